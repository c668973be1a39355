"""How long the pieces of a model take on this machine, measured on the shares the engine computes with.

Pieces are timed inside whole steps, as generation makes them: a product repeated by itself finds its weights in
the caches, which no real step does. It does not know what the figures are for.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from statistics import fmean, median
from typing import Self

import torch
from torch import Tensor

from splitwise_llm.cost.counts import assigned_weight_bytes
from splitwise_llm.cost.measured import BatchPoint, HalfPoint, Measured, RowsPoint, SizePoint
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.pieces import Job, Piece, walk
from splitwise_llm.engine.walk import GREEDY
from splitwise_llm.errors import RequestError
from splitwise_llm.model.sampling import sample
from splitwise_llm.model.share import Positions, Share, together
from splitwise_llm.partition import Part, Partition, Placement
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import ModelSpec
from splitwise_llm.wire import codec

REST_S = 0.01
"""Long enough for a machine's caches to fill with other things, as while it waits for a link."""
WARM_UP_STEPS, FLOWING_STEPS, RESTED_STEPS, PROMPTS = 2, 10, 6, 3
MESSAGE_ROWS = (1, 16, 64, 128)
MESSAGE_TOKENS = 8
FEW_ROWS = (2, 4, 8)
"""Of a step that verifies drafted tokens: products of few rows take other ways than those of one row or of many."""
BATCHES = (1, 2, 4, 8)
"""Sequences computed together."""
SEVERAL_STEPS = 4
Units = tuple[int, int]
"""Key/value groups and FFN shards."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The prompts a round runs, as (positions, chunk): with every unit, and with some; tokens follow each."""

    whole: tuple[tuple[int, int], ...]
    partial: tuple[tuple[int, int], ...]

    @classmethod
    def up_to(cls, positions: int) -> Grid:
        """A prompt of so many positions in chunks of 16, 32, ... and at once, and one a quarter as long."""
        chunks = [size for size in (16, 32, 64, 128, 256) if size < positions]
        short = max(positions // 4, 1)
        whole = ((short, short), *((positions, chunk) for chunk in (*chunks, positions)))
        return cls(whole, ((positions, min(32, positions)), (positions, positions)))


def shares_measured(spec: ModelSpec) -> tuple[Units, ...]:
    """All units of every half; half of them; one."""
    groups, shards = spec.num_kv_heads, spec.num_ffn_shards
    return tuple(dict.fromkeys([(groups, shards), (max(groups // 2, 1), max(shards // 2, 1)), (1, 1)]))


def _partition(spec: ModelSpec, units: Units) -> Partition:
    """So many units of each half on machine 0, with both ends if that is all; the others elsewhere."""
    groups, shards = units
    rest = Placement(
        (0,) * groups + (1,) * (spec.num_kv_heads - groups), (0,) * shards + (1,) * (spec.num_ffn_shards - shards)
    )
    end = int(units != (spec.num_kv_heads, spec.num_ffn_shards))
    return Partition((rest,) * spec.num_layers, embed=end, head=end)


@dataclass(frozen=True, slots=True)
class _Timed:
    """One step, piece by piece (s)."""

    halves: tuple[float, ...]
    heads: int
    """Rows that passed the head."""
    head_s: float
    total_s: float

    @property
    def awake(self) -> tuple[float, ...]:
        """The halves, the first of each kind no longer than the others: a machine that has rested wakes once a stage,
        however many halves follow."""
        usual = [median(self.halves[kind + 2 :: 2] or self.halves[kind::2]) for kind in (0, 1)]
        return tuple(min(half, most) for half, most in zip(self.halves[:2], usual, strict=True)) + self.halves[2:]

    @property
    def woke_s(self) -> float:
        """What waking took."""
        return sum(self.halves) - sum(self.awake)


@dataclass(slots=True)
class Profiler:
    """Measures a machine round by round; its weights stay loaded while it is entered (async with).

    Raises RequestError for a grid that the model's context does not hold.
    """

    machine: Machine
    grid: Grid
    load_bytes_per_s: float = 0.0
    """How fast the weights came from storage."""
    _halves: dict[tuple[Part, int, int, int, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    _head: dict[tuple[int, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    _stage: dict[tuple[int, bool], list[float]] = field(default_factory=lambda: defaultdict(list))
    _batches: dict[int, list[tuple[float, float, float]]] = field(default_factory=lambda: defaultdict(list))
    """By sequences, attention half, FFN half, the rest of the stage."""
    _calls: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))
    _messages: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    _tokens: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        longest = max(positions for positions, _ in (*self.grid.whole, *self.grid.partial))
        longest += WARM_UP_STEPS + FLOWING_STEPS + RESTED_STEPS + max(FEW_ROWS)
        if longest > self.machine.spec.max_context:
            raise RequestError(
                f"profiling would take {longest} positions, the model has {self.machine.spec.max_context}; ask for "
                "shorter prompts"
            )

    @classmethod
    async def fitting(cls, machine: Machine, budget_s: float) -> Self:
        """One whose rounds of the longest possible prompts, up to 256 positions, take a fourth of a budget."""
        room = machine.spec.max_context - WARM_UP_STEPS - FLOWING_STEPS - RESTED_STEPS - max(FEW_ROWS)
        probe = cls(machine, Grid.up_to(max(min(32, room), 1)))
        async with probe:
            await probe.round()
            start_s = time.monotonic()
            await probe.round()
            round_s = time.monotonic() - start_s
        longest = max(min(32, room), 1)
        for positions in (64, 128, 256):
            # Prompts grow with their length, and there are more of them; tokens after them stay as many.
            if positions <= room and round_s * positions / 32 < budget_s / 4:
                longest = positions
        return cls(machine, Grid.up_to(longest))

    async def __aenter__(self) -> Self:
        """Load every share that will be measured. Raises MemoryTooSmall, ModelError."""
        machine, start_s = self.machine, time.monotonic()
        for units in shares_measured(machine.spec):
            await self._open((id(self), units), units, 1)
        partitions = [_partition(machine.spec, units) for units in shares_measured(machine.spec)]
        size = sum(assigned_weight_bytes(machine.spec, one, 0, machine.dtype, machine.weights) for one in partitions)
        self.load_bytes_per_s = size / (time.monotonic() - start_s)
        return self

    async def __aexit__(self, *_: object) -> None:
        for units in shares_measured(self.machine.spec):
            self.machine.release((id(self), units))

    async def _open(self, key: object, units: Units, capacity: int) -> Share:
        return await self.machine.open_share(key, "this machine", _partition(self.machine.spec, units), 0, capacity)

    def forget(self) -> None:
        """Start anew, because a machine's speed drifts; what messages take stays."""
        for table in (self._halves, self._head, self._stage, self._batches, self._calls):
            table.clear()

    # Computing

    async def round(self) -> None:
        """Measure everything of the grid once."""
        all_units, *some = shares_measured(self.machine.spec)
        for positions, chunk in self.grid.whole:
            await self._pass(all_units, positions, chunk, True)
        for units in some:
            for positions, chunk in self.grid.partial:
                await self._pass(units, positions, chunk, False)
        await self._together(all_units, self.grid.whole[-1][0])
        for _ in range(RESTED_STEPS):
            await self._thread_call()

    async def _pass(self, units: Units, positions: int, chunk: int, whole: bool) -> None:
        """A prompt a few times, then decode steps: one straight after the other, and each after a rest."""
        key, steps = object(), WARM_UP_STEPS + FLOWING_STEPS + RESTED_STEPS
        share = await self._open(key, units, positions + steps + max(FEW_ROWS))
        try:
            for _ in range(PROMPTS):
                share.cut(0)
                await asyncio.sleep(REST_S)
                for start in range(0, positions, chunk):
                    count = min(chunk, positions - start)
                    timed = await self._step(share, start, count, whole)
                    self._note(timed, units, count, start + count, True, whole)
            for number in range(steps):
                rested = number >= WARM_UP_STEPS + FLOWING_STEPS
                if rested:
                    await asyncio.sleep(REST_S)
                timed = await self._step(share, positions + number, 1, whole)
                if number >= WARM_UP_STEPS:
                    self._note(timed, units, 1, positions + steps // 2, rested, whole)
                    if whole:
                        await self._walked(share, positions + number, 1, rested, timed.woke_s if rested else 0.0)
            if chunk == positions:
                await self._verifying(share, positions + steps, units, whole)
        finally:
            self.machine.release(key)

    async def _verifying(self, share: Share, start: int, units: Units, whole: bool) -> None:
        """Steps of few rows, as they verify drafted tokens: every row passes the head."""
        for rows in FEW_ROWS:
            for number in range(1 + 2 * SEVERAL_STEPS):
                rested = number > SEVERAL_STEPS
                if rested:
                    await asyncio.sleep(REST_S)
                share.cut(start)
                timed = await self._step(share, start, rows, whole, heads=rows)
                if number:
                    self._note(timed, units, rows, start + rows, rested, whole)
                    if whole:
                        await self._walked(share, start, rows, rested, timed.woke_s if rested else 0.0)

    async def _walked(self, share: Share, start: int, count: int, rested: bool, woke_s: float) -> None:
        """The step just taken once more, as the engine hands it to a machine: what it does around halves and head, and
        what the first halves took longer because the machine woke in them."""
        if rested:
            await asyncio.sleep(REST_S)
        share.cut(start)
        done = await self.machine.compute(lambda: _around(share, self.machine.spec, start, count), here=share)
        self._stage[count, rested].append(done.value + woke_s)

    async def _together(self, units: Units, positions: int) -> None:
        """Decode steps of several sequences at once, each after a rest."""
        keys = [object() for _ in range(max(BATCHES))]
        try:
            shares = [await self._open(key, units, positions + 1) for key in keys]
            for share in shares:
                await self._step(share, 0, positions, False)
            for batch in BATCHES:
                for number in range(1 + SEVERAL_STEPS):
                    await asyncio.sleep(REST_S)
                    for share in shares:
                        share.cut(positions)
                    mine = shares[:batch]
                    done = await self.machine.compute(lambda: _timed_batch(mine, self.machine.spec, positions))  # noqa: B023
                    if number:
                        self._batches[batch].append(done.value)
        finally:
            for key in keys:
                self.machine.release(key)

    async def _step(self, share: Share, start: int, count: int, whole: bool, heads: int = 1) -> _Timed:
        spec = self.machine.spec
        payload = bytes(WirePrecision.FP32.payload_bytes(count, spec.d_model))
        asked_s = time.monotonic()
        done = await self.machine.compute(
            lambda: _timed_step(share, spec, payload, start, count, heads if whole else 0),
            here=share if count == 1 else None,
        )
        if count == 1:
            self._calls[False].append(time.monotonic() - asked_s - (done.stop_s - done.start_s))
        return done.value

    async def _thread_call(self) -> None:
        """What handing over to the compute thread costs where both threads have slept: the work sleeps, too."""
        await asyncio.sleep(REST_S)
        asked_s = time.monotonic()
        await self.machine.compute(lambda: time.sleep(REST_S / 4))
        self._calls[True].append(time.monotonic() - asked_s - REST_S / 4)

    def _note(self, timed: _Timed, units: Units, rows: int, context: int, rested: bool, whole: bool) -> None:
        for half, seconds in enumerate(timed.awake if rested else timed.halves):
            part = Part.FFN if half % 2 else Part.ATTENTION
            self._halves[part, units[half % 2], rows, context, rested].append(seconds)
        if whole:
            if timed.heads != rows:
                self._stage[rows, rested].append(timed.total_s - timed.head_s - sum(timed.awake))
            else:
                self._head[rows, rested].append(timed.head_s)

    async def busy(self, is_prefill: bool, seconds: float) -> None:
        """Prefill, or decode, for about so long, for a meter to watch."""
        units, (positions, _) = shares_measured(self.machine.spec)[0], self.grid.whole[-1]
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            key = object()
            share = await self._open(key, units, positions + FLOWING_STEPS)
            try:
                await self._step(share, 0, positions if is_prefill else 1, True)
                for number in range(0 if is_prefill else FLOWING_STEPS):
                    await self._step(share, 1 + number, 1, True)
            finally:
                self.machine.release(key)

    # Messages

    async def messages(self, edge: Edge, worker: str, rtt_s: float = 0.0) -> None:
        """Take the software time of messages from sessions with a worker behind a link without a limit of rate
        (loopback, or one of so much delay): what passes between one machine's computing and the other's, less the delay
        and what handing over to a thread costs; and that of a token, from the end of one step to the beginning of the
        next.

        The device sleeps before it answers with a token, so that both ends are as cold as after a slow link.
        """
        spec = self.machine.spec
        if edge.names[1:] != (worker,):
            raise RequestError(f"the device has no worker {worker!r}, or others besides: {', '.join(edge.names[1:])}")
        middle = spec.num_layers // 2
        partition = Partition.u_shape(spec, middle, spec.num_layers - middle - 1)

        def slowly(logits: Tensor, position: int) -> int:
            time.sleep(REST_S)
            return sample(logits, GREEDY, position)

        for rows in MESSAGE_ROWS:
            prompt = [position % spec.vocab_size for position in range(rows)]
            async with edge.generate(
                prompt, Decision(partition), max_new_tokens=MESSAGE_TOKENS, stop_ids=(), choose=slowly
            ) as generation:
                async for _ in generation:
                    pass
            for step, gap_s in _gaps(generation.record):
                count = rows if step == 0 else 1
                calls_s = 2 * median(self._calls[count > 1]) if self._calls[count > 1] else 0.0
                one_end_s = max(gap_s - rtt_s - calls_s, 0.0) / 4
                self._messages[WirePrecision.FP32.payload_bytes(count, spec.d_model)].append(one_end_s)
            call_s = median(self._calls[False]) if self._calls[False] else 0.0
            self._tokens += [max(gap_s - call_s, 0.0) for gap_s in _between_steps(generation.record)]

    def table(self) -> Measured:
        """Means of what was measured. Raises SpecError before the first round."""
        machine = self.machine
        halves = [HalfPoint(*key, _mean(values)) for key, values in sorted(self._halves.items())]
        head = [RowsPoint(*key, _mean(values)) for key, values in sorted(self._head.items())]
        stage = [RowsPoint(*key, max(_mean(values), 0.0)) for key, values in sorted(self._stage.items())]
        message = [SizePoint(size, _mean(values)) for size, values in sorted(self._messages.items())]
        batches = [
            BatchPoint(batch, *(_mean(column) for column in zip(*values, strict=True)))
            for batch, values in sorted(self._batches.items())
        ]
        here_s, thread_s = (_mean(self._calls[threaded] or [0.0]) for threaded in (False, True))
        return Measured(
            machine.spec, machine.dtype, machine.weights, machine.threads,
            tuple(halves), tuple(head), tuple(stage), tuple(message or [SizePoint(0, 0.0)]),
            here_s, max(thread_s, here_s), f"measured on {date.today().isoformat()}, torch {torch.__version__}",
            tuple(batches),
            _mean(self._tokens or [0.0]),
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    """The mean, for it is means that add up to a token's; what lies beyond three medians, as where another program
    took the processor, counts as three."""
    limit = 3 * median(values)
    return fmean(min(value, limit) for value in values)


def _timed_step(share: Share, spec: ModelSpec, payload: bytes, start: int, count: int, heads: int) -> _Timed:
    """A step of all layers on a stream that came over a wire and goes back over one; so many rows pass the head."""
    clock = time.perf_counter
    times = [began_s := clock()]
    x = codec.decode(payload, WirePrecision.FP32, count, spec.d_model).to(dtype=share.dtype, device=share.device)
    at = share.positions(start, count)
    times = [clock()]
    for half in range(2 * spec.num_layers):
        x = share.join(x, [share.partial(x, half, at)], half)
        times.append(clock())
    if heads:
        for number, logits in enumerate(share.all_logits(x[-heads:])):
            sample(logits, GREEDY, start + count - heads + 1 + number)
    headed_s = clock()
    codec.encode(x, WirePrecision.FP32)
    halves = tuple(after - before for before, after in pairwise(times))
    return _Timed(halves, heads, headed_s - times[-1], clock() - began_s)


def _around(share: Share, spec: ModelSpec, start: int, count: int) -> float:
    """What a decode step of all layers takes before its first half and behind its head (s)."""
    clock, payload = time.perf_counter, bytes(WirePrecision.FP32.payload_bytes(count, spec.d_model))
    times: list[float] = []

    def stream() -> tuple[Tensor, Positions]:
        x = codec.decode(payload, WirePrecision.FP32, count, spec.d_model)
        return x.to(dtype=share.dtype, device=share.device), share.positions(start, count)

    def finish(x: Tensor, logits: Tensor | None) -> None:
        times.append(clock())
        codec.encode(x, WirePrecision.FP32)

    job = Job(
        Piece(
            share, 0, 2 * spec.num_layers, count, start + count, stream, finish,
            head_rows=count, taps=(0,), tap=lambda half, x: times.append(clock()),
        ),
        half=0,
    )  # fmt: skip
    began_s = clock()
    walk([job])
    ended_s = clock()
    if job.error is not None:
        raise job.error
    first_s, last_s = times
    return first_s - began_s + ended_s - last_s


def _timed_batch(shares: Sequence[Share], spec: ModelSpec, start: int) -> tuple[float, float, float]:
    """One position of each of some sequences, through all layers together: an attention half, an FFN half, and what
    the stage does besides (s)."""
    clock, payload = time.perf_counter, bytes(WirePrecision.FP32.payload_bytes(1, spec.d_model))
    began_s = clock()
    streams: list[Tensor] = []
    ats: list[Positions] = []
    for share in shares:
        stream = codec.decode(payload, WirePrecision.FP32, 1, spec.d_model)
        streams.append(stream.to(dtype=share.dtype, device=share.device))
        ats.append(share.positions(start, 1))
    x = torch.cat(streams)
    spent = [0.0, 0.0]
    for half in range(2 * spec.num_layers):
        before_s = clock()
        x = together(shares, ats, x, half, half + 1)
        spent[half % 2] += clock() - before_s
    for row in torch.split(x, 1):
        codec.encode(row, WirePrecision.FP32)
    attention_s, ffn_s = (seconds / spec.num_layers for seconds in spent)
    return attention_s, ffn_s, clock() - began_s - sum(spent)


def _gaps(record: RequestRecord) -> list[tuple[int, float]]:
    """Per step, what passed between the first machine's two computations while the second did not compute (s)."""
    near, far = record.machines
    mine = {(one.step, one.stage): one for one in near.intervals}
    gaps = []
    for one in far.intervals:
        before, after = mine.get((one.step, one.stage - 1)), mine.get((one.step, one.stage + 1))
        if before and after:
            gaps.append((one.step, after.start_s - before.stop_s - (one.stop_s - one.start_s)))
    return gaps


def _between_steps(record: RequestRecord) -> list[float]:
    """What passed on the first machine from a token to the step that it begins (s); the prompt's does not count, for it
    was computed on another thread."""
    mine = {(one.step, one.stage): one for one in record.machines[0].intervals}
    last = max(stage for _, stage in mine)
    steps = range(1, max(step for step, _ in mine))
    return [mine[step + 1, 0].start_s - mine[step, last].stop_s for step in steps]
