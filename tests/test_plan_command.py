"""`splitwise plan` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forked import splitwise_text
from splitwise_llm.policies import POLICIES

SMALL = ("--model", "gpt2", "--edge", "pi5.json", "--cloud", "a100.json")
LINK = ("--link", "rtt=20ms up=50mbit down=50mbit")
SEVEN = ("--model", "llama-2-7b", "--edge", "pi5", "--cloud", "a100", *LINK)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return splitwise_text("plan", *arguments, timeout=150)


def test_the_best_plan_the_runner_up_every_baseline_and_the_flips_are_printed_and_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = plan(*SEVEN, "--request", "128/128", "--floor", "2+2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "best: edge[0:2] cloud[2:30] edge[30:32]" in done.stdout
    assert "counted as lossless" in done.stdout
    assert "modelled" in done.stdout
    assert "weights int4" in done.stdout
    assert "\x1b" not in done.stdout
    for name in POLICIES:
        assert f" {name} " in done.stdout
    said = json.loads(file.read_text())
    best = said["best"]
    assert best["partition"] == "edge[0:2] cloud[2:30] edge[30:32]"
    assert best["round_trips_per_token"] == 1
    assert said["runner_up"]["total_s"] >= best["total_s"]
    planned = {name: each for name, each in said["policies"].items() if "forbidden" not in each}
    assert len(planned) > len(POLICIES) / 2
    assert all(each["total_s"] >= best["total_s"] * (1 - 1e-9) for each in planned.values())
    assert said["flips"]["rtt"]["above"]["becomes"] == "all:edge"
    assert set(said["flips"]) == {"rtt", "up", "down", "batch", "wait", "edge speed", "prompt", "output"}


def test_a_flip_that_is_printed_is_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    ask = ("--model", "gpt2-xl", "--edge", "orin-nx", "--cloud", "a100", "--floor", "2+2", "--json", str(file))
    assert plan(*ask, "--link", "rtt=8ms up=50mbit down=50mbit").returncode == 0
    said = json.loads(file.read_text())
    at = said["flips"]["rtt"]["above" if "cloud" in said["best"]["partition"] else "below"]["at"]
    best = []
    for factor in (0.98, 1.02):
        assert plan(*ask, "--link", f"rtt={1e3 * factor * at}ms up=50mbit down=50mbit").returncode == 0
        best.append(json.loads(file.read_text())["best"]["partition"])
    assert best[0] != best[1]


def test_a_baseline_without_a_plan_says_what_forbids_it_and_a_named_policy_comes_first() -> None:
    pi = ("--model", "llama-2-7b", "--edge", "pi5", "--edge-weights", "full", "--cloud", "a100", *LINK)
    done = plan(*pi, "--policy", "neurosurgeon")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("neurosurgeon chooses") < done.stdout.index("best:")
    row = done.stdout[done.stdout.index(" edge-only ") :].split("cloud-only")[0]
    assert "would" in row
    assert "hold" in row


def test_all_tools_say_that_the_acceptance_is_assumed_and_are_no_slower() -> None:
    done = plan(*SMALL, *LINK, "--tools", "all", "--acceptance", "0.7", "--batch", "32", "--wait", "100ms")
    assert done.returncode == 0, done.stderr
    assert "0.7 of drafted tokens are accepted (assumed)" in done.stdout
    assert "32 in its batch, 100 ms to be admitted" in done.stdout


def test_two_workers_with_a_mesh_are_planned_for(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    links = ("--link", "rtt=1ms up=1gbit down=1gbit", "--link", "rtt=30ms up=20mbit down=20mbit")
    done = plan("--model", "gpt2", "--edge", "pi5", "--cloud", "l4", "--cloud", "a100", *links, "--mesh",
                "--floor", "1+1", "--json", str(file))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["best"]["partition"] == "edge[0:1] cloud1[1:11] edge[11:12]"


@pytest.mark.alone
def test_a_search_that_is_cut_short_says_so_with_a_bound_and_meanwhile_what_it_does(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    ask = ("--model", "llama-2-7b", "--edge", "pi5", "--cloud", "pi5", "--budget", "1.5", "--json", str(file))
    done = plan(*ask, "--link", "rtt=0.3ms up=940mbit down=940mbit")
    assert done.returncode == 0, done.stderr
    assert "the best found in 1.5 s" in done.stdout
    assert "not proven exact; at most" in done.stdout
    assert "exact, drift-selfish, drift: the best found before the 1.5 s were over" in done.stdout
    assert "... searching all partitions (wire fp16; 1 of 1); best so far 6" in done.stderr
    said = json.loads(file.read_text())
    assert (said["exact"], said["in_time"]) == (False, False)
    assert 0 < said["at_most_above"] < 1
    assert "edge+cloud" in said["best"]["partition"]
    assert said["best"]["total_s"] < said["policies"]["edge-only"]["total_s"]


def test_a_floor_of_more_layers_than_there_are_leaves_everything_on_the_device() -> None:
    command = [sys.executable, "-m", "splitwise_llm", "plan", *SEVEN, "--floor", "40+40"]  # not as a fork: once
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "covers all 32 layers" in done.stdout
    assert "best: all:edge" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*SMALL, "--link", "rtt=20ms up=3tbit down=1mbit"), "not a rate"),
        ((*SMALL, "--link", "rtt=20ms up=3000gbit down=1mbit"), "no link carries"),
        ((*SMALL, "--link", "rtt=-5ms up=1mbit down=1mbit"), "not a duration"),
        (SMALL, "0 links and 1 workers"),
        (("--model", "gpt2", "--edge", "pi5", *LINK), "no --link without a --cloud"),
        (("--model", "gpt3", "--edge", "pi5"), "did you mean 'gpt2'"),
        (("--model", "gpt2", "--edge", "raspbery"), "did you mean 'raspberry-pi-5'"),
        ((*SMALL, *LINK, "--policy", "neurosurgen"), "did you mean 'neurosurgeon'"),
        ((*SMALL, *LINK, "--request", "1000/100"), "context of 1024"),
        ((*SMALL, *LINK, "--request", "0/5"), "at least 1/1"),
        ((*SMALL, *LINK, "--request=-3/5"), "is no request"),
        ((*SMALL, *LINK, "--floor=-1+2"), "is no floor"),
        ((*SMALL, *LINK, "--acceptance", "1.5", "--tools", "all"), "acceptance"),
        ((*SMALL, *LINK, "--tools", "some"), "plain or all"),
        ((*SMALL, *LINK, "--batch", "500"), "at most 48 sequences"),
        ((*SMALL, *LINK, "--wait", "soon"), "not a duration"),
        ((*SMALL, *LINK, "--accuracy", "/nowhere.json"), "no accuracy table"),
        ((*SMALL, *LINK, "--json", "/no-such-directory/x.json"), "check the path"),
        (("--model", "gpt2", "--edge", "pi5", "--cloud", "pi5", *LINK, "--batch", "2"), "none here does"),
        (("--model", "llama-2-70b", "--edge", "pi5", "--cloud", "a100", *LINK), "would hold"),
        (("--model", "llama-2-70b", "--edge", "pi5", "--cloud", "a100", *LINK, "--floor", "2+2"), "floor 2+2"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(arguments: tuple[str, ...], says: str) -> None:
    done = plan(*arguments)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
