"""The best of all plans of at most three runs of layers, priced one and all: what a learner is measured by."""

from __future__ import annotations

from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.policies.proposer import Spans
from splitwise_llm.policies.runs import Sheet

Ints = NDArray[np.int64]


TOO_MANY = 60_000
"""Plans of three runs that are priced in less than about a second."""


def is_quick(sheet: Sheet) -> bool:
    """Whether there are few enough plans of three runs."""
    return sheet.num_seats * (sheet.num_seats - 1) ** 2 * sheet.num_layers**2 / 2 <= TOO_MANY


def best_of_few_runs(sheet: Sheet, most: int = 3) -> tuple[float, Spans | None]:
    """The least value and a sequence that has it; (inf, None) where nothing is admissible.

    Seats that share layers stand in plans of at most two runs, or between two others; all else is tried.
    """
    best: tuple[float, Spans | None] = (np.inf, None)
    layers = sheet.num_layers
    for number in range(1, most + 1):
        cuts = np.array([(*cut, layers) for cut in combinations(range(1, layers), number - 1)])
        for seats in product(range(sheet.num_seats), repeat=number):
            if any(a == b for a, b in pairwise(seats)) or _shares_too_much(sheet, seats):
                continue
            ends = cuts[sheet.keeps(seats, cuts)]
            if not len(ends):
                continue
            for pair in sheet.ends(sheet.seats[seats[0]], sheet.seats[seats[-1]]):
                values = sheet.values_of(seats, ends, *pair)
                at = int(values.argmin())
                if values[at] < best[0]:
                    best = float(values[at]), tuple(zip(seats, ends[at].tolist(), strict=True))
    return best


def _shares_too_much(sheet: Sheet, seats: tuple[int, ...]) -> bool:
    shared = [len(sheet.seats[seat].machines) > 1 for seat in seats]
    return len(seats) > 2 and (shared[0] or shared[-1])
