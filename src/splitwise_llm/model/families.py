"""What distinguishes GPT-2, Llama, Qwen2 and Qwen3, as data: names of tensors, biases, norms, positions.

The arithmetic in `share.py` reads this table; there is no copied model file. Source of the layouts:
the published checkpoints and `config.json` fields of each family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from splitwise_llm.errors import ModelError
from splitwise_llm.spec import ModelSpec


class Norm(StrEnum):
    RMS = "rms"
    LAYER = "layer"


class Activation(StrEnum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a logical matrix (out, in) lies: a tensor, maybe transposed, maybe from a row on (fused)."""

    name: str
    """Without `.weight` or `.bias`."""
    transposed: bool = False
    first_row: int = 0
    total_rows: int = 0
    """Rows of the tensor it is fused into; 0 when it stands alone."""


@dataclass(frozen=True, slots=True)
class Names:
    """Tensor names of one family; `{}` stands for the layer."""

    embed: str
    final_norm: str
    attention_norm: str
    ffn_norm: str
    q: Stored
    k: Stored
    v: Stored
    o: Stored
    up: Stored
    down: Stored
    gate: Stored | None = None
    head: str | None = None
    positions: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Frequency-dependent RoPE scaling of Llama 3.1: long waves are stretched, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the whole head."""

    theta: float
    linear_factor: float = 1.0
    llama3: Llama3Scaling | None = None

    def tables(self, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sign-carrying sin, fp32, (positions, head_dim): `x * cos + x.roll(head_dim / 2) * sin`."""
        inverse = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
        inverse = inverse / self.linear_factor
        if self.llama3:
            inverse = _llama3_frequencies(inverse, self.llama3)
        angles = torch.outer(torch.arange(positions).float(), inverse)  # (positions, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def _llama3_frequencies(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Below `low_freq_factor` waves per original context divide by `factor`, above `high_freq_factor` keep,
    in between interpolate."""
    waves = scaling.original_context * inverse / (2 * math.pi)
    smooth = (waves - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's sizes and everything in which its family differs."""

    spec: ModelSpec
    names: Names
    norm: Norm
    norm_eps: float
    activation: Activation
    biased: tuple[str, ...]
    """Which of q, k, v, o, gate, up, down carry a bias, sorted: the fingerprint covers this text."""
    rope: Rope | None
    """None: learned positions, added to the embedding."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tensor_names: frozenset[str]) -> Architecture:
        """From the content of `config.json` and the names the checkpoint holds (GPT-2 comes with and without a
        `transformer.` prefix). Raises ModelError for what this arithmetic does not cover."""
        spec = ModelSpec.from_config(config)
        reader = _gpt2 if spec.family == "gpt2" else _llama_like
        return reader(spec, config, tensor_names)


def _activation(config: Mapping[str, Any], field: str) -> Activation:
    name = config.get(field)
    if name not in _ACTIVATIONS:
        raise ModelError(f"config.json has {field} = {name!r}; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse(config: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if config.get(field):
            raise ModelError(f"config.json sets {field} = {config[field]!r}, which is not supported")


def _gpt2(spec: ModelSpec, config: Mapping[str, Any], tensor_names: frozenset[str]) -> Architecture:
    _refuse(config, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    if config.get("scale_attn_weights") is False:
        raise ModelError("config.json sets scale_attn_weights = false, which is not supported")
    prefix = "transformer." if "transformer.wte.weight" in tensor_names else ""
    layer, d = prefix + "h.{}.", spec.d_model

    def fused(first_row: int) -> Stored:
        return Stored(layer + "attn.c_attn", transposed=True, first_row=first_row, total_rows=3 * d)

    names = Names(
        embed=prefix + "wte.weight",
        positions=prefix + "wpe.weight",
        final_norm=prefix + "ln_f",
        attention_norm=layer + "ln_1",
        ffn_norm=layer + "ln_2",
        q=fused(0),
        k=fused(d),
        v=fused(2 * d),
        o=Stored(layer + "attn.c_proj", transposed=True),
        up=Stored(layer + "mlp.c_fc", transposed=True),
        down=Stored(layer + "mlp.c_proj", transposed=True),
        head=None if spec.tied_head else "lm_head.weight",
    )
    return Architecture(
        spec=spec,
        names=names,
        norm=Norm.LAYER,
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        activation=_activation({"activation_function": "gelu_new", **config}, "activation_function"),
        biased=("down", "k", "o", "q", "up", "v"),
        rope=None,
    )


def _llama_like(spec: ModelSpec, config: Mapping[str, Any], _: frozenset[str]) -> Architecture:
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise ModelError("config.json asks for sliding-window attention, which is not supported")
    layer = "model.layers.{}."
    qk_norm = spec.family == "qwen3"
    names = Names(
        embed="model.embed_tokens.weight",
        final_norm="model.norm",
        attention_norm=layer + "input_layernorm",
        ffn_norm=layer + "post_attention_layernorm",
        q=Stored(layer + "self_attn.q_proj"),
        k=Stored(layer + "self_attn.k_proj"),
        v=Stored(layer + "self_attn.v_proj"),
        o=Stored(layer + "self_attn.o_proj"),
        gate=Stored(layer + "mlp.gate_proj"),
        up=Stored(layer + "mlp.up_proj"),
        down=Stored(layer + "mlp.down_proj"),
        head=None if spec.tied_head else "lm_head.weight",
        q_norm=layer + "self_attn.q_norm.weight" if qk_norm else None,
        k_norm=layer + "self_attn.k_norm.weight" if qk_norm else None,
    )
    biased = set("qkv") if spec.family == "qwen2" else set("qkvo") if config.get("attention_bias") else set()
    if config.get("mlp_bias"):
        biased |= {"gate", "up", "down"}
    return Architecture(
        spec=spec,
        names=names,
        norm=Norm.RMS,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=_activation({"hidden_act": "silu", **config}, "hidden_act"),
        biased=tuple(sorted(biased)),
        rope=_rope(config),
    )


def _rope(config: Mapping[str, Any]) -> Rope:
    """Rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    settings: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if settings.get("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json asks for a partial rotary embedding, which is not supported")
    kind = settings.get("rope_type", settings.get("type", "default"))
    try:
        match kind:
            case "default":
                return Rope(theta)
            case "linear":
                return Rope(theta, linear_factor=float(settings["factor"]))
            case "llama3":
                low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
                original = int(settings["original_max_position_embeddings"])
                return Rope(theta, llama3=Llama3Scaling(float(settings["factor"]), low, high, original))
    except KeyError as error:
        raise ModelError(f"config.json asks for {kind} RoPE scaling but lacks {error}") from error
    raise ModelError(f"config.json asks for {kind!r} RoPE scaling; supported are default, linear and llama3")
