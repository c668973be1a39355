"""What can go wrong, as data: the faults, and when each is to happen. It knows no clock and breaks nothing itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from splitwise_llm.errors import SpecError
from splitwise_llm.units import parse_rate, parse_seconds


class Layer(StrEnum):
    """Who can make a fault happen."""

    LINK = "frame link"
    PROXY = "TCP proxy"
    PROCESS = "process"
    MACHINE = "clock or journal"


class Fault(StrEnum):
    """Everything that is injected on purpose. `description` says what happens, `seen` what a user sees of it."""

    CONNECT_REFUSED = "connect-refused"
    RESET = "reset"
    DROP_UP = "drop-up"
    DROP_DOWN = "drop-down"
    DROP_BOTH = "drop-both"
    CRAWL = "crawl"
    DELAY_SPIKE = "delay-spike"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT = "corrupt"
    WORKER_KILLED = "worker-killed"
    WORKER_RESTARTED = "worker-restarted"
    WORKER_OUT_OF_MEMORY = "worker-out-of-memory"
    JOURNAL_DISK_FULL = "journal-disk-full"
    EDGE_KILLED = "edge-killed"
    CLOCK_JUMP = "clock-jump"

    @property
    def description(self) -> str:
        return _ABOUT[self].description

    @property
    def seen(self) -> str:
        """What whoever runs a generation sees."""
        return _ABOUT[self].seen

    @property
    def layers(self) -> frozenset[Layer]:
        """Who can make it happen."""
        return _ABOUT[self].layers

    @property
    def lasts(self) -> bool:
        """Whether it acts for a time; the others happen once, at the first link or frame that they can hit."""
        return _ABOUT[self].lasts


@dataclass(frozen=True, slots=True)
class _About:
    description: str
    seen: str
    layers: frozenset[Layer]
    lasts: bool


_NET = frozenset({Layer.LINK, Layer.PROXY})
_FRAMES = frozenset({Layer.LINK})
_PROCESS = frozenset({Layer.PROCESS})
_MACHINE = frozenset({Layer.MACHINE})
_SILENCE = "Nothing at first; after a deadline the link counts as dead, and the text goes on elsewhere or waits."

_ABOUT = {
    Fault.CONNECT_REFUSED: _About(
        "New connections are refused; open ones go on.",
        "The machine counts as unreachable, and is tried again after a growing pause.", _NET, True,
    ),
    Fault.RESET: _About(
        "The link breaks, and both ends are told at once.",
        "A short pause while the link is made anew, or none where the edge goes on alone.", _NET, False,
    ),
    Fault.DROP_UP: _About(
        "What the device sends vanishes, though its sends succeed; the other way works.", _SILENCE, _NET, True
    ),
    Fault.DROP_DOWN: _About(
        "What the worker sends vanishes, though its sends succeed; the other way works.", _SILENCE, _NET, True
    ),
    Fault.DROP_BOTH: _About("What either end sends vanishes, though sends succeed.", _SILENCE, _NET, True),
    Fault.CRAWL: _About(
        "Both directions carry only `rate`.", "Tokens come slowly until the work moves off the link.", _NET, True
    ),
    Fault.DELAY_SPIKE: _About(
        "Everything takes `delay` longer each way.", "Tokens come late; the text is the same.", _NET, True
    ),
    Fault.DUPLICATE: _About("Every frame arrives twice.", "Nothing.", _FRAMES, True),
    Fault.REORDER: _About("Of two frames that follow each other closely, the second arrives first.",
        "Nothing.", _FRAMES, True,
    ),
    Fault.CORRUPT: _About(
        "One byte of what passes next is changed.",
        "The damage is noticed by its checksum, and the link is made anew.", _NET, False,
    ),
    Fault.WORKER_KILLED: _About(
        "The worker's process is killed (SIGKILL) and does not come back.",
        "The text goes on on another worker or on the edge, or waits and says so.", _PROCESS, False,
    ),
    Fault.WORKER_RESTARTED: _About(
        "The worker's process is killed and started again; its keys and values are lost.",
        "A pause while they are computed again.", _PROCESS, False,
    ),
    Fault.WORKER_OUT_OF_MEMORY: _About(
        "The worker has no memory for what it is asked to hold, and says so.",
        "The work goes elsewhere; the record names the refusal.", _PROCESS, False,
    ),
    Fault.JOURNAL_DISK_FULL: _About(
        "Writes to the journal's file fail for want of space.",
        "A warning that the generation cannot be resumed; the text goes on.", _MACHINE, True,
    ),
    Fault.EDGE_KILLED: _About(
        "The device's process is killed (SIGKILL).",
        "The text stops; `splitwise resume` goes on from the last token.", _PROCESS, False,
    ),
    Fault.CLOCK_JUMP: _About(
        "The wall clock is set forward or back by `by`.", "Nothing; durations come from another clock.", _MACHINE, False
    ),
}  # fmt: skip

_FRAME_COUNT = re.compile(r"^([0-9]+)frames?$")


@dataclass(frozen=True, slots=True)
class Injection:
    """One fault and when: `after_s` seconds from the start, or once `after_frames` frames have passed.

    `for_s` is how long a fault that lasts acts, None: until it is healed. `rate_bytes_per_s` belongs to a crawl,
    `delay_s` to a delay spike, `by_s` to a clock jump (back when negative). Raises SpecError.
    """

    fault: Fault
    after_s: float = 0.0
    after_frames: int | None = None
    for_s: float | None = None
    rate_bytes_per_s: float = 1000.0
    delay_s: float = 0.5
    by_s: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.after_s < math.inf or (self.after_frames is not None and self.after_frames < 0):
            raise SpecError(f"{self.fault} cannot come before the start; give after=2s or after=20frames")
        if self.after_frames is not None and self.after_s:
            raise SpecError(f"{self.fault} comes after seconds or after frames, not both")
        if self.for_s is not None and not self.fault.lasts:
            raise SpecError(f"{self.fault} happens once; leave out for=")
        if self.for_s is not None and not 0 < self.for_s < math.inf:
            raise SpecError(f"{self.fault} for {self.for_s} s cannot be; give for=3s, or leave it out for no end")
        if not 0 < self.rate_bytes_per_s < math.inf:
            raise SpecError(f"a crawl at {self.rate_bytes_per_s} bytes/s cannot be; give rate=8kbit, or drop-both")
        if not 0 < self.delay_s < math.inf or not math.isfinite(self.by_s):
            raise SpecError(f"{self.fault} cannot take {self.delay_s} s, or jump by {self.by_s} s")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `drop-both after=2s for=3s`, `corrupt after=20frames`, `crawl rate=8kbit`. Raises SpecError."""
        name, *words = text.split() or [""]
        if name not in set(Fault):
            raise SpecError(f"{name!r} is no fault; there are {', '.join(Fault)}")
        fault = Fault(name)
        keys = {"after", *(["for"] if fault.lasts else []), *_OWN_KEYS.get(fault, ())}
        given: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key not in keys or not equals or not value or key in given:
                raise SpecError(
                    f"{word!r} says nothing about {fault}: write key=value once, of {', '.join(sorted(keys))}"
                )
            given[key] = value
        frames = _FRAME_COUNT.match(given.get("after", ""))
        by = given.get("by", "3600s")
        return cls(
            fault,
            after_s=0.0 if frames else parse_seconds(given.get("after", "0s")),
            after_frames=int(frames.group(1)) if frames else None,
            for_s=parse_seconds(given["for"]) if "for" in given else None,
            rate_bytes_per_s=parse_rate(given.get("rate", "8kbit")),
            delay_s=parse_seconds(given.get("delay", "0.5s")),
            by_s=-parse_seconds(by[1:]) if by.startswith("-") else parse_seconds(by),
        )

    def __str__(self) -> str:
        """What `parse` reads back."""
        words: list[str] = [self.fault]
        if self.after_frames is not None:
            words.append(f"after={self.after_frames}frames")
        elif self.after_s:
            words.append(f"after={_seconds(self.after_s)}")
        if self.for_s is not None:
            words.append(f"for={_seconds(self.for_s)}")
        own = {
            "rate": f"{_plain(8 * self.rate_bytes_per_s)}bit",
            "delay": _seconds(self.delay_s),
            "by": _seconds(self.by_s),
        }
        words.extend(f"{key}={own[key]}" for key in _OWN_KEYS.get(self.fault, ()))
        return " ".join(words)


_OWN_KEYS: dict[Fault, tuple[str, ...]] = {
    Fault.CRAWL: ("rate",),
    Fault.DELAY_SPIKE: ("delay",),
    Fault.CLOCK_JUMP: ("by",),
}


def _plain(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def _seconds(seconds: float) -> str:
    return f"{_plain(seconds)}s"


def parse_schedule(text: str, layer: Layer) -> tuple[Injection, ...]:
    """Injections from text, separated by `;`. Raises SpecError for bad text and for what `layer` cannot do."""
    schedule = tuple(Injection.parse(piece) for piece in text.split(";") if piece.strip())
    if not schedule:
        raise SpecError("no fault was given; write one as in 'drop-both after=2s for=3s; reset after=9s'")
    for injection in schedule:
        refuse(injection, layer)
    return schedule


def show_schedule(schedule: Iterable[Injection]) -> str:
    """The inverse of `parse_schedule`."""
    return "; ".join(map(str, schedule))


def refuse(injection: Injection, layer: Layer) -> None:
    """Raises SpecError when `layer` cannot make this happen."""
    if layer not in injection.fault.layers:
        who = " or ".join(sorted(injection.fault.layers))
        raise SpecError(f"a {layer} cannot apply {injection.fault}: it takes a {who}")
    if layer is Layer.PROXY and injection.after_frames is not None:
        raise SpecError(f"a {layer} knows no frames: write {injection.fault} after=2s")
