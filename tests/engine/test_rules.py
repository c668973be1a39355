"""Two rules a whole run does not show: copies of the stream stay equal, and nobody speaks for another machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitwise_llm import plan as plans
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.machine import need_of
from splitwise_llm.engine.post import Post
from splitwise_llm.errors import ProtocolError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire.codec import round_trip
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.messages import Data, pack

PROMPT = [17, 3, 99, 54, 180]
NAMES = ("edge", "cloud", "third")


@pytest.mark.parametrize("wire", [WirePrecision.FP16, WirePrecision.INT8, WirePrecision.INT4])
def test_whoever_keeps_what_also_travels_keeps_what_the_others_decode(
    wire: WirePrecision, tiny: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    spec = checkpoint.architecture.spec
    partition = Partition.parse("edge[0:1] edge+cloud[1] edge[2:4]", spec, NAMES)
    resident = Resident(checkpoint, Dtype.FP32, Weights.FULL, torch.device("cpu"))
    edge, cloud = (Share(resident, need_of(partition, machine), len(PROMPT) + 1) for machine in (0, 1))
    at = edge.positions(0, len(PROMPT))
    with torch.inference_mode():
        x = round_trip(edge.run(edge.embed(PROMPT, at), 0, 2, at), wire)  # it goes to the cloud and stays here
        for half in (2, 3):
            x = edge.join(x, [round_trip(share.partial(x, half, at), wire) for share in (edge, cloud)], half)
        expected = edge.logits(edge.run(x, 4, 8, at))
    seen: list[Tensor] = []

    def choose(logits: Tensor, _: int) -> int:
        seen.append(logits.clone())
        return 0

    async def play() -> None:
        async with (
            in_process(tiny("llama")) as device,
            device.generate(
                PROMPT, Decision(partition, wire), max_new_tokens=1, stop_ids=(), choose=choose
            ) as generation,
        ):
            async for _ in generation:
                pass

    asyncio.run(play())
    assert torch.equal(seen[0], expected)


def test_a_message_must_come_from_its_sender_or_by_its_way(tiny: Callable[[str], Path]) -> None:
    spec = Checkpoint(tiny("llama")).architecture.spec
    partition = Partition.parse("edge[0:1] cloud[1:2] third[2:4]", spec, NAMES)
    plan = plans.compile(Decision(partition), spec, 3)

    async def play(speaker: int) -> None:
        pairs = {machine: memory_pair() for machine in (1, 2)}
        post = Post(0, plan, {machine: near for machine, (near, _) in pairs.items()}, NAMES, 1, 2)
        frame = pack(Data(0, 1, "residual", 1, 2, 0, "fp32", 1, 64), bytes(256))
        await pairs[speaker][1].send(frame)
        await pairs[speaker][1].close()
        await post.pump(speaker)
        assert await pairs[2][1].receive() == frame, "relayed as it came"

    asyncio.run(play(1))
    with pytest.raises(ProtocolError, match="not come by way of machine 2"):
        asyncio.run(play(2))
