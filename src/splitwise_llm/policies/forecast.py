"""What a device can expect from what it has seen: outages, rates, lengths of answers. Plain statistics, no learning.

Each starts from what is assumed beforehand, which weighs as much as `PRIOR` observations, so that the first outage is
not taken for the rule.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.observation import Past

Floats = NDArray[np.float64]

PRIOR = 2.0
OUTAGE_S, GAP_S = 8.0, 60.0
"""Assumed of a link of which nothing has been seen."""
P90 = 1.2816
"""Standard deviations of a normal variable that nine tenths are below."""
_UP, _DOWN = 3, 4


def _moments(counts: Floats, assumed: Floats | float) -> tuple[Floats, Floats]:
    """Mean and coefficient of variation of counts (systems, 3), beside `PRIOR` exponential ones of mean `assumed`."""
    number = counts[:, 0] + PRIOR
    mean = (counts[:, 1] + PRIOR * assumed) / number
    square = (counts[:, 2] + 2 * PRIOR * assumed**2) / number
    spread = np.sqrt(np.maximum(square - mean**2, 0.0)) / mean
    return mean, spread


def _left(mean: Floats, spread: Floats, since_s: Floats) -> Floats:
    """Expected rest of a stretch that has lasted so long: of an exponential one (variation 1 or more) its mean, of a
    regular one (0) what is left of it, between them in proportion."""
    random = np.minimum(spread, 1.0)
    return np.asarray(random * mean + (1 - random) * np.maximum(mean - since_s, 0.0))


def outages_s(past: Past) -> tuple[Floats, Floats]:
    """(systems,) each: for how long the link is expected to stay away, 0 where it is there; and the mean of outages."""
    mean, spread = _moments(past.outages, OUTAGE_S)
    return np.where(past.is_down, _left(mean, spread, past.since_s), 0.0), mean


def outage_within(past: Past, seconds: Floats) -> Floats:
    """(..., systems): probability that the link is lost within so long; 1 where it is lost."""
    left = np.maximum(_left(*_moments(past.gaps, GAP_S), past.since_s), 1e-3)
    return np.where(past.is_down, 1.0, -np.expm1(-seconds / left))


def answer_tokens(past: Past, assumed: Floats) -> tuple[Floats, Floats]:
    """(systems,) each: tokens of an answer, expected and not exceeded by nine in ten. `assumed`: what was said of this
    one."""
    number = past.answers[:, 0] + PRIOR
    mean = (past.answers[:, 1] + PRIOR * assumed) / number
    square = (past.answers[:, 2] + PRIOR * assumed**2) / number
    return mean, mean + P90 * np.sqrt(np.maximum(square - mean**2, 0.0))


def rate_ratio(past: Past) -> Floats:
    """(systems, 2): rate up and down of the latest epoch over the mean of those remembered; 1 without any."""
    rates = past.epochs[:, :, _UP : _DOWN + 1]
    seen = (rates > 0).sum(axis=1)
    mean = rates.sum(axis=1) / np.maximum(seen, 1)
    return np.where((seen > 0) & (rates[:, 0] > 0), rates[:, 0] / np.maximum(mean, 1e-9), 1.0)
