"""What a worker made meanwhile is taken, refused or left alone, by nothing but the ids."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.engine.background import Background
from splitwise_llm.engine.meanwhile import Meanwhile, parting
from splitwise_llm.wire.messages import Away, Halt

WORDS = 3
ids = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=6)


@given(mine=ids, start=st.integers(0, 7), theirs=st.lists(st.integers(0, WORDS), min_size=1, max_size=6))
def test_texts_part_at_the_first_position_where_they_differ(mine: list[int], start: int, theirs: list[int]) -> None:
    at = parting(mine, Away(1, start, theirs), WORDS)
    here, there = dict(enumerate(mine)), dict(enumerate(theirs, start))
    differs = [position for position in here if position in there and here[position] != there[position]]
    if differs:
        assert at == min(differs)
    elif start > len(mine) or WORDS in theirs:
        assert at == len(mine), "it is no text: nothing of it is taken"
    else:
        assert at is None


def _heard(away: Away, mine: list[int], room: int) -> tuple[bool, int | None, list[int], list[Halt], list[int]]:
    """Whether it was news, whose tokens were taken, the ids then, what the worker was told, and what two runs have
    made."""
    told: list[Halt] = []

    class Text:
        def __init__(self) -> None:
            self.ids = list(mine)

        @property
        def count(self) -> int:
            return len(self.ids) - len(mine)

        @property
        def is_over(self) -> bool:
            return self.count == room

        def add(self, token: int) -> None:
            self.ids.append(token)

    class Run:
        def __init__(self, number: int) -> None:
            self.extent, self.late = SimpleNamespace(run=number), 0

        def made_late(self, count: int) -> None:
            self.late += count

    class Worker:
        is_open = True

        async def ask(self, header: Halt, *_: object) -> None:
            told.append(header)

    def tell(kind: str, text: str) -> None: ...

    text: Any = Text()
    runs: Any = [Run(1), Run(2)]
    peers: Any = {1: Worker()}
    late = Meanwhile(("edge", "cloud"), WORDS, peers, text, Background(tell), runs, tell)
    is_news = late.hear(1, away)
    taken = asyncio.run(late.take())
    assert not late.said
    return is_news, taken, text.ids, told, [run.late for run in runs]


# Dies when engine/meanwhile.py says `if one is self.runs[-1]:` for `if one.extent.run == run:`.
def test_what_goes_on_from_the_text_is_taken_and_is_of_the_run_that_made_it() -> None:
    assert _heard(Away(1, 2, [2, 1, 0]), [0, 1, 2], 9) == (True, 1, [0, 1, 2, 1, 0], [], [2, 0])
    assert _heard(Away(1, 2, [2, 1, 0]), [0, 1, 2], 1) == (True, 1, [0, 1, 2, 1], [], [1, 0]), "no more than is wanted"


# Dies when engine/meanwhile.py says `is_news = True` for
# `is_news = parting(self.text.ids, away, self.vocab_size) is not None or bool(self._late(away))`.
def test_what_the_text_has_already_is_no_news() -> None:
    """A run would end for it, though there is nothing to take."""
    assert _heard(Away(1, 1, [1, 2]), [0, 1, 2, 0], 9) == (False, None, [0, 1, 2, 0], [], [0, 0])


def test_another_text_is_refused() -> None:
    assert _heard(Away(1, 1, [1, 0]), [0, 1, 2, 0], 9) == (True, None, [0, 1, 2, 0], [Halt(1, keep=2)], [0, 0])
