"""A shaped link in real time: slower by what its shape says, and otherwise as the link inside it.

The clock of a busy machine is not ours to keep, so durations are the best of a few tries, or only bounded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine

import pytest

from splitwise_llm.errors import LinkDied, RequestError
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.pacing import LaneQueue, LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import Lane, LinkShape

EARLY_S, LATE_S = 0.001, 0.004


def shaped(text: str, clock: LinkClock | None = None, queue_bytes: int = 4 * 2**20) -> tuple[ShapedLink, MemoryLink]:
    near, far = memory_pair()
    return ShapedLink(near, LinkShape.parse(text), clock, queue_bytes), far


def run(scenario: Callable[[], Coroutine[None, None, None]]) -> None:
    """Run it with a time limit, and see that it leaves neither a thread nor a task behind."""

    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    threads = threading.enumerate()
    asyncio.run(bounded())
    assert threading.enumerate() == threads


async def echo(link: Link) -> None:
    while (frame := await link.receive()) is not None:
        await link.send(frame)


async def seconds(doing: Awaitable[object]) -> float:
    start_s = time.perf_counter()
    await doing
    return time.perf_counter() - start_s


def test_links_beside_each_other_share_the_rate_once() -> None:
    async def scenario() -> None:
        shape, clock = LinkShape.parse("rate=8mbit"), LinkClock()
        (near, far), (other_near, other_far) = memory_pair(), memory_pair()
        first = ShapedLink(near, shape, clock)
        # Dies when wire/shaped.py says `shape.lanes()` for `beside._lanes if beside else shape.lanes()`.
        second = ShapedLink(other_near, shape, clock, beside=first)

        async def carry(link: Link, end: Link) -> None:
            await link.send(b"x" * 50_000)
            await end.receive()

        took_s = await seconds(asyncio.gather(carry(first, far), carry(second, other_far)))
        assert took_s > 0.1 - EARLY_S  # 100 kB at 1 MB/s
        await asyncio.gather(first.close(), second.close())
        clock.close()

    run(scenario)


@pytest.mark.parametrize(("size", "tries"), [(1, 9), (4096, 9), (65536, 5)])
def test_an_echo_takes_the_round_trip_and_the_bytes_both_ways(size: int, tries: int) -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=20ms up=20mbit down=40mbit")
        other = asyncio.create_task(echo(far))
        took_s = []
        for _ in range(tries):
            start_s = time.perf_counter()
            await link.send(bytes(size))
            assert await link.receive() == bytes(size)
            took_s.append(time.perf_counter() - start_s)
        ideal_s = 0.020 + size / 2.5e6 + size / 5e6
        assert ideal_s - EARLY_S < min(took_s) < ideal_s * 1.05 + LATE_S
        await link.close()
        await other

    run(scenario)


def test_a_stream_of_frames_arrives_at_the_rate_whole_and_in_order() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=10ms rate=40mbit")
        frames = [bytes([place]) * 10_000 for place in range(100)]  # 1 MB at 5 MB/s

        async def send_all() -> None:
            for frame in frames:
                await link.send(frame)

        start_s = time.perf_counter()
        sender = asyncio.create_task(send_all())
        assert [await far.receive() for _ in frames] == frames
        took_s = time.perf_counter() - start_s
        assert 0.205 - EARLY_S < took_s < 0.205 * 1.05 + 0.05
        await sender
        await link.close()

    run(scenario)


def test_frames_of_several_senders_stay_in_call_order_while_they_wait_for_room() -> None:
    async def scenario() -> None:
        link, far = shaped("rate=80mbit", queue_bytes=1)
        frames = [bytes([place]) * 5_000 for place in range(20)]
        senders = [asyncio.create_task(link.send(frame)) for frame in frames]
        assert [await far.receive() for _ in frames] == frames
        await asyncio.gather(*senders)
        await link.close()

    run(scenario)


def test_who_waits_for_room_is_not_overtaken() -> None:
    async def scenario() -> None:
        clock = LinkClock()
        queue: LaneQueue[str] = LaneQueue(Lane(), clock, queue_bytes=1)
        await queue.put("first", 1)
        second = asyncio.create_task(queue.put("second", 1))
        await asyncio.sleep(0)

        async def make_room_and_push_in() -> None:
            assert await queue.get() == "first"
            await queue.put("third", 1)

        third = asyncio.create_task(make_room_and_push_in())
        await second
        assert (await queue.get(), await queue.get()) == ("second", "third")
        await third
        clock.close()

    run(scenario)


def test_sending_waits_once_the_queue_is_full() -> None:
    async def scenario() -> None:
        link, _far = shaped("rate=8mbit", queue_bytes=100_000)  # 0.1 s of it
        assert await seconds(link.send(bytes(200_000))) < 0.09  # a frame larger than the queue is taken when empty
        assert 0.15 < await seconds(link.send(b"next")) < 0.5  # but the next waits till it is through
        await link.close()

    run(scenario)


def test_a_reader_who_does_not_read_holds_the_far_side_back() -> None:
    async def scenario() -> None:
        taken = 0

        class Endless(Link):
            peer = "worker"
            max_frame_bytes = 2**20

            async def send(self, frame: bytes) -> None: ...

            async def receive(self) -> bytes | None:
                nonlocal taken
                taken += 1
                await asyncio.sleep(0)
                return bytes(1000)

            async def close(self) -> None: ...

        link = ShapedLink(Endless(), LinkShape(), queue_bytes=10_000)
        assert await link.receive() == bytes(1000)
        await asyncio.sleep(0.05)
        assert taken < 20
        await link.close()

    run(scenario)


def test_closing_lets_frames_on_the_way_arrive_and_then_says_good_bye() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=20ms rate=8mbit")
        for place in range(5):
            await link.send(bytes([place]) * 10_000)
        assert await seconds(link.close()) > 0.055
        assert [await far.receive() for _ in range(6)] == [*(bytes([place]) * 10_000 for place in range(5)), None]

    run(scenario)


def test_the_peers_good_bye_comes_after_its_frames_and_stays() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=20ms rate=8mbit")
        await far.send(bytes(20_000))
        await far.close()
        start_s = time.perf_counter()
        assert await link.receive() == bytes(20_000)
        assert await link.receive() is None
        assert await link.receive() is None
        assert time.perf_counter() - start_s > 0.028
        with pytest.raises(LinkDied, match="has closed the link"):
            await link.send(b"too late")
        await link.close()

    run(scenario)


def test_a_closed_link_receives_none_and_refuses_to_send() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=10ms")
        waiting = asyncio.create_task(link.receive())
        await asyncio.sleep(0)
        await far.send(b"read in time")
        await far.send(b"never read")
        assert await waiting == b"read in time"
        await link.close()
        await link.close()
        assert await link.receive() is None
        with pytest.raises(LinkDied, match="closed on this side"):
            await link.send(b"too late")
        assert await far.receive() is None

    run(scenario)


def test_closing_wakes_the_receiver() -> None:
    async def scenario() -> None:
        link, _far = shaped("rtt=10ms")
        waiting = asyncio.create_task(link.receive())
        await asyncio.sleep(0)
        await link.close()
        assert await waiting is None

    run(scenario)


def test_the_death_of_the_link_inside_reaches_both_senders_and_receivers() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=10ms rate=8kbit", queue_bytes=1)
        await link.send(bytes(10_000))  # ten seconds of it
        stuck = asyncio.create_task(link.send(b"waits for room"))
        await asyncio.sleep(0.01)
        far.kill()
        for told in (stuck, link.receive(), link.send(b"again"), link.receive()):
            with pytest.raises(LinkDied, match="broke"):
                await told
        assert await seconds(link.close()) < 1  # and closing does not wait for what can no longer arrive

    run(scenario)


def test_a_frame_over_the_limit_is_refused_and_the_link_stays_as_it_was() -> None:
    async def scenario() -> None:
        link, far = shaped("")
        with pytest.raises(RequestError):
            await link.send(bytes(256 * 2**20 + 1))
        await link.send(b"fine")
        assert await far.receive() == b"fine"
        await link.close()

    run(scenario)


def test_an_error_that_is_no_death_ends_the_link_for_the_receiver_too() -> None:
    async def scenario() -> None:
        near, _far = memory_pair(max_frame_bytes=10)
        link = ShapedLink(near, LinkShape())
        link.max_frame_bytes = 100  # more than the link below takes
        await link.send(bytes(11))
        with pytest.raises(RequestError):
            await link.receive()
        with pytest.raises(RequestError):
            await link.send(b"next")
        await link.close()

    run(scenario)


def test_nothing_arrives_while_the_link_is_down_and_all_of_it_afterwards() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=20ms rate=8mbit")
        arrival = asyncio.create_task(far.receive())
        await link.send(bytes(10_000))  # 20 ms
        await asyncio.sleep(0.005)
        link.clock.down(True)
        link.clock.down(True)
        await asyncio.sleep(0.1)
        await link.send(b"sent in the dark")
        assert not arrival.done()
        start_s = time.perf_counter()
        link.clock.down(False)
        link.clock.down(False)
        assert await arrival == bytes(10_000)
        assert 0.005 < time.perf_counter() - start_s < 0.1  # what was left of its way
        assert await far.receive() == b"sent in the dark"
        await link.close()

    run(scenario)


def test_a_periodic_outage_is_felt_in_both_directions() -> None:
    async def scenario() -> None:
        link, far = shaped("outage=300ms/200ms")  # up for the first 100 ms
        await asyncio.sleep(0.15)
        await link.send(b"up")
        assert await far.receive() == b"up"
        assert link.clock.now_s() > 0.299
        await asyncio.sleep(0.45 - link.clock.now_s())
        await far.send(b"down")
        assert await link.receive() == b"down"
        assert link.clock.now_s() > 0.599
        await link.close()

    run(scenario)


def test_links_on_one_clock_share_the_course_of_outages() -> None:
    async def scenario() -> None:
        clock = LinkClock()
        first, _ = shaped("outage=200ms/100ms", clock)
        await first.send(b"hello")
        await first.close()
        await clock.sleep_until(0.15)
        again, far = shaped("outage=200ms/100ms", clock)  # connected anew, in the middle of the outage
        await again.send(b"hello")
        assert await far.receive() == b"hello"
        assert clock.now_s() > 0.199
        await again.close()
        clock.close()

    run(scenario)


def test_who_gives_up_closing_loses_what_was_on_the_way() -> None:
    async def scenario() -> None:
        link, far = shaped("rate=8mbit")
        link.clock.down(True)
        await link.send(b"lost")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.close(), 0.05)
        assert await far.receive() is None

    run(scenario)


def test_waiting_for_a_frame_costs_no_processor_time() -> None:
    async def scenario() -> None:
        link, far = shaped("rtt=600ms")
        await link.send(b"slow")
        before_s = time.process_time()
        assert await far.receive() == b"slow"
        assert time.process_time() - before_s < 0.1
        await link.close()

    run(scenario)


def test_a_clock_sleeps_more_finely_than_the_event_loop() -> None:
    async def scenario() -> None:
        clock = LinkClock()
        late_s = []
        for _ in range(41):
            when_s = clock.now_s() + 0.0032
            await clock.sleep_until(when_s)
            late_s.append(clock.now_s() - when_s)
        assert min(late_s) > -0.0003
        assert sorted(late_s)[10] < 0.0006  # the quarter least disturbed by others
        clock.close()

    run(scenario)
