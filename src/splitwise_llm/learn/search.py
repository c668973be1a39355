"""Which constant knobs would have been best in a course: tried in simulation, priced exactly, to be imitated.

Knobs act through queues that take minutes to fill, so chance at single decisions says little of them. Here each value
of each knob is held for whole runs, on the same traces as neutral knobs, and kept if it saves more than noise: the mean
of the paired differences is `SIGNIFICANT` standard errors and `LEAST` of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.learn.courses import Course
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Menu
from splitwise_llm.policies.features import features
from splitwise_llm.policies.guided import Guide
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, Knobs
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.scenarios import TRAIN

Floats = NDArray[np.float64]
Action = tuple[int, ...]

SIGNIFICANT, LEAST = 2.0, 0.002


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A course's best constants, and what was seen with them and with neutral ones."""

    course: str
    action: Action
    saved: float
    """Share of the cost of neutral knobs."""
    seen: NDArray[np.float32]
    """(samples, TOTAL)"""


@dataclass(slots=True, eq=False)
class _Holding:
    """Constant knobs, and a sample of what they are shown."""

    guide: Guide
    action: Action
    every: int = 0
    in_flight: bool = True
    seen: list[NDArray[np.float32]] | None = None
    _asked: int = 0

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        priced = self.guide.price(menu)
        if self.seen is not None:
            self._asked += 1
            if self._asked % self.every == 0:
                self.seen.append(features(priced))
        return self.guide.guide(priced, Knobs.of(np.tile(np.array(self.action), (len(menu.current), 1)))).choice


def cost(course: Course, traces: Traces, chooser: _Holding) -> Floats:
    """(traces,): mean cost of a request, in reference times."""
    records = simulate(course.params, traces, chooser)
    penalty, counted = course.params.penalty, records.counted()
    each = records.total_s / penalty.t_ref_s + penalty.w_energy * records.device_j / penalty.e_ref_j
    return np.array([np.nanmean(each[e][counted[e]]) for e in range(len(each))])


def lesson(course: Course, seed: int, worlds: int, requests: int, samples: int) -> Lesson:
    """Try values of every knob alone, then what helped together. Fewer worlds of many devices, as each holds more."""
    devices = course.params.num_devices
    per_device, worlds = max(requests // devices, 16), max(worlds // devices**0.5, 6)
    traces = draw(course.params, TRAIN.seed + seed, range(int(worlds)), per_device, TRAIN.spread)

    def saved(action: Action) -> Floats:
        return neutral - cost(course, traces, _Holding(course.guide, action))

    first = _Holding(course.guide, NEUTRAL, 3, seen=[])
    neutral = cost(course, traces, first)
    best, gain = NEUTRAL, np.zeros(len(neutral))
    together: dict[int, tuple[float, int]] = {}
    for head in _heads(course):
        for value in _values(head):
            action = (*NEUTRAL[:head], value, *NEUTRAL[head + 1 :])
            one = saved(action)
            if _counts(one, neutral) and one.mean() > together.get(head, (0.0, 0))[0]:
                together[head] = float(one.mean()), value
                if one.mean() > gain.mean():
                    best, gain = action, one
    if len(together) > 1:
        action = tuple(together[head][1] if head in together else value for head, value in enumerate(NEUTRAL))
        one = saved(action)
        if one.mean() > gain.mean():
            best, gain = action, one
    again = _Holding(course.guide, best, 3, seen=[])
    if best != NEUTRAL:
        cost(course, traces, again)
    rows = np.concatenate([*(first.seen or []), *(again.seen or [])])
    dice = np.random.Generator(np.random.Philox([seed, 17]))
    rows = rows[dice.permutation(len(rows))[:samples]]
    return Lesson(course.name, best, float(gain.mean() / neutral.mean()), rows)


def _heads(course: Course) -> Iterator[int]:
    """Knobs that can matter here for a whole run; modes are for moments."""
    drafts = any(one.decision.draft for table in course.params.physics.tables for one in table.bills)
    outages = any(not kind.is_up for kind in course.params.link.classes)
    for head, (name, _) in enumerate(HEADS):
        matters = {"mode": False, "budgets": course.params.budgets != Budgets(), "draft": drafts, "patience": outages}
        matters["link"] = course.params.num_devices > 1  # one device's own link never queued in any run that was tried
        if matters.get(name, True):
            yield head


def _values(head: int) -> list[int]:
    """The outermost: what half a step saves, a whole one mostly does, too."""
    last = len(HEADS[head][1]) - 1
    return [value for value in (0, last) if value != NEUTRAL[head]]


def _counts(saved: Floats, neutral: Floats) -> bool:
    error = saved.std(ddof=1) / np.sqrt(len(saved))
    return bool(saved.mean() > SIGNIFICANT * error and saved.mean() > LEAST * neutral.mean())


def lessons(
    courses: Sequence[Course], seed: int, worlds: int, requests: int, samples: int, processes: int,
    told: Callable[[Lesson], None], folder: Path,
) -> list[Lesson]:  # fmt: skip
    """One of each course, in their order, whoever computes them; each is kept in `folder` and not sought again."""
    global _COURSES  # noqa: PLW0603 - what forked processes inherit; tables do not travel
    _COURSES = courses
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(folder / f"{n}.npz", n, (seed + n, worlds, requests, samples)) for n in range(len(courses))]
    found = []
    with ProcessPoolExecutor(processes, get_context("fork")) if processes > 1 else nullcontext() as pool:
        for one in pool.map(_lesson, tasks) if pool else map(_lesson, tasks):
            told(one)
            found.append(one)
    return found


_COURSES: Sequence[Course] = ()


def _lesson(task: tuple[Path, int, tuple[int, int, int, int]]) -> Lesson:
    file, number, sizes = task
    if file.exists():
        with np.load(file) as kept:
            action = tuple(kept["action"].tolist())
            return Lesson(str(kept["course"]), action, float(kept["saved"]), kept["seen"])
    one = lesson(_COURSES[number], *sizes)
    part = file.with_suffix(".part.npz")
    np.savez(part, course=one.course, action=one.action, saved=one.saved, seen=one.seen)
    part.replace(file)  # whole or not at all: a run may be stopped at any time
    return one


__all__ = ["Lesson", "lesson", "lessons"]
