"""Numbers at the rim: published configurations, device files, links, and quantities with units."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm import cost
from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights, parse_emulation
from splitwise_llm.units import parse_bytes, parse_rate, parse_seconds, show_bytes
from strategies import model_specs

LLAMA_7B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN_05B = {
    "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}


@pytest.mark.parametrize(
    ("config", "parameters", "shard_columns"),
    [(LLAMA_7B, 6.74e9, 1376), (QWEN_05B, 0.494e9, 608), (GPT2, 0.1244e9, 384)],
)
def test_weights_of_published_models_add_up_to_their_known_size(
    config: dict[str, object], parameters: float, shard_columns: int
) -> None:
    spec = ModelSpec.from_config(config)
    held = cost.assigned_weight_bytes(spec, Partition.all_on(spec, 0), 0, Dtype.FP16, Weights.FULL)
    assert held / 2 == pytest.approx(parameters, rel=0.005)
    assert (spec.num_ffn_shards, spec.shard_columns) == (8, shard_columns)


@given(model_specs(), st.sampled_from(Dtype), st.sampled_from(Weights))
def test_however_a_model_is_divided_it_weighs_the_same(spec: ModelSpec, dtype: Dtype, weights: Weights) -> None:
    def total(partition: Partition) -> float:
        machines = range(3)
        return sum(cost.assigned_weight_bytes(spec, partition, m, dtype, weights) for m in machines)

    whole = total(Partition.all_on(spec, 1))
    divided = total(Partition.shared(spec, {0: 1.0, 2: 2.0}))
    assert divided == pytest.approx(whole)
    units = spec.num_layers * (
        spec.num_kv_heads * cost.unit_flop(spec, Part.ATTENTION, 1, 0)
        + spec.num_ffn_shards * cost.unit_flop(spec, Part.FFN, 1, 0)
    )
    attention = spec.d_model * spec.head_dim * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    assert units == 2 * spec.num_layers * (attention + spec.ffn_matrices * spec.d_model * spec.d_ff)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "mamba"}, "supported families are gpt2, llama"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"hidden_size": "wide"}, "expected a whole number"),
        ({"num_key_value_heads": 5}, "cannot be grouped"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ModelSpec.from_config({**LLAMA_7B, **change})


@pytest.mark.parametrize(
    ("text", "bytes_per_s"), [("8mbit", 1e6), ("20 Mbit", 2.5e6), ("1gbit", 125e6), ("3MB/s", 3e6), ("64kbit/s", 8e3)]
)
def test_bits_are_not_bytes(text: str, bytes_per_s: float) -> None:
    assert parse_rate(text) == bytes_per_s


def test_durations_and_sizes() -> None:
    assert (parse_seconds("20ms"), parse_seconds("1.5s"), parse_seconds("2min")) == (0.02, 1.5, 120.0)
    assert (parse_bytes("512MB"), parse_bytes("2GiB")) == (512_000_000, 2**31)
    assert [show_bytes(n) for n in (12, 1500, 2.5e6, 3e9)] == ["12 B", "1.5 kB", "2.5 MB", "3.0 GB"]


@pytest.mark.parametrize("text", ["", "fast", "20", "20 parsec", "-3ms", "nan", "1e999s"])
def test_a_quantity_without_sense_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match=r"20ms|finite"):
        parse_seconds(text)


def test_a_link_in_words() -> None:
    assert LinkSpec.parse("rtt=20ms up=50mbit down=8mbit") == LinkSpec(0.02, 6.25e6, 1e6)
    for text, says in [
        ("rtt=20ms", "write 'rtt="),
        ("rtt=20ms up=3000gbit down=1mbit", "at most 800 Gbit"),
        ("rtt=20ms up=0mbit down=1mbit", "more than 0"),
    ]:
        with pytest.raises(SpecError, match=says):
            LinkSpec.parse(text)


PI = {"name": "pi", "flop_per_s": 5e10, "memory_bytes_per_s": 1e10, "memory_bytes": 8e9, "launch_s": 1e-4}


def test_a_device_file_is_a_roofline(tmp_path: Path) -> None:
    path = tmp_path / "pi.json"
    path.write_text(json.dumps(PI))
    device = parse_emulation(str(path))
    assert isinstance(device, DeviceSpec)
    assert device.seconds(5e10, 1e3) == pytest.approx(1.0001)
    assert device.seconds(1, 1e10) == pytest.approx(1.0001)
    assert parse_emulation("2.5") == 2.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flop_per_s": -1}, "flop_per_s is -1"),
        ({"flop_per_s": 50}, "at least|up to"),
        ({"memory_bytes": "8GB"}, "memory_bytes is '8GB'"),
        ({"launch_s": 100}, "launch_s is 100"),
        ({"watts": 5}, "unknown watts"),
        ({"name": None}, None),
    ],
)
def test_a_device_file_that_cannot_be_right_names_the_field(
    tmp_path: Path, change: dict[str, object], says: str | None
) -> None:
    path = tmp_path / "pi.json"
    data = {**PI, **change}
    if says is None:
        del data["name"]
        says = "lacks name"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecError, match=says):
        DeviceSpec.from_file(path)


def test_a_device_file_that_is_no_file(tmp_path: Path) -> None:
    for text in ("", "[1]", "{"):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(SpecError, match=r"bad\.json"):
            DeviceSpec.from_file(path)
    with pytest.raises(SpecError, match="cannot be read"):
        parse_emulation("no-such-file.json")
