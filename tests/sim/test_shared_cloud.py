"""A cloud that the devices load themselves: batches, sessions, cache blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from worlds import CLOUD, STEADY, Exact, Only, U, table

from splitwise_llm.cost import Job, price
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.sim import cloud, step
from splitwise_llm.sim.asking import questions
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.endings import DONE
from splitwise_llm.sim.episode import Records, Run, simulate
from splitwise_llm.sim.params import Arrivals, LinkClass, LinkProcess, Params, SharedCloud
from splitwise_llm.sim.paths import Path
from splitwise_llm.sim.physics import Physics
from splitwise_llm.sim.state import WAIT, State

MENU = table()
PHYSICS = Physics([MENU])
ALONE = price(MENU.world, MENU.bills[CLOUD].decision, Job(128, 128))


def params(devices: int, **cloud: int | float) -> Params:
    return Params(
        PHYSICS, STEADY, SharedCloud(**cloud), Arrivals(per_s=1e-3), num_devices=devices,  # type: ignore[arg-type]
        penalty=Penalty(t_ref_s=1.0),
    )  # fmt: skip


def together(setting: Params, each: int = 1, apart_s: float = 0.0) -> Traces:
    traces = draw(setting, 0, [0], each)
    at = np.arange(setting.num_devices)[:, None] * apart_s + np.arange(each)[None] * 1000.0
    return replace(traces, arrival_s=at[None].astype(np.float64))


def run(setting: Params, traces: Traces, plan: int) -> Records:
    return simulate(setting, traces, Only(plan, in_flight=False))


@pytest.mark.parametrize("plan", [CLOUD, U])
def test_alone_in_the_cloud_a_request_costs_what_price_says(plan: int) -> None:
    setting = params(1)
    records = run(setting, together(setting), plan)
    one = price(MENU.world, MENU.bills[plan].decision, Job(128, 128))
    for simulated, priced in (
        (records.ttft_s, one.ttft_s),
        (records.total_s, one.total_s),
        (records.total_j, one.total_j),
    ):
        assert float(simulated[0, 0, 0]) == pytest.approx(priced, rel=0.01)


def test_an_iteration_takes_what_the_cost_model_says_of_a_batch() -> None:
    spec, host = MENU.world.spec, MENU.world.hosts[1]
    for batch, context in ((1, 256), (8, 100), (48, 1000), (400, 64)):
        iteration = params(1).server.iteration_s(np.array([float(batch)]), np.array([float(batch * context)]))
        assert float(iteration[0]) == pytest.approx(host.model_s(spec, 1, context, batch), rel=1e-9)


def test_a_full_batch_decodes_at_the_speed_of_its_iteration() -> None:
    """32 requests at the same time; while the first and the last prompts are taken in, fewer decode."""
    setting = params(32)
    records = run(setting, together(setting), CLOUD)
    spec, host = MENU.world.spec, MENU.world.hosts[1]
    fewest, most = (host.model_s(spec, 1, 192, batch) for batch in (20, 32))
    assert fewest < float(np.median(records.tpot_s)) < most
    assert float((records.total_j - records.device_j).mean()) < 0.1 * (ALONE.total_j - ALONE.device_j)


def test_verifying_drafts_fills_the_machine_sooner() -> None:
    """Four positions for each of many sequences: compute binds where reading weights did."""
    server = params(1).server
    few, many = (server.iteration_s(np.array([n, 4.0 * n]), np.array([n * 256.0] * 2)) for n in (1.0, 96.0))
    assert few[1] == pytest.approx(few[0], rel=0.01)
    assert many[1] > 1.5 * many[0]


def test_prompts_of_others_slow_who_is_decoding() -> None:
    setting = params(9)
    quiet = float(run(params(1), together(params(1)), CLOUD).tpot_s[0, 0, 0])
    traces = together(setting)
    traces.arrival_s[0, 1:, 0] = 0.5 + 0.02 * np.arange(8)  # eight prompts while the first one decodes
    slowed = run(setting, traces, CLOUD).tpot_s[0, 0, 0]
    assert slowed > 1.05 * quiet


def test_sessions_beyond_the_limit_wait_first_come_first_served() -> None:
    setting = params(6, sessions=2)
    records = run(setting, together(setting, apart_s=0.01), CLOUD)
    ends = records.end_s[0, :, 0]
    assert (np.diff(ends) > 0).all()
    waits = records.mode_s[0, :, 0, 3]
    assert waits[:2].max() < 0.05
    assert waits[5] == pytest.approx(2 * ALONE.total_s, rel=0.15)


def test_split_sessions_hold_their_slot_while_the_link_is_down() -> None:
    """Two sessions, one outage: a third request waits for it although nobody computes meanwhile."""
    link = LinkProcess((STEADY.classes[0], replace(STEADY.classes[0], is_up=False)))
    setting = replace(params(3, sessions=2), link=link)
    traces = together(setting, apart_s=0.01)
    times = np.tile(np.array([0.0, 0.5, 20.0, 1e6]), (1, 3, 1))
    rows = np.tile(np.array([0, 1, 0]), (1, 3, 1))
    times[0, 2, 1:3] = [900.0, 901.0]  # the third device keeps its link
    records = run(setting, replace(traces, link=Path(times, rows)), U)
    assert records.mode_s[0, 2, 0, 3] > 19.0


def test_when_blocks_run_out_the_last_to_come_is_preempted_and_starts_over() -> None:
    """Blocks for about two whole requests of 16, three ask: all are answered, one twice computed."""
    setting = params(3, blocks=36)
    records = run(setting, together(setting, apart_s=0.01), CLOUD)
    assert (records.status == DONE).all()
    assert records.preempted.sum() >= 1
    assert records.preempted[0, 0, 0] == 0
    roomy = run(params(3), together(params(3), apart_s=0.01), CLOUD)
    assert records.total_s.max() > 1.3 * roomy.total_s.max()
    assert (records.total_j - records.device_j).sum() > (roomy.total_j - roomy.device_j).sum()


def test_load_is_known_as_it_was_when_it_was_published() -> None:
    """A cloud that filled up just now looks empty until it says so."""
    for age, empty in ((0.0, False), (10.0, True)):
        setting = params(5, sessions=2, information_s=age)
        traces = together(setting, apart_s=0.05)
        traces.arrival_s[0, 4, 0] = 1.0
        going = Run.begin(setting, traces, Only(CLOUD, in_flight=False))
        seen = None
        while not going.state.is_over.all():
            for question in questions(setting, traces, going.state, in_flight=False):
                if 4 in question.slots[1]:
                    seen = question.menu
                going.take(question, np.full(len(question.slots[0]), CLOUD))
            going.advance()
        assert seen is not None
        assert (seen.conditions[0, PHYSICS.places.wait] == 0) == empty


# Dies when sim/asking.py says `s.published[e, 4]` for `s.published[e, 3]`.
@pytest.mark.parametrize(("sessions", "full"), [(2, True), (5, False)])
def test_who_is_served_is_no_queue_before_the_cloud_and_who_waits_is(sessions: int, full: bool) -> None:
    """Four requests are there when the fifth comes: with five slots it keeps nobody waiting, and is charged nothing for
    those four."""
    setting = params(5, sessions=sessions)
    traces = together(setting, apart_s=0.05)
    going = Run.begin(setting, traces, Only(CLOUD, in_flight=False))
    queue_s = []
    while not going.state.is_over.all():
        for question in questions(setting, traces, going.state, in_flight=False):
            queue_s += question.menu.queues[question.slots[1] == 4, 3].tolist()
            going.take(question, np.full(len(question.slots[0]), CLOUD))
        going.advance()
    assert (queue_s[-1] > 0) == full


# Dies when sim/asking.py says `s.published[e, 3]` for `np.where(s.granted[i], 0.0, s.published[e, 3])`.
def test_who_holds_a_slot_is_charged_no_queue_and_who_waits_is() -> None:
    """What a slot does to others was priced when it was asked for: nobody is sent away from one for their sake."""
    setting = params(5, sessions=2)
    traces = together(setting, apart_s=0.05)
    going = Run.begin(setting, traces, Only(CLOUD))
    charged: dict[bool, list[float]] = {False: [], True: []}
    while not going.state.is_over.all():
        for question in questions(setting, traces, going.state):
            s = going.state
            full = s.published[0, 3] > 0
            for holds, queue_s in zip(s.granted[question.slots].tolist(), question.menu.queues[:, 3], strict=True):
                if full:
                    charged[holds].append(float(queue_s))
            going.take(question, np.full(len(question.slots[0]), CLOUD))
        going.advance()
    assert charged[True]
    assert max(charged[True]) == 0.0
    assert charged[False]
    assert min(charged[False]) > 0.0


def test_nobody_is_lost_in_rush_hour_and_sessions_never_exceed_the_limit() -> None:
    setting = Params(
        PHYSICS, LinkProcess((LinkClass(0.02, 6e6, 6e6, 15.0), LinkClass(0.02, 6e6, 6e6, 3.0, is_up=False))),
        SharedCloud(sessions=4, blocks=60, information_s=1.0), Arrivals(per_s=0.15, burst=2.0), num_devices=12,
        penalty=Penalty(t_ref_s=2.0), slots=3, horizon_s=300.0,
    )  # fmt: skip
    going = Run.begin(setting, draw(setting, 2, range(2), 5), Exact(setting.penalty))
    waited = False
    while not going.state.is_over.all():
        going.ask()
        going.advance()
        state = going.state
        assert (state.granted.sum(axis=(1, 2)) <= 4).all()
        assert not (state.granted & (state.phase == WAIT)).any()
        waited |= bool((state.phase == WAIT).any())
    records = going.finish()
    assert waited
    assert (records.status == DONE).all()


# Dies when sim/cloud.py says `or False` for `or len(self.filling[0]) > 0`.
@pytest.mark.parametrize("plan", [CLOUD, U])
def test_once_settled_the_load_is_what_the_prices_make_of_it(plan: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and split sessions change the load by their prices, whole sessions that decode do not."""
    settle, settled = step._settle, 0

    def checked(params: Params, traces: Traces, s: State) -> cloud.Served:
        nonlocal settled
        served = settle(params, traces, s)
        assert not s.dirty.any()
        cloud.load(params, s, cloud.Served.of(params, s))
        assert not s.dirty.any()
        settled += 1
        return served

    monkeypatch.setattr(step, "_settle", checked)
    setting = params(8, sessions=6)
    run(setting, together(setting, apart_s=0.03), plan)
    assert settled > 20


# Killed by: SETTLING_ROUNDS = 1 in sim/step.py (load and prices then lag behind each other by an event).
def test_being_asked_and_staying_changes_nothing_for_a_crowd_in_the_cloud() -> None:
    setting = replace(params(24, sessions=12), arrivals=Arrivals(per_s=0.15))
    traces = draw(setting, 0, [0, 1], 4)
    never, always = (simulate(setting, traces, Only(CLOUD, in_flight=asked)) for asked in (False, True))
    assert always.decisions > 2 * never.decisions
    assert always.total_s[always.counted(0.0)].mean() == pytest.approx(
        never.total_s[never.counted(0.0)].mean(), rel=0.01
    )
