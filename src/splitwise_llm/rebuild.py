"""What must be done before a generation can go on under another partition: no seconds, no sockets, no tensors.

Machines have keys and values of some units for some positions, and they keep the residual stream of some boundaries.
The rows that a new partition lacks are filled by running a piece of the new plan again from such a boundary (or from
the ids), or are carried from whoever has them. The cost model prices these ways, the engine executes what it chose.

Gaps span different halves. The ways of two gaps neither of which fills the other read and write different halves: they
may be taken in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from splitwise_llm.errors import PartitionError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

Span = tuple[int, int]
"""Positions, first and end."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one machine has of a session."""

    filled: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    """Attention half -> unit -> positions whose keys and values it has, from the front."""
    kept: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    """Half -> the positions for which it has the residual stream that went into this half, as it crossed; in order,
    apart from one another."""

    @classmethod
    def of(cls, filled: Iterable[tuple[int, Iterable[int], int]], kept: Iterable[tuple[int, int, int]] = ()) -> Held:
        """From rows (half, units, positions filled) and (half, first position, end), in any order; the spans of a
        half may touch or overlap."""
        caches: dict[int, dict[int, int]] = {}
        for half, units, positions in filled:
            caches.setdefault(half, {}).update(dict.fromkeys(units, positions))
        spans: dict[int, list[Span]] = {}
        for half, start, stop in sorted(kept):
            known = spans.setdefault(half, [])
            if known and start <= known[-1][1]:
                known[-1] = (known[-1][0], max(stop, known[-1][1]))
            elif start < stop:
                known.append((start, stop))
        return cls(caches, {half: tuple(known) for half, known in spans.items() if known})

    def covered(self, half: int, units: Iterable[int]) -> int:
        """Positions, from the front, that it has of all these units."""
        has = self.filled.get(half, {})
        return min((has.get(unit, 0) for unit in units), default=0)

    def keeps(self, half: int, start: int, stop: int) -> bool:
        """Whether it has the stream that goes into `half` for positions `start` to `stop`."""
        return any(first <= start and stop <= end for first, end in self.kept.get(half, ()))


NOTHING = Held()


@dataclass(frozen=True, slots=True)
class Holdings:
    """What each machine has of a session; who cannot be reached has nothing."""

    machines: tuple[Held, ...]

    @classmethod
    def of(
        cls, partition: Partition, context: int, num_machines: int, direct: Collection[tuple[int, int]] = ()
    ) -> Holdings:
        """After `context` positions under one partition. `direct` names the pairs of workers (either order) with a
        link of their own; what others exchange passes the device, which keeps it too."""
        filled: list[dict[int, Mapping[int, int]]] = [{} for _ in range(num_machines)]
        kept: list[dict[int, tuple[Span, ...]]] = [{} for _ in range(num_machines)]
        for half in range(2 * len(partition.layers)):
            owners = partition.owners(half)
            if half % 2 == 0:
                for machine in set(owners):
                    filled[machine][half] = dict.fromkeys(partition.units_on(machine, half), context)
            for machine in keepers(partition, half, direct):
                kept[machine][half] = ((0, context),)
        return cls(tuple(map(Held, filled, kept)))

    def replaced(self, machine: int, held: Held) -> Holdings:
        """With what one machine has, as it says, in the place of what was thought."""
        return replace(self, machines=(*self.machines[:machine], held, *self.machines[machine + 1 :]))

    def without(self, machine: int) -> Holdings:
        """That machine has lost everything, or cannot be reached."""
        return self.replaced(machine, NOTHING)

    @property
    def holders(self) -> tuple[int, ...]:
        """The machines that have anything."""
        return tuple(machine for machine, held in enumerate(self.machines) if held.filled or held.kept)


def keepers(partition: Partition, half: int, direct: Collection[tuple[int, int]] = ()) -> frozenset[int]:
    """Who keeps the stream that goes into a half under a partition: nobody where the same machines go on; otherwise
    all that have it then: those that add it up or send it, those it is sent to, and the device if it passes it on."""
    if not half or partition.owners(half - 1) is partition.owners(half):
        return frozenset()
    before, after = (sorted(set(partition.owners(h))) for h in (half - 1, half))
    if before == after:
        return frozenset()
    held = [machine for machine in before if machine in after] or before[:1]  # as in `plan.compile`
    keeps = {*held, *after}
    for machine in after:
        if machine not in held and (held[0], machine) not in direct and (machine, held[0]) not in direct:
            keeps.add(DEVICE)
    return frozenset(keeps)


@dataclass(frozen=True, slots=True)
class Fill:
    """Recompute: run halves `first` to `stop` of the new partition again for positions `start` to `context`.

    All machines with units in those halves compute; what they have there of positions from `start` on is cut first.
    """

    first: int
    stop: int
    feeder: int
    """Keeps the stream that goes into half `first`, for all these positions; the device with the ids if that is 0."""
    start: int
    context: int


@dataclass(frozen=True, slots=True)
class Carry:
    """Transfer: `src` sends `dst` the keys and values of positions `start` to `context`; `dst` has those before."""

    src: int
    dst: int
    units: tuple[tuple[int, tuple[int, ...]], ...]
    """(attention half, its units), in order."""
    start: int
    context: int

    @property
    def num_units(self) -> int:
        return sum(len(units) for _, units in self.units)


Way = Fill | tuple[Carry, ...]
"""How a gap is closed."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Neighbouring attention halves of a partition in which the same machines lack positions, and how to close it."""

    partition: Partition
    machines: tuple[int, ...]
    """Who lacks something, whoever lacks the most first."""
    start: int
    """The first half in which something is lacking."""
    fill: Fill
    """It begins at `start` or before, where the stream is known, and ends with the last half that lacks something."""
    carries: tuple[Carry, ...]
    """None where some lacking row is nowhere."""

    def fills(self, other: Gap) -> bool:
        """Whether its fill closes the other gap, too: it lies between the last known stream and this gap."""
        return self.fill.first <= other.start < self.fill.stop


def gaps(holdings: Holdings, new: Partition, context: int) -> tuple[Gap, ...]:
    """What to do so that every machine has its units of `new` for positions 0 to `context`, in the order of halves.

    Each lacking half is filled from the last kept boundary before it, so that the fewest halves are run again. Where
    there is none between two gaps, the later one's fill contains the earlier one's (`Gap.fills`), and closes both. Two
    gaps that one machine can close in one go, and for the second of which it would have to be sent a boundary, are
    one. Raises PartitionError for machines the holdings do not know.
    """
    if new.machines[-1] >= len(holdings.machines):
        raise PartitionError(
            f"the partition uses machine {new.machines[-1]}, but holdings of only {len(holdings.machines)} are known"
        )
    covered = {half: _covered(holdings, new, half, context) for half in range(0, 2 * len(new.layers), 2)}
    runs: list[tuple[int, frozenset[int], Fill]] = []  # first lacking half, who lacks something
    for half, positions in covered.items():
        if positions == context:
            continue
        fill = _fill(holdings, new, covered, half, context)
        who = frozenset(machine for machine, _, _ in _lacking(holdings, new, half, context))
        goes_on = runs and runs[-1][1] == who and runs[-1][2].stop == half - 1 and who <= set(new.owners(half - 1))
        if goes_on and fill.first < half - 1:
            runs[-1] = (runs[-1][0], who, fill)
        else:
            runs.append((half, who, fill))
    for number in reversed(range(1, len(runs))):
        if _in_one_go(new, [fill for _, _, fill in runs], number):
            start, who, fill = runs[number - 1]
            runs[number - 1 : number + 1] = [(start, who, replace(fill, stop=runs[number][2].stop))]
    return tuple(_gap(holdings, new, start, fill) for start, _, fill in runs)


def written(way: Way, new: Partition) -> frozenset[tuple[int, int]]:
    """The (machine, attention half) whose keys and values are cut or written when a gap of `new` is closed so."""
    if isinstance(way, Fill):
        halves = range(way.first + way.first % 2, way.stop, 2)
        return frozenset((machine, half) for half in halves for machine in new.owners(half))
    return frozenset((carry.dst, half) for carry in way for half, _ in carry.units)


def in_background(gap: Gap, running: Partition, way: Way | None = None) -> bool:
    """Whether a gap may be closed (by its fill unless another way is given) while `running` goes on: no machine has
    keys and values cut or written in a half in which that run uses some of its own."""
    return not any(
        machine in running.owners(half) for machine, half in written(gap.fill if way is None else way, gap.partition)
    )


def _covered(holdings: Holdings, new: Partition, half: int, context: int) -> int:
    """Positions that all owners of an attention half have of their units."""
    return min(
        min(holdings.machines[machine].covered(half, new.units_on(machine, half)), context)
        for machine in set(new.owners(half))
    )


def _fill(holdings: Holdings, new: Partition, covered: Mapping[int, int], last: int, context: int) -> Fill:
    """The shortest one that ends with half `last`."""
    first, start = last, covered[last]
    while first:
        feeder = _feeder(holdings, new, first, start, context)
        if feeder is not None:
            return Fill(first, last + 1, feeder, start, context)
        first -= 1
        start = min(start, covered.get(first, start))
    return Fill(0, last + 1, DEVICE, start, context)


def _feeder(holdings: Holdings, new: Partition, half: int, start: int, stop: int) -> int | None:
    """Who feeds a fill: of those that keep the stream an owner of the half, else the device, else the first."""
    keep = [machine for machine, held in enumerate(holdings.machines) if held.keeps(half, start, stop)]
    owners = new.owners(half)
    return min(keep, key=lambda machine: (machine not in owners, machine), default=None)


def _in_one_go(new: Partition, fills: Sequence[Fill], number: int) -> bool:
    """Whether a single machine that has to be fed for fill `number` could come there from the one before, with at
    most an FFN between, and no later fill begins in its midst."""
    one, other = fills[number - 1 : number + 1]
    if not 0 <= other.first - one.stop <= 1 or one.start != other.start:
        return False
    machines = {machine for half in range(one.stop - 1, other.first + 1) for machine in new.owners(half)}
    if len(machines) > 1 or other.feeder in machines:
        return False
    return not any(one.first < later.first < other.stop for later in fills[number + 1 :])


def _lacking(holdings: Holdings, new: Partition, half: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(machine, unit, positions it has of it) where it does not have them all."""
    for unit, machine in enumerate(new.owners(half)):
        has = holdings.machines[machine].covered(half, (unit,))
        if has < context:
            yield machine, unit, has


def _gap(holdings: Holdings, new: Partition, start: int, fill: Fill) -> Gap:
    context = fill.context
    lacking: Counter[int] = Counter()
    carries: dict[tuple[int, int, int], dict[int, list[int]]] = {}
    lost = False
    for half in range(start, fill.stop, 2):
        for machine, unit, has in _lacking(holdings, new, half, context):
            lacking[machine] += context - has
            src = _source(holdings, half, unit, context)
            if src is None:
                lost = True
            else:
                carries.setdefault((src, machine, has), {}).setdefault(half, []).append(unit)
    ways = tuple(
        Carry(src, dst, tuple((half, tuple(units)) for half, units in rows.items()), has, context)
        for (src, dst, has), rows in sorted(carries.items())
    )
    machines = tuple(sorted(lacking, key=lambda machine: (-lacking[machine], machine)))
    return Gap(new, machines, start, fill, () if lost else ways)


def _source(holdings: Holdings, half: int, unit: int, context: int) -> int | None:
    """The first machine that has a unit for all positions."""
    return next((m for m, held in enumerate(holdings.machines) if held.covered(half, (unit,)) >= context), None)
