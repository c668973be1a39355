"""The network link: one gRPC stream of raw bytes per link, dialled by the device, so it works behind NAT.

It does not know what is inside a frame. All links of a process live on one event loop, for
`grpc.aio` has one poller per process; close them, and stop servers, before that loop ends.

On the wire a frame is one gRPC message, as it is. The empty message is the good-bye, which the other
end answers with its own; gRPC's own end of stream looks the same whether the peer closed or died.
An empty frame, or one that starts with 0xC1 (as no msgpack message does), therefore travels with one
more 0xC1 in front.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from abc import abstractmethod
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our errors say what went wrong; its own lines go to stderr
if version("grpcio").startswith("1.85."):
    # Its older poller wakes one thread less for each message, 0.1 ms on a busy machine. The switch is experimental
    # and other versions may complain of the name: hence only for the version that requirements.txt names.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")

import grpc
from grpc import aio

from splitwise_llm.errors import (
    KeysError,
    ListenError,
    PeerError,
    SplitwiseError,
    Unreachable,
    WorkerFailed,
)
from splitwise_llm.wire.address import is_loopback, parse_address, show_address
from splitwise_llm.wire.keys import check_files
from splitwise_llm.wire.link import MAX_FRAME_BYTES, Handler, Link, TlsFiles, refuse_oversize
from splitwise_llm.wire.memory import FrameQueue

PING_EVERY_S = 1.0
"""Without pings the silent death of an idle link would never show."""

DEAD_AFTER_S = 1.0
"""A network that acknowledges nothing for this long is dead (TCP's user timeout, set through gRPC)."""

STUCK_AFTER_S = 10.0
"""A peer whose network lives, but which answers no ping for this long, is dead. Not shorter, for on a
slow uplink a ping waits behind what the kernel has queued: half a megabyte at 1 Mbit/s takes 4 s."""

LINGER_S = 5.0
"""How long `close` waits for the peer's good-bye before it breaks the link off."""

READ_AHEAD_BYTES = 16 * 2**20
"""So much is taken from the network before anyone receives it: a good-bye or a death shows at once."""

SEND_AHEAD_BYTES = 2**20
"""`send` returns while less than this waits for the network."""

HANDSHAKE_S = 10.0
"""A connection that speaks no HTTP/2 (and TLS, where demanded) after so long is dropped."""

_SERVICE, _METHOD = "splitwise.Link", "Open"
_ACCEPTED = "splitwise-link"
_BYE = b""
_ESCAPE = b"\xc1"

_log = logging.getLogger(__name__)


class _StreamLink(Link):
    """What the two ends of a stream share. `pump` must run in a task from the start."""

    _ends_stream: bool
    """Whether this end sends gRPC's status, which ends the stream, after both good-byes."""

    def __init__(self, peer: str, max_frame_bytes: int, stream: Any) -> None:
        self.peer = peer
        self.max_frame_bytes = max_frame_bytes
        self._stream = stream
        self._inbox = FrameQueue()
        self._outbox = FrameQueue()
        self._over = asyncio.Event()

    @abstractmethod
    async def _why(self) -> str:
        """What gRPC says about the end of the stream."""

    @abstractmethod
    async def break_off(self, why: str) -> None:
        """End the stream without a good-bye; does nothing when it is over."""

    async def send(self, frame: bytes) -> None:
        refuse_oversize(frame, self.max_frame_bytes)
        self._inbox.check_open()
        self._outbox.put(_ESCAPE + frame if frame[:1] in (b"", _ESCAPE) else frame)
        await asyncio.sleep(0)  # the frame leaves now, even if the caller goes on to block the loop
        await self._outbox.room(SEND_AHEAD_BYTES)
        self._inbox.check_open()

    async def receive(self) -> bytes | None:
        return await self._inbox.take()

    async def close(self) -> None:
        self._inbox.end(f"the link to {self.peer} was closed on this side", drop=True)
        self._outbox.end("closed")
        try:
            async with asyncio.timeout(LINGER_S):
                await self._over.wait()
        except TimeoutError:
            await self.break_off("no good-bye came back")

    async def pump(self) -> None:
        """Moves frames between the stream and the two queues until the stream ends."""
        why = "it ended without a good-bye"
        sending = asyncio.create_task(self._pump_out())
        try:
            while (message := await self._read()) is not None:
                if message == _BYE:
                    self._inbox.end(f"{self.peer} has closed the link")
                    self._outbox.end("closed", drop=True)
                    await asyncio.wait([sending])
                    if self._ends_stream:
                        break
                else:
                    self._inbox.put(message[1:] if message[:1] == _ESCAPE else message)
                    await self._inbox.room(READ_AHEAD_BYTES)
            why = await self._why()
        finally:
            self._inbox.end(f"the link to {self.peer} broke: {why}", died=True)
            self._outbox.end("broken", drop=True)
            sending.cancel()
            self._stream = None  # a call, even a finished one, keeps its connection open while someone holds it
            self._over.set()

    async def _pump_out(self) -> None:
        # A broken stream needs no word here: `_read` meets its end as well.
        with suppress(grpc.RpcError, aio.BaseError, asyncio.InvalidStateError):
            while (message := await self._outbox.take()) is not None:
                await self._stream.write(message)
            await self._stream.write(_BYE)

    async def _read(self) -> bytes | None:
        """The next message, or None at the end of the stream, whatever ended it."""
        try:
            message = await self._stream.read()
        except (grpc.RpcError, aio.BaseError):
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # grpc.aio raises this, too, when the stream was broken off on this side
        return None if message is aio.EOF else message


class _DeviceEnd(_StreamLink):
    """The end that dialled; it owns the channel and gives it back when the stream ends."""

    _ends_stream = False

    def __init__(self, peer: str, max_frame_bytes: int, call: Any, channel: Any) -> None:
        super().__init__(peer, max_frame_bytes, call)
        self._channel = channel
        self._pumping = asyncio.create_task(self._pump_and_hang_up())

    async def close(self) -> None:
        await super().close()
        await asyncio.wait([self._pumping])

    async def break_off(self, why: str) -> None:
        if not self._over.is_set():
            self._stream.cancel()

    async def _pump_and_hang_up(self) -> None:
        try:
            await self.pump()
        finally:
            await self._channel.close()

    async def _why(self) -> str:
        return str(await self._stream.details()) or "it ended without a good-bye"


class _WorkerEnd(_StreamLink):
    """The end that was dialled; it lives inside one RPC of the server."""

    _ends_stream = True

    async def accept(self) -> None:
        """Tells the dialler that it has a link; before that it has none."""
        with suppress(aio.BaseError):  # it has gone already: the first receive says so
            await self._stream.send_initial_metadata(((_ACCEPTED, "1"),))

    async def break_off(self, why: str) -> None:
        if not self._over.is_set():
            # `abort` always raises, and waits behind frames that a stuck peer does not take.
            with suppress(aio.BaseError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stream.abort(grpc.StatusCode.ABORTED, why)

    async def _why(self) -> str:
        return "it ended without a good-bye"


async def dial(
    address: str,
    *,
    name: str = "",
    tls: TlsFiles | None = None,
    timeout_s: float = 5.0,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Link:
    """Opens a link to the worker at `host:port`; `name` is what messages to people call it.

    Raises Unreachable (nobody, or no worker, answers), KeysError (certificates do not fit together),
    WorkerFailed (the worker refuses, and says why), SpecError (no address).
    """
    target = show_address(*parse_address(address))
    peer = f"{name or 'worker'} ({target})"
    options = [
        *_options(max_frame_bytes),
        ("grpc.use_local_subchannel_pool", 1),  # else links share a connection, and a failed dial its back-off
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
    ]
    if tls is None:
        channel = aio.insecure_channel(target, options=options)
    else:
        ca, certificate, key = _read_tls(tls)
        credentials = grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=certificate)
        channel = aio.secure_channel(target, credentials, options=options)
    call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()
    try:
        async with asyncio.timeout(timeout_s):
            if _ACCEPTED not in await call.initial_metadata():
                raise _refusal(peer, target, tls, await call.code(), str(await call.details()))
        return _DeviceEnd(peer, max_frame_bytes, call, channel)
    except BaseException as error:
        call.cancel()
        await channel.close()
        if isinstance(error, TimeoutError):
            raise Unreachable(
                f"{peer} did not answer within {timeout_s:g} s; check the address, and whether a firewall"
                f" drops the connection. {_start_hint(target)}"
            ) from None
        raise


_MEANINGS: tuple[tuple[str, bool | None, type[SplitwiseError], str], ...] = (
    # a piece of what gRPC says, whether we dialled with TLS (None: either), what it means
    (
        "WRONG_VERSION_NUMBER", True, Unreachable,
        "{peer} does not speak TLS; dial it without certificates, or start it with `--tls DIR`",
    ),
    (
        "Hostname Verification", True, KeysError,
        "the certificate of {peer} is for other hosts; run `splitwise keys` with this one among the `--host`,"
        " and copy the files to all machines",
    ),
    (
        "handshake failed", True, KeysError,
        "{peer} showed a certificate that is no worker's by {ca}; use files of the same `splitwise keys` on all"
        " machines",
    ),
    (
        "Socket closed", True, KeysError,
        "{peer} hung up when it saw {certificate}: most likely another CA issued it, or it has expired by"
        " the worker's clock; use files of the same `splitwise keys` on all machines",
    ),
    (
        "Socket closed", False, Unreachable,
        "{peer} hung up at once: most likely it demands TLS; give the device's certificates with `--tls DIR`",
    ),
    ("hostname lookup", None, Unreachable, "no such host is known here: {target}"),
    ("HTTP", None, Unreachable, "something answers at {target}, but it is no splitwise worker"),
    ("Method not found", None, Unreachable, "something answers at {target}, but it is no splitwise worker"),
)  # fmt: skip


def _refusal(peer: str, target: str, tls: TlsFiles | None, code: Any, details: str) -> SplitwiseError:
    """The error for a stream that was never accepted, from what gRPC says of it."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return WorkerFailed(f"{peer} refused the link: {details}")
    for piece, with_tls, kind, meaning in _MEANINGS:
        if piece in details and with_tls in (None, tls is not None):
            ca, certificate = (tls.ca, tls.certificate) if tls else ("", "")
            said = meaning.format(peer=peer, target=target, ca=ca, certificate=certificate)
            return kind(f"{said} ({details})")
    return Unreachable(f"nobody answers at {target}. {_start_hint(target)} ({details})")


def _start_hint(target: str) -> str:
    return f"Start a worker there: `splitwise worker --listen {target} --model DIR`"


class Server:
    """Listens, and runs the handler once for each link; made by `serve`, ended by `stop` or `async with`."""

    def __init__(self, handler: Handler, *, max_links: int, max_frame_bytes: int) -> None:
        self.address = ""
        self._handler = handler
        self._max_links = max_links
        self._max_frame_bytes = max_frame_bytes
        self._running: set[asyncio.Task[None]] = set()  # handlers; a stream may end before its handler or after
        self._streams = 0
        self._stopping = False
        self._server = aio.server(options=_options(max_frame_bytes))
        method = grpc.stream_stream_rpc_method_handler(self._open)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: method}),))

    async def start(self, host: str, port: int, tls: TlsFiles | None) -> None:
        where = show_address(host, port)
        try:
            if tls is None:
                port = self._server.add_insecure_port(where)
            else:
                ca, certificate, key = _read_tls(tls)
                port = self._server.add_secure_port(
                    where, grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
                )
        except RuntimeError as error:
            raise ListenError(f"cannot listen on {where}: {error}") from error
        self.address = show_address(host, port)
        await self._server.start()

    async def stop(self, grace_s: float = 1.0) -> None:
        """No new links; those open may end by themselves within the grace, the others are broken off."""
        self._stopping = True
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        await self._server.stop(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(grace_s=0.0 if error else 1.0)

    async def _open(self, _requests: Any, context: Any) -> None:
        """The life of one RPC: it moves bytes; the handler runs beside it."""
        if self._stopping:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "it is stopping")
        if max(len(self._running), self._streams) >= self._max_links:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"it has {self._max_links} links, which is its limit; try again when one has ended,"
                " or start it with a larger `--max-sessions`",
            )
        link = _WorkerEnd(f"device ({_plain_peer(context.peer())})", self._max_frame_bytes, context)
        task = asyncio.create_task(self._handle(link))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        self._streams += 1
        try:
            await link.pump()
        finally:
            self._streams -= 1

    async def _handle(self, link: _WorkerEnd) -> None:
        why = "the worker was stopped"
        try:
            await link.accept()
            await self._handler(link)
            await link.close()
        except PeerError as error:
            why = "the worker gave it up"
            _log.info("the link to %s ended: %s", link.peer, error)
        except Exception:
            why = "the worker failed; its log says how"
            _log.exception("the handler of the link to %s failed", link.peer)
        finally:
            await link.break_off(why)


async def serve(
    listen: str,
    handler: Handler,
    *,
    tls: TlsFiles | None = None,
    max_links: int = 64,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Server:
    """Listens on `host:port` (port 0: any free one, see `address`) and runs `handler` for each link.

    With `tls`, only peers with a certificate of the same CA get a link. Raises ListenError, KeysError.
    """
    host, port = parse_address(listen)
    if tls is None and not is_loopback(host):
        raise ListenError(
            f"{listen} can be reached from other machines, and without TLS anyone there could use this worker;"
            " run `splitwise keys --out DIR --host NAME` and start again with `--tls DIR`, or listen on 127.0.0.1"
        )
    await _check_free(host, port)
    server = Server(handler, max_links=max_links, max_frame_bytes=max_frame_bytes)
    await server.start(host, port, tls)
    return server


async def _check_free(host: str, port: int) -> None:
    """Binds and lets go, for the operating system's reason, which gRPC keeps to itself."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, where in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
    except OSError as error:
        raise ListenError(
            f"cannot listen on {show_address(host, port)}: {error.strerror or error};"
            " give another address, or port 0 for any free port"
        ) from error


def _options(max_frame_bytes: int) -> list[tuple[str, int]]:
    """What both ends of a link set alike."""
    return [
        ("grpc.max_send_message_length", max_frame_bytes + len(_ESCAPE)),
        ("grpc.max_receive_message_length", max_frame_bytes + len(_ESCAPE)),
        ("grpc.keepalive_time_ms", round(PING_EVERY_S * 1e3)),
        ("grpc.keepalive_timeout_ms", round(DEAD_AFTER_S * 1e3)),  # only TCP's; pings have their own:
        ("grpc.http2.ping_timeout_ms", round(STUCK_AFTER_S * 1e3)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 200),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.server_handshake_timeout_ms", round(HANDSHAKE_S * 1e3)),
        ("grpc.so_reuseport", 0),
    ]


def _read_tls(tls: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """(ca, certificate, key), checked, for gRPC says nothing helpful of files that do not fit."""
    check_files(tls)
    return Path(tls.ca).read_bytes(), Path(tls.certificate).read_bytes(), Path(tls.key).read_bytes()


def _plain_peer(peer: str) -> str:
    """`127.0.0.1:4711` from gRPC's `ipv4:127.0.0.1:4711`."""
    return unquote(peer).partition(":")[2]
