"""Live sessions keep what it takes to play them again, and played again they take as long."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.test_policies_live import FAST, SLOW, lab
from forked import splitwise_text
from splitwise_llm.bench.replaying import AS_DECIDED, LIVE, compare
from splitwise_llm.cli.options import keep_records
from splitwise_llm.cli.simulate import simulate
from splitwise_llm.cost import Floor, Limits
from splitwise_llm.engine.link_log import EVERY_S, LinkLog
from splitwise_llm.engine.telemetry import Advert, LinkFigures
from splitwise_llm.errors import SpecError
from splitwise_llm.policies import find_policy
from splitwise_llm.records import RequestRecord, read_records
from splitwise_llm.sim.replay import courses_from_records
from splitwise_llm.spec import LinkSpec
from splitwise_llm.wire.shaper import LinkShape

DEVICE = replace(SLOW, memory_bytes_per_s=2e8)
SERVER = replace(FAST, memory_bytes_per_s=6e8)
"""Slower than what this machine computes by so much that its own software is a small part."""
SHAPE = LinkShape.parse("rtt=20ms rate=20mbit")
WITHIN = 0.3
"""Of live figures: software and neighbours add about a tenth to what emulated machines and a shaped link take."""


def sessions(policy: str, *, count: int = 2, **options: object) -> list[RequestRecord]:
    """Requests of one device after another, of a policy by its name."""

    async def play() -> list[RequestRecord]:
        async with lab(DEVICE, SERVER, shape=SHAPE) as one:
            found = find_policy(policy)
            return [(await one.run(found, tokens=24, called=policy, **options))[0] for _ in range(count)]

    return asyncio.run(play())


def test_a_live_session_played_again_takes_as_long_as_it_took(tmp_path: Path) -> None:
    records = sessions("drift")
    path = tmp_path / "live.jsonl"
    path.write_text("".join(json.dumps(one.to_dict(intervals=False)) + "\n" for one in records))
    assert [RequestRecord.from_dict(json.loads(one.to_json())) for one in records] == records
    (course,) = courses_from_records([path])
    assert [(one.prompt_tokens, one.output_tokens) for one in course.requests] == [(11, 24)] * 2
    link = course.scenario.link.classes[0]
    assert link.rtt_s == pytest.approx(0.02, abs=0.01)
    compared = compare([course], "edge-only")
    rows = {row.name: row for row in compared.rows}
    for name in (AS_DECIDED, "drift"):
        for figure in ("ttft_s", "tpot_s", "total_s", "device_j"):
            live, again = (getattr(rows[which], figure) for which in (LIVE, name))
            assert again == pytest.approx(live, rel=WITHIN), f"{name}: {figure}"
    plans = {name: {one.plan for one in answers} for name, answers in compared.answers.items()}
    assert plans[AS_DECIDED] == plans[LIVE]
    assert rows["edge-only"].total_s > 2 * rows[LIVE].total_s, "as the emulated device is so much slower"


def test_a_record_says_what_was_allowed_and_which_machines_there_were() -> None:
    (record,) = sessions("exact", count=1, limits=Limits(Floor(1, 1)))
    setup = record.setup
    assert setup is not None
    assert setup.floor == Floor(1, 1)
    assert setup.names == ("edge", "cloud")
    assert [one.device.memory_bytes_per_s for one in setup.hosts] == [2e8, 6e8]
    assert setup.max_new_tokens == 24
    assert setup.tools is not None
    assert record.runs[0].draft in setup.tools.drafts


def test_a_partition_that_is_given_measures_nothing_and_is_refused(tmp_path: Path) -> None:
    async def play() -> RequestRecord:
        async with lab(DEVICE, SERVER, shape=SHAPE) as one:
            return (await one.run("all:cloud", tokens=2))[0]

    path = tmp_path / "live.jsonl"
    path.write_text(asyncio.run(play()).to_json() + "\n")
    with pytest.raises(SpecError, match="nobody measured the link"):
        courses_from_records([path])


def test_a_log_keeps_changes_and_the_last_sample_before_a_silence() -> None:
    def figures(rtt_s: float) -> LinkFigures:
        link = LinkSpec(rtt_s, 1e6, 1e6)
        return LinkFigures(link, link, 0.0, float("inf"), 0.0, False, False, "assumed")

    log = LinkLog()
    for at_s, rtt_s in ((0.0, 0.02), (0.2, 0.021), (0.4, 0.03), (0.6, 0.03), (1.2, 0.03), (1.3, 0.03)):
        log.add(1, at_s, figures(rtt_s), Advert(2, 0.5, 0.01, 0), 1)
    kept = log.samples(("edge", "cloud"), 0.4)
    assert [round(one.at_s, 3) for one in kept] == [-0.4, 0.0, 0.2, 0.9]
    assert {(one.worker, one.up_age_s, one.down_age_s, one.others, one.queue_s) for one in kept} == {
        ("cloud", None, 0.0, 1, 0.5)
    }
    assert EVERY_S == 1.0


def test_the_command_line_keeps_records_and_plays_them_again(tmp_path: Path) -> None:
    kept, out = tmp_path / "live.jsonl", tmp_path / "again.jsonl"
    assert splitwise_text("generate", "Once upon", "-n", "2", "--records", str(kept), "-q").returncode == 0
    assert [len(one.token_ids) for one in read_records(kept)] == [2]
    with pytest.raises(SpecError, match=r"1 machines \(edge\)"):
        simulate(out, from_records=[kept])
    assert not out.exists()
    live = [*read_records(kept), *sessions("drift", count=1)]
    kept.write_text("".join(json.dumps(one.to_dict(intervals=False)) + "\n" for one in live[1:]))
    again = splitwise_text("simulate", "--from-records", str(kept), "--policy", "edge-only", "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert "as decided" in again.stdout
    (line,) = (json.loads(text) for text in out.read_text().splitlines())
    assert line["edge-only"]["plan"] == "all:edge"
    assert line["live"]["total_s"] > 0
    with pytest.raises(SpecError, match="leave out --scenario"):
        simulate(out, "tunnel", [kept])
    with pytest.raises(SpecError, match="--scenario NAME, or --from-records"):
        simulate(out)


def test_each_of_several_answers_is_appended(tmp_path: Path) -> None:
    kept = tmp_path / "live.jsonl"
    keep_records(kept)
    assert kept.read_text() == ""
    one = sessions("edge-only", count=1)
    keep_records(kept, one)
    keep_records(kept, one)
    bare = replace(one[0], machines=tuple(replace(machine, intervals=()) for machine in one[0].machines))
    assert read_records(kept) == (bare, bare)
    keep_records(None, one)
