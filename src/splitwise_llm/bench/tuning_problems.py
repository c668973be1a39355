"""What constants are tuned on: every case of the scenarios on its training split, with and without the shared tools.

Crowds are small ones: a twentieth or so of the devices on a cloud with as small a share of the sessions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from splitwise_llm.bench.cells import TOOLS, Setting, Size
from splitwise_llm.learn.tuning import Problem
from splitwise_llm.observation import PLAIN
from splitwise_llm.sim.params import SharedCloud
from splitwise_llm.sim.scenarios import SCENARIOS, TRAIN, Case, Scenario

CROWD = 6
"""Devices of a small crowd."""


def small(scenario: Scenario, case: Case) -> tuple[Scenario, Case]:
    """The same with at most CROWD devices, a shared cloud shrunk with them."""
    share = min(CROWD / scenario.num_devices, 1.0)

    def shrunk(cloud: object) -> SharedCloud | None:
        return replace(cloud, sessions=math.ceil(share * cloud.sessions)) if isinstance(cloud, SharedCloud) else None

    scenario = replace(scenario, num_devices=min(scenario.num_devices, CROWD))
    return (
        replace(scenario, cloud=shrunk(scenario.cloud) or scenario.cloud),
        replace(case, cloud=shrunk(case.cloud) or case.cloud),
    )


def problems(scenarios: Sequence[Scenario] = SCENARIOS) -> Iterator[Problem]:
    """Of all cases but those that replay recordings."""
    for scenario in scenarios:
        for case in () if scenario.is_recorded else scenario.cases:
            setting = Setting(*small(scenario, case), Size(1, 1, 1), split=TRAIN)
            name = f"{scenario.name}.{case.name}"
            make = partial(getattr, setting, "params")  # both share its tables
            yield Problem(name, make, PLAIN, setting.limits)
            yield Problem(f"{name}+tools", make, TOOLS, setting.limits)
