"""The model that ships with the package is small, grouped, loadable by `transformers`, and better than bz2."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import splitwise_llm

BUNDLED = Path(splitwise_llm.__file__).parent / "data" / "bundled"
EXCERPT = BUNDLED.parent / "excerpt.txt"
PROMPTS = ["It was a dark evening, and", "The old captain looked at the sea", '"My dear," said the prince,']


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


@pytest.fixture(scope="module")
def hf_tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BUNDLED)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, ids: torch.Tensor, num_bytes: int) -> float:
    """Every token of ids[1:] scored once, in windows of the model's context that do not overlap."""
    window, nats = model.config.max_position_embeddings, 0.0
    for begin in range(0, len(ids) - 1, window):
        targets = ids[begin + 1 : begin + window + 1]
        logits = model(ids[None, begin : begin + len(targets)], use_cache=False).logits[0]
        nats += functional.cross_entropy(logits, targets, reduction="sum").item()
    return nats / math.log(2) / num_bytes


def test_the_weights_are_small_enough_to_ship(model: LlamaForCausalLM) -> None:
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert (BUNDLED / "model.safetensors").stat().st_size <= 13_000_000


def test_the_shape_leaves_something_to_partition(model: LlamaForCausalLM) -> None:
    config = model.config
    assert config.num_hidden_layers >= 8
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.head_dim % 32 == 0, "int4 groups of 32 columns would straddle two heads"
    assert config.intermediate_size % 256 == 0, "8 feed-forward shards of whole int4 groups"


@given(text=st.text())
def test_any_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(text=st.text())
def test_transformers_tokenizes_alike(tokenizer: Tokenizer, hf_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = hf_tokenizer(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids
    assert hf_tokenizer.decode(ids) == text


def test_end_of_text_is_one_token_that_plain_text_never_makes(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id("<|endoftext|>") == model.config.eos_token_id
    assert model.config.eos_token_id not in tokenizer.encode(EXCERPT.read_text(encoding="utf-8")).ids


def test_held_out_text_costs_less_than_two_bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    text = EXCERPT.read_text(encoding="utf-8")[:24_000]
    ids = torch.tensor([model.config.eos_token_id, *tokenizer.encode(text).ids])
    assert bits_per_byte(model, ids, len(text.encode())) < 2.0


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_does_not_fall_into_a_short_loop(
    model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str
) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    written = model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert len(written) == 64, "the end-of-text token came by itself"
    assert len(set(written.tolist())) >= 16
