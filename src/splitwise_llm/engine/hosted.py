"""One device's session as a worker has it: its share of the model, what crossed, and the runs it takes part in.

It outlives the device's link: who comes back finds the caches as they were. It does not know who may come, nor how
many sessions there are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.drafting import Drafting, Lookup
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.neighbours import Neighbours, NoWay
from splitwise_llm.engine.post import Extent, Office, Post
from splitwise_llm.engine.shares import Shares
from splitwise_llm.engine.walk import Choose, Request, Walker
from splitwise_llm.errors import (
    LinkDied,
    MemoryTooSmall,
    ProtocolError,
    RequestError,
    SplitwiseError,
    Unreachable,
)
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.share import Share
from splitwise_llm.partition import NAME, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.wire import messages
from splitwise_llm.wire.codec import ElementLoss
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import (
    Away,
    Begin,
    Begun,
    Close,
    Closed,
    Data,
    Failed,
    Fetch,
    Filled,
    Halt,
    Halted,
    Header,
    Held,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    Streams,
    pack,
    unpack,
)

log = logging.getLogger(__name__)
KEPT_BYTES = 64 * 2**20
"""Of residual streams, per session; what was dropped is computed again from the ids."""
MAX_ORDERS = 256
"""That wait to be obeyed; data and pings behind more of them wait, too."""
Advertise = Callable[[], dict[str, float | int | str | None]]
"""How the machine is, an `Advert` field by field."""


@dataclass(slots=True)
class _Running:
    walker: Walker
    task: asyncio.Task[None]


class Hosted:
    """A session on a worker. `serve` a link for it, `detach` it, and in the end `drop` it.

    `dial` reaches other workers; `choose` replaces sampling.
    """

    def __init__(
        self,
        machine: Machine,
        opening: Open,
        dial: Callable[[str], Awaitable[Link]],
        choose: Choose | None,
    ) -> None:
        self._check(opening, machine)
        self.opening, self._machine, self._choose = opening, machine, choose
        self.number, self.name = opening.machine, opening.names[opening.machine]
        self._request = Request(
            opening.capacity,
            0,
            frozenset(opening.stop_ids),
            Sampling(opening.temperature, opening.top_k, opening.top_p, opening.seed),
            ElementLoss(opening.element_loss, opening.loss_seed),
            opening.priority,
        )
        self._links: dict[int, Link] = {}
        self._office = Office()
        self._kept = Boundaries(machine.spec.d_model, KEPT_BYTES)
        self._shares = Shares(machine, self.name, self.number, opening.capacity)
        self._drafting = Drafting(Lookup(), machine.spec.vocab_size)
        """For token loops of its own; what it has learnt is good for later runs."""
        self._running: dict[int, _Running] = {}
        self._away: Away | None = None
        """What the last token loop here made, of which the device may not have heard, until it goes on from there."""
        self.neighbours = Neighbours(opening.session, self.number, opening.names, dial, self._office, self._links)
        self._serving: asyncio.Task[None] | None = None
        self._is_over = False
        self._changing = asyncio.Lock()
        self._num_links = 0
        self._left_s = time.monotonic()
        self.active_s = time.monotonic()
        """When the device was heard last."""

    @staticmethod
    def _check(opening: Open, machine: Machine) -> None:
        """Raise UserError or ProtocolError for a session that cannot be."""
        if opening.machine in (DEVICE, *range(len(opening.names), 256)):
            raise ProtocolError(f"this worker cannot be machine {opening.machine} of {len(opening.names)}")
        if not all(NAME.fullmatch(name) for name in opening.names):
            raise ProtocolError("machine names are letters, digits, '_', '.' and '-', a letter first")
        if not 1 < opening.capacity <= machine.spec.max_context:
            raise RequestError(
                f"{opening.capacity} positions were asked for; the model's context is {machine.spec.max_context}"
            )

    # The device's link

    @property
    def detached_at_s(self) -> float | None:
        """When the last link to it was gone; None while there is one."""
        return None if self._num_links else self._left_s

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around `serve`, from the moment the link is known on."""
        self._num_links += 1
        try:
            yield
        finally:
            self._num_links -= 1
            self._left_s = time.monotonic()

    async def serve(self, link: Link, known: bool, advert: Advertise) -> bool:
        """Take the device's orders from a link, the one before it being given up, until it says that the session is
        over (True) or the link ends (False). Raises SplitwiseError for what ends the session."""
        async with self._changing:
            await self._detach()
            await self._stop_runs()
            self._links[DEVICE] = link
            serving = self._serving = asyncio.create_task(self._take_orders(link, known, advert))
        try:
            await serving
        except asyncio.CancelledError:
            if self._serving is serving:
                raise
            return False  # superseded: this link is nobody's any more
        except LinkDied as error:
            log.info("%s lost its device: %s", self.opening.session[:8], error)
        except SplitwiseError:
            if self._serving is serving:
                raise
            return False  # what a link says that is nobody's any more ends no session
        finally:
            serving.cancel()
            async with self._changing:
                if self._serving is serving:
                    await self._detach()
        return self._is_over

    async def _detach(self) -> None:
        """Give up the link in use, if there is one; what is cached stays. A token loop that needs nobody goes on: its
        tokens are there when the device comes back."""
        serving, self._serving = self._serving, None
        if serving:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        await self._stop_runs(besides_loops=True)
        self._links.pop(DEVICE, None)

    async def drop(self) -> None:
        """Forget everything."""
        async with self._changing:
            await self._detach()
            await self._stop_runs()
        await self.neighbours.leave()
        self._shares.release()

    async def _take_orders(self, link: Link, known: bool, advert: Advertise) -> None:
        """Say what is held, then take frames until the link ends. Orders are obeyed one after the other; data and
        pings wait for none of them."""
        await link.send(pack(Opened(known, *self._holds(), self._away)))
        orders: asyncio.Queue[tuple[Header, memoryview]] = asyncio.Queue(MAX_ORDERS)
        both = [asyncio.create_task(self._listen(link, orders, advert)), asyncio.create_task(self._obey(link, orders))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in both:
                if one.done():
                    one.result()
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _listen(self, link: Link, orders: asyncio.Queue[tuple[Header, memoryview]], advert: Advertise) -> None:
        """Raises what ends the session; a link that is closed without a word ends only itself."""
        while (frame := await link.receive()) is not None:
            self.active_s = time.monotonic()
            header, payload = unpack(frame)
            match header:
                case Data():
                    await self._office.accept(header, payload, frame, DEVICE)
                case Ping():
                    answer = bytes(min(header.reply_bytes, link.max_frame_bytes // 2))
                    await link.send(pack(Pong(header.stamp, advert()), answer))
                case Failed():
                    raise ProtocolError(f"the device gave up: {header.message}")
                case _:
                    if isinstance(header, Halt) and header.at_once and header.run in self._running:
                        self._running[header.run].task.cancel()  # though an order to halt waits for its next token
                    self._is_over = self._is_over or isinstance(header, Close)  # though nobody waits for the answer
                    await orders.put((header, payload))  # who sends more than are obeyed is read no further
        log.info("%s left", link.peer)

    async def _obey(self, link: Link, orders: asyncio.Queue[tuple[Header, memoryview]]) -> None:
        """Returns once the device says that the session is over. Raises what ends the session."""
        while True:
            header, payload = await orders.get()
            match header:
                case Begin():
                    await self._begin(link, header)
                case Halt():
                    await self._halt(link, header)
                case Fetch():
                    await self._fetch(link, header)
                case Rows():
                    await self._put(header, payload)
                case Close():
                    await self._stop_runs()
                    self._shares.release()  # before the device may ask for more
                    await link.send(pack(Closed(peak_memory_bytes())))
                    return
                case _:
                    raise ProtocolError(f"got {type(header).__name__} in mid-session, expected an order or data")

    # Runs

    async def _begin(self, link: Link, begin: Begin) -> None:
        """Take part in a run. What cannot be is said, and ends the run, not the session."""
        start = time.monotonic()
        try:
            plan, extent = self._read(begin)
            if extent.tokens:
                await self._stop_runs()
            share = await self._share(plan, extent, begin)
            if extent.tokens:
                self._away = None  # what is cached now ends where the device says
            await self.neighbours.reach(begin.dial)
        except NoWay as error:
            await link.send(pack(Failed(Unreachable.__name__, str(error), run=begin.run, machine=error.machine)))
            return
        except SplitwiseError as error:
            after_s = error.retry_after_s if isinstance(error, MemoryTooSmall) else None
            await link.send(pack(Failed(type(error).__name__, str(error), after_s, run=begin.run)))
            return
        post = Post(self.number, plan, extent, self._links, self.opening.names)
        walker = Walker(
            plan, self._request, share, self._machine, post, choose=self._choose, kept=self._kept,
            drafting=self._drafting if plan.loop_machine == self.number else None,
        )  # fmt: skip
        await link.send(pack(Begun(begin.run, load_s=time.monotonic() - start)))
        if extent.tokens:
            log.info("run %d of %s: %s", begin.run, link.peer, plan.decision.partition.text(self.opening.names))
        await self._office.open(post)
        self._running[begin.run] = _Running(walker, asyncio.create_task(self._walk(link, walker)))

    def _read(self, begin: Begin) -> tuple[plans.Plan, Extent]:
        """What a run asks for, checked against the model. Raises UserError, ProtocolError."""
        spec, num_machines = self._machine.spec, len(self.opening.names)
        pairs = {frozenset(pair) for pair in begin.direct}
        for machine in begin.dial:
            if machine in (DEVICE, self.number) or (self.number, machine) not in begin.direct:
                raise ProtocolError(f"machine {machine} is not to be dialled by machine {self.number}")
        if len(pairs) < len(begin.direct) or any(len(p) < 2 or max(p) >= num_machines for p in pairs):
            raise ProtocolError(f"direct links {begin.direct} name a pair twice, or machines that are not there")
        if begin.run in self._running:
            raise ProtocolError(f"run {begin.run} has begun already")
        for wire in (begin.wire, begin.prefill_wire or begin.wire):
            if wire not in list(WirePrecision):
                raise RequestError(f"unknown wire precision {wire!r}; known are {', '.join(WirePrecision)}")
        if not begin.start < begin.known or begin.known + max(begin.tokens - 1, 0) > self.opening.capacity:
            raise ProtocolError(
                f"positions {begin.start} to {begin.known} and {begin.tokens} tokens are no run of a session of "
                f"{self.opening.capacity} positions"
            )
        partition = Partition.from_bytes(begin.partition, spec)
        decision = Decision(
            partition, WirePrecision(begin.wire), begin.prefill_chunk or None, begin.draft,
            WirePrecision(begin.prefill_wire) if begin.prefill_wire else None,
        )  # fmt: skip
        extent = Extent(begin.run, begin.start, begin.known, begin.tokens)
        if begin.tokens:
            return plans.compile(decision, spec, num_machines, begin.direct), extent
        feeder = None if begin.feeder < 0 else begin.feeder
        plan = plans.excerpt(decision, spec, num_machines, begin.direct, begin.first, begin.stop, feeder, begin.last)
        return plan, extent

    async def _share(self, plan: plans.Plan, extent: Extent, begin: Begin) -> Share:
        """The share of a run, cut to where it begins. Raises MemoryTooSmall, ModelError, ProtocolError."""
        partition = plan.decision.partition
        if extent.tokens == 0:
            return await self._shares.filling(partition, extent.start, extent.known, plan.cached_halves(self.number))
        share = await self._shares.begin(partition, extent.start)
        self._kept.truncate(extent.known)  # streams of tokens that never came to the device are nobody's
        return share

    async def _walk(self, link: Link, walker: Walker) -> None:
        """A run's part here; the device hears of a fill's end, and of what went wrong."""
        run = walker.post.extent.run
        try:
            if walker.post.extent.tokens:
                await walker.run()
            else:
                await walker.fill()
                await link.send(pack(Filled(run)))
        except SplitwiseError as error:
            with suppress(SplitwiseError):
                await link.send(pack(Failed(type(error).__name__, str(error), run=run)))
        except Exception as error:
            log.exception("run %d failed", run)
            with suppress(SplitwiseError):
                said = f"internal error, see the worker's log ({type(error).__name__}: {error})"
                await link.send(pack(Failed("WorkerFailed", said, run=run)))

    async def _halt(self, link: Link, halt: Halt) -> None:
        """End a run: a token loop of one's own at its next token, anything else (which waits for others) at once. Of a
        run that never began, or is over, it is said what is here; what it left may be cut."""
        running = self._running.get(halt.run)
        if running is None:
            if halt.keep >= 0:
                await self._shares.cut(halt.keep)
                self._kept.truncate(halt.keep)
                self._away = None
            await link.send(pack(Halted(halt.run, [], 0, *self._holds()), messages.pack_intervals([])))
            return
        if running.walker.makes_tokens_alone and running.walker.post.extent.tokens and not halt.at_once:
            running.walker.halting = True
            await asyncio.wait({running.task})
        await self._end(running, halt.keep)
        self._running.pop(halt.run, None)
        post = running.walker.post
        crossed = [messages.Crossed(c.after, c.kind, c.src, c.dst, c.count, c.payload_bytes) for c in post.crossings]
        drafts = post.plan.decision.draft and post.plan.loop_machine == self.number
        rounds = running.walker.rounds if drafts else []
        halted = Halted(halt.run, crossed, post.frame_bytes, *self._holds(), rounds)
        await link.send(pack(halted, messages.pack_intervals(running.walker.intervals)))

    async def _end(self, running: _Running, keep: int = -1) -> None:
        """What a run drafted and nobody accepted is forgotten with it, or what the device does not keep. A link may die
        meanwhile, and whoever ends this: it is forgotten as a run only afterwards, and may be ended twice."""
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
        walker, extent = running.walker, running.walker.post.extent
        self._office.close(extent.run)
        await self._machine.settle()
        if keep >= 0 or (walker.plan.decision.draft and extent.tokens):
            certain = keep if keep >= 0 else walker.certain
            await self._shares.cut(certain)
            self._kept.truncate(certain)
        if walker.makes_tokens_alone and walker.made:
            self._away = Away(extent.run, extent.known, walker.made) if keep < 0 else None

    async def _stop_runs(self, besides_loops: bool = False) -> None:
        for run, running in list(self._running.items()):
            if not (besides_loops and running.walker.needs_nobody):
                await self._end(running)
                self._running.pop(run, None)

    # Caches

    def _holds(self) -> tuple[list[Held], list[Streams]]:
        held = [Held(*one) for one in self._shares.cached]
        streams = [Streams(half, self._kept.kept(half)) for half in self._kept.halves]
        return held, streams

    async def _fetch(self, link: Link, fetch: Fetch) -> None:
        """Rows of no units say that these are not here: the device cannot know what every run leaves."""
        try:
            units, rows = fetch.units, await self._shares.rows(fetch.half, fetch.units, fetch.start, fetch.stop)
        except ProtocolError as error:
            log.info("%s asks for what is not here: %s", link.peer, error)
            units, rows = [], b""
        await link.send(pack(Rows(fetch.half, units, fetch.start, fetch.stop), rows))

    async def _put(self, rows: Rows, payload: memoryview) -> None:
        """What cannot be taken ends no session: the next `Halted` says what is here."""
        try:
            partition = Partition.from_bytes(rows.partition, self._machine.spec)
            await self._shares.put(partition, rows.half, rows.units, rows.start, rows.stop, payload)
        except SplitwiseError as error:
            log.info("keys and values of half %d were not taken: %s", rows.half, error)
