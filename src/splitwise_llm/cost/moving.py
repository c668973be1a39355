"""What it costs to go on with another partition in mid-generation: weights are where they are, caches are not.

Keys and values of what a machine gains are recomputed, from the ids or from the activations that crossed at the old
boundaries (the session keeps them), or transferred: whichever is faster under the conditions. Recompute almost
always is: a layer's input is at most half of its keys and values, and ids are thousands of times smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost.terms import Delay, Form
from splitwise_llm.cost.world import World
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE, TOKEN_ID_BYTES

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Gain:
    """One run of halves whose cache a machine must get: seconds of either way, and what recomputing occupies."""

    machine: int
    start: int
    stop: int
    recompute: Form
    transfer: Form
    busy_s: tuple[float, ...]
    """Per machine, of recomputing."""
    recompute_bytes: float
    transfer_bytes: float


@dataclass(frozen=True, slots=True, eq=False)
class Moving:
    """The way from one partition to another with a cache of some positions."""

    gains: tuple[Gain, ...]
    entry: Delay
    """Admission to machines that were not used before, and loading of weights that are not resident."""

    def seconds(self, conditions: Floats) -> Floats:
        """Gains one after the other, each the faster way, and the entry before them."""
        total = self.entry.at(conditions)
        for gain in self.gains:
            total = total + np.minimum(conditions @ gain.recompute, conditions @ gain.transfer)
        return total

    def recomputes(self, conditions: Form) -> tuple[bool, ...]:
        """Per gain, whether recomputing is the faster way."""
        return tuple(bool(conditions @ gain.recompute <= conditions @ gain.transfer) for gain in self.gains)

    def busy_s(self, machine: int) -> float:
        """Compute that recomputing everything would take a machine."""
        return sum(gain.busy_s[machine] for gain in self.gains)


def moving(
    world: World, old: Partition, new: Decision, context: int, load_bytes: Mapping[int, float] | None = None
) -> Moving:
    """The cost of changing from partition `old` to `new` when `context` positions are cached.

    `load_bytes` gives, per machine, bytes of weights it must first read from its storage.
    """
    basis = world.basis
    entry = [
        basis.form({basis.wait(machine): 1.0}) for machine in new.partition.machines if machine not in old.machines
    ] or [basis.form({})]
    loads = [basis.form({0: size / world.hosts[m].device.load_bytes_per_s}) for m, size in (load_bytes or {}).items()]
    delay = Delay.of(entry) + (Delay.of(loads) if loads else Delay(()))
    runs = _runs(old, new.partition)
    return Moving(tuple(_gain(world, old, new, context, *run) for run in runs), delay)


def _runs(old: Partition, new: Partition) -> list[tuple[int, int, int]]:
    """(machine, first half, end) of consecutive halves in which a machine gains attention units."""
    runs: list[tuple[int, int, int]] = []
    for machine in new.machines:
        start = None
        for half in range(2 * len(new.layers) + 1):
            inside = half < 2 * len(new.layers) and bool(
                set(new.units_on(machine, half)) - set(old.units_on(machine, half))
            )
            if inside and start is None:
                start = half
            elif not inside and start is not None:
                if any(h % 2 == 0 for h in range(start, half)):
                    # The FFN after the last attention needs no cache; nothing after it is to be recomputed.
                    runs.append((machine, start, half - 1 if half % 2 == 0 else half))
                start = None
    return sorted(runs, key=lambda run: run[1])


def _crossing(world: World, src: int, dst: int, size: float) -> Form:
    form = world.basis.form({})
    for a, b in _legs(world, src, dst):
        software_s = world.hosts[a].message_s(size) + world.hosts[b].message_s(size)
        form += world.basis.form({0: software_s, world.basis.rtt(a, b): 0.5, world.basis.inverse(a, b): size})
    return form


def _again(
    world: World, new: Decision, feeder: int, start: int, stop: int, context: int
) -> tuple[Form, list[float], float]:
    """Seconds, compute of each machine and bytes of running some halves again over all positions at once, from what
    the feeder has: their machines do so in turn, and all shared halves but the last end with an exchange."""
    form, busy_s, crossed = world.basis.form({}), [0.0] * len(world.hosts), 0.0
    stream = new.wire.payload_bytes(context, world.spec.d_model)
    holders = [feeder]
    for half in range(start, stop):
        part = Part.FFN if half % 2 else Part.ATTENTION
        units = {owner: len(new.partition.units_on(owner, half)) for owner in sorted(set(new.partition.owners(half)))}
        without = [owner for owner in units if owner not in holders]
        if without:
            form += _crossing(world, holders[0], without[0], stream)
            crossed += len(without) * stream
        seconds = {m: world.hosts[m].half_s(world.spec, part, n, context, context) for m, n in units.items()}
        slowest = max(seconds, key=seconds.__getitem__)
        form += world.basis.form({world.basis.slow(slowest): seconds[slowest]})
        for owner in units:
            busy_s[owner] += seconds[owner]
        holders = list(units)
        if len(holders) > 1 and half + 1 < stop:
            form += _crossing(world, holders[0], holders[1], stream)
            crossed += len(holders) * (len(holders) - 1) * stream
    return form, busy_s, crossed


def _gain(world: World, old: Partition, new: Decision, context: int, machine: int, start: int, stop: int) -> Gain:
    basis, spec = world.basis, world.spec
    before = start
    while before and not _kept(old, before):  # back to the ids, or to a boundary whose activations were kept
        before -= 1
    feeder = machine if before == start else new.partition.owners(before)[0]
    recompute, busy, recomputed_bytes = _again(world, new, feeder, before, stop, context)
    recompute += basis.form({basis.join(machine): 1.0})
    keepers = {DEVICE, *old.owners(before - 1), *old.owners(before)} if before else {DEVICE}
    if feeder not in keepers:
        size = new.wire.payload_bytes(context, spec.d_model) if before else TOKEN_ID_BYTES * context
        recompute += _crossing(world, DEVICE, feeder, size)
        recomputed_bytes += size

    transfer, moved = basis.form({}), 0.0
    by_source: dict[int, int] = {}
    for half in range(start + start % 2, stop, 2):
        for unit in new.partition.units_on(machine, half):
            source = old.owners(half)[unit]
            if source != machine:
                by_source[source] = by_source.get(source, 0) + 1
    for source, units in by_source.items():
        size = context * spec.kv_bytes_per_position(units, world.hosts[source].dtype)
        transfer += _crossing(world, source, machine, size)
        moved += size
    return Gain(machine, start, stop, recompute, transfer, tuple(busy), recomputed_bytes, moved)


def _kept(old: Partition, half: int) -> bool:
    """Whether the stream before a half crossed under the old partition, so that the session has kept it."""
    return set(old.owners(half - 1)) != set(old.owners(half))


def _legs(world: World, src: int, dst: int) -> tuple[tuple[int, int], ...]:
    if DEVICE in (src, dst) or (min(src, dst), max(src, dst)) in world.links:
        return ((src, dst),)
    return ((src, DEVICE), (DEVICE, dst))
