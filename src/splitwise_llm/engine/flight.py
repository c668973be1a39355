"""Many prompts over the same machines, so many of them under way at a time, each a generation of its own.

Nobody waits for a round of the others (EdgeShard's order without bubbles): a sequence's next token is begun as soon as
its last one is there, a machine takes steps in the order in which they come, and the next prompt follows as soon as an
answer is complete. It does not know how a generation works.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass

from splitwise_llm.decision import Decision
from splitwise_llm.engine.generation import Generation
from splitwise_llm.errors import BrokenInvariant, MemoryTooSmall, PeerError, SplitwiseError, UserError, WorkerFailed
from splitwise_llm.observation import Observation, Policy
from splitwise_llm.records import Interval, RequestRecord


class Agreed:
    """A policy whose answer at admission is that of all sequences, so that they meet on the same machines in the same
    order; it is asked again when a machine of it cannot be reached. What becomes of a sequence in flight is asked for
    each."""

    def __init__(self, decides: Policy) -> None:
        self._decides = decides
        self.policy = getattr(decides, "policy", decides)
        """Whose answer it is in the end: one that was told it is not asked again."""
        self._answer: Decision | None = None

    def decide(self, observation: Observation) -> Decision:
        """Raises what the policy raises."""
        if observation.placement is not None:
            return self._decides.decide(observation)
        away = {number for number, machine in enumerate(observation.machines) if not machine.reachable}
        if self._answer is None or away & set(self._answer.partition.machines):
            self._answer = self._decides.decide(observation)
        return self._answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a prompt: its record, or what ended it."""

    number: int
    """From 0, in the order of the prompts."""
    record: RequestRecord | None
    error: SplitwiseError | None = None


class Flight:
    """`count` generations, at most `room` of them under way: `async for answer in flight.answers()`, in the order in
    which they are complete. `begin` makes one that was not entered, by its number.

    Where there turns out to be room for fewer, fewer are under way from then on, and `tell` hears of it.
    """

    def __init__(
        self, begin: Callable[[int], Generation], count: int, room: int, tell: Callable[[str, str], object]
    ) -> None:
        if count < 1 or room < 1:
            raise BrokenInvariant(f"{count} prompts, {room} at a time: expected at least one")
        self._begin, self._count, self._tell = begin, count, tell
        self.room = room
        self.seconds = 0.0
        """From the first prompt to the last token, as far as it is."""
        self._start_s: float | None = None
        self._under_way = 0

    async def answers(self) -> AsyncGenerator[Answer]:
        """Each once. The first generation is opened before the others, for what it meets they would meet, too: raises
        what keeps it from beginning. Raises what is our own fault."""
        waiting = deque(range(self._count))
        running: dict[asyncio.Task[Answer | None], int] = {}
        opened = asyncio.Event()
        try:
            while waiting or running:
                while waiting and len(running) < (self.room if opened.is_set() else 1):
                    number = waiting.popleft()
                    running[asyncio.create_task(self._answer(number, opened))] = number
                opening = asyncio.create_task(opened.wait())
                watched = {*running, *(() if opened.is_set() else (opening,))}
                done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                opening.cancel()
                for task in done & running.keys():
                    number = running.pop(task)
                    answer = task.result()
                    if isinstance(answer, Answer):
                        yield answer
                    else:
                        waiting.appendleft(number)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, number: int, opened: asyncio.Event) -> Answer | None:
        """None: there is no room for it beside the others. Raises what keeps the first of all from beginning."""
        is_first = not opened.is_set()
        alone = self.room == 1
        try:
            generation = self._begin(number)
            await generation.__aenter__()
        except (UserError, PeerError) as error:
            if is_first:
                raise
            if isinstance(error, MemoryTooSmall | WorkerFailed) and not alone:
                self.room = max(self._under_way, 1)
                self._tell("refused", f"{error}; {self.room} are under way, and more will not be")
                return None
            return Answer(number, None, error)
        if self._start_s is None:
            self._start_s = time.monotonic()
        opened.set()
        self._under_way += 1
        self.room = max(self.room, self._under_way)  # this one was opened while another one was refused
        try:
            async for _ in generation:
                self.seconds = time.monotonic() - self._start_s
        except (UserError, PeerError) as error:
            return Answer(number, None, error)
        finally:
            self._under_way -= 1
            await generation.__aexit__(None, None, None)
        return Answer(number, generation.record)


@dataclass(frozen=True, slots=True)
class Idling:
    """The machine that computed most, and the share of its time in which it did not: bubbles of the pipeline."""

    machine: str
    bubble_share: float


def idling(records: Sequence[RequestRecord]) -> Idling:
    """From the intervals that the machines of some requests side by side noted, each by its own clock, between its
    first and its last; steps computed together count once. A machine that was lost told nothing of what it did before.
    """
    shares: dict[str, tuple[float, float]] = {}
    machines = [machine for record in records for machine in record.machines]
    for name in dict.fromkeys(machine.name for machine in machines):
        spans = _joined(one for machine in machines if machine.name == name for one in machine.intervals)
        if spans:
            shares[name] = sum(stop - start for start, stop in spans), spans[-1][1] - spans[0][0]
    if not shares:
        return Idling("", 0.0)
    name = max(shares, key=lambda name: shares[name][0])
    busy_s, window_s = shares[name]
    return Idling(name, 1.0 - busy_s / window_s if window_s else 0.0)


def _joined(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """Spans, ascending, none of which touches another."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted((one.start_s, one.stop_s) for one in intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
