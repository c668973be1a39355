"""What is computed: a step of one session, or the steps of several together, half by half.

Sessions that pass a half with the same weights are rows of one product there, those whose units differ are computed
apart. It does not know who is computed when, what a message is, nor what comes of a step: a piece of work brings its
stream and takes its result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from splitwise_llm.cost import Rows
from splitwise_llm.model.share import Positions, Share, together

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Computed(Generic[T]):
    """A result, and when it was worked on (s, monotonic clock)."""

    value: T
    start_s: float
    stop_s: float


def _nothing(half: int, x: Tensor) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Piece(Generic[T]):
    """Halves `start` to `stop` of one step of one session, all their units on this machine.

    `stream` gives the residual stream (rows, d_model) and its positions, `finish` takes the stream behind the last
    half, and logits (head_rows, vocab) of its last rows if any are asked for; both run on the compute thread.
    """

    share: Share
    start: int
    stop: int
    rows: int
    """New positions."""
    context: int
    """Positions seen by the last of them."""
    stream: Callable[[], tuple[Tensor, Positions]]
    finish: Callable[[Tensor, Tensor | None], T]
    is_prefill: bool = False
    head_rows: int = 0
    taps: tuple[int, ...] = ()
    """Halves before which `tap` sees the stream."""
    tap: Callable[[int, Tensor], None] = _nothing
    priority: int = 0
    """A prompt gets 2^priority times the share of one with 0."""

    def part(self, start: int, stop: int) -> Rows:
        """Some of its halves, for their price."""
        return Rows(start, stop, self.rows, self.context, self.head_rows if stop == self.stop else 0)


@dataclass(slots=True, eq=False)
class Job:
    """A piece as it is being computed. `half` is the next one."""

    piece: Piece[Any]
    half: int
    result: Future[Computed[Any]] = field(default_factory=Future)
    start_s: float = 0.0
    busy_s: float = 0.0
    gone: threading.Event = field(default_factory=threading.Event)
    """Nobody waits for it any more."""
    error: Exception | None = None
    value: Any = None
    has_begun: bool = False
    is_computed: bool = False
    owed_s: float = 0.0
    """What the machine played here would still compute of what was computed here."""
    owed_rows: float = 0.0
    """The same in rows times halves."""
    x: Tensor = field(init=False)
    at: Positions = field(init=False)

    def begin(self) -> None:
        """Once: the stream, and whether its caches are where it begins."""
        if not self.has_begun:
            self.x, self.at = self.piece.stream()
            self.piece.share.check(self.piece.start, self.piece.stop, self.at)
            self.has_begun = True

    def attempt(self, work: Callable[[], object]) -> None:
        """What only this session's work can break breaks only this session."""
        if self.error is None:
            try:
                work()
            except Exception as error:
                self.error = error

    def tap(self, half: int) -> None:
        """Show the stream before a half, where it is to be seen."""
        if half in self.piece.taps:
            self.attempt(lambda: self.piece.tap(half, self.x))

    def advance(self, start: int, stop: int) -> None:
        """Through some halves, on its own."""
        self.x = self.piece.share.run(self.x, start, stop, self.at)
        self.half = stop

    def finish(self, logits: Tensor | None) -> None:
        """Take the result."""
        self.value = self.piece.finish(self.x, logits)


def walk(jobs: Sequence[Job]) -> None:
    """Compute decode steps together, from their stream to their results; an error is the job's whose it is."""
    for job in jobs:
        job.attempt(job.begin)
    edges = sorted({edge for job in jobs for edge in (job.piece.start, *job.piece.taps, job.piece.stop)})
    for start, stop in pairwise(edges):
        here = [job for job in jobs if job.error is None and job.piece.start <= start and stop <= job.piece.stop]
        for job in here:
            job.tap(start)
        for group in _groups(here, lambda job: job.piece.share.alike(start, stop)):  # noqa: B023 - used at once
            _advance(group, start, stop)
    finish(jobs)


def _groups(jobs: Iterable[Job], key: Callable[[Job], object]) -> list[list[Job]]:
    found: dict[object, list[Job]] = {}
    for job in jobs:
        if job.error is None:
            found.setdefault(key(job), []).append(job)
    return list(found.values())


def _advance(group: Sequence[Job], start: int, stop: int) -> None:
    """One group through halves that all of them pass with the same weights."""
    if len(group) == 1:
        (job,) = group
        job.attempt(lambda: job.advance(start, stop))
        return
    try:
        x = together(
            [job.piece.share for job in group],
            [job.at for job in group],
            torch.cat([job.x for job in group]),
            start,
            stop,
        )
    except Exception as error:  # of the machine, not of one session: each was checked before
        for job in group:
            job.error = error
        return
    for job, rows in zip(group, torch.split(x, [job.at.count for job in group]), strict=True):
        job.x = rows


def finish(jobs: Sequence[Job]) -> None:
    """Logits, of all that share a head at once, and what each makes of them."""
    for group in _groups((job for job in jobs if job.piece.head_rows), lambda job: job.piece.share.head_alike):
        if len(group) == 1:
            (job,) = group
            job.attempt(lambda: job.finish(job.piece.share.all_logits(job.x[-job.piece.head_rows :])))  # noqa: B023
            continue
        try:
            rows = [job.x[-job.piece.head_rows :] for job in group]
            logits = group[0].piece.share.all_logits(torch.cat(rows))
        except Exception as error:
            for job in group:
                job.error = error
            continue
        for job, mine in zip(group, torch.split(logits, [len(one) for one in rows]), strict=True):
            job.attempt(lambda: job.finish(mine))  # noqa: B023 - called at once
    for job in jobs:
        if not job.piece.head_rows:
            job.attempt(lambda: job.finish(None))  # noqa: B023 - called at once
