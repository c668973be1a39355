"""What is known of a generation's runs, and the record that becomes of them. It runs nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splitwise_llm import plan as plans
from splitwise_llm.cost.drafting import acceptance_of
from splitwise_llm.decision import Decision
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.post import Extent, Post
from splitwise_llm.engine.walk import Walker
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.plan import DEVICE, Crossings, Kind
from splitwise_llm.records import Event, Interval, MachineRecord, Prediction, RequestRecord, RunRecord, Setup
from splitwise_llm.wire.messages import Halted


@dataclass(slots=True)
class Run:
    """A run as the device sees it."""

    decision: Decision
    walker: Walker
    post: Post
    workers: tuple[int, ...]
    at_s: float
    why: str
    halted: dict[int, tuple[Halted, tuple[Interval, ...]]] = field(default_factory=dict)
    """What each worker said in the end, and when it computed."""
    depths: list[int] = field(default_factory=list)
    """Of the tokens that it made."""
    ended: str = ""
    """Why it ended before its time."""

    @property
    def extent(self) -> Extent:
        return self.post.extent

    @property
    def certain(self) -> int:
        """Positions computed whose ids are known to be right."""
        return self.extent.known + max(len(self.depths) - 1, 0)

    @property
    def loop_machine(self) -> int:
        """Who runs the token loop."""
        return self.post.plan.loop_machine

    @property
    def rounds(self) -> Sequence[tuple[int, int]]:
        """Positions computed and tokens made in each decode step of a run that drafts, from where its loop is: streams
        between two workers may never have come by here."""
        if self.loop_machine == DEVICE:
            return self.walker.rounds
        return self.halted[self.loop_machine][0].rounds if self.loop_machine in self.halted else ()

    @property
    def crossings(self) -> tuple[Crossings, ...]:
        """What all machines counted."""
        said = [halted for halted, _ in self.halted.values()]
        theirs = (
            Crossings(c.after, c.kind, c.src, c.dst, c.count, c.payload_bytes) for one in said for c in one.crossed
        )
        return _added([*self.post.crossings, *theirs])

    def made_late(self, count: int) -> None:
        """So many more of its tokens came when it was over, and by no chain of messages of its own."""
        self.depths += [self.depths[-1] if self.depths else 0] * count

    def check(self) -> None:
        """Raise BrokenInvariant unless what was sent is what the plan says, for a run that was not disturbed."""
        rounds = self.rounds if self.post.plan.decision.draft else None
        planned = self.post.plan.traffic(self.extent.known, len(self.depths), self.extent.start, rounds)
        if self.depths and self.crossings != planned:
            raise BrokenInvariant(f"run {self.extent.run} sent {self.crossings}, its plan says {planned}")

    def record(self, names: Sequence[str]) -> RunRecord:
        """As it is kept."""
        extent, text = self.extent, self.decision.partition.text(names)
        decision, tokens = self.decision, len(self.depths)
        return RunRecord(
            extent.run, text, decision.wire, extent.start, extent.known, tokens, self.at_s, self.why, self.ended,
            decision.prefill_chunk, decision.draft, decision.prefill_wire or "",
        )  # fmt: skip


@dataclass(slots=True)
class Account:
    """Everything that a generation's record is made of."""

    names: Sequence[str]
    called: str
    runs: list[Run] = field(default_factory=list)
    fills: list[RunRecord] = field(default_factory=list)
    recomputed_tokens: int = 0
    peak_memory_bytes: dict[int, int] = field(default_factory=dict)
    start_s: float = field(default_factory=time.monotonic)
    """When the prompt was handed over."""
    start_unix_s: float = field(default_factory=time.time)
    """The same by the wall clock."""
    start_j: float | None = None
    """What the device had drawn by then."""
    open_s: float = 0.0
    predicted: Prediction | None = None
    is_degraded: bool = False

    @property
    def acceptance(self) -> float | None:
        """Of a drafted token, by what rounds made of the lengths that were decided; what was not proposed counts as
        wrong. None: no round was to be drafted."""
        drafted = [run for run in self.runs if run.decision.draft and run.rounds]
        lengths = [run.decision.draft for run in drafted for _ in run.rounds]
        made = sum(tokens for run in drafted for _, tokens in run.rounds)
        return acceptance_of(made, lengths) if lengths else None

    def record(
        self,
        journal: Journal,
        decision: Decision,
        made: int,
        text: str,
        emulated: Mapping[int, str],
        joules: tuple[float | None, str],
        setup: Setup | None = None,
    ) -> RequestRecord:
        """The record of a generation whose last `made` tokens this process saw."""
        since_s = time.monotonic() - self.start_s - journal.now_s  # from the journal's time to that of the record
        times = [at_s + since_s for at_s in journal.times_s[len(journal.times_s) - made :]]
        later = max(len(times) - 1, 1)
        counted = [run for run in self.runs if len(run.depths) > 1]
        trips = sum((run.depths[-1] - run.depths[0]) / 2 for run in counted)
        history = [run.record(self.names) for run in self.runs] + self.fills
        return RequestRecord(
            partition=decision.partition.text(self.names),
            wire=decision.wire,
            prompt_tokens=len(journal.entry.prompt),
            token_ids=tuple(journal.tokens),
            text=text,
            open_s=self.open_s,
            ttft_s=times[0] if times else 0.0,
            tpot_s=(times[-1] - times[0]) / later if times else 0.0,
            round_trips_per_token=trips / max(sum(len(run.depths) - 1 for run in counted), 1),
            crossings=_added(one for run in self.runs for one in run.crossings),
            frame_bytes=sum(
                run.post.frame_bytes + sum(halted.frame_bytes for halted, _ in run.halted.values()) for run in self.runs
            ),
            machines=self._machines(emulated),
            policy=self.called,
            predicted=self.predicted,
            token_times_s=tuple(times),
            runs=tuple(sorted(history, key=lambda one: one.run)),
            events=tuple(Event(one.at_s + since_s, one.kind, one.text) for one in journal.events),
            recomputed_tokens=self.recomputed_tokens,
            device_j=None if joules[0] is None or self.start_j is None else joules[0] - self.start_j,
            device_j_from=joules[1],
            is_degraded=self.is_degraded or bool(journal.failed) or any(run.ended for run in self.runs),
            setup=setup,
        )

    def _machines(self, emulated: Mapping[int, str]) -> tuple[MachineRecord, ...]:
        intervals: dict[int, list[Interval]] = {DEVICE: []}
        for run in self.runs:
            intervals[DEVICE] += run.walker.intervals
            for number in run.workers:
                intervals.setdefault(number, []).extend(run.halted[number][1] if number in run.halted else ())
        return tuple(
            MachineRecord(self.names[n], self.peak_memory_bytes.get(n, 0), tuple(times), emulated.get(n, ""))
            for n, times in sorted(intervals.items())
        )


def _added(crossed: Iterable[Crossings]) -> tuple[Crossings, ...]:
    """Crossings added up by stage, kind and link."""
    counts: Counter[tuple[int, Kind, int, int]] = Counter()
    sizes: Counter[tuple[int, Kind, int, int]] = Counter()
    for one in crossed:
        key = (one.after, one.kind, one.src, one.dst)
        counts[key] += one.count
        sizes[key] += one.payload_bytes
    return plans.crossings(counts, sizes)
