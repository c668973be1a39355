"""The in-memory twin of the network link: the same promises, no socket and no clock; for tests and demos."""

from __future__ import annotations

import asyncio
from collections import deque

from splitwise_llm.errors import LinkDied
from splitwise_llm.wire.link import MAX_FRAME_BYTES, Link, refuse_oversize


class FrameQueue:
    """Frames that have arrived and wait to be received, then how the link ended.

    The gRPC link is fed through one too, so both kinds end alike.
    """

    def __init__(self) -> None:
        self.waiting_bytes = 0
        self._frames: deque[bytes] = deque()
        self._end: str | None = None
        self._died = False
        self._more = asyncio.Event()
        self._less = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def put(self, frame: bytes) -> None:
        """One more frame; dropped if the end has come."""
        if self._end is None:
            self._frames.append(frame)
            self.waiting_bytes += len(frame)
            self._more.set()

    def end(self, why: str, *, died: bool = False, drop: bool = False) -> None:
        """Nothing follows what waits here (which may be dropped, too). Only the first reason counts."""
        if self._end is None:
            self._end, self._died = why, died
        if drop:
            self._frames.clear()
            self.waiting_bytes = 0
        self._more.set()
        self._less.set()

    def check_open(self) -> None:
        """Raises LinkDied with the reason once the end has come, however it came."""
        if self._end is not None:
            raise LinkDied(self._end)

    async def take(self) -> bytes | None:
        """The next frame, or None after an end in good order. Raises LinkDied after any other end."""
        while not self._frames:
            if self._died:
                self.check_open()
            if self._end is not None:
                return None
            self._more.clear()
            await self._more.wait()
        frame = self._frames.popleft()
        self.waiting_bytes -= len(frame)
        self._less.set()
        return frame

    async def room(self, limit_bytes: int) -> None:
        """Returns once fewer than `limit_bytes` wait here or the end has come."""
        while self.waiting_bytes >= limit_bytes and not self.ended:
            self._less.clear()
            await self._less.wait()


class MemoryLink(Link):
    """One end of a pair made by `memory_pair`. Nothing holds the sender back."""

    lives_on_loop = True
    _other: MemoryLink

    def __init__(self, peer: str, max_frame_bytes: int) -> None:
        self.peer = peer
        self.max_frame_bytes = max_frame_bytes
        self._inbox = FrameQueue()

    async def send(self, frame: bytes) -> None:
        refuse_oversize(frame, self.max_frame_bytes)
        self._inbox.check_open()
        self._other._inbox.put(frame)
        await asyncio.sleep(0)  # as on a real link, others get a turn

    async def receive(self) -> bytes | None:
        return await self._inbox.take()

    async def close(self) -> None:
        self._inbox.end(f"the link to {self.peer} was closed on this side", drop=True)
        self._other._inbox.end(f"{self._other.peer} has closed the link")

    async def break_off(self, why: str) -> None:
        self.kill()

    def kill(self) -> None:
        """Break the link for both ends, without a good-bye; frames on the way are lost."""
        for end in (self, self._other):
            end._inbox.end(f"the link to {end.peer} broke", died=True, drop=True)


def memory_pair(
    names: tuple[str, str] = ("device", "worker"), *, max_frame_bytes: int = MAX_FRAME_BYTES
) -> tuple[MemoryLink, MemoryLink]:
    """The two ends of a new link; the first belongs to `names[0]`, so its `peer` is `names[1]`."""
    first = MemoryLink(names[1], max_frame_bytes)
    second = MemoryLink(names[0], max_frame_bytes)
    first._other, second._other = second, first
    return first, second
