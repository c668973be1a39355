"""What a simulated world is like: frozen figures, no state and no randomness."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from splitwise_llm.cost import Load
from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.sim.batching import Server
from splitwise_llm.sim.physics import CLOUD, Floats, Ints, Physics
from splitwise_llm.spec import LinkSpec
from splitwise_llm.traces import RateTrace, RttTrace
from splitwise_llm.workload import RequestTrace

NEVER_S = 1e18
"""Later than anything; finite, so that differences of times are numbers."""


@dataclass(frozen=True, slots=True)
class LinkClass:
    """A state of the link. In an outage nothing passes; its figures are those of the time before."""

    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    mean_dwell_s: float = NEVER_S
    is_up: bool = True

    @classmethod
    def of(cls, link: LinkSpec, mean_dwell_s: float = NEVER_S) -> LinkClass:
        return cls(link.rtt_s, link.up_bytes_per_s, link.down_bytes_per_s, mean_dwell_s)


@dataclass(frozen=True, slots=True)
class CloudClass:
    """What others make of the cloud: sequences in its batch, and how long it lets one wait for admission."""

    batch: int = 1
    wait_s: float = 0.0
    mean_dwell_s: float = NEVER_S


@dataclass(frozen=True, slots=True)
class LinkProcess:
    """How the link changes: between neighbouring classes, at random after exponential dwell times; in turn and
    after exactly these times; or as recorded."""

    classes: tuple[LinkClass, ...]
    periodic: bool = False
    up: RateTrace | None = None
    """Recorded rates, resampled to `step_s`; each trace of the simulation starts at its own place."""
    down: RateTrace | None = None
    rtt: RttTrace | None = None
    step_s: float = 1.0
    idle_after_s: float = NEVER_S
    """A radio that has been idle so long sleeps."""
    wake_s: float = 0.0
    """What waking it takes before anything passes."""
    reconnect_s: float = 0.0
    """What sessions take to go on after an outage."""

    def __post_init__(self) -> None:
        if not any(kind.is_up for kind in self.classes):
            raise SpecError("a link that is never up is no link: give a class with is_up=True")
        if any(not kind.mean_dwell_s > 0 for kind in self.classes):
            raise SpecError("link classes last longer than 0 s")

    @property
    def mean_outage_s(self) -> float:
        """How long outages last on average; 0 without any."""
        dwell = [kind.mean_dwell_s for kind in self.classes if not kind.is_up]
        return sum(dwell) / len(dwell) if dwell else 0.0


@dataclass(frozen=True, slots=True)
class CloudProcess:
    """The cloud as seen from devices that do not load it: classes of load, changing to neighbours at random."""

    classes: tuple[CloudClass, ...] = (CloudClass(),)
    periodic: bool = False


@dataclass(frozen=True, slots=True)
class SharedCloud:
    """A cloud that the simulated devices load: continuous batching with limited sessions and cache blocks."""

    sessions: int = 48
    """Admission limit."""
    block_positions: int = 16
    blocks: int | None = None
    """Of cache; None: what the cloud's memory holds beside the weights."""
    chunk: int = 512
    """Prompt positions that an iteration takes in beside the sequences it decodes."""
    background: int = 0
    """Sequences of others that are always in the batch."""
    information_s: float = 0.0
    """The load is published so often: what devices know of it is 0 to so many seconds old. 0: live."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When requests come and how long they are, per device."""

    per_s: float = 0.1
    burst: float = 1.0
    """In bursts the rate is so many times the rate between bursts; 1: plain Poisson. All devices burst together."""
    calm_s: float = 60.0
    burst_s: float = 20.0
    """Mean durations."""
    think_s: float | None = None
    """A closed loop: each device has one user, who asks again so long (mean, exponential) after an answer."""
    prompt_tokens: int = 128
    output_tokens: int = 128
    output_spread: float = 0.0
    """Sigma of a log-normal output length with that mean; 0: all alike."""
    recorded: RequestTrace | None = None
    """Requests as recorded, in place of all above; each trace of the simulation starts at its own place."""

    def __post_init__(self) -> None:
        if not self.per_s > 0 or not self.burst >= 1 or min(self.calm_s, self.burst_s) <= 0:
            raise SpecError(f"requests come at a rate above 0, bursts at 1 times that or more: {self}")
        if min(self.prompt_tokens, self.output_tokens) < 1 or self.output_spread < 0:
            raise SpecError(f"a request has at least one token each way, and a spread of 0 or more: {self}")


@dataclass(frozen=True, slots=True)
class Seeing:
    """What decision makers know, and how late."""

    delay_s: float = 0.0
    """The link's and the cloud's class are seen so much later."""
    needs_traffic: bool = False
    """They are seen only while something crosses the link."""
    length_error: float | None = 0.0
    """Sigma of the log-normal error of predicted output lengths; None: only the mean length is known. A
    clairvoyant has 0 where lengths differ."""
    outage_guess_s: float | None = None
    """How long an outage is expected to go on; None: its mean dwell time."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a day: how the link and the cloud change, and by which factor each kind of device asks more."""

    link: LinkProcess
    cloud: CloudProcess | None = None
    """None: as at other times; a shared cloud is always the same."""
    rates: tuple[float, ...] = (1.0,)
    """By kind; the first one for kinds that have none."""


@dataclass(frozen=True)
class Params:
    """One simulated system: devices that are alike but for their table, one link each, one cloud."""

    physics: Physics
    link: LinkProcess
    cloud: CloudProcess | SharedCloud = CloudProcess()
    arrivals: Arrivals = Arrivals()
    seeing: Seeing = Seeing()
    penalty: Penalty = field(default_factory=lambda: Penalty(t_ref_s=1.0))
    budgets: Budgets = field(default_factory=Budgets)
    segments: tuple[Segment, ...] = ()
    """A day: segments of `segment_s` (shortest, longest) follow each other in an order of each trace's own."""
    segment_s: tuple[float, float] = (600.0, 1200.0)
    num_devices: int = 1
    kinds: tuple[int, ...] = (0,)
    """The kind of device d is `kinds[d % len(kinds)]`; a kind has `prompt_classes` tables, one after another."""
    prompt_classes: tuple[int, ...] = ()
    """Prompt lengths that tables were made for, rising; a request takes the nearest by ratio. Empty: one table."""
    slots: int = 4
    """Requests a device works at; others wait at its door, first come, first served."""
    epoch_s: float = 1.0
    epoch_tokens: float = 16.0
    horizon_s: float = 3600.0
    """What changes by itself repeats after so long."""
    t_max_s: float = 600.0
    """What a request that was shed or not finished counts as."""
    failed_moves: float = 0.0
    """Probability that a move ends where it began, its time spent."""
    battery: bool = False
    """Whether devices with a battery stop when it is empty."""
    sample_s: float = 1.0
    """Queue lengths are noted so often."""
    fewest_left: float = 8.0
    """Tokens that an unfinished answer is expected to have left at the least, if its length was mispredicted."""

    def __post_init__(self) -> None:
        tables, classes = len(self.physics.tables), max(len(self.prompt_classes), 1)
        if (max(self.kinds) + 1) * classes > tables or min(self.kinds) < 0:
            raise SpecError(
                f"{tables} tables cannot serve {max(self.kinds) + 1} kinds of device with {classes} prompt classes "
                "each; give one table per kind and class"
            )
        if self.num_devices < 1 or not 1 <= self.slots <= 64 or self.horizon_s <= 0 or self.sample_s <= 0:
            raise SpecError("a system has a device or more with 1 to 64 slots each, and a horizon above 0 s")

    @property
    def is_shared(self) -> bool:
        """Whether the simulated devices load the cloud."""
        return isinstance(self.cloud, SharedCloud)

    @property
    def cloud_processes(self) -> tuple[CloudProcess, ...]:
        """How a cloud that devices do not load changes, segment by segment."""
        if not isinstance(self.cloud, CloudProcess):
            return (CloudProcess(),)
        return tuple(segment.cloud or self.cloud for segment in self.segments) or (self.cloud,)

    @property
    def links(self) -> tuple[LinkProcess, ...]:
        """How links change, segment by segment."""
        return tuple(segment.link for segment in self.segments) or (self.link,)

    @cached_property
    def cloud_rows(self) -> Floats:
        """(classes, 4): slow, share, join, wait of each class of a cloud that devices do not load."""
        classes = [kind for process in self.cloud_processes for kind in process.classes]
        world = self.physics.tables[0].world
        loads = [world.load(CLOUD, kind.batch, kind.wait_s) for kind in classes]
        return np.array([load_row(load) for load in loads])

    @cached_property
    def server(self) -> Server:
        """The cloud as a batching server."""
        world = self.physics.tables[0].world
        return Server.of(world.spec, world.hosts[CLOUD])

    @cached_property
    def chunk_s(self) -> float:
        """An iteration of a shared cloud that takes in a chunk of prompts and decodes nothing."""
        chunk = self.cloud.chunk if isinstance(self.cloud, SharedCloud) else SharedCloud().chunk
        return float(self.server.iteration_s(np.zeros(1), np.zeros(1), float(chunk))[0])

    @cached_property
    def blocks(self) -> int:
        """Cache blocks of a shared cloud: what was given, or what its memory holds."""
        cloud = self.cloud if isinstance(self.cloud, SharedCloud) else SharedCloud()
        return cloud.blocks or self.server.blocks(cloud.block_positions)

    @cached_property
    def device_tables(self) -> Ints:
        """(devices,): the first table of each device's kind."""
        classes = max(len(self.prompt_classes), 1)
        return np.resize(np.array(self.kinds, np.int64), self.num_devices) * classes

    @cached_property
    def idle_w(self) -> Floats:
        """(devices,): what each device draws when it does nothing."""
        result: Floats = self.physics.idle_w[self.device_tables]
        return result

    @property
    def outage_guess_s(self) -> float:
        guess = self.seeing.outage_guess_s
        return self.link.mean_outage_s if guess is None else guess

    @property
    def mean_tokens(self) -> float:
        """Mean output length."""
        recorded = self.arrivals.recorded
        if recorded is None:
            return float(self.arrivals.output_tokens)
        return sum(r.output_tokens for r in recorded.requests) / max(len(recorded.requests), 1)


def load_row(load: Load) -> tuple[float, float, float, float]:
    """slow, share, join, wait, in the order of conditions."""
    return load.slow, load.slow / load.batch, load.join_s, load.wait_s
