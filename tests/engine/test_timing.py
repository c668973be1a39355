"""Time where it is the point: chunks overlap with the transfer, emulated machines take the time they should."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.cost import Host, stage_seconds
from splitwise_llm.decision import Decision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

PROMPT = list(range(500, 660))


async def finished(edge: Edge, decision: Decision, tokens: int = 2) -> RequestRecord:
    async with edge.generate(PROMPT, decision, max_new_tokens=tokens, stop_ids=()) as generation:
        async for _ in generation:
            pass
    return generation.record


def test_chunks_go_up_while_earlier_ones_come_down() -> None:
    async def play() -> None:
        async with in_process(locate("bundled"), ("cloud",)) as plain:

            async def slow(name: str) -> Link:
                return ShapedLink(await plain._device.connect(name), LinkShape.parse("rtt=20ms rate=2mbit"))

            edge = Edge(plain.machine, ("cloud",), slow)
            partition = Partition.u_shape(edge.machine.spec, 2, 2)
            whole = await finished(edge, Decision(partition))
            chunked = await finished(edge, Decision(partition, prefill_chunk=20))
        one_way = whole.up_bytes / 250_000
        assert whole.up_bytes == chunked.up_bytes
        assert whole.ttft_s > 2 * one_way
        assert chunked.ttft_s < 0.75 * whole.ttft_s

    asyncio.run(play())


def test_a_factor_stretches_every_computation(tiny: Callable[[str], Path]) -> None:
    async def times(factor: float | None) -> float:
        with Machine(Checkpoint(locate("bundled")), emulate=factor) as machine:
            record = await finished(Edge(machine), Decision(Partition.all_on(machine.spec, 0)), 12)
        assert record.is_emulated == (factor is not None)
        return min(i.stop_s - i.start_s for i in record.machines[0].intervals)

    assert asyncio.run(times(8.0)) > 4 * asyncio.run(times(None))


@pytest.mark.parametrize("text", ["all:edge", "edge[0:8] embed=edge"])
def test_an_emulated_device_takes_the_time_its_roofline_predicts(text: str) -> None:
    device = DeviceSpec("slow", flop_per_s=2e9, memory_bytes_per_s=4e8, memory_bytes=1e9, launch_s=1e-3)

    async def play() -> None:
        with Machine(Checkpoint(locate("bundled")), emulate=device) as machine:
            edge = Edge(machine)
            async with edge.generate(PROMPT, text, max_new_tokens=6, stop_ids=()) as generation:
                async for _ in generation:
                    pass
            (me,) = generation.record.machines
            assert me.emulated == "slow"
            plan = generation.plan
            for interval in me.intervals:
                step = plan.step(interval.step, len(PROMPT))
                due = stage_seconds(machine.spec, Host(device, Dtype.FP32), plan.stages[0], 0, step)
                assert due <= interval.stop_s - interval.start_s < due + 0.05
            # 16 sub-blocks and the head, 1 ms of launch each, and 23 MB at 400 MB/s, per token.
            assert generation.record.tpot_s == pytest.approx(0.017 + 23.1e6 / 4e8, rel=0.15)

    asyncio.run(play())


def test_work_that_nobody_waits_for_any_more_still_counts_as_work(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            given_up = asyncio.create_task(machine.compute(lambda: time.sleep(0.3)))
            await asyncio.sleep(0.05)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            beside = await machine.compute(threading.current_thread, here=True)
            assert beside.value.name.startswith("compute")
            after = await machine.compute(threading.current_thread, here=True)
            assert after.value is threading.current_thread()

    asyncio.run(play())
