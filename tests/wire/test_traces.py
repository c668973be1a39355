"""Recorded rates: what each format becomes, what is refused and why, and the arithmetic on the result."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from splitwise_llm.errors import SpecError
from splitwise_llm.wire.traces import Direction, RateTrace, parse_trace, read_trace

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


def test_rows_of_a_log_last_the_median_step_so_pauses_are_left_out() -> None:
    trace = parse_trace("time_since_start,upload\n0,1\n1,2\n2,3\n120,4\n121,5\n", "up")
    assert trace.times_s == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert trace.period_s == 5


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
        ("0 8\n1 8\n2 8\n500 8\n", ":4: nothing is known from 2.0 to 500.0"),
        ("0 8\n1 -8\n", ":2: -8.0 is no rate"),
        ("0 8\n1 nan\n", ":2: nan is no rate"),
        ("0 8\n1 fast\n", ":2: 'fast' is not a number"),
        ("0 8\n", "do not tell how long"),
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
        ("time_since_start,upload\n0,8\nsoon,8\n", ":3: 'soon' in column 'time_since_start'"),
        ("time_since_start,upload\n", "do not tell how long"),
        ("Run 1\n8,16\nRun 2\n", ":3: a run without a list"),
        ("Run 1\n8,,16\n", ":2: '' is not a number"),
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


@given(trace=rate_traces(), laps=st.integers(1, 20))
def test_the_long_run_rate_is_the_mean(trace: RateTrace, laps: int) -> None:
    num_bytes = laps * trace.mean_bytes_per_s * trace.period_s
    first_s = next(time_s for time_s, rate in zip(trace.times_s, trace.bytes_per_s, strict=True) if rate)
    assert trace.finish_s(first_s, num_bytes) <= laps * trace.period_s + first_s + 1e-9
    assert trace.finish_s(first_s, num_bytes) > (laps - 1) * trace.period_s + first_s


def _data() -> Path:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SPLITWISE_DATA", beside)) / "net"
    if not (folder / "manifest.csv").exists():
        pytest.skip(f"no recorded traces in {folder}; point SPLITWISE_DATA at the folder that holds net/manifest.csv")
    return folder.parent


def test_recorded_traces_have_the_mean_and_the_length_their_manifest_says() -> None:
    data = _data()
    manifest = (data / "net/manifest.csv").read_text().splitlines()
    rows = [row for row in csv.DictReader(manifest) if row["direction"] in ("up", "down")]
    assert len(rows) > 50
    sampled_unevenly = {"hsdpa_norway", "wifi_5g_zhuge", "lumos5g", "mahimahi"}  # there it gives the mean over samples
    for row in rows:
        trace = read_trace(data / row["file"], row["direction"])  # type: ignore[arg-type]
        tolerance = 0.3 if row["family"] in sampled_unevenly else 1e-3
        assert trace.mean_bytes_per_s / MBIT == pytest.approx(float(row["mean_mbps"]), rel=tolerance), row["file"]
        assert trace.period_s == pytest.approx(float(row["duration_s"]), rel=0.12), row["file"]
