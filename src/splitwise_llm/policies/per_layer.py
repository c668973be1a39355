"""The paper's policy, repaired: a network goes through the layers and places each one's parts on edge or cloud.

It knows one device and one cloud, decides once, at admission, and does not know how its weights were found. What was
wrong in the published code and is right here: actions are stored and their own probabilities used; one layout of
actions; inputs have one scale; a layer's step sees what the one before it decided; the history goes through a
recurrent encoder; V multiplies the cost; and the cost is that of `cost`, with a round trip wherever one is due.

The state (all figures dimensionless, logarithms where they span decades):

| figures | what |
| --- | --- |
| 9, the paper's | queue, its mean, bandwidth, its mean and variance, arrivals, their mean, free memory, free compute |
| 10 x 3, the paper's | the last ten (queue, bandwidth, arrivals) |
| 23, ours | link, machines, request, floor, depth (the paper trains one for each setting); each queue, its weight |

Who keeps no history shows the present ten times; learning has seen both. The third way of an FFN, its first matrices
on the edge and the second in the cloud, is one of the network's outputs and always masked: `inner_cut` prices it, in
every resource a column split of the same shares is at least as good, and no partition says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np

from splitwise_llm.cost import Bill, Job, Limits, World, bill, counts, obstacle
from splitwise_llm.cost.terms import Load
from splitwise_llm.decision import Decision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.observation import PLAIN, Observation
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import rules
from splitwise_llm.policies.in_flight import decided_once, reachable
from splitwise_llm.policies.network import UNREADABLE
from splitwise_llm.policies.per_layer_network import PAST, Actions, Floats, Network, Rules, shapes
from splitwise_llm.policies.pipelines import driven
from splitwise_llm.policies.planners import typical
from splitwise_llm.policies.solver import nothing_admissible

NUM_FIGURES = 9 + 23
KEPT = 0.9
"""Of a moving average, per step, as published."""
WORKER = 1
LARGEST = 8.0
"""No figure is further from 0: what lies outside the training range should not carry the network away."""


def _log(x: Floats) -> Floats:
    result: Floats = np.log(np.maximum(x, 1e-9))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A device and one worker with a kind of request: what stays as it is while links, loads and queues change."""

    world: World
    """Of two machines."""
    job: Job
    limits: Limits
    penalty: Penalty
    weights: Floats
    """(4,) of the physical queues."""
    arrivals_per_s: float
    rules: Rules
    """Of one system, all machines within reach."""
    token_s: tuple[float, float]
    """Of the whole model, on edge and cloud, alone."""
    prompt_s: tuple[float, float]

    @classmethod
    def of(cls, world: World, job: Job, limits: Limits, arrivals_per_s: float) -> Site:
        """Raises RequestError where nothing is admissible."""
        unlimited = replace(limits, unreachable=frozenset())
        penalty, weights = typical(world, job, PLAIN, unlimited, arrivals_per_s)
        spec = world.spec
        token_s, prompt_s = (
            tuple(host.model_s(spec, rows, context) for host in world.hosts)
            for rows, context in ((1, job.mean_context), (job.prompt_tokens, job.prompt_tokens))
        )
        return cls(
            world, job, unlimited, penalty, weights, arrivals_per_s, _rules(world, job, unlimited),
            (token_s[0], token_s[1]), (prompt_s[0], prompt_s[1]),
        )  # fmt: skip

    def past(self, conditions: Floats, queues: Floats, arrivals_per_s: Floats) -> Floats:
        """(systems, 3): what a step of history holds, from conditions (systems, C) and queues (systems, 4)."""
        carried_s = 2.0 * self.world.spec.d_model * conditions[:, self.world.basis.inverse(DEVICE, WORKER)]
        t_ref = self.penalty.t_ref_s
        return np.stack(
            [
                np.log1p(queues.sum(axis=1) / t_ref),
                -_log(carried_s / self.token_s[0]),
                _log1p10(arrivals_per_s * t_ref),
            ],
            axis=1,
        )

    def figures(self, conditions: Floats, queues: Floats, past: Floats) -> Floats:
        """(systems, NUM_FIGURES): the state, history apart; `past` is (systems, PAST, 3), the present last."""
        spec, basis, job = self.world.spec, self.world.basis, self.job
        x = {
            "rtt": conditions[:, basis.rtt(DEVICE, WORKER)],
            "up": conditions[:, basis.inverse(DEVICE, WORKER)],
            "down": conditions[:, basis.inverse(WORKER, DEVICE)],
            "slow": conditions[:, basis.slow(WORKER)],
            "join": conditions[:, basis.join(WORKER)],
            "wait": conditions[:, basis.wait(WORKER)],
        }
        edge_s, t_ref, later = self.token_s[0], self.penalty.t_ref_s, max(job.tokens_out - 1, 1)
        mean, variance = _moving(past)
        whole = self.rules.size[0, DEVICE] @ np.array([spec.num_layers, spec.num_layers, 1.0, 1.0])
        memory = np.clip(self.rules.room[0, DEVICE] / whole, 0.0, 2.0)
        cloud_s = self.token_s[1] * x["slow"]
        floor, ones = self.limits.floor, np.ones(len(conditions))
        kept = (floor.first_layers + floor.last_layers) / spec.num_layers if floor else 0.0
        columns = [
            past[:, -1, 0], mean[:, 0], past[:, -1, 1], mean[:, 1], variance[:, 1], past[:, -1, 2], mean[:, 2],
            memory * ones, -_log(cloud_s / edge_s),
            # what a policy for one setting need not be told
            _log(x["rtt"] / edge_s), _log(2.0 * spec.d_model * x["down"] / edge_s), _log1p10(x["join"] / edge_s),
            np.log1p(x["wait"] / t_ref), _log(x["slow"]),
            *np.log1p(queues / t_ref).T,
            *(np.log1p(self.weights * t_ref**2)[:, None] * ones),
            kept * ones, float(floor is not None) * ones, float(self.limits.first_layer_on_device) * ones,
            np.log(job.prompt_tokens / later) * ones, np.log(self.prompt_s[0] / t_ref) * ones,
            np.log(self.prompt_s[1] / t_ref) * ones, _log(2.0 * spec.d_model * job.prompt_tokens * x["up"] / t_ref),
            np.log(later * edge_s / t_ref) * ones, _log(later * cloud_s / t_ref),
            np.log(spec.num_layers / 32) * ones,
        ]  # fmt: skip
        figures: Floats = np.clip(np.stack(columns, axis=1), -LARGEST, LARGEST)
        return figures

    def partition(self, actions: Actions, system: int) -> Partition:
        """What was decided for one system."""
        return Partition.from_vector(self.vector(actions, system), self.world.spec)

    def vector(self, actions: Actions, system: int) -> tuple[int, ...]:
        """The same as the action vector that `Partition` owns."""
        spec = self.world.spec
        return actions.vector(system, spec.num_layers, spec.num_kv_heads, spec.num_ffn_shards)

    def bill(self, partition: Partition) -> Bill:
        """Its costs, driven plainly."""
        return bill(self.world, Decision(partition, PLAIN.wires[0]), self.job)


def _log1p10(x: Floats) -> Floats:
    result: Floats = np.log1p(10.0 * x)
    return result


def _moving(past: Floats) -> tuple[Floats, Floats]:
    """Mean and variance (systems, 3), newer steps weighing more."""
    weights = KEPT ** np.arange(past.shape[1])[::-1]
    weights = (weights / weights.sum())[None, :, None]
    mean = (weights * past).sum(axis=1)
    return mean, (weights * (past - mean[:, None]) ** 2).sum(axis=1)


def _rules(world: World, job: Job, limits: Limits) -> Rules:
    """The masks of one system: the floor, and memory."""
    spec = world.spec
    layers, positions = spec.num_layers, job.prompt_tokens + job.tokens_out
    forced = np.zeros((1, layers + 2, 2), dtype=bool)
    if limits.floor:
        first, last = (min(n, layers) for n in (limits.floor.first_layers, limits.floor.last_layers))
        forced[0, : first + 1] = True
        forced[0, layers + 1 - last :] = True
    if limits.first_layer_on_device:
        forced[0, :2] = True
    size, room = np.zeros((1, 2, 4)), np.zeros((1, 2))
    for machine, host in enumerate(world.hosts):
        table = counts.table_bytes(spec, host.dtype, host.weights)
        positional = spec.max_context * spec.d_model * host.dtype.num_bytes if spec.family == "gpt2" else 0
        attention, ffn = (
            counts.units_in(spec, part) * counts.unit_weight_bytes(spec, part, host.dtype, host.weights)
            for part in Part
        )
        cache = positions * spec.kv_bytes_per_position(spec.num_kv_heads, host.dtype)
        size[0, machine] = attention + cache, ffn, table + positional, table
        buffers = counts.activation_bytes(spec, job.prompt_tokens, host.dtype)
        away = machine in limits.unreachable or (limits.only is not None and machine not in limits.only)
        room[0, machine] = -1.0 if away else host.device.memory_bytes - buffers
    one = np.ones(1, dtype=np.int64)
    tied = np.array([spec.tied_head])
    return Rules(layers * one, spec.num_kv_heads * one, forced, size, room, tied)


def read_network(file: Path) -> Network:
    """What `splitwise train --learner paper` has written. Raises ModelError."""
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        raise ModelError(f"{file}: no weights of splitwise-paper ({error}); {_MAKE}") from error
    for name, shape in shapes(NUM_FIGURES).items():
        if name not in found or found[name].shape != shape:
            raise ModelError(f"{file}: no weights of splitwise-paper: {name} of {shape} is not there; {_MAKE}")
    return Network(found)


_MAKE = "make some with `splitwise train --learner paper`"


@cache
def shipped_network() -> Network:
    """The weights in the package. Raises ModelError where there are none."""
    return read_network(Path(str(resources.files("splitwise_llm") / "data/policies/per_layer.npz")))


@dataclass(frozen=True, slots=True, eq=False)
class PerLayer:
    """`splitwise-paper`: the likelier choice at each step, driven with the tools there are as `pipelines.driven` does.

    Of several workers it takes the one within reach that does a token soonest, round trip included. Where masks leave
    nothing, or the plan is not admissible after all, the fastest pure plan or cut is taken.
    """

    network: Network | None = None
    """None: the one in the package."""

    @property
    def weights(self) -> Network:
        return self.network or shipped_network()

    def decide(self, observation: Observation) -> Decision:
        """At admission; in flight see `in_flight`. Raises RequestError where nothing is known of the machines, or
        nothing is admissible."""
        return decided_once(observation, self._plan)

    def _plan(self, observation: Observation) -> Decision:
        world, limits = observation.world, reachable(observation)
        if world is None:
            raise RequestError(observation.unpriced("splitwise-paper"))
        conditions = world.conditions(observation.loads)
        seen = replace(observation, limits=limits)
        for partition in self._proposed(seen, world, limits):
            if obstacle(world, Decision(partition, seen.tools.wires[0]), seen.job, limits) is None:
                return driven(world, [partition], seen, conditions)
        return driven(world, plain_partitions(world, seen.job, limits), seen, conditions)

    def _proposed(self, observation: Observation, world: World, limits: Limits) -> Sequence[Partition]:
        near = [m for m in range(1, len(world.hosts)) if m not in limits.unreachable]
        near = [m for m in near if limits.only is None or m in limits.only] or list(range(1, len(world.hosts)))
        if not near:
            return ()
        loads = observation.loads
        worker = min(near, key=lambda m: _token_s(world, m, observation.job, loads.get(m, Load())))
        pair, numbers = _pair_of(world, worker), {DEVICE: DEVICE, worker: WORKER}
        theirs = replace(
            limits,
            unreachable=frozenset(numbers[m] for m in limits.unreachable if m in numbers),
            only=None if limits.only is None else frozenset(numbers[m] for m in limits.only if m in numbers),
        )
        nominal = observation.nominal
        expected = _pair_of(nominal, worker) if nominal and worker < len(nominal.hosts) else pair
        site = Site.of(expected, observation.job, theirs, observation.arrivals_per_s)
        away = np.array([WORKER in theirs.unreachable])
        conditions = pair.conditions({numbers[m]: load for m, load in loads.items() if m in numbers})
        actions = self.act(site, conditions[None], np.array([observation.queues]), site.rules.without_cloud(away))
        if not actions.possible[0]:
            return ()
        return (site.partition(actions, 0).renumbered({WORKER: worker}),)

    def act(
        self, site: Site, conditions: Floats, queues: Floats, allowed: Rules, past: Floats | None = None
    ) -> Actions:
        """The likelier choices of many systems of one site; without a history the present counts as the past."""
        if past is None:
            rate = np.full(len(conditions), site.arrivals_per_s)
            past = np.repeat(site.past(conditions, queues, rate)[:, None], PAST, axis=1)
        return self.weights.act(site.figures(conditions, queues, past), past, allowed)


def _token_s(world: World, worker: int, job: Job, load: Load) -> float:
    host = world.hosts[worker]
    return load.wait_s + world.links[DEVICE, worker].rtt_s + load.slow * host.model_s(world.spec, 1, job.mean_context)


def _pair_of(world: World, worker: int) -> World:
    """The device and one worker."""
    if len(world.hosts) == 2:
        return world
    hosts = (world.hosts[DEVICE], world.hosts[worker])
    links = {(DEVICE, WORKER): world.links[DEVICE, worker]}
    return World(world.spec, hosts, links, world.accuracy, world.drafter, world.tariff)


def plain_partitions(world: World, job: Job, limits: Limits) -> list[Partition]:
    """Admissible pure plans, else cuts. Raises RequestError where there is none."""
    for rule in (rules.either, rules.cuts):
        plans = rules.that_exist(rule, world, limits)
        possible = [plan for plan in plans if obstacle(world, Decision(plan), job, limits) is None]
        if possible:
            return possible
    raise RequestError(nothing_admissible(world, job, limits))


__all__ = ["NUM_FIGURES", "PerLayer", "Site", "plain_partitions", "read_network", "shipped_network"]
