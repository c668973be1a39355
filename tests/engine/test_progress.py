"""A prompt of several chunks says how far it has come."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.cli.generate import prefill_bar
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Partition


# Dies when engine/walk.py says `if self.on_chunk:` for `if self.on_chunk and not one.step.emits:`.
@pytest.mark.parametrize("text", ["all:edge", "edge[0:2] cloud[2:4]", "edge[0:1] cloud[1:3] edge[3:4]"])
def test_each_chunk_but_the_last_is_told_in_order(text: str, tiny: Callable[[str], Path]) -> None:
    told: list[tuple[int, int]] = []

    async def run() -> None:
        async with in_process(tiny("llama")) as edge:
            decision = Decision(Partition.parse(text, edge.machine.spec, ("edge", "cloud")), prefill_chunk=4)
            generation = edge.generate(list(range(1, 15)), decision, max_new_tokens=2, stop_ids=())
            generation.on_progress = lambda done, total: told.append((done, total))
            async with generation:
                async for _ in generation:
                    pass

    asyncio.run(run())
    assert told == [(4, 14), (8, 14), (12, 14)]


def test_the_bar_shows_on_a_terminal_only() -> None:
    for is_terminal in (True, False):
        shown = io.StringIO()
        generation = SimpleNamespace(on_progress=None)
        console = Console(file=shown, force_terminal=is_terminal, width=80)
        with prefill_bar(generation, console):  # type: ignore[arg-type]
            if generation.on_progress:
                generation.on_progress(256, 1000)
        assert ("256/1000" in shown.getvalue().replace(" ", "")) == is_terminal
        assert generation.on_progress is None
