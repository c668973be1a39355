"""What a decision maker may see, and the one thing it does. It does not know whether the world is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from splitwise_llm.decision import Decision
from splitwise_llm.spec import Dtype, ModelSpec, Weights


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


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything a policy may base a decision on. Later rooms add fields and take none away."""

    model: ModelSpec
    machines: tuple[MachineView, ...]
    prompt_tokens: int
    max_new_tokens: int


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
