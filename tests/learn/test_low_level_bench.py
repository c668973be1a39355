"""The bench of the low levels: its figures are those of the states it asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forked import splitwise_text
from splitwise_llm.bench.low_level import run_low_level
from splitwise_llm.errors import SpecError
from splitwise_llm.policies.proposer import SHIPPED, Weights


def test_the_shipped_weights_are_measured_beside_the_exact_search_the_untrained_and_the_rule() -> None:
    figures = run_low_level(3, lambda _: None, machines=(2,)).figures
    assert figures["machines_2_learned_over_exact_within_2"] == 1.0
    assert figures["machines_2_learned_over_exact_worst"] <= 0.02
    assert figures["machines_2_fell_back"] == 0.0
    for who in ("learned", "exact", "exact_again", "few_runs"):
        assert 0 < figures[f"machines_2_{who}_p50_ms"] <= figures[f"machines_2_{who}_p99_ms"]
    for who in ("untrained", "rule"):
        assert 0 <= figures[f"machines_2_{who}_over_best_known_within_2"] <= 1


def test_weights_of_a_file_are_measured_in_place_of_the_shipped_and_named(tmp_path: Path) -> None:
    untrained = tmp_path / "untrained.npz"
    Weights.random(1).save(untrained)
    result = run_low_level(3, lambda _: None, (2,), untrained)
    assert result.settings["weights"] == str(untrained)
    names = (f"machines_2_{who}_over_best_known_within_2" for who in ("learned", "untrained"))
    assert len({result.figures[name] for name in names}) == 1


def test_files_that_hold_no_weights_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    bad = {name: tmp_path / f"{name}.npz" for name in ("nowhere", "cut", "single", "text", "shapes")}
    bad["cut"].write_bytes(SHIPPED.read_bytes()[:2000])
    with bad["single"].open("wb") as file:
        np.save(file, np.zeros(3))
    bad["text"].write_text("no weights")
    shipped = {name: getattr(Weights.load(), name) for name in Weights.names()}
    np.savez(bad["shapes"], **{**shipped, "own": np.zeros((2, 2))})
    for path in bad.values():
        with pytest.raises(SpecError, match="splitwise train --learner low"):
            Weights.load(path)
    target = tmp_path / "figures.json"
    said = splitwise_text("bench", "low-level", "--weights", str(bad["shapes"]), "--json", str(target))
    assert said.returncode == 2
    assert "own is (2, 2), expected (48, 48)" in said.stderr.replace("\n", " ")
    assert not target.exists()


def test_the_command_reports_what_it_measured(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    said = splitwise_text("bench", "low-level", "--states", "2", "--machines", "2", "--json", str(target))
    assert said.returncode == 0, said.stderr
    assert json.loads(target.read_text())["figures"]["machines_2_learned_over_exact_within_2"] == 1.0
