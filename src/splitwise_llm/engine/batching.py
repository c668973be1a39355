"""The compute thread of a machine, and who is computed when: continuous batching of the sessions that use it.

An iteration takes every decode step that waits, of whatever session, position and partition, and walks the model once
(`pieces` says how). Between two iterations one prompt gets a turn, as many rows as take about as long as a decode step;
turns go round, so a long prompt holds up neither tokens nor short prompts. What joins is what waits when an iteration
starts; it waits a little for sessions that are about to be back, and for nobody when a session is alone.

A batch has more rows than a session alone, and products of more rows may round differently: a session's logits may
differ by rounding from those it has alone. A prompt is never cut for its turns: it pauses between halves.

It does not know what a piece of work computes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from splitwise_llm.cost import Rows
from splitwise_llm.engine.pieces import Computed, Job, Piece, T, finish, walk
from splitwise_llm.engine.telemetry import StepClock

MAX_ROWS = 256
"""Of decode steps in one iteration: more would keep the first of them waiting, and its logits take room."""
LEAST_TURN_ROWS, MOST_TURN_ROWS = 16, 512
"""A prompt's turn, in rows through the whole model; where nobody has measured, the first."""
LINGER_SHARE = 0.25
"""Of a decode step: so long an iteration waits for sessions that are about to be back."""
CALL_AGAIN_S = 0.002
"""So soon does a session call again that has been answered."""
COMPANY_S = 0.25
"""A session that was here in so short a time is here."""


@dataclass(slots=True)
class _Seen:
    came_s: float
    went_s: float | None = None
    away_s: float | None = None
    """How long it was away the last time."""


class Company:
    """Who decodes here lately, and when each is likely to be back. Seconds of one clock are arguments."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[object, _Seen] = WeakKeyDictionary()

    def came(self, who: object, now_s: float) -> None:
        """A step of a session is here."""
        seen = self._seen.setdefault(who, _Seen(now_s))
        if seen.went_s is not None:
            seen.away_s = now_s - seen.went_s
        seen.came_s, seen.went_s = now_s, None

    def went(self, who: object, now_s: float) -> None:
        """It was computed."""
        if who in self._seen:
            self._seen[who].went_s = now_s

    def left(self, who: object) -> None:
        """It is over: whoever comes next is no company of its."""
        self._seen.pop(who, None)

    def is_alone(self, who: object, now_s: float) -> bool:
        """Whether nobody else was here lately."""
        return all(one is who or now_s - seen.came_s > COMPANY_S for one, seen in self._seen.items())

    def awaits(self, now_s: float, within_s: float) -> bool:
        """Whether somebody who is away should be back within so short a time; who is late by as much is not
        awaited any more."""
        for seen in self._seen.values():
            if seen.went_s is not None and seen.away_s is not None:
                due_s = seen.went_s + seen.away_s - now_s
                if -within_s <= due_s <= within_s:
                    return True
        return False


class Turns:
    """Prompts in the order of what their sessions have had, in rows through the model over 2^priority: who had least is
    next, of equals who came first. A session that comes is served as if it had had as much as the one served last."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Job]] = []
        self._had: WeakKeyDictionary[object, float] = WeakKeyDictionary()
        self._floor, self._number = 0.0, 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> list[int]:
        """Rows that wait, by piece."""
        return [job.piece.rows for _, _, job in self._waiting]

    def add(self, job: Job, had_rows: float = 0.0) -> None:
        """It waits, for the first time or after a turn of so many rows."""
        share = job.piece.share
        had = max(self._had.get(share, 0.0), self._floor) + had_rows / 2.0**job.piece.priority
        self._had[share] = had
        self._number += 1
        self._waiting.append((had, self._number, job))

    def next(self) -> Job | None:
        """Whose turn it is."""
        if not self._waiting:
            return None
        first = min(self._waiting, key=lambda one: one[:2])
        self._waiting.remove(first)
        self._floor = first[0]
        return first[2]

    def clear(self) -> list[Job]:
        """Nobody waits any more."""
        jobs, self._waiting = [job for _, _, job in self._waiting], []
        return jobs


def turn_rows(step_s: float | None, row_s: float | None) -> int:
    """Rows through the model that take a prompt about as long as a decode step takes."""
    if not step_s or not row_s:
        return LEAST_TURN_ROWS
    return int(min(max(step_s / row_s, LEAST_TURN_ROWS), MOST_TURN_ROWS))


Due = Callable[[float, Sequence[Rows]], float]
"""From when work began (monotonic clock) and what it was to when this machine is through with it: now, except where it
plays a slower one."""


class _Call(NamedTuple):
    work: Callable[[], Any]
    result: Future[Any]
    again: bool
    """Whether whoever calls is likely to call again at once."""


class Compute:
    """One thread: sessions share the processor instead of fighting over it, and the event loop stays free. `close` it.

    Other work (`call`) is done between two iterations, in order.
    """

    def __init__(self, threads: int, num_halves: int, clock: StepClock, due: Due) -> None:
        self._clock, self._num_halves, self._due = clock, num_halves, due
        self._more = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._decode: list[Job] = []
        self._turns = Turns()
        self._at_hand: list[Job] = []
        """Of this iteration."""
        self._company = Company()
        self._unfinished = 0
        self._is_closed = False
        self.batches: Counter[int] = Counter()
        """Iterations by how many sessions were in them."""
        self.busy_s = 0.0
        """Computing, or playing a machine that does."""
        self._thread = threading.Thread(target=self._live, args=(threads,), name="compute_0", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for what is being computed, cancel the rest, and end the thread."""
        with self._more:
            self._is_closed = True
            self._more.notify()
        self._thread.join()

    @property
    def is_busy(self) -> bool:
        """Whether the thread has work, though whoever waited for it may have been cancelled."""
        return self._unfinished > 0

    @property
    def waiting_rows(self) -> list[int]:
        """Of the steps that wait: a batch of decode steps counts as one of them."""
        with self._more:
            return ([1] if self._decode or self._calls else []) + self._turns.rows

    def call(self, work: Callable[[], T], again: bool = True) -> Future[T]:
        """Run something between two iterations. `again`: more is likely to follow at once, as where a session opens;
        it is waited for a little, and would keep a step waiting that comes instead."""
        result: Future[T] = Future()
        with self._more:
            self._enter()
            self._calls.append(_Call(work, result, again))
        return result

    def submit(self, piece: Piece[Any]) -> Job:
        """A piece waits for its iteration, or its turns."""
        job = Job(piece, piece.start)
        with self._more:
            self._enter()
            if piece.is_prefill:
                self._turns.add(job)
            else:
                self._company.came(piece.share, time.monotonic())
                self._decode.append(job)
        return job

    def _enter(self) -> None:
        if self._is_closed:
            raise RuntimeError("this machine is closed")
        self._unfinished += 1
        self._more.notify()

    def alone(self, piece: Piece[T]) -> Computed[T] | None:
        """Compute a decode step on the calling thread, if nobody else is here and nothing is being computed."""
        start_s = time.monotonic()
        with self._more:
            if self._unfinished or not self._company.is_alone(piece.share, start_s):
                return None
            self._company.came(piece.share, start_s)
        job = Job(piece, piece.start)
        with torch.inference_mode():
            walk([job])
        stop_s = time.monotonic()
        self.busy_s += stop_s - start_s
        self._clock.ran(1, stop_s - start_s)
        with self._more:
            self._company.went(piece.share, stop_s)
        if job.error is not None:
            raise job.error
        return Computed(job.value, start_s, stop_s)

    def is_quiet(self, who: object) -> bool:
        """Whether nobody else was here lately and nothing is being computed."""
        with self._more:
            return not self._unfinished and self._company.is_alone(who, time.monotonic())

    def forget(self, who: object) -> None:
        """A session is over."""
        with self._more:
            self._company.left(who)

    # On the thread

    def _live(self, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                while not self._is_closed:
                    self._iterate()
        finally:  # also where an iteration breaks, which is a mistake of ours: nobody waits for ever
            with self._more:
                self._is_closed = True
                jobs = [*self._at_hand, *self._left()]
                waiting = [call.result for call in self._calls] + [job.result for job in jobs]
            for result in waiting:
                if not result.done() and not result.cancel():  # a prompt between two turns
                    result.set_exception(CancelledError())

    def _left(self) -> list[Job]:
        return self._decode + self._turns.clear()

    def _iterate(self) -> None:
        with self._more:
            self._more.wait_for(lambda: self._calls or self._decode or self._turns or self._is_closed)
        self._answer_calls()
        with self._more:
            self._linger()
            batch = self._at_hand = self._take()
            turn = None if self._is_closed else self._turns.next()
        if turn:
            self._at_hand = [*batch, turn]
        if batch:
            self._run(batch)
        if turn:
            self._run_turn(turn)
        self._at_hand = []

    def _answer_calls(self) -> None:
        """What waits, and what follows at once: who opens a session calls several times in a row, and would wait for
        an iteration each time."""
        until_s = time.monotonic() + LINGER_SHARE * (self._clock.step_s or 0.0)
        due = len(self._calls)  # these in any case; of those that follow, no endless stream
        while self._calls and not self._is_closed and (due > 0 or time.monotonic() < until_s):
            due -= 1
            call = self._calls.popleft()
            self._answer(call.work, call.result)
            with self._more:
                left_s = min(CALL_AGAIN_S, until_s - time.monotonic())
                if call.again and not self._calls and left_s > 0:
                    self._more.wait_for(lambda: self._calls or self._is_closed, left_s)

    def _answer(self, work: Callable[[], Any], result: Future[Any]) -> None:
        if not result.set_running_or_notify_cancel():
            self._left_off(1)
            return
        try:
            value = work()
        except BaseException as error:
            self._left_off(1)
            result.set_exception(error)
        else:
            self._left_off(1)
            result.set_result(value)

    def _left_off(self, number: int) -> None:
        with self._more:
            self._unfinished -= number

    def _linger(self) -> None:
        """Wait for those who are about to be back, rather than leave them for the next iteration."""
        if not self._decode or not (step_s := self._clock.step_s):
            return
        until_s = time.monotonic() + LINGER_SHARE * step_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self._turns or self._calls or self._is_closed:
                return
            if not self._company.awaits(time.monotonic(), left_s):
                return
            self._more.wait(left_s)

    def _take(self) -> list[Job]:
        """What is computed together now: one step of each session that waits, the oldest first."""
        if self._is_closed:
            return []
        batch: list[Job] = []
        later: list[Job] = []
        rows, shares = 0, set()
        for job in self._decode:
            share = id(job.piece.share)
            if batch and (rows + job.piece.rows > MAX_ROWS or share in shares):
                later.append(job)
            elif job.result.set_running_or_notify_cancel():
                batch.append(job)
                shares.add(share)
                rows += job.piece.rows
            else:  # whoever asked for it is gone
                self._unfinished -= 1
        self._decode = later
        return batch

    def _run(self, batch: list[Job]) -> None:
        start_s = time.monotonic()
        walk(batch)
        due_s = self._due(start_s, [job.piece.part(job.piece.start, job.piece.stop) for job in batch])
        time.sleep(max(due_s - time.monotonic(), 0.0))
        stop_s = time.monotonic()
        self.busy_s += stop_s - start_s
        self._clock.ran(1, stop_s - start_s)
        self.batches[len(batch)] += 1
        with self._more:
            for job in batch:
                self._company.went(job.piece.share, stop_s)
        for job in batch:
            job.start_s = start_s
        self._deliver(batch, stop_s)

    def _deliver(self, jobs: Sequence[Job], stop_s: float) -> None:
        self._left_off(len(jobs))
        for job in jobs:
            if job.error is not None:
                job.result.set_exception(job.error)
            else:
                job.result.set_result(Computed(job.value, job.start_s, stop_s))

    def _run_turn(self, job: Job) -> None:
        """A prompt's turn: its rows, half by half, until it is through, or has had its share and others wait."""
        piece, first = job.piece, job.half
        if job.gone.is_set() or (not job.result.running() and not job.result.set_running_or_notify_cancel()):
            self._left_off(1)
            if job.result.running():
                job.result.set_exception(CancelledError())
            return
        start_s = time.monotonic()
        job.start_s = job.start_s or start_s
        allowance = turn_rows(self._clock.step_s, self._clock.row_s) * self._num_halves
        if not job.is_computed:
            job.attempt(job.begin)
            while job.error is None and job.half < piece.stop and not job.gone.is_set():
                job.tap(job.half)
                job.attempt(lambda: job.advance(job.half, job.half + 1))
                if job.half < piece.stop and (job.half - first) * piece.rows >= allowance and self._others_wait():
                    break
            job.owed_rows += (job.half - first) * piece.rows
            if job.half == piece.stop and not job.gone.is_set():
                finish([job])
                job.is_computed = True
            job.owed_s += self._due(start_s, [piece.part(first, job.half)]) - start_s
        had = self._pay(job, start_s, allowance)
        stop_s = time.monotonic()
        self.busy_s += stop_s - start_s
        job.busy_s += stop_s - start_s
        if job.gone.is_set():
            self._left_off(1)
            job.result.set_exception(CancelledError())
        elif job.error is None and (not job.is_computed or job.owed_s > 0.0):
            with self._more:
                self._turns.add(job, had / self._num_halves)
        else:
            self._clock.ran(piece.rows, job.busy_s)
            self._deliver([job], stop_s)

    def _pay(self, job: Job, start_s: float, allowance: float) -> float:
        """Sleep on until the time of a turn that began at `start_s` is up, or, after its allowance, somebody else
        waits; rows (times halves) that this turn has paid for.

        A machine that plays a slower one is through with a whole prompt before that one would have seen who else
        comes; and one that slept between two halves would begin each of them with cold caches.
        """
        rows, owed_s = job.owed_rows, job.owed_s
        if owed_s <= 0.0:
            return rows
        least_s = owed_s * min(allowance / rows, 1.0) if rows else owed_s  # without halves it is short
        with self._more:
            self._more.wait_for(lambda: self._is_closed, start_s + least_s - time.monotonic())
            self._more.wait_for(self._others_wait, start_s + owed_s - time.monotonic())
        job.owed_s = max(start_s + owed_s - time.monotonic(), 0.0)
        job.owed_rows = rows * job.owed_s / owed_s
        return rows - job.owed_rows

    def _others_wait(self) -> bool:
        with self._more:
            return bool(self._decode or self._calls or self._turns or self._is_closed)
