"""Numbers from counters: the n-th of a (seed, trace, purpose) is always the same, whoever asks and for how many."""

from __future__ import annotations

import zlib

import numpy as np

from splitwise_llm.sim.physics import Floats


def uniforms(seed: int, trace: int, purpose: str, count: int) -> Floats:
    """`count` numbers in (0, 1); the first ones do not depend on how many are asked for."""
    key = [(seed << 32) ^ zlib.crc32(purpose.encode()), trace]
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    result: Floats = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return result


def exponentials(seed: int, trace: int, purpose: str, count: int) -> Floats:
    """As `uniforms`, with mean 1."""
    result: Floats = -np.log(uniforms(seed, trace, purpose, count))
    return result


def factor(seed: int, number: int, purpose: str, spread: float) -> float:
    return 1.0 + spread * (2 * float(uniforms(seed, number, purpose, 1)[0]) - 1)
