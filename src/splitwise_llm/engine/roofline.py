"""What this machine can do at most, and the share of it that the engine achieves: the figures of a device file.

The peaks are products of plain tensors, the shares come from measured units; what was not measured is not made up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from splitwise_llm.cost import counts
from splitwise_llm.cost.measured import Measured
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.meters import Meter
from splitwise_llm.engine.profiling import Profiler
from splitwise_llm.model.weights import TORCH_DTYPE
from splitwise_llm.partition import Part

_SQUARE, _COLUMNS, _READ_BYTES, _LONG_S = 1024, 4096, 256 << 20, 0.5
Figure = dict[str, object]


@dataclass(frozen=True, slots=True)
class Peaks:
    """The fastest of many products: FLOP/s of a square one, bytes/s of a row times a matrix that fits no cache."""

    flop_per_s: float
    memory_bytes_per_s: float


async def peaks(machine: Machine) -> Peaks:
    """Measure them in the machine's format, on its compute thread; about a second."""
    dtype = TORCH_DTYPE[machine.dtype]

    def work() -> Peaks:
        a, b = (torch.randn(_SQUARE, _SQUARE, device=machine.device).to(dtype) for _ in "ab")
        rows = _READ_BYTES // (_COLUMNS * dtype.itemsize)
        matrix = torch.ones(rows, _COLUMNS, dtype=dtype, device=machine.device)
        vector = torch.ones(1, rows, dtype=dtype, device=machine.device)
        computing_s = _fastest_s(lambda: torch.mm(a, b))
        reading_s = _fastest_s(lambda: torch.mm(vector, matrix))
        return Peaks(2 * _SQUARE**3 / computing_s, matrix.nbytes / reading_s)

    return (await machine.compute(work)).value


def _fastest_s(work: Callable[[], torch.Tensor]) -> float:
    best, until = float("inf"), time.monotonic() + _LONG_S
    while time.monotonic() < until:
        start = time.perf_counter()
        result = work()
        if result.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True, slots=True)
class Watts:
    """Power of the whole device while it waits, decodes, and prefills."""

    idle: float
    decode: float
    prefill: float
    meter: str


def device_figures(
    name: str, machine: Machine, units: Measured, at_most: Peaks, load_bytes_per_s: float, watts: Watts | None
) -> dict[str, object]:
    """A device file as `DeviceSpec.from_file` reads it, each figure with its source."""
    launch_s, memory_rate, flop_rate = _achieved(units)
    # A disturbed machine may miss its peak for a second, and a small model's weights stay in the caches.
    flop_peak, memory_peak = max(at_most.flop_per_s, flop_rate), max(at_most.memory_bytes_per_s, memory_rate)
    said = f"{units.source}, {units.dtype}, weights {units.weights}, {units.threads} threads"
    figures: dict[str, object] = {
        "name": name,
        "flop_per_s": _figure(flop_peak, f"two {_SQUARE} x {_SQUARE} matrices, or the model's halves, {said}"),
        "memory_bytes_per_s": _figure(memory_peak, f"a row times 256 MiB, or the model's halves, {said}"),
        "memory_bytes": _figure(float(machine.memory_bytes), f"what is free; {said}"),
        "compute_efficiency": _figure(flop_rate / flop_peak, f"prefill of whole halves, {said}"),
        "memory_efficiency": _figure(memory_rate / memory_peak, f"decode steps of whole halves, {said}"),
        "launch_s": _figure(launch_s, f"what is left of a half when its units go to none, {said}"),
        "message_s": _figure(units.message_s(0), f"sessions over loopback, {said}"),
        "token_s": _figure(units.token_s, f"sessions over loopback, {said}"),
        "load_bytes_per_s": _figure(load_bytes_per_s, f"files that may be in the page cache, {said}"),
    }
    if watts:
        source = f"{watts.meter}, {units.source}"
        figures |= {
            "idle_w": _figure(watts.idle, source),
            "decode_w": _figure(watts.decode, source),
            "prefill_w": _figure(watts.prefill, source),
        }
    return figures


def _figure(value: float, source: str) -> Figure:
    return {"value": float(f"{value:.4g}"), "source": source}


def _achieved(units: Measured) -> tuple[float, float, float]:
    """Launch (s) of a half, and what whole halves achieve beyond it: bytes/s in decode, FLOP/s in prefill."""
    spec = units.model
    launches, read_s, read_bytes, flop_s, flop = [], 0.0, 0.0, 0.0, 0.0
    rows = max(half.rows for half in units.halves)
    context = max(half.context for half in units.halves if half.rows == 1)
    for part in Part:
        number = counts.units_in(spec, part)
        all_s, one_s = (units.half_s(part, n, 1, context, False) for n in (number, 1))
        launch_s = max(one_s - (all_s - one_s) / (number - 1), 0.0) if number > 1 else 0.0
        launches.append(min(launch_s, one_s))
        read_s += max(all_s - launches[-1], 1e-9)
        read_bytes += number * counts.unit_memory_bytes(spec, part, context, units.dtype, units.weights)
        flop_s += max(units.half_s(part, number, rows, rows, True) - launches[-1], 1e-9)
        flop += number * counts.unit_flop(spec, part, rows, rows)
    return sum(launches) / len(launches), read_bytes / read_s, flop / flop_s


async def watts(profiler: Profiler, meter: Meter, seconds: float = 2.0) -> Watts:
    """Mean power while nothing runs, while tokens are decoded, and while prompts are prefilled."""

    async def over(work: Awaitable[None]) -> float:
        before_j, start_s = meter.joules(), time.monotonic()
        await work
        return (meter.joules() - before_j) / (time.monotonic() - start_s)

    return Watts(
        await over(asyncio.sleep(seconds)),
        await over(profiler.busy(False, seconds)),
        await over(profiler.busy(True, seconds)),
        meter.name,
    )
