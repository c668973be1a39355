"""Rules that a whole run does not show: copies of the stream stay equal, nobody speaks for another machine, and each
run has its own letter box."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from splitwise_llm import plan as plans
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.failover import Failover
from splitwise_llm.engine.machine import need_of
from splitwise_llm.engine.post import Extent, Office, Post
from splitwise_llm.errors import LinkDied, ProtocolError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Kind
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
        links = {machine: near for machine, (near, _) in pairs.items()}
        box = Post(0, plan, Extent(7, 0, 1, 2), links, NAMES)
        payload = bytes(256)
        header = Data(7, 1, 1, "residual", 1, 2, 0, "fp32", 1, 64)
        frame = pack(header, payload)
        await box.accept(header, memoryview(payload), frame, speaker)
        await box.accept(header, memoryview(payload), frame, speaker)
        await pairs[2][0].close()
        assert await pairs[2][1].receive() == frame, "relayed as it came"
        assert await pairs[2][1].receive() is None, "and once"
        assert [(c.src, c.dst, c.count) for c in box.crossings] == [(0, 2, 1)]

    asyncio.run(play(1))
    with pytest.raises(ProtocolError, match="not come by way of machine 2"):
        asyncio.run(play(2))


def test_what_is_late_finds_no_box_and_what_is_early_waits_for_its_own(tiny: Callable[[str], Path]) -> None:
    spec = Checkpoint(tiny("llama")).architecture.spec
    plan = plans.compile(Decision(Partition.cut(spec, 2)), spec, 2)
    (move,) = (one for one in plan.moves if one.kind is Kind.RESIDUAL)

    def frame(run: int) -> tuple[Data, memoryview, bytes, int]:
        payload = bytes([run]) * 256
        header = Data(run, 0, 0, "residual", 0, 1, 0, "fp32", 1, 64)
        return header, memoryview(payload), pack(header, payload), 0

    async def play() -> None:
        office, boxes = Office(), {run: Post(1, plan, Extent(run, 0, 1, 2), {}, NAMES) for run in (1, 2, 4)}
        await office.open(boxes[1])
        for run in (2, 3, 4):
            await office.accept(*frame(run))
        office.close(1)
        await office.accept(*frame(1))
        assert office.late == 1
        await office.open(boxes[2])
        assert bytes((await boxes[2].receive(move, 0)).payload) == bytes([2]) * 256
        await office.open(boxes[4])  # run 3 is never begun
        assert office.late == 2
        await office.accept(*frame(3))
        assert office.late == 3
        assert bytes((await boxes[4].receive(move, 0)).payload) == bytes([4]) * 256
        office.fail(LinkDied("gone"), run=2)
        with pytest.raises(LinkDied):
            await boxes[2].receive(move, 1)
        waiting = asyncio.ensure_future(boxes[4].receive(move, 1))
        await asyncio.sleep(0)
        assert not waiting.done(), "what has failed in one run has not in another"
        office.fail(LinkDied("gone"))
        with pytest.raises(LinkDied):
            await waiting

    asyncio.run(play())


# Dies when engine/failover.py says `None and True` for `None and not self.down(fallback.partition)`.
def test_without_patience_a_machine_that_is_just_coming_back_is_waited_for_and_the_event_loop_is_not_kept_busy(
    tiny: Callable[[str], Path],
) -> None:
    """Its link was there, its session was not open yet: the fallback was the same partition, which was tried and failed
    for ever, so that nobody heard that the session was open."""
    spec = Checkpoint(tiny("llama")).architecture.spec
    decision = Decision(Partition.parse("edge[0:2] cloud[2:4]", spec, NAMES), patience=0.0)
    cloud = SimpleNamespace(is_up=False, link=object(), refusal=None, is_gone=False, wait=print, elsewhere=print)
    fake: Any = SimpleNamespace(ids=[1], held=None, context=0, move_s=lambda *_: 1.0)

    async def fallback(*_: object) -> Decision:
        return decision

    fake.fallback = fallback
    placement: Any = SimpleNamespace(decision=decision, admitted=None)
    peers: Any = {1: cloud}
    failover = Failover(
        NAMES, RecoveryRules(), fake, peers, fake, fake, fake, lambda *_: None, lambda: placement
    )  # fmt: skip

    async def play() -> None:
        recovering = asyncio.create_task(failover.recover(LinkDied("it was reset")))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not recovering.done()
        cloud.is_up = True
        failover.asked(1, "back")
        assert await recovering == decision

    asyncio.run(asyncio.wait_for(play(), 5))
