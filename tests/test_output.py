"""Files that commands write: whole, or not there; and commands that end early leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forked import splitwise_text
from splitwise_llm.cli.output import whole

pytestmark = pytest.mark.alone
SPLITWISE = [sys.executable, "-m", "splitwise_llm"]


def test_a_file_takes_its_name_when_it_is_written_and_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with whole(path) as part:
        assert part is not None
        part.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    path.chmod(0o640)
    with whole(path) as part:
        assert part is not None
        part.write_text("newer")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("newer", 0o640)
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_file_survives_a_failure_and_none_is_left_where_there_was_none(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        with whole(path) as part:
            assert part is not None
            part.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / name)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_what_cannot_be_written_is_said_at_once_by_the_name_that_was_given(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "x", tmp_path):
        with pytest.raises(OSError, match=str(path)), whole(path):
            raise AssertionError("nothing is begun")
    with whole(None) as part:
        assert part is None
    with whole(Path("/dev/null")) as part:
        assert part == Path("/dev/null")


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole(tmp_path / "link") as part:
        assert part is not None
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_simulation_that_is_interrupted_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("precious\n")
    ask = ("simulate", "--scenario", "flaky-wan", "--worlds", "256", "--requests-per-trace", "5000")
    child = subprocess.Popen([*SPLITWISE, *ask, "--out", str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert "plans for" in child.stdout.readline()
    time.sleep(0.3)
    assert len(os.listdir(tmp_path)) == 2, "the new one is written beside it"
    child.send_signal(signal.SIGINT)
    child.stdout.close()
    assert child.wait(20) == 130
    assert os.listdir(tmp_path) == ["run.jsonl"]
    assert path.read_text() == "precious\n"


def test_a_profile_that_fails_leaves_no_file(tmp_path: Path) -> None:
    done = splitwise_text("profile", "--model", str(tmp_path / "no-model"), "--out", str(tmp_path / "here.json"))
    assert done.returncode not in (0, 1), done.stderr
    assert os.listdir(tmp_path) == []


@pytest.fixture
def replay(tmp_path: Path) -> list[str]:
    """The command that replays a paused uplink and two requests, into run.jsonl."""
    links, asked = tmp_path / "links", tmp_path / "asked.csv"
    links.mkdir()
    (links / "lte.up").write_text("0 40\n1 20\n2 30\n120 10\n121 30\n")
    asked.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,90,5\n2023-11-16 18:00:40,120,6\n")
    ask = ["simulate", "--scenario", "real-traces", "--policy", "router", "--worlds", "2", "--plain"]
    ask += ["--requests-per-trace", "5", "--traces", str(links), "--requests", str(asked)]
    return [*ask, "--out", str(tmp_path / "run.jsonl")]


def test_a_simulation_refuses_a_recording_with_a_pause(replay: list[str], tmp_path: Path) -> None:
    done = splitwise_text(*replay)
    assert done.returncode == 2
    assert f"{tmp_path / 'links' / 'lte.up'}:4: nothing is known from 2 s" in done.stderr
    assert "--cut-gaps" in done.stderr
    assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.long
def test_a_simulation_writes_lines_that_need_no_other_file(replay: list[str], tmp_path: Path) -> None:
    done = splitwise_text(*replay, "--cut-gaps", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the link is lte, one of 1" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert {line["first_plan"]["partition"] for line in lines} <= {"all:edge", "all:cloud"}
    assert {(line["edge"], line["cloud"], line["first_plan"]["wire"]) for line in lines} == {
        ("orin-nx-16gb", "a100-80gb", "fp16")
    }
