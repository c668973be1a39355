"""The claims of drift plus penalty in small: V's side, linear programs by hand, budgets, theta by enumeration."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.bench import stability as bench
from splitwise_llm.bench.cells import idle_question, load_states
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.fluid import capacity, least_penalty, long_run
from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import CAP, Budgets, Floats, Penalty, at_cap, completed, next_theta, ratio_objective
from splitwise_llm.policies.choosers import TableChooser
from splitwise_llm.sim.params import CloudProcess, LinkProcess, SharedCloud
from splitwise_llm.sim.scenarios import TUNNEL, WAN, Case, find_scenario

ZERO = np.zeros(4)


@cache
def trade_off() -> bench.System:
    return bench.system(bench.TRADE_OFF)


def alone(made: bench.System, plan: int) -> Floats:
    return np.arange(len(made.table)) == plan


def all_on_device(made: bench.System) -> int:
    return int(np.nonzero(~made.params.physics.uses_cloud)[0][0])


def quiet(tell: str) -> None:
    pass


# Dies when lyapunov.py says `(c0 + wait), penalty.v * added(` for `penalty.v * (c0 + wait), added(`.
def test_a_larger_v_buys_a_smaller_penalty_with_a_longer_backlog() -> None:
    figures = Figures("stability")
    bench.trade_off(bench.Amount(6, 120), (1.0, 64.0), figures, quiet)
    found = figures.figures
    assert found["v_64/c0"] < 0.7 * found["v_1/c0"]
    assert found["v_64/device_backlog_s"] > 1.5 * found["v_1/device_backlog_s"]
    assert found["c0_limit"] == pytest.approx(1.16, abs=0.01)


def test_a_choosers_v_counts_against_budgets_only_because_nominal_weights_grow_with_it() -> None:
    made = trade_off().at(0.4, 40)
    traces = made.traces(bench.Amount(2, 40))
    plans = [
        bench.simulate(
            made.params, traces, TableChooser(bench.DRIFT, made.tools, made.limits, v=v, arrivals_per_s=0.4)
        ).first_plan
        for v in (1.0, 64.0)
    ]
    assert np.array_equal(*plans)


def test_the_long_run_shares_of_a_walk_are_those_of_visits_times_dwell() -> None:
    dwell = np.array([20.0, 2 * 10, 2 * 6, 5])
    assert long_run(WAN) == pytest.approx(dwell / dwell.sum())
    assert long_run(TUNNEL) == pytest.approx([146.7 / 166.7, 20 / 166.7])
    assert long_run(replace(WAN, periodic=True)) == pytest.approx(np.array([20.0, 10, 6, 5]) / 41)


# Dies when bench/fluid.py says `0 * unit[:, DEVICE_S` for `unit[:, DEVICE_S`.
def test_the_fluid_bound_of_the_device_alone_is_one_over_its_work_whatever_the_slots() -> None:
    made = trade_off()
    plan = all_on_device(made)
    work = made.table.at(made.table.world.conditions()).work.device_s[plan]
    few = made.traces(bench.Amount(1, 1))
    for slots in (1, 64):
        params = replace(made.params, slots=slots)
        assert capacity(params, few, alone(made, plan)) == pytest.approx(1 / work, rel=1e-6)


# Dies when bench/fluid.py says `load[3, c, phase, c] = 0.0` for `load[3, c, phase, c] = unit[:, 0]`.
def test_the_fluid_bound_of_one_slot_and_one_state_is_one_over_the_time_a_split_holds_it() -> None:
    made = trade_off()
    link = LinkProcess(WAN.classes[:1])
    params = replace(made.params, link=link, slots=1)
    plan = int(np.nonzero(made.params.physics.uses_cloud)[0][0])
    few = replace(made, params=params).traces(bench.Amount(1, 1))
    still = replace(params, cloud=CloudProcess(params.cloud_processes[0].classes[:1]))
    x = load_states(made.table.world, find_scenario("capable-edge"), _case())[0]
    prices = made.table.at(x)
    expected = 1 / float(prices.service_s[plan] + prices.wait_s[plan])
    assert capacity(still, few, alone(made, plan)) == pytest.approx(expected, rel=1e-6)


def _case() -> Case:
    return find_scenario("capable-edge").case("orin-gpt2xl")


def test_more_plans_slots_and_moves_never_lower_the_fluid_bound() -> None:
    made = trade_off()
    few = made.traces(bench.Amount(1, 1))
    everything = capacity(made.params, few, made.allowed)
    assert everything >= max(capacity(made.params, few, alone(made, plan)) for plan in range(len(made.table))) - 1e-9
    assert capacity(made.params, few, made.allowed, moves=True) >= everything - 1e-9
    assert capacity(replace(made.params, slots=4), few, made.allowed) <= everything


def test_the_least_penalty_rises_with_the_load_and_ends_where_no_choice_keeps_up() -> None:
    made = trade_off()
    few, (penalty, _) = made.traces(bench.Amount(1, 1)), made.typical()
    values = [least_penalty(made.at(rate, 1).params, few, made.allowed, penalty) for rate in (0.01, 0.5, 0.6, 0.9)]
    assert values[0] == pytest.approx(1.0)  # the device alone is the reference
    assert values == sorted(values)
    with pytest.raises(SpecError, match="more than any choice"):
        least_penalty(made.at(9.0, 1).params, few, made.allowed, penalty)


def test_a_cloud_that_devices_load_has_no_fluid_bound_here() -> None:
    made = trade_off()
    with pytest.raises(SpecError, match="do not load"):
        capacity(replace(made.params, cloud=SharedCloud()), made.traces(bench.Amount(1, 1)), made.allowed)


def test_backlogs_grow_beyond_the_fluid_bound_by_what_is_too_much() -> None:
    figures = Figures("stability")
    bench.stability(bench.Amount(4, 100), (2.0,), figures, quiet, moves=False)
    assert 0.4 < figures.figures["slope_at_2"] < 0.9  # half of it cannot be served, whoever chooses
    assert figures.figures["largest_stable_share"] == 0


# Dies when choosers.py says `Budgets(),` for `self.budgets,` where it makes the objective.
@pytest.mark.parametrize("name", ["energy", "accuracy"])
def test_a_budget_is_kept_where_ignoring_it_would_overrun_it(name: str) -> None:
    row, feasible = next((row, one) for kind, row, one, _ in bench.BUDGETED if kind == name)
    made = bench.system(row, bench.LOSSY, bench.LOSSES, feasible).at(row.per_s, 60)
    traces = made.traces(bench.Amount(4, 60))
    spent = []
    for budget in (feasible, Budgets()):
        chooser = TableChooser(bench.DRIFT, bench.LOSSY, made.limits, budget, arrivals_per_s=row.per_s)
        records = bench.simulate(made.params, traces, chooser)
        assert records.virtual is not None
        spent.append((records.device_j if name == "energy" else records.nats)[:, 0].mean(axis=1))
        if budget is feasible:
            assert not at_cap(records.virtual).any()
            z = records.virtual[:, 0, 0 if name == "energy" else 2]
    limit = feasible.energy_j if name == "energy" else feasible.nats
    assert limit is not None
    assert (spent[0] <= limit * (1 + z / 60) + 1e-9).all()  # Z holds all that was overspent, so Z(t)/t bounds its mean
    assert spent[0].mean() < 1.05 * limit < spent[1].mean()


def test_a_budget_that_no_plan_keeps_to_ends_at_the_cap_and_says_so() -> None:
    z, budgets = np.zeros(4), Budgets(energy_j=1.0)
    for _ in range(200):
        z = completed(z, budgets, np.array(2.0), np.array(0.0), np.array(0.0), np.array(1.0))
    assert z[0] == CAP
    z = completed(z, budgets, np.array(0.5), np.array(0.0), np.array(0.0), np.array(1.0))  # one thrifty request
    assert at_cap(z).tolist() == [True, False, False, False]


# Dies when choosers.py leaves out `menu.waited_s[:, None],`.
def test_what_a_request_has_waited_counts_towards_its_deadline() -> None:
    made = trade_off()
    edge = all_on_device(made)
    question = idle_question(made.table)
    total = made.table.at(question.conditions)
    deadline = float(total.total_s[0, edge]) * 1.5
    other = int(total.total_s[0].argsort()[1])
    assert total.total_s[0, other] > deadline, "the second fastest plan is late anyway"
    budgets = Budgets(deadline_s=deadline)
    chooser = TableChooser(bench.DRIFT, made.tools, made.limits, budgets, arrivals_per_s=0.4)
    busy = replace(question, queues=np.array([[3.0, 0, 0, 0]]))
    pressed = replace(busy, virtual=np.array([[0.0, 50.0, 0.0, 0.0]]))
    assert chooser.choose(busy)[0] != edge  # the device is busy, the drift prefers a split
    assert chooser.choose(pressed)[0] == edge  # unless the deadline presses, which only the device can meet
    late = replace(pressed, waited_s=np.array([deadline]))
    assert chooser.choose(late)[0] != edge  # and not when it is missed whatever is chosen


FRAMES = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=6)


# Dies when lyapunov.py says `/ 7.0` for `/ elapsed_s`, and so it does with a bare 1/k: long frames then never settle.
@given(FRAMES, st.floats(0.01, 100), st.floats(0.1, 10))
def test_theta_converges_to_the_best_ratio_whatever_the_unit_of_time(
    frames: list[tuple[float, float]], unit: float, v: float
) -> None:
    """A closed loop with a cost and a duration per choice: the best long-run cost per time is the least ratio."""
    cost, seconds = (np.array(each) for each in zip(*frames, strict=True))
    seconds = seconds * unit
    best = float((cost / seconds).min())
    theta, elapsed = np.array(0.0), np.array(0.0)
    zero = np.zeros((len(cost), 4))
    for _ in range(400):
        values = ratio_objective(Penalty(1.0, v=v), cost, zero, zero, zero, zero, zero, zero, seconds, theta)
        chosen = int(values.argmin())
        elapsed = elapsed + seconds[chosen]
        theta = next_theta(theta, v * cost[chosen], seconds[chosen], elapsed)
    assert theta / v == pytest.approx(best, rel=0.05)


# Dies when lyapunov.py says `(queues * (work` for `(weights * queues * (work`.
def test_a_queue_in_the_loop_is_weighed_like_everywhere_else() -> None:
    one = np.array(1.0)
    loads, speed = np.array([2.0, 0, 0, 0]), np.array([0.5, 0, 0, 0])
    value = ratio_objective(Penalty(1.0), one, np.full(4, 3.0), loads, np.full(4, 5.0), speed, ZERO, ZERO, one, one)
    assert value == 1 + 5 * 3 * (2 - 0.5) - 1
