"""Which weights are kept: by what they save on courses set apart, which no gradient has seen, less what they certainly
lose in any one.

A network that was taught in some courses takes others for them. So what it learned is judged knob by knob: first the
outlook alone, then each knob that it turns beside it and alone; what helps is put together, the best first, as long as
it goes on helping. A knob that does not help where it was not learned is not left to the network; nor is one whose help
may be chance (`Judgement.surpasses`). Nothing is learned here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.learn.courses import Course, courses
from splitwise_llm.learn.forks import in_forks
from splitwise_llm.learn.search import SIGNIFICANT, costs
from splitwise_llm.policies.guided import Constant
from splitwise_llm.policies.knobs import HEADS, SIZES, START
from splitwise_llm.policies.mind import Mind
from splitwise_llm.policies.network import Network
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.scenarios import TRAIN

Floats = NDArray[np.float64]

SEED = TRAIN.seed + 500_000
"""Of the courses, and of the traces, that only choose among weights."""
HARM = 0.005
"""Share of a course's cost up to which what it loses is made up for by what others gain."""
DOUBT = 1.0
"""Standard errors by which what a course seems to lose must exceed that."""
SURE = SIGNIFICANT
"""Standard errors over the courses by which weights must save more than simpler ones to be preferred to them: as many
as a rule needs to be a lesson. With one, a single course of many decides wherever the others tell nothing."""
HELD = 100.0
"""Logits beyond what any other value comes to."""
KNOBS = tuple(name for name, _ in HEADS)
OUTLOOK = KNOBS[-1]
WHOLE = "all knobs"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a network saves on courses set apart."""

    each: tuple[float, ...]
    """Share of what drift plus penalty costs in each."""
    errors: tuple[float, ...]
    """Standard errors of these, over the traces."""
    turned: frozenset[str] = frozenset()
    """Knobs that were not neutral, once at least."""

    @classmethod
    def neutral(cls, courses: int) -> Judgement:
        """Of weights that turn nothing."""
        return cls((0.0,) * courses, (0.0,) * courses)

    @property
    def logs(self) -> Floats:
        """(courses,): log of drift's cost over theirs."""
        return 0.0 - np.log1p(-np.minimum(self.each, 0.99))

    @property
    def gain(self) -> float:
        """Mean of logs over the courses."""
        return float(self.logs.mean())

    @property
    def worth(self) -> float:
        """The gain less what any course loses beyond `HARM` and beyond doubt."""
        lost = -np.array(self.each) - DOUBT * np.array(self.errors) - HARM
        return self.gain - float(np.maximum(lost, 0.0).sum())

    def surpasses(self, simpler: Judgement) -> bool:
        """Whether it saves more than `simpler` weights, on the same courses, by more than may be chance: they stand for
        those that were not drawn. So one course of several never decides alone."""
        more = self.logs - simpler.logs
        error = more.std(ddof=1) / len(more) ** 0.5 if len(more) > 1 else 0.0
        return bool(more.mean() > SURE * error)

    def __str__(self) -> str:
        worst = int(np.argmin(self.each))
        return (
            f"saves {100 * self.gain:+.2f} % of drift's cost on courses set apart, at worst "
            f"{100 * self.each[worst]:+.2f} ± {100 * self.errors[worst]:.2f} % in one"
        )


class Validation:
    """Courses set apart, `more` that were given, and what drift plus penalty costs on them; so many `processes`
    simulate."""

    def __init__(
        self, count: int, worlds: int, requests: int, processes: int = 1, more: Sequence[Course] = ()
    ) -> None:  # fmt: skip
        self._processes = processes
        self._courses = [*courses(SEED, count, processes), *more]
        self._traces = [_drawn(one, SEED + number, worlds, requests) for number, one in enumerate(self._courses)]
        self._drift = [neutral for ((neutral, _),) in self._simulated([None])]

    def judge(self, *minds: Network) -> list[Judgement]:
        judged = []
        for found in zip(*self._simulated(minds), strict=True):
            saved = [(drift - mine) / drift.mean() for drift, (mine, _) in zip(self._drift, found, strict=True)]
            judged.append(
                Judgement(
                    tuple(float(one.mean()) for one in saved),
                    tuple(float(one.std(ddof=1)) / len(one) ** 0.5 for one in saved),
                    frozenset[str]().union(*(turned for _, turned in found)),
                )
            )
        return judged

    @property
    def names(self) -> list[str]:
        return [course.name for course in self._courses]

    def _simulated(self, minds: Sequence[Network | None]) -> list[list[tuple[Floats, set[str]]]]:
        """Of each course, and there of each mind, what a request costs in each trace, and the knobs that were turned;
        None: as drift has it."""

        def one(number: int) -> list[tuple[Floats, set[str]]]:
            course = self._courses[number]
            choosers = [Mind(course.guide, mind) if mind else Constant(course.guide) for mind in minds]
            found = costs(course, self._traces[number], choosers)
            return [(each, _turned(chooser)) for each, chooser in zip(found, choosers, strict=True)]

        return list(in_forks(one, len(self._courses), self._processes))


def _turned(chooser: Mind | Constant) -> set[str]:
    return {name.partition(" ")[0] for name in chooser.tally.turned} if isinstance(chooser, Mind) else set()


def _drawn(course: Course, seed: int, worlds: int, requests: int) -> Traces:
    """Fewer worlds of many devices, as each holds more."""
    devices = course.params.num_devices
    return draw(course.params, seed, range(int(max(worlds // devices**0.5, 4))), max(requests // devices, 16))


def candidates(
    mind: Network, validation: Validation, helps: Callable[[Judgement], bool]
) -> Iterator[tuple[str, Network, Judgement]]:
    """What could be kept, by name and judged: the network as it is, each knob that it turns, and those together that
    help beside the outlook alone, as `helps` has it, as long as the next goes on being worth more."""
    (whole,) = validation.judge(mind)
    yield WHOLE, mind, whole
    each = {name: freed(mind, {name}) for name in sorted(whole.turned | {OUTLOOK}, key=KNOBS.index)}
    single = dict(zip(each, validation.judge(*each.values()), strict=True))
    for name, one in each.items():
        yield f"{name} beside the outlook" if name != OUTLOOK else "the outlook where it says", one, single[name]
    helping = sorted((name for name in single if helps(single[name])), key=lambda n: -single[n].worth)
    together, worth = helping[:1], max((single[name].worth for name in helping), default=0.0)
    for name in helping[1:]:
        more = freed(mind, {*together, name})
        (found,) = validation.judge(more)
        yield ", ".join([*together, name]), more, found
        if found.worth > worth:
            together, worth = [*together, name], found.worth


def freed(mind: Network, knobs: Collection[str]) -> Network:
    """The network, all knobs but these held at `START`."""
    bias = mind.heads_bias.copy()
    first = np.cumsum([0, *SIZES[:-1]])
    for head, name in enumerate(KNOBS):
        if name not in knobs:
            bias[first[head] + START[head]] += np.float32(HELD)
    return replace(mind, heads_bias=bias)


__all__ = ["WHOLE", "Judgement", "Validation", "candidates", "freed"]
