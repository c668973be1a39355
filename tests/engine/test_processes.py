"""Between real processes over gRPC: bit for bit what one process says, and sessions that do not see each other.

All of them have the kernels that commands take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.processes import worker
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.walk import GREEDY, NO_LOSS
from splitwise_llm.model.checkpoint import locate
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.spec import Kernels
from splitwise_llm.wire.codec import ElementLoss

pytestmark = pytest.mark.usefixtures("forks")
PROMPT = "It was a bright morning, and the Prince said to his old friend:"
SAMPLING = Sampling(temperature=0.9, top_k=100, seed=11)


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with worker("bundled") as cloud, worker("bundled") as third:
        yield {"cloud": cloud.address, "third": third.address}


async def logits_and_tokens(edge: Edge, decision: Decision, loss: ElementLoss) -> tuple[list[Tensor], tuple[int, ...]]:
    seen: list[Tensor] = []

    def choose(logits: Tensor, position: int) -> int:
        seen.append(logits.clone())
        return sample(logits, SAMPLING, position)

    mine = choose if decision.partition.head == 0 else None
    async with edge.generate(
        PROMPT, decision, max_new_tokens=12, sampling=SAMPLING, stop_ids=(), loss=loss, choose=mine
    ) as generation:
        async for _ in generation:
            pass
    return seen, generation.record.token_ids


@pytest.mark.parametrize("direct", [(), (("cloud", "third"),)])
@pytest.mark.parametrize("wire", [WirePrecision.FP32, WirePrecision.INT8])
def test_workers_with_a_link_of_their_own_spare_the_device_the_relay(
    direct: tuple[tuple[str, str], ...], wire: WirePrecision, addresses: dict[str, str]
) -> None:
    async def play() -> None:
        with edge_with("bundled", addresses, direct=direct, kernels=Kernels.AUTO) as edge:
            decision = Decision(edge.partition("edge[0:2] cloud[2:4] third[4:6] cloud+third[6:8] head=edge"), wire)
            real = await logits_and_tokens(edge, decision, NO_LOSS)
            async with edge.generate(PROMPT, decision, max_new_tokens=4, stop_ids=()) as generation:
                async for _ in generation:
                    pass
        relayed = {(c.src, c.dst) for c in generation.record.crossings if c.kind == "residual" and c.after == 1}
        assert relayed == ({(1, 2)} if direct else {(1, 0), (0, 2)})
        assert generation.record.round_trips_per_token == generation.plan.round_trips_per_token
        async with in_process(locate("bundled"), direct=direct, kernels=Kernels.AUTO) as edge:
            alone = await logits_and_tokens(edge, decision, NO_LOSS)
        assert real[1] == alone[1]
        assert all(torch.equal(a, b) for a, b in zip(real[0], alone[0], strict=True))

    asyncio.run(play())


@pytest.mark.parametrize("wire", WirePrecision)
@pytest.mark.parametrize(
    "text",
    [
        "all:cloud",
        "edge[0:4] cloud[4:8]",
        "edge[0:1.5] cloud[1.5:4] third[4:6.5] edge[6.5:8]",
        "edge+cloud+third[0:8]",
        "edge[0:2] cloud+third[2:6] edge[6:8]",
        "cloud[0:3] edge+third[3](kv=edge:1,third:0,third:2-3 ffn=edge:0-3,third:4-7) third[4:8] head=edge",
    ],
)
def test_processes_equal_one_process_to_the_bit(text: str, wire: WirePrecision, addresses: dict[str, str]) -> None:
    async def play() -> None:
        loss = ElementLoss(0.02, seed=4)
        with edge_with("bundled", addresses, kernels=Kernels.AUTO) as edge:
            decision = Decision(edge.partition(text), wire, prefill_chunk=7)
            real = await logits_and_tokens(edge, decision, loss)
        async with in_process(locate("bundled"), kernels=Kernels.AUTO) as edge:
            alone = await logits_and_tokens(edge, decision, loss)
        assert real[1] == alone[1]
        assert len(real[0]) == len(alone[0])
        assert all(torch.equal(a, b) for a, b in zip(real[0], alone[0], strict=True))

    asyncio.run(play())


def test_sessions_at_the_same_time_do_not_see_each_other(addresses: dict[str, str]) -> None:
    texts = [
        "all:cloud",
        "edge[0:4] cloud[4:8]",
        "edge[0:2] cloud[2:6] edge[6:8]",
        "edge+cloud[0:8]",
        "third+cloud[0:8]",
    ]
    prompts = [f"{PROMPT} number {n}" for n in range(8)]

    async def answer(edge: Edge, prompt: str, partition: str) -> tuple[int, ...]:
        async with edge.generate(prompt, partition, max_new_tokens=16, sampling=GREEDY, stop_ids=()) as generation:
            async for _ in generation:
                pass
        return generation.record.token_ids

    async def play() -> None:
        with edge_with("bundled", addresses, kernels=Kernels.AUTO) as edge:
            jobs = [(prompt, texts[n % len(texts)]) for n, prompt in enumerate(prompts)]
            together = await asyncio.gather(*(answer(edge, *job) for job in jobs))
            one_by_one = [await answer(edge, *job) for job in jobs]
            assert together == one_by_one
            assert len(set(together)) > 4

    asyncio.run(play())


def test_a_generation_that_is_given_up_leaves_the_worker_free(addresses: dict[str, str]) -> None:
    async def play() -> None:
        with edge_with("bundled", addresses, kernels=Kernels.AUTO) as edge:
            for _ in range(20):  # more than the worker's session limit
                async with edge.generate(PROMPT, "all:cloud", max_new_tokens=900, stop_ids=()) as generation:
                    async for _token in generation:
                        break

    asyncio.run(play())
