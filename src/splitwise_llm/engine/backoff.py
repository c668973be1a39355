"""When to try again, and how long to wait: numbers and pure functions. It knows no clock, no network and no state.

`tenacity` and `stamina` were considered: both are kept well, and both own the loop that sleeps and calls. Here the
waiting is one state among eight, frames arrive during it, and tests and the fleet bench run it in virtual time; what
is left of such a library without its loop is the few lines of `RecoveryRules.delay_s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from splitwise_llm.errors import RequestError

LONGEST_RETRY_AFTER_S = 60.0
"""A worker is believed when it says when to come back, up to this: it may be mistaken, or mean harm."""

SPREAD = 1.5
"""At 1, attempts would start at just the rate that is accepted; but TCP repeats a dial that nobody answered after a
second, so after a dead network new dials and repeated ones arrive together, at twice that."""


@dataclass(frozen=True, slots=True)
class RecoveryRules:
    """All numbers of recovery, with the reasons for the defaults. Seconds. Raises RequestError for what cannot be.

    Liveness. An answer that is predicted to take `step_s` may keep us waiting for `limit_s` = max(4 steps, 1 s)
    before the link must be known to be dead: four steps, as a step that takes twice as long is common (a full batch,
    a garbage collection) and one that takes four times as long is not; 1 s, as TCP alone may need 0.2 to 0.6 s to
    send a lost segment again. At half of that a ping goes out; at 0.9 the link is given up; the last tenth is left
    for an event loop that comes late. A tick that is later than that tenth means that this process did not run: the
    silence was ours, and the ping gets its grace again.

    Attempts. The delay before attempt n (from 0) is uniform between `floor_s` and min(`cap_s`, `base_s` x 2^n): full
    jitter, which spreads a fleet best for the same mean wait (Brooker, "Exponential Backoff and Jitter", AWS 2015).
    `cap_s` counts from the start of the attempt before: so a link that returns is tried at most `cap_s` later, also
    when that attempt hung. What is left of the cap after a hung attempt is drawn from, never skipped: attempts that
    all hang for the same time would end together, and a fleet would fall into step (docs/recovery.md has figures).
    """

    steps: float = 4.0
    """An answer may take so many times what was predicted."""
    least_limit_s: float = 1.0
    """No link is given up after a shorter silence, however short the steps."""
    suspect_share: float = 0.5
    """At this share of the limit a ping goes out."""
    dead_share: float = 0.9
    """At this share of the limit the link is given up."""
    heartbeat_s: float = 1.0
    """While nothing is awaited, a ping after so much silence: a half-open link shows without traffic. About 100
    bytes per second each way; the ping's answer may take `least_limit_s`."""
    base_s: float = 0.1
    """The longest first delay, for a worker with few sessions; `beside` makes it longer for one with many."""
    cap_s: float = 5.0
    """The longest delay of all: what a returned link may wait for us."""
    floor_s: float = 0.05
    """The shortest delay: full jitter alone may draw none at all, time and again."""
    attempt_s: float = 3.0
    """Dialling and greeting may take so long: 5 round trips of 0.6 s, and the worker's queue. Well below `cap_s`, as
    the difference is what is left to draw from."""
    accepts_per_s: float = 50.0
    """Sessions that one worker takes in again per second, believed to be few: a worker with the bundled model greets
    450 per second on one core of a small virtual machine, without TLS and without loading anything."""
    budget_s: float = 3600.0
    """From the first fault; no attempt starts later. Infinite: never give up."""
    steady_s: float = 5.0
    """A link that lived for so long was well: the next fault starts with a short delay and a whole budget. Without
    this a worker that dies of every session it resumes is dialled as if it were the first time."""

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in self.__slots__}
        for name, number in numbers.items():
            least = 0.0 if name in ("budget_s", "steady_s") else math.ulp(0.0)
            if not (least <= number and (math.isfinite(number) or name == "budget_s")):
                raise RequestError(f"recovery's {name} is {number}; it must be a positive number")
        if not self.suspect_share < self.dead_share < 1:
            raise RequestError(
                f"recovery would suspect at {self.suspect_share:g} and give up at {self.dead_share:g} of the limit; "
                "these must grow and stay below 1"
            )
        if not (self.floor_s <= self.base_s <= self.cap_s and self.attempt_s + self.floor_s <= self.cap_s):
            raise RequestError(
                f"recovery's delays are {self.floor_s:g} s at least, {self.base_s:g} s first, {self.cap_s:g} s at "
                f"most, which must grow; and an attempt of {self.attempt_s:g} s must fit into the longest"
            )

    def beside(self, sessions: int) -> RecoveryRules:
        """These rules, for a worker that has so many sessions: an outage that one of them sees may be one that all
        see, so the first delay is spread over `SPREAD` times what it takes to let them all in again."""
        return replace(self, base_s=min(self.cap_s, max(self.base_s, SPREAD * sessions / self.accepts_per_s)))

    def limit_s(self, step_s: float) -> float:
        """How long a link may be silent while an answer is awaited that should take `step_s`."""
        return max(self.steps * step_s, self.least_limit_s)

    def longest_delay_s(self, failures: int, took_s: float = 0.0) -> float:
        """The upper end of the delay after so many attempts that failed, the last one after `took_s`."""
        longest_s = min(self.cap_s - took_s, self.base_s * 2.0 ** min(failures, 64))
        return max(self.floor_s, longest_s)

    def delay_s(self, failures: int, took_s: float, draw: float) -> float:
        """The delay after so many failed attempts, for a uniform draw from [0, 1)."""
        return self.floor_s + draw * (self.longest_delay_s(failures, took_s) - self.floor_s)

    def after_s(self, retry_after_s: float, draw: float) -> float:
        """The delay when the worker said when to come back: not sooner, and up to half as long again and `base_s`
        later, for it may have told others the same."""
        asked = min(retry_after_s, LONGEST_RETRY_AFTER_S)
        return max(self.floor_s, asked + draw * (asked / 2 + self.base_s))


def wait_s(patience: float, predicted_move_s: float) -> float:
    """How long to wait for a worker before going on elsewhere: `patience` times what moving is predicted to take.

    Patience 1 is never much worse than knowing the outage beforehand: at most twice the cheaper of waiting and
    moving (the ski-rental bound). 0 moves at once; infinite patience never does, whatever the move costs.
    """
    if patience == 0 or math.isinf(patience):
        return patience
    return patience * predicted_move_s


class Door:
    """How many sessions a worker takes in per second, and when it tells the others to come back.

    A queue of `queue` sessions that drains at `per_s`. Whoever finds it full is told a moment of its own, `1 / per_s`
    after the moment told to the one before, so those who were sent away come back one by one and not together.
    """

    def __init__(self, per_s: float, queue: int) -> None:
        if not (0 < per_s < math.inf and queue >= 1):
            raise RequestError(f"a door takes in {per_s} sessions/s and lets {queue} wait; both must be positive")
        self.per_s, self.queue = per_s, queue
        self._free_s = -math.inf
        self._promised_s = -math.inf

    def knock(self, now_s: float) -> tuple[bool, float]:
        """(True, how long until it is taken in), or (False, how long until it should come back)."""
        free_s = max(self._free_s, now_s)
        if (free_s - now_s) * self.per_s <= self.queue - 1:
            self._free_s = free_s + 1 / self.per_s
            return True, self._free_s - now_s
        self._promised_s = max(self._promised_s, free_s) + 1 / self.per_s
        return False, self._promised_s - now_s
