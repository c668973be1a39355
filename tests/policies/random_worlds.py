"""Small random worlds, and every decision in them: what exactness is tested against. It shares only `cost`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from splitwise_llm.cost import (
    Accuracy,
    Drafter,
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
    obstacle,
)
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.policies.objective import DriftPlusPenalty, Energy, Latency, Objective
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights

SIZES = ((2, 1, 2, 2), (2, 2, 1, 1), (2, 1, 1, 3), (2, 2, 2, 1), (3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 2, 1), (2, 3, 1, 1))
"""(machines, layers, groups, shards)"""
LARGER = (*SIZES, (3, 2, 1, 1), (2, 2, 2, 2), (2, 1, 3, 3))
TWO_MACHINES = ((2, 1, 1, 2), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 1))


@dataclass(frozen=True)
class Instance:
    """What a solver is asked."""

    world: World
    job: Job
    conditions: Form
    objective: Objective
    limits: Limits
    tools: Tools


def instance(seed: int, sizes: tuple[tuple[int, int, int, int], ...], *, menus: bool = False) -> Instance:
    """Machines, links, loads, limits and an objective at random; memory binds in half of them."""
    r = random.Random(seed)
    machines, layers, groups, shards = r.choice(sizes)
    spec = ModelSpec(
        "llama", layers, 512 * groups, groups, groups, 512, shards * 32 * 41, r.choice([100, 1000, 8000]), 512, 3,
        r.random() < 0.5,
    )  # fmt: skip
    assert (spec.num_kv_heads, spec.num_ffn_shards) == (groups, shards)
    job = Job(r.randint(1, 40), r.randint(1, 30))
    hosts = tuple(_host(r, number) for number in range(machines))
    links = {
        (a, b): LinkSpec(10 ** r.uniform(-5, -2), 10 ** r.uniform(5, 9), 10 ** r.uniform(5, 9))
        for a in range(machines)
        for b in range(a + 1, machines)
        if a == 0 or r.random() < 0.5
    }
    int8 = WirePrecision.INT8
    accuracy = Accuracy(
        {Weights.INT4: (0.1, 0.02)}, {int8: (0.01, 0.003)}, "made up", {int8: (0.02, 0.008)}, {int8: (0.004, 0.02)}
    )
    world = World(spec, hosts, links, drafter=Drafter(0.6), accuracy=accuracy)
    if r.random() < 0.5:
        world = replace(world, hosts=tuple(_tight(r, world, m, job) for m in range(machines)))
    loads = {
        m: Load(r.uniform(1, 2), r.choice([1, 4]), r.choice([0, 0.002]), r.choice([0, 0, 0.05]))
        for m in range(1, machines)
    }
    limits = Limits(
        floor=r.choice([Floor(1, 0), Floor(0, 1), Floor(0, 0)]) if r.random() < 0.25 else None,
        first_layer_on_device=r.random() < 0.2,
        unreachable=frozenset({machines - 1}) if r.random() < 0.1 else frozenset(),
    )
    wires, chunks, drafts = [WirePrecision.FP16, WirePrecision.INT8], [None, 8], [0, 2]
    if menus:
        tools = Tools(tuple(wires), tuple(r.choice([[None], chunks])), tuple(r.choice([[0], [2], drafts])))
    else:
        tools = Tools((r.choice(wires),), (r.choice([None, None, 8]),), (r.choice([0, 0, 2]),))
    return Instance(world, job, world.conditions(loads), _objective(r), limits, tools)


def _host(r: random.Random, number: int) -> Host:
    device = DeviceSpec(
        f"m{number}", 10 ** r.uniform(9, 12), 10 ** r.uniform(8, 10), 1e12,
        launch_s=r.choice([0, 1e-5]), message_s=r.choice([0, 1e-4]), token_s=r.choice([0, 2e-4]),
        idle_w=1, decode_w=r.uniform(2, 9), prefill_w=r.uniform(3, 9), radio_w=1, slots=r.choice([1, 1, 8]),
    )  # fmt: skip
    return Host(device, Dtype.FP16, r.choice(list(Weights)))


def _tight(r: random.Random, world: World, machine: int, job: Job) -> Host:
    """The machine with memory for a random part of the model, or a little more than all of it."""
    host = world.hosts[machine]
    whole = memory_bytes(world, Partition.all_on(world.spec, machine), machine, job, None)
    return replace(host, device=replace(host.device, memory_bytes=max(whole * r.uniform(0.3, 1.1), 1e6)))


def _objective(r: random.Random) -> Objective:
    penalty = Penalty(t_ref_s=0.1, e_ref_j=1, w_energy=r.random(), w_accuracy=r.random(), n_ref=0.1)
    weights = np.array([1.0, 2, 2, 1]) * r.choice([0, 1, 10])
    queues, virtual = np.array([r.random() for _ in range(4)]), np.array([r.random() for _ in range(4)])
    budgets = r.choice([Budgets(), Budgets(energy_j=1.0, deadline_s=0.2, nats=0.05)])
    return r.choice([Latency(), Latency(), Energy(), DriftPlusPenalty(penalty, weights, queues, virtual, budgets)])


def every_decision(world: World, job: Job, tools: Tools) -> Iterator[Decision]:
    """Every unit, embedding and head on every machine, driven in every way."""
    spec, machines = world.spec, range(len(world.hosts))
    groups = product(machines, repeat=spec.num_kv_heads)
    layer = [Placement(a, f) for a, f in product(groups, product(machines, repeat=spec.num_ffn_shards))]
    for layers in product(layer, repeat=spec.num_layers):
        for embed, head, wire, chunk, draft in product(machines, machines, tools.wires, tools.chunks, tools.drafts):
            yield Decision(Partition(layers, embed, head), wire, chunk, draft)


def by_enumeration(given: Instance) -> tuple[float, Decision] | None:
    """The least value of all admissible decisions and one that has it; None where nothing is admissible."""
    world, job = given.world, given.job
    allowed = [d for d in every_decision(world, job, given.tools) if obstacle(world, d, job, given.limits) is None]
    if not allowed:
        return None
    prices = Table(world, [bill(world, decision, job) for decision in allowed]).at(given.conditions)
    values = given.objective.value(prices)
    return float(values.min()), allowed[int(values.argmin())]
