"""From logits to a token. Noise is a function of (seed, position) alone, so any machine can continue any session."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from splitwise_llm.errors import RequestError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy at temperature 0; otherwise seeded, after top-k (0: all) and top-p (1: all)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise RequestError(f"temperature is {self.temperature}; expected 0 (greedy) up to 100")
        if not 0 <= self.top_k < 2**31:
            raise RequestError(f"top-k is {self.top_k}; expected 0 (all) up to {2**31 - 1}")
        if not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed {self.seed} is too large; expected a 64-bit number")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p is {self.top_p}; expected more than 0, at most 1")


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """The token for a position from its logits (vocab,), fp32.

    Seeded sampling takes the largest of `logit / temperature + Gumbel noise` (the Gumbel-max trick): the same
    distribution as drawing from the softmax, with the noise drawn beforehand and on the CPU everywhere.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = _top_p(_top_k(logits.cpu() / sampling.temperature, sampling.top_k), sampling.top_p)
    generator = torch.Generator().manual_seed(_mix(sampling.seed, position))
    uniform = torch.rand(scaled.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp_(1e-300, 1 - 1e-16)))
    return int((scaled + gumbel).argmax())


def _mix(seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _top_k(logits: Tensor, k: int) -> Tensor:
    if k == 0 or k >= logits.numel():
        return logits
    threshold = logits.topk(k).values[-1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def _top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `p`."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    return logits.index_fill(0, order[before >= p], -torch.inf)
