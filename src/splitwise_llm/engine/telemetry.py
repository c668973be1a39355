"""What a session's own traffic tells of links and machines: round trips, rates, loads, and how old each figure is.

It sends nothing and reads no clock: every time is an argument, in seconds of one's own monotonic clock.
`RateMeter` is the receiving end of one direction; here both directions become one view of a link.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median, median_low
from typing import Self

from splitwise_llm.engine.rate_meter import Rate, RateMeter
from splitwise_llm.errors import ProtocolError
from splitwise_llm.spec import LinkSpec

Number = float | int

RECENT_S, RECENT_SAMPLES = 0.3, 2
"""The fast RTT is of the samples so recent; of the last two where there are fewer."""

STALE_S = 0.6
"""Two samples further apart are of before and after a queue, or an outage: the newer one then stands alone."""

MEMORY_S = 10.0
PESSIMIST_Q = 0.9
"""The pessimistic RTT is the ninth decile of the samples of `MEMORY_S`."""

PACKET_BYTES = 1500
"""More bytes than this in front of a sample (its own included) count as queueing."""

PING_WIRE_BYTES = 60
"""A ping without payload on the wire, about."""

ANSWER_BYTES = 250
"""An answer to a ping, about: so many of the bytes in front of a sample are its own, and no part of the RTT."""

PROBE_SHARE, SILENCE_S, PING_EVERY_S, PROBE_EVERY_S = 0.01, 0.25, 0.1, 1.0
MAX_PROBE_BYTES = 64 * 2**10
CALM_EVERY_S, STIRRED_S, STIR_FACTOR = 0.4, 2.0, 1.5
"""Pings while nothing changes; how long after a change they are frequent; by how much round trips, queues included,
have to change for that."""

STIR_FLOOR_S = 5e-3
"""Round trips below this all count as this: between them lies what a busy machine adds and takes away."""

DOUBT_S, DOUBT_TRIPS = 0.25, 3
"""One round trip that has changed makes pings frequent for so long; a change is what most of so many have. A single
late one is mostly a reader who was away."""

CLASS_FACTOR = 2.0
"""A figure that has doubled or halved is in another class; the simulator's classes of a link lie 4 to 5 apart in
rate and 2 in RTT."""

RTT_FLOOR_S, STEP_FLOOR_S, QUEUE_FLOOR_S = 2e-3, 1e-4, 1e-2
"""Below these, differences are no change of class; the first is how well an RTT is known."""


class RttFilter:
    """The RTT from single samples: a median that follows a step within a second, and a pessimistic quantile.

    A sample that waited behind a large frame is flagged with the bytes in front. It is at least the RTT, so it can
    lower the figure but never raise it.
    """

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque()
        self._sure_s = -math.inf
        """When the newest sample came that was of several frames each way."""

    def add(self, now_s: float, rtt_s: float, ahead_bytes: int = 0, *, is_sure: bool = False) -> None:
        """A round trip that ended at `now_s`, less the time the peer held it; negative and infinite ones do not count.

        `ahead_bytes`: what may have been in front of it either way, and its own bytes; see `Pings`. `is_sure`: it is
        of several frames each way, not of one that may have come late; then it needs no other beside it.
        """
        if not 0 <= rtt_s < math.inf:
            return
        if ahead_bytes > PACKET_BYTES:
            known_s = self.fast_s(now_s)
            if known_s is None or rtt_s >= known_s:
                return
        if self._samples and now_s < self._samples[-1][0]:
            self._samples.clear()  # the clock was set; ages before and after cannot be compared
            self._sure_s = -math.inf
        self._samples.append((now_s, rtt_s))
        if is_sure:
            self._sure_s = now_s
        while now_s - self._samples[0][0] > MEMORY_S:
            self._samples.popleft()

    def fast_s(self, now_s: float) -> float | None:
        """The median of the most recent samples, the lower one of two, for noise is lateness; None before the first."""
        if not self._samples:
            return None
        recent = [rtt_s for at_s, rtt_s in self._samples if now_s - at_s <= RECENT_S]
        if len(recent) < RECENT_SAMPLES and now_s - self._sure_s > RECENT_S:
            newest_s = self._samples[-1][0]
            last = list(self._samples)[-RECENT_SAMPLES:]
            recent = [rtt_s for at_s, rtt_s in last if newest_s - at_s <= STALE_S]
        return median_low(recent)

    def pessimistic_s(self, now_s: float) -> float | None:
        """The ninth decile of the samples kept, or the fast figure where that is more."""
        fast_s = self.fast_s(now_s)
        if fast_s is None:
            return None
        ordered = sorted(rtt_s for _, rtt_s in self._samples)
        return max(fast_s, ordered[min(math.ceil(PESSIMIST_Q * len(ordered)), len(ordered)) - 1])

    def age_s(self, now_s: float) -> float:
        """Since the newest sample; infinite before the first."""
        return max(now_s - self._samples[-1][0], 0.0) if self._samples else math.inf


class Pings:
    """The pings under way, and how much each may have waited behind.

    Whatever was sent before a ping that has been answered had arrived; so what was sent since may still have been in
    front, and so may what came in while the answer was awaited.
    """

    def __init__(self) -> None:
        self._away: dict[int, tuple[float, int, int]] = {}  # by stamp: when it left, bytes sent and received before
        self._arrived_bytes = 0  # of what was sent, for certain
        self._stamp = 0

    def sent(self, now_s: float, sent_bytes: int, received_bytes: int) -> int:
        """The stamp for a ping that leaves now; the counts are `Sequenced`'s, before it."""
        self._stamp += 1
        self._away[self._stamp] = (now_s, sent_bytes, received_bytes)
        return self._stamp

    def answered(self, stamp: int, now_s: float, received_bytes: int) -> tuple[float, int] | None:
        """(RTT, bytes that may have been in front), for `RttFilter.add`; None for a stamp that nobody awaits. Earlier
        pings are forgotten: links keep order."""
        if stamp not in self._away:
            return None
        sent_s, sent_bytes, before = self._away[stamp]
        ahead_bytes = max(sent_bytes - self._arrived_bytes, 0) + max(received_bytes - before, 0)
        self._arrived_bytes = sent_bytes
        self._away = {other: ping for other, ping in self._away.items() if other > stamp}
        return now_s - sent_s, ahead_bytes

    def oldest_s(self) -> float | None:
        """When the oldest unanswered ping left."""
        return min((sent_s for sent_s, _, _ in self._away.values()), default=None)


@dataclass(frozen=True, slots=True)
class Advert:
    """How a machine is, in its own words, as it stands in a reply. None: it does not know."""

    sessions: int
    """Open, of all devices."""
    queue_s: float
    """Of work that waits for the machine."""
    step_s: float | None
    """Of one decode step lately."""
    free_memory_bytes: int
    battery: float | None = None
    """Share, 0 to 1."""
    joules: float | None = None
    """Since its start; `joules_from` says by which meter, or that they are modelled."""
    joules_from: str = ""
    up_bytes_per_s: float | None = None
    """What it measured of what the peer sends, as `Rate` says it, with the age at sending."""
    up_low_bytes_per_s: float | None = None
    up_most_bytes_per_s: float | None = None
    up_age_s: float | None = None
    up_is_bound: int = 0
    up_delay_s: float | None = None
    """As `RateMeter.delay_s` says it: with the clocks' offset in it."""

    @property
    def up(self) -> Rate | None:
        """The uplink's rate when this was written."""
        rate, low, most, age_s = (
            self.up_bytes_per_s, self.up_low_bytes_per_s, self.up_most_bytes_per_s, self.up_age_s,
        )  # fmt: skip
        if rate is None or low is None or most is None or age_s is None:
            return None
        return Rate(rate, low, most, age_s, bool(self.up_is_bound))

    @staticmethod
    def uplink(meter: RateMeter, now_s: float) -> dict[str, float | int | None]:
        """The fields `up_...` as the meter of the peer's direction reads now."""
        rate, delay_s = meter.read(now_s), meter.delay_s(now_s)
        if rate is None:
            return {"up_delay_s": delay_s}
        return {
            "up_bytes_per_s": rate.bytes_per_s, "up_low_bytes_per_s": rate.low_bytes_per_s,
            "up_most_bytes_per_s": rate.most_bytes_per_s, "up_age_s": rate.age_s,
            "up_is_bound": int(rate.is_bound), "up_delay_s": delay_s,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Number | str | None]:
        """Field by field, for a header."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Number | str | None]) -> Self:
        """The inverse of `to_dict`; what was left out is unknown. Raises ProtocolError for figures that cannot be."""
        known = {field.name: str(field.type) for field in fields(cls)}
        if missing := {"sessions", "queue_s", "step_s", "free_memory_bytes"} - set(said):
            raise ProtocolError(f"an advert without {', '.join(sorted(missing))}; its sender is of another version")
        for name, value in said.items():
            kind = known.get(name)
            if kind is None:
                raise ProtocolError(f"an advert has no {name!r}; it has {', '.join(known)}")
            if value is None and kind.endswith("None"):
                continue
            right = (str,) if kind == "str" else (int,) if kind == "int" else (int, float)
            is_figure = isinstance(value, right) and not isinstance(value, bool)
            if is_figure and not isinstance(value, str) and value is not None:
                is_figure = math.isfinite(value) and (value >= 0 or name == "up_delay_s")
                is_figure = is_figure and (value <= 1 or name != "battery")
                is_figure = is_figure and (value > 0 or not name.endswith("bytes_per_s"))
            if not is_figure:
                raise ProtocolError(f"an advert says {name} = {value!r}; expected {kind} within its range")
        return cls(**said)  # type: ignore[arg-type]


class StepClock:
    """How long a machine's work takes, from what it did lately: rows of one step are positions computed at once."""

    def __init__(self, keep: int = 15) -> None:
        self._decode: deque[float] = deque(maxlen=keep)
        self._per_row: deque[float] = deque(maxlen=keep)

    def ran(self, rows: int, seconds: float) -> None:
        """A step is over: one row is a decode step, more are a piece of a prefill or a fill."""
        if rows == 1:
            self._decode.append(seconds)
        elif rows > 1:
            self._per_row.append(seconds / rows)

    @property
    def step_s(self) -> float | None:
        """The median decode step; None before the first."""
        return median(self._decode) if self._decode else None

    @property
    def row_s(self) -> float | None:
        """The median time of a row of a prompt; None before the first."""
        return median(self._per_row) if self._per_row else None

    def queue_s(self, waiting_rows: Iterable[int]) -> float:
        """What the steps that wait will take, each by its rows; a kind never seen counts as the other says, or 0."""
        step_s, row_s = self.step_s, self.row_s
        one_s = step_s if step_s is not None else row_s or 0.0
        return sum(one_s if rows == 1 else rows * row_s if row_s is not None else one_s for rows in waiting_rows)


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A link as it is seen at some moment. Ages are infinite for what was never measured: then the prior stands."""

    fast: LinkSpec
    pessimistic: LinkSpec
    rtt_age_s: float
    up_age_s: float
    down_age_s: float
    up_is_bound: bool
    down_is_bound: bool
    source: str
    """Of what was never measured: as the prior has it."""


class LinkView:
    """Both directions and the RTT of the link to one worker, as the device knows them."""

    def __init__(self, prior: LinkSpec, source: str) -> None:
        self.down, self.rtt = RateMeter(), RttFilter()
        self._prior, self._source = prior, source
        self._trips: deque[float] = deque(maxlen=DOUBT_TRIPS)
        self._usual = ClassWatch((STIR_FLOOR_S,), STIR_FACTOR)
        self._stirred_until_s = -math.inf
        self._up: Rate | None = None
        self._up_at_s = 0.0

    def on_arrival(self, sent_s: float, arrived_s: float, num_bytes: int) -> None:
        """A frame from the worker, as `Sequenced.on_arrival` tells it."""
        self.down.on_arrival(sent_s, arrived_s, num_bytes)

    def on_reply(self, now_s: float, rtt_s: float, ahead_bytes: int = 0, advert: Advert | None = None) -> None:
        """A round trip, as `RttFilter.add` takes it, and what the worker said with it.

        The sum of both directions' delays is an RTT without queues, whatever was in front of whom; where both are
        known it counts instead, but never for more than the round trip took.
        """
        self._trips.append(rtt_s)
        if math.isinf(self._stirred_until_s) or self._usual.changed((median_low(self._trips),)):
            self._stirred_until_s = now_s + STIRRED_S
        elif self._usual.differs((rtt_s,)):
            self._stirred_until_s = max(self._stirred_until_s, now_s + DOUBT_S)
        if advert is not None and advert.up is not None:
            self._up, self._up_at_s = advert.up, now_s
        down_s = self.down.delay_s(now_s)
        if advert is None or advert.up_delay_s is None or down_s is None:
            self.rtt.add(now_s, max(rtt_s - self._own_s(now_s, ahead_bytes), 0.0), ahead_bytes)
        else:
            self.rtt.add(now_s, min(max(advert.up_delay_s + down_s, 0.0), rtt_s), is_sure=True)

    def _own_s(self, now_s: float, ahead_bytes: int) -> float:
        """Of a round trip, what its answer took to pass; 0 where the rate is not known."""
        rate = self.down.read(now_s)
        return 0.0 if rate is None or rate.is_bound else min(ahead_bytes, ANSWER_BYTES) / rate.bytes_per_s

    def is_stirred(self, now_s: float) -> bool:
        """Whether round trips have changed lately, or are few yet."""
        return math.isinf(self._stirred_until_s) or now_s < self._stirred_until_s

    def figures(self, now_s: float) -> LinkFigures:
        """What is known at `now_s`."""
        down, up = self.down.read(now_s), self._up
        rtt_s, slow_s = self.rtt.fast_s(now_s), self.rtt.pessimistic_s(now_s)
        prior = self._prior
        up_fast, up_low = up.given(prior.up_bytes_per_s) if up else (prior.up_bytes_per_s,) * 2
        down_fast, down_low = down.given(prior.down_bytes_per_s) if down else (prior.down_bytes_per_s,) * 2
        return LinkFigures(
            LinkSpec(prior.rtt_s if rtt_s is None else rtt_s, up_fast, down_fast),
            LinkSpec(prior.rtt_s if slow_s is None else slow_s, up_low, down_low),
            self.rtt.age_s(now_s),
            math.inf if up is None else up.age_s + max(now_s - self._up_at_s, 0.0),
            math.inf if down is None else down.age_s,
            up is not None and up.is_bound,
            down is not None and down.is_bound,
            self._source,
        )


class ProbeBudget:
    """When a ping may be sent, and of what size, so that probes stay below `PROBE_SHARE` of the rate.

    In silence a small ping is due every `SILENCE_S` whatever the rate; its bytes are owed, and no other probe goes
    until they are paid.
    """

    def __init__(self, now_s: float) -> None:
        self._bytes, self._at_s = 0.0, now_s
        self._pinged_s, self._probed_s = -math.inf, now_s

    def due(
        self, now_s: float, bytes_per_s: float, heard_s: float, *, wants_rate: bool = False, hurry: bool = True
    ) -> int | None:
        """Bytes on the wire of the ping to send now, None for none; what is returned counts as sent.

        `bytes_per_s`: the rate of the direction as far as known. `heard_s`: when the peer was last heard.
        `wants_rate`: that rate is only a bound; then once a second the ping is as large as the budget allows. Without
        `hurry` (nothing has changed lately) pings are fewer: each costs its two ends a look at what has arrived.
        """
        earned = max(now_s - self._at_s, 0.0) * PROBE_SHARE * bytes_per_s
        most = PROBE_EVERY_S * PROBE_SHARE * bytes_per_s  # saved or owed
        self._bytes = min(self._bytes + earned, most)
        self._at_s = now_s
        size = None
        if wants_rate and now_s - self._probed_s >= PROBE_EVERY_S and self._bytes >= 2 * PING_WIRE_BYTES:
            size, self._probed_s = int(min(self._bytes, MAX_PROBE_BYTES)), now_s
        else:
            every_s = PING_EVERY_S if hurry else CALM_EVERY_S
            affords = now_s - self._pinged_s >= every_s and self._bytes >= PING_WIRE_BYTES
            if affords or now_s - max(heard_s, self._pinged_s) >= SILENCE_S:
                size = PING_WIRE_BYTES
        if size is not None:
            self._bytes, self._pinged_s = max(self._bytes - size, -most), now_s
        return size


class ClassWatch:
    """Tells when a row of figures has changed class: when one of them has left the class it was last announced in.

    A class is centred on the figure announced and ends at `factor` times it either way. So figures that waver around
    any value are announced once, and no boundary is at a value chosen beforehand.
    """

    def __init__(self, floors: Sequence[float], factor: float = CLASS_FACTOR) -> None:
        self._floors, self._factor = tuple(floors), factor
        self._announced: tuple[float, ...] | None = None

    def differs(self, figures: Sequence[float]) -> bool:
        """Whether these (in a fixed order) are of another class than those announced; the first never are."""
        before, now = self._announced, self._raised(figures)
        within = before is None or all(
            a / self._factor < b < a * self._factor for a, b in zip(before, now, strict=True)
        )
        return not within

    def changed(self, figures: Sequence[float]) -> bool:
        """Whether to announce these; if so they are what later ones are compared with. The first are not a change."""
        differs = self.differs(figures)
        if differs or self._announced is None:
            self._announced = self._raised(figures)
        return differs

    def _raised(self, figures: Sequence[float]) -> tuple[float, ...]:
        return tuple(max(figure, floor) for figure, floor in zip(figures, self._floors, strict=True))


def link_watch(factor: float = CLASS_FACTOR) -> ClassWatch:
    """For rows of `link_figures`."""
    return ClassWatch((1.0, 1.0, RTT_FLOOR_S), factor)


def link_figures(link: LinkSpec) -> tuple[float, float, float]:
    """What makes the class of a link: bytes/s up, bytes/s down, RTT."""
    return link.up_bytes_per_s, link.down_bytes_per_s, link.rtt_s


def load_watch(factor: float = CLASS_FACTOR) -> ClassWatch:
    """For rows of `load_figures`."""
    return ClassWatch((1.0, QUEUE_FLOOR_S, STEP_FLOOR_S), factor)


def load_figures(advert: Advert) -> tuple[float, float, float]:
    """What makes the class of a machine's load: sessions, seconds of work that wait, seconds of a decode step."""
    return float(advert.sessions), advert.queue_s, advert.step_s or 0.0
