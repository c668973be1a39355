"""Frames come out once, whole and in order whatever the link below does to them, or the link is dead and says why."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.errors import LinkDied
from splitwise_llm.wire import sequence
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.sequence import HEADER_BYTES, Sequenced

FRAMES = st.lists(st.binary(max_size=40), min_size=1, max_size=12)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(bounded())


async def messages_of(frames: list[bytes], first: int = 0) -> list[bytes]:
    """What crosses the wire for these frames, numbered from `first`."""
    near, far = memory_pair()
    sender = Sequenced(near)
    sender._next = first
    for frame in frames:
        await sender.send(frame)
    return [await far.receive() or b"" for _ in frames]


async def receiver_of(messages: list[bytes], gap_s: float = 1.0) -> tuple[Sequenced, Link]:
    """An end to which these messages have come, and the raw far end."""
    near, far = memory_pair()
    for message in messages:
        await far.send(message)
    return Sequenced(near, gap_s=gap_s), far


class Gate(Link):
    """A link that takes nothing until it is opened; a send that is cancelled before leaves no trace."""

    def __init__(self, link: Link) -> None:
        self.peer, self.max_frame_bytes, self.link, self.open = link.peer, link.max_frame_bytes, link, asyncio.Event()

    async def send(self, frame: bytes) -> None:
        await self.open.wait()
        await self.link.send(frame)

    async def receive(self) -> bytes | None:
        return await self.link.receive()

    async def close(self) -> None:
        await self.link.close()


@settings(deadline=None)
@given(frames=FRAMES, data=st.data())
def test_in_any_order_and_however_often_frames_come_out_once_and_in_order(
    frames: list[bytes], data: st.DataObject
) -> None:
    async def scenario() -> None:
        again = data.draw(st.lists(st.integers(0, len(frames) - 1), max_size=8))
        order = data.draw(st.permutations([*range(len(frames)), *again]))
        messages = await messages_of(frames)
        link, far = await receiver_of([messages[i] for i in order])
        assert [await link.receive() for _ in frames] == frames
        await far.close()
        assert await link.receive() is None
        assert link.duplicates == len(again)
        seen: set[int] = set()
        early = 0
        for i in order:
            early += i not in seen and not all(before in seen for before in range(i))
            seen.add(i)
        assert link.reordered == early

    run(scenario)


@settings(deadline=None)
@given(frames=FRAMES, which=st.integers(0), bit=st.integers(0))
def test_any_flipped_bit_ends_the_link_after_the_frames_before_it(frames: list[bytes], which: int, bit: int) -> None:
    async def scenario() -> None:
        messages = await messages_of(frames)
        which_one = which % len(frames)
        damaged = bytearray(messages[which_one])
        damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
        link, _ = await receiver_of([*messages[:which_one], bytes(damaged), *messages[which_one + 1 :]])
        assert [await link.receive() for _ in range(which_one)] == frames[:which_one]
        for _ in range(2):
            with pytest.raises(LinkDied, match="a frame from worker arrived damaged"):
                await link.receive()
            with pytest.raises(LinkDied, match="arrived damaged"):
                await link.send(b"anyone?")

    run(scenario)


@pytest.mark.parametrize("size", range(HEADER_BYTES))
def test_a_message_without_a_whole_header_is_damaged(size: int) -> None:
    async def scenario() -> None:
        link, _ = await receiver_of([bytes(size)])
        with pytest.raises(LinkDied, match=f"arrived damaged: {size} bytes"):
            await link.receive()

    run(scenario)


def test_a_frame_that_does_not_come_though_later_ones_do_is_lost_and_the_link_dead() -> None:
    async def scenario() -> None:
        first, _, *later = await messages_of([bytes([i]) for i in range(100)])
        link, far = await receiver_of([first, later[0]], gap_s=0.1)
        assert await link.receive() == bytes([0])
        waiting = asyncio.create_task(link.receive())
        start_s = asyncio.get_running_loop().time()
        for message in later[1:]:  # others do not keep it alive
            await far.send(message)
            if waiting in (await asyncio.wait([waiting], timeout=0.02))[0]:
                break
        with pytest.raises(LinkDied, match=r"frame 1 from worker was lost; \d+ later"):
            await waiting
        assert 0.09 < asyncio.get_running_loop().time() - start_s < 1.0

    run(scenario)


def test_only_waiting_counts_as_waiting() -> None:
    async def scenario() -> None:
        messages = await messages_of([b"a", b"b"])
        link, far = await receiver_of([messages[1]], gap_s=0.05)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.receive(), 0.01)
        await asyncio.sleep(0.1)  # nobody receives
        await far.send(messages[0])
        assert [await link.receive(), await link.receive()] == [b"a", b"b"]

    run(scenario)


def test_a_good_bye_behind_a_missing_frame_is_no_good_end() -> None:
    async def scenario() -> None:
        messages = await messages_of([b"a", b"b"])
        link, far = await receiver_of([messages[1]])
        await far.close()
        with pytest.raises(LinkDied, match=r"has closed the link, but frame 0 before that never came"):
            await link.receive()

    run(scenario)


@pytest.mark.parametrize(
    ("name", "bound"), [("MAX_WAITING_FRAMES", 5), ("MAX_WAITING_BYTES", 500)], ids=["frames", "bytes"]
)
def test_no_more_than_the_bound_waits(name: str, bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, name, bound)

    async def scenario() -> None:
        messages = await messages_of([bytes(100)] * 8)
        fits, _ = await receiver_of([*messages[1:6], messages[0]])
        assert [await fits.receive() for _ in range(6)] == [bytes(100)] * 6
        too_many, _ = await receiver_of([*messages[1:7], messages[0]])
        with pytest.raises(LinkDied, match=r"6 later ones \(600 B\) have; that is more than may wait"):
            await too_many.receive()

    run(scenario)


def test_numbers_begin_again_after_the_largest() -> None:
    async def scenario() -> None:
        frames = [bytes([i]) for i in range(6)]
        messages = await messages_of(frames, first=2**32 - 3)
        link, _ = await receiver_of([messages[1], messages[0], messages[1], *messages[3:], messages[0], messages[2]])
        link._expected = 2**32 - 3
        assert [await link.receive() for _ in frames] == frames
        assert link.duplicates == 2

    run(scenario)


@pytest.mark.parametrize("cancelled", [[0], [1], [0, 1], [1, 2], [3]])
def test_a_cancelled_send_that_the_link_never_took_leaves_no_hole(cancelled: list[int]) -> None:
    async def scenario() -> None:
        near, far = memory_pair()
        gate = Gate(near)
        sender, receiver = Sequenced(gate), Sequenced(far)
        sending = [asyncio.create_task(sender.send(bytes([i]))) for i in range(4)]
        await asyncio.sleep(0)
        for i in cancelled:
            sending[i].cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.wait(sending)
        await sender.close()
        left = [i for i in range(4) if i not in cancelled]
        assert [await receiver.receive() for _ in left] == [bytes([i]) for i in left]
        assert await receiver.receive() is None

    run(scenario)


def test_a_close_does_not_wait_for_ever_for_a_link_that_takes_nothing() -> None:
    async def scenario() -> None:
        gate = Gate(memory_pair()[0])
        sender = Sequenced(gate, gap_s=0.05)
        sending = asyncio.create_task(sender.send(b"never"))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
        await asyncio.wait_for(sender.close(), 1)

    run(scenario)


def test_each_arrival_is_told_with_both_times_and_its_bytes_before_it_is_put_in_order() -> None:
    async def scenario() -> None:
        clock = iter([0.0, 10.0, 11.0])
        near, far = memory_pair()
        sender = Sequenced(near, now_s=lambda: next(clock))
        await sender.send(b"one")
        await sender.send(b"three")
        messages = [await far.receive() or b"" for _ in range(2)]
        assert sender.sent_bytes == 2 * HEADER_BYTES + 8
        own = iter([5.0, 20.0, 21.0, 22.0])
        near, far = memory_pair()
        link = Sequenced(near, now_s=lambda: next(own))
        assert link.received_at_s == 5.0
        told: list[tuple[float, float, int]] = []
        link.on_arrival = lambda *said: told.append(said)
        for message in (messages[1], messages[0], messages[0]):
            await far.send(message)
        assert [await link.receive(), await link.receive()] == [b"one", b"three"]
        assert told == [(11.0, 20.0, 21), (10.0, 21.0, 19)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.receive(), 0.01)
        assert told[2:] == [(10.0, 22.0, 19)]
        assert (link.received_bytes, link.received_at_s) == (59, 22.0)

    run(scenario)


def test_the_limit_leaves_room_for_the_header_and_sets_that_of_the_link_below() -> None:
    async def scenario() -> None:
        near, _ = memory_pair(max_frame_bytes=100)
        link = Sequenced(near)
        assert (link.max_frame_bytes, link.peer, link.lives_on_loop) == (84, "worker", True)
        link.max_frame_bytes = 50
        assert (link.max_frame_bytes, near.max_frame_bytes) == (50, 66)
        await link.send(bytes(50))

    run(scenario)


def test_the_sender_says_its_time() -> None:
    async def scenario() -> None:
        near, far = memory_pair()
        receiver, times = Sequenced(far), []
        receiver.on_arrival = lambda sent_s, received_s, _: times.append(received_s - sent_s)
        await Sequenced(near).send(b"now")
        await receiver.receive()
        assert 0 <= times[0] < 1
        assert math.isfinite(times[0])

    run(scenario)
