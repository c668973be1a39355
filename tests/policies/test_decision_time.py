"""The bench of a decision: what it asks is what a live session asks, with the link and without."""

from __future__ import annotations

from splitwise_llm.bench.decision_time import add_decision_ms
from splitwise_llm.bench.figures import Figures
from splitwise_llm.policies.mind import Splitwise


def test_a_decision_is_timed_with_the_link_and_in_an_outage() -> None:
    """Dies when what is remembered of an epoch and what the bench makes up of one part."""
    figures = Figures("decision", {})
    add_decision_ms(figures, Splitwise(), repeats=2)
    for name in ("decision_ms", "decision_p99_ms", "outage_decision_ms", "outage_decision_p99_ms"):
        assert 0.0 < figures.figures[name] < 1e4
