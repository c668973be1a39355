"""Real time around a `Lane`: a clock that can sleep precisely, and a queue that gives items up when they arrive.

The event loop's own timers are rounded up to whole milliseconds, which at 20 Mbit/s is a packet and a
half late, on every frame; so a small thread sleeps instead and wakes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from typing import Generic, TypeVar

from splitwise_llm.wire.shaper import Lane

QUEUE_BYTES = 4 * 2**20
UNLIMITED_FLIGHT_BYTES = 64 * 2**20

_EARLY_S = 2e-4  # about what waking a thread and the loop takes

Item = TypeVar("Item")


class LinkClock:
    """Seconds since a link came up, without those in which it was taken down by hand.

    For one event loop. It holds a thread from the first sleep until `close`. It shows `start_s` at first, so that a
    recording can be entered anywhere.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._zero_s = time.monotonic() - start_s
        self._down_since_s: float | None = None
        self._up = asyncio.Event()
        self._up.set()
        self._alarms = _Alarms()
        self._closed = False

    def now_s(self) -> float:
        """Seconds on this clock."""
        return (time.monotonic() if self._down_since_s is None else self._down_since_s) - self._zero_s

    def down(self, is_down: bool) -> None:
        """Take the link down, or up again: while it is down its time stands still, so nothing arrives."""
        if is_down and self._down_since_s is None:
            self._down_since_s = time.monotonic()
            self._up.clear()
        elif not is_down and self._down_since_s is not None:
            self._zero_s += time.monotonic() - self._down_since_s
            self._down_since_s = None
            self._up.set()

    async def sleep_until(self, when_s: float) -> None:
        """Return when the clock shows `when_s`, to about 0.2 ms, or when it is closed."""
        while not self._closed:
            if self._down_since_s is not None:
                await self._up.wait()
            elif (left_s := when_s - self.now_s()) > _EARLY_S:
                await self._alarms.sleep(left_s - _EARLY_S)
            else:
                return

    def close(self) -> None:
        """End the thread and wake whoever sleeps. Idempotent."""
        self._closed = True
        self._up.set()
        self._alarms.close()


class _Alarms:
    """One thread that sleeps until the earliest of many deadlines and wakes the loop that asked."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._count = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`, or when closed."""
        loop = asyncio.get_running_loop()
        alarm: asyncio.Future[None] = loop.create_future()
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._count), loop, alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="link-clock", daemon=True)
                self._thread.start()
            self._changed.notify()
        await alarm

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while self._due or not self._closed:
                left_s = self._due[0][0] - time.monotonic() if self._due else None
                if not self._closed and (left_s is None or left_s > 0):
                    self._changed.wait(left_s)
                    continue
                _, _, loop, alarm = heapq.heappop(self._due)
                with contextlib.suppress(RuntimeError):  # that loop has ended, and the sleeper with it
                    loop.call_soon_threadsafe(_ring, alarm)


def _ring(alarm: asyncio.Future[None]) -> None:
    if not alarm.done():
        alarm.set_result(None)


class LaneQueue(Generic[Item]):
    """Items on their way through a lane: `put` in order, `get` each when its last byte arrives.

    `put` waits while `queue_bytes`, on top of what is in flight at full rate, have not arrived yet; one
    item of any size always finds room in an empty queue.
    """

    def __init__(self, lane: Lane, clock: LinkClock, queue_bytes: int = QUEUE_BYTES) -> None:
        self._clock = clock
        self._queue_bytes = queue_bytes
        self.carried_bytes = 0
        """All that was ever put."""
        self.reshape(lane)
        self._items: deque[tuple[float, int, Item]] = deque()  # (arrival on the clock, bytes, item)
        self._bytes = 0
        self._turn = asyncio.Lock()  # keeps waiting senders in call order
        self._changed = asyncio.Event()  # an item came or went, or the end did
        self._error: Exception | None = None

    def reshape(self, lane: Lane) -> None:
        """Carry what is put from now on as this lane does; what is on its way arrives as it would have."""
        self._lane = lane
        self._room_bytes = self._queue_bytes + min(lane.in_flight_bytes, UNLIMITED_FLIGHT_BYTES)

    async def put(self, item: Item, num_bytes: int) -> None:
        """Send an item of `num_bytes`; raises the error given to `fail`, if any."""
        async with self._turn:
            while self._bytes >= self._room_bytes and self._error is None:
                self._changed.clear()
                await self._changed.wait()
            if self._error is not None:
                raise self._error
            arrival_s = self._lane.deliver_at(self._clock.now_s(), num_bytes)
            self._items.append((arrival_s, num_bytes, item))
            self._bytes += num_bytes
            self.carried_bytes += num_bytes
            self._changed.set()

    async def get(self) -> Item:
        """The next item, once it has arrived; when none is left, raises the error given to `fail`, if any."""
        while True:
            if self._items:
                await self._clock.sleep_until(self._items[0][0])
                if self._items:
                    break
            elif self._error is not None:
                raise self._error
            else:
                self._changed.clear()
                await self._changed.wait()
        _, num_bytes, item = self._items.popleft()
        self._bytes -= num_bytes
        self._changed.set()
        return item

    def fail(self, error: Exception, at_once: bool = False) -> None:
        """Every `put` raises `error` from now on, and `get` when nothing is left; `at_once` forgets what is."""
        self._error = error
        if at_once:
            self._items.clear()
        self._changed.set()
