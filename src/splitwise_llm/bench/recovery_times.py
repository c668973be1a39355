"""How long recovery takes, over what was predicted: from a fault until it is noticed, until the next token, and from
the link's return until the first token over it. Every time is the session's own record of events, runs and tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from splitwise_llm.bench.demo import demo_partitions
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.matrix import Mode
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.cost import moving_from
from splitwise_llm.decision import Decision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.profiling import Profiler
from splitwise_llm.engine.roofline import device_figures, peaks
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Observation
from splitwise_llm.partition import Partition
from splitwise_llm.rebuild import Holdings
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire.faults import Injection
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.shaper import LinkShape

LINK, RTT_S = "rtt=20ms rate=20mbit", 0.02
CONTEXT = 560
"""Positions of the prompt where the edge takes over; the bar holds from 512 on."""
SHORT = 120
"""Where the worker takes back."""
SLACK_S = 0.05
SLOW = 12.0
"""So much slower is the edge that gives back: its text must last until the link is tried again."""
BROKEN_AT = 8
LONG_S = 600.0
"""Of a silence that nobody ends."""
OUTAGES_S = (0.6, 1.7, 2.9)
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Broken:
    """A generation whose link was silent for a time. Seconds since its prompt was handed over."""

    record: RequestRecord
    seen: Observation
    home: Decision
    step_s: float
    """As predicted: between tokens."""
    silent_s: float
    healed_s: float

    @property
    def lost_s(self) -> float:
        """When the link was given up; infinite if never."""
        return next((e.at_s for e in self.record.events if e.kind == "lost" and e.at_s >= self.silent_s), math.inf)

    @property
    def detection_s(self) -> float:
        return self.lost_s - self.silent_s

    @property
    def next_token_s(self) -> float:
        """The first token after the link was given up."""
        return next((at_s for at_s in self.record.token_times_s if at_s > self.lost_s), math.inf)

    @property
    def known(self) -> int:
        """Ids there were when the link was given up."""
        return self.record.prompt_tokens + sum(at_s <= self.lost_s for at_s in self.record.token_times_s)

    @property
    def first_back(self) -> tuple[float, int]:
        """The first token of a run at home that began after the fault, and the positions that were cached by then."""
        before = 0
        for run in self.record.runs:
            is_home = run.partition == self.record.runs[0].partition
            if run.at_s > self.lost_s and is_home and run.tokens and not run.why.startswith("fill"):
                return self.record.token_times_s[before], run.known - 1
            before += run.tokens
        return math.inf, 0


async def recovery_times(result: Figures, rounds: int, tell: Tell) -> None:
    """`detection_s`, `fallback_over_predicted` and `return_over_predicted`, the bar of each ratio being 1."""
    detections: list[float] = []
    over: list[float] = []
    fallbacks: dict[Mode, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        tell("profiling this machine, for predictions")
        file = Path(place) / "this.json"
        figures = await quick_profile(6.0)
        await asyncio.to_thread(file.write_text, json.dumps(figures))
        profile = DeviceSpec.from_file(file)
        checkpoint = Checkpoint(locate("bundled"))
        with Host("bundled", "--profile", str(file)) as cloud:
            with Machine(checkpoint, profile=profile) as machine:
                pair, partitions = _Pair(machine, cloud), demo_partitions(machine.spec)
                for number in range(rounds):
                    for mode in (Mode.CUT, Mode.U, Mode.CLOUD):
                        home = Decision(partitions[mode], prefill_chunk=128, patience=0.0)
                        one = await pair.broken(home, CONTEXT, 48, LONG_S)
                        detections.append(one.detection_s)
                        over.append(one.detection_s / max(4 * one.step_s, 1.0))
                        fallbacks.setdefault(mode, []).append(_fallback(one, partitions["edge"]))
                    tell(f"the edge takes over, round {number + 1} of {rounds}")
                waiting = Decision(partitions[Mode.CUT], patience=math.inf)
                outages_s = [OUTAGES_S[number % len(OUTAGES_S)] for number in range(rounds)]
                waited = [await pair.broken(waiting, SHORT, 48, outage_s) for outage_s in outages_s]
                tell(f"the link comes back, and was waited for, {rounds} times")
            with Machine(checkpoint, profile=profile, emulate=SLOW) as machine:
                pair, moving = _Pair(machine, cloud), replace(waiting, patience=0.0)
                given = [await pair.broken(moving, SHORT, 400, outage_s) for outage_s in outages_s]
                tell(f"the link comes back, and the edge gives the work back, {rounds} times")
    result.add_median("detection_s", detections, "from the first silent frame")
    result.add("detection_s_worst", max(detections))
    result.add("detection_over_limit_worst", max(over), "of max(4 x predicted step, 1 s)")
    every = [row for rows in fallbacks.values() for row in rows]
    _add_ratio(result, "fallback_over_predicted", [measured / bar for measured, bar in every])
    for mode, rows in fallbacks.items():
        result.add_median(f"fallback_s_{mode}", [measured for measured, _ in rows])
        result.add_median(f"fallback_bar_s_{mode}", [bar for _, bar in rows], "1.2 x predicted recompute + 50 ms")
    _add_ratio(result, "return_over_predicted", [_return(one) for one in (*waited, *given)])
    result.add("return_over_predicted_given_back", max(_return(one) for one in given), "of those that moved home")
    result.add("return_s_worst", max(one.first_back[0] - one.healed_s for one in (*waited, *given)))


def _add_ratio(result: Figures, name: str, values: list[float]) -> None:
    """The worst is the figure, as a bar is for every time; the median beside it."""
    result.add(name, max(values), f"the worst of {len(values)}; bar 1")
    result.add_median(f"{name}_median", values)


def _fallback(one: _Broken, edge: Partition) -> tuple[float, float]:
    """(from detection to the next token, its bar), seconds."""
    world = one.seen.world
    if world is None:
        raise BrokenInvariant("machines with a profile have prices")
    context = one.known - 1
    held = Holdings.of(one.home.partition, context, 2).without(1)
    moving = moving_from(world, held, replace(one.home, partition=edge), context)
    predicted_s = float(moving.seconds(world.conditions(one.seen.loads)))
    return one.next_token_s - one.lost_s, 1.2 * predicted_s + SLACK_S


def _return(one: _Broken) -> float:
    """From the link's return to the first token over it, over a backoff cap, two round trips and predicted replay."""
    world = one.seen.world
    if world is None:
        raise BrokenInvariant("machines with a profile have prices")
    first_s, context = one.first_back
    left = one.known - 1  # what the worker held when it was lost, and holds on a lease
    held = Holdings.of(one.home.partition, context, 2)
    then = Holdings.of(one.home.partition, left, 2)
    moving = moving_from(world, held.replaced(1, then.machines[1]), one.home, context)
    replay_s = float(moving.seconds(world.conditions(one.seen.loads)))
    return (first_s - one.healed_s) / (RecoveryRules().cap_s + 2 * RTT_S + replay_s)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A device and the worker that it reaches over a shaped link."""

    machine: Machine
    cloud: Host

    async def broken(self, home: Decision, prompt_tokens: int, new_tokens: int, outage_s: float) -> _Broken:
        """A generation whose link falls silent both ways at token `BROKEN_AT`, for so long."""
        text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
        ids = Tokenizer(self.machine.checkpoint.directory).encode(text)[:prompt_tokens]
        count, zero_s, silent_s = 0, math.inf, 0.0
        with Line(self.cloud.address, LinkShape.parse(LINK)) as line:
            edge = Edge(self.machine, ("cloud",), lambda name: dial(line.address, name=name))
            async with edge.generate(ids, home, max_new_tokens=new_tokens, stop_ids=()) as generation:
                async for token in generation:
                    zero_s = min(zero_s, time.monotonic() - token.at_s)
                    count += 1
                    if count == BROKEN_AT:
                        line.inject(Injection.parse(f"drop-both for={outage_s}s"))
                        silent_s = time.monotonic() - zero_s
        if generation.predicted is None:
            raise BrokenInvariant("machines with a profile have a prediction")
        step_s = generation.predicted.tpot_s
        return _Broken(generation.record, generation.observation, home, step_s, silent_s, silent_s + outage_s)


async def quick_profile(seconds: float) -> dict[str, object]:
    """What this machine does with the bundled model, measured for so long: what goes into a device file."""
    with worker("bundled") as loopback, edge_with("bundled", {"loopback": loopback.address}) as edge:
        at_most = await peaks(edge.machine)
        async with await Profiler.fitting(edge.machine, seconds) as profiler:
            until_s, rounds = time.monotonic() + seconds, 0
            while rounds < 2 or time.monotonic() < until_s:
                await profiler.round()
                if not rounds:
                    profiler.forget()  # the first touch of everything counts for nothing
                rounds += 1
            await profiler.messages(edge, "loopback")
            return device_figures("this", edge.machine, profiler.table(), at_most, profiler.load_bytes_per_s, None)
