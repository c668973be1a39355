"""The settings that claims are made for, as rows; how each is decided in, or shown, is not known here.

Rows without cases (peer-lan, edgeshard, lossy-channel) are no streams of requests: other benches compute them.
Requests per second are ours where the scenario names none: about half of what the device could do alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from splitwise_llm.cost import NO_LOSS, Accuracy, Drafter, Floor, Host, Job, Limits, Table, World
from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.sim.params import (
    Arrivals,
    CloudClass,
    CloudProcess,
    LinkClass,
    LinkProcess,
    Params,
    Seeing,
    Segment,
    SharedCloud,
)
from splitwise_llm.sim.physics import Physics
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model
from splitwise_llm.traces import RateTrace, RttTrace
from splitwise_llm.units import parse_rate
from splitwise_llm.workload import RequestTrace

CLOUD_DEVICE = "a100-80gb"
DRAFT_MODEL = "gpt2"
"""Drafts for both sides; its acceptance is assumed, not measured."""
ACCEPTANCES = (0.4, 0.6, 0.75)


def _class(mbit: float, rtt_ms: float, dwell_s: float, *, is_up: bool = True) -> LinkClass:
    rate = parse_rate(f"{mbit}mbit")
    return LinkClass(rtt_ms / 1e3, rate, rate, dwell_s, is_up)


WAN = LinkProcess((_class(50, 20, 20), _class(10, 40, 10), _class(2, 80, 6), _class(2, 80, 5, is_up=False)))
MEC = LinkProcess((_class(200, 4, 15), _class(50, 10, 8), _class(50, 10, 3, is_up=False)))
HEALTHY = LinkProcess((_class(50, 20, 60), _class(20, 30, 20)))
TUNNEL = LinkProcess((_class(50, 20, 146.7), _class(50, 20, 20, is_up=False)))
"""20 s without a link, 12 % of the time."""
BUSY, HEAVY, OVERLOAD = CloudClass(32, 0.1, 60.0), CloudClass(64, 1.0, 30.0), CloudClass(96, 6.0, 15.0)
ALWAYS_BUSY, BURSTY_CLOUD = CloudProcess((BUSY,)), CloudProcess((BUSY, HEAVY, OVERLOAD))
CALM_CLOUD = CloudProcess((BUSY, HEAVY))
FLOOR = Floor(2, 2)
PROMPT_CLASSES = (64, 128, 256, 512, 1024)
LONGEST_ANSWER = 512
"""Recorded requests are cut down to this, and to the longest prompt class."""
SHORT = {
    "orin-nx-16gb": "orin", "agx-orin-64gb": "agx", "galaxy-s23": "s23", "raspberry-pi-5": "pi5", "gpt2-xl": "gpt2xl",
    "llama-7b": "7b", "llama-13b": "13b",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A device (or several kinds, in turn) with a model, and in what it departs from its scenario."""

    devices: tuple[str, ...]
    model: str
    per_s: float
    label: str = ""
    link: LinkProcess | None = None
    cloud: CloudProcess | SharedCloud | None = None

    @property
    def name(self) -> str:
        """As in figures: `orin-7b`, with what sets it apart from its neighbours."""
        kinds = "+".join(SHORT.get(device, device) for device in self.devices)
        return "-".join(filter(None, (kinds, SHORT.get(self.model, self.model), self.label)))


@dataclass(frozen=True, slots=True)
class Scenario:
    """A row: the setting, and what must come out."""

    name: str
    says: str
    expects: str
    cases: tuple[Case, ...] = ()
    link: LinkProcess = WAN
    cloud: CloudProcess | SharedCloud = ALWAYS_BUSY
    floor: Floor | None = None
    job: Job = Job(128, 128)  # noqa: RUF009
    burst: float = 1.0
    num_devices: int = 1
    slots: int = 4
    segments: tuple[Segment, ...] = ()
    is_recorded: bool = False

    @property
    def limits(self) -> Limits:
        return Limits(floor=self.floor, in_turn=self.slots == 1)

    def case(self, name: str) -> Case:
        """Raises SpecError that names the cases there are."""
        for case in self.cases:
            if case.name == name:
                return case
        names = [case.name for case in self.cases]
        if not names:
            raise SpecError(f"scenario {self.name} is no stream of requests ({self.says}); its own bench computes it")
        raise SpecError(f"scenario {self.name} has no case {name!r}{_nearest(name, names)}: {', '.join(names)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


ORIN, AGX, S23, PI5 = "orin-nx-16gb", "agx-orin-64gb", "galaxy-s23", "raspberry-pi-5"
GPT2, L7, L13 = "gpt2-xl", "llama-7b", "llama-13b"
_RATES = ((ORIN, GPT2, 0.2), (S23, GPT2, 0.1), (PI5, GPT2, 0.04), (ORIN, L7, 0.07), (S23, L7, 0.04), (PI5, L7, 0.01),
          (ORIN, L13, 0.04), (AGX, L7, 0.1))  # fmt: skip


def _cases(*pairs: tuple[str, str], label: str = "", link: LinkProcess | None = None) -> tuple[Case, ...]:
    rates = {(device, model): rate for device, model, rate in _RATES}
    return tuple(Case((device,), model, rates[device, model], label, link) for device, model in pairs)


def _at(mbit: float) -> LinkProcess:
    return LinkProcess((_class(mbit, 20, 1e9),))


_TUNNELLED = ((ORIN, GPT2), (S23, GPT2), (ORIN, L7), (S23, L7), (PI5, L7), (ORIN, L13))
_RUSH = (("live", 0.0), ("old", 10.0))
_DAY = (
    Segment(HEALTHY, ALWAYS_BUSY, (0.5,)),
    Segment(WAN, ALWAYS_BUSY, (1.5, 0.5, 0.5)),
    Segment(WAN, BURSTY_CLOUD, (0.5, 1.5, 1.0)),
    Segment(TUNNEL, CALM_CLOUD, (1.0,)),
    Segment(MEC, BURSTY_CLOUD, (1.0, 1.0, 2.0)),
)

SCENARIOS: tuple[Scenario, ...] = (
    Scenario("healthy-cloud", "no floor, a good link, a busy A100", "cloud-only wins; the policy within 1 %",
             tuple(Case((device,), L7, 0.2) for device in (ORIN, AGX, S23, PI5)), HEALTHY),
    Scenario("capable-edge", "floor 2+2, WAN, a small model", "edge-only (drafting) wins; the policy within 1 %",
             _cases((ORIN, GPT2), (S23, GPT2)), WAN, BURSTY_CLOUD, FLOOR),
    Scenario("flaky-wan", "no floor, WAN with outages of 5 s, cloud bursts", "p95 against cloud-only falls on fast "
             "devices, and never rises by more than 1 %",
             _cases((ORIN, GPT2), (ORIN, L7), (S23, L7), (PI5, L7)), WAN, BURSTY_CLOUD),
    Scenario("tunnel", "no floor, outages of 20 s, 12 % of the time", "p95 -53..-92 % except on the Pi with 7B",
             _cases(*_TUNNELLED)
             + _cases(*_TUNNELLED, label="periodic", link=replace(TUNNEL, periodic=True)), TUNNEL),
    Scenario("rush-hour", "120 devices, one A100 with 48 sessions, bursts x2", "20 % better mean than selfish",
             (*(Case((ORIN,), L7, rate, f"{rate}-{label}", None, SharedCloud(48, information_s=age))
                for rate in (0.08, 0.12, 0.15, 0.2) for label, age in _RUSH),
              Case((ORIN, S23, PI5), L7, 0.15, "0.15-mixed", None, SharedCloud(48, information_s=10.0))),
             _at(50), SharedCloud(48), burst=2.0, num_devices=120),
    Scenario("private-mec", "floor 2+2, MEC", "U wins; 1.4-1.8x over the static fp16 layer plan",
             _cases((ORIN, L7), (S23, L7), (PI5, L7), (ORIN, L13)), MEC, CALM_CLOUD, FLOOR),
    Scenario("private-wan", "floor 2+2, WAN", "edge and U in turn; 1.5-4x over the static plan",
             _cases((ORIN, L7), (S23, L7), (PI5, GPT2)), WAN, BURSTY_CLOUD, FLOOR),
    Scenario("long-prompt", "floor 2+2, 1024 in / 64 out, 5-50 Mbit/s", "wire precision and chunks matter; edge wins "
             "on Orin at 5 Mbit/s and below",
             tuple(Case((device,), L7, 0.04, f"{mbit}mbit", _at(mbit))
                   for device in (ORIN, S23) for mbit in (5, 10, 20, 50)),
             _at(20), ALWAYS_BUSY, FLOOR, Job(1024, 64)),
    Scenario("too-big", "13B on phones and a Pi, a rationed cloud, MEC", "splitting is the only relief",
             (Case((S23,), L13, 0.04), Case((PI5,), L13, 0.02)), MEC, SharedCloud(8, information_s=2.0),
             num_devices=40),
    Scenario("peer-lan", "two or three machines on a LAN share halves", "heads and FFN columns win beside a peer, and "
             "not beside an A100"),
    Scenario("edgeshard", "EdgeShard's testbed", "its programs find plans at least as good as published"),
    Scenario("lossy-channel", "accuracy against load over a lossy channel", "both find the exhaustive optimum"),
    Scenario("day", "load, links and device mix change every 10-20 minutes", "who adapts beats constants by 3 %",
             (Case((ORIN, S23, PI5), L7, 0.03), Case((ORIN, S23), GPT2, 0.1)), WAN, ALWAYS_BUSY, num_devices=6,
             segments=_DAY),
    Scenario("real-traces", "recorded links and recorded requests, thinned to one device", "the summary row",
             _cases((ORIN, L7), (S23, L7), (ORIN, GPT2)), replace(WAN, idle_after_s=10.0, wake_s=0.8), BURSTY_CLOUD,
             is_recorded=True),
)  # fmt: skip


def find_scenario(name: str) -> Scenario:
    """A scenario by its name. Raises SpecError that suggests the nearest."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    names = [scenario.name for scenario in SCENARIOS]
    raise SpecError(f"unknown scenario {name!r}{_nearest(name, names)}; the scenarios are {', '.join(names)}")


@dataclass(frozen=True, slots=True)
class Recordings:
    """What was recorded, for scenarios that replay it."""

    requests: RequestTrace | None
    """None: only the link was recorded, and requests are drawn."""
    up: RateTrace
    down: RateTrace | None = None
    rtt: RttTrace | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """Worlds to learn in and worlds to be judged in: other seeds; to learn in, each with other dwell times and
    rates, by up to `spread` either way."""

    seed: int
    spread: float


TRAIN, TEST = Split(1_000, 0.5), Split(2_000, 0.0)


def prompt_classes(model: str) -> tuple[int, ...]:
    """What recorded prompts are taken for, in tokens."""
    return tuple(prompt for prompt in PROMPT_CLASSES if prompt < find_model(model).max_context)


def worlds(
    scenario: Scenario, case: Case, acceptance: float = 0.6, accuracy: Accuracy = NO_LOSS
) -> tuple[tuple[World, Job], ...]:
    """What tables are to be made for: per kind of device and prompt class, the world as expected and the job."""
    link = next(kind for kind in (case.link or scenario.link).classes if kind.is_up)
    pair = {(0, 1): LinkSpec(link.rtt_s, link.up_bytes_per_s, link.down_bytes_per_s)}
    spec, server = find_model(case.model), Host(find_device(CLOUD_DEVICE))
    drafter = Drafter(acceptance, find_model(DRAFT_MODEL))
    jobs = [scenario.job]
    if scenario.is_recorded:
        jobs = [Job(prompt, scenario.job.tokens_out) for prompt in prompt_classes(case.model)]
    return tuple(
        (World(spec, (Host(find_device(device), Dtype.FP16, Weights.INT4), server), pair, accuracy, drafter), job)
        for device in case.devices
        for job in jobs
    )


def build(
    scenario: Scenario,
    case: Case,
    tables: Sequence[Table],
    recordings: Recordings | None = None,
    *,
    seeing: Seeing | None = None,
    budgets: Budgets | None = None,
    horizon_s: float = 3600.0,
) -> Params:
    """The simulated system of a case whose plans are `tables`, one for each of `worlds`. Raises SpecError."""
    arrivals = Arrivals(case.per_s, scenario.burst)
    arrivals = replace(arrivals, prompt_tokens=scenario.job.prompt_tokens, output_tokens=scenario.job.tokens_out)
    link, seeing = case.link or scenario.link, seeing or Seeing()
    classes: tuple[int, ...] = ()
    if scenario.is_recorded:
        if recordings is None or recordings.requests is None:
            raise SpecError(
                f"scenario {scenario.name} replays recordings: give a folder of links and a file of requests"
            )
        classes = tuple(table.bills[0].job.prompt_tokens for table in tables[: len(tables) // len(case.devices)])
        link = replace(link, up=recordings.up, down=recordings.down, rtt=recordings.rtt)
        arrivals = replace(arrivals, recorded=recordings.requests.clip(max(classes), LONGEST_ANSWER))
        seeing = replace(seeing, length_error=None) if seeing.length_error == 0.0 else seeing
    prices = [table.at(table.world.conditions()).total_s.min() for table in tables]
    return Params(
        physics=Physics(tables),
        link=link,
        cloud=case.cloud or scenario.cloud,
        arrivals=arrivals,
        seeing=seeing,
        penalty=Penalty(t_ref_s=float(min(prices))),
        budgets=budgets or Budgets(),
        segments=scenario.segments,
        num_devices=scenario.num_devices,
        kinds=tuple(range(len(case.devices))),
        prompt_classes=classes,
        slots=scenario.slots,
        horizon_s=horizon_s,
    )
