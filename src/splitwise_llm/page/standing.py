"""Who is best at what in a case, and where the judged policy stands. It draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitwise_llm.page.inputs import Contents
from splitwise_llm.records import Cell, Estimate

LEVEL = 0.01
"""Closer than this to the best rival is level with it (scenarios: `within 1 %`)."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The judged policy beside the best of its rivals, for a metric where less is better."""

    scenario: str
    case: str
    metric: str
    best: str
    """Of all but the yardsticks, ours included; empty where nobody has this figure."""
    rival: str
    """The best of the others; empty where there is none."""
    excess: float
    """Ours over the rival's, minus 1; NaN where either is missing."""
    apart: bool
    """The 95 % limits do not overlap."""

    @property
    def verdict(self) -> str:
        """`wins`, `level` (within 1 %), `loses`, or `absent`."""
        if math.isnan(self.excess):
            return "absent"
        return "level" if abs(self.excess) <= LEVEL else "wins" if self.excess < 0 else "loses"


def best(cells: Sequence[Cell], metric: str, sign: int = 1) -> Cell | None:
    """The cell with the least (sign 1) or greatest (-1) figure; None where none has one."""
    able = [cell for cell in cells if _finite(cell, metric)]
    return min(able, key=lambda cell: sign * cell.metrics[metric].value) if able else None


def overlap(one: Estimate, other: Estimate) -> bool:
    """Do the limits overlap? Two figures whose limits do may be equal for all that is known."""
    return one.low <= other.high and other.low <= one.high


def judge(contents: Contents, cells: Sequence[Cell], metric: str) -> Standing:
    """The judged policy in one case (the cells of it, not empty) at one metric where less is better."""
    field = [cell for cell in cells if cell.policy not in contents.yardsticks]
    first = best(field, metric)
    rival = best([cell for cell in field if cell.policy not in contents.ours], metric)
    ours = next((cell for cell in field if cell.policy == contents.ours[0] and _finite(cell, metric)), None)
    excess, apart = math.nan, False
    if ours and rival:
        mine, theirs = ours.metrics[metric], rival.metrics[metric]
        excess = mine.value / theirs.value - 1 if theirs.value else (0.0 if not mine.value else math.inf)
        apart = not overlap(mine, theirs)
    return Standing(
        cells[0].scenario,
        cells[0].case,
        metric,
        first.policy if first else "",
        rival.policy if rival else "",
        excess,
        apart,
    )


def ratios(contents: Contents, cells: Sequence[Cell], metric: str = "mean_s") -> dict[str, float]:
    """Policy -> its figure over the best one's, yardsticks neither counted as best nor left out; at least 1 for all
    others."""
    first = best([cell for cell in cells if cell.policy not in contents.yardsticks], metric)
    if first is None or not first.metrics[metric].value:
        return {}
    least = first.metrics[metric].value
    found = {cell.policy: cell.metrics[metric].value / least for cell in cells if metric in cell.metrics}
    return {policy: ratio for policy, ratio in found.items() if not math.isnan(ratio)}


def _finite(cell: Cell, metric: str) -> bool:
    return metric in cell.metrics and math.isfinite(cell.metrics[metric].value)
