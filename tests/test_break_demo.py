"""What `splitwise demo --break` promises: everything breaks, the text is the same, nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from splitwise_llm.bench.break_demo import BreakOptions, BreakShow, Broken, run_break_demo
from splitwise_llm.cli import app
from splitwise_llm.cli.options import DEMO_PROMPT
from splitwise_llm.errors import UserError
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.records import Event, RequestRecord, RunRecord
from splitwise_llm.report import Outage, happenings, timeline

pytestmark = pytest.mark.alone
DEMO = [sys.executable, "-m", "splitwise_llm", "demo"]
QUICK = ("--break", "--rtt", "4ms", "--silence", "0.5s", "--away", "0.1s", "--patience", "0")

TOKENS = (
    *(0.05 + i / 10 for i in range(10)),
    *(2.05 + i / 10 for i in range(10)),
    3.55,
    3.75,
    3.95,
    4.15,
    4.35,
    4.55,
    5.0,
)
RECORD = RequestRecord(
    partition="edge[0:1] cloud[1:2]", wire="fp32", prompt_tokens=4, token_ids=(5,) * 27, text="", open_s=0.0,
    ttft_s=0.1, tpot_s=0.1, round_trips_per_token=1.0, crossings=(), frame_bytes=0, machines=(),
    token_times_s=TOKENS,
    runs=(
        RunRecord(1, "edge[0:1] cloud[1:2]", "fp32", 0, 4, 10, 0.0, "admission", "cloud was lost"),
        RunRecord(2, "all:edge", "fp32", 0, 13, 0, 1.92, "fill halves 2 to 3"),
        RunRecord(3, "all:edge", "fp32", 13, 14, 10, 1.98, "fault"),
        RunRecord(4, "edge[0:1] cloud[1:2]", "fp32", 0, 24, 7, 3.05, "move"),
    ),
    events=(
        Event(1.25, "suspect", "cloud: silent"),
        Event(1.55, "lost", "cloud: silent"),
        Event(1.55, "attempt", "cloud: attempt 1 in 0.50 s"),
        Event(1.97, "fill", "computed halves"),
        Event(2.55, "unreached", "cloud: no greeting"),
        Event(2.55, "attempt", "cloud: attempt 2 in 0.22 s"),
        Event(2.95, "back", "cloud: back, nothing was lost"),
    ),
)  # fmt: skip


def rows(picture: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in picture.splitlines()}


def test_a_timeline_has_a_row_each_for_tokens_partition_link_worker_attempts_and_what_was_recomputed() -> None:
    picture = timeline(RECORD, (Outage("silent", 1.05, 2.05),), plain=True, width=62)  # 50 cells of 0.1 s
    lanes = picture.splitlines()
    assert [lane[:12].strip() for lane in lanes[:6]] == [
        "tokens", "partition", "link", "cloud", "attempts", "recomputed",
    ]  # fmt: skip
    drawn = {lane[:12].strip(): lane[12:].ljust(50) for lane in lanes[:6]}
    assert drawn["tokens"] == "@" * 10 + " " * 10 + "@" * 10 + " " * 5 + "@ " * 6 + "  @"
    assert (drawn["partition"][0], drawn["partition"][19], drawn["partition"][30]) == ("A", "B", "A")
    assert drawn["partition"][11:19].strip() == "", "nothing ran there"
    assert drawn["link"] == "=" * 10 + ":" * 11 + "=" * 29
    assert drawn["cloud"] == "-" * 12 + "?" * 3 + "." * 14 + "-" * 21
    assert {i: mark for i, mark in enumerate(drawn["attempts"]) if mark != " "} == {20: "|", 25: "x", 27: "|", 29: "o"}
    assert drawn["recomputed"].rstrip().lstrip() == "#          ######", "a fill, then a run with its own prefill"
    assert "A edge[0:1] cloud[1:2], B all:edge" in picture
    assert "13 (50 ms), 24 (500 ms)" in picture
    assert picture.isascii()
    assert max(map(len, timeline(RECORD).splitlines()[:7])) <= 100


def test_a_quiet_request_has_a_timeline_without_workers_or_outages() -> None:
    quiet = RequestRecord("all:edge", "fp32", 1, (), "", 0.0, 0.0, 0.0, 0.0, (), 0, ())
    assert [lane[:12].strip() for lane in timeline(quiet).splitlines()[:2]] == ["tokens", "partition"]


def test_what_happened_is_told_in_order_and_attempts_are_counted() -> None:
    said = happenings(RECORD, (Event(1.0, "silent", "the link falls silent"),)).splitlines()
    assert said[0] == "   1.00 s  silent      the link falls silent"
    assert said[-1] == "   2.95 s  back        cloud: back, nothing was lost (2 attempts)"
    assert len(said) == 5


def test_a_silent_link_and_a_worker_killed_and_started_again_leave_the_same_text_and_no_process() -> None:
    told: list[str] = []

    async def play() -> Broken:
        options = BreakOptions(
            "bundled", DEMO_PROMPT, 24, "4ms", "20mbit", 1, Sampling(0.8, seed=7), patience=math.inf, silence_s=0.3,
            away_s=0.1,
        )  # fmt: skip
        note = lambda event: told.append(event.kind)  # noqa: E731
        async with asyncio.timeout(60):
            return await run_break_demo(options, BreakShow(told.append, told.append, lambda *_: None, note, note))

    broken = asyncio.run(play())
    assert broken.is_same
    assert not broken.missed, happenings(broken.record, broken.struck)
    assert len(broken.record.token_ids) == 24
    kinds = [kind for kind in told if kind in ("silent", "healed", "killed", "restarted", "lost", "back")]
    assert kinds == ["silent", "healed", "lost", "back", "killed", "lost", "restarted", "back"]
    assert all(run.partition == broken.reference.partition for run in broken.record.runs), "patience was infinite"
    assert [one.what for one in broken.outages] == ["silent", "killed"]
    silent_s, killed_s = broken.stops_s
    assert 0.9 < silent_s < 4
    assert killed_s > 0.1
    lost = broken.record.runs[-2] if broken.record.runs[-1].tokens else broken.record.runs[-1]
    assert lost.start == 0, "the new worker has to be given everything again"
    for pid in re.findall(r"process (\d+)", happenings(broken.record, broken.struck)):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_the_command_shows_a_timeline_and_says_that_the_text_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    done = subprocess.run(
        [*DEMO, *QUICK, "-n", "30", "--emulate", "1", "--json", str(file)],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert not done.stderr, "what is broken on purpose is no news"
    assert "the same text: yes, token for token" in said
    assert "going on as all:edge" in said
    assert "\x1b" not in said
    lanes = rows(said)
    assert {"tokens", "partition", "link", "cloud", "attempts", "recomputed"} <= set(lanes)
    data = json.loads(file.read_text())
    assert data["same_tokens"]
    assert data["broken"]["token_ids"] == data["undisturbed"]["token_ids"]
    assert data["outages"][0]["what"] == "silent"


def test_another_text_is_said_and_ends_in_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def other(*_: object) -> Broken:
        wanted = replace(RECORD, token_ids=(5, 5, 6))
        return Broken(wanted, replace(RECORD, token_ids=(5, 5, 7)), (Outage("silent", 1.0, 2.0),), (), "the worker")

    monkeypatch.setattr("splitwise_llm.bench.break_demo.run_break_demo", other)
    with pytest.raises(SystemExit, match="1"):
        app(["demo", "--break"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "the same text: NO, from token 2 on" in said
    assert "silent for 1.0 s: the longest wait for a token in that time was 1.10 s" in said
    assert "not shown: the worker" in said


def test_ctrl_c_ends_the_demo_and_its_processes_in_order() -> None:
    with subprocess.Popen(
        [*DEMO, *QUICK, "-n", "40", "--emulate", "1", "--silence", "30s", "--patience", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "silent" in line and "falls" in line and line.startswith("["):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert children
        process.send_signal(signal.SIGINT)
        started_s = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert time.monotonic() - started_s < 10
        for pid in children:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--patience", "0"), "--patience: only with --break"),
        (("--break", "--wire", "int8"), "leave it out"),
        (("--break", "--silence", "0s"), "--silence 0s"),
        (("--break", "--away", "soon"), "soon"),
    ],
)
def test_options_that_mean_nothing_there_are_refused(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        app(["demo", *options], standalone_mode=False)
