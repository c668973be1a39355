"""What a link does to bytes, on a virtual clock: rates, delay, jitter, outages, and the text they are read from."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.errors import SpecError
from splitwise_llm.traces import Direction, RateTrace, parse_trace
from splitwise_llm.wire.shaper import Lane, LinkShape, Outage

rates = st.floats(1e3, 1e9)  # bytes/s
delays_s = st.floats(0, 1)
sizes = st.integers(1, 10_000_000)
starts_s = st.floats(0, 1000)
outages = st.builds(lambda up_s, for_s: Outage(up_s + for_s, for_s), st.floats(0.1, 20), st.floats(0.1, 20))
two_speeds = RateTrace((0.0, 1.0), (1e6, 3e6), 2.0)


@st.composite
def sendings(draw: st.DrawFn) -> list[tuple[float, int]]:
    """Times that do not fall, and sizes."""
    gaps_s = draw(st.lists(st.floats(0, 5), min_size=1, max_size=30))
    times_s = [sum(gaps_s[: place + 1]) for place in range(len(gaps_s))]
    return [(time_s, draw(st.integers(0, 1_000_000))) for time_s in times_s]


def test_eight_megabits_per_second_move_one_megabyte_per_second() -> None:
    up, down = LinkShape.parse("up=8mbit down=80mbit rtt=20ms").lanes()
    assert up.deliver_at(0.0, 1_000_000) == pytest.approx(1.010)
    assert down.deliver_at(0.0, 1_000_000) == pytest.approx(0.110)


@given(rate=rates, size=sizes, now_s=starts_s)
def test_twice_the_bytes_take_twice_the_time(rate: float, size: int, now_s: float) -> None:
    once_s = Lane(rate).deliver_at(now_s, size) - now_s
    twice_s = Lane(rate).deliver_at(now_s, 2 * size) - now_s
    assert once_s == pytest.approx(size / rate, rel=1e-6, abs=2e-6)
    assert twice_s == pytest.approx(2 * once_s, rel=1e-6, abs=2e-6)


@given(rate=rates, delay_s=delays_s, size=sizes, now_s=starts_s)
def test_the_delay_is_added_to_the_serialisation(rate: float, delay_s: float, size: int, now_s: float) -> None:
    assert Lane(rate, delay_s).deliver_at(now_s, size) == pytest.approx(now_s + size / rate + delay_s, abs=2e-6)
    assert Lane(None, delay_s).deliver_at(now_s, size) == pytest.approx(now_s + delay_s)


def test_a_frame_waits_for_the_ones_before_it_but_not_for_their_delay() -> None:
    lane = Lane(1e6, delay_s=0.5)
    assert lane.deliver_at(0.0, 1_000_000) == pytest.approx(1.5)
    assert lane.deliver_at(0.2, 1_000_000) == pytest.approx(2.5)
    assert lane.deliver_at(9.0, 1_000_000) == pytest.approx(10.5)  # idle in between


@given(
    sent=sendings(),
    rate=st.one_of(st.none(), rates, st.just(two_speeds)),
    delay_s=delays_s,
    jitter=st.floats(0, 1),
    outage=st.one_of(st.none(), outages),
    seed=st.integers(0, 5),
)
def test_frames_never_overtake_and_never_arrive_before_they_are_sent_or_in_an_outage(
    sent: list[tuple[float, int]],
    rate: float | RateTrace | None,
    delay_s: float,
    jitter: float,
    outage: Outage | None,
    seed: int,
) -> None:
    lane = Lane(rate, delay_s, jitter * delay_s, outage, seed)
    arrivals_s = [lane.deliver_at(now_s, size) for now_s, size in sent]
    assert all(before_s <= after_s for before_s, after_s in pairwise(arrivals_s))
    for (now_s, _), arrival_s in zip(sent, arrivals_s, strict=True):
        assert arrival_s >= now_s + (delay_s - jitter * delay_s) - 1e-9
        if outage is not None:
            up_s = outage.every_s - outage.for_s
            within_s = arrival_s % outage.every_s
            assert within_s <= up_s + 1e-6 or within_s >= outage.every_s - 1e-6


@given(sent=sendings(), rate=rates)
def test_cutting_a_frame_in_pieces_changes_nothing(sent: list[tuple[float, int]], rate: float) -> None:
    whole, pieces = Lane(rate), Lane(rate)
    for now_s, size in sent:
        arrival_s = whole.deliver_at(now_s, size)
        for piece in (size // 3, size // 3, size - 2 * (size // 3)):
            last_s = pieces.deliver_at(now_s, piece)
        assert last_s == pytest.approx(arrival_s, abs=1e-4)


def test_a_trace_gives_the_rate_of_the_moment() -> None:
    assert Lane(two_speeds).deliver_at(0.0, 500_000) == pytest.approx(0.5)
    assert Lane(two_speeds).deliver_at(0.5, 500_000 + 1_500_000) == pytest.approx(1.5)
    assert Lane(two_speeds).deliver_at(101.0, 3_000_000) == pytest.approx(102.0)


def test_a_silent_stretch_holds_what_does_not_fit_before_it_and_only_that() -> None:
    trace = RateTrace((0.0, 1.0, 61.0), (1e6, 0.0, 1e6), 62.0)
    lane = Lane(trace)
    arrivals_s = [lane.deliver_at(0.0, 100_000) for _ in range(11)]
    assert arrivals_s[:10] == pytest.approx([0.1 * place for place in range(1, 11)])
    assert arrivals_s[10] == pytest.approx(61.1)


@given(
    steps_ms=st.lists(st.one_of(st.integers(0, 3), st.integers(100, 90_000)), min_size=2, max_size=30).filter(any),
    laps=st.integers(1, 4),
)
def test_packets_on_a_packet_trace_arrive_at_its_packet_times(steps_ms: list[int], laps: int) -> None:
    times_ms = [sum(steps_ms[: place + 1]) for place in range(len(steps_ms))]
    lane = Lane(parse_trace("\n".join(map(str, times_ms)), "up"))
    for lap in range(laps):
        for time_ms in times_ms:
            arrival_ms = lane.deliver_at(0.0, 1500) * 1e3 - lap * times_ms[-1]
            assert max(time_ms, 1) - 1 < arrival_ms < max(time_ms, 1) + 1e-3


@given(sizes=st.lists(st.integers(1, 200_000), min_size=50, max_size=100))
def test_the_long_run_rate_of_a_busy_lane_is_the_mean_of_its_trace(sizes: list[int]) -> None:
    lane = Lane(two_speeds)
    for size in sizes:
        end_s = lane.deliver_at(0.0, size)
    ideal_s = sum(sizes) / two_speeds.mean_bytes_per_s
    assert end_s == pytest.approx(ideal_s, abs=two_speeds.period_s)


@given(outage=outages, rate=rates, size=sizes, now_s=st.floats(0, 100))
def test_an_outage_delays_by_the_outages_it_meets_and_nothing_else(
    outage: Outage, rate: float, size: int, now_s: float
) -> None:
    arrival_s = Lane(rate, outage=outage).deliver_at(now_s, size)
    up_s = outage.up_s(arrival_s) - outage.up_s(now_s)  # what is left without the outages
    assert up_s == pytest.approx(size / rate, abs=1e-5, rel=1e-6)


def test_ten_seconds_three_seconds_is_down_from_seven_to_ten() -> None:
    shape = LinkShape.parse("rate=8mbit rtt=20ms outage=10s/3s")
    for lane in shape.lanes():
        assert lane.deliver_at(0.0, 1_000_000) == pytest.approx(1.010)
        assert lane.deliver_at(6.5, 1_000_000) == pytest.approx(10.510)  # half a second of it before
        assert lane.deliver_at(18.0, 1_000) == pytest.approx(20.011)  # sent in the dark
    late = shape.lanes()[0]
    assert late.deliver_at(6.995, 1_000) == pytest.approx(10.006)  # in flight when it goes dark
    assert Lane(None, outage=shape.outage).deliver_at(12.0, 1) == pytest.approx(12.0)
    waiting = shape.lanes()[0]
    arrivals_s = [waiting.deliver_at(8.0, 1_000_000) for _ in range(8)]  # they queue up, and leave at the same rate
    assert arrivals_s == pytest.approx([11.01, 12.01, 13.01, 14.01, 15.01, 16.01, 20.01, 21.01])


def test_the_rate_under_outages_is_the_rate_times_the_time_up() -> None:
    lane = Lane(1e6, outage=Outage(10.0, 3.0))
    assert lane.deliver_at(0.0, 700_000_000) == pytest.approx(1000.0, abs=10.0)


@given(delay_s=st.floats(0.001, 1), seed=st.integers(0, 1000))
def test_jitter_stays_in_its_bounds_moves_the_mean_little_and_repeats_with_its_seed(delay_s: float, seed: int) -> None:
    def delays() -> list[float]:
        lane = Lane(None, delay_s, delay_s / 2, seed=seed)
        return [lane.deliver_at(now_s, 1) - now_s for now_s in range(0, 2000, 2)]  # apart, so that none is held back

    drawn = delays()
    assert drawn == delays()
    assert all(delay_s / 2 - 1e-9 <= one_s <= 1.5 * delay_s + 1e-9 for one_s in drawn)
    assert math.fsum(drawn) / len(drawn) == pytest.approx(delay_s, rel=0.06)
    assert len(set(drawn)) > 900


def test_the_two_directions_do_not_jitter_alike() -> None:
    up, down = LinkShape(delay_s=0.01, jitter_s=0.01).lanes()
    assert up.deliver_at(0.0, 1) != down.deliver_at(0.0, 1)


def test_the_text_of_a_shape_says_all_of_it() -> None:
    shape = LinkShape.parse("rtt=20ms up=50mbit down=8mbit jitter=2ms outage=10s/3s seed=7")
    assert shape == LinkShape(6.25e6, 1e6, 0.01, 0.002, Outage(10.0, 3.0), seed=7)
    assert LinkShape.parse("rate=20mbit") == LinkShape(2.5e6, 2.5e6)
    assert LinkShape.parse("rate=20mbit up=unlimited") == LinkShape(None, 2.5e6)
    assert LinkShape.parse("") == LinkShape()


def test_a_rate_may_be_a_trace_file_read_for_its_direction() -> None:
    asked: list[tuple[str, Direction]] = []

    def read(path: str, direction: Direction) -> RateTrace:
        asked.append((path, direction))
        return two_speeds

    shape = LinkShape.parse("rate='my walk.csv' rtt=10ms", read)
    assert (shape.up, shape.down, shape.delay_s) == (two_speeds, two_speeds, 0.005)
    assert asked == [("my walk.csv", "up"), ("my walk.csv", "down")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed=20mbit", "key of rate, up, down"),
        ("rtt", "key=value"),
        ("rtt=", "key=value"),
        ("rtt=20ms rtt=30ms", "given twice"),
        ("rtt=20", "20ms"),
        ("rtt='20ms", "open quote"),
        ("rate=0mbit", "lets nothing through"),
        ("rate=20mbitt", "no rate either"),
        ("up=missing.csv", "missing.csv: cannot be read"),
        ("rtt=20ms jitter=11ms", "rtt of at least twice the jitter"),
        ("outage=10s", "period/length"),
        ("outage=3s/10s", "shorter than its period"),
        ("outage=3s/0s", "shorter than its period"),
        ("outage=3s/3s", "shorter than its period"),
        ("seed=-1", "whole number"),
    ],
)
def test_what_is_no_shape_is_refused_with_a_remedy(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        LinkShape.parse(text)


def test_a_lane_of_a_recorded_day_answers_at_once() -> None:
    trace = RateTrace(tuple(map(float, range(86_400))), (1e6, 0.0) * 43_200, 86_400.0)
    lane = Lane(trace, outage=Outage(10.0, 3.0))
    for _ in range(1000):
        arrival_s = lane.deliver_at(0.0, 86_400_000)
    assert arrival_s == pytest.approx(2 * 86_400_000 * 1000 / 1e6 / 0.7, rel=1e-3)
