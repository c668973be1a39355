"""What workers make while the device is out of their reach: taken where it goes on from the text there is, refused
where it is another text.

It does not know how a worker is reached again, nor what runs next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from splitwise_llm.engine.account import Run
from splitwise_llm.engine.background import Background
from splitwise_llm.engine.peer import Peer
from splitwise_llm.engine.text import Text
from splitwise_llm.wire.messages import Away, Halt, Halted


@dataclass(slots=True)
class Meanwhile:
    """Tokens of one session that come late. Workers say them at any time; they are taken between two runs."""

    names: tuple[str, ...]
    vocab_size: int
    peers: dict[int, Peer]
    text: Text
    background: Background
    runs: Sequence[Run]
    """So far."""
    tell: Callable[[str, str], None]
    said: dict[int, Away] = field(default_factory=dict)
    """By worker, what it made that is not in the text there is; of what it says twice the later."""

    def hear(self, number: int, away: Away) -> bool:
        """A worker is back, and says what it made; whether that is more than the text there is, or another."""
        is_news = parting(self.text.ids, away, self.vocab_size) is not None or bool(self._late(away))
        self.said.pop(number, None)
        if is_news:
            self.said[number] = away
        return is_news

    def _late(self, away: Away) -> list[int]:
        """What follows the text there is."""
        return away.ids[max(len(self.text.ids) - away.start, 0) :]

    async def take(self) -> int | None:
        """Take what one worker made; its number, or None once nobody made anything that could be taken. Who made
        another text is told where they part. Raises PeerError."""
        while self.said:
            number, away = self.said.popitem()
            keep = parting(self.text.ids, away, self.vocab_size)
            if keep is not None:
                if self.peers[number].is_open:
                    await self.peers[number].ask(Halt(away.run, keep=keep), Halted, away.run)
            elif late := self._late(away):
                await self._add(number, away.run, late)
                return number
        return None

    async def _add(self, number: int, run: int, tokens: Sequence[int]) -> None:
        """As many of them as the answer still wants; a run that has ended here made them after all."""
        for what in ("move", "shadow"):  # both fill for the text as it was
            await self.background.stop(what)
        before = self.text.count
        for token in tokens:
            if not self.text.is_over:
                self.text.add(token)
        count = self.text.count - before
        for one in self.runs:
            if one.extent.run == run:
                one.made_late(count)
        self.tell("caught-up", f"{count} tokens that {self.names[number]} made meanwhile")


def parting(ids: Sequence[int], away: Away, vocab_size: int) -> int | None:
    """The position from which on what a worker made is another text than these ids; None where one of the two goes on
    from the other. What is no text at all, as it begins behind them or with ids that are no words, parts at their end.
    """
    both = zip(ids[away.start :], away.ids, strict=False)
    differs = next((n for n, (mine, other) in enumerate(both) if mine != other), None)
    if differs is not None:
        return away.start + differs
    return len(ids) if away.start > len(ids) or max(away.ids) >= vocab_size else None
