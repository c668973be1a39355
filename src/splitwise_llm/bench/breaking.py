"""One cell of the fault matrix: a generation over real processes, broken at its moment, and what came of it."""

from __future__ import annotations

import asyncio
import math
import os
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Self

from splitwise_llm.bench.demo import demo_partitions
from splitwise_llm.bench.matrix import (
    OTHERS,
    Cell,
    Mode,
    Moment,
    Outcome,
    Scene,
    extra_tokens,
    told_events,
    told_runs,
    untold,
)
from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.decision import Decision
from splitwise_llm.engine.drafting import Draft
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.machine import Machine
from splitwise_llm.errors import BrokenInvariant, SplitwiseError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.faulty import FaultyConnect
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.shaper import LinkShape

WORKER, SPARE = 1, 2
NAMES = ("cloud", "third")
FOR_EVER_S = 600.0
SAMPLINGS = (Sampling(), Sampling(temperature=0.9, top_k=100, seed=11))

MOST_DRAFTED = 4
DRAFT = Draft("ngram", MOST_DRAFTED, is_free=False)

BRIEF_S, LONG_S = 0.8, 3.0
"""How long a drop lasts where the generation waits for the link, and where it goes on elsewhere."""

SCRIPTS = {
    Fault.CONNECT_REFUSED: ("connect-refused for=1s", "reset"),
    Fault.RESET: ("reset",),
    Fault.DROP_UP: ("drop-up for={for_s}s",),
    Fault.DROP_DOWN: ("drop-down for={for_s}s",),
    Fault.DROP_BOTH: ("drop-both for={for_s}s",),
    Fault.CRAWL: ("crawl rate=8kbit for=1.5s",),
    Fault.DELAY_SPIKE: ("delay-spike delay=0.4s for=1s",),
    Fault.CORRUPT: ("corrupt",),
}
"""What the link does to bytes."""

FRAME_SCRIPTS = {Fault.DUPLICATE: "duplicate", Fault.REORDER: "reorder", Fault.CORRUPT: "corrupt"}
"""What only someone can do who knows frames: to the end. A byte is corrupted either way, by turns of the moments: in a
frame it is noticed for certain, in the bytes it may break the transport itself, or fall where nobody looks."""

STACK_BYTES = 9 * 2**20
"""A worker starts its compute thread with the first session; what it lacks memory for then is what it is to hold."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every cell runs. Compute is stretched so that tokens come apart and a fault finds its moment."""

    new_tokens: int = 24
    prompt_tokens: int = 200
    link: str = "rtt=20ms rate=20mbit"
    emulate: float = 3.0
    limit_s: float = 30.0
    """A cell that takes longer has failed; one with a crowd may take as many times as long as there are sessions."""

    @property
    def prompt(self) -> str:
        """Text of about so many tokens."""
        return (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()[: 4 * self.prompt_tokens]


@dataclass(slots=True)
class Stage:
    """What a fault can hit in one cell."""

    line: Line
    frames: Faults
    cloud: Host
    spare: Host | None
    generation: Generation
    journal: Path | None
    before: Callable[[], float] = time.time
    restarting: asyncio.Task[None] | None = None
    status: int | None = None
    """Of the process that was killed."""
    limits: tuple[int, int] | None = None
    """On the size of files, as they were."""
    jumped_s: float = 0.0


@dataclass
class Bench:
    """The device's machine, its workers, and the text of the undisturbed runs."""

    setup: Setup
    folder: Path
    """For journals."""
    model: str = "bundled"
    cloud: Host = field(init=False)
    spare: Host = field(init=False)
    machine: Machine = field(init=False)
    references: dict[tuple[Mode, Sampling], tuple[int, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        stretch = ("--emulate", f"{self.setup.emulate:g}")
        self.cloud, self.spare = Host(self.model, *stretch), Host(self.model, *stretch)

    def __enter__(self) -> Self:
        self.machine = Machine(Checkpoint(locate(self.model)), emulate=self.setup.emulate)
        self.partitions = demo_partitions(self.machine.spec)
        return self

    def __exit__(self, *_: object) -> None:
        for host in (self.cloud, self.spare):
            host.stop()
        self.machine.close()

    def decision(self, cell: Cell) -> Decision:
        """The cell's partition and patience. What comes back is waited for, or not: by turns of the moments."""
        draft = MOST_DRAFTED if cell.drafting else 0
        return Decision(self.partition(cell), prefill_chunk=64, draft=draft, patience=patience(cell))

    def partition(self, cell: Cell) -> Partition:
        """Where the model is. A pipeline ends on its last worker, or, as a U, on the device."""
        if cell.scene is not Scene.PIPELINE:
            return self.partitions[cell.mode]
        last = self.machine.spec.num_layers
        head = " head=edge" if cell.mode is Mode.U else ""
        return Partition.parse(f"edge[0:1] cloud[1:2] third[2:{last}]{head}", self.machine.spec, ("edge", *NAMES))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return Tokenizer(self.machine.checkpoint.directory).decode(list(ids))

    async def reference(self, mode: Mode, sampling: Sampling) -> tuple[int, ...]:
        """The undisturbed run's ids; the very same mode, link and machines."""
        known = self.references.get((mode, sampling))
        if known is None:
            self.cloud.start()
            with Line(self.cloud.address, LinkShape.parse(self.setup.link)) as line:
                edge = Edge(self.machine, NAMES[:1], lambda name: dial(line.address, name=name))
                async with edge.generate(
                    self.setup.prompt, self.partitions[mode], max_new_tokens=self.setup.new_tokens, sampling=sampling
                ) as generation:
                    async for _ in generation:
                        pass
            known = self.references[mode, sampling] = generation.record.token_ids
            if len(known) < self.setup.new_tokens:
                raise BrokenInvariant(f"the text ends after {len(known)} tokens; choose a prompt that goes on longer")
        return known

    async def play(self, cell: Cell, number: int) -> Outcome:
        """Run a cell; `number` says which sampling. Never raises for what the generation did."""
        sampling = SAMPLINGS[number % len(SAMPLINGS)]
        want = await self.reference(cell.mode, sampling)
        self.cloud.start()
        extra = self._extra(cell)
        if extra:
            extra.start()
        journal = self.folder / f"{cell.name.replace('/', '.')}.journal" if _wants_journal(cell) else None
        if journal:
            journal.unlink(missing_ok=True)
        begun_s = time.monotonic()
        with Line(self.cloud.address, LinkShape.parse(self.setup.link)) as line:
            frames = Faults()
            connect = self._connect(cell, line, frames, extra)
            direct = {NAMES: extra.address} if extra and cell.scene is Scene.PIPELINE else None
            edge = Edge(self.machine, NAMES[: 2 if extra else 1], connect, direct)

            def generate(journal: Path | None = None) -> Generation:
                return edge.generate(
                    self.setup.prompt, self.decision(cell), max_new_tokens=self.setup.new_tokens, sampling=sampling,
                    journal=journal, draft=DRAFT if cell.drafting else None,
                )  # fmt: skip

            generation = generate(journal)
            stage = Stage(line, frames, self.cloud, extra, generation, journal)
            came: list[int] = []
            error = ""
            others = [generate() for _ in range(OTHERS if cell.scene is Scene.CROWD else 0)]
            limit_s = self.setup.limit_s * (1 + len(others))
            try:
                async with asyncio.timeout(limit_s), asyncio.TaskGroup() as crowd:
                    beside = [crowd.create_task(_ids_of(other)) for other in others]
                    crowd.create_task(_take(cell, stage, came, self.setup.new_tokens))
                for other, task in zip(others, beside, strict=True):
                    if task.result() != want:
                        error = f"another session said otherwise: {task.result()}, {told_events_of(other)}"
            except TimeoutError:
                error = f"it did not end within {limit_s:g} s"
            except ExceptionGroup as group:
                met = group.exceptions[0]
                is_known = isinstance(met, SplitwiseError | AssertionError)
                error = f"{'' if is_known else 'bug: '}{type(met).__name__}: {met}"
            finally:
                await _clean(cell, stage)
            took_s = time.monotonic() - begun_s
            fired = _fired(cell, stage)
        identical = tuple(came) == want and bool(error or generation.record.token_ids == want)
        return self._outcome(cell, stage, identical, fired, error, took_s)

    def _extra(self, cell: Cell) -> Host | None:
        needs = cell.spare or cell.fault is Fault.WORKER_OUT_OF_MEMORY or cell.scene is Scene.PIPELINE
        return self.spare if needs else None

    def _connect(self, cell: Cell, line: Line, frames: Faults, extra: Host | None) -> Callable[[str], Awaitable[Link]]:
        async def reach(name: str) -> Link:
            return await dial(extra.address if extra and name == NAMES[1] else line.address, name=name)

        return FaultyConnect(reach, {NAMES[0]: frames}) if _is_of_frames(cell) else reach

    def _outcome(
        self, cell: Cell, stage: Stage, identical: bool, fired: str, error: str, took_s: float
    ) -> Outcome:  # fmt: skip
        if error:
            events = told_events_of(stage.generation)
            return Outcome(cell.name, not fired, identical, "", error, round(took_s, 3), events=events)
        record = stage.generation.record
        extra = extra_tokens(record, self.partition(cell), WORKER) if _loses_cache(cell) else 0
        drafting = stage.generation._controller.drafting  # of a loop in the cloud, nobody tells the device
        silent = cell.drafting and cell.mode is not Mode.CLOUD and not (drafting and drafting.proposed)
        told = "nothing was drafted" if silent else untold(cell, record)
        return Outcome(
            cell.name, not fired, identical, told, "", round(took_s, 3), extra,
            _says_nothing(cell, fired, record), told_events(record.events), told_runs(record.runs),
        )  # fmt: skip


def patience(cell: Cell) -> float:
    """Who must come back is waited for; who never does, is not; the others by turns of the moments."""
    if cell.fault in (Fault.CONNECT_REFUSED, Fault.WORKER_RESTARTED):
        return math.inf
    waits = cell.moment in (Moment.FIRST, Moment.LAST)
    if cell.fault in (Fault.WORKER_KILLED, Fault.WORKER_OUT_OF_MEMORY):
        return 1.0 if waits else 0.0
    return math.inf if waits else 1.0


async def _take(cell: Cell, stage: Stage, came: list[int], total: int) -> None:
    """Take all tokens, and strike once as many are there as the moment says."""
    at = cell.moment.tokens(total)
    async with stage.generation as generation:
        if at == 0:
            strike(cell, stage)
        async for token in generation:
            came.append(token.id)
            if len(came) == at:
                strike(cell, stage)


async def _ids_of(generation: Generation) -> tuple[int, ...]:
    """Of a session to its end, as they came."""
    async with generation:
        return tuple([token.id async for token in generation])


def strike(cell: Cell, stage: Stage) -> None:
    """Make the fault happen, now."""
    fault = cell.fault
    match fault:
        case _ if _is_of_frames(cell):
            stage.frames.inject(Injection.parse(FRAME_SCRIPTS[fault]))
        case Fault.WORKER_KILLED:
            stage.status = stage.cloud.kill()
        case Fault.WORKER_OUT_OF_MEMORY:  # whoever would take over has said that it has room, and then has none
            assert stage.spare is not None
            no_more(stage.spare.pid)
            stage.status = stage.cloud.kill()
        case Fault.WORKER_RESTARTED:
            stage.status = stage.cloud.kill()
            stage.restarting = asyncio.get_running_loop().create_task(asyncio.to_thread(stage.cloud.start))
        case Fault.JOURNAL_DISK_FULL:
            assert stage.journal is not None
            stage.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (os.stat(stage.journal).st_size, stage.limits[1]))
        case Fault.CLOCK_JUMP:
            by_s = 3600.0 if cell.moment in (Moment.PREFILL, Moment.MID) else -3600.0
            before = stage.before = time.time
            time.time = lambda: before() + by_s
            stage.jumped_s = time.time() - before()
        case _:
            for_s = BRIEF_S if patience(cell) == math.inf else LONG_S
            stage.line.inject(*(Injection.parse(text.format(for_s=for_s)) for text in SCRIPTS[fault]))


def no_more(pid: int) -> None:
    """The kernel refuses a process any memory beyond what it has, but for a thread's stack and a little."""
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize() + STACK_BYTES
    _, most = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (size, most))


async def _clean(cell: Cell, stage: Stage) -> None:
    """Undo what would hit the next cell."""
    if stage.limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, stage.limits)
    time.time = stage.before
    if stage.spare and cell.fault is Fault.WORKER_OUT_OF_MEMORY:
        stage.spare.stop()  # it is of no use to the next cell
    if stage.restarting:
        await stage.restarting


def _fired(cell: Cell, stage: Stage) -> str:
    """Why the fault did not happen; empty if it did."""
    match cell.fault:
        case _ if _is_of_frames(cell):
            hit = stage.frames.fired[cell.fault] > 0
        case Fault.WORKER_KILLED:
            hit = stage.status == -9
        case Fault.WORKER_OUT_OF_MEMORY:
            hit = stage.status == -9 and any(
                "memory" in text.lower() for _, _, text in told_events_of(stage.generation)
            )
        case Fault.WORKER_RESTARTED:
            hit = stage.status == -9 and stage.cloud.is_alive
        case Fault.JOURNAL_DISK_FULL:
            hit = any(kind == "journal" for _, kind, _ in told_events_of(stage.generation))
        case Fault.CLOCK_JUMP:
            hit = abs(stage.jumped_s) > 3000
        case _:
            hit = all(stage.line.fired[Injection.parse(t.format(for_s=1)).fault] for t in SCRIPTS[cell.fault])
    return "" if hit else f"{cell.fault} never hit anything"


def _says_nothing(cell: Cell, unfired: str, record: RequestRecord) -> str:
    """Why a fault that did not strike could not."""
    if cell.fault is Fault.REORDER and unfired:
        return "frames alternate while tokens flow: after that moment no two were on their way together"
    is_done = cell.moment is Moment.LAST and not any(run.ended for run in record.runs)
    if cell.fault is Fault.WORKER_OUT_OF_MEMORY and unfired and is_done:
        return "the last token was on its way already: nobody was asked to take over"
    return ""


def _is_of_frames(cell: Cell) -> bool:
    if cell.fault is Fault.CORRUPT:
        return cell.moment in (Moment.FIRST, Moment.LAST)
    return cell.fault in FRAME_SCRIPTS


def _wants_journal(cell: Cell) -> bool:
    return cell.fault in (Fault.JOURNAL_DISK_FULL, Fault.CLOCK_JUMP)


def _loses_cache(cell: Cell) -> bool:
    return cell.fault is Fault.WORKER_RESTARTED


def told_events_of(generation: Generation) -> tuple[tuple[float, str, str], ...]:
    """The events so far, of a generation that may have no record."""
    return tuple((round(e.at_s, 4), e.kind, e.text) for e in generation._journal.events)
