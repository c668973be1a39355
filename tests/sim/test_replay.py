"""Records become courses: what came when, over which link, to which machines; and what cannot be replayed is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.bench.replaying import AS_DECIDED, LIVE, Replay, compare
from splitwise_llm.cost import Floor
from splitwise_llm.cost.drafting import acceptance_of, tokens_per_round
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.observation import Tools
from splitwise_llm.policies.mind import shipped
from splitwise_llm.records import (
    Event,
    HostRecord,
    LinkSample,
    RequestRecord,
    RunRecord,
    Setup,
    read_records,
)
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.replay import PAUSE_S, courses_from_records, silent
from splitwise_llm.spec import DeviceSpec, Dtype, Weights, find_model

SLOW = DeviceSpec("edge", 1e12, 2e10, 8e9, idle_w=1.0, decode_w=5.0, prefill_w=6.0)
FAST = DeviceSpec("server", 2e13, 4e11, 4e10, idle_w=20.0, decode_w=100.0, prefill_w=200.0, slots=8)
HOSTS = tuple(HostRecord(device, Dtype.FP16, Weights.FULL) for device in (SLOW, FAST))
TOOLS = Tools((WirePrecision.FP16,))


def sample(
    at_s: float, rtt_s: float = 0.02, rate: float = 2.5e6, others: int = 0, age_s: float | None = 0.1
) -> LinkSample:
    return LinkSample(at_s, "server", rtt_s, rate, 2 * rate, age_s, age_s, others)


def record(began_s: float = 0.0, **changes: object) -> RequestRecord:
    """Ten tokens from the server in a second; `changes` are of the record or of its setup."""
    of_setup = {name: value for name, value in changes.items() if name in Setup.__dataclass_fields__}
    setup = replace(
        Setup(1.7e9 + began_s, 16, find_model("gpt2"), "f00d", ("edge", "server"), HOSTS, TOOLS, links=(sample(0.0),)),
        **of_setup,  # type: ignore[arg-type]
    )
    times = tuple(0.1 * n for n in range(1, 11))
    runs = (RunRecord(0, "all:server", "fp16", 0, 12, 10, 0.0, "admission"),)
    made = RequestRecord(
        "all:server", "fp16", 12, tuple(range(10)), "", 0.2, 0.1, 0.1, 0.0, (), 0, (), "drift", token_times_s=times,
        runs=runs, device_j=1.0, setup=setup,
    )  # fmt: skip
    return replace(made, **{name: value for name, value in changes.items() if name not in of_setup})  # type: ignore[arg-type]


def kept(place: Path, *records: RequestRecord) -> Path:
    path = place / "live.jsonl"
    path.write_text("".join(json.dumps(one.to_dict(intervals=False)) + "\n" for one in records))
    return path


def test_a_record_comes_back_from_its_line_and_what_older_versions_left_out_is_as_its_default(tmp_path: Path) -> None:
    one = record(floor=Floor(2, 2), events=(Event(0.5, "suspect", "server: silent"),))
    assert read_records(kept(tmp_path, one, one)) == (one, one)
    old = one.to_dict()
    for name in ("setup", "device_j", "is_degraded"):
        del old[name]
    for run in old["runs"]:  # type: ignore[attr-defined]
        del run["prefill_chunk"], run["draft"], run["prefill_wire"]
    found = RequestRecord.from_dict({**old, "of a version to come": 1})
    assert found == replace(one, setup=None, device_j=None)


def test_records_are_read_as_every_command_writes_them(tmp_path: Path) -> None:
    one, path = record(), tmp_path / "one.json"
    path.write_text(json.dumps(one.to_dict(), indent=1))
    assert read_records(path) == (one,)
    path.write_text(json.dumps({"answers": [{"number": 1, **one.to_dict()}], "tokens": 10}, indent=1))
    assert read_records(path) == (one,)


def test_a_course_holds_what_came_when_and_the_link_as_it_was_measured(tmp_path: Path) -> None:
    samples = (sample(-0.1, rate=9e9, age_s=None), sample(0.2), sample(0.6, rtt_s=0.05, rate=1e6, others=2))
    later = record(4.0, links=(sample(0.0),), prompt_tokens=30, max_new_tokens=20)
    (course,) = courses_from_records([kept(tmp_path, later, record(links=samples))])
    assert [(one.began_s, one.prompt_tokens, one.output_tokens, one.expected_tokens) for one in course.requests] == [
        (0.0, 12, 10, 16), (4.0, 30, 10, 20),
    ]  # fmt: skip
    up, down, rtt = course.recordings.up, course.recordings.down, course.recordings.rtt
    assert down is not None
    assert rtt is not None
    assert [up.rate_at(at) for at in (0.0, 0.5, 0.7, 3.9, 4.0)] == [2.5e6, 2.5e6, 1e6, 1e6, 2.5e6], (
        "not what was believed"
    )
    assert down.rate_at(0.7) == 2e6
    assert [rtt.at(at) for at in (0.1, 0.7, 4.5)] == [0.02, 0.05, 0.02]
    assert course.loads == ((0.0, 1), (0.6, 3), (4.0, 1))
    assert [kind.batch for kind in course.scenario.cloud.classes] == [1, 3]  # type: ignore[union-attr]
    world, job = course.worlds[0]
    assert [host.device.name for host in world.hosts] == ["edge", "server"]
    assert [one.prompt_tokens for _, one in course.worlds] == [12, 30]
    assert job.tokens_out == 10


def test_nothing_passes_from_the_last_sign_of_life_until_the_worker_answers_again(tmp_path: Path) -> None:
    events = tuple(
        Event(at_s, kind, "")
        for at_s, kind in ((0.4, "suspect"), (0.5, "lost"), (0.7, "back"), (0.8, "suspect"), (0.85, "alive"))
    )
    samples = (sample(0.0), sample(0.3), sample(0.75))
    heard_s = [one.at_s for one in samples]
    assert silent(events, heard_s, 1.0) == [(0.3, 0.7), (0.75, 0.85)]
    assert silent(events[:2], heard_s[:2], 1.0) == [(0.3, 1.0)], "it never came back"
    assert silent(events[:2], [0.0, 0.35, 0.6], 1.0) == [(0.35, 0.6)], "another session heard of it"
    assert silent(events[2:3], [0.72], 1.0) == [(0.0, 0.7)], "it answered late"
    assert silent((), [], 1.0, answered=False) == [(0.0, 1.0)]
    (course,) = courses_from_records([kept(tmp_path, record(events=events, links=samples))])
    assert course.outages == ((0.3, 0.7), (0.75, 0.85))
    assert [course.recordings.up.rate_at(at) > 0 for at in (0.2, 0.4, 0.72, 0.8, 0.9)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert course.recordings.rtt is not None
    assert course.recordings.rtt.outages == course.outages
    down = course.scenario.link.classes[-1]
    assert not down.is_up
    assert down.mean_dwell_s == pytest.approx(0.25)


def test_a_session_that_did_not_meet_the_worker_is_one_without_a_link(tmp_path: Path) -> None:
    lost = record(events=(Event(0.8, "lost", ""),), links=(sample(0.0), sample(0.6)))
    alone = record(1.2, hosts=HOSTS[:1], links=())
    (course,) = courses_from_records([kept(tmp_path, lost, alone, record(3.0, links=(sample(0.1),)))])
    assert course.outages == ((0.6, pytest.approx(2.2)),), "nothing was heard between them either"
    assert len(course.worlds[0][0].hosts) == 2


def test_a_long_pause_and_other_machines_begin_another_course(tmp_path: Path) -> None:
    other = HOSTS[0], replace(HOSTS[1], device=replace(FAST, memory_bytes_per_s=1e11))
    wavers = HOSTS[0], replace(HOSTS[1], device=replace(FAST, memory_bytes=3e10))
    records = [record(0.0), record(2.0, hosts=wavers), record(2.5, hosts=other), record(PAUSE_S + 4)]
    courses = courses_from_records([kept(tmp_path, *records)])
    assert [len(course.requests) for course in courses] == [2, 1, 1]
    assert courses[0].worlds[0][0].hosts[1].device.memory_bytes == 3e10, "the least that was ever free"


def test_the_replay_of_what_was_decided_is_what_the_plan_costs_and_another_policy_is_shown_beside_it(
    tmp_path: Path,
) -> None:
    (course,) = courses_from_records([kept(tmp_path, record(), record(3.0))])
    replay = Replay(course, ["edge-only"])
    table = replay.tables[0]
    plan = next(n for n, one in enumerate(table.bills) if one.decision == course.decisions[0])
    alone = float(table.at(table.world.conditions(), np.array([9.0])).total_s[plan])
    (played, _), (edge, _) = replay.answered(AS_DECIDED), replay.answered("edge-only")
    assert (played.plan, edge.plan) == ("all:server", "all:edge")
    assert played.total_s == pytest.approx(alone, rel=1e-6)
    assert edge.total_s is not None
    assert played.total_s is not None
    assert edge.total_s > 2 * played.total_s
    compared = compare([course], "edge-only")
    assert list(compared.answers) == [LIVE, AS_DECIDED, "drift", "edge-only"]
    assert compared.rows[0].total_s == pytest.approx(1.0)
    (line, _) = compared.lines()
    assert line["live"]["ttft_s"] == 0.1  # type: ignore[index]


def test_moves_that_were_made_live_are_made_again_at_the_next_epoch(tmp_path: Path) -> None:
    slow = (replace(HOSTS[0], stretch=4.0), HOSTS[1])
    runs = (
        RunRecord(0, "all:edge", "fp16", 0, 12, 30, 0.0, "admission"),
        RunRecord(1, "fill", "fp16", 0, 42, 0, 0.05, "fill"),
        RunRecord(2, "all:server", "fp16", 42, 42, 30, 0.1, "move"),
    )
    times = tuple(0.01 * n for n in range(1, 61))
    one = record(runs=runs, token_ids=tuple(range(60)), token_times_s=times, max_new_tokens=60, hosts=slow)
    (course,) = courses_from_records([kept(tmp_path, one)])
    replay = Replay(course)
    (played,) = replay.answered(AS_DECIDED)
    assert (played.plan, played.moves) == ("all:edge", 1)
    (stayed,) = Replay(course, ["edge-only"]).answered("edge-only")
    assert played.total_s is not None
    assert stayed.total_s is not None
    assert played.total_s < stayed.total_s


def test_courses_are_worlds_to_learn_in(tmp_path: Path) -> None:
    samples = (sample(0.0), sample(0.4, others=3), sample(0.8))
    (course,) = courses_from_records([kept(tmp_path, record(links=samples), record(2.0, prompt_tokens=40))])
    params = Replay(course).params
    traces = draw(params, 1_000, range(3), 6, 0.5)
    records = simulate(params, traces, Fixed0())
    assert (records.status == 0).all()
    assert set(traces.prompt_tokens.ravel().tolist()) == {12, 40}


class Fixed0:
    """Always the first plan."""

    in_flight = False

    def choose(self, menu: object) -> object:
        return [0] * len(menu.conditions)  # type: ignore[attr-defined]


BROKEN = {
    "is empty": ("", "holds no record"),
    "a line is cut": (
        json.dumps(record().to_dict()) + '\n{"partition": "all',
        r":2: no whole JSON object .* drop the line",
    ),
    "no record": ('{"a": 1}', ":1: no record of a request"),
    "a field is wrong": (json.dumps(record().to_dict() | {"ttft_s": "soon"}), "ttft_s"),
    "a list": ("[1]", "expected a JSON object"),
}


@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_files_that_hold_no_records_are_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "live.jsonl"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        read_records(path)
    with pytest.raises(SpecError, match="No such file"):
        read_records(tmp_path / "nowhere")


LACKING = {
    "of an older version": ([record(setup=None)], "an older version wrote it"),
    "of two models": ([record(), record(1.0, fingerprint="beef")], "record 2 is of model beef, .*record 1 of f00d"),
    "without a measured link": ([record(links=())], "nobody measured the link.*--policy"),
    "of three machines": ([record(names=("edge", "a", "b"))], "3 machines .edge, a, b"),
    "not profiled": ([record(hosts=())], "--profile FILE or --emulate"),
    "worker never there": ([record(hosts=HOSTS[:1])], "server never answered"),
    "without tokens": ([record(token_times_s=())], "no times of tokens"),
    "resumed": ([record(runs=(RunRecord(0, "all:edge", "fp16", 0, 12, 10, 0.0, "resume"),))], "no record is left"),
}


@pytest.mark.parametrize(("records", "said"), LACKING.values(), ids=LACKING)
def test_records_that_cannot_be_replayed_are_refused_with_what_they_lack(
    tmp_path: Path, records: list[RequestRecord], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        courses_from_records([kept(tmp_path, *records)])


def test_a_policy_that_is_asked_for_must_exist_and_one_that_is_recorded_need_not(tmp_path: Path) -> None:
    courses = courses_from_records([kept(tmp_path, record(policy="my-own"))])
    assert "unknown policy" in compare(courses).unplanned["my-own"]
    with pytest.raises(RequestError, match="unknown policy"):
        compare(courses, "my-own")


def test_weights_of_ones_own_are_played_as_a_policy_and_left_out_where_they_are_gone(tmp_path: Path) -> None:
    file = tmp_path / "own.npz"
    shipped().save(file)
    courses = courses_from_records([kept(tmp_path, record(policy=f"splitwise:{file}"))])
    assert list(compare(courses).answers) == [LIVE, AS_DECIDED, f"splitwise:{file}"]
    file.unlink()
    assert "own.npz: no weights of a policy" in compare(courses).unplanned[f"splitwise:{file}"]


def test_joules_that_nobody_knows_are_none(tmp_path: Path) -> None:
    unknown = replace(HOSTS[0], device=replace(SLOW, idle_w=0.0, decode_w=0.0, prefill_w=0.0))
    (course,) = courses_from_records([kept(tmp_path, record(hosts=(unknown, HOSTS[1])))])
    (played,) = Replay(course).answered(AS_DECIDED)
    assert played.device_j is None


def test_acceptance_is_found_back_from_what_rounds_made() -> None:
    rounds = [4, 4, 2, 1]
    for acceptance in (0.1, 0.5, 0.9):
        made = sum(tokens_per_round(acceptance, draft) for draft in rounds)
        assert acceptance_of(made, rounds) == pytest.approx(acceptance, abs=1e-6)
    assert acceptance_of(4.0, rounds) == pytest.approx(0.0, abs=1e-6), "nothing was right"
