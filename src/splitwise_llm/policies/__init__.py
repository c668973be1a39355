"""Every decision maker, ours and the field's, under one interface. It does not know where observations come from."""

from __future__ import annotations

from difflib import get_close_matches

from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Policy
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.per_layer import PerLayer
from splitwise_llm.policies.pipelines import EdgeShard, Program
from splitwise_llm.policies.planners import PLANNERS
from splitwise_llm.policies.splitting import LayerSplitting

POLICIES: dict[str, tuple[str, Policy]] = {planner.name: (planner.says, planner) for planner in PLANNERS} | {
    "edgeshard-latency": ("EdgeShard's latency program for the expected conditions", EdgeShard()),
    "edgeshard-exact": ("the same, with memory remembered", EdgeShard(Program.EXACT_LATENCY)),
    "edgeshard-throughput": ("EdgeShard's throughput program", EdgeShard(Program.THROUGHPUT)),
    "layer-splitting": ("the cut that loses least accuracy, as measured, for its load", LayerSplitting.lossless()),
    "splitwise": ("a learned high level over the exact solver, which drift plus penalty keeps from harm", Splitwise()),
    "splitwise-paper": ("the paper's own per-layer network, repaired, trained and asked at admission", PerLayer()),
    "edgeshard-replanned": ("EdgeShard's latency program for each request, now", EdgeShard(current=True)),
}
"""Name -> (what it does, the policy)."""


def find_policy(name: str) -> Policy:
    """A policy by its name. Raises RequestError that suggests the nearest."""
    if name not in POLICIES:
        near = get_close_matches(name, POLICIES, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"unknown policy {name!r}; {hint}The policies are {', '.join(POLICIES)}")
    return POLICIES[name][1]


__all__ = ["POLICIES", "find_policy"]
