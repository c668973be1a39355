"""What simple rules would save in a course: tried in simulation, priced exactly, to be taught.

Knobs act through queues that take minutes to fill, so chance at single decisions says little of them. Here a rule holds
one value of one knob in one kind of moment for whole runs, on the same traces as neutral knobs. What it saves, less
what may be chance, is what this value is worth in such moments of this course; what of it holds for others is the
learner's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.learn.courses import Course
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Menu
from splitwise_llm.policies.features import features
from splitwise_llm.policies.guided import Guide
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Knobs, Mode
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.scenarios import TRAIN

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST = 0.002
"""Of the cost: what is told as helping, and held beside other rules."""
EVERY = 3
"""One in so many questions is kept."""
_WHERE = {name: n for n, (name, _) in enumerate(HEADS)}


class Moment(IntEnum):
    """When a question is asked: at admission or in flight, and whether the link is seen to be down."""

    FRESH = 0
    GOING = 1
    FRESH_DOWN = 2
    GOING_DOWN = 3


ALWAYS = tuple(Moment)


def moments(menu: Menu) -> Ints:
    """(systems,)"""
    down = menu.past.is_down if menu.past else np.zeros(len(menu.current), np.bool_)
    return (menu.current >= 0) + 2 * down.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Rule:
    """A knob that is held at a value in some moments."""

    head: int
    value: int
    when: tuple[Moment, ...] = ALWAYS

    def __str__(self) -> str:
        name, values = HEADS[self.head]
        held = f"mode {Mode(self.value).name.lower()}" if name == "mode" else f"{name} x {values[self.value]:g}"
        when = " or ".join(one.name.lower().replace("_", ", ") for one in self.when)
        return held if self.when == ALWAYS else f"{held} ({when})"


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What rules save in a course, and what is seen there, with neutral knobs and with all that help."""

    course: str
    rules: str
    """Those that save more than noise, for people."""
    worth: Floats
    """(moments, sum of SIZES): share of the cost that a value of a knob saves; 0: neutral; NaN: not tried."""
    seen: NDArray[np.float32]
    """(samples, TOTAL)"""
    when: Ints
    """(samples,): the moment of each."""


@dataclass(slots=True, eq=False)
class _Holding:
    """Rules that are kept to as far as masks allow; and, if there is an `every`, a sample of what they are shown."""

    guide: Guide
    rules: Sequence[Rule]
    every: int = 0
    in_flight: bool = True
    seen: list[NDArray[np.float32]] = field(default_factory=list)
    when: list[Ints] = field(default_factory=list)
    _asked: int = 0

    def choose(self, menu: Menu) -> Ints:
        priced = self.guide.price(menu)
        now, masks = moments(menu), self.guide.masks(priced)
        self._asked += 1
        if self.every and self._asked % self.every == 0:
            self.seen.append(features(priced))
            self.when.append(now)
        return self.guide.guide(priced, Knobs.of(_actions(self.rules, now, masks))).choice


def _actions(rules: Sequence[Rule], now: Ints, masks: Bools) -> Ints:
    """(systems, heads): what rules ask for, where it may be asked for."""
    actions = np.tile(np.array(NEUTRAL), (len(now), 1))
    for rule in rules:
        allowed = masks[:, sum(SIZES[: rule.head]) + rule.value]
        actions[np.isin(now, rule.when) & allowed, rule.head] = rule.value
    return actions


def cost(course: Course, traces: Traces, chooser: _Holding) -> Floats:
    """(traces,): mean cost of a request, in reference times."""
    records = simulate(course.params, traces, chooser)
    penalty, counted = course.params.penalty, records.counted()
    each = records.total_s / penalty.t_ref_s + penalty.w_energy * records.device_j / penalty.e_ref_j
    return np.array([np.nanmean(each[e][counted[e]]) for e in range(len(each))])


def lesson(course: Course, seed: int, worlds: int, requests: int, samples: int) -> Lesson:
    """Try every rule alone. Fewer worlds of many devices, as each holds more."""
    devices = course.params.num_devices
    per_device, worlds = max(requests // devices, 16), max(worlds // devices**0.5, 6)
    traces = draw(course.params, TRAIN.seed + seed, range(int(worlds)), per_device, TRAIN.spread)
    plain = _Holding(course.guide, (), EVERY)
    neutral = cost(course, traces, plain)
    worth = _untried()
    helps: dict[tuple[int, tuple[Moment, ...]], tuple[float, Rule]] = {}
    for rule in candidates(course):
        saved = neutral - cost(course, traces, _Holding(course.guide, [rule]))
        share = shrunk(saved) / neutral.mean()
        worth[np.ix_(rule.when, [sum(SIZES[: rule.head]) + rule.value])] = share
        if share > max(LEAST, helps.get((rule.head, rule.when), (0.0, rule))[0]):
            helps[rule.head, rule.when] = share, rule
    shown = [plain]
    if helps:
        shown.append(_Holding(course.guide, [rule for _, rule in helps.values()], EVERY))
        cost(course, traces, shown[1])
    seen, when = (np.concatenate([part for one in shown for part in getattr(one, name)]) for name in ("seen", "when"))
    rows = _rows(when, samples, np.random.Generator(np.random.Philox([seed, 17])))
    said = ", ".join(f"{rule} saves {100 * share:.1f} %" for share, rule in helps.values())
    return Lesson(course.name, said, worth, seen[rows], when[rows])


def shrunk(saved: Floats) -> float:
    """The mean of paired differences, less what chance may have put into it (the positive part of James and Stein's
    estimator): 0 where it is smaller than its standard error."""
    mean, error = float(saved.mean()), float(saved.std(ddof=1)) / len(saved) ** 0.5
    return mean * max(1 - (error / mean) ** 2, 0.0) if mean else 0.0


def _untried() -> Floats:
    worth = np.full((len(Moment), sum(SIZES)), np.nan)
    worth[:, np.cumsum([0, *SIZES[:-1]]) + np.array(NEUTRAL)] = 0.0
    return worth


def _rows(when: Ints, samples: int, dice: np.random.Generator) -> Ints:
    """Rows to keep: as many of each kind of moment as there are, so that the rare ones are not lost."""
    kinds = [dice.permutation(np.nonzero(when == moment)[0]) for moment in Moment]
    rows: list[Ints] = []
    left = samples
    for n, kind in enumerate(sorted(kinds, key=len)):
        rows.append(kind[: left // (len(kinds) - n)])
        left -= len(rows[-1])
    return np.concatenate(rows)


def candidates(course: Course) -> Iterator[Rule]:
    """What is tried: the outermost values of what can matter there (what half a step saves, a whole one mostly does,
    too), and ways of running while the link is down."""
    drafts = any(one.decision.draft for table in course.params.physics.tables for one in table.bills)
    crowd, turns = course.params.num_devices > 1, course.guide.limits.in_turn
    matters = {
        "device": not turns,  # whole requests queue there: its own queue has no weight
        "link": crowd,  # one device's own link never queued in any run that was tried
        "cloud": True,
        "budgets": course.params.budgets != Budgets(),
        "draft": drafts,
    }
    for head, (name, values) in enumerate(HEADS):
        if matters.get(name, False):
            yield from (Rule(head, value) for value in (0, len(values) - 1) if value != NEUTRAL[head])
    if any(not kind.is_up for kind in course.params.link.classes):
        yield Rule(_WHERE["mode"], Mode.WAIT, (Moment.FRESH_DOWN,))
        yield Rule(_WHERE["mode"], Mode.EDGE, (Moment.GOING_DOWN,))
        patience = _WHERE["patience"]
        yield from (Rule(patience, value, (Moment.GOING_DOWN,)) for value in (0, SIZES[patience] - 1))


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
            return Lesson(str(kept["course"]), str(kept["rules"]), kept["worth"], kept["seen"], kept["when"])
    one = lesson(_COURSES[number], *sizes)
    part = file.with_suffix(".part.npz")
    np.savez(part, course=one.course, rules=one.rules, worth=one.worth, seen=one.seen, when=one.when)
    part.replace(file)  # whole or not at all: a run may be stopped at any time
    return one


__all__ = ["Lesson", "Moment", "Rule", "candidates", "lesson", "lessons", "moments", "shrunk"]
