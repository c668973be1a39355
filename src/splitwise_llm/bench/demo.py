"""The main job in front of your eyes: one prompt, five partitions, two processes, a shaped link, the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the demo runs; `link` is written as for `splitwise link`."""

    model: str
    prompt: str
    max_new_tokens: int
    rtt: str
    rate: str
    threads: int
    wire: WirePrecision
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Show:
    """How the demo speaks to whoever watches."""

    step: Callable[[str], None]
    begin: Callable[[str, Partition], None]
    token: Callable[[str], None]
    end: Callable[[RequestRecord], None]


def demo_partitions(spec: ModelSpec) -> Mapping[str, Partition]:
    """The five ways of a model of any size over the device and one worker, unsplit first."""
    layers = spec.num_layers
    outer = max(1, layers // 4)
    middle = range(layers // 2, layers // 2 + 1)
    return {
        "edge": Partition.all_on(spec, 0),
        "cloud": Partition.all_on(spec, 1),
        "cut": Partition.cut(spec, layers / 2),
        "U": Partition.u_shape(spec, outer, outer),
        "shared": Partition.shared(spec, {0: 1.0, 1: 1.0}, layers=middle),
    }


async def run_demo(options: DemoOptions, show: Show) -> dict[str, RequestRecord]:
    """Run every mode and return its record, the unsplit one first. All processes have ended by then."""
    show.step("starting the cloud worker, a process of its own")
    with worker(options.model, "--threads", str(options.threads)) as cloud:
        show.step(f"putting a link in front of it: {options.rate} each way, RTT {options.rtt}")
        with shaped_link(cloud.address, "--rate", options.rate, "--rtt", options.rtt) as link:
            show.step("loading the model on the device")
            with edge_with(options.model, {"cloud": link.address}, threads=options.threads) as edge:
                return await _run_modes(edge, options, show)


async def _run_modes(edge: Edge, options: DemoOptions, show: Show) -> dict[str, RequestRecord]:
    records: dict[str, RequestRecord] = {}
    for mode, partition in demo_partitions(edge.machine.spec).items():
        show.begin(mode, partition)
        decision = Decision(partition, options.wire)
        async with edge.generate(
            options.prompt, decision, max_new_tokens=options.max_new_tokens, sampling=options.sampling
        ) as generation:
            async for token in generation:
                show.token(token.text)
        records[mode] = generation.record
        show.end(generation.record)
    return records
