"""Does the cost model tell the truth: predicted against measured TTFT, TPOT, bytes and crossings of real runs.

What is predicted is made of units measured just before and after, never of a run of a whole partition.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from splitwise_llm.bench.fidelity_cases import (
    DRAFTING,
    LINKS,
    NAMES,
    OVERLAP,
    SESSIONS,
    SLOWER,
    Case,
    Run,
    Told,
    cases,
    decisions,
    rounds,
)
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.overhead import NO_WORDS, Tell
from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.cost import Drafter, Host, Job, World, price
from splitwise_llm.cost.crowd import crowded
from splitwise_llm.cost.measured import Measured
from splitwise_llm.engine.edge import Edge, LinkTo
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.profiling import Grid, Profiler
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec

T = TypeVar("T")
DISTURBED = 0.15
"""A measurement is made again when other programs took more of the processors than this while it ran."""
ATTEMPTS, PATIENCE = 3, 60
"""So often at most for one measurement, and for all of one model."""
MESSAGES_RTT_S = 0.01
"""Of the link that messages are timed on, without a limit of rate: it is no link of any case. Its delay is subtracted;
what waiting for it makes of both ends, and the software of a shaper, are part of every message here."""
THIS = DeviceSpec("this machine", 1e11, 1e10, 4e9)
"""Its roofline is never asked: every host of this bench carries measured units."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Relative errors of one case: predicted over measured, less one."""

    case: Case
    ttft: float | None
    """None of sessions that begin at once: how prompts take turns is not priced."""
    tpot: float
    bytes: float
    crossings: float


def world_of(spec: ModelSpec, case: Case, units: Measured) -> World:
    """The machines of a case and their link, as they are priced."""
    hosts = tuple(Host(THIS, units.dtype, units.weights, units, slower) for slower in case.slower)
    return World(spec, hosts, {(0, 1): LinkSpec.parse(LINKS[case.link])}, drafter=Drafter(case.acceptance))


def predict(spec: ModelSpec, case: Case, units: Measured) -> Outcome:
    """The errors of the prices made of these units."""
    world, job = world_of(spec, case, units), case.job
    said = price(world, case.decision, job, crowded(world, case.decision, job, case.sessions))
    ttft_s, tpot_s = case.measured
    plan, draft = world.plan(case.decision), case.decision.draft
    known = rounds(job.tokens_out, draft, case.acceptance) if draft else None
    planned = plan.traffic(job.prompt_tokens, job.tokens_out, rounds=known)
    # What a drafting run carries hangs on its rounds; a price knows how many there are on average.
    up, down = (sum(c.payload_bytes for c in planned if getattr(c, end) == 0) for end in ("src", "dst"))
    trips = plan.round_trips_per_token * len(known) / (job.tokens_out - 1) if known else said.round_trips_per_token
    if not draft:
        up, down = round(said.up_bytes), round(said.down_bytes)
    records = case.runs[0].records
    return Outcome(
        case,
        said.ttft_s / ttft_s - 1 if case.sessions == 1 else None,
        said.tpot_s / tpot_s - 1,
        max(_error(a, b) for r in records for a, b in ((up, r.up_bytes), (down, r.down_bytes))),
        max(
            _error(a, b)
            for r in records
            for a, b in (
                (trips, r.round_trips_per_token),
                (sum(c.count for c in planned), sum(c.count for c in r.crossings)),
            )
        ),
    )


def _error(said: float, seen: float) -> float:
    return abs(said - seen) / seen if seen else abs(said)


class Stand:
    """The processes one model is run on: a worker as it is and a slowed one, each behind every link."""

    def __init__(
        self, model: Path, links: Sequence[str], stack: ExitStack, slower: Sequence[float] = (1.0, SLOWER)
    ) -> None:
        self.machine = stack.enter_context(Machine(Checkpoint(model)))
        self.pids: list[int] = []
        """Of everything started here."""
        self.disturbed = 0
        self._texts: dict[Job, tuple[int, ...]] = {}
        """What follows the prompt of a job."""
        workers = {
            factor: stack.enter_context(worker(str(model), *(["--emulate", f"{factor:g}"] if factor != 1 else [])))
            for factor in slower
        }
        self.pids += [child.process.pid for child in workers.values()]
        unlimited = stack.enter_context(shaped_link(workers[1.0].address, "--rtt", f"{1e3 * MESSAGES_RTT_S:g}ms"))
        self.pids.append(unlimited.process.pid)
        self.unlimited = Edge(self.machine, NAMES[1:], LinkTo({NAMES[1]: unlimited.address}))
        self._edges: dict[tuple[str, float], Edge] = {}
        for link in links:
            for factor, child in workers.items():
                options = [word for pair in LINKS[link].split() for word in _option(pair)]
                shaper = stack.enter_context(shaped_link(child.address, *options))
                self.pids.append(shaper.process.pid)
                self._edges[link, factor] = Edge(self.machine, NAMES[1:], LinkTo({NAMES[1]: shaper.address}))

    async def undisturbed(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do it again while others disturb it, a few times; the result of the quietest time."""
        results: list[tuple[float, T]] = []
        while len(results) < ATTEMPTS:
            neighbours = Neighbours(self.pids)
            result = await work()
            results.append((neighbours.share, result))
            if results[-1][0] <= DISTURBED:
                break
            self.disturbed += 1
            if self.disturbed > PATIENCE:
                break
        return min(results, key=lambda one: one[0])[1]

    async def run(self, case: Case) -> Run:
        """One run of a case, for real."""
        edge = self._edges[case.link, case.slower[1]]
        drafter = await self._drafter(case)
        self.machine.emulate = case.slower[0] if case.slower[0] != 1 else None
        try:
            sessions = [self._session(edge, case, number, drafter) for number in range(case.sessions)]
            found = await asyncio.gather(*sessions)
        finally:
            self.machine.emulate = None
        records = tuple(record for record, _ in found)
        tpot_s = records[0].tpot_s if case.sessions == 1 else seconds_per_token([came_s for _, came_s in found])
        return Run(records, median(record.ttft_s for record in records), tpot_s)

    def _prompt(self, case: Case, number: int = 0) -> list[int]:
        return [(7 * n + 5 * number) % self.machine.spec.vocab_size for n in range(case.job.prompt_tokens)]

    async def _session(
        self, edge: Edge, case: Case, number: int, drafter: Told | None
    ) -> tuple[RequestRecord, list[float]]:
        """One of those that run at once, and when its tokens came."""
        came_s: list[float] = []
        async with edge.generate(
            self._prompt(case, number), case.decision, max_new_tokens=case.job.tokens_out, stop_ids=(), drafter=drafter
        ) as generation:
            async for _ in generation:
                came_s.append(time.monotonic())
        return generation.record, came_s

    async def _drafter(self, case: Case) -> Told | None:
        """Who is to draft, told what follows the prompt without drafts."""
        if not case.decision.draft:
            return None
        job, vocabulary = case.job, self.machine.spec.vocab_size
        if job not in self._texts:
            async with self.unlimited.generate(
                self._prompt(case), "all:edge", max_new_tokens=job.tokens_out, stop_ids=()
            ) as generation:
                async for _ in generation:
                    pass
            self._texts[job] = generation.record.token_ids
        return Told(job.prompt_tokens, self._texts[job], case.acceptance, vocabulary)


def seconds_per_token(came_s: Sequence[Sequence[float]]) -> float:
    """Of sessions side by side, while all of them decode: after the last first token, until the first is done.

    Raises BrokenInvariant unless that is a third of their tokens or more.
    """
    start_s, stop_s = max(one[0] for one in came_s), min(one[-1] for one in came_s)
    count = sum(start_s < at_s <= stop_s for one in came_s for at_s in one)
    if 3 * count < sum(len(one) for one in came_s):
        raise BrokenInvariant("the sessions did not decode at the same time; ask for more tokens")
    return len(came_s) * (stop_s - start_s) / count


def _option(pair: str) -> tuple[str, str]:
    name, _, value = pair.partition("=")
    return f"--{name}", value


async def measure(
    stand: Stand, blocks: Sequence[Sequence[Case]], repeats: int, grid: Grid, tell: Tell
) -> list[Outcome]:
    """Run the cases block by block, the units measured before the first block, between blocks and after the last;
    a block is priced with the mean of its neighbours."""
    outcomes: list[Outcome] = []
    spec = stand.machine.spec
    async with Profiler(stand.machine, grid) as profiler:
        await profiler.round()  # the first touch of everything counts for nothing
        before = await stand.undisturbed(lambda: _units(profiler, stand.unlimited))
        for number, block in enumerate(blocks):
            # One decision at a time: a worker forgets what its last session needed and this one does not.
            for name in dict.fromkeys(case.name for case in block):
                for case in [case for case in block if case.name == name] * repeats:
                    case.runs.append(await stand.undisturbed(partial(stand.run, case)))
            after = await stand.undisturbed(lambda: _units(profiler, stand.unlimited))
            units = Measured.between(before, after)
            before = after
            for case in block:
                outcome = predict(spec, case, units)
                outcomes.append(outcome)
                tell(_line(outcome))
            tell(f"block {number + 1} of {len(blocks)}")
    return outcomes


async def _units(profiler: Profiler, unlimited: Edge) -> Measured:
    profiler.forget()
    await profiler.round()
    await profiler.messages(unlimited, NAMES[1], MESSAGES_RTT_S)
    return profiler.table()


def _line(one: Outcome) -> str:
    case, (ttft_s, tpot_s) = one.case, one.case.measured
    ttft = "  (not priced)" if one.ttft is None else f"{1e3 * ttft_s:7.1f} ms {100 * one.ttft:+5.1f} %"
    return (
        f"{case.name:20} {case.link:23} edge x{case.slower[0]:g} cloud x{case.slower[1]:g}  TTFT {ttft}  "
        f"TPOT {1e3 * tpot_s:7.2f} ms {100 * one.tpot:+5.1f} %"
    )


QUICK = (
    "edge", "cut_middle", "u_deep", "shared_one", "chunked", "draft_u", "overlap_u", "sessions_cloud", "sessions_u",
)  # fmt: skip


async def run_fidelity(
    repeats: int, tokens: int, quick: bool, tell: Tell, models: Mapping[str, Callable[[Path], Path]] | None = None
) -> Figures:
    """Errors of TTFT and TPOT (`_median_abs_error`, `_p90_abs_error`), of bytes and crossings (`_max_abs_error`): of
    all cases, and of those with drafting, overlap and sessions side by side; and signed ones for each link."""
    result = Figures("fidelity", {"repeats": repeats, "tokens": tokens, "quick": quick, "threads_per_process": 1})
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    for model, make in (models or MODELS).items():
        tell(f"starting workers and links for {model}")
        with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
            stand = Stand(make(Path(place)), list(LINKS), stack)
            spec = stand.machine.spec
            names = QUICK if quick else list(decisions(spec))
            everything = list(cases(spec, tokens, names, list(LINKS)))
            size = 3 * len(LINKS)
            blocks = [everything[start : start + size] for start in range(0, len(everything), size)]
            mine = await measure(stand, blocks, repeats, Grid.up_to(128), tell)
        for name in ("ttft", "tpot"):
            known = [abs(error) for one in mine if (error := getattr(one, name)) is not None]
            result.add(f"{model}_{name}_median_abs_error", median(known))
        result.add(f"{model}_disturbed", stand.disturbed, f"made again up to {PATIENCE} times")
        outcomes += mine
    summarise(result, outcomes)
    return result


def _random_model(place: Path) -> Path:
    directory = make_model(place, OVERHEAD_LLAMA)
    (directory / "tokenizer.json").write_text(NO_WORDS)
    return directory


MODELS: Mapping[str, Callable[[Path], Path]] = {"bundled": lambda _: locate("bundled"), "random_130m": _random_model}


def summarise(result: Figures, outcomes: Sequence[Outcome]) -> None:
    """Add the figures of some outcomes: of all, of each kind, and signed ones of each link."""
    _errors(result, outcomes)
    for kind in (DRAFTING, OVERLAP, SESSIONS):
        if mine := [one for one in outcomes if one.case.kind == kind]:
            _errors(result, mine, f"_{kind}")
    for link in dict.fromkeys(one.case.link for one in outcomes):
        for name in ("ttft", "tpot"):
            if signed := [
                error for one in outcomes if one.case.link == link and (error := getattr(one, name)) is not None
            ]:
                result.add(f"signed_error_{link}_{name}", median(signed), "predicted over measured, less 1: median")


def _errors(result: Figures, outcomes: Sequence[Outcome], suffix: str = "") -> None:
    for name in ("ttft", "tpot"):
        known = [one for one in outcomes if getattr(one, name) is not None]
        if not known:
            continue
        errors = sorted(abs(getattr(one, name)) for one in known)
        result.add(f"{name}_median_abs_error{suffix}", median(errors), f"of {len(errors)} cases; at most 0.10")
        worst = max(known, key=lambda one: abs(getattr(one, name)))
        where = f"worst {getattr(worst, name):+.2f}: {worst.case.name}, {worst.case.link}"
        result.add(f"{name}_p90_abs_error{suffix}", errors[math.ceil(0.9 * len(errors)) - 1], f"at most 0.25; {where}")
    result.add(f"bytes_max_abs_error{suffix}", max(one.bytes for one in outcomes), "must be 0")
    result.add(f"crossings_max_abs_error{suffix}", max(one.crossings for one in outcomes), "must be 0")
