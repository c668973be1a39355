"""Links that break on purpose: any `Link`, or whatever dials one, under `Faults`. It does not know what is said.

It goes between the raw (or shaped) link and `Sequenced`, on the device's side; "up" is what this side sends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from splitwise_llm.errors import LinkDied, SplitwiseError, Unreachable
from splitwise_llm.traces import Direction
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.injector import Faults, LateQueue
from splitwise_llm.wire.link import Link, refuse_oversize
from splitwise_llm.wire.memory import FrameQueue
from splitwise_llm.wire.pacing import QUEUE_BYTES

REORDER_HOLD_S = 0.05
"""How long a frame that is to arrive after the next one waits for a next one."""

LINGER_S = 5.0
ON_PURPOSE = "it was reset on purpose"
"""How long `close` waits for frames that crawl before it breaks the link off."""


_Item = bytes | LinkDied | None
"""A frame, or how the link ended: None in good order."""


class FaultyLink(Link):
    """`link` under `faults`; with none acting, the same link. Made in a running loop, and closed in it.

    - reset: both ends see LinkDied at once (where `link` cannot be broken off, the far end sees a good-bye).
    - drop-up, drop-down, drop-both: frames vanish, and so does the far end's good-bye or death until it is over.
      A `close` meanwhile breaks the link off: its good-bye could not get through.
    - crawl, delay-spike: frames arrive as late as they would; those still waiting when it is over leave at once.
    - duplicate: each frame twice. reorder: a frame leaves after the next one, or after 50 ms if there is none.
    - corrupt: one bit of the next frame, either way.

    Connections are refused by `FaultyConnect`, not here.
    """

    lives_on_loop = True

    def __init__(self, link: Link, faults: Faults) -> None:
        self.peer, self.faults = link.peer, faults
        self._link = link
        self._up: LateQueue[_Item] = LateQueue(faults)
        self._down: LateQueue[_Item] = LateQueue(faults)
        self._inbox = FrameQueue()
        self._send_error: str | None = None
        self._closed = False
        self._breaking: asyncio.Task[None] | None = None
        self._carriers = [
            asyncio.create_task(self._read()),
            asyncio.create_task(self._carry("down", self._down, self._arrive)),
            asyncio.create_task(self._carry("up", self._up, self._leave)),
        ]
        faults.join(self)

    @property
    def max_frame_bytes(self) -> int:
        return self._link.max_frame_bytes

    @max_frame_bytes.setter
    def max_frame_bytes(self, limit: int) -> None:
        self._link.max_frame_bytes = limit

    @property
    def fired(self) -> Counter[Fault]:
        """How often each fault has hit something, on this link and others of the same `faults`."""
        return self.faults.fired

    def inject(self, injection: Injection) -> None:
        """Let it happen, its `after` counted from now."""
        self.faults.inject(injection)

    def heal(self) -> None:
        """End whatever acts, and forget whatever was to come."""
        self.faults.heal()

    async def send(self, frame: bytes) -> None:
        refuse_oversize(frame, self.max_frame_bytes)
        self._inbox.check_open()
        if self._send_error is not None:
            raise LinkDied(self._send_error)
        await self._up.put(frame, len(frame))
        await asyncio.sleep(0)  # it leaves now, even if the caller goes on to block the loop
        self._inbox.check_open()

    async def receive(self) -> bytes | None:
        return await self._inbox.take()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.faults.leave(self)
        self._inbox.end(f"the link to {self.peer} was closed on this side", drop=True)
        reading, down, up = self._carriers
        down.cancel()
        try:
            if self._breaking is None:
                async with asyncio.timeout(LINGER_S):
                    await self._up.put(None, 0)
                    await asyncio.wait([up])
            else:
                await self._breaking
        except TimeoutError:
            await self._link.break_off(ON_PURPOSE)
        finally:
            self._up.end()
            for carrier in (reading, up):
                carrier.cancel()
            await asyncio.gather(*self._carriers, return_exceptions=True)
            await self._link.close()

    async def break_off(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            self.reset()
            await asyncio.gather(*self._carriers, return_exceptions=True)
        if self._breaking is not None:
            await self._breaking

    def reset(self) -> None:
        """Break the link for both ends, now."""
        self.faults.leave(self)
        if self._breaking is None:
            for carrier in self._carriers:
                carrier.cancel()
            self._up.end()
            self._inbox.end(f"the link to {self.peer} broke: it was reset on purpose", died=True)
            self._breaking = asyncio.create_task(self._link.break_off(ON_PURPOSE))

    async def _read(self) -> None:
        """Take in what comes, so that it enters this layer when it comes."""
        end: LinkDied | None = None
        try:
            while (frame := await self._link.receive()) is not None:
                await self._down.put(frame, len(frame))
        except SplitwiseError as error:
            end = LinkDied(str(error))
        await self._down.put(end, 0)

    async def _carry(
        self,
        way: Direction,
        queue: LateQueue[_Item],
        let_out: Callable[[_Item], Awaitable[None]],
    ) -> None:
        """Move frames out of a queue until its end has come out, doing to them what is to be done."""
        held: list[bytes] = []
        while True:
            item: _Item = b""
            frames: list[bytes] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REORDER_HOLD_S if held else None):
                    item = await queue.get()
                    frames = self._hit(way, item) if isinstance(item, bytes) else []
            if frames and not held and self.faults.active(Fault.REORDER):
                held = frames
                continue
            if frames and held:
                self.fired[Fault.REORDER] += 1
            for frame in (*frames, *held):
                await let_out(frame)
                self.faults.passed()
            held = []
            if not isinstance(item, bytes):
                await let_out(item)
                return

    def _hit(self, way: Direction, frame: bytes) -> list[bytes]:
        """What becomes of a frame: nothing, itself, something damaged, or two of it."""
        dropping = self.faults.dropping(way)
        if dropping is not None:
            self.fired[dropping] += 1
            frames = []
        else:
            frame = self.faults.corrupted(frame)
            frames = [frame]
            if self.faults.active(Fault.DUPLICATE):
                self.fired[Fault.DUPLICATE] += 1
                frames = [frame, frame]
        return frames

    async def _leave(self, item: _Item) -> None:
        try:
            if isinstance(item, bytes):
                await self._link.send(item)
            elif self.faults.dropping("up"):
                await self._link.break_off(ON_PURPOSE)
            else:
                await self._link.close()
        except SplitwiseError as error:  # what `receive` says of it comes from the link, in its order
            self._send_error = str(error)

    async def _arrive(self, item: _Item) -> None:
        if isinstance(item, bytes):
            self._inbox.put(item)
            await self._inbox.room(QUEUE_BYTES)
            return
        while self.faults.dropping("down"):
            await self.faults.wait()
        if item is None:
            self._inbox.end(f"{self.peer} has closed the link")
        else:
            self._inbox.end(str(item), died=True)


Connect = Callable[[str], Awaitable[Link]]
"""Opens a link to the machine of that name; raises Unreachable, among others."""


class FaultyConnect:
    """`connect` with faults for some machines, by name; each keeps its `Faults` from one connection to the next.

        connect = FaultyConnect(reach, {"cloud": Faults(parse_schedule("drop-both after=2s for=3s", Layer.LINK))})
        link = Sequenced(await connect("cloud"))
        connect.faults["cloud"].inject(Injection(Fault.RESET))
        assert connect.faults["cloud"].fired[Fault.RESET]

    A schedule's time counts from the first attempt to connect. While connect-refused acts, an attempt raises
    Unreachable; while frames are dropped, a connection is made and nothing comes through it.
    """

    def __init__(self, connect: Connect, faults: Mapping[str, Faults]) -> None:
        self.faults = dict(faults)
        self._connect = connect

    async def __call__(self, name: str) -> Link:
        faults = self.faults.get(name)
        if faults is None:
            return await self._connect(name)
        faults.begin()
        if faults.active(Fault.CONNECT_REFUSED):
            faults.fired[Fault.CONNECT_REFUSED] += 1
            raise Unreachable(f"{name} refused the connection, on purpose ({Fault.CONNECT_REFUSED})")
        return FaultyLink(await self._connect(name), faults)
