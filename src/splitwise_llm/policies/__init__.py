"""Every decision maker, ours and the field's, under one interface. It does not know where observations come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Policy
from splitwise_llm.policies.low_level import Level
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.network import Network
from splitwise_llm.policies.per_layer import PerLayer, read_network
from splitwise_llm.policies.pipelines import EdgeShard, Program
from splitwise_llm.policies.planners import PLANNERS, Planner
from splitwise_llm.policies.splitting import LayerSplitting
from splitwise_llm.policies.tuned import Tuned, read_constants

POLICIES: dict[str, tuple[str, Policy]] = {planner.name: (planner.says, planner) for planner in PLANNERS} | {
    "edgeshard-latency": ("EdgeShard's latency program for the expected conditions", EdgeShard()),
    "edgeshard-exact": ("the same, with memory remembered", EdgeShard(Program.EXACT_LATENCY)),
    "edgeshard-throughput": ("EdgeShard's throughput program", EdgeShard(Program.THROUGHPUT)),
    "layer-splitting": ("the cut that loses least accuracy, as measured, for its load", LayerSplitting.lossless()),
    "splitwise": ("a learned high level over the exact solver, which drift plus penalty keeps from harm", Splitwise()),
    "splitwise-paper": ("the paper's own per-layer network, repaired, trained and asked at admission", PerLayer()),
    "tuned": ("the same knobs, set once for all systems by a plain optimiser", Tuned()),
    "edgeshard-replanned": ("EdgeShard's latency program for each request, now", EdgeShard(current=True)),
}
"""Name -> (what it does, the policy)."""
_FROM_FILE: dict[str, Callable[[str, Path], Policy]] = {
    "splitwise": lambda name, file: Splitwise(name, Network.load(file)),
    "splitwise-paper": lambda _, file: PerLayer(read_network(file)),
    "tuned": lambda name, file: Tuned(name, read_constants(file)),
}


def find_policy(name: str) -> Policy:
    """A policy by its name; `splitwise:FILE`, `splitwise-paper:FILE` and `tuned:FILE` with weights or constants of
    one's own. Raises RequestError that suggests the nearest, ModelError for what are no such weights."""
    known, colon, file = name.partition(":")
    if colon and known in _FROM_FILE:
        return _FROM_FILE[known](name, Path(file))
    if name not in POLICIES:
        near = get_close_matches(name, POLICIES, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"unknown policy {name!r}; {hint}The policies are {', '.join(POLICIES)}")
    return POLICIES[name][1]


def with_low_level(policy: Policy, low: Level | None) -> Policy:
    """The policy with who finds its plans, if somebody was asked for. Raises RequestError for one without a choice."""
    if low is None:
        return policy
    if isinstance(policy, Splitwise) or (isinstance(policy, Planner) and policy.has_levels):
        return replace(policy, low=low)
    able = [
        name for name, (_, one) in POLICIES.items() if isinstance(one, Splitwise) or getattr(one, "has_levels", False)
    ]
    raise RequestError(f"--low-level is for --policy {', '.join(able[:-1])} and {able[-1]}; no other has two of them")


__all__ = ["POLICIES", "find_policy", "with_low_level"]
