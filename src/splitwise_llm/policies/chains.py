"""A model as a chain of units over machines, in small arrays: what programs that only cut chains need to see.

It knows no program. Every figure comes from `cost`, so a route's sum here is its price there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import UNLIMITED, Form, Host, Job, Limits, World, counts, memory_bytes
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE, TOKEN_ID_BYTES
from splitwise_llm.spec import ModelSpec

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Route:
    """Consecutive spans `(machine, end layer)`, and what the program that found them minimised, in seconds."""

    spans: tuple[tuple[int, float], ...]
    seconds: float
    head_at_home: bool = False
    """Whether the head is on the device; else it is on the last machine."""

    @property
    def machines(self) -> tuple[int, ...]:
        return tuple(machine for machine, _ in self.spans)

    def partition(self, spec: ModelSpec) -> Partition:
        """The embedding is on the first machine, which is the device."""
        partition = Partition.of_spans(spec, self.spans)
        return replace(partition, head=DEVICE) if self.head_at_home else partition


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Seconds and bytes of a request on every machine (rows; the first is its device), unit by unit (columns)."""

    machines: tuple[int, ...]
    ends: tuple[float, ...]
    """Layer at which each unit ends."""
    num_layers: int
    unit_s: Floats
    """(machines, units)"""
    enter_s: Floats
    """(machines,): of having a segment at all; the device's also of what must stay on it besides `pinned`."""
    tail_s: Floats
    """(machines,): of having the last segment: the head."""
    hop_s: Floats
    """(machines, machines): of handing the residual stream over."""
    back_s: Floats
    """(machines,): from the last segment to the device."""
    unit_bytes: Floats
    enter_bytes: Floats
    tail_bytes: Floats
    memory_bytes: Floats
    """(machines,): what there is."""
    pinned: int
    """Units at the beginning that stay on the device: at least the first layer."""
    head_at_home: bool = False
    """Whether a floor keeps the head, and layers after the last unit, on the device."""

    @property
    def num_units(self) -> int:
        return len(self.ends)

    def route(self, segments: Sequence[tuple[int, int]], seconds: float) -> Route:
        """Of segments `(row, end unit)`; what stays on the device after the last unit is appended."""
        spans = [(self.machines[row], self.ends[end - 1]) for row, end in segments]
        if spans[-1][1] < self.num_layers:
            spans.append((DEVICE, float(self.num_layers)))
        return Route(tuple(spans), seconds, self.head_at_home)

    def segment_s(self) -> Floats:
        """(machines, units + 1, units + 1): seconds of the segment from unit i up to j; infinite unless i < j."""
        return _segments(self.unit_s, self.enter_s, self.tail_s)

    def fits(self) -> NDArray[np.bool_]:
        """(machines, units + 1, units + 1): whether a machine holds the segment from unit i up to j."""
        return _segments(self.unit_bytes, self.enter_bytes, self.tail_bytes) <= self.memory_bytes[:, None, None]


def _segments(unit: Floats, enter: Floats, tail: Floats) -> Floats:
    sums = np.concatenate([np.zeros((len(unit), 1)), np.cumsum(unit, axis=1)], axis=1)
    total: Floats = enter[:, None, None] + sums[:, None, :] - sums[:, :, None]
    total[:, :, -1] += tail[:, None]
    size = sums.shape[1]
    total[:, np.arange(size)[:, None] >= np.arange(size)] = np.inf
    return total


@dataclass(frozen=True, slots=True)
class Flow:
    """Who shares a pipeline: sequences per micro-batch, and micro-batches under way at a time, whose keys and values
    every machine keeps."""

    batch: int = 1
    in_flight: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.in_flight < 1:
            raise RequestError(f"{self.in_flight} micro-batches of {self.batch} sequences; expected at least 1 of 1")


ALONE = Flow()


def chain(
    world: World,
    job: Job,
    wire: WirePrecision = WirePrecision.FP32,
    *,
    conditions: Form | None = None,
    limits: Limits = UNLIMITED,
    flow: Flow = ALONE,
    halves: bool = False,
    occupancy: bool = False,
) -> Chain:
    """The chain of a job, its first layer on the device (EdgeShard's privacy), or more where `limits` has a floor.

    Seconds are of the whole request, as `cost` prices it: the prompt once, every later token at mean context.
    `occupancy` counts for how long it keeps machines and links busy, without delays and waiting: what bounds the
    throughput. `halves` also cuts between attention and FFN.
    """
    return _Filling(world, job, wire, world.conditions() if conditions is None else conditions, flow, occupancy).chain(
        limits, halves
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Filling:
    """Figures of one job in one world, machine by machine."""

    world: World
    job: Job
    wire: WirePrecision
    x: Form
    flow: Flow
    occupancy: bool

    @property
    def steps(self) -> tuple[tuple[int, int, int], ...]:
        """(how many, rows, context): the prompt, and a later token at mean context."""
        return (1, self.job.prompt_tokens, self.job.prompt_tokens), (self.job.tokens_out - 1, 1, self.job.mean_context)

    def chain(self, limits: Limits, halves: bool) -> Chain:
        spec, world = self.world.spec, self.world
        machines = (DEVICE, *(m for m in range(1, len(world.hosts)) if _may_use(limits, m)))
        per_layer = 2 if halves else 1
        floor = limits.floor
        first = min(max(floor.first_layers if floor else 0, 1), spec.num_layers)
        last = min(floor.last_layers, spec.num_layers - first) if floor else 0
        at_home = floor is not None
        kept = range(2 * (spec.num_layers - last), 2 * spec.num_layers)
        units = [range(2 * n // per_layer, 2 * (n + 1) // per_layer) for n in range(per_layer * spec.num_layers)]
        units = units[: per_layer * (spec.num_layers - last)]
        enter_s = np.array([self._visits_s(m) for m in machines])
        enter_bytes = np.array([self._buffer_bytes(m) + self._ends_bytes(m, m == DEVICE, False) for m in machines])
        tail_s = np.array([self._head_s(m) for m in machines])
        tail_bytes = np.array(
            [self._ends_bytes(m, m == DEVICE, True) - self._ends_bytes(m, m == DEVICE, False) for m in machines]
        )
        back_s = np.array([self._token_s(m) for m in machines])
        hop_s = np.array([[self._stream_s(a, b) if a != b else 0.0 for b in machines] for a in machines])
        if at_home:
            enter_s[0] += tail_s[0] + sum(self._half_s(DEVICE, half) for half in kept)
            enter_bytes[0] += tail_bytes[0] + sum(self._half_bytes(DEVICE, half) for half in kept)
            again = self._visits_s(DEVICE, loop=False) * (not self.occupancy)
            home_s = [again + self._stream_s(m, DEVICE, last_only=not last) for m in machines[1:]]
            back_s = np.array([back_s[0], *home_s])
            tail_s, tail_bytes = np.zeros_like(tail_s), np.zeros_like(tail_bytes)
        return Chain(
            machines,
            tuple(unit.stop / 2 for unit in units),
            spec.num_layers,
            np.array([[sum(self._half_s(m, half) for half in unit) for unit in units] for m in machines]),
            enter_s, tail_s, hop_s, back_s,
            np.array([[sum(self._half_bytes(m, half) for half in unit) for unit in units] for m in machines]),
            enter_bytes, tail_bytes,
            np.array([world.hosts[m].device.memory_bytes for m in machines]),
            per_layer * first, at_home,
        )  # fmt: skip

    def _slow(self, machine: int) -> float:
        return float(self.x[self.world.basis.slow(machine)])

    def _half_s(self, machine: int, half: int) -> float:
        spec, host = self.world.spec, self.world.hosts[machine]
        part = Part.FFN if half % 2 else Part.ATTENTION
        units = counts.units_in(spec, part)
        return self._slow(machine) * sum(
            times * host.half_s(spec, part, units, rows, context, self.flow.batch)
            for times, rows, context in self.steps
        )

    def _head_s(self, machine: int) -> float:
        one = self.world.hosts[machine].head_s(self.world.spec, 1, self.flow.batch)
        return self.job.tokens_out * self._slow(machine) * one

    def _visits_s(self, machine: int, loop: bool = True) -> float:
        """Of one stage in each step: entering it, and waiting for the running iteration. Without `loop`, of a second
        stage on the device, which then is where a token's loop begins: the wait there is not paid twice."""
        host = self.world.hosts[machine]
        total = self._slow(machine) * sum(
            times * host.stage_s(rows, is_prefill=rows > 1) for times, rows, _ in self.steps
        )
        if not self.occupancy:
            total += float(self.x[self.world.basis.join(machine)]) * (self.job.tokens_out if loop else 1)
        return total

    def _crossings_s(self, src: int, dst: int, sizes: Sequence[tuple[int, float]]) -> float:
        """Of `(how many, bytes)` messages; workers without a link between them meet through the device."""
        world, basis = self.world, self.world.basis
        joined = DEVICE in (src, dst) or (min(src, dst), max(src, dst)) in world.links
        legs = [(src, dst)] if joined else [(src, DEVICE), (DEVICE, dst)]
        seconds = []
        for a, b in legs:
            fixed = world.hosts[a].device.message_s + world.hosts[b].device.message_s
            if not self.occupancy:
                fixed += 0.5 * float(self.x[basis.rtt(a, b)])
            inverse = float(self.x[basis.inverse(a, b)])
            seconds.append(sum(times * (fixed + size * inverse) for times, size in sizes))
        return max(seconds) if self.occupancy else sum(seconds)

    def _stream_s(self, src: int, dst: int, last_only: bool = False) -> float:
        """The residual stream; to a machine with nothing but the head, of the last position only."""
        rows = [(times, (1 if last_only else rows) * self.flow.batch) for times, rows, _ in self.steps]
        width = self.world.spec.d_model
        return self._crossings_s(src, dst, [(times, self.wire.payload_bytes(n, width)) for times, n in rows])

    def _token_s(self, machine: int) -> float:
        """The sampled ids reach the device. Where they are sampled on it, a token's loop never leaves it in between."""
        if machine != DEVICE:
            return self._crossings_s(machine, DEVICE, [(self.job.tokens_out, TOKEN_ID_BYTES * self.flow.batch)])
        join = 0.0 if self.occupancy else float(self.x[self.world.basis.join(DEVICE)])
        return -join * (self.job.tokens_out - 1)

    def _host(self, machine: int) -> Host:
        return self.world.hosts[machine]

    def _half_bytes(self, machine: int, half: int) -> float:
        """Weights, and keys and values of every sequence under way."""
        spec, host = self.world.spec, self._host(machine)
        part = Part.FFN if half % 2 else Part.ATTENTION
        units = counts.units_in(spec, part)
        total = units * counts.unit_weight_bytes(spec, part, host.dtype, host.weights)
        if part is Part.ATTENTION:
            positions = (self.job.prompt_tokens + self.job.tokens_out) * self.flow.batch * self.flow.in_flight
            total += positions * spec.kv_bytes_per_position(units, host.dtype)
        return total

    def _ends_bytes(self, machine: int, embed: bool, head: bool) -> float:
        host = self._host(machine)
        return counts.weight_bytes(self.world.spec, (), embed, head, host.dtype, host.weights)

    def _buffer_bytes(self, machine: int) -> float:
        """What a machine needs besides weights and cache: one micro-batch's activations."""
        spec, host = self.world.spec, self._host(machine)
        whole = Partition.all_on(spec, machine)
        positions = self.job.prompt_tokens + self.job.tokens_out
        held = counts.assigned_weight_bytes(spec, whole, machine, host.dtype, host.weights)
        held += counts.assigned_kv_bytes(spec, whole, machine, host.dtype, positions)
        return self.flow.batch * (memory_bytes(self.world, whole, machine, self.job, None) - held)


def _may_use(limits: Limits, machine: int) -> bool:
    return machine not in limits.unreachable and (limits.only is None or machine in limits.only)
