"""The bench of the low levels: its figures are those of the states it asked."""

from __future__ import annotations

from splitwise_llm.bench.low_level import run_low_level


def test_the_shipped_weights_are_measured_beside_the_exact_search_the_untrained_and_the_rule() -> None:
    figures = run_low_level(3, lambda _: None, machines=(2,)).figures
    assert figures["machines_2_learned_over_exact_within_2"] == 1.0
    assert figures["machines_2_learned_over_exact_worst"] <= 0.02
    assert figures["machines_2_fell_back"] == 0.0
    for who in ("learned", "exact", "exact_again", "few_runs"):
        assert 0 < figures[f"machines_2_{who}_p50_ms"] <= figures[f"machines_2_{who}_p99_ms"]
    for who in ("untrained", "rule"):
        assert 0 <= figures[f"machines_2_{who}_over_best_known_within_2"] <= 1
