"""What is known of machines and links when a policy is asked, and where each figure is from.

It sends nothing: it reads what greetings said. It does not know how decisions are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from splitwise_llm.cost import UNLIMITED, Drafter, Host, Limits, Load, World
from splitwise_llm.decision import WirePrecision
from splitwise_llm.engine.greeting import Greeted
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.telemetry import Advert, LinkFigures
from splitwise_llm.engine.walk import Request
from splitwise_llm.errors import SpecError
from splitwise_llm.observation import EVERYTHING, Ages, MachineView, Observation, Tools, usable_bytes
from splitwise_llm.plan import DEVICE
from splitwise_llm.records import LinkRecord
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, Weights
from splitwise_llm.units import parse_rate
from splitwise_llm.wire.shaper import LinkShape, Rate

Pair = tuple[int, int]
LOSSLESS = {
    Dtype.FP32: WirePrecision.FP32, Dtype.BF16: WirePrecision.BF16, Dtype.FP16: WirePrecision.FP16,
}  # fmt: skip
DRAFTS = (0, 1, 2, 4)
"""Lengths that a policy may choose between; what is verified in a round may be less."""
LOSSY = (WirePrecision.INT8, WirePrecision.INT4)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a link is believed to carry (bytes/s): `up` from the machine of the lower number; and how one knows."""

    up: float
    down: float
    source: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `20mbit`, or `up=20mbit down=50mbit`. Raises SpecError."""
        given = dict(word.split("=", 1) for word in text.split() if "=" in word)
        if set(given) == {"up", "down"} and len(text.split()) == 2:
            return cls(parse_rate(given["up"]), parse_rate(given["down"]), "given")
        if given or not text.strip():
            raise SpecError(f"{text!r} are no rates of a link: write 20mbit, or 'up=20mbit down=50mbit'")
        return cls(parse_rate(text), parse_rate(text), "given")

    @classmethod
    def of_shape(cls, shape: LinkShape) -> Self:
        """What a shaped link carries on average; a direction without a limit is `ASSUMED`."""
        up_share = 1 - shape.outage.for_s / shape.outage.every_s if shape.outage else 1.0
        limited = [rate is not None for rate in (shape.up, shape.down)]
        source = "its shape" if all(limited) else f"its shape, and {ASSUMED.source}" if any(limited) else ASSUMED.source
        return cls(_mean(shape.up) * up_share, _mean(shape.down) * up_share, source)


ASSUMED = Rates(1.25e8, 1.25e8, "assumed: 1 Gbit/s")
"""Of a link about whose rates nothing was said."""


def _mean(rate: Rate) -> float:
    if rate is None:
        return ASSUMED.up
    return rate if isinstance(rate, float | int) else rate.mean_bytes_per_s


@dataclass(frozen=True, slots=True)
class Survey:
    """The machines of one generation, workers by number as far as they answered, and what is believed of links.

    Links between workers (`direct`) cannot be timed from here: their RTT is taken as the longer of those to the two.
    """

    machine: Machine
    names: Sequence[str]
    greeted: Mapping[int, Greeted]
    rates: Mapping[Pair, Rates]
    direct: frozenset[Pair] = frozenset()
    """First < second."""
    figures: Mapping[int, LinkFigures] = field(default_factory=dict)
    """Of links to workers, where they are measured as they are used."""
    adverts: Mapping[int, Advert] = field(default_factory=dict)
    """What workers said of themselves last."""
    drafter: Drafter | None = None
    """Who proposes tokens here, and how often they were right; None: nobody."""
    joined: frozenset[int] = frozenset()
    """Workers at which this session is open, and so among those that they count."""

    def observe(self, request: Request, limits: Limits = UNLIMITED, tools: Tools | None = None) -> Observation:
        """What a policy is shown. Without `tools`: what loses nothing. `world` is None unless every machine that
        answered is profiled.

        A worker with n other sessions is taken to compute n + 1 sequences at a time, as every session may be
        computing; where its figures are not known, one after the other.
        """
        missing = frozenset(range(1, len(self.names))) - set(self.greeted)
        others = {n: self._others(n) for n in self.greeted}
        world, context = self._world(), request.prompt_tokens + max(request.max_new_tokens // 2, 1)
        loads = {n: self._load(world, n, 1 + count, context) for n, count in others.items() if count}
        return Observation(
            self.machine.spec,
            tuple(self._view(number) for number in range(len(self.names))),
            request.prompt_tokens,
            request.max_new_tokens,
            world=world,
            loads=loads,
            limits=replace(limits, unreachable=limits.unreachable | missing),
            tools=self._tools(tools),
            cautious=self._world(cautious=True) if self.figures else None,
            ages_s={(DEVICE, n): Ages(one.rtt_age_s, one.up_age_s, one.down_age_s) for n, one in self.figures.items()},
        )

    @staticmethod
    def _load(world: World | None, number: int, sessions: int, context: int) -> Load:
        if world is None:
            return Load(slow=float(sessions), batch=float(sessions))
        return world.load(number, sessions, context=context)

    def _tools(self, tools: Tools | None) -> Tools:
        tools = tools or Tools((self._lossless(),), EVERYTHING.chunks, DRAFTS)
        return tools if self.drafter else replace(tools, drafts=(0,))

    def _others(self, number: int) -> int:
        """Sessions of others at a worker."""
        advert = self.adverts.get(number)
        if advert is None:
            return self.greeted[number].welcome.sessions
        return max(advert.sessions - (number in self.joined), 0)

    def links(self, world: World) -> tuple[LinkRecord, ...]:
        """The links of what was observed, for a record."""
        return tuple(
            LinkRecord(
                self.names[a], self.names[b], link.rtt_s, link.up_bytes_per_s, link.down_bytes_per_s,
                self._source((a, b)),
            )
            for (a, b), link in world.links.items()
            if {a, b} <= {DEVICE, *self.greeted}
        )  # fmt: skip

    @property
    def answered(self) -> tuple[Host, ...]:
        """The machines that answered, the device first, as they are priced; none where not all of them are profiled."""
        hosts = [self._host(number) for number in (DEVICE, *sorted(self.greeted))]
        known = tuple(host for host in hosts if host is not None)
        return known if len(known) == len(hosts) else ()

    def _source(self, pair: Pair) -> str:
        figures = self.figures.get(pair[1]) if pair[0] == DEVICE else None
        if figures is not None and math.isfinite(max(figures.up_age_s, figures.down_age_s)):
            return "measured"
        return self.rates.get(pair, ASSUMED).source

    def _view(self, number: int) -> MachineView:
        name, machine = self.names[number], self.machine
        if number == DEVICE:
            known = machine.figures is not None
            return MachineView(name, True, machine.memory_bytes, machine.dtype, machine.weights, profiled=known)
        if number not in self.greeted:
            return MachineView(name, False, 0, Dtype.FP32, Weights.FULL)
        one = self.greeted[number]
        said, known = one.welcome, one.figures is not None
        return MachineView(name, True, said.memory_bytes, Dtype(said.dtype), Weights(said.weights), one.rtt_s, known)

    def _lossless(self) -> WirePrecision:
        """What carries any of the formats computed in; machines that differ meet in fp32."""
        formats = {self.machine.dtype, *(Dtype(one.welcome.dtype) for one in self.greeted.values())}
        return LOSSLESS[formats.pop()] if len(formats) == 1 else WirePrecision.FP32

    def _world(self, cautious: bool = False) -> World | None:
        hosts = tuple(self._host(number) for number in range(len(self.names)))
        known = tuple(host for host in hosts if host is not None)
        if len(known) < len(hosts):
            return None
        links = {(DEVICE, number): self._link((DEVICE, number), self._rtt_s(number)) for number in range(1, len(hosts))}
        for number, one in self.figures.items():
            links[DEVICE, number] = one.pessimistic if cautious else one.fast
        for a, b in sorted(self.direct):
            links[a, b] = self._link((a, b), max(self._rtt_s(a), self._rtt_s(b)))
        return World(self.machine.spec, known, links, drafter=self.drafter or Drafter(0.0))

    def _host(self, number: int) -> Host | None:
        """A machine as it is priced, by the name it has here; one that did not answer is in nobody's reach, so any
        figures do."""
        view = self._view(number)
        if number == DEVICE:
            figures, stretch = self.machine.figures, self.machine.stretch
        elif number in self.greeted:
            figures, stretch = self.greeted[number].figures, self.greeted[number].welcome.stretch
        else:
            figures, stretch = DeviceSpec(view.name, 1e9, 1e9, 1e6), 1.0
        if figures is None:
            return None
        device = replace(figures, name=view.name, memory_bytes=usable_bytes(view.memory_bytes))
        return Host(device, view.dtype, view.weights, stretch=stretch)

    def _rtt_s(self, number: int) -> float:
        return self.greeted[number].rtt_s if number in self.greeted else 0.0

    def _link(self, pair: Pair, rtt_s: float) -> LinkSpec:
        rates = self.rates.get(pair, ASSUMED)
        return LinkSpec(rtt_s, rates.up, rates.down)
