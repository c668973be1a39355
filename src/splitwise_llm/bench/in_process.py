"""A device and its workers in one process: what a run between processes must equal to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.walk import Choose
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.spec import Dtype, Kernels, Weights
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair


@asynccontextmanager
async def in_process(
    directory: str | Path,
    workers: Sequence[str] = ("cloud", "third"),
    dtype: Dtype = Dtype.FP32,
    weights: Weights = Weights.FULL,
    choose: Choose | None = None,
    direct: Iterable[tuple[str, str]] = (),
    kernels: Kernels = Kernels.TORCH,
) -> AsyncIterator[Edge]:
    """The one-process run of any plan: a device and workers joined by in-memory links. `choose` replaces the
    workers' sampling; the device's is an argument of `generate`."""
    checkpoint = Checkpoint(directory)
    serving: set[asyncio.Task[None]] = set()
    with Machine(checkpoint, dtype=dtype, weights=weights, kernels=kernels) as device:
        async with AsyncExitStack() as stack:
            served: dict[str, Worker] = {}

            async def connect(name: str) -> Link:
                near, far = memory_pair(("peer", name))

                async def serve() -> None:
                    await served[name].handle(far)
                    await far.close()

                task = asyncio.create_task(serve())
                serving.add(task)
                task.add_done_callback(serving.discard)
                return near

            for name in workers:
                machine = stack.enter_context(Machine(checkpoint, dtype=dtype, weights=weights, kernels=kernels))
                served[name] = Worker(machine, connect=connect, choose=choose)
            yield Edge(device, workers, connect, {pair: pair[1] for pair in direct})
            await asyncio.gather(*serving)
