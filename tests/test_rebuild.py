"""What has to be done before a generation goes on elsewhere: done on a model of caches that holds only how far they go,
it leaves every machine with what it needs, from inputs that exist."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision
from splitwise_llm.errors import PartitionError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Kind, Serial
from splitwise_llm.rebuild import NOTHING, Carry, Fill, Gap, Held, Holdings, Way, gaps, in_background, keepers, written
from splitwise_llm.spec import ModelSpec
from strategies import NAMES, model_specs, partitions

SPEC = ModelSpec("llama", 8, 64, 8, 4, 16, 256, 100, 128, 3, True)
CONTEXT = 60
EDGE, CLOUD, THIRD = range(3)
U = Partition.u_shape(SPEC, 2, 2)
CUT = Partition.cut(SPEC, 4)
SHARED = Partition.shared(SPEC, {EDGE: 1, CLOUD: 1})
ALL = [Partition.all_on(SPEC, machine) for machine in range(3)]


def parse(text: str) -> Partition:
    return Partition.parse(text, SPEC, NAMES)


def after(old: Partition, *lost: int, context: int = CONTEXT) -> Holdings:
    """What is there after a session under one partition when some machines have lost it."""
    holdings = Holdings.of(old, context, 3)
    for machine in lost:
        holdings = holdings.without(machine)
    return holdings


class Caches:
    """How far each cache goes, and the rows that were computed: (half, unit, position)."""

    def __init__(self, holdings: Holdings) -> None:
        self.holdings = holdings
        self.filled = {
            (machine, half, unit): positions
            for machine, held in enumerate(holdings.machines)
            for half, units in held.filled.items()
            for unit, positions in units.items()
        }
        self.computed: list[tuple[int, int, int]] = []

    def go(self, way: Way, new: Partition) -> None:
        for step in [way] if isinstance(way, Fill) else way:
            self._fill(step, new) if isinstance(step, Fill) else self._carry(step)

    def _fill(self, fill: Fill, new: Partition) -> None:
        if fill.first:
            spans = self.holdings.machines[fill.feeder].kept[fill.first]
            there = {position for start, stop in spans for position in range(start, stop)}
            assert set(range(fill.start, fill.context)) <= there
        else:
            assert fill.feeder == DEVICE
        for half in range(fill.first + fill.first % 2, fill.stop, 2):
            for unit, machine in enumerate(new.owners(half)):
                assert self.filled.get((machine, half, unit), 0) >= fill.start, "attention over rows that are not there"
                self.filled[machine, half, unit] = fill.context
                self.computed += [(half, unit, position) for position in range(fill.start, fill.context)]

    def _carry(self, carry: Carry) -> None:
        assert carry.src != carry.dst
        for half, units in carry.units:
            for unit in units:
                assert self.filled[carry.src, half, unit] >= carry.context
                assert self.filled.get((carry.dst, half, unit), 0) == carry.start < carry.context
                self.filled[carry.dst, half, unit] = carry.context

    def serve(self, new: Partition, context: int) -> bool:
        return all(
            self.filled.get((machine, half, unit), 0) >= context
            for half in range(0, 2 * len(new.layers), 2)
            for unit, machine in enumerate(new.owners(half))
        )


def filling(found: tuple[Gap, ...]) -> list[Gap]:
    """The gaps whose fills close all."""
    left: list[Gap] = []
    for gap in reversed(found):
        if not any(later.fills(gap) for later in left):
            left.append(gap)
    return left[::-1]


@st.composite
def any_holdings(draw: st.DrawFn, spec: ModelSpec, context: int) -> Holdings:
    """Caches that go any way, boundaries kept for any positions; or what one partition leaves, with losses."""
    if draw(st.booleans()):
        holdings = Holdings.of(draw(partitions(spec)), context, 3)
        return holdings.without(draw(st.integers(0, 2))) if draw(st.booleans()) else holdings
    some = st.sampled_from([0, context // 2, context, context + 3])
    machines = []
    for _ in range(3):
        rows = [
            (half, units, draw(some))
            for half in range(0, 2 * spec.num_layers, 2)
            for units in (
                [range(spec.num_kv_heads)] if draw(st.booleans()) else [(u,) for u in range(spec.num_kv_heads)]
            )
        ]
        half = st.integers(1, 2 * spec.num_layers - 1)
        kept = draw(st.lists(st.tuples(half, st.sampled_from([0, context // 2]), some), max_size=4))
        machines.append(Held.of(rows, kept))
    return Holdings(tuple(machines))


@st.composite
def moves(draw: st.DrawFn) -> tuple[Holdings, Partition, int]:
    spec = draw(model_specs())
    context = draw(st.integers(1, 12))
    return draw(any_holdings(spec, context)), draw(partitions(spec)), context


# Dies when rebuild.py says `start = start` for `start = min(start, covered.get(first, start))`.
# Dies when rebuild.py says `if fill.first < half - 1 or goes_on:` for `if goes_on and fill.first < half - 1:`.
@given(moves(), st.data())
def test_whatever_way_is_chosen_everybody_has_what_the_new_partition_needs(
    move: tuple[Holdings, Partition, int], data: st.DataObject
) -> None:
    holdings, new, context = move
    found = gaps(holdings, new, context)
    caches = Caches(holdings)
    chosen: list[tuple[Gap, Way]] = []
    for gap in reversed(found):
        if not any(isinstance(way, Fill) and later.fills(gap) for later, way in chosen):
            chosen.append((gap, gap.carries if gap.carries and data.draw(st.booleans()) else gap.fill))
    touched: set[tuple[int, int]] = set()
    for gap, way in data.draw(st.permutations(chosen)):
        caches.go(way, new)
        assert not touched & written(way, new)
        touched |= written(way, new)
        assert gap.partition == new
    assert caches.serve(new, context)


@given(moves())
def test_a_gap_is_there_where_a_machine_lacks_something_and_nowhere_else(
    move: tuple[Holdings, Partition, int],
) -> None:
    holdings, new, context = move
    found = gaps(holdings, new, context)
    assert bool(found) != Caches(holdings).serve(new, context)
    for gap in found:
        for half in (gap.start, gap.fill.stop - 1):  # no FFN at its ends, no half that is complete
            owners = new.owners(half)
            assert min(holdings.machines[m].covered(half, (unit,)) for unit, m in enumerate(owners)) < context
        lowest = min(
            holdings.machines[m].covered(half, (unit,))
            for half in range(gap.fill.first + gap.fill.first % 2, gap.fill.stop, 2)
            for unit, m in enumerate(new.owners(half))
        )
        assert gap.fill.start == lowest
    assert list(found) == sorted(found, key=lambda gap: gap.start)


def fewest_halves(holdings: Holdings, new: Partition, context: int) -> int:
    """Attention halves that must be run again at least, by trying every set of walks."""
    covered = [
        min(holdings.machines[m].covered(half, (unit,)) for unit, m in enumerate(new.owners(half)))
        for half in range(0, 2 * len(new.layers), 2)
    ]
    end = 2 * len(new.layers)
    best = [0] * (end + 1)
    for first in reversed(range(end)):
        ways = [best[first + 1]] if first % 2 or covered[first // 2] >= context else []
        for stop in range(first + 1, end + 1):
            halves = covered[(first + 1) // 2 : (stop + 1) // 2]
            start = min([*halves, context])
            if not first or any(held.keeps(first, start, context) for held in holdings.machines):
                ways.append(len(halves) + best[stop])
        best[first] = min(ways, default=10**6)
    return best[0]


# Dies when rebuild.py says `while first > 4:` for `while first:`.
@given(moves())
def test_no_fewer_halves_could_be_run_again(move: tuple[Holdings, Partition, int]) -> None:
    holdings, new, context = move
    fills = [gap.fill for gap in filling(gaps(holdings, new, context))]
    halves = [half for fill in fills for half in range(fill.first + fill.first % 2, fill.stop, 2)]
    assert len(halves) == len(set(halves)) == fewest_halves(holdings, new, context)


@given(st.data())
def test_who_goes_on_as_before_lacks_nothing(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    partition, context = data.draw(partitions(spec)), data.draw(st.integers(0, 12))
    assert gaps(Holdings.of(partition, context, 3), partition, context) == ()
    assert gaps(Holdings((NOTHING,) * 3), partition, 0) == ()


# Dies when rebuild.py says `keeps = {*before, *after}` for `keeps = {*held, *after}`.
# Dies when rebuild.py says `before[-1:]` for `before[:1]`.
@given(st.data())
def test_those_keep_a_boundary_who_have_its_stream_when_the_plan_is_walked(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    partition = data.draw(partitions(spec))
    direct = [(CLOUD, THIRD)] if data.draw(st.booleans()) else []
    plan = plans.compile(Decision(partition), spec, 3, direct)
    has: dict[int, set[int]] = {}
    for index, (stage, following) in enumerate(zip(plan.stages, plan.stages[1:], strict=False)):
        half = following.start if isinstance(following, Serial) else following.half
        if half in (0, 2 * spec.num_layers) or stage.machines == following.machines:
            continue
        has[half] = set(plan.joiners[index])
        for move in plan.moves_after(index):
            if move.kind is Kind.RESIDUAL:
                has[half] |= {machine for leg in plan.legs(move.src, move.dst) for machine in leg}
    assert {half: set(keepers(partition, half, direct)) for half in range(2 * spec.num_layers)} == {
        half: has.get(half, set()) for half in range(2 * spec.num_layers)
    }


# Losing a worker


@pytest.mark.parametrize("new", [U, parse("edge[0:2] third[2:6] edge[6:8]"), ALL[EDGE]], ids=["back", "other", "edge"])
def test_a_lost_middle_is_rebuilt_from_the_boundary_the_device_sent_and_nothing_else_is_computed(
    new: Partition,
) -> None:
    (gap,) = gaps(after(U, CLOUD), new, CONTEXT)
    assert gap.fill == Fill(4, 11, DEVICE, 0, CONTEXT)
    assert gap.carries == ()
    caches = Caches(after(U, CLOUD))
    caches.go(gap.fill, new)
    lost = [(half, unit, p) for half in range(4, 12, 2) for unit in range(4) for p in range(CONTEXT)]
    assert sorted(caches.computed) == lost


@pytest.mark.parametrize(
    ("old", "fill"),
    [
        (U, Fill(4, 11, EDGE, 0, CONTEXT)),
        (CUT, Fill(8, 15, EDGE, 0, CONTEXT)),
        (ALL[CLOUD], Fill(0, 15, EDGE, 0, CONTEXT)),
        (SHARED, Fill(0, 15, EDGE, 0, CONTEXT)),
        (parse("edge[0:2] edge+cloud[2:5] edge[5:8]"), Fill(4, 9, EDGE, 0, CONTEXT)),
        (parse("cloud[0:8] embed=edge head=edge"), Fill(0, 15, EDGE, 0, CONTEXT)),
        (parse("edge[0:2.5] cloud[2.5:6] edge[6:8]"), Fill(5, 11, EDGE, 0, CONTEXT)),
    ],
    ids=["U", "cut", "cloud", "all shared", "some shared", "only the embedding here", "a cut after the attention"],
)
def test_the_device_goes_on_alone_from_what_it_kept(old: Partition, fill: Fill) -> None:
    (gap,) = gaps(after(old, CLOUD), ALL[EDGE], CONTEXT)
    assert gap == Gap(ALL[EDGE], (EDGE,), fill.first + fill.first % 2, fill, ())


def test_a_lost_worker_behind_another_is_fed_by_the_device_which_passed_its_input_on() -> None:
    chain = parse("edge[0:2] cloud[2:5] third[5:8]")
    holdings = Holdings.of(chain, CONTEXT, 4).without(THIRD)
    (gap,) = gaps(holdings, chain, CONTEXT)
    assert gap.fill == Fill(10, 15, DEVICE, 0, CONTEXT)
    direct = Holdings.of(chain, CONTEXT, 4, [(CLOUD, THIRD)]).without(THIRD)
    (gap,) = gaps(direct, chain, CONTEXT)
    assert gap.fill == Fill(10, 15, CLOUD, 0, CONTEXT)


def test_where_only_the_lost_worker_had_the_sum_what_lies_before_it_is_run_again() -> None:
    """The device sent its part of the sum, and never had the sum."""
    old = parse("edge[0:1] edge+cloud[1:3] cloud[3:8]")
    assert keepers(old, 6) == {CLOUD}
    (gap,) = gaps(after(old, CLOUD), ALL[EDGE], CONTEXT)
    assert gap.fill == Fill(2, 15, EDGE, 0, CONTEXT)


# Other moves


def test_each_way_back_from_the_cloud_stands_alone_and_the_longer_fill_holds_the_shorter() -> None:
    first, last = gaps(after(ALL[CLOUD]), U, CONTEXT)
    assert (first.fill, last.fill) == (Fill(0, 3, EDGE, 0, CONTEXT), Fill(0, 15, EDGE, 0, CONTEXT))
    assert last.fills(first)
    assert not first.fills(last)
    units = tuple((half, (0, 1, 2, 3)) for half in (0, 2))
    assert first.carries == (Carry(CLOUD, EDGE, units, 0, CONTEXT),)


# Dies when rebuild.py says `(machine in owners, machine)` for `(machine not in owners, machine)`.
def test_the_boundary_comes_from_whoever_needs_it_if_they_kept_it() -> None:
    new = parse("edge[0:1] cloud[1:7] edge[7:8]")
    first, second = gaps(after(parse("edge[0:2] cloud[2:3] edge[3:8]")), new, CONTEXT)
    assert first.fill == Fill(0, 3, EDGE, 0, CONTEXT)
    assert second.fill == Fill(6, 13, CLOUD, 0, CONTEXT)


# Dies when rebuild.py says `> 99 or one.start` for `<= 1 or one.start`.
def test_one_new_worker_takes_the_places_of_two_in_one_go_and_the_device_closes_them_one_by_one() -> None:
    old = parse("edge[0:2] cloud[2:4] third[4:8]")
    holdings = Holdings.of(old, CONTEXT, 4).without(CLOUD).without(THIRD)
    fourth = Partition.cut(SPEC, 2, EDGE, 3)
    assert [gap.fill for gap in gaps(holdings, fourth, CONTEXT)] == [Fill(4, 15, EDGE, 0, CONTEXT)]
    fills = [gap.fill for gap in gaps(holdings, ALL[EDGE], CONTEXT)]
    assert fills == [Fill(4, 7, EDGE, 0, CONTEXT), Fill(8, 15, EDGE, 0, CONTEXT)]


def test_what_a_machine_has_from_before_is_kept_and_only_the_rest_is_brought() -> None:
    """The device has 20 of 60 positions of the middle, from a time when it ran alone."""
    now = Holdings.of(U, CONTEXT, 3)
    here = now.machines[EDGE]
    early = Held({**here.filled, **dict.fromkeys(range(4, 12, 2), dict.fromkeys(range(4), 20))}, here.kept)
    (gap,) = gaps(now.replaced(EDGE, early), ALL[EDGE], CONTEXT)
    assert gap.fill == Fill(4, 11, EDGE, 20, CONTEXT)
    units = tuple((half, (0, 1, 2, 3)) for half in range(4, 12, 2))
    assert gap.carries == (Carry(CLOUD, EDGE, units, 20, CONTEXT),)
    late = Held(early.filled, {4: ((30, CONTEXT),)})  # not for the positions that are lacking
    (gap,) = gaps(now.replaced(EDGE, late).without(CLOUD), ALL[EDGE], CONTEXT)
    assert gap.fill == Fill(0, 11, EDGE, 20, CONTEXT)


def test_rows_that_nobody_has_any_more_are_not_carried() -> None:
    new = parse("third[0:8]")
    (gap, *_) = gaps(after(CUT, CLOUD), new, CONTEXT)
    assert gap.carries == ()
    (_, other) = gaps(after(U), parse("third[0:2] cloud[2:6] third[6:8]"), CONTEXT)
    assert other.carries == (Carry(EDGE, THIRD, ((12, (0, 1, 2, 3)), (14, (0, 1, 2, 3))), 0, CONTEXT),)


# In the background


@pytest.mark.parametrize(
    ("old", "new", "free"),
    [
        (U, ALL[EDGE], [True]),
        (U, ALL[CLOUD], [True, True]),
        (ALL[CLOUD], U, [True, False]),  # the second goes through the cloud's layers, which the old plan uses
        (ALL[CLOUD], ALL[EDGE], [True]),
        (CUT, SHARED, [False, False]),  # a machine that has some groups of a layer gets others
        (U, parse("edge[0:2] third[2:6] edge[6:8]"), [True]),
    ],
)
def test_a_gap_is_closed_while_the_old_partition_goes_on_only_where_it_touches_no_cache_in_use(
    old: Partition, new: Partition, free: list[bool]
) -> None:
    assert [in_background(gap, old) for gap in gaps(after(old), new, CONTEXT)] == free


@given(st.data())
def test_what_runs_in_the_background_touches_nothing_in_use(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    old, new = data.draw(partitions(spec)), data.draw(partitions(spec))
    for gap in gaps(Holdings.of(old, 5, 3), new, 5):
        for way in (gap.fill, gap.carries):
            used = any(old.units_on(machine, half) for machine, half in written(way, new))
            assert in_background(gap, old, way) != used


# What machines say they have


# Dies when rebuild.py says `start < known[-1][1]` for `start <= known[-1][1]`.
def test_rows_and_spans_are_put_together_in_any_order() -> None:
    held = Held.of(
        [(2, (1,), 7), (0, (0, 1), 5), (2, (0,), 9)], [(3, 4, 9), (3, 0, 4), (5, 2, 2), (3, 12, 15), (7, 1, 2)]
    )
    assert held == Held({0: {0: 5, 1: 5}, 2: {0: 9, 1: 7}}, {3: ((0, 9), (12, 15)), 7: ((1, 2),)})
    assert (held.covered(2, (0, 1)), held.covered(2, (0,)), held.covered(0, (0, 3)), held.covered(4, (0,))) == (
        7,
        9,
        0,
        0,
    )
    assert [held.keeps(3, *span) for span in ((1, 9), (0, 10), (12, 13))] == [True, False, True]


def test_who_has_nothing_holds_nothing() -> None:
    holdings = Holdings.of(U, CONTEXT, 3)
    assert holdings.holders == (EDGE, CLOUD)
    assert holdings.without(CLOUD).holders == (EDGE,)
    assert holdings.without(CLOUD).replaced(CLOUD, holdings.machines[CLOUD]) == holdings


def test_machines_nobody_has_heard_of_are_refused() -> None:
    with pytest.raises(PartitionError, match="machine 2, but holdings of only 2"):
        gaps(Holdings.of(CUT, CONTEXT, 2), ALL[THIRD], CONTEXT)
