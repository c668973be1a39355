"""Knobs set once for all systems by a plain optimiser: what a learned policy has to beat. It does not know how they
were found.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path

from splitwise_llm.cost import Limits
from splitwise_llm.decision import Decision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Observation, Tools
from splitwise_llm.policies.guided import Constant, Guide
from splitwise_llm.policies.knobs import Constants
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


@dataclass(frozen=True, slots=True)
class Tuned:
    """The policy by its name: one observation at a time, or, as `chooser`, many systems at a time."""

    name: str = "tuned"

    def chooser(
        self, tools: Tools, limits: Limits, budgets: Budgets, v: float, arrivals_per_s: float, *, w_energy: float = 0.0
    ) -> Constant:
        """Raises ModelError without constants."""
        guide = Guide(tools, limits, budgets, v, arrivals_per_s, w_energy=w_energy)
        return Constant(guide, shipped_constants())

    def decide(self, observation: Observation) -> Decision:
        """As exact drift plus penalty decides, until the observation of one session is priced under knobs."""
        return next(row for row in PLANNERS if row.name == "drift").decide(observation)


__all__ = ["SHIPPED", "Tuned", "read_constants", "shipped_constants"]
