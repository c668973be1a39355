"""Which faults act now, and what waits because of them; it does not know what a link or a connection is.

`FaultyLink`, `FaultyConnect` (wire/faulty.py) and `Proxy` (wire/proxy.py) ask `Faults` and do what it says.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from splitwise_llm.traces import Direction
from splitwise_llm.wire.faults import Fault, Injection, Layer, refuse
from splitwise_llm.wire.pacing import QUEUE_BYTES

Item = TypeVar("Item")


class Target(Protocol):
    """What a reset can hit: a link or a connection."""

    def reset(self) -> None:
        """Break at once, so that both ends see it."""


class Faults:
    """A schedule as it runs, and what is injected by hand: which faults act now, and which have `fired`.

    One `Faults` belongs to one machine's link and outlives its reconnections: a link that is dropped for 3 s stays
    so for a new connection. Times count from `begin`, which the first connection calls. A fault that happens once
    waits until there is something to hit. For one event loop; `now_s` is that loop's clock, in seconds.
    """

    def __init__(
        self,
        schedule: Iterable[Injection] = (),
        *,
        layer: Layer = Layer.LINK,
        now_s: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        self.fired: Counter[Fault] = Counter()
        """How often each has hit something: a frame (or, in a proxy, a chunk of bytes), a link, an attempt."""
        self.now_s = now_s
        self._layer = layer
        self._random = random.Random(seed)
        self._schedule: list[Injection] = []
        self._planned: list[tuple[float, int, Injection]] = []  # (due at, due when so many frames passed, what)
        self._acting: list[tuple[float, Injection]] = []  # (until, what)
        self._owed: list[Injection] = []  # due, happens once, and has hit nothing yet
        self._frames = 0
        self._begun = False
        self._targets: set[Target] = set()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        for injection in schedule:
            refuse(injection, layer)
            self._schedule.append(injection)

    def begin(self) -> None:
        """Start the schedule's clock; later calls do nothing."""
        if not self._begun:
            self._begun = True
            for injection in self._schedule:
                self._plan(injection)
            self._update()
            self._arm()

    def inject(self, injection: Injection) -> None:
        """Plan one more, its `after` counted from now. Raises SpecError when this layer cannot do it."""
        refuse(injection, self._layer)
        self._plan(injection)
        self._update()
        self._arm()

    def heal(self) -> None:
        """End whatever acts, and forget whatever was to come."""
        self._begun = True
        self._planned, self._acting, self._owed = [], [], []
        self._tell()

    def active(self, fault: Fault) -> Injection | None:
        """What acts now of a fault that lasts; the first, if there are several."""
        if not self._planned and not self._acting:
            return None
        self._update()
        return next((injection for _, injection in self._acting if injection.fault is fault), None)

    def dropping(self, way: Direction) -> Fault | None:
        """What makes all that goes this way vanish now."""
        faults = (Fault.DROP_UP if way == "up" else Fault.DROP_DOWN, Fault.DROP_BOTH)
        return next((fault for fault in faults if self.active(fault)), None)

    def slowing(self) -> bool:
        """Whether anything is to arrive later now."""
        return self.active(Fault.CRAWL) is not None or self.active(Fault.DELAY_SPIKE) is not None

    def corrupted(self, data: bytes) -> bytes:
        """`data`, with one bit flipped if a corruption is due."""
        self._update()
        due = next((injection for injection in self._owed if injection.fault is Fault.CORRUPT), None)
        if due is None or not data:
            return data
        self._owed.remove(due)
        self.fired[Fault.CORRUPT] += 1
        changed = bytearray(data)
        changed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def passed(self) -> None:
        """One more frame has been seen; for `after_frames`."""
        self._frames += 1
        if self._planned:
            self._update()

    def join(self, target: Target) -> None:
        """A link or connection that a reset hits, from now on; at once, if one is due."""
        self.begin()
        self._targets.add(target)
        self._update()

    def leave(self, target: Target) -> None:
        """It has ended. Idempotent."""
        self._targets.discard(target)

    async def wait(self, until_s: float = math.inf) -> None:
        """Return at `until_s`, or as soon as something begins, ends or is healed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if until_s == math.inf else max(0.0, until_s - self.now_s())):
                await self._changed.wait()

    def _plan(self, injection: Injection) -> None:
        frames = self._frames + (injection.after_frames or 0)
        self._planned.append((self.now_s() + injection.after_s, frames, injection))

    def _update(self) -> None:
        """Let what is due begin and what is over end; called by every question, and by a timer."""
        now_s = self.now_s()
        due = [one for one in self._planned if one[0] <= now_s and one[1] <= self._frames]
        for one in due:
            self._planned.remove(one)
            at_s, _, injection = one
            if injection.fault.lasts:
                since_s = at_s if injection.after_frames is None else now_s
                self._acting.append((math.inf if injection.for_s is None else since_s + injection.for_s, injection))
            else:
                self._owed.append(injection)
        acting = [one for one in self._acting if one[0] > now_s]
        changed = bool(due) or len(acting) < len(self._acting)
        self._acting = acting
        self._reset_targets()
        if changed:
            self._tell()
        elif self._timer is None:
            self._arm()

    def _reset_targets(self) -> None:
        due = next((injection for injection in self._owed if injection.fault is Fault.RESET), None)
        if due is not None and self._targets:
            self._owed.remove(due)
            for target in tuple(self._targets):
                self.leave(target)
                self.fired[Fault.RESET] += 1
                target.reset()

    def _tell(self) -> None:
        """Wake who waits."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._arm()

    def _arm(self) -> None:
        """See to it that the next change is noticed in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        times = [at_s for at_s, frames, _ in self._planned if frames <= self._frames]
        times += [until_s for until_s, _ in self._acting if until_s < math.inf]
        with contextlib.suppress(RuntimeError):  # no loop runs yet: whoever joins later comes here again
            if times:
                self._timer = asyncio.get_running_loop().call_later(max(0.0, min(times) - self.now_s()), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._update()


class LateQueue(Generic[Item]):
    """Items of one direction in their order, later by what crawl and delay spike cost while they act.

    Takes `QUEUE_BYTES` and one item on top, then `put` waits.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._items: deque[tuple[float, int, Item]] = deque()  # (entered at, bytes, item)
        self._bytes = 0
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()  # keeps waiting senders in call order
        self._ended = False

    @property
    def is_empty(self) -> bool:
        return not self._items

    async def put(self, item: Item, num_bytes: int) -> None:
        async with self._turn:
            while self._bytes >= QUEUE_BYTES and not self._ended:
                self._changed.clear()
                await self._changed.wait()
            self._items.append((self._faults.now_s(), num_bytes, item))
            self._bytes += num_bytes
            self._changed.set()

    def end(self) -> None:
        """Nobody will `get` any more: whoever waits to `put` need not."""
        self._ended = True
        self._changed.set()

    async def get(self) -> Item:
        """The next item when it is due; one task only. Cancelled, it takes nothing."""
        while not self._items:
            self._changed.clear()
            await self._changed.wait()
        entered_s, num_bytes, item = self._items[0]
        await self._crawl(num_bytes)
        await self._delay(entered_s)
        self._items.popleft()
        self._bytes -= num_bytes
        self._changed.set()
        return item

    async def _crawl(self, num_bytes: int) -> None:
        left_bytes = float(num_bytes)
        while left_bytes > 0 and (crawl := self._faults.active(Fault.CRAWL)) is not None:
            if left_bytes == num_bytes:
                self._faults.fired[Fault.CRAWL] += 1
            since_s = self._faults.now_s()
            await self._faults.wait(since_s + left_bytes / crawl.rate_bytes_per_s)
            left_bytes -= (self._faults.now_s() - since_s) * crawl.rate_bytes_per_s

    async def _delay(self, entered_s: float) -> None:
        counted = False
        while (spike := self._faults.active(Fault.DELAY_SPIKE)) is not None:
            due_s = entered_s + spike.delay_s
            if self._faults.now_s() >= due_s:
                return
            self._faults.fired[Fault.DELAY_SPIKE] += not counted
            counted = True
            await self._faults.wait(due_s)
