"""Constants by a plain optimiser: what the learned high level is measured against, with a budget of the same kind.

CMA-ES over the logarithms of `Constants`, one vector for all problems. A generation is judged by a few problems, drawn
anew, on traces drawn anew; all of its candidates meet the same ones. The loss of a candidate is the mean over these
problems of log(its mean latency / that of neutral constants on the same traces), and a little for each doubling, so
that what gains nothing stays neutral. It does not know where problems come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import cma
import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Limits
from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Tools
from splitwise_llm.policies.guided import Constant, Guide
from splitwise_llm.policies.knobs import Constants
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Records, simulate
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.scenarios import TRAIN

Floats = NDArray[np.float64]
Tell = Callable[[str], None]
Judged = tuple[list[float], int]
"""Losses of a generation, and the decisions they took."""

NAMES = tuple(item.name for item in fields(Constants))
LEAST, MOST = 1 / 8, 8.0
PER_DOUBLING = 1e-4
"""What a constant's distance from 1 adds to the loss, times its squared binary logarithm."""
CHECKED_FROM = 1_000_000
"""Traces from this number on are for checking the outcome, and are never tuned on."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A system whose requests are to be fast; it is made when it is first asked for, which takes seconds."""

    name: str
    make: Callable[[], Params]
    tools: Tools
    limits: Limits
    budgets: Budgets = field(default_factory=Budgets)

    @cached_property
    def params(self) -> Params:
        return self.make()

    @cached_property
    def guide(self) -> Guide:
        return Guide(self.tools, self.limits, self.budgets, arrivals_per_s=self.params.arrivals.per_s)

    def traces(self, first: int, count: int, requests: int) -> Traces:
        return draw(self.params, TRAIN.seed, tuple(range(first, first + count)), requests, TRAIN.spread)

    def run(self, traces: Traces, constants: Constants) -> Records:
        guide = replace(self.guide, _odds={})  # tables at odds of one candidate are of no use to the next
        return simulate(self.params, traces, Constant(guide, constants))


@dataclass(frozen=True, slots=True)
class Settings:
    """What a course of tuning depends on; `decisions` may grow from one run to the next."""

    seed: int = 0
    decisions: int = 1_000_000
    """The budget: simulated decisions, those of neutral constants included."""
    problems: int = 8
    """Per generation."""
    traces: int = 2
    requests: int = 20
    candidates: int = 9
    sigma: float = 0.5
    """Of the first generation, in natural logarithms."""

    def __post_init__(self) -> None:
        if min(self.decisions, self.problems, self.traces, self.requests) < 1 or self.candidates < 4 or self.sigma <= 0:
            raise SpecError(f"a budget, problems, traces, requests, 4 candidates and a step above 0; got {self}")

    @property
    def course(self) -> dict[str, object]:
        """All but the budget: what has to be the same to go on with what is kept."""
        return {name: value for name, value in asdict(self).items() if name != "decisions"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where tuning came to."""

    constants: Constants
    decisions: int
    generations: int
    loss: tuple[float, ...]
    """Of the mean candidate of each generation."""


def free(problems: Sequence[Problem]) -> tuple[str, ...]:
    """Which constants change anything: that of budgets only where there are some."""
    spend = any(problem.budgets != Budgets() for problem in problems)
    return tuple(name for name in NAMES if spend or name != "budgets")


def least_of(name: str) -> float:
    return 1.0 if name == "budgets" else LEAST


def constants_of(names: Sequence[str], logs: Floats) -> Constants:
    """All others are 1. Raises nothing: what rounding puts outside of the bounds is put back."""
    values = {name: float(np.clip(np.exp(log), least_of(name), MOST)) for name, log in zip(names, logs, strict=True)}
    return Constants(**values)


def log_ratio(problem: Problem, traces: Traces, constants: Constants, base_s: float) -> tuple[float, int]:
    """log(mean latency / base), and the decisions it took. Requests that were not finished count as `t_max_s`."""
    records = problem.run(traces, constants)
    return float(np.log(np.nanmean(records.total_s) / base_s)), records.decisions


def tune(
    problems: Sequence[Problem], settings: Settings, tell: Tell, keep: Path | None = None,
    loss: Callable[[int, Sequence[Constants]], Judged] | None = None,
) -> Outcome:  # fmt: skip
    """Generations until the budget is spent. `keep`: a file of what every generation was judged; what is there is not
    simulated again. `loss` (generation, candidates -> losses, decisions) replaces simulation. Raises SpecError where
    `keep` is of another course."""
    judge = loss or (lambda generation, candidates: _judge(problems, settings, generation, candidates))
    names, of_problems = free(problems), [problem.name for problem in problems]
    kept = _read(keep, settings, of_problems)
    bounds = [[float(np.log(least_of(name))) for name in names], [float(np.log(MOST))] * len(names)]
    dice = np.random.Generator(np.random.Philox(key=[settings.seed, 17]))
    search = cma.CMAEvolutionStrategy(
        np.zeros(len(names)), settings.sigma,
        {
            "bounds": bounds, "popsize": settings.candidates,
            "randn": lambda *shape: dice.standard_normal(shape), "seed": np.nan, "verbose": -9, "tolfun": 0,
        },
    )  # fmt: skip
    spent, done, losses = 0, 0, list[float]()
    while spent < settings.decisions:
        points = search.ask()
        candidates = [constants_of(names, np.asarray(point)) for point in points]
        if done == len(kept):
            kept.append(judge(done, candidates))
            _write(keep, settings, of_problems, kept)
        values, decisions = kept[done]
        search.tell(points, values)
        spent, done = spent + decisions, done + 1
        losses.append(float(np.mean(values)))
        found = constants_of(names, np.asarray(search.result.xfavorite))
        if done == len(kept):
            tell(f"generation {done}, {spent} of {settings.decisions} decisions: loss {losses[-1]:+.4f}; {told(found)}")
    return Outcome(constants_of(names, np.asarray(search.result.xfavorite)), spent, done, tuple(losses))


def told(constants: Constants) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in zip(NAMES, astuple(constants), strict=True))


def _judge(problems: Sequence[Problem], settings: Settings, generation: int, candidates: Sequence[Constants]) -> Judged:
    dice = np.random.Generator(np.random.Philox(key=[settings.seed, 18 + generation]))
    chosen = dice.permutation(len(problems))[: settings.problems]
    ratios, decisions = np.zeros((len(candidates), len(chosen))), 0
    for column, number in enumerate(chosen.tolist()):
        problem = problems[number]
        traces = problem.traces(generation * settings.traces, settings.traces, settings.requests)
        base = problem.run(traces, Constants())
        decisions += base.decisions
        for row, candidate in enumerate(candidates):
            ratios[row, column], took = log_ratio(problem, traces, candidate, float(np.nanmean(base.total_s)))
            decisions += took
    far = np.array([np.square(np.log2(astuple(candidate))).sum() for candidate in candidates])
    return (ratios.mean(axis=1) + PER_DOUBLING * far).tolist(), decisions


def checked(problems: Sequence[Problem], constants: Constants, traces: int, requests: int, tell: Tell) -> list[float]:
    """Of each problem, mean latency over that of neutral constants, on traces that nothing was tuned on."""
    ratios = []
    for problem in problems:
        drawn = problem.traces(CHECKED_FROM, traces, requests)
        base_s = float(np.nanmean(problem.run(drawn, Constants()).total_s))
        ratios.append(float(np.exp(log_ratio(problem, drawn, constants, base_s)[0])))
        tell(f"{problem.name}: {100 * (ratios[-1] - 1):+.2f} % of neutral's mean")
    return ratios


def accepted(outcome: Outcome, ratios: Sequence[float]) -> Outcome:
    """The same, or with neutral constants where what was found is, by the geometric mean of the check, no better: a
    short search mostly finds what its own traces had by chance."""
    if ratios and float(np.exp(np.mean(np.log(ratios)))) >= 1.0:
        return replace(outcome, constants=Constants())
    return outcome


def write_constants(file: Path, settings: Settings, outcome: Outcome, found: Outcome, ratios: dict[str, float]) -> None:
    """The vector, and how it came about: `found` is what the search ended with, `ratios` what that was checked to be
    over neutral."""
    data = {
        "constants": asdict(outcome.constants),
        "made_with": asdict(settings) | {"spent": found.decisions, "generations": found.generations},
        "found": {name: round(value, 5) for name, value in asdict(found.constants).items()},
        "found_over_neutral": {name: round(ratio, 5) for name, ratio in ratios.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(file)


def _read(keep: Path | None, settings: Settings, names: list[str]) -> list[Judged]:
    if keep is None or not keep.exists():
        return []
    try:
        data = json.loads(keep.read_text())
        course = data["course"]
        generations = [([float(x) for x in values], int(decisions)) for values, decisions in data["generations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{keep} is no course of tuning ({error}); move it away, or give another file") from error
    if course != settings.course | {"names": names}:
        raise SpecError(
            f"{keep} is of another course ({course}), this one is {settings.course} with {len(names)} problems: give "
            "another file, or the settings it was begun with"
        )
    return generations


def _write(keep: Path | None, settings: Settings, names: list[str], kept: list[Judged]) -> None:
    if keep is None:
        return
    keep.parent.mkdir(parents=True, exist_ok=True)
    part = keep.with_suffix(".part")
    part.write_text(json.dumps({"course": settings.course | {"names": names}, "generations": kept}))
    part.replace(keep)


__all__ = [
    "NAMES",
    "Outcome",
    "Problem",
    "Settings",
    "checked",
    "constants_of",
    "free",
    "told",
    "tune",
    "write_constants",
]
