"""The best plan for the rest of a running request among all cuts and U-shapes, without pricing every way there.

Every member of a family is priced for the rest of the request with a bound on the way there, all at once; then ways
are priced as `cost.moving` does, in the order of these bounds, until the next bound is no better than what was found.
What is found is then the best of all. It does not know what is made small.

The bound. A gap is closed by running halves again, from a boundary that somebody has kept to the last half that
lacks something, or by carrying rows. So every half between a lacking one and the nearest boundary kept before it is
computed again, and the stream crosses where its machine changes, or the rows are carried: for each lacking half the
cheaper of the two, whatever gap it belongs to. What feeds a boundary and waiting for an iteration are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Bill, Delay, Prices, Table, Work, units_in
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Part
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.family import Family, Members
from splitwise_llm.policies.in_flight import Running, is_less
from splitwise_llm.policies.objective import Objective
from splitwise_llm.rebuild import Held

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST = 16
"""Ways priced for one answer. Where bounds are so close that more would be needed, the best so far is taken."""


@dataclass(frozen=True, slots=True)
class Onward:
    """What is chosen, what the rest of the request is then worth, and how much less it could be at best."""

    decision: Decision
    value: float
    gap: float
    """0: nothing considered is better."""
    priced: int
    """Ways that were priced."""


class Later:
    """A family's parts, priced for one later token and nothing else: the rest of a request is a multiple of it."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._tables = [Table(table.world, [_later(one) for one in table.bills]) for _, table, _ in family.parts]
        x = family.world.conditions()
        self._nats = [family.prices(part, x).nats for part in range(len(family.parts))]

    def rest(self, part: int, running: Running, seconds: Floats) -> Prices:
        """So many tokens, and a way there of some seconds (members,); work, money and others' joules of it apart."""
        tokens, idle_j = float(running.tokens), running.world.hosts[DEVICE].device.idle_w * seconds
        one = self._tables[part].mixed(self.family.parts[part][2], running.conditions)
        service = tokens * one.service_s + seconds
        work = Work(*(tokens * getattr(one.work, name) for name in ("device_s", "up_s", "down_s", "cloud_s")))
        return Prices(
            seconds, one.tpot_s, service, np.zeros_like(seconds), service, tokens * one.device_j + idle_j,
            tokens * one.total_j + idle_j, tokens * one.usd, self._nats[part], work,
        )  # fmt: skip


def _later(one: Bill) -> Bill:
    nothing = np.zeros_like(one.token.device_s)
    no_time = Delay.of([nothing])
    prompt = replace(
        one.prompt, device_j=nothing, others_j=nothing, usd=nothing, device_s=nothing, up_s=nothing, down_s=nothing,
        cloud_s=nothing,
    )  # fmt: skip
    return replace(one, ttft=no_time, wait=no_time, prompt=prompt, job=replace(one.job, tokens_out=2))


def best_of_all(
    running: Running, objective: Objective, families: Sequence[Later], others: list[Decision]
) -> Onward | None:
    """The best way on among members of families and some other decisions; of equal ones the first of `others`, where
    the present plan should be. None where there is nothing."""
    found, value, priced = None, np.inf, len(others)
    if others:
        values = running.values(objective, others)
        found = running.best(objective, others)
        value = float(values[others.index(found)])
    known = set(others)
    for bound, decision in _by_bound(running, objective, families):
        if found is not None and not is_less(bound, value):
            break
        if decision in known:
            continue
        if priced >= len(others) + MOST and found is not None:
            return Onward(found, value, value - bound, priced)
        own = float(running.values(objective, [decision])[0])
        known.add(decision)
        priced += 1
        if found is None or is_less(own, value):
            found, value = decision, own
    return None if found is None else Onward(found, value, 0.0, priced)


def _by_bound(running: Running, objective: Objective, families: Sequence[Later]) -> Iterator[tuple[float, Decision]]:
    """Members of families and what they are worth at best, in that order."""
    bounds: list[Floats] = []
    where: list[tuple[Family, int]] = []
    for later in families:
        family = later.family
        ways = Ways(running, family.worker) if running.placement.tokens_out else None
        chunks = {members.chunk for members, _, _ in family.parts}
        if ways:  # the prompt is done; how it was, is all the same to the rest
            chunks = {running.present.prefill_chunk} & chunks or set(sorted(chunks, key=str)[:1])
        for part, (members, _, _) in enumerate(family.parts):
            if members.chunk not in chunks:
                continue
            if ways:
                seconds = ways.seconds(members)
            else:
                whole = family.prices(part, running.conditions)
                seconds = whole.ttft_s + whole.wait_s
            bounds.append(objective.value(later.rest(part, running, seconds)))
            where.append((family, part))
    if not bounds:
        return
    every = np.concatenate(bounds)
    starts = np.cumsum([0] + [len(each) for each in bounds])
    for index in np.argsort(every, kind="stable").tolist():
        at = int(np.searchsorted(starts, index, side="right")) - 1
        family, part = where[at]
        yield float(every[index]), family.decision(part, index - int(starts[at]))


class Ways:
    """Bounds on the seconds that a running request takes to get to members of a family of one worker. Arrays over
    (machine, half) have the device first."""

    def __init__(self, running: Running, worker: int) -> None:
        self.running, self.machines = running, (DEVICE, worker)
        spec, context = running.world.spec, running.placement.context
        self.halves = 2 * spec.num_layers
        held = [running.holdings.machines[machine] for machine in self.machines]
        self.covered = np.full((2, self.halves), context)
        """Positions, from the front, of which it has all units."""
        for row, one in enumerate(held):
            for half in range(0, self.halves, 2):
                self.covered[row, half] = min(one.covered(half, range(spec.num_kv_heads)), context)
        self.lacking = self.covered < context
        self.kept = np.array([[self._kept(half, start) for half, start in enumerate(row)] for row in self.covered])
        """The nearest boundary before a lacking half that anybody keeps; 0: the ids."""
        rows = [
            int((context - row[lacks]).min(initial=context))
            for row, lacks in zip(self.covered, self.lacking, strict=True)
        ]
        self.again = np.array([[self._again_s(m, number) for number in rows] for m in self.machines])
        """(machine, whose rows are filled, half): running a half again for at least so many positions."""
        self.rows = rows
        self.carrying = np.stack([self._carry_s(m, one) for m, one in zip(self.machines, held, strict=True)])
        self._known: dict[tuple[object, ...], Floats] = {}

    def _kept(self, half: int, start: int) -> int:
        """Fills may begin further back, never later."""
        held, context = self.running.holdings.machines, self.running.placement.context
        if half % 2 or start >= context:
            return 0
        return next((h for h in range(half, 0, -1) if any(one.keeps(h, start, context) for one in held)), 0)

    def _again_s(self, machine: int, rows: int) -> Floats:
        run = self.running
        slow = float(run.conditions[run.world.basis.slow(machine)])
        host, spec = run.world.hosts[machine], run.world.spec
        seconds = [host.half_s(spec, part, units_in(spec, part), rows, run.placement.context) for part in Part]
        return np.tile(slow * np.array(seconds), spec.num_layers)

    def _carry_s(self, machine: int, held: Held) -> Floats:
        """(halves,): the missing rows of each attention half over the fastest way into a machine."""
        run, spec = self.running, self.running.world.spec
        basis, context = run.world.basis, run.placement.context
        sources = [a if b == machine else b for a, b in run.world.links if machine in (a, b)]
        fastest = min((float(run.conditions[basis.inverse(src, machine)]) for src in sources), default=0.0)
        dtypes = {run.world.hosts[m].dtype for m in run.holdings.holders}
        row_bytes = min((spec.kv_bytes_per_position(1, dtype) for dtype in dtypes), default=0.0)
        missing = np.zeros(self.halves)
        for half in range(0, self.halves, 2):
            has = held.filled.get(half, {})
            missing[half] = spec.num_kv_heads * context - sum(min(positions, context) for positions in has.values())
        return missing * row_bytes * fastest

    def _crossing_s(self, wire: WirePrecision, src: int, dst: int, rows: int) -> float:
        """The stream of so many positions from one machine to the other."""
        run = self.running
        size = wire.payload_bytes(rows, run.world.spec.d_model)
        software_s = run.world.hosts[src].message_s(size) + run.world.hosts[dst].message_s(size)
        basis, x = run.world.basis, run.conditions
        return software_s + float(x[basis.rtt(src, dst)] / 2 + size * x[basis.inverse(src, dst)])

    def seconds(self, members: Members) -> Floats:
        """(members,): at least what getting to each takes."""
        shape = members.shape
        run = self.running
        used = {*shape.runs, shape.embed, shape.head}
        known = {*run.holdings.holders, *run.present.partition.machines}
        wait = max((float(run.conditions[run.world.basis.wait(m)]) for m in used - known), default=0.0)
        key = (shape.runs, members.wire, members.prefill_wire, members.ends.tobytes())
        if key not in self._known:
            self._known[key] = self._closing(members)
        return wait + self._known[key]

    def _closing(self, members: Members) -> Floats:
        """(members,): every half that is run again or carried."""
        halves = np.arange(self.halves)
        run_of = (members.ends[:, :-1, None] <= halves).sum(axis=1)  # (members, halves)
        away = np.array([machine != DEVICE for machine in members.shape.runs])[run_of]
        lacks = np.where(away, self.lacking[1], self.lacking[0])
        if not lacks.any():
            return np.zeros(len(away))
        # For each half the next lacking one from it on, whose fill may run it again.
        following = np.where(lacks, halves, self.halves)
        following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
        at = np.minimum(following, self.halves - 1)
        kept = np.take_along_axis(np.where(away, self.kept[1], self.kept[0]), at, axis=1)
        again = (following < self.halves) & (kept <= halves)
        one, other = (np.where(away, self.again[1, n], self.again[0, n]) for n in (0, 1))
        for_worker = np.take_along_axis(away, at, axis=1)
        cost = np.where(again, np.where(for_worker, other, one), 0.0)
        inside = again[:, 1:] & again[:, :-1] & (following[:, 1:] == following[:, :-1])
        member, half = np.nonzero(inside & (away[:, 1:] != away[:, :-1]))
        device, worker = self.machines
        wires = {members.wire, members.prefill_wire or members.wire}
        crossing = np.array([
            [min(self._crossing_s(wire, *way, rows) for wire in wires) for rows in self.rows]
            for way in ((worker, device), (device, worker))
        ])  # fmt: skip
        cost[member, half + 1] += crossing[away[member, half + 1].astype(int), for_worker[member, half + 1].astype(int)]
        # Per lacking half: what was added since the lacking half before it, or carrying.
        total = np.zeros((len(away), self.halves + 1))
        np.cumsum(cost, axis=1, out=total[:, 1:])
        before = np.zeros_like(following)
        np.maximum.accumulate(np.where(lacks, halves + 1, 0)[:, :-1], axis=1, out=before[:, 1:])
        filling = total[:, 1:] - np.take_along_axis(total, before, axis=1)
        carrying = np.where(away, self.carrying[1], self.carrying[0])
        result: Floats = np.where(lacks, np.minimum(filling, carrying), 0.0).sum(axis=1)
        return result
