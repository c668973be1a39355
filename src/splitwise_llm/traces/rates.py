"""Formats of recorded rates, told by their first line. Every one gives a `RateTrace`; no file is opened here."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise

from splitwise_llm.errors import SpecError
from splitwise_llm.traces.lines import (
    SORT_OR_CUT,
    Direction,
    Gaps,
    LineError,
    Lines,
    figure,
    is_number,
    known_column,
    laid_out,
    parse_s,
    run_lists,
    since_epoch,
)
from splitwise_llm.traces.series import RateTrace

KBIT, MBIT = 1e3 / 8, 1e6 / 8  # bytes
PACKET_BYTES = 1500
LIST_STEP_S = 0.1

CSV_RATES: dict[str, tuple[Direction, float]] = {
    "uplink_mbps": ("up", MBIT), "downlink_mbps": ("down", MBIT),
    "UL_bitrate": ("up", KBIT), "DL_bitrate": ("down", KBIT),
    "upload": ("up", MBIT), "download": ("down", MBIT),
    "RATE(MBit/s)": ("up", MBIT),
}  # fmt: skip
"""Column name -> direction, and bytes per second of one of its units."""

CSV_TIMES: dict[str, Callable[[str], float]] = {
    "time_since_start": float,
    "Timestamp": lambda text: since_epoch(datetime.strptime(text, "%Y.%m.%d_%H.%M.%S")),
    "Time": lambda text: since_epoch(datetime.strptime(text, "%a %b %d %H:%M:%S UTC %Y")),
    "timestamp_start_dl": lambda text: since_epoch(datetime.fromisoformat(text)),
}
"""Column name -> how to read its seconds (from any origin)."""

PROBE_SENT, PROBE_RTT = "pub_time(ms)", "delay(ms)"


def rate_reader(first: str) -> Callable[[Lines, Direction, Gaps], RateTrace]:
    words = re.split(r"[,\s]+", first)
    if all(is_number(word) for word in words) and len(words) <= 2:
        return _packet_times if len(words) == 1 else _columns
    if first.startswith("Run "):
        return _run_lists
    if "," in first:
        return _csv_log
    raise SpecError(
        f"{first[:60]!r} begins no known trace: expected packet times in ms, `time_s Mbit/s` columns, "
        "a CSV header, or `Run 1`"
    )


def _packet_times(lines: Lines, _direction: Direction, _gaps: Gaps) -> RateTrace:
    """The packets of millisecond t leave during (t-1, t]; the last line ends the period, as in mahimahi."""
    packets: dict[int, int] = {}  # by the millisecond in which the bin starts
    before_ms = 0
    for number, line in lines:
        if not line.isdecimal() or len(line) > 15:
            raise LineError(number, f"{line!r} is not a whole number of milliseconds >= 0; one packet time per line")
        at_ms = int(line)
        if at_ms < before_ms:
            raise LineError(number, f"time goes back from {before_ms} to {at_ms} ms; sort the file or cut it here")
        packets[max(at_ms - 1, 0)] = packets.get(max(at_ms - 1, 0), 0) + 1
        before_ms = at_ms
    starts_ms, counts = [0], [packets.get(0, 0)]
    for start_ms, count in packets.items():
        if count != counts[-1]:
            starts_ms.append(start_ms)
            counts.append(count)
        if start_ms + 1 < before_ms and start_ms + 1 not in packets:
            starts_ms.append(start_ms + 1)
            counts.append(0)
    bytes_per_s = {count: count * PACKET_BYTES / 1e-3 for count in set(counts)}
    return RateTrace(
        tuple(start_ms / 1e3 for start_ms in starts_ms), tuple(bytes_per_s[count] for count in counts), before_ms / 1e3
    )


def _columns(lines: Lines, _: Direction, gaps: Gaps) -> RateTrace:
    times_s: list[float] = []
    rates = []
    for number, line in lines:
        words = re.split(r"[,\s]+", line)
        if len(words) != 2:
            raise LineError(number, f"{line!r} has not two columns, time_s and Mbit/s; is the file truncated?")
        times_s.append(parse_s(number, words[0]))
        if len(times_s) > 1 and times_s[-1] <= times_s[-2]:
            raise LineError(number, f"time goes from {times_s[-2]} to {times_s[-1]} s, and must rise; {SORT_OR_CUT}")
        rates.append(_rate(number, words[1], MBIT))
    starts_s, period_s = laid_out([number for number, _ in lines], times_s, gaps)
    return RateTrace(starts_s, tuple(rates), period_s)


def _csv_log(lines: Lines, direction: Direction, gaps: Gaps) -> RateTrace:
    reader = csv.reader(line for _, line in lines)
    names = [name.strip() for name in next(reader)]
    of_direction = [name for name, (way, _) in CSV_RATES.items() if way == direction]
    rate_name = known_column(names, of_direction, f"{direction}link rate")
    time_name = known_column(names, CSV_TIMES, "time")
    numbers: list[int] = []
    times_s: list[float] = []
    rates = []
    for row in reader:
        number = lines[reader.line_num - 1][0]
        if len(row) != len(names):
            raise LineError(number, f"{len(row)} fields where the header has {len(names)}; is the file truncated?")
        text = row[names.index(time_name)]
        numbers.append(number)
        times_s.append(parse_s(number, text, CSV_TIMES[time_name]))
        if len(times_s) > 1 and times_s[-1] < times_s[-2]:
            raise LineError(number, f"time goes back to {text!r}; {SORT_OR_CUT}")
        rates.append(_rate(number, row[names.index(rate_name)], CSV_RATES[rate_name][1]))
    starts_s, period_s = laid_out(numbers, times_s, gaps)
    return RateTrace(starts_s, tuple(rates), period_s)


def _run_lists(lines: Lines, _: Direction, gaps: Gaps) -> RateTrace:
    """A run has one list, the rates, or several, of which the first two are times and rates."""
    starts_s: list[float] = []
    rates: list[float] = []
    now_s = 0.0
    for lists in run_lists(lines):
        number, line = lists[0 if len(lists) == 1 else 1]
        of_run = [_rate(number, word, MBIT) for word in line.split(",")]
        times_s = [place * LIST_STEP_S for place in range(len(of_run))]
        if len(lists) > 1:
            times_s = [parse_s(lists[0][0], word) for word in lists[0][1].split(",")]
        if len(times_s) != len(of_run):
            raise LineError(number, f"{len(of_run)} rates for {len(times_s)} times; is the file truncated?")
        for before_s, after_s in pairwise(times_s):
            if after_s <= before_s:
                raise LineError(lists[0][0], f"time goes from {before_s} to {after_s} s, and must rise; {SORT_OR_CUT}")
        within_s, run_s = laid_out([number] * len(of_run), times_s, gaps, LIST_STEP_S)
        starts_s += (now_s + start_s for start_s in within_s)
        rates += of_run
        now_s += run_s
    return RateTrace(tuple(starts_s), tuple(rates), now_s)


def _rate(number: int, text: str, unit_bytes: float) -> float:
    value = figure(number, text)
    if not 0 <= value < math.inf:
        raise LineError(number, f"{value} is no rate: rates are finite and not negative; mend or drop the line")
    return value * unit_bytes
