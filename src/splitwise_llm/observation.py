"""What a decision maker may see, and the one thing it does. It does not know whether the world is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import UNLIMITED, Job, Limits, Load, Pair, Table, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.lyapunov import Budgets
from splitwise_llm.rebuild import Holdings
from splitwise_llm.spec import Dtype, ModelSpec, Weights

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MachineView:
    """One machine as the session sees it; index 0 of `Observation.machines` is the device itself."""

    name: str
    reachable: bool
    memory_bytes: int
    dtype: Dtype
    weights: Weights
    rtt_s: float | None = None
    """Measured when the link was opened; None for the device itself."""
    profiled: bool = False
    """Whether its speed and power are known."""


def usable_bytes(memory_bytes: float) -> float:
    """What a machine says of its memory, as the nearest that a `DeviceSpec` may have."""
    return min(max(float(memory_bytes), 1e6), 1e15)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a decision may use besides the partition; the same for every policy that is compared."""

    wires: tuple[WirePrecision, ...] = (WirePrecision.FP16,)
    chunks: tuple[int | None, ...] = (None,)
    drafts: tuple[int, ...] = (0,)
    prefill_wires: tuple[WirePrecision | None, ...] = (None,)
    """On the wire while a prompt is prefilled; None: as afterwards."""

    @property
    def by_phase(self) -> tuple[tuple[WirePrecision, WirePrecision | None], ...]:
        """Precisions on the wire while tokens flow, and before; each pair once."""
        pairs = product(self.wires, self.prefill_wires)
        return tuple(dict.fromkeys((wire, None if early is wire else early) for wire, early in pairs))

    def allow(self, decision: Decision) -> bool:
        """Whether a decision keeps to them."""
        return (
            decision.wire in self.wires
            and decision.prefill_chunk in self.chunks
            and decision.draft in self.drafts
            and decision.prefill_wire in self.prefill_wires
        )


PLAIN = Tools()
EVERYTHING = Tools(
    (WirePrecision.FP16, WirePrecision.INT8, WirePrecision.INT4), (None, 32, 128), (0, 1, 2, 3, 4, 6)
)  # fmt: skip


class Occasion(StrEnum):
    """Why a policy is asked."""

    ADMISSION = "admission"
    EPOCH = "epoch"
    """So many tokens or seconds have passed."""
    LINK = "link"
    """A link changed class."""
    LOAD = "load"
    """A machine's load changed class."""
    FAULT = "fault"
    """A machine was lost."""
    RETURN = "return"
    """A lost machine is back."""


@dataclass(frozen=True, slots=True)
class Ages:
    """Seconds since each figure of a link was measured; inf: never, so that it is only believed."""

    rtt_s: float
    up_s: float
    down_s: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a running generation is: what it runs, and how far it has come."""

    decision: Decision
    context: int
    """Positions whose keys and values the decision's machines have."""
    tokens_out: int
    admitted: Decision | None = None
    """What the policy chose at admission, to which those that decide once return after a failover; None: what it
    runs."""
    holdings: Holdings | None = None
    """What each machine has of the session; None: what the decision makes them have."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything a policy may base a decision on. Later rooms add fields and take none away."""

    model: ModelSpec
    machines: tuple[MachineView, ...]
    prompt_tokens: int
    max_new_tokens: int
    world: World | None = None
    """The machines and links as they are believed to be now; None when nobody has measured them."""
    nominal: World | None = None
    """The same as they were when plans were made; None: as now."""
    loads: Mapping[int, Load] = field(default_factory=dict)
    """What others make of the machines, as last heard."""
    limits: Limits = UNLIMITED
    tools: Tools = PLAIN
    expected_tokens: int | None = None
    """A guess at the answer's length; None: as many as are allowed."""
    queues: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Seconds of work before device, uplink, downlink and cloud."""
    virtual: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    arrivals_per_s: float = 0.0
    """Requests of this device, as counted so far; 0 when nobody has."""
    placement: Placement | None = None
    """None at admission."""
    occasion: Occasion = Occasion.ADMISSION
    waited_s: float = 0.0
    """Since the request arrived."""
    budgets: Budgets = field(default_factory=Budgets)
    """What may be spent on average, to whose queues `virtual` belongs."""
    cautious: World | None = None
    """`world` with links at the pessimistic quantile of what was measured; None: nobody keeps one."""
    ages_s: Mapping[Pair, Ages] = field(default_factory=dict)
    """How old the figures of `world`'s links are; a link that is missing was never measured."""
    battery: float | None = None
    """Share of the device's battery that is left; None: it has none, or none that can be read."""
    joules: float = 0.0
    """That the device has spent on this request so far."""
    past: Past | None = None
    """Of one system; None: nobody remembers."""

    def unpriced(self, who: str) -> str:
        """Why who plans by prices cannot answer where `world` is None: what is not known, and the remedy."""
        names = ", ".join(machine.name for machine in self.machines if machine.reachable and not machine.profiled)
        known = f"machine {names} is not profiled: start it" if names else "these machines are not profiled: start them"
        return f"{who} needs figures, and {known} with --profile FILE or --emulate DEVICE"

    @property
    def job(self) -> Job:
        """The request as far as it is known."""
        return Job(self.prompt_tokens, self.expected_tokens or self.max_new_tokens)

    @property
    def remaining_tokens(self) -> int:
        """Expected tokens still to come: after the first one (admission), or after those there are, then at least 1."""
        if self.placement is None:
            return self.job.tokens_out - 1
        return max(self.job.tokens_out - max(self.placement.tokens_out, 1), 1)


EPOCHS = 8
"""Of decision epochs that are remembered."""
SEEN = ("age_s", "up", "rtt_s", "up_bytes_per_s", "down_bytes_per_s", "slow", "wait_s")
"""What is remembered of each: how long ago it was, whether the link was up, and what link and cloud were said to be."""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """What devices remember, as they saw it. Arrays lead with the system."""

    is_down: NDArray[np.bool_]
    """(systems,): whether the link is seen to be down now."""
    since_s: Floats
    """(systems,): for how long it has been up, or down."""
    age_s: Floats
    """(systems,): of what is known of link and cloud, the older of the two; 0: live."""
    slots: Floats
    """(systems,): requests that the device works at at a time."""
    others: Floats
    """(systems, 2): other requests in its slots, and at its door."""
    epochs: Floats
    """(systems, EPOCHS, SEEN): the latest first; rows of zeros where there were not so many."""
    outages: Floats
    """(systems, 3): number, sum of seconds, sum of their squares, of those that are over."""
    gaps: Floats
    """(systems, 3): the same of the times between them."""
    answers: Floats
    """(systems, 3): number, sum of tokens, sum of their squares, of answers that are finished."""

    @property
    def waiting(self) -> Floats:
        """(systems,): requests at the device's door."""
        return self.others[:, 1]

    @classmethod
    def nothing(cls, systems: int) -> Past:
        """Of devices that have just begun."""
        zero = np.zeros((systems, 3))
        return cls(
            np.zeros(systems, np.bool_), np.zeros(systems), np.zeros(systems), np.ones(systems), np.zeros((systems, 2)),
            np.zeros((systems, EPOCHS, len(SEEN))), zero, zero, zero,
        )  # fmt: skip

    def at(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Past:
        """Of some of the systems."""
        return Past(*(getattr(self, item.name)[which] for item in fields(self)))


class Policy(Protocol):
    """A decision maker: asked at admission, and by later rooms again while tokens flow."""

    def decide(self, observation: Observation) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Always:
    """The policy that decided beforehand: every static plan, and what `--partition` means."""

    decision: Decision

    def decide(self, observation: Observation) -> Decision:
        """The decision it was made with. Raises PartitionError if it does not fit what is observed."""
        self.decision.partition.check(observation.model, len(observation.machines))
        return self.decision


def innermost(policy: Policy) -> Policy:
    """The policy inside those that only add to another's answers, which keep it as `policy`."""
    while (inner := getattr(policy, "policy", None)) is not None:
        policy = inner
    return policy


@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """The same question asked of many systems at a time: which of a table's plans? Arrays lead with the system.

    Every array is what the decision maker believes, as old as its information is.
    """

    table: Table
    conditions: Floats
    """(systems, conditions)"""
    admissible: NDArray[np.bool_]
    """(systems, plans): neither forbidden nor out of reach now."""
    queues: Floats
    """(systems, 4): seconds of work before device, up, down, cloud."""
    virtual: Floats
    """(systems, 4)"""
    current: NDArray[np.int64]
    """(systems,): the plan a running generation is on; -1 at admission."""
    remaining_tokens: Floats
    """(systems,): expected tokens still to come after the first (admission) or after those there are."""
    entry_s: Floats
    """(systems, plans): in flight, seconds until the generation can go on with a plan; unused at admission."""
    entry_device_s: Floats
    """(systems, plans): of that, work of the device."""
    entry_cloud_s: Floats
    waited_s: Floats
    """(systems,): since the request arrived."""
    past: Past | None = None
    """None: nobody remembers."""
    outage_s: Floats | float = 0.0
    """(systems,): what conditions and entries hold of the rest of an outage."""

    def at(self, which: NDArray[np.bool_] | NDArray[np.int64] | slice) -> Menu:
        """About some of the systems."""
        once = ("table", "past", "outage_s")
        names = [item.name for item in fields(self) if item.name not in once]
        past = None if self.past is None else self.past.at(which)
        outage_s = np.broadcast_to(np.asarray(self.outage_s), self.current.shape)[which]
        return replace(self, past=past, outage_s=outage_s, **{name: getattr(self, name)[which] for name in names})


class Chooser(Protocol):
    """A decision maker for many systems at a time."""

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        """Per system the number of a plan, -1 to leave a running generation as it is or, at admission, to shed."""
        ...
