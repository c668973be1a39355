"""One machine's share of the arithmetic of one session: its units, its keys and values, nothing about messages.

Shapes: `positions` new positions of one sequence; there is no batch dimension. All methods run under
`torch.inference_mode()`, on the machine's compute thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.model.families import Activation, Norm
from splitwise_llm.model.weights import (
    TORCH_DTYPE,
    AttentionWeights,
    EmbeddingWeights,
    FfnWeights,
    HeadWeights,
    Need,
    NormWeights,
    Resident,
)


@dataclass(slots=True)
class KeyValues:
    """Keys and values of some groups of one layer: (groups, capacity, head_dim), filled from the front."""

    keys: Tensor
    values: Tensor
    filled: int = 0


@dataclass(frozen=True, slots=True)
class Positions:
    """What every layer of one step needs to know of where it is; made once per step."""

    start: int
    count: int
    cos: Tensor | None  # (count, 1, head_dim)
    sin: Tensor | None
    mask: Tensor | None  # (count, start + count); only for a prefill chunk that is not the first

    @property
    def stop(self) -> int:
        return self.start + self.count


class Share:
    """The units of one machine in one session, with room for `capacity` positions."""

    def __init__(self, resident: Resident, need: Need, capacity: int) -> None:
        self.architecture = resident.architecture
        spec = self.architecture.spec
        self.dtype, self.device = TORCH_DTYPE[resident.dtype], resident.device
        self._embedding: EmbeddingWeights | None = resident.embedding() if need.embed else None
        self._head: HeadWeights | None = resident.head() if need.head else None
        self._attention: dict[int, AttentionWeights] = {}
        self._ffn: dict[int, FfnWeights] = {}
        self._cache: dict[int, KeyValues] = {}
        for half, units in need.units:
            if half % 2:
                self._ffn[half] = resident.ffn(half // 2, units)
            else:
                self._attention[half] = resident.attention(half // 2, units)
                shape = (len(units), capacity, spec.head_dim)
                keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")
                self._cache[half] = KeyValues(keys, values)
        self._rotary: tuple[Tensor, Tensor] | None = None
        if self.architecture.rope and self._attention:
            cos, sin = self.architecture.rope.tables(spec.head_dim, capacity)
            self._rotary = tuple(t.to(self.dtype).to(self.device).unsqueeze(1) for t in (cos, sin))  # type: ignore[assignment]

    def positions(self, start: int, count: int) -> Positions:
        """The step that adds `count` positions after the first `start`."""
        cos = sin = mask = None
        if self._rotary:
            cos, sin = (table[start : start + count] for table in self._rotary)
        if start and count > 1:
            seen = torch.arange(start + count, device=self.device)
            mask = seen <= torch.arange(start, start + count, device=self.device).unsqueeze(1)
        return Positions(start, count, cos, sin, mask)

    def embed(self, ids: Sequence[int], at: Positions) -> Tensor:
        """Token ids (positions) to the residual stream (positions, d_model)."""
        if self._embedding is None:
            raise BrokenInvariant("this share has no embedding")
        x = self._embedding.table.lookup(torch.tensor(ids, dtype=torch.long, device=self.device))
        if self._embedding.positions is not None:
            x = x + self._embedding.positions[at.start : at.stop]
        return x

    def run(self, x: Tensor, start: int, stop: int, at: Positions) -> Tensor:
        """Halves `start` to `stop`, whole, on the residual stream (positions, d_model)."""
        for half in range(start, stop):
            x = self.join(x, [self.partial(x, half, at)], half)
        return x

    def partial(self, x: Tensor, half: int, at: Positions) -> Tensor:
        """This share's summand of one half, (positions, d_model): no residual, no output bias."""
        if half % 2:
            return self._ffn_partial(x, self._ffn[half])
        return self._attention_partial(x, self._attention[half], self._cache[half], at)

    def join(self, x: Tensor, partials: Sequence[Tensor], half: int) -> Tensor:
        """The residual, then the partial sums in the order given, then the output bias once."""
        for partial in partials:
            x = x + partial
        bias = self._ffn[half].down_bias if half % 2 else self._attention[half].o_bias
        return x if bias is None else x + bias

    def logits(self, x: Tensor) -> Tensor:
        """Logits (vocab,), fp32, of the last position of the residual stream (positions, d_model)."""
        if self._head is None:
            raise BrokenInvariant("this share has no head")
        return self._head.table.project(self._norm(x[-1:], self._head.norm))[0].float()

    def _norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        if self.architecture.norm is Norm.LAYER:
            return F.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, self.architecture.norm_eps)
        return F.rms_norm(x, x.shape[-1:], weights.weight, self.architecture.norm_eps)

    def _attention_partial(self, x: Tensor, weights: AttentionWeights, cache: KeyValues, at: Positions) -> Tensor:
        spec = self.architecture.spec
        groups, ratio = weights.num_groups, spec.heads_per_group
        heads = groups * (ratio + 1)
        qkv = weights.qkv(self._norm(x, weights.norm))
        if weights.qkv_bias is not None:
            qkv = qkv + weights.qkv_bias
        qkv = qkv.view(at.count, groups * (ratio + 2), spec.head_dim)
        rotated = qkv[:, :heads]  # (positions, query heads + groups, head_dim)
        if weights.qk_norm is not None:
            rotated = F.rms_norm(rotated, (spec.head_dim,), None, self.architecture.norm_eps) * weights.qk_norm
        if at.cos is not None and at.sin is not None:
            rotated = torch.addcmul(rotated * at.cos, rotated.roll(spec.head_dim // 2, -1), at.sin)
        if cache.filled != at.start:
            raise BrokenInvariant(f"keys and values end at {cache.filled}, the step starts at {at.start}")
        cache.keys[:, at.start : at.stop] = rotated[:, groups * ratio :].transpose(0, 1)
        cache.values[:, at.start : at.stop] = qkv[:, heads:].transpose(0, 1)
        cache.filled = at.stop
        keys, values = cache.keys[:, : at.stop], cache.values[:, : at.stop]
        mixed = _attend(rotated[:, : groups * ratio], keys, values, ratio, at)
        return weights.o(mixed)

    def _ffn_partial(self, x: Tensor, weights: FfnWeights) -> Tensor:
        inner = weights.up(self._norm(x, weights.norm))
        if weights.up_bias is not None:
            inner = inner + weights.up_bias
        if self.architecture.spec.ffn_matrices == 3:
            gate, up = inner.chunk(2, -1)
            return weights.down(_activate(gate, self.architecture.activation) * up)
        return weights.down(_activate(inner, self.architecture.activation))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, ratio: int, at: Positions) -> Tensor:
    """Causal attention: queries (positions, groups * ratio, head_dim), keys and values (groups, seen, head_dim);
    the result is (positions, groups * ratio * head_dim)."""
    groups, _, head_dim = keys.shape
    if at.count == 1:
        # One position sees everything: the query heads of a group are rows of one small product.
        grouped = queries.view(1, groups, ratio, head_dim)
        mixed = F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0))
        return mixed.reshape(1, -1)
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=at.mask,
        is_causal=at.mask is None,
        enable_gqa=ratio > 1,
    )
    return mixed[0].transpose(0, 1).reshape(at.count, -1)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return F.relu(x)
