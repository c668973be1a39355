"""What is resident: exactly the assigned slices, in the form that was asked for, whatever the family stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwise_llm.bench.random_models import TINY, make_model
from splitwise_llm.errors import ModelError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.families import Architecture
from splitwise_llm.model.weights import Need, Resident
from splitwise_llm.spec import Dtype, Weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", TINY)
def test_slices_of_units_put_together_are_the_whole_layer(family: str, tiny: Callable[[str], Path]) -> None:
    resident = Resident(Checkpoint(tiny(family)), Dtype.FP32, Weights.FULL, CPU)
    spec = resident.architecture.spec
    groups, shards = range(spec.num_kv_heads), range(spec.num_ffn_shards)
    x = torch.randn(3, spec.d_model)
    inner = [resident.ffn(1, (shard,)).up(x) for shard in shards]
    halves = [
        torch.cat([part.chunk(spec.ffn_matrices - 1, -1)[n] for part in inner], -1)
        for n in range(spec.ffn_matrices - 1)
    ]
    assert torch.allclose(torch.cat(halves, -1), resident.ffn(1, tuple(shards)).up(x), atol=1e-5)
    whole = resident.attention(1, tuple(groups))
    odd, even = (resident.attention(1, tuple(groups[n::2])) for n in (1, 0))
    assert odd.num_groups + even.num_groups == whole.num_groups
    width = spec.heads_per_group * spec.head_dim
    y = torch.randn(3, spec.num_heads * spec.head_dim)
    blocks = y.view(3, spec.num_kv_heads, width)
    summed = odd.o(blocks[:, 1::2].reshape(3, -1)) + even.o(blocks[:, 0::2].reshape(3, -1))
    assert torch.allclose(summed, whole.o(y), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("weights", [Weights.INT8, Weights.INT4])
def test_every_matrix_is_quantised_gpt2s_fused_ones_too(
    family: str, weights: Weights, tiny: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint(tiny(family))
    spec = checkpoint.architecture.spec
    full, low = (Resident(checkpoint, Dtype.BF16, form, CPU) for form in (Weights.FULL, weights))
    groups, shards = tuple(range(spec.num_kv_heads)), tuple(range(spec.num_ffn_shards))
    pairs = [
        (full.attention(0, groups).qkv, low.attention(0, groups).qkv),
        (full.attention(0, groups).o, low.attention(0, groups).o),
        (full.ffn(0, shards).up, low.ffn(0, shards).up),
        (full.ffn(0, shards).down, low.ffn(0, shards).down),
    ]
    for exact, quantised in pairs:
        error = (exact.dequantised() - quantised.dequantised()).norm() / exact.dequantised().norm()
        assert 0 < float(error) < {Weights.INT8: 0.012, Weights.INT4: 0.12}[weights]
        assert (exact.in_features, exact.out_features) == (quantised.in_features, quantised.out_features)


def test_a_tied_table_is_held_once_and_slices_are_forgotten_when_nobody_needs_them(tiny: Callable[[str], Path]) -> None:
    resident = Resident(Checkpoint(tiny("qwen2")), Dtype.FP32, Weights.FULL, CPU)
    assert resident.embedding().table is resident.head().table
    need = Need(((0, (0, 1)), (1, (0,))), embed=True, head=False)
    resident.load(need)
    kept = resident.ffn(0, (0,))
    resident.ffn(0, (1,))
    resident.keep_only([need])
    assert resident.ffn(0, (0,)) is kept
    assert set(resident._held) == {("attention", 0, (0, 1)), ("ffn", 0, (0,)), ("embedding", 0, ()), ("table", 0, ())}


# Dies when model/weights.py says `in need.units:` for `in sorted(need.units, key=lambda unit: unit[0] % 2 == 0):`.
def test_what_is_largest_is_read_first(tiny: Callable[[str], Path]) -> None:
    """The full precision of a slice lies beside what is held while it is quantised."""
    resident = Resident(Checkpoint(tiny("llama")), Dtype.BF16, Weights.INT4, CPU)
    units = tuple((half, (0,)) for half in range(4))
    resident.load(Need(units, embed=True, head=True))
    kinds = [kind for kind, *_ in resident._held]
    assert kinds == ["embedding", "head", "ffn", "ffn", "attention", "attention"]


def test_the_fingerprint_tells_fine_tunes_apart(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("llama")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert Checkpoint(tmp_path).fingerprint == Checkpoint(source).fingerprint
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Checkpoint(tmp_path).fingerprint != Checkpoint(source).fingerprint


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa-tied"])
def test_the_fingerprint_is_the_same_in_every_process(family: str, tiny: Callable[[str], Path]) -> None:
    code = (
        "import sys; from splitwise_llm.model.checkpoint import Checkpoint; print(Checkpoint(sys.argv[1]).fingerprint)"
    )
    for seed in ("1", "2"):  # sets and their like are ordered differently in each process
        command = [sys.executable, "-c", code, str(tiny(family))]
        said = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True)
        assert said.stdout.decode().strip() == Checkpoint(tiny(family)).fingerprint


def test_a_missing_or_misshapen_tensor_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("llama")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = (source / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    resident = Resident(Checkpoint(tmp_path), Dtype.FP32, Weights.FULL, CPU)
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.4\.input_layernorm|no tensor 'model\.layers\.4"):
        resident.attention(4, (0,))
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 256', '"vocab_size": 300'))
    with pytest.raises(ModelError, match=r"has shape \(256, 64\), config\.json calls for \(300, 64\)"):
        Resident(Checkpoint(tmp_path), Dtype.FP32, Weights.FULL, CPU).embedding()


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": "x"},
        {"rms_norm_eps": "abc"},
        {"rope_parameters": [1]},
        {"hidden_act": ["a"]},
        {"layer_types": 5},
        {"num_hidden_layers": 10**9},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_values_that_cannot_be_are_model_errors(
    change: dict[str, object], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny("llama")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**json.loads((source / "config.json").read_text()), **change}))
    with pytest.raises(ModelError):
        Checkpoint(tmp_path)


def test_a_tensor_in_a_format_that_is_not_read_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    data = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"'))
    with pytest.raises(ModelError, match="stored as I32; read are F32"):
        Resident(Checkpoint(tmp_path), Dtype.FP32, Weights.FULL, CPU).embedding()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "mish"}, "mish"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' RoPE scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_the_arithmetic_does_not_cover_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        Architecture.from_config({**TINY["llama"], **change}, frozenset())


def test_a_sharded_checkpoint_reads_like_a_whole_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    make_model(tmp_path, TINY["llama"], seed=len("llama"), max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert Checkpoint(tmp_path).fingerprint == Checkpoint(tiny("llama")).fingerprint


def test_a_hub_id_is_downloaded_only_when_it_is_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "org/absent":
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name") == tmp_path
    assert locate(str(tmp_path)) == tmp_path
    assert asked == ["org/name"]
    with pytest.raises(ModelError, match=r"org/absent.*no network"):
        locate("org/absent")
    for wrong in ("./absent", "absent", "a/b/c"):
        with pytest.raises(ModelError, match="no directory with a model"):
            locate(wrong)
