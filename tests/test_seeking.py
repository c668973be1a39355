"""A search with an end: the same answer where there is time, a good one with a bound where there is none."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

import pytest

from splitwise_llm.cli.seeking import PATIENCE_S, Progress, Seeker, SpentError, within
from splitwise_llm.cost import Drafter, Floor, Host, Job, Limits, World, memory_bytes
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import PLAIN, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.bounds import least_total_s
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.solver import Solver
from splitwise_llm.spec import Dtype, LinkSpec, ModelSpec, Weights, find_device, find_model

LAN = {(0, 1): LinkSpec.parse("rtt=0.3ms up=940mbit down=940mbit")}
SMALL = ModelSpec("llama", 2, 128, 2, 2, 64, 64, 500, 256, 3, False)
"""Of which every assignment is searched."""


def two(device: str, model: str | ModelSpec, other: str = "pi5") -> World:
    hosts = (Host(find_device(device), Dtype.FP16, Weights.INT4), Host(find_device(other)))
    spec = find_model(model) if isinstance(model, str) else model
    return World(spec, hosts, LAN, drafter=Drafter(0.6))


@pytest.mark.parametrize("tools", [PLAIN, Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 8), (0, 2))])
@pytest.mark.parametrize("limits", [Limits(), Limits(floor=Floor(1, 0))])
def test_in_time_the_answer_is_the_solvers(tools: Tools, limits: Limits) -> None:
    world, job = two("pi5", SMALL), Job(24, 16)
    if len(tools.wires) == 1:
        links = LAN | {(0, 2): LinkSpec.parse("rtt=2ms up=100mbit down=100mbit")}
        world = replace(world, hosts=(*world.hosts, Host(find_device("a100"))), links=links)
    usual = Solver(world, job, tools, limits).solve(world.conditions(), Latency())
    seeker = Seeker(world, job, tools, limits, 60.0, Progress())
    sought = seeker.solve(world.conditions(), Latency())
    assert not seeker.is_spent
    assert sought.shared_considered == usual.shared_considered == (len(world.hosts) == 2)
    assert sought.best.value == pytest.approx(usual.best.value, rel=1e-12)
    assert sought.exact == usual.exact
    assert seeker.solve(world.conditions(), Latency()) is sought


@pytest.mark.alone
def test_out_of_time_the_answer_is_no_worse_than_the_best_cut_and_says_so() -> None:
    world, job = two("pi5", "llama-2-7b"), Job(128, 128)
    start = time.monotonic()
    seeker = Seeker(world, job, PLAIN, Limits(), 0.2, Progress())
    solution = seeker.solve(world.conditions(), Latency())
    assert time.monotonic() - start < 20
    assert seeker.is_spent
    assert not solution.exact
    cut = next(seeker.cuts(world.conditions(), Latency()))
    assert solution.best.value < 0.99 * cut.value, "layers divided alike are tried in any case"
    assert solution.best.value >= least_total_s(world, job, PLAIN, Limits(), world.conditions())


def test_what_nothing_allows_is_refused_as_by_the_solver() -> None:
    world = two("pi5", "llama-2-70b")
    seeker = Seeker(world, Job(8, 8), Tools((WirePrecision.FP16,), (None,), (0, 2)), Limits(), 0.5, Progress())
    with pytest.raises(RequestError, match=r"no partition is admissible: .*would hold.*not all tried.*--budget"):
        seeker.solve(world.conditions(), Latency())


def test_a_block_is_left_when_its_time_is_over_and_not_before() -> None:
    with within(5.0):
        pass
    with pytest.raises(SpentError), within(0.05):
        time.sleep(5)
    with pytest.raises(SpentError), within(-1.0):
        raise AssertionError("no time to begin")


# Dies when cli/seeking.py says `ITIMER_REAL, seconds)` for `ITIMER_REAL, seconds, AGAIN_S)`.
def test_that_time_is_over_is_said_again_where_it_was_lost() -> None:
    """A finaliser that was running took the only alarm there was, and the search went on for ever."""

    def hard_of_hearing() -> None:
        with suppress(SpentError):
            time.sleep(2)
        time.sleep(2)
        raise AssertionError("nobody was told")

    with pytest.raises(SpentError), within(0.05):
        hard_of_hearing()
    time.sleep(0.3)  # no alarm is left behind


# Dies when cli/seeking.py says `if True:` for `if not isinstance(said.exc_value, SpentError):`.
def test_nothing_is_printed_of_an_alarm_that_a_finaliser_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda said: printed.append(said.exc_type))

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.2)

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    def finalised() -> None:
        Slow()
        Broken()
        time.sleep(5)

    with pytest.raises(SpentError), within(0.05):
        finalised()
    assert printed == [ValueError], "of what else goes wrong in a finaliser it is"
    Broken()
    assert printed == [ValueError, ValueError]


def test_what_takes_long_is_said_on_stderr_and_what_does_not_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.say("looking")
    assert capfd.readouterr().err == ""
    with Progress() as progress:
        progress.say("looking; best so far 2 s")
        time.sleep(PATIENCE_S + 0.3)
    said = capfd.readouterr()
    assert said.err == "... looking; best so far 2 s, 1 s\n"
    assert said.out == ""


def test_what_only_the_search_finds_is_found_where_no_two_machines_hold_the_model() -> None:
    spec, job = ModelSpec("llama", 2, 1024, 2, 2, 512, 2624, 1000, 512, 3, True), Job(24, 16)
    links = LAN | {(0, 2): LAN[0, 1]}
    roomy = World(spec, (Host(find_device("pi5")),) * 3, links)
    whole = memory_bytes(roomy, Partition.all_on(spec, 0), 0, job, None)
    tight = Host(replace(find_device("pi5"), memory_bytes=0.48 * whole))
    world = replace(roomy, hosts=(tight,) * 3)
    usual = Solver(world, job, PLAIN, Limits()).solve(world.conditions(), Latency())
    seeker = Seeker(world, job, PLAIN, Limits(), 60.0, Progress())
    assert not list(seeker.cuts(world.conditions(), Latency()))
    assert seeker.solve(world.conditions(), Latency()).best.value == pytest.approx(usual.best.value, rel=1e-12)
    assert len(usual.best.decision.partition.machines) == 3
