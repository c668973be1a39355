"""Random states in which a low level is asked: models, unlike machines, links, loads, queues, prices, budgets.

It knows nobody who decides. A state is a function of its seed alone, so that a split by seeds is a split of states.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np

from splitwise_llm.cost import (
    NO_LOSS,
    Accuracy,
    Floor,
    Form,
    Host,
    Job,
    Limits,
    Load,
    Table,
    World,
    bill,
    memory_bytes,
)
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.lyapunov import Budgets, Penalty, nominal_weights
from splitwise_llm.observation import PLAIN, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.spec import Dtype, LinkSpec, ModelSpec, Weights, find_device, find_model, shipped_models

EDGES = ("raspberry-pi-5", "galaxy-s23", "orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb")
WORKERS = (*EDGES, "rtx-3090", "l4", "a100-40gb", "a100-80gb", "h100-80gb")
_LOSSES = Accuracy(
    {Weights.INT8: (0.002, 0.001), Weights.INT4: (0.06, 0.03)},
    {WirePrecision.INT8: (0.002,), WirePrecision.INT4: (0.03,)},
    "assumed",
)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a low level is asked."""

    world: World
    job: Job
    tools: Tools
    limits: Limits
    conditions: Form
    objective: DriftPlusPenalty


@dataclass(frozen=True, slots=True)
class Spread:
    """What is drawn: how many machines, how often memory binds, whether tools come in menus."""

    machines: tuple[int, ...] = (2, 3, 3, 3, 4, 4, 4)
    tight: float = 0.5
    """Share of states in which some machine has memory for a part of the model only."""
    menus: float = 0.0
    """Share of states with a choice of precisions on the wire, chunks and draft lengths."""


DEFAULT = Spread()


def random_state(seed: int, spread: Spread = DEFAULT) -> State:
    """The state of a seed. Machines are the shipped ones, their speeds and memories changed; every state has an
    admissible plan as far as memory goes, since the machines together hold half as much again as the model."""
    r = random.Random(seed)
    spec = _model(r)
    number = r.choice(spread.machines)
    job = Job(round(10 ** r.uniform(1, 3)), round(10 ** r.uniform(0.6, 2.6)))
    hosts = tuple(_host(r, EDGES if m == 0 else WORKERS) for m in range(number))
    links = {
        (a, b): _link(r, 0.0 if a == 0 else 0.5)
        for a in range(number)
        for b in range(a + 1, number)
        if a == 0 or r.random() < 0.5
    }
    world = World(spec, hosts, links, accuracy=r.choice([NO_LOSS, _LOSSES]))
    limits = _limits(r, spec, number)
    world = _with_memory(r, world, job, limits, r.random() < spread.tight)
    loads = {m: _load(r, world, m) for m in range(1, number)}
    tools = PLAIN
    if r.random() < spread.menus:
        tools = Tools(
            (WirePrecision.FP16, WirePrecision.INT8), r.choice([(None,), (None, 64)]), r.choice([(0,), (0, 3)])
        )
    return State(world, job, tools, limits, world.conditions(loads), _objective(r, world, job))


def _model(r: random.Random) -> ModelSpec:
    spec = find_model(r.choice(shipped_models()))
    return replace(spec, num_layers=max(6, round(spec.num_layers * r.uniform(0.5, 1.2)))) if r.random() < 0.5 else spec


def _host(r: random.Random, names: tuple[str, ...]) -> Host:
    device = find_device(r.choice(names))
    changed = replace(
        device,
        flop_per_s=device.flop_per_s * 2 ** r.uniform(-1, 1),
        memory_bytes_per_s=device.memory_bytes_per_s * 2 ** r.uniform(-1, 1),
        memory_bytes=device.memory_bytes * 2 ** r.uniform(-1, 1),
        battery_j=None,
    )
    return Host(changed, Dtype.FP16, r.choice([Weights.FULL, Weights.INT8, Weights.INT4, Weights.INT4]))


def _link(r: random.Random, nearer: float) -> LinkSpec:
    rate = 10 ** r.uniform(5.5 + nearer, 8.5)
    return LinkSpec(10 ** r.uniform(-3.5, -1 - nearer), rate, rate * 2 ** r.uniform(-1, 2))


def _limits(r: random.Random, spec: ModelSpec, number: int) -> Limits:
    floor = Floor(r.randint(0, 3), r.randint(0, 2)) if r.random() < 0.35 else None
    gone = frozenset({r.randrange(1, number)}) if number > 2 and r.random() < 0.05 else frozenset[int]()
    return Limits(floor=floor, first_layer_on_device=floor is None and r.random() < 0.15, unreachable=gone)


def _with_memory(r: random.Random, world: World, job: Job, limits: Limits, tight: bool) -> World:
    """Machines that hold some part of the model each (or what they have), and enough together."""
    spec = world.spec
    whole = [memory_bytes(world, Partition.all_on(spec, m), m, job, None) for m in range(len(world.hosts))]
    memory = [host.device.memory_bytes for host in world.hosts]
    if tight:
        memory = [
            size * r.uniform(0.2, 0.9) if r.random() < 0.7 else have for size, have in zip(whole, memory, strict=True)
        ]
    kept = limits.floor.first_layers + limits.floor.last_layers + 1 if limits.floor else 2
    short = replace(world, spec=replace(spec, num_layers=1))
    one = memory_bytes(short, Partition.all_on(short.spec, 0), 0, job, None)
    memory[0] = max(memory[0], 1.05 * (one + kept * (whole[0] - one) / (spec.num_layers - 1)))
    usable = [m for m in range(len(world.hosts)) if m not in limits.unreachable]
    share = sum(memory[m] / whole[m] for m in usable)
    if share < 1.5:
        most = max(usable, key=lambda m: memory[m] / whole[m])
        memory[most] += (1.5 - share) * whole[most]
    hosts = tuple(
        replace(host, device=replace(host.device, memory_bytes=max(size, 2e6)))
        for host, size in zip(world.hosts, memory, strict=True)
    )
    return replace(world, hosts=hosts)


def _load(r: random.Random, world: World, machine: int) -> Load:
    host = world.hosts[machine]
    if host.device.slots == 1:
        return Load(r.choice([1.0, 1.0, r.uniform(1, 3)]))
    return world.load(machine, r.choice([1, 1, 4, 16, 32]), r.choice([0.0, 0.0, 0.3, 2.0]))


def _objective(r: random.Random, world: World, job: Job) -> DriftPlusPenalty:
    """Drift plus penalty, measured by the best plan on one machine, whether it fits there or not."""
    pure = [Decision(Partition.all_on(world.spec, m), WirePrecision.FP16) for m in range(len(world.hosts))]
    prices = Table(world, [bill(world, one, job) for one in pure]).at(world.conditions())
    t_ref, e_ref = float(prices.service_s.min()), max(float(prices.device_j.min()), 1e-9)
    penalty = Penalty(
        t_ref, e_ref, 0.1, w_energy=r.choice([0.0, 0.0, 0.3]), w_accuracy=r.choice([0.0, 0.5]), v=10 ** r.uniform(-1, 1)
    )
    work = prices.work
    mean = np.stack([work.device_s, work.up_s, work.down_s, work.cloud_s]).max(axis=1)
    load = np.array([r.uniform(0, 0.8) for _ in range(4)])
    prices_of_queues = np.array([4.0 ** r.uniform(-1, 1) for _ in range(4)])
    weights = nominal_weights(penalty, mean, load) * prices_of_queues
    queues = np.array([r.choice([0.0, r.expovariate(1.0), 4 * r.expovariate(1.0)]) for _ in range(4)]) * mean
    virtual = np.array([r.choice([0.0, 0.0, r.expovariate(1.0)]) for _ in range(4)]) * penalty.v
    budgets = Budgets(
        energy_j=r.choice([None, e_ref * r.uniform(0.3, 2)]),
        deadline_s=r.choice([None, None, t_ref * r.uniform(0.8, 4)]),
        nats=r.choice([None, 0.05]),
    )
    return DriftPlusPenalty(penalty, weights, queues, virtual, budgets, float(job.tokens_out))
