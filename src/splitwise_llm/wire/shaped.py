"""A link made slower: any `Link`, with its frames passing through two lanes in real time."""

from __future__ import annotations

import asyncio
import contextlib

from splitwise_llm.errors import LinkDied
from splitwise_llm.wire.link import Link, refuse_oversize
from splitwise_llm.wire.pacing import QUEUE_BYTES, LaneQueue, LinkClock
from splitwise_llm.wire.shaper import Lane, LinkShape


class _Over(Exception):
    """Nothing more will be received, in good order."""


class ShapedLink(Link):
    """`link` as it would be behind `shape`: what is sent goes up, what is received comes down.

    A frame counts its own length. `send` returns when the frame is queued, and waits while the queue is
    full; an error of `link` reaches `send` at once and `receive` after the frames on their way. With a
    `clock` of the caller, several links (reconnections, say) share the course of traces and outages, and
    the caller closes it; one `beside` another one, with the same clock, shares its rate with it.
    """

    lives_on_loop = True

    def __init__(
        self,
        link: Link,
        shape: LinkShape,
        clock: LinkClock | None = None,
        queue_bytes: int = QUEUE_BYTES,
        beside: ShapedLink | None = None,
    ) -> None:
        self.peer, self.max_frame_bytes = link.peer, link.max_frame_bytes
        self.clock = clock or LinkClock()
        self._own_clock = clock is None
        self._link = link
        self._lanes: tuple[Lane, Lane] = beside._lanes if beside else shape.lanes()
        up, down = self._lanes
        self._up: LaneQueue[bytes | None] = LaneQueue(up, self.clock, queue_bytes)  # None: good-bye
        self._down: LaneQueue[bytes | Exception] = LaneQueue(down, self.clock, queue_bytes)
        self._carriers: list[asyncio.Task[None]] = []
        self._closed = False  # on this side

    @property
    def is_closed(self) -> bool:
        """On this side."""
        return self._closed

    async def send(self, frame: bytes) -> None:
        refuse_oversize(frame, self.max_frame_bytes)
        if self._closed:
            raise LinkDied(f"the link to {self.peer} was closed on this side; open another one")
        self._start()
        await self._up.put(frame, len(frame))

    async def receive(self) -> bytes | None:
        self._start()
        try:
            item = await self._down.get()
            if isinstance(item, bytes):
                return item
            self._up.fail(LinkDied(f"{self.peer} has closed the link") if isinstance(item, _Over) else item)
            self._down.fail(item)
            raise item
        except _Over:
            return None

    async def close(self) -> None:
        """Say good-bye behind the frames already sent; returns when it got through. Cancelled, it gives up on them."""
        if self._closed:
            return
        self._closed = True
        self._start()
        try:
            with contextlib.suppress(Exception):  # the link died first
                await self._up.put(None, 0)
                await self._carriers[0]
        finally:
            for carrier in self._carriers:
                carrier.cancel()
            await asyncio.gather(*self._carriers, return_exceptions=True)
            self._down.fail(_Over(), at_once=True)
            if self._own_clock:
                self.clock.close()
            await self._link.close()

    async def break_off(self, why: str) -> None:
        if self._closed:
            return
        self._closed = True
        for carrier in self._carriers:
            carrier.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)
        self._up.fail(LinkDied(why), at_once=True)
        self._down.fail(LinkDied(why), at_once=True)
        if self._own_clock:
            self.clock.close()
        await self._link.break_off(why)  # the shape has no say in it: a reset is not a frame

    def _start(self) -> None:
        if not self._carriers:
            self._carriers = [asyncio.create_task(self._carry_up()), asyncio.create_task(self._carry_down())]

    async def _carry_up(self) -> None:
        try:
            while (frame := await self._up.get()) is not None:
                await self._link.send(frame)
            await self._link.close()
        except Exception as error:
            self._up.fail(error)
            if not isinstance(error, LinkDied):  # of a death `receive` learns from the link, in its order
                self._down.fail(error)

    async def _carry_down(self) -> None:
        end: Exception = _Over()
        try:
            while (frame := await self._link.receive()) is not None:
                await self._down.put(frame, len(frame))
        except Exception as error:
            self._up.fail(error)
            end = error
        with contextlib.suppress(Exception):  # failed already, and said so
            await self._down.put(end, 0)
