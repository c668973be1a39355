"""The policy `splitwise` asked about one session: never what is forbidden, never worse than its filter lets."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from neutral_networks import network
from random_worlds import TWO_MACHINES, Instance, instance
from test_in_flight import CLOUD, CRAWL, EDGE, JOB, SPEC, THREE, TWO, WAN, drawn, flying

from splitwise_llm.cost import Floor, Host, Job, Limits, Table, World, bill, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import EPOCHS, SEEN, MachineView, Observation, Past, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies import find_policy, mind, one_session
from splitwise_llm.policies.entries import Entries
from splitwise_llm.policies.guided import ETA, SLACK
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, Mode
from splitwise_llm.policies.mind import STALE_S, Splitwise
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.policies.one_session import MAX_PLANS, Shelf, ask
from splitwise_llm.policies.planners import typical
from splitwise_llm.rebuild import Holdings
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

NEUTRAL_ONE = Splitwise(weights=network())
FROM_DISK = mind.shipped.__wrapped__


def wanting(**heads: float) -> Splitwise:
    """One that always turns these knobs."""
    wants = [heads_.index(float(heads[name])) if name in heads else neutral
             for (name, heads_), neutral in zip(HEADS, NEUTRAL, strict=True)]  # fmt: skip
    return Splitwise(weights=network(tuple(wants)))


def admitted(world: World, job: Job = JOB, tools: Tools | None = None, **others: object) -> Observation:
    views = tuple(
        MachineView(f"m{n}", True, int(host.device.memory_bytes), Dtype.FP16, Weights.FULL, profiled=True)
        for n, host in enumerate(world.hosts)
    )
    tools = tools or Tools((WirePrecision.FP16,), (None, 32), (0, 2))
    return Observation(
        world.spec, views, job.prompt_tokens, job.tokens_out, world=world, tools=tools,
        **others,  # type: ignore[arg-type]
    )  # fmt: skip


def remembered(dice: np.random.Generator, age_s: float = 0.0) -> Past:
    """Any past, of any length."""
    epochs = dice.exponential(size=(1, EPOCHS, len(SEEN))) * (np.arange(EPOCHS) < dice.integers(EPOCHS + 1))[:, None]
    moments = np.abs(dice.normal(size=(3, 1, 3))) * 5
    return Past(
        dice.random(1) < 0.5, dice.exponential(10, 1), np.array([age_s]), np.array([4.0]),
        dice.exponential(size=(1, 2)), epochs, *moments,
    )  # fmt: skip


def observations(seed: int) -> Observation:
    """Anything about two machines: at admission or in flight, with caches lost, budgets, queues and a past."""
    r, dice = random.Random(seed), np.random.default_rng(seed)
    others: dict[str, object] = {
        "queues": tuple(dice.exponential(size=4)), "virtual": tuple(dice.exponential(size=4)),
        "budgets": r.choice([Budgets(), Budgets(energy_j=1.0, deadline_s=0.2, nats=0.05)]),
        "waited_s": r.choice([0.0, 0.5, 1e4]), "arrivals_per_s": r.choice([0.0, 0.3]),
        "past": r.choice([None, remembered(dice), remembered(dice, 100.0)]),
    }  # fmt: skip
    if r.random() < 0.4:
        one: Instance = instance(seed, TWO_MACHINES, menus=False)
        seen = admitted(one.world, one.job, one.tools, limits=one.limits, **others)
    else:
        while True:
            one, running, _ = drawn(seed)
            if len(one.world.hosts) == 2:
                break
            seed += 1_000_003
        seen = flying(
            one.world, running.present, running.placement.context, running.placement.tokens_out, job=one.job,
            limits=one.limits, tools=one.tools, holdings=running.placement.holdings, **others,
        )  # fmt: skip
    if r.random() < 0.2:
        seen = replace(seen, limits=replace(seen.limits, unreachable=frozenset({1})))
    return seen


@pytest.fixture
def few_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are sought for the present link alone: small models are searched whole each time."""
    monkeypatch.setattr(one_session, "RATES", (1.0,))
    monkeypatch.setattr(one_session, "TRIPS", (1.0,))


SEEDS = (Phase.explicit, Phase.reuse, Phase.generate)
"""A smaller seed is no simpler."""
FEW = pytest.mark.usefixtures("few_links")


@FEW
@given(st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=SEEDS)
def test_whatever_it_sees_and_wants_it_decides_what_may_be_or_says_what_forbids_it(seed: int, wants: int) -> None:
    # Dies when policies/one_session.py says `self.lawful | ` for `self.lawful & `.
    seen = observations(seed)
    policy = Splitwise(weights=network(seed=wants))
    judged = None
    with suppress(RequestError):  # which says what forbids everything; nothing else may be raised
        judged = policy.judge(seen)
    if judged is None:
        return
    decision, world = judged.decision, seen.world
    assert world is not None
    assert obstacle(world, decision, seen.job, seen.limits) is None
    assert decision.patience in (0.0, 0.5, 1.0, 2.0)
    if np.isnan(judged.d1):
        assert sum(policy.elsewhere.values()) == 1
        assert decision == find_policy("drift").decide(seen)
        return
    assert judged.d1 <= judged.plain_d1 + ETA * abs(judged.plain_d1) + SLACK
    executed, plain = values(seen, [judged.decision, judged.plain])
    assert executed <= plain + ETA * abs(plain) + SLACK + 1e-6 * abs(plain)
    assert (judged.d1, judged.plain_d1) == pytest.approx((executed, plain), rel=1e-6, abs=1e-9)


def values(seen: Observation, decisions: list[Decision]) -> list[float]:
    """D1, priced as `drift` would, by itself."""
    world = seen.world
    assert world is not None
    penalty, weights = typical(
        world, seen.job, seen.tools, replace(seen.limits, unreachable=frozenset()), seen.arrivals_per_s
    )  # fmt: skip
    goal = DriftPlusPenalty(
        penalty, weights, np.array(seen.queues), np.array(seen.virtual), seen.budgets, seen.remaining_tokens,
        seen.waited_s,
    )  # fmt: skip
    if seen.placement is not None:
        return Running.of(seen).values(goal, decisions).tolist()
    table = Table(world, [bill(world, one, seen.job) for one in decisions])
    return goal.value(table.at(world.conditions(seen.loads))).tolist()


@pytest.mark.parametrize("seed", range(30))
def test_ways_to_all_plans_cost_what_they_cost_one_by_one(seed: int) -> None:
    """And still within a twentieth when the generation has grown by tokens since they were priced."""
    while True:
        given_, running, solver = drawn(seed)
        if len(given_.world.hosts) == 2:
            break
        seed += 1_000_003
    world = given_.world
    every = [family.decision(part, n) for family in solver.families for part in range(len(family.parts))
             for n in range(len(family.parts[part][0].ends))]  # fmt: skip
    plans = [*every[:12], running.present]
    entries = Entries(world, plans)
    context, last = running.placement.context, running.placement.context + 40
    present = running.present.partition.machines
    seconds, device_s, others_s = entries.at(running.holdings, context, last, running.conditions, present)
    for number, plan in enumerate(plans):
        way = running.moving(plan)
        assert seconds[number] == pytest.approx(float(way.seconds(running.conditions)), abs=1e-12)
        filled = [gain for gain in way.gains if gain.gap.fill in way.choose(running.conditions)]
        busy = [sum(gain.busy_s[m] for gain in filled) for m in (0, 1)]
        assert [device_s[number], others_s[number]] == pytest.approx(busy, abs=1e-12)
    assert entries.misses == 1


def test_a_generation_that_grows_asks_for_no_new_prices_and_one_that_moves_does() -> None:
    # Dies when policies/entries.py says `if least > context:` for `if least >= context:`.
    plans = [EDGE, CLOUD, Decision(Partition.cut(SPEC, 4), WirePrecision.FP16)]
    entries, x = Entries(TWO, plans), TWO.conditions()
    for context in range(70, 190, 7):
        held = Holdings.of(EDGE.partition, context, 2)
        seconds, _, _ = entries.at(held, context, 192, x, (0,))
        running = Running.of(flying(TWO, EDGE, context, context - 64, holdings=held))
        exact = [float(running.moving(plan).seconds(x)) for plan in plans]
        assert seconds == pytest.approx(exact, rel=0.05, abs=1e-4)
    assert entries.misses == 1
    entries.at(Holdings.of(plans[2].partition, 190, 2), 190, 192, x, (0, 1))
    assert entries.misses == 2


# Dies when policies/entries.py says `if before is None:` for `if units != before:`.
def test_a_cache_that_lacks_positions_in_one_half_alone_is_priced_as_such() -> None:
    plans = [EDGE, CLOUD]
    entries, x = Entries(TWO, plans), TWO.conditions()
    whole = Holdings.of(EDGE.partition, 100, 2)
    device = whole.machines[0]
    last = max(device.filled)
    short = replace(device, filled={**device.filled, last: dict.fromkeys(device.filled[last], 40)})
    ready, later = (
        entries.at(Holdings((machine, *whole.machines[1:])), 100, 192, x, (0,))[0][0] for machine in (device, short)
    )
    assert ready == 0.0
    assert later > 0.0
    assert entries.misses == 2


def test_neutral_knobs_are_the_plain_solver() -> None:
    for world in (TWO, replace(TWO, links={(0, 1): CRAWL})):
        for limits in (Limits(), Limits(floor=Floor(1, 1))):
            seen = admitted(world, limits=limits)
            judged = NEUTRAL_ONE.judge(seen)
            assert (judged.decision, judged.turned, judged.why) == (judged.plain, (), "")
            exact = find_policy("drift").decide(seen)
            mine, best = values(seen, [judged.decision, exact])
            assert mine <= best * 1.01 + 1e-9, "the table lacks what is best"


@FEW
def test_a_mode_is_turned_to_where_its_best_plan_is_within_the_filter_and_nowhere_else() -> None:
    # Dies when policies/mind.py says `guide(priced, Knobs.neutral(1))` for `guide(priced, knobs)`.
    machines = {Mode.EDGE: (0,), Mode.CLOUD: (1,), Mode.BOTH: (0, 1)}
    policies, found = {mode: wanting(mode=mode) for mode in machines}, set()
    worlds = [replace(TWO, links={(0, 1): replace(WAN, rtt_s=trip_s)}) for trip_s in np.geomspace(1e-3, 10, 60)]
    worth = np.array([values(admitted(world), [EDGE, CLOUD]) for world in worlds])
    even = int(np.abs(np.log(worth[:, 0] / worth[:, 1])).argmin())
    for world in (worlds[0], worlds[even - 1], worlds[even], worlds[even + 1], worlds[-1]):
        seen = admitted(world)
        for mode, policy in policies.items():
            judged = policy.judge(seen)
            if judged.turned:
                assert judged.turned == (f"mode {mode.name.lower()}",)
                assert judged.decision.partition.machines == machines[mode]
                found.add((mode, judged.decision == judged.plain))
            else:
                assert judged.decision == judged.plain
    assert {(Mode.CLOUD, True), (Mode.EDGE, True)} <= found
    assert any(not is_plain for _, is_plain in found), "nothing was turned away from the plain solver"


@FEW
def test_patience_is_its_knob() -> None:
    for patience in (0.0, 0.5, 1.0, 2.0):
        assert wanting(patience=patience).decide(admitted(TWO)).patience == patience
        assert wanting(patience=patience).decide(flying(TWO, CLOUD)).patience == patience


@FEW
@pytest.mark.parametrize("mode", [Mode.WAIT, Mode.SHED, Mode.RACE, Mode.SHADOW])
def test_a_session_is_neither_refused_nor_kept_waiting(mode: Mode) -> None:
    # Dies when policies/one_session.py says `~self.uses[:, 0]` for `~self.uses[:, machine]`.
    policy = wanting(mode=mode)
    for seen in (
        admitted(TWO, waited_s=1e4),
        flying(TWO, CLOUD, limits=Limits(unreachable=frozenset({1}))),
        flying(TWO, CLOUD),
    ):
        judged = policy.judge(seen)
        assert obstacle(TWO, judged.decision, seen.job, seen.limits) is None


@FEW
def test_what_runs_is_a_plan_of_the_table_and_no_other_run_is_asked_for_how_a_prompt_was_cut() -> None:
    # Dies when policies/one_session.py says `& ~plans.uses[:, 0]` for `& ~plans.alike(current)`.
    tools = Tools((WirePrecision.FP16,), (None, 16, 32), (0, 2))
    odd = Decision(Partition.all_on(SPEC, 1), WirePrecision.FP16, 16)
    seen = flying(TWO, odd, tools=tools)
    assert NEUTRAL_ONE.decide(seen) == odd
    row = ask(seen, NEUTRAL_ONE._live.shelf.plans(seen))
    assert row.plans.table.bills[row.present].decision == odd
    assert row.menu.admissible[0, row.present]
    assert len(row.plans.table) <= MAX_PLANS


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"world": None}, "nobody has measured"),
        ({"world": THREE}, "trained with one worker"),
        ({"limits": Limits(floor=Floor(1, 1), only=frozenset({1}))}, "no table could be made"),
    ],
)
def test_where_there_is_no_row_the_plain_solver_decides_and_it_is_counted(change: dict[str, object], why: str) -> None:
    policy, seen = Splitwise(weights=network()), replace(admitted(TWO), **change)  # type: ignore[arg-type]
    try:
        expected: Decision | str = find_policy("drift").decide(seen)
    except RequestError as error:
        expected = str(error)
    try:
        said: Decision | str = policy.decide(seen)
    except RequestError as error:
        said = str(error)
    assert said == expected
    assert [why in reason for reason in policy.elsewhere] == [True]
    assert policy.fallback_share == 1.0


@FEW
def test_stale_strange_and_broken_inputs_fall_back_and_say_why() -> None:
    dice = np.random.default_rng(0)
    old = wanting(mode=Mode.EDGE).judge(admitted(TWO, past=remembered(dice, STALE_S + 1)))
    assert "older" in old.why
    assert old.turned == ()
    narrow = replace(network(), high=np.zeros_like(network().high))
    assert "outside" in Splitwise(weights=narrow).judge(admitted(TWO)).why
    broken = replace(network(), heads_bias=np.full_like(network().heads_bias, np.nan))
    assert "no numbers" in Splitwise(weights=broken).judge(admitted(TWO)).why
    for judged in (old, Splitwise(weights=narrow).judge(admitted(TWO))):
        assert judged.decision == judged.plain


@FEW
def test_without_weights_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mind, "SHIPPED", str(tmp_path / "none.npz"))
    monkeypatch.setattr(mind, "shipped", FROM_DISK)
    with pytest.raises(ModelError, match=r"none\.npz.*splitwise train"):
        Splitwise().decide(admitted(TWO))


@FEW
def test_an_explanation_is_not_counted() -> None:
    policy = Splitwise(weights=network())
    policy.judge(admitted(TWO), counts=False)
    assert policy.tally.decisions == 0
    policy.decide(admitted(TWO))
    assert policy.tally.decisions == 1


def test_plans_are_sought_once_for_a_class_of_requests_and_tables_are_kept() -> None:
    shelf = Shelf()
    for tokens in (60, 64, 70, 64, 60):
        shelf.plans(admitted(TWO, Job(tokens, 128)))
    assert shelf.made == 3
    assert len(shelf._sought) == 1
    wavering = replace(TWO, hosts=tuple(
        replace(h, device=replace(h.device, memory_bytes=0.9 * h.device.memory_bytes)) for h in TWO.hosts
    ))  # fmt: skip
    shelf.plans(admitted(wavering, Job(64, 128)))
    assert shelf.made == 3, "free memory wavers"
    shelf.plans(admitted(replace(TWO, links={(0, 1): LinkSpec.parse("rtt=20ms up=0.1mbit down=50mbit")}), Job(64, 128)))
    assert shelf.made == 4, "nobody tried so slow a link"


@pytest.mark.alone
def test_a_decision_takes_about_a_millisecond_once_its_table_is_made() -> None:
    """Processor time of a 32-layer model on two machines; the bound is generous, the bench measures it."""
    spec = find_model("llama-2-7b")
    hosts = (
        Host(find_device("orin-nx"), Dtype.FP16, Weights.INT4),
        Host(find_device("a100"), Dtype.FP16, Weights.FULL),
    )
    world = World(spec, hosts, {(0, 1): LinkSpec.parse("rtt=40ms up=20mbit down=40mbit")})
    seen = admitted(world, Job(128, 128), limits=Limits(floor=Floor(2, 2)), past=Past.nothing(1))
    decision = NEUTRAL_ONE.decide(seen)
    asked = [seen] * 40
    for tokens in range(1, 41):
        held = Holdings.of(decision.partition, 128 + tokens, 2)
        asked.append(
            replace(flying(world, decision, 128 + tokens, tokens, job=Job(128, 128), holdings=held), past=seen.past,
                    limits=seen.limits, tools=seen.tools)
        )  # fmt: skip
    NEUTRAL_ONE.decide(asked[40])
    took = []
    for one in asked:
        begun_s = time.thread_time()
        NEUTRAL_ONE.decide(one)
        took.append(time.thread_time() - begun_s)
    assert np.median(took) < 4e-3, f"{1e3 * np.median(took):.2f} ms"
