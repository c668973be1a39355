"""One prompt being answered: a row of runs, each a partition that the machines walk, until the last token is there.

A run ends because the answer is complete, because the controller moves the partition, or because a machine or a link
fails; the next one begins with the tokens there are. It does not know how links are made, nor how decisions are found;
workers are greeted in `admission`, runs end in `halting`, `moving` changes the partition, `failover` gets over faults,
`meanwhile` takes what came late.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from splitwise_llm import plan as plans
from splitwise_llm.cost import UNLIMITED, Limits
from splitwise_llm.decision import Decision
from splitwise_llm.engine.account import Account, Run
from splitwise_llm.engine.admission import Admission
from splitwise_llm.engine.background import Background
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.direct import DirectLinks
from splitwise_llm.engine.drafting import Drafting
from splitwise_llm.engine.failover import Failover
from splitwise_llm.engine.filling import Filling
from splitwise_llm.engine.halting import Halting
from splitwise_llm.engine.journal import Decided, Journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.meanwhile import Meanwhile
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.moving import Moving
from splitwise_llm.engine.peer import Connect, Peer
from splitwise_llm.engine.post import Extent, Office, Post
from splitwise_llm.engine.remembering import Memory
from splitwise_llm.engine.shares import Shares
from splitwise_llm.engine.standby import Standby
from splitwise_llm.engine.survey import Rates
from splitwise_llm.engine.telemetry import Advert, LinkFigures
from splitwise_llm.engine.text import Text, Token
from splitwise_llm.engine.walk import Choose, Request, Sampled, Walker
from splitwise_llm.errors import (
    BrokenInvariant,
    LinkDied,
    PeerError,
    RequestError,
    SplitwiseError,
    UserError,
    WorkerFailed,
)
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Observation, Occasion, Policy, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.rebuild import keepers
from splitwise_llm.records import Prediction, RequestRecord, Status
from splitwise_llm.wire.messages import Away, Begun, Close, Closed, Data

CLOSING_S = 2.0
"""How long a worker may take to say good-bye once the answer is complete."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a generation needs of the machine that holds it."""

    machine: Machine
    tokenizer: Tokenizer
    names: tuple[str, ...]
    """Of machines 0 (this one), 1, ..."""
    connect: Connect
    direct: DirectLinks
    """Between workers."""
    rates: Mapping[tuple[int, int], Rates]
    """Of links, lower number first, as far as they are known."""
    memory: Memory | None = None
    """Of earlier requests, where there is one worker."""


class Generation:
    """One prompt being answered. After the last token, `record` says how it went."""

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
        drafting: Drafting | None = None,
    ) -> None:
        self._device, self._journal, self._request, self._choose = device, journal, request, choose
        rules = rules or RecoveryRules()
        self._peers: dict[int, Peer] = {}
        self._office = Office()
        self._shares = Shares(
            device.machine, device.names[DEVICE], DEVICE, request.prompt_tokens + request.max_new_tokens
        )
        self._controller = Controller(
            device.machine, device.names, dict(device.rates), device.direct.pairs, policy, request, limits, tools,
            self._shares.fits, drafting, memory=device.memory,
        )  # fmt: skip
        self._driving: asyncio.Task[None] | None = None
        self._begun_at = len(journal.ids)
        """Ids there were when this process began with it."""
        self._is_fresh = self._begun_at == request.prompt_tokens
        self._num_apart = 0
        """So often two workers did not reach each other."""
        self._precision = ""
        self._record: RequestRecord | None = None
        self.on_event: Callable[[str, str], object] | None = None
        """Told of what happens besides tokens (kind, text), as it happens."""
        self.on_prefill: Callable[[int, int], object] | None = None
        """Told how many positions of the prompt, of how many, this device is done with."""
        self._account = Account(device.names, called)
        self._runs = self._account.runs
        self._text = Text(
            journal, request, device.tokenizer, lambda: time.monotonic() - self._account.start_s, self._came
        )
        self._background = Background(self._tell)
        self._admission = Admission(
            device.machine, device.names, device.connect, self, rules, journal.entry.session, request, self._is_fresh,
            policy, self._peers, self._controller, self._background, self._tell,
        )  # fmt: skip
        self._filling = Filling(
            device.machine, device.names, device.direct, request, journal, self._peers, self._office, self._shares,
            self._controller, self._account, self._tell,
        )  # fmt: skip
        self._failover = Failover(
            device.names, rules, journal, self._peers, self._controller, self._account, self._filling, self._tell,
            lambda: self._moving.placement,
        )  # fmt: skip
        self._filling.patient = self._failover.patient
        self._halting = Halting(
            device.machine, rules, self._peers, self._office, self._controller, self._background, lambda: self.decision,
            self._silent,
        )  # fmt: skip
        self._moving = Moving(
            device.names, journal, self._peers, self._controller, self._account, self._filling, self._failover,
            self._halting, self._background, self._tell, self._admission.open_sessions,
        )  # fmt: skip
        self._meanwhile = Meanwhile(
            device.names, device.machine.spec.vocab_size, self._peers, self._text, self._background,
            self._runs, self._tell,
        )  # fmt: skip
        self._standby = Standby(device.machine, journal, self._shares, self._filling, self._moving, self._tell)

    @property
    def home(self) -> Decision:
        """What is run whenever all its machines are there, of a policy that does not look at the world."""
        return self._moving.home

    @property
    def decision(self) -> Decision:
        """What is run now, or next."""
        return self._moving.decision

    @property
    def observation(self) -> Observation:
        """What the first decision was made by."""
        return self._admission.observation

    @property
    def unreachable(self) -> dict[str, SplitwiseError]:
        """By name, the workers that did not answer as they should, and why."""
        return self._admission.unreachable

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
        return self._text.ids

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._text.whole

    @property
    def certain(self) -> str:
        """The part of the answer that another process's tokens make certain."""
        return self._text.certain

    @property
    def is_complete(self) -> bool:
        """Whether the last token is there."""
        return bool(self._journal.finished)

    @property
    def is_degraded(self) -> bool:
        """Whether something that should be there is not: a machine of the decision that was made, or the journal."""
        wanted = {*self.home.partition.machines, *self.decision.partition.machines} - {DEVICE}
        return bool(self._journal.failed) or any(not self._peers[number].is_up for number in wanted)

    @property
    def status(self) -> Status:
        """How it stands."""
        names, journal = self._device.names, self._journal
        joules, source = self._device.machine.joules
        start_j = self._account.start_j
        return Status(
            partition=self.decision.partition.text(names),
            wanted=self.home.partition.text(names),
            tokens=self._text.count,
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
            late = await self._admission.greet_all()
            try:
                self._admit()
            except (RequestError, PeerError):
                if not late:
                    raise
                await asyncio.wait(late)  # it takes somebody who has not answered yet
                self._admit()
            run = None
            if not self._text.is_over and not self._admission.misses:
                await self._admission.open_sessions(self.decision.partition)
                await self._catch_up()
            if not self._text.is_over and not self._admission.misses:
                run = await self._begin_first("admission" if self._is_fresh else "resume")
        except BaseException:
            await self._leave()
            if self._is_fresh:
                self._journal.discard()  # nothing is lost, and the next try may have the name
            raise
        self._account.start_s, self._account.start_unix_s = time.monotonic(), time.time()
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
        while (token := await self._text.next()) is not None:
            yield token
        await self._driving  # raises what ended it, if anything did

    def _admit(self) -> None:
        """Decide for the first time. Raises SplitwiseError."""
        decision = self._admission.decide()
        if self._choose and decision.partition.head != DEVICE:
            raise RequestError("tokens can only be chosen here where the head is on the device: add head=edge")
        self._moving.admit(decision)
        self._account.predicted = self._controller.predict(decision)

    # Runs

    async def _drive(self, first: Run | None) -> None:
        """One run after the other, until the last token is there; then account for them."""
        run: Run | None = first
        why = ""
        try:
            if self._controller.is_asked_again:
                self._background.start("control", self._moving.control())
            self._background.start("ready", self._standby.ready())
            while not self._text.is_over:
                try:
                    if run is None and await self._catch_up():
                        continue
                    run = run or await self._begin(why)
                    await self._walk(run)
                    why = "move"
                except (PeerError, UserError) as error:
                    await self._background.stop("move")
                    await self._background.stop("shadow")
                    if run:
                        await self._halting.abandon(run, error)
                        self._filling.broken.update(dict.fromkeys(run.workers, run))
                    if run or not self._moving.goes_back(error):
                        await self._recover(error)
                    why = "fault"
                run = None
            await self._close()
        finally:
            await self._background.stop_all()
            self._text.end()

    async def _begin_first(self, why: str) -> Run:
        """The first run, of whose failures its caller hears; but where only two workers do not reach each other, it is
        begun again without their link. Raises SplitwiseError."""
        while True:
            apart = self._num_apart
            try:
                return await self._begin(why, first=True)
            except PeerError:
                if self._num_apart == apart:
                    raise
                self._office.close(self._filling.last_run)

    async def _begin(self, why: str, first: bool = False) -> Run:
        """Fill what the partition lacks, and begin a run of it. Raises SplitwiseError."""
        decision, known, filling, names = self.decision, len(self.ids), self._filling, self._device.names
        self._failover.check_up(decision.partition)
        await self._admission.open_sessions(decision.partition)
        start = await filling.fill(decision) if known > 1 and not (first and self._is_fresh) else 0
        extent = Extent(filling.next_run(), start, known, self._text.room)
        direct = filling.direct(decision.partition)
        plan = self._plan(decision, direct)
        share = await self._shares.begin(decision.partition, start)
        self._journal.boundaries.truncate(known)
        workers = tuple(n for n in decision.partition.machines if n != DEVICE)
        post = Post(DEVICE, plan, extent, filling.links, names)
        walker = Walker(
            plan, self._request, share, self._device.machine, post, ids=self.ids, on_token=self._take,
            choose=self._choose, kept=self._journal.boundaries, taps=self._taps(decision.partition),
            drafting=self._controller.begin_drafting(decision) if plan.loop_machine == DEVICE else None,
            on_chunk=lambda done: self.on_prefill(done, known) if self.on_prefill else None,
        )  # fmt: skip
        post.keep = walker.keep
        run = Run(decision, walker, post, workers, time.monotonic() - self._account.start_s, why)
        filling.wires |= decision.wires
        self._note_precision(decision)
        text = decision.partition.text(names)
        wire, early = decision.wire, decision.prefill_wire
        self._journal.decide(
            Decided(
                extent.run, text, wire, decision.prefill_chunk, start, why, draft=decision.draft, prefill_wire=early
            )
        )
        self._halting.is_due.clear()
        await self._office.open(post)
        begun = [self._peers[n].answer(Begun, extent.run) for n in workers]
        for number in workers:
            await self._peers[number].send(filling.begin(number, plan, extent, direct))
        if first:  # loading is no part of the time to the first token
            await asyncio.gather(*begun)
        self._runs.append(run)
        self._moving.before = None
        return run

    def _plan(self, decision: Decision, direct: Iterable[tuple[int, int]]) -> plans.Plan:
        """Of a run. Where the loop is here, it leaves room for as many drafted tokens as may ever be wanted: so that
        another length is no other run."""
        spec, count = self._device.machine.spec, len(self._device.names)
        plan = plans.compile(decision, spec, count, direct)
        if plan.loop_machine != DEVICE:
            return plan
        return plans.compile(replace(decision, draft=self._controller.most_drafted(decision)), spec, count, direct)

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
            now += f", {_wires(decision)} on the wire"
        elif self._precision.startswith(now):  # nothing crosses
            now = self._precision
        if self._precision not in ("", now) and not now.startswith(self._precision):
            self._tell("precision", f"{self._precision} until here, {now} from here on")
            self._account.is_degraded = True
        self._precision = now

    async def _walk(self, run: Run) -> None:
        """Walk until the answer is complete or the partition is to move. Raises PeerError, and what is our fault."""
        self._filling.expect(run.workers, run.decision, run.extent)
        self._moving.go_home()
        if self._meanwhile.said:  # said while the run was being begun
            self._halting.is_due.set()
        if run.decision.shadow and "shadow" not in self._background.tasks:
            self._background.start("shadow", self._standby.shadow())
        await self._halting.walk(run)

    async def _catch_up(self) -> bool:
        """Between two runs: take what workers made meanwhile; whether there was any. Raises PeerError."""
        caught = False
        while (number := await self._meanwhile.take()) is not None:
            caught = True
            if not self._text.is_over and number not in self.decision.partition.machines:
                await self._moving.reconsider()
        return caught

    async def _recover(self, error: SplitwiseError) -> None:
        """Return once there is something that can be run, or nothing left to run. Raises what happened when nothing can
        be done about it."""
        if not self._text.is_over:
            self._moving.decision = await self._failover.recover(error)

    def _take(self, sampled: Sampled) -> None:
        """A token of the run that is under way."""
        run = self._runs[-1]
        if not run.depths:
            later_s = self._controller.token_s(run.decision)
            for number in run.workers:
                self._peers[number].expect(later_s)
        run.depths.append(sampled.depth)
        self._text.add(sampled.id)

    def _came(self, at_s: float) -> None:
        """A token was added, whoever made it."""
        self._failover.token()
        self._halting.came.set()
        self._controller.token(at_s)

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
        self._failover.changed.set()

    def failed(self, number: int, run: int, error: SplitwiseError) -> None:
        """One run has failed there."""
        self._office.fail(error if isinstance(error, PeerError) else WorkerFailed(str(error)), run)

    def apart(self, number: int, other: int, why: str) -> None:
        """The next run does without that link."""
        self._num_apart += 1
        self._filling.apart(number, other, why)

    def _silent(self, run: Run, why: str) -> None:
        """Machines that answer make nothing together: perhaps two of them do not hear each other."""
        for first, second in self._filling.direct(run.decision.partition):
            self._device.direct.failed((second, first))
            self.apart(first, second, f"{why}: perhaps two of them do not hear each other")

    def asked(self, number: int, why: str) -> None:
        """A worker came back, is given up, or was waited for long enough."""
        greeted = self._peers[number].greeted
        if greeted is not None:
            self._controller.greeted.setdefault(number, greeted)
        if why in ("return", "back"):
            self._controller.note(Occasion.RETURN)
            if self._halting.current is not None:
                self._moving.go_home()
        self._failover.asked(number, why)

    def away(self, number: int, said: Away) -> None:
        """A worker went on while it was out of reach: what runs meanwhile ends at its next token."""
        if self._meanwhile.hear(number, said) and self._halting.current is not None:
            self._halting.is_due.set()

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
        self._journal.finish("stop" if self._text.has_stopped else "length")
        self._account.peak_memory_bytes[DEVICE] = peak_memory_bytes()
        self._account.is_degraded |= len({_wires(run.decision) for run in self._runs}) > 1
        emulated = {n: peer.greeted.welcome.emulated for n, peer in self._peers.items() if peer.greeted}
        emulated[DEVICE] = self._device.machine.emulated
        made = len(self.ids) - self._begun_at
        account = self._account
        setup = self._controller.setup(account.start_s, account.start_unix_s, account.acceptance)
        self._record = account.record(
            self._journal, self.decision, made, self.text, emulated, self._device.machine.joules, setup
        )

    async def _leave(self) -> None:
        """Close every link and give the shares back."""
        await self._background.stop_all()
        if self._device.memory is not None:
            self._device.memory.left(id(self._controller), self._text.count if self.is_complete else None)
        await self._device.machine.settle()
        self._shares.release()
        await asyncio.to_thread(self._journal.close)  # it waits for the disk
        for_good = bool(self._journal.finished) or self._journal.path is None
        await asyncio.gather(*(peer.leave(for_good) for peer in self._peers.values()), return_exceptions=True)


def _wires(decision: Decision) -> str:
    early = decision.prefill_wire
    return f"{decision.wire} ({early} in prefill)" if early else str(decision.wire)
