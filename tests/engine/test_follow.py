"""`bench follow`: what it draws, counts and compares; one real request; the recorded link where there is one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.follow import draw, fixed, stalls, summarise
from splitwise_llm.bench.follow_course import ALONE, LIVE, Asked, Course, Served, Setting, slowed
from splitwise_llm.bench.follow_figure import draw_follow
from splitwise_llm.cost import Host, Job, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.rate_meter import RateMeter
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.observation import Always, Observation, Policy
from splitwise_llm.partition import Partition
from splitwise_llm.policies import find_policy
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec
from splitwise_llm.traces import RateTrace, named_trace
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.pacing import LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import Lane, LinkShape

FAST = DeviceSpec("this machine", 5e10, 1e10, 4e9)
SETTING = Setting("", "", model="bundled", requests=2, prompt_tokens=(8, 8), new_tokens=(6, 6))
RECORDING = RateTrace((0.0, 4.0, 6.0), (1.5e5, 0.0, 1.5e5), 10.0)


def served(contender: str, number: int, total_s: float, **more: object) -> Served:
    one = Served(contender, number, 0.0, total_s, 0.1, 0.2, True, 0, [("all:edge", "admission", 9, 0.0)], [])
    return replace(one, **more)  # type: ignore[arg-type]


def test_requests_are_the_same_for_a_seed_and_spread_over_the_whole_recording() -> None:
    setting = Setting("", "", requests=10, prompt_tokens=(3, 9), new_tokens=(2, 5))
    asked = draw(setting, range(100), RECORDING.period_s)
    assert asked == draw(setting, range(100), RECORDING.period_s)
    assert asked != draw(replace(setting, seed=2), range(100), RECORDING.period_s)
    assert [one.at_s for one in asked] == [float(n) for n in range(10)]
    assert all(3 <= len(one.prompt) <= 9 and 2 <= one.new_tokens <= 5 for one in asked)


def test_stalls_are_the_silent_stretches_of_a_recording() -> None:
    assert stalls(RECORDING) == [(4.0, 2.0)]
    assert stalls(RateTrace((0.0, 4.0, 4.5), (1e5, 0.0, 1e5), 10.0)) == []


def test_partitions_that_never_move_keep_to_the_floor_and_the_best_predicted_is_among_them() -> None:
    spec = Checkpoint(locate("bundled")).architecture.spec
    hosts = (Host(slowed(FAST, 48.0), Dtype.FP32), Host(FAST, Dtype.FP32))
    world = World(spec, hosts, {(0, 1): LinkSpec(0.02, 1e6, 1e6)})
    under = fixed(spec, Setting("", "", floor="1+1"), world, [Job(50, 30)])
    free = fixed(spec, Setting("", "", floor=""), world, [Job(50, 30)])
    assert "all:cloud" in free
    assert "all:cloud" not in under
    assert ALONE in under
    assert all(one.wire is WirePrecision.FP32 for one in (*under.values(), *free.values()))
    assert all(one.partition.embed == one.partition.head == 0 for one in under.values())


def test_the_ratio_is_to_the_partition_that_was_best_in_hindsight_and_paired_by_request() -> None:
    rows = [served(LIVE, n, 1.0 + n) for n in range(20)]
    rows += [served(ALONE, n, 2.0 * (1.0 + n)) for n in range(20)] + [served("u-thin", n, 50.0) for n in range(20)]
    result = Figures("follow")
    summarise(result, rows)
    assert result.figures["over_best_static"] == pytest.approx(0.5)
    assert result.intervals["over_best_static"] == pytest.approx((0.5, 0.5)), "pairs that all say the same"
    assert result.figures["tokens_lost"] == 0
    assert result.figures["identical_share"] == 1
    assert result.figures[f"{ALONE} p95_s"] == pytest.approx(2 * np.quantile(np.arange(20) + 1.0, 0.95))


def test_a_lost_token_and_another_text_show_in_the_figures() -> None:
    rows = [served(name, n, 1.0) for name in (LIVE, ALONE) for n in range(4)]
    rows[1] = replace(rows[1], identical=False, missing=2)
    result = Figures("follow")
    summarise(result, rows)
    assert result.figures["tokens_lost"] == 2
    assert result.figures["identical_share"] == 7 / 8


def test_the_figure_is_drawn_from_what_was_written(tmp_path: Path) -> None:
    data = {
        "uplink_bytes_per_s": [1e5, 0.0, 2e5],
        "stalls_s": [(1.0, 1.0)],
        "figures": {"drift mean_s": 1.0, "all:edge mean_s": 2.0},
        "served": [
            {"contender": name, "trace_s": 0.5, "total_s": 1.0, "moves": 1, "faults": 0} for name in ("drift", ALONE)
        ],
    }
    draw_follow(data, tmp_path / "it.svg")
    assert "<svg" in (tmp_path / "it.svg").read_text()


async def answers(asked: Asked, contenders: Mapping[str, Policy]) -> dict[str, tuple[Served, RequestRecord]]:
    """Each contender's, over `RECORDING`."""
    checkpoint = Checkpoint(locate("bundled"))
    with Machine(checkpoint, emulate=slowed(FAST, 48.0)) as machine, Machine(checkpoint, profile=FAST) as far:
        async with await serve("127.0.0.1:0", Worker(far).handle) as server:
            course = Course(SETTING, LinkShape(RECORDING, None, 0.01), machine, server.address, ())
            return {name: await course.answer(asked, name, policy) for name, policy in contenders.items()}


@pytest.mark.parametrize("at_s", [0.0, 4.2])
def test_whoever_answers_and_whenever_the_text_is_the_same_and_whole(at_s: float) -> None:
    spec = Checkpoint(locate("bundled")).architecture.spec
    asked = replace(draw(SETTING, range(500), RECORDING.period_s)[0], at_s=at_s)  # the link is silent from 4 to 6 s
    contenders: dict[str, Policy] = {
        ALONE: Always(Decision(Partition.all_on(spec, 0), WirePrecision.FP32)),
        "u-thin": Always(Decision(Partition.u_shape(spec, 1, 1), WirePrecision.FP32)),
        LIVE: find_policy(LIVE),
    }
    found = asyncio.run(answers(asked, contenders))
    assert len({record.token_ids for _, record in found.values()}) == 1
    for one, _ in found.values():
        assert one.missing == 0
        assert one.total_s >= one.open_s + one.ttft_s > 0
    assert found[LIVE][0].open_s < 1.0, "a policy whose device can begin does not wait for the greeting"
    assert (found["u-thin"][0].open_s > 1.5) == (at_s > 4), "a partition that cannot begin without its worker does"


@dataclass(frozen=True, slots=True)
class HomeAfter:
    """On both machines at first, on the device alone after some seconds."""

    first: Decision
    seconds: float

    def decide(self, observation: Observation) -> Decision:
        alone = replace(self.first, partition=Partition.all_on(observation.model, 0))
        return self.first if observation.waited_s < self.seconds else alone


async def moved(rules: RecoveryRules) -> RequestRecord:
    checkpoint, shape, clock = Checkpoint(locate("bundled")), LinkShape(RECORDING, None, 0.01), LinkClock(3.2)
    with Machine(checkpoint, emulate=slowed(FAST, 48.0)) as machine, Machine(checkpoint, profile=FAST) as far:
        async with await serve("127.0.0.1:0", Worker(far).handle) as server:

            async def reach(name: str) -> Link:
                return ShapedLink(await dial(server.address, name=name), shape, clock)

            thin = Decision(Partition.u_shape(machine.spec, 1, 1), WirePrecision.FP32)
            edge = Edge(machine, ("cloud",), reach)
            async with edge.generate(
                list(range(8)), HomeAfter(thin, 0.9), max_new_tokens=24, stop_ids=(), rules=rules
            ) as generation:
                async for _ in generation:
                    pass
            clock.close()
    return generation.record


def test_a_move_home_does_not_wait_for_a_token_that_hangs_on_a_silent_link() -> None:
    # The link is silent from 0.6 s on; it is given up 1.8 s later, and suspect after 0.3 s.
    record = asyncio.run(moved(RecoveryRules(least_limit_s=2.0, suspect_share=0.15)))
    left = [run for run in record.runs if run.ended.startswith("left behind")]
    assert len(left) == 1
    assert 0 < left[0].tokens < 24
    assert record.partition == "all:edge"
    assert len(record.token_ids) == 24
    assert not any(event.kind == "failed-over" for event in record.events)


def _data() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    file = Path(os.environ.get("SPLITWISE_DATA", beside)) / "net" / "mahimahi" / "ATT-LTE-driving.up.gz"
    if not file.exists():
        pytest.skip(f"no {file}; point SPLITWISE_DATA at the folder that holds net/")
    return file


def test_the_recorded_uplink_has_outages() -> None:
    trace = named_trace(str(_data()), "up")
    silent = stalls(trace)
    assert sum(for_s for _, for_s in silent) > 0.1 * trace.period_s
    assert max(for_s for _, for_s in silent) > 60


def test_pings_alone_over_a_recorded_uplink_are_no_estimate_of_its_rate() -> None:
    lane, meter = Lane(named_trace(str(_data()), "up"), 0.025), RateMeter()
    for number in range(60):
        at_s = 300 + 0.1 * number
        meter.on_arrival(at_s, lane.deliver_at(at_s, 110), 110)
        assert meter.read(at_s + 0.05) is None, "110 bytes every 0.1 s tell nothing of 1 Mbit/s"
