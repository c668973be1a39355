"""Constants asked about one session: as the high level that turns the same knobs, and drift plus penalty where it is
neutral or has no table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from test_in_flight import THREE, TWO, WAN, flying
from test_one_session import admitted, wanting

from splitwise_llm.errors import ModelError
from splitwise_llm.observation import Observation
from splitwise_llm.policies import find_policy, one_session
from splitwise_llm.policies.knobs import Constants
from splitwise_llm.policies.tuned import Tuned

DEAR = Tuned(own=Constants(cloud=4.0))


@pytest.fixture(autouse=True)
def few_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_session, "RATES", (1.0,))
    monkeypatch.setattr(one_session, "TRIPS", (1.0,))


def far(trip_s: float) -> Observation:
    return admitted(replace(TWO, links={(0, 1): replace(WAN, rtt_s=trip_s)}))


# Dies when policies/tuned.py says `Constants().knobs(1)` for `constants.knobs(1)`.
def test_a_dear_cloud_is_left_where_the_high_level_would_leave_it_and_drift_stays() -> None:
    knobs, drift, differ = wanting(cloud=4.0), find_policy("drift"), 0
    for trip_s in np.geomspace(1.5, 4, 12).tolist():
        seen = far(trip_s)
        decided = DEAR.decide(seen)
        assert decided == knobs.decide(seen)
        differ += decided != drift.decide(seen)
    assert 0 < differ < 12


def test_patience_goes_with_the_decision() -> None:
    assert Tuned(own=Constants(patience=2.0)).decide(far(0.1)).patience == 2.0


# Dies when policies/tuned.py says `if True:` for `if constants != Constants():`.
def test_neutral_constants_ask_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_session.Shelf, "plans", lambda *_: pytest.fail("no table is needed"))
    assert Tuned(own=Constants()).decide(far(0.1)) == find_policy("drift").decide(far(0.1))


def test_more_workers_than_a_table_knows_are_left_to_drift() -> None:
    seen = admitted(THREE)
    assert DEAR.decide(seen) == find_policy("drift").decide(seen)


def test_a_guide_is_made_once_for_a_table_and_anew_for_other_budgets() -> None:
    policy, seen = Tuned(own=Constants(cloud=4.0)), far(0.1)
    running = flying(TWO, policy.decide(seen))
    policy.decide(running)
    first = policy._live.last
    policy.decide(running)
    assert policy._live.last is first
    policy.decide(replace(running, arrivals_per_s=0.3))
    assert policy._live.last is not first


def test_constants_of_ones_own_are_named_by_their_file(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"constants": asdict(Constants(cloud=4.0))}))
    policy = find_policy(f"tuned:{file}")
    assert isinstance(policy, Tuned)
    assert (policy.name, policy.constants) == (f"tuned:{file}", Constants(cloud=4.0))
    with pytest.raises(ModelError, match="no tuned constants"):
        find_policy(f"tuned:{tmp_path / 'none.json'}")
