"""The ceiling where devices share a cloud, against queues whose means are known."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import CLOUD, EDGE, STEADY, table

from splitwise_llm.bench import crowd
from splitwise_llm.bench.crowd import MOST, controlled, done_per_s, mean_s
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.endings import DONE, SHED
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


# Dies when bench/crowd.py says `number >= 0` for `number >= warm_up`.
def test_who_comes_early_does_not_count() -> None:
    assert mean_s(np.arange(20) * 10.0, served(0.5), 0, 7.0, warm_up=5) == pytest.approx(7.0)
    assert mean_s(np.arange(20) * 10.0, served(0.5), 5, 7.0, warm_up=5) == pytest.approx(2.0)


def test_random_arrivals_wait_as_long_as_before_one_server_of_equal_services() -> None:
    """M/D/1 at rho 0.7: 1 + rho / (2 (1 - rho)) services."""
    at = np.cumsum(np.random.default_rng(0).exponential(1 / 0.7, 200_000))
    assert mean_s(at, served(1.0), MOST, 1e6) == pytest.approx(1 + 0.7 / 0.6, rel=0.03)


def served_in_turn() -> Records:
    """One every half second, each 1.9 s: four are there for 0.4 s, and then one is done. Between them others that
    moved, that were at home, and that were shed."""
    setting = Params(Physics([table()]), STEADY, SharedCloud(), Arrivals(per_s=1.0), num_devices=1)
    records = Records.empty(setting, draw(setting, 0, [0], 400))
    records.status[:], records.moves[:], records.first_plan[:] = DONE, 0, CLOUD
    records.arrival_s[0, 0] = np.arange(400) // 4 * 0.5
    records.first_plan[0, 0, 1::4], records.moves[0, 0, 2::4], records.status[0, 0, 3::4] = EDGE, 1, SHED
    records.total_s[0, 0] = np.where(np.arange(400) % 4, 7.0, 1.9)
    return records


# Dies when bench/crowd.py says `(records.moves >= 0)` for `(records.moves == 0)`.
# Dies when bench/crowd.py says `(records.status >= 0)` for `(records.status == DONE)`.
# Dies when bench/crowd.py says `(times >= 0)` for `(times > ended.min())`.
def test_speeds_are_measured_as_requests_were_done() -> None:
    done = done_per_s(served_in_turn(), 4)
    assert done[4] == done[MOST] == pytest.approx(2.5, rel=0.01)
    assert done[0] == 0
    assert done_per_s(served_in_turn(), 8)[4] == pytest.approx(2.0, rel=0.01)  # three or four there


def test_where_nobody_stayed_in_the_cloud_nothing_is_measured() -> None:
    records = served_in_turn()
    records.moves[:] = 1
    assert np.isnan(controlled(records, 4, 3.0, 0.1)).all()


# Dies when bench/crowd.py says `(0,)` for `(0, *tried)`.
# Dies when bench/crowd.py says `(*tried,)` for `(0, *tried)`.
@pytest.mark.parametrize("home_s", [0.1, 20.5])
def test_the_best_number_is_sought(home_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all come at once, those whose turn comes later than they would be done at home go there."""
    monkeypatch.setattr(crowd, "done_per_s", lambda *_: served(1.0))
    records = served_in_turn()
    records.arrival_s[:] = 0.0
    turns = np.minimum(np.arange(1, 401), home_s)
    assert controlled(records, 1, home_s, 0.0)[0] == pytest.approx(turns.mean(), rel=0.01)
