"""A machine's share of one session as its partition moves: the one in use, and the next one, while it is being filled.

Nothing that is cached is lost by preparing a move, nor by giving it up. It does not know who decides, nor what crosses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from splitwise_llm.engine.machine import Machine
from splitwise_llm.errors import ProtocolError
from splitwise_llm.model.share import Share
from splitwise_llm.partition import Partition

Cached = tuple[tuple[int, tuple[int, ...], int], ...]
"""(attention half, units, positions filled)."""


class Shares:
    """Machine `number` of a session of at most `capacity` positions; `release` them in the end."""

    def __init__(self, machine: Machine, name: str, number: int, capacity: int) -> None:
        self._machine, self._name, self._number, self._capacity = machine, name, number, capacity
        self._used: tuple[Partition, Share] | None = None
        self._next: tuple[Partition, Share] | None = None
        self._given_up: list[Share] = []

    @property
    def cached(self) -> Cached:
        """What is cached, in both shares together."""
        filled: dict[tuple[int, int], int] = {}
        for _, share in filter(None, (self._used, self._next)):
            for half, units, positions in share.held:
                for unit in units:
                    filled[half, unit] = max(filled.get((half, unit), 0), positions)
        rows: dict[tuple[int, int], list[int]] = {}
        for (half, unit), positions in sorted(filled.items()):
            rows.setdefault((half, positions), []).append(unit)
        return tuple((half, tuple(units), positions) for (half, positions), units in rows.items())

    def fits(self, partition: Partition) -> bool:
        """Whether the machine has room to go on with a partition, beside what it does now."""
        return self._machine.fits(partition, self._number, self._capacity, owner=self)

    async def prepared(self, partition: Partition, known: int) -> Share:
        """The share for a partition, with what is cached already up to position `known`: the one in use, or the next.
        What lies behind may have been drafted, and the run that goes on rolls back only its own. Raises MemoryTooSmall,
        ModelError."""
        for held in (self._used, self._next):
            if held and held[0] == partition:
                return held[1]
        share = await self._machine.open_share(
            (self, partition), self._name, partition, self._number, self._capacity, owner=self
        )
        try:
            await self._take_over(share, known, self._used, self._next)
        except BaseException:
            self._machine.release((self, partition))
            raise
        if self._next:
            self._machine.release((self, self._next[0]))
            self._given_up.append(self._next[1])  # perhaps it is being filled; nothing is any more when a run begins
        self._next = partition, share
        return share

    async def begin(self, partition: Partition, start: int) -> Share:
        """The share of a run that begins at a position; from now on the one in use. Raises MemoryTooSmall, ModelError,
        and ProtocolError when what it needs is not cached up to there."""
        share = await self.prepared(partition, start)
        if self._next and self._next[1] is share:
            if self._used:
                await self._take_over(share, start, self._used)
                self._let_go(self._used)
            self._used, self._next = self._next, None
        await self._machine.compute(lambda: share.cut(start))
        for half, _, filled in share.held:
            if filled < start:
                raise ProtocolError(f"a run begins at position {start}, and half {half} is cached up to {filled} only")
        return share

    async def filling(self, partition: Partition, start: int, known: int, halves: range) -> Share:
        """The share of a fill up to position `known`: caches of these halves end at a position. Raises as `begin`."""
        share = await self.prepared(partition, known)
        await self._machine.compute(lambda: share.cut(start, halves))
        for half, _, filled in share.held:
            if half in halves and filled < start:
                raise ProtocolError(f"a fill begins at position {start}, and half {half} is cached up to {filled} only")
        return share

    async def cut(self, position: int) -> None:
        """Forget cached positions from here on."""
        held = [one[1] for one in (self._used, self._next) if one]

        def work() -> None:
            for share in held:
                share.cut(position)

        await self._machine.compute(work)

    async def rows(self, half: int, units: Sequence[int], start: int, stop: int) -> bytes:
        """Keys, then values, (units, positions, head_dim) each. Raises ProtocolError for what is not cached."""
        for held in filter(None, (self._used, self._next)):
            if any(h == half and set(units) <= set(mine) and filled >= stop for h, mine, filled in held[1].held):
                take = partial(held[1].rows, half, units, start, stop)
                return (await self._machine.compute(lambda: _packed(*take()))).value  # noqa: B023 - awaited here
        raise ProtocolError(f"keys and values of units {list(units)} of half {half} are not cached up to {stop}")

    async def put(
        self, partition: Partition, half: int, units: Sequence[int], start: int, stop: int, payload: memoryview
    ) -> None:
        """Cache what `rows` gave on another machine, for the next run's partition. Raises ProtocolError."""
        share = await self.prepared(partition, stop)
        await self._machine.compute(lambda: _unpacked(share, half, units, start, stop, payload))

    def release(self) -> None:
        """Forget everything, at once: runs may be remembered for longer than their caches should take room."""
        for held in filter(None, (self._used, self._next)):
            self._let_go(held)
        self._used = self._next = None

    def _let_go(self, held: tuple[Partition, Share]) -> None:
        self._machine.release((self, held[0]))
        for share in (held[1], *self._given_up):
            share.clear()
        self._given_up.clear()

    async def _take_over(self, share: Share, known: int, *others: tuple[Partition, Share] | None) -> None:
        def work() -> None:
            for held in filter(None, others):
                share.take_over(held[1], known)

        await self._machine.compute(work)


def _packed(keys: torch.Tensor, values: torch.Tensor) -> bytes:
    return b"".join(x.cpu().contiguous().view(torch.uint8).numpy().tobytes() for x in (keys, values))


def _unpacked(share: Share, half: int, units: Sequence[int], start: int, stop: int, payload: memoryview) -> None:
    shape = (2, len(units), max(stop - start, 0), share.architecture.spec.head_dim)
    size = math.prod(shape) * share.dtype.itemsize
    if len(payload) != size:
        raise ProtocolError(f"keys and values of shape {shape} take {size} bytes, got {len(payload)}")
    both = torch.frombuffer(bytearray(payload), dtype=share.dtype).view(shape).to(share.device)
    for number, unit in enumerate(units):
        share.put(half, unit, both[0, number], both[1, number], start)
