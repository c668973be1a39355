"""What survival costs while nothing fails: the time inside journal and telemetry code over the time per token, and the
same engine with that code switched off, by turns. Both machines run in one process, so that both sides are counted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.overhead import NO_WORDS, PROMPT
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.decision import Decision
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.rate_meter import RateMeter
from splitwise_llm.engine.telemetry import Advert, LinkView, Pings, ProbeBudget, StepClock
from splitwise_llm.observation import Observation
from splitwise_llm.wire.sequence import Sequenced

TOKENS = 320
BAR = 0.02
Tell = Callable[[str], None]

COUNTED: Mapping[type, Sequence[str]] = {
    Journal: ("token", "decide", "event"),
    Boundaries: ("put", "truncate"),
    LinkView: ("on_arrival", "on_reply", "figures"),
    RateMeter: ("on_arrival", "read"),
    ProbeBudget: ("due",),
    Pings: ("sent", "answered"),
    StepClock: ("ran",),
    Advert: ("uplink", "to_dict", "from_dict"),
}
"""Journal and telemetry code that runs while tokens flow."""


class Stays:
    """A policy that looks at the world at every epoch, and stays where it is."""

    def __init__(self, decision: Decision) -> None:
        self._decision = decision

    def decide(self, observation: Observation) -> Decision:
        """The decision it was made with."""
        return self._decision


@dataclass(slots=True)
class Stopwatch:
    """Time inside some functions; where one calls another, it counts once."""

    inside_s: float = 0.0
    calls: int = 0
    _depth: int = 0

    def timing(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed."""

        @wraps(work)
        def timed(*args: Any, **options: Any) -> Any:
            self._depth += 1
            start_s = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.inside_s += time.perf_counter() - start_s
                    self.calls += 1

        return timed


@contextmanager
def replaced(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner.name` is what `make` makes of it, class and static methods too, until the block ends."""
    before = owner.__dict__[name]
    if isinstance(before, classmethod | staticmethod):
        after: object = type(before)(make(before.__func__))
    else:
        after = make(before)
    setattr(owner, name, after)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def counted(watch: Stopwatch, what: Mapping[type, Sequence[str]]) -> Iterator[None]:
    """Time all of these functions."""
    with ExitStack() as stack:
        for owner, names in what.items():
            for name in names:
                stack.enter_context(replaced(owner, name, watch.timing))
        yield


@contextmanager
def switched_off() -> Iterator[None]:
    """An engine without telemetry, and with a journal that keeps nothing but the ids."""

    def nothing(_: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: None

    def only_the_id(_: Callable[..., Any]) -> Callable[..., Any]:
        def token(journal: Journal, token: int) -> None:
            journal.ids.append(token)
            journal.times_s.append(journal.now_s)

        return token

    off = [(Boundaries, "put"), (LinkView, "on_arrival"), (LinkView, "on_reply"), (RateMeter, "on_arrival")]
    with ExitStack() as stack:
        stack.enter_context(replaced(Journal, "token", only_the_id))
        for owner, name in [*off, (ProbeBudget, "due"), (StepClock, "ran")]:
            stack.enter_context(replaced(owner, name, nothing))
        yield


async def journal_cost(result: Figures, rounds: int, tell: Tell) -> None:
    """`journal_overhead` (bar: 0.02), and `journal_overhead_ab`: how much longer a token takes than with all of it
    switched off. `sequence_overhead` is what numbering and checking frames takes beside."""
    tell("making a random model of 12 x 768")
    with tempfile.TemporaryDirectory() as place:
        directory = make_model(Path(place), OVERHEAD_LLAMA)
        (directory / "tokenizer.json").write_text(NO_WORDS)
        journals = iter(range(1_000_000))
        async with in_process(directory, ("cloud",)) as edge:
            half = edge.machine.spec.num_layers // 2
            decision = Decision(edge.partition(f"edge[0:{half}] cloud[{half}:{2 * half}] head=edge"))

            async def with_it() -> float:
                return await _token_s(edge, decision, Path(place) / f"{next(journals)}.journal")

            async def without() -> float:
                with switched_off():
                    return await _token_s(edge, decision, None)

            shares, framing, calls = [], [], 0.0
            for number in range(max(rounds // 2, 3)):
                watch, frames = Stopwatch(), Stopwatch()
                with counted(watch, COUNTED), counted(frames, {Sequenced: ("_open",)}):
                    took_s = TOKENS * await with_it()
                if number:  # the first one loads
                    shares.append(watch.inside_s / took_s)
                    framing.append(frames.inside_s / took_s)
                    calls = watch.calls / TOKENS
            tell("time inside journal and telemetry")
            times = await interleaved({"with": with_it, "without": without}, rounds, tell)
    result.add_median("journal_overhead", shares, f"of the time per token; {calls:.0f} calls per token; bar {BAR:g}")
    result.add_median("journal_overhead_ab", [one - 1 for one in ratios(times["with"], times["without"])])
    result.add_median("journal_ms_per_token", [1e3 * one for one in times["with"]])
    result.add_median("sequence_overhead", framing, "checking frames on their arrival; not counted above")


async def _token_s(edge: Edge, decision: Decision, journal: Path | None) -> float:
    """Mean seconds per token after the first, of a session whose policy is asked at every epoch."""
    async with edge.generate(
        PROMPT, Stays(decision), max_new_tokens=TOKENS + 1, stop_ids=(), journal=journal
    ) as generation:
        async for _ in generation:
            pass
    return generation.record.tpot_s
