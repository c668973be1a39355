"""The field's planners and ours as rows of one table: which partitions each considers, what it makes small, when.

Every planner gets the same tools, machines and age of information. It does not know whether a world is simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Floor, Host, Job, Limits, Table, World, bill, obstacle
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision
from splitwise_llm.errors import PartitionError, RequestError
from splitwise_llm.lyapunov import Budgets, Penalty, nominal_weights
from splitwise_llm.observation import Observation, Tools, usable_bytes
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.solver import Solver
from splitwise_llm.spec import DeviceSpec, LinkSpec

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


Partitions = Callable[[World, Limits], Iterable[Partition]]


def _cut(world: World, at: float, floor: Floor | None, worker: int) -> Partition:
    """Layers before `at` on the device; under a floor the last layers come back to it."""
    spec = world.spec
    if floor:
        return Partition.u_shape(spec, at, floor.last_layers, inner=worker)
    if at in (0, spec.num_layers):
        return Partition.all_on(spec, DEVICE if at else worker)
    return Partition.cut(spec, at, second=worker)


def _edge(world: World, limits: Limits) -> Iterable[Partition]:
    yield Partition.all_on(world.spec, DEVICE)


def _cloud(world: World, limits: Limits) -> Iterable[Partition]:
    """Everything on one worker; under a floor, everything it allows."""
    for worker in range(1, len(world.hosts)):
        yield _cut(world, limits.floor.first_layers if limits.floor else 0, limits.floor, worker)


def _either(world: World, limits: Limits) -> Iterable[Partition]:
    yield from _edge(world, limits)
    yield from _cloud(world, limits)


def _cuts(world: World, limits: Limits) -> Iterable[Partition]:
    """Every single cut between layers, both ends included."""
    yield from _either(world, limits)
    last = limits.floor.last_layers if limits.floor else 0
    for worker, at in product(range(1, len(world.hosts)), range(1, world.spec.num_layers - last)):
        yield _cut(world, at, limits.floor, worker)


def _from_source(world: World, limits: Limits) -> Iterable[Partition]:
    """Every cut that keeps the first layer on the device."""
    last = limits.floor.last_layers if limits.floor else 0
    yield from _edge(world, limits)
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


def _even(world: World, limits: Limits) -> Iterable[Partition]:
    return _proportional(world, limits, [1.0] * len(world.hosts))


def _by_memory(world: World, limits: Limits) -> Iterable[Partition]:
    return _proportional(world, limits, [host.device.memory_bytes for host in world.hosts])


@dataclass(frozen=True, slots=True)
class Planner:
    """A row: as a `Policy` it answers one observation, exactly."""

    name: str
    says: str
    partitions: Partitions | None
    """None: all that the exact solver knows."""
    when: When
    pressure: Pressure = Pressure.NONE
    by_rule: bool = False
    """Whether its partitions ask for no figures but memory: it also answers where nothing was measured."""

    def decide(self, observation: Observation, solver: Solver | None = None) -> Decision:
        """The smallest objective among what this planner considers. `solver`, if there is one, is of this observation's
        world, job, tools and limits. Raises RequestError that says what forbids everything, or that nothing is known
        of the machines."""
        world = observation.nominal or observation.world if self.when is When.BEFORE else observation.world
        if world is None:
            if not self.by_rule:
                raise RequestError(observation.unpriced(self.name))
            world = _unmeasured(observation)
            return self._admissible(world, observation.job, observation.tools, observation.limits)[0]
        loads = None if self.when is When.BEFORE else observation.loads
        conditions = world.conditions(loads)
        job, tools, limits = observation.job, observation.tools, observation.limits
        objective = self.objective(
            world, job, tools, limits, observation.queues, observation.virtual, observation.arrivals_per_s
        )
        if self.partitions is None:
            solver = solver or Solver(world, job, tools, limits)
            return solver.solve(conditions, objective).best.decision
        return self._among(world, job, tools, limits, conditions, objective)

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
        return _those_that_exist(self.partitions, world, limits) if self.partitions else ()

    def decisions(self, world: World, job: Job, tools: Tools, limits: Limits) -> list[Decision]:
        """Every admissible way of driving what this planner considers; only for rows with their own partitions."""
        if self.partitions is None:
            raise RequestError(f"{self.name} considers everything; ask the solver")
        found: dict[Decision, None] = {}
        for partition in self._existing(world, limits):
            wires = tools.wires if len(partition.machines) > 1 else tools.wires[:1]
            for wire, chunk, draft in product(wires, tools.chunks, tools.drafts):
                decision = Decision(partition, wire, chunk, draft)
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
    ) -> Objective:
        """What it makes small: latency, or drift plus penalty with the weights of a typical request."""
        if self.pressure is Pressure.NONE:
            return Latency()
        penalty, weights = typical(world, job, tools, limits, arrivals_per_s)
        if self.pressure is Pressure.SELFISH:
            weights = weights * np.array([1.0, 1.0, 1.0, 0.0])
        return DriftPlusPenalty(
            penalty, weights, np.asarray(queues, dtype=float), np.asarray(virtual, dtype=float), Budgets()
        )


def _unmeasured(observation: Observation) -> World:
    """Machines of which nothing but the memory is known; speeds and links stand for nothing and price nothing."""
    hosts = tuple(
        Host(DeviceSpec(view.name, 1e9, 1e9, usable_bytes(view.memory_bytes)), view.dtype, view.weights)
        for view in observation.machines
    )
    links = {(DEVICE, worker): LinkSpec(0.0, 1e9, 1e9) for worker in range(1, len(hosts))}
    return World(observation.model, hosts, links)


def _those_that_exist(partitions: Partitions, world: World, limits: Limits) -> Iterable[Partition]:
    """Partitions of a rule; none where the rule has no meaning for this floor."""
    try:
        return list(dict.fromkeys(partitions(world, limits)))
    except PartitionError:
        return []


SHARED_LOAD = 0.8
"""Assumed of a machine whose other users one does not see."""


def typical(
    world: World, job: Job, tools: Tools, limits: Limits, arrivals_per_s: float = 0.0
) -> tuple[Penalty, Floats]:
    """The reference a request is measured by (the best pure plan when nothing else goes on), and the weights of the
    physical queues: own queues at the load that these arrivals make, the shared cloud's at `SHARED_LOAD`."""
    pure: list[Decision] = []
    for rule in (_either, _cuts):
        ways = [Decision(partition, tools.wires[0]) for partition in _those_that_exist(rule, world, limits)]
        pure = pure or [way for way in ways if obstacle(world, way, job, limits) is None]
    if not pure:  # only three machines or more hold it
        pure = [Solver(world, job, tools, limits).solve(world.conditions(), Latency()).best.decision]
    prices = Table(world, [bill(world, decision, job) for decision in pure]).at(world.conditions())
    penalty = Penalty(t_ref_s=float(prices.service_s.min()), e_ref_j=max(float(prices.device_j.min()), 1e-9))
    work = np.stack([prices.work.device_s, prices.work.up_s, prices.work.down_s, prices.work.cloud_s], axis=-1)
    mean = work.max(axis=0)  # of the plans that use a queue, the one that is made for it
    load = np.minimum(arrivals_per_s * mean, SHARED_LOAD)
    load[3] = SHARED_LOAD
    return penalty, nominal_weights(penalty, mean, load)


PLANNERS: tuple[Planner, ...] = (
    Planner("edge-only", "everything on the device", _edge, When.REQUEST, by_rule=True),
    Planner("cloud-only", "everything on a worker, or all that the floor allows", _cloud, When.REQUEST, by_rule=True),
    Planner("even-split", "as many layers on each machine", _even, When.BEFORE, by_rule=True),
    Planner("memory-proportional", "layers in proportion to memory, as llama.cpp and exo do",
            _by_memory, When.BEFORE, by_rule=True),
    Planner("best-static", "the best plan for the expected conditions, never changed", None, When.BEFORE),
    Planner("neurosurgeon", "the best single cut between layers, now", _cuts, When.REQUEST),
    Planner("router", "device or cloud for each request, whichever ends first", _either, When.REQUEST),
    Planner("exact", "the fastest plan of all, now", None, When.REQUEST),
    Planner("drift-selfish", "drift plus penalty over one's own queues, at every epoch",
            None, When.EPOCH, Pressure.SELFISH),
    Planner("drift", "drift plus penalty that prices the shared cloud, too, at every epoch",
            None, When.EPOCH, Pressure.ALL),
)  # fmt: skip

EDGESHARD_REPLANNED = Planner(
    "edgeshard-replanned", "EdgeShard's latency program on two machines, for each request", _from_source, When.REQUEST
)
"""What `pipelines.EdgeShard(current=True)` comes to where there is one worker: the best cut behind the first layer."""
