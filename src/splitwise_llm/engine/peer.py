"""One worker as a session on the device has it: its link, whoever waits for its answers, and its way back when lost.

It drives `Recovery` with real time and real links. It does not know what the session computes.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from splitwise_llm.engine import signals
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.greeting import Greeted, greet, unexpected
from splitwise_llm.engine.recovery import Recovery
from splitwise_llm.engine.telemetry import PING_WIRE_BYTES, Advert, LinkFigures, LinkView, Pings, ProbeBudget
from splitwise_llm.engine.transitions import State
from splitwise_llm.errors import (
    BrokenInvariant,
    KeysError,
    LinkDied,
    PeerMismatch,
    ProtocolError,
    SplitwiseError,
    Unreachable,
    UserError,
    WorkerFailed,
)
from splitwise_llm.rebuild import NOTHING, Held
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import (
    Away,
    Begun,
    Close,
    Closed,
    Data,
    Failed,
    Filled,
    Halted,
    Header,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    pack,
    unpack,
)
from splitwise_llm.wire.sequence import Sequenced

Connect = Callable[[str], Awaitable[Link]]
"""Opens a link to a machine, by its name. Raises Unreachable."""
Answer = tuple[Header, memoryview]
PROBING_S = 0.05
"""How often the budget for probes is looked at."""


class Owner(Protocol):
    """Whose peers these are."""

    async def data(self, number: int, header: Data, payload: memoryview, frame: bytes) -> None:
        """A frame of a run. Raises ProtocolError."""

    def lost(self, number: int, error: SplitwiseError) -> None:
        """The link is dead."""

    def failed(self, number: int, run: int, error: SplitwiseError) -> None:
        """The worker cannot go on with a run."""

    def apart(self, number: int, other: int, why: str) -> None:
        """The worker does not reach another one directly, as a run asks for; the run has failed for it."""

    def asked(self, number: int, why: str) -> None:
        """A decision is due: fault, return, gone or patience."""

    def away(self, number: int, said: Away) -> None:
        """What the worker made while it was out of reach."""

    def told(self, kind: str, text: str) -> None:
        """For the record."""

    def measured(self, number: int, figures: LinkFigures, advert: Advert | None) -> None:
        """What is known of the link now, and what the worker says of itself."""


class Peer:
    """Worker `number` of a session. `meet` it, `open` the session there, and `leave` in the end."""

    def __init__(
        self,
        number: int,
        name: str,
        connect: Connect,
        fingerprint: str,
        owner: Owner,
        rules: RecoveryRules,
        view: LinkView | None = None,
    ) -> None:
        """With a `view`, the link is measured by what crosses it, and by probes of at most one byte in a hundred."""
        self.number, self.name, self.view = number, name, view
        self._connect, self._fingerprint, self._owner, self._rules = connect, fingerprint, owner, rules
        self._recovery: Recovery | None = None
        self.link: Sequenced | None = None
        self.greeted: Greeted | None = None
        self.opening: Open | None = None
        """What opens the session there; None until it is wanted."""
        self.held: Held = NOTHING
        """What it said last that it holds."""
        self.is_open = False
        self.refusal: SplitwiseError | None = None
        """Why it cannot do what it was asked for last, of a worker that is there; forgotten with a new link."""
        self._has_parted = False
        """Whether good-byes were said, so that the link may end."""
        self._links: dict[int, Sequenced] = {}
        self._closing: set[Sequenced] = set()
        """Given up, and not closed yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._attempts: dict[int, asyncio.Task[None]] = {}
        """Under way."""
        self._waiting: dict[tuple[type[Header], int], asyncio.Future[Answer]] = {}
        self._pings = Pings()
        self._figures: LinkFigures | None = None
        """Of the link, when a ping was last answered."""
        self._poked = asyncio.Event()

    # How it is

    @property
    def is_up(self) -> bool:
        """Whether it can be asked for something now."""
        return self.link is not None and self.refusal is None and (self.opening is None or self.is_open)

    @property
    def is_gone(self) -> bool:
        """Whether it will not come back."""
        return self._recovery is None or self._recovery.state is State.GONE

    @property
    def state(self) -> State | None:
        """None before it was met."""
        return self._recovery.state if self._recovery else None

    # Meeting, opening, leaving

    async def meet(self, echoes: int) -> None:
        """Dial and greet for the first time. Raises SplitwiseError."""
        try:
            async with asyncio.timeout(self._rules.attempt_s):
                self.link, self.greeted = await self._dial(echoes)
        except TimeoutError:
            raise Unreachable(f"{self.name} did not greet within {self._rules.attempt_s:g} s") from None
        self._recovery = Recovery(self.name, self._rules, random.Random(), time.monotonic())
        self._links[0] = self.link
        self._spawn(self._read(self.link, 0))
        self._spawn(self._tend())
        if self.view is not None:
            self.view.rtt.add(time.monotonic(), self.greeted.rtt_s)
            self._spawn(self._probe(self.view))

    def miss(self, opening: Open, error: SplitwiseError) -> None:
        """It did not answer at all, and the session needs it: it is tried again like one that was lost."""
        self.opening = opening
        self._recovery = Recovery(self.name, self._rules, random.Random(), time.monotonic())
        self._spawn(self._tend())
        self._on(signals.Died(str(error)))

    async def _dial(self, echoes: int) -> tuple[Sequenced, Greeted]:
        link = Sequenced(await self._connect(self.name))
        if self.view is not None:
            link.on_arrival = self.view.on_arrival
        try:
            return link, await greet(link, self._fingerprint, echoes)
        except BaseException as error:
            if isinstance(error, SplitwiseError) and not isinstance(error, LinkDied):
                await link.close()  # it is there, and is no use
            else:
                await link.break_off("nobody greeted in time")
            raise

    async def open(self, opening: Open) -> None:
        """Open the session there, unless it is. Raises SplitwiseError."""
        self.opening = opening
        if not self.is_open:
            answer, _ = await self.ask(opening, Opened)
            self._opened(answer)

    def _opened(self, answer: Header) -> bool:
        """Take in what it holds; whether it knew the session."""
        if not isinstance(answer, Opened):
            raise BrokenInvariant("an answer of another kind was waited for")
        self.is_open = True
        self.hold(answer)
        if answer.away is not None:
            self._owner.away(self.number, answer.away)
        return answer.known

    def hold(self, said: Opened | Halted) -> None:
        """Take in what it says that it holds."""
        streams = ((one.half, start, stop) for one in said.streams for start, stop in one.spans)
        self.held = Held.of(((one.half, one.units, one.filled) for one in said.held), streams)

    async def leave(self, for_good: bool = True) -> None:
        """Close the link and end whatever is going on. A session that was not closed yet is over there, too, unless
        somebody may come back for it."""
        if self.is_open and for_good:
            await self._quietly(partial(self.send, Close()))
        link, self.link = self.link, None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkDied(f"the session at {self.name} was left"))
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for other in {*self._links.values(), *self._closing} - {link}:
            with suppress(SplitwiseError):
                await other.break_off("the session is over")
        if link is not None:
            with suppress(SplitwiseError):
                await link.close()
        self._links.clear()

    # Talking

    async def send(self, header: Header, payload: bytes = b"") -> None:
        """Raises LinkDied."""
        if (link := self.link) is None:
            raise LinkDied(f"there is no link to {self.name}")
        try:
            await link.send(pack(header, payload))
        except LinkDied as error:  # its end may never be read, where what comes in is lost
            if self.link is link:
                self._on(signals.Died(str(error)))
            raise

    def answer(self, kind: type[Header], run: int = 0) -> asyncio.Future[Answer]:
        """Its next word of a kind about a run; fails with what ends the link or the run."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[kind, run] = future
        if self.link is None:
            future.set_exception(LinkDied(f"there is no link to {self.name}"))

        def done(_: asyncio.Future[Answer]) -> None:
            if self._waiting.get((kind, run)) is future:
                del self._waiting[kind, run]
            if not future.cancelled():
                future.exception()  # taken here: perhaps nobody waits any more

        future.add_done_callback(done)
        return future

    async def ask(self, header: Header, kind: type[Header], run: int = 0) -> Answer:
        """Send a word and wait for the answer. Raises SplitwiseError."""
        future = self.answer(kind, run)
        try:
            await self.send(header)
            return await future
        finally:
            self._waiting.pop((kind, run), None)

    def expect(self, step_s: float | None) -> None:
        """Answers are awaited that should take so long; None: nothing is."""
        self._on(signals.Idle() if step_s is None else signals.Expect(step_s))

    def wait(self, seconds: float) -> None:
        """How long the session has patience, from the fault on."""
        self._on(signals.Wait(seconds))

    def elsewhere(self, where: str) -> None:
        """The session goes on without it."""
        self._on(signals.Elsewhere(where))

    def give_up(self, reason: str) -> None:
        """No more attempts."""
        self._on(signals.GiveUp(reason))

    def ping(self, payload_bytes: int = 0) -> None:
        """Ask for a sign of life, with so many bytes each way."""
        if (link := self.link) is not None:
            stamp = self._pings.sent(time.monotonic(), link.sent_bytes, link.received_bytes)
            frame = pack(Ping(payload_bytes, stamp), bytes(payload_bytes))
            self._spawn(self._quietly(partial(link.send, frame)))

    async def _probe(self, view: LinkView) -> None:
        """Pings, as many and as large as they may be."""
        budget = ProbeBudget(time.monotonic())
        while True:
            await asyncio.sleep(PROBING_S)
            if self.link is None or (self.opening is not None and not self.is_open):
                continue
            now_s = time.monotonic()
            figures = self._figures or view.figures(now_s)  # a new fit takes a millisecond: once per answer
            rate = min(figures.fast.up_bytes_per_s, figures.fast.down_bytes_per_s)
            wants_rate = figures.up_is_bound or figures.down_is_bound
            size = budget.due(now_s, rate, self.link.received_at_s, wants_rate=wants_rate, hurry=view.is_stirred(now_s))
            if size is not None:
                self.ping(max(size - PING_WIRE_BYTES, 0))

    # What comes in

    async def _read(self, link: Sequenced, number: int) -> None:
        error: SplitwiseError
        try:
            while (frame := await link.receive()) is not None:
                header, payload = unpack(frame)
                if self._recovery and self._recovery.state is not State.CONNECTED:
                    self._on(signals.Heard(number))
                if isinstance(header, Data):
                    await self._owner.data(self.number, header, payload, frame)
                else:
                    self._hear(link, header, payload)
            error = LinkDied(f"{self.name} closed the link; see its log")
        except SplitwiseError as met:
            error = met
        if self.link is link and not self._has_parted:
            self._died(error, number)

    def _hear(self, link: Sequenced, header: Header, payload: memoryview) -> None:
        """Raises what the worker says that ends the session."""
        match header:
            case Pong():
                self._ponged(link, header)
            case Failed() if header.run >= 0:
                self._failed(header, unexpected(link, header, Begun))
            case Failed():
                raise unexpected(link, header, Opened)
            case Opened() | Closed():
                self._has_parted = isinstance(header, Closed)
                self.is_open = self.is_open and not self._has_parted
                self._answer(header, payload, 0)
            case Rows():
                self._answer(header, payload, header.half)
            case Begun() | Filled() | Halted():
                if isinstance(header, Halted):
                    self.hold(header)
                self._answer(header, payload, header.run)
            case _:
                raise unexpected(link, header, Data)

    def _failed(self, said: Failed, error: SplitwiseError) -> None:
        """It cannot go on with a run. Raises ProtocolError where it blames a machine that is not there."""
        if said.machine >= 0:
            if self.opening is None or said.machine >= len(self.opening.names):
                raise ProtocolError(f"{self.name} does not reach machine {said.machine}, which is not there")
            self._owner.apart(self.number, said.machine, said.message)
        if isinstance(error, UserError):
            self.refusal = error
        for (kind, run), future in list(self._waiting.items()):
            if run == said.run and kind is not Halted and not future.done():
                future.set_exception(error)
        self._owner.failed(self.number, said.run, error)

    def _ponged(self, link: Sequenced, pong: Pong) -> None:
        now_s = time.monotonic()
        answered = self._pings.answered(pong.stamp, now_s, link.received_bytes)
        advert = Advert.from_dict(pong.advert) if pong.advert is not None else None
        if advert is not None and self._recovery is not None:  # as many devices would come back as are there now
            self._recovery.rules = self._rules.beside(advert.sessions)
        if answered is None or self.view is None:
            return
        rtt_s, ahead_bytes = answered
        self.view.on_reply(now_s, rtt_s, ahead_bytes, advert)
        self._figures = self.view.figures(now_s)
        self._owner.measured(self.number, self._figures, advert)

    def _answer(self, header: Header, payload: memoryview, run: int) -> None:
        future = self._waiting.pop((type(header), run), None)
        if future is not None and not future.done():
            future.set_result((header, payload))

    def _died(self, error: SplitwiseError, number: int | None = None) -> None:
        """The link is of no use any more."""
        link, self.link, self.is_open, self.refusal = self.link, None, False, None
        self.held = NOTHING
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
        if link is not None:
            self._discard(link)
        self._owner.lost(self.number, error)
        self._on(self._loss(error, number))

    def _loss(self, error: SplitwiseError, number: int | None) -> signals.Event:
        """What the end of a link says: a worker that refuses the session says when to come back, or that there is no
        use in it."""
        if number and self.state in (State.RESYNCING, State.RETURNING):
            if isinstance(error, WorkerFailed):
                return signals.Unreached(number, str(error), error.retry_after_s)
            if isinstance(error, UserError | PeerMismatch):
                return signals.Mismatch(number, str(error))
        return signals.Died(str(error), number)

    # The way back

    async def _tend(self) -> None:
        """Tell the time to `Recovery`. What was heard is told then, too: not each frame on its own."""
        recovery = self._recovery
        if recovery is None:
            raise BrokenInvariant("a peer is tended once it was met")
        heard_s = -math.inf
        while True:
            self._poked.clear()
            due_s = recovery.next_deadline_s - time.monotonic()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(due_s) else max(due_s, 0.0)):
                    await self._poked.wait()
            if self.link is not None and recovery.state is State.CONNECTED and self.link.received_at_s > heard_s:
                heard_s = self.link.received_at_s  # each frame once: an old one is no new sign of life
                self._follow(recovery.on(signals.Heard(), heard_s))
            self._follow(recovery.on(signals.Tick(), time.monotonic()))

    def _on(self, event: signals.Event) -> None:
        if self._recovery is not None:
            self._follow(self._recovery.on(event, time.monotonic()))
            self._poked.set()

    def _follow(self, actions: tuple[signals.Action, ...]) -> None:
        for action in actions:
            match action:
                case signals.Ping():
                    self.ping()
                case signals.HangUp(link, reason):
                    self._hang_up(link, reason)
                case signals.Dial(attempt):
                    task = self._attempts[attempt] = self._spawn(self._try(attempt))
                    task.add_done_callback(partial(self._over, attempt))
                case signals.Attach(link):
                    self._spawn(self._attach(link))
                case signals.AskPolicy(why):
                    self._owner.asked(self.number, why)
                case signals.PatienceOver():
                    self._owner.asked(self.number, "patience")
                case signals.Tell(kind, text):
                    self._owner.told(kind, text)

    def _hang_up(self, number: int, reason: str) -> None:
        if attempt := self._attempts.get(number):
            attempt.cancel()
        link = self._links.pop(number, None)
        if link is None:
            return
        if link is self.link:
            self._died(LinkDied(f"{self.name}: {reason}"))
        else:
            self._discard(link)

    def _discard(self, link: Sequenced) -> None:
        """Break off what is dead, beside whatever goes on; `leave` sees to it if that comes first."""
        self._closing.add(link)

        async def close() -> None:
            await self._quietly(partial(link.break_off, "it was given up on this side"))
            self._closing.discard(link)

        self._spawn(close())

    def _over(self, attempt: int, _: asyncio.Task[None]) -> None:
        del self._attempts[attempt]

    async def _try(self, attempt: int) -> None:
        try:
            link, greeted = await self._dial(0)
        except (PeerMismatch, KeysError) as error:
            self._on(signals.Mismatch(attempt, str(error)))
        except SplitwiseError as error:
            after_s = error.retry_after_s if isinstance(error, WorkerFailed) else None
            self._on(signals.Unreached(attempt, str(error), after_s))
        else:
            self._links[attempt] = link
            self.greeted = greeted if self.greeted is None else self.greeted.again(greeted)
            self._on(signals.Reached(attempt))

    async def _attach(self, number: int) -> None:
        """The session goes on over a new link: what does the worker still hold of it?"""
        link = self._links.get(number)
        if link is None:
            return
        self.link = link
        self._spawn(self._read(link, number))
        try:
            known = True
            if self.opening is not None:
                answer, _ = await self.ask(self.opening, Opened)
                known = self._opened(answer)
        except SplitwiseError as error:
            if self.link is link:  # else its end has been told already
                self._on(self._loss(error, number))
            return
        self._on(signals.Resumed(known, number))
        self._owner.asked(self.number, "back")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @staticmethod
    async def _quietly(work: Callable[[], Awaitable[object]]) -> None:
        with suppress(SplitwiseError):
            await work()
