"""Going on with another partition in mid-generation: the mistake of repartitioning for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import FP16, LINKS, SMALL, box, edge_and_cloud, on, serial_partitions, world, worlds
from splitwise_llm import plan as plans
from splitwise_llm.cost import Form, Job, Load, Moving, World, bill, moving
from splitwise_llm.cost.moving import Gain, moving_from
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.rebuild import Fill, Held, Holdings
from splitwise_llm.spec import LinkSpec
from strategies import NAMES, partitions

CONTEXT = 1024
U = Partition.u_shape(SMALL, 2, 2)


def link(rate: str) -> LinkSpec:
    return LinkSpec.parse(f"rtt=20ms up={rate} down={rate}")


def ways_s(here: World, move: Moving) -> tuple[float, float]:
    """Seconds of recomputing everything, and of transferring everything."""
    x = here.conditions()
    return sum(float(x @ g.recompute) for g in move.gains), sum(float(x @ g.transfer) for g in move.gains)


# Dies when cost/moving.py says `kv_bytes_per_position(1, ` for `kv_bytes_per_position(carry.num_units, `.
@pytest.mark.parametrize(("rate", "seconds"), [("20mbit", 215), ("100mbit", 43), ("1gbit", 4.3)])
def test_the_cache_of_1024_tokens_of_a_7b_takes_long_on_any_link(rate: str, seconds: float) -> None:
    here = edge_and_cloud("orin-nx", "a100")
    here = World(here.spec, here.hosts, {(0, 1): link(rate)})
    move = moving(here, on(here.spec, 1).partition, on(here.spec, 0), CONTEXT)
    assert sum(gain.transfer_bytes for gain in move.gains) == CONTEXT * 2 * 32 * 4096 * 2  # 537 MB
    assert ways_s(here, move)[1] == pytest.approx(seconds, rel=0.01)


# Dies when cost/moving.py says `units_on(owner, half)) > 99` for `units_on(owner, half))`.
@pytest.mark.parametrize(("edge", "seconds"), [("orin-nx", 2.2), ("s23", 9.7), ("pi5", 98)])
def test_recomputing_a_session_of_1024_tokens_on_the_device_takes_its_prefill(edge: str, seconds: float) -> None:
    """As the regime study has it, within half: the Raspberry Pi's prefill was measured slower since (130 s)."""
    here = edge_and_cloud(edge, "a100")
    move = moving(here, on(here.spec, 1).partition, on(here.spec, 0), CONTEXT)
    assert ways_s(here, move)[0] == pytest.approx(seconds, rel=0.5)
    prefill_s = bill(here, on(here.spec, 0), Job(CONTEXT, 1)).ttft.at(here.conditions())
    assert ways_s(here, move)[0] == pytest.approx(prefill_s, rel=0.03)
    assert all(gain.recompute_bytes == 0 for gain in move.gains)  # the device has the ids


# Dies when cost/moving.py says `np.maximum(fill,` for `np.minimum(fill,`.
@pytest.mark.parametrize("rate", ["1mbit", "20mbit", "100mbit", "1gbit", "10gbit", "100gbit"])
@pytest.mark.parametrize("edge", ["orin-nx", "s23", "pi5"])
def test_the_faster_way_is_taken_and_neither_is_free(edge: str, rate: str) -> None:
    here = edge_and_cloud(edge, "a100")
    here = World(here.spec, here.hosts, {(0, 1): link(rate)})
    move = moving(here, on(here.spec, 1).partition, on(here.spec, 0), CONTEXT)
    x = here.conditions()
    assert move.seconds(x) == pytest.approx(min(ways_s(here, move)))
    assert move.seconds(x) > 0.04
    assert move.recomputes(x) == (ways_s(here, move)[0] <= ways_s(here, move)[1],)


def test_transfer_beats_recompute_only_above_rates_few_links_have() -> None:
    """Gbit/s; the regime study has 2.0, 0.44 and 0.044."""
    for edge, low, high in (("orin-nx", 1.5e9, 2.5e9), ("s23", 3e8, 6e8), ("pi5", 2e7, 6e7)):
        for rate, recomputes in ((low, True), (high, False)):
            here = edge_and_cloud(edge, "a100")
            here = World(here.spec, here.hosts, {(0, 1): LinkSpec(0.0, rate / 8, rate / 8)})
            move = moving(here, on(here.spec, 1).partition, on(here.spec, 0), CONTEXT)
            assert move.recomputes(here.conditions()) == (recomputes,)


def test_cloud_only_from_the_device_takes_the_ids_and_a_fast_prefill() -> None:
    here = edge_and_cloud("orin-nx", "a100")
    move = moving(here, on(here.spec, 0).partition, on(here.spec, 1), CONTEXT)
    (gain,) = move.gains
    assert gain.recompute_bytes == 4 * CONTEXT
    assert 0.02 < move.seconds(here.conditions()) < 0.2
    assert move.busy_s(1) > 0 == move.busy_s(0)


# Dies when rebuild.py says `if True:` for `if before == after:`.
def test_from_a_u_shape_to_the_device_nothing_crosses_and_only_the_middle_is_recomputed() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    (gain,) = moving(here, U, on(SMALL, 0), CONTEXT).gains
    assert (gain.machine, gain.start, gain.stop, gain.recompute_bytes) == (0, 4, 11, 0)
    whole = moving(here, on(SMALL, 1).partition, on(SMALL, 0), CONTEXT)
    assert sum(gain.busy_s) == pytest.approx(whole.busy_s(0) / 2, rel=0.1)


def test_from_a_u_shape_to_the_cloud_only_the_ids_cross() -> None:
    """The cloud has the activations of the second boundary: it sent them."""
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    first, last = moving(here, U, on(SMALL, 1), CONTEXT).gains
    assert (first.start, first.stop, last.start, last.stop) == (0, 3, 12, 15)
    assert (first.recompute_bytes, last.recompute_bytes) == (4 * CONTEXT, 0)


def test_a_deeper_cut_is_fed_from_the_boundary_that_was_kept_with_the_wire_precision_of_the_new_plan() -> None:
    here = world(SMALL, box(), box(), box(), link=LINKS["cell"])
    old = Partition.parse("edge[0:4] cloud[4:8]", SMALL, NAMES)
    new = Partition.parse("edge[0:4] third[4:8]", SMALL, NAMES)
    for wire in WirePrecision:
        (gain,) = moving(here, old, Decision(new, wire), CONTEXT).gains
        assert (gain.machine, gain.recompute_bytes) == (2, wire.payload_bytes(CONTEXT, SMALL.d_model))
    cache = CONTEXT * 4 * 2 * 8 * 16 * 2
    assert gain.transfer_bytes == cache
    x = here.basis.form({here.basis.inverse(1, 0): 1.0, here.basis.inverse(0, 2): 1.0})
    assert x @ gain.transfer == 2 * cache  # through the device


# Dies when rebuild.py says `return Fill(last, last + 1, DEVICE` for `return Fill(0, last + 1, DEVICE`.
def test_where_no_boundary_was_kept_whoever_runs_the_halves_before_runs_them_again() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    (gain,) = moving(here, on(SMALL, 0).partition, Decision(Partition.cut(SMALL, 4), FP16), CONTEXT).gains
    assert (gain.start, gain.stop) == (8, 15)
    assert gain.busy_s[0] == pytest.approx(gain.busy_s[1], rel=0.2)
    assert gain.recompute_bytes == FP16.payload_bytes(CONTEXT, SMALL.d_model)


# Dies when cost/moving.py says `half + 1 < 0:` for `half + 1 < fill.stop:`.
def test_beginning_to_share_takes_both_machines_and_every_exchange() -> None:
    here = world(SMALL, box(), box(), link=LINKS["lan"])
    new = Decision(Partition.shared(SMALL, {0: 1, 1: 1}), FP16)
    (gain,) = moving(here, on(SMALL, 0).partition, new, CONTEXT).gains
    one = bill(here, new, Job(CONTEXT, 1))
    x = here.conditions()
    head_s = here.hosts[0].head_s(SMALL)
    assert x @ gain.recompute == pytest.approx(one.ttft.at(x) - head_s, rel=0.15)  # the last FFN need not be run
    assert gain.busy_s[0] == gain.busy_s[1] > 0


@given(st.data())
def test_a_move_to_the_same_partition_costs_nothing(data: st.DataObject) -> None:
    here = data.draw(worlds())
    partition = data.draw(partitions(here.spec))
    move = moving(here, partition, Decision(partition, FP16), data.draw(st.integers(1, 100)))
    assert move.gains == ()
    assert move.seconds(here.conditions({1: Load(2.0, 4.0, 1.0, 9.0)})) == 0


@given(st.data())
def test_any_move_that_gains_attention_costs_time_and_any_other_none(data: st.DataObject) -> None:
    here = data.draw(worlds())
    old, new = data.draw(partitions(here.spec)), data.draw(partitions(here.spec))
    context = data.draw(st.integers(1, 100))
    move = moving(here, old, Decision(new, FP16), context)
    gained = any(
        mine != before
        for mine, before in zip(
            (owner for layer in new.layers for owner in layer.groups),
            (owner for layer in old.layers for owner in layer.groups),
            strict=True,
        )
    )
    assert bool(move.gains) == gained
    assert (move.seconds(here.conditions()) > 0) == gained
    longer = moving(here, old, Decision(new, FP16), context + 1)
    assert longer.seconds(here.conditions()) >= move.seconds(here.conditions())
    moved = sum(gain.transfer_bytes for gain in move.gains)
    units = sum(
        mine != before
        for a, b in zip(new.layers, old.layers, strict=True)
        for mine, before in zip(a.groups, b.groups, strict=True)
    )
    assert moved == context * units * 2 * here.spec.head_dim * 2


# Dies when cost/moving.py says `basis.form({basis.wait(machine): 0.0})` for `basis.form({basis.wait(machine): 1.0})`.
# Dies when cost/moving.py says `{0: size}` for `{0: size / world.hosts[m].device.load_bytes_per_s}`.
def test_admission_and_weights_that_are_not_resident_come_before() -> None:
    here = world(SMALL, box(load_bytes_per_s=1e8), box(load_bytes_per_s=1e9), link=LINKS["lan"])
    device, cloud = on(SMALL, 0), on(SMALL, 1)
    x = here.conditions({1: Load(wait_s=3.0)})
    there = moving(here, device.partition, cloud, CONTEXT)
    assert there.seconds(x) - there.seconds(here.conditions()) == pytest.approx(3.0)
    back = moving(here, cloud.partition, device, CONTEXT)
    assert back.seconds(x) == back.seconds(here.conditions())
    loading = moving(here, cloud.partition, device, CONTEXT, load_bytes={0: 5e8, 1: 1e9})
    assert loading.seconds(x) - back.seconds(x) == pytest.approx(5.0)


def test_a_move_is_priced_under_many_conditions_at_a_time() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    move = moving(here, on(SMALL, 1).partition, Decision(U, FP16), CONTEXT)
    rng = np.random.default_rng(0)
    many = np.abs(rng.normal(size=(3, 5, here.basis.size)))
    assert move.seconds(many).shape == (3, 5)
    assert move.seconds(many)[2, 4] == pytest.approx(move.seconds(many[2, 4]))


def fastest_s(x: Form, gains: tuple[Gain, ...]) -> float:
    """By trying every way of every gap; a fill closes what lies in it."""
    if not gains:
        return 0.0
    *rest, last = gains
    left = tuple(gain for gain in rest if not last.gap.fills(gain.gap))
    ways = [float(x @ last.recompute) + fastest_s(x, left)]
    if last.gap.carries:
        ways.append(float(x @ last.transfer) + fastest_s(x, tuple(rest)))
    return min(ways)


# Dies when cost/moving.py says `chosen[1:]` for `chosen[::-1]`.
@given(st.data())
def test_what_is_chosen_takes_what_the_move_is_said_to_take_and_nothing_is_faster(data: st.DataObject) -> None:
    here = data.draw(worlds())
    old, new = data.draw(partitions(here.spec)), data.draw(partitions(here.spec))
    context, x = data.draw(st.integers(1, 100)), here.conditions()
    holdings = Holdings.of(old, context, 3)
    if data.draw(st.booleans()):
        holdings = holdings.without(data.draw(st.integers(0, 2)))
    move = moving_from(here, holdings, Decision(new, FP16), context)
    said = float(move.seconds(x))
    assert said == pytest.approx(fastest_s(x, move.gains))
    forms = [*((g.gap.fill, g.recompute) for g in move.gains), *((g.gap.carries, g.transfer) for g in move.gains)]
    ways = move.choose(x)
    taken = sum(float(x @ next(form for known, form in forms if known == way)) for way in ways)
    assert said == pytest.approx(taken)
    assert said <= sum(ways_s(here, Moving((g,), move.entry))[0] for g in move.gains) * (1 + 1e-9)
    assert list(move.recomputes(x)) == [g.gap.carries == () or g.gap.carries not in ways for g in move.gains]


# Dies when cost/moving.py says `number = number - 1` for `number = before if recompute else number - 1`.
# Dies when cost/moving.py says `sum(1 for` for `sum(not self.gains[number].gap.fills(gain.gap) for`.
def test_what_the_longer_walk_passes_is_not_walked_before() -> None:
    """From the cloud to a U: the suffix is reached through the prefix, which is then done."""
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    move = moving(here, on(SMALL, 1).partition, Decision(U, FP16), CONTEXT)
    x = here.conditions()
    prefix, suffix = move.gains
    assert move.choose(x) == (Fill(0, 15, 0, 0, CONTEXT),)
    assert move.recomputes(x) == (True, True)
    assert move.seconds(x) == pytest.approx(float(x @ suffix.recompute))
    x[here.basis.inverse(1, 0)] = 1e-12  # a link as fast as any
    x[here.basis.inverse(0, 1)] = 1e-5
    assert move.choose(x) == (prefix.gap.fill, suffix.gap.carries)
    assert move.recomputes(x) == (True, False)


# Dies when cost/moving.py says `holders = [new.partition.owners(0)[0]]` for `holders = [new.partition.embed]`.
def test_ids_go_to_the_embedding_alone() -> None:
    """Who keeps the embedding on the device does not send ids to move, either."""
    here = world(SMALL, box(), box(), link=LINKS["wan"])
    veiled = Partition.u_shape(SMALL, 0, 0)
    (gain,) = moving(here, on(SMALL, 0).partition, Decision(veiled, FP16), CONTEXT).gains
    assert gain.recompute_bytes == FP16.payload_bytes(CONTEXT, SMALL.d_model)
    (gain,) = moving(here, on(SMALL, 0).partition, on(SMALL, 1), CONTEXT).gains
    assert gain.recompute_bytes == 4 * CONTEXT


# Dies when cost/moving.py says `crossed += stream` for `crossed += len(without) * stream`.
# Dies when cost/moving.py says `holders = []` for `holders = list(units)`.
@given(st.data())
def test_a_fill_is_billed_for_the_bytes_of_its_excerpt(data: st.DataObject) -> None:
    """Exactly, where no half is shared; partial sums for those who do not go on are billed and not sent."""
    here = data.draw(worlds())
    is_serial = data.draw(st.booleans())
    new = data.draw(serial_partitions(here.spec) if is_serial else partitions(here.spec))
    old, context = data.draw(partitions(here.spec)), data.draw(st.integers(1, 100))
    for gain in moving(here, old, Decision(new, FP16), context).gains:
        fill = gain.gap.fill
        feeder = fill.feeder if fill.first else None
        excerpt = plans.excerpt(Decision(new, FP16), here.spec, 3, here.direct, fill.first, fill.stop, feeder)
        step = plans.Step(0, 0, context, emits=False, is_prefill=True)
        sent = sum(excerpt.payload_bytes(move, step) for move in excerpt.moves)
        assert gain.recompute_bytes == sent if is_serial else gain.recompute_bytes >= sent


# Dies when cost/moving.py says `rows = fill.context` for `rows = fill.context - fill.start`.
# Dies when cost/moving.py says `carry.context * per_` for `(carry.context - carry.start) * per_`.
def test_only_the_positions_that_lack_are_paid_for() -> None:
    here = world(SMALL, box(), box(), link=LINKS["wan"])
    device = Holdings.of(U, CONTEXT, 2).machines[0]
    early = {**device.filled, **dict.fromkeys(range(4, 12, 2), dict.fromkeys(range(8), 3 * CONTEXT // 4))}
    holdings = Holdings.of(U, CONTEXT, 2).replaced(0, Held(early, device.kept))
    (part,) = moving_from(here, holdings, on(SMALL, 0), CONTEXT).gains
    (whole,) = moving(here, U, on(SMALL, 0), CONTEXT).gains
    assert part.transfer_bytes == whole.transfer_bytes / 4
    assert part.busy_s[0] < 0.5 * whole.busy_s[0]


def test_a_dead_machine_is_rebuilt_by_recomputing_whatever_the_link_and_is_waited_for_again() -> None:
    here = world(SMALL, box(), box(), link=LinkSpec.parse("rtt=0ms up=100gbit down=100gbit"))
    old = Decision(U, FP16)
    holdings = Holdings.of(U, CONTEXT, 2)
    assert moving_from(here, holdings, old, CONTEXT).gains == ()
    x = here.conditions({1: Load(wait_s=3.0)})
    lost = moving_from(here, holdings.without(1), old, CONTEXT)
    assert lost.choose(x) == (Fill(4, 11, 0, 0, CONTEXT),)
    stays = moving_from(here, holdings.without(1), old, CONTEXT, admitted=(0, 1))
    assert lost.seconds(x) == pytest.approx(3.0 + float(stays.seconds(x)))
