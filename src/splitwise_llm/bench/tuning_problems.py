"""What constants are tuned on: every case of the scenarios on its training split, with and without the shared tools.

Crowds are small ones: a twentieth or so of the devices on a cloud with as small a share of the sessions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from splitwise_llm.bench.cells import TOOLS, Setting, Size
from splitwise_llm.cost import Table, bill
from splitwise_llm.learn.tuning import Problem
from splitwise_llm.observation import PLAIN
from splitwise_llm.policies.planners import PLANNERS
from splitwise_llm.sim.params import SharedCloud
from splitwise_llm.sim.scenarios import SCENARIOS, TRAIN, Case, Scenario, worlds

CROWD = 6
"""Devices of a small crowd."""


def small(scenario: Scenario, case: Case) -> tuple[Scenario, Case]:
    """The same with at most CROWD devices, a shared cloud shrunk with them. A small batch is faster than a large one;
    devices ask as much more often, so that as many of the sessions are taken."""
    cloud, share = case.cloud or scenario.cloud, CROWD / scenario.num_devices
    if share >= 1 or not isinstance(cloud, SharedCloud):
        return replace(scenario, num_devices=min(scenario.num_devices, CROWD)), case
    sessions = math.ceil(share * cloud.sessions)
    faster = _cloud_s(scenario, case, cloud.sessions) / _cloud_s(scenario, case, sessions)
    fewer = replace(case, cloud=replace(cloud, sessions=sessions), per_s=case.per_s * faster)
    return replace(scenario, num_devices=CROWD), fewer


def _cloud_s(scenario: Scenario, case: Case, batch: int) -> float:
    """A request of the first kind of device, as much as may be of it in a cloud that works on so many."""
    world, job = worlds(scenario, case)[0]
    planner = next(row for row in PLANNERS if row.name == "cloud-only")
    plan = planner.decisions(world, job, PLAIN, scenario.limits)[0]
    times = Table(world, [bill(world, plan, job)]).at(world.conditions({1: world.load(1, batch, 0.0)})).total_s
    return float(times[0])


def problems(scenarios: Sequence[Scenario] = SCENARIOS) -> Iterator[Problem]:
    """Of all cases but those that replay recordings."""
    for scenario in scenarios:
        for case in () if scenario.is_recorded else scenario.cases:
            setting = Setting(*small(scenario, case), Size(1, 1, 1), split=TRAIN)
            name = f"{scenario.name}.{case.name}"
            make = partial(getattr, setting, "params")  # both share its tables
            yield Problem(name, make, PLAIN, setting.limits)
            yield Problem(f"{name}+tools", make, TOOLS, setting.limits)
