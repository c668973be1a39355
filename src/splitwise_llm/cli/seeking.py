"""A search that ends when its time is over, and says meanwhile what it does. How plans are found is not known here."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from types import FrameType

from splitwise_llm.cost import Form, Job, Limits, Table, World, bill, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.objective import Latency, Objective
from splitwise_llm.policies.solver import Choice, Solution, Solver, nothing_admissible

_Way = tuple[WirePrecision, int]
"""Wire precision and draft length."""
PATIENCE_S = 1.0
"""Nothing is said of what takes less."""


class Progress:
    """While it is open, a line on stderr about every two seconds, the first after one: what goes on, for how long."""

    def __init__(self) -> None:
        self._text, self._over = "", threading.Event()
        self._begin = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def say(self, text: str) -> None:
        self._text = text

    def _watch(self) -> None:
        wait_s = PATIENCE_S
        while not self._over.wait(wait_s):
            print(f"... {self._text}, {time.monotonic() - self._begin:.0f} s", file=sys.stderr, flush=True)
            wait_s = 2 * PATIENCE_S


class SpentError(Exception):
    """The time is over."""


AGAIN_S = 0.2
"""Between two times that a block hears that its time is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises SpentError in the block when it takes longer, and again as long as nobody heard it; in the main thread
    only. Where the interpreter happens to run somebody's finaliser, what is raised there is lost, and nothing is
    printed of it."""
    counts = True
    usual = sys.unraisablehook

    def lost(said: sys.UnraisableHookArgs) -> None:
        if not isinstance(said.exc_value, SpentError):
            usual(said)

    def over(_number: int, _frame: FrameType | None) -> None:
        if counts:
            raise SpentError

    if seconds <= 0:
        raise SpentError
    before = signal.signal(signal.SIGALRM, over)
    sys.unraisablehook = lost
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
        yield
    finally:
        counts = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = usual


class Seeker(Solver):
    """The exact solver, with seconds for all its searches together: when they are over it answers with the best it has
    found by then, cuts and U-shapes in any case.

    Wire precisions and draft lengths are searched one after the other, those of the best cut first; what is found is
    driven in every way.
    """

    def __init__(
        self, world: World, job: Job, tools: Tools, limits: Limits, budget_s: float, progress: Progress
    ) -> None:
        self.progress = progress
        progress.say("listing cuts and U-shapes")
        super().__init__(world, job, tools, limits)
        self._ends_s = time.monotonic() + budget_s
        self._parts: dict[_Way, Solver] = {}
        self._known: dict[bytes, Solution] = {}
        self._divided: list[Partition] | None = None
        self.is_spent = False
        """Whether the last answer was cut short."""

    def solve(self, conditions: Form, objective: Objective) -> Solution:
        """As `Solver.solve`; not exact when time was short. Raises RequestError that says what forbids everything,
        or that none was found in time."""
        fastest = isinstance(objective, Latency)
        key = conditions.tobytes()
        if fastest and key in self._known:
            self.is_spent = False
            return self._known[key]
        self.is_spent = False
        workers = len(self.world.hosts) - 1
        if workers == 0 or (workers == 1 and not self._is_small and not any(self._sharing(conditions))):
            return super().solve(conditions, objective)  # cuts and U-shapes, and no search
        found = list(self.cuts(conditions, objective))
        if self._divided is None:
            self._divided = self._divided_alike(found, conditions, objective)
        found += self._driven(self._divided, conditions, objective)
        found.sort(key=lambda choice: choice.value)
        answers: list[Solution] = []
        refused: RequestError | None = None
        try:
            ways = self._in_order(found)
            for number, way in enumerate(ways, start=1):
                self._say(way, f"{number} of {len(ways)}", found, objective)
                with within(self._ends_s - time.monotonic()):
                    try:
                        answers.append(Solver.solve(self._part(way), conditions, objective))
                    except RequestError as error:  # perhaps only driven in this way
                        refused = error
                        continue
                found += [one for one in (answers[-1].best, answers[-1].runner_up) if one]
        except SpentError:
            self.is_spent = True
        if not found:
            said = nothing_admissible(self.world, self.job, self.limits)
            raise refused or RequestError(
                f"{said}; other partitions were not all tried in the time there was (--budget)"
            )
        if len(self.tools.by_phase) * len(self.tools.chunks) * len(self.tools.drafts) > 1:
            found += self._driven([one.decision.partition for one in found], conditions, objective)
        solution = self._solution(found, answers)
        if fastest and not self.is_spent:
            self._known[key] = solution
        return solution

    def _in_order(self, found: Sequence[Choice]) -> Sequence[_Way]:
        """Wire precisions and draft lengths, those first that the best so far has."""
        ways = list(product(self.tools.wires, self.tools.drafts))
        if not found:
            return ways
        best = found[0].decision
        return sorted(ways, key=lambda way: (way != (best.wire, best.draft), way[1] != best.draft))

    def _part(self, way: _Way) -> Solver:
        """The solver of one way; this one where there is no other."""
        if len(self.tools.wires) * len(self.tools.drafts) == 1:
            return self
        if way not in self._parts:
            wire, draft = way
            self._parts[way] = Solver(self.world, self.job, Tools((wire,), self.tools.chunks, (draft,)), self.limits)
        return self._parts[way]

    def _say(self, way: _Way, place: str, found: Sequence[Choice], objective: Objective) -> None:
        wire, draft = way
        said = f"wire {wire}" + (f", drafts of {draft}" if draft else "")
        said = f"searching all partitions ({said}; {place})"
        least = min(found, key=lambda choice: choice.value, default=None)
        if least and isinstance(objective, Latency):
            said += f"; best so far {least.value:.3g} s"
        self.progress.say(said)

    def _divided_alike(self, found: Sequence[Choice], conditions: Form, objective: Objective) -> list[Partition]:
        """The two best divisions of all layers alike between the device and a worker, where dividing can pay; driven as
        the best cut is. In a second or so it finds most of what the search finds in minutes."""
        spec, floor = self.world.spec, self.limits.floor
        first, last = (floor.first_layers, floor.last_layers) if floor else (0, 0)
        first = max(first, int(self.limits.first_layer_on_device))
        way = (found[0].decision.wire, None, found[0].decision.draft) if found else (self.tools.wires[0], None, 0)
        groups, shards = spec.num_kv_heads, spec.num_ffn_shards
        home = Placement((DEVICE,) * groups, (DEVICE,) * shards)
        best: list[Choice] = []
        for worker in sorted({b for a, b in self._sharing(conditions) if a == DEVICE}):
            for mine, ours in product(range(0, groups + 1, max(groups // 8, 1)), range(shards + 1)):
                owners = Placement(
                    (DEVICE,) * mine + (worker,) * (groups - mine), (DEVICE,) * ours + (worker,) * (shards - ours)
                )
                layers = (home,) * first + (owners,) * (spec.num_layers - first - last) + (home,) * last
                choice = self._valued(Decision(Partition(layers, DEVICE, DEVICE), *way), conditions, objective)
                best = sorted([*best, *([choice] if choice else [])], key=lambda choice: choice.value)[:2]
        return [choice.decision.partition for choice in best]

    def _valued(self, decision: Decision, conditions: Form, objective: Objective) -> Choice | None:
        """None where it is not admissible."""
        if obstacle(self.world, decision, self.job, self.limits) is not None:
            return None
        prices = Table(self.world, [bill(self.world, decision, self.job)]).at(conditions)
        return Choice(decision, float(objective.value(prices)[0]))

    def _driven(self, partitions: Iterable[Partition], conditions: Form, objective: Objective) -> list[Choice]:
        """These partitions, driven in every way that is admissible."""
        chunks = [chunk for chunk in self.tools.chunks if chunk is None or chunk < self.job.prompt_tokens]
        ways = list(product(self.tools.by_phase, chunks, self.tools.drafts))
        decisions = [
            Decision(partition, wire, chunk, draft, early)
            for partition in dict.fromkeys(partitions)
            for (wire, early), chunk, draft in ways
        ]
        driven = (self._valued(decision, conditions, objective) for decision in decisions)
        return [choice for choice in driven if choice]

    def _solution(self, found: Sequence[Choice], answers: Sequence[Solution]) -> Solution:
        best_of: dict[Partition, Choice] = {}
        for choice in sorted(found, key=lambda choice: choice.value):
            best_of.setdefault(choice.decision.partition, choice)
        first, *others = best_of.values()
        exact = not self.is_spent and all(answer.exact for answer in answers)
        shared = any(answer.shared_considered for answer in answers)
        return Solution(first, others[0] if others else None, len(self), shared, exact)


__all__ = ["Progress", "Seeker", "within"]
