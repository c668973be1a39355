"""What a policy answers: a partition and how to drive it. It does not know how the answer was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Partition

MAX_DRAFT = 16


class WirePrecision(StrEnum):
    """How activations are written on a link; the quantised forms carry one fp32 scale per token."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def is_quantised(self) -> bool:
        return self in (WirePrecision.INT8, WirePrecision.INT4)

    def payload_bytes(self, positions: int, d_model: int) -> int:
        """Bytes of `positions` activations of width `d_model`: tensor data and scales, no framing."""
        row = {"fp32": 4 * d_model, "bf16": 2 * d_model, "fp16": 2 * d_model, "int8": d_model + 4}
        return positions * row.get(self.value, (d_model + 1) // 2 + 4)


@dataclass(frozen=True, slots=True)
class Decision:
    """A partition, the precision on the wire, the prompt positions per prefill chunk (None: one chunk), the tokens
    drafted before each verifying step (0: plain decoding), and the precision on the wire while a prompt is prefilled
    (None: as afterwards); and what to do when a machine is lost.

    Two decisions are equal when they are the same plan. `patience` and `shadow` change neither what runs nor its
    price, so they are left out of comparisons: tables hold a plan once, and another patience is no reason to move.
    Whoever executes an answer takes both from the latest one, equal or not.
    """

    partition: Partition
    wire: WirePrecision = WirePrecision.FP32
    prefill_chunk: int | None = None
    draft: int = 0
    prefill_wire: WirePrecision | None = None
    """A run that begins again after tokens have come carries all that it computes again as a prompt."""
    patience: float = field(default=1.0, compare=False)
    """How long to wait for a lost machine before going on without it, in units of the predicted time M of moving away;
    0: not at all, inf: for ever. At 1 no loss costs more than twice the best in hindsight (the ski-rental rule): a
    machine that is back before M has cost just the wait, which was the best; one that is not, M + M, where leaving at
    once would have cost M. No other fixed patience promises as little."""
    shadow: bool = field(default=False, compare=False)
    """Whether the device keeps keys and values of everything, so that it can go on alone at once (M is then about 0),
    for the price of computing everything twice."""

    def __post_init__(self) -> None:
        if self.prefill_wire is self.wire:  # one plan, one way to write it
            object.__setattr__(self, "prefill_wire", None)
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise RequestError(f"prefill chunk is {self.prefill_chunk}; expected at least 1 position, or none")
        if not 0 <= self.draft <= MAX_DRAFT:
            raise RequestError(f"{self.draft} drafted tokens per step; expected 0 to {MAX_DRAFT}")
        if not self.patience >= 0:
            raise RequestError(
                f"patience is {self.patience}; expected at least 0 times the time of moving away, or inf"
            )

    def wire_in(self, is_prefill: bool) -> WirePrecision:
        """The precision on the wire in a phase."""
        return self.prefill_wire or self.wire if is_prefill else self.wire

    @property
    def wires(self) -> frozenset[WirePrecision]:
        """Every precision that it uses on the wire."""
        return frozenset({self.wire, self.wire_in(is_prefill=True)})

    def num_chunks(self, prompt_tokens: int) -> int:
        """Into how many chunks a prompt is prefilled."""
        return -(-prompt_tokens // (self.prefill_chunk or prompt_tokens))
