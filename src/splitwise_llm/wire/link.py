"""The narrow waist between machines: a link carries whole frames of bytes, in order, both ways.

gRPC, memory and shaped links are the same to their users and pass one conformance suite
(`tests/wire/test_link_conformance.py`). A link does not know what is inside a frame.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from splitwise_llm.errors import RequestError
from splitwise_llm.units import show_bytes

MAX_FRAME_BYTES = 256 * 2**20


class Link(ABC):
    """One ordered, reliable, bidirectional stream of frames between two machines.

    `send` and `receive` may run at the same time; several tasks may `send` at once (frames
    stay whole, in call order); only one task may `receive`.
    """

    peer: str
    """Who is at the other end, for messages to people: a name and an address."""

    max_frame_bytes: int
    """What `send` refuses to exceed; may be lowered when the peer says that it takes less."""

    lives_on_loop: bool = False
    """Whether frames on their way stand still while this end's event loop is busy."""

    @abstractmethod
    async def send(self, frame: bytes) -> None:
        """Hand over one frame; returns when the link has accepted it, which may be before it arrived.

        Raises LinkDied when the link has ended, RequestError when the frame exceeds the link's limit.
        """

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The next frame, or None once the peer has closed in good order. Raises LinkDied otherwise."""

    @abstractmethod
    async def close(self) -> None:
        """Say good-bye: frames already sent still arrive, then the peer's `receive` gives None. Idempotent."""

    async def break_off(self, why: str) -> None:
        """End the link at once and without a good-bye, for one that is dead already: nobody would answer it. Where a
        kind of link has no such way it is closed. Idempotent."""
        await self.close()


def refuse_oversize(frame: bytes, limit_bytes: int) -> None:
    """Raises RequestError when the frame exceeds the limit of a link; the link stays as it was."""
    if len(frame) > limit_bytes:
        raise RequestError(
            f"a frame of {len(frame)} bytes ({show_bytes(len(frame))}) exceeds the link's limit of"
            f" {limit_bytes} bytes ({show_bytes(limit_bytes)}); send it in smaller chunks"
        )


Handler = Callable[[Link], Awaitable[None]]
"""What a server runs for each link that is opened to it; the link is closed when it returns."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the certificates of mutual TLS lie: the CA, and one's own certificate and key (PEM)."""

    ca: str
    certificate: str
    key: str
