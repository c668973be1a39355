"""`--explain` of the policy `splitwise`: which knobs, what the plain solver would do, what is expected of either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from neutral_networks import network
from test_in_flight import CLOUD, EDGE, THREE, TWO, WAN, flying
from test_one_session import admitted, values, wanting
from typer.testing import CliRunner

from splitwise_llm.cli import app
from splitwise_llm.cli.decision_map import NUM_TRIPS, points
from splitwise_llm.cli.turned import counted, turned
from splitwise_llm.errors import RequestError
from splitwise_llm.policies import mind, one_session
from splitwise_llm.policies.knobs import NEUTRAL, Mode
from splitwise_llm.policies.mind import Splitwise

NAMES = ("edge", "cloud")
SEVEN = (
    "plan", "--model", "llama-2-7b", "--edge", "orin-nx", "--cloud", "a100", "--link", "rtt=40ms up=20mbit down=40mbit",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_session, "RATES", (1.0,))
    monkeypatch.setattr(one_session, "TRIPS", (1.0,))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that ship wait twice as long."""
    wants = list(NEUTRAL)
    wants[5] = 3
    monkeypatch.setattr(mind, "shipped", lambda: network(tuple(wants)))


def test_neutral_knobs_say_that_the_plain_solver_decides_the_same() -> None:
    lines = list(turned(Splitwise(weights=network()), admitted(TWO), NAMES))
    assert lines[0] == "  knobs: all neutral"
    assert lines[1].endswith("decides the same")
    assert " s" in lines[2]


def test_another_choice_is_shown_beside_the_plain_one_with_what_either_takes() -> None:
    policy = wanting(mode=Mode.EDGE)
    for trip_s in np.geomspace(1e-3, 10, 60):
        seen = admitted(replace(TWO, links={(0, 1): replace(WAN, rtt_s=float(trip_s))}))
        edge, cloud = values(seen, [EDGE, CLOUD])
        if cloud < edge < 1.1 * cloud:
            break
    lines = list(turned(policy, seen, NAMES))
    assert lines[0] == "  knobs: mode edge"
    assert "would choose all:cloud" in lines[1]
    assert lines[2].startswith("  expected: D ")
    assert "of the plain solver: D " in lines[3]
    assert "may pass" in lines[3]
    d1, plain = (float(line.split("D ")[1].split(",")[0]) for line in lines[2:4])
    assert d1 > plain


def test_a_fallback_says_its_reason_and_the_count_tells_all_of_them() -> None:
    policy = Splitwise(weights=network())
    seen = flying(TWO, policy.decide(admitted(TWO)))
    policy.decide(seen)
    assert "all neutral" in next(turned(policy, seen, NAMES))
    odd = admitted(THREE)
    policy.decide(odd)
    lines = list(turned(policy, odd, NAMES))
    assert "fell back to the plain solver: it was trained with one worker" in lines[0]
    said = list(counted(policy))
    assert said[0].startswith("  3 decisions, 33.3 % of them by the plain solver (it was trained with one worker: 1)")
    assert said[1] == "  knobs turned: none"


@pytest.mark.usefixtures("patient")
def test_plan_explains_its_choice() -> None:
    done = CliRunner().invoke(app, [*SEVEN, "--floor", "2+2", "--policy", "splitwise", "--explain"])
    assert done.exit_code == 0, done.output
    assert "splitwise chooses:" in done.output
    assert "knobs: patience x2" in done.output
    assert "decides the same" in done.output


@pytest.mark.parametrize("option", ["--explain", "--map=decisions.svg"])
def test_plan_explains_no_policy_that_has_only_prices(option: str) -> None:
    done = CliRunner().invoke(app, [*SEVEN, "--policy", "neurosurgeon", option])
    assert done.exit_code != 0
    assert "--policy splitwise" in f"{done.output}{done.exception}"


def test_plan_says_which_low_level_found_a_plan_and_what_the_other_one_finds(tmp_path: Path) -> None:
    link = ("--link", "rtt=2ms up=100mbit down=100mbit")
    ask = ["plan", "--model", "gpt2", "--edge", "pi5", "--cloud", "orin-nx", *link, "--explain"]
    ask += ["--json", f"{tmp_path}/plan.json"]
    said = CliRunner().invoke(app, [*ask, "--policy", "drift"]).output
    assert "low level: exact; the learned one is for two workers and more" in said
    assert json.loads((tmp_path / "plan.json").read_text())["low_level"] == "exact"
    ask += ["--cloud", "l4", "--budget", "1"]
    for policy, options, mine, other in (
        ("drift", [], "learned", "exact"), ("splitwise", ["--low-level", "exact"], "exact", "learned"),
    ):  # fmt: skip
        done = CliRunner().invoke(app, [*ask, "--policy", policy, *options])
        assert done.exit_code == 0, done.output
        assert f"low level: {mine}, D " in done.output
        assert f"the {other} one: " in done.output
        assert json.loads((tmp_path / "plan.json").read_text())["low_level"] == mine


@pytest.mark.usefixtures("patient")
def test_generate_explains_its_decisions() -> None:
    done = CliRunner().invoke(
        app, ["generate", "It was", "--policy", "splitwise", "--explain", "-n", "3", "--emulate", "pi5"]
    )
    assert done.exit_code == 0, done.output
    assert "knobs: fell back to the plain solver: it was trained with one worker" in done.output + done.stderr
    assert "knobs turned: " in done.output + done.stderr


@pytest.mark.usefixtures("patient")
def test_simulate_runs_it(tmp_path: object) -> None:
    file = f"{tmp_path}/records.jsonl"
    done = CliRunner().invoke(
        app,
        ["simulate", "--scenario", "tunnel", "--policy", "splitwise", "--worlds", "1", "--requests-per-trace", "5",
         "--plain", "--out", file],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "under splitwise" in done.output


@pytest.mark.usefixtures("patient")
def test_plan_draws_its_decisions_over_round_trip_time_and_load(tmp_path: Path) -> None:
    file = tmp_path / "map.png"
    done = CliRunner().invoke(app, [*SEVEN, "--policy", "splitwise", "--map", str(file)])
    assert done.exit_code == 0, done.output
    assert "decisions over round-trip time and load" in done.output
    assert file.read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(app, [*SEVEN, "--policy", "splitwise", "--map", "map.txt"])
    assert "ends in .png" in str(done.exception)


def test_points_of_the_map_are_what_would_be_decided_there() -> None:
    link = replace(WAN, rtt_s=0.001)
    found = list(points(Splitwise(weights=network()), admitted(replace(TWO, links={(0, 1): link}))))
    assert {point.batch for point in found} == {1}, "its worker serves one at a time"
    assert len(found) == NUM_TRIPS
    assert all(point.mode == point.plain_mode for point in found)
    assert found[0].mode == "cloud"
    assert not any(point.fell_back or point.turned for point in found)
    with pytest.raises(RequestError, match="one --cloud"):
        list(points(Splitwise(weights=network()), admitted(THREE)))
