"""Numbers, checksums and times on frames, over any link. It refuses to know what a frame says, and never reconnects.

TCP numbers its bytes already; this layer is for what lies beyond it: proxies, radios and our own fault
injection that repeat, swap, lose or damage whole frames, and for the sender's clock that telemetry needs.
"""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from collections.abc import Callable
from typing import NoReturn

from splitwise_llm.errors import LinkDied
from splitwise_llm.units import show_bytes
from splitwise_llm.wire.link import Link, refuse_oversize

_HEADER = struct.Struct("<IId")  # number, CRC-32 of number, time and frame, sender's time in seconds
_COVERED = struct.Struct("<Id")
_WRAP = 1 << 32
HEADER_BYTES = _HEADER.size
"""What each frame costs more on the wire: 16."""

MAX_WAITING_FRAMES = 4096
MAX_WAITING_BYTES = 64 * 2**20
"""Bounds of what waits behind a frame that has not come; a link that exceeds one is dead."""

GAP_S = 1.0
"""How long later frames wait for one that is missing before it counts as lost, unless told otherwise."""


class Sequenced(Link):
    """`link` with frames that come out once, whole and in the order sent, or not at all; both ends wrap theirs.

    `receive` drops a frame that it has seen (`duplicates`), keeps one that is early until those before it
    have come (`reordered`), and raises LinkDied for one that is damaged, for one that does not come within
    `gap_s` seconds of waiting after a later one, and when more waits than the bounds above. The link is dead from then
    on: `send` and `receive` raise the same again, and it is the caller's to close it and to open another.
    A `send` that was cancelled may leave a hole in the numbers; it is withdrawn with a frame that says so.
    """

    on_arrival: Callable[[float, float, int], None] | None = None
    """Called as each undamaged frame comes in, whatever its place in the order, with the sender's time and
    one's own (`now_s` of either machine, seconds) and the bytes with header."""

    def __init__(self, link: Link, *, gap_s: float = GAP_S, now_s: Callable[[], float] = time.monotonic) -> None:
        self.peer, self.lives_on_loop, self.gap_s = link.peer, link.lives_on_loop, gap_s
        self._now_s = now_s
        self.sent_bytes = self.received_bytes = 0  # headers included; sent: handed over, arrived or not
        self.duplicates = self.reordered = 0  # frames
        self.received_at_s = self._now_s()
        """One's own time when the last frame came in; when none has, of the beginning."""
        self._link = link
        self._next = 0  # number of the next frame sent
        self._expected = 0  # and of the next one given out
        self._waiting: dict[int, bytes | None] = {}  # by number; None: withdrawn
        self._waiting_bytes = 0
        self._patience_s = gap_s  # how much longer `receive` waits for `_expected` while others wait behind it
        self._dead: str | None = None
        self._withdrawals: set[asyncio.Task[None]] = set()

    @property
    def max_frame_bytes(self) -> int:
        """The limit of the link below less the header; setting it sets that one."""
        return self._link.max_frame_bytes - HEADER_BYTES

    @max_frame_bytes.setter
    def max_frame_bytes(self, limit: int) -> None:
        self._link.max_frame_bytes = limit + HEADER_BYTES

    async def send(self, frame: bytes) -> None:
        refuse_oversize(frame, self.max_frame_bytes)
        if self._dead is not None:
            raise LinkDied(self._dead)
        number, self._next = self._next, (self._next + 1) % _WRAP
        message = _seal(number, self._now_s(), frame)
        self.sent_bytes += len(message)
        try:
            await self._link.send(message)
        except LinkDied:
            raise
        except BaseException:  # cancelled: nobody knows whether the link took it
            withdrawal = asyncio.create_task(self._withdraw(number))
            self._withdrawals.add(withdrawal)
            withdrawal.add_done_callback(self._withdrawals.discard)
            raise

    async def receive(self) -> bytes | None:
        while True:
            if self._expected in self._waiting:
                frame = self._waiting.pop(self._expected)
                self._waiting_bytes -= len(frame or b"")
                self._advance()
                if frame is not None:
                    return frame
                continue
            if self._dead is not None:
                raise LinkDied(self._dead)
            message = await self._link.receive() if not self._waiting else await self._before_given_up()
            if message is None:
                if self._waiting:
                    self._die(f"{self.peer} has closed the link, but frame {self._expected} before that never came")
                return None
            number, sent_s, frame = self._open(message)
            if number == self._expected:
                self._advance()
                if sent_s >= 0:
                    return frame
            else:
                self._out_of_turn(number, frame if sent_s >= 0 else None)

    async def close(self) -> None:
        if self._withdrawals:  # frames behind the hole still have to arrive
            await asyncio.wait(self._withdrawals, timeout=self.gap_s)
        for withdrawal in self._withdrawals:
            withdrawal.cancel()
        self._waiting.clear()
        await self._link.close()

    async def break_off(self, why: str) -> None:
        self._dead = self._dead or why
        for withdrawal in self._withdrawals:
            withdrawal.cancel()
        self._waiting.clear()
        await self._link.break_off(why)

    async def _withdraw(self, number: int) -> None:
        try:
            message = _seal(number, -self._now_s(), b"")
            self.sent_bytes += len(message)
            await self._link.send(message)
        except LinkDied:
            pass  # then nobody misses the number

    async def _before_given_up(self) -> bytes | None:
        """The next message while frames wait for a missing one, for which there is a time limit."""
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        try:
            async with asyncio.timeout(max(0.0, self._patience_s)):
                return await self._link.receive()
        except TimeoutError:
            self._die(f"frame {self._expected} from {self.peer} was lost; {len(self._waiting)} later ones have come")
        finally:
            self._patience_s -= loop.time() - since_s  # time in which nobody called `receive` does not count

    def _open(self, message: bytes) -> tuple[int, float, bytes]:
        """(number, sender's time, frame) of a message that has just come in. Raises LinkDied for a damaged one."""
        if len(message) < HEADER_BYTES:
            self._die(f"a frame from {self.peer} arrived damaged: {len(message)} bytes are too short for its header")
        number, checksum, sent_s = _HEADER.unpack_from(message)
        frame = message[HEADER_BYTES:]
        if zlib.crc32(frame, zlib.crc32(_COVERED.pack(number, sent_s))) != checksum:
            self._die(f"a frame from {self.peer} arrived damaged: its checksum does not fit its {len(frame)} bytes")
        self.received_bytes += len(message)
        self.received_at_s = self._now_s()
        if self.on_arrival is not None:
            self.on_arrival(abs(sent_s), self.received_at_s, len(message))
        return number, sent_s, frame

    def _out_of_turn(self, number: int, frame: bytes | None) -> None:
        if (number - self._expected) % _WRAP >= _WRAP // 2 or number in self._waiting:
            self.duplicates += 1
            return
        self.reordered += 1
        if not self._waiting:
            self._patience_s = self.gap_s
        self._waiting[number] = frame
        self._waiting_bytes += len(frame or b"")
        if len(self._waiting) > MAX_WAITING_FRAMES or self._waiting_bytes > MAX_WAITING_BYTES:
            self._die(
                f"frame {self._expected} from {self.peer} has not come, but {len(self._waiting)} later ones"
                f" ({show_bytes(self._waiting_bytes)}) have; that is more than may wait"
            )

    def _advance(self) -> None:
        self._expected = (self._expected + 1) % _WRAP
        self._patience_s = self.gap_s

    def _die(self, why: str) -> NoReturn:
        self._dead = why
        self._waiting.clear()
        raise LinkDied(why)


def _seal(number: int, sent_s: float, frame: bytes) -> bytes:
    """A frame as it travels; a time below 0 withdraws the number, and the frame is empty."""
    checksum = zlib.crc32(frame, zlib.crc32(_COVERED.pack(number, sent_s)))
    return b"".join((_HEADER.pack(number, checksum, sent_s), frame))
