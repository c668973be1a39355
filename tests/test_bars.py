"""Bars are decided by paired figures, say what was not run, and show what nobody could exceed where they are missed."""

from __future__ import annotations

import numpy as np
import pytest

from splitwise_llm.bench.bars import NINE, Bar, Evidence, bars_of, losses_of, markdown, recovered
from splitwise_llm.bench.outcome import Outcome
from splitwise_llm.bench.scenarios import CAUSAL, CLAIRVOYANT, CONTROLLER
from splitwise_llm.bench.yardsticks import Result, find_row
from splitwise_llm.records import Cell, Estimate

DICE = np.random.default_rng(3)
BASE = DICE.uniform(1.0, 3.0, (6, 40))


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits as wide, from fewer draws."""
    monkeypatch.setattr("splitwise_llm.bench.outcome.RESAMPLES", 60)


def outcome(times: float = 1.0, joules: float = 1.0, nats: float = 0.0) -> Outcome:
    return Outcome(times * BASE, joules * BASE, 2 * joules * BASE, np.full_like(BASE, nats))


def row(drift: float, ours: float, noise: float = 0.0, name: str = "outages-s23-7b") -> Result:
    """Costs in units of the causal policy's."""
    causal = BASE.mean(axis=1)
    shaken = drift + noise * np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    costs = {"drift": shaken * causal, "drift_alone": causal, "router": causal, "splitwise": ours * causal}
    return Result.of(find_row(name), 0.0, {**costs, "causal": causal, "static": causal, "clairvoyant": causal})


def only(evidence: Evidence, figure: str, where: str = "", bar: str = "") -> Bar:
    found = [
        one for one in bars_of(evidence) if (one.figure, one.where) == (figure, where or one.where) and bar in one.bar
    ]
    assert len(found) == 1, [(one.where, one.bar) for one in found]
    return found[0]


@pytest.mark.parametrize(("times", "met"), [(1.009, True), (1.011, False)])
def test_as_good_as_the_winning_pure_mode_is_an_upper_limit(times: float, met: bool) -> None:
    case = {"cloud-only": outcome(), "edge-only": outcome(2.0), "splitwise": outcome(times), CAUSAL: outcome(0.9)}
    found = only(
        Evidence({("healthy-cloud", "orin-7b"): case}), "as good as the pure mode", "healthy-cloud.orin-7b", "mean_s"
    )
    assert found.met is met
    assert "cloud-only" in found.bar
    assert found.ceiling == ("" if met else "causal 0.900")


# Dies when bars.py says `one.value` for `(one.high if by_limit else one.value)`.
def test_a_limit_decides_where_the_bar_speaks_of_one() -> None:
    shaken = outcome()
    shaken = Outcome(shaken.total_s * np.where(np.arange(6) % 2, 1.1, 0.9)[:, None], *(BASE for _ in range(3)))
    case = {"cloud-only": outcome(), "splitwise": shaken, "drift-selfish": outcome(), "tuned": outcome()}
    pure = only(Evidence({("healthy-cloud", "a"): case}), "as good as the pure mode", "healthy-cloud.a", "mean_s")
    assert pure.measured is not None
    assert pure.measured.value < 1.01 < pure.measured.high
    assert pure.met is False
    assert only(Evidence({("day", "a"): {**case, "splitwise": outcome(0.969)}}), "tuned constants").met
    assert not only(Evidence({("day", "a"): case}), "tuned constants").met


@pytest.mark.parametrize(
    ("case", "times", "met"),
    [("orin-7b-0.15-live", 0.75, True), ("orin-7b-0.15-live", 0.8, False), ("orin-7b-0.15-old", 0.8, True),
     ("orin+s23+pi5-7b-0.15-mixed", 0.91, False), ("orin-7b-0.2-live", 0.76, False), ("orin-7b-0.12-old", 0.89, True)],
)  # fmt: skip
def test_rush_hour_asks_for_more_where_the_load_is_fresh(case: str, times: float, met: bool) -> None:
    evidence = Evidence({("rush-hour", case): {"drift-selfish": outcome(), "splitwise": outcome(times)}})
    assert only(evidence, "rush-hour against selfish", f"rush-hour.{case}", "mean_s").met is met
    assert only(evidence, "rush-hour against selfish", f"rush-hour.{case}", "p95_s").met


def test_a_crowd_whose_mean_is_missed_shows_what_one_controller_comes_to() -> None:
    """Which has a mean, and no tail."""
    case = {"drift-selfish": outcome(), "splitwise": outcome(1.1), CONTROLLER: outcome(0.88)}
    evidence = Evidence({("rush-hour", "orin-7b-0.12-live"): case})
    assert only(evidence, "rush-hour against selfish", bar="mean_s").ceiling == "one controller of the crowd 0.880"
    assert only(evidence, "rush-hour against selfish", bar="p95_s").ceiling == ""


def test_rush_hour_below_capacity_decides_no_bar_and_its_tail_may_not_be_longer() -> None:
    calm = Evidence({("rush-hour", "orin-7b-0.08-live"): {"drift-selfish": outcome(), "splitwise": outcome(0.5)}})
    found = only(calm, "rush-hour against selfish")
    assert found.met is None
    assert "--scenario rush-hour" in found.says
    tail = outcome(0.5)
    tail.total_s[:, -4:] *= 10  # a tenth of the requests
    longer = Evidence({("rush-hour", "orin-7b-0.15-live"): {"drift-selfish": outcome(), "splitwise": tail}})
    assert only(longer, "rush-hour against selfish", bar="p95_s").met is False


def test_tails_are_held_to_nine_tenths_of_the_reduction_that_can_be_had() -> None:
    case = {"cloud-only": outcome(), "splitwise+tools": outcome(0.65), CAUSAL: outcome(0.6), CLAIRVOYANT: outcome(0.5)}
    found = only(Evidence({("flaky-wan", "s23-7b"): case}), "p95 against cloud-only")
    assert found.met is False  # 0.35 of 0.4
    assert found.ceiling == "causal 0.600"
    del case[CAUSAL]
    assert "0.55" in only(Evidence({("flaky-wan", "s23-7b"): case}), "p95 against cloud-only").bar
    case["splitwise+tools"] = outcome(0.5)
    fast = Evidence({("tunnel", "orin-7b-periodic"): case})
    assert not only(fast, "p95 against cloud-only", bar="0.47").met
    assert only(Evidence({("tunnel", "pi5-7b"): case}), "p95 against cloud-only").bar.endswith("1.02")


# Dies when bars.py says `.value > 1 + CLEAR]` for `.low > 1 + CLEAR]`.
def test_of_the_gaps_that_are_sure_at_least_half_is_to_be_recovered() -> None:
    rows = [row(1.10, 1.04), row(1.02, 1.015, name="private-mec-orin-13b"), row(1.02, 1.02, 0.05, "tunnel-orin-7b")]
    evidence = Evidence({}, rows=rows)
    pooled = only(evidence, "regret to best causal", bar="half")
    assert pooled.where.startswith("2 of 3 rows")
    assert pooled.measured is not None
    assert pooled.measured.value == pytest.approx(0.065 / 0.12)
    assert pooled.met
    assert recovered([row(1.1, 1.1)]).value == pytest.approx(0.0)
    worse = only(Evidence({}, rows=[row(1.0, 1.006)]), "regret to best causal", "outages-s23-7b")
    assert worse.met is False
    assert worse.ceiling == "causal 1.000"


def test_joules_are_compared_in_the_nine_rows_by_their_median_and_their_best() -> None:
    sizes = [0.9, 0.85, 0.7, 0.75, 0.79, 0.6, 0.78, 0.81, 0.95]
    cases = {
        one: {"edgeshard-replanned": outcome(), "splitwise+tools": outcome(0.9, size)}
        for one, size in zip(NINE, sizes, strict=True)
    }
    evidence = Evidence(cases)
    figure = "device_j against edgeshard-replanned"
    median = only(evidence, figure, "9 rows")
    assert median.measured is not None
    assert median.measured.value == pytest.approx(0.79)
    assert median.met
    assert only(evidence, figure, "best row").met
    del cases["private-wan", "orin-7b"]
    assert only(Evidence(cases), figure, "8 rows").says == "8 of 9 rows were run"
    cases["private-mec", "orin-7b"]["splitwise+tools"] = outcome(1.1, 0.5, nats=0.1)
    assert not only(Evidence(cases), "joules: at latency no worse", "private-mec.orin-7b", "mean_s").met
    assert not only(Evidence(cases), "joules: at nats no worse", "private-mec.orin-7b").met


def test_private_rows_are_judged_alone_and_by_their_geometric_mean() -> None:
    def case(gain: float) -> dict[str, Outcome]:
        other = {"edgeshard-latency": outcome(gain), "edgeshard-replanned+tools": outcome(1.05)}
        return {**other, "splitwise+tools": outcome(), CLAIRVOYANT: outcome(0.5)}

    evidence = Evidence({("private-mec", "orin-7b"): case(1.2), ("private-wan", "orin-7b"): case(2.0)})
    mean = only(evidence, "private: latency", "2 rows", "edgeshard-latency")
    assert mean.measured is not None
    assert mean.measured.value == pytest.approx(2.4**0.5)
    assert mean.met
    alone = only(evidence, "private: latency", "private-mec.orin-7b", "edgeshard-latency")
    assert alone.met is False
    assert alone.ceiling == "clairvoyant 2.400"
    assert only(evidence, "private: latency", "2 rows", "p95_s").met is False


def test_what_was_not_run_is_neither_met_nor_missed_and_says_what_would() -> None:
    bars = bars_of(Evidence({}))
    assert all(bar.met is None for bar in bars)
    assert {bar.figure for bar in bars} >= {
        "accuracy", "stability", "memory", "regret to best causal", "rush-hour against selfish",
    }  # fmt: skip
    assert any("splitwise bench stability --policy splitwise" in bar.says for bar in bars)


def test_stability_is_decided_by_the_upper_limit_of_the_growth() -> None:
    found = {"slope_at_0.9": 0.002, "slope_at_0.9_lo": 0.0, "slope_at_0.9_hi": 0.012, "slope_at_0.8": 0.0}
    evidence = Evidence({}, stability={**found, "slope_at_0.8_lo": -0.01, "slope_at_0.8_hi": 0.009})
    assert not only(evidence, "stability", "at 0.9 of the fluid bound").met
    assert only(evidence, "stability", "at 0.8 of the fluid bound").met
    assert only(evidence, "stability", "at 0.95 of the fluid bound").met is None


def test_a_policy_that_falls_back_too_often_is_told_with_its_knobs() -> None:
    share = {"fallback_share": Estimate(0.06, 0.06, 0.06)}
    cell = Cell("day", "a", "splitwise+tools", 1, 1, share, knobs={"cloud x2": 0.4, "link x4": 0.1})
    found = only(Evidence({}, [cell]), "fallback_share", "day.a+tools")
    assert found.met is False
    assert found.says == "cloud x2 in 40 %, link x4 in 10 %"


def test_every_loss_with_confidence_is_listed_and_bounds_are_no_rivals() -> None:
    case = {
        "splitwise": outcome(1.1), "drift": outcome(), "router": outcome(1.05), CAUSAL: outcome(0.8),
        "splitwise-filter-0": outcome(0.9), "splitwise@a": outcome(0.9), "tuned@a": outcome(0.9),
        "best-static": outcome(0.9), "splitwise+tools": outcome(), "drift+tools": outcome(1.2),
        CONTROLLER: outcome(0.8),
    }  # fmt: skip
    losses = losses_of(Evidence({("day", "a"): case}), ("mean_s",))
    assert [(one.where, one.rival) for one in losses] == [("day.a", "drift")]
    text = markdown(bars_of(Evidence({("day", "a"): case})), losses)
    assert "| day.a | mean_s | drift | 1.100 (1.100 to 1.100) |" in text
    assert "nowhere" in markdown([], [])
