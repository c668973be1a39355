"""What one direction of a link carries, from when its frames were sent and came in. It knows no link and no clock.

The sender's clock has any offset. A link is taken to be first in, first out: a frame begins when it was sent, or
when the one before it has passed, takes its bytes over the rate, and travels for the delay. Whatever else happens
(jitter, a busy event loop that picks frames up late) is noise, to which the fit gives no more weight than it must.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOWS_S = (0.5, 1.0)
"""The newest evidence counts first; older evidence counts where it agrees, for the rate may have changed since."""

FEW_FRAMES = 6
"""With fewer in the longest window (a slow link, large frames), so many of the last `KEEP_S` are looked at."""

KEEP_S, KEEP_FRAMES, FIT_FRAMES = 10.0, 512, 128
MIN_FRAMES = 4
MIN_BYTES = 4 * 1500
"""Links let bytes out by packets, and mobile ones every ten milliseconds or so. When fewer bytes than some packets'
arrived, they tell when the link was served, not how fast it is: pings alone would make a link look a hundred times
slower than it is."""
TIGHT, NARROW, ROUGH = 1.1, 1.28, 2.0
"""The ends of an interval differ by at most such a factor: no more evidence is needed; it is an estimate (mostly
within 10 %); its best rate is a better guess than either end."""

FOLLOW_S = 1e-3
"""A frame picked up sooner than this after another may have waited for its reader: how late it is says nothing."""

NOISE_S = 1e-4
"""The least noise that is believed."""

IDLE_S, IDLE_SHARE, MIN_IDLE = 2e-3, 0.03, 2
"""A link was idle where gaps between frames are so long, and this share of what is looked at; a rate a little too
high leaves small ones in a link that never was, and so does a slow reader. One alone may be a reader who was away."""

NEWEST, FRESH_S = 8, 0.3
"""The delay is that of so many of the newest frames that found the link idle, and no older than this: were one half
of a round trip from before a change, the sum would be of neither time."""

DELAYS_AGREE_S = 0.01
"""Frames sent at various times into one queue, and let out of it together, differ by more."""

DELAY_MOVES_S = 0.02
"""A delay that has changed by less is about as likely as one that has not."""

ON_TIME = 0.3
"""The share of frames that a fit takes to be early or on time: noise is mostly lateness."""

PROMPT = 0.15
"""The share of the newest frames that the delay is taken to be no more than: the second least of eight, the least of
fewer. Timers and readers add up to a millisecond each way to all the others."""

EVIDENCE = 3.0
"""By how much the log likelihood of a rate may fall behind the best: about 95 %."""

JUMP_S = 1.0
"""A sender's clock that goes back, or ahead of all delays seen, by more was set anew."""

REFRESH_S, CALM_S = 0.05, 0.5
"""A fit is not made again sooner; nor sooner than the second while frames arrive as it foretells."""

EARLY_S, LATE_S, NEWS_S = 1e-3, 3e-3, 0.3
"""A frame is news that is earlier, or later, than foretold by more, and later than one in ten of those fitted; it takes
more frames to tell what it is of, so it stays news for so long."""
USUAL = 0.9

HISTORY_EVERY_S, PESSIMIST_Q = 0.1, 0.1
COARSE = np.geomspace(1e3, 2.5e9, 67)
"""Rates that are tried, bytes/s: 8 kbit/s to 20 Gbit/s in steps of a quarter; then, twice, `FINE` around the best."""
FINE = np.linspace(0.0, 1.0, 26)[1:-1]
"""Without the ends and the middle, which were tried: a rate beside itself would end the search there."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What is known of one direction at some moment.

    An estimate (not `is_bound`) was mostly within 10 % `age_s` ago. Otherwise `bytes_per_s` is what recent frames
    allow that is nearest to the last estimate, which they refute (the likeliest where they allow few); where there
    was none, the least that they allow.
    """

    bytes_per_s: float
    low_bytes_per_s: float
    """Pessimistic: the first decile of recent estimates, or the low end of what the newest frames allow, if lower."""
    most_bytes_per_s: float
    """Where there never was an estimate, the most that they allow; otherwise `bytes_per_s`."""
    age_s: float
    """Since the newest frame that says so came in."""
    is_bound: bool

    def given(self, prior_bytes_per_s: float) -> tuple[float, float]:
        """(likely, pessimistic) for one who believed something before: where there never was an estimate, what
        recent frames allow that is nearest to that, twice; for the least they allow may be far too little."""
        if self.bytes_per_s == self.most_bytes_per_s:
            return self.bytes_per_s, self.low_bytes_per_s
        nearest = min(max(prior_bytes_per_s, self.bytes_per_s), self.most_bytes_per_s)
        return nearest, nearest


@dataclass(frozen=True, slots=True)
class _Fit:
    best: float
    low: float
    high: float
    delay_s: tuple[float, float]
    """And when the newest frame came in that says so; with the clocks' offset in it, at `best` if narrow, else at
    `high`. NaN: too few frames found the link idle."""
    newest_s: float
    num_bytes: float
    """That it is made of."""
    usual_s: float
    """So much later than at `best`, at most, nine in ten of its frames were."""

    @property
    def tells_rate(self) -> bool:
        """Otherwise it only tells the delay."""
        return self.num_bytes >= MIN_BYTES

    @property
    def is_narrow(self) -> bool:
        return self.tells_rate and self.high <= NARROW * self.low

    def refines(self, other: _Fit) -> bool:
        """Whether it says the same as the other, and more."""
        agrees = self.low <= other.high and other.low <= self.high
        return agrees and self.high * other.low < other.high * self.low


@dataclass(frozen=True, slots=True)
class _Frames:
    """Frames in order, (frames,) each; `free_s` is when the one before them had arrived, and left them the link."""

    sent: Floats
    arrived: Floats
    sizes: Floats
    free_s: float
    follows: NDArray[np.bool_]
    """Picked up right after the one before."""

    @classmethod
    def of(cls, sent: Floats, arrived: Floats, sizes: Floats, free_s: float) -> Self:
        return cls(sent, arrived, sizes, free_s, _gaps(arrived, free_s) < FOLLOW_S)

    def under(self, rates: Floats) -> tuple[Floats, Floats]:
        """(rates, frames) each: arrivals less what all bytes so far take, and the latest start of a busy stretch, by
        the sender's clock, less what the bytes before it take."""
        until = np.cumsum(self.sizes)
        starts = self.sent - (until - self.sizes) / rates[:, None]
        return self.arrived - until / rates[:, None], np.maximum.accumulate(starts, axis=1)


class RateMeter:
    """Stands at the receiving end of one direction; feed it every frame, read it now and then (about 1 ms each)."""

    def __init__(self) -> None:
        self._frames: deque[tuple[float, float, int]] = deque(maxlen=KEEP_FRAMES)  # sent, arrived, bytes
        self._least_s = math.inf  # of arrived - sent
        self._count = 0
        self._estimates: deque[tuple[float, float]] = deque()  # (when, bytes/s), of the last KEEP_S
        self._last: tuple[float, float] | None = None
        self._told: tuple[Rate, float] | None = None  # and when
        self._counted, self._fitted_s = -1, -math.inf  # when the fit was made
        self._fit: _Fit | None = None
        self._news_s = -math.inf
        self._delay_s = math.nan  # as last known

    def on_arrival(self, sent_s: float, arrived_s: float, num_bytes: int) -> None:
        """One more frame, by the sender's clock and by one's own. Duplicates and stragglers do not count."""
        if self._frames:
            sent_before_s, arrived_before_s, _ = self._frames[-1]
            if arrived_s < arrived_before_s or sent_s < sent_before_s - JUMP_S or (
                arrived_s - sent_s < self._least_s - JUMP_S
            ):  # fmt: skip
                self._frames.clear()  # one of the clocks was set; delays before and after cannot be compared
                self._least_s, self._delay_s = math.inf, math.nan
            elif sent_s <= sent_before_s:
                return
        self._compare(sent_s, arrived_s, num_bytes)
        self._frames.append((sent_s, arrived_s, num_bytes))
        self._least_s = min(self._least_s, arrived_s - sent_s)
        self._count += 1

    def _compare(self, sent_s: float, arrived_s: float, num_bytes: int) -> None:
        """A frame with what the last fit says of it: a fit takes a thousand times as long as this."""
        if self._fit is None or not self._frames:
            self._news_s = arrived_s
            return
        delay_s = self._fit.delay_s[0]
        idle_s = sent_s + delay_s - self._frames[-1][1]  # the link was, before this frame; NaN: nobody knows
        begins_s = max(sent_s + delay_s, self._frames[-1][1])
        late_s = arrived_s - begins_s - num_bytes / self._fit.best
        if not -EARLY_S <= late_s <= max(LATE_S, self._fit.usual_s):
            self._news_s = arrived_s
        elif idle_s > IDLE_S and late_s <= LATE_S:  # it says the delay, too
            self._fit = replace(self._fit, newest_s=arrived_s, delay_s=(delay_s, arrived_s))
        else:
            self._fit = replace(self._fit, newest_s=arrived_s)

    def read(self, now_s: float) -> Rate | None:
        """What is known at `now_s` (one's own clock), however long ago it was told; None before enough frames have come
        to say anything."""
        fit = self._update(now_s)
        if fit is None or not fit.tells_rate:
            return replace(self._told[0], age_s=max(now_s - self._told[1], 0.0)) if self._told else None
        rate = self._read(fit, now_s)
        self._told = rate, now_s - rate.age_s
        return rate

    def _read(self, fit: _Fit, now_s: float) -> Rate:
        if fit.is_narrow:
            rate, at_s, is_bound = fit.best, fit.newest_s, False
        elif self._last is not None:
            at_s, rate = self._last
            is_bound = not fit.low <= rate <= fit.high
            if is_bound:
                nearest = min(max(rate, fit.low), fit.high)
                rate, at_s = fit.best if fit.high <= ROUGH * fit.low else nearest, fit.newest_s
        else:
            return Rate(fit.low, fit.low, fit.high, max(now_s - fit.newest_s, 0.0), True)
        lows = [rate, *([fit.low] if fit.is_narrow else [])]
        if self._estimates:
            ordered = sorted(value for _, value in self._estimates)
            lows.append(ordered[int(PESSIMIST_Q * (len(ordered) - 1))])
        return Rate(rate, min(lows), rate, max(now_s - at_s, 0.0), is_bound)

    def delay_s(self, now_s: float) -> float | None:
        """One-way delay of a frame of no bytes on a free link plus how far one's own clock is ahead of the sender's;
        the two directions' sum is the RTT. None when no recent frames tell."""
        fit = self._update(now_s)
        if fit is None or math.isnan(fit.delay_s[0]) or now_s - fit.delay_s[1] > FRESH_S:
            return None
        return fit.delay_s[0]

    def _update(self, now_s: float) -> _Fit | None:
        has_news = self._fit is None or now_s - self._news_s < NEWS_S
        every_s = REFRESH_S if has_news and self._count != self._counted else CALM_S
        if abs(now_s - self._fitted_s) < every_s:
            return self._fit
        self._counted, self._fitted_s = self._count, now_s
        while self._frames and not now_s - KEEP_S <= self._frames[0][1]:
            self._frames.popleft()
        while self._estimates and not now_s - KEEP_S <= self._estimates[0][0]:
            self._estimates.popleft()
        self._fit = self._newest_fit(now_s)
        if self._fit is not None and not math.isnan(self._fit.delay_s[0]):
            self._delay_s = self._fit.delay_s[0]
        if self._fit is not None and self._fit.is_narrow:
            self._last = (self._fit.newest_s, self._fit.best)
            if not self._estimates or self._fit.newest_s - self._estimates[-1][0] >= HISTORY_EVERY_S:
                self._estimates.append(self._last)
        return self._fit

    def _newest_fit(self, now_s: float) -> _Fit | None:
        if len(self._frames) < MIN_FRAMES:
            return None
        sent, arrived, sizes = np.array(self._frames, np.float64).T
        self._least_s = float((arrived - sent).min())
        began = np.maximum(sent + self._least_s, np.concatenate([[-math.inf], arrived[:-1]]))
        fit = None
        for window_s in WINDOWS_S:
            first = int(np.searchsorted(began, now_s - window_s))
            last_window = window_s == WINDOWS_S[-1]
            if last_window and len(sent) - first < FEW_FRAMES:
                first = max(len(sent) - FEW_FRAMES, 0)
            first = max(first, len(sent) - FIT_FRAMES)
            free_s = arrived[first - 1] if first else -math.inf
            longer = _fit(_Frames.of(sent[first:], arrived[first:], sizes[first:], free_s), self._delay_s)
            if fit is None or (longer is not None and longer.refines(fit)):
                fit = longer
            if fit is not None and fit.high <= TIGHT * fit.low:
                break
        return fit


def _gaps(times_s: Floats, before_s: float) -> Floats:
    """(frames,): from the one before to each; `np.diff` takes twice as long over it."""
    gaps = np.empty_like(times_s)
    gaps[:1] = times_s[:1] - before_s
    np.subtract(times_s[1:], times_s[:-1], out=gaps[1:])
    return gaps


def _fit(frames: _Frames, delay_before_s: float) -> _Fit | None:
    """The rates that explain the frames, and the delays that go with them; None for too few frames."""
    if len(frames.sent) < MIN_FRAMES or (~frames.follows[1:]).sum() < MIN_FRAMES - 1:
        return None
    rates = COARSE
    errors, delays = _errors(rates, frames)
    for _ in range(2):  # a link that is never idle tells its rate to a thousandth, and a coarser grid misses that
        order = np.argsort(rates)
        place = int(_unlikely(errors, delays, delay_before_s)[order].argmin())
        below, above = order[max(place - 1, 0)], order[min(place + 1, len(rates) - 1)]
        fine = rates[below] * (rates[above] / rates[below]) ** FINE
        more, more_delays = _errors(fine, frames)
        rates, errors, delays = np.append(rates, fine), np.append(errors, more, axis=0), np.append(delays, more_delays)
    unlikely = _unlikely(errors, delays, delay_before_s)
    best = int(unlikely.argmin())
    allowed = unlikely <= unlikely[best] + EVIDENCE
    low, high = float(rates[allowed].min()), float(rates[allowed].max())
    used = best if high <= NARROW * low else int(np.flatnonzero(allowed & (rates == high))[0])
    delay_s = _newest_delay(float(rates[used]), float(delays[used]), frames)
    num_bytes = float(frames.sizes.sum())
    late = int(USUAL * (errors.shape[1] - 1))
    usual_s = float(np.partition(errors[best], late)[late]) / ON_TIME
    return _Fit(float(rates[best]), low, high, delay_s, float(frames.arrived[-1]), num_bytes, usual_s)


def _unlikely(errors: Floats, delays: Floats, delay_before_s: float) -> Floats:
    """(rates, frames), (rates,) -> (rates,): minus the log likelihood if noise has tails so heavy that its mean is
    infinite (density as `(1 + error / noise)^-2`): one frame that is very late must not look like a slow link, and a
    delay that changes is likelier than one that changes by a lot."""
    middle = errors.shape[1] // 2  # `np.median` takes three times as long
    noise_s = NOISE_S + float(np.partition(errors, middle, axis=1)[:, middle].min())  # of the best
    unlikely = 2 * np.log1p(errors / noise_s).sum(axis=1)
    if not math.isnan(delay_before_s):
        moved_s = np.where(np.isnan(delays), 0.0, np.abs(delays - delay_before_s))
        unlikely = unlikely + 2 * np.log1p(moved_s / DELAY_MOVES_S)
    return unlikely  # type: ignore[no-any-return]


def _errors(rates: Floats, frames: _Frames) -> tuple[Floats, Floats]:
    """How far off (s; being late counts less) each arrival is under each rate at the delay that suits it,
    (rates, frames), and that delay, (rates,): NaN where every frame waited for the one before.

    With `N(j, k)` bytes from frame j to frame k, a frame arrives at
    `max(free + N(1, k) / rate, delay + max_j (sent_j + N(j, k) / rate))`.
    """
    rest, latest = frames.under(rates)
    follows = frames.follows
    waits = rest - latest  # the delay if the frame did not wait for `free`, else more
    rows, alone = np.arange(len(rates)), np.zeros(len(rates), np.int64)
    delay = np.sort(waits, axis=1)[:, waits.shape[1] // 10]
    for _ in range(3):
        is_alone = (delay[:, None] + latest >= frames.free_s) & ~follows
        alone = is_alone.sum(axis=1)
        ordered = np.sort(np.where(is_alone, waits, np.inf), axis=1)
        place = (np.maximum(alone - 1, 0) * ON_TIME).astype(np.int64)
        delay = np.where(alone > 0, ordered[rows, place], delay)
    late = rest - np.maximum(frames.free_s, delay[:, None] + latest)
    errors = np.where(late > 0, ~follows * ON_TIME * late, (ON_TIME - 1) * late)
    return errors, np.where(alone > 0, delay, np.nan)


def _newest_delay(rate: float, delay_s: float, frames: _Frames) -> tuple[float, float]:
    """The delay as the newest frames say that found the link idle (NaN for fewer than `MIN_IDLE` such, and where they
    do not agree), and when the last of these came in."""
    rest, latest = (row[0] for row in frames.under(np.array([rate])))
    gaps = _gaps(np.maximum(frames.free_s, delay_s + latest), frames.free_s)
    gap_s = max(IDLE_S, IDLE_SHARE * (frames.arrived[-1] - frames.arrived[0]))
    found = np.flatnonzero((gaps > gap_s) & ~frames.follows)[-NEWEST:]
    if not len(found):
        return math.nan, -math.inf
    newest_s = float(frames.arrived[found[-1]])
    waits = (rest - latest)[found[frames.arrived[found] >= newest_s - FRESH_S]]
    newest_delay_s = float(np.quantile(waits, PROMPT, method="lower"))
    agree = int((np.abs(waits - newest_delay_s) <= DELAYS_AGREE_S).sum())
    return newest_delay_s if agree >= max(MIN_IDLE, len(waits) / 2) else math.nan, newest_s
