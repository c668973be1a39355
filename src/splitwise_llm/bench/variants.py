"""The learned policy without one of its ingredients, and with other weights: rows of the grid. It runs nothing.

`splitwise-no-forecasts`, `splitwise-filter-0`, `splitwise-filter-x3` leave out or change one thing; what neutral knobs
come to is the row `drift`, what constants come to the row `tuned`. `splitwise@NAME`, `splitwise-paper@NAME` and
`tuned@NAME` have the weights or constants of a file NAME.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

from splitwise_llm.cost import Limits
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import Chooser, Tools
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.guided import ETA, SLACK, Guide
from splitwise_llm.policies.mind import Mind, Splitwise, shipped
from splitwise_llm.policies.network import UNREADABLE
from splitwise_llm.policies.per_layer import PerLayer
from splitwise_llm.policies.tuned import Tuned

OURS = "splitwise"
TUNED = "tuned"
PAPER = "splitwise-paper"
LEARNED = (OURS, TUNED, PAPER)
"""Policies whose figures depend on a file of weights or constants; ours first."""
SPREAD = "seeds"
"""In place of a file's name: of all weights of a policy together."""


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
    """Row -> file, of a folder with weights of ours and of the paper's policy (`*.npz`), and constants (`*.json`).
    Raises SpecError where there are none or a name stands for another row, and ModelError for what is neither, before
    anything is run."""
    if folder is None:
        return {}
    found = {f"{_whose(file)}@{file.stem}": file for file in sorted([*folder.glob("*.npz"), *folder.glob("*.json")])}
    if not found:
        raise SpecError(
            f"{folder} has no weights (*.npz) and no constants (*.json): give a folder with some that "
            "`splitwise train` or `splitwise bench constants` made"
        )
    for row, file in found.items():
        if file.stem == SPREAD or file.stem.endswith("+tools"):
            raise SpecError(f"{file}: no row can be {row}, which is the name of something else: rename the file")
        _loaded(_named(row, found))
    return found


def _whose(file: Path) -> str:
    """Which policy a file is of."""
    if file.suffix == ".json":
        return TUNED
    with suppress(*UNREADABLE), zipfile.ZipFile(file) as arrays:
        if "figures_mean.npy" in arrays.namelist():
            return PAPER
    return OURS


def _named(row: str, weights: Mapping[str, Path]) -> str:
    """As `find_policy` names it. Raises RequestError where weights are missing."""
    base, at, _ = row.partition("@")
    if at and row not in weights:
        raise RequestError(f"no weights for {row}; there are {', '.join(weights) or 'none'}: give --weights DIR")
    return f"{base}:{weights[row]}" if at else row


_loaded = lru_cache(maxsize=16)(find_policy)


def per_layer_policies(weights: Mapping[str, Path]) -> list[PerLayer]:
    """The paper's policy with the weights of rows: a table is to have its plans."""
    every = [_loaded(_named(row, weights)) for row in weights]
    return [policy for policy in every if isinstance(policy, PerLayer)]


def chooser_of(
    name: str, tools: Tools, limits: Limits, arrivals_per_s: float, weights: Mapping[str, Path], *,
    budgets: Budgets | None = None, w_energy: float = 0.0,
) -> Chooser:  # fmt: skip
    """A policy, a variant of ours, or a learned one with other weights. Raises RequestError for unknown names,
    ModelError where weights are missing."""
    variant = next((one for one in VARIANTS if one.name == name), Variant(name, ""))
    named = _named(OURS if variant in VARIANTS else name, weights)
    policy = _loaded(named)
    if isinstance(policy, Tuned):
        return policy.chooser(tools, limits, budgets or Budgets(), 1.0, arrivals_per_s, w_energy=w_energy)
    if not isinstance(policy, Splitwise):
        return find_chooser(named, tools, limits, budgets=budgets, arrivals_per_s=arrivals_per_s)
    guide = Guide(
        tools, limits, budgets or Budgets(), arrivals_per_s=arrivals_per_s,
        w_energy=w_energy, eta=ETA * variant.filter, slack=SLACK * variant.filter,
    )  # fmt: skip
    return Mind(guide, policy.weights or shipped(), variant.forecasts)


def digest_of(policy: str, weights: Mapping[str, Path]) -> str:
    """Of the files that a policy's figures depend on besides the source; empty where there are none."""
    bare = policy.removesuffix("+tools")
    if "@" in bare:
        files = [weights[bare]] if bare in weights else []
    else:
        base = OURS if is_ours(bare) else bare
        folder = Path(str(resources.files("splitwise_llm") / "data" / "policies"))
        stems = (base, base.removeprefix("splitwise-"), "per_layer") if base == PAPER else (base,)
        files = [file for file in sorted(folder.glob("*")) if file.stem in stems] if base in LEARNED else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else ""


__all__ = [
    "LEARNED", "OURS", "PAPER", "SPREAD", "TUNED", "VARIANTS", "Variant", "chooser_of", "digest_of", "is_ours",
    "per_layer_policies", "weight_files",
]  # fmt: skip
