"""Courses of live sessions, played again under one decision maker and another, beside what was measured live.

What a course is, `sim.replay` knows; who decides, `policies`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from splitwise_llm.bench.cells import load_states
from splitwise_llm.cost import Job, Table, World
from splitwise_llm.decision import Decision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.choosers import find_chooser, planned
from splitwise_llm.policies.menus import MAX_PLANS, menu
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.planners import Planner, typical
from splitwise_llm.sim.episode import Records, simulate
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.replay import Course, Live, play_as_decided
from splitwise_llm.sim.scenarios import build

LIVE, AS_DECIDED = "live", "as decided"
FIGURES = ("ttft_s", "tpot_s", "total_s", "device_j")
MOST_TAKEN = MAX_PLANS // 2
"""Decisions of the records that a table holds for certain."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request under one decision maker; None where there is no such figure (of energy: nobody knows)."""

    ttft_s: float | None
    tpot_s: float | None
    total_s: float | None
    device_j: float | None
    plan: str
    """Where it began."""
    moves: int

    def to_dict(self) -> dict[str, object]:
        figures = {name: getattr(self, name) for name in FIGURES}
        return figures | {"plan": self.plan, "moves": self.moves}


@dataclass(eq=False)
class Replay:
    """A course made ready: tables that hold what was decided, and what `policies` would."""

    course: Course
    policies: Sequence[str] = ()

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """One per prompt length. Raises RequestError where nothing is admissible."""
        return tuple(self._table(world, job) for world, job in self.course.worlds)

    def _table(self, world: World, job: Job) -> Table:
        course = self.course
        limits, tools = course.scenario.limits, course.tools
        extra: dict[Decision, None] = dict.fromkeys(course.decisions[:MOST_TAKEN])
        for name in self.policies:
            policy = find_policy(name)
            if not isinstance(policy, (Planner, Splitwise)):
                extra[planned(policy, world, job, tools, limits)] = None
        penalty, weights = typical(world, job, tools, limits, course.case.per_s)
        objectives: list[Objective] = [Latency(), DriftPlusPenalty(penalty, weights)]
        return menu(world, job, (tools,), limits, load_states(world, course.scenario, course.case), objectives, extra)

    @cached_property
    def params(self) -> Params:
        """The system of the course; requests expect as many tokens as were allowed, and nobody's answer is cut."""
        last_s = self.course.requests[-1].began_s
        made = build(self.course.scenario, self.course.case, self.tables, self.course.recordings)
        return replace(made, horizon_s=max(made.horizon_s, 2 * last_s))

    def records(self, policy: str) -> Records:
        """What became of the course: under a policy by its name, or `AS_DECIDED`. Raises RequestError where a policy
        has no plan."""
        if policy == AS_DECIDED:
            return play_as_decided(self.params, self.course)
        scenario, case = self.course.scenario, self.course.case
        chooser = find_chooser(policy, self.course.tools, scenario.limits, arrivals_per_s=case.per_s)
        return simulate(self.params, self.course.traces(self.params), chooser)

    def answered(self, policy: str) -> list[Answered]:
        """The same by request, in their order; or how they ran `LIVE`."""
        if policy == LIVE:
            return [_lived(one, self.names) for one in self.course.requests]
        records = self.records(policy)
        bills = [bill for table in self.tables for bill in table.bills]  # by row
        rows = records.first_plan[0, 0].tolist()
        plans = [bills[row].decision.partition.text(self.names) for row in rows]
        figures = {name: getattr(records, name)[0, 0].tolist() for name in FIGURES}
        if not self.course.worlds[0][0].hosts[DEVICE].device.decode_w:  # nobody has said what the device takes
            figures["device_j"] = [math.nan] * len(rows)
        return [
            Answered(**{name: _figure(values[n]) for name, values in figures.items()}, plan=plan, moves=moves)
            for n, (plan, moves) in enumerate(zip(plans, records.moves[0, 0].tolist(), strict=True))
        ]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(host.device.name for host in self.course.worlds[0][0].hosts)


def _lived(one: Live, names: Sequence[str]) -> Answered:
    plans = [decision.partition.text(names) for _, decision in one.decisions]
    moves = sum(before != after for before, after in pairwise(plans))
    return Answered(one.ttft_s, one.tpot_s, one.total_s, one.device_j, plans[0], moves)


def _figure(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Row:
    """Means over the requests of a decision maker; NaN where there is no such figure."""

    name: str
    requests: int
    ttft_s: float
    tpot_s: float
    total_s: float
    p95_s: float
    device_j: float
    moves: int

    @classmethod
    def of(cls, name: str, answers: Sequence[Answered]) -> Row:
        values = {figure: _known(getattr(one, figure) for one in answers) for figure in FIGURES}
        means = {figure: float(np.mean(known)) if len(known) else np.nan for figure, known in values.items()}
        p95 = float(np.percentile(values["total_s"], 95)) if len(values["total_s"]) else np.nan
        return cls(name, len(answers), **means, p95_s=p95, moves=sum(one.moves for one in answers))


def _known(values: Iterator[float | None]) -> list[float]:
    return [value for value in values if value is not None]


@dataclass(frozen=True, slots=True)
class Compared:
    """All requests of all courses under each decision maker."""

    courses: tuple[Course, ...]
    answers: dict[str, list[Answered]]
    """By name, in the order of courses and requests: `LIVE`, `AS_DECIDED`, policies."""
    unplanned: dict[str, str]
    """Policies that could not be played, and why."""

    @property
    def rows(self) -> list[Row]:
        return [Row.of(name, answers) for name, answers in self.answers.items()]

    def lines(self) -> Iterator[dict[str, object]]:
        """One plain mapping per request."""
        requests = [(course.name, one) for course in self.courses for one in course.requests]
        for number, (course, one) in enumerate(requests):
            yield {
                "course": course, "record": one.where, "began_s": one.began_s, "prompt_tokens": one.prompt_tokens,
                "output_tokens": one.output_tokens, "policy": one.policy,
                **{name: answers[number].to_dict() for name, answers in self.answers.items()},
            }  # fmt: skip


def compare(courses: Sequence[Course], policy: str = "") -> Compared:
    """Play courses as they were decided, under the policies that decided them, and under `policy`.

    Raises RequestError for a `policy` that is unknown or has no plan, ModelError for one whose weights are none; a
    recorded one is then left out.
    """
    if policy:
        find_policy(policy)
    recorded = dict.fromkeys(one.policy for course in courses for one in course.requests if one.policy)
    names = list(dict.fromkeys([*recorded, *([policy] if policy else [])]))
    unplanned: dict[str, str] = {}
    for name in names:
        try:
            for course in courses:
                world, job = course.worlds[0]
                if not isinstance(found := find_policy(name), (Planner, Splitwise)):
                    planned(found, world, job, course.tools, course.scenario.limits)
        except (RequestError, ModelError) as error:
            if name == policy:
                raise
            unplanned[name] = str(error)
    playable = [name for name in names if name not in unplanned]
    answers: dict[str, list[Answered]] = {name: [] for name in (LIVE, AS_DECIDED, *playable)}
    for course in courses:
        replay = Replay(course, playable)
        for name in answers:
            answers[name] += replay.answered(name)
    return Compared(tuple(courses), answers, unplanned)


__all__ = ["AS_DECIDED", "LIVE", "Answered", "Compared", "Replay", "Row", "compare"]
