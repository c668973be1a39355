"""Scenarios as rows: every one can be built and run, and says so in words when it cannot."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from worlds import CLOUD, Exact, Only, table

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.params import LinkProcess, Params, SharedCloud
from splitwise_llm.sim.paths import day
from splitwise_llm.sim.scenarios import (
    MEC,
    SCENARIOS,
    TEST,
    TRAIN,
    TUNNEL,
    WAN,
    Case,
    Recordings,
    Scenario,
    build,
    find_scenario,
    worlds,
)
from splitwise_llm.traces import RateTrace, RttTrace, read_trace
from splitwise_llm.workload import RecordedRequest, RequestTrace, read_requests

STREAMS = [(row, case) for row in SCENARIOS for case in row.cases]
RECORDED = Recordings(
    RequestTrace(tuple(RecordedRequest(3.0 * n, 40 * (n + 1), 10 + n) for n in range(40)), 120.0),
    RateTrace((0.0, 30.0, 35.0), (2e6, 0.0, 4e5), 60.0),
    rtt=RttTrace((0.0, 50.0), (0.03, np.inf), 55.0),
)


def built(row: Scenario, case: Case) -> Params:
    tables = [table(world, job) for world, job in worlds(row, case)]
    return build(row, case, tables, RECORDED if row.is_recorded else None)


def test_there_are_fourteen_scenarios_and_their_cases_have_names_of_their_own() -> None:
    assert len({row.name for row in SCENARIOS}) == 14
    for row in SCENARIOS:
        assert len({case.name for case in row.cases}) == len(row.cases)
    assert [row.name for row in SCENARIOS if not row.cases] == ["peer-lan", "edgeshard", "lossy-channel"]


@pytest.mark.parametrize(("row", "case"), STREAMS, ids=[f"{row.name}.{case.name}" for row, case in STREAMS])
def test_every_case_can_be_run(row: Scenario, case: Case) -> None:
    params = built(row, case)
    fewer = 1 if params.num_devices > 1 else 3
    records = simulate(params, draw(params, TEST.seed, range(2), fewer), Only(CLOUD), until_s=120.0)
    assert records.decisions > 0
    assert np.isfinite(records.total_s[records.status == 0]).all()


def test_links_are_in_their_classes_for_the_shares_that_are_said() -> None:
    """Long-run shares of a walk between neighbours: ends are visited half as often as what lies between."""
    for link, outage in ((WAN, 5 / 57), (MEC, 3 / 34), (TUNNEL, 0.12)):
        params = Params(built(*STREAMS[0]).physics, link)
        traces = draw(params, 0, range(100), 1)
        share, total = 0.0, 0.0
        for world in range(100):
            times, rows = traces.link.times_s[world, 0], traces.link.rows[world, 0]
            lengths = np.diff(times)
            share += lengths[traces.link_rows[rows, 3] == 0].sum()
            total += lengths.sum()
        assert share / total == pytest.approx(outage, rel=0.1)


def test_training_worlds_differ_from_each_other_and_test_worlds_do_not() -> None:
    row, case = find_scenario("flaky-wan"), find_scenario("flaky-wan").cases[0]
    params = built(row, case)
    rates = {}
    for split in (TRAIN, TEST):
        traces = draw(params, split.seed, range(60), 400, split.spread)
        rates[split] = 400 / traces.arrival_s[:, 0, -1]
    assert rates[TRAIN].std() > 3 * rates[TEST].std()
    assert rates[TRAIN].min() < 0.65 * case.per_s
    assert rates[TRAIN].max() > 1.35 * case.per_s


def test_a_day_has_segments_of_ten_to_twenty_minutes_in_an_order_of_its_own() -> None:
    row = find_scenario("day")
    params = built(row, row.cases[0])
    days = [day(params, 0, number) for number in range(4)]
    for plan in days:
        assert all(600 <= end - start <= 1200 for start, end, _ in plan[:-1])
        assert all(a[2] != b[2] for a, b in itertools.pairwise(plan))
    assert len({tuple(segment for *_, segment in plan) for plan in days}) > 1
    traces = draw(params, 0, range(4), 40)
    firsts = np.cumsum([0, *(len(link.classes) for link in params.links)])
    for world, plan in enumerate(days):
        times, rows = traces.link.times_s[world, 0][:-1], traces.link.rows[world, 0]
        for start, end, segment in plan:
            inside = rows[(times >= start) & (times < end)]
            assert ((inside >= firsts[segment]) & (inside < firsts[segment + 1])).all()


def test_recordings_are_replayed_outages_included_each_trace_from_its_own_place() -> None:
    row = find_scenario("real-traces")
    params = built(row, row.cases[0])
    traces = draw(params, 0, range(6), 30)
    up = traces.link_rows[:, 3] > 0
    share = [
        (np.diff(traces.link.times_s[n, 0]) * ~up[traces.link.rows[n, 0]]).sum() / traces.link.times_s[n, 0, -1]
        for n in range(6)
    ]
    assert share == pytest.approx([10 / 60] * 6)  # 30 to 35 s without a rate, 50 to 55 s without an answer
    assert len(set(traces.link.times_s[:, 0, 1].tolist())) == 6
    assert (30 / traces.arrival_s[:, 0, -1]).mean() == pytest.approx(row.cases[0].per_s, rel=0.15)
    assert traces.prompt_class.max() == len(params.prompt_classes) - 1
    assert params.prompt_classes == (64, 128, 256, 512, 1024)


def test_real_recordings_can_be_replayed_where_they_are() -> None:
    folder = Path(os.environ.get("SPLITWISE_DATA", Path(__file__).parents[3] / "shared" / "data"))
    link = folder / "net" / "mahimahi" / "ATT-LTE-driving.up.gz"
    asked = folder / "requests" / "azure2023" / "AzureLLMInferenceTrace_conv_first_two_thirds.csv"
    if not link.exists() or not asked.exists():
        pytest.skip(f"no {link.name} or {asked.name}; point SPLITWISE_DATA at the folder that holds net/ and requests/")
    row = find_scenario("real-traces")
    tables = [table(world, job) for world, job in worlds(row, row.cases[0])]
    params = build(row, row.cases[0], tables, Recordings(read_requests(asked), read_trace(link, "up")))
    records = simulate(params, draw(params, 0, range(4), 15), Exact(params.penalty))
    assert (records.status == 0).all()
    assert len(set(records.traces.prompt_class.ravel().tolist())) > 2


def test_a_record_is_a_line_of_json_with_what_became_of_the_request() -> None:
    row = find_scenario("flaky-wan")
    params = built(row, row.cases[0])
    records = simulate(params, draw(params, 0, range(2), 3), Only(CLOUD))
    lines = list(records.lines())
    assert len(lines) == 6
    for line in lines:
        back = json.loads(json.dumps(line))
        assert back["status"] == "done"
        assert sum(back["mode_s"].values()) == pytest.approx(back["total_s"], abs=1e-5)
        assert back["first_plan"] == back["last_plan"]
        assert back["first_plan"] == {"partition": "all:cloud", "wire": "fp16", "prefill_chunk": None, "draft": 0}
        assert (back["edge"], back["cloud"]) == ("orin-nx-16gb", "a100-80gb")
    counted = records.counted(warm_up=0.4)
    assert counted.sum() == 4


def test_what_is_unknown_is_answered_with_what_is_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'flaky-wan'"):
        find_scenario("flaky-wam")
    with pytest.raises(SpecError, match="did you mean 'orin-7b'"):
        find_scenario("flaky-wan").case("orin7b")
    with pytest.raises(SpecError, match="no stream of requests"):
        find_scenario("edgeshard").case("")
    row = find_scenario("real-traces")
    with pytest.raises(SpecError, match="replays recordings"):
        build(row, row.cases[0], [table(world, job) for world, job in worlds(row, row.cases[0])])


def test_a_shared_cloud_or_a_link_of_its_own_is_what_a_case_says() -> None:
    rush = find_scenario("rush-hour")
    params = built(rush, rush.case("orin-7b-0.15-old"))
    assert isinstance(params.cloud, SharedCloud)
    assert params.cloud.information_s == 10.0
    assert params.num_devices == 120
    periodic = built(find_scenario("tunnel"), find_scenario("tunnel").case("pi5-7b-periodic"))
    assert isinstance(periodic.link, LinkProcess)
    assert periodic.link.periodic
