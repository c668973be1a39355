"""Sessions under random faults for as long as one likes: their text must be right, and nothing may pile up: no memory,
no file descriptors, no tasks, no processes. It knows how to look into /proc, so it runs on Linux.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from statistics import median

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.decision import Decision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.errors import PeerError, RequestError, SplitwiseError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.shaper import LinkShape

LINK = "rtt=10ms rate=50mbit"
LEASE_S = 5.0
"""Of sessions whose device is gone; short, so that what they hold is given back while one watches."""
PARTITIONS = (
    "all:cloud", "edge[0:4] cloud[4:8]", "edge[0:2] cloud[2:6] edge[6:8]", "edge+cloud[0:2] edge[2:8]",
    "edge[0:3] cloud[3:6] third[6:8] head=edge", "edge[0:5] third[5:8] head=edge", "all:third",
)  # fmt: skip
SCRIPTS = (
    "reset", "corrupt", "drop-both for={s}s", "drop-up for={s}s", "drop-down for={s}s", "crawl rate=64kbit for={s}s",
    "delay-spike delay=0.3s for={s}s", "connect-refused for={s}s; reset",
)  # fmt: skip
KILL = "kill third"
TALKERS = 2
"""Sessions at a time."""
JOBS = 6
"""Different prompts, each with its own sampling; their undisturbed text is known."""
LIMIT_S = 90.0
"""A session that takes longer has failed: longer than any row of faults here."""
LOOK_EVERY_S = 1.0
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Job:
    ids: tuple[int, ...]
    new_tokens: int
    sampling: Sampling
    text: tuple[int, ...] = ()
    """What must come, as ids."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a process."""

    at_s: float
    rss_bytes: int
    descriptors: int
    tasks: int = 0


@dataclass(slots=True)
class Soak:
    """What happened."""

    sessions: int = 0
    same: int = 0
    broken: int = 0
    """Sessions that a fault hit."""
    errors: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    edge: list[Look] = field(default_factory=list)
    cloud: list[Look] = field(default_factory=list)
    tasks_left: int = 0
    orphans: int = 0


def look(pid: int, at_s: float, tasks: int = 0) -> Look | None:
    """Resident memory and open descriptors of a process; None if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return Look(at_s, pages * resource.getpagesize(), len(os.listdir(f"/proc/{pid}/fd")), tasks)
    except OSError:
        return None


def growth(looks: Sequence[Look], of: Callable[[Look], float], reduce: Callable[[list[float]], float]) -> float:
    """From the second quarter of the time to the last; the first one warms up."""
    first_s, last_s = looks[0].at_s, looks[-1].at_s
    quarter_s = (last_s - first_s) / 4
    second = [of(one) for one in looks if quarter_s <= one.at_s - first_s < 2 * quarter_s]
    last = [of(one) for one in looks if one.at_s - first_s >= 3 * quarter_s]
    return reduce(last) - reduce(second)


async def run_soak(seconds: float, seed: int, tell: Tell) -> Figures:
    """`soak_...`: identical share, and what grew from the second quarter to the last: memory by the median, descriptors
    and tasks by what there is at least (faults come and go on top)."""
    result = Figures("soak", {"seconds": seconds, "seed": seed, "talkers": TALKERS, "link": LINK})
    soak = Soak()
    before = children()
    with _quiet():
        await _soak(soak, seconds, random.Random(seed), tell)
    await asyncio.sleep(0.5)
    soak.tasks_left = len(asyncio.all_tasks()) - 1
    soak.orphans = len(children() - before)
    result.add("soak_sessions", soak.sessions, f"{soak.broken} were hit")
    result.add("soak_identical_share", soak.same / max(soak.sessions, 1))
    result.add("soak_errors", len(soak.errors), "; ".join(soak.errors[:3]))
    result.add("soak_faults", sum(soak.faults.values()), ", ".join(f"{k} {n}" for k, n in soak.faults.most_common()))
    for name, looks in (("edge", soak.edge), ("cloud", soak.cloud)):
        half = [one.rss_bytes for one in looks]
        grown = growth(looks, lambda one: one.rss_bytes, median)
        result.add(f"soak_rss_mb_{name}", median(half) / 1e6)
        result.add(f"soak_rss_growth_{name}", grown / median(half), f"{grown / 1e6:+.1f} MB")
        result.add(f"soak_descriptor_growth_{name}", growth(looks, lambda one: one.descriptors, min))
    result.add("soak_task_growth", growth(soak.edge, lambda one: one.tasks, min))
    result.add("soak_tasks_left", soak.tasks_left, "after all sessions, besides the main one")
    result.add("soak_orphans", soak.orphans, "processes that were started and live on")
    return result


def children() -> set[int]:
    """Processes whose parent this one is, those that have ended and were not waited for left out."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that were asked for."""
    log = logging.getLogger("splitwise_llm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


async def _soak(soak: Soak, seconds: float, draw: random.Random, tell: Tell) -> None:
    options = ("--lease", f"{LEASE_S:g}")
    with (
        Machine(Checkpoint(locate("bundled"))) as machine,
        Host("bundled", *options) as cloud,
        Host("bundled", *options) as third,
        Line(cloud.address, LinkShape.parse(LINK)) as line,
    ):
        reach = {"cloud": line.address, "third": third.address}
        edge = Edge(machine, tuple(reach), lambda name: dial(reach[name], name=name))
        jobs = [await _known(edge, job) for job in _jobs(machine, draw)]
        end_s = time.monotonic() + seconds
        tell(f"{seconds:g} s of sessions under random faults")
        sides = [
            asyncio.create_task(_break(soak, line, third, random.Random(draw.random()))),
            asyncio.create_task(_watch(soak, cloud, tell, end_s)),
        ]
        try:
            await asyncio.gather(
                *(_talk(soak, edge, jobs, random.Random(draw.random()), end_s) for _ in range(TALKERS))
            )
        finally:
            for task in sides:
                task.cancel()
            await asyncio.gather(*sides, return_exceptions=True)


def _jobs(machine: Machine, draw: random.Random) -> list[_Job]:
    text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
    ids = Tokenizer(machine.checkpoint.directory).encode(text)
    jobs = []
    for number in range(JOBS):
        first, length = draw.randrange(len(ids) - 400), draw.randrange(8, 400)
        sampling = Sampling(temperature=0.9, top_k=100, seed=number) if number % 2 else Sampling()
        jobs.append(_Job(tuple(ids[first : first + length]), draw.randrange(16, 120), sampling))
    return jobs


async def _known(edge: Edge, job: _Job) -> _Job:
    async with edge.generate(
        job.ids, "all:edge", max_new_tokens=job.new_tokens, sampling=job.sampling, stop_ids=()
    ) as generation:
        async for _ in generation:
            pass
    return _Job(job.ids, job.new_tokens, job.sampling, generation.record.token_ids)


async def _talk(soak: Soak, edge: Edge, jobs: Sequence[_Job], draw: random.Random, end_s: float) -> None:
    """One session after the other."""
    while time.monotonic() < end_s:
        job, text = draw.choice(jobs), draw.choice(PARTITIONS)
        came: list[int] = []
        has_begun = False
        try:
            decision = Decision(edge.partition(text), patience=draw.choice([0.0, 1.0, 4.0]))
            async with (
                asyncio.timeout(LIMIT_S),
                edge.generate(
                    job.ids, decision, max_new_tokens=job.new_tokens, sampling=job.sampling, stop_ids=()
                ) as generation,
            ):
                has_begun = True
                async for token in generation:
                    came.append(token.id)
        except (SplitwiseError, TimeoutError) as error:
            if not has_begun and isinstance(error, PeerError | RequestError):
                await asyncio.sleep(0.2)  # its workers were not there to begin with: nothing was lost
                continue
            soak.errors.append(f"{text}: {type(error).__name__}: {error}")
        else:
            soak.broken += any(run.ended for run in generation.record.runs)
        soak.sessions += 1
        soak.same += tuple(came) == job.text


async def _break(soak: Soak, line: Line, third: Host, draw: random.Random) -> None:
    """One fault after the other; at times the third machine dies and comes back."""
    while True:
        await asyncio.sleep(draw.uniform(0.3, 3.0))
        script = draw.choice([*SCRIPTS, KILL])
        if script == KILL:
            third.kill()
            await asyncio.sleep(draw.uniform(0.0, 2.0))
            await asyncio.to_thread(third.start)
        else:
            length_s = round(draw.uniform(0.2, 2.5), 2)
            for one in script.format(s=length_s).split("; "):
                line.inject(Injection.parse(one))
        soak.faults[Fault.WORKER_RESTARTED if script == KILL else script.split()[0]] += 1


async def _watch(soak: Soak, cloud: Host, tell: Tell, end_s: float) -> None:
    start_s, said_s = time.monotonic(), 0.0
    while True:
        at_s = time.monotonic() - start_s
        gc.collect()  # what only awaits the collector has not leaked
        mine = look(os.getpid(), at_s, len(asyncio.all_tasks()))
        theirs = look(cloud.pid, at_s)
        soak.edge += [mine] if mine else []
        soak.cloud += [theirs] if theirs else []
        if at_s - said_s >= 30:
            said_s = at_s
            tell(f"{at_s:.0f} s: {soak.sessions} sessions, {soak.same} the same, {len(soak.errors)} errors")
        await asyncio.sleep(LOOK_EVERY_S)
