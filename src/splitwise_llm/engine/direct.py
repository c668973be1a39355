"""Links between two workers: who opens each, at which address, and which of them could not be opened lately.

It opens nothing: a worker dials, and says when nobody answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

Pair = tuple[int, int]
"""The first dials the second."""
RELAYED_S = 60.0
"""A way that led nowhere is not tried again for so long; what passes between the two goes through the device."""


class DirectLinks:
    """What all generations of a device know of them. `addresses` says for a pair where the first reaches the second;
    `turned`, where the second would reach the first, if that is known: of two workers often only one can be dialled.
    """

    def __init__(
        self,
        addresses: Mapping[Pair, str] = {},
        turned: Mapping[Pair, str] = {},
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ways = {
            pair: {pair: address} | ({pair[::-1]: turned[pair[::-1]]} if pair[::-1] in turned else {})
            for pair, address in addresses.items()
        }
        self._failed: dict[Pair, float] = {}
        """When each way was last tried in vain."""
        self._clock = clock

    def __iter__(self) -> Iterator[Pair]:
        """The pairs as they were given, open or not."""
        return iter(self._ways)

    @property
    def pairs(self) -> frozenset[Pair]:
        """Those that can be used now, lower number first."""
        everywhere = {machine for pair in self._ways for machine in pair}
        return frozenset((min(pair), max(pair)) for pair in self.among(everywhere))

    def among(self, machines: Iterable[int]) -> dict[Pair, str]:
        """For links between some machines, who dials whom, and where; none for a pair without a way."""
        there, found = set(machines), dict[Pair, str]()
        for pair, ways in self._ways.items():
            left = [way for way in ways if not self._is_failed(way)]
            if left and set(pair) <= there:
                found[left[0]] = ways[left[0]]
        return found

    def _is_failed(self, way: Pair) -> bool:
        return way in self._failed and self._clock() - self._failed[way] < RELAYED_S

    def failed(self, way: Pair) -> Pair | None:
        """A way led nowhere; the one that is left between these two, if any."""
        self._failed[way] = self._clock()
        return next(iter(self.among(way)), None)
