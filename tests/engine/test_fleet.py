"""120 devices after one outage: the door of the worker is never stormed, and all come back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.bench.fleet import NoJitter, Outage, Told, peak_per_s, reconnect
from splitwise_llm.engine.backoff import RecoveryRules

RULES = RecoveryRules()


@pytest.mark.parametrize("refused", [True, False], ids=["dead-worker", "dead-network"])
@pytest.mark.parametrize("outage_s", [0.5, 1.0, 2.0, 3.5, 10.0, 60.0])
def test_a_fleet_reconnects_at_no_more_than_twice_what_the_worker_accepts_and_all_finish(
    outage_s: float, refused: bool
) -> None:
    back = reconnect(Outage(outage_s, refused), RULES)
    assert back.finished == back.outage.devices == 120
    assert back.peak_over_accepted <= 2
    assert back.last_s <= RULES.cap_s + 1


@settings(max_examples=12)
@given(outage_s=st.floats(0.5, 60.0), refused=st.booleans(), seed=st.integers(0, 2**20), step_s=st.floats(0.02, 1.0))
def test_so_it_is_after_any_outage(outage_s: float, refused: bool, seed: int, step_s: float) -> None:
    back = reconnect(Outage(outage_s, refused, seed=seed, step_s=step_s), RULES)
    assert back.finished == 120
    assert back.peak_over_accepted <= 2


@pytest.mark.parametrize("refused", [True, False])
def test_without_jitter_or_without_news_of_the_others_the_worker_is_stormed(refused: bool) -> None:
    outage = Outage(2.0, refused)
    assert reconnect(outage, RULES, NoJitter).peak_over_accepted > 2
    assert reconnect(replace(outage, told=Told.NONE), RULES).peak_over_accepted > 2


def test_a_worker_slower_than_believed_sends_devices_away_with_a_moment_each_and_all_finish() -> None:
    outage = Outage(2.0, False, accepts_per_s=10, queue=10)
    back = reconnect(outage, RULES)
    assert back.refusals > 0
    assert back.finished == 120
    assert back.last_s <= 120 / outage.accepts_per_s * 2.5
    assert back.dials + 0.0 < 120 * 5, "refused devices come back when told, not again and again"


def test_a_link_that_is_silent_for_less_than_its_limit_is_not_dialled_again() -> None:
    back = reconnect(Outage(0.4, refused=False), RULES)
    assert (back.dials, back.finished, back.last_s) == (0, 120, 0.0)


def test_the_same_seed_gives_the_same_fleet() -> None:
    outage = Outage(3.0, True, seed=7)
    assert reconnect(outage, RULES) == reconnect(outage, RULES)
    assert reconnect(outage, RULES) != reconnect(replace(outage, seed=8), RULES)


@given(st.lists(st.floats(0, 10), max_size=60))
def test_a_peak_is_the_fullest_window_of_a_second(times_s: list[float]) -> None:
    brute = max((sum(start <= t < start + 1 for t in times_s) for start in times_s), default=0)
    # t < start + 1 and t - start < 1 differ in the last bit
    assert abs(peak_per_s(times_s) - brute) <= sum(1 for t in times_s for s in times_s if abs(t - s - 1) < 1e-9)


def test_without_jitter_every_draw_is_the_longest() -> None:
    assert isinstance(NoJitter(1), random.Random)
    assert RULES.delay_s(2, 0.0, NoJitter(1).random()) == RULES.longest_delay_s(2)
