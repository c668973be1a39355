"""Recorded link rates and round-trip times: two small types and the files they are read from; no link, no clock.

| rates | a line | what it becomes |
| --- | --- | --- |
| packet times (mahimahi) | whole milliseconds, one 1500-byte packet each | 1 ms bins, none averaged away |
| columns | `time_s  Mbit/s` | the rate holds until the next line, the last one for the median step |
| CSV log of a sampler | a header with one of `CSV_RATES` and one of `CSV_TIMES` | as columns |
| run lists | `Run k`, then Mbit/s every 0.1 s, comma separated | all runs, one after another, as if one |

| round trips | a line | what it becomes |
| --- | --- | --- |
| `ping` output | `[clock] ... icmp_seq=7 ... time=23.5 ms`, the clock optional | a probe at the time it was sent |
| table | a header with `pub_time(ms)` and `delay(ms)` | a probe at `pub_time` |
| run lists | `Run k`, then RTTs in ms, comma separated | a probe every 0.2 s, all runs one after another |

A probe between two answered ones that has no answer of its own was lost: its RTT is infinite. What was still
under way when a log ended, and what a list leaves out without a word, is not known and not counted.

Where a recorder paused, nothing is known. A pause (over 10 s and over ten median steps) is refused, unless
`gaps="cut"`: then the line before it lasts the median step, and what follows moves up.

The format is told by the content; a file may be gzipped; lines that are empty or start with `#` do not count.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Literal, Self, TypeVar

from splitwise_llm.errors import SpecError

Direction = Literal["up", "down"]
Gaps = Literal["refuse", "cut"]

KBIT, MBIT = 1e3 / 8, 1e6 / 8  # bytes
PACKET_BYTES = 1500
LIST_STEP_S = 0.1
PING_LIST_STEP_S = 0.2
"""Not in the files; 148 or 149 probes of a run of half a minute fit no other usual interval."""
PING_STEP_S = 1.0
"""What `ping` does unless told otherwise; for a log that ends without its statistics."""
LONGEST_GAP_S = 10.0

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

PROBE_SENT, PROBE_RTT = "pub_time(ms)", "delay(ms)"
"""Column names, both in milliseconds."""

CLOCK_JITTER_S = 1.0
"""A log's clock says when a line was written, so probes may seem to be sent a little out of order."""

SORT_OR_CUT = "sort the file or cut it here"

_CLOCKED = re.compile(r"\[([^\]]*)\]")
_PING_BYTES = re.compile(r"\d+ bytes from ")
_PING_ANSWER = re.compile(r"\d+ bytes from .*\bicmp_seq=(\d+) .*\btime=([\d.]+) ?ms")
_PING_SENT = re.compile(r"(\d+) packets transmitted, .*\btime (\d+) ?ms")
_PING_LINE = re.compile(
    r"PING |\d+ bytes from |From |no answer yet |Request timeout |--- |\d+ packets transmitted|rtt |round-trip |"
    r"ping: |Start time|End time|Warning"
)

_SLACK_BYTES = 1e-3  # sums of floats must not push the last byte of a frame across a silent stretch

_Lines = list[tuple[int, str]]  # (line number from 1, stripped text)
_Trace = TypeVar("_Trace", "RateTrace", "RttTrace")


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
        _check_steps(self.times_s, self.bytes_per_s, self.period_s, "rates")
        if not all(0 <= rate < math.inf for rate in self.bytes_per_s):
            raise SpecError("the rates of a trace are finite and not negative")
        ends_s = (*self.times_s[1:], self.period_s)
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

    def rate_at(self, t_s: float) -> float:
        """Bytes per second from `t_s` until `next_change_s(t_s)`."""
        _, place = _locate(self.times_s, self.period_s, t_s)
        return self.bytes_per_s[place]

    def next_change_s(self, t_s: float) -> float:
        """The first time after `t_s` with another rate than at `t_s`; infinite if there is only one rate."""
        return _next_change_s(self.times_s, self.bytes_per_s, self.period_s, t_s)

    def bytes_between(self, start_s: float, stop_s: float) -> float:
        """How much gets through from `start_s` to `stop_s`."""
        return self._moved_by(stop_s) - self._moved_by(start_s)

    def mean_over(self, start_s: float, stop_s: float) -> float:
        """Mean bytes per second from `start_s` to `stop_s`. Raises SpecError unless it is later."""
        if not start_s < stop_s:
            raise SpecError(f"no time passes from {start_s} to {stop_s} s; a mean needs a later end than start")
        return self.bytes_between(start_s, stop_s) / (stop_s - start_s)

    def quantile_bytes_per_s(self, q: float) -> float:
        """The lowest rate that is not exceeded for a share `q` (0 to 1) of the time."""
        return _quantile(self.times_s, self.bytes_per_s, self.period_s, q)

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

    def _moved_by(self, t_s: float) -> float:
        lap, place = _locate(self.times_s, self.period_s, t_s)
        within_s = t_s - (lap * self.period_s + self.times_s[place])
        return lap * self._moved[-1] + self._moved[place] + self.bytes_per_s[place] * within_s


@dataclass(frozen=True, slots=True)
class RttTrace:
    """Round-trip times that hold from one probe to the next, and start over after `period_s`.

    `times_s` starts at 0 and rises; `rtt_s[i]` is what a message sent from `times_s[i]` until the next time
    takes there and back, infinite if it is lost. Raises SpecError when that is not so, or when all are lost.
    """

    times_s: tuple[float, ...] = field(repr=False)
    rtt_s: tuple[float, ...] = field(repr=False)
    period_s: float

    def __post_init__(self) -> None:
        _check_steps(self.times_s, self.rtt_s, self.period_s, "round-trip times")
        if not all(rtt_s >= 0 for rtt_s in self.rtt_s):
            raise SpecError("round-trip times are not negative; one that never ends is infinite")
        if min(self.rtt_s) == math.inf:
            raise SpecError("every probe is lost: nothing would ever be answered; give a trace with answers")

    def at(self, t_s: float) -> float:
        """The round-trip time of what is sent at `t_s`; infinite in an outage."""
        _, place = _locate(self.times_s, self.period_s, t_s)
        return self.rtt_s[place]

    def next_change_s(self, t_s: float) -> float:
        """The first time after `t_s` with another round-trip time than at `t_s`; infinite if there is only one."""
        return _next_change_s(self.times_s, self.rtt_s, self.period_s, t_s)

    def quantile_s(self, q: float) -> float:
        """The lowest round-trip time that is not exceeded for a share `q` (0 to 1) of the time, outages included."""
        return _quantile(self.times_s, self.rtt_s, self.period_s, q)

    @property
    def lost_share(self) -> float:
        """The share of the time in which what is sent is lost."""
        return sum(stop_s - start_s for start_s, stop_s in self.outages) / self.period_s

    @property
    def outages(self) -> tuple[tuple[float, float], ...]:
        """Start and end of every stretch of one period in which what is sent is lost."""
        found = []
        pieces = zip(self.times_s, (*self.times_s[1:], self.period_s), self.rtt_s, strict=True)
        for lost, together in groupby(pieces, key=lambda piece: piece[2] == math.inf):
            stretch = list(together)
            if lost:
                found.append((stretch[0][0], stretch[-1][1]))
        return tuple(found)


def read_trace(path: str | Path, direction: Direction, gaps: Gaps = "refuse") -> RateTrace:
    """The trace in a file, plain or gzipped; `direction` chooses where a file has both.

    Raises SpecError, naming file, line and remedy, when there is no such file or it is no trace.
    """
    return parse_trace(recorded_text(path), direction, str(path), gaps)


def named_trace(text: str, direction: Direction) -> RateTrace:
    """The trace that a link's text names: `FILE`, or `FILE:cut` to leave out its pauses. Raises SpecError."""
    path = text.removesuffix(":cut")
    return read_trace(path, direction, "refuse" if path == text else "cut")


def parse_trace(text: str, direction: Direction, name: str = "trace", gaps: Gaps = "refuse") -> RateTrace:
    """The trace in the text of a file; `name` is for messages. Raises SpecError as `read_trace` does."""
    return _parsed(text, name, lambda lines: _rate_reader(lines[0][1])(lines, direction, gaps))


def read_rtt(path: str | Path, gaps: Gaps = "refuse") -> RttTrace:
    """The round-trip times in a file, plain or gzipped. Raises SpecError as `read_trace` does."""
    return parse_rtt(recorded_text(path), str(path), gaps)


def parse_rtt(text: str, name: str = "trace", gaps: Gaps = "refuse") -> RttTrace:
    """The round-trip times in the text of a file; `name` is for messages. Raises SpecError as `read_trace` does."""
    return _parsed(text, name, lambda lines: _rtt_reader(lines[0][1])(lines, gaps))


def recorded_text(path: str | Path) -> str:
    """The text of a file, plain or gzipped. Raises SpecError, with a remedy, when there is none."""
    try:
        content = Path(path).read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SpecError(f"{path}: a damaged or truncated gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the path of a trace file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not text; a trace is a text file, plain or gzipped") from error


def _parsed(text: str, name: str, read: Callable[[_Lines], _Trace]) -> _Trace:
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise SpecError(f"{name}: is empty; a trace has at least one line with a time, a rate or a round trip")
    try:
        return read(lines)
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


def _rate_reader(first: str) -> Callable[[_Lines, Direction, Gaps], RateTrace]:
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


def _packet_times(lines: _Lines, _direction: Direction, _gaps: Gaps) -> RateTrace:
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


def _columns(lines: _Lines, _: Direction, gaps: Gaps) -> RateTrace:
    times_s: list[float] = []
    rates = []
    for number, line in lines:
        words = re.split(r"[,\s]+", line)
        if len(words) != 2:
            raise _LineError(number, f"{line!r} has not two columns, time_s and Mbit/s; is the file truncated?")
        times_s.append(_seconds(number, words[0]))
        if len(times_s) > 1 and times_s[-1] <= times_s[-2]:
            raise _LineError(number, f"time goes from {times_s[-2]} to {times_s[-1]} s, and must rise; {SORT_OR_CUT}")
        rates.append(_rate(number, words[1], MBIT))
    starts_s, period_s = _laid_out([number for number, _ in lines], times_s, gaps)
    return RateTrace(starts_s, tuple(rates), period_s)


def _csv_log(lines: _Lines, direction: Direction, gaps: Gaps) -> RateTrace:
    reader = csv.reader(line for _, line in lines)
    names = [name.strip() for name in next(reader)]
    of_direction = [name for name, (way, _) in CSV_RATES.items() if way == direction]
    rate_name = _known_column(names, of_direction, f"{direction}link rate")
    time_name = _known_column(names, CSV_TIMES, "time")
    numbers: list[int] = []
    times_s: list[float] = []
    rates = []
    for row in reader:
        number = lines[reader.line_num - 1][0]
        if len(row) != len(names):
            raise _LineError(number, f"{len(row)} fields where the header has {len(names)}; is the file truncated?")
        text = row[names.index(time_name)]
        numbers.append(number)
        times_s.append(_seconds(number, text, CSV_TIMES[time_name]))
        if len(times_s) > 1 and times_s[-1] < times_s[-2]:
            raise _LineError(number, f"time goes back to {text!r}; {SORT_OR_CUT}")
        rates.append(_rate(number, row[names.index(rate_name)], CSV_RATES[rate_name][1]))
    starts_s, period_s = _laid_out(numbers, times_s, gaps)
    return RateTrace(starts_s, tuple(rates), period_s)


def _run_lists(lines: _Lines, _: Direction, gaps: Gaps) -> RateTrace:
    """A run has one list, the rates, or several, of which the first two are times and rates."""
    starts_s: list[float] = []
    rates: list[float] = []
    now_s = 0.0
    for lists in _runs(lines):
        number, line = lists[0 if len(lists) == 1 else 1]
        of_run = [_rate(number, word, MBIT) for word in line.split(",")]
        times_s = [place * LIST_STEP_S for place in range(len(of_run))]
        if len(lists) > 1:
            times_s = [_seconds(lists[0][0], word) for word in lists[0][1].split(",")]
        if len(times_s) != len(of_run):
            raise _LineError(number, f"{len(of_run)} rates for {len(times_s)} times; is the file truncated?")
        for before_s, after_s in pairwise(times_s):
            if after_s <= before_s:
                raise _LineError(lists[0][0], f"time goes from {before_s} to {after_s} s, and must rise; {SORT_OR_CUT}")
        within_s, run_s = _laid_out([number] * len(of_run), times_s, gaps, LIST_STEP_S)
        starts_s += (now_s + start_s for start_s in within_s)
        rates += of_run
        now_s += run_s
    return RateTrace(tuple(starts_s), tuple(rates), now_s)


def _rtt_reader(first: str) -> Callable[[_Lines, Gaps], RttTrace]:
    if first.startswith("Run "):
        return _rtt_lists
    if {PROBE_SENT, PROBE_RTT} <= set(first.split()):
        return _rtt_table
    if _is_ping(_unclocked(first)):
        return _ping_log
    raise SpecError(
        f"{first[:60]!r} begins no known log of round trips: expected the output of ping, a table with the columns "
        f"{PROBE_SENT} and {PROBE_RTT}, or `Run 1`"
    )


def _rtt_table(lines: _Lines, gaps: Gaps) -> RttTrace:
    names = lines[0][1].split()
    times_ms: list[float] = []
    rtts_s = []
    for number, line in lines[1:]:
        words = line.split()
        if len(words) != len(names):
            raise _LineError(number, f"{len(words)} fields where the header has {len(names)}; is the file truncated?")
        times_ms.append(_seconds(number, words[names.index(PROBE_SENT)]))
        if len(times_ms) > 1 and times_ms[-1] <= times_ms[-2]:
            raise _LineError(
                number, f"time goes from {times_ms[-2]} to {times_ms[-1]} ms, and must rise; {SORT_OR_CUT}"
            )
        rtts_s.append(_rtt(number, words[names.index(PROBE_RTT)]))
    times_s = [(time_ms - times_ms[0]) / 1e3 for time_ms in times_ms]
    starts_s, period_s = _laid_out([number for number, _ in lines[1:]], times_s, gaps)
    return RttTrace(starts_s, tuple(rtts_s), period_s)


def _rtt_lists(lines: _Lines, _: Gaps) -> RttTrace:
    rtts_s: list[float] = []
    for lists in _runs(lines):
        if len(lists) > 1:
            raise _LineError(lists[1][0], "a second list in a run of round trips; is this a file of rates?")
        rtts_s += (_rtt(lists[0][0], word) for word in lists[0][1].split(","))
    starts_s = tuple(place * PING_LIST_STEP_S for place in range(len(rtts_s)))
    return RttTrace(starts_s, tuple(rtts_s), len(rtts_s) * PING_LIST_STEP_S)


@dataclass(frozen=True, slots=True)
class _Answer:
    number: int  # of its line
    rtt_s: float
    clock_s: float | None  # when it came, if the log says so


def _ping_log(lines: _Lines, gaps: Gaps) -> RttTrace:
    """Probes by sequence number; sent at the clock's time less the RTT, or else at equal distances.

    Of a probe answered twice (`DUP!`) the first answer counts.
    """
    answers: dict[int, _Answer] = {}
    step_s = PING_STEP_S
    latest = 0
    for number, line in lines:
        said = _unclocked(line)
        if not _is_ping(said):
            raise _LineError(number, f"{said[:60]!r} is no line of ping; mend or drop it")
        if said.startswith("PING ") and answers:
            raise _LineError(number, "a second log begins here; cut the file")
        if (sent := _PING_SENT.match(said)) and int(sent[1]) > 1:
            step_s = int(sent[2]) / 1e3 / (int(sent[1]) - 1)
        if not _PING_BYTES.match(said) or said.endswith("(DUP!)"):
            continue
        if not (answer := _PING_ANSWER.fullmatch(said)):
            raise _LineError(number, f"{said[-60:]!r} is no whole answer of ping; is the file truncated?")
        latest += (int(answer[1]) - latest + 2**15) % 2**16 - 2**15  # sequence numbers have 16 bits and start over
        if latest in answers:
            raise _LineError(number, f"icmp_seq={answer[1]} is answered twice; are these two logs? cut the file here")
        answers[latest] = _Answer(number, _rtt(number, answer[2]), _clock_s(number, line))
    if not answers:
        raise SpecError("no probe is answered: nothing can be said about round trips; give a log with answers")
    return _probes(dict(sorted(answers.items())), step_s, gaps)


def _probes(answers: dict[int, _Answer], step_s: float, gaps: Gaps) -> RttTrace:
    if len({answer.clock_s is None for answer in answers.values()}) > 1:
        raise SpecError("some answers have a clock before them and some have none; mend the file, or drop all clocks")
    sent_s: list[float] = []
    for place, answer in answers.items():
        if answer.clock_s is None:
            sent_s.append(place * step_s)
            continue
        sent_s.append(answer.clock_s - answer.rtt_s)
        if len(sent_s) > 1 and sent_s[-1] < sent_s[-2]:
            if sent_s[-1] < sent_s[-2] - CLOCK_JITTER_S:
                raise _LineError(
                    answer.number,
                    f"time goes back by {sent_s[-2] - sent_s[-1]:.3g} s from the probe before; {SORT_OR_CUT}",
                )
            sent_s[-1] = sent_s[-2]
    numbers, times_s, rtts_s = [], [], []
    steps = [*(after - before for before, after in pairwise(answers)), 1]
    for answer, start_s, end_s, probes in zip(answers.values(), sent_s, [*sent_s[1:], sent_s[-1]], steps, strict=True):
        for probe in range(probes):  # the first was answered, the others were lost
            numbers.append(answer.number)
            times_s.append(start_s + (end_s - start_s) * probe / probes)
            rtts_s.append(math.inf if probe else answer.rtt_s)
    starts_s, period_s = _laid_out(numbers, times_s, gaps, step_s)
    return RttTrace(starts_s, tuple(rtts_s), period_s)


def _known_column(names: list[str], known: Iterable[str], what: str) -> str:
    found = next((name for name in known if name in names), None)
    if found is None:
        raise SpecError(
            f"no {what} among the columns {', '.join(names)[:200]}; known are {', '.join(known)}; "
            "ask for the other direction, or write two columns, `time_s Mbit/s`"
        )
    return found


def _runs(lines: _Lines) -> list[_Lines]:
    """The lists of each run, one at least."""
    heads = [place for place, (_, line) in enumerate(lines) if line.startswith("Run ")]
    for start, end in pairwise([*heads, len(lines)]):
        if end == start + 1:
            raise _LineError(lines[start][0], "a run without a list; is the file truncated?")
    return [lines[start + 1 : end] for start, end in pairwise([*heads, len(lines)])]


def _laid_out(
    numbers: Sequence[int], times_s: Sequence[float], gaps: Gaps, step_s: float | None = None
) -> tuple[tuple[float, ...], float]:
    """Starts from 0 on, and the period, of rows at times that do not fall.

    A row lasts until the next time, the last one and one before a pause that is cut for the median step (for
    `step_s` if there is no step); rows of the same time, from a clock that is coarser than the rows, share it.
    """
    stamps = [(stamp_s, len(list(rows))) for stamp_s, rows in groupby(times_s)]
    steps_s = [after_s - before_s for (before_s, _), (after_s, _) in pairwise(stamps)]
    if steps_s:
        step_s = median(steps_s)
    elif step_s is None:
        raise SpecError(
            f"{len(times_s)} rows do not tell how long a row lasts; a trace has two at least, at rising times"
        )
    longest_s = max(LONGEST_GAP_S, 10 * step_s)
    starts_s: list[float] = []
    cut_s = 0.0
    for (stamp_s, rows), lasts_s in zip(stamps, [*steps_s, step_s], strict=True):
        begin_s = stamp_s - times_s[0] - cut_s
        if lasts_s > longest_s:
            if gaps == "refuse":
                raise _LineError(
                    numbers[len(starts_s) + rows],
                    f"nothing is known from {stamp_s - times_s[0]:.6g} s after the first row to "
                    f"{stamp_s - times_s[0] + lasts_s:.6g} s (the median step is {step_s:.3g} s); "
                    'read the file with gaps="cut" to leave such pauses out (where a link is described, write '
                    "FILE:cut), or add a line that says what was in between",
                )
            cut_s += lasts_s - step_s
            lasts_s = step_s  # noqa: PLW2901
        starts_s += (begin_s + lasts_s * row / rows for row in range(rows))
    return tuple(starts_s), times_s[-1] - times_s[0] - cut_s + step_s


def _check_steps(times_s: Sequence[float], values: Sequence[float], period_s: float, what: str) -> None:
    if len(times_s) != len(values) or not times_s:
        raise SpecError(f"a trace needs as many times as {what}, and one of each at least")
    if times_s[0] != 0 or not all(start < end < math.inf for start, end in pairwise((*times_s, period_s))):
        raise SpecError("the times of a trace start at 0, rise, and end before its period")


def _locate(times_s: Sequence[float], period_s: float, t_s: float) -> tuple[float, int]:
    """The lap and the piece that hold at `t_s`: the last with lap x period + start <= `t_s`, in floats too."""
    if not abs(t_s) < period_s * 2**40:
        raise SpecError(f"{t_s} s is too far from 0 to say where in a trace of {period_s} s it is")
    lap, within_s = divmod(t_s, period_s)
    place = bisect_right(times_s, within_s) - 1
    while lap * period_s + times_s[place] > t_s:  # only by rounding, as below
        lap, place = _after(lap, place - 1, len(times_s))
    following = _after(lap, place + 1, len(times_s))
    while following[0] * period_s + times_s[following[1]] <= t_s:
        lap, place = following
        following = _after(lap, place + 1, len(times_s))
    return lap, place


def _after(lap: float, place: int, places: int) -> tuple[float, int]:
    return lap + place // places, place % places


def _next_change_s(times_s: Sequence[float], values: Sequence[float], period_s: float, t_s: float) -> float:
    lap, here = _locate(times_s, period_s, t_s)
    for further in range(here + 1, here + len(values)):
        then, place = _after(lap, further, len(values))
        if values[place] != values[here]:
            return then * period_s + times_s[place]
    return math.inf


def _quantile(times_s: Sequence[float], values: Sequence[float], period_s: float, q: float) -> float:
    if not 0 <= q <= 1:
        raise SpecError(f"{q} is no share; a quantile is asked for a share from 0 to 1, as in 0.05")
    lasting = sorted(
        (value, end - start) for value, (start, end) in zip(values, pairwise((*times_s, period_s)), strict=True)
    )
    so_far = list(accumulate(lasts_s for _, lasts_s in lasting))
    return lasting[min(bisect_left(so_far, q * so_far[-1]), len(lasting) - 1)][0]


def _number(number: int, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise _LineError(number, f"{text!r} is not a number; mend or drop the line") from error


def _seconds(number: int, text: str, read: Callable[[str], float] = float) -> float:
    try:
        time_s = read(text)
        if math.isfinite(time_s):
            return time_s
    except ValueError:
        pass
    raise _LineError(number, f"{text!r} is not a time; mend or drop the line")


def _rate(number: int, text: str, unit_bytes: float) -> float:
    value = _number(number, text)
    if not 0 <= value < math.inf:
        raise _LineError(number, f"{value} is no rate: rates are finite and not negative; mend or drop the line")
    return value * unit_bytes


def _rtt(number: int, text: str) -> float:
    value = _number(number, text)
    if not 0 <= value < math.inf:
        raise _LineError(number, f"{value} ms is no round trip: it is finite and not negative; mend or drop the line")
    return value / 1e3


def _unclocked(line: str) -> str:
    return _CLOCKED.sub("", line).strip()


def _is_ping(said: str) -> bool:
    return not said or _PING_LINE.match(said) is not None


def _clock_s(number: int, line: str) -> float | None:
    """When the line was written: `[seconds]` as of `ping -D`, or `[date time]`; None without brackets."""
    if not (clock := _CLOCKED.match(line)):
        return None
    if _is_number(clock[1]):
        return _seconds(number, clock[1])
    return _seconds(number, clock[1], lambda text: _since_epoch(datetime.fromisoformat(text)))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _since_epoch(when: datetime) -> float:
    return (when.replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
