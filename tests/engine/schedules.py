"""Generated schedules of faults and moves over the real engine in one process. It does not know what must hold then.

A device and two workers, joined by in-memory links that can be faulted; workers can be killed, come back with nothing,
be full or out of memory; a scripted policy moves the partition, also to where it may not; tokens are drafted, well,
badly, or not at all.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from splitwise_llm import cost
from splitwise_llm.decision import Decision
from splitwise_llm.engine import controller, edge, hosted, neighbours, peer, standby, worker
from splitwise_llm.engine import generation as generations
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.drafting import Draft, Drafter, Drafting, Lookup, Pace
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.machine import Machine, need_of
from splitwise_llm.engine.survey import Rates
from splitwise_llm.engine.worker import Worker
from splitwise_llm.errors import RequestError, SplitwiseError, Unreachable
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.observation import Observation, Occasion, Policy
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, Dtype, ModelSpec, Weights
from splitwise_llm.wire import faulty
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.faulty import FaultyConnect
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.sequence import Sequenced
from strategies import NAMES, partitions

PROMPT_TOKENS, TOKENS = 9, 14
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7)
FAMILIES = ("llama", "llama-gqa-tied", "gpt2")
RULES = RecoveryRules(
    steps=4.0, least_limit_s=0.15, heartbeat_s=0.1, base_s=0.01, cap_s=0.3, floor_s=0.002, attempt_s=0.25,
    budget_s=3.0, steady_s=0.05,
)  # fmt: skip
"""The defaults, about ten to twenty times faster."""
MOST_DRAFTED = 4
DRAFTERS = ("", "ngram", "model", "half", "wrong")
"""Who proposes: nobody; lookup; the model itself; who knows the answer, and says every third id otherwise; who is
always wrong."""
LONGEST_S = 20.0
"""A schedule that takes longer hangs."""
NOTHING_KEPT = 0
LINK_FAULTS = ("reset", "drop-up", "drop-down", "drop-both", "duplicate", "reorder", "corrupt", "crawl", "delay-spike")
DEADLY = ("outage", "killed", "full", "no-memory", "drop-up", "drop-down", "drop-both", "crawl", "delay-spike")
"""What, if it never ends, leaves a worker out of reach."""
PARTITIONS = (
    "all:edge",
    "all:cloud",
    "all:third",
    "cloud[0:3] head=edge",
    "edge[0:1] cloud[1:3]",
    "cloud[0:2] edge[2:3]",
    "edge[0:1] cloud[1:2] edge[2:3]",
    "edge[0:1] cloud[1:2] third[2:3]",
    "edge[0:0.5] cloud[0.5:2.5] edge[2.5:3]",
    "edge+cloud[0:3]",
    "edge[0:1] edge+cloud[1:3] embed=edge head=edge",
    "cloud+third[0:3] embed=third head=edge",
    "edge+cloud+third[0:3]",
)
SLOW = DeviceSpec("slow", 2e8, 4e8, 1e12, launch_s=1e-4)
QUICK = DeviceSpec("quick", 1e12, 1e12, 1e12, launch_s=1e-5)
PRICES = {
    "": None,
    "carry": (SLOW, Rates(1e9, 1e9, "given")),
    "compute": (QUICK, Rates(1e5, 1e5, "given")),
}
"""What machines are believed to do: nobody knows; slow machines on fast links, which carry caches; the opposite."""


# What a schedule is


@dataclass(frozen=True)
class Act:
    """Something that happens `after` frames of a link (or milliseconds) once `token` tokens are there (-1: before
    anybody is greeted), for `for_s` (None: for ever; where it lasts)."""

    token: int
    what: str
    who: str
    for_s: float | None = 0.1
    after: int = 0

    @property
    def is_forever(self) -> bool:
        return self.for_s is None and self.what in DEADLY


@dataclass(frozen=True)
class Answerer:
    """One session: what its policy answers, in turn; a single decision is one that was given."""

    answers: tuple[Decision | str, ...]
    """Text: what may not be."""
    prompt: int = 0
    is_sampled: bool = False
    drafter: str = ""
    """One of `DRAFTERS`, on the device."""

    @property
    def is_given(self) -> bool:
        return len(self.answers) == 1


@dataclass(frozen=True)
class Schedule:
    """Everything that a run is made of."""

    family: str
    sessions: tuple[Answerer, ...]
    acts: tuple[Act, ...] = ()
    prices: str = ""
    is_direct: bool = False
    fits: bool = True
    """Whether the device could hold all of the model."""
    lease_s: float = 60.0
    kept_bytes: int = 2**26
    drafter: str = ""
    """One of `DRAFTERS`, of workers that run token loops; they have no model to draft with."""


class Scripted:
    """A policy that gives its answers one after the other, then stays. Until a session is admitted that is the first:
    it is asked twice where a worker's greeting is late."""

    def __init__(self, answers: Sequence[Decision | str]) -> None:
        self._first, *self._later = answers
        self.asked = 0

    def decide(self, observation: Observation) -> Decision:
        self.asked += 1
        if observation.occasion is Occasion.ADMISSION:
            answer = self._first
        elif self._later:
            answer = self._later.pop(0)
        else:
            assert observation.placement is not None
            return observation.placement.decision
        if isinstance(answer, Decision):
            return answer
        spec = observation.model
        match answer:
            case "raises":
                raise RequestError("nothing is to my liking")
            case "stranger":
                return Decision(Partition.all_on(spec, len(observation.machines)))
            case _:
                other = replace(spec, num_layers=spec.num_layers + 1)
                return Decision(Partition.all_on(other, 1))


INADMISSIBLE = ("raises", "stranger", "another model")


@st.composite
def decisions(draw: st.DrawFn, spec: ModelSpec) -> Decision:
    """Where a session may be, and how it takes faults."""
    texts = st.sampled_from(PARTITIONS).map(lambda text: text.replace("3]", f"{spec.num_layers}]"))
    partition = draw(texts.map(lambda text: Partition.parse(text, spec, NAMES)) | partitions(spec))
    chunk = draw(st.sampled_from([None, None, 1, 4]))
    patience = draw(st.sampled_from([0.0, 1.0, float("inf")]))
    draft = draw(st.integers(0, MOST_DRAFTED))
    return Decision(partition, prefill_chunk=chunk, draft=draft, patience=patience, shadow=draw(st.booleans()))


@st.composite
def acts(draw: st.DrawFn) -> Act:
    """One fault."""
    what = draw(st.sampled_from(("reset", "outage", "killed", "full", "no-memory", "broken-direct", *LINK_FAULTS)))
    return Act(
        token=draw(st.integers(-1, TOKENS)),
        what=what,
        who=draw(st.sampled_from(NAMES[1:])),
        for_s=draw(st.sampled_from([0.02, 0.1, 0.3, None])),
        after=draw(st.integers(0, 12)),
    )


@st.composite
def sessions(draw: st.DrawFn, spec: ModelSpec) -> Answerer:
    first = draw(decisions(spec))
    later = draw(st.lists(decisions(spec) | st.sampled_from(INADMISSIBLE), max_size=5))
    drafter = draw(st.sampled_from(DRAFTERS))
    return Answerer((first, *later), draw(st.integers(0, 1)), draw(st.booleans()), drafter)


@st.composite
def schedules(draw: st.DrawFn, specs: Callable[[str], ModelSpec]) -> Schedule:
    """Faults and moves of one or two sessions on the same machines."""
    family = draw(st.sampled_from(FAMILIES))
    spec = specs(family)
    return Schedule(
        family=family,
        sessions=tuple(draw(st.lists(sessions(spec), min_size=1, max_size=2))),
        acts=tuple(draw(st.lists(acts(), max_size=5))),
        prices=draw(st.sampled_from(sorted(PRICES))),
        is_direct=draw(st.booleans()),
        fits=draw(st.sampled_from([True, True, True, False])),
        lease_s=draw(st.sampled_from([60.0, 0.1])),
        kept_bytes=draw(st.sampled_from([2**26, 2048])),
        drafter=draw(st.sampled_from([one for one in DRAFTERS if one != "model"])),
    )


# Who drafts


class Knowing:
    """Proposes what the answer goes on with, of several texts that are known, every `wrong`th id changed."""

    is_light = True

    def __init__(self, texts: Sequence[Sequence[int]], wrong: int) -> None:
        self._texts, self._wrong = texts, wrong

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """See `Drafter`. Looks no further back than a worker may have seen."""
        last = list(ids[-2:])
        for text in self._texts:
            for stop in range(len(last), len(text) if last else 0):
                if list(text[stop - len(last) : stop]) == last:
                    follows = range(stop, min(stop + most, len(text)))
                    return [text[at] ^ 1 if at % self._wrong == 0 else text[at] for at in follows]
        return []


def drafting_by(kind: str, texts: Sequence[Sequence[int]], vocabulary: int) -> Drafting | None:
    """One that always proposes as much as it may, but for lookup, which learns what pays; None: nobody."""
    light: dict[str, Drafter] = {"ngram": Lookup(), "half": Knowing(texts, 3), "wrong": Knowing(texts, 1)}
    pace = Pace() if kind == "ngram" else Pace(least=MOST_DRAFTED)
    return Drafting(light[kind], vocabulary, pace) if kind in light else None


# What it runs on


@dataclass(eq=False)
class Seat:
    """Where a worker is, or is not."""

    name: str
    machine: Machine
    worker: Worker
    is_there: bool = True
    links: set[MemoryLink] = field(default_factory=set)
    serving: set[asyncio.Task[None]] = field(default_factory=set)
    memory_bytes: int = 2**40


class Lab:
    """A device and two workers, and what may be done to them."""

    def __init__(self, checkpoint: Checkpoint, schedule: Schedule, stack: ExitStack) -> None:
        priced = PRICES[schedule.prices]
        figures, rates = priced if priced else (None, None)
        self._schedule = schedule
        self._doing: set[asyncio.Task[None]] = set()
        self.direct: set[MemoryLink] = set()
        machine = partial(Machine, checkpoint, profile=figures, memory_bytes=2**40)
        self.device = stack.enter_context(machine())
        self.seats: dict[str, Seat] = {}
        for name in NAMES[1:]:
            one = stack.enter_context(machine())
            self.seats[name] = Seat(name, one, self._worker(one))
        self.faults = {name: Faults() for name in self.seats}
        connect = FaultyConnect(self._connect, self.faults)
        direct = {("cloud", "third"): "third"} if schedule.is_direct else {}
        believed = dict.fromkeys(self.seats, rates) if rates else {}
        if rates and direct:
            believed["cloud+third"] = rates
        self.edge = Edge(self.device, tuple(self.seats), connect, direct, believed)

    def _worker(self, machine: Machine) -> Worker:
        return Worker(machine, connect=self._connect_directly, lease_s=self._schedule.lease_s)

    async def _connect(self, name: str) -> MemoryLink:
        seat = self.seats[name]
        if not seat.is_there:
            raise Unreachable(f"nobody answers for {name}")
        near, far = memory_pair(("peer", name))
        seat.links.add(near)

        async def serve() -> None:
            await seat.worker.handle(far)
            await far.close()
            seat.links.discard(near)

        task = asyncio.create_task(serve(), name=f"serving {name}")
        seat.serving.add(task)
        task.add_done_callback(seat.serving.discard)
        return near

    async def _connect_directly(self, name: str) -> Link:
        link = await self._connect(name)
        self.direct.add(link)
        return link

    def do(self, act: Act) -> None:
        """Let it happen."""
        task = asyncio.create_task(self._do(act), name=f"{act}")
        self._doing.add(task)
        task.add_done_callback(self._doing.discard)

    async def _do(self, act: Act) -> None:
        seat, faults = self.seats[act.who], self.faults[act.who]
        if act.what in LINK_FAULTS:
            fault = Fault(act.what)
            for_s = act.for_s if fault.lasts else None
            faults.inject(Injection(fault, after_frames=act.after, for_s=for_s, rate_bytes_per_s=20000.0, delay_s=0.03))
            return
        await asyncio.sleep(act.after / 1000)
        match act.what:
            case "outage":
                faults.inject(Injection(Fault.CONNECT_REFUSED, for_s=act.for_s))
                faults.inject(Injection(Fault.RESET))
            case "killed":
                await self._kill(seat)
                if act.for_s is not None:
                    await asyncio.sleep(act.for_s)
                    seat.worker, seat.is_there = self._worker(seat.machine), True
            case "full":
                seat.worker.max_sessions = 0
                if act.for_s is not None:
                    await asyncio.sleep(act.for_s)
                    seat.worker.max_sessions = 16
            case "no-memory":
                seat.machine._memory_limit = 1
                if act.for_s is not None:
                    await asyncio.sleep(act.for_s)
                    seat.machine._memory_limit = seat.memory_bytes
            case "broken-direct":
                for link in self.direct:
                    link.kill()
            case _:
                raise AssertionError(act.what)

    async def _kill(self, seat: Seat) -> None:
        """As if its process were gone: links die, tasks end, nothing is remembered."""
        seat.is_there = False
        for link in seat.links:
            link.kill()
        seat.links.clear()
        tasks = tuple(seat.serving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await seat.worker.close()

    async def at_rest(self) -> list[str]:
        """End all faults, then say what is left behind: sessions that nobody let go of, shares, tasks."""
        doing = tuple(self._doing)
        for task in doing:
            task.cancel()
        await asyncio.gather(*doing, return_exceptions=True)
        for faults in self.faults.values():
            faults.heal()
        left: list[str] = []
        if self.device._open:
            left.append(f"shares of the device: {list(self.device._open)}")
        serving = {task for seat in self.seats.values() for task in seat.serving}
        direct = {task for task in serving if self.direct}
        if serving:
            await asyncio.wait(serving - direct or serving, timeout=2.0)
        for seat in self.seats.values():
            attached = [name for name, one in seat.worker._sessions.items() if one.detached_at_s is None]
            if attached:
                left.append(f"sessions at {seat.name} in use: {attached}")
            if self._schedule.lease_s < 1:
                await _until(lambda seat=seat: not seat.worker._sessions, self._schedule.lease_s + 1.0)
                if seat.worker._sessions:
                    left.append(f"sessions at {seat.name} after their lease: {list(seat.worker._sessions)}")
            await seat.worker.close()
            await _until(lambda seat=seat: not seat.machine._open, 1.0)
            if seat.machine._open:
                left.append(f"shares at {seat.name}: {list(seat.machine._open)}")
        await _until(lambda: len(asyncio.all_tasks()) == 1, 1.0)
        left += [f"task {_where(task)}" for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        return left


async def _until(done: Callable[[], bool], within_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while not done():  # noqa: ASYNC110 - nobody tells when tasks end
                await asyncio.sleep(0.005)


def _where(task: asyncio.Task[Any]) -> str:
    """A task and where it waits, through all coroutines."""
    frames, coroutine = [], task.get_coro()
    while coroutine is not None and hasattr(coroutine, "cr_frame"):
        if coroutine.cr_frame is not None:
            frames.append(f"{Path(coroutine.cr_frame.f_code.co_filename).stem}:{coroutine.cr_frame.f_lineno}")
        coroutine = coroutine.cr_await
    return f"{task.get_name()} {' > '.join(frames)}"


# How it runs


@dataclass
class Outcome:
    """What one session came to."""

    generation: Generation
    ids: list[int] = field(default_factory=list)
    text: str = ""
    error: SplitwiseError | None = None
    was_entered: bool = False
    journal_bytes: int = 0
    """The most the journal held of boundaries."""

    def story(self) -> str:
        """What happened, for whoever has to find out why."""
        lines = [f"  {e.at_s:.3f} {e.kind}: {e.text}" for e in self.generation._journal.events]
        runs = [
            f"  run {run.extent.run} {run.decision.partition.text(NAMES)} from {run.extent.start} with "
            f"{run.extent.known} known made {len(run.depths)} ({run.why}) {run.ended}"
            for run in self.generation._runs
        ]
        return "\n".join([f"ids {self.ids}, error {self.error!r}", *runs, *lines])


@dataclass
class Result:
    """What a schedule came to."""

    outcomes: list[Outcome] = field(default_factory=list)
    hanging: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors in logs, exceptions that nobody took."""

    def story(self) -> str:
        return "\n".join([*(one.story() for one in self.outcomes), *self.left, *self.complaints, *self.hanging])


@contextmanager
def hurried(schedule: Schedule, texts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Everything that takes its time in earnest, faster; and workers that draft as the schedule says."""

    def there(_: Lookup, vocabulary: int) -> Drafting:
        return drafting_by(schedule.drafter, texts, vocabulary) or Drafting(Lookup(), vocabulary)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosted, "Drafting", there)
        patch.setattr(controller, "EPOCH_TOKENS", 2)
        patch.setattr(controller, "EPOCH_S", 0.05)
        patch.setattr(controller, "UNKNOWN_STEP_S", 0.03)
        patch.setattr(generations, "CLOSING_S", 0.2)
        patch.setattr(standby, "READY_AFTER_S", 0.01)
        patch.setattr(worker, "RETRY_S", 0.03)
        patch.setattr(worker, "GREETING_S", 0.3)
        patch.setattr(neighbours, "JOINING_S", 0.3)
        patch.setattr(faulty, "REORDER_HOLD_S", 0.005)
        patch.setattr(faulty, "LINGER_S", 0.1)
        for module in (edge, hosted):
            patch.setattr(module, "KEPT_BYTES", schedule.kept_bytes)
        for module in (peer, worker):
            patch.setattr(module, "Sequenced", partial(Sequenced, gap_s=0.1))
        yield


class _Complaints(logging.Handler):
    """What logs say at level ERROR, and what the event loop says nobody took."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(logging.Formatter().format(record))

    def handle_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.said.append(f"{context.get('message')}: {context.get('exception')!r} {context.get('future', '')}")


Texts = Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
"""Prompts, and all that an undisturbed run may answer to each: what a drafter may know."""


def run(directory: Path, prompts: Texts, schedule: Schedule) -> Result:
    """The schedule, in real time."""
    texts = [[*prompt, *answer] for prompt, answers in prompts for answer in answers]
    complaints = _Complaints()
    log = logging.getLogger("splitwise_llm")
    log.addHandler(complaints)
    try:
        with hurried(schedule, texts), asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(complaints.handle_loop)
            result = runner.run(_run(Checkpoint(directory), [prompt for prompt, _ in prompts], texts, schedule))
            gc.collect()
    finally:
        log.removeHandler(complaints)
    result.complaints = complaints.said
    return result


async def _run(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], schedule: Schedule
) -> Result:
    result = Result()
    with ExitStack() as stack:
        lab = Lab(checkpoint, schedule, stack)
        if not schedule.fits:
            lab.device._memory_limit = _too_little(checkpoint)
        for act in schedule.acts:
            if act.token < 0:
                lab.do(act)
        if any(act.token < 0 for act in schedule.acts):
            await asyncio.sleep(0.005)
        following: list[asyncio.Task[None]] = []
        for number, session in enumerate(schedule.sessions):
            policy: Policy | Decision = Scripted(session.answers)
            if session.is_given and isinstance(session.answers[0], Decision):
                policy = session.answers[0]
            by = {"": "off", "model": str(checkpoint.directory)}.get(session.drafter, "ngram")
            generation = lab.edge.generate(
                list(prompts[session.prompt]),
                policy,
                max_new_tokens=TOKENS,
                sampling=SAMPLED if session.is_sampled else None,
                stop_ids=(),
                rules=RULES,
                draft=Draft(by, MOST_DRAFTED, is_free=False),
            )
            if drafting := drafting_by(session.drafter, texts, checkpoint.architecture.spec.vocab_size):
                generation._controller.drafting = drafting
            outcome = Outcome(generation)
            result.outcomes.append(outcome)
            todo = [act for act in schedule.acts if act.token >= 0] if number == 0 else []
            following.append(asyncio.create_task(_follow(lab, outcome, todo), name=f"session {number}"))
        _, late = await asyncio.wait(following, timeout=LONGEST_S)
        if late:
            result.hanging = [f"hangs: {_where(task)}" for task in asyncio.all_tasks()]
            for task in late:
                task.cancel()
        for failed in await asyncio.gather(*following, return_exceptions=True):
            if isinstance(failed, Exception):
                raise failed
        result.left = await lab.at_rest()
    return result


def _too_little(checkpoint: Checkpoint) -> int:
    """One byte less than all of the model and one session's caches take."""
    spec = checkpoint.architecture.spec
    everything = Partition.all_on(spec, 0)
    need = need_of(everything, 0)
    weights = cost.weight_bytes(spec, set(need.units), need.embed, need.head, Dtype.FP32, Weights.FULL)
    return int(weights) + cost.assigned_kv_bytes(spec, everything, 0, Dtype.FP32, PROMPT_TOKENS + TOKENS) - 1


async def _follow(lab: Lab, outcome: Outcome, todo: list[Act]) -> None:
    """One session to its end; acts at their tokens."""
    generation = outcome.generation
    try:
        async with generation:
            outcome.was_entered = True
            _act(lab, todo, 0)
            async for token in generation:
                outcome.ids.append(token.id)
                outcome.text += token.text
                outcome.journal_bytes = max(outcome.journal_bytes, generation._journal.boundaries.bytes_held)
                _act(lab, todo, len(outcome.ids))
    except SplitwiseError as error:
        outcome.error = error


def _act(lab: Lab, todo: list[Act], count: int) -> None:
    for act in [act for act in todo if act.token <= count]:
        todo.remove(act)
        lab.do(act)
