"""The ceiling where devices share a cloud, against queues whose means are known."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import CLOUD, EDGE, STEADY, table

from splitwise_llm.bench.crowd import MOST, done_per_s, mean_s
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import Records
from splitwise_llm.sim.params import Arrivals, Params, SharedCloud
from splitwise_llm.sim.physics import Physics


def served(per_s: float, at_once: int = 1) -> np.ndarray:
    return per_s * np.minimum(np.arange(MOST + 1), at_once)


def test_whoever_comes_alone_takes_as_long_as_one_does() -> None:
    assert mean_s(np.arange(20) * 10.0, served(0.5), 5, 100.0) == pytest.approx(2.0)


def test_requests_that_all_come_at_once_are_served_one_after_another() -> None:
    """1, 2, 3, ... seconds; two at a time half of that, but for the last one; and a third takes the seconds of home."""
    assert mean_s(np.zeros(9), served(1.0), 9, 100.0) == pytest.approx(5.0)
    assert mean_s(np.zeros(8), served(1.0, at_once=2), 8, 100.0) == pytest.approx((14 + 4.5) / 8)
    assert mean_s(np.zeros(9), served(1.0), 6, 100.0) == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 + 300) / 9)


def test_who_comes_early_does_not_count() -> None:
    """Dies when crowd.py says `number >= 0` for `number >= warm_up`."""
    assert mean_s(np.arange(20) * 10.0, served(0.5), 0, 7.0, warm_up=5) == pytest.approx(7.0)
    assert mean_s(np.arange(20) * 10.0, served(0.5), 5, 7.0, warm_up=5) == pytest.approx(2.0)


def test_random_arrivals_wait_as_long_as_before_one_server_of_equal_services() -> None:
    """M/D/1 at rho 0.7: 1 + rho / (2 (1 - rho)) services."""
    at = np.cumsum(np.random.default_rng(0).exponential(1 / 0.7, 200_000))
    assert mean_s(at, served(1.0), MOST, 1e6) == pytest.approx(1 + 0.7 / 0.6, rel=0.03)


def test_speeds_are_measured_as_requests_were_done() -> None:
    """One every half second, each 1.9 s: four are there for 0.4 s, and then one is done. What moved, and what was at
    home, does not count. Dies when crowd.py says `(records.moves >= 0)` for `(records.moves == 0)`."""
    setting = Params(Physics([table()]), STEADY, SharedCloud(), Arrivals(per_s=1.0), num_devices=1)
    records = Records.empty(setting, draw(setting, 0, [0], 300))
    records.arrival_s[0, 0] = np.arange(300) // 3 * 0.5
    records.total_s[0, 0], records.first_plan[:], records.moves[:] = 1.9, CLOUD, 0
    records.first_plan[0, 0, 1::3], records.moves[0, 0, 2::3] = EDGE, 1
    records.total_s[0, 0, 1::3] = records.total_s[0, 0, 2::3] = 7.0
    done = done_per_s(records, 4)
    assert done[4] == done[MOST] == pytest.approx(2.5, rel=0.05)
    assert done[0] == 0
