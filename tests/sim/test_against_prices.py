"""The simulator and the cost model cannot disagree: one request in a quiet world costs what `price` says."""

from __future__ import annotations

import numpy as np
import pytest
from worlds import CLOUD, CUT, EDGE, LINK, STEADY, Exact, Only, U, constant_table, table, world

from splitwise_llm.cost import Job, moving, price
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.sim.asking import answer, questions
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import Run, simulate
from splitwise_llm.sim.params import Arrivals, CloudClass, CloudProcess, LinkClass, LinkProcess, Params
from splitwise_llm.sim.physics import Physics

NAMES = ("edge", "cloud", "U", "cut", "U with chunks, int8 and drafts", "edge with drafts", "shared halves")


@pytest.mark.parametrize("plan", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize(
    "cloud", [CloudClass(), CloudClass(32, 0.1), CloudClass(96, 6.0)], ids=["idle", "busy", "over"]
)
def test_one_request_in_a_quiet_world_costs_what_price_says(plan: int, cloud: CloudClass) -> None:
    """Dies when an occupied second is counted twice, for example by adding the wait to the first unit."""
    menu = table()
    params = Params(Physics([menu]), STEADY, CloudProcess((cloud,)), Arrivals(per_s=1e-3))
    records = simulate(params, draw(params, 0, [0], 1), Only(plan))
    at = menu.world
    loads = {1: at.load(1, cloud.batch, cloud.wait_s)}
    one = price(at, menu.bills[plan].decision, menu.bills[plan].job, at.conditions(loads))
    figures = {
        "ttft": (records.ttft_s, one.wait_s + one.ttft_s), "tpot": (records.tpot_s, one.tpot_s),
        "total": (records.total_s, one.total_s), "device J": (records.device_j, one.device_j),
        "total J": (records.total_j, one.total_j), "usd": (records.usd, one.usd),
    }  # fmt: skip
    for name, (simulated, priced) in figures.items():
        assert float(simulated[0, 0, 0]) == pytest.approx(priced, rel=1e-6), name


def test_a_queue_of_whole_requests_waits_as_the_theory_of_m_d_1_says() -> None:
    """Mean wait `rho s / (2 (1 - rho))`. Dies when the device is shared by turns instead of first come first served."""
    service, load = 1.0, 0.6
    params = Params(
        Physics([constant_table(service)]), STEADY,
        arrivals=Arrivals(per_s=load / service, prompt_tokens=8, output_tokens=2), slots=8,
    )  # fmt: skip
    records = simulate(params, draw(params, 3, range(64), 400), Only(0, in_flight=False))
    counted = records.counted()
    wait = records.total_s[counted].mean() - service
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.05)
    assert (np.diff(records.end_s[counted].reshape(64, -1), axis=1) > 0).all()


def test_concurrent_cloud_requests_do_not_wait_for_each_other_and_splits_interleave() -> None:
    menu = table()
    for plan, slowest in ((CLOUD, 1.001), (U, 1.05)):
        params = Params(Physics([menu]), STEADY, arrivals=Arrivals(per_s=1e-3))
        traces = draw(params, 0, [0], 3)
        traces.arrival_s[:] = [0.0, 0.5, 1.0]
        records = simulate(params, traces, Only(plan))
        alone = price(menu.world, menu.bills[plan].decision, Job(128, 128)).total_s
        assert records.total_s.max() < slowest * alone


def test_a_move_takes_what_cost_moving_says() -> None:
    """From the U shape to the device after some tokens, at a context class of the table."""
    menu = table()
    params = Params(Physics([menu]), STEADY, arrivals=Arrivals(per_s=1e-3), epoch_tokens=64.0, epoch_s=1e9)
    traces = draw(params, 0, [0], 1)

    def total(second: int) -> float:
        run = Run.begin(params, traces, Only(U))
        count = 0
        while not run.state.is_over.all():
            for question in questions(params, traces, run.state):
                run.take(question, np.array([U if count == 0 else second]))
                count += 1
            run.advance()
        return float(run.finish().total_s[0, 0, 0])

    at = menu.world
    tokens = 65.0  # the first epoch: 64 tokens after the first one
    steps = [price(at, menu.bills[plan].decision, Job(128, 128)) for plan in (U, EDGE)]
    cost = moving(at, menu.bills[U].decision.partition, menu.bills[EDGE].decision, 192)
    expected = steps[0].ttft_s + (tokens - 1) * steps[0].tpot_s + float(cost.seconds(at.conditions()))
    expected += (128 - tokens) * steps[1].tpot_s
    assert total(EDGE) == pytest.approx(expected, rel=0.01)


def test_a_cut_device_link_halves_the_rate_of_those_who_fill_it() -> None:
    """Two prompts of 1,024 positions up one narrow link take twice as long as one."""
    narrow = world(link=LINK.parse("rtt=20ms up=5mbit down=50mbit"))
    menu = table(narrow, Job(1024, 2))
    link = LinkProcess((LinkClass.of(narrow.links[0, 1]),))
    params = Params(Physics([menu]), link, arrivals=Arrivals(per_s=1e-3, prompt_tokens=1024, output_tokens=2))
    both = draw(params, 0, [0], 2)
    both.arrival_s[:] = 0.0
    together = simulate(params, both, Only(CUT)).ttft_s.max()
    alone = simulate(params, draw(params, 0, [0], 1), Only(CUT)).ttft_s.max()
    assert together == pytest.approx(2 * alone, rel=0.08)


def test_the_exact_chooser_sees_in_the_menu_what_the_request_will_then_take() -> None:
    """Predicted at admission = simulated, when nothing changes and nobody else comes."""
    menu = table()
    params = Params(
        Physics([menu]),
        STEADY,
        CloudProcess((CloudClass(32, 0.1),)),
        Arrivals(per_s=1e-3),
        penalty=Penalty(t_ref_s=1.0),
    )
    traces = draw(params, 0, [0], 1)
    run = Run.begin(params, traces, Exact(params.penalty))
    while not run.state.is_asking.any():
        run.advance()
    question = next(iter(questions(params, traces, run.state)))
    later = question.menu.remaining_tokens[:, None]
    predicted = menu.at(question.menu.conditions, later).total_s[0]
    for plan in (EDGE, CLOUD, U):
        again = Run.begin(params, traces, Only(plan))
        while not again.state.is_over.all():
            again.ask()
            again.advance()
        assert float(again.finish().total_s[0, 0, 0]) == pytest.approx(predicted[plan], rel=1e-6)
    assert answer(params, traces, run.state, question, np.array([EDGE])) == []


def test_a_menu_says_how_long_the_device_is_busy_with_earlier_requests() -> None:
    """The second request's time on the device, waiting included, is what it was told at its admission."""
    menu = table()
    params = Params(Physics([menu]), STEADY, arrivals=Arrivals(per_s=1e-3))
    traces = draw(params, 0, [0], 2)
    traces.arrival_s[:] = [0.0, 1.0]
    run, told = Run.begin(params, traces, Only(EDGE)), 0.0
    while not run.state.is_over.all():
        for question in questions(params, traces, run.state):
            if question.menu.current[0] < 0:
                told = float(
                    menu.at(question.menu.conditions, question.menu.remaining_tokens[:, None]).total_s[0, EDGE]
                )
            run.take(question, np.array([EDGE]))
        run.advance()
    first, second = run.finish().total_s[0, 0]
    assert second == pytest.approx(told, rel=1e-6)
    assert second == pytest.approx(2 * first - 1.0, rel=1e-6)
