"""Knobs over the exact solver: neutral ones change nothing, others only what the filter allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.bench.simulator import case_tables, random_menus
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import EVERYTHING, Menu, Past
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.features import FULL, NAMES, features
from splitwise_llm.policies.guided import LATER, REFUSE, STAY, Constant, Guide
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Constants, Knobs, Mode
from splitwise_llm.policies.mind import best_actions
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.scenarios import FLOOR, Case, Scenario, build

CASE = Case(("orin-nx-16gb",), "gpt2-xl", 0.3)
ROW = Scenario("small", "", "", (CASE,), floor=FLOOR)


@pytest.fixture(scope="module")
def params() -> Params:
    return build(ROW, CASE, case_tables(ROW, CASE))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide(EVERYTHING, ROW.limits, arrivals_per_s=CASE.per_s)


def menus(params: Params, states: int = 600) -> Iterator[Menu]:
    for menu in random_menus(params, states):
        past = Past.nothing(len(menu.current))
        yield replace(menu, past=replace(past, is_down=~menu.admissible.all(axis=1)))


def test_neutral_knobs_are_exact_drift_plus_penalty(params: Params, guide: Guide) -> None:
    drift = find_chooser("drift", EVERYTHING, ROW.limits, arrivals_per_s=CASE.per_s)
    for menu in menus(params):
        assert np.array_equal(guide.choose(menu), drift.choose(menu))


def test_constants_of_one_run_like_drift(params: Params, guide: Guide) -> None:
    traces = draw(params, 3, range(4), 12)
    drift = find_chooser("drift", EVERYTHING, ROW.limits, arrivals_per_s=CASE.per_s)
    records = [simulate(params, traces, one) for one in (drift, Constant(guide))]
    assert np.array_equal(records[0].total_s, records[1].total_s)


actions = st.lists(st.tuples(*(st.integers(0, size - 1) for size in SIZES)), min_size=8, max_size=8)


# Dies when policies/guided.py says `np.where(kept, wanted, wanted)` for `np.where(kept, priced.best, wanted)`.
@settings(max_examples=60, deadline=None)
@given(number=st.integers(0, 5), chosen=actions, eta=st.sampled_from([0.0, 0.15, 0.45]))
def test_whatever_is_turned_nothing_inadmissible_and_nothing_worse_than_the_bound_is_done(
    params: Params, number: int, chosen: list[tuple[int, ...]], eta: float
) -> None:
    guide = Guide(EVERYTHING, ROW.limits, arrivals_per_s=CASE.per_s, eta=eta, slack=eta)
    menu = list(menus(params, 400))[number % 3]
    turned = np.resize(np.array(chosen), (len(menu.current), len(SIZES)))
    priced = guide.price(menu)
    guided = guide.guide(priced, Knobs.of(turned))
    assert (guided.d1 <= priced.least + eta * np.abs(priced.least) + eta).all()
    n = np.arange(len(turned))
    plan = np.where(guided.choice == STAY, np.maximum(menu.current, 0), guided.choice)
    real = guided.choice >= 0
    assert np.isfinite(priced.d1[n[real], plan[real]]).all()
    refused = priced.fresh & (guided.choice == REFUSE)
    assert (turned[refused, 0] == Mode.SHED).all()
    assert (turned[guided.choice == LATER, 0] == Mode.WAIT).all()


def test_modes_keep_to_their_machines_where_they_are_not_masked(params: Params, guide: Guide) -> None:
    wide = replace(guide, eta=1e9)
    seen = set()
    for menu in menus(params):
        priced = wide.price(menu)
        masks = wide.masks(priced)
        for mode, machines in ((Mode.EDGE, {0}), (Mode.BOTH, {0, 1})):
            knobs = Knobs.of(np.tile([mode, *NEUTRAL[1:]], (len(menu.current), 1)))
            choice = wide.guide(priced, knobs).choice
            for n in np.nonzero(masks[:, mode] & (choice >= 0))[0]:
                used = menu.table.bills[choice[n]].decision.partition.machines
                assert set(used) == machines
                seen.add(mode)
    assert seen == {Mode.EDGE, Mode.BOTH}


def test_what_the_filter_would_hold_back_is_masked(params: Params, guide: Guide) -> None:
    strict = replace(guide, eta=0.0, slack=0.0)
    for menu in menus(params, 200):
        priced = strict.price(menu)
        masks = strict.masks(priced)
        assert masks[:, Mode.AUTO].all()
        for mode in (Mode.EDGE, Mode.CLOUD, Mode.BOTH, Mode.WAIT, Mode.SHED):
            which = masks[:, mode]
            knobs = Knobs.of(np.tile([mode, *NEUTRAL[1:]], (len(which), 1)))
            assert not strict.guide(priced, knobs).kept[which].any()


def test_dearer_devices_get_less_work(params: Params, guide: Guide) -> None:
    traces = draw(params, 3, range(6), 20)
    shares = []
    for device in (0.0, 1.0, 8.0):
        constant = Constant(replace(guide, eta=1e9), Constants(device=device))
        shares.append(float(simulate(params, traces, constant).mode_s[..., 0].sum()))
    assert shares[0] > shares[2]


def test_what_all_waits_add_up_to_stays_within_the_bound(params: Params, guide: Guide) -> None:
    traces = draw(params, 3, range(4), 10)
    waits = np.array([[Mode.WAIT, *NEUTRAL[1:]]])

    class Waits:
        in_flight = True

        def choose(self, menu: Menu) -> np.ndarray:
            return guide.choose(menu, Knobs.of(np.tile(waits, (len(menu.current), 1))))

    plain, slow = (simulate(params, traces, one) for one in (Constant(guide), Waits()))
    assert (slow.status == 0).all()
    assert np.nanmean(slow.total_s) < 1.4 * np.nanmean(plain.total_s)


# Dies when policies/features.py says `[_FAR]]` for `[FULL]]`.
def test_a_cloud_that_is_full_looks_the_same_however_full_it_is_and_is_priced_as_it_is(
    params: Params, guide: Guide
) -> None:
    menu = next(menus(params))
    t_ref_s = guide.price(menu).prepared.penalty.t_ref_s

    def behind(reference_times: float) -> Menu:
        queues = menu.queues.copy()
        queues[:, 3] = reference_times * t_ref_s
        return replace(menu, queues=queues)

    half, full, fuller = (guide.price(behind(each)) for each in (FULL / 2, FULL, 4 * FULL))
    seen = [features(each)[:, NAMES.index("queue cloud")] for each in (half, full, fuller)]
    assert (seen[0] < seen[1]).all()
    assert np.array_equal(seen[1], seen[2])
    cloud = full.prepared.classes == 1
    assert (fuller.d1[:, cloud] > full.d1[:, cloud])[np.isfinite(full.d1[:, cloud])].all()


# Dies when policies/guided.py says `self._bound(least, self.eta, self.slack) - least` for
# `self._bound(least, ETA, SLACK) - least`.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("times", [0.0, 3.0])
def test_what_is_seen_does_not_depend_on_the_filter(params: Params, guide: Guide, times: float) -> None:
    other = replace(guide, eta=times * guide.eta, slack=times * guide.slack, _tables={})
    for menu in menus(params, 60):
        priced, same = guide.price(menu), other.price(menu)
        assert np.array_equal(features(same), features(priced))
        assert not np.array_equal(same.bound, priced.bound)


def test_the_likeliest_value_that_is_not_masked_is_taken() -> None:
    logits = np.zeros((1, sum(SIZES)), np.float32)
    logits[0, Mode.SHED] = 5.0
    masks = np.ones(logits.shape, bool)
    assert best_actions(logits, masks)[0, 0] == Mode.SHED
    masks[0, Mode.SHED] = False
    assert best_actions(logits, masks)[0, 0] == Mode.AUTO
    assert Knobs.neutral(2).cloud.tolist() == [1.0, 1.0]
    assert HEADS[0][0] == "mode"


def test_constants_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RequestError, match="budgets 1 or more"):
        Constants(budgets=0.5)
