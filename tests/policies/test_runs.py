"""Plans as runs of layers: their sums are their prices."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from splitwise_llm.cost import Limits, Table, bill, obstacle
from splitwise_llm.decision import WirePrecision
from splitwise_llm.learn.states import State, random_state
from splitwise_llm.policies.low_level import sheet_of
from splitwise_llm.policies.runs import Runs, Sheet


def drawn_plan(r: random.Random, sheet: Sheet) -> Runs:
    """Up to four runs on seats at random, embedding and head where they may be."""
    seats = [r.randrange(sheet.num_seats)]
    while len(seats) < r.randint(1, 4) and sheet.num_seats > 1:
        seats.append(r.choice([seat for seat in range(sheet.num_seats) if seat != seats[-1]]))
    ends = [*sorted(r.sample(range(1, sheet.num_layers), len(seats) - 1)), sheet.num_layers]
    pair = r.choice(sheet.ends(sheet.seats[seats[0]], sheet.seats[seats[-1]]))
    return Runs(tuple(zip(seats, ends, strict=True)), *pair)


def exactly(state: State, sheet: Sheet, plan: Runs) -> float:
    """What `cost` says; inf where memory forbids it."""
    decision = sheet.decision(plan)
    if obstacle(state.world, decision, state.job, Limits()):
        return float("inf")
    prices = Table(state.world, [bill(state.world, decision, state.job)]).at(state.conditions)
    return float(state.objective.value(prices)[0])


@pytest.mark.parametrize("draft", [0, 3])
def test_the_sum_of_a_plan_of_whole_layers_in_one_chunk_is_its_price(draft: int) -> None:
    """Killed in runs.py by: `lengths @ self.layer[order]`; hops without nats; work without slots; tables
    without the head; in assignments.py by `ids` for `made` where the loop is away."""
    for seed in range(60):
        r, state = random.Random(seed), random_state(seed)
        way = (WirePrecision.INT8 if draft else WirePrecision.FP16, None, draft)
        sheet = Sheet(state.world, state.job, state.limits, state.conditions, state.objective, way)
        plans = [drawn_plan(r, sheet) for _ in range(4)]
        expected = [exactly(state, sheet, plan) for plan in plans]
        assert sheet.values(plans) == pytest.approx(expected, rel=1e-9), seed
        for plan, value in zip(plans, expected, strict=True):
            seats, ends = zip(*plan.runs, strict=True)
            assert sheet.values_of(seats, np.array([ends]), plan.embed, plan.head)[0] == pytest.approx(value, rel=1e-9)


def test_the_sum_of_a_plan_with_shared_layers_is_near_its_price() -> None:
    """Whose clock is ahead depends on what came before; who is chosen is priced by `cost`."""
    compared = 0
    for seed in range(120):
        r, state = random.Random(seed), random_state(seed)
        hosts = tuple(replace(host, device=replace(host.device, memory_bytes=1e13)) for host in state.world.hosts)
        links = {pair: replace(link, rtt_s=1e-5, up_bytes_per_s=1e9) for pair, link in state.world.links.items()}
        state = replace(state, world=replace(state.world, hosts=hosts, links=links))
        state = replace(state, conditions=state.world.conditions())
        sheet = sheet_of(state.world, state.job, state.limits, state.conditions, state.objective,
                         (state.tools.wires[0], None, 0))  # fmt: skip
        for seat in [n for n, seat in enumerate(sheet.seats) if len(seat.machines) > 1]:
            before = r.randrange(len(sheet.machines))
            last = sheet.seats[seat].machines[-1]
            plan = Runs(((before, 2), (seat, sheet.num_layers)), 0, last)
            assert float(sheet.values([plan])[0]) == pytest.approx(exactly(state, sheet, plan), rel=0.1), (seed, plan)
            compared += 1
    assert compared >= 10


def test_machines_out_of_reach_have_no_seat() -> None:
    state = random_state(3)
    gone = frozenset({len(state.world.hosts) - 1})
    sheet = sheet_of(state.world, state.job, replace(state.limits, unreachable=gone), state.conditions,
                     state.objective, (state.tools.wires[0], None, 0))  # fmt: skip
    assert not any(gone & set(seat.machines) for seat in sheet.seats)
