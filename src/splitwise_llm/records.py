"""What is kept of one request: one frozen record, written as a line of JSON. It does not compute anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from splitwise_llm.cost import Floor
from splitwise_llm.errors import SpecError
from splitwise_llm.observation import Tools
from splitwise_llm.plan import Crossings
from splitwise_llm.spec import DeviceSpec, Dtype, ModelSpec, Weights


@dataclass(frozen=True, slots=True)
class Interval:
    """One computation of a machine: its stage and step, and when (s, monotonic clock of that machine)."""

    stage: int
    step: int
    start_s: float
    stop_s: float
    run: int = 0
    """Which of the request's runs it belongs to; stages and steps are counted in it."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run of a request: the ids `start` to `known` through a partition, then `tokens` more. A fill (which makes
    caches anew for the run behind it) generates none."""

    run: int
    partition: str
    wire: str
    start: int
    known: int
    tokens: int
    at_s: float
    """After the prompt was handed over."""
    why: str
    """What it was begun for: admission, move, fault, return, resume; `fill` and what is filled."""
    ended: str = ""
    """Empty if it ran to its end."""
    prefill_chunk: int | None = None
    draft: int = 0
    prefill_wire: str = ""
    """Empty: as `wire`."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a request besides its tokens."""

    at_s: float
    """After the prompt was handed over."""
    kind: str
    """suspect, lost, attempt, back, failed-over, waiting, move, refused, shadow, journal, precision ..."""
    text: str


@dataclass(frozen=True, slots=True)
class MachineRecord:
    """What one machine says of a request."""

    name: str
    peak_memory_bytes: int
    intervals: tuple[Interval, ...]
    emulated: str
    """What its `--emulate` was given; empty for a machine that plays itself."""


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """A link as it was believed to be when the decision was made; `up` is from `first` to `second`."""

    first: str
    second: str
    rtt_s: float
    """Measured by an echo (of a link between workers: taken as the longer of their links to the device)."""
    up_bytes_per_s: float
    down_bytes_per_s: float
    rates_from: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a decision was expected to take, all the tokens that were allowed coming; and by which links."""

    ttft_s: float
    tpot_s: float
    device_j: float
    total_j: float
    links: tuple[LinkRecord, ...]


@dataclass(frozen=True, slots=True)
class LinkSample:
    """What was known of the link to a worker, and what the worker said of itself, from some moment on."""

    at_s: float
    """After the prompt was handed over; negative before."""
    worker: str
    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    up_age_s: float | None = None
    """Since it was measured; None: never, it is only believed."""
    down_age_s: float | None = None
    others: int = 0
    """Sessions there that are not this one."""
    queue_s: float = 0.0
    """Of work that waited for the worker."""
    step_s: float | None = None
    """Of one of its decode steps; None: it does not know."""


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A machine as it was priced, by the name that it has in partitions."""

    device: DeviceSpec
    dtype: Dtype
    weights: Weights
    stretch: float = 1.0
    """Its compute takes so many times as long as `device` says."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a request was decided in: what it takes, beside the request itself, to play it again."""

    began_unix_s: float
    """When the prompt was handed over, by the device's wall clock."""
    max_new_tokens: int
    model: ModelSpec
    fingerprint: str
    """Of the model."""
    names: tuple[str, ...]
    """Of all machines, the device first."""
    hosts: tuple[HostRecord, ...] = ()
    """Of those that answered, the device first; none where not all of them are profiled."""
    tools: Tools | None = None
    """What the policy might use."""
    floor: Floor | None = None
    acceptance: float = 0.0
    """Of a drafted token: by what its rounds made, or, where none were to be drafted, as it was priced."""
    links: tuple[LinkSample, ...] = ()
    """In order of time; thinned (`engine.link_log`). Empty where nobody measured: of a partition that was given."""


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
    policy: str = ""
    """Who decided; empty for a partition that was given."""
    predicted: Prediction | None = None
    """None where a machine is not profiled."""
    token_times_s: tuple[float, ...] = ()
    """When each token came, after the prompt was handed over."""
    runs: tuple[RunRecord, ...] = ()
    """The history of partitions, in order; one where nothing happened. `partition` and `wire` are the last one's."""
    events: tuple[Event, ...] = ()
    recomputed_tokens: int = 0
    """Positions behind which a token had come already and that a machine computed again though it had not lost them."""
    device_j: float | None = None
    """What the device drew from the prompt to the last token; None where nobody knows."""
    device_j_from: str = ""
    """The meter (of the whole machine), or `modelled`."""
    is_degraded: bool = False
    """Whether something failed and was got over, or weights or wire changed precision on the way."""
    setup: Setup | None = None
    """None in records of older versions."""

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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RequestRecord:
        """The inverse of `to_dict`; what an older version left out is as its default says, and what this one does not
        know is not read. Raises SpecError that says which field is wrong."""
        machines = data.get("machines")
        if isinstance(machines, list):
            bare = [m for m in machines if isinstance(m, dict)]
            machines = [{"intervals": []} | m for m in bare] if len(bare) == len(machines) else machines
        try:
            return msgspec.convert({**data, "machines": machines}, cls)
        except msgspec.ValidationError as error:
            raise SpecError(f"no record of a request: {error}") from error


def read_records(path: str | Path) -> tuple[RequestRecord, ...]:
    """The records in a file, in its order: a record per line (`generate --records`), one record, or the answers of
    several prompts (`generate --json`). Raises SpecError naming file, line and remedy."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}; give a file that `splitwise generate --records` wrote") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not valid UTF-8 ({error}); give a file of records") from None
    found = []
    for number, data in _objects(text, str(path)):
        answers = data.get("answers")
        for one in answers if isinstance(answers, list) else [data]:
            try:
                found.append(RequestRecord.from_dict(one if isinstance(one, dict) else {}))
            except SpecError as error:
                raise SpecError(
                    f"{path}:{number}: {error}; expected what `splitwise generate --records` or `--json` writes"
                ) from error
    if not found:
        raise SpecError(f"{path} holds no record; give a file that `splitwise generate --records` wrote")
    return tuple(found)


def _objects(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, object): the whole text as one, or each line."""
    try:
        data = json.loads(text)
        rows = [(1, data)]
    except ValueError:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise SpecError(
                    f"{name}:{number}: no whole JSON object ({error}); is the file truncated? drop the line"
                ) from error
    for number, data in rows:
        if not isinstance(data, dict):
            raise SpecError(f"{name}:{number}: {type(data).__name__}, expected a JSON object: a record per line")
    return rows


@dataclass(frozen=True, slots=True)
class Status:
    """How a request that is under way stands."""

    partition: str
    wanted: str
    """What was decided before anything failed."""
    tokens: int
    is_degraded: bool
    """Whether something that should be there is not: a worker, or the journal's file."""
    workers: dict[str, str]
    """Where things stand with each, as in docs/recovery.md; `not met` where nobody ever answered."""
    journal: str
    """Where it is kept; why it no longer is; or `in memory`."""
    journal_path: str
    """The file from which another process can go on; empty where there is none."""
    joules: float | None
    joules_from: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % limits over traces."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy in one case of a scenario, over all its traces."""

    scenario: str
    case: str
    """Device and model, as in `orin-nx-16gb+llama-7b`."""
    policy: str
    """With `+tools` where it had int8 wire, chunks and drafting."""
    traces: int
    requests: int
    """Counted, warm-up apart, all traces together."""
    metrics: dict[str, Estimate]
    """By the figure names of `bench scenarios`: seconds, joules, dollars, nats per token."""
    latencies_s: tuple[float, ...] = ()
    """Total latencies at evenly spaced ranks, ascending: the distribution's curve."""
    modes: dict[str, float] = field(default_factory=dict)
    """Share of running time per way of running (edge, cloud, u, cut, shared, waiting)."""
    queue_times_s: tuple[float, ...] = ()
    queues_s: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Backlog of device, up, down and cloud at those times in the first trace, in seconds of work."""
    wins: int = 0
    """Traces in which no other policy of the case had a smaller mean latency."""
    note: str = ""
    """Why it stopped early, or what could not be run."""
    knobs: dict[str, float] = field(default_factory=dict)
    """Of a learned policy: share of the decisions in which a knob was not neutral, by its name and value."""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)
