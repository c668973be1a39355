"""Random models in the published format, of any family and size, for benches and tests.

Scales are chosen so that greedy text wanders instead of repeating one token: a comparison of two
runs that both print the same token for ever would prove nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from splitwise_llm.bench.reference import transformers

TINY: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 599, "n_positions": 256,
    },
    "llama": {
        "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 256,
    },
    "llama-gqa-tied": {
        "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 256, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
    },
    "llama3-rope": {
        "model_type": "llama", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {
        "model_type": "qwen2", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 192, "vocab_size": 256, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128, "vocab_size": 256,
        "max_position_embeddings": 256,
    },
}  # fmt: skip
"""One small model of each family and of each feature in which models of a family differ."""

OVERHEAD_LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12,
    "num_key_value_heads": 12, "intermediate_size": 2048, "vocab_size": 32000, "max_position_embeddings": 1024,
}  # fmt: skip
OVERHEAD_GPT2: Mapping[str, Any] = {
    "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024,
}  # fmt: skip


def make_model(directory: Path, config: Mapping[str, Any], seed: int = 0, max_shard_size: str = "50GB") -> Path:
    """Write a random model of a `config.json` to a directory, fp32, and return it.

    Raises UserError when `transformers`, which writes the files, is not installed.
    """
    settings = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None, **config}
    torch.manual_seed(seed)
    library = transformers()
    model = library.AutoModelForCausalLM.from_config(library.AutoConfig.for_model(**settings), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _fill(name, weight)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def _fill(name: str, weight: torch.Tensor) -> None:
    """Unit-variance activations, sharp attention, and sub-blocks that outweigh the embedding."""
    if weight.ndim == 1:
        weight.normal_(std=0.1)
        if "norm" in name or "ln_" in name:
            weight.add_(1.0 if name.endswith("weight") else 0.0)
    elif any(table in name for table in ("embed_tokens", "wte", "wpe", "lm_head")):
        weight.normal_(std=0.3)
    else:
        fan_in = weight.shape[0] if "c_" in name else weight.shape[1]
        gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "c_attn")) else 1.5
        weight.normal_(std=gain / fan_in**0.5)
