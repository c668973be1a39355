"""All cuts and U-shapes of a device and one worker, priced together; it knows no objective.

Layers are alike, so within one shape (which machine runs the first, second and third run of halves) every
coefficient of a bill is an affine function of how many attention and FFN halves each run has. Three bills fix it;
thousands of plans then cost a few matrix products instead of a walk each. What crosses depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Floor, Job, Limits, Prices, Table, World, bill
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.plan import DEVICE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """Which machine runs each of at most three consecutive runs of halves, and the two ends."""

    runs: tuple[int, ...]
    embed: int
    head: int


def shapes(worker: int) -> tuple[Shape, ...]:
    """Runs in turn on the device and one worker; each end on the machine of its run, or on the device, or, where the
    token then still goes round in one crossing each way at most, on the worker."""
    found: dict[Shape, None] = {}
    for first, second in ((DEVICE, worker), (worker, DEVICE)):
        for runs in ((first,), (first, second), (first, second, first)):
            for embed, head in ((runs[0], runs[-1]), (DEVICE, DEVICE), (DEVICE, runs[-1]), (runs[0], DEVICE)):
                found[Shape(runs, embed, head)] = None
            for embed, head in product((DEVICE, worker), repeat=2):
                way = (embed, *runs, head, embed)
                if sum(a != b for a, b in pairwise(way)) <= 2:
                    found[Shape(runs, embed, head)] = None
    return tuple(found)


def partition_of(shape: Shape, ends: Sequence[int], world: World) -> Partition:
    """The partition whose runs end before these halves (the last end is that of the model)."""
    spec = world.spec
    owners: list[int] = []
    for machine, end in zip(shape.runs, ends, strict=True):
        owners += [machine] * (end - len(owners))
    layers = tuple(
        Placement((attention,) * spec.num_kv_heads, (ffn,) * spec.num_ffn_shards)
        for attention, ffn in zip(owners[::2], owners[1::2], strict=True)
    )
    return Partition(layers, shape.embed, shape.head)


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """Members of one shape with the same tools: the halves before which their runs end, (members, runs)."""

    shape: Shape
    wire: WirePrecision
    chunk: int | None
    draft: int
    prefill_wire: WirePrecision | None
    ends: Ints

    def decision(self, number: int, world: World) -> Decision:
        """One member as a decision."""
        partition = partition_of(self.shape, self.ends[number].tolist(), world)
        return Decision(partition, self.wire, self.chunk, self.draft, self.prefill_wire)


def _ends(runs: int, halves: int) -> Ints:
    """Every way to end `runs` non-empty runs, the last at `halves`."""
    if runs == 1:
        return np.array([[halves]])
    if runs == 2:
        first = np.arange(1, halves)
        return np.stack([first, np.full_like(first, halves)], axis=1)
    first, second = np.triu_indices(halves, 1)
    inside = (first >= 1) & (second >= 1)
    both = np.stack([first[inside], second[inside]], axis=1)
    return np.concatenate([both, np.full((len(both), 1), halves)], axis=1)


def _halves(ends: Ints) -> Floats:
    """Attention and FFN halves of each run: (members, runs, 2)."""
    starts = np.concatenate([np.zeros((len(ends), 1), dtype=ends.dtype), ends[:, :-1]], axis=1)
    attention = (ends + 1) // 2 - (starts + 1) // 2
    ffn = ends // 2 - starts // 2
    return np.stack([attention, ffn], axis=-1).astype(np.float64)


class Family:
    """Every cut and U-shape of a world's device with one worker, for one job, under the tools allowed."""

    def __init__(
        self,
        world: World,
        job: Job,
        tools: Tools,
        worker: int = 1,
        limits: Limits | None = None,
        step: int = 1,
    ) -> None:
        """`step` 2 keeps cuts between layers only. Members that memory or a limit forbids are left out."""
        self.world, self.job, self.tools, self.worker = world, job, tools, worker
        self.limits = limits or Limits()
        self.forbidden = 0
        self._lost: dict[int, Floats] = {}
        self.parts: list[tuple[Members, Table, Floats]] = []
        for shape in shapes(worker) if len(world.hosts) > 1 else (Shape((DEVICE,), DEVICE, DEVICE),):
            for members, table, mix in self._of_shape(shape, step):
                self.parts.append((members, table, mix))

    def __len__(self) -> int:
        return sum(len(members.ends) for members, _, _ in self.parts)

    def _of_shape(self, shape: Shape, step: int) -> Iterator[tuple[Members, Table, Floats]]:
        halves = 2 * self.world.spec.num_layers
        ends = _ends(len(shape.runs), halves)
        if step > 1:
            ends = ends[(ends % step == 0).all(axis=1)]
        ends = ends[self._inside(shape, ends)]
        if not len(ends):
            return
        anchors, mix = self._anchors(ends)
        spanning = [partition_of(shape, one, self.world) for one in anchors.tolist()]
        residual = len(shape.runs) > 1 or shape.embed != shape.runs[0] or shape.head != shape.runs[-1]
        for wire, early in self.tools.by_phase if residual else ((self.tools.wires[0], None),):
            for chunk in self.tools.chunks:
                if chunk is not None and chunk >= self.job.prompt_tokens:
                    continue
                for draft in self.tools.drafts:
                    bills = [bill(self.world, Decision(one, wire, chunk, draft, early), self.job) for one in spanning]
                    fits = self._fits(np.array([one.memory_bytes for one in bills]), mix)
                    self.forbidden += int((~fits).sum())
                    if fits.any():
                        yield Members(shape, wire, chunk, draft, early, ends[fits]), Table(self.world, bills), mix[fits]

    def _inside(self, shape: Shape, ends: Ints) -> NDArray[np.bool_]:
        """Whether the limits allow each member; memory apart."""
        ok = np.ones(len(ends), dtype=bool)
        used = {*shape.runs, shape.embed, shape.head}
        if used & self.limits.unreachable or (self.limits.only is not None and used - self.limits.only):
            return ~ok
        floor = self.limits.floor
        if self.limits.first_layer_on_device:
            if shape.embed != DEVICE or shape.runs[0] != DEVICE:
                return ~ok
            ok &= ends[:, 0] >= 2
        if floor:
            ok &= self._floor(floor, shape, ends)
        return ok

    def _floor(self, floor: Floor, shape: Shape, ends: Ints) -> NDArray[np.bool_]:
        layers = self.world.spec.num_layers
        if (shape.embed, shape.head) != (DEVICE, DEVICE):
            return np.zeros(len(ends), dtype=bool)
        inside = {*range(min(floor.first_layers, layers)), *range(max(layers - floor.last_layers, 0), layers)}
        ok = np.ones(len(ends), dtype=bool)
        runs = np.array(shape.runs)
        for half in (h for layer in inside for h in (2 * layer, 2 * layer + 1)):
            ok = np.logical_and(ok, runs[(ends <= half).sum(axis=1)] == DEVICE)
        return ok

    def _anchors(self, ends: Ints) -> tuple[Ints, Floats]:
        """Members whose bills span all others, and the mix of anchors that makes each member: (members, anchors)."""
        coordinates = np.concatenate([_halves(ends).reshape(len(ends), -1), np.ones((len(ends), 1))], axis=1)
        chosen: list[int] = []
        rank, full = 0, np.linalg.matrix_rank(coordinates)
        # Far apart first: mixing then never magnifies rounding.
        order = np.argsort(-np.abs(coordinates - coordinates.mean(axis=0)).sum(axis=1), kind="stable")
        for index in order.tolist():
            if np.linalg.matrix_rank(coordinates[[*chosen, index]]) > rank:
                chosen.append(index)
                rank += 1
            if rank >= full:
                break
        anchors = coordinates[chosen]
        return ends[chosen], coordinates @ np.linalg.pinv(anchors)

    def _fits(self, memory: Floats, mix: Floats) -> NDArray[np.bool_]:
        limits = np.array([host.device.memory_bytes for host in self.world.hosts])
        fits: NDArray[np.bool_] = np.all(mix @ memory <= limits * (1 + 1e-9), axis=1)
        return fits

    def prices(self, part: int, conditions: Floats) -> Prices:
        """The figures of one part's members under one set of conditions."""
        members, table, mix = self.parts[part]
        if part not in self._lost:
            self._lost[part] = self._nats(members)
        return replace(table.mixed(mix, conditions), nats=self._lost[part])

    def _nats(self, members: Members) -> Floats:
        """Loss of each member: by weights, cumulated over the halves of its runs, and by what crosses where."""
        world, accuracy = self.world, self.world.accuracy
        layers = world.spec.num_layers
        lost = np.zeros(len(members.ends))
        starts = np.concatenate([np.zeros((len(members.ends), 1), dtype=np.int64), members.ends[:, :-1]], axis=1)
        for run, machine in enumerate(members.shape.runs):
            by_half = accuracy.weights_by_half(world.hosts[machine].weights, layers)
            before = np.concatenate([[0.0], np.cumsum(by_half)])
            lost += before[members.ends[:, run]] - before[starts[:, run]]
        by_boundary = np.array(accuracy.by_boundary({members.wire, members.prefill_wire or members.wire}, layers))
        shape = members.shape
        for run in range(len(shape.runs) - 1):
            lost += by_boundary[members.ends[:, run]]
        if shape.embed != shape.runs[0]:
            lost += by_boundary[0]
        if shape.head != shape.runs[-1]:
            lost += by_boundary[2 * layers]
        return lost

    def decision(self, part: int, number: int) -> Decision:
        """One member of a part."""
        return self.parts[part][0].decision(number, self.world)
