"""The grid keeps what it made, and only what the same settings made; claims follow from figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.bench.cells import Size, mean_estimate, ratio
from splitwise_llm.bench.claims import claims_of
from splitwise_llm.bench.scenarios import Grid, _keep, _read_kept, cell_from, scalings
from splitwise_llm.records import Cell, Estimate


def cell(policy: str, mean_s: float) -> Cell:
    figures = {name: Estimate(mean_s, mean_s, mean_s) for name in ("mean_s", "p95_s", "device_j")}
    return Cell("healthy-cloud", "orin-7b", policy, 1, 10, figures, (1.0, 2.0), {"cloud": 1.0}, (0.0,), {"up": (0.0,)})


def test_cells_are_kept_for_the_same_settings_and_for_no_others(tmp_path: Path) -> None:
    grid, file = Grid(keep=tmp_path), tmp_path / "a.json"
    _keep(grid, file, [cell("drift", 1.0).to_dict()])
    kept = _read_kept(grid, file)
    assert kept is not None
    assert [cell_from(one) for one in kept] == [cell("drift", 1.0)]
    assert _read_kept(replace(grid, seed=1), file) is None
    assert _read_kept(replace(grid, size=Size(2, 3, 1)), file) is None
    file.write_text(file.read_text()[:40])
    assert _read_kept(grid, file) is None


@pytest.mark.parametrize(("drift_s", "holds"), [(1.005, True), (1.02, False)])
def test_a_policy_holds_its_claim_within_one_percent(drift_s: float, holds: bool) -> None:
    claims = claims_of([cell("cloud-only", 1.0), cell("edge-only", 3.0), cell("drift", drift_s)])
    within = [claim.holds for claim in claims if "within 1 %" in claim.text]
    assert within == [holds] * 3
    assert next(claim for claim in claims if "wins" in claim.text).holds


def test_limits_of_a_latency_are_never_negative_and_those_of_a_growth_may_be() -> None:
    two = np.array([1.0, 4.0])  # whose limits are 9 standard deviations either way
    assert mean_estimate(two, 0.0).low == 0.0
    assert mean_estimate(two).low == pytest.approx(2.5 - 12.706 * 1.5, rel=1e-3)
    assert mean_estimate(np.array([0.2, 0.9]), 0.0, 1.0).high == 1.0


def test_limits_of_a_speed_up_hold_it_and_stay_finite_where_a_mean_may_be_nothing() -> None:
    def wide(policy: str, case: str, mean_s: float) -> Cell:
        one = cell(policy, mean_s)
        return replace(one, scenario="flaky-wan", case=case, metrics={"mean_s": Estimate(mean_s, 0.0, 2 * mean_s)})

    cells = [wide(policy, case, mean_s) for case in ("orin-gpt2xl", "orin-7b")
             for policy, mean_s in (("cloud-only", 3.0), ("edge-only", 1.5))]  # fmt: skip
    for one in scalings(cells)[0].series["edge-only"]:
        assert one.value == 2.0
        assert 0 < one.low < 2.0 < one.high < 10


def test_limits_are_over_traces_and_ratios_are_paired() -> None:
    one = mean_estimate(np.array([1.0, 2.0, 3.0]))
    assert (one.value, one.low) == (2.0, pytest.approx(2 - 4.303 / 3**0.5, rel=1e-3))
    base = np.array([1.0, 5.0, 2.0])
    assert ratio(2 * base, base) == Estimate(2.0, 2.0, 2.0)
