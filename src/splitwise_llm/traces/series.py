"""Rates and round-trip times over time: two small types; no file, no link, no clock."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Self

from splitwise_llm.errors import SpecError

_SLACK_BYTES = 1e-3  # sums of floats must not push the last byte of a frame across a silent stretch


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
