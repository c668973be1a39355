"""What became of every request under one policy, kept so that policies can be paired without simulating again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.records import Estimate
from splitwise_llm.sim.episode import Records

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 400
DIGITS = 9
"""Of every figure that is kept."""


def resampled(figure: Callable[[Ints], float], traces: int) -> Estimate:
    """A figure of all traces and its 95 % limits over traces drawn again with replacement; `figure` is given their
    numbers. The draws are the same for every policy."""
    dice = np.random.Generator(np.random.Philox(7))
    values = [figure(dice.integers(0, traces, traces)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(values, (0.025, 0.975))
    return Estimate(float(figure(np.arange(traces))), float(low), float(high))


def ratio(above: Floats, below: Floats) -> Estimate:
    """Mean over mean, trace by trace paired."""
    return resampled(lambda at: float(np.nanmean(above[at]) / np.nanmean(below[at])), len(above))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Arrays (traces, requests); NaN where a request does not count (warm-up) or has no such figure."""

    total_s: Floats
    device_j: Floats
    total_j: Floats
    nats: Floats

    @classmethod
    def of(cls, records: Records, warm_up: float) -> Outcome:
        counted = records.counted(warm_up)
        return cls(*(_flat(getattr(records, item.name), counted) for item in fields(cls)))

    @classmethod
    def of_seconds(cls, total_s: Floats, counted: NDArray[np.bool_]) -> Outcome:
        """Of a bound, (traces, devices, requests), which has no joules."""
        nothing = np.full(total_s.shape, np.nan)
        return cls(_flat(total_s, counted), *(_flat(nothing, counted) for _ in range(3)))

    def mean(self, name: str = "total_s") -> Floats:
        """(traces,)"""
        values: Floats = getattr(self, name)
        some = np.isfinite(values)
        total: Floats = np.where(some, values, 0.0).sum(axis=1) / np.where(some.any(axis=1), some.sum(axis=1), np.nan)
        return total

    def quantile(self, share: float, at: Ints | None = None) -> float:
        """Of the latencies of all requests of some traces."""
        pool = (self.total_s if at is None else self.total_s[at]).ravel()
        return float(np.quantile(pool[np.isfinite(pool)], share))

    def to_dict(self) -> dict[str, list[list[float]]]:
        return {
            name: [[float(f"{value:.{DIGITS}g}") for value in row] for row in values.tolist()]
            for name, values in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: dict[str, list[list[float]]]) -> Outcome:
        return cls(*(np.array(data[item.name]) for item in fields(cls)))


def _flat(values: Floats, counted: NDArray[np.bool_]) -> Floats:
    flat: Floats = np.where(counted, values, np.nan).reshape(len(values), -1)
    return flat


METRICS = ("mean_s", "p95_s", "device_j", "total_j")


def figure_of(outcome: Outcome, metric: str) -> Callable[[Ints], float]:
    """One of METRICS, of some of the traces."""
    if metric == "p95_s":
        return lambda at: outcome.quantile(0.95, at)
    means = outcome.mean("total_s" if metric == "mean_s" else metric)
    return lambda at: float(np.nanmean(means[at]))


def compared(above: Outcome, below: Outcome, metric: str) -> Estimate:
    """A figure of one over the same of the other, paired by trace."""
    one, other = figure_of(above, metric), figure_of(below, metric)
    return resampled(lambda at: one(at) / other(at), len(above.total_s))


def together(pairs: Sequence[tuple[Outcome, Outcome]], metric: str) -> Estimate:
    """The geometric mean of such ratios over cases that have equally many traces."""
    figures = [(figure_of(above, metric), figure_of(below, metric)) for above, below in pairs]
    traces = min(len(above.total_s) for above, _ in pairs)
    return resampled(lambda at: float(np.exp(np.mean([np.log(one(at) / other(at)) for one, other in figures]))), traces)


__all__ = ["METRICS", "Outcome", "compared", "figure_of", "ratio", "resampled", "together"]
