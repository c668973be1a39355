"""The fault matrix as data: which fault, in which way of running, at which moment, and what came of it.

It starts nothing and breaks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import product

from splitwise_llm.partition import Partition
from splitwise_llm.records import Event, RequestRecord, RunRecord
from splitwise_llm.wire.faults import Fault


class Mode(StrEnum):
    """How the model is spread over the device and the worker; the names of `demo_partitions`."""

    CUT = "cut"
    U = "U"
    SHARED = "shared"
    CLOUD = "cloud"


class Moment(StrEnum):
    """When the fault strikes."""

    PREFILL = "prefill"
    FIRST = "first token"
    MID = "mid"
    LAST = "last token"

    def tokens(self, of: int) -> int:
        """So many tokens have come by then; `of` come in all."""
        return {Moment.PREFILL: 0, Moment.FIRST: 1, Moment.MID: of // 2, Moment.LAST: of - 1}[self]


class Scene(StrEnum):
    """Who else is there."""

    ALONE = "alone"
    CROWD = "eight sessions"
    """Seven other sessions of the same kind on the same worker, over the same link: all have to get over it."""
    PIPELINE = "three machines"
    """The worker hands on to a second one, over a direct link. The fault is of the first worker, or of its link."""


OTHERS = 7
"""Sessions beside the one that is looked at, in a crowd."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One generation with one fault."""

    fault: Fault
    mode: Mode
    moment: Moment
    spare: bool = False
    """Whether another worker could take the lost one's place."""
    drafting: bool = False
    """Whether tokens are drafted, by lookup."""
    scene: Scene = Scene.ALONE

    @property
    def row(self) -> str:
        """The fault, and what is special besides."""
        said = (
            "a spare there" if self.spare else "", "drafting" if self.drafting else "",
            "" if self.scene is Scene.ALONE else self.scene,
        )  # fmt: skip
        return ", ".join([self.fault, *filter(None, said)])

    @property
    def name(self) -> str:
        """For people and, blanks apart, for files."""
        special = (
            "+spare" * self.spare, "+drafting" * self.drafting,
            "" if self.scene is Scene.ALONE else f"+{self.scene}",
        )  # fmt: skip
        return f"{self.fault}{''.join(special)}/{self.mode}/{self.moment}".replace(" ", "-")


BREAKS = frozenset(
    {
        Fault.CONNECT_REFUSED, Fault.RESET, Fault.DROP_UP, Fault.DROP_DOWN, Fault.DROP_BOTH, Fault.WORKER_KILLED,
        Fault.WORKER_RESTARTED, Fault.WORKER_OUT_OF_MEMORY,
    }
)  # fmt: skip
"""What a run cannot survive. A corrupted bit may fall where nobody looks; a crawl or a spike may be short enough."""


def all_cells() -> tuple[Cell, ...]:
    """Every fault in every way of running at every moment; a killed worker with and without a spare one."""
    rows = [(fault, False) for fault in Fault] + [(Fault.WORKER_KILLED, True)]
    return tuple(Cell(fault, mode, moment, spare) for (fault, spare), mode, moment in product(rows, Mode, Moment))


def drafted_cells() -> tuple[Cell, ...]:
    """Every fault in every way of running in the middle of the answer, while tokens are drafted."""
    return tuple(replace(cell, drafting=True) for cell in all_cells() if cell.moment is Moment.MID)


STRIKING = (Fault.WORKER_KILLED, Fault.RESET, Fault.DROP_BOTH, Fault.CRAWL, Fault.CORRUPT)
"""Faults that are tried with others on the worker, and in a pipeline."""


def crowded_cells() -> tuple[Cell, ...]:
    """Some faults with eight sessions on the worker, and in a row of three machines; with and without drafting."""
    scenes = [(Scene.CROWD, mode) for mode in (Mode.CUT, Mode.CLOUD)]
    scenes += [(Scene.PIPELINE, mode) for mode in (Mode.CUT, Mode.U)]
    return tuple(
        Cell(fault, mode, Moment.MID, drafting=drafting, scene=scene)
        for (scene, mode), fault, drafting in product(scenes, STRIKING, (False, True))
    )


def pairwise(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """A fourth of all cells in which each two of fault, mode and moment meet: a Latin square for each fault, shifted
    from one to the next. In half of them, of each fault, way and moment, tokens are drafted."""
    rows = list(dict.fromkeys(cell.row for cell in cells))
    modes, moments = list(Mode), list(Moment)
    return tuple(
        replace(cell, drafting=(modes.index(cell.mode) // 2 + rows.index(cell.row) // 4) % 2 == 0)
        for cell in cells
        if (modes.index(cell.mode) + moments.index(cell.moment) + rows.index(cell.row)) % len(moments) == 0
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a cell."""

    cell: str
    fired: bool
    identical: bool
    """The ids of the undisturbed run, each of them told once and in order."""
    told: str
    """What the record should say and does not; empty: it says what happened."""
    error: str
    """What ended the generation; empty if it was complete."""
    took_s: float
    extra_tokens: int = 0
    """Computed again beyond what the machine that lost its cache must rebuild."""
    inapplicable: str = ""
    """Why the cell says nothing."""
    events: tuple[tuple[float, str, str], ...] = ()
    runs: tuple[tuple[int, str, int, int, int, str, str], ...] = ()
    """(number, partition, start, known, tokens, why, ended)."""

    @property
    def is_well(self) -> bool:
        return bool(self.inapplicable) or (self.fired and self.identical and not self.told and not self.error)

    @property
    def verdict(self) -> str:
        """A word for the table."""
        if self.inapplicable:
            return "n/a"
        if self.is_well:
            return "same"
        return "ended" if self.error else "TEXT" if not self.identical else "no fault" if not self.fired else "untold"

    def to_dict(self) -> dict[str, object]:
        """Plain data; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Outcome:
        """Raises TypeError for what `to_dict` did not write."""
        plain = dict(data)
        for name in ("events", "runs"):
            rows = plain[name]
            if not isinstance(rows, list | tuple):
                raise TypeError(f"{name} is no list of rows")
            plain[name] = tuple(tuple(row) for row in rows)
        return cls(**plain)  # type: ignore[arg-type]


def told_events(events: Iterable[Event]) -> tuple[tuple[float, str, str], ...]:
    """Events as an outcome keeps them."""
    return tuple((round(event.at_s, 4), event.kind, event.text) for event in events)


def told_runs(runs: Iterable[RunRecord]) -> tuple[tuple[int, str, int, int, int, str, str], ...]:
    """Runs as an outcome keeps them."""
    return tuple((r.run, r.partition, r.start, r.known, r.tokens, r.why, r.ended) for r in runs)


def untold(cell: Cell, record: RequestRecord) -> str:
    """What the record of a cell leaves out; empty if it says what happened."""
    kinds = {event.kind for event in record.events}
    broke = any(run.ended for run in record.runs)
    early = cell.moment is not Moment.LAST and not (cell.mode is Mode.CLOUD and cell.fault is Fault.DROP_UP)
    # at the last token, and of the uplink while the cloud makes all tokens, the answer may be complete before it shows
    if cell.fault in BREAKS and early and not broke:
        return "no run ended early"
    if broke and not kinds & {"fault", "retry"}:
        return "a run ended early, and there is no event of a fault"
    if broke and not record.is_degraded:
        return "a run ended early, and the record does not say degraded"
    if cell.fault is Fault.JOURNAL_DISK_FULL and not ("journal" in kinds and record.is_degraded):
        return "the journal is not kept any more, and the record does not say so"
    if broke and cell.fault is Fault.CONNECT_REFUSED and "unreached" not in kinds:
        return "no event of an attempt that was refused"
    if broke and cell.fault is Fault.WORKER_KILLED and "failed-over" not in kinds:
        return "no event of the failover"
    if broke and cell.fault is Fault.WORKER_RESTARTED and "back" not in kinds:
        return "no event of the worker's return"
    if (
        broke
        and cell.fault is Fault.WORKER_OUT_OF_MEMORY
        and not any("memory" in e.text.lower() for e in record.events)
    ):
        return "no event names the refusal for want of memory"
    return ""


_FILL = re.compile(r"fill halves ([0-9]+) to ([0-9]+), positions ([0-9]+) to ([0-9]+)")


def extra_tokens(record: RequestRecord, partition: Partition, lost: int) -> int:
    """Positions that were computed again on a machine that had lost nothing, after machine `lost` had: by the history
    of runs, or as the session itself counted them, whichever is more.

    A fill is counted where it runs attention of others than the lost machine, its last half apart, in which only those
    take part who lack it; a run, where it begins before the last
    known id though others than the lost machine have attention. Nothing counts before the first token: of a prefill
    that was broken off, nobody has anything whole.
    """
    keep = [half for half in range(0, 2 * len(partition.layers), 2) if set(partition.owners(half)) != {lost}]
    again = 0
    for run in record.runs[1:]:
        if (fill := _FILL.match(run.why)) is not None:
            first, stop, start, context = map(int, fill.groups())
            again += (context - start) * any(first <= half < stop - 1 for half in keep)
        elif keep and run.known > record.prompt_tokens:
            again += max(run.known - 1 - run.start, 0)
    return max(again, record.recomputed_tokens)
