"""What a machine has cached, while its partition moves beside a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import torch

from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.shares import Shares
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.partition import Partition

ME = 1


# Dies when model/share.py says `stop = theirs.filled[row]` for `stop = min(theirs.filled[row], known)`.
def test_what_was_drafted_and_not_judged_does_not_go_into_the_share_of_the_next_partition(
    tiny: Callable[[str], Path],
) -> None:
    with Machine(Checkpoint(tiny("llama"))) as machine:
        spec = machine.spec
        alone, divided = Partition.all_on(spec, ME), Partition.shared(spec, {0: 1, ME: 1})
        rows = Rows(spec.head_dim)
        mine = divided.units_on(ME, 0)
        theirs = tuple(unit for unit in range(spec.num_kv_heads) if unit not in mine)

        async def play() -> bytes:
            shares = Shares(machine, "cloud", ME, 20)
            used = await shares.begin(divided, 0)
            for half in range(0, 2 * spec.num_layers, 2):  # five positions of the text, and three of a draft
                await shares.put(divided, half, mine, 0, 8, rows(mine, 8, 1.0))
                await shares.put(alone, half, theirs, 0, 5, rows(theirs, 5, 1.0))  # a move is prepared
            used.cut(5)  # the draft was wrong, and the run goes on
            for half in range(0, 2 * spec.num_layers, 2):
                await shares.put(divided, half, mine, 5, 7, rows(mine, 2, 2.0))
                await shares.put(alone, half, theirs, 5, 7, rows(theirs, 2, 2.0))
            await shares.begin(alone, 7)
            return await shares.rows(0, mine, 0, 7)

        has = torch.frombuffer(bytearray(asyncio.run(play())), dtype=torch.float32).view(2, len(mine), 7, -1)
    assert (has[:, :, :5] == 1.0).all()
    assert (has[:, :, 5:] == 2.0).all()


# Dies when engine/shares.py says `known, None)` for `known, self._next)`.
def test_a_run_begins_with_what_was_filled_for_the_next_partition_while_the_last_run_broke(
    tiny: Callable[[str], Path],
) -> None:
    with Machine(Checkpoint(tiny("llama"))) as machine:
        spec = machine.spec
        alone, divided = Partition.all_on(spec, ME), Partition.shared(spec, {0: 1, ME: 1})
        rows = Rows(spec.head_dim)
        mine, everything = divided.units_on(ME, 0), alone.units_on(ME, 0)

        async def play() -> None:
            shares = Shares(machine, "cloud", ME, 20)
            await shares.begin(divided, 0)
            for half in range(0, 2 * spec.num_layers, 2):  # a prefill breaks off, and a shadow has seen all of it
                await shares.put(divided, half, mine, 0, 3, rows(mine, 3, 1.0))
                await shares.put(alone, half, everything, 0, 8, rows(everything, 8, 1.0))
            assert {filled for _, _, filled in shares.cached} == {8}
            share = await shares.begin(divided, 8)
            assert {filled for _, _, filled in share.held} == {8}

        asyncio.run(play())


class Rows:
    """Keys and values, all of one number."""

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    def __call__(self, units: tuple[int, ...], count: int, value: float) -> memoryview:
        return memoryview(torch.full((2, len(units), count, self._head_dim), value).numpy().tobytes())
