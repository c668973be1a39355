"""What is priced: a model on machines joined by links, and a request. Machine 0 is the device that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from splitwise_llm import plan as plans
from splitwise_llm.cost.accuracy import NO_LOSS, Accuracy
from splitwise_llm.cost.hosts import Host
from splitwise_llm.cost.terms import Basis, Form, Load, Pair
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.plan import DEVICE, TOKEN_ID_BYTES, Plan
from splitwise_llm.spec import LinkSpec, ModelSpec, Weights


@dataclass(frozen=True, slots=True)
class Job:
    """A request as far as its price goes."""

    prompt_tokens: int
    tokens_out: int

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.tokens_out < 1:
            raise RequestError(f"a request of {self.prompt_tokens}/{self.tokens_out} tokens; expected at least 1/1")

    @property
    def mean_context(self) -> int:
        """Positions an average decode step sees."""
        return self.prompt_tokens + max(self.tokens_out // 2, 1)

    @classmethod
    def parse(cls, text: str) -> Job:
        """From `128/128`: prompt tokens / tokens out. Raises RequestError."""
        first, slash, second = text.partition("/")
        if not slash or not first.strip().isdigit() or not second.strip().isdigit():
            raise RequestError(f"{text!r} is no request: write prompt/output tokens, as in 128/128")
        return cls(int(first), int(second))


@dataclass(frozen=True, slots=True)
class Drafter:
    """Who proposes tokens, and how often they are accepted (an i.i.d. probability; assumed unless measured)."""

    acceptance: float
    model: ModelSpec | None = None
    """A smaller model beside the embedding; None: lookup in the text so far, which costs nothing."""
    weights: Weights | None = None
    """Of that model; None: as the machine has the large one's."""

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance < 1:
            raise RequestError(f"acceptance {self.acceptance}; expected 0 up to (not including) 1")

    def tokens_per_round(self, draft: int) -> float:
        """Expected tokens of a step that verifies `draft` tokens: 1 + a + ... + a^draft."""
        return sum(self.acceptance**n for n in range(draft + 1))


@dataclass(frozen=True, slots=True)
class Tariff:
    """Money, with the date and place of each figure in docs/devices.md."""

    usd_per_kwh: float = 0.17
    """Assumed: a household's electricity."""
    usd_per_gb_down: float = 0.09
    """Assumed: what clouds ask for a gigabyte that leaves them; nothing for one that enters."""


@dataclass(frozen=True)
class World:
    """A model, the machines that may run it, and the links between them."""

    spec: ModelSpec
    hosts: tuple[Host, ...]
    links: Mapping[Pair, LinkSpec] = field(default_factory=dict)
    """By (a, b) with a < b; `up` is from a to b. Every worker has one to the device, or none at all has any."""
    accuracy: Accuracy = NO_LOSS
    drafter: Drafter = Drafter(0.0)
    tariff: Tariff = Tariff()

    def __post_init__(self) -> None:
        wanted = {(DEVICE, machine) for machine in range(1, len(self.hosts))}
        if not self.hosts or not wanted <= set(self.links):
            raise SpecError("a world has a device, and a link from it to every other machine")
        if any(not 0 <= a < b < len(self.hosts) for a, b in self.links):
            raise SpecError(
                f"links {sorted(self.links)} do not join machines 0 to {len(self.hosts) - 1}, first < second"
            )

    @property
    def direct(self) -> tuple[Pair, ...]:
        """Pairs of workers with a link of their own."""
        return tuple(pair for pair in sorted(self.links) if DEVICE not in pair)

    @cached_property
    def basis(self) -> Basis:
        return Basis(len(self.hosts), tuple(sorted(self.links)))

    def plan(self, decision: Decision) -> Plan:
        """The decision compiled for these machines. Raises PartitionError."""
        return plans.compile(decision, self.spec, len(self.hosts), self.direct)

    def conditions(self, loads: Mapping[int, Load] | None = None) -> Form:
        """The links as they are given, under some loads."""
        return self.basis.conditions(self.links, loads)

    def load(self, machine: int, batch: int, wait_s: float = 0.0, context: int = 256, rested: bool = False) -> Load:
        """What `batch` sequences of `context` positions make of a machine: whoever arrives waits for half of a
        running iteration, unless nobody else is there. Our own engine sends for the others before it goes on.
        `rested`: it waits for other machines between its steps, as an emulated one always does."""
        host = self.hosts[machine]
        rested = rested or host.stretch != 1
        step_s = host.model_s(self.spec, 1, context, batch, rested) + (batch - 1) * host.sending_s(TOKEN_ID_BYTES)
        slow = step_s / host.model_s(self.spec, 1, context, rested=rested)
        return Load(slow, batch, step_s / 2 if batch > 1 else 0.0, wait_s)
