"""Policies asked while tokens flow: the least of the rest, the way there included, and nothing else keeps them.

Copies of the source with one line changed fail here; the docstring of a test says which change it kills.
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from random_worlds import Instance, instance

from splitwise_llm.cli.choice import Explained
from splitwise_llm.cost import UNLIMITED, Entry, Floor, Host, Job, Limits, Load, Table, World, bill, moving, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.observation import PLAIN, Ages, Always, MachineView, Menu, Observation, Occasion, Placement, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.partition import Placement as Placed
from splitwise_llm.policies import POLICIES, find_policy
from splitwise_llm.policies.choosers import TableChooser, number_of
from splitwise_llm.policies.in_flight import Running, is_less
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency
from splitwise_llm.policies.onward import Ways
from splitwise_llm.policies.planners import Planner, When
from splitwise_llm.policies.solver import Solver
from splitwise_llm.rebuild import Held, Holdings
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights

SPEC = ModelSpec("llama", 8, 512, 4, 4, 128, 1312, 100, 2048, 3, False)
JOB = Job(64, 128)
FP16 = WirePrecision.FP16
WAN = LinkSpec.parse("rtt=20ms up=50mbit down=50mbit")
CRAWL = LinkSpec.parse("rtt=300ms up=1mbit down=1mbit")
SLOW = DeviceSpec("slow", 1e11, 2e9, 1e12, idle_w=2, decode_w=5, prefill_w=6)
FAST = DeviceSpec("fast", 1e13, 1e11, 1e12)
TWO = World(SPEC, (Host(SLOW), Host(FAST)), {(0, 1): WAN})
THREE = World(SPEC, (Host(SLOW), Host(FAST), Host(FAST)), {(0, 1): WAN, (0, 2): WAN})
EDGE, CLOUD = (Decision(Partition.all_on(SPEC, machine), FP16) for machine in (0, 1))
HALVES = ((2, 2, 1, 1), (2, 3, 1, 2), (2, 4, 2, 1), (3, 2, 1, 1), (3, 3, 2, 1))
"""(machines, layers, groups, shards)"""


def flying(
    world: World, decision: Decision, context: int = 100, tokens_out: int = 36, *, job: Job = JOB,
    limits: Limits = UNLIMITED, tools: Tools = PLAIN, admitted: Decision | None = None,
    holdings: Holdings | None = None, **others: object,
) -> Observation:  # fmt: skip
    views = tuple(
        MachineView(f"m{n}", True, int(host.device.memory_bytes), Dtype.FP16, Weights.FULL, profiled=True)
        for n, host in enumerate(world.hosts)
    )
    return Observation(
        world.spec, views, job.prompt_tokens, job.tokens_out, world=world, limits=limits, tools=tools,
        placement=Placement(decision, context, tokens_out, admitted, holdings), **others,  # type: ignore[arg-type]
    )  # fmt: skip


def drawn(seed: int) -> tuple[Instance, Running, Solver]:
    """A random request in flight: any assignment, some of it lost, under random loads and objectives."""
    r = random.Random(seed)
    given = instance(seed, HALVES)
    world, job = given.world, given.job
    solver = Solver(world, job, given.tools, given.limits)
    anyone = partial(r.randrange, len(world.hosts))
    layers = tuple(
        Placed(*(tuple(anyone() if r.random() < 0.3 else first for _ in each) for each in (layer.groups, layer.shards)))
        for layer, first in ((layer, anyone()) for layer in Partition.all_on(world.spec, 0).layers)
    )
    old = Decision(Partition(layers, anyone(), anyone()), given.tools.wires[0])
    context = r.randint(1, job.prompt_tokens + job.tokens_out)
    held = Holdings.of(old.partition, context, len(world.hosts), world.direct)
    for machine in r.sample(range(len(world.hosts)), r.randint(0, 2)):
        few = r.choice([0, context // 2])
        known = held.machines[machine].filled
        held = held.replaced(machine, Held({half: dict.fromkeys(units, few) for half, units in known.items()}))
    placement = Placement(old, context, r.randint(1, job.tokens_out), holdings=held if r.random() < 0.7 else None)
    if placement.holdings is None:
        held = Holdings.of(old.partition, context, len(world.hosts), world.direct)
    for machine in given.limits.unreachable:
        held = held.without(machine)
    tokens = max(job.tokens_out - placement.tokens_out, 1)
    return given, Running(world, given.conditions, job, given.limits, placement, tokens, held), solver


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_on_a_way_is_never_above_its_price(seed: int) -> None:
    """Kills a boundary that is kept counted one later, and a crossing counted twice."""
    _, running, solver = drawn(seed)
    for family in solver.families:
        ways = Ways(running, family.worker)
        for members, _, _ in family.parts:
            bounds = ways.seconds(members)
            for number in range(len(members.ends)):
                decision = members.decision(number, running.world)
                took = float(running.moving(decision).seconds(running.conditions))
                assert bounds[number] <= took * (1 + 1e-9) + 1e-12, (seed, decision)


def test_the_bound_is_close_to_the_price_where_a_cut_moves() -> None:
    """Kills a bound of 0, with which every way would have to be priced."""
    old = Decision(Partition.cut(SPEC, 4), FP16)
    running = Running.of(flying(TWO, old))
    family = Solver(TWO, JOB, PLAIN, UNLIMITED).families[0]
    ways, off = Ways(running, 1), []
    for members, _, _ in family.parts:
        for number, bound in enumerate(ways.seconds(members)):
            took = float(running.moving(members.decision(number, TWO)).seconds(running.conditions))
            off.append(took - bound)
    assert np.median(off) < WAN.rtt_s / 2 + 1e-3, "but for the way of the ids"
    assert max(off) < 0.1


@pytest.mark.parametrize("seed", range(60))
def test_the_answer_is_the_best_of_every_cut_and_u_shape_with_its_way_there(seed: int) -> None:
    """Kills a scan that stops at the first, and entries left out of prices."""
    given, running, solver = drawn(seed)
    every = [family.decision(part, n) for family in solver.families for part in range(len(family.parts))
             for n in range(len(family.parts[part][0].ends))]  # fmt: skip
    if running.is_possible(running.present):
        every.append(running.present)
    if not every:  # then nothing is, or only a row of three machines
        if len(running.world.hosts) == 2:
            with pytest.raises(RequestError, match="no partition is admissible"):
                solver.onward(running, given.objective)
            return
        with suppress(RequestError):
            found = solver.onward(running, given.objective)
            assert len(found.decision.partition.machines) > 2
            assert obstacle(running.world, found.decision, running.job, running.limits) is None
        return
    best = float(running.values(given.objective, every).min())
    found = solver.onward(running, given.objective)
    own = float(running.values(given.objective, [found.decision])[0])
    assert found.value == pytest.approx(own, rel=1e-9)
    assert obstacle(running.world, found.decision, running.job, running.limits) is None
    assert not is_less(best + found.gap, own), (best, own)
    if found.gap == 0 and len(given.world.hosts) == 2:
        assert own <= best + 1e-9 * abs(best)


def menu(table: Table, old: Decision, seen: Observation) -> Menu:
    """The same question as the simulator puts it, entries from `cost.moving`."""
    world, placement = table.world, seen.placement
    assert placement
    x = world.basis.conditions(seen.world.links if seen.world else {}, seen.loads)
    rows = []
    for each in table.bills:
        way = moving(world, old.partition, each.decision, placement.context)
        chosen = way.choose(x)
        busy = [sum(gain.busy_s[m] for gain in way.gains if gain.gap.fill in chosen) for m in (0, 1)]
        rows.append((float(way.seconds(x)), *busy) if each.decision.partition != old.partition else (0.0, 0.0, 0.0))
    entry = np.array(rows).T[:, None, :]
    current = number_of(table, old)
    ones = np.ones((1, len(table)), dtype=bool)
    return Menu(
        table, x[None], ones, np.array([seen.queues]), np.array([seen.virtual]), np.array([current]),
        np.array([float(seen.remaining_tokens)]), *entry, np.array([seen.waited_s]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["drift", "drift-selfish"])
def test_a_live_policy_answers_as_the_simulators_does_on_a_table_of_its_plans(name: str, seed: int) -> None:
    """Kills a reference that follows the link, tokens that are not the remaining ones, and budgets that are lost."""
    r = random.Random(seed)
    spec = replace(SPEC, num_layers=r.choice([3, 5]), num_heads=1, num_kv_heads=1, head_dim=512, d_ff=1312)
    cloud = replace(FAST, slots=r.choice([1, 8]))
    world = World(spec, (Host(SLOW), Host(cloud)), {(0, 1): WAN})
    tools = Tools((FP16, WirePrecision.INT8), (None,), (0,))
    solver = Solver(world, JOB, tools, UNLIMITED)
    family = solver.families[0]
    plans = dict.fromkeys(
        family.decision(part, n) for part in range(len(family.parts)) for n in range(len(family.parts[part][0].ends))
    )
    table = Table(world, [bill(world, plan, JOB) for plan in plans])
    planner = find_policy(name)
    assert isinstance(planner, Planner)
    budgets = r.choice([Budgets(), Budgets(energy_j=2.0, deadline_s=4.0, nats=0.05)])
    chooser = TableChooser(planner, tools, UNLIMITED, budgets, arrivals_per_s=0.2)
    moved = 0
    for _ in range(8):
        old = r.choice(list(plans))
        tokens_out = r.randint(1, 127)
        link = LinkSpec(10 ** r.uniform(-3, -0.5), 10 ** r.uniform(4.5, 8), 10 ** r.uniform(4.5, 8))
        seen = flying(
            replace(world, links={(0, 1): link}), old, 64 + tokens_out, tokens_out, tools=tools, nominal=world,
            loads={1: Load(r.uniform(1, 3), 2, 0.01, r.choice([0, 0.2]))}, arrivals_per_s=0.2, budgets=budgets,
            queues=tuple(r.choice([0, r.uniform(0, 5)]) for _ in range(4)),
            virtual=tuple(r.choice([0, r.uniform(0, 3)]) for _ in range(4)), waited_s=r.uniform(0, 4),
        )  # fmt: skip
        question = menu(table, old, seen)
        chosen = int(chooser.choose(question)[0])
        theirs = table.bills[chosen].decision if chosen >= 0 else old
        mine = planner.decide(seen)
        entry = Entry(question.entry_s, question.entry_device_s, question.entry_cloud_s)
        prices = table.at(question.conditions, question.remaining_tokens[:, None], entry)
        values = chooser._objective(chooser._prepare(table), question).value(prices)[0]
        if mine in plans:
            ours = values[number_of(table, mine)]
            assert ours == pytest.approx(values[number_of(table, theirs)], rel=1e-8)
        else:  # divided by speed, which this table does not hold, and better
            objective = planner._objective(seen)
            own, other = Running.of(seen).values(objective, [mine, theirs])
            assert is_less(float(own), float(other))
        moved += mine != old
    assert moved


def test_a_small_gain_does_not_move_a_long_context_and_a_large_one_does() -> None:
    """Kills a price of moving that does not grow with the context."""
    fast = Host(replace(SLOW, flop_per_s=1.3 * SLOW.flop_per_s, memory_bytes_per_s=1.15 * SLOW.memory_bytes_per_s))
    world = World(SPEC, (Host(SLOW), fast), {(0, 1): LinkSpec.parse("rtt=1ms up=50mbit down=50mbit")})
    drift = find_policy("drift-selfish")
    few = flying(world, EDGE, 1900, 1836, job=Job(64, 1850))
    assert drift.decide(few).partition == EDGE.partition
    assert drift.decide(replace(few, max_new_tokens=40_000)).partition != EDGE.partition
    short = flying(world, EDGE, 2, 1, job=Job(1, 15))
    assert drift.decide(short).partition != EDGE.partition


def test_equal_values_mean_staying_and_nobody_returns_in_a_world_that_stays_as_it_is() -> None:
    """Kills a choice among equals that is not the present one: two workers alike."""
    drift = find_policy("drift")
    on = {worker: Decision(Partition.all_on(SPEC, worker), FP16) for worker in (1, 2)}
    for worker, decision in on.items():
        assert drift.decide(flying(THREE, decision)) == decision, worker
    for link in (WAN, CRAWL, LinkSpec.parse("rtt=1ms up=1gbit down=1gbit")):
        world = replace(TWO, links={(0, 1): link})
        seen, now = set[Decision](), Decision(Partition.u_shape(SPEC, 2, 2), FP16)
        for _ in range(6):
            after = drift.decide(flying(world, now))
            if after == now:
                break
            assert after not in seen, "it came back"
            seen.add(now)
            now = after
        else:
            pytest.fail("it never settles")


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("lost", [{1}, {2}, {1, 2}], ids=str)
@pytest.mark.parametrize("seen_by", ["limits", "views"])
def test_a_fault_leads_every_policy_to_an_admissible_answer(name: str, lost: set[int], seen_by: str) -> None:
    """Kills a failover that raises because none of a policy's own plans is left."""
    policy = find_policy(name)
    for tokens_out, context in ((36, 100), (0, 20)):
        first = policy.decide(replace(flying(THREE, EDGE), placement=None))
        seen = flying(THREE, first, context, tokens_out, admitted=first, occasion=Occasion.FAULT)
        if seen_by == "limits":
            seen = replace(seen, limits=Limits(unreachable=frozenset(lost)))
        else:
            views = [replace(view, reachable=number not in lost) for number, view in enumerate(seen.machines)]
            seen = replace(seen, machines=tuple(views))
        answer = policy.decide(seen)
        assert obstacle(THREE, answer, JOB, Limits(unreachable=frozenset(lost))) is None
        if not set(first.partition.machines) & lost and not (isinstance(policy, Planner) and policy.when is When.EPOCH):
            assert answer == first


@pytest.mark.parametrize(
    "name", [name for name, (_, policy) in POLICIES.items() if getattr(policy, "when", 0) != When.EPOCH]
)
def test_who_decides_once_stays_in_any_weather_and_returns_when_that_is_cheaper(name: str) -> None:
    """Kills a return at any price, and a policy of each request that decides anew at epochs."""
    policy = find_policy(name)
    first = policy.decide(replace(flying(TWO, EDGE), placement=None))
    for link in (WAN, CRAWL):
        assert policy.decide(flying(replace(TWO, links={(0, 1): link}), first)) == first
    if first.partition != CLOUD.partition:
        return
    back = flying(TWO, EDGE, admitted=first, occasion=Occasion.RETURN)
    assert policy.decide(back) == first
    far = flying(replace(TWO, links={(0, 1): CRAWL}), EDGE, admitted=first, job=Job(64, 37), occasion=Occasion.RETURN)
    assert policy.decide(far) == EDGE, "one token is not worth the way"
    gone = replace(back, limits=Limits(unreachable=frozenset({1})))
    assert policy.decide(gone) == EDGE


@pytest.mark.parametrize("name", ["edge-only", "cloud-only", "even-split", "memory-proportional"])
def test_rules_without_figures_fail_over_and_return_without_figures(name: str) -> None:
    policy = find_policy(name)
    seen = replace(flying(TWO, EDGE), world=None)
    first = policy.decide(replace(seen, placement=None))
    ours = flying(TWO, first, admitted=first).placement
    lost = replace(seen, placement=ours, limits=Limits(unreachable=frozenset({1})))
    assert policy.decide(lost).partition == EDGE.partition
    assert policy.decide(replace(seen, placement=ours)) == first


def test_a_failover_without_the_memory_for_it_says_what_forbids_everything() -> None:
    small = replace(TWO, hosts=(Host(replace(SLOW, memory_bytes=2e6)), Host(FAST)))
    for name in ("cloud-only", "exact", "drift", "neurosurgeon"):
        seen = flying(small, CLOUD, limits=Limits(unreachable=frozenset({1})))
        with pytest.raises(RequestError, match="would hold"):
            find_policy(name).decide(seen)


def test_a_lost_machine_cannot_be_carried_from_and_one_that_kept_its_rows_costs_only_what_it_missed() -> None:
    """Kills prices that ask a dead machine for rows, and a return that is priced as if nothing had been kept."""
    quick = LinkSpec.parse("rtt=1ms up=10gbit down=10gbit")
    world = replace(THREE, links={(0, 1): quick, (0, 2): quick})
    other = Decision(Partition.all_on(SPEC, 2), FP16)
    limits = Limits(unreachable=frozenset({1}))
    gone, there = (Running.of(flying(world, CLOUD, 1000, 36, limits=each)) for each in (limits, UNLIMITED))
    assert not gone.moving(other).gains[0].gap.carries
    assert there.moving(other).gains[0].gap.carries
    kept = Holdings.of(EDGE.partition, 100, 2)
    lease = Held({half: dict.fromkeys(range(4), 90) for half in range(0, 16, 2)})
    full, rest = (
        float(Running.of(flying(TWO, EDGE, holdings=held)).prices([CLOUD]).ttft_s[0])
        for held in (kept, kept.replaced(1, lease))
    )
    assert 0 < rest < full


def test_before_the_first_token_a_plan_is_weighed_by_what_is_left_of_its_prompt() -> None:
    """Kills ways priced by a cache that is not there yet."""
    drift = find_policy("drift-selfish")
    fast = Host(replace(SLOW, flop_per_s=1.3 * SLOW.flop_per_s, memory_bytes_per_s=1.3 * SLOW.memory_bytes_per_s))
    job = Job(1000, 2)
    world = World(SPEC, (Host(SLOW), fast), {(0, 1): LinkSpec.parse("rtt=1ms up=50mbit down=50mbit")})
    assert drift.decide(flying(world, EDGE, 1, 0, job=job)).partition.machines == (1,)
    assert drift.decide(flying(world, EDGE, 999, 0, job=job)) == EDGE


def test_a_floor_and_the_tools_hold_in_flight_too() -> None:
    limits = Limits(floor=Floor(2, 1))
    for name in POLICIES:
        answer = find_policy(name).decide(
            flying(TWO, Decision(Partition.u_shape(SPEC, 4, 2), WirePrecision.INT8), limits=limits,
                   tools=Tools((WirePrecision.INT8,)))
        )  # fmt: skip
        assert limits.floor is not None
        assert limits.floor.holds(answer.partition), name
        assert answer.wire is WirePrecision.INT8, name


def test_patience_changes_no_plan_and_is_carried_along_until_somebody_says_otherwise() -> None:
    patient = replace(EDGE, patience=float("inf"), shadow=True)
    assert patient == EDGE
    assert hash(patient) == hash(EDGE)
    assert number_of(Table(TWO, [bill(TWO, EDGE, JOB)]), patient) == 0
    moved = find_policy("drift").decide(flying(TWO, patient))
    assert moved.partition != EDGE.partition
    assert (moved.patience, moved.shadow) == (float("inf"), True)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(RequestError, match="patience"):
            Decision(EDGE.partition, patience=wrong)


def test_an_explanation_says_one_line_when_it_stays_and_prices_both_when_it_moves() -> None:
    said: list[str] = []
    explained = Explained(find_policy("drift"), "drift", ("edge", "cloud"), said.append)
    ages = {(0, 1): Ages(0.1, 2.0, float("inf"))}
    explained.decide(flying(TWO, EDGE, occasion=Occasion.LINK, waited_s=3.2, ages_s=ages))
    assert "token 36" in said[0]
    assert "3.2 s" in said[0]
    assert "moves" in said[0]
    text = "\n".join(said)
    for part in (
        "RTT 20.0 ms (0.1 s old)",
        "up 50 Mbit/s (2.0 s old)",
        "never measured",
        "staying on all:edge: ",
        "moving, ",
        "the ids",
    ):
        assert part in text, part
    said.clear()
    explained.decide(flying(TWO, CLOUD, occasion=Occasion.EPOCH))
    assert len(said) == 1
    assert "stays" in said[0]
    said.clear()
    gone = Explained(find_policy("cloud-only"), "cloud-only", ("edge", "cloud"), said.append)
    gone.decide(flying(TWO, CLOUD, occasion=Occasion.FAULT, limits=Limits(unreachable=frozenset({1}))))
    assert "cannot be reached" in "\n".join(said)
    said.clear()
    Explained(Always(EDGE), "--partition", ("edge", "cloud"), said.append).decide(
        replace(flying(TWO, EDGE), world=None)
    )
    assert len(said) == 1


def test_latency_alone_asks_for_no_reference() -> None:
    exact = find_policy("exact")
    assert isinstance(exact, Planner)
    assert isinstance(exact._objective(flying(TWO, EDGE)), Latency)
    drift = find_policy("drift")
    assert isinstance(drift, Planner)
    made = drift._objective(flying(TWO, EDGE, budgets=Budgets(energy_j=3.0), waited_s=2.0))
    assert isinstance(made, DriftPlusPenalty)
    assert (made.budgets.energy_j, made.tokens, made.waited_s) == (3.0, 92, 2.0)


def test_the_reference_request_does_not_wander_while_a_link_or_a_machine_does() -> None:
    """Kills a reference under the links of now, or among the machines that are left."""
    drift = find_policy("drift")
    assert isinstance(drift, Planner)
    far = replace(TWO, links={(0, 1): CRAWL})
    calm, worse, alone = (
        drift._objective(seen)
        for seen in (
            flying(TWO, EDGE),
            flying(far, EDGE, nominal=TWO),
            flying(far, EDGE, nominal=TWO, limits=Limits(unreachable=frozenset({1}))),
        )
    )
    for one in (calm, worse, alone):
        assert isinstance(one, DriftPlusPenalty)
        assert isinstance(calm, DriftPlusPenalty)
        assert one.penalty == calm.penalty
        assert (one.weights == calm.weights).all()
