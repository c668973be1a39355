"""Whether a machine can play another: sleeping makes it slower, and nothing makes it faster. It measures nothing."""

from __future__ import annotations

from splitwise_llm.cost.hosts import Host
from splitwise_llm.spec import ModelSpec

PROMPT_ROWS, CONTEXT = 128, 256
NOTICED = 1.05
"""Less than this is within what timing is good for."""


def shortfall(spec: ModelSpec, here: Host, played: Host) -> float:
    """How many times as long `here` takes as `played` would, for one token at a context of 256 or a prompt of 128,
    whichever is worse; at most 1: it can be played by sleeping."""
    return max(
        here.model_s(spec, rows, context) / played.model_s(spec, rows, context)
        for rows, context in ((1, CONTEXT), (PROMPT_ROWS, PROMPT_ROWS))
    )


def emulation_warning(name: str, times: float) -> str:
    """What to say when this machine needs `times` as long as the emulated one; empty where it can keep up."""
    if times <= NOTICED:
        return ""
    return (
        f"{name} is up to {times:.3g} times faster than this machine with this model, and an emulation can only slow "
        "down: times measured here are not that device's; emulate a slower device, or take "
        "predictions from `splitwise plan`"
    )


__all__ = ["emulation_warning", "shortfall"]
