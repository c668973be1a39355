"""The first words with a worker, and what an answer must be. It does not know what the link is wanted for."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from splitwise_llm import errors
from splitwise_llm.errors import (
    LinkDied,
    PeerMismatch,
    ProtocolError,
    SpecError,
    SplitwiseError,
    UserError,
    WorkerFailed,
)
from splitwise_llm.spec import DeviceSpec, Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Failed, Header, Hello, Ping, Pong, Welcome, pack, unpack

OPENING_S = 600.0
"""Loading a large share from a slow disk takes a while; keepalive finds a dead worker sooner."""
ECHOES, ECHOING_S = 5, 0.1
"""The fastest of so many is the RTT (the first message over a new link takes 2 ms on loopback, later ones 0.2); of
fewer once they took so long: beside a long RTT what disturbs one is small."""


@dataclass(frozen=True, slots=True)
class Greeted:
    """A worker that answered: what it said, what it can do (None: not measured), and the fastest way there and back
    so far (s)."""

    welcome: Welcome
    figures: DeviceSpec | None
    rtt_s: float

    def again(self, other: Greeted) -> Greeted:
        """The same worker greeted later, with fewer echoes: the figures are new, the RTT is not."""
        return Greeted(other.welcome, other.figures, self.rtt_s)


async def greet(link: Link, fingerprint: str, echoes: int = 0) -> Greeted:
    """Say hello to a worker that should hold this model, and time some echoes. Raises PeerError."""
    start = time.monotonic()
    await link.send(pack(Hello(messages.PROTOCOL_VERSION, fingerprint)))
    welcome = await answer(link, Welcome)
    times = [time.monotonic() - start]
    if welcome.protocol != messages.PROTOCOL_VERSION:
        raise PeerMismatch(
            f"{link.peer} speaks protocol {welcome.protocol}, "
            f"this device {messages.PROTOCOL_VERSION}; install the same version on both"
        )
    if welcome.fingerprint != fingerprint:
        raise PeerMismatch(
            f"{link.peer} holds model {welcome.fingerprint}, this device {fingerprint}; "
            "start both with the same --model"
        )
    if welcome.dtype not in set(Dtype) or welcome.weights not in set(Weights):
        raise ProtocolError(f"{link.peer} computes in unknown formats {welcome.dtype}, {welcome.weights}")
    figures = _figures(welcome, link.peer)
    link.max_frame_bytes = min(link.max_frame_bytes, welcome.max_frame_bytes)
    while len(times) <= echoes and sum(times) < ECHOING_S:
        start = time.monotonic()
        await link.send(pack(Ping(0)))
        await answer(link, Pong)
        times.append(time.monotonic() - start)
    return Greeted(welcome, figures, min(times))


def _figures(welcome: Welcome, peer: str) -> DeviceSpec | None:
    """What a worker says it can do. Raises ProtocolError for figures that cannot be."""
    if welcome.figures is None:
        return None
    try:
        return DeviceSpec(**welcome.figures)  # type: ignore[arg-type]
    except (TypeError, SpecError) as error:
        raise ProtocolError(f"{peer} gives figures of itself that cannot be: {error}") from error


async def answer(link: Link, kind: type[messages.H]) -> messages.H:
    """The worker's next word, which must be of this kind. Raises what the worker says it met, or PeerError."""
    try:
        async with asyncio.timeout(OPENING_S):
            frame = await link.receive()
    except TimeoutError:
        raise LinkDied(f"{link.peer} did not answer for {OPENING_S:g} s") from None
    header = unpack(frame)[0] if frame is not None else None
    if not isinstance(header, kind):
        raise unexpected(link, header, kind)
    return header


def unexpected(link: Link, header: Header | None, wanted: type) -> SplitwiseError:
    """The error for anything but the answer that was due; a worker's own error keeps its class if it is the user's."""
    if header is None:
        return LinkDied(f"{link.peer} closed the link; see its log")
    if not isinstance(header, Failed):
        return ProtocolError(f"{link.peer} sent {type(header).__name__}, expected {wanted.__name__}")
    kind = getattr(errors, header.error, None)
    if isinstance(kind, type) and issubclass(kind, UserError | PeerMismatch):
        return kind(f"{link.peer}: {header.message}")
    return WorkerFailed(f"{link.peer} ended the session: {header.message}", header.retry_after_s)
