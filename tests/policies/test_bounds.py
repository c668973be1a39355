"""The least time any decision could take, beside every decision of small random worlds."""

from __future__ import annotations

import numpy as np
import pytest
from random_worlds import LARGER, every_decision, instance

from splitwise_llm.cost import Host, Job, Limits, Table, World, bill, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.bounds import least_total_s
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.solver import Solver
from splitwise_llm.spec import DeviceSpec, LinkSpec, find_device, find_model


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_no_decision_is_quicker_than_the_bound_and_some_come_near(first: int) -> None:
    nearest = []
    for seed in range(first, first + 10):
        one = instance(seed, LARGER[:6], menus=True)
        bound = least_total_s(one.world, one.job, one.tools, one.limits, one.conditions)
        assert bound > 0
        ways = [
            way
            for way in every_decision(one.world, one.job, one.tools)
            if obstacle(one.world, way, one.job, one.limits) is None
        ]
        if ways:
            total = (
                Table(one.world, [bill(one.world, way, one.job) for way in ways[:: len(ways) // 4000 + 1]])
                .at(one.conditions)
                .total_s
            )
            assert total.min() >= bound * (1 - 1e-9), seed
            nearest.append(total.min() / bound)
    assert np.median(nearest) < 3


def test_where_one_machine_does_it_all_the_bound_is_the_best() -> None:
    world = World(find_model("gpt2"), (Host(find_device("pi5")),))
    job, tools, limits = Job(64, 16), Tools(), Limits()
    best = Solver(world, job, tools, limits).solve(world.conditions(), Latency()).best
    assert least_total_s(world, job, tools, limits, world.conditions()) == pytest.approx(best.value, rel=1e-9)


def test_a_fast_worker_under_no_floor_leaves_little_between_the_best_and_the_bound() -> None:
    link = {(0, 1): LinkSpec.parse("rtt=1ms up=1gbit down=1gbit")}
    world = World(find_model("llama-2-7b"), (Host(find_device("pi5")), Host(find_device("a100"))), link)
    job, tools, limits = Job(128, 128), Tools(), Limits()
    best = Solver(world, job, tools, limits).solve(world.conditions(), Latency()).best
    assert 1 <= best.value / least_total_s(world, job, tools, limits, world.conditions()) < 1.1


def test_chunks_that_overlap_on_two_machines_may_take_half_as_long_and_the_bound_knows() -> None:
    link = {(0, 1): LinkSpec(1e-7, 1e11, 1e11)}
    flat = DeviceSpec("flat", 1e11, 1e11, 1e12)
    world, job = World(find_model("gpt2"), (Host(flat), Host(flat)), link), Job(512, 1)
    tools, halved = Tools(chunks=(8,)), Partition.cut(world.spec, 6)
    total = Table(world, [bill(world, Decision(halved, WirePrecision.FP16, 8), job)]).at(world.conditions()).total_s
    bound = least_total_s(world, job, tools, Limits(), world.conditions())
    assert bound <= float(total[0]) < 1.2 * bound
