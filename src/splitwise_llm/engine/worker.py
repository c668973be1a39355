"""A worker: greets devices, and opens their sessions on its machine or goes on with those that lost their link.

Whatever a device does wrong ends that device's session with a message, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from types import UnionType
from typing import Any, get_args

from splitwise_llm.engine.backoff import Door
from splitwise_llm.engine.hosted import Advertise, Hosted
from splitwise_llm.engine.machine import RETRY_S, Machine
from splitwise_llm.engine.meters import battery_share
from splitwise_llm.engine.rate_meter import RateMeter
from splitwise_llm.engine.telemetry import Advert
from splitwise_llm.engine.walk import Choose
from splitwise_llm.errors import (
    PeerError,
    PeerMismatch,
    ProtocolError,
    SplitwiseError,
    WorkerFailed,
)
from splitwise_llm.wire import messages
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import (
    Failed,
    Header,
    Hello,
    Join,
    Open,
    Ping,
    Pong,
    Welcome,
    pack,
    unpack,
)
from splitwise_llm.wire.sequence import Sequenced

log = logging.getLogger(__name__)
GREETING_S = 10.0
"""A device that has not said who it is after this long is hung up on."""
OPENING_S = 30.0
"""One that has not said what it wants; it decides at once, but may wait for other workers to greet it."""
SESSIONS_PER_S = 50.0
"""More than are opened in a second, for long, are asked to come back one by one; a worker greets ten times as many."""


class Worker:
    """Serves sessions on a machine; `handle` is what a server runs for each link. `connect` opens a direct link
    to another worker by its address; `choose` replaces sampling.

    A session whose device was lost is kept for `lease_s`, or until somebody else needs its place.
    """

    def __init__(
        self,
        machine: Machine,
        *,
        max_sessions: int = 16,
        idle_s: float = 300.0,
        lease_s: float = 120.0,
        connect: Callable[[str], Awaitable[Link]] = dial,
        choose: Choose | None = None,
    ) -> None:
        self.machine, self.max_sessions, self.idle_s, self.lease_s = machine, max_sessions, idle_s, lease_s
        self._connect, self._choose = connect, choose
        self._sessions: dict[str, Hosted] = {}
        self._door = Door(SESSIONS_PER_S, max(max_sessions, int(SESSIONS_PER_S)))
        self._dropping: set[asyncio.Task[None]] = set()

    async def handle(self, raw: Link) -> None:
        """One link from greeting to good-bye; never raises for what the peer did."""
        link = Sequenced(raw)
        meter = RateMeter()
        link.on_arrival = meter.on_arrival
        try:
            await self._serve(link, partial(self._advert, meter))
        except SplitwiseError as error:
            level = logging.INFO if isinstance(error, PeerError) else logging.WARNING
            log.log(level, "session with %s ended: %s", link.peer, error)
            await _tell(link, error)
        except Exception as error:
            log.exception("session with %s failed", link.peer)
            await _tell(link, WorkerFailed(f"internal error, see the worker's log ({type(error).__name__}: {error})"))
        finally:
            await link.close()

    async def close(self) -> None:
        """Forget all sessions."""
        for name in list(self._sessions):
            await self._drop(name)

    async def _serve(self, link: Link, advert: Advertise) -> None:
        first = await _expect(link, Hello | Join, GREETING_S)
        if isinstance(first, Join):
            await self._join(link, first)
        elif isinstance(first, Hello):
            await self._greet(link, first)
            opening = await self._pinged(link, advert)
            if opening is not None:
                await self._open(link, opening, advert)

    async def _pinged(self, link: Link, advert: Advertise) -> Open | None:
        """Answer pings until the device says what it wants, which may be in an hour, when it needs this worker; None
        when it leaves. Raises ProtocolError."""
        while True:
            said = await _expect(link, Open | Ping, OPENING_S)
            if not isinstance(said, Ping):
                return said if isinstance(said, Open) else None
            await link.send(pack(Pong(said.stamp, advert()), bytes(min(said.reply_bytes, link.max_frame_bytes // 2))))

    async def _open(self, link: Link, opening: Open, advert: Advertise) -> None:
        """One device's session, new or gone on with. Raises SplitwiseError."""
        name = opening.session
        is_taken, wait_s = self._door.knock(time.monotonic())
        if not is_taken:
            said = f"more than {SESSIONS_PER_S:g} sessions are opened per second; try again in {wait_s:.2g} s"
            raise WorkerFailed(said, retry_after_s=wait_s)
        known = name in self._sessions
        if not known:
            fresh = Hosted(self.machine, opening, self._dial, self._choose)
            await self._make_room()
            self._sessions.setdefault(name, fresh)
        session = self._sessions[name]
        if session.opening != opening:
            raise ProtocolError("a session is open under this name for another request")
        is_over = True
        try:
            with session.in_use():
                is_over = await self._until_over(session, link, known, advert)
        finally:
            if is_over:
                await self._drop(name)
            elif session.detached_at_s is not None:
                asyncio.get_running_loop().call_later(self.lease_s, self._expire, name, session.detached_at_s)

    async def _until_over(self, session: Hosted, link: Link, known: bool, advert: Advertise) -> bool:
        """Serve a link; whether the session ended with it. Raises SplitwiseError."""
        watching = asyncio.create_task(self._watch_idle(session))
        serving = asyncio.create_task(session.serve(link, known, advert))
        try:
            await asyncio.wait({watching, serving}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
            return serving.result()
        finally:
            await _end(watching, serving)

    def _expire(self, name: str, detached_at_s: float) -> None:
        session = self._sessions.get(name)
        if session is not None and session.detached_at_s == detached_at_s:
            log.info("nobody came back for a session in %g s; it is forgotten", self.lease_s)
            del self._sessions[name]
            dropping = asyncio.get_running_loop().create_task(session.drop())
            self._dropping.add(dropping)
            dropping.add_done_callback(self._dropping.discard)

    async def _make_room(self) -> None:
        """Raise WorkerFailed unless one more session may be opened; the one that was left longest ago makes room."""
        while len(self._sessions) >= self.max_sessions:
            left = [(one.detached_at_s, name) for name, one in self._sessions.items() if one.detached_at_s is not None]
            if not left:
                raise WorkerFailed(
                    f"all {self.max_sessions} sessions are taken; try again in {RETRY_S:g} s or use another worker",
                    retry_after_s=RETRY_S,
                )
            await self._drop(min(left)[1])

    async def _drop(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            await session.drop()

    async def _join(self, link: Link, join: Join) -> None:
        """Another worker of a session that is open here, or will be in a moment. Raises PeerError."""
        deadline = time.monotonic() + GREETING_S
        while (session := self._sessions.get(join.session)) is None:
            if time.monotonic() > deadline:
                raise ProtocolError("a worker asked to join a session that is not open here")
            await asyncio.sleep(0.01)
        await session.neighbours.join(link, join.machine)

    async def _dial(self, address: str) -> Link:
        return Sequenced(await self._connect(address))

    def _advert(self, meter: RateMeter) -> dict[str, float | int | str | None]:
        """How this machine is, and how fast the device's frames come in."""
        machine, now_s = self.machine, time.monotonic()
        advert = Advert(
            sessions=self._num_attached,
            queue_s=machine.queue_s,
            step_s=machine.clock.step_s,
            free_memory_bytes=machine.free_bytes,
            battery=battery_share(),
            joules=machine.joules[0],
            joules_from=machine.joules[1],
            **Advert.uplink(meter, now_s),  # type: ignore[arg-type]
        )
        return advert.to_dict()

    @property
    def _num_attached(self) -> int:
        return sum(one.detached_at_s is None for one in self._sessions.values())

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
                    sessions=self._num_attached,
                )
            )
        )
        if hello.protocol != messages.PROTOCOL_VERSION:
            raise PeerMismatch(f"the device speaks protocol {hello.protocol}, this worker {messages.PROTOCOL_VERSION}")
        if hello.fingerprint != mine:
            raise PeerMismatch(f"the device holds model {hello.fingerprint}, this worker {mine}")

    async def _watch_idle(self, session: Hosted) -> None:
        """Raise WorkerFailed once the device has said nothing for too long."""
        session.active_s = time.monotonic()
        left = self.idle_s
        while left > 0:
            await asyncio.sleep(left)
            left = session.active_s + self.idle_s - time.monotonic()
        raise WorkerFailed(f"nothing was heard from the device for {self.idle_s:g} s; the session is closed")


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
        after_s = error.retry_after_s if isinstance(error, WorkerFailed) else None
        await link.send(pack(Failed(type(error).__name__, str(error), after_s)))


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs and wait until it has ended; what it raises was raised already or no longer matters."""
    waiting: list[Awaitable[object]] = []
    for task in tasks:
        task.cancel()
        waiting.append(task)
    await asyncio.gather(*waiting, return_exceptions=True)
