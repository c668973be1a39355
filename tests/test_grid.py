"""The grid keeps what it made, and only what the same settings made; claims follow from figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.bench.cells import Size, mean_estimate, ratio
from splitwise_llm.bench.claims import claims_of
from splitwise_llm.bench.scenarios import Grid, _keep, _read_kept, cell_from
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


def test_limits_are_over_traces_and_ratios_are_paired() -> None:
    one = mean_estimate(np.array([1.0, 2.0, 3.0]))
    assert (one.value, one.low) == (2.0, pytest.approx(2 - 4.303 / 3**0.5, rel=1e-3))
    base = np.array([1.0, 5.0, 2.0])
    assert ratio(2 * base, base) == Estimate(2.0, 2.0, 2.0)
