"""Formats of recorded round trips, told by their first line. Every one gives an `RttTrace`; no file is opened here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from splitwise_llm.errors import SpecError
from splitwise_llm.traces.lines import (
    SORT_OR_CUT,
    Gaps,
    LineError,
    Lines,
    figure,
    is_number,
    laid_out,
    parse_s,
    run_lists,
    since_epoch,
)
from splitwise_llm.traces.series import RttTrace

PING_LIST_STEP_S = 0.2
"""Not in the files; 148 or 149 probes of a run of half a minute fit no other usual interval."""
PING_STEP_S = 1.0
"""What `ping` does unless told otherwise; for a log that ends without its statistics."""
PROBE_SENT, PROBE_RTT = "pub_time(ms)", "delay(ms)"
"""Column names, both in milliseconds."""

CLOCK_JITTER_S = 1.0
"""A log's clock says when a line was written, so probes may seem to be sent a little out of order."""
_CLOCKED = re.compile(r"\[([^\]]*)\]")
_PING_BYTES = re.compile(r"\d+ bytes from ")
_PING_ANSWER = re.compile(r"\d+ bytes from .*\bicmp_seq=(\d+) .*\btime=([\d.]+) ?ms")
_PING_SENT = re.compile(r"(\d+) packets transmitted, .*\btime (\d+) ?ms")
_PING_LINE = re.compile(
    r"PING |\d+ bytes from |From |no answer yet |Request timeout |--- |\d+ packets transmitted|rtt |round-trip |"
    r"ping: |Start time|End time|Warning"
)


def rtt_reader(first: str) -> Callable[[Lines, Gaps], RttTrace]:
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


def _rtt_table(lines: Lines, gaps: Gaps) -> RttTrace:
    names = lines[0][1].split()
    times_ms: list[float] = []
    rtts_s = []
    for number, line in lines[1:]:
        words = line.split()
        if len(words) != len(names):
            raise LineError(number, f"{len(words)} fields where the header has {len(names)}; is the file truncated?")
        times_ms.append(parse_s(number, words[names.index(PROBE_SENT)]))
        if len(times_ms) > 1 and times_ms[-1] <= times_ms[-2]:
            raise LineError(number, f"time goes from {times_ms[-2]} to {times_ms[-1]} ms, and must rise; {SORT_OR_CUT}")
        rtts_s.append(_rtt(number, words[names.index(PROBE_RTT)]))
    times_s = [(time_ms - times_ms[0]) / 1e3 for time_ms in times_ms]
    starts_s, period_s = laid_out([number for number, _ in lines[1:]], times_s, gaps)
    return RttTrace(starts_s, tuple(rtts_s), period_s)


def _rtt_lists(lines: Lines, _: Gaps) -> RttTrace:
    rtts_s: list[float] = []
    for lists in run_lists(lines):
        if len(lists) > 1:
            raise LineError(lists[1][0], "a second list in a run of round trips; is this a file of rates?")
        rtts_s += (_rtt(lists[0][0], word) for word in lists[0][1].split(","))
    starts_s = tuple(place * PING_LIST_STEP_S for place in range(len(rtts_s)))
    return RttTrace(starts_s, tuple(rtts_s), len(rtts_s) * PING_LIST_STEP_S)


@dataclass(frozen=True, slots=True)
class _Answer:
    number: int  # of its line
    rtt_s: float
    clock_s: float | None  # when it came, if the log says so


def _ping_log(lines: Lines, gaps: Gaps) -> RttTrace:
    """Probes by sequence number; sent at the clock's time less the RTT, or else at equal distances.

    Of a probe answered twice (`DUP!`) the first answer counts.
    """
    answers: dict[int, _Answer] = {}
    step_s = PING_STEP_S
    latest = 0
    for number, line in lines:
        said = _unclocked(line)
        if not _is_ping(said):
            raise LineError(number, f"{said[:60]!r} is no line of ping; mend or drop it")
        if said.startswith("PING ") and answers:
            raise LineError(number, "a second log begins here; cut the file")
        if (sent := _PING_SENT.match(said)) and int(sent[1]) > 1:
            step_s = int(sent[2]) / 1e3 / (int(sent[1]) - 1)
        if not _PING_BYTES.match(said) or said.endswith("(DUP!)"):
            continue
        if not (answer := _PING_ANSWER.fullmatch(said)):
            raise LineError(number, f"{said[-60:]!r} is no whole answer of ping; is the file truncated?")
        latest += (int(answer[1]) - latest + 2**15) % 2**16 - 2**15  # sequence numbers have 16 bits and start over
        if latest in answers:
            raise LineError(number, f"icmp_seq={answer[1]} is answered twice; are these two logs? cut the file here")
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
                raise LineError(
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
    starts_s, period_s = laid_out(numbers, times_s, gaps, step_s)
    return RttTrace(starts_s, tuple(rtts_s), period_s)


def _rtt(number: int, text: str) -> float:
    value = figure(number, text)
    if not 0 <= value < math.inf:
        raise LineError(number, f"{value} ms is no round trip: it is finite and not negative; mend or drop the line")
    return value / 1e3


def _unclocked(line: str) -> str:
    return _CLOCKED.sub("", line).strip()


def _is_ping(said: str) -> bool:
    return not said or _PING_LINE.match(said) is not None


def _clock_s(number: int, line: str) -> float | None:
    """When the line was written: `[seconds]` as of `ping -D`, or `[date time]`; None without brackets."""
    if not (clock := _CLOCKED.match(line)):
        return None
    if is_number(clock[1]):
        return parse_s(number, clock[1])
    return parse_s(number, clock[1], lambda text: since_epoch(datetime.fromisoformat(text)))
