"""Recorded rates and round trips: what each format becomes, what is refused and why, and the arithmetic on it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import os
from bisect import bisect_right
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitwise_llm.errors import SpecError
from splitwise_llm.traces import (
    Direction,
    GapError,
    RateTrace,
    RttTrace,
    named_trace,
    parse_rtt,
    parse_trace,
    read_rtt,
    read_trace,
)

MBIT = 125_000.0  # bytes


@st.composite
def rate_traces(draw: st.DrawFn) -> RateTrace:
    steps = draw(
        st.lists(
            st.tuples(st.integers(1, 50), st.one_of(st.just(0), st.integers(1, 10_000))), min_size=1, max_size=12
        ).filter(lambda steps: any(rate for _, rate in steps))
    )
    times_s, now_s = [], 0.0
    for tenths, _ in steps:
        times_s.append(now_s)
        now_s += tenths / 10
    return RateTrace(tuple(times_s), tuple(float(rate) for _, rate in steps), now_s)


def test_columns_are_seconds_and_megabits_from_the_first_time_on() -> None:
    trace = parse_trace("600.0\t8\n600.5 16\n\n602.5  0\n603 4\n", "up")
    assert trace.times_s == (0.0, 0.5, 2.5, 3.0)
    assert trace.bytes_per_s == (1e6, 2e6, 0.0, 0.5e6)  # 8 Mbit/s is 1 MB/s
    assert trace.period_s == 3.5  # the last line lasts the median step


def test_a_mahimahi_line_is_one_packet_that_has_left_by_its_millisecond() -> None:
    trace = parse_trace("0\n3\n3\n4\n10\n", "down")
    assert trace.period_s == 0.010
    assert trace.mean_bytes_per_s == pytest.approx(5 * 1500 / 0.010)
    assert trace.finish_s(0.0, 1500) == pytest.approx(0.001)  # packets of time 0 share the first bin
    assert trace.finish_s(0.001, 3000) == pytest.approx(0.003)
    assert trace.finish_s(0.003, 1500) == pytest.approx(0.004)
    assert trace.finish_s(0.005, 1500) == pytest.approx(0.010)
    assert trace.finish_s(0.010, 1500) == pytest.approx(0.011)  # and it starts over


def test_a_mahimahi_file_of_one_line_is_a_constant_rate() -> None:
    trace = parse_trace("1\n", "up")  # a packet every millisecond: 12 Mbit/s
    assert (trace.times_s, trace.bytes_per_s, trace.period_s) == ((0.0,), (12 * MBIT,), 0.001)


CSV_SAMPLES: list[tuple[str, Direction, float]] = [
    ("time_since_start,uplink_mbps,downlink_mbps\n0,8,80\n1,8,80\n7,8,80\n", "up", 1e6),
    ("time_since_start,uplink_mbps,downlink_mbps\n0,8,80\n1,8,80\n7,8,80\n", "down", 1e7),
    ("Timestamp,DL_bitrate,UL_bitrate\n2020.02.13_13.03.24,8000,80\n2020.02.13_13.03.25,8000,80\n", "down", 1e6),
    ("Timestamp,DL_bitrate,UL_bitrate\n2020.02.13_13.03.24,8000,80\n2020.02.13_13.03.25,8000,80\n", "up", 1e4),
    ("Time,RATE(MBit/s)\nSat Aug 20 13:29:30 UTC 2022,8\nSat Aug 20 13:29:33 UTC 2022,8\n", "up", 1e6),
    (
        "timestamp_start_dl,download,upload\n2024-04-19 16:23:00.001039872,8,16\n2024-04-19 16:23:01.001035008,8,16\n",
        "up",
        2e6,
    ),
]


@pytest.mark.parametrize(("text", "direction", "bytes_per_s"), CSV_SAMPLES)
def test_a_log_with_known_columns_is_read_in_its_own_unit(text: str, direction: Direction, bytes_per_s: float) -> None:
    assert parse_trace(text, direction).mean_bytes_per_s == pytest.approx(bytes_per_s)


def test_a_row_of_a_log_holds_until_the_next_so_that_no_time_is_left_out() -> None:
    trace = parse_trace("time_since_start,upload\n0,8\n1,16\n2,24\n9,32\n10,40\n", "up")
    assert trace.times_s == (0.0, 1.0, 2.0, 9.0, 10.0)
    assert trace.period_s == 11


def test_rows_of_one_second_share_it() -> None:
    trace = parse_trace("time_since_start,upload\n0,8\n1,16\n1,24\n2,32\n2,40\n", "up")
    assert trace.times_s == (0.0, 1.0, 1.5, 2.0, 2.5)
    assert trace.period_s == 3


PAUSES: list[tuple[str, int]] = [
    ("time_since_start,upload\n0,8\n1,16\n2,24\n120,32\n121,40\n", 5),
    ("0 8\n1 16\n2 24\n120 32\n121 40\n", 4),
    ("Run 1\n0.1,1.1,2.1,120.1,121.1\n8,16,24,32,40\n", 3),
]


@pytest.mark.parametrize(("text", "line"), PAUSES)
def test_a_pause_of_the_recorder_is_refused_until_asked_to_be_left_out(text: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "walk.txt"
    file.write_text(text)
    with pytest.raises(SpecError, match=r'nothing is known from 2 s .* to 120 s .*gaps="cut".*FILE:cut') as caught:
        read_trace(file, "up")
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert isinstance(caught.value, GapError)
    assert caught.value.where.endswith("(the median step is 1 s)")
    cut = read_trace(file, "up", gaps="cut")
    assert cut.times_s == pytest.approx((0.0, 1.0, 2.0, 3.0, 4.0))
    assert cut.bytes_per_s == (1e6, 2e6, 3e6, 4e6, 5e6)
    assert cut.period_s == pytest.approx(5.0)
    assert named_trace(f"{file}:cut", "up") == cut
    with pytest.raises(SpecError, match="nothing is known"):
        named_trace(str(file), "up")


def test_what_is_a_pause_depends_on_the_usual_step() -> None:
    assert parse_trace("0 8\n5 8\n10 8\n55 8\n", "up").period_s == 60  # nine steps
    assert parse_trace("0 8\n1 8\n2 8\n12 8\n", "up").period_s == 13  # 10 s
    with pytest.raises(SpecError, match="nothing is known"):
        parse_trace("0 8\n1 8\n2 8\n12.1 8\n", "up")


def test_silence_between_packets_is_no_pause() -> None:
    trace = parse_trace("1\n80000\n", "up")
    assert trace.rate_at(40.0) == 0
    assert trace.finish_s(0.5, 1500) == pytest.approx(80.0)


def test_a_quoted_field_may_hold_commas_and_line_ends() -> None:
    trace = parse_trace('time_since_start,note,upload\n0,"a, b",8\n1,"c\nd",16\n2,e,24\n', "up")
    assert trace.bytes_per_s == (1e6, 2e6, 3e6)


def test_run_lists_are_joined_and_of_four_lists_the_second_is_the_rate() -> None:
    trace = parse_trace("\n####\nRun 1\n8,16\n####\nRun 2\n0.1,0.2\n24,32\n0.1,0.2\n99,99", "up")
    assert trace.bytes_per_s == (1e6, 2e6, 3e6, 4e6)
    assert trace.period_s == pytest.approx(0.4)


def test_a_gzipped_file_is_read_as_the_plain_one(tmp_path: Path) -> None:
    plain, packed = tmp_path / "trace", tmp_path / "trace.gz"
    plain.write_text("0 8\n1 16\n")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(plain, "up") == read_trace(packed, "up") == RateTrace((0.0, 1.0), (1e6, 2e6), 2.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n# only a comment\n", "is empty"),
        ("0 8\n1 8\n2", ":3: '2' has not two columns"),
        ("0 8\n2 8\n1 8\n", ":3: time goes from 2.0 to 1.0"),
        ("0 8\n1 8\n1 8\n", ":3: time goes from 1.0 to 1.0"),
        ("0 8\n1 8\n2 8\n500 8\n", ":4: nothing is known from 2 s"),
        ("0 8\n1 -8\n", ":2: -8.0 is no rate"),
        ("0 8\n1 nan\n", ":2: nan is no rate"),
        ("0 8\n1 fast\n", ":2: 'fast' is not a number"),
        ("0 8\n", "do not tell how long"),
        ("nan 8\n1 8\n", ":1: 'nan' is not a time"),
        ("0 0\n1 0\n", "nothing would ever arrive"),
        ("3\n2\n", ":2: time goes back from 3 to 2 ms"),
        ("3\n-4\n", ":2: '-4' is not a whole number"),
        ("3\n4.5\n", ":2: '4.5' is not a whole number"),
        ("3\nabc\n", ":2: 'abc' is not a whole number"),
        ("0\n0\n", "end before its period"),
        ("hello world\n", "begins no known trace"),
        ("a,b\n1,2\n", "no uplink rate among the columns a, b"),
        ("upload,b\n1,2\n", "no time among the columns"),
        ("time_since_start,upload\n0,8\n1\n", ":3: 1 fields where the header has 2"),
        ("time_since_start,upload\n0,8\n1,-\n", ":3: '-' is not a number"),
        ("time_since_start,upload\n0,8\n1,-3\n", ":3: -3.0 is no rate"),
        ("time_since_start,upload\n5,8\n1,8\n", ":3: time goes back"),
        ("time_since_start,upload\n0,8\nsoon,8\n", ":3: 'soon' is not a time"),
        ("time_since_start,upload\n", "do not tell how long"),
        ("Run 1\n8,16\nRun 2\n", ":3: a run without a list"),
        ("Run 1\n8,,16\n", ":2: '' is not a number"),
        ("Run 1\n0.1,0.2\n8\n", ":3: 1 rates for 2 times"),
        ("Run 1\n0.1,0.1\n8,8\n", ":2: time goes from 0.1 to 0.1"),
        ("Run 1\n0,0\n", "nothing would ever arrive"),
        ('time_since_start,upload\n0,"' + 200_000 * "8", "damaged CSV file"),
        (400 * "9", "is not a whole number"),
    ],
)
def test_what_is_no_trace_is_refused_with_file_and_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "walk.txt"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_trace(file, "up")
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)


@given(text=st.text(alphabet='0123456789.,-+ \n#"eainfRutmp_slod', max_size=60))
@example("0,1\nnan,1\n2,1")
@example("time_since_start,upload\nnan,1\n1e400,1")
def test_any_text_is_a_trace_or_refused_in_good_order(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert parse_trace(text, "up").mean_bytes_per_s > 0


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    whole = gzip.compress(b"0 8\n1 16\n" * 1000)
    (tmp_path / "half.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "spoilt.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    for name, says in (
        ("half.gz", "truncated"),
        ("spoilt.gz", "damaged"),
        ("picture", "is not text"),
        ("none", "No such file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(SpecError, match=says):
            read_trace(tmp_path / name, "up")


@pytest.mark.parametrize(
    ("times_s", "rates", "period_s"),
    [
        ((), (), 1.0),
        ((0.0,), (1.0, 2.0), 1.0),
        ((1.0,), (1.0,), 2.0),
        ((0.0, 0.0), (1.0, 1.0), 2.0),
        ((0.0, 2.0), (1.0, 1.0), 2.0),
        ((0.0,), (-1.0,), 1.0),
        ((0.0,), (float("inf"),), 1.0),
        ((0.0,), (0.0,), 1.0),
    ],
)
def test_a_trace_that_cannot_be_is_not_made(
    times_s: tuple[float, ...], rates: tuple[float, ...], period_s: float
) -> None:
    with pytest.raises(SpecError):
        RateTrace(times_s, rates, period_s)


@given(trace=rate_traces(), start_s=st.floats(0, 100), num_bytes=st.integers(1, 100_000))
def test_finishing_agrees_with_counting_bytes_piece_by_piece(trace: RateTrace, start_s: float, num_bytes: int) -> None:
    def moved_by(when_s: float) -> float:  # counted anew from 0, segment by segment
        laps, within_s = divmod(when_s, trace.period_s)
        total = partial = 0.0
        for begin_s, end_s, rate in zip(
            trace.times_s, (*trace.times_s[1:], trace.period_s), trace.bytes_per_s, strict=True
        ):
            total += rate * (end_s - begin_s)
            partial += rate * max(0.0, min(end_s, within_s) - begin_s)
        return laps * total + partial

    end_s = trace.finish_s(start_s, num_bytes)
    assert end_s >= start_s
    assert moved_by(end_s) - moved_by(start_s) == pytest.approx(num_bytes, abs=0.01, rel=1e-9)
    assert moved_by(end_s - 1e-4) - moved_by(start_s) < num_bytes  # and no earlier


@given(trace=rate_traces(), t_s=st.floats(-50, 200))
def test_a_rate_holds_until_its_next_change_and_is_another_there(trace: RateTrace, t_s: float) -> None:
    change_s = trace.next_change_s(t_s)
    assert change_s > t_s
    if len(set(trace.bytes_per_s)) == 1:
        assert change_s == math.inf
        return
    assert change_s <= t_s + trace.period_s + 1e-9
    assert trace.rate_at(change_s) != trace.rate_at(t_s)
    assert trace.rate_at(math.nextafter(change_s, -math.inf)) == trace.rate_at(t_s)
    assert trace.rate_at((t_s + change_s) / 2) == trace.rate_at(t_s)


@given(trace=rate_traces())
def test_walking_from_change_to_change_meets_the_rates_in_their_order(trace: RateTrace) -> None:
    if len(set(trace.bytes_per_s)) == 1:
        return
    t_s = moved = 0.0
    while t_s < 30 * trace.period_s:  # each step by the floats the walk before gave
        end_s = min(trace.next_change_s(t_s), 30 * trace.period_s)
        moved += trace.rate_at(t_s) * (end_s - t_s)
        t_s = end_s
    assert moved == pytest.approx(30 * trace.mean_bytes_per_s * trace.period_s)


def test_the_rate_of_a_moment_starts_over_with_the_period() -> None:
    trace = RateTrace((0.0, 1.0, 4.0), (5.0, 7.0, 5.0), 5.0)
    assert [trace.rate_at(t_s) for t_s in (0.0, 0.99, 1.0, 3.99, 4.0, 5.0, 6.0, -1.0, -1.01)] == [
        5.0, 5.0, 7.0, 7.0, 5.0, 5.0, 7.0, 5.0, 7.0,
    ]  # fmt: skip
    assert [trace.next_change_s(t_s) for t_s in (0.0, 1.0, 4.0, 5.0, 6.0)] == [1.0, 4.0, 6.0, 6.0, 9.0]
    assert RateTrace.constant(5.0).next_change_s(3.0) == math.inf
    with pytest.raises(SpecError, match="too far"):
        trace.rate_at(math.inf)


@given(trace=rate_traces(), start_s=st.floats(0, 50), for_s=st.floats(0.1, 50))
def test_what_gets_through_meanwhile_agrees_with_when_it_is_through(
    trace: RateTrace, start_s: float, for_s: float
) -> None:
    num_bytes = trace.bytes_between(start_s, start_s + for_s)
    assert trace.mean_over(start_s, start_s + for_s) * for_s == pytest.approx(num_bytes, rel=1e-6, abs=1e-6)
    assert num_bytes > -1e-6
    if num_bytes > 1:
        assert trace.finish_s(start_s, num_bytes) <= start_s + for_s + 1e-6
    assert trace.mean_over(start_s, start_s + 7 * trace.period_s) == pytest.approx(trace.mean_bytes_per_s)


def test_quantiles_weigh_a_rate_by_how_long_it_lasts() -> None:
    trace = RateTrace((0.0, 1.0, 4.0), (30.0, 10.0, 20.0), 10.0)  # 10 for 3 s, 20 for 6 s, 30 for 1 s
    shares = (0, 0.05, 0.3, 0.31, 0.5, 0.9, 0.91, 1)
    assert [trace.quantile_bytes_per_s(q) for q in shares] == [10, 10, 10, 20, 20, 20, 30, 30]
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(SpecError, match="share from 0 to 1"):
            trace.quantile_bytes_per_s(q)
    with pytest.raises(SpecError, match="later end"):
        trace.mean_over(1.0, 1.0)


@given(trace=rate_traces(), laps=st.integers(1, 20))
def test_the_long_run_rate_is_the_mean(trace: RateTrace, laps: int) -> None:
    num_bytes = laps * trace.mean_bytes_per_s * trace.period_s
    first_s = next(time_s for time_s, rate in zip(trace.times_s, trace.bytes_per_s, strict=True) if rate)
    assert trace.finish_s(first_s, num_bytes) <= laps * trace.period_s + first_s + 1e-9
    assert trace.finish_s(first_s, num_bytes) > (laps - 1) * trace.period_s + first_s


PING = """\
PING 10.0.0.1 (10.0.0.1) 56(84) bytes of data.
64 bytes from 10.0.0.1: icmp_seq=1 ttl=64 time=20.0 ms
64 bytes from host.net (10.0.0.1): icmp_seq=2 ttl=64 time=9.5 ms
64 bytes from 10.0.0.1: icmp_seq=5 ttl=64 time=30 ms
64 bytes from 10.0.0.1: icmp_seq=4 ttl=64 time=1230 ms
64 bytes from 10.0.0.1: icmp_seq=5 ttl=64 time=31 ms (DUP!)
"""
STATISTICS = """
--- 10.0.0.1 ping statistics ---
6 packets transmitted, 4 received, +1 duplicates, 33% packet loss, time 10000ms
rtt min/avg/max/mdev = 9.500/322.000/1230.000/1.0 ms, pipe 2
"""


def test_a_ping_log_is_a_probe_a_second_in_the_order_of_sending_and_a_missing_one_was_lost() -> None:
    trace = parse_rtt(PING)
    assert trace.times_s == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert trace.rtt_s == (0.02, 0.0095, math.inf, 1.23, 0.03)  # the first answer to a probe counts
    assert trace.period_s == 5.0
    assert trace.outages == ((2.0, 3.0),)
    assert trace.lost_share == 0.2


def test_statistics_of_ping_tell_its_interval_and_what_was_under_way_at_the_end_is_not_counted() -> None:
    trace = parse_rtt(PING + STATISTICS)
    assert trace.times_s == (0.0, 2.0, 4.0, 6.0, 8.0)
    assert trace.period_s == 10.0


CLOCKED_PING = """\
Start time: 1684001346157
[2023-05-13 14:09:06.300000] PING 10.0.0.1 (10.0.0.1) 38(66) bytes of data.
[2023-05-13 14:09:06.300000] 46 bytes from 10.0.0.1: icmp_seq=1 ttl=50 time=100 ms
[2023-05-13 14:09:07.000000] From 10.0.0.9 icmp_seq=2 Destination Host Unreachable
[2023-05-13 14:09:07.200000] 46 bytes from 10.0.0.1: icmp_seq=4 ttl=50 time=400 ms
[2023-05-13 14:09:07.100000] 46 bytes from 10.0.0.1: icmp_seq=5 ttl=50 time=100 ms
[2023-05-13 14:09:36.200209]
End time: 1684001376210
"""


def test_a_clock_in_a_ping_log_tells_when_a_probe_came_back() -> None:
    trace = parse_rtt(CLOCKED_PING)
    assert trace.times_s == pytest.approx((0.0, 0.2, 0.4, 0.6, 0.8))
    assert trace.rtt_s == (0.1, math.inf, math.inf, 0.4, 0.1)
    assert trace.outages == (pytest.approx((0.2, 0.6)),)
    epoch = parse_rtt(
        "[1684001346.3] 46 bytes from a: icmp_seq=1 ttl=50 time=100 ms\n"
        "[1684001346.7] 46 bytes from a: icmp_seq=2 ttl=50 time=300 ms\n"
    )
    assert epoch.times_s == pytest.approx((0.0, 0.2))


def test_a_clock_that_lags_a_little_keeps_the_order_of_the_probes() -> None:
    trace = parse_rtt(
        "".join(
            f"[{clock}] 46 bytes from a: icmp_seq={place} ttl=50 time=100 ms\n"
            for place, clock in enumerate((0, 1, 2.4, 2.2, 4))
        )
    )
    assert trace.times_s == pytest.approx((0.0, 1.0, 2.4, 3.2, 4.0))


def test_sequence_numbers_of_ping_start_over_after_16_bits() -> None:
    lines = [
        f"64 bytes from a: icmp_seq={place % 2**16} ttl=1 time={place - 65_000} ms" for place in range(65_534, 65_540)
    ]
    assert parse_rtt("\n".join(lines)).rtt_s == pytest.approx((0.534, 0.535, 0.536, 0.537, 0.538, 0.539))


def test_a_table_of_round_trips_is_read_by_its_header() -> None:
    trace = parse_rtt(
        "pub_time(ms) sub_time(ms) delay(ms) cellid(db)\n1722584020826 1722584020856 30 5C\n"
        "1722584020881 1722584020901 20 5C\n1722584020981 1722584020999 18 5C\n"
    )
    assert trace.times_s == pytest.approx((0.0, 0.055, 0.155))
    assert trace.rtt_s == (0.03, 0.02, 0.018)
    assert trace.period_s == pytest.approx(0.155 + 0.0775)


def test_lists_of_round_trips_are_joined() -> None:
    trace = parse_rtt("\n###\nRun 1\n10,20\n###\nRun 3\n30.5\n")
    assert trace.times_s == pytest.approx((0.0, 0.2, 0.4))
    assert trace.rtt_s == (0.01, 0.02, 0.0305)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("hello world\n", "begins no known log of round trips"),
        ("interval,RTT1\n1,2\n", "begins no known log of round trips"),
        ("PING 10.0.0.1 56 bytes of data.\n", "no probe is answered"),
        (PING + "64 bytes from 10.0.0.1: icm", ":7: '64 bytes from 10.0.0.1: icm' is no whole answer"),
        (PING + "64 bytes from 10.0.0.1: icmp_seq=6 ttl=64 time=1", ":7: "),
        (PING + "64 byt", ":7: '64 byt' is no line of ping"),
        (PING + PING, ":7: a second log begins here"),
        (PING + "64 bytes from a: icmp_seq=2 ttl=64 time=10 ms", ":7: icmp_seq=2 is answered twice"),
        (PING + "64 bytes from a: icmp_seq=6 ttl=64 time=1.2.3 ms", ":7: '1.2.3' is not a number"),
        (PING + "[1.0] 64 bytes from a: icmp_seq=6 ttl=64 time=1 ms", "some answers have a clock"),
        ("[noon] 64 bytes from a: icmp_seq=6 ttl=64 time=1 ms", ":1: 'noon' is not a time"),
        (
            "[9] 64 bytes from a: icmp_seq=1 ttl=6 time=1 ms\n[7] 64 bytes from a: icmp_seq=2 ttl=6 time=1 ms",
            ":2: time goes back by 2 s",
        ),
        ("pub_time(ms) delay(ms)\n", "do not tell how long"),
        ("pub_time(ms) delay(ms)\n1 2\n3\n", ":3: 1 fields where the header has 2"),
        ("pub_time(ms) delay(ms)\n2 2\n1 2\n", ":3: time goes from 2.0 to 1.0 ms"),
        ("pub_time(ms) delay(ms)\n1 2\n2 -1\n", ":3: -1.0 ms is no round trip"),
        ("Run 1\n1,2\n3,4\n", ":3: a second list"),
        ("Run 1\nRun 2\n3,4\n", ":1: a run without a list"),
        ("Run 1\n3,inf\n", ":2: inf ms is no round trip"),
    ],
)
def test_what_is_no_log_of_round_trips_is_refused_with_file_and_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "ping.txt"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_rtt(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)


def test_a_machine_that_slept_while_it_pinged_left_a_pause_and_one_that_was_cut_off_an_outage() -> None:
    def log(*probes: tuple[int, float]) -> str:
        return "".join(f"[{clock}] 64 bytes from a: icmp_seq={place} ttl=1 time=0 ms\n" for place, clock in probes)

    slept = log((1, 0.0), (2, 1.0), (3, 2.0), (4, 3602.0), (5, 3603.0))
    with pytest.raises(SpecError, match=r":4: nothing is known from 2 s after the first row to 3602 s"):
        parse_rtt(slept)
    assert parse_rtt(slept, gaps="cut").times_s == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert parse_rtt(log((1, 0.0), (2, 1.0), (61, 60.0))).outages == ((2.0, 60.0),)


@given(
    text=st.one_of(
        st.text(alphabet='0123456789.,-+ \n#"[]eainfRu', max_size=60),
        st.lists(st.sampled_from([*PING.splitlines(), *CLOCKED_PING.splitlines(), *STATISTICS.splitlines()])).map(
            "\n".join
        ),
    )
)
def test_any_text_is_a_log_of_round_trips_or_refused_in_good_order(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert parse_rtt(text).quantile_s(0) < math.inf


@pytest.mark.parametrize(
    ("times_s", "rtt_s", "period_s"),
    [
        ((), (), 1.0),
        ((0.0,), (1.0, 2.0), 1.0),
        ((0.0, 2.0), (1.0, 1.0), 2.0),
        ((0.0,), (-1.0,), 1.0),
        ((0.0,), (math.nan,), 1.0),
        ((0.0, 1.0), (math.inf, math.inf), 2.0),
    ],
)
def test_round_trips_that_cannot_be_are_not_made(
    times_s: tuple[float, ...], rtt_s: tuple[float, ...], period_s: float
) -> None:
    with pytest.raises(SpecError):
        RttTrace(times_s, rtt_s, period_s)


def test_a_round_trip_holds_until_the_next_probe_and_starts_over() -> None:
    trace = RttTrace((0.0, 1.0, 2.0, 3.0), (0.1, 0.1, math.inf, math.inf), 5.0)
    assert [trace.at(t_s) for t_s in (0.0, 1.9, 2.0, 4.9, 5.0, 7.0)] == [0.1, 0.1, math.inf, math.inf, 0.1, math.inf]
    assert [trace.next_change_s(t_s) for t_s in (0.0, 2.0, 6.0)] == [2.0, 5.0, 7.0]
    assert trace.outages == ((2.0, 5.0),)
    assert (trace.quantile_s(0.4), trace.quantile_s(0.5), trace.lost_share) == (0.1, math.inf, 0.6)


@given(trace=rate_traces(), t_s=st.floats(0, 100))
def test_pieces_are_found_as_by_looking_at_the_list(trace: RateTrace, t_s: float) -> None:
    starts_s = [lap * trace.period_s + start_s for lap in range(1100) for start_s in trace.times_s]
    assert trace.rate_at(t_s) == (trace.bytes_per_s * 1100)[bisect_right(starts_s, t_s) - 1]


def _data() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPLITWISE_DATA", beside)) / "net"
    if not (folder / "manifest.csv").exists():
        pytest.skip(f"no recorded traces in {folder}; point SPLITWISE_DATA at the folder that holds net/manifest.csv")
    return folder.parent


def _manifest(data: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((data / "net/manifest.csv").read_text().splitlines()))


PAUSED = {"throughput_first_two_thirds.csv.gz", "throughput_driving_5g_throughput.list.gz", "xu5g_0.pitree-trace",
          "xu5g_3.pitree-trace"}  # fmt: skip


def test_recorded_traces_have_the_mean_and_the_length_their_manifest_says() -> None:
    data = _data()
    rows = [row for row in _manifest(data) if row["direction"] in ("up", "down")]
    assert len(rows) > 50
    # The manifest weighs all samples alike: those of uneven steps, and two in the same second.
    tolerances = {"hsdpa_norway": 0.3, "wifi_5g_zhuge": 0.3, "irish5g": 0.1, "mn5g_walk_power": 0.04}
    paused = set()
    for row in rows:
        try:
            trace = read_trace(data / row["file"], row["direction"])  # type: ignore[arg-type]
        except SpecError:
            paused.add(Path(row["file"]).name)
            trace = read_trace(data / row["file"], row["direction"], gaps="cut")  # type: ignore[arg-type]
        tolerance = tolerances.get(row["family"], 0.01)
        assert trace.mean_bytes_per_s / MBIT == pytest.approx(float(row["mean_mbps"]), rel=tolerance), row["file"]
        length = 0.25 if row["family"] == "mn5g_walk_power" else 0.12  # there it counts rows, not missing seconds
        assert trace.period_s == pytest.approx(float(row["duration_s"]), rel=length), row["file"]
    assert paused == PAUSED


def test_recorded_round_trips_have_the_spread_their_manifest_says() -> None:
    data = _data()
    rows = [row for row in _manifest(data) if row["direction"] == "rtt" and row["family"] != "rtt/rrc_probe"]
    assert len(rows) > 35
    for row in rows:
        trace = read_rtt(data / row["file"])
        rtts_ms = [rtt_s * 1e3 for rtt_s in trace.rtt_s if rtt_s < math.inf]
        assert len(rtts_ms) in (int(row["rtt_n"]), int(row["rtt_n"]) - 1), row["file"]  # one has a duplicate
        assert (min(rtts_ms), max(rtts_ms)) == pytest.approx(
            (float(row["rtt_min_ms"]), float(row["rtt_max_ms"])), rel=1e-3, abs=1
        )
        assert fmean(rtts_ms) == pytest.approx(float(row["rtt_mean_ms"]), rel=0.01)
        assert trace.quantile_s(0.5) * 1e3 == pytest.approx(float(row["rtt_p50_ms"]), rel=0.05), row["file"]
        assert trace.lost_share == 0
