"""The learned high level over the exact solver: it turns knobs, a filter keeps it from harm, and both are counted.

What it cannot judge it leaves to neutral knobs, which are exact drift plus penalty: figures older than `STALE_S`,
features outside of what it was trained on, outputs that are no numbers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Limits
from splitwise_llm.decision import Decision
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Menu, Observation, Tools
from splitwise_llm.policies.features import features
from splitwise_llm.policies.guided import Guide, Guided, Priced
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Knobs, Mode
from splitwise_llm.policies.network import Network
from splitwise_llm.policies.planners import PLANNERS

Ints = NDArray[np.int64]

STALE_S = 30.0
SHIPPED = "policies/splitwise.npz"
_SPLITS = np.cumsum(SIZES)[:-1]


@lru_cache(maxsize=1)
def shipped() -> Network:
    """The weights that come with the package. Raises ModelError."""
    return Network.load(Path(str(resources.files("splitwise_llm") / "data" / SHIPPED)))


def best_actions(logits: NDArray[np.float32], masks: NDArray[np.bool_]) -> Ints:
    """(systems, heads): the likeliest value of each head that is not masked."""
    logits = np.where(masks, logits, -np.inf)
    return np.stack([part.argmax(axis=1) for part in np.split(logits, _SPLITS, axis=1)], axis=1)


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
        outside = ~stale & self.network.is_outside(x)
        wild = ~stale & ~outside & ~np.isfinite(logits).all(axis=1)
        tally.decisions += len(x)
        tally.stale += int(stale.sum())
        tally.outside += int(outside.sum())
        tally.not_finite += int(wild.sum())
        return np.where((stale | outside | wild)[:, None], np.array(NEUTRAL), actions)

    def judge(self, priced: Priced, actions: Ints) -> Guided:
        """What the actions lead to, filtered and counted."""
        guided = self.guide.guide(priced, Knobs.of(actions))
        self.tally.filtered += int(guided.kept.sum())
        for head, neutral in enumerate(NEUTRAL):
            values, counts = np.unique(actions[:, head], return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                if value != neutral:
                    self.tally.turned[knob_name(head, value)] += count
        return guided


@dataclass(frozen=True, slots=True)
class Splitwise:
    """The policy by its name: one observation at a time, or, as `chooser`, many systems at a time."""

    name: str = "splitwise"

    def chooser(
        self, tools: Tools, limits: Limits, budgets: Budgets, v: float, arrivals_per_s: float, *, w_energy: float = 0.0
    ) -> Mind:
        """Raises ModelError without weights."""
        guide = Guide(tools, limits, budgets, v, arrivals_per_s, w_energy=w_energy)
        return Mind(guide, shipped())

    def decide(self, observation: Observation) -> Decision:
        """As exact drift plus penalty decides, until the observation of one session is shown to the network."""
        return next(row for row in PLANNERS if row.name == "drift").decide(observation)


__all__ = ["SHIPPED", "STALE_S", "Mind", "Splitwise", "Tally", "best_actions", "knob_name", "shipped"]
