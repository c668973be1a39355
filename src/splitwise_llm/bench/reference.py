"""The Hugging Face model as the judge: the logits from which each token of a run should have been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitwise_llm.errors import UserError

TOLERANCE = 5e-5
"""Largest difference of fp32 logits, relative to max(1, largest logit)."""


@cache
def transformers() -> Any:
    """The reference implementation, silent; no part of the run-time path. Raises UserError when it is not
    installed."""
    try:
        library: Any = import_module("transformers")
    except ImportError as error:
        raise UserError("this needs the transformers package: pip install transformers") from error
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@cache
def hugging_face(directory: Path) -> Any:
    """The reference model of a directory, fp32. Raises UserError."""
    return transformers().AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run compares with the reference."""

    relative_difference: float
    """Largest difference of logits over max(1, largest logit)."""
    mismatches: int
    """Greedy tokens that differ although the reference's top two are clearly apart."""
    ties: int
    """Positions where they are not: closer than twice the difference of logits."""

    @property
    def is_same(self) -> bool:
        return self.relative_difference <= TOLERANCE and self.mismatches == 0


def compare(directory: Path, prompt: Sequence[int], tokens: Sequence[int], logits: Sequence[Tensor]) -> Verdict:
    """Judge a greedy run: the `logits` (vocab,) from which each of `tokens` was drawn after `prompt`."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        theirs: Tensor = hugging_face(directory)(ids).logits[0, len(prompt) - 1 :]
    difference = float((torch.stack(list(logits)) - theirs).abs().max())
    top = theirs.topk(2).values
    clear = (top[:, 0] - top[:, 1]) > 2 * difference
    wrong = theirs.argmax(-1) != torch.tensor(list(tokens))
    scale = max(1.0, float(theirs.abs().max()))
    return Verdict(difference / scale, int((wrong & clear).sum()), int((~clear).sum()))
