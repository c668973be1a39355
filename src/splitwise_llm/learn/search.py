"""Which simple rules would have been best in a course: tried in simulation, priced exactly, to be imitated.

Knobs act through queues that take minutes to fill, so chance at single decisions says little of them. Here a rule holds
one value of one knob in one kind of moment for whole runs, on the same traces as neutral knobs. What saves more than
noise (the mean of the paired differences is `SIGNIFICANT` standard errors and `LEAST` of the cost) is put together, the
best first, as long as it goes on saving.

Many worlds, and short traces, and rules side by side: what a simulation takes is its steps, and 64 worlds take hardly
longer than 8. The outlook comes first, and the other way round: an expectation and no bias, it is left on unless it
loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.learn.courses import Course
from splitwise_llm.learn.forks import in_forks
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Chooser, Menu
from splitwise_llm.policies.features import features
from splitwise_llm.policies.guided import Guide
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Knobs, Mode
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import simulate_each
from splitwise_llm.sim.scenarios import TRAIN

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SIGNIFICANT, LEAST = 2.0, 0.002
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
        held = name if name == "outlook" else held
        when = " or ".join(one.name.lower().replace("_", ", ") for one in self.when)
        return held if self.when == ALWAYS else f"{held} ({when})"


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A course's best rules, and what is seen under them and under none, with the actions they then ask for."""

    course: str
    rules: str
    """For people; empty where none saves anything."""
    saved: float
    """Share of the cost of neutral knobs."""
    seen: NDArray[np.float32]
    """(samples, TOTAL)"""
    actions: Ints
    """(samples, heads)"""
    low: NDArray[np.float32]
    """(TOTAL,): the smallest and the largest of all that was seen, samples or not."""
    high: NDArray[np.float32]


@dataclass(slots=True, eq=False)
class _Holding:
    """Rules that are kept to as far as masks allow; and a sample of what they are shown, with what `taught` asks for
    there."""

    guide: Guide
    rules: Sequence[Rule]
    taught: Sequence[Rule] | None = None
    in_flight: bool = True
    seen: list[NDArray[np.float32]] = field(default_factory=list)
    actions: list[Ints] = field(default_factory=list)
    when: list[Ints] = field(default_factory=list)
    _asked: int = 0

    def choose(self, menu: Menu) -> Ints:
        priced = self.guide.price(menu)
        now, masks = moments(menu), self.guide.masks(priced)
        self._asked += 1
        if self.taught is not None and self._asked % EVERY == 0:
            self.seen.append(features(priced))
            self.actions.append(_actions(self.taught, now, masks))
            self.when.append(now)
        return self.guide.guide(priced, Knobs.of(_actions(self.rules, now, masks))).choice


def _actions(rules: Sequence[Rule], now: Ints, masks: Bools) -> Ints:
    """(systems, heads): what rules ask for, where it may be asked for."""
    actions = np.tile(np.array(NEUTRAL), (len(now), 1))
    for rule in rules:
        allowed = masks[:, sum(SIZES[: rule.head]) + rule.value]
        actions[np.isin(now, rule.when) & allowed, rule.head] = rule.value
    return actions


def costs(course: Course, traces: Traces, choosers: Sequence[Chooser]) -> list[Floats]:
    """(traces,) of each chooser: mean cost of a request, in reference times."""
    penalty, found = course.params.penalty, list[Floats]()
    for records in simulate_each(course.params, traces, choosers):
        counted = records.counted()
        each = records.total_s / penalty.t_ref_s + penalty.w_energy * records.device_j / penalty.e_ref_j
        found.append(np.array([np.nanmean(each[e][counted[e]]) for e in range(len(each))]))
    return found


def lesson(course: Course, seed: int, worlds: int, requests: int, samples: int) -> Lesson:
    """Try every rule alone, then what helped together. Fewer worlds of many devices, as each holds more."""
    devices = course.params.num_devices
    per_device, worlds = max(requests // devices, 16), max(worlds // devices**0.5, 6)
    traces = draw(course.params, TRAIN.seed + seed, range(int(worlds)), per_device, TRAIN.spread)

    def saved(rules: Sequence[Rule], *others: Sequence[Rule]) -> list[Floats]:
        holding = [_Holding(course.guide, each) for each in (rules, *others)]
        return [neutral - one for one in costs(course, traces, holding)]

    (neutral,) = costs(course, traces, [_Holding(course.guide, ())])
    best, gain = list[Rule](), np.zeros(len(neutral))
    for rule in outlooks(course):
        if _loses_nothing((one := saved([*best, rule])[0]) - gain, neutral):
            best, gain = [*best, rule], one
    tried = list(candidates(course))
    alone = [one - gain for one in saved(*([*best, rule] for rule in tried))] if tried else []
    helps = [(rule, one) for rule, one in zip(tried, alone, strict=True) if _counts(one, neutral)]
    start = len(best)
    for rule, by_itself in sorted(helps, key=lambda each: -each[1].mean()):
        if any(rule.head == other.head and set(rule.when) & set(other.when) for other in best):
            continue
        one = saved([*best, rule])[0] - gain if len(best) > start else by_itself
        if _counts(one, neutral):
            best, gain = [*best, rule], gain + one
    shown = [_Holding(course.guide, rules, best) for rules in ([(), best] if best else [()])]
    costs(course, traces, shown)
    seen, actions, when = (
        np.concatenate([part for each in shown for part in getattr(each, name)]) for name in ("seen", "actions", "when")
    )
    dice = np.random.Generator(np.random.Philox([seed, 17]))
    rows = _rows(when, samples, dice)
    rules = ", ".join(map(str, best))
    found = float(gain.mean() / neutral.mean())
    return Lesson(course.name, rules, found, seen[rows], actions[rows], seen.min(axis=0), seen.max(axis=0))


def _rows(when: Ints, samples: int, dice: np.random.Generator) -> Ints:
    """Rows to keep: as many of each kind of moment as there are, so that the rare ones are not lost."""
    kinds = [dice.permutation(np.nonzero(when == moment)[0]) for moment in Moment]
    rows: list[Ints] = []
    left = samples
    for n, kind in enumerate(sorted(kinds, key=len)):
        rows.append(kind[: left // (len(kinds) - n)])
        left -= len(rows[-1])
    return np.concatenate(rows)


def outlooks(course: Course) -> Iterator[Rule]:
    """What is left on unless it loses."""
    if any(not kind.is_up for kind in course.params.link.classes):
        yield from (Rule(_WHERE["outlook"], 1, (moment,)) for moment in (Moment.GOING_DOWN, Moment.FRESH_DOWN))


def candidates(course: Course) -> Iterator[Rule]:
    """What is tried: the outermost values of what can matter there (what half a step saves, a whole one mostly does,
    too)."""
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


def _counts(saved: Floats, neutral: Floats) -> bool:
    error = saved.std(ddof=1) / np.sqrt(len(saved))
    return bool(saved.mean() > SIGNIFICANT * error and saved.mean() > LEAST * neutral.mean())


def _loses_nothing(saved: Floats, neutral: Floats) -> bool:
    error = saved.std(ddof=1) / np.sqrt(len(saved))
    return bool(saved.mean() >= -min(error, LEAST * neutral.mean()))


def lessons(
    courses: Sequence[Course], seed: int, worlds: int, requests: int, samples: int, processes: int,
    told: Callable[[Lesson], None], folder: Path,
) -> list[Lesson]:  # fmt: skip
    """One of each course, in their order, whoever computes them; each is kept in `folder` and not sought again."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(number: int) -> Lesson:
        file = folder / f"{number}.npz"
        if file.exists():
            with np.load(file) as kept:
                if str(kept["course"]) == courses[number].name:  # another version draws others
                    return Lesson(
                        str(kept["course"]), str(kept["rules"]), float(kept["saved"]), kept["seen"], kept["actions"],
                        kept["low"], kept["high"],
                    )  # fmt: skip
        found = lesson(courses[number], seed + number, worlds, requests, samples)
        part = file.with_suffix(".part.npz")
        np.savez(part, **{item.name: getattr(found, item.name) for item in fields(found)})
        part.replace(file)  # whole or not at all: a run may be stopped at any time
        return found

    found = []
    for each in in_forks(one, len(courses), processes):
        told(each)
        found.append(each)
    return found


__all__ = ["Lesson", "Moment", "Rule", "candidates", "costs", "lesson", "lessons", "moments", "outlooks"]
