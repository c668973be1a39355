"""The best decision of all, exactly: over every cut and U-shape, and over divided halves where they can pay.

It does not know what is made small (an `Objective` does), nor where conditions come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import comb, prod

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Job, Limits, Table, World, bill, obstacle
from splitwise_llm.cost.counts import units_in
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.assignments import Found, Search
from splitwise_llm.policies.chains import chain
from splitwise_llm.policies.family import Family
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.policies.objective import Latency, Objective
from splitwise_llm.policies.onward import Later, Onward, best_of_all
from splitwise_llm.policies.pipelines import exact_latency

Floats = NDArray[np.float64]
_Way = tuple[WirePrecision, int | None, int]
"""Wire precision, prefill chunk, draft."""
FEW_LABELS = 60
"""Labels kept per end for a large model on several workers, where the search could take minutes; it then says that
it is not exact, and the fastest row of machines is tried beside it."""
SMALL = 1500
"""Ways for halves to follow one another, times halves, up to which every assignment is searched, whatever it can
bring: a second at most, for any objective."""

REMEMBERED = 64
"""Fastest assignments remembered, by their conditions."""
MANY = 2000
"""Ways to divide one layer beyond which divided halves are not searched: three machines and a large model. Layers
divided in proportion to speed are then tried instead."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision and its value under the objective."""

    decision: Decision
    value: float


@dataclass(frozen=True, slots=True)
class Solution:
    """The best decision, the best of another partition, and how it was found. The runner-up to one
    that divides halves is not the next division, which would say nothing, but the best cut or rule."""

    best: Choice
    runner_up: Choice | None
    considered: int
    shared_considered: bool
    """Whether divided halves were searched, too: they can pay here, or the model is small."""
    exact: bool
    """Whether every assignment was considered. If not, then every cut and U-shape was, and every other plan makes
    more crossings, or divides a half beside one, which saves less than `min(e, c)^2 / (e + c)` each time."""


class Solver:
    """The families of one world, job, tools and limits, to be asked under many conditions and objectives."""

    def __init__(self, world: World, job: Job, tools: Tools, limits: Limits, step: int = 1) -> None:
        """`step` 2 leaves out cuts inside layers, for a third of the time."""
        self.world, self.job, self.tools, self.limits = world, job, tools, limits
        workers = range(1, len(world.hosts)) or (DEVICE,)
        self.families = [Family(world, job, tools, worker, limits, step) for worker in workers]
        self._fastest: dict[tuple[bytes, *_Way, bool], Found | None] = {}
        self._later: list[Later] = []

    def __len__(self) -> int:
        return sum(len(family) for family in self.families)

    def solve(self, conditions: Form, objective: Objective) -> Solution:
        """The best decision under these conditions. Raises RequestError that says what forbids everything."""
        best_of: dict[Partition, Choice] = {}
        for choice in self.cuts(conditions, objective):
            _offer(best_of, choice)
        workers = len(self.world.hosts) - 1
        share = bool(workers) and (self._is_small or any(self._sharing(conditions)))
        exact = share or not workers
        if share or workers > 1:
            for decision, proven in self._searched(conditions, objective, share):
                exact = exact and proven
                if decision is not None:
                    prices = Table(self.world, [bill(self.world, decision, self.job)]).at(conditions)
                    _offer(best_of, Choice(decision, float(objective.value(prices)[0])))
            for decision in self._chains(conditions):
                prices = Table(self.world, [bill(self.world, decision, self.job)]).at(conditions)
                _offer(best_of, Choice(decision, float(objective.value(prices)[0])))
        if not best_of:
            known = "" if exact else "; not every partition was tried, the model is too large for that"
            raise RequestError(nothing_admissible(self.world, self.job, self.limits) + known)
        first, *others = sorted(best_of.values(), key=lambda choice: choice.value)
        return Solution(first, others[0] if others else None, len(self), share, exact)

    def onward(self, running: Running, objective: Objective) -> Onward:
        """The best for the rest of a running request, the way there included: the best of all cuts and U-shapes, and,
        where they can pay, of layers divided by speed and rows of machines, of what was chosen at admission, and of
        staying, which is what equal values mean. Raises RequestError that says what forbids everything."""
        self._later = self._later or [Later(family) for family in self.families]
        seeds = dict.fromkeys((running.present, running.placement.admitted or running.present))
        if len(self.world.hosts) > 2:
            seeds |= dict.fromkeys(self._chains(running.conditions))
        if any(self._sharing(running.conditions)):
            divided = [Decision(one, *way) for one in self._by_speed(running.conditions) for way in self._tools()]
            seeds |= dict.fromkeys(divided)
        possible = [one for one in seeds if obstacle(self.world, one, self.job, running.limits) is None]
        found = best_of_all(running, objective, self._later, possible)
        if found is None:
            raise RequestError(nothing_admissible(self.world, self.job, running.limits))
        return found

    def _chains(self, conditions: Form) -> Iterator[Decision]:
        """The fastest row of machines from the device on, driven every way: where memory forces several workers the
        search may drop what would have fitted."""
        for wire, chunk, draft in self._tools():
            route = exact_latency(chain(self.world, self.job, wire, conditions=conditions, limits=self.limits))
            if route is not None:
                decision = Decision(route.partition(self.world.spec), wire, chunk, draft)
                if obstacle(self.world, decision, self.job, self.limits) is None:
                    yield decision

    def cuts(self, conditions: Form, objective: Objective) -> Iterator[Choice]:
        """The best cuts and U-shapes, best first, until there are two partitions among them; none where memory or a
        limit forbids all."""
        found: list[tuple[float, int, int, int]] = []
        for at, family in enumerate(self.families):
            for part in range(len(family.parts)):
                values = objective.value(family.prices(part, conditions))
                # The two best partitions of a part are among its two best members.
                best = np.argsort(values, kind="stable")[:2]
                found += [(float(values[number]), at, part, number) for number in best.tolist()]
        partitions: set[Partition] = set()
        for value, at, part, number in sorted(found):
            decision = self.families[at].decision(part, number)
            yield Choice(decision, value)
            partitions.add(decision.partition)
            if len(partitions) > 1:
                return

    @property
    def _is_small(self) -> bool:
        """Whether a search over every assignment takes no longer than a few cuts."""
        return len(self.world.hosts) ** 2 * (2 * self.world.spec.num_layers) ** 2 * self._divisions <= SMALL

    @property
    def _divisions(self) -> int:
        """Ways to divide one layer over the machines."""
        spec, others = self.world.spec, len(self.world.hosts) - 1
        return prod(comb(units_in(spec, part) + others, others) for part in Part)

    def _by_speed(self, conditions: Form) -> Iterator[Partition]:
        """All layers that the floor lets go, divided over the device and some workers in proportion to their speed;
        the workers are taken fastest first."""
        spec, floor, basis = self.world.spec, self.limits.floor, self.world.basis
        first, last = (floor.first_layers, floor.last_layers) if floor else (0, 0)
        first = max(first, int(self.limits.first_layer_on_device))
        speed = {
            machine: 1 / (host.model_s(spec, 1, self.job.mean_context) * float(conditions[basis.slow(machine)]))
            for machine, host in enumerate(self.world.hosts)
        }
        workers = sorted((m for m in speed if m != DEVICE), key=lambda machine: -speed[machine])
        for number in range(1, len(workers) + 1):
            weights = {machine: speed[machine] for machine in (DEVICE, *workers[:number])}
            yield Partition.shared(spec, weights, range(first, spec.num_layers - last))

    def _searched(self, conditions: Form, objective: Objective, share: bool) -> Iterator[tuple[Decision | None, bool]]:
        """The best assignments, and whether they are proven to be.

        For a large model only the fastest assignments in one chunk are searched, and divided halves only on two
        machines; what is found is then driven in every way.
        """
        found: dict[Partition, None] = {}
        too_many = share and self._divisions > MANY
        if too_many:
            share = False
            found = dict.fromkeys(self._by_speed(conditions))
        for wire, chunk, draft in self._tools():
            hard = not self._is_small and not (objective.only_time and chunk is None)
            if hard and (chunk is not None or draft != self.tools.drafts[0]):
                continue
            sought = Latency() if hard else objective
            result = self._search(conditions, sought, (wire, chunk, draft), share)
            if result:
                found[result.decision.partition] = None
            proven = not hard and not too_many
            yield (result.decision, result.exact and proven) if result else (None, proven)
        if not self._is_small:
            some_left = not objective.only_time or self.tools.chunks != (None,)
            for partition in found:
                for tools in self._tools():
                    decision = Decision(partition, *tools)
                    if obstacle(self.world, decision, self.job, self.limits) is None:
                        yield decision, not some_left
        early = [wire for wire in self.tools.prefill_wires if wire]  # no search of their own: what is found uses them
        for partition, wire, tools in product(found, early, self._tools()):
            decision = Decision(partition, *tools, wire)
            if obstacle(self.world, decision, self.job, self.limits) is None:
                yield decision, False

    def _search(self, conditions: Form, objective: Objective, way: _Way, share: bool) -> Found | None:
        """The best assignment driven in one way; the fastest one is remembered, since many objectives ask for it."""
        key = (conditions.tobytes(), *way, share)
        if isinstance(objective, Latency) and key in self._fastest:
            return self._fastest[key]
        most = FEW_LABELS if len(self.world.hosts) > 2 and not self._is_small else 4000
        search = Search(self.world, self.job, conditions, objective, self.limits, *way, share=share, max_labels=most)
        found = search.best()
        if isinstance(objective, Latency):
            if len(self._fastest) >= REMEMBERED:
                self._fastest.pop(next(iter(self._fastest)))
            self._fastest[key] = found
        return found

    def _tools(self) -> Iterator[_Way]:
        for wire in self.tools.wires:
            for chunk in self.tools.chunks:
                if chunk is None or chunk < self.job.prompt_tokens:
                    yield from ((wire, chunk, draft) for draft in self.tools.drafts)

    def _sharing(self, conditions: Form) -> Iterator[tuple[int, int]]:
        """Pairs of machines for which dividing a half can pay: `min(e, c)^2 / (e + c)` exceeds the exchange."""
        spec, basis = self.world.spec, self.world.basis
        wire = min(self.tools.wires, key=lambda w: w.payload_bytes(1, spec.d_model))
        rows = {1, *(draft + 1 for draft in self.tools.drafts), self.job.prompt_tokens}
        for a, b in self.world.links:
            if {a, b} & self.limits.unreachable:
                continue
            for part in Part:
                for count in rows:
                    context = self.job.mean_context if count < self.job.prompt_tokens else count
                    e, c = (
                        self.world.hosts[m].half_s(spec, part, units_in(spec, part), count, context)
                        * conditions[basis.slow(m)]
                        for m in (a, b)
                    )
                    slower = max(conditions[basis.inverse(a, b)], conditions[basis.inverse(b, a)])
                    software_s = sum(self.world.hosts[m].device.message_s for m in (a, b))
                    exchange = software_s + conditions[basis.rtt(a, b)] / 2
                    exchange += wire.payload_bytes(count, spec.d_model) * slower
                    if min(e, c) ** 2 / (e + c) > exchange:
                        yield a, b


_RECENT: deque[tuple[tuple[object, ...], Solver]] = deque(maxlen=4)


def solver_for(world: World, job: Job, tools: Tools, limits: Limits) -> Solver:
    """A solver of this question, perhaps one that was made for it before: what links and loads are now, is no part of
    the question but a condition, so that all epochs of a generation ask the same one."""
    key = (
        world.spec,
        world.hosts,
        sorted(world.links),
        world.accuracy,
        world.drafter,
        world.tariff,
        job,
        tools,
        limits,
    )
    for known, solver in _RECENT:
        if known == key:
            return solver
    solver = Solver(world, job, tools, limits)
    _RECENT.appendleft((key, solver))
    return solver


def _offer(best_of: dict[Partition, Choice], choice: Choice) -> None:
    kept = best_of.get(choice.decision.partition)
    if kept is None or choice.value < kept.value:
        best_of[choice.decision.partition] = choice


def nothing_admissible(world: World, job: Job, limits: Limits) -> str:
    """Why no decision is possible: what forbids each of the plain ones."""
    spec = world.spec
    tried = {"everything on the device": Partition.all_on(spec, DEVICE)}
    for worker in range(1, len(world.hosts)):
        name = world.hosts[worker].device.name
        tried[f"everything on {name}"] = Partition.all_on(spec, worker)
        if limits.floor and limits.floor.first_layers + limits.floor.last_layers < spec.num_layers:
            ends = (limits.floor.first_layers, limits.floor.last_layers)
            tried[f"only the floor on the device, the rest on {name}"] = Partition.u_shape(spec, *ends, inner=worker)
        elif not limits.floor:
            tried[f"half on {name}"] = Partition.cut(spec, spec.num_layers / 2, second=worker)
    reasons = [
        f"{what}: {obstacle(world, Decision(partition), job, limits) or 'allowed'}" for what, partition in tried.items()
    ]
    return (
        "no partition is admissible: " + "; ".join(reasons) + "; relax the floor, shorten the request, or use machines "
        "with more memory or low-bit weights"
    )
