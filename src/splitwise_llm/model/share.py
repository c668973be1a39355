"""One machine's share of the arithmetic of one session: its units, its keys and values, nothing about messages.

Shapes: `positions` new positions of one sequence; there is no batch dimension. What sessions compute `together` are
rows of one matrix for every product with weights, which are then read once for all, and apart where they attend to
their own keys and values. A product of more rows may round differently; a session by itself is computed as ever.
All methods run under `torch.inference_mode()`, on the machine's compute thread.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from splitwise_llm.errors import BrokenInvariant, ProtocolError
from splitwise_llm.model.families import Activation, Norm
from splitwise_llm.model.linear import has_fast_product
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

ATTENTION_BLOCK = 32
"""Positions whose scores are computed together where torch's attention is not used; 16 and 64 are slower (Zen 5)."""


@dataclass(slots=True)
class KeyValues:
    """Keys and values of some groups of one layer: (groups, capacity, head_dim), each filled from the front."""

    groups: tuple[int, ...]
    keys: Tensor
    values: Tensor
    filled: list[int]
    """Positions, per group; while steps pass through, all the same."""

    def cut(self, position: int) -> None:
        """Forget positions from here on."""
        self.filled = [min(filled, position) for filled in self.filled]

    def put(self, group: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Positions from `start` on of one group, (positions, head_dim) each. Raises ProtocolError for a hole."""
        row = self.groups.index(group)
        stop = start + keys.shape[0]
        if start > self.filled[row] or stop > self.keys.shape[1]:
            raise ProtocolError(
                f"keys and values of positions {start} to {stop} do not fit behind {self.filled[row]} of "
                f"{self.keys.shape[1]}"
            )
        self.keys[row, start:stop], self.values[row, start:stop] = keys, values
        self.filled[row] = max(self.filled[row], stop)


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
        self._between = resident.between
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
                self._cache[half] = KeyValues(units, keys, values, [0] * len(units))
        self._rotary: tuple[Tensor, Tensor] | None = None
        if self.architecture.rope and self._attention:
            cos, sin = self.architecture.rope.tables(spec.head_dim, capacity)
            self._rotary = tuple(t.to(self.dtype).to(self.device).unsqueeze(1) for t in (cos, sin))  # type: ignore[assignment]

    # What is cached

    @property
    def held(self) -> tuple[tuple[int, tuple[int, ...], int], ...]:
        """(half, groups, positions filled) of all groups; those of one half that differ, apart."""
        found: list[tuple[int, tuple[int, ...], int]] = []
        for half, cache in sorted(self._cache.items()):
            for filled in sorted(set(cache.filled)):
                groups = (group for group, f in zip(cache.groups, cache.filled, strict=True) if f == filled)
                found.append((half, tuple(groups), filled))
        return tuple(found)

    def take_over(self, other: Share, known: int) -> None:
        """Go on with what another share of the same session has cached: the tensors themselves where the groups of a
        half are the same; where they are not, copies of the rows before position `known` that this share lacks."""
        for half, cache in self._cache.items():
            theirs = other._cache.get(half)
            if theirs is None or theirs is cache:
                continue
            if theirs.groups == cache.groups:
                if sum(theirs.filled) >= sum(cache.filled):
                    self._cache[half] = theirs
                continue
            for row, group in enumerate(theirs.groups):
                stop = min(theirs.filled[row], known)
                if group in cache.groups and stop > cache.filled[cache.groups.index(group)]:
                    cache.put(group, theirs.keys[row, :stop], theirs.values[row, :stop], 0)

    def cut(self, position: int, halves: range | None = None) -> None:
        """Forget cached positions from here on, in some halves or all of them."""
        for half, cache in self._cache.items():
            if halves is None or half in halves:
                cache.cut(position)

    def clear(self) -> None:
        """Let go of caches and weights at once, whoever still holds the share itself."""
        for held in (self._cache, self._attention, self._ffn):
            held.clear()

    def rows(self, half: int, groups: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Cached keys and values, (groups, positions, head_dim) each. Raises ProtocolError for what is not there."""
        cache = self._cache.get(half)
        if cache is None or not set(groups) <= set(cache.groups):
            raise ProtocolError(f"this machine holds no keys and values of groups {list(groups)} of half {half}")
        numbers = [cache.groups.index(group) for group in groups]
        if any(cache.filled[number] < stop for number in numbers) or start > stop:
            raise ProtocolError(f"keys and values of half {half} end before position {stop}")
        return cache.keys[numbers, start:stop], cache.values[numbers, start:stop]

    def put(self, half: int, group: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Cache positions from `start` on of one group, (positions, head_dim) each. Raises ProtocolError."""
        cache = self._cache.get(half)
        if cache is None or group not in cache.groups:
            raise ProtocolError(f"group {group} of half {half} has no place here")
        cache.put(group, keys, values, start)

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
        return self.all_logits(x[-1:])[0]

    def all_logits(self, x: Tensor) -> Tensor:
        """Logits (positions, vocab), fp32, of every position of the residual stream (positions, d_model)."""
        if self._head is None:
            raise BrokenInvariant("this share has no head")
        return self._head.table.project(self._norm(x, self._head.norm)).float()

    # Together with other sessions

    def check(self, start: int, stop: int, at: Positions) -> None:
        """Raise BrokenInvariant unless halves `start` to `stop` are here, and their caches end where a step begins."""
        for half in range(start, stop):
            cache = self._cache.get(half)
            if cache is not None and any(filled != at.start for filled in cache.filled):
                raise BrokenInvariant(f"keys and values end at {cache.filled}, the step starts at {at.start}")
            if half not in (self._ffn if half % 2 else self._attention):
                raise BrokenInvariant(f"half {half} is not here")

    def alike(self, start: int, stop: int) -> tuple[int, ...]:
        """Equal for shares that hold the very same weights of halves `start` to `stop`, units and all."""
        return tuple(id(self._ffn[half] if half % 2 else self._attention[half]) for half in range(start, stop))

    @property
    def head_alike(self) -> int:
        """Equal for shares with the very same head."""
        return id(self._head)

    def _norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        if self.architecture.norm is Norm.LAYER:
            return F.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, self.architecture.norm_eps)
        if self._between is not None:
            return self._between.rms_norm(x, weights.weight, x.shape[-1] * self.architecture.norm_eps)
        return _rms_norm(x, weights.weight, self.architecture.norm_eps)

    def _attention_partial(self, x: Tensor, weights: AttentionWeights, cache: KeyValues, at: Positions) -> Tensor:
        queries, keys, values = self._project(x, weights, at.cos, at.sin)
        return weights.o(self._attend(queries, keys, values, cache, at))

    def _project(
        self, x: Tensor, weights: AttentionWeights, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (positions, groups * ratio, head_dim), keys and values (positions, groups, head_dim), rotated, of
        any rows of any sequences; `cos` and `sin` (positions, 1, head_dim)."""
        spec = self.architecture.spec
        groups, ratio = weights.num_groups, spec.heads_per_group
        heads = groups * (ratio + 1)
        qkv = weights.qkv(self._norm(x, weights.norm))
        if weights.qkv_bias is not None:
            qkv = qkv + weights.qkv_bias
        qkv = qkv.view(len(x), groups * (ratio + 2), spec.head_dim)
        rotated = qkv[:, :heads]  # (positions, query heads + groups, head_dim)
        if weights.qk_norm is not None:
            rotated = _rms_norm(rotated, weights.qk_norm, self.architecture.norm_eps)
        if cos is not None and sin is not None:
            rotated = torch.addcmul(rotated * cos, rotated.roll(spec.head_dim // 2, -1), sin)
        return rotated[:, : groups * ratio], rotated[:, groups * ratio :], qkv[:, heads:]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: KeyValues, at: Positions) -> Tensor:
        """One sequence's part of `_project` enters its cache and attends to it: (positions, query columns)."""
        if any(filled != at.start for filled in cache.filled):
            raise BrokenInvariant(f"keys and values end at {cache.filled}, the step starts at {at.start}")
        cache.keys.narrow(1, at.start, at.count).copy_(keys.transpose(0, 1))
        cache.values.narrow(1, at.start, at.count).copy_(values.transpose(0, 1))
        cache.filled = [at.stop] * len(cache.filled)
        seen = slice(0, at.stop)
        return _attend(queries, cache.keys[:, seen], cache.values[:, seen], self.architecture.spec.heads_per_group, at)

    def _ffn_partial(self, x: Tensor, weights: FfnWeights) -> Tensor:
        inner = weights.up(self._norm(x, weights.norm))
        if weights.up_bias is not None:
            inner = inner + weights.up_bias
        if self.architecture.spec.ffn_matrices == 3:
            # The widest tensor of a prompt goes as soon as its gate is applied, not after the product.
            if self._between is not None and self.architecture.activation is Activation.SILU:
                inner = self._between.gated(inner)
            else:
                inner = _gated(inner, self.architecture.activation)
        else:
            inner = _activate(inner, self.architecture.activation)
        return weights.down(inner)


def together(shares: Sequence[Share], ats: Sequence[Positions], x: Tensor, start: int, stop: int) -> Tensor:
    """Halves `start` to `stop`, whole, on the residual streams of several sessions, one below the other in `x`
    (all positions, d_model); the shares are `alike` there, and `check`ed."""
    one, counts = shares[0], [at.count for at in ats]
    cos = _stacked([at.cos for at in ats])
    sin = _stacked([at.sin for at in ats])
    for half in range(start, stop):
        if half % 2:
            x = one.join(x, [one.partial(x, half, ats[0])], half)
            continue
        weights = one._attention[half]
        parts = [torch.split(rows, counts) for rows in one._project(x, weights, cos, sin)]
        mixed = [
            share._attend(queries, keys, values, share._cache[half], at)
            for share, at, queries, keys, values in zip(shares, ats, *parts, strict=True)
        ]
        x = one.join(x, [weights.o(torch.cat(mixed))], half)
    return x


def _stacked(tables: Sequence[Tensor | None]) -> Tensor | None:
    held = [table for table in tables if table is not None]
    return torch.cat(held) if held else None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x; `weight` as `NormWeights` has it.

    Half the operators that `F.rms_norm` is made of: between two products every one of them runs with cold caches.
    """
    wide = x.to(torch.float32, copy=True)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return wide.div_(length.hypot_(_root(x.shape[-1] * eps))).mul_(weight).to(x.dtype)


@functools.cache
def _root(value: float) -> Tensor:
    return torch.tensor(value**0.5)  # without a dimension it goes with tensors of any device


def _attend(queries: Tensor, keys: Tensor, values: Tensor, ratio: int, at: Positions) -> Tensor:
    """Causal attention: queries (positions, groups * ratio, head_dim), keys and values (groups, seen, head_dim);
    the result is (positions, groups * ratio * head_dim)."""
    groups, _, head_dim = keys.shape
    if at.count == 1:
        # One position sees everything: the query heads of a group are rows of one small product.
        grouped = queries.view(1, groups, ratio, head_dim)
        mixed = F.scaled_dot_product_attention(grouped, keys.unsqueeze(0), values.unsqueeze(0))
        return mixed.reshape(1, -1)
    if queries.dtype is torch.bfloat16 and queries.device.type == "cpu" and has_fast_product(torch.bfloat16):
        return _attend_in_blocks(queries, keys, values, ratio, at)
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=at.mask,
        is_causal=at.mask is None,
        enable_gqa=ratio > 1,
    )
    return mixed[0].transpose(0, 1).reshape(at.count, -1)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, ratio: int, at: Positions) -> Tensor:
    """The same for many positions in bf16 on a processor, ATTENTION_BLOCK of them at a time: scores in fp32 over what
    they see and no more, weights in bf16 as torch's own kernel has them, in half of its time: the heads of a group are
    rows of one product, and MKL's product of bf16, which torch takes, is slow on some processors."""
    groups, seen, head_dim = keys.shape
    rows = queries.view(at.count, groups, ratio, head_dim).transpose(0, 1).float().mul_(head_dim**-0.5)
    columns = keys.float().transpose(1, 2)
    room = torch.empty(groups * min(ATTENTION_BLOCK, at.count) * ratio * seen)  # one for all blocks: new pages are dear
    mixed = torch.empty(at.count, groups, ratio, head_dim, dtype=queries.dtype)
    for start in range(0, at.count, ATTENTION_BLOCK):
        stop = min(start + ATTENTION_BLOCK, at.count)
        count, until = stop - start, at.start + stop
        scores = room[: groups * count * ratio * until].view(groups, count * ratio, until)
        torch.bmm(rows[:, start:stop].reshape(groups, count * ratio, head_dim), columns[:, :, :until], out=scores)
        scores.view(groups, count, ratio, until)[..., -count:].add_(_later()[:count, :, :count])
        torch.softmax(scores, -1, out=scores)
        block = torch.bmm(scores.to(values.dtype), values[:, :until])
        mixed[start:stop] = block.view(groups, count, ratio, head_dim).transpose(0, 1)
    return mixed.view(at.count, -1)


@functools.cache
def _later() -> Tensor:
    """Minus infinity where a position of a block would see a later one, (positions, 1, positions)."""
    return torch.full((ATTENTION_BLOCK, ATTENTION_BLOCK), -torch.inf).triu_(1).unsqueeze(1)


def _gated(x: Tensor, activation: Activation) -> Tensor:
    """The activated gate times up, (positions, width), of x (positions, gate and up)."""
    gate, up = x.chunk(2, -1)
    return _activate(gate, activation).mul_(up)


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
