"""Which plan makes a given objective small, exactly searched for or proposed by a network: two ways to answer one
question, behind one switch. It does not know what the objective is, nor who sets its prices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Protocol

from splitwise_llm.cost import Form, Job, Limits, Table, World, bill, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Tools
from splitwise_llm.policies.in_flight import Running, is_less
from splitwise_llm.policies.objective import Objective
from splitwise_llm.policies.proposer import Proposer, Prospect, Weights, polished, settled, shared_seats
from splitwise_llm.policies.runs import Runs, Sheet
from splitwise_llm.policies.solver import solver_for

FEWEST = 3
"""Machines from which on the learned low level decides unless the exact one is asked for."""
Way = tuple[WirePrecision, int | None, int]
"""On the wire, prefill chunk, draft."""


class Level(StrEnum):
    """The switch."""

    EXACT = "exact"
    LEARNED = "learned"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A decision and what it is worth, priced by `cost`; smaller is better."""

    decision: Decision
    value: float
    fell_back: bool = False
    """Whether nothing that was proposed is admissible, so that the exact search answered."""


class LowLevel(Protocol):
    """Who finds plans."""

    def propose(
        self, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
    ) -> Proposal:
        """A decision that makes the objective small at admission. Raises RequestError that says what forbids
        everything."""
        ...

    def onward(self, running: Running, tools: Tools, objective: Objective) -> Proposal:
        """The same for the rest of a running request, the way there included. Raises RequestError."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """The search that exists (`solver`)."""

    def propose(
        self, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
    ) -> Proposal:
        best = solver_for(world, job, tools, limits).solve(conditions, objective).best
        return Proposal(best.decision, best.value)

    def onward(self, running: Running, tools: Tools, objective: Objective) -> Proposal:
        found = solver_for(running.world, running.job, tools, running.limits).onward(running, objective)
        return Proposal(found.decision, found.value)


@dataclass(slots=True)
class Count:
    """What a learned level did."""

    asked: int = 0
    fell_back: int = 0


@dataclass(frozen=True, slots=True)
class Learned:
    """`width` sequences of runs proposed by the network, at most `alike` of them over the same seats in the same order,
    each with every place of embedding and head. Of the best `polished` orders among them the ends of runs are moved to
    where sums are least; the best `priced` of them are priced exactly, and of the best the cuts are moved by half a
    layer. Where there is a choice of tools, the best plan
    under the first is driven in every way, one tool at a time, and plans are proposed once more under what is best for
    it."""

    proposer: Proposer
    width: int = 48
    alike: int = 6
    polished: int = 8
    priced: int = 4
    exact: LowLevel = field(default_factory=Exact)
    """Who answers where no proposal is admissible."""
    count: Count = field(default_factory=Count)

    def propose(
        self, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
    ) -> Proposal:
        self.count.asked += 1
        best: Proposal | None = None
        for decision in self._proposed(world, job, tools, limits, conditions, objective):
            best = decision if best is None or decision.value < best.value else best
        if best is not None:
            return best
        self.count.fell_back += 1
        return replace(self.exact.propose(world, job, tools, limits, conditions, objective), fell_back=True)

    def onward(self, running: Running, tools: Tools, objective: Objective) -> Proposal:
        """The best of staying, of what was chosen at admission, and of what is proposed for a request like this."""
        self.count.asked += 1
        world, job, limits = running.world, running.job, running.limits
        seeds = dict.fromkeys((running.present, running.placement.admitted or running.present))
        asked = self._proposed(world, job, tools, limits, running.conditions, objective)
        seeds |= dict.fromkeys(one.decision for one in asked)
        possible = [one for one in seeds if running.is_possible(one)]
        if not possible:
            self.count.fell_back += 1
            return replace(self.exact.onward(running, tools, objective), fell_back=True)
        values = running.values(objective, possible)
        chosen = running.best(objective, possible)
        return Proposal(chosen, float(values[possible.index(chosen)]))

    def _proposed(
        self, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
    ) -> Iterator[Proposal]:
        """What is admissible of what is proposed, priced."""
        first = _first(tools, job)
        found = list(self._under(first, world, job, limits, conditions, objective))
        yield from found
        menus = (tools.wires, tools.chunks, tools.drafts, tools.prefill_wires)
        if not found or all(len(menu) == 1 for menu in menus):
            return
        best = min(found, key=lambda one: one.value)
        best = driven(best, world, job, tools, limits, conditions, objective)
        yield best
        way = (best.decision.wire, best.decision.prefill_chunk, best.decision.draft)
        if way != first:
            again = list(self._under(way, world, job, limits, conditions, objective))
            yield from again
            if again:
                yield driven(min(again, key=lambda one: one.value), world, job, tools, limits, conditions, objective)

    def _under(
        self, way: Way, world: World, job: Job, limits: Limits, conditions: Form, objective: Objective
    ) -> list[Proposal]:
        sheet = sheet_of(world, job, limits, conditions, objective, way)
        if not sheet.seats:
            return []
        values, plans = settled(sheet, self.proposer.paths(Prospect(sheet), self.width, self.alike))
        orders: dict[tuple[int, ...], tuple[float, Runs]] = {}  # the best of each order of seats
        for number in values.argsort(kind="stable").tolist():
            seats = tuple(seat for seat, _ in plans[number].runs)
            if seats not in orders and len(orders) < self.polished:
                orders[seats] = polished(sheet, plans[number], float(values[number]))
        best = sorted(orders.values(), key=lambda one: one[0])[: self.priced]
        found: list[Proposal] = []
        for value, plan in best:
            # Where sums are exact, the first is the best: the others are priced only if it is worth less than it said.
            if value == float("inf") or (found and not is_less(value, min(one.value for one in found))):
                break
            found += priced([sheet.decision(plan)], world, job, limits, conditions, objective)
        if found:
            best_found = min(found, key=lambda one: one.value)
            found.append(by_halves(best_found, world, job, limits, conditions, objective))
        return found


def _first(tools: Tools, job: Job) -> Way:
    chunk = next((one for one in tools.chunks if one is None or one < job.prompt_tokens), None)
    return tools.wires[0], chunk, tools.drafts[0]


def sheet_of(world: World, job: Job, limits: Limits, conditions: Form, objective: Objective, way: Way) -> Sheet:
    """The sheet of a question, with the shared seats that can pay."""
    wire, chunk, draft = way
    usable = [
        m for m in range(len(world.hosts)) if m not in limits.unreachable and (limits.only is None or m in limits.only)
    ]
    size = min(chunk or job.prompt_tokens, job.prompt_tokens)
    rows = [(size, job.prompt_tokens), (draft + 1, job.mean_context)]
    often = [job.prompt_tokens / size, (job.tokens_out - 1) / world.drafter.tokens_per_round(draft)]
    seats = shared_seats(world, usable, conditions, wire, rows, often)
    return Sheet(world, job, limits, conditions, objective, way, seats)


def priced(
    decisions: Sequence[Decision], world: World, job: Job, limits: Limits, conditions: Form, objective: Objective
) -> list[Proposal]:
    """Those that nothing forbids, priced by `cost` in one table."""
    allowed = [one for one in dict.fromkeys(decisions) if obstacle(world, one, job, limits) is None]
    if not allowed:
        return []
    values = objective.value(Table(world, [bill(world, one, job) for one in allowed]).at(conditions))
    return [Proposal(one, float(value)) for one, value in zip(allowed, values, strict=True)]


def by_halves(
    best: Proposal, world: World, job: Job, limits: Limits, conditions: Form, objective: Objective
) -> Proposal:
    """The same plan with cuts moved by half a layer where that is better: the FFN before a cut goes with the layers
    behind it, or the attention behind it with those before."""
    for cut in range(1, world.spec.num_layers):
        layers = best.decision.partition.layers
        before, after = layers[cut - 1], layers[cut]
        if before == after or before.is_shared or after.is_shared:
            continue
        others = []
        for at, moved in ((cut - 1, replace(before, shards=after.shards)), (cut, replace(after, groups=before.groups))):
            partition = replace(best.decision.partition, layers=(*layers[:at], moved, *layers[at + 1 :]))
            others.append(replace(best.decision, partition=partition))
        best = min([best, *priced(others, world, job, limits, conditions, objective)], key=lambda one: one.value)
    return best


def driven(
    best: Proposal, world: World, job: Job, tools: Tools, limits: Limits, conditions: Form, objective: Objective
) -> Proposal:
    """The same partition with better tools: each tool in turn, the others as they are."""
    menus: tuple[tuple[str, Sequence[object]], ...] = (
        ("draft", tools.drafts), ("wire", tools.wires), ("prefill_wire", tools.prefill_wires),
        ("prefill_chunk", [one for one in tools.chunks if one is None or one < job.prompt_tokens]),
    )  # fmt: skip
    for name, menu in menus:
        others = [replace(best.decision, **{name: one}) for one in menu]  # type: ignore[arg-type]
        others = [one for one in others if one != best.decision]
        best = min([best, *priced(others, world, job, limits, conditions, objective)], key=lambda one: one.value)
    return best


@cache
def shipped() -> Proposer:
    """The network with the weights that come with the package. Raises SpecError where there are none."""
    return Proposer(Weights.load())


def parse_level(text: str) -> Level | None:
    """By the name of the switch; None for no name. Raises RequestError for another."""
    if text and text not in tuple(Level):
        raise RequestError(f"unknown low level {text!r}; it is {' or '.join(Level)}")
    return Level(text) if text else None


def level_for(asked: Level | None, machines: int) -> Level:
    """Which one answers for so many machines where nobody, or somebody, has asked for one. The exact search of two is
    quick and leaves nothing out; of more it takes half a second or seconds, and is not exact for a large model, where
    the learned one comes as near to the best that is known or nearer. Raises RequestError."""
    if asked is Level.LEARNED and machines < FEWEST:
        raise RequestError(
            f"the learned low level is for {FEWEST} machines and more, and {'2 are' if machines == 2 else '1 is'} "
            "given, whose plans the exact search tries quickly: leave out --low-level, or name more workers"
        )
    return asked or (Level.LEARNED if machines >= FEWEST else Level.EXACT)


def find_level(level: Level) -> LowLevel:
    """Who answers. Raises SpecError without weights."""
    return Exact() if level is Level.EXACT else Learned(shipped())
