"""What a device remembers from one request to the next: its latest epochs, outages, lengths of answers.

It means what the simulator's memory of the same means (`sim/past.py`). It sends nothing and reads no clock: times are
seconds of one's own monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from splitwise_llm.observation import EPOCHS, SEEN, Past

SLOTS = 4
"""Requests that a device is taken to work at at a time, as in the scenarios: nobody keeps the others at a door here, so
they are as many as there are where there are more."""


@dataclass(slots=True)
class Moments:
    """Number, sum, and sum of squares of some figures."""

    number: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.number, self.total, self.squares = self.number + 1, self.total + value, self.squares + value**2

    @property
    def row(self) -> tuple[float, float, float]:
        return float(self.number), self.total, self.squares


@dataclass(frozen=True, slots=True)
class Epoch:
    """What was believed of the link and the cloud when a policy was asked."""

    at_s: float
    is_up: bool
    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    slow: float
    wait_s: float

    def row(self, now_s: float) -> tuple[float, ...]:
        """In the order of `SEEN`."""
        return (
            now_s - self.at_s, float(self.is_up), self.rtt_s, self.up_bytes_per_s, self.down_bytes_per_s, self.slow,
            self.wait_s,
        )  # fmt: skip


@dataclass(slots=True)
class Memory:
    """Of one device with one worker, over all its requests in this process. Sessions are told apart by what stands for
    them, anything that is not another's."""

    epochs: deque[Epoch] = field(default_factory=lambda: deque(maxlen=EPOCHS))
    """The latest first."""
    outages: Moments = field(default_factory=Moments)
    gaps: Moments = field(default_factory=Moments)
    answers: Moments = field(default_factory=Moments)
    is_down: bool = False
    _since_s: float | None = None
    _open: set[object] = field(default_factory=set)
    _cut_off: set[object] = field(default_factory=set)
    """Sessions whose worker is out of reach: the link is down while any one's is."""

    def saw(self, session: object, now_s: float, *, is_up: bool) -> None:
        """A session's worker is within reach, or is not. The first stretch counts like any other."""
        self._open.add(session)
        if is_up:
            self._cut_off.discard(session)
        else:
            self._cut_off.add(session)
        if self._since_s is None:
            self._since_s, self.is_down = now_s, not is_up
        is_down = bool(self._cut_off)
        if is_down != self.is_down:
            (self.gaps if is_down else self.outages).add(now_s - self._since_s)
            self._since_s, self.is_down = now_s, is_down

    def left(self, session: object, tokens: int | None = None) -> None:
        """A session is over, with so many tokens if it was answered. Whether its worker is back, another one sees."""
        self._open.discard(session)
        self._cut_off.discard(session)
        if tokens is not None:
            self.answers.add(float(tokens))

    def decided(self, epoch: Epoch) -> None:
        """A policy was asked: what it saw goes on top."""
        self.epochs.appendleft(epoch)

    def past(self, session: object, now_s: float, age_s: float) -> Past:
        """As one system; `age_s` of what is known of link and cloud, the older of the two."""
        others = len(self._open - {session})
        epochs = np.zeros((1, EPOCHS, len(SEEN)))
        for number, one in enumerate(self.epochs):
            epochs[0, number] = one.row(now_s)
        since_s = 0.0 if self._since_s is None else now_s - self._since_s
        return Past(
            np.array([self.is_down]), np.array([since_s]), np.array([age_s]),
            np.array([float(max(SLOTS, others + 1))]), np.array([[float(others), 0.0]]), epochs,
            *(np.array([one.row]) for one in (self.outages, self.gaps, self.answers)),
        )  # fmt: skip
