"""`bench follow`: does a policy that moves the partition keep up with the best fixed one over a recorded mobile uplink?

Real processes, one shaped link. Request i of n begins at second i/n of the recording, for every contender: so the same
request meets the same link, whoever answers it, and the whole recording is visited. Nothing here knows how a policy
decides, and nothing is chosen by what came out of it, except the best fixed partition, which is so by definition.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from splitwise_llm.bench.cells import resampled
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import Floor, Host, Job, Limits, World, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.profiling import Profiler
from splitwise_llm.engine.roofline import device_figures, peaks
from splitwise_llm.engine.survey import Rates
from splitwise_llm.errors import PeerError, RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Always, Observation, Policy, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.records import Estimate, RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec
from splitwise_llm.traces import RateTrace, named_trace
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.pacing import LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

LIVE, ALONE, STATIC = "drift", "all:edge", "best-static"
NAMES = ("edge", "cloud")
STALL_S = 1.0
"""A link that carries nothing for so long is out."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run. Lengths are drawn evenly from the ranges; seconds."""

    up: str
    """File of the recorded uplink."""
    down: str
    rtt_s: float = 0.05
    model: str = "bundled"
    slower: float = 48.0
    """The device plays this machine so many times as slow, by its measured figures; the worker is as fast as it is."""
    floor: str = "1+1"
    """First and last layers that stay on the device; empty: nothing must."""
    requests: int = 50
    prompt_tokens: tuple[int, int] = (32, 256)
    new_tokens: tuple[int, int] = (16, 64)
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


def draw(setting: Setting, ids: Sequence[int], period_s: float) -> list[Asked]:
    """The requests, the same for the same seed: excerpts of a text, evenly spread over a recording."""
    dice = random.Random(setting.seed)
    found = []
    for number in range(setting.requests):
        count = dice.randint(*setting.prompt_tokens)
        start = dice.randrange(len(ids) - count)
        tokens = dice.randint(*setting.new_tokens)
        found.append(Asked(number, tuple(ids[start : start + count]), tokens, period_s * number / setting.requests))
    return found


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
                _text(decision), bool(placement and placement.decision != decision), link.rtt_s, link.up_bytes_per_s,
                link.down_bytes_per_s, up_age_s, rest_s, staying_s, took_s,
            )
        )  # fmt: skip
        return decision


def _text(decision: Decision) -> str:
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

    def modes_s(self) -> Counter[str]:
        """Seconds on the device alone, on the worker alone, on both; `opening` before."""
        total: Counter[str] = Counter()
        total["opening"] = self.open_s
        ends = [*(at_s for _, _, _, at_s in self.runs[1:]), self.total_s - self.open_s]
        for (text, _, _, at_s), end_s in zip(self.runs, ends, strict=True):
            mode = "edge" if "cloud" not in text else "cloud" if "edge" not in text else "split"
            total[mode] += max(end_s - at_s, 0.0)
        return total


def fixed(spec: ModelSpec, setting: Setting, world: World, jobs: Sequence[Job]) -> dict[str, Decision]:
    """The partitions that never move, by name: what the floor allows of the pure ones and of splits in the middle, and
    the best by prediction, for a request of middling length over the link as it is on average."""
    layers, quarter = spec.num_layers, spec.num_layers // 4
    middle = Job(round(fmean(job.prompt_tokens for job in jobs)), round(fmean(job.tokens_out for job in jobs)))
    texts = {
        ALONE: ALONE,
        "all:cloud": "all:cloud",
        "cut-middle": f"edge[0:{layers // 2}] cloud[{layers // 2}:{layers}]",
        "u-thin": f"edge[0:1] cloud[1:{layers - 1}] edge[{layers - 1}:{layers}]",
        "u-middle": f"edge[0:{quarter}] cloud[{quarter}:{layers - quarter}] edge[{layers - quarter}:{layers}]",
    }
    found = {name: Decision(Partition.parse(text, spec, NAMES), WirePrecision.FP32) for name, text in texts.items()}
    found = {name: one for name, one in found.items() if obstacle(world, one, middle, setting.limits) is None}
    seen = Observation(
        spec, (), middle.prompt_tokens, middle.tokens_out, world, world, limits=setting.limits,
        tools=Tools((WirePrecision.FP32,), (None, 32, 128)),
    )  # fmt: skip
    best = find_policy(STATIC).decide(seen)
    return found if any(best.partition == one.partition for one in found.values()) else found | {STATIC: best}


async def measured_figures(setting: Setting, checkpoint: Checkpoint) -> DeviceSpec:
    """What this machine can do, units and messages measured as `splitwise profile` does."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        machine = stack.enter_context(Machine(checkpoint))
        child = stack.enter_context(worker(setting.model))

        async def reach(name: str) -> Link:
            return await dial(child.address, name=name)

        at_most = await peaks(machine)
        async with await Profiler.fitting(machine, setting.profile_s) as profiler:
            until_s = time.monotonic() + setting.profile_s
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


@dataclass
class Followed:
    """Everything that was run."""

    setting: Setting
    partitions: dict[str, str]
    served: list[Served]
    recording: RateTrace
    figures: Figures

    def to_dict(self) -> dict[str, object]:
        """For `--json`, the uplink's mean in each second included."""
        seconds = range(int(self.recording.period_s))
        return self.figures.to_dict() | {
            "partitions": self.partitions,
            "uplink_bytes_per_s": [round(self.recording.mean_over(s, s + 1)) for s in seconds],
            "stalls_s": stalls(self.recording),
            "served": [asdict(one) | {"moves": one.moves, "faults": one.faults} for one in self.served],
        }


def stalls(trace: RateTrace) -> list[tuple[float, float]]:
    """When a recorded link carried nothing for `STALL_S` or longer, and for how long (s)."""
    ends = (*trace.times_s[1:], trace.period_s)
    silent = [(a, b - a) for a, b, r in zip(trace.times_s, ends, trace.bytes_per_s, strict=True) if r == 0]
    return [(round(at_s, 3), round(for_s, 3)) for at_s, for_s in silent if for_s >= STALL_S]


async def run_follow(setting: Setting, tell: Tell) -> Followed:
    """Every contender answers every request, in turns whose order is drawn anew for each request. Raises UserError."""
    torch.set_num_threads(1)
    checkpoint, shape = Checkpoint(locate(setting.model)), setting.shape()
    if not isinstance(shape.up, RateTrace):
        raise RequestError(f"{setting.up!r} is no recording; give a file of recorded rates, as in lte.up.gz")
    text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
    requests = draw(setting, Tokenizer(checkpoint.directory).encode(text), shape.up.period_s)
    tell("measuring this machine")
    figures = await measured_figures(setting, checkpoint)
    near = slowed(figures, setting.slower)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        file = Path(place) / "device.json"
        file.write_text(json.dumps(asdict(figures)))
        tell("starting the worker")
        cloud = stack.enter_context(worker(setting.model, "--profile", str(file)))
        machine = stack.enter_context(Machine(checkpoint, emulate=near))
        rates = Rates.of_shape(shape)
        link = LinkSpec(setting.rtt_s, rates.up, rates.down)
        world = World(machine.spec, (Host(near, Dtype.FP32), Host(figures, Dtype.FP32)), {(0, 1): link})
        decisions = fixed(
            machine.spec, setting, world, [Job(len(one.prompt), one.new_tokens) for one in requests]
        )  # fmt: skip
        partitions = {name: _text(one) for name, one in decisions.items()}
        tell(f"against {', '.join(f'{name} ({one})' for name, one in partitions.items())}")
        course = Course(setting, shape, machine, cloud.address, (cloud.process.pid,))
        served = [one async for one in _serve(course, requests, decisions, tell)]
    result = Figures("follow", asdict(setting) | {"figures": asdict(figures), "rates": asdict(rates)})
    summarise(result, served)
    return Followed(setting, partitions, served, shape.up, result)


async def _serve(
    course: Course, requests: Sequence[Asked], decisions: Mapping[str, Decision], tell: Tell
) -> AsyncIterator[Served]:
    dice = random.Random(course.setting.seed)
    order = [LIVE, *decisions]
    for asked in requests:
        dice.shuffle(order)
        served: dict[str, Served] = {}
        ids: dict[str, tuple[int, ...]] = {}
        for contender in order:
            watched = Watched(find_policy(LIVE) if contender == LIVE else Always(decisions[contender]))
            served[contender], record = await course.answer(
                asked, contender, watched if contender == LIVE else watched.policy
            )
            served[contender].decisions, ids[contender] = watched.said, record.token_ids
        for contender, one in served.items():
            one.identical = ids[contender] == ids[ALONE]
            yield one
        said = "  ".join(f"{name} {served[name].total_s:.2f}" for name in (LIVE, *decisions))
        path = " > ".join(f"{text} ({why}, {tokens})" for text, why, tokens, _ in served[LIVE].runs)
        tell(f"{asked.number + 1}/{len(requests)} at {asked.at_s:.0f} s: {said}; {path}")


def summarise(result: Figures, served: Sequence[Served]) -> None:
    """Means, p95, moves, faults; and the ratio of means to the fixed partition that was best in hindsight, with limits
    over requests drawn again."""
    by_name: dict[str, list[Served]] = {}
    for one in served:
        by_name.setdefault(one.contender, []).append(one)
    totals = {name: np.array([one.total_s for one in ones]) for name, ones in by_name.items()}
    best = min((name for name in totals if name != LIVE), key=lambda name: float(totals[name].mean()))
    for name, values in totals.items():
        estimate = resampled(lambda at, v=values: float(v[at].mean()), len(values))  # type: ignore[misc]
        _add(result, f"{name} mean_s", estimate)
        result.add(f"{name} p95_s", float(np.quantile(values, 0.95)))
    mine = totals[LIVE]
    for name, values in totals.items():
        if name != LIVE:
            _add(
                result, f"over {name}", resampled(lambda at, v=values: float(mine[at].mean() / v[at].mean()), len(mine))
            )  # type: ignore[misc]
    _add(result, "over_best_static", _estimate(result, f"over {best}"), f"{best}, the best in hindsight; at most 1.05")
    live = by_name[LIVE]
    for name in ("moves", "faults"):
        result.add(name, sum(getattr(one, name) for one in live))
    result.add("requests_moved", sum(one.moves > 0 for one in live))
    result.add("failovers", sum(kind == "failed-over" for one in live for _, kind, _ in one.events))
    result.add("tokens_lost", sum(one.missing for one in served), "of all contenders; must be 0")
    result.add("identical_share", fmean(one.identical for one in served), "with the ids of the device alone; must be 1")
    modes = sum((one.modes_s() for one in live), Counter[str]())
    for mode, seconds in modes.items():
        result.add(f"share_{mode}", seconds / modes.total())
    asked = [one for served_one in live for one in served_one.decisions]
    result.add("decisions", len(asked))
    result.add("decide_p95_ms", 1e3 * float(np.quantile([one.took_s for one in asked], 0.95)))
    result.add("foreign_share", fmean(one.foreign for one in served), "of the processors, by other programs")


def _add(result: Figures, name: str, one: Estimate, note: str = "") -> None:
    result.add(name, one.value, f"{one.low:.4g} to {one.high:.4g}" + (f"; {note}" if note else ""))
    result.intervals[name] = one.low, one.high


def _estimate(result: Figures, name: str) -> Estimate:
    return Estimate(result.figures[name], *result.intervals[name])
