"""What the device keeps at hand so as to go on alone at once: caches that follow the run, and weights.

It does not know when that is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from splitwise_llm.decision import Decision
from splitwise_llm.engine.filling import Filling
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.moving import FILL_CHUNK, Moving
from splitwise_llm.engine.shares import Shares
from splitwise_llm.errors import SplitwiseError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

SHADOW_TOKENS = 4
"""A shadow follows in steps of so many tokens: one pass over the weights for all of them."""
READY_AFTER_S = 1.0
"""Short answers are over before it pays to load for a fault."""


@dataclass(slots=True)
class Standby:
    """The device, ready to take over one session."""

    machine: Machine
    journal: Journal
    shares: Shares
    filling: Filling
    moving: Moving
    tell: Callable[[str, str], None]

    async def shadow(self) -> None:
        """Keep the device's caches of everything close behind, so that it can go on alone at once."""
        while True:
            known = len(self.journal.ids)
            if self.moving.may_move and self.moving.decision.shadow:
                alone = Decision(Partition.all_on(self.machine.spec, DEVICE), self.moving.decision.wire, FILL_CHUNK)
                if alone.partition == self.moving.decision.partition:
                    return
                try:
                    await self.filling.fill_beside(alone, self.moving.decision.partition)
                except SplitwiseError as error:
                    self.tell("shadow", f"no shadow is kept: {error}")
                    return
            while len(self.journal.ids) < known + SHADOW_TOKENS:
                self.moving.halting.came.clear()
                await self.moving.halting.came.wait()

    async def ready(self) -> None:
        """Have the weights at hand with which the device could go on alone, if it can hold them."""
        alone = Partition.all_on(self.machine.spec, DEVICE)
        await asyncio.sleep(READY_AFTER_S)
        if alone != self.moving.decision.partition and self.shares.fits(alone):
            with suppress(SplitwiseError):  # then it will load when it has to, or say why it cannot
                await self.machine.keep_ready(alone, DEVICE)
