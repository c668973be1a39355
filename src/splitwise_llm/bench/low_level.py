"""The learned low level beside the exact search: what its plans are worth, and how long either takes.

States are random and never seen in training. Three yardsticks: the exact search as it is used (for three or more
machines and a large model it says of itself that it is not exact), the best of all plans of at most three runs of
layers, and the best that anyone here has found. In the network's
place stand an untrained one and a rule without one, all else the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.bench.figures import Figures
from splitwise_llm.errors import RequestError
from splitwise_llm.learn.few_runs import best_of_few_runs, is_quick
from splitwise_llm.learn.low_level import TEST_SEEDS, lesson_of
from splitwise_llm.learn.states import DEFAULT, Spread, State, random_state
from splitwise_llm.policies.low_level import Count, Exact, Learned, LowLevel, Proposal, shipped
from splitwise_llm.policies.proposer import Proposer, Weights
from splitwise_llm.policies.solver import Solver

Tell = Callable[[str], None]
Floats = NDArray[np.float64]
BAR = 0.02


@dataclass(slots=True)
class _Tally:
    """Of states with one number of machines: values, and seconds."""

    learned: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    few: list[float] = field(default_factory=list)
    untrained: list[float] = field(default_factory=list)
    rule: list[float] = field(default_factory=list)
    learned_s: list[float] = field(default_factory=list)
    build_s: list[float] = field(default_factory=list)
    solve_s: list[float] = field(default_factory=list)
    few_s: list[float] = field(default_factory=list)
    exact_failed: int = 0
    nothing: int = 0


def run_low_level(
    states: int, tell: Tell, machines: Sequence[int], weights: Path | None = None, spread: Spread = DEFAULT
) -> Figures:
    """`states` per number of machines; the shipped weights unless those of a file are asked for. The exact search takes
    up to seconds a state with three machines. Raises SpecError for a file that holds none."""
    learned = Learned(Proposer(Weights.load(weights)) if weights else shipped())
    settings: dict[str, object] = {
        "states": states, "weights": str(weights or "shipped"), "seeds_from": TEST_SEEDS, "width": learned.width,
        "bar": BAR,
    }  # fmt: skip
    figures = Figures("low-level", settings)
    for number in machines:
        tally = _Tally()
        before = replace(learned.count)
        for n in range(states):
            state = random_state(TEST_SEEDS + 10_000 * number + n, replace(spread, machines=(number,)))
            _ask(state, learned, tally, first=n % 2)
            if (n + 1) % 10 == 0:
                tell(f"{number} machines: {n + 1} of {states} states")
        if not tally.learned:
            raise RequestError(f"nothing is admissible in any of {states} states with {number} machines; ask more")
        fell_back = (learned.count.fell_back - before.fell_back) / (learned.count.asked - before.asked)
        _report(figures, f"machines_{number}", tally, fell_back)
    return figures


def _ask(state: State, learned: Learned, tally: _Tally, first: int) -> None:
    """Both levels, in turns first, then the yardsticks."""
    question = (state.world, state.job, state.tools, state.limits)
    values: dict[str, float] = {}

    def ask_learned() -> None:
        begin = time.perf_counter()
        values["learned"] = _value(learned, state)
        tally.learned_s.append(time.perf_counter() - begin)

    def ask_exact() -> None:
        begin = time.perf_counter()
        solver = Solver(*question)
        built = time.perf_counter()
        try:
            values["exact"] = solver.solve(state.conditions, state.objective).best.value
        except RequestError:
            values["exact"] = np.inf
        tally.build_s.append(built - begin)
        tally.solve_s.append(time.perf_counter() - built)

    for ask in (ask_learned, ask_exact) if first else (ask_exact, ask_learned):
        ask()
    lesson = lesson_of(state)
    sheet = lesson.sheet
    few = np.nan
    if is_quick(sheet):
        begin = time.perf_counter()
        few = best_of_few_runs(lesson_of(state).sheet)[0]
        tally.few_s.append(time.perf_counter() - begin)
    if not np.isfinite(values["learned"]) and not np.isfinite(values["exact"]):
        tally.nothing += 1
        return
    tally.exact_failed += not np.isfinite(values["exact"])
    tally.learned.append(values["learned"])
    tally.exact.append(values["exact"])
    tally.few.append(few)
    for others, weights in ((tally.untrained, Weights.random(1)), (tally.rule, _Rule())):
        other = replace(learned, proposer=Proposer(weights), exact=_Nobody(), count=Count())
        others.append(_value(other, state))


def _value(level: LowLevel, state: State) -> float:
    """What a level answers is worth; inf where it answers nothing."""
    try:
        found = level.propose(state.world, state.job, state.tools, state.limits, state.conditions, state.objective)
    except RequestError:
        return np.inf
    return found.value


class _Nobody(Exact):
    """No fallback, so that only the proposals count."""

    def propose(self, *_: object) -> Proposal:
        raise RequestError("nothing was proposed that is admissible")


class _Rule:
    """In the place of weights: a candidate is as good as its linear price with the best single run that may follow."""

    def scores(self, features: NDArray[np.float32], starts: NDArray[np.int64]) -> NDArray[np.float32]:
        return -10 * features[:, 4]


def _report(figures: Figures, name: str, tally: _Tally, fell_back: float) -> None:
    learned, exact, few = (np.array(values) for values in (tally.learned, tally.exact, tally.few))
    known = np.fmin(np.fmin(learned, exact), few)
    against = {
        "learned_over_exact": _excess(learned, exact),
        "learned_over_best_known": _excess(learned, known),
        "exact_over_best_known": _excess(exact, known),
        "untrained_over_best_known": _excess(np.array(tally.untrained), known),
        "rule_over_best_known": _excess(np.array(tally.rule), known),
    }
    for kind, excess in against.items():
        note = f"{len(excess)} states; mean {_mean(excess):.4f}, worst {excess.max():.3g}"
        figures.add(f"{name}_{kind}_within_2", float((excess <= BAR).mean()), note)
    for kind in ("learned_over_exact", "learned_over_best_known", "exact_over_best_known"):
        figures.add(f"{name}_{kind}_mean", _mean(against[kind]), "an excess above 1 counts as 1")
        figures.add(f"{name}_{kind}_worst", float(against[kind].max()))
    better = float((against["learned_over_exact"] < -1e-6).mean())
    figures.add(f"{name}_learned_better_than_exact", better, "share of states, by any margin")
    figures.add(
        f"{name}_fell_back", fell_back, f"exact found nothing in {tally.exact_failed}, nobody in {tally.nothing}"
    )
    whole_s = np.array(tally.build_s) + np.array(tally.solve_s)
    of = {"learned": tally.learned_s, "exact": whole_s, "exact_again": tally.solve_s, "few_runs": tally.few_s}
    for kind, seconds in of.items():
        for q in (50, 99):
            figures.add(f"{name}_{kind}_p{q}_ms", 1e3 * float(np.percentile(seconds, q)) if len(seconds) else np.nan)
    figures.add(f"{name}_speedup_p50", float(np.median(np.array(tally.solve_s) / np.array(tally.learned_s))),
                "median of exact, its tables made before, over learned, state by state")  # fmt: skip


def _excess(values: Floats, least: Floats) -> Floats:
    """By how much values are above others, relative; where both are inf, 0."""
    with np.errstate(invalid="ignore"):
        excess = (values - least) / np.abs(least)
    excess = np.where(np.isinf(least), np.where(np.isinf(values), 0.0, -1.0), excess)
    return np.where(np.isinf(values) & ~np.isinf(least), np.inf, excess)


def _mean(excess: Floats) -> float:
    return float(np.clip(excess, -1.0, 1.0).mean())
