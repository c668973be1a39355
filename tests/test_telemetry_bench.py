"""The truth that telemetry is compared with: a link that steps, and what counts as close to it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from splitwise_llm.bench.telemetry import STEP_S, Reading, _Steps, stepped_links
from splitwise_llm.engine.telemetry import LinkFigures
from splitwise_llm.spec import LinkSpec

SLOW, FAST = LinkSpec(0.1, 1e6, 2e6), LinkSpec(0.02, 4e6, 8e6)


def test_every_figure_changes_at_every_step() -> None:
    links = stepped_links(30, 1)
    assert len(links) == 31
    for before, after in pairwise(links):
        assert before.rtt_s != after.rtt_s
        assert before.up_bytes_per_s != after.up_bytes_per_s
        assert before.down_bytes_per_s != after.down_bytes_per_s


def test_a_stepped_link_delays_as_each_of_its_links_in_turn() -> None:
    up, down = _Steps(links=(SLOW, FAST)).lanes()
    assert up.deliver_at(1.0, 100_000) == pytest.approx(1.0 + 0.1 + 0.05)
    assert up.deliver_at(STEP_S + 1, 100_000) == pytest.approx(STEP_S + 1 + 0.025 + 0.01)
    assert down.deliver_at(STEP_S + 1, 100_000) == pytest.approx(STEP_S + 1 + 0.0125 + 0.01)
    assert up.deliver_at(100.0, 100_000) == pytest.approx(100.0 + 0.025 + 0.01)


def figures(link: LinkSpec, *, up_is_bound: bool = False, down_age_s: float = 0.1) -> LinkFigures:
    return LinkFigures(link, link, 0.1, 0.1, down_age_s, up_is_bound, False, "given")


def test_a_reading_holds_within_the_bars_and_not_beyond() -> None:
    near = figures(LinkSpec(0.109, 1.09e6, 1.7e6))
    reading = Reading(SLOW, near, 65536, 65536)
    assert reading.rtt_holds
    assert [holds for _, _, holds in reading.rates()] == [True, False]
    assert Reading(LinkSpec(0.005, 1e6, 1e6), figures(LinkSpec(0.0069, 1e6, 1e6)), 0, 0).rtt_holds
    assert not Reading(LinkSpec(0.005, 1e6, 1e6), figures(LinkSpec(0.0071, 1e6, 1e6)), 0, 0).rtt_holds


def test_a_rate_counts_only_where_enough_has_crossed_and_holds_only_as_a_fresh_estimate() -> None:
    assert Reading(SLOW, figures(SLOW), 65535, 0).rates() == ()
    assert Reading(SLOW, figures(SLOW, up_is_bound=True), 65536, 0).rates() == ((0.0, False, False),)
    assert Reading(SLOW, figures(SLOW, down_age_s=1.5), 0, 65536).rates() == ((0.0, False, False),)
