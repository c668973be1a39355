"""A machine: resident weights, and computing for any number of sessions, one piece at a time.

It does not know about links; sessions bring it work and wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from splitwise_llm import cost
from splitwise_llm.engine.memory import available_memory_bytes, reset_peak_memory
from splitwise_llm.errors import MemoryTooSmall, RequestError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Need, Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, Dtype, ModelSpec, Weights
from splitwise_llm.units import show_bytes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Computed(Generic[T]):
    """A result, and when it was worked on (s, monotonic clock)."""

    value: T
    start_s: float
    stop_s: float


def need_of(partition: Partition, machine: int) -> Need:
    """What a machine must hold for a partition."""
    halves = range(2 * len(partition.layers))
    units = tuple((half, mine) for half in halves if (mine := partition.units_on(machine, half)))
    return Need(units, embed=partition.embed == machine, head=partition.head == machine)


class Machine:
    """One process's part of the system. `close` it, or use it as a context manager.

    `profile` is what this machine was measured to do, `emulate` a factor by which it is slower than that, or the
    device whose time it takes instead.
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
    ) -> None:
        if profile and isinstance(emulate, DeviceSpec):
            raise RequestError(
                f"a machine that plays {emulate.name} is priced by its figures, not by those of {profile.name}: give "
                "a profile, or a device to emulate, or a profile and a factor"
            )
        self.checkpoint, self.dtype, self.weights, self.threads = checkpoint, dtype, weights, threads
        self.emulate, self.profile = emulate, profile
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._memory_limit = memory_bytes
        self._resident = Resident(checkpoint, dtype, weights, self.device)
        self._open: dict[object, tuple[Need, int]] = {}
        """What each open session needs: slices, and bytes of cache."""
        self._pending: set[Future[Any]] = set()
        torch.set_num_threads(threads)
        # One thread: sessions queue for the processor instead of fighting over it, and the event loop stays free.
        self._executor = ThreadPoolExecutor(1, "compute", initializer=torch.set_num_threads, initargs=(threads,))

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the piece being computed and end the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

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

    def _held(self, sessions: Sequence[tuple[Need, int]]) -> tuple[float, int]:
        """Bytes of weights (slices that sessions share count once) and of caches."""
        pieces = {piece for need, _ in sessions for piece in need.units}
        embed, head = any(need.embed for need, _ in sessions), any(need.head for need, _ in sessions)
        weights = cost.weight_bytes(self.spec, pieces, embed, head, self.dtype, self.weights)
        return weights, sum(cache for _, cache in sessions)

    def _check_fits(self, name: str, wanted: tuple[Need, int]) -> None:
        """Raise MemoryTooSmall, with the sizes, unless one more session fits beside the open ones."""
        weights, cache = self._held([*self._open.values(), wanted])
        if weights + cache > self.memory_bytes:
            others = f" together with {len(self._open)} open sessions" if self._open else ""
            raise MemoryTooSmall(
                f"{name} would hold {show_bytes(weights)} of weights ({self.dtype}, {self.weights}) and "
                f"{show_bytes(cache)} of cache{others}, and has {show_bytes(self.memory_bytes)}; give it fewer layers, "
                "or start it with --weights int8 or int4"
            )

    async def open_share(self, key: object, name: str, partition: Partition, number: int, capacity: int) -> Share:
        """Load what machine `number` needs (once) and make a session's share of it; `release` it by its key.

        Slices that no open session needs are forgotten first. Raises MemoryTooSmall before loading, ModelError.
        """
        need = need_of(partition, number)
        wanted = (need, cost.assigned_kv_bytes(self.spec, partition, number, self.dtype, capacity))
        self._check_fits(name, wanted)
        self._open[key] = wanted
        try:
            return (await self.compute(lambda: self._load(need, capacity))).value
        except BaseException:
            self.release(key)
            raise

    def _load(self, need: Need, capacity: int) -> Share:
        self._resident.keep_only(need for need, _ in list(self._open.values()))
        if len(self._open) == 1:
            reset_peak_memory()
        self._resident.load(need)
        return Share(self._resident, need, capacity)

    def release(self, key: object) -> None:
        """The session is over; its slices stay until the next session opens, in case it needs them."""
        self._open.pop(key, None)

    async def compute(
        self, work: Callable[[], T], predicted: Callable[[DeviceSpec], float] | None = None, here: bool = False
    ) -> Computed[T]:
        """Run `work` on the compute thread. Where `predicted` is given, an emulated machine sleeps on until the
        time its device would have taken is up.

        `here` asks for this thread instead, which spares two thread switches, about 0.3 ms when the caches are
        full of weights; granted when nothing is being computed or emulated.
        """
        busy = self._is_busy()  # asked every time: it also lets go of what is done
        if here and self.emulate is None and not busy:
            return self._run(work, None)
        future = self._executor.submit(self._run, work, predicted)
        self._pending.add(future)
        return await asyncio.wrap_future(future)

    def _is_busy(self) -> bool:
        """Whether the thread has work, though whoever waited for it may have been cancelled."""
        self._pending = {future for future in self._pending if not future.done()}
        return bool(self._pending)

    def _run(self, work: Callable[[], T], predicted: Callable[[DeviceSpec], float] | None) -> Computed[T]:
        start = time.monotonic()
        with torch.inference_mode():
            result = work()
        if self.emulate is not None and predicted is not None:
            took = time.monotonic() - start
            due = predicted(self.emulate) if isinstance(self.emulate, DeviceSpec) else took * self.emulate
            time.sleep(max(0.0, due - took))
        return Computed(result, start, time.monotonic())
