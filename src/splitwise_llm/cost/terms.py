"""Seconds as functions of what changes: link rates and delays, how loaded a machine is, how long it lets one wait.

A *condition* vector holds what changes; an affine *form* is a vector of the same length, its value the inner
product. A `Delay` is a sum of maxima of forms: exact for plans whose stages follow one another, meet at joins, or
overlap in a pipeline. So a plan is compiled once and then priced under any number of conditions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.spec import LinkSpec

Form = NDArray[np.float64]
"""(num_conditions,): coefficients, so that `form @ conditions` is in seconds (or joules, or whatever is priced)."""
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Basis:
    """Which place of a condition vector means what, for machines 0 to `num_machines` - 1 and the links `pairs`.

    | place | meaning |
    | --- | --- |
    | 0 | 1 |
    | per machine: `slow` | its step time over that of the machine alone (1: nobody else) |
    | `share` | `slow` over the sequences in the batch: what one sequence costs the machine |
    | `join` | s, from the arrival of a piece of work until the running iteration ends |
    | `wait` | s, from asking to being admitted |
    | per link: `rtt` | s, there and back |
    | `inverse` | s per byte, each way |
    """

    num_machines: int
    pairs: tuple[Pair, ...]

    @property
    def size(self) -> int:
        return 1 + 4 * self.num_machines + 3 * len(self.pairs)

    def slow(self, machine: int) -> int:
        return 1 + 4 * machine

    def share(self, machine: int) -> int:
        return 2 + 4 * machine

    def join(self, machine: int) -> int:
        return 3 + 4 * machine

    def wait(self, machine: int) -> int:
        return 4 + 4 * machine

    def _pair(self, a: int, b: int) -> int:
        return 1 + 4 * self.num_machines + 3 * self.pairs.index((min(a, b), max(a, b)))

    def rtt(self, a: int, b: int) -> int:
        return self._pair(a, b)

    def inverse(self, src: int, dst: int) -> int:
        return self._pair(src, dst) + (1 if src < dst else 2)

    def form(self, coefficients: Mapping[int, float]) -> Form:
        """A form from places and coefficients."""
        form = np.zeros(self.size)
        for place, value in coefficients.items():
            form[place] += value
        return form

    def conditions(self, links: Mapping[Pair, LinkSpec], loads: Mapping[int, Load] | None = None) -> Form:
        """The conditions of links and machines that stay as they are; a machine without a load is idle."""
        x = np.zeros(self.size)
        x[0] = 1.0
        for machine in range(self.num_machines):
            load = (loads or {}).get(machine, IDLE)
            x[self.slow(machine) : self.slow(machine) + 4] = (
                load.slow,
                load.slow / load.batch,
                load.join_s,
                load.wait_s,
            )
        for pair, link in links.items():
            place = self._pair(*pair)
            x[place : place + 3] = (link.rtt_s, 1 / link.up_bytes_per_s, 1 / link.down_bytes_per_s)
        return x


@dataclass(frozen=True, slots=True)
class Load:
    """What others make of a machine: `slow` and `join_s` as in `Basis`, the sequences in its batch, the admission
    wait (s)."""

    slow: float = 1.0
    batch: float = 1.0
    join_s: float = 0.0
    wait_s: float = 0.0


IDLE = Load()


class Delay:
    """A sum over groups of the largest of each group's forms: `sum_g max_j forms[g][j] @ conditions`."""

    __slots__ = ("groups",)

    def __init__(self, groups: Iterable[NDArray[np.float64]]) -> None:
        """Each group is (forms, num_conditions); equal groups and groups of one form are joined."""
        single: NDArray[np.float64] | None = None
        counted: dict[bytes, tuple[NDArray[np.float64], int]] = {}
        for group in groups:
            if len(group) == 1:
                single = group if single is None else single + group
            else:
                key = group.tobytes()
                kept, number = counted.get(key, (group, 0))
                counted[key] = (kept, number + 1)
        joined = [group * number for group, number in counted.values()]
        self.groups = tuple(joined if single is None else [single, *joined])

    @classmethod
    def of(cls, forms: Sequence[Form]) -> Delay:
        """The largest of some forms; one that can never be largest is dropped."""
        kept = list(forms)
        for form in forms:  # conditions are never negative, so a form below another in every place is never largest
            if any(other is not form and (other >= form).all() and (other > form).any() for other in kept):
                kept = [other for other in kept if other is not form]
        unique = {form.tobytes(): form for form in kept}
        return cls([np.stack(list(unique.values()))])

    def __add__(self, other: Delay) -> Delay:
        return Delay((*self.groups, *other.groups))

    def times(self, factor: float) -> Delay:
        """Scaled by a factor of at least 0."""
        return Delay(group * factor for group in self.groups)

    def at(self, conditions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds under conditions (..., num_conditions) -> (...)."""
        total = np.zeros(conditions.shape[:-1])
        for group in self.groups:
            total = total + (conditions @ group.T).max(axis=-1)
        return total


NOTHING = Delay(())
