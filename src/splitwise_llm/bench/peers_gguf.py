"""A Llama of the published format as a GGUF file, fp32, bit for bit the same weights; knows no program that reads it.

The vocabulary in it is made up (the benches speak in ids), so that any model can be written, with or without text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from splitwise_llm.errors import ModelError
from splitwise_llm.model.checkpoint import Checkpoint

ALIGNMENT = 32
UNKNOWN, CONTROL, NORMAL = 2, 3, 1
"""Kinds of tokens, as GGUF numbers them."""

_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 4, 6, 7, 8, 9, 5
_FP32 = 0

PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Of a layer: its name in safetensors, and in GGUF."""

Value = int | float | bool | str | list[str] | list[int] | list[float]


def write_gguf(directory: Path, into: Path) -> None:
    """Write the Llama of a model directory, a tensor at a time. Raises ModelError for anything but a plain Llama."""
    checkpoint = Checkpoint(directory)
    names = tensor_names(checkpoint)
    shapes = {theirs: checkpoint.tensors[ours].shape for ours, theirs in names.items()}
    with into.open("wb") as file:
        file.write(header(metadata(checkpoint), shapes))
        for ours, theirs in names.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            for rows in _rows(checkpoint, ours, theirs):
                file.write(rows.numpy().tobytes())
        file.write(bytes(-file.tell() % ALIGNMENT))


def tensor_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Of every tensor, what GGUF calls it. Raises ModelError."""
    spec, config = checkpoint.architecture.spec, checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "llama" or rope.get("rope_type", "default") != "default":
        raise ModelError(f"{checkpoint.directory} is no plain Llama; the comparison writes only those as GGUF")
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(spec.num_layers):
        for ours, theirs in PARTS.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    if not spec.tied_head:
        names["lm_head.weight"] = "output.weight"
    odd = {*checkpoint.tensors} ^ {*names}
    if odd:
        raise ModelError(f"{checkpoint.directory}: {min(odd)!r} is more, or less, than a plain Llama has")
    return names


def metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """What a GGUF file says of a Llama before its tensors."""
    spec, config = checkpoint.architecture.spec, checkpoint.config
    rope = config.get("rope_parameters") or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, spec.vocab_size))]
    return {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.block_count": spec.num_layers,
        "llama.context_length": spec.max_context,
        "llama.embedding_length": spec.d_model,
        "llama.feed_forward_length": spec.d_ff,
        "llama.attention.head_count": spec.num_heads,
        "llama.attention.head_count_kv": spec.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": spec.head_dim,
        "llama.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "llama.vocab_size": spec.vocab_size,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 3)],
        "tokenizer.ggml.add_bos_token": False,
    }


def header(said: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Everything before the first tensor, which begins at the next multiple of ALIGNMENT."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(shapes), len(said))]
    parts += [_string(key) + _typed(value) for key, value in said.items()]
    offset = 0
    for name, shape in shapes.items():
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        parts.append(struct.pack("<IQ", _FP32, offset))
        count = 4
        for size in shape:
            count *= size
        offset += count + -count % ALIGNMENT
    return b"".join(parts)


def interleaved_heads(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads x head_dim, columns) with the two halves of every head interleaved: GGUF's Llama rotates neighbours
    where the published one rotates halves."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, -1).transpose(1, 2).reshape(rows.shape)


def _rows(checkpoint: Checkpoint, ours: str, theirs: str) -> Iterator[Tensor]:
    spec, shape = checkpoint.architecture.spec, checkpoint.tensors[ours].shape
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}
    rotated = next((count for part, count in heads.items() if f".{part}." in theirs), 0)
    step = shape[0] if rotated or len(shape) == 1 else 1024
    for start in range(0, shape[0], step):
        rows = torch.empty(min(step, shape[0] - start), *shape[1:])
        checkpoint.copy_slice(ours, shape, 0, start, rows)
        yield interleaved_heads(rows, rotated) if rotated else rows


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value: Value) -> bytes:
    if isinstance(value, list):
        kind = {str: _STRING, int: _INT32, float: _FLOAT32}[type(value[0])]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_plain(kind, one) for one in value)
    kind = {str: _STRING, bool: _BOOL, int: _UINT32, float: _FLOAT32}[type(value)]
    return struct.pack("<I", kind) + _plain(kind, value)


def _plain(kind: int, value: int | float | str) -> bytes:
    if isinstance(value, str):
        return _string(value)
    return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}[kind], value)
