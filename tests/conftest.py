"""What every test may use: small models of each family, and machines that live in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from splitwise_llm.bench.random_models import TINY, make_model
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair

settings.register_profile("splitwise", deadline=None, derandomize=True)
settings.load_profile("splitwise")
torch.set_num_threads(1)

BUNDLED_TOKENIZER = Path(__file__).parent.parent / "src/splitwise_llm/data/bundled/tokenizer.json"
EXCERPT = Path(__file__).parent / "data" / "excerpt.txt"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small random model, by its name in TINY, with the bundled tokenizer beside it."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            make_model(path, TINY[name], seed=len(name))
            (path / "tokenizer.json").write_bytes(BUNDLED_TOKENIZER.read_bytes())
            made[name] = path
        return made[name]

    return directory


@asynccontextmanager
async def in_process(
    directory: Path,
    workers: Sequence[str] = ("cloud", "third"),
    dtype: Dtype = Dtype.FP32,
    weights: Weights = Weights.FULL,
    wrap: Mapping[str, Callable[[Link], Link]] | None = None,
) -> AsyncIterator[Edge]:
    """A device and workers in this process, joined by in-memory links: the one-process run of any plan."""
    checkpoint = Checkpoint(directory)
    serving: set[asyncio.Task[None]] = set()
    with Machine(checkpoint, dtype=dtype, weights=weights) as device:
        async with AsyncExitStack() as stack:
            machines = {
                name: stack.enter_context(Machine(checkpoint, dtype=dtype, weights=weights)) for name in workers
            }
            served = {name: Worker(machine) for name, machine in machines.items()}

            async def connect(name: str) -> Link:
                near, far = memory_pair(("device", name))

                async def serve() -> None:
                    await served[name].handle(far)
                    await far.close()

                task = asyncio.create_task(serve())
                serving.add(task)
                task.add_done_callback(serving.discard)
                return wrap[name](near) if wrap and name in wrap else near

            yield Edge(device, workers, connect)
            await asyncio.gather(*serving)
