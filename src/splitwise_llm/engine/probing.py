"""What a link to a worker carries, measured with messages of the engine's own kind over the link it would use.

It does not know what makes a link slow; what the software at both ends takes is measured on loopback, and taken off.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median

from splitwise_llm.errors import LinkDied, PeerMismatch, ProtocolError
from splitwise_llm.spec import LinkSpec
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Hello, Ping, Pong, Welcome, pack, unpack
from splitwise_llm.wire.sequence import Sequenced

ECHOES = 15
LONG_ENOUGH_S = 0.2
FIRST_BYTES, MOST_BYTES = 1 << 14, 8 << 20
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Probe:
    """What a link did: the time of an echo without payload, and the rates of payloads each way."""

    echo_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def link(self, loopback_echo_s: float = 0.0) -> LinkSpec:
        """The link without the software at its ends, whose echo on loopback takes so long; in round numbers."""
        up, down = (float(f"{8 * rate:.4g}") / 8 for rate in (self.up_bytes_per_s, self.down_bytes_per_s))
        return LinkSpec(round(max(self.echo_s - loopback_echo_s, 0.0), 5), up, down)


async def probe(link: Link, fingerprint: str) -> Probe:
    """Measure a freshly opened link to a worker that holds this model. Raises PeerError."""
    link = Sequenced(link)  # as the worker's end is
    await link.send(pack(Hello(messages.PROTOCOL_VERSION, fingerprint)))
    welcome = await _said(link)
    if not isinstance(welcome, Welcome):
        raise ProtocolError(f"{link.peer} sent {type(welcome).__name__}, expected Welcome")
    if (welcome.protocol, welcome.fingerprint) != (messages.PROTOCOL_VERSION, fingerprint):
        raise PeerMismatch(
            f"{link.peer} holds model {welcome.fingerprint} and speaks protocol {welcome.protocol}, this device "
            f"{fingerprint} and {messages.PROTOCOL_VERSION}; start both with the same --model and version"
        )
    most = min(MOST_BYTES, min(link.max_frame_bytes, welcome.max_frame_bytes) // 2)
    echoes = [await _echo(link, 0, 0) for _ in range(ECHOES)]
    echo_s = median(echoes)
    return Probe(echo_s, await _rate(link, echo_s, most, up=True), await _rate(link, echo_s, most, up=False))


async def _rate(link: Link, echo_s: float, most: int, up: bool) -> float:
    """Bytes per second of payloads so large that they take a while: the median of three."""
    size = min(FIRST_BYTES, most)

    async def carrying_s() -> float:
        return max(await _echo(link, size if up else 0, 0 if up else size) - echo_s, 1e-7)

    while await carrying_s() < LONG_ENOUGH_S and size < most:
        size = min(2 * size, most)
    return min(size / median([await carrying_s() for _ in range(3)]), 1e11)


async def _echo(link: Link, up_bytes: int, down_bytes: int) -> float:
    """Seconds until a ping of so many bytes is answered with so many."""
    start_s = time.monotonic()
    await link.send(pack(Ping(down_bytes), bytes(up_bytes)))
    said = await _said(link)
    if not isinstance(said, Pong):
        raise ProtocolError(f"{link.peer} sent {type(said).__name__}, expected Pong")
    return time.monotonic() - start_s


async def _said(link: Link) -> messages.Header:
    try:
        async with asyncio.timeout(ANSWER_S):
            frame = await link.receive()
    except TimeoutError:
        raise LinkDied(f"{link.peer} did not answer for {ANSWER_S:g} s") from None
    if frame is None:
        raise LinkDied(f"{link.peer} closed the link; see its log")
    return unpack(frame)[0]
