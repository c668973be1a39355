"""Nothing is lost and nothing counts twice: work is that of the model whoever does it, and a partition costs the same
however it is written."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from physics.examples import SMALL, box, jobs, worlds
from splitwise_llm.cost import Bill, Host, Job, World, assigned_kv_bytes, assigned_weight_bytes, bill, model_flop, price
from splitwise_llm.cost.bill import flop
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.spec import Dtype, LinkSpec, ModelSpec, Weights
from strategies import NAMES, decisions, model_specs, partitions


def figures(here: World, decision: Decision, job: Job) -> list[float]:
    """Everything of a price that is one number."""
    shown = price(here, decision, job)
    return [getattr(shown, field.name) for field in fields(shown) if field.type == "float"]


# Dies when partition.py says `for half in range(start, stop - 1)]` for `for half in range(start, stop)]`.
@pytest.mark.parametrize(
    "texts",
    [
        ["edge[0:2] cloud[2:8]", "edge[0:1] edge[1] cloud[2:4.5] cloud[4.5:8]", "embed=edge edge[0:2] cloud[2:8]"],
        ["all:cloud", "cloud[0:8]", "cloud[0:3] cloud[3:8] embed=cloud"],
        [
            "edge[0:3] edge+cloud[3] edge[4:8]",
            "edge[0:3] cloud+edge[3](ffn=cloud:4-7,edge:0-3 kv=edge:0-3,cloud:4-7) edge[4:8]",
        ],
    ],
)  # fmt: skip
def test_a_partition_costs_the_same_however_it_is_written(texts: list[str]) -> None:
    here = World(
        SMALL,
        (Host(box(idle_w=3, decode_w=7, prefill_w=9)), Host(box(slots=8, decode_w=300))),
        {(0, 1): LinkSpec(0.02, 1e6, 2e6)},
    )
    prices = []
    for text in texts:
        partition = Partition.parse(text, SMALL, NAMES)
        for again in (
            partition,
            Partition.parse(partition.text(NAMES), SMALL, NAMES),
            Partition.from_vector(partition.to_vector(), SMALL),
            Partition.from_bytes(partition.to_bytes(), SMALL),
        ):
            prices.append(figures(here, Decision(again), Job(50, 20)))
    assert all(one == prices[0] for one in prices)


@given(st.data())
def test_a_span_costs_the_same_in_one_piece_or_several(data: st.DataObject) -> None:
    here = data.draw(worlds())
    layers = here.spec.num_layers
    machines = data.draw(st.lists(st.integers(0, 2), min_size=2 * layers, max_size=2 * layers))
    pieces = [(machine, (half + 1) / 2) for half, machine in enumerate(machines)]
    spans = [(m, end) for n, (m, end) in enumerate(pieces) if n + 1 == len(pieces) or pieces[n + 1][0] != m]
    whole, cut = (Decision(Partition.of_spans(here.spec, ends)) for ends in (spans, pieces))
    assert figures(here, whole, Job(9, 9)) == figures(here, cut, Job(9, 9))


# Dies when cost/hosts.py says `units = sum(share.units[-1] for share` for `units = sum(len(share.units) for share`.
@given(st.data())
def test_which_units_a_machine_has_makes_no_difference_only_how_many(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    decision = data.draw(decisions(here.spec))
    layers = tuple(
        Placement(tuple(data.draw(st.permutations(one.groups))), tuple(data.draw(st.permutations(one.shards))))
        for one in decision.partition.layers
    )
    other = Partition(layers, decision.partition.embed, decision.partition.head)
    again = Decision(other, decision.wire, decision.prefill_chunk)
    assert figures(here, decision, job) == pytest.approx(figures(here, again, job))


# Dies when cost/bill.py says `machine * device.pue * watts * active` for `device.pue * watts * active`.
@given(st.data())
def test_workers_that_are_alike_may_change_numbers(data: st.DataObject) -> None:
    two, job = data.draw(worlds(2)), data.draw(jobs())
    here = World(two.spec, (*two.hosts, two.hosts[1]), {(0, 1): two.links[0, 1], (0, 2): two.links[0, 1]})
    decision = data.draw(decisions(here.spec))
    renamed = {0: 0, 1: 2, 2: 1}
    vector = tuple(renamed[machine] for machine in decision.partition.to_vector())
    other = Decision(Partition.from_vector(vector, here.spec), decision.wire, decision.prefill_chunk)
    # Where several may add the partial sums for whoever comes next, the first in number does: another plan.
    old, new = here.plan(decision), here.plan(other)
    assume({(m.kind, m.after, renamed[m.src], renamed[m.dst]) for m in old.moves}
           == {(m.kind, m.after, m.src, m.dst) for m in new.moves})  # fmt: skip
    assert figures(here, decision, job) == pytest.approx(figures(here, other, job))


def matrices(spec: ModelSpec) -> float:
    """Weights in the matrices of one layer, written down a second time."""
    attention = 2 * spec.num_heads * spec.head_dim + 2 * spec.num_kv_heads * spec.head_dim
    return spec.d_model * (attention + spec.ffn_matrices * spec.d_ff)


# Dies when cost/bill.py says `range(2 * spec.num_layers - 1):` for `range(2 * spec.num_layers):`.
@given(st.data())
def test_flop_of_all_machines_are_the_models_for_any_partition(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    partition = data.draw(partitions(here.spec))
    spec, prompt, later, mean = here.spec, job.prompt_tokens, job.tokens_out - 1, job.mean_context
    head = 2 * spec.vocab_size * spec.d_model
    scores = 4 * spec.num_layers * spec.num_heads * spec.head_dim
    whole = 2 * spec.num_layers * matrices(spec) * (prompt + later)
    whole += scores * (prompt**2 + later * mean) + head * job.tokens_out
    assert sum(flop(here, partition, job, machine) for machine in range(3)) == pytest.approx(whole)
    assert model_flop(spec, prompt, prompt) + later * model_flop(spec, 1, mean) == pytest.approx(whole)


# Dies when partition.py says `if owner == machine and unit)` for `if owner == machine)`.
@given(st.data())
def test_weights_and_cache_of_all_machines_are_the_models_for_any_partition(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    partition = data.draw(partitions(spec))
    held = sum(assigned_weight_bytes(spec, partition, m, Dtype.FP16, Weights.FULL) for m in range(3))
    tables = 1 if spec.tied_head and partition.embed == partition.head else 2
    assert held == 2 * (spec.num_layers * matrices(spec) + tables * spec.vocab_size * spec.d_model)
    cache = sum(assigned_kv_bytes(spec, partition, m, Dtype.FP16, 100) for m in range(3))
    assert cache == 100 * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 2


def alike(spec: ModelSpec, **figures: float) -> World:
    hosts = (Host(box(**figures)),) * 3
    return World(spec, hosts, {(0, 1): LinkSpec(0.0, 1e6, 1e6), (0, 2): LinkSpec(0.0, 1e6, 1e6)})


def busy_s(one: Bill) -> tuple[float, float]:
    return sum(one.prefill_busy_s), sum(one.token_busy_s)


# Dies when cost/hosts.py says `stage.stop // 2 - (stage.start + 1) // 2,` for `stage.stop // 2 - stage.start // 2,`.
# Dies when cost/bill.py says `(walk.busy_s for walk in walks[1:])` for `(walk.busy_s for walk in walks)`.
@given(st.data())
def test_seconds_of_machines_that_only_compute_are_the_models_flop(data: st.DataObject) -> None:
    spec, job = data.draw(model_specs()), data.draw(jobs())
    decision = data.draw(decisions(spec))
    one = bill(alike(spec, flop_per_s=1e6, memory_bytes_per_s=1e17), decision, job)
    steps = [one.plan.step(n, job.prompt_tokens) for n in range(decision.num_chunks(job.prompt_tokens))]
    head = 2 * spec.vocab_size * spec.d_model
    prompt = head + sum(model_flop(spec, step.count, step.start + step.count) - head for step in steps)
    assert busy_s(one) == pytest.approx((prompt / 1e6, model_flop(spec, 1, job.mean_context) / 1e6))
    assert sum(step.count for step in steps) == job.prompt_tokens


# Dies when cost/counts.py says `* context if part is Part.FFN else 0` for `* context if part is Part.ATTENTION else 0`.
@given(st.data())
def test_seconds_of_machines_that_only_read_are_the_models_bytes(data: st.DataObject) -> None:
    spec, job = data.draw(model_specs()), data.draw(jobs())
    one = bill(alike(spec, flop_per_s=1e17, memory_bytes_per_s=1e6), data.draw(decisions(spec)), job)
    cache = 2 * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    token = 2 * (spec.num_layers * matrices(spec) + spec.vocab_size * spec.d_model) + job.mean_context * cache
    assert busy_s(one)[1] == pytest.approx(token / 1e6)
