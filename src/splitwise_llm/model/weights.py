"""The slices a machine has resident: read once from its own disk, fused for the kernels, shared by its sessions.

It knows which rows and columns belong to a unit; it does not know why a machine was given them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor

from splitwise_llm.model import compiled
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.families import Norm, Stored
from splitwise_llm.model.linear import Linear, Table, linear_of, table_of
from splitwise_llm.spec import Dtype, Kernels, Weights

TORCH_DTYPE = {Dtype.FP32: torch.float32, Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16}


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Scale and, for layer norm, shift; (d_model,) each. The scale of an RMS norm is fp32, times the root of its
    width: `share.py` divides by the length of a row and not by its mean."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Some key/value groups of one layer's attention, q, k and v fused by rows."""

    num_groups: int
    norm: NormWeights
    qkv: Linear
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """(query heads + groups, head_dim): the norm weights of every query and key head, in that order, as an RMS norm's
    scale."""
    o: Linear
    o_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """Some column shards of one layer's FFN, gate and up fused by rows (gate first)."""

    norm: NormWeights
    up: Linear
    up_bias: Tensor | None
    down: Linear
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    table: Table
    positions: Tensor | None  # (max_context, d_model), learned positions only


@dataclass(frozen=True, slots=True)
class HeadWeights:
    norm: NormWeights
    table: Table


@dataclass(frozen=True, slots=True)
class Need:
    """What a machine must hold for a plan: units per half, and the ends. Hashable parts are cache keys."""

    units: tuple[tuple[int, tuple[int, ...]], ...]
    """(half, units) pairs, only halves with units."""
    embed: bool
    head: bool


Loaded = AttentionWeights | FfnWeights | EmbeddingWeights | HeadWeights | Table
_Key = tuple[str, int, tuple[int, ...]]
_T = TypeVar("_T", bound=Loaded)


class Resident:
    """The weights of one machine; loading the same slice twice reads it once.

    Not thread-safe: the machine's compute thread owns it.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: Dtype, weights: Weights, device: torch.device,
        kernels: Kernels = Kernels.TORCH,
    ) -> None:  # fmt: skip
        """Raises RequestError for kernels that are not installed or do not serve this device and these weights."""
        self.checkpoint, self.dtype, self.weights, self.device = checkpoint, dtype, weights, device
        self.kernels = compiled.settled(kernels, weights, dtype, device)
        self.architecture = checkpoint.architecture
        self._torch_dtype = TORCH_DTYPE[dtype]
        self._held: dict[_Key, Loaded] = {}

    @property
    def between(self) -> compiled.Library | None:
        """Our own kernels for what stands between products. None for int8, whose products by our own and by torch's
        have the same bits, so that two machines may each take theirs."""
        spec = self.architecture.spec
        if self.kernels is not Kernels.COMPILED or self.weights is Weights.INT8 or self.dtype is Dtype.FP16:
            return None
        is_even = spec.d_model % compiled.BETWEEN_STEP == spec.shard_columns % compiled.BETWEEN_STEP == 0
        return compiled.kernels() if is_even else None

    def load(self, need: Need) -> None:
        """Read what is needed and not yet held, the token tables first, then FFN halves: they are the largest, and a
        copy in flight (of low-bit weights in full precision) costs least while little else is held. Raises
        ModelError."""
        if need.embed:
            self.embedding()
        if need.head:
            self.head()
        for half, units in sorted(need.units, key=lambda unit: unit[0] % 2 == 0):
            _ = self.ffn(half // 2, units) if half % 2 else self.attention(half // 2, units)

    def keep_only(self, needs: Iterable[Need]) -> None:
        """Forget every slice that none of these needs."""
        keys: set[_Key] = set()
        for need in needs:
            keys |= {("ffn" if half % 2 else "attention", half // 2, units) for half, units in need.units}
            keys |= {("embedding", 0, ())} if need.embed else set()
            keys |= {("head", 0, ())} if need.head else set()
            keys |= {("table", 0, ())} if self._is_tied and (need.embed or need.head) else set()
        self._held = {key: value for key, value in self._held.items() if key in keys}

    @property
    def _is_tied(self) -> bool:
        return self.architecture.names.head is None

    def embedding(self) -> EmbeddingWeights:
        return self._once(("embedding", 0, ()), self._embedding)

    def head(self) -> HeadWeights:
        return self._once(("head", 0, ()), self._head)

    def attention(self, layer: int, groups: tuple[int, ...]) -> AttentionWeights:
        return self._once(("attention", layer, groups), lambda: self._attention(layer, groups))

    def ffn(self, layer: int, shards: tuple[int, ...]) -> FfnWeights:
        return self._once(("ffn", layer, shards), lambda: self._ffn(layer, shards))

    def _once(self, key: _Key, load: Callable[[], _T]) -> _T:
        if key not in self._held:
            self._held[key] = load()
            _return_freed_memory()
        return cast(_T, self._held[key])

    # Reading

    def _embedding(self) -> EmbeddingWeights:
        spec, names = self.architecture.spec, self.architecture.names
        positions = None
        if names.positions:
            positions = torch.empty(spec.max_context, spec.d_model, dtype=self._torch_dtype)
            self.checkpoint.copy_slice(names.positions, tuple(positions.shape), 0, 0, positions)
        return EmbeddingWeights(self._table(names.embed, self._is_tied), _to(positions, self.device))

    def _head(self) -> HeadWeights:
        names = self.architecture.names
        table = self._table(names.head or names.embed, multiplied=True)
        return HeadWeights(self._norm(names.final_norm), table)

    def _table(self, name: str, multiplied: bool) -> Table:
        def read() -> Table:
            spec = self.architecture.spec
            rows = torch.empty(spec.vocab_size, spec.d_model, dtype=self._torch_dtype)
            self.checkpoint.copy_slice(name, tuple(rows.shape), 0, 0, rows)
            form = Weights.FULL if self.weights is Weights.FULL else Weights.INT8
            return table_of(rows.to(self.device), form, self._torch_dtype, multiplied, self.kernels)

        return self._once(("table", 0, ()), read) if self._is_tied else read()

    def _attention(self, layer: int, groups: tuple[int, ...]) -> AttentionWeights:
        spec, names = self.architecture.spec, self.architecture.names
        query, head = spec.heads_per_group * spec.head_dim, spec.head_dim
        o_bias = self._bias("o", names.o, layer, spec.d_model, [(0, spec.d_model)])
        all_query, all_key = spec.num_heads * head, spec.num_kv_heads * head
        q_rows, k_rows = _runs(groups, query), _runs(groups, head)
        sources = [
            ("q", names.q, all_query, q_rows),
            ("k", names.k, all_key, k_rows),
            ("v", names.v, all_key, k_rows),
        ]
        qkv, qkv_bias = self._fused(sources, layer, spec.d_model)
        o = self._columns(names.o, layer, spec.d_model, all_query, q_rows)
        norm = self._norm(names.attention_norm.format(layer))
        return AttentionWeights(len(groups), norm, qkv, qkv_bias, self._qk_norm(layer, len(groups)), o, o_bias)

    def _qk_norm(self, layer: int, groups: int) -> Tensor | None:
        spec, names = self.architecture.spec, self.architecture.names
        if not names.q_norm or not names.k_norm:
            return None
        q = self.checkpoint.vector(names.q_norm.format(layer), spec.head_dim, self._torch_dtype)
        k = self.checkpoint.vector(names.k_norm.format(layer), spec.head_dim, self._torch_dtype)
        rows = [q.expand(groups * spec.heads_per_group, -1), k.expand(groups, -1)]
        return _per_length(torch.cat(rows)).to(self.device)

    def _ffn(self, layer: int, shards: tuple[int, ...]) -> FfnWeights:
        spec, names = self.architecture.spec, self.architecture.names
        columns = _runs(shards, spec.shard_columns)
        sources = [("up", names.up, spec.d_ff, columns)]
        if names.gate:
            sources.insert(0, ("gate", names.gate, spec.d_ff, columns))
        up, up_bias = self._fused(sources, layer, spec.d_model)
        down = self._columns(names.down, layer, spec.d_model, spec.d_ff, columns)
        down_bias = self._bias("down", names.down, layer, spec.d_model, [(0, spec.d_model)])
        return FfnWeights(self._norm(names.ffn_norm.format(layer)), up, up_bias, down, down_bias)

    def _norm(self, name: str) -> NormWeights:
        width = self.architecture.spec.d_model
        weight = self.checkpoint.vector(f"{name}.weight", width, self._torch_dtype)
        if self.architecture.norm is Norm.RMS:
            return NormWeights(_per_length(weight).to(self.device), None)
        bias = self.checkpoint.vector(f"{name}.bias", width, self._torch_dtype)
        return NormWeights(weight.to(self.device), bias.to(self.device))

    def _fused(
        self, sources: list[tuple[str, Stored, int, list[tuple[int, int]]]], layer: int, columns: int
    ) -> tuple[Linear, Tensor | None]:
        """Row slices of several matrices, one below the other, and their biases."""
        rows = sum(stop - start for *_, runs in sources for start, stop in runs)
        fused = torch.empty(rows, columns, dtype=self._torch_dtype)
        biases: list[Tensor] = []
        at = 0
        for letter, stored, total, runs in sources:
            for start, stop in runs:
                self._copy(stored, layer, (total, columns), 0, start, fused[at : at + stop - start])
                at += stop - start
            bias = self._bias(letter, stored, layer, total, runs)
            biases += [] if bias is None else [bias]
        return self._linear(fused), torch.cat(biases) if biases else None

    def _columns(self, stored: Stored, layer: int, rows: int, total: int, runs: list[tuple[int, int]]) -> Linear:
        """Column slices of one matrix, side by side."""
        matrix = torch.empty(rows, sum(stop - start for start, stop in runs), dtype=self._torch_dtype)
        at = 0
        for start, stop in runs:
            self._copy(stored, layer, (rows, total), 1, start, matrix[:, at : at + stop - start])
            at += stop - start
        return self._linear(matrix)

    def _copy(self, stored: Stored, layer: int, shape: tuple[int, int], dim: int, start: int, into: Tensor) -> None:
        """Copy logical rows (dim 0) or columns (dim 1) of a matrix, however it is stored."""
        rows, columns = stored.total_rows or shape[0], shape[1]
        start += stored.first_row if dim == 0 else 0
        name = f"{stored.name.format(layer)}.weight"
        if stored.transposed:
            self.checkpoint.copy_slice(name, (columns, rows), 1 - dim, start, into.T)
        else:
            self.checkpoint.copy_slice(name, (rows, columns), dim, start, into)

    def _bias(self, letter: str, stored: Stored, layer: int, total: int, runs: list[tuple[int, int]]) -> Tensor | None:
        if letter not in self.architecture.biased:
            return None
        name, length = f"{stored.name.format(layer)}.bias", stored.total_rows or total
        whole = self.checkpoint.vector(name, length, self._torch_dtype)
        parts = [whole[stored.first_row + start : stored.first_row + stop] for start, stop in runs]
        return torch.cat(parts).to(self.device)

    def _linear(self, matrix: Tensor) -> Linear:
        return linear_of(matrix.to(self.device), self.weights, self._torch_dtype, self.kernels)


@cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return lambda _: 0
    return trim


def _return_freed_memory() -> None:
    """Give pages freed while reading back to the system: between slices that stay they would be kept for ever,
    and a model in int4 took up to a third more."""
    _malloc_trim()(0)


def _per_length(weight: Tensor) -> Tensor:
    """The weight of an RMS norm over the last dimension, for rows that were divided by their length; fp32."""
    return weight.float() * math.sqrt(weight.shape[-1])


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _runs(units: Collection[int], width: int) -> list[tuple[int, int]]:
    """Row ranges of ascending units of `width` rows each, neighbours merged."""
    ordered = sorted(units)
    breaks = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ordered)) if b != a + 1), len(ordered)]
    return [(ordered[a] * width, (ordered[b - 1] + 1) * width) for a, b in pairwise(breaks)]
