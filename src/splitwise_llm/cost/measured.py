"""What was measured on a machine, as seconds of the pieces of one model: a table, and straight lines between.

It knows no clock and no tensor; `splitwise profile` writes the tables it reads.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

from splitwise_llm.cost.counts import units_in
from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.partition import Part
from splitwise_llm.spec import Dtype, ModelSpec, Weights


class HalfPoint(NamedTuple):
    """`units` units of a half layer over `rows` positions, the last of which sees `context`."""

    part: Part
    units: int
    rows: int
    context: int
    rested: bool
    seconds: float


class RowsPoint(NamedTuple):
    """Something that a step of `rows` positions does once."""

    rows: int
    rested: bool
    seconds: float


class BatchPoint(NamedTuple):
    """One position of each of `batch` sequences, computed together after a rest: one whole half layer of each kind,
    and what the stage does besides."""

    batch: int
    attention_s: float
    ffn_s: float
    stage_s: float


class SizePoint(NamedTuple):
    """One end's software time of a message with a payload of so many bytes."""

    num_bytes: int
    seconds: float


Line = tuple[tuple[float, ...], tuple[float, ...]]
"""Where it was measured, ascending, and what: seconds that never fall."""


@dataclass(frozen=True)
class Measured:
    """Seconds of the pieces of one model on one machine, with weights in one form: a `hosts.UnitTimes`.

    Between points it goes straight, first in context, then in rows, then in units; seconds never fall where one
    of them rises (noise that says otherwise is levelled by a running maximum). Below the first point it is
    flat, above the last it rises as between the last two. A machine has *rested* when it waited for others since
    its last step: other things are in its caches then. Points of more than one row hold in both states where they
    were measured in one. A batch takes what its first sequence takes alone, and what `batches` say that the others
    add; where no batch was measured, their rows count as one sequence's.

    Raises SpecError for points that cannot be, or too few.
    """

    model: ModelSpec
    dtype: Dtype
    weights: Weights
    threads: int
    halves: tuple[HalfPoint, ...]
    head: tuple[RowsPoint, ...]
    stage: tuple[RowsPoint, ...]
    message: tuple[SizePoint, ...]
    here_s: float
    """What asking for a computation costs where it runs on the thread that asks."""
    thread_s: float
    """The same where it runs on the compute thread."""
    source: str
    batches: tuple[BatchPoint, ...] = ()
    """Ascending, from one sequence on."""
    token_s: float = 0.0
    """What a token loop does on the device between two steps; 0 in files from before it was measured."""

    def __post_init__(self) -> None:
        seconds = [point[-1] for table in (self.halves, self.head, self.stage, self.message) for point in table]
        seconds += [value for point in self.batches for value in point[1:]]
        for value in (*seconds, self.here_s, self.thread_s, self.token_s):
            if not (math.isfinite(value) and value >= 0):
                raise SpecError(f"a measured time is {value} s; expected 0 or more")
        batches = [point.batch for point in self.batches]
        if batches and (batches[0] != 1 or batches != sorted(set(batches))):
            raise SpecError(f"batches of {batches} sequences were measured; expected 1 and then more each time")
        for half in self.halves:
            most = units_in(self.model, half.part)
            if not (1 <= half.units <= most and 1 <= half.rows <= half.context):
                raise SpecError(
                    f"a measured half has {half.units} units, {half.rows} rows and context {half.context}; expected 1 "
                    f"to {most} units, and a context of at least the rows"
                )
        for part in Part:
            if not any(h.part is part and h.units == units_in(self.model, part) and h.rows == 1 for h in self.halves):
                raise SpecError(f"no decode step (one row) of a whole {part} half was measured; measure again")
        if not (self.head and self.stage and self.message):
            raise SpecError("the head, the stages or the messages were not measured; measure again")

    # What a host asks

    def half_s(self, part: Part, units: int, rows: int, context: int, rested: bool, batch: int = 1) -> float:
        if batch > 1 and not self.batches:
            rows, batch = batch * rows, 1
        key = (part, units, rows, context, rested)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._half_s(*key)
        if batch > 1:
            found += (
                rows * units / units_in(self.model, part) * self._added_s(1 if part is Part.ATTENTION else 2, batch)
            )
        return found

    def head_s(self, rows: int, rested: bool) -> float:
        return _on(_rows_line(self.head, rested), rows)

    def stage_s(self, rows: int, rested: bool, batch: int = 1) -> float:
        if batch > 1 and not self.batches:
            rows, batch = batch * rows, 1
        return _on(_rows_line(self.stage, rested), rows) + self._added_s(3, batch)

    def _added_s(self, column: int, batch: int) -> float:
        """What the other sequences of a batch add to the first one's time."""
        if batch == 1:
            return 0.0
        line = _line({point.batch: point[column] for point in self.batches})
        return _on(line, batch) - line[1][0]

    def call_s(self, threaded: bool) -> float:
        return self.thread_s if threaded else self.here_s

    def message_s(self, num_bytes: float) -> float:
        return _on(_line({point.num_bytes: point.seconds for point in self.message}), num_bytes)

    def _half_s(self, part: Part, units: int, rows: int, context: int, rested: bool) -> float:
        levels = self._levels[part, rested] or self._levels[part, not rested]
        by_units = {
            level: _on(_line({r: _on(line, context) for r, line in by_rows.items()}), rows)
            for level, by_rows in levels.items()
        }
        return _on(_line(by_units), units)

    @cached_property
    def _known(self) -> dict[tuple[Part, int, int, int, bool], float]:
        return {}

    @cached_property
    def _levels(self) -> dict[tuple[Part, bool], dict[int, dict[int, Line]]]:
        """By part and rest, then units, then rows: a line over contexts."""
        points: dict[tuple[Part, bool], dict[int, dict[int, dict[int, float]]]] = {
            (part, rested): defaultdict(lambda: defaultdict(dict)) for part in Part for rested in (False, True)
        }
        for half in self.halves:
            points[half.part, half.rested][half.units][half.rows][half.context] = half.seconds
        for half in self.halves:
            if half.rows > 1:
                points[half.part, not half.rested][half.units][half.rows].setdefault(half.context, half.seconds)
        return {
            key: {units: {rows: _line(by) for rows, by in by_rows.items()} for units, by_rows in by_units.items()}
            for key, by_units in points.items()
        }

    # Several at a time, and files

    @classmethod
    def between(cls, first: Measured, second: Measured, share: float = 0.5) -> Self:
        """Point by point between two measurements of the same things, `share` of the way to the second."""

        def mixed(a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, ...]:
            later = {point[:-1]: point[-1] for point in b}
            return tuple(
                point._replace(seconds=point[-1] + share * (later.get(point[:-1], point[-1]) - point[-1]))
                for point in a
            )

        if (first.model, first.dtype, first.weights) != (second.model, second.dtype, second.weights):
            raise SpecError("two measurements of different models, or of different forms of one, have no mean")
        return cls(
            first.model, first.dtype, first.weights, first.threads,
            mixed(first.halves, second.halves), mixed(first.head, second.head),
            mixed(first.stage, second.stage), mixed(first.message, second.message),
            first.here_s + share * (second.here_s - first.here_s),
            first.thread_s + share * (second.thread_s - first.thread_s),
            first.source,
            tuple(_between(a, b, share) for a, b in zip(first.batches, second.batches, strict=True)),
            first.token_s + share * (second.token_s - first.token_s),
        )  # fmt: skip

    def to_json(self) -> str:
        """As `from_file` reads it; one point a line."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TABLES}
        head = json.dumps(plain | {"model": asdict(self.model)}, indent=1)[:-2]
        tables = ",\n".join(
            f' "{name}": [\n  ' + ",\n  ".join(json.dumps(point) for point in getattr(self, name)) + "\n ]"
            for name in _TABLES
        )
        return f"{head},\n{tables}\n}}\n"

    @classmethod
    def from_file(cls, path: str | Path, model: ModelSpec | None = None) -> Self:
        """Read what `to_json` wrote; `model` is what it must have been measured on. Raises SpecError."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SpecError(f"{path} cannot be read as JSON ({error}); is it complete? Measure again if not") from error
        try:
            found = cls._of(data)
        except (KeyError, TypeError, ValueError, AttributeError, ModelError) as error:
            raise SpecError(
                f"{path} is no table of measured units ({error!r}); expected what `splitwise profile` writes"
            ) from error
        except SpecError as error:
            raise SpecError(f"{path}: {error}") from error
        if model is not None:
            found.check(model, path)
        return found

    @classmethod
    def _of(cls, data: Mapping[str, Any]) -> Self:
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise KeyError(f"unknown {min(unknown)}")
        return cls(
            ModelSpec(**data["model"]),
            Dtype(data["dtype"]),
            Weights(data["weights"]),
            int(data["threads"]),
            tuple(HalfPoint(Part(p), int(u), int(r), int(c), bool(w), float(s)) for p, u, r, c, w, s in data["halves"]),
            tuple(RowsPoint(int(r), bool(w), float(s)) for r, w, s in data["head"]),
            tuple(RowsPoint(int(r), bool(w), float(s)) for r, w, s in data["stage"]),
            tuple(SizePoint(int(n), float(s)) for n, s in data["message"]),
            float(data["here_s"]),
            float(data["thread_s"]),
            str(data["source"]),
            tuple(BatchPoint(int(n), *(float(s) for s in rest)) for n, *rest in data.get("batches", ())),
            float(data.get("token_s", 0.0)),
        )

    def check(self, model: ModelSpec, where: str | Path = "the table") -> None:
        """Raise SpecError, with the first size that differs, unless it was measured on a model of these sizes."""
        for field in fields(ModelSpec):
            mine, wanted = getattr(self.model, field.name), getattr(model, field.name)
            if mine != wanted:
                raise SpecError(
                    f"{where} was measured on another model: its {field.name} is {mine}, this one's {wanted}; "
                    "run `splitwise profile` with this --model"
                )


_TABLES = ("halves", "head", "stage", "message", "batches")


def _between(first: BatchPoint, second: BatchPoint, share: float) -> BatchPoint:
    return BatchPoint(first.batch, *(a + share * (b - a) for a, b in zip(first[1:], second[1:], strict=True)))


def _rows_line(points: Sequence[RowsPoint], rested: bool) -> Line:
    """The line of one state; of the other where that was never measured."""
    both = {point.rows: point.seconds for point in points if point.rows > 1}
    mine = {point.rows: point.seconds for point in points if point.rested == rested}
    return _line(both | mine or {point.rows: point.seconds for point in points})


def _line(points: Mapping[int, float]) -> Line:
    places = tuple(sorted(points))
    return places, tuple(accumulate((points[place] for place in places), max))


def _on(line: Line, x: float) -> float:
    """Straight between points, flat before the first, with the last slope beyond the last."""
    places, values = line
    if x <= places[0] or len(places) == 1:
        return values[0]
    right = min(bisect_right(places, x), len(places) - 1)
    left = right - 1
    slope = (values[right] - values[left]) / (places[right] - places[left])
    return values[left] + slope * (x - places[left])
