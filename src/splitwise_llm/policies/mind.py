"""The learned high level over the exact solver: it turns knobs, a filter keeps it from harm, and both are counted.

What it cannot judge it leaves to neutral knobs, which are exact drift plus penalty: figures older than `STALE_S`,
features outside of what it was trained on, outputs that are no numbers.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Limits
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Menu, Observation, Tools
from splitwise_llm.policies.features import FORECASTS, features
from splitwise_llm.policies.guided import STAY, Guide, Guided, Priced
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Knobs, Mode
from splitwise_llm.policies.low_level import Level
from splitwise_llm.policies.network import Network
from splitwise_llm.policies.one_session import Plans, Question, Shelf, Unfit, ask
from splitwise_llm.policies.planners import PLANNERS, Planner

Ints = NDArray[np.int64]

STALE_S = 30.0
SHIPPED = "policies/splitwise.npz"
_HEADS = [slice(sum(SIZES[:n]), sum(SIZES[: n + 1])) for n in range(len(SIZES))]
"""Where the logits of each head are."""
_NEUTRAL = np.array(NEUTRAL)


@lru_cache(maxsize=1)
def shipped() -> Network:
    """The weights that come with the package. Raises ModelError."""
    return Network.load(Path(str(resources.files("splitwise_llm") / "data" / SHIPPED)))


def best_actions(logits: NDArray[np.float32], masks: NDArray[np.bool_]) -> Ints:
    """(systems, heads): the likeliest value of each head that is not masked."""
    logits = np.where(masks, logits, -np.inf)
    return np.array([logits[:, head].argmax(axis=1) for head in _HEADS]).T


@dataclass(slots=True)
class Tally:
    """What was decided so far."""

    decisions: int = 0
    stale: int = 0
    outside: int = 0
    not_finite: int = 0
    filtered: int = 0
    turned: Counter[str] = field(default_factory=Counter)
    """How often each knob stood where: `cloud x0.5`; neutral ones are not counted."""

    @property
    def fallback_share(self) -> float:
        """Share of the decisions that exact drift plus penalty made in its place."""
        fallbacks = self.stale + self.outside + self.not_finite + self.filtered
        return fallbacks / max(self.decisions, 1)


def knob_name(head: int, value: int) -> str:
    name, values = HEADS[head]
    if name == "mode":
        return f"mode {Mode(value).name.lower()}"
    if name == "outlook":
        return name
    return f"{name} x{values[value]:g}"


@dataclass(frozen=True, slots=True, eq=False)
class Mind:
    """The policy `splitwise` for many systems at a time."""

    guide: Guide
    network: Network
    forecasts: bool = True
    """False: it sees none, as in the ablation."""
    tally: Tally = field(default_factory=Tally)
    in_flight: bool = True

    def choose(self, menu: Menu) -> Ints:
        """Per system the number of a plan; -1 stay or refuse, -2 later."""
        priced = self.guide.price(menu)
        return self.judge(priced, self.actions(priced)).choice

    def actions(self, priced: Priced) -> Ints:
        """(systems, heads)"""
        x = features(priced, forecasts=self.forecasts)
        logits = self.network.logits(x)
        actions = best_actions(logits, self.guide.masks(priced))
        past, tally = priced.menu.past, self.tally
        stale = past.age_s > STALE_S if past is not None else np.zeros(len(x), np.bool_)
        outside = ~stale & self.network.is_outside(x, () if self.forecasts else FORECASTS)
        wild = ~stale & ~outside & ~np.isfinite(logits).all(axis=1)
        tally.decisions += len(x)
        tally.stale += int(np.count_nonzero(stale))
        tally.outside += int(np.count_nonzero(outside))
        tally.not_finite += int(np.count_nonzero(wild))
        return np.where((stale | outside | wild)[:, None], _NEUTRAL, actions)

    def judge(self, priced: Priced, actions: Ints) -> Guided:
        """What the actions lead to, filtered and counted."""
        guided = self.guide.guide(priced, Knobs.of(actions))
        self.tally.filtered += int(guided.kept.sum())
        for head in np.nonzero((actions != _NEUTRAL).any(axis=0))[0].tolist():
            values, counts = np.unique(actions[:, head], return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if value != NEUTRAL[head]:
                    self.tally.turned[knob_name(head, value)] += count
        return guided


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """A decision about one session, beside the plain solver's among the same plans. Where `why` says something, the
    plain solver decided; where its reason is that there is no such row, without a table: then D1 is not known."""

    decision: Decision
    plain: Decision
    action: tuple[int, ...]
    """The number of a value in each head of `HEADS`."""
    d1: float
    """Of what is done; NaN where there was no table."""
    plain_d1: float
    bound: float
    """What the filter lets through."""
    why: str
    """Why it fell back; empty where it did not."""

    @property
    def turned(self) -> tuple[str, ...]:
        """The knobs that are not neutral."""
        return _turned(self.action)


def _turned(action: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(knob_name(head, value) for head, value in enumerate(action) if value != NEUTRAL[head])


@dataclass(slots=True, eq=False)
class _Live:
    """What the policy keeps from one session to the next: tables, the mind of each, and counts."""

    shelf: Shelf = field(default_factory=Shelf)
    minds: OrderedDict[tuple[object, ...], tuple[Plans, Mind]] = field(default_factory=OrderedDict)
    tally: Tally = field(default_factory=Tally)
    elsewhere: Counter[str] = field(default_factory=Counter)
    """Decisions without a table, by their reason."""
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True, slots=True)
class Splitwise:
    """The policy by its name: one observation at a time, or, as `chooser`, many systems at a time."""

    name: str = "splitwise"
    weights: Network | None = None
    """None: the shipped ones."""
    low: Level | None = None
    """Who finds plans where there are more workers than its tables know; None: as `drift` has it."""
    _live: _Live = field(default_factory=_Live, repr=False, compare=False)

    def chooser(
        self, tools: Tools, limits: Limits, budgets: Budgets, v: float, arrivals_per_s: float, *, w_energy: float = 0.0
    ) -> Mind:
        """Raises ModelError without weights."""
        guide = Guide(tools, limits, budgets, v, arrivals_per_s, w_energy=w_energy)
        return Mind(guide, self.weights or shipped())

    @property
    def tally(self) -> Tally:
        """Of decisions about single sessions that had a table."""
        return self._live.tally

    @property
    def elsewhere(self) -> Counter[str]:
        """How often exact drift plus penalty decided because there is no table for such a question, by the reason."""
        return self._live.elsewhere

    @property
    def fallback_share(self) -> float:
        """Of all decisions about single sessions."""
        tally, elsewhere = self._live.tally, sum(self._live.elsewhere.values())
        all_of_them = max(tally.decisions + elsewhere, 1)
        return (tally.fallback_share * tally.decisions + elsewhere) / all_of_them

    def decide(self, observation: Observation) -> Decision:
        """What the knobs lead to, with the patience of a decision; where there is no table for the question, what
        exact drift plus penalty decides. Raises ModelError without weights, RequestError as `drift` does."""
        return self.judge(observation).decision

    def judge(self, observation: Observation, *, counts: bool = True) -> Judged:
        """The same with its reasons; `counts` whether the tallies are to know of it."""
        network = self.weights or shipped()
        live = self._live
        with live.lock:  # sessions ask from threads of their own
            try:
                plans = live.shelf.plans(observation)
                question = ask(observation, plans)
            except RequestError as error:
                why = str(error) if isinstance(error, Unfit) else "no table could be made"
                if counts:
                    live.elsewhere[why] += 1
            else:
                mind = self._mind(network, plans, observation)
                return _judged(question, mind if counts else replace(mind, tally=Tally()))
        plain = self.drift.decide(observation)
        return Judged(plain, plain, NEUTRAL, math.nan, math.nan, math.nan, why)

    @property
    def drift(self) -> Planner:
        """Who decides where it has no table."""
        return replace(_DRIFT, low=self.low)

    def _mind(self, network: Network, plans: Plans, observation: Observation) -> Mind:
        """With what it has made of a table, which goes when the table does."""
        live, key = self._live, (id(plans), observation.budgets, observation.arrivals_per_s)
        if key not in live.minds:
            guide = Guide(plans.tools, plans.limits, observation.budgets, 1.0, observation.arrivals_per_s)
            live.minds[key] = plans, Mind(guide, network, tally=live.tally)
            if len(live.minds) > MINDS:
                live.minds.popitem(last=False)
        return live.minds[key][1]


MINDS = 16
"""Tables with budgets of which something is kept."""
_DRIFT = next(row for row in PLANNERS if row.name == "drift")


def _judged(question: Question, mind: Mind) -> Judged:
    """What the mind makes of a row. A session can neither be refused nor asked again later, and cannot stay where
    nothing works: then the mode is left to the solver."""
    priced = mind.guide.price(question.menu)
    before = mind.tally.stale, mind.tally.outside, mind.tally.not_finite
    actions = mind.actions(priced)
    after = mind.tally.stale, mind.tally.outside, mind.tally.not_finite
    here = question.present
    stuck = here < 0 or not question.menu.admissible[0, here]
    mode = Mode(int(actions[0, 0]))
    if mode is Mode.SHED or (mode is Mode.WAIT and stuck):
        actions[0, 0] = mode = Mode.AUTO
    if here < 0:
        actions[0, -1] = NEUTRAL[-1]
    knobs = Knobs.of(actions)
    guided, action = mind.guide.guide(priced, knobs), tuple(actions[0].tolist())
    mind.tally.filtered += int(guided.kept[0])
    mind.tally.turned.update(_turned(action))
    best = int(priced.best[0])
    plain = question.decision(STAY if best == here else best, 1.0, shadow=False)
    decision = question.decision(int(guided.choice[0]), float(knobs.patience[0]), shadow=mode is Mode.SHADOW)
    reasons = (
        f"its figures are older than {STALE_S:g} s", "something it sees is outside of what it was trained on",
        "its network gave no numbers",
    )  # fmt: skip
    why = next((reason for reason, a, b in zip(reasons, before, after, strict=True) if b > a), "")
    if guided.kept[0]:
        why = "the safety filter: what it wanted would cost more than it may"
    return Judged(
        decision, plain, action, float(guided.d1[0]), float(priced.least[0]),
        float(priced.bound[0]), why,
    )  # fmt: skip


__all__ = ["SHIPPED", "STALE_S", "Judged", "Mind", "Splitwise", "Tally", "best_actions", "knob_name", "shipped"]
