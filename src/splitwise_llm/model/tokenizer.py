"""Text to token ids and back, by the `tokenizers` library; streamed text never splits a character."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from splitwise_llm.errors import ModelError

_UNFINISHED = "\ufffd"


class Tokenizer:
    """The tokenizer of a model directory. Raises ModelError when there is none."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{directory} has no tokenizer.json; it is needed to read a prompt")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} is no tokenizer: {error}") from error

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """Turns ids that arrive one by one into pieces of text whose concatenation is the whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """What is left at the end, unfinished characters included."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._shown = text
        return piece
