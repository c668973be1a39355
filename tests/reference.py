"""The Hugging Face model as the judge: logits at every position a generation sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 5e-5


@cache
def hugging_face(directory: Path) -> Any:
    """The reference model of a directory, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def reference_logits(directory: Path, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Logits (tokens, vocab) from which each of `tokens` would be drawn after `prompt`."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logits: Tensor = hugging_face(directory)(ids).logits[0, len(prompt) - 1 :]
    return logits


def assert_same_as_reference(
    directory: Path, prompt: Sequence[int], tokens: Sequence[int], logits: Sequence[Tensor]
) -> int:
    """Logits within tolerance, greedy tokens equal wherever the reference's top two are further apart than twice
    the difference. Returns the number of ties, positions where they are not."""
    theirs = reference_logits(directory, prompt, tokens)
    ours = torch.stack(list(logits))
    difference = float((ours - theirs).abs().max())
    assert difference <= TOLERANCE * max(1.0, float(theirs.abs().max()))
    top = theirs.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 2 * difference
    same = theirs.argmax(-1) == torch.tensor(list(tokens))
    assert bool(same[clear].all())
    return int((~clear).sum())
