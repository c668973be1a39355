"""Every fault of a link fires, does what it says and nothing else, and says so; the others are only named here."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.errors import LinkDied, SpecError, Unreachable
from splitwise_llm.wire.faults import Fault, Injection, Layer, parse_schedule, show_schedule
from splitwise_llm.wire.faulty import REORDER_HOLD_S, FaultyConnect, FaultyLink
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.sequence import Sequenced
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

DROPS = [Fault.DROP_UP, Fault.DROP_DOWN, Fault.DROP_BOTH]
SECONDS = st.floats(0.001, 1e6)


@st.composite
def injections(draw: st.DrawFn) -> Injection:
    fault = draw(st.sampled_from(list(Fault)))
    frames = draw(st.none() | st.integers(0, 10**6))
    return Injection(
        fault,
        after_s=0.0 if frames is not None else draw(st.just(0.0) | SECONDS),
        after_frames=frames,
        for_s=draw(st.none() | SECONDS) if fault.lasts else None,
        **({"rate_bytes_per_s": draw(st.floats(1e-3, 1e12))} if fault is Fault.CRAWL else {}),
        **({"delay_s": draw(SECONDS)} if fault is Fault.DELAY_SPIKE else {}),
        **({"by_s": draw(SECONDS) * draw(st.sampled_from([1, -1]))} if fault is Fault.CLOCK_JUMP else {}),
    )


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(bounded())


def at_once(fault: Fault, **more: float) -> Faults:
    return Faults([Injection(fault, **more)])  # type: ignore[arg-type]


def faulty(faults: Faults) -> tuple[FaultyLink, MemoryLink]:
    near, far = memory_pair()
    return FaultyLink(near, faults), far


def ways(link: FaultyLink, far: Link) -> list[tuple[Link, Link]]:
    return [(link, far), (far, link)]


async def arrives(link: Link, within_s: float = 0.05) -> list[bytes | None]:
    """What comes within a time: for what should not come."""
    come: list[bytes | None] = []
    try:
        async with asyncio.timeout(within_s):
            while (frame := await link.receive()) is not None:
                come.append(frame)
            come.append(None)
    except TimeoutError:
        pass
    return come


# What is said


def test_the_faults_are_those_of_the_matrix_and_each_says_what_it_does_and_what_is_seen() -> None:
    assert " ".join(Fault) == (
        "connect-refused reset drop-up drop-down drop-both crawl delay-spike duplicate reorder corrupt worker-killed"
        " worker-restarted worker-out-of-memory journal-disk-full edge-killed clock-jump"
    )
    for fault in Fault:
        assert fault.description.endswith(".")
        assert fault.seen.endswith(".")
        assert fault.layers


@given(injections())
def test_what_is_printed_is_read_back_the_same(injection: Injection) -> None:
    assert Injection.parse(str(injection)) == injection


@given(st.lists(injections(), min_size=1, max_size=4))
def test_so_is_a_whole_schedule(schedule: list[Injection]) -> None:
    schedule = [one for one in schedule if Layer.LINK in one.fault.layers] or [Injection(Fault.RESET)]
    assert parse_schedule(show_schedule(schedule), Layer.LINK) == tuple(schedule)


def test_the_text_form_is_short() -> None:
    for text in (
        "drop-both after=2s for=3s", "corrupt after=20frames", "crawl after=1s for=5s rate=8000bit", "reset",
        "delay-spike after=1s for=1s delay=0.5s", "clock-jump after=1s by=-3600s",
    ):  # fmt: skip
        assert str(Injection.parse(text)) == text
    assert Injection.parse("corrupt after=1frame").after_frames == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no fault was given"),
        (" ; ", "no fault was given"),
        ("explode", "'explode' is no fault; there are connect-refused"),
        ("reset after", "'after' says nothing about reset"),
        ("reset after=", "says nothing about reset"),
        ("reset for=2s", "'for=2s' says nothing about reset"),
        ("drop-up for=2s for=3s", "'for=3s' says nothing about drop-up"),
        ("drop-up rate=8kbit", "'rate=8kbit' says nothing about drop-up"),
        ("drop-up after=20", "'20' is not a duration"),
        ("drop-up for=0s", "for=3s"),
        ("crawl rate=0kbit", "a crawl at 0.0 bytes/s cannot be"),
        ("delay-spike delay=0s", "cannot take"),
        ("reset; worker-killed", "a frame link cannot apply worker-killed: it takes a process"),
        ("journal-disk-full", "it takes a clock or journal"),
    ],
)
def test_bad_text_is_refused_with_what_to_write(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse_schedule(text, Layer.LINK)


def test_numbers_that_cannot_be_are_refused() -> None:
    for bad in ({"after_s": -1.0}, {"after_frames": -1}, {"after_s": 1.0, "after_frames": 1}, {"for_s": 1.0}):
        with pytest.raises(SpecError):
            Injection(Fault.RESET, **bad)  # type: ignore[arg-type]
    with pytest.raises(SpecError):
        Injection(Fault.CLOCK_JUMP, by_s=float("nan"))


def test_a_proxy_refuses_what_takes_frames() -> None:
    for text in ("duplicate", "reorder", "corrupt after=20frames"):
        with pytest.raises(SpecError, match="a TCP proxy"):
            parse_schedule(text, Layer.PROXY)
    with pytest.raises(SpecError, match="a TCP proxy cannot apply duplicate"):
        Faults([Injection(Fault.DUPLICATE)], layer=Layer.PROXY)
    with pytest.raises(SpecError, match="cannot apply edge-killed"):
        Faults().inject(Injection(Fault.EDGE_KILLED))


# When it happens


class Clock:
    s = 100.0

    def __call__(self) -> float:
        return self.s


def test_a_fault_begins_and_ends_at_its_times_counted_from_the_first_connection() -> None:
    clock = Clock()
    faults = Faults(parse_schedule("drop-up after=2s for=3s; drop-both after=4s for=2s", Layer.LINK), now_s=clock)
    clock.s = 1000.0
    assert not faults.dropping("up")
    faults.begin()
    faults.begin()
    acted = []
    for _ in range(8):
        acted.append((faults.dropping("up"), faults.dropping("down")))
        clock.s += 1.0
    up, both = Fault.DROP_UP, Fault.DROP_BOTH
    assert acted == [
        (None, None), (None, None), (up, None), (up, None), (up, both), (both, both), (None, None), (None, None)
    ]  # fmt: skip


def test_a_fault_after_frames_begins_when_so_many_have_passed_and_lasts_from_there() -> None:
    clock = Clock()
    faults = Faults(parse_schedule("drop-down after=2frames for=3s", Layer.LINK), now_s=clock)
    faults.begin()
    faults.passed()
    clock.s += 50.0
    assert not faults.dropping("down")
    faults.passed()
    assert faults.dropping("down")
    clock.s += 2.9
    assert faults.dropping("down")
    clock.s += 0.2
    assert not faults.dropping("down")


def test_what_is_injected_by_hand_counts_from_now_and_healing_ends_everything() -> None:
    clock = Clock()
    faults = Faults(parse_schedule("drop-up after=9s", Layer.LINK), now_s=clock)
    faults.begin()
    for _ in range(3):
        faults.passed()
    faults.inject(Injection(Fault.DROP_DOWN))
    faults.inject(Injection(Fault.DUPLICATE, after_s=1.0))
    faults.inject(Injection(Fault.REORDER, after_frames=1))
    faults.inject(Injection(Fault.CORRUPT))
    assert faults.active(Fault.DROP_DOWN)
    assert not faults.active(Fault.DUPLICATE)
    assert not faults.active(Fault.REORDER)
    clock.s += 1.0
    faults.passed()
    assert faults.active(Fault.DUPLICATE)
    assert faults.active(Fault.REORDER)
    faults.heal()
    clock.s += 100.0
    assert not any(faults.active(fault) for fault in Fault)
    assert faults.corrupted(b"as it was") == b"as it was"
    assert not faults.fired


def test_who_waits_is_woken_when_something_begins_or_ends_and_not_by_being_asked() -> None:
    async def scenario() -> None:
        faults = Faults(parse_schedule("drop-up after=0.03s for=0.03s", Layer.LINK))
        faults.begin()
        start_s = time.monotonic()
        await faults.wait()
        assert faults.dropping("up")
        await faults.wait()
        assert not faults.dropping("up")
        assert time.monotonic() - start_s >= 0.06
        faults.inject(Injection(Fault.CRAWL))
        waiting = asyncio.create_task(faults.wait())
        await asyncio.sleep(0)
        for _ in range(3):
            faults.slowing()
            await asyncio.sleep(0)
        assert not waiting.done()
        faults.heal()
        await asyncio.wait_for(waiting, 1)

    run(scenario)


# What it does to a link


def test_without_a_fault_frames_pass_and_nothing_is_counted() -> None:
    async def scenario() -> None:
        link, far = faulty(Faults())
        for sender, receiver in ways(link, far):
            await sender.send(b"x")
            assert await receiver.receive() == b"x"
        assert not link.fired
        await link.close()

    run(scenario)


@pytest.mark.parametrize("text", ["reset", "reset after=2frames", "reset after=0.05s", ""])
def test_a_reset_is_seen_at_both_ends(text: str) -> None:
    async def scenario() -> None:
        link, far = faulty(Faults(parse_schedule(text, Layer.LINK) if text else ()))
        if text == "reset after=2frames":
            for sender, receiver in ways(link, far):
                await sender.send(b"x")
                assert await receiver.receive() == b"x"
        waiting = [asyncio.create_task(end.receive()) for end in (link, far)]
        await asyncio.sleep(0.01)
        if not text:
            link.inject(Injection(Fault.RESET))
        for task in waiting:
            with pytest.raises(LinkDied, match="broke"):
                await asyncio.wait_for(task, 1)
        for end in (link, far):
            with pytest.raises(LinkDied):
                await end.send(b"anyone?")
        assert link.fired == Counter({Fault.RESET: 1})
        await link.close()

    run(scenario)


@pytest.mark.parametrize("shaped", [False, True], ids=["grpc", "shaped grpc"])
def test_a_reset_of_a_network_link_is_no_good_bye_for_the_worker(shaped: bool) -> None:
    async def scenario() -> None:
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def handler(link: Link) -> None:
            try:
                ended.set_result(f"got {await link.receive()!r}")
            except LinkDied as error:
                ended.set_result(str(error))

        async with await serve("127.0.0.1:0", handler) as server:
            raw = await dial(server.address)
            link = FaultyLink(ShapedLink(raw, LinkShape(delay_s=0.005)) if shaped else raw, Faults())
            link.inject(Injection(Fault.RESET))
            with pytest.raises(LinkDied, match="reset on purpose"):
                await link.receive()
            assert "broke" in await ended
            await link.close()

    run(scenario)


@pytest.mark.parametrize("fault", DROPS)
def test_a_drop_swallows_its_direction_while_sends_succeed_and_ends_when_healed(fault: Fault) -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(fault))
        for sender, receiver in ways(link, far):
            lost = fault is Fault.DROP_BOTH or (fault is Fault.DROP_UP) == (sender is link)
            await sender.send(b"one")
            await sender.send(b"two")
            assert await arrives(receiver) == ([] if lost else [b"one", b"two"])
        assert link.fired == Counter({fault: 4 if fault is Fault.DROP_BOTH else 2})
        link.heal()
        for sender, receiver in ways(link, far):
            await sender.send(b"three")
            assert await receiver.receive() == b"three"
        await link.close()

    run(scenario)


def test_a_death_or_good_bye_behind_a_drop_shows_only_afterwards() -> None:
    async def scenario() -> None:
        for end in ("close", "kill"):
            link, far = faulty(at_once(Fault.DROP_DOWN))
            if end == "close":
                await far.close()
            else:
                far.kill()
            assert await arrives(link) == []
            link.heal()
            if end == "close":
                assert await link.receive() is None
            else:
                with pytest.raises(LinkDied, match="broke"):
                    await link.receive()
            await link.close()

    run(scenario)


def test_a_close_during_a_drop_is_a_death_for_the_far_end() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.DROP_BOTH))
        await link.close()
        with pytest.raises(LinkDied):
            await far.receive()

    run(scenario)


def test_a_sequenced_link_notices_a_drop_that_was_healed() -> None:
    async def scenario() -> None:
        link, far = faulty(Faults())
        sender, receiver = Sequenced(link), Sequenced(far, gap_s=0.05)
        link.inject(Injection(Fault.DROP_UP))
        await sender.send(b"lost")
        await asyncio.sleep(0.01)
        link.heal()
        await sender.send(b"later")
        with pytest.raises(LinkDied, match="frame 0 from device was lost"):
            await receiver.receive()
        await sender.close()

    run(scenario)


def test_a_crawl_carries_only_its_rate_and_what_waits_leaves_when_it_is_over() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.CRAWL, rate_bytes_per_s=10_000.0))
        for sender, receiver in ways(link, far):
            start_s = time.monotonic()
            await sender.send(bytes(600))
            assert await receiver.receive() == bytes(600)
            assert 0.059 < time.monotonic() - start_s < 0.5
        for sender, _ in ways(link, far):
            await sender.send(bytes(10**6))  # 100 s
        await asyncio.sleep(0.05)
        assert link.fired == Counter({Fault.CRAWL: 4})
        link.heal()
        for _, receiver in ways(link, far):
            assert await asyncio.wait_for(receiver.receive(), 1) == bytes(10**6)
        await link.close()

    run(scenario)


def test_a_crawl_goes_on_when_something_else_begins_and_ends() -> None:
    async def scenario() -> None:
        link, far = faulty(Faults(parse_schedule("crawl rate=80kbit; duplicate after=10ms for=10ms", Layer.LINK)))
        start_s = time.monotonic()
        await link.send(bytes(600))
        assert await far.receive() == bytes(600)
        assert 0.059 < time.monotonic() - start_s < 0.5
        await link.close()

    run(scenario)


def test_a_delay_spike_makes_everything_late_but_not_slower() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.DELAY_SPIKE, delay_s=0.1, for_s=0.3))
        for sender, receiver in ways(link, far):
            start_s = time.monotonic()
            for i in range(5):
                await sender.send(bytes([i]))
            assert [await receiver.receive() for _ in range(5)] == [bytes([i]) for i in range(5)]
            assert 0.099 < time.monotonic() - start_s < 0.19
        assert link.fired[Fault.DELAY_SPIKE] >= 2
        await link.faults.wait()
        start_s = time.monotonic()
        await link.send(b"prompt")
        await far.receive()
        assert time.monotonic() - start_s < 0.09
        await link.close()

    run(scenario)


def test_duplicates_arrive_twice_and_a_sequenced_link_drops_them() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.DUPLICATE))
        await link.send(b"a")
        await far.send(b"b")
        assert [await far.receive(), await far.receive()] == [b"a", b"a"]
        assert [await link.receive(), await link.receive()] == [b"b", b"b"]
        assert link.fired == Counter({Fault.DUPLICATE: 2})
        sender, receiver = Sequenced(link), Sequenced(far)
        for frame in (b"c", b"d"):
            await sender.send(frame)
            assert await receiver.receive() == frame
        assert receiver.duplicates == 1  # that of "d" has not been looked at
        await sender.close()

    run(scenario)


def test_of_two_frames_the_second_arrives_first_and_a_lone_one_is_held_for_a_moment() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.REORDER))
        for sender, receiver in ways(link, far):
            for frame in (b"1", b"2", b"3", b"4"):
                await sender.send(frame)
            assert [await receiver.receive() for _ in range(4)] == [b"2", b"1", b"4", b"3"]
        assert link.fired == Counter({Fault.REORDER: 4})
        start_s = time.monotonic()
        await link.send(b"alone")
        assert await far.receive() == b"alone"
        assert time.monotonic() - start_s > REORDER_HOLD_S - 0.005
        assert link.fired == Counter({Fault.REORDER: 4})  # nothing was out of order
        await link.send(b"last")
        await link.close()
        assert await far.receive() == b"last"
        assert await far.receive() is None

    run(scenario)


def test_a_sequenced_link_puts_them_back_in_order() -> None:
    async def scenario() -> None:
        link, far = faulty(at_once(Fault.REORDER))
        sender, receiver = Sequenced(link), Sequenced(far)
        for i in range(6):
            await sender.send(bytes([i]))
        assert [await receiver.receive() for _ in range(6)] == [bytes([i]) for i in range(6)]
        assert receiver.reordered == 3
        await sender.close()

    run(scenario)


@pytest.mark.parametrize("way", [0, 1], ids=["up", "down"])
def test_a_corruption_flips_one_bit_of_one_frame(way: int) -> None:
    async def scenario() -> None:
        link, far = faulty(Faults(parse_schedule("corrupt after=3frames", Layer.LINK)))
        sender, receiver = ways(link, far)[way]
        frames = [bytes(50), bytes(60), bytes(70), b"", bytes(80), bytes(90)]
        for frame in frames:
            await sender.send(frame)
        come = [await receiver.receive() or b"" for _ in frames]
        flipped = [sum(byte.bit_count() for byte in frame) for frame in come]
        assert [len(frame) for frame in come] == [len(frame) for frame in frames]
        assert flipped == [0, 0, 0, 0, 1, 0]  # an empty frame has no bit to flip
        assert link.fired == Counter({Fault.CORRUPT: 1})
        await link.close()

    run(scenario)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_a_corruption_anywhere_ends_a_sequenced_link(seed: int) -> None:
    async def scenario() -> None:
        link, far = faulty(Faults([Injection(Fault.CORRUPT)], seed=seed))
        sender, receiver = Sequenced(link), Sequenced(far)
        await sender.send(b"a few bytes")
        with pytest.raises(LinkDied, match="arrived damaged"):
            await receiver.receive()
        await sender.close()

    run(scenario)


HITS = st.builds(
    Injection,
    st.sampled_from([Fault.RESET, Fault.CORRUPT]),
    after_frames=st.integers(0, 40),
) | st.builds(
    Injection,
    st.sampled_from([*DROPS, Fault.DUPLICATE, Fault.REORDER]),
    after_frames=st.integers(0, 40),
    for_s=st.sampled_from([0.001, 0.01]),
)


@settings(deadline=None, max_examples=50)
@given(schedule=st.lists(HITS, max_size=4), both=st.booleans())
def test_whatever_happens_a_sequenced_link_gives_out_a_beginning_of_what_was_sent(
    schedule: list[Injection], both: bool
) -> None:
    async def scenario() -> None:
        link, far = faulty(Faults(schedule))
        near_end, far_end = (Sequenced(end, gap_s=2 * REORDER_HOLD_S) for end in (link, far))
        sent = [bytes([i]) * i for i in range(30)]

        async def send(end: Link) -> None:
            for frame in sent:
                await end.send(frame)
                await asyncio.sleep(0)

        async def take(end: Link, come: list[bytes], count: int) -> None:
            while len(come) < count and (frame := await end.receive()) is not None:
                come.append(frame)

        come: tuple[list[bytes], list[bytes]] = ([], [])
        taking = [
            asyncio.create_task(take(near_end, come[0], len(sent) if both else 0)),
            asyncio.create_task(take(far_end, come[1], len(sent))),
        ]
        senders = (near_end, far_end) if both else (near_end,)
        outcomes = await asyncio.gather(*map(send, senders), return_exceptions=True)
        await asyncio.wait(taking, timeout=3 * REORDER_HOLD_S)
        await near_end.close()
        await far_end.close()
        outcomes += await asyncio.gather(*taking, return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, LinkDied) for outcome in outcomes)
        for frames in come:
            assert frames == sent[: len(frames)]
        if not any(link.fired[fault] for fault in (*DROPS, Fault.RESET, Fault.CORRUPT)):
            assert come == (sent if both else [], sent)

    run(scenario)


def test_a_send_that_waits_for_room_ends_with_the_link() -> None:
    async def scenario() -> None:
        link, _ = faulty(at_once(Fault.CRAWL))
        sending = [asyncio.create_task(link.send(bytes(3 * 2**20))) for _ in range(4)]
        await asyncio.sleep(0.02)
        assert [task.done() for task in sending] == [True, True, False, False]
        link.inject(Injection(Fault.RESET))
        for task in sending[2:]:
            with pytest.raises(LinkDied, match="reset on purpose"):
                await asyncio.wait_for(task, 1)
        await link.close()

    run(scenario)


def test_a_close_gives_up_on_frames_that_crawl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitwise_llm.wire.faulty.LINGER_S", 0.05)

    async def scenario() -> None:
        link, far = faulty(at_once(Fault.CRAWL))
        sending = [asyncio.create_task(link.send(bytes(3 * 2**20))) for _ in range(4)]
        await asyncio.sleep(0.02)
        await asyncio.wait_for(link.close(), 1)
        with pytest.raises(LinkDied):
            await far.receive()
        await asyncio.gather(*sending, return_exceptions=True)

    run(scenario)


# What it does to connecting


def test_connections_are_refused_while_the_fault_acts_and_only_for_its_machine() -> None:
    async def scenario() -> None:
        made: list[str] = []

        async def connect(name: str) -> Link:
            made.append(name)
            return memory_pair()[0]

        faults = Faults(parse_schedule("connect-refused for=0.05s", Layer.LINK))
        dialling = FaultyConnect(connect, {"cloud": faults})
        for _ in range(2):
            with pytest.raises(Unreachable, match="cloud refused the connection, on purpose"):
                await dialling("cloud")
        assert isinstance(await dialling("third"), MemoryLink)
        assert made == ["third"]
        assert faults.fired == Counter({Fault.CONNECT_REFUSED: 2})
        await asyncio.sleep(0.06)
        link = await dialling("cloud")
        assert isinstance(link, FaultyLink)
        faults.inject(Injection(Fault.CONNECT_REFUSED))
        await link.send(b"open links go on")
        await link.close()

    run(scenario)


def test_a_fault_outlives_a_reconnection_and_a_reset_finds_the_next_link() -> None:
    async def scenario() -> None:
        ends: list[MemoryLink] = []

        async def connect(_: str) -> Link:
            near, far = memory_pair()
            ends.append(far)
            return near

        faults = at_once(Fault.DROP_UP)
        dialling = FaultyConnect(connect, {"cloud": faults})
        for attempt in range(2):
            link = await dialling("cloud")
            await link.send(b"lost")
            assert await arrives(ends[attempt], 0.02) == []
            await link.close()
        assert faults.fired == Counter({Fault.DROP_UP: 2})
        faults.heal()
        faults.inject(Injection(Fault.RESET))
        assert faults.fired[Fault.RESET] == 0
        link = await dialling("cloud")
        with pytest.raises(LinkDied):
            await link.receive()
        assert faults.fired[Fault.RESET] == 1
        await link.close()
        link = await dialling("cloud")
        await link.send(b"one reset is one reset")
        assert await ends[3].receive() == b"one reset is one reset"
        await link.close()

    run(scenario)
