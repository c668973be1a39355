"""How long a machine takes for a piece of a model: by its roofline, or by what was measured on it.

It knows nothing of partitions, plans or links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from splitwise_llm.cost import counts
from splitwise_llm.partition import Part
from splitwise_llm.plan import Serial, Stage, Step
from splitwise_llm.spec import DeviceSpec, Dtype, ModelSpec, Weights


class UnitTimes(Protocol):
    """Measured seconds of the pieces of one model on one machine, in one precision. `rested`: the machine waited
    for others since its last step, and its caches hold other things."""

    def half_s(self, part: Part, units: int, rows: int, context: int, rested: bool, batch: int = 1) -> float:
        """`units` units of one half layer over `rows` positions that see up to `context`, of each of `batch`
        sequences at once."""
        ...

    def head_s(self, rows: int, rested: bool) -> float:
        """Final norm, output projection and sampling of `rows` positions."""
        ...

    def stage_s(self, rows: int, rested: bool, batch: int = 1) -> float:
        """What a stage computes besides its halves: positions, codec, the first touch of everything, and how much
        longer its first halves take where the machine wakes there."""
        ...

    def call_s(self, threaded: bool) -> float:
        """Software around a computation, on the compute thread or on the thread that asks."""
        ...

    def message_s(self, num_bytes: float) -> float:
        """Software at one end of a message."""
        ...

    @property
    def token_s(self) -> float:
        """Software of a token loop between the last computation of a step and the first of the next."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as it is priced: what it is, what its weights are kept in, and how fast it is for one model."""

    device: DeviceSpec
    dtype: Dtype = Dtype.FP16
    weights: Weights = Weights.FULL
    measured: UnitTimes | None = None
    """None: the roofline of the device."""
    stretch: float = 1.0
    """Compute takes this many times as long (an emulated machine)."""

    @property
    def is_shared(self) -> bool:
        """Whether it serves several sequences at a time, so that a request pays for its part of a batch."""
        return self.device.slots > 1

    def half_s(
        self, spec: ModelSpec, part: Part, units: int, rows: int, context: int, batch: int = 1, rested: bool = False
    ) -> float:
        """Seconds of `units` units of one half layer over `rows` new positions, for each of `batch` sequences at
        `context`: weights are read once, keys and values once per sequence."""
        if self.measured is not None:
            return self.stretch * self.measured.half_s(part, units, rows, context, rested, batch)
        flop = batch * units * counts.unit_flop(spec, part, rows, context)
        kv = counts.unit_memory_bytes(spec, part, context, self.dtype, self.weights)
        weight = counts.unit_weight_bytes(spec, part, self.dtype, self.weights)
        return self.stretch * self.device.seconds(flop, units * (weight + batch * (kv - weight)))

    def rows_s(
        self, spec: ModelSpec, part: Part, units: int, batch: Sequence[tuple[int, int]], rested: bool = False
    ) -> float:
        """`half_s` for sequences that differ: (new positions, context) of each."""
        if self.measured is not None or len(batch) == 1:
            rows, context = sum(rows for rows, _ in batch), max(context for _, context in batch)
            return self.half_s(spec, part, units, -(-rows // len(batch)), context, len(batch), rested)
        flop = sum(counts.unit_flop(spec, part, rows, context) for rows, context in batch)
        weight = counts.unit_weight_bytes(spec, part, self.dtype, self.weights)
        cached = sum(
            counts.unit_memory_bytes(spec, part, context, self.dtype, self.weights) - weight for _, context in batch
        )
        return self.stretch * self.device.seconds(units * flop, units * (weight + cached))

    def head_s(self, spec: ModelSpec, rows: int = 1, batch: int = 1, rested: bool = False) -> float:
        """Seconds of the output projection of `rows` positions of each of `batch` sequences."""
        if self.measured is not None:
            return self.stretch * self.measured.head_s(batch * rows, rested)
        table = counts.table_bytes(spec, self.dtype, self.weights)
        return self.stretch * self.device.seconds(batch * counts.head_flop(spec, rows), table)

    def stage_s(self, rows: int, rested: bool = False, *, is_prefill: bool = False, batch: int = 1) -> float:
        """Seconds of entering and leaving a stage; part of the launches of a roofline. Prefill, batches and emulated
        machines compute on a thread of their own, and handing over to it is never stretched; a decode step of one
        sequence does not, drafted tokens or none."""
        if self.measured is None:
            return 0.0
        threaded = is_prefill or batch > 1 or self.stretch != 1
        return self.stretch * self.measured.stage_s(rows, rested, batch) + self.measured.call_s(threaded)

    def message_s(self, num_bytes: float) -> float:
        """Seconds of software at this end of a message."""
        return self.device.message_s if self.measured is None else self.measured.message_s(num_bytes)

    @property
    def token_s(self) -> float:
        """Seconds of software per step of a token loop that passes here, besides messages; never stretched."""
        return self.device.token_s if self.measured is None else self.measured.token_s

    def model_s(self, spec: ModelSpec, rows: int, context: int, batch: int = 1, rested: bool = False) -> float:
        """Seconds of one step of the whole model: what a serving machine advertises as its step time."""
        attention = self.half_s(spec, Part.ATTENTION, spec.num_kv_heads, rows, context, batch, rested)
        ffn = self.half_s(spec, Part.FFN, spec.num_ffn_shards, rows, context, batch, rested)
        stage = self.stage_s(rows, rested, is_prefill=rows > 1, batch=batch)
        return spec.num_layers * (attention + ffn) + self.head_s(spec, 1, batch, rested) + stage

    def sending_s(self, num_bytes: float) -> float:
        """Seconds that sending a message keeps a loop that does not wait for its arrival: our engine's computes and
        sends in turn; a roofline's server is taken to send beside it."""
        return 0.0 if self.measured is None else self.measured.message_s(num_bytes)


@dataclass(frozen=True, slots=True)
class Rows:
    """What one sequence brings to a batch: halves `start` to `stop`, whole, over `count` new positions that see up to
    `context`, and how many of them pass the output projection."""

    start: int
    stop: int
    count: int
    context: int
    head: int = 0


def batch_seconds(spec: ModelSpec, host: Host, batch: Sequence[Rows], rested: bool = False) -> float:
    """What a batch of sequences takes `host`, half by half: weights are read once for all that pass there, keys and
    values once per sequence. Of one sequence, and of equal ones: what `stage_seconds` and `model_s` say.

    Of measured times, sequences that differ count as equal ones: of as many rows in all, at the longest context.
    """
    if not batch:
        return 0.0
    rested = rested or host.stretch != 1
    rows = -(-sum(one.count for one in batch) // len(batch))
    total = host.stage_s(rows, rested, is_prefill=len(batch) == 1 and rows > 1, batch=len(batch))
    edges = sorted({edge for rows in batch for edge in (rows.start, rows.stop)})
    for first, last in pairwise(edges):
        here = [(rows.count, rows.context) for rows in batch if rows.start <= first and last <= rows.stop]
        for half in range(first, last) if here else ():
            part = Part.FFN if half % 2 else Part.ATTENTION
            total += host.rows_s(spec, part, counts.units_in(spec, part), here, rested)
    if projected := sum(rows.head for rows in batch):
        total += host.head_s(spec, projected, rested=rested)
    return total


def stage_seconds(
    spec: ModelSpec,
    host: Host,
    stage: Stage,
    machine: int,
    step: Step,
    rested: bool = False,
    waited: bool | None = None,
) -> float:
    """What one stage of a step takes `machine` if it is `host`: its units sub-block by sub-block, and the output
    projection where the head is. `rested`: it waited for others since its last step, as an emulated machine always
    does, for it is slow by sleeping; `waited` (None: as `rested`): just before this stage, so that it wakes here."""
    context, rows = step.start + step.count, step.count
    rested = rested or host.stretch != 1
    waited = rested if waited is None else waited or host.stretch != 1
    if not isinstance(stage, Serial):
        units = sum(len(share.units) for share in stage.shares if share.machine == machine)
        if not units:
            return 0.0
        return host.half_s(spec, stage.part, units, rows, context, rested=rested) + host.stage_s(
            rows, waited, is_prefill=step.is_prefill
        )
    halves = {
        Part.ATTENTION: (stage.stop + 1) // 2 - (stage.start + 1) // 2,
        Part.FFN: stage.stop // 2 - stage.start // 2,
    }
    total = host.stage_s(rows, waited, is_prefill=step.is_prefill)
    for part, number in halves.items():
        if number:
            total += number * host.half_s(spec, part, counts.units_in(spec, part), rows, context, rested=rested)
    if stage.head and step.emits:
        total += host.head_s(spec, 1 if step.is_prefill else rows, rested=rested)
    return total
