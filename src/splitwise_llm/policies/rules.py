"""The partitions that rules name: pure plans, single cuts, even and proportional shares. A rule prices nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product

from splitwise_llm.cost import Floor, Limits, World
from splitwise_llm.errors import PartitionError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

Partitions = Callable[[World, Limits], Iterable[Partition]]


def _cut(world: World, at: float, floor: Floor | None, worker: int) -> Partition:
    """Layers before `at` on the device; under a floor the last layers come back to it."""
    spec = world.spec
    if floor:
        return Partition.u_shape(spec, at, floor.last_layers, inner=worker)
    if at in (0, spec.num_layers):
        return Partition.all_on(spec, DEVICE if at else worker)
    return Partition.cut(spec, at, second=worker)


def edge(world: World, limits: Limits) -> Iterable[Partition]:
    """Everything on the device."""
    yield Partition.all_on(world.spec, DEVICE)


def cloud(world: World, limits: Limits) -> Iterable[Partition]:
    """Everything on one worker; under a floor, everything it allows."""
    for worker in range(1, len(world.hosts)):
        yield _cut(world, limits.floor.first_layers if limits.floor else 0, limits.floor, worker)


def either(world: World, limits: Limits) -> Iterable[Partition]:
    """The pure plans."""
    yield from edge(world, limits)
    yield from cloud(world, limits)


def cuts(world: World, limits: Limits) -> Iterable[Partition]:
    """Every single cut between layers, both ends included."""
    yield from either(world, limits)
    last = limits.floor.last_layers if limits.floor else 0
    for worker, at in product(range(1, len(world.hosts)), range(1, world.spec.num_layers - last)):
        yield _cut(world, at, limits.floor, worker)


def from_source(world: World, limits: Limits) -> Iterable[Partition]:
    """Every cut that keeps the first layer on the device."""
    last = limits.floor.last_layers if limits.floor else 0
    yield from edge(world, limits)
    for worker, at in product(range(1, len(world.hosts)), range(1, world.spec.num_layers - last)):
        yield _cut(world, at, limits.floor, worker)


def _proportional(world: World, limits: Limits, shares: Sequence[float]) -> Iterable[Partition]:
    """Consecutive layers in proportion to the machines' shares, in machine order."""
    spec, floor = world.spec, limits.floor
    last = floor.last_layers if floor else 0
    total = sum(shares)
    ends = [round(spec.num_layers * sum(shares[: n + 1]) / total) for n in range(len(shares))]
    ends = [min(end, spec.num_layers - last) for end in ends[:-1]] + [spec.num_layers - last]
    if floor:
        ends[0] = max(ends[0] - last, min(floor.first_layers, ends[-1]))
    spans = [(machine, float(max(ends[: machine + 1]))) for machine in range(len(ends))]
    if last:
        spans.append((DEVICE, float(spec.num_layers)))
    partition = Partition.of_spans(spec, spans)
    yield replace(partition, embed=DEVICE, head=DEVICE) if floor else replace(partition, embed=DEVICE)


def even(world: World, limits: Limits) -> Iterable[Partition]:
    """As many layers on each machine."""
    return _proportional(world, limits, [1.0] * len(world.hosts))


def by_memory(world: World, limits: Limits) -> Iterable[Partition]:
    """Layers in proportion to memory."""
    return _proportional(world, limits, [host.device.memory_bytes for host in world.hosts])


def that_exist(partitions: Partitions, world: World, limits: Limits) -> Sequence[Partition]:
    """Partitions of a rule, each once; none where the rule has no meaning for this floor."""
    try:
        return list(dict.fromkeys(partitions(world, limits)))
    except PartitionError:
        return []
