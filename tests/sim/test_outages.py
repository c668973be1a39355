"""Outages, moves and what is known late."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from worlds import CLOUD, EDGE, Exact, Only, U, table

from splitwise_llm.cost import Job, price
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.observation import Menu
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Records, Run, simulate
from splitwise_llm.sim.params import Arrivals, CloudClass, CloudProcess, LinkClass, LinkProcess, Params, Seeing
from splitwise_llm.sim.paths import Path
from splitwise_llm.sim.physics import Physics

MBIT = 1e6 / 8
UP, DOWN = LinkClass(0.02, 50 * MBIT, 50 * MBIT, 20.0), LinkClass(0.02, 50 * MBIT, 50 * MBIT, 10.0, is_up=False)
SLOW = LinkClass(0.08, 2 * MBIT, 2 * MBIT, 10.0)
MENU = table()
PHYSICS = Physics([MENU])
PARAMS = Params(PHYSICS, LinkProcess((UP, DOWN, SLOW)), arrivals=Arrivals(per_s=1e-3), penalty=Penalty(t_ref_s=1.0))


def planned(params: Params, changes: list[tuple[float, int]], arrivals: list[float]) -> Traces:
    """One world whose link goes through given (time, class) and whose requests come at given times."""
    traces = draw(params, 0, [0], len(arrivals))
    times = np.array([[[t for t, _ in changes] + [1e6]]])
    rows = np.array([[[row for _, row in changes]]])
    return replace(traces, link=Path(times, rows), arrival_s=np.array([[arrivals]], np.float64))


def alone(plan: int) -> float:
    return price(MENU.world, MENU.bills[plan].decision, Job(128, 128)).total_s


def run(params: Params, traces: Traces, chooser: object) -> Records:
    return simulate(params, traces, chooser)  # type: ignore[arg-type]


def test_the_cloud_goes_on_in_an_outage_and_delivers_afterwards() -> None:
    """Dies when generation stops with the link: the answer then ends at 5 + what was left, not at 5."""
    traces = planned(PARAMS, [(0.0, 0), (0.5, 1), (5.0, 0)], [0.0])
    records = run(PARAMS, traces, Only(CLOUD))
    assert alone(CLOUD) < 5.0
    assert float(records.total_s[0, 0, 0]) == pytest.approx(5.0 + UP.rtt_s / 2, abs=1e-6)


def test_a_short_outage_in_the_middle_of_a_stream_costs_nothing_in_the_end() -> None:
    traces = planned(PARAMS, [(0.0, 0), (0.3, 1), (0.6, 0)], [0.0])
    assert float(run(PARAMS, traces, Only(CLOUD)).total_s[0, 0, 0]) == pytest.approx(alone(CLOUD))


def test_a_split_stands_still_for_exactly_the_outage() -> None:
    traces = planned(PARAMS, [(0.0, 0), (1.0, 1), (4.0, 0)], [0.0])
    assert float(run(PARAMS, traces, Only(U)).total_s[0, 0, 0]) == pytest.approx(alone(U) + 3.0)


def test_the_device_does_not_care_about_outages() -> None:
    traces = planned(PARAMS, [(0.0, 1)], [0.0])
    assert float(run(PARAMS, traces, Only(EDGE)).total_s[0, 0, 0]) == pytest.approx(alone(EDGE))


def test_a_cloud_request_made_in_an_outage_waits_for_its_end() -> None:
    params = replace(PARAMS, cloud=CloudProcess((CloudClass(32, 0.5),)))
    traces = planned(params, [(0.0, 1), (7.0, 0)], [0.0])
    loads = {1: MENU.world.load(1, 32, 0.5)}
    one = price(MENU.world, MENU.bills[CLOUD].decision, Job(128, 128), MENU.world.conditions(loads))
    assert float(run(params, traces, Only(CLOUD)).total_s[0, 0, 0]) == pytest.approx(7.0 + one.total_s)


def test_reconnecting_and_waking_the_radio_take_their_time() -> None:
    link = replace(PARAMS.link, reconnect_s=0.4, wake_s=0.8, idle_after_s=10.0)
    params = replace(PARAMS, link=link)
    broken = planned(params, [(0.0, 0), (1.0, 1), (4.0, 0)], [0.0])
    assert float(run(params, broken, Only(U)).total_s[0, 0, 0]) == pytest.approx(alone(U) + 3.4)
    asleep = planned(params, [(0.0, 0)], [0.0, 100.0])
    first, second = run(params, asleep, Only(CLOUD)).total_s[0, 0]
    assert (first, second) == (pytest.approx(alone(CLOUD)), pytest.approx(alone(CLOUD) + 0.8))


class Script:
    """At admission the first plan; at the n-th epoch after it the n-th of the rest, then as it is."""

    in_flight = True

    def __init__(self, *plans: int) -> None:
        self.plans, self.menus = list(plans), list[Menu]()

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        self.menus.append(menu)
        return np.array([self.plans.pop(0) if self.plans else -1])


def test_failing_over_recomputes_only_what_had_been_delivered() -> None:
    """A second into an outage the cloud has nearly everything, and the device what had come before it."""
    params = replace(PARAMS, epoch_tokens=1e9)
    traces = planned(params, [(0.0, 0), (0.5, 1), (60.0, 0)], [0.0])
    script = Script(CLOUD, -1, EDGE)  # at admission, when the link goes, and a second later
    records = run(params, traces, script)
    one, edge = (price(MENU.world, MENU.bills[plan].decision, Job(128, 128)) for plan in (CLOUD, EDGE))
    delivered = 1 + (0.5 - one.ttft_s) / one.tpot_s
    expected = 1.5 + script.menus[2].entry_s[0, EDGE] + (128 - delivered) * edge.tpot_s
    assert float(records.total_s[0, 0, 0]) == pytest.approx(expected, rel=1e-6)
    assert script.menus[2].remaining_tokens[0] == pytest.approx(128 - delivered)
    assert records.moves[0, 0, 0] == 1


def test_cancelled_work_in_the_cloud_runs_until_the_cancellation_is_heard() -> None:
    """In an outage the cloud finishes an answer nobody wants; with the link up it stops at once."""
    joules = []
    for changes in ([(0.0, 0), (0.31, 1), (60.0, 0)], [(0.0, 0), (0.31, 2)]):
        records = run(PARAMS, planned(PARAMS, changes, [0.0]), Script(CLOUD, -1, EDGE))
        joules.append(float((records.total_j - records.device_j)[0, 0, 0]))
    whole = price(MENU.world, MENU.bills[CLOUD].decision, Job(128, 128))
    assert joules[0] == pytest.approx(whole.total_j - whole.device_j, rel=0.01)
    assert joules[1] < 0.6 * joules[0]


class Wavering:
    """The cloud, but for the device while requests are between two ages."""

    in_flight = True

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        age = menu.waited_s
        return np.where((age >= 0.3) & (age < 0.45), EDGE, CLOUD)


def test_an_aborted_move_returns_for_free_with_what_the_cloud_made_meanwhile() -> None:
    """The cloud, in an outage, had not heard of the move; nothing is generated, or paid for, twice."""
    params = replace(PARAMS, epoch_s=0.1)
    whole = price(MENU.world, MENU.bills[CLOUD].decision, Job(128, 128))
    for back, total in ((0.6, alone(CLOUD)), (2.0, 2.0 + UP.rtt_s / 2)):
        records = run(params, planned(params, [(0.0, 0), (0.3, 1), (back, 0)], [0.0]), Wavering())
        assert float(records.total_s[0, 0, 0]) == pytest.approx(total)
        assert records.moves[0, 0, 0] == 1
        cloud_j = float((records.total_j - records.device_j)[0, 0, 0])
        assert cloud_j == pytest.approx(whole.total_j - whole.device_j, rel=0.01)


def test_a_failed_move_ends_where_it_began_its_time_spent() -> None:
    traces = planned(PARAMS, [(0.0, 0)], [0.0])
    certain = replace(PARAMS, failed_moves=1.0)
    script = Script(U, EDGE)
    records = run(certain, traces, script)
    lost = script.menus[1].entry_s[0, EDGE]
    assert float(records.total_s[0, 0, 0]) == pytest.approx(alone(U) + lost, rel=1e-6)
    assert records.last_plan[0, 0, 0] == U
    assert run(PARAMS, traces, Script(U, EDGE)).last_plan[0, 0, 0] == EDGE


def test_an_outage_and_its_end_are_epochs() -> None:
    params = replace(PARAMS, epoch_s=1e9, epoch_tokens=1e9)
    script = Script(U)
    run(params, planned(params, [(0.0, 0), (1.0, 1), (4.0, 0)], [0.0]), script)
    assert len(script.menus) == 3
    assert [bool(menu.admissible[0, CLOUD]) for menu in script.menus] == [True, False, True]
    assert bool(script.menus[1].admissible[0, U])  # to stay is always possible
    assert script.menus[1].entry_s[0, U] == pytest.approx(params.outage_guess_s)


def test_what_is_seen_late_is_seen_late() -> None:
    for delay, expected in ((0.0, 0.08), (2.0, 0.02)):
        params = replace(PARAMS, seeing=Seeing(delay_s=delay))
        script = Script(EDGE, EDGE)
        run(params, planned(params, [(0.0, 0), (9.0, 2)], [0.0, 10.0]), script)
        place = PHYSICS.places.rtt
        fresh = [menu for menu in script.menus if menu.current[0] < 0]
        assert fresh[1].conditions[0, place] == expected


def test_without_traffic_a_device_does_not_learn_how_its_link_is() -> None:
    """It learns with the first cloud request after the change."""
    params = replace(PARAMS, seeing=Seeing(needs_traffic=True))
    place = PHYSICS.places.rtt
    script = Script(EDGE)
    run(params, planned(params, [(0.0, 0), (2.0, 2)], [0.0]), script)
    assert all(menu.conditions[0, place] == 0.02 for menu in script.menus)
    script = Script(CLOUD)
    run(params, planned(params, [(0.0, 0), (0.2, 2)], [0.0]), script)
    assert script.menus[-1].conditions[0, place] == 0.08


def test_drift_plus_penalty_fails_over_in_long_outages() -> None:
    """20 s without a link: who may move is far better in the tail than who waits for the cloud."""
    link = LinkProcess((replace(UP, mean_dwell_s=100.0), replace(DOWN, mean_dwell_s=20.0)))
    params = replace(PARAMS, link=link, arrivals=Arrivals(per_s=0.05), penalty=Penalty(t_ref_s=2.0))
    traces = draw(params, 0, range(64), 20)
    tail = [np.percentile(run(params, traces, chooser).total_s, 95) for chooser in (Only(CLOUD), Exact(params.penalty))]
    assert tail[1] < 0.6 * tail[0]


def test_periodic_outages_come_like_clockwork() -> None:
    params = replace(PARAMS, link=LinkProcess((UP, DOWN), periodic=True))
    traces = draw(params, 0, range(4), 1)
    for world in range(4):
        times = traces.link.times_s[world, 0]
        assert times[-1] == pytest.approx(30.0)
        lengths = np.diff(times)
        assert sorted([*lengths[1:-1].tolist(), lengths[0] + lengths[-1]]) == pytest.approx([10.0, 20.0])
    state = Run.begin(params, traces, Only(EDGE)).state
    assert len(set(state.next_s[:, 0].tolist())) == 4
