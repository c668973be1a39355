"""What is kept of one request: one frozen record, written as a line of JSON. It does not compute anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from splitwise_llm.plan import Crossings


@dataclass(frozen=True, slots=True)
class Interval:
    """One computation of a machine: its stage and step, and when (s, monotonic clock of that machine)."""

    stage: int
    step: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """What one machine says of a request."""

    name: str
    peak_memory_bytes: int
    intervals: tuple[Interval, ...]
    emulated: str
    """What its `--emulate` was given; empty for a machine that plays itself."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, as it ran. Times in seconds; bytes are payload unless the name says frames."""

    partition: str
    wire: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    open_s: float
    """Dialling, greeting and loading, before the prompt is handed over."""
    ttft_s: float
    """From handing over the prompt to the first token at the device."""
    tpot_s: float
    """Mean time between later tokens; 0 with a single token."""
    round_trips_per_token: float
    """Measured: half the growth of the causal chain of messages per token."""
    crossings: tuple[Crossings, ...]
    """Counted at the senders, every leg."""
    frame_bytes: int
    """Everything sent for the data, framing included."""
    machines: tuple[MachineRecord, ...]

    @property
    def up_bytes(self) -> int:
        """Payload that left the device."""
        return sum(crossing.payload_bytes for crossing in self.crossings if crossing.src == 0)

    @property
    def down_bytes(self) -> int:
        """Payload that reached the device."""
        return sum(crossing.payload_bytes for crossing in self.crossings if crossing.dst == 0)

    @property
    def is_emulated(self) -> bool:
        return any(machine.emulated for machine in self.machines)

    def to_dict(self, intervals: bool = True) -> dict[str, object]:
        """Plain data, derived figures included."""
        data: dict[str, object] = asdict(self)
        data |= {"up_bytes": self.up_bytes, "down_bytes": self.down_bytes, "emulated": self.is_emulated}
        if not intervals:
            data["machines"] = [
                {"name": m.name, "peak_memory_bytes": m.peak_memory_bytes, "emulated": m.emulated}
                for m in self.machines
            ]
        return data

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)
