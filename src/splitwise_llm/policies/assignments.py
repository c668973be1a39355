"""The best assignment of every unit to any of several machines, by an exact search over halves.

A partial assignment (a *label*) is a vector of sums: critical seconds per step, work per machine, bytes per link,
units per machine. What is still to come depends on the last half alone, so among labels that end alike one that is
nowhere larger in anything the objective or a limit reads makes the other useless. That is exact for every objective
that never falls when a figure rises. Units of a half are alike, so only how many go to each machine matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Job, Limits, Table, World, bill, memory_bytes, obstacle
from splitwise_llm.cost.counts import unit_weight_bytes, units_in
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Part, Partition, Placement
from splitwise_llm.plan import DEVICE, Step
from splitwise_llm.policies.objective import Objective

Floats = NDArray[np.float64]
Counts = tuple[int, ...]
"""Units of one half per machine."""


@dataclass(frozen=True, slots=True)
class End:
    """How a partial assignment ends: the last half, and, where it is shared, who held the stream before it, on which
    single machine the stage before it ran, and which of two clocks was ahead (see `cost.bill.Lead`)."""

    counts: Counts
    held: tuple[int, ...] = ()
    after: int | None = None
    ahead: int | None = None

    @property
    def machines(self) -> tuple[int, ...]:
        return tuple(machine for machine, units in enumerate(self.counts) if units)


@dataclass(frozen=True, slots=True)
class Found:
    """The best decision, its value, and how many labels were kept at most; `exact` unless some were dropped."""

    decision: Decision
    value: float
    labels: int
    exact: bool


class Search:
    """One search: a world, a job, conditions, an objective, limits, and fixed wire, chunk and draft length."""

    def __init__(
        self,
        world: World,
        job: Job,
        conditions: Form,
        objective: Objective,
        limits: Limits,
        wire: WirePrecision,
        chunk: int | None = None,
        draft: int = 0,
        *,
        share: bool = True,
        max_labels: int = 4000,
    ) -> None:
        """`share` allows halves divided over machines; `max_labels` bounds the labels kept per end."""
        self.world, self.job, self.x, self.objective, self.limits = world, job, conditions, objective, limits
        self.tools = (wire, chunk, draft)
        self.share, self.max_labels = share, max_labels
        self.machines = [
            machine
            for machine in range(len(world.hosts))
            if machine not in limits.unreachable and (limits.only is None or machine in limits.only)
        ]
        probe = Decision(Partition.all_on(world.spec, DEVICE), wire, chunk, draft)
        plan = world.plan(probe)
        chunks = probe.num_chunks(job.prompt_tokens)
        self.steps = [plan.step(index, job.prompt_tokens) for index in range(chunks)]
        self.steps.append(Step(chunks, job.mean_context - 1, draft + 1, emits=True, is_prefill=False))
        self.lanes = sorted({(a, b) for pair in world.links for a, b in (pair, pair[::-1])})
        self._cache: dict[tuple[int, End | None, Counts, int, int], tuple[Floats, End]] = {}

    # A label: [critical s per step | busy s per machine and step kind | bytes per lane and kind | units | nats]

    @cached_property
    def at(self) -> dict[str, slice]:
        sizes = {
            "critical": len(self.steps),
            "busy": 2 * len(self.world.hosts),
            "bytes": 2 * len(self.lanes),
            "units": 2 * len(self.world.hosts),
            "nats": 1,
        }
        starts = np.cumsum([0, *sizes.values()]).tolist()
        return {name: slice(starts[n], starts[n + 1]) for n, name in enumerate(sizes)}

    def _start(self, name: str) -> int:
        return int(self.at[name].start)

    @property
    def size(self) -> int:
        return self._start("nats") + 1

    def _seconds(self, machine: int, part: Part, units: int, step: Step) -> float:
        rows, context = step.count, step.start + step.count
        return self.world.hosts[machine].half_s(self.world.spec, part, units, rows, context, rested=True)

    def _kind(self, step: int) -> int:
        return int(step == len(self.steps) - 1)

    def _work(self, v: Floats, machine: int, step: int, seconds: float) -> float:
        """Count work; the seconds it takes under the conditions."""
        v[self._start("busy") + 2 * machine + self._kind(step)] += seconds
        return float(seconds * self.x[self.world.basis.slow(machine)])

    def _cross(self, v: Floats, src: int, dst: int, step: int, size: float) -> float:
        """Count bytes; the seconds a message takes under the conditions."""
        world, basis = self.world, self.world.basis
        seconds = 0.0
        for a, b in self._legs(src, dst):
            v[self._start("bytes") + 2 * self.lanes.index((a, b)) + self._kind(step)] += size
            seconds += world.hosts[a].message_s(size) + world.hosts[b].message_s(size)
            seconds += self.x[basis.rtt(a, b)] / 2 + size * self.x[basis.inverse(a, b)]
        return seconds

    def _legs(self, src: int, dst: int) -> tuple[tuple[int, int], ...]:
        near = DEVICE in (src, dst) or (min(src, dst), max(src, dst)) in self.world.links
        return ((src, dst),) if near else ((src, DEVICE), (DEVICE, dst))

    def _visit(self, machine: int) -> float:
        return float(self.x[self.world.basis.join(machine)])

    def _payload(self, step: Step) -> float:
        return self.tools[0].payload_bytes(step.count, self.world.spec.d_model)

    def _close(self, v: Floats, end: End, part: Part, following: Sequence[int], head_only: bool) -> tuple[int, ...]:
        """Add what the last half, if shared, and the way to the next machines cost; who holds the stream then."""
        machines = end.machines
        shared = len(machines) > 1
        held = tuple(m for m in machines if m in following) or machines[:1]
        for number, step in enumerate(self.steps):
            silent = head_only and not step.emits
            size = (
                self.tools[0].payload_bytes(1, self.world.spec.d_model)
                if head_only and step.is_prefill
                else (self._payload(step))
            )
            if shared:
                computed = {}
                goes_on = end.ahead is not None and tuple(following) == machines and not silent
                for m in machines:
                    arrival = 0.0
                    if end.ahead is not None and m != end.ahead:
                        arrival = self._arrival[number, end.ahead, m]
                    elif m not in end.held:
                        arrival = self._arrival[number, end.held[0], m]
                    waited = step.is_prefill or m != end.after
                    seconds = self._seconds(m, part, end.counts[m], step) + self.world.hosts[m].stage_s(
                        step.count, rested=waited, is_prefill=step.is_prefill
                    )
                    visit = 0.0 if m == end.after else self._visit(m)
                    computed[m] = arrival + visit + self._work(v, m, number, seconds)
                # In a run of two, whoever was behind goes on first: how late the other is then, delays nobody yet.
                joins = [m for m in (machines if silent else held) if not (goes_on and m == end.ahead)]
                ends = [computed[m] for m in joins]
                for w, j in permutations(machines, 2) if not silent else ():
                    if j in held:
                        summed = computed[w] + self._cross(v, w, j, number, size)
                        came = j not in end.held and w == end.held[0]
                        queued = self._queued(number, w, j, size) if came else summed
                        ends += [summed, queued] if j in joins else []
                v[number] += max(ends)
            if silent:
                continue
            others = [m for m in following if m not in held]
            if len(following) == 1:
                for m in others:
                    v[number] += self._cross(v, held[0], m, number, size)
            else:  # the next half is shared: whoever gets the stream waits in that half's maximum
                for m in others:
                    self._cross(v, held[0], m, number, size)
        return held

    def _queued(self, number: int, src: int, dst: int, size: float) -> float:
        """Seconds until a partial sum is there that queues behind the stream (see `cost.bill`)."""
        slowest = max(float(self.x[self.world.basis.inverse(*leg)]) for leg in self._legs(src, dst))
        return self._arrival[number, src, dst] + size * slowest

    @cached_property
    def _arrival(self) -> dict[tuple[int, int, int], float]:
        """Seconds until the stream of a step is at another machine."""
        uncounted = np.zeros(self.size)
        return {
            (number, a, b): self._cross(uncounted, a, b, number, self._payload(step))
            for number, step in enumerate(self.steps)
            for a, b in permutations(range(len(self.world.hosts)), 2)
        }

    def step(self, half: int, end: End | None, counts: Counts, embed: int, head: int) -> tuple[Floats, End]:
        """What one more half adds after an end (None: after the embedding), and the new end."""
        part = Part.FFN if half % 2 else Part.ATTENTION
        key = (half % 2, end, counts, embed, head) if end is None else (half % 2, end, counts, -1, -1)
        if key in self._cache:
            return self._cache[key]
        v = np.zeros(self.size)
        following = [machine for machine, units in enumerate(counts) if units]
        alone = len(following) == 1
        if end is None:
            loops = embed == head
            held: tuple[int, ...] = (embed,)
            for number, step in enumerate(self.steps):
                if step.is_prefill or not loops:
                    v[number] += self._visit(embed)
                waited = step.is_prefill or not loops
                stage_s = self.world.hosts[embed].stage_s(step.count, rested=waited, is_prefill=step.is_prefill)
                v[number] += self._work(v, embed, number, stage_s)
            previous = End(tuple(int(m == embed) for m in range(len(self.world.hosts))))
        else:
            previous = end
        other = Part.ATTENTION if part is Part.FFN else Part.FFN
        held = self._close(v, previous, other, following, False)
        if alone:
            machine = following[0]
            fresh = len(previous.machines) > 1 or previous.machines[0] != machine
            for number, step in enumerate(self.steps):
                seconds = self._seconds(machine, part, counts[machine], step)
                if fresh:
                    seconds += self.world.hosts[machine].stage_s(step.count, rested=True, is_prefill=step.is_prefill)
                    v[number] += self._visit(machine)
                v[number] += self._work(v, machine, number, seconds)
        for machine in following:
            v[self._start("units") + 2 * machine + half % 2] += counts[machine]
        before = previous.machines
        new = (
            End(counts)
            if alone
            else End(counts, held, before[0] if len(before) == 1 else None, _ahead(previous, held, tuple(following)))
        )
        self._cache[key] = (v, new)
        return v, new

    def finish(self, end: End, embed: int, head: int) -> Floats:
        """What the head and the way of the token add after the last half."""
        v = np.zeros(self.size)
        serial_here = end.machines == (head,)
        self._close(v, end, Part.FFN, (head,), not serial_here)
        for number, step in enumerate(self.steps):
            rows = 1 if step.is_prefill else step.count
            if step.emits:
                seconds = self.world.hosts[head].head_s(self.world.spec, rows, rested=True)
                if not serial_here:
                    seconds += self.world.hosts[head].stage_s(step.count, rested=True, is_prefill=step.is_prefill)
                    v[number] += self._visit(head)
                v[number] += self._work(v, head, number, seconds)
            ids = 4.0 * rows
            if head != DEVICE and step.emits:
                made = (
                    4.0 if embed == head else ids
                )  # of drafted tokens, a loop away from the device sends what it made
                seconds = self._cross(v, head, DEVICE, number, made)
                v[number] += seconds if step.is_prefill or embed != head else 0.0
            if embed != DEVICE and step.is_prefill:
                v[number] += self._cross(v, DEVICE, embed, number, 4.0 * step.count)
            if not step.is_prefill and (embed != head or embed == DEVICE):
                v[number] += self.world.hosts[DEVICE].token_s
            if embed not in (DEVICE, head) and not step.is_prefill:
                v[number] += self._cross(v, DEVICE, embed, number, 4.0 * step.count)
        return v

    # The search

    def _divisions(self, part: Part) -> list[Counts]:
        units, size = units_in(self.world.spec, part), len(self.world.hosts)
        result: list[Counts] = []
        for counts in _compositions(units, len(self.machines)):
            if self.share or max(counts) == units:
                whole = [0] * size
                for machine, number in zip(self.machines, counts, strict=True):
                    whole[machine] = number
                result.append(tuple(whole))
        return result

    def _allowed(self, half: int, counts: Counts) -> bool:
        layers, layer = self.world.spec.num_layers, half // 2
        floor = self.limits.floor
        kept = self.limits.first_layer_on_device and layer == 0
        if floor:
            kept = kept or layer < floor.first_layers or layer >= layers - floor.last_layers
        return not kept or counts[DEVICE] == sum(counts)

    def _memory(self, labels: Floats) -> Floats:
        """Bytes of linear weights and cache of each machine so far: (labels, machines); ends apart."""
        spec = self.world.spec
        units = labels[:, self.at["units"]].reshape(len(labels), -1, 2)
        positions = self.job.prompt_tokens + self.job.tokens_out
        per = np.array(
            [
                (
                    unit_weight_bytes(spec, Part.ATTENTION, host.dtype, host.weights)
                    + spec.kv_bytes_per_position(1, host.dtype) * positions,
                    unit_weight_bytes(spec, Part.FFN, host.dtype, host.weights),
                )
                for host in self.world.hosts
            ]
        )
        used: Floats = (units * per).sum(axis=-1)
        return used

    def _reads(self, labels: Floats) -> Floats:
        """What the objective can depend on, each column so that less is never worse: (labels, columns)."""
        chunks = len(self.steps) - 1
        critical = labels[:, self.at["critical"]]
        tokens = self.world.drafter.tokens_per_round(self.tools[2])
        prompt, token = critical[:, :chunks].mean(axis=1), critical[:, chunks] / tokens
        columns = [prompt + (self.job.tokens_out - 1) * token] if self.objective.only_time else [prompt, token]
        if chunks > 1 or not self.objective.only_time:
            columns += [labels[:, n] for n in range(*self.at["busy"].indices(self.size))]
            columns += [labels[:, n] for n in range(*self.at["bytes"].indices(self.size))]
            columns += [labels[:, -1]]
        if self._waits.any():  # the session starts when the slowest to admit it has
            units = labels[:, self.at["units"]].reshape(len(labels), -1, 2).sum(axis=-1)
            columns.append((np.where(units > 0, self._waits, 0.0)).max(axis=1))
        return np.stack(columns, axis=1)

    @cached_property
    def _waits(self) -> Floats:
        basis = self.world.basis
        return np.array([self.x[basis.wait(machine)] for machine in range(len(self.world.hosts))])

    def best(self) -> Found | None:
        """The best admissible assignment, embedding and head included; None when nothing is admissible."""
        best: Found | None = None
        kept, exact = 0, True
        floor = self.limits.floor is not None
        for embed, head in product(self.machines, self.machines):
            if (floor and (embed, head) != (DEVICE, DEVICE)) or (self.limits.first_layer_on_device and embed != DEVICE):
                continue
            labels, paths, all_kept, most = self._labels(embed, head)
            kept, exact = max(kept, most), exact and all_kept
            alone = [Decision(Partition.all_on(self.world.spec, embed), *self.tools)] if embed == head else []
            # A machine that never waits for others is faster than its labels say.
            for decision in (*alone, *self._decisions(labels, paths, embed, head)):
                if obstacle(self.world, decision, self.job, self.limits):
                    continue
                value = self._value(decision)
                if best is None or value < best.value:
                    best = Found(decision, value, kept, exact)
        return best and Found(best.decision, best.value, kept, exact)

    def _value(self, decision: Decision) -> float:
        prices = Table(self.world, [bill(self.world, decision, self.job)]).at(self.x)
        return float(self.objective.value(prices)[0])

    def _labels(self, embed: int, head: int) -> tuple[Floats, list[tuple[Counts, ...]], bool, int]:
        """All final labels that survive, with their halves."""
        halves = 2 * self.world.spec.num_layers
        limits = np.array([host.device.memory_bytes for host in self.world.hosts])
        by_accuracy = self.world.accuracy
        layers = self.world.spec.num_layers
        half_nats = [by_accuracy.weights_by_half(host.weights, layers) for host in self.world.hosts]
        wire_nats = by_accuracy.wire_by_boundary(self.tools[0], layers)
        partial_nats = by_accuracy.partials_by_boundary(self.tools[0], layers)
        start: dict[End | None, tuple[Floats, list[tuple[Counts, ...]]]] = {None: (np.zeros((1, self.size)), [()])}
        front, exact, most = start, True, 1
        for half in range(halves):
            grown: dict[End | None, tuple[list[Floats], list[tuple[Counts, ...]]]] = {}
            part = Part.FFN if half % 2 else Part.ATTENTION
            for counts in self._divisions(part):
                if not self._allowed(half, counts):
                    continue
                units = sum(counts)
                nats = sum(number / units * half_nats[m][half] for m, number in enumerate(counts))
                for end, (labels, paths) in front.items():
                    v, new = self.step(half, end, counts, embed, head)
                    added = labels + v
                    added[:, -1] += nats
                    partials, streams = crossings(end, counts, embed)
                    added[:, -1] += partials * partial_nats[half] + streams * wire_nats[half]
                    fits = np.all(self._memory(added) <= limits, axis=1)
                    where = grown.setdefault(new, ([], []))
                    where[0].append(added[fits])
                    where[1].extend((*path, counts) for path, fit in zip(paths, fits.tolist(), strict=True) if fit)
            front = {}
            for end, (parts, paths) in grown.items():
                labels = np.concatenate(parts)
                if not len(labels):
                    continue
                keep, all_kept = self._prune(labels)
                exact, most = exact and all_kept, max(most, len(keep))
                front[end] = (labels[keep], [paths[n] for n in keep])
        last: list[Floats] = []
        whole: list[tuple[Counts, ...]] = []
        for end, (labels, paths) in front.items():
            if end is None:
                continue
            last.append(labels + self.finish(end, embed, head))
            whole += paths
        if not last:
            return np.zeros((0, self.size)), [], exact, most
        return np.concatenate(last), whole, exact, most

    def _prune(self, labels: Floats) -> tuple[list[int], bool]:
        """Labels that no other makes useless, and whether that is all of them."""
        columns = [self._reads(labels)]
        memory = self._memory(labels)
        if self._tight:
            columns.append(memory[:, self._tight])
        reads = np.concatenate(columns, axis=1)
        order = np.argsort(reads.sum(axis=1), kind="stable")
        kept: list[int] = []
        chosen = np.empty((0, reads.shape[1]))
        slack = 1e-12 * (1 + np.abs(reads).max(axis=0))
        for index in order.tolist():
            if kept and ((chosen <= reads[index] + slack).all(axis=1)).any():
                continue
            if len(kept) >= self.max_labels:
                return kept, False
            kept.append(index)
            chosen = np.vstack([chosen, reads[index]])
        return kept, True

    @cached_property
    def _memory_of_all(self) -> Floats:
        """Bytes a machine would need for everything."""
        spec = self.world.spec
        return np.array(
            [
                memory_bytes(self.world, Partition.all_on(spec, machine), machine, self.job, *self.tools[1:])
                for machine in range(len(self.world.hosts))
            ]
        )

    @cached_property
    def _tight(self) -> list[int]:
        """Machines that cannot hold everything: their memory is a thing to be saved."""
        hosts = enumerate(self.world.hosts)
        return [machine for machine, host in hosts if self._memory_of_all[machine] > host.device.memory_bytes]

    def _decisions(
        self, labels: Floats, paths: Sequence[tuple[Counts, ...]], embed: int, head: int
    ) -> Iterator[Decision]:
        wire, chunk, draft = self.tools
        if self.objective.only_time and len(self.steps) == 2 and not self._tight and not self._waits.any():
            paths = [paths[int(np.argmin(self._reads(labels)[:, 0]))]] if len(paths) else []
        for path in paths:
            owners = [tuple(m for m, number in enumerate(counts) for _ in range(number)) for counts in path]
            layers = tuple(Placement(a, f) for a, f in zip(owners[::2], owners[1::2], strict=True))
            yield Decision(Partition(layers, embed, head), wire, chunk, draft)


def _ahead(previous: End, held: tuple[int, ...], pair: tuple[int, ...]) -> int | None:
    """Which of two machines that share the next half is ahead, if one is."""
    if len(pair) != 2:
        return None
    if previous.machines == pair:
        return None if previous.ahead is None else next(machine for machine in pair if machine != previous.ahead)
    holders = [machine for machine in pair if machine in held]
    return holders[0] if len(holders) == 1 else None


def crossings(end: End | None, counts: Counts, embed: int) -> tuple[bool, bool]:
    """Whether parts of a sum cross between the last half and the next, and whether the stream does."""
    following = {machine for machine, units in enumerate(counts) if units}
    before = (embed,) if end is None else end.machines
    held = following & set(before) or {before[0]}
    return len(before) > 1, bool(following - held)


def _compositions(units: int, machines: int) -> Iterator[Counts]:
    """Every way to give `units` equal units to `machines` machines."""
    if machines == 1:
        yield (units,)
        return
    for first in range(units + 1):
        for rest in _compositions(units - first, machines - 1):
            yield (first, *rest)
