"""Keys and values that are carried are those that were asked for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from physics.examples import SMALL
from splitwise_llm.decision import Decision
from splitwise_llm.engine.filling import Filling
from splitwise_llm.errors import WorkerFailed
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.rebuild import Carry
from splitwise_llm.wire.messages import Fetch, Header, Rows


# Dies when engine/filling.py says `not isinstance(found, Rows) or not found.units:` for
# `not isinstance(found, Rows) or (found.units, found.start, found.stop) != asked:`.
@pytest.mark.parametrize(
    ("said", "is_taken"),
    [
        (Rows(0, [0, 1], 0, 4), True),
        (Rows(0, [], 0, 4), False),
        (Rows(0, [1, 2], 0, 4), False),
        (Rows(0, [0, 1], 1, 5), False),
    ],
    ids=["as asked", "not there", "other units", "other positions"],
)
def test_rows_that_answer_an_earlier_question_are_not_put_for_others(said: Rows, is_taken: bool) -> None:
    """A move that is given up leaves its question behind; the answer comes when the next one waits for its own."""
    put: list[tuple[object, ...]] = []

    class Worker:
        async def ask(self, header: Header, kind: type[Header], run: int = 0) -> tuple[Header, memoryview]:
            return (said if isinstance(header, Fetch) else header), memoryview(bytes(8))

    class Shares:
        async def put(self, *what: object) -> None:
            put.append(what)

    anything: Any = SimpleNamespace(decisions=[])
    filling = Filling(
        anything, ("edge", "cloud"), anything, anything, anything, {1: Worker()}, anything, Shares(),  # type: ignore[arg-type, dict-item]
        anything, anything, lambda *_: None,
    )  # fmt: skip
    carry = Carry(1, DEVICE, ((0, (0, 1)),), 0, 4)
    carrying = filling._carry(carry, Decision(Partition.all_on(SMALL, DEVICE)))
    if is_taken:
        asyncio.run(carrying)
    else:
        with pytest.raises(WorkerFailed, match="did not give"):
            asyncio.run(carrying)
    assert bool(put) == is_taken
