"""Which low level found a plan, beside what the other one finds, in words. It decides nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from splitwise_llm.cli.choice import decision_text
from splitwise_llm.cli.seeking import Seeker
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Observation
from splitwise_llm.policies.in_flight import SAME
from splitwise_llm.policies.low_level import FEWEST, Level
from splitwise_llm.policies.planners import Planner


def compared(planner: Planner, observation: Observation, names: Sequence[str], solver: Seeker) -> Iterator[str]:
    """Of one decision at admission, a line each: who found the plan, its D, and the other's. `solver` says when the
    exact search has run out of its time."""
    world = observation.world
    assert world is not None
    level = planner.level(world)
    if len(world.hosts) < FEWEST:
        yield f"  low level: {level}; the learned one is for two workers and more"
        return
    mine = _asked(replace(planner, low=level), observation, solver)
    if isinstance(mine.found, str):
        yield f"  low level: {level}: {mine.found}"
        return
    yield f"  low level: {level}, D {mine.value:.5g}{mine.text}"
    other = next(each for each in Level if each is not level)
    beside = _asked(replace(planner, low=other), observation, solver)
    if isinstance(beside.found, str):
        yield f"  the {other} one: {beside.found}"
        return
    more = beside.value / mine.value - 1
    than = "the same D" if abs(more) < SAME else f"D {100 * abs(more):.2g} % {'higher' if more > 0 else 'lower'}"
    said = "the same plan" if beside.found == mine.found else f"{decision_text(beside.found, names)}, {than}"
    yield f"  the {other} one: {said}{beside.text}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a low level answered, or what it refused for."""

    found: Decision | str
    value: float
    text: str
    """For how long, and whether that was all the time there was."""


def _asked(planner: Planner, observation: Observation, solver: Seeker) -> _Asked:
    solver.is_spent = False
    begun_s = time.process_time()
    try:
        found = planner.decide(observation, solver)
    except RequestError as error:
        return _Asked(str(error), math.nan, "")
    took = f", in {1e3 * (time.process_time() - begun_s):.0f} ms of processor time"
    if planner.low is Level.EXACT and solver.is_spent:
        took += " (the best found before its time was over; --budget)"
    return _Asked(found, planner.worth(observation, found), took)


__all__ = ["compared"]
