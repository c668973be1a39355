"""What workers are told of the text when a run ends before its time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.halting import Halting
from splitwise_llm.errors import LinkDied
from splitwise_llm.plan import DEVICE
from splitwise_llm.wire.messages import Halt, Header


class Nothing:
    """Stands for what only has to be there."""

    def close(self, run: int) -> None: ...

    async def settle(self) -> None: ...


# Dies when engine/halting.py says `return -1` for `return run.certain if is_ahead and not tells else -1`.
# Dies when engine/halting.py says `bool(run.post.plan.decision.draft)` for
# `bool(run.post.plan.decision.draft) or (at_once and run.loop_machine != DEVICE)`.
@pytest.mark.parametrize(("loop", "keep"), [(DEVICE, -1), (1, 7), (2, 7)], ids=["here", "there", "at another worker"])
def test_a_token_loop_that_is_abandoned_is_told_how_far_the_text_goes(loop: int, keep: int) -> None:
    """It may have made tokens that nobody takes any more; one that runs here is ahead of every worker."""
    told: list[Halt] = []

    class Worker:
        is_up = True

        async def ask(self, header: Header, kind: type[Header], run: int = 0) -> tuple[Header, memoryview]:
            assert isinstance(header, Halt)
            told.append(header)
            return header, memoryview(b"")

        def expect(self, step_s: float | None) -> None: ...

    plan = SimpleNamespace(decision=SimpleNamespace(draft=0))
    run: Any = SimpleNamespace(
        workers=(1,), halted={}, certain=7, loop_machine=loop, post=SimpleNamespace(plan=plan),
        extent=SimpleNamespace(run=3), ended="",
    )  # fmt: skip
    anything: Any = Nothing()
    workers: Any = {1: Worker()}
    halting = Halting(
        anything, RecoveryRules(), workers, anything, anything, anything, anything, lambda *_: None
    )  # fmt: skip
    asyncio.run(halting.abandon(run, LinkDied("somebody else was lost")))
    assert told == [Halt(3, at_once=True, keep=keep)]
