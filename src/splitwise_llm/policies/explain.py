"""What would have to change for a choice to flip: the nearest value of each figure at which another plan is better.

Pure: it prices and solves, and prints nothing. The challengers are the plans it is given and the best cuts and
U-shapes at probed values; a threshold among them is kept only if the solver finds nothing better just before it, and
else what it finds joins them. Where values are concave in a figure (all but overlapping chunks and shared halves)
the nearest threshold among cuts and U-shapes is therefore found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Form, Job, Load, Table, World, bill, obstacle
from splitwise_llm.decision import Decision
from splitwise_llm.observation import Tools
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.objective import Objective
from splitwise_llm.policies.solver import Solver

Floats = NDArray[np.float64]

FACTOR = 1000.0
"""A figure is changed by at most this, either way."""
_FROM_NOTHING = 1e-3
"""s, or whatever a figure is in, that stands for 0 where steps are factors."""


@dataclass(frozen=True, slots=True)
class Flip:
    """The value at which the choice changes, and what it becomes (None: nothing is admissible any more)."""

    value: float
    becomes: Decision | None


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The nearest flips of one figure below and above its value; None: none down to `low`, or up to `high`."""

    name: str
    unit: str
    """s, bytes/s, tokens, sequences, or x (times what it is)."""
    value: float
    low: float
    high: float
    below: Flip | None
    above: Flip | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that may change. `values` prices plans (settings, plans), inf where one is forbidden; `best` are
    the best of all plans at a setting."""

    name: str
    unit: str
    value: float
    low: float
    high: float
    values: Callable[[Sequence[Decision], Sequence[float]], Floats]
    best: Callable[[float], Iterable[Decision]]
    steps: int = 48
    """Settings each way at which the challengers are compared."""
    probes: int = 2
    """Settings each way at which new challengers are sought, the last at the end."""
    whole: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What was decided, and under what."""

    solver: Solver
    objective: Objective
    loads: Mapping[int, Load]
    choice: Decision

    @property
    def world(self) -> World:
        return self.solver.world

    @property
    def conditions(self) -> Form:
        return self.world.conditions(self.loads)


def sensitivities(question: Question, challengers: Sequence[Decision], batch: int, wait_s: float) -> list[Sensitivity]:
    """The nearest flips of every figure: links, load and wait of the shared machines, lengths, the device's speed."""
    known = dict.fromkeys((question.choice, *challengers))
    found = []
    for figure in (*_of_conditions(question, batch, wait_s), *_of_lengths(question)):
        below = nearest(figure, question.choice, figure.low, known)
        above = nearest(figure, question.choice, figure.high, known)
        found.append(Sensitivity(figure.name, figure.unit, figure.value, figure.low, figure.high, below, above))
    return found


def nearest(figure: Figure, choice: Decision, end: float, known: dict[Decision, None]) -> Flip | None:
    """The first setting on the way from the figure's value to `end` at which another plan is better than `choice`.
    `known` are challengers; those that are found are added."""
    start = figure.value
    if start == end:
        return None
    for probe in (_between(start, end, figure.whole), end)[-figure.probes :]:
        known.update(dict.fromkeys(figure.best(probe)))
    while True:
        plans = [choice, *(plan for plan in known if plan != choice)]
        grid = _grid(start, end, figure.steps, figure.whole)
        lost = _lost(figure.values(plans, grid))
        if not lost.any():
            return None
        first = int(lost.argmax())
        inside, outside = (grid[first - 1] if first else start), grid[first]
        while _apart(inside, outside, figure.whole):
            middle = _between(inside, outside, figure.whole)
            if _lost(figure.values(plans, [middle]))[0]:
                outside = middle
            else:
                inside = middle
        fresh = [plan for plan in figure.best(inside) if plan not in known]
        better = [plan for plan in fresh if _lost(figure.values([choice, plan], [inside]))[0]]
        if not better:
            at = figure.values(plans, [outside])[0]
            return Flip(outside, plans[int(at.argmin())] if np.isfinite(at.min()) else None)
        known.update(dict.fromkeys(better))


def _lost(values: Floats) -> NDArray[np.bool_]:
    """Where the first of some plans is not the best, rounding apart: (settings,)."""
    first, best = values[:, 0], values.min(axis=1)
    lost: NDArray[np.bool_] = ~np.isfinite(first) | (best < first * (1 - 1e-9 * np.sign(first)))
    return lost


def _between(a: float, b: float, whole: bool) -> float:
    """The middle in factors, or, beside 0, in steps."""
    middle = float(np.sqrt(a * b)) if a > 0 and b > 0 else max(a, b) / 2
    return float(round(middle)) if whole else middle


def _apart(a: float, b: float, whole: bool) -> bool:
    """Whether there is anything to try in between."""
    return abs(a - b) > (1 if whole else 1e-3 * max(a, b))


def _grid(start: float, end: float, steps: int, whole: bool) -> list[float]:
    """Settings from beyond `start` to `end`, by equal factors."""
    low = start if start > 0 else min(_FROM_NOTHING, end)
    values = np.geomspace(low, end, steps + 1)[1 if start > 0 else 0 :]
    values[-1] = end
    if whole:
        values = np.array([value for value in dict.fromkeys(np.round(values).tolist()) if value != start])
    return [float(value) for value in values]


def _of_conditions(question: Question, batch: int, wait_s: float) -> list[Figure]:
    """Figures that leave every bill as it is."""
    world, basis, solver = question.world, question.world.basis, question.solver
    shared = [m for m, host in enumerate(world.hosts) if m != DEVICE and host.is_shared]
    bills: dict[Decision, Table] = {}

    def values(settings: Callable[[float], Form], plans: Sequence[Decision], at: Sequence[float]) -> Floats:
        for plan in plans:
            if plan not in bills:
                bills[plan] = Table(world, [bill(world, plan, solver.job)])
        x = np.stack([settings(value) for value in at])
        return np.concatenate([question.objective.value(bills[plan].at(x)) for plan in plans], axis=-1)

    def figure(name: str, unit: str, value: float, settings: Callable[[float], Form], **ends: float) -> Figure:
        low, high = ends.get("low", value / FACTOR), ends.get("high", value * FACTOR)

        def best(at: float) -> list[Decision]:
            return [choice.decision for choice in solver.cuts(settings(at), question.objective)]

        return Figure(name, unit, value, low, high, partial(values, settings), best, whole=bool(ends.get("whole")))

    def scaled(places: Sequence[int], value: float, at: float) -> Form:
        x = question.conditions
        x[places] = x[places] * (at / value) if value else at
        return x

    def loaded(at_batch: float, at_wait: float) -> Form:
        context = solver.job.mean_context
        more = {m: world.load(m, round(at_batch), at_wait, context) for m in shared}
        return world.conditions({**question.loads, **more})

    figures = []
    if world.links:
        first = world.links[min(world.links)]
        rtts = [basis.rtt(*pair) for pair in basis.pairs]
        ups = [basis.inverse(*pair) for pair in basis.pairs]
        downs = [basis.inverse(*pair[::-1]) for pair in basis.pairs]
        rtt_high = {} if first.rtt_s else {"high": _FROM_NOTHING * FACTOR}
        figures.append(figure("rtt", "s", first.rtt_s, partial(scaled, rtts, first.rtt_s), **rtt_high))
        for name, places, rate in (("up", ups, first.up_bytes_per_s), ("down", downs, first.down_bytes_per_s)):

            def at_rate(at: float, places: Sequence[int] = places, rate: float = rate) -> Form:
                return scaled(places, 1.0, rate / at)

            figures.append(figure(name, "bytes/s", rate, at_rate))
    if shared:
        slots = float(min(world.hosts[m].device.slots for m in shared))
        most = max(slots, float(batch))
        figures.append(
            figure("batch", "sequences", batch, lambda at: loaded(at, wait_s), low=1.0, high=most, whole=True)
        )
        wait_high = {} if wait_s else {"high": 0.1 * FACTOR}
        figures.append(figure("wait", "s", wait_s, lambda at: loaded(batch, at), **wait_high))
    device = [basis.slow(DEVICE), basis.share(DEVICE)]
    figures.append(figure("edge speed", "x", 1.0, lambda at: scaled(device, 1.0, 1 / at)))
    return figures


def _of_lengths(question: Question) -> list[Figure]:
    """Prompt and answer: every bill changes with them. Only the tools of the choice are tried elsewhere."""
    world, limits, job = question.world, question.solver.limits, question.solver.job
    choice = question.choice
    chunks = tuple(dict.fromkeys((None, choice.prefill_chunk)))
    tools = Tools((choice.wire,), chunks, (choice.draft,), (choice.prefill_wire,))

    def values(jobs: Callable[[float], Job], plans: Sequence[Decision], at: Sequence[float]) -> Floats:
        rows = []
        for value in at:
            changed = jobs(value)
            prices = Table(world, [bill(world, plan, changed) for plan in plans]).at(question.conditions)
            allowed = [obstacle(world, plan, changed, limits) is None for plan in plans]
            rows.append(np.where(allowed, question.objective.value(prices), np.inf))
        return np.stack(rows)

    def best(jobs: Callable[[float], Job], at: float) -> list[Decision]:
        solver = Solver(world, jobs(at), tools, limits)
        return [each.decision for each in solver.cuts(question.conditions, question.objective)]

    figures = []
    for name, value, other in (
        ("prompt", job.prompt_tokens, job.tokens_out),
        ("output", job.tokens_out, job.prompt_tokens),
    ):
        field = "prompt_tokens" if name == "prompt" else "tokens_out"

        def jobs(at: float, field: str = field) -> Job:
            return replace(job, **{field: round(at)})

        high = max(min(value * FACTOR, float(world.spec.max_context - other)), float(value))
        low = float(max(round(value / FACTOR), 1))
        given = (partial(values, jobs), partial(best, jobs))
        figures.append(Figure(name, "tokens", float(value), low, high, *given, steps=8, probes=1, whole=True))
    return figures
