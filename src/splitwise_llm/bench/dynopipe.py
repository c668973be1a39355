"""DynoPipe's case study (ISCA 2026): where to cut a model in two machines' tandem queue, by load and round trip.

Only its published service times go in: LLaMA2-7B, 179 ms a request in the cloud, 256 ms at the edge, linear in layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.bench.comparison import NEAR, Listing, Row

Floats = NDArray[np.float64]
LAYERS = 32
CLOUD_S, EDGE_S = 0.179, 0.256
REQUESTS = 128
"""Requests of a run, from empty queues: their 295 ms of queueing at 0.89 of capacity are no steady state's 760 ms."""
CROSSING_S = 0.002
"""Of a split, besides the round trip: their network share is 7 ms per request at 5 ms of RTT."""
SPLITS = (0, 4, 8, 12, 16)

Published = dict[tuple[float, float], tuple[int, float]]
PUBLISHED: Published = {
    (3, 0.005): (4, 0.246), (3, 0.020): (12, 0.254), (3, 0.050): (4, 0.274),
    (4, 0.005): (12, 0.252), (4, 0.020): (12, 0.261), (4, 0.050): (16, 0.315),
    (5, 0.005): (12, 0.292), (5, 0.020): (12, 0.308), (5, 0.050): (8, 0.372),
}  # fmt: skip
"""(requests per second, RTT) -> (best split, latency): layers at the edge, seconds. (At 50 ms with jitter.)"""
PUBLISHED_AT_5_PER_S = {0: 0.478, 12: 0.292, 32: 4.498}
"""Latency by split at 5 requests per second and 5 ms."""

Arrivals = Callable[[np.random.Generator, float, tuple[int, int]], Floats]
"""(dice, requests per second, (runs, requests)) -> seconds between arrivals."""


def poisson(dice: np.random.Generator, rate: float, shape: tuple[int, int]) -> Floats:
    """Independent exponential gaps."""
    return dice.exponential(1 / rate, shape)


def bursty(dice: np.random.Generator, rate: float, shape: tuple[int, int], cv: float = 2.5) -> Floats:
    """Gaps of two exponential phases with balanced means and a coefficient of variation, as their traces have."""
    p = (1 + ((cv**2 - 1) / (cv**2 + 1)) ** 0.5) / 2
    mean = np.where(dice.random(shape) < p, 1 / (2 * p), 1 / (2 * (1 - p))) / rate
    gaps: Floats = dice.exponential(mean)
    return gaps


def service_s(split: int) -> tuple[float, float]:
    """(edge, cloud) seconds of a request with `split` layers at the edge."""
    return EDGE_S * split / LAYERS, CLOUD_S * (LAYERS - split) / LAYERS


def network_s(split: int, rtt_s: float, tokens: int = 1) -> float:
    """One round trip a request, as published; of a split, one per token if `tokens` are counted."""
    if split == LAYERS:
        return 0.0
    return rtt_s if split == 0 else tokens * (rtt_s + CROSSING_S)


def waits(gaps: Floats, edge_s: float, cloud_s: float) -> Floats:
    """(runs, requests): seconds in the two queues of first-come stations in a row, empty at the beginning."""
    arrived = np.cumsum(gaps, axis=1)
    edge_free = cloud_free = np.zeros(len(gaps))
    waited = np.empty_like(gaps)
    for n in range(gaps.shape[1]):
        edge_free = np.maximum(arrived[:, n], edge_free) + edge_s
        cloud_free = np.maximum(edge_free, cloud_free) + cloud_s
        waited[:, n] = cloud_free - arrived[:, n] - edge_s - cloud_s
    return waited


@dataclass(frozen=True, slots=True)
class Latency:
    """Mean over runs of a run's mean latency, its standard error, and its spread (5th to 95th percentile of runs)."""

    mean_s: float
    error_s: float
    low_s: float
    high_s: float


def latency(
    split: int, rate: float, rtt_s: float, arrivals: Arrivals = poisson, runs: int = 4000, requests: int = REQUESTS
) -> Latency:
    """Of requests that arrive at `rate`; the same arrivals for every split."""
    gaps = arrivals(np.random.default_rng(0), rate, (runs, requests))
    means = waits(gaps, *service_s(split)).mean(axis=1) + sum(service_s(split)) + network_s(split, rtt_s)
    low, high = np.percentile(means, (5, 95))
    return Latency(float(means.mean()), float(means.std(ddof=1) / runs**0.5), float(low), float(high))


def tokens_to_break_even(rate: float, rtt_s: float, split: int = 12) -> float:
    """Tokens a request may generate until a round trip each undoes what a split gains over cloud-only."""
    gain = latency(0, rate, rtt_s).mean_s - latency(split, rate, rtt_s).mean_s
    return 1 + gain / (rtt_s + CROSSING_S)


_DP = "DynoPipe"


def rows_and_listing() -> tuple[list[Row], Listing]:
    """The QPS x RTT table, and the case at 5 requests per second."""
    lines: list[tuple[str, ...]] = [
        ("requests/s", "RTT", "published", "ours, Poisson", "at the published split", "ours, bursty")
    ]
    same = near = 0
    for (rate, rtt_s), (split, published_s) in PUBLISHED.items():
        best, at_theirs = _best_split(rate, rtt_s, poisson), latency(split, rate, rtt_s).mean_s
        burst = _best_split(rate, rtt_s, bursty)
        same += best[0] == split
        near += abs(best[1] / published_s - 1) <= NEAR
        lines.append(
            (
                f"{rate:g}",
                f"{1e3 * rtt_s:g} ms",
                f"{split}: {1e3 * published_s:.0f} ms",
                f"{best[0]}: {1e3 * best[1]:.0f} ms",
                f"{1e3 * at_theirs:.0f} ms",
                f"{burst[0]}: {1e3 * burst[1]:.0f} ms",
            )
        )
    rows = [
        Row(_DP, "dynopipe_same_split", "cells of 9 with the same best split", same, 9,
            "ours is the balanced cut, 12, everywhere: 96 ms at the edge, 112 ms in the cloud. Theirs varies between "
            "4, 8, 12 and 16 without a rule, in runs of 128 requests"),
        Row(_DP, "dynopipe_near_latency", "cells of 9 with the best latency within 25 %", near, 9),
    ]  # fmt: skip
    alone = {split: sum(service_s(split)) + network_s(split, 0.005) for split in range(33)}
    best_alone = min(alone, key=alone.__getitem__)
    rows.append(
        Row(
            _DP,
            "dynopipe_alone_cloud_ms",
            "one request alone, cloud-only, ms",
            1e3 * alone[0],
            179,
            "with its round trip",
        )
    )
    rows.append(
        Row(_DP, "dynopipe_alone_split_ms", "one request alone, 12 layers at the edge, ms", 1e3 * alone[12], 215)
    )
    rows.append(
        Row(_DP, "dynopipe_alone_best", "one request alone, best number of layers at the edge", best_alone, None)
    )
    for split, published_s in PUBLISHED_AT_5_PER_S.items():
        found = latency(split, 5, 0.005)
        why = f"single runs of 128 requests: {1e3 * found.low_s:.0f} to {1e3 * found.high_s:.0f} ms (5 to 95 %)"
        rows.append(
            Row(_DP, f"dynopipe_5_per_s_{split}_ms", f"5 requests/s, {split} layers at the edge, ms",
                1e3 * found.mean_s, 1e3 * published_s, why)
        )  # fmt: skip
    rows.append(
        Row(_DP, "dynopipe_tokens_to_break_even", "tokens a request may generate before a round trip each eats the "
            "split's gain at 5 requests/s, 5 ms", tokens_to_break_even(5, 0.005), None,
            "their network share is one crossing a request, though decoding crosses once a token")
    )  # fmt: skip
    remark = (
        "Best number of layers at the edge and the mean latency. Tandem queue, deterministic service, runs of 128 "
        "requests from empty queues, mean of 4,000 runs; splits 0, 4, 8, 12, 16 as published; one round trip and 2 ms "
        "per request. Bursty: gaps with a coefficient of variation of 2.5, as they say of their traces; their own "
        "latencies are those of Poisson arrivals."
    )
    return rows, Listing("DynoPipe, best split by load and RTT", remark, tuple(lines))


def _best_split(rate: float, rtt_s: float, arrivals: Arrivals) -> tuple[int, float]:
    found = {split: latency(split, rate, rtt_s, arrivals).mean_s for split in SPLITS}
    best = min(found, key=found.__getitem__)
    return best, found[best]
