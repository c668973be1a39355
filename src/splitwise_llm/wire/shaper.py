"""What a link does to bytes: when they arrive. It knows no socket and reads no clock: every time is an argument.

Times are seconds since the link came up. A frame waits for the frames before it, is serialised at the
rate of the moment, travels for the one-way delay, and never overtakes.
"""

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from splitwise_llm.errors import SpecError
from splitwise_llm.traces import Direction, RateTrace, named_trace
from splitwise_llm.units import parse_rate, parse_seconds

Rate = float | RateTrace | None
"""Bytes per second, constant or from a trace; None is unlimited."""


@dataclass(frozen=True, slots=True)
class Outage:
    """Down for the last `for_s` of every `every_s` seconds; the first outage starts at `every_s - for_s`.

    An outage stops the link's own time: nothing is serialised, what is in flight stays where it is, a
    trace waits, and all goes on afterwards; so whatever had not arrived comes later by the outage's length.
    """

    every_s: float
    for_s: float

    def __post_init__(self) -> None:
        if not 0 < self.for_s < self.every_s < math.inf:
            raise SpecError(
                f"an outage of {self.for_s} s in every {self.every_s} s cannot be: it must be shorter than its "
                "period, as in outage=10s/3s"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `10s/3s`: down for 3 s in every 10 s. Raises SpecError."""
        every, slash, length = text.partition("/")
        if not slash:
            raise SpecError(f"{text!r} is no outage: write period/length, as in 10s/3s (3 s in every 10 s)")
        return cls(parse_seconds(every), parse_seconds(length))

    def up_s(self, when_s: float) -> float:
        """The link's own time at `when_s`: how long it has been up by then."""
        periods, within_s = divmod(when_s, self.every_s)
        return periods * self._up_s + min(within_s, self._up_s)

    def when_s(self, up_s: float) -> float:
        """The inverse of `up_s`: when the link has been up for so long; of a whole outage, its end."""
        periods, within_s = divmod(up_s, self._up_s)
        return periods * self.every_s + within_s

    @property
    def _up_s(self) -> float:
        return self.every_s - self.for_s


@dataclass(frozen=True, slots=True)
class LinkShape:
    """Both directions of a link: rates, one-way delay, and what disturbs them.

    A frame's delay is drawn evenly from `delay_s` +- `jitter_s`, the same for the same `seed`, and a quick
    frame still waits for a slow one before it; outages hit both directions at once. Raises SpecError when
    a number cannot be.
    """

    up: Rate = None
    down: Rate = None
    delay_s: float = 0.0
    jitter_s: float = 0.0
    outage: Outage | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for rate in (self.up, self.down):
            if isinstance(rate, float | int) and not 0 < rate < math.inf:
                raise SpecError(f"a rate of {rate} bytes/s lets nothing through; give one above 0, or leave it out")
        if not 0 <= self.delay_s < math.inf:
            raise SpecError(f"a delay of {self.delay_s} s cannot be; give one of 0 or more")
        if not 0 <= self.jitter_s <= self.delay_s:
            raise SpecError(
                f"a jitter of {self.jitter_s} s does not fit a one-way delay of {self.delay_s} s: frames would "
                "arrive before they are sent; give an rtt of at least twice the jitter"
            )

    @classmethod
    def parse(cls, text: str, read: Callable[[str, Direction], RateTrace] = named_trace) -> Self:
        """From `rtt=20ms up=50mbit down=50mbit jitter=2ms outage=10s/3s seed=1`, in any order, all optional.

        `rate=20mbit` is both directions; a rate may also be `unlimited` or a trace file, as in `up=walk.csv.gz`
        (`up=walk.csv.gz:cut` leaves out the pauses of a recorder); quote paths with blanks as in a shell.
        `rtt` is halved into the one-way delay.
        Traces are read with `read`. Raises SpecError.
        """
        given = _settings(text)
        both = given.get("rate", "unlimited")
        return cls(
            up=_rate(given.get("up", both), "up", read),
            down=_rate(given.get("down", both), "down", read),
            delay_s=parse_seconds(given.get("rtt", "0s")) / 2,
            jitter_s=parse_seconds(given.get("jitter", "0s")),
            outage=Outage.parse(given["outage"]) if "outage" in given else None,
            seed=_whole(given.get("seed", "0")),
        )

    def lanes(self) -> tuple[Lane, Lane]:
        """A fresh lane up and a fresh lane down, both at time 0."""
        return (
            Lane(self.up, self.delay_s, self.jitter_s, self.outage, f"{self.seed} up"),
            Lane(self.down, self.delay_s, self.jitter_s, self.outage, f"{self.seed} down"),
        )


class Lane:
    """One direction of a link: first in, first out. Ask it in the order of sending, at times that do not fall."""

    def __init__(
        self,
        rate: Rate = None,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        outage: Outage | None = None,
        seed: int | str = 0,
    ) -> None:
        self._trace = RateTrace.constant(rate) if isinstance(rate, float | int) else rate
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._outage = outage
        self._random = random.Random(seed)
        self._free_s = 0.0  # in the link's own time: when the last byte accepted so far has left
        self._arrival_s = 0.0  # and when it arrives

    def deliver_at(self, now_s: float, num_bytes: int) -> float:
        """When the last of `num_bytes` handed over at `now_s` arrives; the lane now counts on them."""
        ready_s = max(now_s if self._outage is None else self._outage.up_s(now_s), self._free_s)
        self._free_s = ready_s if self._trace is None else self._trace.finish_s(ready_s, num_bytes)
        travel_s = self._delay_s + self._jitter_s * self._random.uniform(-1, 1)
        self._arrival_s = max(self._arrival_s, self._free_s + travel_s)
        return max(now_s, self._arrival_s if self._outage is None else self._outage.when_s(self._arrival_s))

    @property
    def in_flight_bytes(self) -> float:
        """The most that can have left and not arrived: peak rate x delay; infinite when unlimited and delayed."""
        longest_s = self._delay_s + self._jitter_s
        if longest_s == 0:
            return 0.0
        return math.inf if self._trace is None else self._trace.peak_bytes_per_s * longest_s


_KEYS = ("rate", "up", "down", "rtt", "jitter", "outage", "seed")


def _settings(text: str) -> dict[str, str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SpecError(f"{text!r} has an open quote; close it") from error
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _KEYS or not equals or not value:
            raise SpecError(f"{word!r} says nothing about a link: write key=value with a key of {', '.join(_KEYS)}")
        if key in given:
            raise SpecError(f"{key} is given twice, {given[key]!r} and {value!r}; keep one")
        given[key] = value
    return given


def _rate(text: str, direction: Direction, read: Callable[[str, Direction], RateTrace]) -> Rate:
    if text == "unlimited":
        return None
    try:
        return parse_rate(text)
    except SpecError:
        pass
    try:
        return read(text, direction)
    except SpecError as error:
        raise SpecError(f"{error} ({text!r} is no rate either; a rate is written as 20mbit)") from error


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise SpecError(f"seed={text!r} is not a whole number of 0 or more")
    return int(text)
