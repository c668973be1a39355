"""Recorded link rates: one small type and the file formats it is read from; it knows no link and no clock.

| format | a line | what it becomes |
| --- | --- | --- |
| packet times (mahimahi) | whole milliseconds, one 1500-byte packet each | 1 ms bins, none averaged away |
| columns | `time_s  Mbit/s` | the rate holds until the next line, the last one for the median step |
| CSV log of a regular sampler | a header with one of `CSV_RATES` and one of `CSV_TIMES` | a row lasts the median step |
| run lists | `Run k`, then Mbit/s every 0.1 s, comma separated | all runs, one after another |

The format is told by the content; a file may be gzipped; lines that are empty or start with `#` do not count.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Literal, Self

from splitwise_llm.errors import SpecError

Direction = Literal["up", "down"]

KBIT, MBIT = 1e3 / 8, 1e6 / 8  # bytes
PACKET_BYTES = 1500
LIST_STEP_S = 0.1
LONGEST_GAP_S = 60.0

CSV_RATES: dict[str, tuple[Direction, float]] = {
    "uplink_mbps": ("up", MBIT), "downlink_mbps": ("down", MBIT),
    "UL_bitrate": ("up", KBIT), "DL_bitrate": ("down", KBIT),
    "upload": ("up", MBIT), "download": ("down", MBIT),
    "RATE(MBit/s)": ("up", MBIT),
}  # fmt: skip
"""Column name -> direction, and bytes per second of one of its units."""

CSV_TIMES: dict[str, Callable[[str], float]] = {
    "time_since_start": float,
    "Timestamp": lambda text: _since_epoch(datetime.strptime(text, "%Y.%m.%d_%H.%M.%S")),
    "Time": lambda text: _since_epoch(datetime.strptime(text, "%a %b %d %H:%M:%S UTC %Y")),
    "timestamp_start_dl": lambda text: _since_epoch(datetime.fromisoformat(text)),
}
"""Column name -> how to read its seconds (from any origin)."""

_SLACK_BYTES = 1e-3  # sums of floats must not push the last byte of a frame across a silent stretch

_Lines = list[tuple[int, str]]  # (line number from 1, stripped text)


@dataclass(frozen=True, slots=True)
class RateTrace:
    """A rate that is constant between the times given, and starts over after `period_s`.

    `times_s` starts at 0 and rises; `bytes_per_s[i]` holds from `times_s[i]` until the next time, the last
    one until `period_s`. Raises SpecError when that is not so, or when nothing would ever get through.
    """

    times_s: tuple[float, ...] = field(repr=False)
    bytes_per_s: tuple[float, ...] = field(repr=False)
    period_s: float
    _moved: tuple[float, ...] = field(init=False, repr=False, compare=False)  # bytes by times_s[i]; then in all

    def __post_init__(self) -> None:
        ends_s = (*self.times_s[1:], self.period_s)
        if len(self.times_s) != len(self.bytes_per_s) or not self.times_s:
            raise SpecError("a trace needs as many times as rates, and one of each at least")
        if self.times_s[0] != 0 or not all(
            start < end < math.inf for start, end in zip(self.times_s, ends_s, strict=True)
        ):
            raise SpecError("the times of a trace start at 0, rise, and end before its period")
        if not all(0 <= rate < math.inf for rate in self.bytes_per_s):
            raise SpecError("the rates of a trace are finite and not negative")
        sizes = (rate * (end - start) for start, end, rate in zip(self.times_s, ends_s, self.bytes_per_s, strict=True))
        object.__setattr__(self, "_moved", tuple(accumulate(sizes, initial=0.0)))
        if self._moved[-1] <= _SLACK_BYTES:
            raise SpecError("every rate is zero: nothing would ever arrive; give a trace that carries something")

    @classmethod
    def constant(cls, bytes_per_s: float) -> Self:
        """The same rate for ever."""
        return cls((0.0,), (bytes_per_s,), 1.0)

    @property
    def mean_bytes_per_s(self) -> float:
        return self._moved[-1] / self.period_s

    @property
    def peak_bytes_per_s(self) -> float:
        return max(self.bytes_per_s)

    def finish_s(self, start_s: float, num_bytes: float) -> float:
        """When the last of `num_bytes` has left, if the first may leave at `start_s` >= 0: exact, O(log n)."""
        laps, within_s = divmod(start_s, self.period_s)
        here = bisect_right(self.times_s, within_s) - 1
        target = self._moved[here] + self.bytes_per_s[here] * (within_s - self.times_s[here]) + num_bytes
        more_laps, rest = divmod(target - _SLACK_BYTES, self._moved[-1])
        last = bisect_left(self._moved, rest, lo=1) - 1
        while self.bytes_per_s[last] == 0:  # only when rest is 0, at a silent start
            last += 1
        end_s = (
            (laps + more_laps) * self.period_s
            + self.times_s[last]
            + (rest - self._moved[last]) / self.bytes_per_s[last]
        )
        return max(start_s, end_s)


def read_trace(path: str | Path, direction: Direction) -> RateTrace:
    """The trace in a file, plain or gzipped; `direction` chooses where a file has both.

    Raises SpecError, naming file, line and remedy, when there is no such file or it is no trace.
    """
    try:
        content = Path(path).read_bytes()
        text = (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SpecError(f"{path}: a damaged or truncated gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the path of a trace file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not text; a trace is a text file, plain or gzipped") from error
    return parse_trace(text, direction, name=str(path))


def parse_trace(text: str, direction: Direction, name: str = "trace") -> RateTrace:
    """The trace in the text of a file; `name` is for messages. Raises SpecError as `read_trace` does."""
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise SpecError(f"{name}: is empty; a trace has at least one line with a time or a rate")
    try:
        return _reader_for(lines[0][1])(lines, direction)
    except _LineError as error:
        raise SpecError(f"{name}:{error.number}: {error}") from error
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from error
    except csv.Error as error:
        raise SpecError(f"{name}: a damaged CSV file ({error}); fetch it again") from error


class _LineError(SpecError):
    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def _reader_for(first: str) -> Callable[[_Lines, Direction], RateTrace]:
    words = re.split(r"[,\s]+", first)
    if all(_is_number(word) for word in words) and len(words) <= 2:
        return _packet_times if len(words) == 1 else _columns
    if first.startswith("Run "):
        return _run_lists
    if "," in first:
        return _csv_log
    raise SpecError(
        f"{first[:60]!r} begins no known trace: expected packet times in ms, `time_s Mbit/s` columns, "
        "a CSV header, or `Run 1`"
    )


def _packet_times(lines: _Lines, _: Direction) -> RateTrace:
    """The packets of millisecond t leave during (t-1, t]; the last line ends the period, as in mahimahi."""
    packets: dict[int, int] = {}  # by the millisecond in which the bin starts
    before_ms = 0
    for number, line in lines:
        if not line.isdecimal() or len(line) > 15:
            raise _LineError(number, f"{line!r} is not a whole number of milliseconds >= 0; one packet time per line")
        at_ms = int(line)
        if at_ms < before_ms:
            raise _LineError(number, f"time goes back from {before_ms} to {at_ms} ms; sort the file or cut it here")
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


def _columns(lines: _Lines, _: Direction) -> RateTrace:
    times_s: list[float] = []
    rates = []
    for number, line in lines:
        words = re.split(r"[,\s]+", line)
        if len(words) != 2:
            raise _LineError(number, f"{line!r} has not two columns, time_s and Mbit/s; is the file truncated?")
        time_s, rate = (_number(number, word) for word in words)
        if times_s and time_s <= times_s[-1]:
            raise _LineError(
                number, f"time goes from {times_s[-1]} to {time_s} s, and must rise; sort the file or cut it"
            )
        times_s.append(time_s)
        rates.append(_rate(number, rate, MBIT))
    step_s = _median_step_s(times_s)
    for (number, _line), before_s, time_s in zip(lines[1:], times_s, times_s[1:], strict=False):
        if time_s - before_s > max(LONGEST_GAP_S, 10 * step_s):
            raise _LineError(
                number,
                f"nothing is known from {before_s} to {time_s} s (the median step is {step_s:.3g} s); "
                "cut the file there or add a line that says what the rate was",
            )
    return RateTrace(tuple(time_s - times_s[0] for time_s in times_s), tuple(rates), times_s[-1] - times_s[0] + step_s)


def _csv_log(lines: _Lines, direction: Direction) -> RateTrace:
    """Pauses between measurements are left out, and clocks of whole seconds smoothed: every row lasts as long."""
    reader = csv.reader(line for _, line in lines)
    names = [name.strip() for name in next(reader)]
    of_direction = [name for name, (way, _) in CSV_RATES.items() if way == direction]
    rate_name = _known_column(names, of_direction, f"{direction}link rate")
    time_name = _known_column(names, CSV_TIMES, "time")
    times_s: list[float] = []
    rates = []
    for row in reader:
        number = lines[reader.line_num - 1][0]
        if len(row) != len(names):
            raise _LineError(number, f"{len(row)} fields where the header has {len(names)}; is the file truncated?")
        text = row[names.index(time_name)]
        try:
            times_s.append(CSV_TIMES[time_name](text))
        except ValueError as error:
            raise _LineError(number, f"{text!r} in column {time_name!r} is not a time; mend or drop the row") from error
        if len(times_s) > 1 and times_s[-1] < times_s[-2]:
            raise _LineError(number, f"time goes back to {text!r}; sort the file or cut it here")
        rates.append(_rate(number, _number(number, row[names.index(rate_name)]), CSV_RATES[rate_name][1]))
    return _even(rates, _median_step_s(times_s))


def _run_lists(lines: _Lines, _: Direction) -> RateTrace:
    """A run has one list, the rates, or several, of which the first two are times and rates."""
    rates: list[float] = []
    runs = [place for place, (_, line) in enumerate(lines) if line.startswith("Run ")]
    for start, end in pairwise([*runs, len(lines)]):
        lists = lines[start + 1 : end]
        if not lists:
            raise _LineError(lines[start][0], "a run without a list of rates; is the file truncated?")
        number, line = lists[0 if len(lists) == 1 else 1]
        rates += (_rate(number, _number(number, word), MBIT) for word in line.split(","))
    return _even(rates, LIST_STEP_S)


def _even(rates: list[float], step_s: float) -> RateTrace:
    return RateTrace(tuple(place * step_s for place in range(len(rates))), tuple(rates), len(rates) * step_s)


def _median_step_s(times_s: list[float]) -> float:
    steps_s = [after - before for before, after in pairwise(times_s)]
    if not steps_s or median(steps_s) <= 0:
        raise SpecError(
            f"{len(times_s)} rows do not tell how long a row lasts; a trace has two at least, at rising times"
        )
    return median(steps_s)


def _known_column(names: list[str], known: Iterable[str], what: str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise SpecError(
            f"no {what} among the columns {', '.join(names)[:200]}; known are {', '.join(known)}; "
            "ask for the other direction, or write two columns, `time_s Mbit/s`"
        )
    return found


def _number(number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise _LineError(number, f"{text!r} is not a number; mend or drop the line") from error


def _rate(number: int, value: float, unit_bytes: float) -> float:
    if not 0 <= value < math.inf:
        raise _LineError(number, f"{value} is no rate: rates are finite and not negative; mend or drop the line")
    return value * unit_bytes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _since_epoch(when: datetime) -> float:
    return (when.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
