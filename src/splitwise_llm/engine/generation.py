"""One prompt being answered: a row of runs, each a partition that the machines walk, until the last token is there.

A run ends because the answer is complete, because the controller moves the partition, or because a machine or a link
fails; the next one begins with the tokens there are. It does not know how links are made, nor how decisions are found.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from splitwise_llm import plan as plans
from splitwise_llm.cost import UNLIMITED, Limits
from splitwise_llm.decision import Decision
from splitwise_llm.engine.account import Account, Run
from splitwise_llm.engine.backoff import RecoveryRules, wait_s
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.filling import Filling
from splitwise_llm.engine.journal import Decided, Journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.peer import Connect, Peer
from splitwise_llm.engine.post import Extent, Office, Post
from splitwise_llm.engine.shares import Shares
from splitwise_llm.engine.survey import Rates
from splitwise_llm.engine.telemetry import Advert, LinkFigures
from splitwise_llm.engine.walk import Choose, Request, Sampled, Walker
from splitwise_llm.errors import (
    BrokenInvariant,
    LinkDied,
    PeerError,
    RequestError,
    SplitwiseError,
    Unreachable,
    UserError,
    WorkerFailed,
)
from splitwise_llm.model.tokenizer import TextStream, Tokenizer
from splitwise_llm.observation import Observation, Occasion, Placement, Policy, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Kind
from splitwise_llm.rebuild import keepers
from splitwise_llm.records import Prediction, RequestRecord, Status
from splitwise_llm.wire import messages
from splitwise_llm.wire.messages import Begun, Close, Closed, Data, Halt, Halted, Open

log = logging.getLogger(__name__)
MAX_FAILURES = 5
"""So often a run may fail at the same token while every machine it needs is there; then it is no accident."""
CLOSING_S = 2.0
"""How long a worker may take to say good-bye once the answer is complete."""
REFUSED_S = 1.0
"""A worker that had no room is asked again after so long."""
SHADOW_TOKENS = 4
"""A shadow follows in steps of so many tokens: one pass over the weights for all of them."""
READY_AFTER_S = 1.0
"""Short answers are over before it pays to load for a fault."""
FILL_CHUNK = 64
"""Positions per chunk of a fill that runs beside decoding: what it holds up is one token, and not many."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a generation needs of the machine that holds it."""

    machine: Machine
    tokenizer: Tokenizer
    names: tuple[str, ...]
    """Of machines 0 (this one), 1, ..."""
    connect: Connect
    direct: Mapping[tuple[int, int], str]
    """For a pair of workers with a link of their own, the address at which the first reaches the second."""
    rates: Mapping[tuple[int, int], Rates]
    """Of links, lower number first, as far as they are known."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it arrived: its id, the text that became certain with it, and when (s after the prompt)."""

    id: int
    text: str
    at_s: float


class Generation:
    """One prompt being answered. After the last token, `record` says how it went."""

    on_progress: Callable[[int, int], object] | None = None
    """Told how many positions of how many have been prefilled, after each chunk that is not the last."""

    def __init__(
        self,
        device: Device,
        journal: Journal,
        policy: Policy,
        request: Request,
        choose: Choose | None,
        *,
        called: str = "",
        limits: Limits = UNLIMITED,
        tools: Tools | None = None,
        rules: RecoveryRules | None = None,
    ) -> None:
        self._device, self._journal, self._policy, self._request = device, journal, policy, request
        self._choose = choose
        self._rules = rules or RecoveryRules()
        self._peers: dict[int, Peer] = {}
        self._office = Office()
        self._shares = Shares(
            device.machine, device.names[DEVICE], DEVICE, request.prompt_tokens + request.max_new_tokens
        )
        direct = frozenset((min(pair), max(pair)) for pair in device.direct)
        self._controller = Controller(
            device.machine,
            device.names,
            dict(device.rates),
            direct,
            policy,
            request,
            limits,
            tools,
            self._shares.fits,
        )
        self._tokens: asyncio.Queue[Token | None] = asyncio.Queue()
        self._stream = TextStream(device.tokenizer)
        self.certain = "".join(self._stream.push(token) for token in journal.tokens)
        """The text that another process's tokens make certain; what they leave open comes with the next token."""
        self._driving: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._beside: dict[str, asyncio.Task[None]] = {}
        """What goes on beside the runs: control, shadow, ready."""
        self._halt = asyncio.Event()
        self._came = asyncio.Event()
        """A token."""
        self._changed = asyncio.Event()
        """Something happened to a peer."""
        self._impatient: set[int] = set()
        self._account = Account(device.names, called)
        self._runs = self._account.runs
        self._filling = Filling(
            device.machine, device.names, device.direct, request, journal, self._peers, self._office, self._shares,
            self._controller, self._account, self._tell, self._patient,
        )  # fmt: skip
        self._current: Run | None = None
        """The run that is under way."""
        self._begun_at = len(journal.ids)
        """Ids there were when this process began with it."""
        self._is_fresh = self._begun_at == request.prompt_tokens
        self._failures: tuple[int, int] = (0, 0)
        self._misses: list[int] = []
        """Machines that a session needed when it was gone on with, and that did not answer."""
        self._gone: dict[int, str] = {}
        """Why machines were given up."""
        self._precision = ""
        self._refused_s: float | None = None
        """Since when the session has waited for room somewhere."""
        self._before: Decision | None = None
        """What ran before a move, until the next run has begun."""
        self._record: RequestRecord | None = None
        self.home: Decision
        """What is run whenever all its machines are there, of a policy that does not look at the world."""
        self.observation: Observation
        self.decision: Decision
        self.on_event: Callable[[str, str], object] | None = None
        """Told of what happens besides tokens (kind, text), as it happens."""
        self.unreachable: dict[str, SplitwiseError] = {}
        """By name, the workers that did not answer as they should, and why."""

    @property
    def record(self) -> RequestRecord:
        """What happened; only after the last token. Raises BrokenInvariant before."""
        if self._record is None:
            raise BrokenInvariant("a generation has a record once its last token was taken")
        return self._record

    @property
    def predicted(self) -> Prediction | None:
        """What the first decision was expected to take; None where a machine is not profiled."""
        return self._account.predicted

    @property
    def plan(self) -> plans.Plan:
        """Of the latest run. Raises BrokenInvariant before the first."""
        if not self._runs:
            raise BrokenInvariant("a generation has a plan once it was entered")
        return self._runs[-1].post.plan

    @property
    def ids(self) -> list[int]:
        """Prompt and tokens so far."""
        return self._journal.ids

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._device.tokenizer.decode(list(self._journal.tokens))

    @property
    def is_complete(self) -> bool:
        """Whether the last token is there."""
        return bool(self._journal.finished)

    @property
    def is_degraded(self) -> bool:
        """Whether something that should be there is not: a machine of the decision that was made, or the journal."""
        wanted = {*self.home.partition.machines, *self.decision.partition.machines} - {DEVICE}
        return bool(self._journal.failed) or any(not self._is_up(number) for number in wanted)

    @property
    def status(self) -> Status:
        """How it stands."""
        names, journal = self._device.names, self._journal
        joules, source = self._device.machine.joules
        start_j = self._account.start_j
        return Status(
            partition=self.decision.partition.text(names),
            wanted=self.home.partition.text(names),
            tokens=self._tokens_out,
            is_degraded=self.is_degraded,
            workers={peer.name: peer.state or "not met" for peer in self._peers.values()},
            journal=journal.failed or (str(journal.path) if journal.path else "in memory"),
            journal_path=str(journal.path) if journal.path and not journal.failed else "",
            joules=None if joules is None or start_j is None else joules - start_j,
            joules_from=source,
        )

    async def __aenter__(self) -> Self:
        start = time.monotonic()
        try:
            late = await self._greet_all()
            try:
                self._decide()
            except (RequestError, PeerError):
                if not late:
                    raise
                await asyncio.wait(late)  # it takes somebody who has not answered yet
                self._decide()
            run = None
            if not self._is_over and not self._misses:
                await self._open_sessions(self.decision.partition)
                run = await self._begin("admission" if self._is_fresh else "resume", first=True)
        except BaseException:
            await self._leave()
            if self._is_fresh:
                self._journal.discard()  # nothing is lost, and the next try may have the name
            raise
        self._account.start_s = time.monotonic()
        self._account.start_j = self._device.machine.joules[0]
        self._account.open_s = self._account.start_s - start
        if run:
            run.at_s = 0.0
        self._driving = asyncio.create_task(self._drive(run))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._driving:
            self._driving.cancel()
            await asyncio.gather(self._driving, return_exceptions=True)
        await self._leave()

    async def __aiter__(self) -> AsyncIterator[Token]:
        if self._driving is None:
            raise BrokenInvariant("enter a generation (async with) before taking its tokens")
        while (token := await self._tokens.get()) is not None:
            yield token
        await self._driving  # raises what ended it, if anything did

    # Opening

    async def _greet_all(self) -> list[asyncio.Task[None]]:
        """Say hello to every worker at once. Those that do not answer matter only if they are needed. For a policy
        whose device could begin alone, greetings that take long go on beside it, and are returned."""
        device, fingerprint = self._device, self._device.machine.checkpoint.fingerprint
        peers = [
            Peer(number, name, device.connect, fingerprint, self, self._rules, self._controller.view(number))
            for number, name in enumerate(device.names)
            if number != DEVICE
        ]
        self._peers |= {peer.number: peer for peer in peers}
        alone = Partition.all_on(device.machine.spec, DEVICE)
        begins_alone = bool(peers) and self._controller.begins_alone(alone)
        meeting = {peer: asyncio.create_task(peer.meet(self._controller.echoes)) for peer in peers}
        try:
            if meeting:
                await asyncio.wait(meeting.values(), timeout=self._suspect_s(0.0) if begins_alone else None)
        except BaseException:
            for task in meeting.values():
                task.cancel()
            raise
        for peer, task in meeting.items():
            error = task.exception() if task.done() else Unreachable(f"{peer.name} has not answered yet")
            if isinstance(error, SplitwiseError):
                self.unreachable[peer.name] = error
            elif error is not None:
                for other in meeting.values():
                    other.cancel()
                raise error
            if begins_alone and isinstance(error, Unreachable | LinkDied):
                self._beside[f"greet {peer.name}"] = self._start("greet", self._greet_late(peer, task))
        return [task for task in meeting.values() if not task.done()]

    async def _greet_late(self, peer: Peer, meeting: asyncio.Task[None]) -> None:
        """A worker that was silent at admission is greeted when it answers, and then it is there like one that came
        back."""
        failures = 0
        while True:
            begun_s = time.monotonic()
            try:
                await meeting
                break
            except (Unreachable, LinkDied) as error:
                self.unreachable[peer.name] = error
                took_s = time.monotonic() - begun_s
                await asyncio.sleep(self._rules.delay_s(failures, took_s, random.random()))
                failures += 1
                meeting = asyncio.create_task(peer.meet(self._controller.echoes))
            except SplitwiseError as error:
                self.unreachable[peer.name] = error
                self._tell("refused", str(error))
                return
        if peer.greeted:
            self._controller.greeted[peer.number] = peer.greeted
        self.unreachable.pop(peer.name, None)
        self._tell("back", f"{peer.name}: answers at last")
        self._controller.note(Occasion.RETURN)

    def _suspect_s(self, step_s: float) -> float:
        """How long an answer that should take so long may be awaited before something is amiss."""
        return self._rules.suspect_share * self._rules.limit_s(step_s)

    def _decide(self) -> None:
        """Ask the policy for the first time; what it may not decide is refused here, whoever it is. Raises
        SplitwiseError."""
        greeted = self._controller.greeted = {n: peer.greeted for n, peer in self._peers.items() if peer.greeted}
        self.observation = observation = self._controller.observe(Occasion.ADMISSION, None)
        try:
            decision = self._policy.decide(observation)
        except RequestError as error:
            if not self.unreachable:
                raise
            raise RequestError("; ".join(map(str, (error, *self.unreachable.values())))) from error
        self._controller.check(decision)
        for number in decision.partition.machines:
            if number != DEVICE and number not in greeted:
                missing = self.unreachable[self._device.names[number]]
                if self._is_fresh or not isinstance(missing, Unreachable | LinkDied):
                    raise missing
                self._misses.append(number)  # a session that goes on waits for it, or does without
                self._peers[number].miss(self._opening(number), missing)
        if self._choose and decision.partition.head != DEVICE:
            raise RequestError("tokens can only be chosen here where the head is on the device: add head=edge")
        self.decision = self.home = decision
        self._account.predicted = self._controller.predict(decision)

    async def _open_sessions(self, partition: Partition) -> None:
        """Open the session on every worker that a partition uses. Raises SplitwiseError."""
        await asyncio.gather(*(self._peers[n].open(self._opening(n)) for n in partition.machines if n != DEVICE))

    def _opening(self, number: int) -> Open:
        request = self._request
        return Open(
            session=self._journal.entry.session,
            machine=number,
            names=list(self._device.names),
            capacity=request.prompt_tokens + request.max_new_tokens,
            stop_ids=sorted(request.stop_ids),
            temperature=request.sampling.temperature,
            top_k=request.sampling.top_k,
            top_p=request.sampling.top_p,
            seed=request.sampling.seed,
            element_loss=request.loss.probability,
            loss_seed=request.loss.seed,
        )

    # Runs

    @property
    def _tokens_out(self) -> int:
        return len(self.ids) - self._request.prompt_tokens

    @property
    def _is_over(self) -> bool:
        count = self._tokens_out
        return count >= self._request.max_new_tokens or (count > 0 and self.ids[-1] in self._request.stop_ids)

    async def _drive(self, first: Run | None) -> None:
        """One run after the other, until the last token is there; then account for them."""
        run: Run | None = first
        why = ""
        try:
            if self._controller.is_asked_again:
                self._beside["control"] = self._start("control", self._control())
            self._beside["ready"] = self._start("ready", self._ready())
            while not self._is_over:
                try:
                    run = run or await self._begin(why)
                    await self._walk(run)
                    why = "move"
                except (PeerError, UserError) as error:
                    await self._stop_moving()
                    if run:
                        await self._abandon(run, error)
                    if run or not self._goes_back(error):
                        await self._recover(error)
                    why = "fault"
                run = None
            await self._close()
        finally:
            tasks = [*self._beside.values(), *([self._moving] if self._moving else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._tokens.put_nowait(None)

    async def _begin(self, why: str, first: bool = False) -> Run:
        """Fill what the partition lacks, and begin a run of it. Raises SplitwiseError."""
        decision, known, filling, names = self.decision, len(self.ids), self._filling, self._device.names
        self._check_up(decision.partition)
        await self._open_sessions(decision.partition)
        start = await filling.fill(decision) if known > 1 and not (first and self._is_fresh) else 0
        extent = Extent(filling.next_run(), start, known, self._request.max_new_tokens - self._tokens_out)
        direct = filling.direct(decision.partition)
        plan = plans.compile(decision, self._device.machine.spec, len(names), direct)
        share = await self._shares.begin(decision.partition, start)
        self._journal.boundaries.truncate(known)
        workers = tuple(n for n in decision.partition.machines if n != DEVICE)
        post = Post(DEVICE, plan, extent, filling.links, names)
        walker = Walker(
            plan, self._request, share, self._device.machine, post, ids=self.ids, on_token=self._take,
            choose=self._choose, kept=self._journal.boundaries, taps=self._taps(decision.partition),
        )  # fmt: skip
        walker.on_chunk = lambda done: self.on_progress and self.on_progress(done, known)
        post.keep = walker.keep
        run = Run(decision, walker, post, workers, time.monotonic() - self._account.start_s, why)
        filling.wires |= decision.wires
        self._note_precision(decision)
        text = decision.partition.text(names)
        decided = Decided(
            extent.run, text, decision.wire, decision.prefill_chunk, start, why, prefill_wire=decision.prefill_wire
        )
        self._journal.decide(decided)
        self._halt.clear()
        await self._office.open(post)
        begun = [self._peers[n].answer(Begun, extent.run) for n in workers]
        for number in workers:
            await self._peers[number].send(filling.begin(number, plan, extent))
        if first:  # loading is no part of the time to the first token
            await asyncio.gather(*begun)
        self._runs.append(run)
        self._before = None
        return run

    def _taps(self, partition: Partition) -> tuple[int, ...]:
        """Where the device, while it does the work of others, keeps the stream that it would send them: so that nothing
        of its own is computed again when they take their work back."""
        home = self.home.partition
        if partition == home:
            return ()
        return tuple(half for half in range(1, 2 * len(home.layers)) if DEVICE in keepers(home, half))

    def _note_precision(self, decision: Decision) -> None:
        """Say so when another precision computes or carries from here on: the text is then that of this history, and
        not of one partition."""
        machine = self._device.machine
        formats = {DEVICE: (str(machine.dtype), str(machine.weights))} | {
            n: (peer.greeted.welcome.dtype, peer.greeted.welcome.weights)
            for n, peer in self._peers.items()
            if peer.greeted
        }
        used = {formats[n] for n in decision.partition.machines if n in formats}
        now = " and ".join(sorted(f"{dtype} with {weights} weights" for dtype, weights in used))
        if len(decision.partition.machines) > 1:
            now += f", {decision.wire} on the wire"
            now += f" ({decision.prefill_wire} in prefill)" if decision.prefill_wire else ""
        elif self._precision.startswith(now):  # nothing crosses
            now = self._precision
        if self._precision not in ("", now) and not now.startswith(self._precision):
            self._tell("precision", f"{self._precision} until here, {now} from here on")
            self._account.is_degraded = True
        self._precision = now

    async def _walk(self, run: Run) -> None:
        """Walk until the answer is complete or the partition is to move. Raises PeerError, and what is our fault."""
        self._filling.expect(run.workers, run.decision, run.extent)
        self._current = run
        if self._goes_home:
            self._moving = self._start("move", self._move(self.home, Occasion.RETURN))
        if run.decision.shadow and not self._beside.get("shadow"):
            self._beside["shadow"] = self._start("shadow", self._shadow())
        walking = asyncio.create_task(run.walker.run())
        halting = asyncio.create_task(self._halt.wait())
        try:
            await self._ended(run, walking, halting)
            if not walking.done() and not await self._halt_walk(run, walking):
                walking.cancel()
                run.ended = "left behind: its link let nothing through, and the next partition does without it"
            await walking
        except asyncio.CancelledError:
            if not walking.cancelled():  # it is this task that was cancelled
                raise
        finally:
            self._current = None
            for task in (walking, halting):
                task.cancel()
            await asyncio.gather(walking, halting, return_exceptions=True)
        if run.ended:
            await self._leave_behind(run)
            return
        with suppress(PeerError):  # the tokens are there; whoever dies now is noticed by the next run
            await self._collect(run)
        self._office.close(run.extent.run)

    async def _ended(self, run: Run, walking: asyncio.Task[None], halting: asyncio.Task[Any]) -> None:
        """Wait until a run has ended or is to. One that makes nothing for very long fails, though its machines answer
        pings: a link between two workers may be dead and neither know it."""
        while not walking.done() and not halting.done():
            made, most_s = len(run.depths), self._controller.stuck_s(run.decision, run.extent)
            either: set[asyncio.Task[Any]] = {walking, halting}
            done, _ = await asyncio.wait(either, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
            if not done and len(run.depths) == made:
                error = LinkDied(f"no token came for {most_s:.0f} s, though every machine answers")
                self._office.fail(error, run.extent.run)

    async def _halt_walk(self, run: Run, walking: asyncio.Task[None]) -> bool:
        """Bring a walk to its end at the next token, wherever its token loop runs; False where none comes any more and
        the next partition can do without. Raises PeerError."""
        if run.loop_machine == DEVICE:
            run.walker.halting = True
            return await self._ends(run, walking)
        asking = asyncio.ensure_future(self._ask_halt(run, run.loop_machine))
        answered = await self._ends(run, walking, asking)
        if not answered or (walking.done() and walking.exception()):
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return answered
        await asking
        halted, _ = run.halted[run.loop_machine]
        sent = sum(c.count for c in halted.crossed if c.kind is Kind.TOKEN)
        while len(run.depths) < sent and not walking.done():
            self._came.clear()
            taking = asyncio.ensure_future(self._came.wait())
            await asyncio.wait({walking, taking}, return_when=asyncio.FIRST_COMPLETED)
            taking.cancel()
        walking.cancel()
        return True

    async def _ends(self, run: Run, *ways: asyncio.Future[None]) -> bool:
        """Wait until one of these is done; False once no token came for so long that something is amiss, if the next
        partition uses none of this one's workers."""
        stays = set(run.workers) & set(self.decision.partition.machines)
        while True:
            made = len(run.depths)
            left_s = None if stays else self._suspect_s(self._controller.token_s(run.decision))
            done, _ = await asyncio.wait(ways, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return True
            if len(run.depths) == made:
                return False

    async def _leave_behind(self, run: Run) -> None:
        """End a run without waiting for what its workers say of it: that comes when their links let it through."""
        await self._device.machine.settle()
        self._office.close(run.extent.run)
        for number in run.workers:
            self._peers[number].expect(None)
            halt = self._peers[number].send(Halt(run.extent.run, at_once=True))
            self._beside[f"halt {run.extent.run} {number}"] = self._start("halt", self._quietly(halt))

    @staticmethod
    async def _quietly(work: Awaitable[object]) -> None:
        with suppress(PeerError):
            await work

    async def _ask_halt(self, run: Run, number: int, at_once: bool = False) -> None:
        answer, payload = await self._peers[number].ask(Halt(run.extent.run, at_once), Halted, run.extent.run)
        if isinstance(answer, Halted):
            run.halted[number] = answer, messages.unpack_intervals(payload)

    async def _collect(self, run: Run) -> None:
        """What every worker counted; the sum is the plan's. Raises PeerError, BrokenInvariant."""
        left = [n for n in run.workers if n not in run.halted]
        await asyncio.gather(*(self._ask_halt(run, number) for number in left))
        for number in run.workers:
            self._peers[number].expect(None)
        run.check()

    async def _abandon(self, run: Run, error: SplitwiseError) -> None:
        """A run has failed. Those of its machines that are there end it at once, and say what they hold."""
        run.ended = str(error)
        await self._device.machine.settle()
        left = [n for n in run.workers if n not in run.halted and self._is_up(n)]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._rules.limit_s(0.0)):
                halts = (self._ask_halt(run, number, at_once=True) for number in left)
                await asyncio.gather(*halts, return_exceptions=True)
        self._office.close(run.extent.run)
        for number in run.workers:
            self._peers[number].expect(None)

    def _patient(self) -> float:
        """How many times longer than predicted an answer may take: twice for each failure at this token. A link that
        is slower than anybody thought is not dead, and would be given up for ever."""
        context, count = self._failures
        return 2.0 ** (min(count, 16) if context == len(self.ids) else 0)

    def _take(self, sampled: Sampled) -> None:
        """A token of the run that is under way."""
        run = self._runs[-1]
        self._journal.token(sampled.id)
        at_s = time.monotonic() - self._account.start_s
        if not run.depths:
            later_s = self._controller.token_s(run.decision)
            for number in run.workers:
                self._peers[number].expect(later_s)
        run.depths.append(sampled.depth)
        self._refused_s = None
        self._came.set()
        text = self._stream.push(sampled.id)
        if self._is_over:
            text += self._stream.finish()
        self._tokens.put_nowait(Token(sampled.id, text, at_s))
        self._controller.token(at_s)

    # Beside the runs

    async def _shadow(self) -> None:
        """Keep the device's caches of everything close behind, so that it can go on alone at once."""
        while True:
            known = len(self.ids)
            if self._current is not None and self._is_still and self.decision.shadow:
                alone = Decision(Partition.all_on(self._device.machine.spec, DEVICE), self.decision.wire, FILL_CHUNK)
                if alone.partition == self.decision.partition:
                    return
                try:
                    await self._filling.fill_beside(alone, self.decision.partition)
                except SplitwiseError as error:
                    self._tell("shadow", f"no shadow is kept: {error}")
                    return
            while len(self.ids) < known + SHADOW_TOKENS:
                self._came.clear()
                await self._came.wait()

    async def _ready(self) -> None:
        """Have the weights at hand with which the device could go on alone, if it can hold them."""
        machine, spec = self._device.machine, self._device.machine.spec
        alone = Partition.all_on(spec, DEVICE)
        await asyncio.sleep(READY_AFTER_S)
        if alone != self.decision.partition and self._shares.fits(alone):
            with suppress(SplitwiseError):  # then it will load when it has to, or say why it cannot
                await machine.keep_ready(alone, DEVICE)

    # Moving

    async def _control(self) -> None:
        """Ask the policy at its epochs, and move when it says so."""
        while True:
            occasion = await self._controller.epoch()
            if not self._may_move:
                continue
            run = self._current
            decision = await self._ask(occasion)
            if decision is None or self._current is not run or not self._is_still:
                continue
            if decision != self.decision:
                self._moving = self._start("move", self._move(decision, occasion))
            else:  # the same plan, perhaps with another patience
                self.decision = decision

    def _start(self, what: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Something beside the runs; that it failed by our own fault is told, and hurts nobody."""

        def over(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                log.error("%s failed", what, exc_info=error)
                self._tell(what, f"failed: {type(error).__name__}: {error}")

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(over)
        return task

    async def _ask(self, occasion: Occasion) -> Decision | None:
        """What the policy wants now; None, and an event, for what may not be."""
        try:
            decision = await self._controller.decide(occasion, self._placement, self._unreachable)
            self._check_up(decision.partition)
        except SplitwiseError as error:
            self._tell("refused", f"{type(error).__name__}: {error}")
            self._controller.refused += 1
            return None
        return decision

    @property
    def _placement(self) -> Placement:
        filling = self._filling
        return Placement(self.decision, filling.context, self._tokens_out, admitted=self.home, holdings=filling.held)

    @property
    def _unreachable(self) -> frozenset[int]:
        return frozenset(n for n, peer in self._peers.items() if peer.link is None or peer.refusal is not None)

    async def _move(self, decision: Decision, occasion: Occasion) -> None:
        """Fill for another partition beside the run that is under way, then end that run; what fails before that
        leaves everything as it was."""
        names, old, run = self._device.names, self.decision, self._current
        try:
            await self._open_sessions(decision.partition)
            careful = replace(decision, prefill_chunk=min(decision.prefill_chunk or FILL_CHUNK, FILL_CHUNK))
            await self._filling.fill_beside(careful, old.partition)
        except SplitwiseError as error:
            self._tell("refused", f"{decision.partition.text(names)}: {error}; going on as before")
            return
        if run is not self._current:
            return
        self._before = old
        self._tell("move", f"{old.partition.text(names)} -> {decision.partition.text(names)} ({occasion})")
        self.decision = decision
        self._halt.set()

    def _goes_back(self, error: SplitwiseError) -> bool:
        """Where the next run could not begin, after a move above all, go on with what ran last, if its machines are
        there and that was another partition."""
        before, self._before = self._before or (self._runs[-1].decision if self._runs else None), None
        if before is None or before == self.decision:
            return False
        if any(self._peers[number].link is None for number in before.partition.machines if number != DEVICE):
            return False
        self._tell("refused", f"{error}; going back to what ran before")
        for number in before.partition.machines:
            if number != DEVICE:
                self._peers[number].refusal = None  # it was for the other partition
        if isinstance(error, UserError):
            self._controller.impossible.add(self.decision.partition)
        self.decision = before
        return True

    async def _stop_moving(self) -> None:
        for task in (self._moving, self._beside.pop("shadow", None)):
            if task:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._moving = None

    # Getting over faults

    def _is_up(self, number: int) -> bool:
        return self._peers[number].is_up

    def _down(self, partition: Partition) -> list[int]:
        return [n for n in partition.machines if n != DEVICE and not self._is_up(n)]

    def _check_up(self, partition: Partition) -> None:
        """Raise LinkDied for a machine that is not there."""
        if down := self._down(partition):
            raise LinkDied(f"{self._device.names[down[0]]} cannot be reached")

    async def _recover(self, error: SplitwiseError) -> None:
        """Return once `self.decision` can be run: the same, or another without what is lost. Raises what happened when
        nothing can be done about it."""
        if self._is_over:
            return
        if isinstance(error, UserError) and not any(peer.refusal for peer in self._peers.values()):
            raise error
        context, count = self._failures
        self._failures = (len(self.ids), count + 1 if context == len(self.ids) else 1)
        if not self._down(self.decision.partition):
            if self._failures[1] > MAX_FAILURES:
                raise error
            self._tell("retry", str(error))
            await asyncio.sleep(self._rules.floor_s * 2 ** self._failures[1])
            return
        refusals = [n for n in self._down(self.decision.partition) if self._peers[n].refusal is not None]
        self._tell("refused" if refusals else "fault", str(error))
        self._impatient.clear()
        self._impatient.update(refusals)  # waiting would not help
        await self._wait(error)

    async def _wait(self, error: SplitwiseError) -> None:
        """Wait for what is lost: as long as there is patience where the session could go on elsewhere, and otherwise as
        long as there is hope. Raises what happened when there is none."""
        fallback: Decision | None = None
        told = False
        while down := self._down(self.decision.partition):
            self._changed.clear()  # here: what changes while a fallback is looked for must not be missed
            if fallback is None or self._down(fallback.partition):
                fallback = await self._fallback()
                if fallback is not None:
                    self._set_patience(fallback)
            if fallback is not None and any(n in self._impatient or self._peers[n].is_gone for n in down):
                where = fallback.partition.text(self._device.names)
                for number in down:
                    self._peers[number].elsewhere(f"as {where}")
                self._tell("failed-over", f"going on as {where}")
                self._account.is_degraded = True
                self.decision = fallback
                return
            if fallback is None:
                if all(self._peers[n].is_gone for n in down):
                    raise self._given_up(down, error) from error
                if not told:
                    names = ", ".join(self._device.names[n] for n in down)
                    self._tell("waiting", f"no partition without {names} is possible; waiting for it")
                told = True
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_S if any(self._peers[n].refusal for n in down) else None):
                    await self._changed.wait()
                    continue
            self._ask_again(down)

    def _given_up(self, down: Sequence[int], error: SplitwiseError) -> LinkDied:
        """What to say when nothing can be done any more."""
        why = "; ".join(self._gone.get(n, f"{self._device.names[n]} is gone") for n in down)
        kept = f"{self._tokens_out} tokens are there"
        if self._journal.path is not None and not self._journal.failed:
            kept += f", and `splitwise resume {self._journal.path}` goes on from them"
        return LinkDied(f"{why}. Nothing else can go on with the answer ({kept}). First of all: {error}")

    def _ask_again(self, down: Sequence[int]) -> None:
        """What a worker had no room for it may have room for now. Raises the refusal once the time for attempts is
        spent."""
        since_s = self._refused_s or time.monotonic()
        for number in down:
            refusal = self._peers[number].refusal
            if refusal is not None and time.monotonic() - since_s > self._rules.budget_s:
                raise refusal
            self._peers[number].refusal = None
        self._refused_s = since_s

    def _set_patience(self, fallback: Decision) -> None:
        """How long to wait for what is lost before going on elsewhere."""
        down = self._down(self.decision.partition)
        move_s = self._controller.move_s(self._filling.held, fallback, self._filling.context)
        patience_s = wait_s(self.decision.patience, move_s)
        for number in down:
            self._peers[number].wait(patience_s)
        if patience_s == 0:
            self._impatient.update(down)

    async def _fallback(self) -> Decision | None:
        """The best decision without what is lost; None: there is none."""
        return await self._controller.fallback(self.home, self._placement, self._unreachable)

    @property
    def _may_move(self) -> bool:
        """Whether a run is under way that no move is to end already."""
        return self._current is not None and self._is_still

    @property
    def _is_still(self) -> bool:
        return not self._halt.is_set() and not (self._moving and not self._moving.done())

    @property
    def _goes_home(self) -> bool:
        """Whether everything is there that the decision of a policy that never looks again needs, and is not used."""
        if self._controller.is_asked_again or not self._may_move:
            return False
        return self.decision.partition != self.home.partition and not self._down(self.home.partition)

    # What peers tell (`Owner`)

    async def data(self, number: int, header: Data, payload: memoryview, frame: bytes) -> None:
        """Into the box of its run."""
        try:
            await self._office.accept(header, payload, frame, number)
        except LinkDied as error:  # of another machine, to which this was to be passed on
            self._office.fail(error)

    def lost(self, number: int, error: SplitwiseError) -> None:
        """Whatever runs there has failed."""
        if self._runs and number in self._runs[-1].workers:
            self._office.fail(LinkDied(f"{self._device.names[number]} was lost in mid-generation: {error}"))
        self._changed.set()

    def failed(self, number: int, run: int, error: SplitwiseError) -> None:
        """One run has failed there."""
        self._office.fail(error if isinstance(error, PeerError) else WorkerFailed(str(error)), run)

    def asked(self, number: int, why: str) -> None:
        """A worker came back, is given up, or was waited for long enough."""
        if why == "patience":
            self._impatient.add(number)
        if why == "gone":
            self._gone[number] = self._journal.events[-1].text
        greeted = self._peers[number].greeted
        if greeted is not None:
            self._controller.greeted.setdefault(number, greeted)
        if why in ("return", "back"):
            self._controller.note(Occasion.RETURN)
            if self._goes_home:
                self._moving = self._start("move", self._move(self.home, Occasion.RETURN))
        self._changed.set()

    def told(self, kind: str, text: str) -> None:
        """For the record."""
        self._tell(kind, text)

    def measured(self, number: int, figures: LinkFigures, advert: Advert | None) -> None:
        """News of a link and of a worker."""
        self._controller.joined = frozenset(n for n, peer in self._peers.items() if peer.is_open)
        self._controller.measured(number, figures, advert)

    def _tell(self, kind: str, text: str) -> None:
        self._journal.event(kind, text)
        if self.on_event:
            self.on_event(kind, text)

    # The end

    async def _close(self) -> None:
        """The answer is complete: say good-bye, and write the record."""
        for peer in self._peers.values():
            with suppress(PeerError, TimeoutError):
                if peer.is_open:
                    async with asyncio.timeout(CLOSING_S):
                        answer, _ = await peer.ask(Close(), Closed)
                        if isinstance(answer, Closed):
                            self._account.peak_memory_bytes[peer.number] = answer.peak_memory_bytes
        self._journal.finish("stop" if self.ids[-1] in self._request.stop_ids else "length")
        self._account.peak_memory_bytes[DEVICE] = peak_memory_bytes()
        self._account.is_degraded |= len({(one.decision.wire, one.decision.prefill_wire) for one in self._runs}) > 1
        emulated = {n: peer.greeted.welcome.emulated for n, peer in self._peers.items() if peer.greeted}
        emulated[DEVICE] = self._device.machine.emulated
        made = len(self.ids) - self._begun_at
        self._record = self._account.record(
            self._journal, self.decision, made, self.text, emulated, self._device.machine.joules
        )

    async def _leave(self) -> None:
        """Close every link and give the shares back."""
        for task in self._beside.values():
            task.cancel()
        await asyncio.gather(*self._beside.values(), return_exceptions=True)
        await self._device.machine.settle()
        self._shares.release()
        await asyncio.to_thread(self._journal.close)  # it waits for the disk
        for_good = bool(self._journal.finished) or self._journal.path is None
        await asyncio.gather(*(peer.leave(for_good) for peer in self._peers.values()), return_exceptions=True)
