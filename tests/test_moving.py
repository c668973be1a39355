"""Going on with another partition in mid-generation: the mistake of repartitioning for nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import FP16, LINKS, SMALL, box, edge_and_cloud, on, world, worlds
from splitwise_llm.cost import Job, Load, Moving, World, bill, moving
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
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


# Dies when cost/moving.py says `spec.kv_bytes_per_position(1, ` for `spec.kv_bytes_per_position(units, `.
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


# Dies when cost/moving.py says `np.maximum(conditions @ gain.recompute` for `np.minimum(conditions @ gain.recompute`.
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


# Dies when cost/moving.py says `return False` for `return set(old.owners(half - 1)) != set(old.owners(half))`.
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


# Dies when cost/moving.py says `while False and not _kept` for `while before and not _kept`.
def test_where_no_boundary_was_kept_whoever_runs_the_halves_before_runs_them_again() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    (gain,) = moving(here, on(SMALL, 0).partition, Decision(Partition.cut(SMALL, 4), FP16), CONTEXT).gains
    assert (gain.start, gain.stop) == (8, 15)
    assert gain.busy_s[0] == pytest.approx(gain.busy_s[1], rel=0.2)
    assert gain.recompute_bytes == FP16.payload_bytes(CONTEXT, SMALL.d_model)


# Dies when cost/moving.py says `half + 1 < 0:` for `half + 1 < stop:`.
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
