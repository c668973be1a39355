"""A plain optimiser finds constants whose optimum is known, the same ones every time, and goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sim.worlds import STEADY, table
from splitwise_llm.bench.tuning_problems import small
from splitwise_llm.cli import app
from splitwise_llm.cost import Limits
from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.learn.tuning import NAMES, Judged, Problem, Settings, accepted, checked, free, tune, write_constants
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import EVERYTHING
from splitwise_llm.policies.knobs import Constants
from splitwise_llm.policies.tuned import read_constants, shipped_constants
from splitwise_llm.sim.params import Arrivals, Params, SharedCloud
from splitwise_llm.sim.physics import Physics
from splitwise_llm.sim.scenarios import find_scenario

BEST = Constants(device=0.5, link=2.0, cloud=3.0, patience=0.25, draft=1.5)


def problem(budgets: Budgets | None = None) -> Problem:
    def make() -> Params:
        arrivals, penalty = Arrivals(0.05), Penalty(t_ref_s=2.0)
        return Params(Physics([table()]), STEADY, arrivals=arrivals, penalty=penalty, horizon_s=3e3)

    return Problem("steady", make, EVERYTHING, Limits(), budgets or Budgets())


def distance(generation: int, candidates: Sequence[Constants]) -> Judged:
    return [float(np.square(np.log(astuple(one)) - np.log(astuple(BEST))).sum()) for one in candidates], 100


def quiet(text: str) -> None:
    pass


# Dies when tuning.py says `search.tell(points, values[::-1])` for `search.tell(points, values)`.
def test_a_known_optimum_is_found() -> None:
    found = tune([problem()], Settings(decisions=6_000), quiet, loss=distance)
    assert astuple(found.constants) == pytest.approx(astuple(BEST), rel=0.02)
    assert found.decisions == 6_000
    assert found.generations == 60


def test_without_budgets_their_constant_stays_neutral() -> None:
    assert free([problem()]) == tuple(name for name in NAMES if name != "budgets")
    assert free([problem(Budgets(energy_j=50.0))]) == NAMES


def test_the_same_seed_finds_the_same_and_a_stopped_course_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole = tune([problem()], Settings(decisions=1_000), quiet, loss=distance)
    keep = tmp_path / "course.json"
    tune([problem()], Settings(decisions=400), quiet, keep, loss=distance)
    asked: list[int] = []

    def counted(generation: int, candidates: Sequence[Constants]) -> Judged:
        asked.append(generation)
        return distance(generation, candidates)

    assert tune([problem()], Settings(decisions=1_000), quiet, keep, loss=counted) == whole
    assert asked == list(range(4, 10))
    assert tune([problem()], Settings(1, decisions=1_000), quiet, loss=distance) != whole
    with pytest.raises(SpecError, match="another course"):
        tune([problem()], Settings(1, decisions=1_000), quiet, keep, loss=distance)
    keep.write_text("{}")
    with pytest.raises(SpecError, match="no course of tuning"):
        tune([problem()], Settings(), quiet, keep, loss=distance)


def test_simulated_losses_are_paired_and_neutral_constants_lose_nothing(tmp_path: Path) -> None:
    one = problem()
    settings = Settings(decisions=1, problems=1, traces=1, requests=4, candidates=4)
    found = tune([one], settings, quiet)
    assert found.generations == 1
    assert found.decisions >= 5 * 4  # neutral and four candidates, a decision a request at least
    assert checked([one], Constants(), 1, 4, quiet) == [1.0]
    file = tmp_path / "tuned.json"
    neutral = replace(found, constants=Constants())
    write_constants(file, settings, neutral, found, {"steady": 1.0})
    assert read_constants(file) == Constants()
    told = json.loads(file.read_text())
    assert told["found"] == pytest.approx(asdict(found.constants), abs=1e-5)
    assert told["found_over_neutral"] == {"steady": 1.0}


def test_a_small_crowd_takes_as_large_a_share_of_its_cloud() -> None:
    scenario = find_scenario("rush-hour")
    crowd, case = small(scenario, scenario.case("orin-7b-0.15-live"))
    assert isinstance(case.cloud, SharedCloud)
    assert (crowd.num_devices, case.cloud.sessions) == (6, 3)
    assert case.per_s == pytest.approx(0.15 * 1.733 / 1.233, rel=1e-3)  # seconds a request takes in batches of 48, of 3
    day = find_scenario("day")
    assert small(day, day.cases[0]) == (day, day.cases[0])


def test_what_is_no_better_than_neutral_on_other_traces_is_not_taken() -> None:
    found = tune([problem()], Settings(decisions=500), quiet, loss=distance)
    assert accepted(found, [0.9, 1.05]) == found
    assert accepted(found, [0.9, 1.2]).constants == Constants()
    assert accepted(found, []) == found


def test_what_ships_can_be_read_and_what_cannot_says_so(tmp_path: Path) -> None:
    assert min(astuple(shipped_constants())) > 0
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"constants": {"device": 1.0}}))
    with pytest.raises(ModelError, match="no tuned constants"):
        read_constants(file)
    for value in (-1.0, np.inf, np.nan):
        file.write_text(json.dumps({"constants": dict.fromkeys(NAMES, value)}))
        with pytest.raises(ModelError, match="no tuned constants"):
            read_constants(file)


def test_the_command_names_scenarios_it_does_not_know(tmp_path: Path) -> None:
    arguments = ["bench", "constants", "--to", str(tmp_path / "tuned.json"), "--scenario", "peer"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, SpecError)
    assert not (tmp_path / "tuned.json").exists()
