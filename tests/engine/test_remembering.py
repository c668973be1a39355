"""What a device remembers between requests means what the simulator's memory of the same means."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.test_policies_live import FAST, SLOW, Stubborn, lab
from splitwise_llm.engine.remembering import SLOTS, Epoch, Memory
from splitwise_llm.observation import EPOCHS, Observation


def test_stretches_are_counted_as_the_simulator_counts_them() -> None:
    """Up for 10 s, away for 4, up for 20: the first stretch counts, the one that is not over does not."""
    # Dies when engine/remembering.py says `(self.outages if is_down` for `(self.gaps if is_down`.
    memory = Memory()
    for at_s, is_up in ((100.0, True), (105.0, True), (110.0, False), (112.0, False), (114.0, True), (134.0, True)):
        memory.saw("a", at_s, is_up=is_up)
    past = memory.past("a", 134.0, 0.5)
    assert past.outages.tolist() == [[1.0, 4.0, 16.0]]
    assert past.gaps.tolist() == [[1.0, 10.0, 100.0]]
    assert (past.is_down.tolist(), past.since_s.tolist(), past.age_s.tolist()) == ([False], [20.0], [0.5])


def test_a_link_is_down_while_any_session_has_lost_its_worker() -> None:
    """Another session's old good news is no news of this one's link."""
    memory = Memory()
    memory.saw("a", 0.0, is_up=True)
    memory.saw("b", 1.0, is_up=True)
    memory.saw("a", 5.0, is_up=False)
    memory.saw("b", 6.0, is_up=True)
    assert memory.is_down
    memory.left("a", 7)
    assert memory.is_down, "who has gone has not seen it come back"
    memory.saw("b", 9.0, is_up=True)
    assert not memory.is_down
    past = memory.past("b", 9.0, 0.0)
    assert past.outages.tolist() == [[1.0, 4.0, 16.0]]
    assert past.answers.tolist() == [[1.0, 7.0, 49.0]]


@given(st.lists(st.floats(0.01, 100.0), max_size=3 * EPOCHS))
def test_the_latest_epochs_stand_first_and_the_oldest_go(steps: list[float]) -> None:
    memory, now_s = Memory(), 0.0
    for number, step_s in enumerate(steps):
        now_s += step_s
        memory.decided(Epoch(now_s, True, 0.05, 1e6, 2e6, 1.0 + number, 0.0))
    epochs = memory.past("a", now_s, 0.0).epochs[0]
    kept = min(len(steps), EPOCHS)
    assert epochs[:kept, 5].tolist() == [1.0 + n for n in reversed(range(len(steps)))][:kept]
    assert not epochs[kept:].any()
    assert (np.diff(epochs[:kept, 0]) >= 0).all()
    assert kept == 0 or epochs[0, 0] == 0.0


def test_who_has_just_begun_remembers_nothing_but_that_it_is_there() -> None:
    past = Memory().past("a", 5.0, 0.0)
    assert not past.epochs.any()
    assert not past.is_down[0]
    assert (past.slots.tolist(), past.others.tolist()) == ([float(SLOTS)], [[0.0, 0.0]])


def test_an_edge_remembers_from_one_request_to_the_next() -> None:
    """The first observation has an empty past; the next request's has the first one's epoch and answer."""

    # Dies when engine/generation.py says `None if self.is_complete` for `self._text.count if self.is_complete`.
    async def play() -> tuple[Observation, Observation]:
        async with lab(SLOW, FAST) as one:
            first = await one.observe()
            _, again, _ = await one.run(Stubborn("all:edge"), tokens=3)
            return first, again

    first, again = asyncio.run(play())
    assert first.past is not None
    assert again.past is not None
    assert not first.past.epochs.any()
    epoch = again.past.epochs[0, 0]
    assert (epoch[1], epoch[5]) == (1.0, 1.0)
    assert epoch[3] == pytest.approx(first.world.links[0, 1].up_bytes_per_s if first.world else 0.0)
    assert again.past.answers.tolist() == [[1.0, 1.0, 1.0]]
    assert again.past.age_s[0] == 0.0
    assert again.past.others.tolist() == [[0.0, 0.0]]


def test_an_edge_that_never_met_its_worker_remembers_an_outage() -> None:
    async def play() -> Observation:
        async with lab(reachable=False) as one:
            return await one.observe()

    seen = asyncio.run(play())
    assert seen.past is not None
    assert seen.past.is_down[0]
