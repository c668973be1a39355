"""One request over a recorded link, by whoever decides: real machines, a link entered at any second of its recording,
and what became of it. It compares nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import Floor, Limits
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.profiling import Profiler
from splitwise_llm.engine.roofline import device_figures, peaks
from splitwise_llm.engine.survey import Rates
from splitwise_llm.errors import PeerError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.observation import Always, Observation, Policy
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, LinkSpec
from splitwise_llm.traces import named_trace
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.pacing import LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

LIVE, ALONE = "drift", "all:edge"
NAMES = ("edge", "cloud")
DEEP = "random-24x256"
"""As deep as small language models are, so that what a floor keeps on the device is a small part of them."""
DEEP_LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 24, "hidden_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 2048, "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run. Lengths are drawn evenly from the ranges; seconds."""

    up: str
    """File of the recorded uplink."""
    down: str
    rtt_s: float = 0.05
    model: str = DEEP
    slower: float = 24.0
    """The device plays this machine so many times as slow, by its measured figures; the worker is as fast as it is."""
    floor: str = "1+1"
    """First and last layers that stay on the device; empty: nothing must."""
    requests: int = 50
    prompt_tokens: tuple[int, int] = (16, 128)
    new_tokens: tuple[int, int] = (16, 40)
    seed: int = 1
    profile_s: float = 15.0

    @property
    def limits(self) -> Limits:
        return Limits(Floor.parse(self.floor)) if self.floor else Limits()

    def shape(self) -> LinkShape:
        """The link. Raises SpecError for a file that cannot be read."""
        return LinkShape(named_trace(self.up, "up"), named_trace(self.down, "down"), self.rtt_s / 2)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: a prompt, the length of its answer, and when in the recording it is asked."""

    number: int
    prompt: tuple[int, ...]
    new_tokens: int
    at_s: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """One answer of the policy, and what it was made of. Seconds, bytes/s; ages are None where nothing was measured."""

    at_s: float
    occasion: str
    tokens: int
    decision: str
    moves: bool
    rtt_s: float
    up: float
    down: float
    up_age_s: float | None
    rest_s: float | None
    """Predicted until the last token, as decided."""
    staying_s: float | None
    """The same without moving."""
    took_s: float
    """To decide."""


@dataclass(slots=True)
class Watched:
    """A policy whose decisions are kept with their prices."""

    policy: Policy
    said: list[Chosen] = field(default_factory=list)

    def decide(self, observation: Observation) -> Decision:
        """What the policy decides."""
        begun_s = time.perf_counter()
        decision = self.policy.decide(observation)
        took_s = time.perf_counter() - begun_s
        world, placement = observation.world, observation.placement
        link = world.links[DEVICE, 1] if world else LinkSpec(math.nan, 1.0, 1.0)
        age = observation.ages_s.get((DEVICE, 1))
        rest_s = staying_s = None
        if world and placement:
            running = Running.of(observation)
            rest_s, staying_s = (float(one) for one in running.prices([decision, placement.decision]).total_s)
        up_age_s = age.up_s if age and math.isfinite(age.up_s) else None
        self.said.append(
            Chosen(
                observation.waited_s, str(observation.occasion), placement.tokens_out if placement else 0,
                text(decision), bool(placement and placement.decision != decision), link.rtt_s, link.up_bytes_per_s,
                link.down_bytes_per_s, up_age_s, rest_s, staying_s, took_s,
            )
        )  # fmt: skip
        return decision


def text(decision: Decision) -> str:
    chunk = f", chunks of {decision.prefill_chunk}" if decision.prefill_chunk else ""
    return decision.partition.text(NAMES) + chunk


@dataclass(slots=True)
class Served:
    """One request by one contender. Seconds; what has no worth is empty."""

    contender: str
    number: int
    trace_s: float
    total_s: float
    """From asking to the last token: dialling, greeting and loading included."""
    open_s: float
    ttft_s: float
    identical: bool
    missing: int
    """Tokens that never came."""
    runs: list[tuple[str, str, int, float]]
    """Partition, why, tokens, when."""
    events: list[tuple[float, str, str]]
    decisions: list[Chosen] = field(default_factory=list)
    alone: bool = False
    """The partition could not even begin, and the device answered by itself."""
    foreign: float = 0.0
    """Share of the processors that other programs took meanwhile."""

    @property
    def moves(self) -> int:
        return sum(why == "move" for _, why, _, _ in self.runs)

    @property
    def faults(self) -> int:
        return sum(why == "fault" for _, why, _, _ in self.runs)

    def modes_s(self) -> dict[str, float]:
        """Seconds on the device alone, on the worker alone, on both; `opening` before."""
        total = {"opening": self.open_s, "edge": 0.0, "split": 0.0, "cloud": 0.0}
        ends = [*(at_s for _, _, _, at_s in self.runs[1:]), self.total_s - self.open_s]
        for (text, _, _, at_s), end_s in zip(self.runs, ends, strict=True):
            mode = "edge" if "cloud" not in text else "cloud" if "edge" not in text else "split"
            total[mode] += max(end_s - at_s, 0.0)
        return total


async def measured_figures(model: str, checkpoint: Checkpoint, budget_s: float) -> DeviceSpec:
    """What this machine can do, units and messages measured as `splitwise profile` does."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        machine = stack.enter_context(Machine(checkpoint))
        child = stack.enter_context(worker(model))

        async def reach(name: str) -> Link:
            return await dial(child.address, name=name)

        at_most = await peaks(machine)
        async with await Profiler.fitting(machine, budget_s) as profiler:
            until_s = time.monotonic() + budget_s
            await profiler.round()
            profiler.forget()  # the first touch of everything counts for nothing
            while True:
                await profiler.round()
                if time.monotonic() >= until_s:
                    break
            await profiler.messages(Edge(machine, NAMES[1:], reach), NAMES[1])
            units = profiler.table()
        page = device_figures("this machine", machine, units, at_most, profiler.load_bytes_per_s, None)
        file = Path(place) / "device.json"
        file.write_text(json.dumps(page))
        return DeviceSpec.from_file(file)


def slowed(figures: DeviceSpec, factor: float) -> DeviceSpec:
    """A device that computes so many times as slow; messages take it as long as before, for they are not stretched."""
    return replace(
        figures, name=f"this machine, {factor:g}x slower", flop_per_s=figures.flop_per_s / factor,
        memory_bytes_per_s=figures.memory_bytes_per_s / factor, launch_s=min(figures.launch_s * factor, 1.0),
    )  # fmt: skip


@dataclass
class Course:
    """The machines and the link between, ready to answer."""

    setting: Setting
    shape: LinkShape
    machine: Machine
    address: str
    pids: Sequence[int]

    async def answer(self, asked: Asked, contender: str, policy: Policy) -> tuple[Served, RequestRecord]:
        """One request. A partition that cannot begin because its worker is out of reach falls back on the device, as it
        does in mid-generation; what it waited until then counts."""
        clock = LinkClock(asked.at_s)

        async def reach(name: str) -> Link:
            return ShapedLink(await dial(self.address, name=name), self.shape, clock)

        names = () if contender == ALONE else NAMES[1:]  # alone, it greets nobody
        neighbours, begun_s = Neighbours(self.pids), time.monotonic()
        alone = False
        try:
            edge = Edge(self.machine, names, reach, rates={n: Rates.of_shape(self.shape) for n in names})
            try:
                record, last_s = await self._generate(edge, asked, contender, policy)
            except PeerError:
                if contender == LIVE:
                    raise
                alone = True
                edge = Edge(self.machine)
                own = Always(Decision(Partition.all_on(self.machine.spec, DEVICE), WirePrecision.FP32))
                record, last_s = await self._generate(edge, asked, contender, own)
        finally:
            clock.close()
        total_s = last_s - begun_s
        served = Served(
            contender, asked.number, asked.at_s, total_s, total_s - record.token_times_s[-1], record.ttft_s,
            True, asked.new_tokens - len(record.token_ids),
            [(run.partition, run.why, run.tokens, run.at_s) for run in record.runs if not run.why.startswith("fill")],
            [(event.at_s, event.kind, event.text) for event in record.events], alone=alone,
            foreign=neighbours.share,
        )  # fmt: skip
        return served, record

    async def _generate(
        self, edge: Edge, asked: Asked, contender: str, policy: Policy
    ) -> tuple[RequestRecord, float]:  # fmt: skip
        last_s = math.nan
        async with edge.generate(
            asked.prompt, policy, max_new_tokens=asked.new_tokens, stop_ids=(), called=contender,
            limits=self.setting.limits,
        ) as generation:  # fmt: skip
            async for _ in generation:
                last_s = time.monotonic()
        return generation.record, last_s
