"""A machine: resident weights, memory, and computing for any number of sessions.

It does not know about links; sessions bring it work and wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch

from splitwise_llm import cost
from splitwise_llm.cost import Host, Rows
from splitwise_llm.cost.emulation import emulation_warning
from splitwise_llm.engine.batching import Compute
from splitwise_llm.engine.memory import available_memory_bytes, reset_peak_memory
from splitwise_llm.engine.meters import the_meter
from splitwise_llm.engine.pieces import Computed, Piece
from splitwise_llm.engine.telemetry import StepClock
from splitwise_llm.errors import MemoryTooSmall, RequestError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Need, Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, Dtype, Kernels, ModelSpec, Weights
from splitwise_llm.units import show_bytes

T = TypeVar("T")
RETRY_S = 5.0
"""When a session that found no room beside others is asked to come back."""
READYING_S = 0.02
"""Between two pieces that are loaded beside decoding: each holds up a token or two."""


@dataclass(frozen=True, slots=True)
class _Open:
    """What a share holds: slices, and caches for so many positions; those that shares of one owner have in common are
    the same."""

    need: Need
    capacity: int
    owner: object


def need_of(partition: Partition, machine: int) -> Need:
    """What a machine must hold for a partition."""
    halves = range(2 * len(partition.layers))
    units = tuple((half, mine) for half in halves if (mine := partition.units_on(machine, half)))
    return Need(units, embed=partition.embed == machine, head=partition.head == machine)


class Machine:
    """One process's part of the system. `close` it, or use it as a context manager.

    `profile` is what this machine was measured to do, `emulate` a factor by which it is slower than that, or the
    device whose time it takes instead. `kernels` multiply weights by few rows; raises RequestError for those it lacks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: Dtype = Dtype.FP32,
        weights: Weights = Weights.FULL,
        threads: int = 1,
        memory_bytes: int | None = None,
        emulate: float | DeviceSpec | None = None,
        profile: DeviceSpec | None = None,
        kernels: Kernels = Kernels.TORCH,
    ) -> None:
        if profile and isinstance(emulate, DeviceSpec):
            raise RequestError(
                f"a machine that plays {emulate.name} is priced by its figures, not by those of {profile.name}: give "
                "a profile, or a device to emulate, or a profile and a factor"
            )
        self.checkpoint, self.dtype, self.weights, self.threads = checkpoint, dtype, weights, threads
        self.emulate, self.profile, self.kernels = emulate, profile, kernels
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._memory_limit = memory_bytes
        self._resident = Resident(checkpoint, dtype, weights, self.device, kernels)
        self._ready: Need | None = None
        """Held for a fault, beside what is open."""
        self._open: dict[object, _Open] = {}
        """By key, what each open share holds."""
        self._shares: dict[object, Share] = {}
        """By key, those of them that are loaded."""
        self._since_s, self._busy_s = time.monotonic(), 0.0
        self._short: deque[float] = deque(maxlen=200)
        """By how much this machine was slower than the one it plays."""
        self.clock = StepClock()
        """How long steps take here; told by those who know what a step is."""
        torch.set_num_threads(threads)
        self._compute = Compute(threads, 2 * self.spec.num_layers, self.clock, self._due)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the piece being computed and end the thread."""
        self._compute.close()

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.architecture.spec

    @property
    def emulated(self) -> str:
        """What is emulated, for records; empty for nothing."""
        if self.emulate is None:
            return ""
        return self.emulate.name if isinstance(self.emulate, DeviceSpec) else f"{self.emulate:g}x slower"

    @property
    def emulation_warning(self) -> str:
        """What to say when it cannot keep up with the device it plays; empty otherwise."""
        if not isinstance(self.emulate, DeviceSpec) or not self._short:
            return ""
        return emulation_warning(self.emulate.name, median(self._short))

    @property
    def joules(self) -> tuple[float | None, str]:
        """What this process has drawn since some moment and who says so: a meter (of the whole machine), or its figures
        and the time it computed; None where neither is there."""
        if (meter := the_meter()) is not None:
            return meter.joules(), meter.name
        if self.figures is None or not (self.figures.decode_w or self.figures.idle_w):
            return None, ""
        busy_s = self._busy_s + self._compute.busy_s
        idle_s = time.monotonic() - self._since_s - busy_s
        return self.figures.decode_w * busy_s + self.figures.idle_w * max(idle_s, 0.0), "modelled"

    @property
    def figures(self) -> DeviceSpec | None:
        """What this machine can do, before `stretch`; None where nobody has measured it."""
        return self.emulate if isinstance(self.emulate, DeviceSpec) else self.profile

    @property
    def stretch(self) -> float:
        """Its compute takes so many times as long as `figures` say."""
        return self.emulate if isinstance(self.emulate, float | int) else 1.0

    @property
    def memory_bytes(self) -> int:
        """Memory for weights and caches: what was allowed, or what is free now plus what is already held."""
        if self._memory_limit is not None:
            return self._memory_limit
        if isinstance(self.emulate, DeviceSpec):
            return int(self.emulate.memory_bytes)
        return available_memory_bytes() + int(sum(self._held(list(self._open.values()))))

    @property
    def free_bytes(self) -> int:
        """Memory that no open share takes."""
        return max(self.memory_bytes - int(sum(self._held(list(self._open.values())))), 0)

    @property
    def queue_s(self) -> float:
        """Seconds of work that waits for the compute thread: decode steps, which are one batch, and rows of prompts."""
        return self.clock.queue_s(self._compute.waiting_rows)

    @property
    def batches(self) -> Mapping[int, int]:
        """Iterations on the compute thread so far, by how many sessions decoded in them."""
        return self._compute.batches

    def _held(self, shares: Sequence[_Open]) -> tuple[float, int]:
        """Bytes of weights (slices that shares have in common count once) and of caches."""
        pieces = {piece for one in shares for piece in one.need.units}
        embed, head = any(one.need.embed for one in shares), any(one.need.head for one in shares)
        weights = cost.weight_bytes(self.spec, pieces, embed, head, self.dtype, self.weights)
        caches = {
            (one.owner, half, units): one.capacity * self.spec.kv_bytes_per_position(len(units), self.dtype)
            for one in shares
            for half, units in one.need.units
            if half % 2 == 0
        }
        return weights, sum(caches.values())

    def _check_fits(self, name: str, wanted: _Open) -> None:
        """Raise MemoryTooSmall, with the sizes, unless one more share fits beside the open ones. What is only kept
        ready counts for nothing: `_load` lets go of it first."""
        weights, cache = self._held([*self._open.values(), wanted])
        if weights + cache > self.memory_bytes:
            count = len({one.owner for one in self._open.values()} - {wanted.owner})
            others = f" together with {count} other sessions" if count else ""
            own = [one for one in self._open.values() if one.owner == wanted.owner]
            would_fit = bool(count) and sum(self._held([*own, wanted])) <= self.memory_bytes
            raise MemoryTooSmall(
                f"{name} would hold {show_bytes(weights)} of weights ({self.dtype}, {self.weights}) and "
                f"{show_bytes(cache)} of cache{others}, and may count on {show_bytes(self.memory_bytes)}; "
                + (f"try again in {RETRY_S:g} s, " if would_fit else "")
                + "give it fewer layers, or start it with --weights int8 or int4, or with more --memory",
                RETRY_S if would_fit else None,
            )

    async def open_share(
        self, key: object, name: str, partition: Partition, number: int, capacity: int, owner: object = None
    ) -> Share:
        """Load what machine `number` needs (once) and make a session's share of it; `release` it by its key. Another
        share of the same `owner` may take over its caches.

        Slices that no open share needs are forgotten first. Raises MemoryTooSmall before loading, ModelError.
        """
        need = need_of(partition, number)
        wanted = _Open(need, capacity, owner or key)
        self._check_fits(name, wanted)
        self._open[key] = wanted
        try:
            share = self._shares[key] = (await self.compute(lambda: self._load(need, capacity))).value
        except BaseException as error:
            self.release(key)
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                raise MemoryTooSmall(f"{name} has no memory for its part: {error}; give it fewer layers") from error
            raise
        return share

    async def keep_ready(self, partition: Partition, number: int) -> None:
        """Load what machine `number` would need, piece by piece and slowly, beside whatever is computed, and keep it
        for as long as nobody else needs the room. Raises MemoryTooSmall, ModelError."""
        need = need_of(partition, number)
        if self._ready == need:
            return
        wanted = _Open(need, 0, None)
        self._check_fits("", wanted)
        for unit in need.units:
            await asyncio.sleep(READYING_S)
            await self.compute(partial(self._resident.load, Need((unit,), embed=False, head=False)))
        await self.compute(lambda: self._resident.load(need))
        self._ready = need

    def fits(self, partition: Partition, number: int, capacity: int, owner: object = None) -> bool:
        """Whether a share (of an owner) would fit beside the open ones."""
        try:
            self._check_fits("", _Open(need_of(partition, number), capacity, owner or object()))
        except MemoryTooSmall:
            return False
        return True

    def _load(self, need: Need, capacity: int) -> Share:
        shares = list(self._open.values())
        if self._ready is not None:
            held = self._held([*shares, _Open(self._ready, 0, None)])
            self._ready = self._ready if sum(held) <= self.memory_bytes else None
        self._resident.keep_only([*(one.need for one in shares), *([self._ready] if self._ready else [])])
        if len(self._open) == 1:
            reset_peak_memory()
        self._resident.load(need)
        return Share(self._resident, need, capacity)

    def release(self, key: object) -> None:
        """The share is over; its slices stay until the next one opens, in case it needs them."""
        self._open.pop(key, None)
        if (share := self._shares.pop(key, None)) is not None:
            self._compute.forget(share)

    async def settle(self) -> None:
        """Return when nothing is computed any more that was given up before, and all other work handed in so far is
        done; prompts of others may still have turns to come."""
        await self.compute(lambda: None)

    async def run(self, piece: Piece[T], here: bool = False) -> Computed[T]:
        """Compute a step's halves together with whatever other sessions want of this machine; an emulated one takes
        the batch's time.

        `here` asks for this thread instead, which spares a session that is alone two thread switches, about 0.3 ms
        when the caches are full of weights. Who is cancelled while it waits leaves the batch as it is.
        """
        if here and not piece.is_prefill and self.emulate is None and (done := self._compute.alone(piece)) is not None:
            return done
        job = self._compute.submit(piece)
        try:
            return await asyncio.wrap_future(job.result)
        except asyncio.CancelledError:
            job.gone.set()
            raise

    async def compute(
        self, work: Callable[[], T], predicted: Callable[[DeviceSpec], float] | None = None, here: Share | None = None
    ) -> Computed[T]:
        """Run `work` on the compute thread, between two iterations. Where `predicted` is given, it is (a part of) a
        step, and an emulated machine sleeps on until the time its device would have taken is up. `here`, the share it
        is a step of, asks for this thread, as in `run`."""
        if here is not None and self.emulate is None and self._compute.is_quiet(here):
            return self._timed(work, None)
        call = self._compute.call(partial(self._timed, work, predicted), again=predicted is None)
        return await asyncio.wrap_future(call)

    def _timed(self, work: Callable[[], T], predicted: Callable[[DeviceSpec], float] | None) -> Computed[T]:
        start_s = time.monotonic()
        with torch.inference_mode():
            result = work()
        if predicted is not None:
            time.sleep(max(self._through(start_s, predicted) - time.monotonic(), 0.0))
        stop_s = time.monotonic()
        self._busy_s += stop_s - start_s
        return Computed(result, start_s, stop_s)

    def _due(self, start_s: float, batch: Sequence[Rows]) -> float:
        """When it is through with a batch, or a part of a prompt's turn: weights are paid once, keys and values by
        each session."""
        return self._through(
            start_s, lambda device: cost.batch_seconds(self.spec, Host(device, self.dtype, self.weights), batch)
        )

    def _through(self, start_s: float, predicted: Callable[[DeviceSpec], float]) -> float:
        """When what is emulated has done what began then (monotonic clock): not before now."""
        now_s = time.monotonic()
        if self.emulate is None:
            return now_s
        took = now_s - start_s
        due = predicted(self.emulate) if isinstance(self.emulate, DeviceSpec) else took * self.stretch
        if due > 0:
            self._short.append(took / due)
        return start_s + max(took, due)
