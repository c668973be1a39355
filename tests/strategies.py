"""Generated values, in one place: model sizes, partitions, decisions."""

from __future__ import annotations

from hypothesis import strategies as st

from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.spec import ModelSpec

NAMES = ("edge", "cloud", "third")


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    """Models of one to six layers and up to eight groups."""
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    ratio = draw(st.sampled_from([1, 2, 4]))
    return ModelSpec(
        family="llama",
        num_layers=draw(st.integers(1, 6)),
        d_model=64,
        num_heads=groups * ratio,
        num_kv_heads=groups,
        head_dim=16,
        d_ff=draw(st.sampled_from([96, 128, 160, 256, 7])),
        vocab_size=100,
        max_context=128,
        ffn_matrices=3,
        tied_head=draw(st.booleans()),
    )


def _owners(count: int, machines: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Mostly one machine for all units, sometimes any machine for each."""
    alone = st.integers(0, machines - 1).map(lambda machine: (machine,) * count)
    return alone | st.tuples(*[st.integers(0, machines - 1)] * count)


@st.composite
def partitions(draw: st.DrawFn, spec: ModelSpec, machines: int = 3) -> Partition:
    """Any assignment of units, embedding and head to machines."""
    layers = tuple(
        Placement(draw(_owners(spec.num_kv_heads, machines)), draw(_owners(spec.num_ffn_shards, machines)))
        for _ in range(spec.num_layers)
    )
    machine = st.integers(0, machines - 1)
    return Partition(layers, embed=draw(machine), head=draw(machine))


@st.composite
def decisions(draw: st.DrawFn, spec: ModelSpec, machines: int = 3) -> Decision:
    """A partition, any wire precision, and chunks from one position to all at once."""
    chunk = draw(st.none() | st.integers(1, 20))
    return Decision(draw(partitions(spec, machines)), draw(st.sampled_from(WirePrecision)), chunk)
