"""What would flip a choice: thresholds against a scan that solves at every value."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from splitwise_llm.cost import UNLIMITED, Drafter, Floor, Host, Job, Limits, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.observation import PLAIN, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.explain import Figure, Question, Sensitivity, nearest, sensitivities
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.solver import Solver
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec, Weights

SPEC = ModelSpec("llama", 8, 512, 8, 8, 64, 2048, 4000, 2048, 3, False)
DEVICE = DeviceSpec("device", 2e10, 1e9, 1e10, message_s=1e-4, launch_s=1e-5)
SERVER = DeviceSpec("server", 1e13, 4e11, 1e11, message_s=1e-4, slots=16)
LINK = LinkSpec.parse("rtt=5ms up=50mbit down=20mbit")
CASES = {
    "free": (SERVER, UNLIMITED, PLAIN, Job(64, 32)),
    "floor": (SERVER, Limits(floor=Floor(1, 1)), PLAIN, Job(64, 32)),
    "short memory": (replace(SERVER, memory_bytes=3.6e7), UNLIMITED, PLAIN, Job(64, 32)),
    "tools": (
        SERVER, Limits(floor=Floor(1, 1)), Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 16), (0, 2)),
        Job(128, 8),
    ),
}  # fmt: skip


@cache
def question(case: str, batch: int = 4, wait_s: float = 0.05) -> Question:
    server, limits, tools, job = CASES[case]
    world = World(SPEC, (Host(DEVICE, weights=Weights.INT4), Host(server)), {(0, 1): LINK}, drafter=Drafter(0.5))
    solver = Solver(world, job, tools, limits)
    loads = {1: world.load(1, batch, wait_s, job.mean_context)}
    best = next(iter(solver.cuts(world.conditions(loads), Latency()))).decision
    return Question(solver, Latency(), loads, best)


@cache
def asked(case: str) -> dict[str, Sensitivity]:
    return {one.name: one for one in sensitivities(question(case), [], 4, 0.05)}


def solved_at(case: str, name: str, value: float) -> Decision | None:
    """The best of all under one changed figure, worked out from the start."""
    server, limits, tools, job = CASES[case]
    link, device, batch, wait_s = LINK, DEVICE, 4.0, 0.05
    match name:
        case "rtt":
            link = replace(link, rtt_s=value)
        case "up":
            link = replace(link, up_bytes_per_s=min(value, 1e11))
        case "down":
            link = replace(link, down_bytes_per_s=min(value, 1e11))
        case "batch":
            batch = value
        case "wait":
            wait_s = value
        case "prompt":
            job = Job(round(value), job.tokens_out)
        case "output":
            job = Job(job.prompt_tokens, round(value))
    stretch = 1 / value if name == "edge speed" else 1.0
    world = World(
        SPEC, (Host(device, weights=Weights.INT4, stretch=stretch), Host(server)), {(0, 1): link}, drafter=Drafter(0.5)
    )
    loads = {1: world.load(1, round(batch), wait_s, CASES[case][3].mean_context)}
    found = list(Solver(world, job, tools, limits).cuts(world.conditions(loads), Latency()))
    return found[0].decision if found else None


@pytest.mark.parametrize("name", ["rtt", "up", "down", "batch", "wait", "prompt", "output", "edge speed"])
@pytest.mark.parametrize("case", ["free", "floor", "short memory"])
def test_the_nearest_flip_is_where_a_scan_first_finds_another_best(case: str, name: str) -> None:
    """Killed by: `low = value` in `_of_conditions`; comparing with `grid[-1]` instead of the first that is lost."""
    one, chosen = asked(case)[name], question(case).choice
    for flip, end in ((one.below, one.low), (one.above, one.high)):
        whole = one.unit in ("tokens", "sequences")
        values = np.geomspace(one.value, end, 25)[1:] if one.value != end else np.array([])
        values = np.unique(np.round(values)) if whole else values
        for value in sorted(values.tolist(), reverse=end < one.value):
            beyond = flip is not None and (value >= flip.value) == (end > one.value)
            near = flip is not None and abs(value / flip.value - 1) < 0.01 + 1.01 * whole / flip.value
            if not near:
                assert (solved_at(case, name, value) != chosen) == beyond, (value, flip)
            if beyond:
                break  # farther away the choice may come back


@pytest.mark.parametrize("name", ["rtt", "up", "down", "edge speed"])
def test_the_choice_is_the_best_just_before_a_flip_and_another_just_behind_it(name: str) -> None:
    for case in CASES:
        one, chosen = asked(case)[name], question(case).choice
        for flip, way in ((one.below, -1), (one.above, 1)):
            if flip:
                assert solved_at(case, name, flip.value * (1 - way * 0.01)) == chosen, case
                assert solved_at(case, name, flip.value * (1 + way * 0.01)) != chosen, case


def test_a_threshold_that_two_probes_miss_is_found_by_asking_again_just_before_it() -> None:
    """Killed by: taking the first threshold without `figure.best(inside)`."""
    home, middle, far = (Decision(Partition.cut(SPEC, at)) for at in (2, 3, 4))
    lines = {home: (0.0, 1.0), middle: (9.0, 0.2), far: (30.0, 0.05)}  # value = a + b x; home until 11.25

    def values(plans: object, at: object) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([[lines[p][0] + lines[p][1] * x for p in plans] for x in at])  # type: ignore[attr-defined]

    def best(at: float) -> list[Decision]:
        return [min(lines, key=lambda plan: float(values([plan], [at])[0, 0]))]

    figure = Figure("x", "s", 1.0, 1e-3, 1e5, values, best)
    flip = nearest(figure, home, figure.high, {home: None})
    assert flip
    assert flip.becomes == middle
    assert flip.value == pytest.approx(11.25, rel=0.002)
    assert nearest(figure, home, figure.low, {home: None}) is None


def test_a_request_that_outgrows_every_memory_is_said_to_fit_nowhere() -> None:
    small = replace(DEVICE, memory_bytes=4e7)
    world = World(SPEC, (Host(small, weights=Weights.INT4),))
    solver = Solver(world, Job(64, 32), PLAIN, UNLIMITED)
    best = next(iter(solver.cuts(world.conditions(), Latency()))).decision
    found = {one.name: one for one in sensitivities(Question(solver, Latency(), {}, best), [], 1, 0.0)}
    assert found["prompt"].above
    assert found["prompt"].above.becomes is None
    assert set(found) == {"edge speed", "prompt", "output"}
