"""Recorded requests: when they arrived and how long they were; it knows no prompts, no model and no clock.

| format | a line | from |
| --- | --- | --- |
| CSV with the columns of `AZURE_COLUMNS` | date, time (UTC if it names no zone, cut to 1 us), tokens, tokens | Azure |
| JSON lines with the fields of `MOONCAKE_FIELDS` | milliseconds, tokens, tokens; other fields are not read | Mooncake |

The format is told by the content; a file may be gzipped; empty lines do not count. Lines are in order of time,
and a long silence between two of them is a silence. Mooncake's clock ticks every 3 s: its requests come in batches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Self

from splitwise_llm.errors import SpecError
from splitwise_llm.traces import recorded_text

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length")
MOST_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request: when it came, how many tokens it brought and how many were generated for it."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Requests in order of arrival, from 0 to `duration_s`; at least one token in and one out of each.

    Put end to end, copies of a trace keep its mean rate. Raises SpecError when that is not so.
    """

    requests: tuple[RecordedRequest, ...] = field(repr=False)
    duration_s: float

    def __post_init__(self) -> None:
        if not 0 < self.duration_s < math.inf:
            raise SpecError(f"a request trace of {self.duration_s} s cannot be; give a duration above 0")
        arrivals_s = (0.0, *(request.arrival_s for request in self.requests))
        if not all(before_s <= after_s <= self.duration_s for before_s, after_s in pairwise(arrivals_s)):
            raise SpecError("the requests of a trace are in order of arrival, from 0 to its duration")
        if any(request.prompt_tokens < 1 or request.output_tokens < 1 for request in self.requests):
            raise SpecError("a request has at least one token of prompt and one of output")

    @property
    def mean_per_s(self) -> float:
        """Requests per second."""
        return len(self.requests) / self.duration_s

    def thin(self, every: int, first: int = 0) -> Self:
        """Every `every`-th request, from number `first` on, at its own time: the rate falls, silences stay."""
        if every < 1 or not 0 <= first < every:
            raise SpecError(f"every {every} from {first} is no thinning: every is 1 or more, first from 0 to every - 1")
        return replace(self, requests=self.requests[first::every])

    def scale_time(self, factor: float) -> Self:
        """The same requests, `factor` times as far apart: 10 makes a tenth of the rate."""
        if not 0 < factor < math.inf:
            raise SpecError(f"time cannot be scaled by {factor}; give a factor above 0, as in 10")
        slower = (replace(request, arrival_s=request.arrival_s * factor) for request in self.requests)
        return replace(self, requests=tuple(slower), duration_s=self.duration_s * factor)

    def clip(self, max_prompt: int, max_output: int) -> Self:
        """The same requests, the longer ones cut down to what a model can take; none is dropped."""
        if max_prompt < 1 or max_output < 1:
            raise SpecError(
                f"requests cannot be cut down to {max_prompt} + {max_output} tokens; give 1 or more of each"
            )
        shorter = (
            replace(
                request,
                prompt_tokens=min(request.prompt_tokens, max_prompt),
                output_tokens=min(request.output_tokens, max_output),
            )
            for request in self.requests
        )
        return replace(self, requests=tuple(shorter))

    def window(self, start_s: float, stop_s: float) -> Self:
        """What arrived from `start_s` on and before `stop_s`, with `start_s` as the new 0; perhaps nothing."""
        if not 0 <= start_s < stop_s <= self.duration_s:
            raise SpecError(
                f"from {start_s} to {stop_s} s is no part of a trace of {self.duration_s} s; give 0 <= start < stop <= "
                "its duration"
            )
        inside = (
            replace(request, arrival_s=request.arrival_s - start_s)
            for request in self.requests
            if start_s <= request.arrival_s < stop_s
        )
        return replace(self, requests=tuple(inside), duration_s=stop_s - start_s)


def read_requests(path: str | Path) -> RequestTrace:
    """The requests in a file, plain or gzipped; the first arrives at 0, and a mean gap follows the last.

    Raises SpecError, naming file, line and remedy, when there is no such file or it is no request trace.
    """
    return parse_requests(recorded_text(path), name=str(path))


def parse_requests(text: str, name: str = "requests") -> RequestTrace:
    """The requests in the text of a file; `name` is for messages. Raises SpecError as `read_requests` does."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise SpecError(f"{name}: is empty; a request trace has two requests at least")
    rows = _json_lines(lines, name) if lines[0][1].startswith("{") else _csv(lines, text, name)
    numbered = list(rows)
    for (_, before), (number, after) in pairwise(numbered):
        if after.arrival_s < before.arrival_s:
            back_s = before.arrival_s - after.arrival_s
            raise SpecError(f"{name}:{number}: time goes back by {back_s:.6g} s; sort the file or cut it here")
    first_s, last_s = (numbered[place][1].arrival_s for place in (0, -1)) if numbered else (0.0, 0.0)
    if first_s == last_s:
        raise SpecError(f"{name}: {len(numbered)} requests at one time tell no rate; give two at least, at two times")
    from_0 = (replace(request, arrival_s=request.arrival_s - first_s) for _, request in numbered)
    return RequestTrace(tuple(from_0), (last_s - first_s) * len(numbered) / (len(numbered) - 1))


def _csv(lines: Sequence[tuple[int, str]], text: str, name: str) -> Iterator[tuple[int, RecordedRequest]]:
    header = [word.strip() for word in lines[0][1].split(",")]
    missing = [column for column in AZURE_COLUMNS if column not in header]
    if missing:
        raise SpecError(
            f"{name}:{lines[0][0]}: {lines[0][1][:60]!r} begins no known request trace: expected a CSV header with "
            f"{', '.join(AZURE_COLUMNS)}, or JSON lines with {', '.join(MOONCAKE_FIELDS)}"
        )
    when, prompt, output = (header.index(column) for column in AZURE_COLUMNS)
    if not text.endswith(("\n", "\r")):
        raise SpecError(
            f"{name}:{lines[-1][0]}: the last line has no end, so its last figure may be cut off; fetch the file "
            "again, or add the end of the line if it is whole"
        )
    begin: datetime | None = None
    for number, line in lines[1:]:
        words = [word.strip() for word in line.split(",")]
        if len(words) != len(header):
            raise SpecError(
                f"{name}:{number}: {len(words)} fields where the header has {len(header)}; is the file truncated? "
                "fetch it again, or drop the line"
            )
        try:
            at = datetime.fromisoformat(words[when])
        except ValueError as error:
            raise SpecError(f"{name}:{number}: {words[when]!r} is no date and time; mend or drop the line") from error
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        begin = begin or at
        tokens = (_tokens(words[place], header[place], f"{name}:{number}") for place in (prompt, output))
        yield number, RecordedRequest((at - begin).total_seconds(), *tokens)


def _json_lines(lines: Sequence[tuple[int, str]], name: str) -> Iterator[tuple[int, RecordedRequest]]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SpecError(
                f"{name}:{number}: no whole JSON object ({error}); is the file truncated? fetch it again, "
                "or drop the line"
            ) from error
        missing = [key for key in MOONCAKE_FIELDS if key not in row] if isinstance(row, dict) else MOONCAKE_FIELDS
        if missing:
            raise SpecError(f"{name}:{number}: has no {', '.join(missing)}; mend or drop the line")
        time_ms, *tokens = (row[key] for key in MOONCAKE_FIELDS)
        if not isinstance(time_ms, int | float) or not 0 <= time_ms < 1e15:
            raise SpecError(f"{name}:{number}: timestamp {time_ms!r} is no time in ms; mend or drop the line")
        counts = (
            _tokens(count, key, f"{name}:{number}") for count, key in zip(tokens, MOONCAKE_FIELDS[1:], strict=True)
        )
        yield number, RecordedRequest(time_ms / 1e3, *counts)


def _tokens(given: object, what: str, place: str) -> int:
    """A count from the text of a CSV field, or from a number in JSON."""
    count = int(given) if isinstance(given, str) and given.isdecimal() and len(given) <= 10 else given
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TOKENS:
        raise SpecError(f"{place}: {what} {given!r} is no number of tokens of 1 or more; mend or drop the line")
    return count
