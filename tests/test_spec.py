"""Numbers at the rim: published configurations, device files, links, and quantities with units."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm import cost
from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.spec import (
    DeviceSpec,
    Dtype,
    LinkSpec,
    ModelSpec,
    Weights,
    device_sources,
    find_device,
    parse_emulation,
)
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rtt=20ms", "write 'rtt="),
        ("rtt=20ms up=3000gbit down=1mbit", "up is 3000 Gbit/s, which no link carries; expected .* up to 800 Gbit/s"),
        ("rtt=20ms up=1mbit down=375GB/s", "down is 3000 Gbit/s, which no link carries"),
        ("rtt=20ms up=3tbit down=1mbit", "'3tbit' is not a rate: write a number and one of bit, kbit"),
        ("rtt=20ms up=0mbit down=1mbit", "expected 1 bit/s"),
        ("rtt=90min up=1mbit down=1mbit", "rtt is 5400.0 s; expected a number from 0 to 3600 s"),
    ],
)
def test_a_link_that_cannot_be_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        LinkSpec.parse(text)


@pytest.mark.parametrize("value", [math.nan, -1.0, True, "1", math.inf, None])
def test_a_link_is_made_of_numbers(value: Any) -> None:
    for link in ((value, 1e6, 1e6), (0.1, value, 1e6), (0.1, 1e6, value)):
        with pytest.raises(SpecError, match="expected"):
            LinkSpec(*link)


def test_a_link_in_words() -> None:
    link = LinkSpec.parse("rtt=20ms up=50mbit down=8mbit")
    assert link == LinkSpec(0.02, 6.25e6, 1e6)
    assert link.text == "rtt=20ms up=50mbit down=8mbit"


RATES = st.floats(0.125, 1e11)


@given(st.builds(LinkSpec, st.floats(0, 3600), RATES, RATES))
def test_the_words_of_any_link_give_that_link(link: LinkSpec) -> None:
    assert LinkSpec.parse(link.text) == link


PI: dict[str, object] = {
    "name": "pi", "flop_per_s": 5e10, "memory_bytes_per_s": 1e10, "memory_bytes": 8e9, "launch_s": 1e-4,
}  # fmt: skip
PHONE = PI | {"name": "phone", "battery_j": 5.4e4}


def written(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data, indent=2))
    return path


def test_a_device_file_is_a_roofline(tmp_path: Path) -> None:
    device = parse_emulation(str(written(tmp_path / "pi.json", PI)))
    assert isinstance(device, DeviceSpec)
    assert device.seconds(5e10, 1e3) == pytest.approx(1.0001)
    assert device.seconds(1, 1e10) == pytest.approx(1.0001)
    assert parse_emulation("2.5") == 2.5
    assert parse_emulation("pi5") == find_device("raspberry-pi-5")


def test_efficiencies_stretch_the_roofline() -> None:
    device = DeviceSpec("pi", 5e10, 1e10, 8e9, compute_efficiency=0.5, memory_efficiency=0.25)
    assert device.seconds(5e10, 0) == 2.0
    assert device.seconds(0, 1e10) == 4.0
    assert device.seconds(5e10, 1e10) == 4.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"flop_per_s": -1}, "flop_per_s is -1"),
        ({"flop_per_s": 50}, "'pi': flop_per_s is 50; expected a number from 1e\\+06 to 1e\\+17 FLOP/s"),
        ({"flop_per_s": 1e18}, r"flop_per_s is 1e\+18; expected .* to 1e\+17"),
        ({"flop_per_s": 10**400}, "flop_per_s is 1000"),
        ({"flop_per_s": True}, "flop_per_s is True"),
        ({"memory_bytes": "8GB"}, "memory_bytes is '8GB'; expected a number"),
        ({"memory_bytes": None}, "memory_bytes is None"),
        ({"memory_bytes_per_s": math.nan}, "memory_bytes_per_s is nan"),
        ({"memory_bytes_per_s": math.inf}, r"memory_bytes_per_s is inf; .*bytes/s \(not bits\)"),
        ({"launch_s": 100}, "launch_s is 100"),
        ({"message_s": -1e-3}, "message_s is -0.001; expected a number from 0 to 1 s"),
        ({"compute_efficiency": 0}, "compute_efficiency is 0; expected a number above 0 to 1 of peak"),
        ({"memory_efficiency": 1.2}, "memory_efficiency is 1.2"),
        ({"load_bytes_per_s": 0}, "load_bytes_per_s is 0"),
        ({"idle_w": -5}, "idle_w is -5; expected a number from 0 to 1e\\+06 W"),
        (
            {"idle_w": 5, "decode_w": 4, "prefill_w": 9},
            "idle_w is 5 and decode_w only 4; .*whole device.*give decode_w",
        ),
        ({"idle_w": 5, "prefill_w": 4, "decode_w": 5}, "idle_w is 5 and prefill_w only 4"),
        ({"idle_w": 5}, "idle_w is 5 and decode_w not given"),
        ({"decode_w": "6 W"}, "decode_w is '6 W'"),
        ({"prefill_w": 1e9}, "prefill_w is 1000000000.0"),
        ({"radio_w": False}, "radio_w is False"),
        ({"pue": 0.9}, "pue is 0.9; expected a number from 1"),
        ({"battery_j": 0}, "battery_j is 0"),
        ({"usd_per_hour": -1}, "usd_per_hour is -1"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": 1.5}, "slots is 1.5; expected a whole number from 1"),
        ({"name": " "}, "name is ' '; expected text"),
        ({"name": 7}, "name is 7; expected text"),
    ],
)
def test_figures_of_a_device_that_cannot_be_right_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    given_here: dict[str, Any] = PI | change
    with pytest.raises(SpecError, match=says):
        DeviceSpec(**given_here)
    path = written(tmp_path / "pi.json", given_here)
    line = 2 + list(given_here).index(next(iter(change)))
    with pytest.raises(SpecError, match=rf"pi\.json, line {line}: .*{says}"):
        DeviceSpec.from_file(path)


def test_a_phone_is_no_datacentre() -> None:
    device: Any = {**PHONE, "memory_bytes_per_s": 67.2e9}
    assert DeviceSpec(**device).battery_j == 5.4e4
    for field, value in [("memory_bytes_per_s", 3e12 / 8), ("flop_per_s", 1e15)]:
        with pytest.raises(SpecError, match=rf"'phone': {field} is .*no phone is so fast: expected .* to [23]e"):
            DeviceSpec(**{**device, field: value})
    assert DeviceSpec(**{**device, "memory_bytes_per_s": 5e11, "battery_j": 3.6e5}).battery_j == 3.6e5  # a laptop


@pytest.mark.parametrize(
    ("change", "without", "says"),
    [
        ({}, "name", "lacks name; a device file has name, flop_per_s"),
        ({"name": "pi"}, "flop_per_s", "lacks flop_per_s;"),
        ({"watts": 5}, "", "line 7: has unknown watts; a device file has"),
        ({"launch_s": {"value": 1}}, "", "line 6: launch_s is .*expected a number or"),
        ({"launch_s": {"value": 1, "source": ""}}, "", "launch_s is .*expected a number or"),
        ({"launch_s": {"value": 1, "source": "x", "unit": "s"}}, "", "launch_s is .*expected a number or"),
        ({"launch_s": {"value": "1", "source": "x"}}, "", "line 6: device 'pi': launch_s is '1'"),
        ({"launch_s": [1]}, "", r"launch_s is \[1\]"),
        ({"engine": "fast"}, "", "line 7: 'fast' is none of this device's engines: there are none"),
        ({"engine": 5, "engines": {"5": {}}}, "", "'5' is none of this device's engines"),
        ({"engines": []}, "", "line 7: engines is no object of objects"),
        ({"engines": {"fast": 1}}, "", "engines is no object of objects"),
        ({"engines": {"fast": {"flop_per_s": 1e9}}}, "", "line 9: has unknown flop_per_s; an engine has compute_"),
        ({"engines": {"a": {"launch_s": 0.1}, "b": {"launch_s": 9}}}, "", "line 12: launch_s of engine 'b' is 9;"),
    ],
)
def test_a_device_file_that_cannot_be_right_names_line_and_field(
    tmp_path: Path, change: dict[str, object], without: str, says: str
) -> None:
    data = {key: value for key, value in (PI | change).items() if key != without}
    with pytest.raises(SpecError, match=rf"pi\.json.*{says}"):
        DeviceSpec.from_file(written(tmp_path / "pi.json", data))


def test_a_device_file_says_where_its_figures_are_from_and_what_engines_it_has(tmp_path: Path) -> None:
    table: dict[str, object] = {
        "slow": {"memory_efficiency": {"value": 0.5, "source": "measured here"}, "message_s": 1e-3},
        "fast": {"memory_efficiency": 0.9},
    }
    sourced = {"value": 1e10, "source": "data sheet"}
    path = written(tmp_path / "pi.json", {**PI, "memory_bytes_per_s": sourced, "engine": "slow", "engines": table})
    slow, fast = DeviceSpec.from_file(path), DeviceSpec.from_file(path, "fast")
    assert (slow.name, slow.memory_efficiency, slow.message_s) == ("pi", 0.5, 1e-3)
    assert (fast.name, fast.memory_efficiency, fast.message_s) == ("pi:fast", 0.9, 0.0)
    assert find_device(str(path)) == find_device(f"{path}:slow") == slow
    assert find_device(f"{path}:fast") == fast
    assert device_sources(str(path)) == {"memory_bytes_per_s": "data sheet", "memory_efficiency": "measured here"}
    assert device_sources(f"{path}:fast") == {"memory_bytes_per_s": "data sheet"}
    with pytest.raises(SpecError, match="line 11: 'fats' is none of this device's engines: slow, fast; did you mean"):
        find_device(f"{path}:fats")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[1]", "holds a JSON list"),
        (b"{", "line 1: .*ends in the middle"),
        (b'{\n"name": "pi",\n"flop_per_s": 5e1', "line 3: .*ends in the middle"),
        (b'{\n"name": "p', "line 2: .*ends in the middle"),
        (b'{"name": "pi",\n\n"flop_per_s" 5}', "line 3: this is no JSON: Expecting ':' delimiter"),
        (b'{"name": "pi",\n"name": "po"}', "name stands a second time"),
        (b"\xff\xfe{", "not text in UTF-8"),
        (b'{"a":' * 50_000, "bad.json"),
        (b'{"flop_per_s": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_a_device_file_that_is_no_file_of_figures(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text)
    with pytest.raises(SpecError, match=rf"bad\.json.*{says}" if says != "bad.json" else says):
        DeviceSpec.from_file(path)


def test_a_device_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        DeviceSpec.from_file(tmp_path / "pi.json")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        DeviceSpec.from_file(tmp_path)
    with pytest.raises(SpecError, match=r"'no-such-file\.json' is no device file and none of the shipped devices"):
        parse_emulation("no-such-file.json")
    with pytest.raises(SpecError, match="1 or more"):
        parse_emulation("nan")
