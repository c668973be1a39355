"""A machine reads only the slices it is assigned, and quantised weights take the memory they promise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitwise_llm import cost
from splitwise_llm.bench.overhead import NO_WORDS
from splitwise_llm.bench.processes import worker
from splitwise_llm.engine.edge import edge_with
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Weights

CONFIG = (
    '{"model_type": "llama", "num_hidden_layers": 12, "hidden_size": 1024, "num_attention_heads": 16,'
    '"num_key_value_heads": 8, "intermediate_size": 4096, "vocab_size": 32000, "max_position_embeddings": 512}'
)


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of about 1 GB, fp32, in two files with an index."""
    place = tmp_path_factory.mktemp("gigabyte")
    (place / "config.json").write_text(CONFIG)
    (place / "tokenizer.json").write_text(NO_WORDS)
    matrix = {"q": (1024, 1024), "k": (512, 1024), "v": (512, 1024), "o": (1024, 1024)}
    mlp = {"gate": (4096, 1024), "up": (4096, 1024), "down": (1024, 4096)}
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    tables = {"model.embed_tokens.weight": (32000, 1024), "lm_head.weight": (32000, 1024)}
    for name, shape in tables.items():
        files[0][name] = torch.randn(shape)
    files[0]["model.norm.weight"] = torch.ones(1024)
    for layer in range(12):
        prefix = f"model.layers.{layer}."
        into = files[layer % 2]
        for name, shape in matrix.items():
            into[f"{prefix}self_attn.{name}_proj.weight"] = torch.randn(shape) / 32
        for name, shape in mlp.items():
            into[f"{prefix}mlp.{name}_proj.weight"] = torch.randn(shape) / 32
        for name in ("input_layernorm", "post_attention_layernorm"):
            into[f"{prefix}{name}.weight"] = torch.ones(1024)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files):
        save_file(tensors, place / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part-{number}.safetensors")
    (place / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    yield place
    for file in place.iterdir():
        file.unlink()


def peak(directory: Path, partition: str, *options: str) -> tuple[int, float]:
    """Peak memory of a worker process in one short generation, and the bytes it was assigned."""

    async def play() -> tuple[int, float]:
        with worker(str(directory), *options) as cloud, edge_with(str(directory), {"cloud": cloud.address}) as edge:
            async with edge.generate([1, 2, 3, 4], partition, max_new_tokens=3, stop_ids=()) as generation:
                async for _ in generation:
                    pass
            weights = Weights(options[1]) if options else Weights.FULL
            dtype = Dtype(options[3]) if options else Dtype.FP32
            assigned = cost.assigned_weight_bytes(edge.machine.spec, edge.partition(partition), 1, dtype, weights)
            return generation.record.machines[1].peak_memory_bytes, assigned

    return asyncio.run(play())


SHARE = "edge[0:2] cloud[2:6] edge+cloud[6:10](kv=edge:0-3,cloud:4-7 ffn=edge:0-3,cloud:4-7) edge[10:12]"


ONE_GROUP = "edge[0:5] edge+cloud[5](kv=edge:0-6,cloud:7 ffn=edge:0-6,cloud:7) edge[6:12]"
"""So little that what is measured is the process itself."""


def test_peak_memory_is_what_was_assigned_plus_the_baseline(gigabyte: Path) -> None:
    assert 0.9e9 < sum(file.stat().st_size for file in gigabyte.glob("*.safetensors")) < 1.2e9
    spec = Checkpoint(gigabyte).architecture.spec
    measured, assigned = peak(gigabyte, ONE_GROUP)
    baseline = measured - assigned
    whole = cost.assigned_weight_bytes(spec, Partition.all_on(spec, 1), 1, Dtype.FP32, Weights.FULL)
    for partition in ("edge[0:2] cloud[2:12]", SHARE, "all:cloud"):
        measured, assigned = peak(gigabyte, partition)
        assert measured <= 1.15 * (assigned + baseline), (partition, measured, assigned, baseline)
        assert assigned <= whole


@pytest.mark.parametrize(
    ("weights", "bytes_per_weight"), [pytest.param("int8", 1.0, marks=pytest.mark.long), ("int4", 0.625)]
)
def test_low_bit_weights_take_the_memory_they_promise(gigabyte: Path, weights: str, bytes_per_weight: float) -> None:
    options = ("--weights", weights, "--dtype", "bf16")
    measured, assigned = peak(gigabyte, ONE_GROUP, *options)
    baseline = measured - assigned
    spec = Checkpoint(gigabyte).architecture.spec
    layers = Partition.parse("edge[0:2] cloud[2:12] head=edge", spec, ("edge", "cloud"))
    full = cost.assigned_weight_bytes(spec, layers, 1, Dtype.BF16, Weights.FULL)
    for partition in (layers, Partition.all_on(spec, 1)):
        measured, assigned = peak(gigabyte, partition.text(("edge", "cloud")), *options)
        if partition is layers:
            assert assigned == pytest.approx(full / 2 * bytes_per_weight, rel=0.01)
        assert measured <= 1.15 * (assigned + baseline), (measured, assigned, baseline)
