"""Queues, drift and drift-plus-penalty as defined: the mistakes of a reversed weight and of V on the drift."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import (
    CAP,
    Budgets,
    Floats,
    Penalty,
    Terms,
    completed,
    drained,
    drift,
    lyapunov,
    next_theta,
    nominal_weights,
    overspending,
    ratio_objective,
    scaled,
    served,
)

FOUR = arrays.arrays(np.float64, 4, elements=st.floats(0, 100))
PLANS = 5
MATRIX = arrays.arrays(np.float64, (PLANS, 4), elements=st.floats(0, 10))
COSTS = arrays.arrays(np.float64, PLANS, elements=st.floats(0, 100))
ZERO = np.zeros(4)


def value(
    penalty: Penalty, c0: Floats, queues: Floats, work: Floats, weights: Floats, z: Floats = ZERO, g: Floats = ZERO
) -> Floats:
    return Terms.of(penalty, c0, np.zeros_like(c0), queues, work, g).objective(weights, z)


# Dies when lyapunov.py says `+ work * work` for `+ work * work / 2`.
@given(FOUR, FOUR, FOUR)
def test_drift_is_exactly_what_work_adds_to_the_function(queues: Floats, work: Floats, weights: Floats) -> None:
    before, after = lyapunov(queues, weights, ZERO), lyapunov(queues + work, weights, ZERO)
    assert drift(queues, work, weights) == pytest.approx(after - before, rel=1e-6, abs=1e-6)


# Dies when lyapunov.py says `.sum(axis=-1) / 2 + 0 *` for `.sum(axis=-1) / 2 +`.
def test_the_function_by_hand() -> None:
    assert lyapunov(np.array([1.0, 2, 3, 4]), np.array([1.0, 1, 2, 0.5]), np.array([2.0, 0, 1, 0])) == 15.5 + 2.5
    many = lyapunov(np.ones((7, 3, 4)), np.ones(4), np.zeros((7, 3, 4)))
    assert many.shape == (7, 3)


# Dies when lyapunov.py says `return -queues * work` for `return queues * work`.
@given(FOUR, FOUR, FOUR, st.integers(0, 3), st.floats(0, 100))
def test_pressure_never_falls_as_a_queue_rises(
    queues: Floats, work: Floats, weights: Floats, which: int, more: float
) -> None:
    longer = queues.copy()
    longer[which] += more
    one = np.array(1.0)
    assert value(Penalty(1.0), one, longer, work, weights) >= value(Penalty(1.0), one, queues, work, weights)


# Dies when lyapunov.py says `- (virtual * self.g).sum(axis=-1)` for `+ (virtual * self.g).sum(axis=-1)`.
@given(FOUR, FOUR, st.integers(0, 3), st.floats(0, 100))
def test_pressure_never_falls_as_a_budget_is_overrun(z: Floats, g: Floats, which: int, more: float) -> None:
    higher = z.copy()
    higher[which] += more
    one = np.array(1.0)
    assert value(Penalty(1.0), one, ZERO, ZERO, ZERO, higher, g) >= value(Penalty(1.0), one, ZERO, ZERO, ZERO, z, g)


@given(MATRIX, st.integers(0, 3), st.floats(0.1, 100))
def test_a_longer_queue_never_makes_the_choice_put_more_work_into_it(work: Floats, which: int, more: float) -> None:
    queues = np.ones(4)
    longer = queues.copy()
    longer[which] += more
    c0 = np.linspace(1, 2, PLANS)
    choices = [int(value(Penalty(1.0), c0, q, work, np.ones(4)).argmin()) for q in (queues, longer)]
    assert work[choices[1], which] <= work[choices[0], which] + 1e-9


# Dies when lyapunov.py says `(c0 + wait), penalty.v * added(` for `(c0 + wait), added(`.
@given(COSTS, MATRIX, st.floats(1e-3, 1e3), FOUR, FOUR)
def test_v_multiplies_the_cost_and_not_the_drift(c0: Floats, work: Floats, v: float, queues: Floats, w: Floats) -> None:
    one, other = (value(Penalty(1.0, v=each), c0, queues, work, w) for each in (v, 3 * v))
    assert other - one == pytest.approx(2 * v * c0, rel=1e-6, abs=1e-6 * (1 + np.abs(one).max()))


# Dies when lyapunov.py says `(c0 + wait) / penalty.v, added(` for `penalty.v * (c0 + wait), added(`.
def test_a_large_v_chooses_the_cheapest_and_a_small_v_the_least_work() -> None:
    c0, work = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])[:, None] * np.ones(4)
    chosen = [int(value(Penalty(1.0, v=v), c0, np.ones(4), work, np.ones(4)).argmin()) for v in (1e-6, 1e6)]
    assert chosen == [2, 0]


# Dies when lyapunov.py says `+ (virtual**2 * self.g).sum(axis=-1)` for `+ (virtual * self.g).sum(axis=-1)`.
@given(COSTS, MATRIX, FOUR, FOUR, FOUR, MATRIX, st.floats(0.01, 100))
def test_scaling_v_weights_and_virtual_queues_together_changes_no_choice(
    c0: Floats, work: Floats, queues: Floats, weights: Floats, z: Floats, g: Floats, factor: float
) -> None:
    penalty = Penalty(2.0, v=3.0)
    one = value(penalty, c0, queues, work, weights, z, g)
    other = value(scaled(penalty, factor), c0, queues, work, factor * weights, factor * z, g)
    assert other == pytest.approx(factor * one, rel=1e-9)
    assert one[other.argmin()] == pytest.approx(one.min(), rel=1e-9)


# Dies when lyapunov.py says `np.minimum(wait_s, 9e9)` for `np.minimum(wait_s, penalty.wait_cap_s)`.
def test_waiting_counts_beside_the_penalty_up_to_a_cap_or_not_at_all() -> None:
    def of(penalty: Penalty, wait_s: float) -> float:
        return float(Terms.of(penalty, np.array(1.0), np.array(wait_s), ZERO, ZERO, ZERO).objective(ZERO, ZERO))

    assert of(Penalty(2.0, v=5.0), 4.0) == 5.0 * (1 + 4.0 / 2.0)
    assert of(Penalty(2.0, wait_cap_s=10.0), 1e9) == 1 + 10.0 / 2.0
    assert of(Penalty(2.0, wait_term=False), 4.0) == 1.0


# Dies when lyapunov.py says `self.w_energy * joules * self.e_ref_j` for `self.w_energy * joules / self.e_ref_j`.
def test_the_penalty_by_hand() -> None:
    penalty = Penalty(2.0, e_ref_j=50.0, n_ref=0.1, w_energy=0.5, w_accuracy=3.0)
    assert penalty.c0(np.array(8.0), np.array(25.0), np.array(0.2)) == pytest.approx(4 + 0.25 + 6)


# Dies when lyapunov.py says `queues - speed * seconds` for `np.maximum(queues - speed * seconds, 0.0)`.
@given(FOUR, FOUR, st.floats(0, 100))
def test_serving_never_leaves_less_than_nothing_nor_more_than_was_there(
    queues: Floats, speed: Floats, seconds: float
) -> None:
    after = served(queues, speed, np.array(seconds))
    assert np.all((after >= 0) & (after <= queues))
    assert np.array_equal(served(queues, ZERO, np.array(seconds)), queues)  # an outage


ALL = Budgets(energy_j=50.0, deadline_s=10.0, misses=0.05, nats=0.1, tokens_ref=128.0, battery_w=2.0, t_ref_s=3.0)


# Dies when lyapunov.py says `g[..., 1] -= 0.0` for `g[..., 1] -= 1.0`.
def test_a_completed_request_by_hand() -> None:
    z = np.array([1.0, 30.0, 1.0, 4.0])
    missed = completed(z, ALL, np.array(75.0), np.array(1.0), np.array(0.2), np.array(64.0))
    assert missed == pytest.approx([1 + 0.5, 30 + 0.95 / 0.05, 1 + 0.5 * 1, 4.0])
    met = completed(z, ALL, np.array(25.0), np.array(0.0), np.array(0.05), np.array(256.0))
    assert met == pytest.approx([1 - 0.5, 30 - 1, 1 - 2 * 0.5, 4.0])


# Dies when lyapunov.py says `np.clip(virtual + g, -CAP, CAP)` for `np.clip(virtual + g, 0.0, CAP)`.
@given(FOUR, st.floats(0, 1e4), st.sampled_from([0.0, 1.0]), st.floats(0, 10), st.floats(1, 1e4))
def test_virtual_queues_stay_between_nothing_and_the_cap(
    z: Floats, joules: float, missed: float, nats: float, tokens: float
) -> None:
    after = completed(z, ALL, *map(np.array, (joules, missed, nats, tokens)))
    assert np.all((after >= 0) & (after <= CAP))
    assert after[3] == z[3]  # the battery's is for time to change
    assert np.array_equal(completed(z, Budgets(), *map(np.array, (joules, missed, nats, tokens))), z)


@given(st.floats(0, 200), st.floats(0, 1), st.floats(0, 1), st.floats(1, 1000))
def test_without_a_budget_nothing_is_overspent(joules: float, misses: float, nats: float, tokens: float) -> None:
    assert not overspending(Budgets(), *map(np.array, (joules, misses, nats, tokens))).any()


# Dies when lyapunov.py says `miss_probability * budgets.misses` for `miss_probability / budgets.misses`.
def test_what_a_decision_is_expected_to_overspend_by_hand() -> None:
    g = overspending(ALL, *map(np.array, (75.0, 0.2, 0.2, 64.0)))
    assert g == pytest.approx([0.5, 4.0, 0.5, 75 / 6])
    assert overspending(ALL, np.ones((2, 3)), np.ones((2, 1)), np.ones(3), np.array(1.0)).shape == (2, 3, 4)


def test_a_request_on_average_within_its_budgets_leaves_the_queues_where_they_are() -> None:
    z, rng = np.array([50.0, 50.0, 50.0, 0.0]), np.random.default_rng(0)
    missed = rng.permutation(np.repeat([1.0, 0.0], [5, 95]))
    for miss in missed:
        z = completed(z, ALL, np.array(50.0), np.array(miss), np.array(0.1), np.array(128.0))
    assert z == pytest.approx([50.0, 50.0, 50.0, 0.0])


# Dies when lyapunov.py says `- 0 * seconds / budgets.t_ref_s` for `- seconds / budgets.t_ref_s`.
def test_the_batterys_queue_follows_time() -> None:
    z = np.array([1.0, 1.0, 1.0, 5.0])
    assert drained(z, ALL, np.array(30.0), np.array(6.0)) == pytest.approx([1, 1, 1, 5 + 30 / 6 - 2])
    assert drained(z, ALL, np.array(0.0), np.array(1e6))[3] == 0
    assert drained(z, ALL, np.array(1e9), np.array(1.0))[3] == CAP
    assert drained(z, Budgets(), np.array(30.0), np.array(6.0)) is z
    assert z[3] == 5.0  # arguments are left as they are


# Dies when lyapunov.py says `penalty.v * load * mean_work_s` for `penalty.v * load`.
def test_nominal_weights_are_what_work_costs_later_arrivals_of_a_queue() -> None:
    """At load rho the busy period that work x prolongs holds x rho / ((1 - rho) s) arrivals: each waits x longer."""
    weights = nominal_weights(Penalty(10.0, v=2.0), np.array([4.0, 0.0, 1.0, 2.0]), load=0.8)
    assert weights == pytest.approx([2 * 4 / 4 / 10, 0.0, 2 * 4 / 1 / 10, 2 * 4 / 2 / 10])


# Dies when lyapunov.py says `- theta` for `- theta * frame_s`.
# Dies when lyapunov.py says `waiting * x + x**2` for `waiting * x + x**2 / 2`.
@given(st.floats(0.0, 0.9), st.integers(0, 5), st.floats(0.1, 10.0))
def test_a_turn_costs_what_it_makes_others_wait(load: float, waiting: int, total_s: float) -> None:
    """Served one by one, each for T_ref: a little longer for this request is as much longer for everybody of the busy
    period that it begins, which holds those at the door and `rho / (1 - rho)` for each second of work in it."""
    t_ref = 2.0
    pieces = (np.arange(1000) + 0.5) * total_s / 1000  # how long it has been so far
    later = load / t_ref * (pieces + waiting * t_ref) / (1 - load)
    delays = (waiting + later).sum() * total_s / 1000
    assert Penalty(t_ref, in_turn=load).turn(np.array(total_s), waiting) == pytest.approx(delays / t_ref)


def test_who_serves_several_at_a_time_keeps_nobody_waiting() -> None:
    assert Penalty(2.0).turn(np.array([1.0, 5.0]), 3.0) == 0.0


def test_theta_settles_at_the_cost_per_time() -> None:
    penalty, theta, elapsed = Penalty(1.0), np.array(0.0), np.array(0.0)
    rng = np.random.default_rng(1)
    for _ in range(4000):
        long = rng.random() < 0.5
        frame = np.array(2.0 if long else 1.0)
        elapsed = elapsed + frame
        theta = next_theta(theta, np.array(6.0 if long else 1.0), frame, elapsed)
    assert theta == pytest.approx(3.5 / 1.5, rel=0.05)
    value = ratio_objective(
        penalty, np.array(6.0), np.ones(4), np.ones(4), np.full(4, 2.0), np.full(4, 0.5), ZERO, ZERO, np.array(3.0),
        np.array(2.0),
    )  # fmt: skip
    assert value == 6 + 4 * 2 * (1 - 0.5 * 3) - 2 * 3


@pytest.mark.parametrize("wrong", [{"t_ref_s": 0.0}, {"v": 0.0}, {"w_energy": -1.0}, {"e_ref_j": 0.0}, {"n_ref": -1.0}])
def test_impossible_penalties_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        Penalty(**{"t_ref_s": 1.0, **wrong})  # type: ignore[arg-type]
