"""The paper's third way of an FFN, priced: its first matrices on the device, its second on a worker.

"First" of a gated FFN are gate and up, whose product is formed on the device; "second" is down. What crosses is then
the widest tensor of the layer, and the residual stream, to which the result is added. It executes nothing.

Every bit of what it does, a column split of the same shares does for less: as much work on each machine, at the same
time instead of in turn, and 2 d_model numbers over the link (the FFN's input, then one partial sum) instead of
d_ff + d_model. The cut before or after the whole FFN, whichever side computes it sooner, is faster, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitwise_llm.cost import World, counts
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import WirePrecision
from splitwise_llm.partition import Part
from splitwise_llm.plan import DEVICE
from splitwise_llm.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class FfnPrice:
    """One FFN over some positions, the stream on the device before it and on the worker after it."""

    seconds: float
    device_s: float
    """Work of the device, alone."""
    worker_s: float
    up_bytes: int


def first_share(spec: ModelSpec) -> float:
    """Of an FFN's weights and FLOP, the part of its first matrices: 1/2 without a gate, 2/3 with one."""
    return (spec.ffn_matrices - 1) / spec.ffn_matrices


def _compute_s(world: World, machine: int, share: float, rows: int) -> float:
    """Seconds of a share of an FFN; a launch each time, however small the share."""
    spec, host = world.spec, world.hosts[machine]
    if not share:
        return 0.0
    flop = counts.units_in(spec, Part.FFN) * counts.unit_flop(spec, Part.FFN, rows, rows)
    size = counts.units_in(spec, Part.FFN) * counts.unit_weight_bytes(spec, Part.FFN, host.dtype, host.weights)
    return host.stretch * host.device.seconds(share * flop, share * size)


def _ways(world: World, worker: int, rows: int, wire: WirePrecision, x: Form, width: int) -> tuple[int, float]:
    """Bytes and seconds of carrying `width` numbers per position up."""
    size = wire.payload_bytes(rows, width)
    basis, hosts = world.basis, world.hosts
    software_s = hosts[DEVICE].message_s(size) + hosts[worker].message_s(size)
    return size, float(software_s + x[basis.rtt(DEVICE, worker)] / 2 + size * x[basis.inverse(DEVICE, worker)])


def inner_cut(world: World, worker: int, rows: int, wire: WirePrecision, conditions: Form) -> FfnPrice:
    """First matrices on the device, then the widest tensor and the stream cross, then the second on the worker."""
    spec, slow = world.spec, [float(conditions[world.basis.slow(machine)]) for machine in (DEVICE, worker)]
    share = first_share(spec)
    device_s, worker_s = (
        _compute_s(world, machine, part, rows) for machine, part in ((DEVICE, share), (worker, 1 - share))
    )
    size, way_s = _ways(world, worker, rows, wire, conditions, spec.d_ff + spec.d_model)
    return FfnPrice(slow[0] * device_s + way_s + slow[1] * worker_s, device_s, worker_s, size)


def column_split(world: World, worker: int, rows: int, wire: WirePrecision, conditions: Form, share: float) -> FfnPrice:
    """A share of the columns of all matrices on the device, the rest on the worker, the partial sums added there."""
    spec, slow = world.spec, [float(conditions[world.basis.slow(machine)]) for machine in (DEVICE, worker)]
    device_s, worker_s = (
        _compute_s(world, machine, part, rows) for machine, part in ((DEVICE, share), (worker, 1 - share))
    )
    size, way_s = _ways(world, worker, rows, wire, conditions, spec.d_model)
    ends = (way_s + slow[1] * worker_s, slow[0] * device_s + way_s if share else 0.0)
    return FfnPrice(max(ends), device_s, worker_s, size * (2 if 0 < share < 1 else 1))


def boundary_cut(world: World, worker: int, rows: int, wire: WirePrecision, conditions: Form) -> FfnPrice:
    """The whole FFN before the crossing or behind it, whichever is sooner."""
    behind = column_split(world, worker, rows, wire, conditions, 0.0)
    slow = float(conditions[world.basis.slow(DEVICE)])
    device_s = _compute_s(world, DEVICE, 1.0, rows)
    size, way_s = _ways(world, worker, rows, wire, conditions, world.spec.d_model)
    before = FfnPrice(slow * device_s + way_s, device_s, 0.0, size)
    return min(before, behind, key=lambda price: price.seconds)
