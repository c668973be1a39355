"""`bench pipeline`: what EdgeShard's throughput program promises against a real pipeline of four processes.

Device and workers play slow machines by sleeping, so that they overlap on few processors; links are this machine's own.
What is predicted is the very same work: as many sequences, as many in flight, filling and draining included.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.bench.pipeline import completions, stations
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import Job, World
from splitwise_llm.decision import WirePrecision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.flight import Agreed, Flight, idling
from splitwise_llm.engine.generation import Generation
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.model.checkpoint import locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.observation import Tools
from splitwise_llm.policies.chains import Flow, Route, chain
from splitwise_llm.policies.pipelines import EdgeShard, Program, best_throughput
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec

TOOLS = Tools((WirePrecision.FP32,))
SLOWEST = DeviceSpec("slow-1x", 2.5e9, 1.8e8, 1e9, launch_s=2e-4)
"""About 140 ms per token of the bundled model: what EdgeShard's boards take for a 7B, each alone."""
FASTER = {"cloud": 1.0, "third": 1.5, "fourth": 2.0}
"""So many times as fast as the device."""
DIRECT = (("cloud", "third"), ("cloud", "fourth"), ("third", "fourth"))


def faster(name: str, times: float) -> DeviceSpec:
    """The slowest machine, so many times as fast."""
    return replace(
        SLOWEST,
        name=f"slow-{times:g}x",
        flop_per_s=times * SLOWEST.flop_per_s,
        memory_bytes_per_s=times * SLOWEST.memory_bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class Setting:
    """What runs: prompts of equal length from the bundled excerpt, greedily, none of which ends early. The lengths are
    EdgeShard's."""

    in_flight: int = 4
    batches: int = 2
    """So many sequences per place in flight."""
    prompt_tokens: int = 32
    tokens: int = 96

    @property
    def job(self) -> Job:
        return Job(self.prompt_tokens, self.tokens)

    def sequences(self, in_flight: int) -> int:
        """How many are answered in all."""
        return in_flight * self.batches


@dataclass(frozen=True, slots=True)
class Played:
    """One measurement."""

    per_s: float
    bubble_share: float
    texts: tuple[tuple[int, ...], ...]
    """By prompt."""


class Pipeline:
    """A device with its workers, and the program that spreads a model over them."""

    def __init__(self, edge: Edge, setting: Setting) -> None:
        text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
        self._ids = Tokenizer(edge.machine.checkpoint.directory).encode(text)
        self._edge, self._setting = edge, setting
        self._decides = Agreed(EdgeShard(Program.THROUGHPUT, flow=Flow(1, setting.in_flight)))
        self.world: World | None = None
        self.partition = ""

    def prompt(self, number: int) -> Sequence[int]:
        """Excerpts that do not overlap."""
        size = self._setting.prompt_tokens
        return self._ids[number * size : (number + 1) * size]

    async def play(self, in_flight: int) -> Played:
        """So many at a time, over the plan that was made for the first of all. Raises BrokenInvariant where a machine
        was lost, or moved."""
        begun: list[Generation] = []

        def begin(number: int) -> Generation:
            begun.append(
                self._edge.generate(
                    self.prompt(number), self._decides, max_new_tokens=self._setting.tokens, stop_ids=(), tools=TOOLS
                )
            )
            return begun[-1]

        records: dict[int, RequestRecord] = {}
        flight = Flight(begin, self._setting.sequences(in_flight), in_flight, lambda _kind, _text: None)
        async with aclosing(flight.answers()) as answers:
            async for answer in answers:
                if answer.record is None:
                    raise BrokenInvariant(f"sequence {answer.number} came to no end: {answer.error}")
                records[answer.number] = answer.record
        self.world = self.world or begun[0].observation.world
        ways = {record.partition for record in records.values()} | ({self.partition} if self.partition else set())
        if len(ways) > 1 or flight.room < in_flight:
            raise BrokenInvariant(f"sequences went by {sorted(ways)}, {flight.room} at a time")
        self.partition = ways.pop()
        tokens = sum(len(record.token_ids) for record in records.values())
        done = [records[number] for number in sorted(records)]
        return Played(tokens / flight.seconds, idling(done).bubble_share, tuple(one.token_ids for one in done))

    def route(self) -> Route:
        """The program's, in the world that its policy was shown. Raises BrokenInvariant unless it is what ran."""
        if self.world is None:
            raise BrokenInvariant("nothing ran yet")
        flow = Flow(1, self._setting.in_flight)
        busy, short = (chain(self.world, self._setting.job, flow=flow, occupancy=one) for one in (True, False))
        route = best_throughput(busy, short)
        if route is None or route.partition(self.world.spec).text(self._edge.names) != self.partition:
            raise BrokenInvariant(f"the program plans {route}, and {self.partition} ran")
        return route

    def predicted_per_s(self, in_flight: int) -> float:
        """Tokens per second of the same sequences through the discrete-event pipeline of the program's route."""
        setting, world, route = self._setting, self.world, self.route()
        if world is None:
            raise BrokenInvariant("nothing ran yet")
        line = stations(world, setting.job, route, Flow(1, in_flight))
        number = setting.sequences(in_flight)
        return number * setting.tokens / completions(line, in_flight, setting.tokens, number, runs_dry=True)[-1]


async def run_pipeline(rounds: int, setting: Setting, tell: Tell) -> Figures:
    """The pipeline with several sequences in flight and with one, in turn."""
    played: dict[int, list[Played]] = {1: [], setting.in_flight: []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        addresses = {}
        for name, times in FASTER.items():
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps(asdict(faster(name, times))))
            addresses[name] = stack.enter_context(worker("bundled", "--emulate", str(file))).address
        edge = stack.enter_context(edge_with(str(locate("bundled")), addresses, emulate=SLOWEST, direct=DIRECT))
        pipeline = Pipeline(edge, setting)

        async def one(in_flight: int) -> float:
            found = await pipeline.play(in_flight)
            played[in_flight].append(found)
            return found.per_s

        runs = {str(count): lambda count=count: one(count) for count in played}
        measured = await interleaved(runs, rounds, tell)
        promised = {count: pipeline.predicted_per_s(count) for count in played}
        bound = setting.tokens / pipeline.route().seconds
        several, alone = measured[str(setting.in_flight)], measured["1"]
        texts = {one.texts[: setting.batches] for found in played.values() for one in found}
        figures = Figures("pipeline", asdict(setting) | {"partition": pipeline.partition, "emulated": True})
        figures.add_median(
            "throughput_over_predicted", [one / promised[setting.in_flight] for one in several],
            f"{setting.in_flight} in flight, predicted {promised[setting.in_flight]:.1f} tokens/s by the discrete-"
            f"event pipeline, {bound:.1f} if it were always full; {pipeline.partition}",
        )  # fmt: skip
        figures.add_median("throughput_over_one", ratios(several, alone), "against one in flight")
        figures.add(
            "predicted_over_one",
            promised[setting.in_flight] / promised[1],
            "the same, as the discrete-event pipeline has it",
        )
        figures.add_median("one_over_predicted", [one / promised[1] for one in alone])
        bubbles = {count: [one.bubble_share for one in found[1:]] for count, found in played.items()}
        figures.add_median("bubble_share", bubbles[setting.in_flight], "of the machine that computes most")
        figures.add_median("bubble_share_one", bubbles[1], "the same with one in flight")
        figures.add_median("tokens_per_s", several, "emulated machines")
        figures.add("same_texts", float(len(texts) == 1), "1: the same however many are in flight")
    return figures
