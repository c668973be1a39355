"""How close a split comes to what the link allows: compute, plus round trips times RTT, plus bytes over rate; and how
close a long prompt comes to the slowest of device, link and cloud."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from splitwise_llm import plan as plans
from splitwise_llm.bench.figures import Figures, interleaved
from splitwise_llm.bench.overhead import NO_WORDS, PROMPT, Tell
from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.cost import default_chunk
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import ModelSpec
from splitwise_llm.units import parse_rate, parse_seconds

RTT, RATE = "20ms", "20mbit"
LONG_PROMPT = 1000


def link_partitions(spec: ModelSpec) -> dict[str, Partition]:
    """The modes whose bounds are measured, the unsplit one for its compute."""
    layers = spec.num_layers
    return {
        "unsplit": Partition.all_on(spec, 0),
        "cut": Partition.cut(spec, layers / 2),
        "u": Partition.u_shape(spec, layers // 4, layers // 4),
        "cloud": Partition.all_on(spec, 1),
    }


def network_s_per_token(spec: ModelSpec, partition: Partition) -> float:
    """The least the network adds per token: round trips times RTT plus the payload over the rate."""
    plan = plans.compile(Decision(partition), spec, 2)
    one, two = (sum(c.payload_bytes for c in plan.traffic(len(PROMPT), out)) for out in (2, 3))
    return plan.round_trips_per_token * parse_seconds(RTT) + (two - one) / parse_rate(RATE)


async def run_link(rounds: int, tokens: int, tell: Tell) -> Figures:
    """`over_bound_cut`, `over_bound_u` and `over_bound_cloud`; TTFT apart."""
    settings: dict[str, object] = {"rounds": rounds, "tokens": tokens, "rtt": RTT, "rate": RATE}
    result = Figures("link", settings | {"threads_per_process": 1})
    torch.set_num_threads(1)
    tell("making a random Llama of the size of GPT-2 small")
    with tempfile.TemporaryDirectory() as place:
        directory = make_model(Path(place), OVERHEAD_LLAMA)
        (directory / "tokenizer.json").write_text(NO_WORDS)
        with (
            worker(str(directory)) as cloud,
            shaped_link(cloud.address, "--rtt", RTT, "--rate", RATE) as link,
            edge_with(str(directory), {"cloud": link.address}) as edge,
        ):
            await _measure(result, edge, rounds, tokens, tell)
            await _prefill(result, edge, rounds, tell)
    return result


async def _measure(result: Figures, edge: Edge, rounds: int, tokens: int, tell: Tell) -> None:
    spec = edge.machine.spec
    partitions = link_partitions(spec)
    ttft: dict[str, list[float]] = {name: [] for name in partitions}

    async def once(name: str) -> float:
        async with edge.generate(PROMPT, partitions[name], max_new_tokens=tokens, stop_ids=()) as generation:
            async for _ in generation:
                pass
        ttft[name].append(generation.record.ttft_s)
        return generation.record.tpot_s

    times = await interleaved({name: partial(once, name) for name in partitions}, rounds, tell)
    for name, partition in partitions.items():
        if name != "unsplit":
            network = network_s_per_token(spec, partition)
            over = [
                measured / (compute + network) for measured, compute in zip(times[name], times["unsplit"], strict=True)
            ]
            result.add_median(f"over_bound_{name}", over)
    for name, values in times.items():
        result.add_median(f"{name}_ms_per_token", [1e3 * value for value in values])
        result.add_median(f"{name}_ttft_ms", [1e3 * value for value in ttft[name][1:]], "prefill, one chunk")


async def _prefill(result: Figures, edge: Edge, rounds: int, tell: Tell) -> None:
    """`ttft_over_bound`: 1,000 tokens there and back (U) in chunks as one's own engine cuts them where nobody has
    measured it, over the slowest of device, each direction of the link, and cloud, plus one chunk's way through the
    others. What machines computed is taken from the same run, as each says it: so that what else the computer does
    counts on both sides."""
    spec = edge.machine.spec
    ids = torch.randint(spec.vocab_size, (LONG_PROMPT,), generator=torch.Generator().manual_seed(7)).tolist()
    partition = link_partitions(spec)["u"]
    for wire in (WirePrecision.FP32, WirePrecision.INT8):
        decision = Decision(partition, prefill_wire=wire)
        chunk = default_chunk(decision, LONG_PROMPT)
        decision = replace(decision, prefill_chunk=chunk)
        over: list[float] = []
        for number in range(rounds + 1):
            tell(f"a prompt of {LONG_PROMPT} tokens in {wire}, round {number} of {rounds}")
            async with edge.generate(ids, decision, max_new_tokens=1, stop_ids=()) as generation:
                async for _ in generation:
                    pass
            if number:
                over.append(generation.record.ttft_s / prefill_bound_s(generation.record, chunk or LONG_PROMPT))
        name = "ttft_over_bound" if wire is WirePrecision.FP32 else f"ttft_over_bound_{wire}"
        result.add_median(name, over, f"{LONG_PROMPT} tokens, U, {wire} on the wire, chunks of {chunk}; bar 1.2")


def prefill_bound_s(record: RequestRecord, chunk: int) -> float:
    """The slowest of the machines and of the link's directions, one chunk's way through the others, a round trip."""
    busy = [_covered_s([(one.start_s, one.stop_s) for one in machine.intervals]) for machine in record.machines]
    stations = [*busy, record.up_bytes / parse_rate(RATE), record.down_bytes / parse_rate(RATE)]
    chunks = -(-record.prompt_tokens // chunk)
    slowest = max(stations)
    return slowest + (sum(stations) - slowest) / chunks + parse_seconds(RTT)


def _covered_s(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds that some spans cover together: pieces take turns, and one that pauses is not being computed."""
    covered, until = 0.0, -math.inf
    for start, stop in sorted(spans):
        covered += max(stop - max(start, until), 0.0)
        until = max(until, stop)
    return covered
