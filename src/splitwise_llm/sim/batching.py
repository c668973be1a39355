"""How long an iteration of a batching server takes, and how much cache it has; it knows no sessions and no time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from splitwise_llm.cost import Host, counts
from splitwise_llm.partition import Part
from splitwise_llm.sim.physics import Floats
from splitwise_llm.spec import ModelSpec

REFERENCE_CONTEXT = 256
"""Context at which a step is taken as 1, as in `World.load`; also of chunks of prompts."""


@dataclass(frozen=True)
class Server:
    """A whole model on one machine, as coefficients of an iteration: seconds per row, per cached position, fixed."""

    layers: int
    attention_row_s: float
    attention_position_s: float
    attention_weights_s: float
    cache_position_s: float
    ffn_row_s: float
    ffn_weights_s: float
    head_row_s: float
    head_weights_s: float
    launch_s: float
    stretch: float
    cache_bytes: float
    """What memory is left beside the weights."""
    position_bytes: float

    @classmethod
    def of(cls, spec: ModelSpec, host: Host) -> Server:
        device = host.device
        flop_s = 1 / (device.flop_per_s * device.compute_efficiency)
        byte_s = 1 / (device.memory_bytes_per_s * device.memory_efficiency)
        groups, shards = spec.num_kv_heads, spec.num_ffn_shards
        row = counts.unit_flop(spec, Part.ATTENTION, 1, 0)
        every = [
            (half, tuple(range(counts.units_in(spec, Part.FFN if half % 2 else Part.ATTENTION))))
            for half in range(2 * spec.num_layers)
        ]
        weights = counts.weight_bytes(spec, every, True, True, host.dtype, host.weights)
        position = spec.kv_bytes_per_position(groups, host.dtype)
        return cls(
            layers=spec.num_layers,
            attention_row_s=groups * row * flop_s,
            attention_position_s=groups * (counts.unit_flop(spec, Part.ATTENTION, 1, 1) - row) * flop_s,
            attention_weights_s=groups
            * counts.unit_weight_bytes(spec, Part.ATTENTION, host.dtype, host.weights)
            * byte_s,
            cache_position_s=position * byte_s,
            ffn_row_s=shards * counts.unit_flop(spec, Part.FFN, 1, 0) * flop_s,
            ffn_weights_s=shards * counts.unit_weight_bytes(spec, Part.FFN, host.dtype, host.weights) * byte_s,
            head_row_s=counts.head_flop(spec) * flop_s,
            head_weights_s=counts.table_bytes(spec, host.dtype, host.weights) * byte_s,
            launch_s=device.launch_s,
            stretch=host.stretch,
            cache_bytes=device.memory_bytes - weights,
            position_bytes=float(position * spec.num_layers),
        )

    def iteration_s(self, decoded: Floats, positions: Floats, chunk: float = 0.0) -> Floats:
        """Seconds of an iteration in which `decoded` positions are computed (one for each sequence, more where it
        verifies drafts), reading `positions` cached positions together, and `chunk` prompt positions are taken in.
        Equals `Host.model_s` for equal sequences."""
        rows = decoded + chunk
        flop = rows * self.attention_row_s + (positions + chunk * REFERENCE_CONTEXT) * self.attention_position_s
        layer = np.maximum(flop, self.attention_weights_s + positions * self.cache_position_s)
        layer = layer + np.maximum(rows * self.ffn_row_s, self.ffn_weights_s) + 2 * self.launch_s
        head = np.maximum(decoded * self.head_row_s, self.head_weights_s) + self.launch_s
        result: Floats = self.stretch * (self.layers * layer + head)
        return result

    @cached_property
    def one_s(self) -> float:
        """Seconds of a step of one sequence."""
        return float(self.iteration_s(np.ones(1), np.full(1, float(REFERENCE_CONTEXT)))[0])

    def blocks(self, positions: int) -> int:
        """Cache blocks of so many positions that its memory holds; at least one."""
        return max(int(self.cache_bytes / (self.position_bytes * positions)), 1)
