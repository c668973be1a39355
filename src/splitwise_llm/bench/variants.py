"""The learned policy without one of its ingredients, and with other weights: rows of the grid. It runs nothing.

`splitwise-no-forecasts`, `splitwise-filter-0`, `splitwise-filter-x3` leave out or change one thing; what neutral knobs
come to is the row `drift`, what constants come to the row `tuned`. `splitwise@NAME` has the weights of a file NAME.npz.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

from splitwise_llm.cost import Limits
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Chooser, Tools
from splitwise_llm.policies import POLICIES
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.guided import ETA, SLACK, Guide
from splitwise_llm.policies.mind import Mind, shipped
from splitwise_llm.policies.network import Network
from splitwise_llm.policies.tuned import Tuned

OURS = "splitwise"
LEARNED = tuple(name for name in (OURS, "tuned", "splitwise-paper") if name in POLICIES)
"""Policies whose figures depend on a file of weights or constants; ours first."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different."""

    name: str
    says: str
    forecasts: bool = True
    filter: float = 1.0
    """Times what the safety filter allows."""


VARIANTS = (
    Variant("splitwise-no-forecasts", "it sees no forecasts", forecasts=False),
    Variant("splitwise-filter-0", "the filter lets nothing pass that is worse than drift plus penalty", filter=0.0),
    Variant("splitwise-filter-x3", "the filter lets pass three times as much", filter=3.0),
)


def is_ours(policy: str) -> bool:
    """Whether a row is the learned policy in one of its forms."""
    bare = policy.removesuffix("+tools")
    return bare.partition("@")[0] == OURS or any(bare == variant.name for variant in VARIANTS)


def weight_files(folder: Path | None) -> dict[str, Path]:
    """Name -> file, of a folder of `*.npz`. Raises SpecError where there are none."""
    if folder is None:
        return {}
    found = {file.stem: file for file in sorted(folder.glob("*.npz"))}
    if not found:
        raise SpecError(f"{folder} has no weights (*.npz): give a folder that `splitwise train` wrote them to")
    return found


@lru_cache(maxsize=16)
def _loaded(file: Path) -> Network:
    return Network.load(file)


def chooser_of(
    name: str, tools: Tools, limits: Limits, arrivals_per_s: float, weights: Mapping[str, Path], *,
    budgets: Budgets | None = None, w_energy: float = 0.0,
) -> Chooser:  # fmt: skip
    """A policy, a variant of ours, or ours with other weights. Raises RequestError for unknown names, ModelError
    where weights are missing."""
    if name == Tuned().name:
        return Tuned().chooser(tools, limits, budgets or Budgets(), 1.0, arrivals_per_s, w_energy=w_energy)
    if not is_ours(name):
        return find_chooser(name, tools, limits, budgets=budgets, arrivals_per_s=arrivals_per_s)
    variant = next((one for one in VARIANTS if one.name == name), Variant(name, ""))
    _, at, file = name.partition("@")
    if at and file not in weights:
        raise RequestError(f"no weights {file!r}; there are {', '.join(weights) or 'none'}: give --weights DIR")
    network = _loaded(weights[file]) if at else shipped()
    guide = Guide(
        tools, limits, budgets or Budgets(), arrivals_per_s=arrivals_per_s,
        w_energy=w_energy, eta=ETA * variant.filter, slack=SLACK * variant.filter,
    )  # fmt: skip
    return Mind(guide, network, variant.forecasts)


def digest_of(policy: str, weights: Mapping[str, Path]) -> str:
    """Of the files that a policy's figures depend on besides the source; empty where there are none."""
    bare = policy.removesuffix("+tools")
    base, at, name = bare.partition("@")
    if at:
        files = [weights[name]] if name in weights else []
    else:
        base = OURS if is_ours(bare) else base
        folder = Path(str(resources.files("splitwise_llm") / "data" / "policies"))
        stems = (base, base.removeprefix("splitwise-"), "per_layer") if base == "splitwise-paper" else (base,)
        files = [file for file in sorted(folder.glob("*")) if file.stem in stems] if base in LEARNED else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else ""


__all__ = ["LEARNED", "OURS", "VARIANTS", "Variant", "chooser_of", "digest_of", "is_ours", "weight_files"]
