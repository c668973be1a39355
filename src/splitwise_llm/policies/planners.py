"""The field's planners and ours as rows of one table: which partitions each considers, what it makes small, when.

Every planner gets the same tools, machines and age of information. It does not know whether a world is simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Job, Limits, Table, World, bill, obstacle
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.lyapunov import Budgets, Penalty, nominal_weights
from splitwise_llm.observation import Observation, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies import rules
from splitwise_llm.policies.in_flight import Running, decided_once, unmeasured
from splitwise_llm.policies.low_level import Level, find_level, level_for
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.solver import Solver

Floats = NDArray[np.float64]


class When(StrEnum):
    """Which conditions a planner looks at, and how often."""

    BEFORE = "before"  # once, under the links and loads that were expected
    REQUEST = "request"  # for each request, under those of now
    EPOCH = "epoch"  # and again while tokens flow


class Pressure(StrEnum):
    """Which queues a planner prices."""

    NONE = "none"  # latency only
    SELFISH = "selfish"  # its own: device, uplink, downlink
    ALL = "all"  # the shared cloud's, too


@dataclass(frozen=True, slots=True)
class Planner:
    """A row: as a `Policy` it answers one observation, exactly."""

    name: str
    says: str
    partitions: rules.Partitions | None
    """None: all that the exact solver knows."""
    when: When
    pressure: Pressure = Pressure.NONE
    by_rule: bool = False
    """Whether its partitions ask for no figures but memory: it also answers where nothing was measured."""
    low: Level | None = None
    """Who finds plans for rows of drift plus penalty; None: by the number of machines."""

    @property
    def has_levels(self) -> bool:
        """Whether there is a choice of who finds its plans: what names itself exact, or plans once, searches."""
        return self.partitions is None and self.pressure is not Pressure.NONE

    def level(self, world: World) -> Level:
        """Who finds its plans for these machines. Raises RequestError where they cannot be those that were asked."""
        return level_for(self.low, len(world.hosts)) if self.has_levels else Level.EXACT

    def worth(self, observation: Observation, decision: Decision) -> float:
        """The objective of a decision at admission; smaller is better."""
        world = observation.world
        assert world is not None
        prices = Table(world, [bill(world, decision, observation.job)]).at(world.conditions(observation.loads))
        return float(self._objective(observation).value(prices)[0])

    def decide(self, observation: Observation, solver: Solver | None = None) -> Decision:
        """The smallest objective among what this planner considers; in flight see `in_flight`, where rows that look at
        every epoch price the rest of the request and the way there. `solver`, if there is one, is of this
        observation's world, job, tools and limits. Raises RequestError that says what forbids everything, or that
        nothing is known of the machines."""
        if observation.placement is None:
            return self._first(observation, solver)
        if self.when is When.EPOCH:
            return self._onward(observation, solver)
        objective = self._objective(observation) if observation.world else None
        return decided_once(observation, self._onward if observation.world else self._first, objective)

    def _first(self, observation: Observation, solver: Solver | None = None) -> Decision:
        """At admission."""
        world = observation.nominal or observation.world if self.when is When.BEFORE else observation.world
        job, tools, limits = observation.job, observation.tools, observation.limits
        if world is None:
            if not self.by_rule:
                raise RequestError(observation.unpriced(self.name))
            return self._admissible(unmeasured(observation), job, tools, limits)[0]
        conditions = world.conditions(None if self.when is When.BEFORE else observation.loads)
        objective = self._objective(observation)
        if self.partitions is None:
            level = self.level(world)
            if solver is not None and level is Level.EXACT:
                return solver.solve(conditions, objective).best.decision
            return find_level(level).propose(world, job, tools, limits, conditions, objective).decision
        return self._among(world, job, tools, limits, conditions, objective)

    def _onward(self, observation: Observation, solver: Solver | None = None) -> Decision:
        """In flight: the smallest objective of the rest of the request."""
        running = Running.of(observation)
        objective = self._objective(observation)
        if self.partitions is None:
            level = self.level(running.world)
            if solver is not None and level is Level.EXACT:
                chosen = solver.onward(running, objective).decision
            else:
                chosen = find_level(level).onward(running, observation.tools, objective).decision
        else:
            ways = self._admissible(running.world, running.job, observation.tools, running.limits)
            stay = [running.present] if running.is_possible(running.present) else []
            chosen = running.best(objective, [*stay, *ways])
        return running.answer(chosen)

    def _objective(self, observation: Observation) -> Objective:
        """What is made small for what is observed. The reference request is that of the expected world, with all
        machines: it does not wander while a link does."""
        world, past = observation.nominal or observation.world, observation.past
        assert world is not None
        return self.objective(
            world, observation.job, observation.tools, replace(observation.limits, unreachable=frozenset()),
            observation.queues, observation.virtual, observation.arrivals_per_s, observation.budgets,
            observation.remaining_tokens, observation.waited_s, past.waiting[0] if past else 0.0,
        )  # fmt: skip

    def _among(
        self, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
    ) -> Decision:
        ways = self._admissible(world, job, tools, limits)
        prices = Table(world, [bill(world, way, job) for way in ways]).at(conditions)
        return ways[int(np.argmin(objective.value(prices)))]

    def _admissible(self, world: World, job: Job, tools: Tools, limits: Limits) -> list[Decision]:
        """At least one decision. Raises RequestError that says what forbids everything this planner considers, which
        need not be all there is."""
        ways = self.decisions(world, job, tools, limits)
        if not ways:
            considered = [Decision(partition, tools.wires[0]) for partition in self._existing(world, limits)]
            reasons = list(dict.fromkeys(obstacle(world, way, job, limits) or "allowed" for way in considered))
            said = "; ".join(reasons[:4]) or "these machines and this floor leave it nothing to consider"
            raise RequestError(f"{self.name} ({self.says}) finds nothing admissible: {said}")
        return ways

    def _existing(self, world: World, limits: Limits) -> Iterable[Partition]:
        return rules.that_exist(self.partitions, world, limits) if self.partitions else ()

    def decisions(self, world: World, job: Job, tools: Tools, limits: Limits) -> list[Decision]:
        """Every admissible way of driving what this planner considers; only for rows with their own partitions."""
        if self.partitions is None:
            raise RequestError(f"{self.name} considers everything; ask the solver")
        found: dict[Decision, None] = {}
        for partition in self._existing(world, limits):
            wires = tools.by_phase if len(partition.machines) > 1 else ((tools.wires[0], None),)
            for (wire, early), chunk, draft in product(wires, tools.chunks, tools.drafts):
                decision = Decision(partition, wire, chunk, draft, early)
                if (chunk is None or chunk < job.prompt_tokens) and obstacle(world, decision, job, limits) is None:
                    found[decision] = None
        return list(found)

    def objective(
        self,
        world: World,
        job: Job,
        tools: Tools,
        limits: Limits,
        queues: Sequence[float] = (0.0,) * 4,
        virtual: Sequence[float] = (0.0,) * 4,
        arrivals_per_s: float = 0.0,
        budgets: Budgets = Budgets(),  # noqa: B008 - frozen
        tokens: float = 128.0,
        waited_s: float = 0.0,
        waiting: float = 0.0,
    ) -> Objective:
        """What it makes small: latency, or drift plus penalty with the weights of a typical request. `tokens` are
        those still to come, `waited_s` the seconds since the request arrived: budgets count them. `waiting` are the
        requests that wait at the device."""
        if self.pressure is Pressure.NONE:
            return Latency()
        penalty, weights = typical(world, job, tools, limits, arrivals_per_s)
        if self.pressure is Pressure.SELFISH:
            weights = weights * np.array([1.0, 1.0, 1.0, 0.0])
        return DriftPlusPenalty(
            penalty, weights, np.asarray(queues, dtype=float), np.asarray(virtual, dtype=float), budgets, tokens,
            waited_s, waiting,
        )  # fmt: skip


SHARED_LOAD = 0.8
"""Assumed of a machine whose other users one does not see."""


def typical(
    world: World, job: Job, tools: Tools, limits: Limits, arrivals_per_s: float = 0.0
) -> tuple[Penalty, Floats]:
    """The reference a request is measured by (the best pure plan when nothing else goes on), and the weights of the
    physical queues: own queues at the load that these arrivals make, the shared cloud's at `SHARED_LOAD`. Where the
    device takes requests in turn nothing queues but whole requests: that is in the penalty, and own queues have no
    weight."""
    pure: list[Decision] = []
    for rule in (rules.either, rules.cuts):
        if not pure:
            ways = [Decision(partition, tools.wires[0]) for partition in rules.that_exist(rule, world, limits)]
            pure = [way for way in ways if obstacle(world, way, job, limits) is None]
    if not pure:  # only three machines or more hold it
        pure = [Solver(world, job, tools, limits).solve(world.conditions(), Latency()).best.decision]
    prices = Table(world, [bill(world, decision, job) for decision in pure]).at(world.conditions())
    penalty = Penalty(t_ref_s=float(prices.service_s.min()), e_ref_j=max(float(prices.device_j.min()), 1e-9))
    work = np.stack([prices.work.device_s, prices.work.up_s, prices.work.down_s, prices.work.cloud_s], axis=-1)
    mean = work.max(axis=0)  # of the plans that use a queue, the one that is made for it
    load = np.minimum(arrivals_per_s * mean, SHARED_LOAD)
    load[3] = SHARED_LOAD
    if limits.in_turn:
        penalty = replace(penalty, in_turn=min(arrivals_per_s * penalty.t_ref_s, SHARED_LOAD))
        load[:3] = 0.0
    return penalty, nominal_weights(penalty, mean, load)


PLANNERS: tuple[Planner, ...] = (
    Planner("edge-only", "everything on the device", rules.edge, When.REQUEST, by_rule=True),
    Planner("cloud-only", "everything on a worker, or all that the floor allows",
            rules.cloud, When.REQUEST, by_rule=True),
    Planner("even-split", "as many layers on each machine", rules.even, When.BEFORE, by_rule=True),
    Planner("memory-proportional", "layers in proportion to memory, as llama.cpp and exo do",
            rules.by_memory, When.BEFORE, by_rule=True),
    Planner("best-static", "the best plan for the expected conditions, never changed", None, When.BEFORE),
    Planner("neurosurgeon", "the best single cut between layers, now", rules.cuts, When.REQUEST),
    Planner("router", "device or cloud for each request, whichever ends first", rules.either, When.REQUEST),
    Planner("exact", "the fastest plan of all, now", None, When.REQUEST),
    Planner("drift-selfish", "drift plus penalty over one's own queues, at every epoch",
            None, When.EPOCH, Pressure.SELFISH),
    Planner("drift", "drift plus penalty that prices the shared cloud, too, at every epoch",
            None, When.EPOCH, Pressure.ALL),
)  # fmt: skip

EDGESHARD_REPLANNED = Planner(
    "edgeshard-replanned",
    "EdgeShard's latency program on two machines, for each request",
    rules.from_source,
    When.REQUEST,
)
"""What `pipelines.EdgeShard(current=True)` comes to where there is one worker: the best cut behind the first layer."""
