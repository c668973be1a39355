"""Into how large pieces to cut a prompt: small ones keep device, link and cloud busy at the same time, large ones are
computed and sent with less around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitwise_llm.cost.price import price
from splitwise_llm.cost.terms import Form
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision

CHUNKS = (16, 32, 64, 128, 256, 512)
"""Positions: a factor of two apart, as the time to the first token is flat around its least."""

UNKNOWN_CHUNK = 64
"""Where nobody has measured the machines: rows enough for most of a machine's prefill speed, and small beside a prompt
for which it matters."""


def best_chunk(
    world: World, decision: Decision, job: Job, conditions: Form | None = None, chunks: Sequence[int] = CHUNKS
) -> int | None:
    """The chunk with the least time to the first token under some conditions (None: as the links are given, idle); None
    for the whole prompt at once, which is what stays on one machine."""
    if len(decision.partition.machines) == 1:
        return None
    smaller = [chunk for chunk in chunks if chunk < job.prompt_tokens]
    one = replace(job, tokens_out=1)

    def ttft_s(chunk: int | None) -> float:
        return price(world, replace(decision, prefill_chunk=chunk), one, conditions).ttft_s

    return min((None, *smaller), key=ttft_s)
