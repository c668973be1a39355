"""Knobs set once for all systems by a plain optimiser: what a learned policy has to beat. It does not know how they
were found. All 1 they are exact drift plus penalty, which then decides.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from threading import Lock

from splitwise_llm.cost import Limits
from splitwise_llm.decision import Decision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Observation, Tools
from splitwise_llm.policies.guided import Constant, Guide
from splitwise_llm.policies.knobs import Constants
from splitwise_llm.policies.one_session import Plans, Shelf, ask
from splitwise_llm.policies.planners import PLANNERS

SHIPPED = "policies/tuned.json"


def read_constants(file: Path) -> Constants:
    """What `splitwise bench constants` has written. Raises ModelError."""
    try:
        found = json.loads(file.read_text())["constants"]
        return Constants(**{item.name: float(found[item.name]) for item in fields(Constants)})
    except (OSError, ValueError, KeyError, TypeError, RequestError) as error:
        raise ModelError(f"{file}: no tuned constants ({error}); make some with `splitwise bench constants`") from error


@lru_cache(maxsize=1)
def shipped_constants() -> Constants:
    """The vector that comes with the package. Raises ModelError."""
    return read_constants(Path(str(resources.files("splitwise_llm") / "data" / SHIPPED)))


@dataclass(slots=True, eq=False)
class _Live:
    """Tables that are kept from one decision to the next, and the guide of the one that was asked last."""

    shelf: Shelf = field(default_factory=Shelf)
    last: tuple[Plans, Guide] | None = None
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True, slots=True)
class Tuned:
    """The policy by its name: one observation at a time, or, as `chooser`, many systems at a time."""

    name: str = "tuned"
    own: Constants | None = None
    """None: the shipped ones."""
    _live: _Live = field(default_factory=_Live, repr=False, compare=False)

    @property
    def constants(self) -> Constants:
        """Raises ModelError where none are shipped."""
        return self.own or shipped_constants()

    def chooser(
        self, tools: Tools, limits: Limits, budgets: Budgets, v: float, arrivals_per_s: float, *, w_energy: float = 0.0
    ) -> Constant:
        """Raises ModelError without constants."""
        guide = Guide(tools, limits, budgets, v, arrivals_per_s, w_energy=w_energy)
        return Constant(guide, self.constants)

    def decide(self, observation: Observation) -> Decision:
        """Among the plans of a table under these constants; where there is none for the question, or all of them are
        1, what exact drift plus penalty decides. Raises RequestError as `drift` does."""
        constants, live = self.constants, self._live
        if constants != Constants():
            with live.lock, suppress(RequestError):  # sessions ask from threads of their own
                plans = live.shelf.plans(observation)
                question = ask(observation, plans)
                choice = self._guide(plans, observation).choose(question.menu, constants.knobs(1))
                return question.decision(int(choice[0]), constants.patience, shadow=False)
        return next(row for row in PLANNERS if row.name == "drift").decide(observation)

    def _guide(self, plans: Plans, observation: Observation) -> Guide:
        live, budgets, per_s = self._live, observation.budgets, observation.arrivals_per_s
        known = live.last
        if known is None or known[0] is not plans or (known[1].budgets, known[1].arrivals_per_s) != (budgets, per_s):
            live.last = known = plans, Guide(plans.tools, plans.limits, budgets, 1.0, per_s)
        return known[1]


__all__ = ["SHIPPED", "Tuned", "read_constants", "shipped_constants"]
