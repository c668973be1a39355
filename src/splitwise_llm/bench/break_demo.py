"""Survival in front of your eyes: one text while its link falls silent, its worker is killed and comes back.

It breaks things at their moments and compares texts; what a generation does about it, it does not know.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise

from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.decision import Decision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.text import Token
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.partition import Partition
from splitwise_llm.records import Event, RequestRecord
from splitwise_llm.report import Outage
from splitwise_llm.spec import ModelSpec
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.shaper import LinkShape

CLOUD = "cloud"
SILENCE_AT, KILL_AT = 0.12, 0.4
"""After these shares of the tokens; the second not before the worker has the work again, for a while."""
WELL = 0.1
"""That while, as a share of the tokens."""


@dataclass(frozen=True, slots=True)
class BreakOptions:
    """What is run, and how it is broken; `rtt` and `rate` are written as for `splitwise link`."""

    model: str
    prompt: str
    max_new_tokens: int
    rtt: str
    rate: str
    threads: int
    sampling: Sampling
    patience: float
    """How long to wait for the worker, in times of moving away from it."""
    silence_s: float
    """How long nothing crosses the link, though it looks open."""
    away_s: float
    """From the worker's death to the start of another process in its place."""
    emulate: float | None = None
    """The device computes so many times slower, so that there is something to see."""


@dataclass(frozen=True, slots=True)
class BreakShow:
    """How the demo speaks to whoever watches."""

    step: Callable[[str], None]
    begin: Callable[[str], None]
    token: Callable[[Token, bool], None]
    """And whether it was made elsewhere than it should have been."""
    struck: Callable[[Event], None]
    told: Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Broken:
    """The undisturbed run and the broken one."""

    reference: RequestRecord
    record: RequestRecord
    outages: tuple[Outage, ...]
    struck: tuple[Event, ...]
    """What was done to it, in the record's time."""
    missed: str
    """What there was no time to show; empty if nothing."""

    @property
    def is_same(self) -> bool:
        """Whether the texts are equal, token for token."""
        return self.record.token_ids == self.reference.token_ids

    @property
    def stops_s(self) -> tuple[float, ...]:
        """Per outage, the longest time without a token that began or went on in it."""
        gaps = [*pairwise((0.0, *self.record.token_times_s))]
        return tuple(
            max((stop - start for start, stop in gaps if stop > one.start_s and start < one.stop_s), default=0.0)
            for one in self.outages
        )

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "same_tokens": self.is_same,
            "missed": self.missed,
            "stops_s": self.stops_s,
            "outages": [asdict(one) for one in self.outages],
            "struck": [asdict(one) for one in self.struck],
            "undisturbed": self.reference.to_dict(intervals=False),
            "broken": self.record.to_dict(intervals=False),
        }


def home_partition(spec: ModelSpec) -> Partition:
    """A U: embedding, ends, head and sampling on the device, most layers on the worker."""
    outer = max(1, spec.num_layers // 8)
    return Partition.u_shape(spec, outer, outer)


async def run_break_demo(options: BreakOptions, show: BreakShow) -> Broken:
    """The undisturbed run, then the broken one. All processes have ended by then. Raises SplitwiseError."""
    show.step("starting the cloud worker, a process of its own")
    with Host(options.model, "--threads", str(options.threads)) as host:
        show.step(f"putting a link in front of it: {options.rate} each way, RTT {options.rtt}")
        with Line(host.address, LinkShape.parse(f"rtt={options.rtt} rate={options.rate}")) as line:
            show.step("loading the model on the device")
            reach = {CLOUD: line.address}
            with edge_with(options.model, reach, threads=options.threads, emulate=options.emulate) as edge:
                show.begin("undisturbed")
                async with _generation(edge, options) as generation:
                    async for token in generation:
                        show.token(token, False)
                reference = generation.record
                silent_at, kill_at = (int(share * options.max_new_tokens) for share in (SILENCE_AT, KILL_AT))
                show.step(
                    f"again; the link falls silent at token {silent_at} for {options.silence_s:g} s, the worker is "
                    f"killed at about {kill_at} and started anew {options.away_s:g} s later; patience: "
                    f"{options.patience:g} times what moving is predicted to take"
                )
                show.begin("broken")
                return await _broken(edge, options, show, host, line, reference)


def _generation(edge: Edge, options: BreakOptions) -> Generation:
    decision = Decision(home_partition(edge.machine.spec), patience=options.patience)
    return edge.generate(
        options.prompt, decision, max_new_tokens=options.max_new_tokens, sampling=options.sampling, stop_ids=()
    )


async def _broken(
    edge: Edge, options: BreakOptions, show: BreakShow, host: Host, line: Line, reference: RequestRecord
) -> Broken:
    generation = _generation(edge, options)
    breaking = _Breaking(options, show, host, line, generation)
    generation.on_event = breaking.told
    async with generation:
        breaking.began_s = time.monotonic()
        striking = asyncio.create_task(breaking.run())
        try:
            async for token in generation:
                breaking.came(token)
        finally:
            striking.cancel()
            with suppress(asyncio.CancelledError):
                await striking
            await breaking.settle()
    record = generation.record
    end_s = record.token_times_s[-1]
    outages = tuple(Outage(one.what, one.start_s, min(one.stop_s, end_s)) for one in breaking.outages)
    return Broken(reference, record, outages, tuple(breaking.struck), breaking.missing)


@dataclass(slots=True)
class _Breaking:
    """What happens to one generation, and when."""

    options: BreakOptions
    show: BreakShow
    host: Host
    line: Line
    generation: Generation
    began_s: float = 0.0
    tokens: int = 0
    missing: str = "the link was never cut: the text was complete before"
    outages: list[Outage] = field(default_factory=list)
    struck: list[Event] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _starting: asyncio.Future[None] | None = None

    def came(self, token: Token) -> None:
        """A token."""
        self.tokens += 1
        self.show.token(token, not self._is_home())
        self._news.set()

    def told(self, kind: str, text: str) -> None:
        """The generation says what happened to it."""
        at_s = time.monotonic() - self.began_s if self.began_s else 0.0
        self.show.told(Event(at_s, kind, text))
        self._news.set()

    async def run(self) -> None:
        """Break one thing after the other, as long as there is text to come."""
        total, silence_s, away_s = self.options.max_new_tokens, self.options.silence_s, self.options.away_s
        await self._until(lambda: self.tokens >= SILENCE_AT * total)
        self.missing = "the worker was never killed: the text was complete before it had the work again"
        start_s = self._strike("silent", "the link falls silent: what either end sends is lost")
        self.line.inject(Injection(Fault.DROP_BOTH))
        self.outages.append(Outage("silent", start_s, start_s + silence_s))
        await asyncio.sleep(silence_s)
        self.line.heal()
        self._strike("healed", "the link lets through again; what was open stays dead")
        await self._until(self._is_home)
        least = max(KILL_AT * total, self.tokens + WELL * total)
        await self._until(lambda: self.tokens >= least and self._is_home())

        self.missing = "the worker came too late: the text was complete before it had the work again"
        start_s = self._strike("killed", f"the worker's process {self.host.pid} is killed (SIGKILL)")
        self.host.kill()
        self.outages.append(Outage("killed", start_s, float("inf")))
        await asyncio.sleep(away_s)
        self._starting = asyncio.ensure_future(asyncio.to_thread(self.host.start))
        await asyncio.shield(self._starting)
        stop_s = self._strike("restarted", f"another, process {self.host.pid}, listens in its place; it holds nothing")
        self.outages[-1] = Outage("killed", start_s, stop_s)
        await self._until(self._is_home)
        self.missing = ""

    async def settle(self) -> None:
        """Whatever was being started is there, and so can be ended."""
        self.line.heal()
        if self._starting:
            await self._starting

    def _is_home(self) -> bool:
        return not self.generation.is_degraded and self.generation.decision.partition == self.generation.home.partition

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._news.clear()
            await self._news.wait()

    def _strike(self, kind: str, text: str) -> float:
        event = Event(time.monotonic() - self.began_s, kind, text)
        self.struck.append(event)
        self.show.struck(event)
        return event.at_s
