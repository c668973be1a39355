"""What the parts of a model weigh and compute: small pure functions, one formula each, the counting rule with it.

Norms, biases and rotary tables are below a thousandth of any unit and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from splitwise_llm.partition import Part, Partition
from splitwise_llm.spec import Dtype, ModelSpec, Weights


def _matrices(spec: ModelSpec, part: Part) -> tuple[tuple[int, int], ...]:
    return spec.group_matrices if part is Part.ATTENTION else spec.shard_matrices


@cache
def unit_weight_bytes(spec: ModelSpec, part: Part, dtype: Dtype, weights: Weights) -> float:
    """Bytes of the linear weights of one key/value group or one FFN shard."""
    return sum(weights.num_bytes(rows, columns, dtype) for rows, columns in _matrices(spec, part))


def table_bytes(spec: ModelSpec, dtype: Dtype, weights: Weights) -> float:
    """Bytes of the token table (embedding or output projection); low-bit models keep it in int8."""
    form = Weights.FULL if weights is Weights.FULL else Weights.INT8
    return form.num_bytes(spec.vocab_size, spec.d_model, dtype)


def weight_bytes(
    spec: ModelSpec,
    pieces: Iterable[tuple[int, tuple[int, ...]]],
    embed: bool,
    head: bool,
    dtype: Dtype,
    weights: Weights,
) -> float:
    """Bytes of (half, units) pieces and the ends; a tied table that serves both ends counts once."""
    total = sum(
        len(units) * unit_weight_bytes(spec, Part.FFN if half % 2 else Part.ATTENTION, dtype, weights)
        for half, units in pieces
    )
    tables = embed + head
    total += (min(tables, 1) if spec.tied_head else tables) * table_bytes(spec, dtype, weights)
    if spec.family == "gpt2" and embed:
        total += spec.max_context * spec.d_model * dtype.num_bytes
    return total


def assigned_weight_bytes(spec: ModelSpec, partition: Partition, machine: int, dtype: Dtype, weights: Weights) -> float:
    """Bytes of weights a machine holds for a partition."""
    pieces = [(half, partition.units_on(machine, half)) for half in range(2 * spec.num_layers)]
    embed, head = partition.embed == machine, partition.head == machine
    return weight_bytes(spec, pieces, embed, head, dtype, weights)


def assigned_kv_bytes(spec: ModelSpec, partition: Partition, machine: int, dtype: Dtype, positions: int) -> int:
    """Bytes of keys and values a machine keeps for one session of `positions` positions."""
    groups = sum(len(partition.units_on(machine, half)) for half in range(0, 2 * spec.num_layers, 2))
    return positions * spec.kv_bytes_per_position(groups, dtype)


def activation_bytes(spec: ModelSpec, rows: int, dtype: Dtype) -> int:
    """Bytes of what `rows` positions computed at once leave beside weights and cache, as `model/share.py` computes.

    Attention: the stream, queries with keys and values as projected, queries and keys rotated, both once more in fp32
    (two elements each, as in 16 bits; of fp32 itself that is too much), and what was attended to. FFN: the stream and
    one tensor per matrix. Both halves count though one is computed at a time: the C library keeps what one has freed,
    and the tensors of the other are of other sizes. What attention makes of positions before these, in fp32, and
    blocks of its scores are not counted: they matter where a long prompt is computed in short chunks.
    """
    kv = spec.num_kv_heads * spec.head_dim
    queries = spec.heads_per_group * kv
    attention = spec.d_model + (queries + 2 * kv) + (queries + kv) + 2 * (queries + kv) + queries
    return rows * (attention + spec.d_model + spec.ffn_matrices * spec.d_ff) * dtype.num_bytes


def unit_flop(spec: ModelSpec, part: Part, positions: int, context: int) -> float:
    """FLOP of one unit over `positions` new positions that see up to `context`: two per weight and
    position, plus scores and values, counted over the whole context for each position (an upper bound
    for a causal prefill)."""
    linear = 2.0 * positions * sum(rows * columns for rows, columns in _matrices(spec, part))
    if part is Part.FFN:
        return linear
    return linear + 4.0 * positions * context * spec.heads_per_group * spec.head_dim


def unit_memory_bytes(spec: ModelSpec, part: Part, context: int, dtype: Dtype, weights: Weights) -> float:
    """Bytes one unit reads in a step: its weights once, and for attention its keys and values."""
    kv = spec.kv_bytes_per_position(1, dtype) * context if part is Part.ATTENTION else 0
    return unit_weight_bytes(spec, part, dtype, weights) + kv


def head_flop(spec: ModelSpec, rows: int = 1) -> float:
    """FLOP of the output projection for the positions that are sampled or verified."""
    return 2.0 * rows * spec.vocab_size * spec.d_model


def model_flop(spec: ModelSpec, positions: int, context: int) -> float:
    """FLOP of the whole model over `positions` new positions, with one output projection."""
    attention = spec.num_kv_heads * unit_flop(spec, Part.ATTENTION, positions, context)
    ffn = spec.num_ffn_shards * unit_flop(spec, Part.FFN, positions, context)
    return spec.num_layers * (attention + ffn) + head_flop(spec)


def units_in(spec: ModelSpec, part: Part) -> int:
    """Units of one half layer."""
    return spec.num_kv_heads if part is Part.ATTENTION else spec.num_ffn_shards
