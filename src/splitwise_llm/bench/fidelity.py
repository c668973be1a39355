"""Does the cost model tell the truth: predicted against measured TTFT, TPOT, bytes and crossings of real runs.

What is predicted is made of units measured just before and after, never of a run of a whole partition.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.overhead import NO_WORDS, Tell
from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.cost import Host, Job, World, price
from splitwise_llm.cost.measured import Measured
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge, LinkTo
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.profiling import Grid, Profiler
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec

T = TypeVar("T")
LINKS: Mapping[str, str] = {
    "5ms_100mbit": "rtt=5ms up=100mbit down=100mbit",
    "20ms_20mbit": "rtt=20ms up=20mbit down=20mbit",
    "40ms_10mbit_up_40_down": "rtt=40ms up=10mbit down=40mbit",
    "80ms_5mbit": "rtt=80ms up=5mbit down=5mbit",
}
SLOWER = 3.0
EMULATED: Sequence[tuple[float, float]] = ((1.0, 1.0), (1.0, SLOWER), (SLOWER, 1.0))
"""By how much device and worker are slowed down; the other one is the faster machine of the two."""
NAMES = ("edge", "cloud")
PROMPTS = (96, 64, 120)
DISTURBED = 0.15
"""A measurement is made again when other programs took more of the processors than this while it ran."""
ATTEMPTS, PATIENCE = 3, 60
"""So often at most for one measurement, and for all of one model."""
THIS = DeviceSpec("this machine", 1e11, 1e10, 4e9)
"""Its roofline is never asked: every host of this bench carries measured units."""


@dataclass(frozen=True, slots=True)
class Case:
    """One decision on one link between machines slowed down by some factors, and what became of it."""

    name: str
    decision: Decision
    job: Job
    link: str
    slower: tuple[float, float]
    runs: list[RequestRecord] = field(default_factory=list)

    @property
    def measured(self) -> tuple[float, float]:
        """Median TTFT and TPOT, s."""
        return median(r.ttft_s for r in self.runs), median(r.tpot_s for r in self.runs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Relative errors of one case: predicted over measured, less one."""

    case: Case
    ttft: float
    tpot: float
    bytes: float
    crossings: float


def decisions(spec: ModelSpec) -> dict[str, Decision]:
    """What is run: every kind of partition, one of them chunked, one of them with int8 on the wire."""
    layers = spec.num_layers
    quarter, half = layers // 4, layers // 2

    def of(text: str, wire: WirePrecision = WirePrecision.FP32, chunk: int | None = None) -> Decision:
        return Decision(Partition.parse(text, spec, NAMES), wire, chunk)

    def cut(end: float, more: str = "") -> str:
        return f"edge[0:{end:g}] cloud[{end:g}:{layers}]{more}"

    def u(first: int, last: int) -> str:
        return f"edge[0:{first}] cloud[{first}:{layers - last}] edge[{layers - last}:{layers}]"

    return {
        "edge": of("all:edge"),
        "cut_middle": of(cut(half)),
        "u_deep": of(u(quarter, quarter)),
        "shared_one": of(f"edge[0:{half}] edge+cloud[{half}] edge[{half + 1}:{layers}]"),
        "cloud": of("all:cloud"),
        "cut_early": of(cut(quarter)),
        "u_thin": of(u(1, 1)),
        "chunked": of(cut(half), chunk=32),
        "cut_late": of(cut(layers - quarter)),
        "half_layer": of(cut(half - 0.5)),
        "head_on_device": of(cut(half + 1, " head=edge")),
        "shared_two": of(f"edge[0:{quarter}] edge+cloud[{quarter}:{quarter + 2}] cloud[{quarter + 2}:{layers}]"),
        "u_chunked_int8": of(u(quarter, 1), WirePrecision.INT8, 32),
    }


def cases(spec: ModelSpec, tokens: int, names: Sequence[str], links: Sequence[str]) -> Iterator[Case]:
    """Each decision on each link, the emulated machines in turn."""
    known = decisions(spec)
    for row, name in enumerate(names):
        for column, link in enumerate(links):
            job = Job(PROMPTS[row % len(PROMPTS)], tokens)
            yield Case(name, known[name], job, link, EMULATED[(row + column) % len(EMULATED)])


def predict(spec: ModelSpec, case: Case, units: Measured) -> Outcome:
    """The errors of the prices made of these units."""
    hosts = tuple(Host(THIS, units.dtype, units.weights, units, slower) for slower in case.slower)
    world = World(spec, hosts, {(0, 1): LinkSpec.parse(LINKS[case.link])})
    said = price(world, case.decision, case.job)
    ttft_s, tpot_s = case.measured
    record = case.runs[0]
    planned = world.plan(case.decision).traffic(case.job.prompt_tokens, case.job.tokens_out)
    return Outcome(
        case,
        said.ttft_s / ttft_s - 1,
        said.tpot_s / tpot_s - 1,
        max(_error(said.up_bytes, record.up_bytes), _error(said.down_bytes, record.down_bytes)),
        max(
            _error(said.round_trips_per_token, record.round_trips_per_token),
            _error(sum(c.count for c in planned), sum(c.count for c in record.crossings)),
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
        workers = {
            factor: stack.enter_context(worker(str(model), *(["--emulate", f"{factor:g}"] if factor != 1 else [])))
            for factor in slower
        }
        self.pids += [child.process.pid for child in workers.values()]
        self.loopback = Edge(self.machine, NAMES[1:], LinkTo({NAMES[1]: workers[1.0].address}))
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

    async def run(self, case: Case) -> RequestRecord:
        """One run of a case, for real."""
        prompt = [(7 * n) % self.machine.spec.vocab_size for n in range(case.job.prompt_tokens)]
        edge = self._edges[case.link, case.slower[1]]
        self.machine.emulate = case.slower[0] if case.slower[0] != 1 else None
        try:
            async with edge.generate(
                prompt, case.decision, max_new_tokens=case.job.tokens_out, stop_ids=()
            ) as generation:
                async for _ in generation:
                    pass
        finally:
            self.machine.emulate = None
        return generation.record


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
        before = await stand.undisturbed(lambda: _units(profiler, stand.loopback))
        for number, block in enumerate(blocks):
            # One decision at a time: a worker forgets what its last session needed and this one does not.
            for name in dict.fromkeys(case.name for case in block):
                for case in [case for case in block if case.name == name] * repeats:
                    case.runs.append(await stand.undisturbed(partial(stand.run, case)))
            after = await stand.undisturbed(lambda: _units(profiler, stand.loopback))
            units = Measured.between(before, after)
            before = after
            for case in block:
                outcome = predict(spec, case, units)
                outcomes.append(outcome)
                tell(_line(outcome))
            tell(f"block {number + 1} of {len(blocks)}")
    return outcomes


async def _units(profiler: Profiler, loopback: Edge) -> Measured:
    profiler.forget()
    await profiler.round()
    await profiler.messages(loopback, NAMES[1])
    return profiler.table()


def _line(one: Outcome) -> str:
    case, (ttft_s, tpot_s) = one.case, one.case.measured
    return (
        f"{case.name:15} {case.link:23} edge x{case.slower[0]:g} cloud x{case.slower[1]:g}  TTFT {1e3 * ttft_s:7.1f} "
        f"ms {100 * one.ttft:+5.1f} %  TPOT {1e3 * tpot_s:7.2f} ms {100 * one.tpot:+5.1f} %"
    )


QUICK = ("edge", "cut_middle", "u_deep", "shared_one", "chunked")


async def run_fidelity(
    repeats: int, tokens: int, quick: bool, tell: Tell, models: Mapping[str, Callable[[Path], Path]] | None = None
) -> Figures:
    """Errors of TTFT and TPOT (`_median_abs_error`, `_p90_abs_error`), of bytes and crossings (`_max_abs_error`), and
    signed ones for each link."""
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
            result.add(f"{model}_{name}_median_abs_error", median(abs(getattr(one, name)) for one in mine))
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
    """Add the figures of some outcomes."""
    for name in ("ttft", "tpot"):
        errors = sorted(abs(getattr(one, name)) for one in outcomes)
        result.add(f"{name}_median_abs_error", median(errors), f"of {len(errors)} cases; at most 0.10")
        worst = max(outcomes, key=lambda one: abs(getattr(one, name)))
        where = f"worst {getattr(worst, name):+.2f}: {worst.case.name}, {worst.case.link}"
        result.add(f"{name}_p90_abs_error", errors[math.ceil(0.9 * len(errors)) - 1], f"at most 0.25; {where}")
    result.add("bytes_max_abs_error", max(one.bytes for one in outcomes), "must be 0")
    result.add("crossings_max_abs_error", max(one.crossings for one in outcomes), "must be 0")
    for link in dict.fromkeys(one.case.link for one in outcomes):
        for name in ("ttft", "tpot"):
            signed = [getattr(one, name) for one in outcomes if one.case.link == link]
            result.add(f"signed_error_{link}_{name}", median(signed), "predicted over measured, less 1: median")
