"""Numbered lines of a recording: what the formats share; which formats there are is not known here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import groupby, pairwise
from statistics import median
from typing import Literal

from splitwise_llm.errors import SpecError

Direction = Literal["up", "down"]
Gaps = Literal["refuse", "cut"]
Lines = list[tuple[int, str]]  # (line number from 1, stripped text)

LONGEST_GAP_S = 10.0
"""A longer step between two rows is a pause of the recorder, if it is over ten median steps, too."""
SORT_OR_CUT = "sort the file or cut it here"
LEAVE_OUT = (
    'read the file with gaps="cut" to leave such pauses out (where a link is described, write FILE:cut; for a folder '
    "of recordings give --cut-gaps)"
)


class LineError(SpecError):
    """What is wrong with one line; whoever knows the file says its name."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Pause(LineError):
    """The recorder paused before this line; the message says from when to when, and no remedy."""


class GapError(SpecError):
    """A recording of which a stretch is unknown. `where` is the file, the line and the stretch, without a remedy."""

    def __init__(self, where: str) -> None:
        super().__init__(f"{where}; {LEAVE_OUT}, or add a line that says what was in between")
        self.where = where


def known_column(names: list[str], known: Iterable[str], what: str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise SpecError(
            f"no {what} among the columns {', '.join(names)[:200]}; known are {', '.join(known)}; "
            "ask for the other direction, or write two columns, `time_s Mbit/s`"
        )
    return found


def run_lists(lines: Lines) -> list[Lines]:
    """The lists of each run, one at least."""
    heads = [place for place, (_, line) in enumerate(lines) if line.startswith("Run ")]
    for start, end in pairwise([*heads, len(lines)]):
        if end == start + 1:
            raise LineError(lines[start][0], "a run without a list; is the file truncated?")
    return [lines[start + 1 : end] for start, end in pairwise([*heads, len(lines)])]


def laid_out(
    numbers: Sequence[int], times_s: Sequence[float], gaps: Gaps, step_s: float | None = None
) -> tuple[tuple[float, ...], float]:
    """Starts from 0 on, and the period, of rows at times that do not fall.

    A row lasts until the next time, the last one and one before a pause that is cut for the median step (for
    `step_s` if there is no step); rows of the same time, from a clock that is coarser than the rows, share it.
    """
    stamps = [(stamp_s, len(list(rows))) for stamp_s, rows in groupby(times_s)]
    steps_s = [after_s - before_s for (before_s, _), (after_s, _) in pairwise(stamps)]
    if steps_s:
        step_s = median(steps_s)
    elif step_s is None:
        raise SpecError(
            f"{len(times_s)} rows do not tell how long a row lasts; a trace has two at least, at rising times"
        )
    longest_s = max(LONGEST_GAP_S, 10 * step_s)
    starts_s: list[float] = []
    cut_s = 0.0
    for (stamp_s, rows), lasts_s in zip(stamps, [*steps_s, step_s], strict=True):
        begin_s = stamp_s - times_s[0] - cut_s
        if lasts_s > longest_s:
            if gaps == "refuse":
                raise Pause(
                    numbers[len(starts_s) + rows],
                    f"nothing is known from {stamp_s - times_s[0]:.6g} s after the first row to "
                    f"{stamp_s - times_s[0] + lasts_s:.6g} s (the median step is {step_s:.3g} s)",
                )
            cut_s += lasts_s - step_s
            lasts_s = step_s  # noqa: PLW2901
        starts_s += (begin_s + lasts_s * row / rows for row in range(rows))
    return tuple(starts_s), times_s[-1] - times_s[0] - cut_s + step_s


def figure(number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise LineError(number, f"{text!r} is not a number; mend or drop the line") from error


def parse_s(number: int, text: str, read: Callable[[str], float] = float) -> float:
    try:
        time_s = read(text)
        if math.isfinite(time_s):
            return time_s
    except ValueError:
        pass
    raise LineError(number, f"{text!r} is not a time; mend or drop the line")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def since_epoch(when: datetime) -> float:
    return (when.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
