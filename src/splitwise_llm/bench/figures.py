"""What a bench reports: short names with numbers, and how sure they are."""

from __future__ import annotations

import os
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Figures:
    """The result of one bench; `to_dict` is what `--json` writes."""

    bench: str
    settings: dict[str, object] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float, note: str = "") -> None:
        """One figure that has no spread."""
        self.figures[name] = value
        if note:
            self.notes[name] = note

    def add_median(self, name: str, values: Sequence[float], note: str = "") -> None:
        """The median of repeated measurements and its interval."""
        low, high = median_interval(values)
        self.figures[name], self.intervals[name] = statistics.median(values), (low, high)
        self.notes[name] = f"{low:.4g} to {high:.4g}, {len(values)} runs" + (f"; {note}" if note else "")

    def to_dict(self) -> dict[str, object]:
        return {
            "bench": self.bench,
            "figures": self.figures,
            "intervals": self.intervals,
            "settings": {**self.settings, "load_average": os.getloadavg(), "cpus": os.cpu_count()},
        }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval of order statistics that holds the median with at least 95 % (nine values: the second and the
    eighth; below six: all of them)."""
    ordered, count = sorted(values), len(values)
    tail, probability = 0, 0.5**count
    while 2 * (probability + _binomial(count, tail + 1)) <= 0.05:
        tail += 1
        probability += _binomial(count, tail)
    return ordered[tail], ordered[count - 1 - tail]


def _binomial(count: int, successes: int) -> float:
    result = 0.5**count
    for n in range(successes):
        result *= (count - n) / (n + 1)
    return result


async def interleaved(
    runs: Mapping[str, Callable[[], Awaitable[float]]], rounds: int, tell: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure every run once per round, forwards and backwards in turn, after one round that is thrown away; so
    a machine whose speed drifts treats all alike."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        order = list(runs) if number % 2 else list(runs)[::-1]
        for name in order:
            value = await runs[name]()
            if number:
                measured[name].append(value)
        tell(f"round {number} of {rounds}" + (" (warm-up)" if not number else ""))
    return measured


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [a / b for a, b in zip(above, below, strict=True)]
