"""One answer as it grows: tokens go in, into the journal first, and come out in order with their text and time.

It does not know who makes them, nor how.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.walk import Request
from splitwise_llm.model.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it arrived: its id, the text that became certain with it, and when (s after the prompt)."""

    id: int
    text: str
    at_s: float


class Text:
    """`add` tokens until it `is_over`, and `end` it; whoever wants them takes the `next`. `now_s` tells the time since
    the prompt, `came` is told when each token was added."""

    def __init__(
        self,
        journal: Journal,
        request: Request,
        tokenizer: Tokenizer,
        now_s: Callable[[], float],
        came: Callable[[float], None],
    ) -> None:
        self._journal, self._request, self._tokenizer = journal, request, tokenizer
        self._now_s, self._came = now_s, came
        self._tokens: asyncio.Queue[Token | None] = asyncio.Queue()
        self._stream = TextStream(tokenizer)
        self.certain = "".join(self._stream.push(token) for token in journal.tokens)
        """The text that another process's tokens make certain; what they leave open comes with the next token."""

    @property
    def ids(self) -> list[int]:
        """Prompt and tokens so far."""
        return self._journal.ids

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self.ids) - self._request.prompt_tokens

    @property
    def room(self) -> int:
        """Tokens that may follow."""
        return self._request.max_new_tokens - self.count

    @property
    def has_stopped(self) -> bool:
        """Whether it ends with a stop token."""
        return self.count > 0 and self.ids[-1] in self._request.stop_ids

    @property
    def is_over(self) -> bool:
        """Whether no token follows."""
        return self.room <= 0 or self.has_stopped

    @property
    def whole(self) -> str:
        """All of it, in words."""
        return self._tokenizer.decode(list(self._journal.tokens))

    def add(self, token: int) -> None:
        """The next token, whoever made it."""
        self._journal.token(token)
        at_s = self._now_s()
        text = self._stream.push(token)
        if self.is_over:
            text += self._stream.finish()
        self._tokens.put_nowait(Token(token, text, at_s))
        self._came(at_s)

    def end(self) -> None:
        """Whoever takes the tokens waits for no more of them."""
        self._tokens.put_nowait(None)

    async def next(self) -> Token | None:
        """The first that nobody has taken yet, once it is there; None at the end."""
        return await self._tokens.get()
