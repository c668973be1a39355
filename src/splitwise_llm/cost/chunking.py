"""Into which chunks a prompt is best prefilled on a given partition. It does not choose the partition.

Many small chunks keep device, link and cloud busy at the same time; few large ones spare messages, and let a machine
use each weight that it reads for more positions.
"""

from __future__ import annotations

from dataclasses import replace

from splitwise_llm.cost.bill import bill
from splitwise_llm.cost.price import Table
from splitwise_llm.cost.terms import Form
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision

GRID = (16, 32, 64, 128, 256, 512, None)
"""Chunk sizes that are priced: between two of them little changes, for the first token's time is flat around its
best."""

UNPROFILED = 64
"""Where nobody knows how fast machines are. A CPU reaches most of its rate of products with so many rows, and what a
chunk costs besides (messages, thread switches: about a millisecond) is little beside what it computes."""


def best_chunk(world: World, decision: Decision, job: Job, conditions: Form | None = None) -> int | None:
    """The chunk of `GRID` with which a decision brings the first token soonest, the largest of equals; None: all at
    once, as where only one machine computes and nothing could overlap. Raises PartitionError."""
    if len(decision.partition.machines) < 2:
        return None
    sizes = [size for size in reversed(GRID) if size is None or size < job.prompt_tokens]
    bills = [bill(world, replace(decision, prefill_chunk=size), job) for size in sizes]
    x = world.conditions() if conditions is None else conditions
    return sizes[int(Table(world, bills).at(x).ttft_s.argmin())]


def default_chunk(decision: Decision, prompt_tokens: int) -> int | None:
    """A sensible chunk where machines are not profiled: none where only one machine computes, or where the prompt would
    not make two."""
    if len(decision.partition.machines) < 2:
        return None
    return UNPROFILED if prompt_tokens >= 2 * UNPROFILED else None
