"""The sizes of a model as plain numbers; knows nothing of how any of it works inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from splitwise_llm.errors import ModelError
from splitwise_llm.spec.formats import INT4_GROUP, Dtype

MAX_FFN_SHARDS = 8
MAX_LAYERS = 10_000

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The sizes of a decoder-only transformer, enough to place, count and price its parts.

    Two kinds of unit can be placed on a machine of their own: a *key/value group* of a layer's
    attention (a key/value head and the query heads that read it) and an *FFN shard* (an equal
    block of the inner columns).
    """

    family: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_context: int
    ffn_matrices: int
    """3 with a gate (SwiGLU), 2 without."""
    tied_head: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
                raise ModelError(f"{field.name} is {value}; a model has at least one")
        if self.num_layers > MAX_LAYERS:
            raise ModelError(f"num_layers is {self.num_layers}; expected at most {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_ffn_shards(self) -> int:
        """The largest count up to MAX_FFN_SHARDS whose shards are equal and whole int4 groups (or just equal)."""
        for unit in (INT4_GROUP, 1):
            counts = [n for n in range(1, MAX_FFN_SHARDS + 1) if self.d_ff % (n * unit) == 0]
            if counts:
                return counts[-1]
        raise AssertionError("one shard always divides")

    @property
    def shard_columns(self) -> int:
        return self.d_ff // self.num_ffn_shards

    @property
    def group_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the q, k, v and o slices of one key/value group."""
        query = self.heads_per_group * self.head_dim
        return (
            (query, self.d_model),
            (self.head_dim, self.d_model),
            (self.head_dim, self.d_model),
            (self.d_model, query),
        )

    @property
    def shard_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the up (and gate) and down slices of one FFN shard."""
        up = (self.shard_columns, self.d_model)
        return (up,) * (self.ffn_matrices - 1) + ((self.d_model, self.shard_columns),)

    def kv_bytes_per_position(self, groups: int, dtype: Dtype) -> int:
        """Bytes of keys and values that `groups` groups of one layer keep per position."""
        return 2 * groups * self.head_dim * dtype.num_bytes

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the sizes from the content of a Hugging Face `config.json`.

        Raises ModelError for an unknown family or a missing or impossible size.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"config.json says model_type {family!r}; supported families are {', '.join(FAMILIES)}")
        names = _GPT2_SIZES if family == "gpt2" else _LLAMA_SIZES

        def size(field: str, default: int | None = None) -> int:
            given = config.get(names[field])
            value: object = default if given is None else given
            if not isinstance(value, int) or isinstance(value, bool):
                raise ModelError(f"config.json has {names[field]} = {value!r}; expected a whole number")
            return value

        d_model, num_heads = size("d_model"), size("num_heads")
        width = d_model // max(num_heads, 1)
        return cls(
            family=family,
            num_layers=size("num_layers"),
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_heads if family == "gpt2" else size("num_kv_heads", num_heads),
            head_dim=width if family == "gpt2" else size("head_dim", width),
            d_ff=size("d_ff", 4 * d_model if family == "gpt2" else None),
            vocab_size=size("vocab_size"),
            max_context=size("max_context"),
            ffn_matrices=2 if family == "gpt2" else 3,
            tied_head=bool(config.get("tie_word_embeddings", family == "gpt2")),
        )


_GPT2_SIZES = {
    "num_layers": "n_layer", "d_model": "n_embd", "num_heads": "n_head", "d_ff": "n_inner",
    "vocab_size": "vocab_size", "max_context": "n_positions",
}  # fmt: skip
_LLAMA_SIZES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size",
    "vocab_size": "vocab_size", "max_context": "max_position_embeddings",
}  # fmt: skip
