"""The cell in which the device itself dies: `splitwise generate --journal` is killed, `splitwise resume` goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from splitwise_llm.bench.breaking import DRAFT, NAMES, SAMPLINGS, Bench
from splitwise_llm.bench.matrix import Cell, Outcome
from splitwise_llm.bench.rig import Line
from splitwise_llm.engine.journal import Saved, read_journal
from splitwise_llm.errors import JournalError
from splitwise_llm.wire.shaper import LinkShape

START_S = 60.0
"""A process has begun its session by then."""
LOOK_EVERY_S = 0.002


async def play_edge_killed(bench: Bench, cell: Cell, number: int) -> Outcome:
    """Run one such cell; as `Bench.play`."""
    sampling = SAMPLINGS[number % len(SAMPLINGS)]
    want = await bench.reference(cell.mode, sampling)
    bench.cloud.start()
    journal = bench.folder / f"{cell.name.replace('/', '.')}.journal"
    journal.unlink(missing_ok=True)
    begun_s = time.monotonic()
    with Line(bench.cloud.address, LinkShape.parse(bench.setup.link)) as line:
        generate = [
            "generate", bench.setup.prompt, "--model", bench.model, "--machine", f"{NAMES[0]}={line.address}",
            "--partition", bench.partitions[cell.mode].text(("edge", *NAMES)), "--chunk", "64", "--quiet",
            "-n", str(bench.setup.new_tokens), "--emulate", f"{bench.setup.emulate:g}", "--journal", str(journal),
            "--temperature", str(sampling.temperature), "--top-k", str(sampling.top_k), "--top-p", str(sampling.top_p),
            "--seed", str(sampling.seed),
            *(("--draft", DRAFT.by, "--draft-tokens", str(DRAFT.most)) if cell.drafting else ()),
        ]  # fmt: skip
        at = cell.moment.tokens(bench.setup.new_tokens)
        status, said = await asyncio.to_thread(_kill_at, generate, journal, at)
        if status != -9:
            error = f"the process ended with {status} before {at} tokens were there: {said[-300:]}"
            return Outcome(cell.name, False, False, "", error, round(time.monotonic() - begun_s, 3))
        resume = ["resume", str(journal), "--quiet"]
        done = await asyncio.to_thread(_run, resume, bench.setup.limit_s + START_S)
    took_s = round(time.monotonic() - begun_s, 3)
    if done.returncode:
        return Outcome(cell.name, True, False, "", f"resume ended with {done.returncode}: {done.stderr[-300:]}", took_s)
    try:
        saved = read_journal(journal)
    except JournalError as error:
        return Outcome(cell.name, True, False, "", str(error), took_s)
    ids = tuple(token.id for token in saved.tokens)
    said = "" if bench.decode(want) in done.stdout else f"resume printed {done.stdout[-200:]!r}"
    return Outcome(
        cell.name, True, ids == want and not said, _untold(saved), "", took_s,
        events=tuple((event.at_s, event.kind, event.text) for event in saved.events),
        runs=tuple((d.run, d.partition, d.position, d.position, 0, d.why, "") for d in saved.decisions),
    )  # fmt: skip


def _untold(saved: Saved) -> str:
    if saved.finished != "length":
        return f"the journal says that the session finished so: {saved.finished!r}"
    return "" if saved.resumed == 1 else f"the journal says that it was resumed {saved.resumed} times"


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "splitwise_llm", *arguments]


def _run(arguments: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(_command(arguments), capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, -1, "", f"it did not end within {limit_s:g} s")


def _kill_at(arguments: list[str], journal: Path, tokens: int) -> tuple[int, str]:
    """Kill a process once its journal has a run and so many tokens; its exit status, and what it said."""
    with subprocess.Popen(
        _command(arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline and not _has(journal, tokens):
            time.sleep(LOOK_EVERY_S)
        process.kill()
        _, said = process.communicate()
    return process.returncode, said


def _has(journal: Path, tokens: int) -> bool:
    try:
        written = journal.read_bytes()
    except OSError:
        return False
    return written.count(b'"record":"decision"') > 0 and written.count(b'"record":"token"') >= tokens
