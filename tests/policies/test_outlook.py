"""In an outage: the device as what can be left when it ends, and waiting where that spares joules."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from splitwise_llm.bench.simulator import case_tables
from splitwise_llm.cost import Entry, Prices
from splitwise_llm.observation import EVERYTHING, PLAIN, Menu, Past
from splitwise_llm.policies.features import NAMES, features
from splitwise_llm.policies.guided import LATER, Constant, Guide
from splitwise_llm.policies.knobs import NEUTRAL, SIZES, START, Knobs
from splitwise_llm.policies.outlook import ENDS, with_returns
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.scenarios import CALM_CLOUD, FLOOR, MEC, WAN, Case, Scenario, build

CASE = Case(("orin-nx-16gb",), "llama-13b", 0.04)
ROW = Scenario("small", "", "", (CASE,), MEC, CALM_CLOUD, FLOOR, slots=1)
SLOW = Case(("raspberry-pi-5",), "llama-7b", 0.01)
OPEN = Scenario("open", "", "", (SLOW,), WAN, CALM_CLOUD, slots=1)


class Turned:
    """Always the same action."""

    in_flight = True

    def __init__(self, guide: Guide, action: tuple[int, ...]) -> None:
        self.guide, self.action = guide, np.array([action])

    def choose(self, menu: Menu) -> np.ndarray:
        return self.guide.choose(menu, Knobs.of(np.tile(self.action, (len(menu.current), 1))))


@pytest.fixture(scope="module")
def params() -> Params:
    return build(ROW, CASE, case_tables(ROW, CASE))


@pytest.fixture(scope="module")
def guide() -> Guide:
    return Guide(PLAIN, ROW.limits, arrivals_per_s=CASE.per_s)


def in_outage(params: Params, guide: Guide, left: float, outage_s: float, ahead_s: float = 0.5) -> Menu:
    """One system on the best plan that uses both machines, its link lost, the way to the device `ahead_s`."""
    table = params.physics.tables[0]
    plans, places = len(table), params.physics.places
    x = table.world.conditions()[None].copy()
    both = np.nonzero(params.physics.uses_cloud & guide.prepare(table).allowed)[0]
    current = both[table.at(x[0]).total_s[both].argmin()]
    x[:, places.wait] += outage_s
    device = ~params.physics.uses_cloud
    entry = np.where(device, ahead_s, 3.0 + outage_s)[None]
    entry[0, current] = outage_s
    admissible = device[None].copy()
    admissible[0, current] = True
    zero = np.zeros((1, plans))
    past = replace(Past.nothing(1), is_down=np.ones(1, np.bool_))
    return Menu(
        table, x, admissible, np.zeros((1, 4)), np.zeros((1, 4)), np.array([current]), np.array([left]), entry, zero,
        zero, np.zeros(1), past, np.array([outage_s]),
    )  # fmt: skip


def priced(guide: Guide, menu: Menu, joule_s: float) -> Prices:
    """Of all plans, those on the device with returns."""
    prepared = guide.prepare(menu.table)
    entry = Entry(menu.entry_s, menu.entry_device_s, menu.entry_cloud_s)
    prices = menu.table.at(menu.conditions, menu.remaining_tokens[:, None], entry)
    return with_returns(menu, prices, prepared.device, prepared.returns[None], np.asarray(menu.outage_s), joule_s)


def expected(params: Params, guide: Guide, menu: Menu) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Total seconds of all plans as if for good and with returns, and which are on the device."""
    prepared = guide.prepare(menu.table)
    entry = Entry(menu.entry_s, menu.entry_device_s, menu.entry_cloud_s)
    prices = menu.table.at(menu.conditions, menu.remaining_tokens[:, None], entry)
    device = np.nonzero(prepared.classes == 0)[0]
    goes = (prepared.allowed & (prepared.classes > 0))[None]
    found = with_returns(menu, prices, device, goes, np.asarray(menu.outage_s), 0.0)
    return prices.total_s[0], found.total_s[0], prepared.classes == 0


def test_a_plan_that_can_be_left_costs_no_more_than_one_for_good_and_others_cost_the_same(
    params: Params, guide: Guide
) -> None:
    for left in (5.0, 60.0, 120.0):
        for outage_s in (0.5, 4.0, 60.0):
            plain, found, device = expected(params, guide, in_outage(params, guide, left, outage_s))
            assert (found[device] <= plain[device] + 1e-9).all()
            assert np.array_equal(found[~device], plain[~device])


# Dies when policies/outlook.py says `ends / np.maximum(begin[_TOTAL], SMALL)` for
# `np.minimum(ends / np.maximum(begin[_TOTAL], SMALL), 1.0)`.
def test_who_returns_has_spent_the_outage_and_goes_on_as_the_cloud_does_then(params: Params, guide: Guide) -> None:
    """End by end: the outage, then the cloud with what is left, unless to stay takes less."""
    left, outage_s, ahead_s = 126.0, 3.0, 0.5
    menu = in_outage(params, guide, left, outage_s, ahead_s)
    plain, found, device = expected(params, guide, menu)
    table, prepared, none = menu.table, guide.prepare(menu.table), np.zeros((1, 1))
    x = menu.conditions.copy()
    x[:, params.physics.places.wait] -= outage_s
    zero = np.zeros_like(menu.entry_s)
    each = table.at(x, none + left, Entry(zero, zero, zero)).total_s[0] / left
    anew = table.at(x, none)
    job = table.bills[0].job
    again = anew.service_s[0] * (1 + (job.tokens_out - 1 - left) / job.prompt_tokens) + anew.wait_s[0]
    back = menu.entry_s[0] - outage_s
    on, off = (np.where(prepared.allowed & ~device, begin + left * each, np.inf).argmin() for begin in (back, again))
    for plan in np.nonzero(device)[0]:
        totals = []
        for end in outage_s * ENDS:
            made = min(max(end - ahead_s, 0.0) / each[plan], left)
            rest = back[on] + left * each[on] if end < ahead_s else again[off] + (left - made) * each[off]
            totals.append(min(plain[plan], end + rest))
        assert found[plan] == pytest.approx(np.mean(totals), rel=1e-9)
        assert found[plan] < plain[plan]


# Dies when policies/outlook.py says `for figure in (_TOTAL,):` for `for figure in (_TOTAL, _SERVICE):`.
# Dies when policies/outlook.py says `figures[_TOTAL] if joule_s else` for
# `figures[_TOTAL] + joule_s * figures[_JOULES] if joule_s else`.
def test_seconds_add_up_and_joules_count_where_they_are_to(params: Params, guide: Guide) -> None:
    spared = 0.0
    for left in (20.0, 60.0, 120.0):
        for outage_s in (0.5, 4.0, 20.0):
            menu = in_outage(params, guide, left, outage_s)
            menu = replace(menu, past=replace(menu.past or Past.nothing(1), age_s=np.array([1.5])))
            blind, seeing = (priced(guide, menu, joule_s) for joule_s in (0.0, 0.5))
            device = guide.prepare(menu.table).device
            for each in (blind, seeing):
                assert np.allclose(each.total_s, each.service_s + each.wait_s, rtol=1e-12)
            costs = [(each.total_s + 0.5 * each.device_j)[0, device] for each in (blind, seeing)]
            assert (costs[1] <= costs[0] + 1e-9).all()
            spared = max(spared, float((costs[0] - costs[1]).max()))
    assert spared > 0


def test_in_a_short_outage_the_device_costs_hardly_more_than_to_stay_and_in_a_long_one_what_it_costs_for_good(
    params: Params, guide: Guide
) -> None:
    """Who is not there yet returns for nothing."""
    menu = in_outage(params, guide, 100.0, 0.2, ahead_s=50.0)
    plain, found, device = expected(params, guide, menu)
    assert found[device].min() == pytest.approx(plain[menu.current[0]], rel=1e-6)
    plain, found, device = expected(params, guide, in_outage(params, guide, 100.0, 1e5))
    assert found[device].min() == pytest.approx(plain[device].min(), rel=1e-6)


# Dies when policies/guided.py says `np.maximum(expected, values[at])` for `np.minimum(expected, values[at])`.
def test_the_outlook_goes_over_where_drift_stays_and_the_filter_knows_what_it_is_worth(
    params: Params, guide: Guide
) -> None:
    tight = replace(guide, eta=0.0, slack=0.0)
    moved = 0
    for left in np.arange(10.0, 127.0, 4.0):
        menu = in_outage(params, guide, float(left), 6.0)
        priced = tight.price(menu)
        drift = tight.choose(menu)[0]
        guided = tight.guide(priced, Knobs.of(np.array([START])))
        assert guided.d1[0] <= priced.least[0]
        moved += int(drift < 0 and guided.choice[0] >= 0)
    assert moved > 0


def test_it_can_be_turned_on_in_outages_only_and_is_off_when_neutral(params: Params, guide: Guide) -> None:
    menu = in_outage(params, guide, 60.0, 4.0)
    up = replace(menu, past=Past.nothing(1), outage_s=0.0)
    assert guide.masks(guide.price(menu))[0, sum(SIZES) - 1]
    assert not guide.masks(guide.price(up))[0, sum(SIZES) - 1]
    turned = Knobs.of(np.array([START]))
    assert np.array_equal(guide.choose(up, turned), guide.choose(up))
    seen = dict(zip(NAMES, features(guide.price(menu))[0].tolist(), strict=False))
    assert seen["outlook device"] > 0
    assert features(guide.price(up))[0, NAMES.index("outlook device")] == 0.0
    assert NEUTRAL[-1] == 0


def test_it_saves_time_where_outages_are_waited_for(params: Params, guide: Guide) -> None:
    traces = draw(params, 5, range(12), 20)
    plain, looking = (simulate(params, traces, one) for one in (Constant(guide), Turned(guide, START)))
    assert np.nanmean(looking.total_s) < 0.99 * np.nanmean(plain.total_s)


def at_the_door(made: Params) -> Menu:
    """One system in an outage whose request has not begun."""
    table = made.physics.tables[0]
    past = replace(Past.nothing(1), is_down=np.ones(1, np.bool_))
    x = table.world.conditions()[None].copy()
    x[:, made.physics.places.wait] += 5.0
    zero = np.zeros((1, len(table)))
    return Menu(
        table, x, ~made.physics.uses_cloud[None], np.zeros((1, 4)), np.zeros((1, 4)), np.array([-1]),
        np.array([float(table.bills[0].later_tokens)]), zero, zero, zero, np.zeros(1), past, np.array([5.0]),
    )  # fmt: skip


def test_waiting_at_admission_is_for_joules_alone() -> None:
    menu = at_the_door(build(OPEN, SLOW, case_tables(OPEN, SLOW)))
    choices = {}
    for w_energy in (0.0, 0.02):
        guide = Guide(EVERYTHING, OPEN.limits, arrivals_per_s=0.01, w_energy=w_energy)
        choices[w_energy] = int(guide.choose(menu, Knobs.of(np.array([START])))[0])
        assert guide.choose(menu)[0] >= 0
    assert choices[0.0] >= 0
    assert choices[0.02] == LATER


# Dies when policies/guided.py says `if fresh.all():` for `if fresh.any():`.
def test_what_waiting_spares_is_the_same_beside_a_system_that_runs() -> None:
    made = build(OPEN, SLOW, case_tables(OPEN, SLOW))
    menu = at_the_door(made)
    guide = Guide(EVERYTHING, OPEN.limits, arrivals_per_s=0.01, w_energy=0.02)
    alone = guide.price(menu).prospect
    running = replace(menu, current=np.nonzero(~made.physics.uses_cloud)[0][:1])
    columns = {
        item.name: np.concatenate([getattr(menu, item.name), getattr(running, item.name)])
        for item in fields(Menu)
        if item.name not in ("table", "past")
    }
    past = replace(Past.nothing(2), is_down=np.ones(2, np.bool_))
    both = guide.price(Menu(menu.table, past=past, **columns)).prospect
    assert alone is not None
    assert both is not None
    assert alone.spared[0] > 0
    assert both.spared.tolist() == [alone.spared[0], -1.0]
