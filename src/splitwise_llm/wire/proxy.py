"""The link shaper for any program: a TCP proxy whose connections share one pair of lanes.

It does not look into the bytes. Opening a connection costs no time on the link; its bytes, its half-closes
and its resets do. (asyncio sets TCP_NODELAY on every socket here.)

Faults happen to bytes that come out of the link, and to connections:

- connect-refused: a connection is accepted and reset at once, so the port stays ours and attempts are counted.
- reset: all connections are reset at both ends.
- drop-up, drop-down, drop-both: bytes vanish while sends succeed. A stream that has lost bytes can never be right
  again, so from the first lost one on this direction of this connection is dead for ever, its end included, even
  when the drop is over: the connection is half-open until both programs give it up. New connections then work.
- crawl, delay-spike: all connections together are slow, or everything is late.
- corrupt: one bit of what comes out next, either way. (Bytes of TCP are neither duplicated nor reordered.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from types import TracebackType
from typing import Self

from splitwise_llm.errors import ListenError
from splitwise_llm.traces import Direction
from splitwise_llm.wire.address import is_loopback, parse_address, show_address
from splitwise_llm.wire.faults import Fault, Injection, Layer
from splitwise_llm.wire.injector import Faults, LateQueue
from splitwise_llm.wire.pacing import QUEUE_BYTES, LaneQueue, LinkClock
from splitwise_llm.wire.shaper import LinkShape

CHUNK_BYTES = 16 * 2**10

_log = logging.getLogger(__name__)


class _End(Enum):
    CLOSED = "no more bytes this way"
    RESET = "the connection is gone"


class _Exit:
    """Where one direction of one connection comes out of its lane."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.done = asyncio.Event()  # the end has come out
        self.lost = False  # bytes have, so nothing more may come out

    def emit(self, what: bytes | _End) -> None:
        """Write a chunk, or end this direction; never raises: that a socket has gone, its own reader learns."""
        if isinstance(what, bytes):
            if not self.writer.is_closing():
                self.writer.write(what)
            return
        if what is _End.RESET:
            _reset(self.writer)
        else:
            with contextlib.suppress(OSError):
                self.writer.write_eof()
        self.done.set()


_Item = tuple[_Exit, bytes | _End]
_Way = LaneQueue[_Item]


class _Open:
    """A connection that a reset can hit."""

    def __init__(self, near: _Exit, far: _Exit) -> None:
        self._ends = near, far

    def reset(self) -> None:
        for end in self._ends:
            _reset(end.writer)


class Proxy:
    """A running proxy, made by `run_proxy`; as a context manager it stops at the end."""

    address: tuple[str, int]
    """Where it listens: host and the port really taken."""

    def __init__(self, to: str, shape: LinkShape, queue_bytes: int, faults: Faults) -> None:
        self._to = parse_address(to)
        self._clock = LinkClock()
        up, down = shape.lanes()
        self._up: _Way = LaneQueue(up, self._clock, queue_bytes)
        self._down: _Way = LaneQueue(down, self._clock, queue_bytes)
        self._connections: set[asyncio.Task[None]] = set()
        self._faults = faults

    @property
    def fired(self) -> Counter[Fault]:
        """How often each fault has hit a chunk of bytes, a connection, or an attempt to connect."""
        return self._faults.fired

    def inject(self, injection: Injection) -> None:
        """Let it happen, its `after` counted from now. Raises SpecError for what a proxy cannot do."""
        self._faults.inject(injection)

    def heal(self) -> None:
        """End whatever acts, and forget whatever was to come; what is half-open stays so."""
        self._faults.heal()

    def reshape(self, shape: LinkShape) -> None:
        """From now on be another link, connections staying open."""
        up, down = shape.lanes()
        self._up.reshape(up)
        self._down.reshape(down)

    @property
    def carried_bytes(self) -> tuple[int, int]:
        """What all connections have sent so far, up and down; what is on its way counts."""
        return self._up.carried_bytes, self._down.carried_bytes

    def down(self, is_down: bool) -> None:
        """Break the link, or mend it: nothing arrives in between, connections stay open."""
        self._clock.down(is_down)

    async def stop(self) -> None:
        """Stop listening and drop all connections with what is on the way. Idempotent."""
        self._server.close()
        self._faults.heal()
        running = [*self._connections, *self._carriers]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._server.wait_closed()
        self._clock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _listen(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, host, port, limit=CHUNK_BYTES, start_serving=False)
        await self._server.start_serving()
        self.address = self._server.sockets[0].getsockname()[:2]
        self._carriers = []
        ways: tuple[tuple[Direction, _Way], ...] = (("up", self._up), ("down", self._down))
        for way, lane in ways:
            late: LateQueue[_Item] = LateQueue(self._faults)
            self._carriers.append(asyncio.create_task(self._carry(way, lane, late)))
            self._carriers.append(asyncio.create_task(self._carry_late(way, late)))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._server.is_serving():  # stopped between the knock and the opening
            _reset(writer)
            return
        self._faults.begin()
        if self._faults.active(Fault.CONNECT_REFUSED):
            self.fired[Fault.CONNECT_REFUSED] += 1
            _reset(writer)
            return
        connection = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.ExitStack() as sockets:
            sockets.callback(_reset, writer)
            try:
                far_reader, far_writer = await asyncio.open_connection(*self._to, limit=CHUNK_BYTES)
            except OSError as error:
                address = show_address(*self._to)
                _log.warning("nobody answers at %s (%s); is the program there running?", address, error)
                return
            sockets.callback(_reset, far_writer)
            near, far = _Exit(writer), _Exit(far_writer)
            target = _Open(near, far)
            sockets.callback(self._faults.leave, target)
            self._faults.join(target)
            await asyncio.gather(
                _read(reader, self._up, far, self._down, near),
                _read(far_reader, self._down, near, self._up, far),
                near.done.wait(),
                far.done.wait(),
            )
            for end in (near, far):
                end.writer.close()
                with contextlib.suppress(OSError):
                    await end.writer.wait_closed()

    async def _carry(self, way: Direction, lane: _Way, late: LateQueue[_Item]) -> None:
        """Let out what arrives, unless it is to be late."""
        while True:
            exit_, what = await lane.get()
            if late.is_empty and not self._faults.slowing():
                self._let_out(way, exit_, what)
            else:
                await late.put((exit_, what), len(what) if isinstance(what, bytes) else 0)

    async def _carry_late(self, way: Direction, late: LateQueue[_Item]) -> None:
        while True:
            self._let_out(way, *await late.get())

    def _let_out(self, way: Direction, exit_: _Exit, what: bytes | _End) -> None:
        dropping = self._faults.dropping(way)
        if dropping is not None:
            self.fired[dropping] += 1
            exit_.lost = True
        if exit_.lost:
            if isinstance(what, _End):
                exit_.done.set()
        else:
            exit_.emit(self._faults.corrupted(what) if isinstance(what, bytes) else what)


async def run_proxy(
    listen: str,
    to: str,
    shape: LinkShape,
    *,
    exposed: bool = False,
    queue_bytes: int = QUEUE_BYTES,
    faults: Iterable[Injection] = (),
) -> Proxy:
    """Listen on `listen` and pass every connection on to `to` (both `host:port`) through one shaped link.

    A listening port of 0 takes a free one, see `Proxy.address`. Each direction buffers `queue_bytes` on top
    of what is in flight, then stops reading. The times of `faults` count from the
    first connection. Raises SpecError for an address that is none and a fault that no proxy can apply, and
    ListenError for one that is taken, or that others can reach unless `exposed`: this proxy has no TLS of its own.
    """
    host, port = parse_address(listen)
    if not exposed and not is_loopback(host):
        raise ListenError(
            f"{listen} can be reached from other machines, and the proxy lets everyone through to {to}; listen on "
            "127.0.0.1, or say that it may be exposed if what is behind it asks for certificates itself"
        )
    proxy = Proxy(to, shape, queue_bytes, Faults(faults, layer=Layer.PROXY))
    try:
        await proxy._listen(host, port)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {listen} ({error.strerror}); choose another port, 0 for any free one"
        ) from error
    return proxy


async def _read(reader: asyncio.StreamReader, way: _Way, exit_: _Exit, way_back: _Way, own: _Exit) -> None:
    """Feed one direction of a connection into its lane; stop reading while the lane or the far end is full."""
    try:
        while chunk := await reader.read(CHUNK_BYTES):
            await exit_.writer.drain()
            await way.put((exit_, chunk), len(chunk))
        await way.put((exit_, _End.CLOSED), 0)
    except OSError:  # either end was reset: both ends learn it, over the link
        await way.put((exit_, _End.RESET), 0)
        await way_back.put((own, _End.RESET), 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees an error, not an end; nothing if closed already."""
    with contextlib.suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
