"""How close a split comes to what the link allows: compute, plus round trips times RTT, plus bytes over rate; and how
close a long prompt comes to the slowest of device, link and cloud."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from splitwise_llm import plan as plans
from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.overhead import NO_WORDS, PROMPT, Tell
from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.cost import default_chunk
from splitwise_llm.decision import Decision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Plan
from splitwise_llm.spec import ModelSpec
from splitwise_llm.units import parse_rate, parse_seconds

RTT, RATE = "20ms", "20mbit"
LONG_PROMPT = [token * 7919 % 32000 for token in range(1000)]
LONG_ROUNDS = 5


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


def ttft_bound_s(plan: Plan, prompt_tokens: int, device_s: float, cloud_s: float) -> float:
    """The least a split takes until its first token: what the slowest of device, uplink, cloud and downlink does with
    the whole prompt, and the way of one chunk through the other three, latency included. `device_s` and `cloud_s`: what
    each computes for its part."""
    sent = {DEVICE: 0, 1: 0}
    for one in plan.traffic(prompt_tokens, 1):
        sent[one.src] += one.payload_bytes
    stations = [device_s, cloud_s, *(size / parse_rate(RATE) for size in sent.values())]
    rest = sum(stations) - max(stations)
    return max(stations) + rest / plan.decision.num_chunks(prompt_tokens) + parse_seconds(RTT)


async def run_link(rounds: int, tokens: int, tell: Tell) -> Figures:
    """`over_bound_cut`, `over_bound_u` and `over_bound_cloud`; TTFT apart, and `ttft_over_bound` of a long prompt."""
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
            await _measure_prefill(result, edge, min(rounds, LONG_ROUNDS), tell)
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


async def _measure_prefill(result: Figures, edge: Edge, rounds: int, tell: Tell) -> None:
    """`ttft_over_bound`: a U-shape in the chunks of `--partition`, over `ttft_bound_s` of what each machine takes alone
    for its half of the model. `ttft_over_busy_bound`: over that of what they computed in the same run, for on one
    computer two machines that compute at the same time slow each other down."""
    spec, prompt = edge.machine.spec, len(LONG_PROMPT)
    partitions = link_partitions(spec)
    decision = Decision(partitions["u"])
    decision = replace(decision, prefill_chunk=default_chunk(decision, prompt))
    plan = plans.compile(decision, spec, 2)
    busy: list[float] = []

    async def once(name: str) -> float:
        one = replace(decision, partition=partitions[name])
        async with edge.generate(LONG_PROMPT, one, max_new_tokens=1, stop_ids=()) as generation:
            async for _ in generation:
                pass
        record = generation.record
        if name == "u":
            seconds = [sum(each.stop_s - each.start_s for each in machine.intervals) for machine in record.machines]
            busy.append(ttft_bound_s(plan, prompt, *seconds))
        return record.ttft_s

    names = ("unsplit", "u", "cloud")
    times = await interleaved({name: partial(once, name) for name in names}, rounds, tell)
    alone = zip(times["unsplit"], times["cloud"], strict=True)
    bounds = [ttft_bound_s(plan, prompt, here / 2, (there - parse_seconds(RTT)) / 2) for here, there in alone]
    chunk = f"{prompt} tokens, chunks of {decision.prefill_chunk}"
    result.add_median("ttft_over_bound", ratios(times["u"], bounds), chunk)
    result.add_median("ttft_over_busy_bound", ratios(times["u"], busy[1:]), chunk)  # the first round is thrown away
    result.add_median("long_u_ttft_s", times["u"], chunk)
    result.add_median("long_bound_s", bounds, "the slowest of device, link and cloud, and one chunk's way")
