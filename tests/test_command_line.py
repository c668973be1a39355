"""The commands as a person runs them: real processes, real sockets, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forked import splitwise
from splitwise_llm.bench.processes import Child, shaped_link, worker
from splitwise_llm.cli.options import machine_options
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.edge import edge_with
from splitwise_llm.errors import LinkDied, ListenError, WorkerFailed
from splitwise_llm.records import RequestRecord

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("forks")]
ROOT = Path(__file__).parent.parent
PROMPT = "It was a bright morning, and the Prince said:"
SHARED = "edge[0:3] edge+cloud+third[3](kv=edge:0,cloud:1-2,third:3 ffn=edge:0-1,cloud:2-5,third:6-7) third[4:8]"


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    with worker("bundled") as process:
        yield process.address


@pytest.fixture(scope="module")
def third() -> Iterator[str]:
    with worker("bundled") as process:
        yield process.address


def refused(*arguments: str | bytes, stdin: bytes = b"") -> str:
    """What a command that cannot work says: one message on stderr, no traceback, exit code 2 or 3."""
    done = splitwise(*arguments, stdin=stdin)
    said = done.stderr.decode()
    assert done.returncode in (2, 3), said
    assert "Traceback" not in said
    return said


def test_three_machines_that_share_a_layer_say_what_one_says(cloud: str, third: str, tmp_path: Path) -> None:
    usual = ("--model", "bundled", "--quiet", "--max-new-tokens", "24", PROMPT)
    alone = splitwise("generate", "--partition", "all:edge", *usual)
    machines = ("--machine", f"cloud={cloud}", "--machine", f"third={third}")
    record = tmp_path / "record.json"
    split = splitwise("generate", *machines, "--partition", SHARED, "--json", str(record), *usual)
    assert (alone.returncode, split.returncode) == (0, 0), split.stderr.decode()
    assert split.stdout == alone.stdout
    assert len(split.stdout.split()) > 3
    said = json.loads(record.read_text())
    assert said["partition"] == SHARED
    assert [machine["name"] for machine in said["machines"]] == ["edge", "cloud", "third"]


def test_the_demo_says_the_same_in_all_five_modes(tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    done = splitwise("demo", "-n", "8", "--rtt", "4ms", "--json", str(file))
    said = done.stdout.decode()
    assert done.returncode == 0, said + done.stderr.decode()
    assert said.count(" yes ") == 5
    assert "\x1b" not in said, "plain text when the output is no terminal"
    modes = json.loads(file.read_text())
    assert list(modes) == ["edge", "cloud", "cut", "U", "shared"]
    assert {mode: data["round_trips_per_token"] for mode, data in modes.items()} == {
        "edge": 0, "cloud": 0, "cut": 1, "U": 1, "shared": 1,
    }  # fmt: skip
    assert all(data["same_tokens"] for data in modes.values())


def test_machines_of_a_shared_stage_compute_at_the_same_time(cloud: str) -> None:
    async def overlapping() -> float:
        with edge_with("bundled", {"cloud": cloud}, emulate=80.0) as edge:
            # Stretched by sleeping, so that the other's work falls into its time.
            async with edge.generate(PROMPT, "edge+cloud[0:8]", max_new_tokens=4) as generation:
                async for _ in generation:
                    pass
            device, other = ({(i.stage, i.step): i for i in m.intervals} for m in generation.record.machines)
            assert generation.record.is_emulated
            both = [k for k in other if other[k].start_s < device[k].stop_s and device[k].start_s < other[k].stop_s]
            return len(both) / len(other)

    async def play() -> None:
        # A machine busy with other programs delays messages past a stage: one quiet moment in six is enough.
        for _ in range(6):
            if await overlapping() > 0.5:
                return
        pytest.fail("one machine always waited for the other")

    asyncio.run(play())


def test_a_worker_killed_in_mid_generation_is_named_and_done_without_and_nothing_stays_behind() -> None:
    async def play(process: Child) -> tuple[RequestRecord, RequestRecord]:
        with edge_with("bundled", {"cloud": process.address}) as edge:

            async def answer(partition: str, kill: bool) -> RequestRecord:
                async with edge.generate(PROMPT, partition, max_new_tokens=40, stop_ids=()) as generation:
                    async for _ in generation:
                        if kill:
                            process.process.kill()
                return generation.record

            return await answer("edge[0:4] cloud[4:8]", kill=True), await answer("all:edge", kill=False)

    with worker("bundled") as process:
        killed, alone = asyncio.run(play(process))
        assert process.process.wait(5) == -9
    assert killed.token_ids == alone.token_ids
    assert killed.partition == "all:edge"
    assert "cloud was lost in mid-generation" in killed.runs[0].ended
    assert killed.is_degraded


def test_a_worker_killed_in_mid_generation_that_cannot_be_done_without_is_an_error() -> None:
    async def play(process: Child) -> None:
        with edge_with("bundled", {"cloud": process.address}, memory_bytes=int(15e6)) as edge:
            partition, rules = edge.partition("edge[0:4] cloud[4:8]"), RecoveryRules(budget_s=0.5)
            assert not edge.machine.fits(edge.partition("all:edge"), 0, 200)
            async with edge.generate(PROMPT, partition, max_new_tokens=150, stop_ids=(), rules=rules) as generation:
                async for _ in generation:
                    process.process.kill()

    with worker("bundled") as process, pytest.raises(LinkDied, match="cloud was lost in mid-generation"):
        asyncio.run(play(process))


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    script = (
        "from splitwise_llm.bench.processes import worker\n"
        "import os, sys\n"
        "one = worker('bundled'); child = one.__enter__()\n"
        "print(child.process.pid, flush=True); os._exit(9)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    pid = int(parent.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def test_the_example_runs(cloud: str) -> None:
    command = [sys.executable, str(ROOT / "examples/two_machines.py"), cloud]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "ms/token" in done.stdout


def test_a_generation_behind_a_stand_alone_shaped_link(cloud: str) -> None:
    async def play() -> None:
        with (
            shaped_link(cloud, "--rtt", "40ms", "--rate", "20mbit") as link,
            edge_with("bundled", {"cloud": link.address}) as edge,
        ):
            async with edge.generate(PROMPT, "edge[0:4] cloud[4:8]", max_new_tokens=8, stop_ids=()) as generation:
                async for _ in generation:
                    pass
            assert 0.040 < generation.record.tpot_s < 0.120

    asyncio.run(play())


def test_a_message_over_the_workers_limit_is_refused_with_the_remedy() -> None:
    with worker("bundled", "--max-message", "50kB") as process:
        machine = ("--machine", f"cloud={process.address}", "--partition", "edge[0:4] cloud[4:8]", "-n", "3", "-q")
        assert "smaller prefill chunk" in refused("generate", *machine, "word " * 100)
        assert splitwise("generate", *machine, "--chunk", "16", "word " * 100).returncode == 0


def test_mutual_tls_from_keys_to_tokens(tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    assert splitwise("keys", "--out", keys, "--host", "localhost").returncode == 0
    with worker("bundled", "--tls", keys) as process:
        machine = f"cloud={process.address}"
        done = splitwise(
            "generate", "--machine", machine, "--tls", keys, "--partition", "all:cloud", "-n", "4", "-q", PROMPT
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.strip()
        assert "cloud" in refused("generate", "--machine", machine, "--partition", "all:cloud", PROMPT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--partition", "phone[0:8]"], "the machines are edge"),
        (["--partition", "edge[0:9]"], "layer 9 does not exist"),
        (["--partition", "edge[0:4]"], "the model has 8 layers"),
        (["--machine", "cloud"], "write name=value"),
        (["--model", "/nowhere"], "no directory with a model"),
        (["--memory", "1kB"], "edge would hold"),
        (["--memory", "lots"], "not a size"),
        (["--emulate", "0.5"], "1 or more"),
        (["--link", "cloud=rtt=20ms"], "no machine of this call"),
        (["--top-p", "0"], "top-p"),
        (["--tls", "/nowhere"], "splitwise keys"),
        (["-n", "5000"], "ask for at most"),
        (["--json", "/no-such-directory/x.json"], "check the path"),
        (["--seed", "9" * 30], "seed"),
        (["--top-k", "9" * 30], "top-k"),
        (["--partition", f"edge[0:{'9' * 400}]"], "is no layer"),
        (["--machine", "1x=127.0.0.1:1"], "is no machine name"),
        (["--machine", "a=127.0.0.1:1", "--machine", "b=127.0.0.1:2", "--direct", "a+a"], "two different workers"),
        (
            ["--machine", "a=127.0.0.1:1", "--machine", "b=127.0.0.1:2", "--direct", "a+b", "--direct", "b+a"],
            "each pair is named once",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_remedy(arguments: list[str], says: str) -> None:
    assert says in refused("generate", *arguments, PROMPT)


# Dies when cli/options.py says `int(parse_bytes(memory))` for `int((1 - HELD_BACK) * parse_bytes(memory))`.
def test_of_the_memory_that_is_allowed_a_tenth_is_not_planned_with() -> None:
    assert machine_options("2GB", "")["memory_bytes"] == 1_800_000_000
    assert machine_options("", "")["memory_bytes"] is None


# Dies when cli/benches.py says `if False:` for `if live_tokens:`.
def test_options_of_a_part_that_is_not_run_are_refused(tmp_path: Path) -> None:
    assert "are of --accuracy" in refused("profile", "--accuracy-groups", "8")
    assert "--live-tokens is of --live" in refused("bench", "exactness", "--live-tokens", "100")
    assert "--keep is of --memory" in refused("bench", "serving", "--keep", str(tmp_path))


def test_a_prompt_must_be_text_and_fit(tmp_path: Path) -> None:
    assert "UTF-8" in refused("generate", b"caf\xe9")
    assert "UTF-8" in refused("generate", "-", stdin=b"caf\xe9")
    assert "shorten the prompt" in refused("generate", "-", stdin=b"word " * 3000)


def test_nobody_at_the_address_says_what_to_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    said = refused("generate", "--machine", f"cloud={address}", "--partition", "all:cloud", PROMPT)
    assert "splitwise worker" in said
    assert address in said


def test_a_taken_port_and_an_open_address_are_refused(cloud: str) -> None:
    assert cloud in refused("worker", "--listen", cloud)
    assert "splitwise keys" in refused("worker", "--listen", "0.0.0.0:7070")
    assert "--max-message" in refused("worker", "--max-message", "4GiB")
    assert "lead to itself" in refused("link", "--listen", "127.0.0.1:7071", "--to", "127.0.0.1:7071")
    with pytest.raises(WorkerFailed, match="7999999"), shaped_link("127.0.0.1:7999999"):
        pass
    assert ListenError.exit_code == 2


def test_another_model_on_the_worker_is_refused(cloud: str, tiny: object) -> None:
    directory = tiny("llama")  # type: ignore[operator]
    said = refused(
        "generate", "--model", str(directory), "--machine", f"cloud={cloud}", "--partition", "all:cloud", "x"
    )
    assert "vocabulary" in said or "same --model" in said
