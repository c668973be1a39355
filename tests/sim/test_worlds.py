"""What must hold in any simulated world: nothing is lost, nothing depends on who decides but what was decided."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from worlds import CLOUD, EDGE, STEADY, Exact, Only, U, constant_table, table

from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import Menu
from splitwise_llm.sim.asking import LATER, questions
from splitwise_llm.sim.counters import uniforms
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.endings import ABANDONED, DONE, SHED
from splitwise_llm.sim.episode import Records, Run, advance, simulate, slope
from splitwise_llm.sim.params import Arrivals, CloudClass, CloudProcess, LinkClass, LinkProcess, Params, Seeing
from splitwise_llm.sim.physics import Physics
from splitwise_llm.sim.state import FREE, State, initial

MBIT = 1e6 / 8
WAN = LinkProcess(
    (
        LinkClass(0.02, 50 * MBIT, 50 * MBIT, 20.0),
        LinkClass(0.04, 10 * MBIT, 10 * MBIT, 10.0),
        LinkClass(0.08, 2 * MBIT, 2 * MBIT, 6.0),
        LinkClass(0.08, 2 * MBIT, 2 * MBIT, 5.0, is_up=False),
    )
)
CLOUDS = CloudProcess((CloudClass(32, 0.1, 60.0), CloudClass(64, 1.0, 30.0), CloudClass(96, 6.0, 15.0)))
PHYSICS = Physics([table()])
BUSY = Params(
    PHYSICS, WAN, CLOUDS, Arrivals(per_s=0.15, burst=2.0), penalty=Penalty(t_ref_s=2.0), horizon_s=600.0,
    budgets=Budgets(energy_j=20.0, deadline_s=5.0),
)  # fmt: skip
EXACT = Exact(BUSY.penalty, BUSY.budgets)


class Chance:
    """Any plan at any time, sometimes nothing: what a bad policy could do. Seeded, so that runs can be repeated."""

    in_flight = True

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        return self.rng.integers(LATER, len(menu.table), len(menu.current))


def same(one: Records, other: Records, at: slice = slice(None)) -> bool:
    names = [field.name for field in fields(Records) if field.name not in ("params", "traces", "decisions", "steps")]
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)[at], equal_nan=True)
        for name in names[: names.index("end_s") + 1]
    )


def test_every_request_that_arrives_is_completed_shed_or_still_there() -> None:
    for chooser in (EXACT, Chance(), Only(CLOUD)):
        run = Run.begin(BUSY, draw(BUSY, 1, range(8), 20), chooser)
        while not run.state.is_over.all():
            run.ask()
            run.advance()
            ended = (run.records.status >= 0).sum(axis=2)
            inside = (run.state.phase != FREE).sum(axis=2)
            assert (run.state.taken == ended + inside).all()
        records = run.finish()
        assert np.isin(records.status, [DONE, SHED]).all()
        done = records.status == DONE
        assert (records.tokens[done] == 128).all()
        assert np.allclose(records.mode_s.sum(axis=3)[done], records.total_s[done])
        assert (records.ttft_s[done] <= records.total_s[done] + 1e-9).all()


def test_energy_of_requests_is_what_their_device_drew_less_its_idle_hours() -> None:
    """Idle power is shared among requests in flight, so nothing is counted twice."""
    params = replace(BUSY, slots=16)  # nobody waits at a door, where nobody is charged
    records = simulate(params, draw(params, 2, range(4), 20), Only(U))
    idle_w = PHYSICS.idle_w[0]
    assert records.device_total_j is not None
    assert records.seconds is not None
    for world in range(4):
        begin, stop = records.arrival_s[world, 0], records.end_s[world, 0]
        edges = np.sort(np.concatenate([begin, stop]))
        middle = (edges[1:] + edges[:-1]) / 2
        busy = ((begin[:, None] <= middle) & (stop[:, None] > middle)).any(axis=0)
        free_s = records.seconds[world] - (np.diff(edges) * busy).sum()
        expected = records.device_total_j[world, 0] - idle_w * free_s
        assert records.device_j[world].sum() == pytest.approx(expected, rel=1e-6)


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    one, two, other = (simulate(BUSY, draw(BUSY, seed, range(3), 10), EXACT) for seed in (7, 7, 8))
    assert same(one, two)
    assert not same(one, other)


def test_worlds_of_a_batch_do_not_touch_each_other() -> None:
    traces = draw(BUSY, 4, range(5), 10)
    together = simulate(BUSY, traces, EXACT)
    for world in range(5):
        part = slice(world, world + 1)
        assert same(simulate(BUSY, traces.part(part), EXACT), together, part)


def test_two_policies_meet_the_same_arrivals_lengths_and_links() -> None:
    """Common randomness: what happens at a time does not depend on what was decided before."""

    def history(plan: int) -> tuple[Records, dict[float, int]]:
        run = Run.begin(BUSY, draw(BUSY, 9, [0], 15), Only(plan))
        seen = {}
        while not run.state.is_over.all():
            run.ask()
            run.advance()
            seen[round(float(run.state.now[0]))] = int(run.state.row[0, 0])
        return run.finish(), seen

    (one, links), (two, others) = history(EDGE), history(CLOUD)
    assert np.array_equal(one.arrival_s, two.arrival_s)
    assert np.array_equal(one.tokens, two.tokens)
    changes = BUSY.link.classes
    both = [t for t in links if t in others]
    assert len(both) > 20
    assert len(changes) == 4
    equal = sum(links[t] == others[t] for t in both)
    assert equal > 0.9 * len(both)  # events lie up to half a second apart, links change meanwhile


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert np.array_equal(uniforms(1, 2, "gap", 5), uniforms(1, 2, "gap", 50)[:5])
    assert not np.array_equal(uniforms(1, 2, "gap", 5), uniforms(1, 3, "gap", 5))
    short, long = draw(BUSY, 1, [0], 5), draw(BUSY, 1, [0], 50)
    assert np.array_equal(short.arrival_s, long.arrival_s[:, :, :5])
    assert np.array_equal(short.link.times_s, long.link.times_s)


def test_advance_is_a_pure_function() -> None:
    traces = draw(BUSY, 1, range(2), 5)
    state = initial(BUSY, traces)
    for _ in range(30):
        before = state.copy()
        answers = [(question, EXACT.choose(question.menu)) for question in questions(BUSY, traces, state)]
        one, _ = advance(BUSY, traces, state, answers)
        two, _ = advance(BUSY, traces, state, answers)
        for field in fields(State):
            assert np.array_equal(getattr(state, field.name), getattr(before, field.name), equal_nan=True), field.name
            assert np.array_equal(getattr(one, field.name), getattr(two, field.name), equal_nan=True), field.name
        state = one
    assert state.now.min() > 0


def test_queues_stay_bounded_below_capacity_and_grow_above_it() -> None:
    """One request takes a second of the device: at 0.9 per second the backlog has no slope, at 1.1 it has."""
    physics = Physics([constant_table(1.0)])
    slopes = []
    for per_s in (0.9, 1.1):
        params = Params(
            physics,
            STEADY,
            arrivals=Arrivals(per_s=per_s, prompt_tokens=8, output_tokens=2),
            epoch_s=1e18,
            sample_s=5.0,
        )
        traces = draw(params, 0, range(16), 1200)
        until = float(traces.arrival_s[:, :, -1].min())
        records = simulate(params, traces, Only(0, in_flight=False), until_s=until)
        assert records.queue_s is not None
        assert records.in_flight is not None
        late = records.queue_s > 0.25 * until
        slopes.append(slope(records.queue_s[late], records.in_flight[late]))
    assert slopes[0] < 0.01
    assert slopes[1] == pytest.approx(0.1, rel=0.3)


def test_bursts_keep_the_mean_rate_and_spread_the_gaps() -> None:
    plain, bursty = (
        draw(replace(BUSY, arrivals=Arrivals(per_s=0.5, burst=burst)), 0, range(32), 400).arrival_s[:, 0]
        for burst in (1.0, 6.0)
    )
    for arrivals in (plain, bursty):
        assert (400 / arrivals[:, -1]).mean() == pytest.approx(0.5, rel=0.1)
    gaps = [np.diff(a, axis=1) for a in (plain, bursty)]
    assert gaps[1].std() / gaps[1].mean() > 1.15 * gaps[0].std() / gaps[0].mean()


def test_a_closed_loop_thinks_after_each_answer() -> None:
    params = replace(BUSY, arrivals=Arrivals(think_s=3.0))
    records = simulate(params, draw(params, 0, range(16), 40), Only(CLOUD))
    gaps = records.arrival_s[..., 1:] - records.end_s[..., :-1]
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(3.0, rel=0.15)


def test_an_empty_battery_ends_everything() -> None:
    cell = table().world.hosts[0].device.__class__
    assert cell is not None
    base = table()
    device = replace(base.world.hosts[0].device, battery_j=400.0)
    world = replace(base.world, hosts=(replace(base.world.hosts[0], device=device), base.world.hosts[1]))
    params = replace(BUSY, physics=Physics([table(world)]), battery=True)
    records = simulate(params, draw(params, 0, range(4), 30), Only(EDGE))
    assert (records.status == ABANDONED).sum() > 0
    assert records.device_total_j is not None
    assert records.device_total_j == pytest.approx(400.0, rel=1e-6)


def test_virtual_queues_follow_what_was_spent_beyond_the_budgets() -> None:
    """Edge-only takes 105 J of a budget of 20, so the queue rises by 4.2 per request."""
    params = replace(BUSY, budgets=Budgets(energy_j=20.0))
    records = simulate(params, draw(params, 0, range(2), 4), Only(EDGE))
    assert records.virtual is not None
    expected = (records.device_j / 20.0 - 1).sum(axis=2)
    assert records.virtual[..., 0] == pytest.approx(expected, rel=1e-9)
    assert (records.virtual[..., 2:] == 0).all()


@pytest.mark.parametrize("answer", [LATER, -1])
def test_admission_can_be_put_off_or_refused(answer: int) -> None:
    """Who waits three epochs is served three seconds later; who is refused counts with the longest time."""

    class Patient:
        in_flight = True
        asked = 0

        def choose(self, menu: Menu) -> NDArray[np.int64]:
            self.asked += 1
            fresh = menu.current < 0
            if answer == LATER and self.asked > 3:
                return np.where(fresh, EDGE, -1)
            return np.full(len(fresh), answer)

    params = Params(PHYSICS, STEADY, arrivals=Arrivals(per_s=1e-3))
    records = simulate(params, draw(params, 0, [0], 1), Patient())
    alone = simulate(params, draw(params, 0, [0], 1), Only(EDGE))
    if answer == LATER:
        assert records.total_s == pytest.approx(alone.total_s + 3.0)
    else:
        assert (records.status == SHED).all()
        assert (records.total_s == params.t_max_s).all()


def test_lengths_are_predicted_with_the_stated_error_and_policies_see_only_that() -> None:
    params = replace(BUSY, arrivals=Arrivals(per_s=0.1, output_spread=0.6), seeing=Seeing(length_error=0.4))
    traces = draw(params, 0, range(64), 50)
    assert traces.output_tokens.mean() == pytest.approx(128, rel=0.05)
    error = np.log(traces.predicted_tokens / traces.output_tokens)
    assert error.std() == pytest.approx(0.4, rel=0.1)
    blind = draw(replace(params, seeing=Seeing(length_error=None)), 0, range(2), 5)
    assert (blind.predicted_tokens == 128).all()
    longer = replace(traces, output_tokens=traces.output_tokens + 1000)
    for world in (traces, longer):
        run = Run.begin(params, world, EXACT)
        while not run.state.is_asking.all():
            run.advance()
        menu = next(iter(questions(params, world, run.state))).menu
        assert np.array_equal(menu.remaining_tokens, traces.predicted_tokens[:, 0, 0] - 1)


def test_impossible_worlds_are_refused_with_what_to_do() -> None:
    with pytest.raises(SpecError, match="one table per kind"):
        replace(BUSY, kinds=(0, 1))
    with pytest.raises(SpecError, match="never up"):
        LinkProcess((LinkClass(0.01, 1e6, 1e6, is_up=False),))
    with pytest.raises(SpecError, match="1 to 64 plans"):
        Physics([])
    with pytest.raises(SpecError, match="at least one"):
        draw(BUSY, 0, [], 5)
