"""A partition: its three encodings, its named constructors, and what it refuses."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.errors import PartitionError
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.spec import ModelSpec
from strategies import NAMES, model_specs, partitions

SPEC = ModelSpec("llama", 8, 64, 8, 4, 16, 256, 100, 128, 3, True)


@given(st.data())
def test_each_encoding_has_its_inverse(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    partition = data.draw(partitions(spec))
    assert Partition.parse(partition.text(NAMES), spec, NAMES) == partition
    assert Partition.from_bytes(partition.to_bytes(), spec) == partition
    assert Partition.from_vector(partition.to_vector(), spec) == partition


@given(st.data())
def test_every_unit_is_on_exactly_one_machine(data: st.DataObject) -> None:
    spec = data.draw(model_specs())
    partition = data.draw(partitions(spec))
    for half in range(2 * spec.num_layers):
        units = [unit for machine in range(3) for unit in partition.units_on(machine, half)]
        assert sorted(units) == list(range(spec.num_ffn_shards if half % 2 else spec.num_kv_heads))


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("all:cloud", "cloud[0:8]"),
        ("edge[0:2] cloud[2:6] edge[6:8]", "edge[0:2] cloud[2:4] cloud[4:6] edge[6:8] embed=edge head=edge"),
        ("edge[0:2.5] cloud[2.5:8]", "edge[0:2] edge[2:2.5] cloud[2.5:3] cloud[3:8]"),
        (
            "edge[0:3] edge+cloud[3](kv=edge:0-1,cloud:2-3 ffn=edge:0-3,cloud:4-7) edge[4:8]",
            "edge[0:3] edge+cloud[3] edge[4:8]",
        ),
        (
            "edge+cloud+third[0:8](kv=edge:0-1,cloud:2,third:3 ffn=edge:0-2,cloud:3-5,third:6-7)",
            "edge+cloud+third[0:8]",
        ),
    ],
)
def test_text_is_canonical(text: str, same: str) -> None:
    partition = Partition.parse(same, SPEC, NAMES)
    assert partition.text(NAMES) == text
    assert Partition.parse(text, SPEC, NAMES) == partition


def test_named_constructors_say_what_they_mean() -> None:
    assert Partition.all_on(SPEC, 1).text(NAMES) == "all:cloud"
    assert Partition.cut(SPEC, 2.5).text(NAMES) == "edge[0:2.5] cloud[2.5:8]"
    assert Partition.u_shape(SPEC, 2, 2).text(NAMES) == "edge[0:2] cloud[2:6] edge[6:8]"
    assert Partition.u_shape(SPEC, 0, 0).text(NAMES) == "cloud[0:8] embed=edge head=edge"
    halves = Partition.shared(SPEC, {0: 1, 1: 1}, layers=[3])
    assert halves == Partition.parse("edge[0:3] edge+cloud[3] edge[4:8]", SPEC, NAMES)
    uneven = Partition.shared(SPEC, {0: 1, 1: 3}, layers=[0])
    assert uneven.layers[0] == Placement((0, 1, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ends at layer 0"),
        ("edge[0:2]", "ends at layer 2"),
        ("edge[0:2] cloud[3:8]", "starts at layer 3"),
        ("edge[0:2] cloud[1:8]", "starts at layer 1"),
        ("edge[0:9]", "layer 9 does not exist"),
        ("edge[0:0] cloud[0:8]", "is empty"),
        ("edge[0:2.3] cloud[2.3:8]", "neither whole nor half"),
        ("phone[0:8]", "unknown machine 'phone'; the machines are edge, cloud, third"),
        ("all:phone", "unknown machine"),
        ("edge[0:8] embed=edge embed=cloud", "embed= is written twice"),
        ("edge+edge[0:8]", "names a machine twice"),
        ("edge[0:inf]", "cannot read"),
        (f"edge[0:{'9' * 400}]", "is no layer"),
        ("edge[0:8] head=phone", "unknown machine"),
        ("edge[0:8", "cannot read"),
        ("edge[0:8] cloud", "cannot read 'cloud'"),
        ("edge[0:0.5] edge+cloud[0.5:8]", "must begin and end between layers"),
        ("edge+cloud[0:8](kv=edge:0-3)", "needs both lists"),
        ("edge+cloud[0:8](kv=edge:0-3 ffn=edge:0-3,cloud:4-8)", "names number 8 of the FFN shards; a layer has 8"),
        ("edge+cloud[0:8](kv=edge:0-3 ffn=edge:0-3,cloud:3-7)", "gives number 3"),
        ("edge+cloud[0:8](kv=edge:0-2 ffn=edge:0-3,cloud:4-7)", "leaves number 3 of the key/value groups to nobody"),
        ("edge+cloud[0:8](kv=edge:0-3 ffn=edge:0-7)", "gives cloud nothing to do"),
        ("edge+cloud[0:8](kv=edge:0-3 ffn=edge:0-3,third:4-7)", "not named before the bracket"),
        ("edge+cloud[0:8](kv=edge:a ffn=edge:0-3,cloud:4-7)", "cannot read 'edge:a'"),
    ],
)
def test_text_that_is_no_partition_is_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(PartitionError, match=re.escape(says)):
        Partition.parse(text, SPEC, NAMES)


def test_bytes_and_vectors_of_another_model_are_refused() -> None:
    data = Partition.all_on(SPEC, 0).to_bytes()
    with pytest.raises(PartitionError, match="version"):
        Partition.from_bytes(b"\x07" + data[1:], SPEC)
    with pytest.raises(PartitionError, match="has 98 numbers, this one has 97"):
        Partition.from_bytes(data[:-1], SPEC)
    with pytest.raises(PartitionError, match="out of range"):
        Partition.from_vector([255, *data[2:]], SPEC)


def test_a_partition_is_checked_against_model_and_machines() -> None:
    partition = Partition.cut(SPEC, 4)
    partition.check(SPEC, 2)
    with pytest.raises(PartitionError, match="only machines 0 to 0"):
        partition.check(SPEC, 1)
    with pytest.raises(PartitionError, match="the model 4 layers"):
        partition.check(ModelSpec("llama", 4, 64, 8, 4, 16, 256, 100, 128, 3, True), 2)
