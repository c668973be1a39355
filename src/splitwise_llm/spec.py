"""Plain numbers of models, devices and links, in SI units; knows nothing of how any of them works inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.units import parse_bytes, parse_rate, parse_seconds

INT4_GROUP = 32
"""Input columns that share one scale in int4 weights; FFN shards are multiples of it where the model allows."""
MAX_FFN_SHARDS = 8
MAX_LAYERS = 10_000

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


class Dtype(StrEnum):
    """The number format a machine computes in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def num_bytes(self) -> int:
        return 4 if self is Dtype.FP32 else 2


class Weights(StrEnum):
    """How the weights of linear layers stay in memory: as computed in, or weight-only quantised."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"

    def num_bytes(self, rows: int, columns: int, dtype: Dtype) -> float:
        """Bytes of a (rows, columns) matrix. int8: a byte each and a bf16 scale per row; int4: half a byte
        each and a bf16 scale and zero per INT4_GROUP columns."""
        match self:
            case Weights.FULL:
                return float(rows * columns * dtype.num_bytes)
            case Weights.INT8:
                return rows * (columns + 2.0)
            case Weights.INT4:
                return rows * columns * (0.5 + 4 / INT4_GROUP)


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SpecError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{path} holds {type(data).__name__}, expected an object of named figures")
    return cast("dict[str, Any]", data)


def _check(device: str, field: str, value: object, low: float, high: float) -> None:
    """Raise SpecError unless a figure of a device is a number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise SpecError(
            f"device {device!r}: {field} is {value!r}; expected a number in SI units, {low:g} up to {high:g}"
        )


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a machine can do: a roofline of arithmetic and memory, and a fixed cost per sub-block."""

    name: str
    flop_per_s: float
    """Achieved, not peak: the efficiency is already in it."""
    memory_bytes_per_s: float
    memory_bytes: float
    launch_s: float = 0.0
    """Fixed time per sub-block (kernel launches, framework)."""

    def __post_init__(self) -> None:
        for field, low in (("flop_per_s", 1e6), ("memory_bytes_per_s", 1e6), ("memory_bytes", 1e6)):
            _check(self.name, field, getattr(self, field), low, 1e18)
        _check(self.name, "launch_s", self.launch_s, 0.0, 1.0)

    def seconds(self, flop: float, memory_bytes: float) -> float:
        """Roofline: `max(FLOP / rate, bytes / bandwidth) + launch` of one sub-block."""
        return max(flop / self.flop_per_s, memory_bytes / self.memory_bytes_per_s) + self.launch_s

    @classmethod
    def from_file(cls, path: str | Path) -> DeviceSpec:
        """Read a device file (JSON, the field names of this class). Raises SpecError naming file and field."""
        data = _read_json(Path(path))
        known = {field.name for field in fields(cls)}
        required = known - {"launch_s"}
        missing, unknown = required - data.keys(), data.keys() - known
        if missing or unknown:
            said = [f"lacks {', '.join(sorted(missing))}"] if missing else []
            said += [f"has unknown {', '.join(sorted(unknown))}"] if unknown else []
            raise SpecError(f"{path} {' and '.join(said)}; a device file has {', '.join(sorted(known))}")
        return cls(**data)


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link between the device and another machine, as constants."""

    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.rtt_s < 3600:
            raise SpecError(f"rtt is {self.rtt_s} s; expected seconds, 0 or more")
        for name, rate in (("up", self.up_bytes_per_s), ("down", self.down_bytes_per_s)):
            if not 0 < rate <= 1e11:
                raise SpecError(f"{name} is {8 * rate:g} bit/s; expected more than 0 and at most 800 Gbit/s")

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """From `rtt=20ms up=50mbit down=50mbit`. Raises SpecError."""
        pairs = dict(item.split("=", 1) for item in text.split() if "=" in item)
        if set(pairs) != {"rtt", "up", "down"} or len(pairs) != len(text.split()):
            raise SpecError(f"{text!r} is no link: write 'rtt=20ms up=50mbit down=50mbit'")
        return cls(parse_seconds(pairs["rtt"]), parse_rate(pairs["up"]), parse_rate(pairs["down"]))


def parse_emulation(text: str) -> float | DeviceSpec:
    """What `--emulate` was given: a factor by which compute is stretched (1.5), or a device file.

    Raises SpecError for a factor below 1 (a machine cannot be made faster by sleeping).
    """
    try:
        factor = float(text)
    except ValueError:
        return DeviceSpec.from_file(text)
    if not 1 <= factor < 1e6:
        raise SpecError(f"--emulate {text}: a factor stretches compute by sleeping, so it is 1 or more")
    return factor


__all__ = [
    "FAMILIES", "INT4_GROUP", "DeviceSpec", "Dtype", "LinkSpec", "ModelSpec", "Weights",
    "parse_bytes", "parse_emulation",
]  # fmt: skip
