"""Plans as a few runs of layers, each on one seat: what they cost is a sum over runs. It does not know who chooses.

Layers are alike, so the best plans are few runs of consecutive layers. A *seat* is where a run sits: one machine, or
several that share every layer of it by fixed counts of key/value groups and FFN shards. What a run adds to a plan
(seconds per step, work, bytes, nats) comes from `assignments.Search`, and is exact for seats of one machine and
prompts in one chunk; with shared seats or chunks it is close. Whoever decides prices the last few with `cost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Job, Limits, Prices, Work, World, counts, memory_bytes
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Part, Partition, Placement
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.assignments import Counts, End, Search, crossings
from splitwise_llm.policies.objective import DriftPlusPenalty, Objective

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a run of layers sits: units of each half per machine."""

    groups: Counts
    shards: Counts

    @property
    def machines(self) -> tuple[int, ...]:
        """Those that have a unit."""
        return tuple(m for m, both in enumerate(zip(self.groups, self.shards, strict=True)) if any(both))

    def placement(self) -> Placement:
        """Units in machine order, so that seats with nearly the same counts are nearly the same placement."""
        owners = [tuple(m for m, n in enumerate(half) for _ in range(n)) for half in (self.groups, self.shards)]
        return Placement(*owners)


@dataclass(frozen=True, slots=True)
class Runs:
    """A plan: `(seat, end layer)` in order, and where embedding and head are."""

    runs: tuple[tuple[int, int], ...]
    embed: int
    head: int


@dataclass(frozen=True, slots=True)
class _Row:
    """Of one seat: what a layer after the first adds, how a run ends, and the nats of layers before each one."""

    layer: Floats
    end: End
    nats: Floats


class Sheet:
    """Everything that the runs of one question cost, driven in one way (wire, chunk, draft)."""

    def __init__(
        self,
        world: World,
        job: Job,
        limits: Limits,
        conditions: Form,
        objective: Objective,
        way: tuple[WirePrecision, int | None, int],
        seats: Iterable[Seat] = (),
    ) -> None:
        """`seats` are the shared ones; each usable machine has one of its own before them. Where no machine may be used
        there is no seat, and nothing to ask."""
        self.world, self.job, self.limits, self.x, self.objective, self.way = (
            world,
            job,
            limits,
            conditions,
            objective,
            way,
        )
        self.search = Search(world, job, conditions, objective, limits, *way)
        spec = world.spec
        self.machines = self.search.machines
        alone = [self._whole(machine) for machine in self.machines]
        self.seats = (*alone, *seats)
        self.num_layers, self.num_seats = spec.num_layers, len(self.seats)
        self.size = self.search.size
        if not self.seats:
            return
        self._rows = [self._row(seat) for seat in self.seats]
        self.layer = np.stack([row.layer for row in self._rows])  # (seats, size)
        self.nats = np.stack([row.nats for row in self._rows])  # (seats, layers + 1), cumulated
        self.wire_nats = np.array(world.accuracy.wire_by_boundary(way[0], spec.num_layers))
        self.partial_nats = np.array(world.accuracy.partials_by_boundary(way[0], spec.num_layers))
        pairs = [(p, s) for p in range(self.num_seats) for s in range(self.num_seats) if p != s]
        self.enter = np.zeros((self.num_seats, self.num_seats, self.size))
        self.hop_partials, self.hop_streams = np.zeros((2, self.num_seats, self.num_seats))
        for p, s in pairs:  # layers of a run after the first are `layer`
            self.enter[p, s] = self._first(self._rows[p].end, self.seats[s], DEVICE, DEVICE)[0]
            crossed = crossings(self._rows[p].end, self.seats[s].groups, DEVICE)
            self.hop_partials[p, s], self.hop_streams[p, s] = crossed
        self.uses = np.array([[m in seat.machines for m in range(len(world.hosts))] for seat in self.seats])
        self.layer_bytes = np.array([self._bytes(seat) for seat in self.seats])  # (seats, machines)
        self.memory = np.array([host.device.memory_bytes for host in world.hosts])
        self._starts: dict[tuple[int, int, bool], Floats] = {}
        self._ends: dict[tuple[int, int, int], Floats] = {}

    def _whole(self, machine: int) -> Seat:
        spec, size = self.world.spec, len(self.world.hosts)
        return Seat(
            tuple(spec.num_kv_heads * (m == machine) for m in range(size)),
            tuple(spec.num_ffn_shards * (m == machine) for m in range(size)),
        )

    def _first(self, end: End | None, seat: Seat, embed: int, head: int) -> tuple[Floats, End]:
        """What the first layer on a seat adds after an end."""
        attention, middle = self.search.step(0, end, seat.groups, embed, head)
        ffn, last = self.search.step(1, middle, seat.shards, embed, head)
        return attention + ffn, last

    def _row(self, seat: Seat) -> _Row:
        _, end = self._first(None, seat, DEVICE, DEVICE)
        layer, end = self._first(end, seat, DEVICE, DEVICE)
        layer, end = self._first(end, seat, DEVICE, DEVICE)
        layers, accuracy = self.world.spec.num_layers, self.world.accuracy
        nats = np.zeros(layers + 1)
        for half, of in enumerate((seat.groups, seat.shards)):
            for machine, units in enumerate(of):
                if units:
                    by_half = accuracy.weights_by_half(self.world.hosts[machine].weights, layers)
                    nats[1:] += units / sum(of) * np.cumsum(by_half[half::2])
        return _Row(layer, end, nats)

    def _bytes(self, seat: Seat) -> list[float]:
        spec, positions = self.world.spec, self.job.prompt_tokens + self.job.tokens_out
        total = []
        for m, host in enumerate(self.world.hosts):
            group = counts.unit_weight_bytes(spec, Part.ATTENTION, host.dtype, host.weights)
            group += spec.kv_bytes_per_position(1, host.dtype) * positions
            shard = counts.unit_weight_bytes(spec, Part.FFN, host.dtype, host.weights)
            total.append(seat.groups[m] * group + seat.shards[m] * shard)
        return total

    @cached_property
    def tables(self) -> Floats:
        """(machines, 2, 2): bytes of a machine that is used besides its layers, by whether it has the embedding and
        the head."""
        spec, (_, chunk, draft) = replace(self.world.spec, num_layers=1), self.way
        world = replace(self.world, spec=spec)
        result = np.zeros((len(self.world.hosts), 2, 2))
        for m, host in enumerate(self.world.hosts):
            whole = Partition.all_on(spec, m)
            both = counts.weight_bytes(spec, (), True, True, host.dtype, host.weights)
            layer = self._bytes(self._whole(m))[m]
            besides = [memory_bytes(world, whole, m, self.job, chunk, one) - layer - both for one in (0, draft)]
            for embed, head in product((0, 1), repeat=2):
                ends = counts.weight_bytes(spec, (), bool(embed), bool(head), host.dtype, host.weights)
                result[m, embed, head] = ends + besides[embed]
        return result

    # Rules

    @cached_property
    def first(self) -> int:
        """Layers at the beginning that stay on the device."""
        floor = self.limits.floor
        kept = max(floor.first_layers if floor else 0, int(self.limits.first_layer_on_device))
        return min(kept, self.num_layers)

    @cached_property
    def last(self) -> int:
        """Layers at the end that stay on the device, where they are not among the first."""
        floor = self.limits.floor
        return min(floor.last_layers, self.num_layers - self.first) if floor else 0

    @cached_property
    def ends_at_home(self) -> bool:
        """Whether embedding and head must stay on the device."""
        return self.limits.floor is not None

    def ends(self, first: Seat, last: Seat) -> list[tuple[int, int]]:
        """Where embedding and head may be for a plan that begins and ends on these seats: with the first and last
        layers, or on the device, or the head beside the embedding."""
        if self.ends_at_home:
            return [(DEVICE, DEVICE)]
        embeds = [DEVICE] if self.limits.first_layer_on_device else [first.machines[0], DEVICE]
        found = dict.fromkeys((e, h) for e in embeds for h in (last.machines[-1], last.machines[0], e, DEVICE))
        return [pair for pair in found if set(pair) <= set(self.machines)]

    def keeps(self, seats: Sequence[int], ends: Ints) -> Bools:
        """(plans,): whether layers that must stay on the device do, with runs that end at `ends` (plans, runs)."""
        ok = np.ones(len(ends), dtype=bool)
        for number, seat in enumerate(seats):
            if self.seats[seat].machines != (DEVICE,):
                start = ends[:, number - 1] if number else np.zeros(len(ends), np.int64)
                ok &= (start >= self.first) & (ends[:, number] <= self.num_layers - self.last)
        return ok

    # Sums

    def start(self, seat: int, embed: int, loops: bool) -> Floats:
        """What the first layer of all adds, the embedding included. `loops`: the head is beside the embedding."""
        key = (seat, embed, loops)
        if key not in self._starts:
            v = self._first(None, self.seats[seat], embed, embed if loops else -1)[0].copy()
            _, streams = crossings(None, self.seats[seat].groups, embed)
            v[-1] += streams * self.wire_nats[0]
            self._drafting(v, embed)
            self._starts[key] = v
        return self._starts[key]

    def _drafting(self, v: Floats, embed: int) -> None:
        drafter, draft = self.world.drafter, self.way[2]
        if draft and drafter.model is not None:
            host = self.world.hosts[embed]
            host = replace(host, measured=None, weights=drafter.weights or host.weights)
            seconds = draft * host.model_s(drafter.model, 1, self.job.mean_context)
            v[self.search.at["busy"].start + 2 * embed + 1] += seconds
            v[self.search.at["critical"].stop - 1] += seconds * self.x[self.world.basis.slow(embed)]

    def finish(self, seat: int, embed: int, head: int) -> Floats:
        """What the way out of the last layer adds: head and token."""
        key = (seat, embed, head)
        if key not in self._ends:
            end = self._rows[seat].end
            v = self.search.finish(end, embed, head).copy()
            whole = tuple(int(m == head) for m in range(len(self.world.hosts)))
            partials, streams = crossings(end, whole, head)
            v[-1] += partials * self.partial_nats[-1] + streams * self.wire_nats[-1]
            self._ends[key] = v
        return self._ends[key]

    def sums(self, seats: Sequence[int], ends: Ints, embed: int, head: int) -> tuple[Floats, Bools, Floats]:
        """Of plans with runs on these seats that end at layers `ends` (plans, runs): their sums (plans, size), the
        machines they use (machines,), and the bytes each must hold (plans, machines)."""
        order = list(seats)
        fixed = self.start(order[0], embed, embed == head) + self.finish(order[-1], embed, head)
        for before, after in pairwise(order):
            fixed = fixed + self.enter[before, after]
        starts = np.concatenate([np.zeros((len(ends), 1), dtype=ends.dtype), ends[:, :-1]], axis=1)
        lengths = ends - starts
        labels = fixed + (lengths - 1) @ self.layer[order]
        labels[:, -1] += (self.nats[order, ends] - self.nats[order, starts]).sum(axis=1)
        for number, pair in enumerate(pairwise(order)):
            at = 2 * ends[:, number]
            labels[:, -1] += (
                self.hop_partials[pair] * self.partial_nats[at] + self.hop_streams[pair] * self.wire_nats[at]
            )
        used: Bools = np.any(self.uses[order], axis=0)
        used[[embed, head]] = True
        besides = np.array([self.tables[m, int(embed == m), int(head == m)] for m in range(len(used))])
        return labels, used, lengths @ self.layer_bytes[order] + besides * used

    def values_of(self, seats: Sequence[int], ends: Ints, embed: int, head: int) -> Floats:
        """(plans,): the objective of plans as in `sums`; inf where memory forbids one."""
        labels, used, held = self.sums(seats, ends, embed, head)
        values = self.value(labels, np.broadcast_to(used, (len(labels), len(used))))
        return np.where((held <= self.memory).all(axis=1), values, np.inf)

    def values(self, plans: Sequence[Runs]) -> Floats:
        """(plans,): the objective of each; inf where memory forbids it."""
        parts = [self.sums([s for s, _ in p.runs], np.array([[e for _, e in p.runs]]), p.embed, p.head) for p in plans]
        if not parts:
            return np.zeros(0)
        labels, used, held = (np.concatenate([np.atleast_2d(part[n]) for part in parts]) for n in range(3))
        return np.where((held <= self.memory).all(axis=1), self.value(labels, used.astype(bool)), np.inf)

    def value(self, labels: Floats, used: Bools, objective: Objective | None = None) -> Floats:
        """(plans,): the objective of sums (plans, size) of plans that use some machines (plans, machines)."""
        return (objective or self.objective).value(self.prices(labels, used))

    @cached_property
    def _tariffs(self) -> tuple[Floats, ...]:
        """Per machine, work and energy by place in a label: (kinds, busy), and of lanes (kinds, bytes)."""
        world, x, basis = self.world, self.x, self.world.basis
        size = len(world.hosts)
        device_s, cloud_s, device_j = np.zeros((3, 2 * size))
        for m, host in enumerate(world.hosts):
            device, shared = host.device, host.is_shared and m != DEVICE
            for kind in (0, 1):
                at = 2 * m + kind
                if m == DEVICE:
                    watts = (device.decode_w if kind else device.prefill_w) - device.idle_w
                    device_j[at], device_s[at] = watts * x[basis.slow(m)], 1.0
                elif not kind or not shared:
                    cloud_s[at] = 1.0
        up_s, down_s = np.zeros((2, 2 * len(self.search.lanes)))
        for n, (a, b) in enumerate(self.search.lanes):
            for kind in (0, 1):
                up_s[2 * n + kind] = x[basis.inverse(a, b)] * (a == DEVICE)
                down_s[2 * n + kind] = x[basis.inverse(a, b)] * (b == DEVICE)
        slots = np.array([h.is_shared * (m != DEVICE) / h.device.slots for m, h in enumerate(world.hosts)])
        waits = np.array([x[basis.wait(m)] for m in range(size)])
        return device_s, cloud_s, device_j, up_s, down_s, slots, waits

    def prices(self, labels: Floats, used: Bools) -> Prices:
        """The figures that objectives read; those of money and of the others' joules are 0."""
        device_s, cloud_s, device_j, up_s, down_s, slot, waits = self._tariffs
        at, chunks, later = self.search.at, len(self.search.steps) - 1, self.job.tokens_out - 1
        device = self.world.hosts[DEVICE].device
        tokens = self.world.drafter.tokens_per_round(self.way[2])
        critical, busy, lanes = labels[:, at["critical"]], labels[:, at["busy"]], labels[:, at["bytes"]]
        ttft, tpot = critical[:, :chunks].mean(axis=1), critical[:, chunks] / tokens
        if chunks > 1:
            ttft = ttft + (1 - 1 / chunks) * self._longest(busy[:, ::2], lanes[:, ::2])
        often = np.array([1.0, later / tokens])
        busy = busy * np.tile(often, busy.shape[1] // 2)
        lanes = lanes * np.tile(often, lanes.shape[1] // 2)
        service = ttft + later * tpot
        wait = np.where(used, waits, 0.0).max(axis=1)
        total = wait + service
        up, down = lanes @ up_s, lanes @ down_s
        joules = busy @ device_j + device.radio_w * (up + down) + device.idle_w * total
        slots = np.where(used, slot, 0.0).max(axis=1) * later * tpot
        nothing = np.zeros_like(total)
        work = Work(busy @ device_s, up, down, busy @ cloud_s + slots)
        return Prices(ttft, tpot, service, wait, total, joules, nothing, nothing, labels[:, -1], work)

    def _longest(self, busy: Floats, lanes: Floats) -> Floats:
        """The busiest machine or link while a prompt's chunks overlap."""
        slow = np.array([self.x[self.world.basis.slow(m)] for m in range(len(self.world.hosts))])
        inverse = np.array([self.x[self.world.basis.inverse(*lane)] for lane in self.search.lanes])
        longest: Floats = np.concatenate([busy * slow, lanes * inverse], axis=1).max(axis=1)
        return longest

    def decision(self, plan: Runs) -> Decision:
        """The plan as a decision."""
        layers: list[Placement] = []
        for seat, end in plan.runs:
            layers += [self.seats[seat].placement()] * (end - len(layers))
        return Decision(Partition(tuple(layers), plan.embed, plan.head), *self.way)


def without_deadline(objective: Objective) -> Objective:
    """The same objective where a miss counts for nothing: smooth, so that it has a gradient."""
    if isinstance(objective, DriftPlusPenalty) and objective.budgets.deadline_s is not None:
        return replace(objective, budgets=replace(objective.budgets, deadline_s=None))
    return objective
