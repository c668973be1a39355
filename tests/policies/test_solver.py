"""The exact solver against every assignment there is, and families of plans against one bill after another.

Copies of the source with one line changed fail here; the docstring of a test says which change it kills.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from random_worlds import LARGER, SIZES, TWO_MACHINES, Instance, by_enumeration, every_decision, instance

from splitwise_llm.cost import UNLIMITED, Floor, Host, Job, Limits, Load, Table, World, bill, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import EVERYTHING, PLAIN, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.assignments import Search
from splitwise_llm.policies.family import Family
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.solver import Solver, nothing_admissible
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec, Weights, find_device, find_model

WAN = LinkSpec.parse("rtt=20ms up=50mbit down=50mbit")


def same(value: float, other: float) -> bool:
    return value == pytest.approx(other, rel=1e-9, abs=1e-12)


def searched(given: Instance) -> float | None:
    wire, chunk, draft = given.tools.wires[0], given.tools.chunks[0], given.tools.drafts[0]
    one = Search(given.world, given.job, given.conditions, given.objective, given.limits, wire, chunk, draft).best()
    return one and one.value


def solved(given: Instance) -> float | None:
    try:
        solution = Solver(given.world, given.job, given.tools, given.limits).solve(given.conditions, given.objective)
    except RequestError:
        return None
    decision = solution.best.decision
    assert obstacle(given.world, decision, given.job, given.limits) is None
    prices = Table(given.world, [bill(given.world, decision, given.job)]).at(given.conditions)
    assert same(float(given.objective.value(prices)[0]), solution.best.value), "the value is that of the decision"
    assert solution.exact
    return solution.best.value


def check_search(seeds: range, sizes: tuple[tuple[int, int, int, int], ...]) -> None:
    for seed in seeds:
        given = instance(seed, sizes)
        expected, found = by_enumeration(given), searched(given)
        assert (found is None) == (expected is None), seed
        assert expected is None or same(found or 0.0, expected[0]), (seed, expected[1].partition.text("abc"))


def check_solver(seeds: range) -> None:
    for seed in seeds:
        given = instance(seed, TWO_MACHINES, menus=True)
        expected, found = by_enumeration(given), solved(given)
        assert (found is None) == (expected is None), seed
        assert expected is None or same(found or 0.0, expected[0]), (seed, expected[1])


@pytest.mark.parametrize("first", range(0, 100, 20))
def test_the_search_finds_what_the_enumeration_of_all_assignments_finds(first: int) -> None:
    """Killed in assignments.py by: leaving memory out of the columns that pruning compares; pruning by the first
    column alone."""
    check_search(range(first, first + 20), SIZES)


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_what_the_search_counts_for_an_assignment_is_what_its_bill_says(first: int) -> None:
    """Killed in assignments.py by: `held = machines[:1]` in `_close` (the stream goes back to the first machine);
    `v[number] += min(ends)`; no `self._visit` of a fresh serial stage; `seconds = 0.0` in `finish`."""
    for seed in range(first, first + 20):
        given = instance(seed, SIZES)
        world, job = given.world, given.job
        plain = replace(given, tools=Tools(given.tools.wires, (None,), given.tools.drafts))
        wire, draft = plain.tools.wires[0], plain.tools.drafts[0]
        search = Search(world, job, given.conditions, given.objective, given.limits, wire, None, draft)
        decisions = list(every_decision(world, job, plain.tools))
        for decision in random.Random(seed).sample(decisions, 20):
            label = _walked(search, decision.partition)
            one = bill(world, decision, job)
            if len(decision.partition.machines) > 1:  # alone, it is priced by its bill at once
                critical = label[: len(search.steps)]
                tokens = world.drafter.tokens_per_round(draft)
                assert same(critical[0], float(one.ttft.at(given.conditions))), decision
                assert same(critical[1] / tokens, float(one.tpot.at(given.conditions))), decision


def _walked(search: Search, partition: Partition) -> np.ndarray:  # type: ignore[type-arg]
    """The label that the search gives to an assignment."""
    label, end = np.zeros(search.size), None
    for half in range(2 * len(partition.layers)):
        owners = partition.owners(half)
        counts = tuple(owners.count(machine) for machine in range(len(search.world.hosts)))
        added, end = search.step(half, end, counts, partition.embed, partition.head)
        label = label + added
    assert end
    return label + search.finish(end, partition.embed, partition.head)


def test_a_plan_that_waits_for_no_admission_is_kept_beside_a_faster_one_that_waits() -> None:
    """Killed in assignments.py by leaving the waits out of `_reads`."""
    spec = ModelSpec("llama", 3, 512, 1, 1, 984, 1312, 100, 512, 3, False)
    hosts = tuple(Host(DeviceSpec("box", 1e12, bandwidth, 1e12)) for bandwidth in (1e10, 1e11, 8e10))
    link = LinkSpec(1e-4, 1e9, 1e9)
    world = World(spec, hosts, {(0, 1): link, (0, 2): link})
    limits = Limits(floor=Floor(1, 1))
    for wait_s, used in ((0.0, (0, 1)), (1.0, (0, 2))):
        conditions = world.conditions({1: Load(wait_s=wait_s)})
        found = Search(world, Job(8, 16), conditions, Latency(), limits, WirePrecision.FP16).best()
        assert found
        assert found.decision.partition.machines == used


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_the_search_finds_what_the_enumeration_finds_a_thousand_times(first: int) -> None:
    """As above, on larger instances."""
    check_search(range(first, first + 50), LARGER)


@pytest.mark.parametrize("first", range(0, 45, 15))
def test_the_solver_finds_what_the_enumeration_of_assignments_and_tools_finds(first: int) -> None:
    """Killed in solver.py by: `chunks[:1]` in `_tools`; `share=False`."""
    check_solver(range(first, first + 15))


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1300, 30))
def test_the_solver_finds_what_the_enumeration_finds_hundreds_of_times(first: int) -> None:
    """As above."""
    check_solver(range(first, first + 30))


@pytest.mark.parametrize("seed", range(6))
def test_a_family_prices_every_member_as_its_own_bill_does(seed: int) -> None:
    """Killed in family.py by: `(ends + 1) // 2` for the FFN halves in `_halves`; `by_boundary[starts]` in `_nats`;
    in price.py by a wrong offset in `Table.mixed`."""
    r = random.Random(seed)
    given = instance(seed, ((2, 5, 2, 1), (2, 3, 1, 2), (2, 8, 1, 1)), menus=True)
    family = Family(given.world, given.job, given.tools, 1, given.limits)
    for part, (members, _, _) in enumerate(family.parts):
        prices = family.prices(part, given.conditions)
        number = r.randrange(len(members.ends))
        decision = family.decision(part, number)
        assert obstacle(given.world, decision, given.job, given.limits) is None
        one = price(given.world, decision, given.job, given.conditions)
        work = Table(given.world, [bill(given.world, decision, given.job)]).at(given.conditions).work
        for name in ("ttft_s", "tpot_s", "wait_s", "total_s", "device_j", "total_j", "usd", "nats"):
            mixed = float(np.broadcast_to(getattr(prices, name), prices.total_s.shape)[number])
            assert same(mixed, getattr(one, name)), (name, decision)
        for name in ("device_s", "up_s", "down_s", "cloud_s"):
            assert same(float(getattr(prices.work, name)[number]), float(getattr(work, name)[0])), (name, decision)


def test_a_family_leaves_out_what_memory_forbids_and_nothing_else() -> None:
    """Killed in family.py by: `np.any` in `_fits`."""
    for seed in range(8):
        given = instance(seed, ((2, 3, 1, 1), (2, 4, 1, 1)))
        free = replace(given.world, hosts=tuple(map(_roomy, given.world.hosts)))
        kept = _members(Family(given.world, given.job, PLAIN, 1))
        for decision in _members(Family(free, given.job, PLAIN, 1)):
            assert (decision in kept) == (obstacle(given.world, decision, given.job) is None), decision


def test_a_family_drives_a_plan_on_one_machine_in_chunks_too() -> None:
    """Less memory for activations and shorter contexts are worth something where nothing crosses. Killed in family.py
    by `self.tools.chunks[:1]` for shapes of one machine."""
    world = World(find_model("gpt2"), (Host(find_device("pi5")), Host(find_device("a100"))), {(0, 1): WAN})
    kept = _members(Family(world, Job(64, 8), replace(PLAIN, chunks=(None, 16)), 1))
    for machine, chunk in product((0, 1), (None, 16)):
        assert Decision(Partition.all_on(world.spec, machine), WirePrecision.FP16, chunk) in kept


def _roomy(host: Host) -> Host:
    return replace(host, device=replace(host.device, memory_bytes=1e15))


def _members(family: Family) -> set[object]:
    return {
        family.decision(part, n) for part, (members, _, _) in enumerate(family.parts) for n in range(len(members.ends))
    }


def test_a_floor_that_forbids_the_cloud_leaves_the_best_u_shape_and_the_next_half_layer_as_runner_up() -> None:
    world = World(
        find_model("llama-2-7b"),
        (Host(find_device("pi5"), weights=Weights.INT4), Host(find_device("a100"))),
        {(0, 1): WAN},
    )
    solver = Solver(world, Job(128, 128), PLAIN, Limits(floor=Floor(2, 2)))
    solution = solver.solve(world.conditions(), Latency())
    assert solution.best.decision.partition == Partition.u_shape(world.spec, 2, 2)
    assert solution.runner_up
    assert solution.runner_up.decision.partition == Partition.u_shape(world.spec, 2.5, 2)
    assert not solution.shared_considered
    assert not solution.exact, "a half beside a cut could be divided, and was not tried"


def test_two_equal_boards_on_a_lan_share_and_a_board_beside_a_data_centre_card_does_not() -> None:
    board = Host(find_device("pi5"), weights=Weights.INT4)
    lan = LinkSpec.parse("rtt=0.5ms up=1gbit down=1gbit")
    spec = replace(find_model("llama-2-7b"), num_layers=2, num_heads=4, num_kv_heads=4)
    for other, shares in ((board, True), (Host(find_device("a100")), False)):
        world = World(spec, (board, other), {(0, 1): lan})
        solution = Solver(world, Job(16, 64), PLAIN, UNLIMITED).solve(world.conditions(), Latency())
        assert any(layer.is_shared for layer in solution.best.decision.partition.layers) == shares


def test_more_tools_never_make_the_best_worse() -> None:
    for seed in range(6):
        given = instance(seed, ((2, 2, 1, 1),))
        if by_enumeration(replace(given, limits=UNLIMITED)) is None:
            continue
        few, many = (replace(given, limits=UNLIMITED, tools=tools) for tools in (PLAIN, Tools(*_menus())))
        assert (solved(many) or 0.0) <= (solved(few) or 0.0) + 1e-12


def _menus() -> tuple[tuple, tuple, tuple]:  # type: ignore[type-arg]
    return EVERYTHING.wires, EVERYTHING.chunks, EVERYTHING.drafts[:2]


def test_when_nothing_is_admissible_every_plain_plan_is_named_with_its_obstacle() -> None:
    world = World(find_model("llama-2-70b"), (Host(find_device("pi5")), Host(find_device("a100"))), {(0, 1): WAN})
    with pytest.raises(RequestError, match="no partition is admissible") as error:
        Solver(world, Job(128, 128), PLAIN, Limits(floor=Floor(2, 2))).solve(world.conditions(), Latency())
    assert "would hold" in str(error.value)
    assert "the floor 2+2" in nothing_admissible(world, Job(128, 128), Limits(floor=Floor(2, 2)))
