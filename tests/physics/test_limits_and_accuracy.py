"""Memory, limits and accuracy: what forbids a plan, and what a lossy one loses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import CHAT, FP16, LINKS, SMALL, box, edge_and_cloud, jobs, on, world, worlds
from splitwise_llm.cost import Accuracy, Floor, Host, Job, Limits, World, bill, memory_bytes, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import SpecError
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, ModelSpec, Weights
from strategies import NAMES, decisions

# Memory and limits


# Dies when cost/bill.py says `positions = job.prompt_tokens` for `positions = job.prompt_tokens + job.tokens_out`.
# Dies when cost/bill.py says `rows = min(job.prompt_tokens` for `rows = min(chunk or job.prompt_tokens`.
# Dies when cost/counts.py says `(spec.d_model + spec.ffn_matrices` for `(attention + spec.d_model + spec.ffn_matrices`.
def test_memory_is_weights_cache_and_buffers_on_both_sides() -> None:
    hosts = (Host(box(), weights=Weights.INT4), Host(box(), Dtype.FP32))
    here = World(SMALL, hosts, {(0, 1): LINKS["lan"]})
    one = bill(here, Decision(Partition.cut(SMALL, 2.5), prefill_chunk=32), Job(100, 20))
    attention, ffn, table = 4 * 64 * 128, 3 * 64 * 256, 100 * 64
    queries = kv = 128
    projected, rotated = queries + 2 * kv, queries + kv
    inner = 32 * (64 + projected + rotated + 2 * rotated + queries + 64 + 3 * 256)
    edge = 0.625 * (3 * attention + 2 * ffn) + 100 * (64 + 2) + 120 * 3 * 2 * 128 * 2 + inner * 2
    cloud = 4 * (5 * attention + 6 * ffn + table) + 120 * 5 * 2 * 128 * 4 + inner * 4
    assert one.memory_bytes == (edge, cloud)
    assert memory_bytes(here, on(SMALL, 0).partition, 1, CHAT, None) == 0


@given(st.data())
def test_a_plan_takes_as_much_memory_as_its_machines_have_or_there_is_an_obstacle(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    decision = data.draw(decisions(here.spec))
    need = bill(here, decision, job).memory_bytes
    for short in (0, 1):
        devices = [box(memory_bytes=max(size - short, 1e6)) for size in need]
        hosts = tuple(Host(d, h.dtype, h.weights) for d, h in zip(devices, here.hosts, strict=True))
        tight = World(here.spec, hosts, here.links)
        assert (obstacle(tight, decision, job) is not None) == bool(short and max(need) > 1e6)


# Dies when cost/limits.py says `if need < have:` for `if need > have:`.
def test_an_obstacle_names_the_machine_and_the_sizes() -> None:
    here = edge_and_cloud("s23", "a100", "llama-2-13b")
    said = obstacle(here, on(here.spec, 0), CHAT)
    assert said == "machine 0 (galaxy-s23) would hold 8.5 GB and has 4.6 GB"
    assert obstacle(here, on(here.spec, 1), CHAT) is None
    assert obstacle(here, Decision(Partition.u_shape(here.spec, 8, 8)), CHAT) is None


# Dies when cost/limits.py says `(layers - self.last_layers, 1)` for `(layers - self.last_layers, 0)`.
@pytest.mark.parametrize(
    ("text", "floor", "holds"),
    [
        ("all:edge", "8+8", True),
        ("edge[0:2] cloud[2:6] edge[6:8]", "2+2", True),
        ("edge[0:2] cloud[2:6] edge[6:8]", "3+2", False),
        ("edge[0:2] cloud[2:6] edge[6:8]", "2+3", False),
        ("edge[0:2] cloud[2:6.5] edge[6.5:8]", "2+2", False),
        ("edge[0:2] cloud[2:6] edge[6:8]", "0+0", True),
        ("edge[0:8] head=cloud", "0+0", False),
        ("edge[0:8] embed=cloud", "0+0", False),
        ("cloud[0:8] embed=edge head=edge", "0+0", True),
        ("cloud[0:1] edge[1:8] embed=edge", "0+9", False),
        ("edge+cloud[0] edge[1:8]", "1+0", False),
        ("edge[0:1] edge+cloud[1] edge[2:8]", "1+6", True),
    ],
)
def test_a_floor_keeps_embedding_head_and_its_layers_on_the_device(text: str, floor: str, holds: bool) -> None:
    here, decision = world(SMALL, box(), box()), Decision(Partition.parse(text, SMALL, NAMES))
    assert Floor.parse(floor).holds(decision.partition) == holds
    said = obstacle(here, decision, CHAT, Limits(floor=Floor.parse(floor)))
    assert (said is None) == holds
    assert holds or f"the floor {floor}" in str(said)


def test_other_limits_say_what_they_forbid() -> None:
    here = world(SMALL, box(), box())
    cut = Decision(Partition.cut(SMALL, 1))
    assert obstacle(here, cut, CHAT, Limits(unreachable=frozenset({1}))) == "machine 1 (box) cannot be reached"
    assert obstacle(here, cut, CHAT, Limits(only=frozenset({0}))) == "machine 1 (box) may not be used"
    assert obstacle(here, on(SMALL, 0), CHAT, Limits(unreachable=frozenset({1}))) is None
    assert obstacle(here, cut, CHAT, Limits(first_layer_on_device=True)) is None
    half = Decision(Partition.cut(SMALL, 0.5))
    assert obstacle(here, half, CHAT, Limits(first_layer_on_device=True)) == "the first layer must stay on the device"


# Accuracy

TABLE = Accuracy(
    {Weights.INT4: (0.1, 0.3), Weights.INT8: (0.01, 0.01)},
    {WirePrecision.INT8: (0.001, 0.002), WirePrecision.INT4: (0.01, 0.02)},
    "made up",
)


def nats(text: str, wire: WirePrecision = FP16, form: Weights = Weights.INT4, table: Accuracy = TABLE) -> float:
    here = World(SMALL, (Host(box(), weights=form), Host(box())), {(0, 1): LINKS["lan"]}, accuracy=table)
    return price(here, Decision(Partition.parse(text, SMALL, NAMES), wire), CHAT).nats


# Dies when cost/accuracy.py says `(machine in owners)` for `owners.count(machine) / len(owners)`.
def test_losses_of_weights_add_up_over_what_is_lossy() -> None:
    assert nats("all:edge") == pytest.approx(0.4)
    assert nats("all:edge", form=Weights.FULL) == nats("all:cloud") == 0
    assert nats("edge[0:4] cloud[4:8]") == pytest.approx(0.1)
    assert nats("edge[0:6] cloud[6:8]") == pytest.approx(0.1 + 0.3 / 2)
    assert nats("edge[0:4.5] cloud[4.5:8]") == pytest.approx(0.1 + 0.3 / 8)
    assert nats("edge+cloud[0:8]") == pytest.approx(0.2)


# Dies when cost/accuracy.py says `losses.items())` for `losses.items() if kind in kinds)`.
def test_losses_of_the_wire_add_up_over_crossings() -> None:
    assert nats("cloud[0:3] edge[3:8]", WirePrecision.INT4, Weights.FULL) == pytest.approx(0.01)
    assert nats("edge[0:2] cloud[2:6] edge[6:8]", WirePrecision.INT8, Weights.FULL) == pytest.approx(0.003)
    assert nats("cloud[0:4.5] edge[4.5:8]", WirePrecision.INT4, Weights.FULL) == pytest.approx(0.02)
    assert nats("cloud[0:8] embed=edge head=edge", WirePrecision.INT4, Weights.FULL) == pytest.approx(0.03)
    assert nats("edge[0:2] cloud[2:6] edge[6:8]", WirePrecision.FP16, Weights.FULL) == 0
    assert nats("all:cloud", WirePrecision.INT4) == 0


# Dies when cost/accuracy.py says `return (first, *inside[1:])` for `return (first, *inside[1:-1], last)`.
# Dies when cost/accuracy.py says `PARTIAL: self.by_boundary(` for `PARTIAL: self.by_shared_boundary(`.
def test_partial_sums_and_crossings_at_the_ends_have_figures_of_their_own() -> None:
    int8 = WirePrecision.INT8
    full = replace(TABLE, partials={int8: (0.08, 0.16)}, ends={int8: (0.0003, 0.0007)})
    middle, whole, inside = "edge[0:5] edge+cloud[5:6] edge[6:8]", "edge+cloud[0:8]", "cloud[0:8] embed=edge head=edge"
    assert nats(middle, int8, Weights.FULL, full) == pytest.approx(0.002 + 2 * 0.16 / 8)
    assert nats(middle, int8, Weights.FULL) == pytest.approx(3 * 0.002)
    assert nats(whole, int8, Weights.FULL, full) == pytest.approx(0.0003 + 0.08 + 0.16)
    assert nats(whole, int8, Weights.FULL) == pytest.approx(8 * 0.001 + 9 * 0.002)
    assert nats(inside, int8, Weights.FULL, full) == pytest.approx(0.001)
    assert nats("edge[0:2] cloud[2:8] head=edge", int8, Weights.FULL, full) == pytest.approx(0.001 + 0.0007)
    assert nats(whole, WirePrecision.INT4, Weights.FULL, full) == nats(whole, WirePrecision.INT4, Weights.FULL)


# Dies when cost/accuracy.py says `min(losses)` for `max(losses)`.
def test_a_lossy_prefill_is_priced_as_if_it_lost_throughout() -> None:
    here = World(SMALL, (Host(box()), Host(box())), {(0, 1): LINKS["lan"]}, accuracy=TABLE)
    u = Partition.parse("edge[0:2] cloud[2:6] edge[6:8]", SMALL, NAMES)
    for wire, early in ((FP16, WirePrecision.INT8), (WirePrecision.INT8, FP16)):
        assert price(here, Decision(u, wire, prefill_wire=early), CHAT).nats == pytest.approx(0.003)


def test_an_accuracy_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(TABLE.to_json())
    assert Accuracy.from_file(path) == TABLE
    full = replace(TABLE, partials={WirePrecision.INT8: (0.1, 0.2)}, ends={WirePrecision.INT8: (0.3, 0.4)})
    path.write_text(full.to_json())
    assert Accuracy.from_file(path) == full
    old = {key: value for key, value in json.loads(TABLE.to_json()).items() if key not in ("partials", "ends")}
    path.write_text(json.dumps(old))
    assert Accuracy.from_file(path) == TABLE
    lame = json.dumps({**old, "ends": {"int8": [1]}})
    for text in ("", "{}", "[1]", '{"weights": {"int3": [1]}, "wire": {}, "source": ""}', lame):
        path.write_text(text)
        with pytest.raises(SpecError, match=r"accuracy\.json is no accuracy table .*splitwise profile --accuracy"):
            Accuracy.from_file(path)
    with pytest.raises(SpecError, match="is no accuracy table"):
        Accuracy.from_file(tmp_path / "none.json")


# Dies when cost/accuracy.py says `* len(groups) / (2 * layers) for` for `/ of_half.count(group) for`.
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_all_layers_in_a_form_lose_the_sum_of_the_groups_however_layers_divide(layers: int, groups: int) -> None:
    groups = min(groups, layers)
    spec = ModelSpec("llama", layers, 64, 8, 8, 8, 256, 100, 128, 3, True)
    table = Accuracy({Weights.INT4: tuple(0.1 * (n + 1) for n in range(groups))}, {}, "made up")
    lost = table.of_weights(Partition.all_on(spec, 0), [Weights.INT4])
    assert lost == pytest.approx(0.1 * groups * (groups + 1) / 2)
