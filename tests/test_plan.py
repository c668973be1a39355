"""A plan: every unit computed once, and what crosses counted by the rules, on cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import PartitionError, RequestError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Kind, Plan, Serial, Shared
from splitwise_llm.spec import ModelSpec
from strategies import NAMES, decisions, model_specs

SPEC = ModelSpec("llama", 8, 64, 8, 4, 16, 256, 100, 128, 3, True)
SHARED_3 = "edge[0:3] edge+cloud[3] edge[4:8]"


def plan_of(text: str, wire: WirePrecision = WirePrecision.FP32, chunk: int | None = None) -> Plan:
    return plans.compile(Decision(Partition.parse(text, SPEC, NAMES), wire, chunk), SPEC, 3)


def up_down(plan: Plan, prompt: int, out: int) -> tuple[int, int]:
    crossings = plan.traffic(prompt, out)
    return sum(c.payload_bytes for c in crossings if c.src == 0), sum(c.payload_bytes for c in crossings if c.dst == 0)


@given(st.data())
def test_every_unit_is_computed_once_and_embedding_and_head_too(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    decision = data.draw(decisions(spec))
    plan = plans.compile(decision, spec, 3)
    done = [(half, decision.partition.owners(half)) for half in range(2 * spec.num_layers)]
    computed: list[tuple[int, tuple[int, ...]]] = []
    for stage in plan.stages:
        if isinstance(stage, Serial):
            units = {0: spec.num_kv_heads, 1: spec.num_ffn_shards}
            computed += [(half, (stage.machine,) * units[half % 2]) for half in range(stage.start, stage.stop)]
        else:
            owners = {unit: share.machine for share in stage.shares for unit in share.units}
            computed.append((stage.half, tuple(owners[unit] for unit in range(len(owners)))))
    assert computed == done
    embeds = [s.machine for s in plan.stages if isinstance(s, Serial) and s.embed]
    heads = [s.machine for s in plan.stages if isinstance(s, Serial) and s.head]
    assert (embeds, heads) == ([decision.partition.embed], [decision.partition.head])


@given(st.data())
def test_whoever_computes_a_stage_has_its_input(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    plan = plans.compile(data.draw(decisions(spec)), spec, 3)
    holders = {plan.embed}
    for index, stage in enumerate(plan.stages):
        assert set(stage.machines) <= holders
        if isinstance(stage, Shared):
            sent = {(m.src, m.dst) for m in plan.moves_after(index) if m.kind is Kind.PARTIAL}
            assert sent == {(w, j) for w in stage.machines for j in plan.joiners[index] if w != j}
        moves = [m for m in plan.moves_after(index) if m.kind is Kind.RESIDUAL]
        assert {m.src for m in moves} <= set(plan.joiners[index])
        holders = set(plan.joiners[index]) | {m.dst for m in moves}


@pytest.mark.parametrize(
    ("text", "round_trips"),
    [
        ("all:edge", 0),
        ("all:cloud", 0),
        ("edge[0:4] cloud[4:8]", 1),
        ("edge[0:2] cloud[2:6] edge[6:8]", 1),
        ("edge[0:2] cloud[2:4] edge[4:6] cloud[6:8]", 2),
        ("edge[0:2] cloud[2:4] third[4:8]", 2),  # edge -> cloud -> (edge) -> third -> edge
        (SHARED_3, 1),  # the cloud's answer to the attention carries it on to the FFN without waiting
        ("edge+cloud[0:8]", 8),  # sixteen exchanges, one way each
    ],
)
def test_round_trips_per_token(text: str, round_trips: float) -> None:
    assert plan_of(text).round_trips_per_token == round_trips


def test_cloud_only_sends_ids_once_and_streams_ids_back() -> None:
    assert up_down(plan_of("all:cloud"), prompt=10, out=7) == (4 * 10, 4 * 7)


def test_a_cut_sends_the_stream_up_and_an_id_down() -> None:
    row = 64 * 4
    assert up_down(plan_of("edge[0:4] cloud[4:8]"), 10, 7) == (row * (10 + 6), 4 * 7)


def test_a_u_shape_sends_the_stream_both_ways_and_no_ids() -> None:
    row = 64 * 2
    plan = plan_of("edge[0:2] cloud[2:6] edge[6:8]", WirePrecision.FP16)
    assert up_down(plan, 10, 7) == (row * 16, row * 16)


def test_a_head_without_layers_receives_only_the_last_position() -> None:
    row = 64 * 4
    assert up_down(plan_of("cloud[0:8] head=edge", chunk=4), 10, 7) == (4 * (10 + 6), row * 7)


def test_a_shared_layer_exchanges_each_partial_sum_once_both_ways() -> None:
    row = 64 * 4
    # Up: the stream, the attention's partial, the FFN's stays (only the edge goes on). Down: both partials.
    crossings = plan_of(SHARED_3).traffic(10, 7)
    per_kind = {(c.kind, c.src): c.payload_bytes for c in crossings if c.after == 1}
    assert per_kind == {(Kind.PARTIAL, 0): row * 16, (Kind.PARTIAL, 1): row * 16}
    assert up_down(plan_of(SHARED_3), 10, 7) == (2 * row * 16, 2 * row * 16)


def test_a_relayed_hop_counts_each_leg_and_a_direct_link_one() -> None:
    decision = Decision(Partition.parse("edge[0:2] cloud[2:4] third[4:8]", SPEC, NAMES))
    star = plans.compile(decision, SPEC, 3)
    assert [(c.src, c.dst) for c in star.traffic(10, 2) if c.after == 1] == [(0, 2), (1, 0)]
    direct = plans.compile(decision, SPEC, 3, direct=[(1, 2)])
    assert [(c.src, c.dst) for c in direct.traffic(10, 2) if c.after == 1] == [(1, 2)]
    assert (star.round_trips_per_token, direct.round_trips_per_token) == (2.0, 1.5)


@pytest.mark.parametrize(
    ("wire", "size"), [("fp32", 260), ("bf16", 130), ("fp16", 130), ("int8", 65 + 4), ("int4", 33 + 4)]
)
def test_payload_of_one_position_of_width_65(wire: str, size: int) -> None:
    assert WirePrecision(wire).payload_bytes(1, 65) == size
    assert WirePrecision(wire).payload_bytes(3, 65) == 3 * size


# Dies when decision.py says `self.wire if is_prefill` for `self.prefill_wire or self.wire if is_prefill`.
def test_a_prompt_crosses_in_a_precision_of_its_own() -> None:
    cut, width = Partition.cut(SPEC, 4), SPEC.d_model
    plan = plans.compile(Decision(cut, WirePrecision.FP16, 4, prefill_wire=WirePrecision.INT8), SPEC, 2)
    stream = next(crossed for crossed in plan.traffic(10, 3) if crossed.kind is Kind.RESIDUAL)
    assert stream.payload_bytes == 10 * (width + 4) + 2 * 2 * width


# Dies when decision.py says `if False` for `if self.prefill_wire is self.wire`.
def test_a_plan_is_written_in_one_way() -> None:
    cut = Partition.cut(SPEC, 4)
    same = Decision(cut, WirePrecision.INT8, prefill_wire=WirePrecision.INT8)
    assert same == Decision(cut, WirePrecision.INT8)
    assert same.wires == {WirePrecision.INT8}


def test_a_plan_of_another_model_or_with_too_few_machines_is_refused() -> None:
    with pytest.raises(PartitionError):
        plans.compile(Decision(Partition.cut(SPEC, 4)), SPEC, 1)
    with pytest.raises(RequestError, match="at least 1"):
        Decision(Partition.cut(SPEC, 4), prefill_chunk=0)


def test_steps_cover_prompt_and_answer() -> None:
    plan = plan_of("all:edge", chunk=4)
    steps = [plan.step(index, 10) for index in range(plan.num_steps(10, 3))]
    assert [(s.start, s.count, s.emits, s.is_prefill) for s in steps] == [
        (0, 4, False, True),
        (4, 4, False, True),
        (8, 2, True, True),
        (10, 1, True, False),
        (11, 1, True, False),
    ]


def test_in_the_last_half_of_an_excerpt_only_those_who_lack_it_take_part() -> None:
    decision = Decision(Partition.shared(SPEC, {0: 1.0, 1: 1.0}, layers=[2]))
    whole = plans.excerpt(decision, SPEC, 2, (), 4, 5, feeder=0)
    assert whole.stages[-1].machines == (0, 1)
    mine = plans.excerpt(decision, SPEC, 2, (), 4, 5, feeder=0, last=[1])
    assert mine.stages[-1].machines == (1,)
    assert [(move.kind, move.src, move.dst) for move in mine.moves] == [(Kind.RESIDUAL, 0, 1)]
    assert mine.cached_halves(1) == range(4, 5)
    assert mine.cached_halves(0) == range(4, 4)
