"""A worker: greets devices, opens their sessions on its machine, and walks its part of their plans.

Whatever a device does wrong ends that device's session with a message, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from types import UnionType
from typing import Any, get_args

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.post import Post
from splitwise_llm.engine.walk import Choose, Request, Walker
from splitwise_llm.errors import (
    PeerError,
    PeerMismatch,
    ProtocolError,
    RequestError,
    SplitwiseError,
    WorkerFailed,
)
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.partition import NAME, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.wire import messages
from splitwise_llm.wire.codec import ElementLoss
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import (
    Close,
    Closed,
    Failed,
    Header,
    Hello,
    Join,
    Open,
    Opened,
    Ping,
    Pong,
    Welcome,
    pack,
    unpack,
)

log = logging.getLogger(__name__)
GREETING_S = 10.0
"""A device that has not said who it is after this long is hung up on."""
OPENING_S = 30.0
"""One that has not said what it wants; it decides at once, but may wait for other workers to greet it."""
MAX_PINGS = 200


class Worker:
    """Serves sessions on a machine; `handle` is what a server runs for each link. `connect` opens a direct link
    to another worker by its address; `choose` replaces sampling."""

    def __init__(
        self,
        machine: Machine,
        *,
        max_sessions: int = 16,
        idle_s: float = 300.0,
        connect: Callable[[str], Awaitable[Link]] = dial,
        choose: Choose | None = None,
    ) -> None:
        self.machine, self.max_sessions, self.idle_s, self._choose = machine, max_sessions, idle_s, choose
        self._connect = connect
        self._posts: dict[str, Post] = {}
        self._sessions = 0

    async def handle(self, link: Link) -> None:
        """One session from greeting to good-bye; never raises for what the peer did."""
        try:
            await self._session(link)
        except SplitwiseError as error:
            level = logging.INFO if isinstance(error, PeerError) else logging.WARNING
            log.log(level, "session with %s ended: %s", link.peer, error)
            await _tell(link, error)
        except Exception as error:
            log.exception("session with %s failed", link.peer)
            await _tell(link, WorkerFailed(f"internal error, see the worker's log ({type(error).__name__}: {error})"))

    async def _session(self, link: Link) -> None:
        first = await _expect(link, Hello | Join, GREETING_S)
        if isinstance(first, Join):
            await self._join(link, first)
        elif isinstance(first, Hello):
            await self._greet(link, first)
            opening = await self._pinged(link)
            if opening is not None:
                await self._open(link, opening)

    async def _pinged(self, link: Link) -> Open | None:
        """Answer pings until the device says what it wants; None when it leaves. Raises ProtocolError."""
        for _ in range(MAX_PINGS + 1):
            said = await _expect(link, Open | Ping, OPENING_S)
            if not isinstance(said, Ping):
                return said if isinstance(said, Open) else None
            await link.send(pack(Pong(), bytes(min(said.reply_bytes, link.max_frame_bytes // 2))))
        raise ProtocolError(f"more than {MAX_PINGS} pings; a link is measured with fewer")

    async def _open(self, link: Link, opening: Open) -> None:
        """One device's session. Raises SplitwiseError."""
        if self._sessions >= self.max_sessions:
            raise WorkerFailed(f"all {self.max_sessions} sessions are taken; try again later or use another worker")
        self._sessions += 1
        try:
            await self._run(link, opening)
        finally:
            self._sessions -= 1

    async def _join(self, link: Link, join: Join) -> None:
        """Another worker of a session that is open here, or will be in a moment. Raises PeerError."""
        deadline = time.monotonic() + GREETING_S
        while (post := self._posts.get(join.session)) is None:
            if time.monotonic() > deadline:
                raise ProtocolError("a worker asked to join a session that is not open here")
            await asyncio.sleep(0.01)
        if (join.machine, post.me) not in post.plan.direct or join.machine in post.links:
            raise ProtocolError(f"machine {join.machine} is not to be reached directly in this session")
        post.links[join.machine] = link
        await link.send(pack(Opened(load_s=0.0)))
        await self._neighbour(post, join.machine)

    async def _neighbour(self, post: Post, machine: int) -> None:
        """Take in what another worker sends until it closes; its failure is the session's."""
        try:
            said = await post.pump(machine)
            if said is not None:
                raise ProtocolError(f"got {type(said[0]).__name__} on a direct link, expected data")
        except SplitwiseError as error:
            post.fail(error)
            raise

    async def _greet(self, link: Link, hello: Hello) -> None:
        """Say who we are, then look at who asked. Raises PeerMismatch."""
        machine, mine = self.machine, self.machine.checkpoint.fingerprint
        await link.send(
            pack(
                Welcome(
                    protocol=messages.PROTOCOL_VERSION,
                    fingerprint=mine,
                    dtype=machine.dtype,
                    weights=machine.weights,
                    memory_bytes=machine.memory_bytes,
                    max_frame_bytes=link.max_frame_bytes,
                    threads=machine.threads,
                    emulated=machine.emulated,
                    figures=asdict(machine.figures) if machine.figures else None,
                    stretch=machine.stretch,
                    sessions=self._sessions,
                )
            )
        )
        if hello.protocol != messages.PROTOCOL_VERSION:
            raise PeerMismatch(f"the device speaks protocol {hello.protocol}, this worker {messages.PROTOCOL_VERSION}")
        if hello.fingerprint != mine:
            raise PeerMismatch(f"the device holds model {hello.fingerprint}, this worker {mine}")

    async def _run(self, link: Link, opening: Open) -> None:
        plan, request = self._read(opening)
        key, name = object(), opening.names[opening.machine]
        capacity = request.prompt_tokens + request.max_new_tokens
        start = time.monotonic()
        partition = plan.decision.partition
        share = await self.machine.open_share(key, name, partition, opening.machine, capacity)
        dialled: dict[int, Link] = {}
        try:
            links = {DEVICE: link}
            post = Post(opening.machine, plan, links, opening.names, request.prompt_tokens, request.max_new_tokens)
            self._posts[opening.session] = post
            await self._reach(opening, dialled)
            links |= dialled
            walker = Walker(plan, request, share, self.machine, post, choose=self._choose)
            await link.send(pack(Opened(load_s=time.monotonic() - start)))
            log.info("session from %s: %s", link.peer, partition.text(opening.names))
            if await self._until_closed(walker, post, list(dialled)):
                await link.send(pack(_closed(post), messages.pack_intervals(walker.intervals)))
        finally:
            self._posts.pop(opening.session, None)
            self.machine.release(key)
            await asyncio.gather(*(other.close() for other in dialled.values()), return_exceptions=True)

    async def _reach(self, opening: Open, dialled: dict[int, Link]) -> None:
        """Open the direct links this worker is to open. Raises PeerError."""
        for machine, address in opening.dial.items():
            dialled[machine] = await self._connect(address)
            await dialled[machine].send(pack(Join(opening.session, opening.machine)))
            answer = await _expect(dialled[machine], Opened | Failed, GREETING_S)
            if not isinstance(answer, Opened):
                why = answer.message if isinstance(answer, Failed) else "it closed the link"
                raise WorkerFailed(f"{opening.names[machine]} ({address}) does not join: {why}")

    def _read(self, opening: Open) -> tuple[plans.Plan, Request]:
        """What a session asks for, checked against the model. Raises UserError."""
        spec = self.machine.spec
        if opening.machine in (DEVICE, *range(len(opening.names), 256)):
            raise ProtocolError(f"this worker cannot be machine {opening.machine} of {len(opening.names)}")
        if not all(NAME.fullmatch(name) for name in opening.names):
            raise ProtocolError("machine names are letters, digits, '_', '.' and '-', a letter first")
        pairs = {frozenset(pair) for pair in opening.direct}
        for machine in opening.dial:
            if machine in (DEVICE, opening.machine) or (opening.machine, machine) not in opening.direct:
                raise ProtocolError(f"machine {machine} is not to be dialled by machine {opening.machine}")
        if len(pairs) < len(opening.direct) or any(len(p) < 2 or max(p) >= len(opening.names) for p in pairs):
            raise ProtocolError(f"direct links {opening.direct} name a pair twice, or machines that are not there")
        if opening.wire not in list(WirePrecision):
            raise RequestError(f"unknown wire precision {opening.wire!r}; known are {', '.join(WirePrecision)}")
        partition = Partition.from_bytes(opening.partition, spec)
        decision = Decision(partition, WirePrecision(opening.wire), opening.prefill_chunk or None)
        request = Request(
            opening.prompt_tokens,
            opening.max_new_tokens,
            frozenset(opening.stop_ids),
            Sampling(opening.temperature, opening.top_k, opening.top_p, opening.seed),
            ElementLoss(opening.element_loss, opening.loss_seed),
        )
        request.check(spec.max_context)
        return plans.compile(decision, spec, len(opening.names), opening.direct), request

    async def _until_closed(self, walker: Walker, post: Post, neighbours: list[int]) -> bool:
        """Walk while frames come in. True when the device closed the session in words. Raises SplitwiseError."""
        walking = asyncio.create_task(walker.run())
        pumping = asyncio.create_task(post.pump(DEVICE))
        watching = asyncio.create_task(self._watch_idle(post))
        others = [asyncio.create_task(self._neighbour(post, machine)) for machine in neighbours]
        try:
            await asyncio.wait({walking, pumping, watching}, return_when=asyncio.FIRST_COMPLETED)
            if walking.done() and not pumping.done():
                walking.result()  # raises what went wrong; a walker that is through waits for the device's word
                await asyncio.wait({pumping, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            said = pumping.result()
        finally:
            await _end(walking, pumping, watching, *others)
        if said is None:
            log.info("%s left", post.links[DEVICE].peer)
            return False
        header, _ = said
        if isinstance(header, Failed):
            raise ProtocolError(f"the device gave up: {header.message}")
        if not isinstance(header, Close):
            raise ProtocolError(f"got {type(header).__name__} in mid-session, expected data or Close")
        return True

    async def _watch_idle(self, post: Post) -> None:
        """Raise WorkerFailed once nothing has moved for too long."""
        left = self.idle_s
        while left > 0:
            await asyncio.sleep(left)
            left = post.last_active_s + self.idle_s - time.monotonic()
        raise WorkerFailed(f"nothing was sent or received for {self.idle_s:g} s; the session is closed")


def _closed(post: Post) -> Closed:
    crossed = [messages.Crossed(c.after, c.kind, c.src, c.dst, c.count, c.payload_bytes) for c in post.crossings]
    return Closed(crossed, peak_memory_bytes(), post.frame_bytes)


async def _expect(link: Link, kind: type[messages.H] | UnionType, within_s: float) -> Header | None:
    """The next frame, which must be of this kind; None when the peer closes. Raises ProtocolError."""
    try:
        async with asyncio.timeout(within_s):
            frame = await link.receive()
    except TimeoutError:
        raise ProtocolError(f"no {_name(kind)} came within {within_s:g} s") from None
    if frame is None:
        return None
    header, _ = unpack(frame)
    if not isinstance(header, kind):
        raise ProtocolError(f"got {type(header).__name__}, expected {_name(kind)}")
    return header


def _name(kind: type | UnionType) -> str:
    return " or ".join(one.__name__ for one in get_args(kind)) or getattr(kind, "__name__", "")


async def _tell(link: Link, error: SplitwiseError) -> None:
    with suppress(SplitwiseError):
        await link.send(pack(Failed(type(error).__name__, str(error))))


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has ended; what it raises was raised already or no longer matters."""
    waiting: list[Awaitable[object]] = []
    for task in tasks:
        task.cancel()
        waiting.append(task)
    await asyncio.gather(*waiting, return_exceptions=True)
