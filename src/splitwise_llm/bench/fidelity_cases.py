"""What `bench fidelity` runs: partitions, drafting, overlapped prefill and sessions side by side, each on every link.

It knows what a run should do, and runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from splitwise_llm.cost import Job
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import ModelSpec

LINKS: Mapping[str, str] = {
    "5ms_100mbit": "rtt=5ms up=100mbit down=100mbit",
    "20ms_20mbit": "rtt=20ms up=20mbit down=20mbit",
    "40ms_10mbit_up_40_down": "rtt=40ms up=10mbit down=40mbit",
    "80ms_5mbit": "rtt=80ms up=5mbit down=5mbit",
}
SLOWER = 3.0
EMULATED: Sequence[tuple[float, float]] = ((1.0, 1.0), (1.0, SLOWER), (SLOWER, 1.0))
"""By how much device and worker are slowed down; the other one is the faster machine of the two."""
NAMES = ("edge", "cloud")
PLAIN, DRAFTING, OVERLAP, SESSIONS = KINDS = ("plain", "drafting", "overlap", "sessions")
PROMPTS: Mapping[str, Sequence[int]] = {PLAIN: (96, 64, 120), DRAFTING: (64,), OVERLAP: (240, 160), SESSIONS: (32,)}
TOKENS: Mapping[str, int] = {PLAIN: 1, DRAFTING: 3, OVERLAP: 1, SESSIONS: 5}
"""Times as many as without: a round makes several, and sessions begin one after another."""
TOGETHER = 4
ACCEPTANCE: Mapping[str, float] = {"draft_cut": 0.6, "draft_u": 0.8, "draft_edge": 0.6, "draft_head_on_device": 0.3}
"""Of the drafter that these cases are run with, and that they are priced with."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Run:
    """One session, or some at once: their records, and median TTFT and mean TPOT while all of them decode (s)."""

    records: tuple[RequestRecord, ...]
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """One decision on one link between machines slowed down by some factors, and what became of it."""

    name: str
    decision: Decision
    job: Job
    link: str
    slower: tuple[float, float]
    kind: str = PLAIN
    runs: list[Run] = field(default_factory=list)

    @property
    def sessions(self) -> int:
        """At once."""
        return TOGETHER if self.kind == SESSIONS else 1

    @property
    def acceptance(self) -> float:
        """Of a drafted token, if those before it are right."""
        return ACCEPTANCE.get(self.name, 0.0)

    @property
    def measured(self) -> tuple[float, float]:
        """Median TTFT and TPOT, s."""
        return median(r.ttft_s for r in self.runs), median(r.tpot_s for r in self.runs)


def decisions(spec: ModelSpec) -> dict[str, Decision]:
    """What is run, one session at a time: every kind of partition, chunks, int8 on the wire, drafts."""
    layers = spec.num_layers
    quarter, half = layers // 4, layers // 2

    def of(
        text: str,
        wire: WirePrecision = WirePrecision.FP32,
        chunk: int | None = None,
        draft: int = 0,
        prefill_wire: WirePrecision | None = None,
    ) -> Decision:
        return Decision(Partition.parse(text, spec, NAMES), wire, chunk, draft, prefill_wire)

    def cut(end: float, more: str = "") -> str:
        return f"edge[0:{end:g}] cloud[{end:g}:{layers}]{more}"

    def u(first: int, last: int) -> str:
        return f"edge[0:{first}] cloud[{first}:{layers - last}] edge[{layers - last}:{layers}]"

    return {
        "edge": of("all:edge"),
        "cut_middle": of(cut(half)),
        "u_deep": of(u(quarter, quarter)),
        "shared_one": of(f"edge[0:{half}] edge+cloud[{half}] edge[{half + 1}:{layers}]"),
        "cloud": of("all:cloud"),
        "cut_early": of(cut(quarter)),
        "u_thin": of(u(1, 1)),
        "chunked": of(cut(half), chunk=32),
        "cut_late": of(cut(layers - quarter)),
        "half_layer": of(cut(half - 0.5)),
        "head_on_device": of(cut(half + 1, " head=edge")),
        "shared_two": of(f"edge[0:{quarter}] edge+cloud[{quarter}:{quarter + 2}] cloud[{quarter + 2}:{layers}]"),
        "u_chunked_int8": of(u(quarter, 1), WirePrecision.INT8, 32),
        "draft_cut": of(cut(half), draft=3),
        "draft_u": of(u(quarter, quarter), draft=4),
        "draft_edge": of("all:edge", draft=3),
        "draft_head_on_device": of(cut(half + 1, " head=edge"), draft=2),
        "overlap_cut": of(cut(half), chunk=32),
        "overlap_u": of(u(quarter, quarter), chunk=48),
        "overlap_int8": of(cut(quarter), chunk=32, prefill_wire=WirePrecision.INT8),
        "overlap_u_int8": of(u(quarter, 1), chunk=64, prefill_wire=WirePrecision.INT8),
        "sessions_cloud": of("all:cloud"),
        "sessions_u": of(u(1, 1)),
    }


def kind_of(name: str) -> str:
    """The kind of a case, from its name."""
    starts = {"draft_": DRAFTING, "overlap_": OVERLAP, "sessions_": SESSIONS}
    return next((kind for start, kind in starts.items() if name.startswith(start)), PLAIN)


def cases(spec: ModelSpec, tokens: int, names: Sequence[str], links: Sequence[str]) -> Iterator[Case]:
    """Each decision on each link, the emulated machines in turn."""
    known = decisions(spec)
    for row, name in enumerate(names):
        kind = kind_of(name)
        prompts = PROMPTS[kind]
        for column, link in enumerate(links):
            job = Job(prompts[row % len(prompts)], tokens * TOKENS[kind])
            # Sessions side by side: a device slowed down would be a queue of its own, which is no worker's.
            machines = EMULATED[:2] if kind == SESSIONS else EMULATED
            yield Case(name, known[name], job, link, machines[(row + column) % len(machines)], kind)


# Drafting


def right_tokens(number: int, acceptance: float, draft: int) -> int:
    """How many of the tokens drafted in a round are right: j or more of them with probability acceptance^j, the draws
    spread evenly (multiples of the golden ratio), so that a short run is no game of chance."""
    draw = (0.5 + number * GOLDEN) % 1
    return min(int(math.log(1 - draw) / math.log(acceptance)), draft) if acceptance > 0 else 0


def rounds(tokens: int, draft: int, acceptance: float) -> list[tuple[int, int]]:
    """(positions, tokens made) of each round of a run with `Told`; none is drafted beyond the last token."""
    made, found = 1, list[tuple[int, int]]()
    while made < tokens:
        drafted = min(draft, tokens - made - 1)
        right = right_tokens(len(found), acceptance, drafted)
        found.append((1 + drafted, 1 + right))
        made += 1 + right
    return found


class Told:
    """A drafter that was told what will follow, and is right as often as it is asked to be."""

    is_light = True

    def __init__(self, prompt_tokens: int, text: Sequence[int], acceptance: float, vocabulary: int) -> None:
        self._start, self._text, self._acceptance, self._vocabulary = prompt_tokens, text, acceptance, vocabulary
        self._round = 0

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """See `engine.drafting.Drafter`."""
        at = len(ids) - self._start
        truth = list(self._text[at : at + most])
        right = right_tokens(self._round, self._acceptance, most)
        self._round += 1
        return truth[:right] + [(token + 1) % self._vocabulary for token in truth[right:]]
