"""Weights of the high level whose actions are known."""

from __future__ import annotations

import numpy as np

from splitwise_llm.observation import SEEN
from splitwise_llm.policies.features import COUNT
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES
from splitwise_llm.policies.network import Network


def steady_network(turned: dict[str, int] | None = None, seen: float = 1e9) -> Network:
    """Which turns knobs (head -> number of the value) the same way whatever it sees; by default none."""
    zero = {name: np.zeros(shape, np.float32) for name, shape in (
        ("gru_input", (6, len(SEEN))), ("gru_hidden", (6, 2)), ("gru_input_bias", (6,)), ("gru_hidden_bias", (6,)),
        ("first", (4, COUNT + 2)), ("first_bias", (4,)), ("second", (4, 4)), ("second_bias", (4,)),
        ("heads", (sum(SIZES), 4)),
    )}  # fmt: skip
    bias = np.zeros(sum(SIZES), np.float32)
    begin = 0
    for (name, values), neutral in zip(HEADS, NEUTRAL, strict=True):
        bias[begin + (turned or {}).get(name, neutral)] = 1.0
        begin += len(values)
    bounds = np.full(COUNT, seen, np.float32)
    return Network.of({**zero, "heads_bias": bias, "low": -bounds, "high": bounds})
