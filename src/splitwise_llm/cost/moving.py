"""What it costs to go on with another partition in mid-generation: weights are where they are, caches are not.

`rebuild` says what is to be done; here it gets its seconds. Keys and values that a machine lacks are recomputed, from
the ids or from the activations that crossed at the old boundaries (the session keeps them), or transferred: whichever
is faster under the conditions. Recompute almost always is: a layer's input is at most half of its keys and values,
and ids are thousands of times smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost.terms import Delay, Form
from splitwise_llm.cost.world import World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE, TOKEN_ID_BYTES
from splitwise_llm.rebuild import Carry, Fill, Gap, Holdings, Way, gaps

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """One gap: seconds of either way to close it, and what recomputing occupies."""

    gap: Gap
    recompute: Form
    transfer: Form
    """As `recompute` where the rows are nowhere to be had."""
    busy_s: tuple[float, ...]
    """Per machine, of recomputing."""
    recompute_bytes: float
    transfer_bytes: float

    @property
    def machine(self) -> int:
        """Who lacks the most."""
        return self.gap.machines[0]

    @property
    def start(self) -> int:
        """The first half that lacks something."""
        return self.gap.start

    @property
    def stop(self) -> int:
        """The end of the last half that lacks something."""
        return self.gap.fill.stop


@dataclass(frozen=True, slots=True, eq=False)
class Moving:
    """The way to a partition from what machines have of a cache of some positions."""

    gains: tuple[Gain, ...]
    entry: Delay
    """Admission to machines that were not used before, and loading of weights that are not resident."""

    def seconds(self, conditions: Floats) -> Floats:
        """The entry, then the gaps one after the other, by the fastest choice of their ways: what a fill closes on its
        way to a later gap need not be closed before."""
        total: Floats = self.entry.at(conditions) + self._fastest(conditions)[-1]
        return total

    def choose(self, conditions: Form) -> tuple[Way, ...]:
        """What is to be done, in the order of halves: the ways that `seconds` counts."""
        return tuple(gain.gap.fill if recompute else gain.gap.carries for gain, recompute in self._chosen(conditions))

    def recomputes(self, conditions: Form) -> tuple[bool, ...]:
        """Per gain, whether it is recomputed, by its own fill or by a later one's."""
        carried = [gain for gain, recompute in self._chosen(conditions) if not recompute]
        return tuple(gain not in carried for gain in self.gains)

    def _fastest(self, conditions: Floats) -> list[Floats]:
        """Seconds of closing no gap, the first, the first two, ...: each by its fill, after the gaps that this one does
        not close, or by transfer, after all gaps before it."""
        fastest: list[Floats] = [np.zeros(conditions.shape[:-1])]
        for number, gain in enumerate(self.gains):
            fill = fastest[self._before(number)] + conditions @ gain.recompute
            fastest.append(np.minimum(fill, fastest[-1] + conditions @ gain.transfer))
        return fastest

    def _chosen(self, conditions: Form) -> list[tuple[Gain, bool]]:
        """Gains with whether they are recomputed, without those that a later one's fill closes."""
        fastest, chosen, number = self._fastest(conditions), list[tuple[Gain, bool]](), len(self.gains)
        while number:
            gain, before = self.gains[number - 1], self._before(number - 1)
            recompute = not gain.gap.carries or bool(
                fastest[before] + conditions @ gain.recompute <= fastest[number - 1] + conditions @ gain.transfer
            )
            chosen.append((gain, recompute))
            number = before if recompute else number - 1
        return chosen[::-1]

    def _before(self, number: int) -> int:
        """How many gaps there are before those that a gain's fill closes."""
        return sum(not self.gains[number].gap.fills(gain.gap) for gain in self.gains[:number])

    def busy_s(self, machine: int) -> float:
        """Compute that recomputing everything would take a machine."""
        return sum(gain.busy_s[machine] for gain in self.gains)


def moving(
    world: World, old: Partition, new: Decision, context: int, load_bytes: Mapping[int, float] | None = None
) -> Moving:
    """The cost of changing from partition `old` to `new` when `context` positions are cached.

    `load_bytes` gives, per machine, bytes of weights it must first read from its storage.
    """
    holdings = Holdings.of(old, context, len(world.hosts), world.direct)
    return moving_from(world, holdings, new, context, load_bytes, old.machines)


def moving_from(
    world: World,
    holdings: Holdings,
    new: Decision,
    context: int,
    load_bytes: Mapping[int, float] | None = None,
    admitted: Collection[int] | None = None,
) -> Moving:
    """As `moving`, from what each machine has. `admitted` are the machines that serve the session already (None:
    those that have anything of it); the others of `new` are waited for."""
    basis = world.basis
    known = holdings.holders if admitted is None else admitted
    entry = [basis.form({basis.wait(machine): 1.0}) for machine in new.partition.machines if machine not in known] or [
        basis.form({})
    ]
    loads = [basis.form({0: size / world.hosts[m].device.load_bytes_per_s}) for m, size in (load_bytes or {}).items()]
    delay = Delay.of(entry) + (Delay.of(loads) if loads else Delay(()))
    return Moving(tuple(_gain(world, new, gap) for gap in gaps(holdings, new.partition, context)), delay)


def _gain(world: World, new: Decision, gap: Gap) -> Gain:
    recompute, busy, recomputed_bytes = _filling(world, new, gap.fill)
    for machine in gap.machines:
        recompute += world.basis.form({world.basis.join(machine): 1.0})
    if not gap.carries:
        return Gain(gap, recompute, recompute, tuple(busy), recomputed_bytes, recomputed_bytes)
    transfer, moved = world.basis.form({}), 0.0
    for carry in gap.carries:
        size = _carried_bytes(world, carry)
        transfer += _crossing(world, carry.src, carry.dst, size)
        moved += size
    return Gain(gap, recompute, transfer, tuple(busy), recomputed_bytes, moved)


def _filling(world: World, new: Decision, fill: Fill) -> tuple[Form, list[float], float]:
    """Seconds, compute of each machine and bytes of running some halves again over all positions at once: their
    machines do so in turn, and all shared halves but the last end with an exchange."""
    form, busy_s, crossed = world.basis.form({}), [0.0] * len(world.hosts), 0.0
    rows = fill.context - fill.start
    # Streams of two precisions were kept: only fp32 holds both.
    wire = new.wire_in(is_prefill=True) if fill.first == 0 or len(new.wires) == 1 else WirePrecision.FP32
    stream = wire.payload_bytes(rows, world.spec.d_model)
    holders = [fill.feeder]
    if fill.first == 0:
        holders = [new.partition.embed]
        if new.partition.embed != fill.feeder:
            form += _crossing(world, fill.feeder, new.partition.embed, TOKEN_ID_BYTES * rows)
            crossed += TOKEN_ID_BYTES * rows
    for half in range(fill.first, fill.stop):
        part = Part.FFN if half % 2 else Part.ATTENTION
        units = {owner: len(new.partition.units_on(owner, half)) for owner in sorted(set(new.partition.owners(half)))}
        without = [owner for owner in units if owner not in holders]
        if without:
            form += _crossing(world, holders[0], without[0], stream)
            crossed += len(without) * stream
        seconds = {m: world.hosts[m].half_s(world.spec, part, n, rows, fill.context) for m, n in units.items()}
        slowest = max(seconds, key=seconds.__getitem__)
        form += world.basis.form({world.basis.slow(slowest): seconds[slowest]})
        for owner in units:
            busy_s[owner] += seconds[owner]
        holders = list(units)
        if len(holders) > 1 and half + 1 < fill.stop:
            form += _crossing(world, holders[0], holders[1], stream)
            crossed += len(holders) * (len(holders) - 1) * stream
    return form, busy_s, crossed


def _carried_bytes(world: World, carry: Carry) -> float:
    per_position = world.spec.kv_bytes_per_position(carry.num_units, world.hosts[carry.src].dtype)
    return (carry.context - carry.start) * per_position


def _crossing(world: World, src: int, dst: int, size: float) -> Form:
    form = world.basis.form({})
    for a, b in _legs(world, src, dst):
        software_s = world.hosts[a].message_s(size) + world.hosts[b].message_s(size)
        form += world.basis.form({0: software_s, world.basis.rtt(a, b): 0.5, world.basis.inverse(a, b): size})
    return form


def _legs(world: World, src: int, dst: int) -> tuple[tuple[int, int], ...]:
    if DEVICE in (src, dst) or (min(src, dst), max(src, dst)) in world.links:
        return ((src, dst),)
    return ((src, DEVICE), (DEVICE, dst))
