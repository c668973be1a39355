"""Networks of the policy `splitwise` that nobody trained: neutral ones, and ones that want anything."""

from __future__ import annotations

import numpy as np

from splitwise_llm.observation import SEEN
from splitwise_llm.policies.features import COUNT
from splitwise_llm.policies.knobs import NEUTRAL, SIZES
from splitwise_llm.policies.network import Network

HIDDEN, WIDE = 4, 6


def network(wants: tuple[int, ...] = NEUTRAL, seed: int | None = None) -> Network:
    """One that always wants the same values of the heads; with a seed, one that wants what it likes."""
    dice = np.random.default_rng(seed)

    def matrix(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        made = np.zeros(shape) if seed is None else dice.normal(size=shape)
        return made.astype(np.float32)

    bias = np.concatenate([np.eye(size)[want] for size, want in zip(SIZES, wants, strict=True)])
    return Network(
        matrix(3 * HIDDEN, len(SEEN)), matrix(3 * HIDDEN, HIDDEN), matrix(3 * HIDDEN), matrix(3 * HIDDEN),
        matrix(WIDE, COUNT + HIDDEN), matrix(WIDE), matrix(WIDE, WIDE), matrix(WIDE), matrix(sum(SIZES), WIDE),
        bias.astype(np.float32) if seed is None else matrix(sum(SIZES)),
        np.full(COUNT, -1e9, np.float32), np.full(COUNT, 1e9, np.float32),
    )  # fmt: skip
