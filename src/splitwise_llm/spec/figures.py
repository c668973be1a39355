"""JSON files of named figures, the line on which each stands, and what a figure may be; not whose figures they are."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from splitwise_llm.errors import SpecError, UserError


class Page(NamedTuple):
    """A JSON file of named figures, and the line on which each stands, by the names that lead to it."""

    path: Path
    data: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def wrong(self, said: str, *names: str) -> SpecError:
        line = self.lines.get(names)
        return SpecError(f"{self.path}, line {line}: {said}" if line else f"{self.path}: {said}")


def read_json(path: Path, error: type[UserError]) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and the text it was read from. Raises `error` with the line."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not text in UTF-8 ({cause.reason} at byte {cause.start}); expected JSON") from cause
    except (OSError, ValueError) as cause:
        said = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"{path} cannot be read: {said}; check the path and its permissions") from cause
    if not text.strip():
        raise error(f"{path} is empty; expected a JSON object of named figures")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as cause:
        cut = cause.pos >= len(text.rstrip()) or cause.msg.startswith("Unterminated")
        said = "the file ends in the middle; is it complete?" if cut else f"{cause.msg} at column {cause.colno}"
        raise error(f"{path}, line {cause.lineno}: this is no JSON: {said}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from cause
    if not isinstance(data, dict):
        raise error(f"{path} holds a JSON {type(data).__name__}; expected an object of named figures")
    return data, text


_KEY_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[\[\]{}]')


def read_page(path: Path) -> Page:
    """Read a file of figures. Raises SpecError, also for a name that stands twice in one object."""
    data, text = read_json(path, SpecError)
    page = Page(path, data, {})
    names: list[str] = []
    for token in _KEY_OR_BRACKET.finditer(text):
        if token.group() in ("{", "["):
            names.append("")
        elif token.group() in ("}", "]"):
            names.pop()
        elif token.group(1):
            names[-1] = json.loads(token.group().rstrip(": \t\r\n"))
            where = tuple(names)
            if where in page.lines:
                raise page.wrong(f"{names[-1]} stands a second time below; keep one of the two", *where)
            page.lines[where] = text.count("\n", 0, token.start()) + 1
    return page


class Range(NamedTuple):
    """Figures that may be: from `low` (or only above it) to `high`."""

    low: float
    high: float
    unit: str
    above: bool = False
    whole: bool = False

    @property
    def text(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.low:g} to {self.high:g} {self.unit}"

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


def unknown(kind: str, text: str, names: Sequence[str]) -> str:
    """What to say about a name that is none of these."""
    nearest = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{text!r} is {kind}: {', '.join(names) or 'there are none'}{hint}"
