"""`bench follow`: does a policy that moves the partition keep up with the best fixed one over a recorded mobile uplink?

Real processes, one shaped link. Request i of n begins at second i/n of the recording, for every contender: so the same
request meets the same link, whoever answers it, and the whole recording is visited. Nothing here knows how a policy
decides, and nothing is chosen by what came out of it, except the best fixed partition, which is so by definition.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.follow_course import (
    ALONE,
    DEEP,
    DEEP_LLAMA,
    LIVE,
    NAMES,
    Asked,
    Course,
    Served,
    Setting,
    Watched,
    measured_figures,
    slowed,
    text,
)
from splitwise_llm.bench.outcome import resampled
from splitwise_llm.bench.overhead import NO_WORDS, Tell
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.random_models import make_model
from splitwise_llm.cost import Host, Job, World, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.survey import Rates
from splitwise_llm.errors import RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Always, Observation, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import find_policy
from splitwise_llm.records import Estimate
from splitwise_llm.spec import Dtype, LinkSpec, ModelSpec
from splitwise_llm.traces import RateTrace
from splitwise_llm.wire.shaper import LinkShape

Floats = NDArray[np.float64]
STATIC = "best-static"
STALL_S = 1.0
"""A link that carries nothing for so long is out."""


def draw(setting: Setting, ids: Sequence[int], period_s: float) -> list[Asked]:
    """The requests, the same for the same seed: excerpts of a text (its ids), evenly spread over a recording."""
    dice = random.Random(setting.seed)
    found = []
    for number in range(setting.requests):
        count = dice.randint(*setting.prompt_tokens)
        start = dice.randrange(len(ids) - count)
        tokens = dice.randint(*setting.new_tokens)
        found.append(Asked(number, tuple(ids[start : start + count]), tokens, period_s * number / setting.requests))
    return found


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
    shape = setting.shape()
    if not isinstance(shape.up, RateTrace):
        raise RequestError(f"{setting.up!r} is no recording; give a file of recorded rates, as in lte.up.gz")
    with tempfile.TemporaryDirectory() as place:
        return await _run(setting, shape, shape.up, Path(place), tell)


async def _run(setting: Setting, shape: LinkShape, recording: RateTrace, place: Path, tell: Tell) -> Followed:
    model = setting.model
    if model == DEEP:
        model = str(make_model(place, DEEP_LLAMA))
        (place / "tokenizer.json").write_text(NO_WORDS)
    checkpoint = Checkpoint(locate(model))
    requests = draw(setting, _text_ids(setting, checkpoint), recording.period_s)
    tell("measuring this machine")
    figures = await measured_figures(model, checkpoint, setting.profile_s)
    near = slowed(figures, setting.slower)
    with ExitStack() as stack:
        file = place / "device.json"
        file.write_text(json.dumps(asdict(figures)))
        tell("starting the worker")
        cloud = stack.enter_context(worker(model, "--profile", str(file)))
        machine = stack.enter_context(Machine(checkpoint, emulate=near))
        # All weights stay loaded on the device: who answered the request before must not matter.
        await machine.open_share(object(), NAMES[DEVICE], Partition.all_on(machine.spec, DEVICE), DEVICE, 1)
        rates = Rates.of_shape(shape)
        link = LinkSpec(setting.rtt_s, rates.up, rates.down)
        world = World(machine.spec, (Host(near, Dtype.FP32), Host(figures, Dtype.FP32)), {(0, 1): link})
        decisions = fixed(
            machine.spec, setting, world, [Job(len(one.prompt), one.new_tokens) for one in requests]
        )  # fmt: skip
        partitions = {name: text(one) for name, one in decisions.items()}
        tell(f"against {', '.join(f'{name} ({one})' for name, one in partitions.items())}")
        course = Course(setting, shape, machine, cloud.address, (cloud.process.pid,))
        served = [one async for one in _serve(course, requests, decisions, tell)]
    result = Figures("follow", asdict(setting) | {"figures": asdict(figures), "rates": asdict(rates)})
    summarise(result, served)
    return Followed(setting, partitions, served, recording, result)


def _text_ids(setting: Setting, checkpoint: Checkpoint) -> Sequence[int]:
    """Ids to take prompts from: of a text, or any ids where the model knows no words."""
    if setting.model == DEEP:
        dice = random.Random(setting.seed)
        return [dice.randrange(checkpoint.architecture.spec.vocab_size) for _ in range(20_000)]
    excerpt = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
    return Tokenizer(checkpoint.directory).encode(excerpt)


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
        _add(result, f"{name} mean_s", _over(values, np.ones(len(values))))
        result.add(f"{name} p95_s", float(np.quantile(values, 0.95)))
    mine = totals[LIVE]
    for name, values in totals.items():
        if name != LIVE:
            _add(result, f"over {name}", _over(mine, values))
    _add(result, "over_best_static", _estimate(result, f"over {best}"), f"{best}, the best in hindsight; at most 1.05")
    live = by_name[LIVE]
    for name in ("moves", "faults"):
        result.add(name, sum(getattr(one, name) for one in live))
    result.add("requests_moved", sum(one.moves > 0 for one in live))
    result.add("failovers", sum(kind == "failed-over" for one in live for _, kind, _ in one.events))
    result.add("tokens_lost", sum(one.missing for one in served), "of all contenders; must be 0")
    result.add("identical_share", fmean(one.identical for one in served), "with the ids of the device alone; must be 1")
    modes = [one.modes_s() for one in live]
    for mode in modes[0]:
        result.add(f"share_{mode}", sum(one[mode] for one in modes) / sum(sum(one.values()) for one in modes))
    asked = [one for served_one in live for one in served_one.decisions]
    result.add("decisions", len(asked))
    if asked:
        result.add("decide_p95_ms", 1e3 * float(np.quantile([one.took_s for one in asked], 0.95)))
    result.add("foreign_share", fmean(one.foreign for one in served), "of the processors, by other programs")


def _over(above: Floats, below: Floats) -> Estimate:
    """Mean over mean, paired by request."""
    return resampled(lambda at: float(above[at].mean() / below[at].mean()), len(above))


def _add(result: Figures, name: str, one: Estimate, note: str = "") -> None:
    result.add(name, one.value, f"{one.low:.4g} to {one.high:.4g}" + (f"; {note}" if note else ""))
    result.intervals[name] = one.low, one.high


def _estimate(result: Figures, name: str) -> Estimate:
    return Estimate(result.figures[name], *result.intervals[name])
