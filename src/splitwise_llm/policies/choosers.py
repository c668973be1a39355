"""Planners for many systems at a time: the same rows, choosing among the plans of a table instead of solving anew.

A table holds every plan its planners can come to; that it does is a test's business. It does not know who runs the
systems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Entry, Job, Limits, Table, World
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import Chooser, Menu, Observation, Policy, Tools
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.layer_chooser import LayerChooser
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.per_layer import PerLayer
from splitwise_llm.policies.planners import EDGESHARD_REPLANNED, Planner, Pressure, When, typical
from splitwise_llm.policies.tuned import Tuned

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """What a planner makes of one table."""

    allowed: Bools
    fixed: int | None
    penalty: Penalty
    weights: Floats


@dataclass(frozen=True, slots=True, eq=False)
class TableChooser:
    """A planner over tables. `budgets` and `v` are what drift plus penalty is given; `arrivals_per_s` is how often
    this device is asked, for the weights of its own queues."""

    planner: Planner
    tools: Tools
    limits: Limits = field(default_factory=Limits)
    budgets: Budgets = field(default_factory=Budgets)
    v: float = 1.0
    arrivals_per_s: float = 0.0
    wait_term: bool = True
    moves: bool = True
    """False: a generation stays where it was admitted, whatever the planner."""
    _tables: dict[int, tuple[Table, _Prepared]] = field(default_factory=dict, repr=False)

    @property
    def in_flight(self) -> bool:
        """Whether it wants to be asked again while tokens flow."""
        return self.moves and self.planner.when is When.EPOCH

    def choose(self, menu: Menu) -> Ints:
        """Per system the number of a plan; -1 leaves a running generation as it is."""
        prepared = self._prepare(menu.table)
        chosen = np.full(len(menu.conditions), -1)
        fresh = menu.current < 0
        if prepared.fixed is not None:
            chosen[fresh] = prepared.fixed
            return chosen
        if fresh.any():
            chosen[fresh] = self._best(prepared, menu.at(fresh), None)
        running = ~fresh
        if running.any() and self.in_flight:
            some = menu.at(running)
            entry = Entry(some.entry_s, some.entry_device_s, some.entry_cloud_s)
            best = self._best(prepared, some, entry)
            chosen[running] = np.where(best == some.current, -1, best)
        return chosen

    def _best(self, prepared: _Prepared, menu: Menu, entry: Entry | None) -> Ints:
        prices = menu.table.at(menu.conditions, menu.remaining_tokens[:, None], entry)
        values = self._objective(prepared, menu).value(prices)
        usable = menu.admissible & prepared.allowed
        usable = np.where(usable.any(axis=1, keepdims=True), usable, prepared.allowed)
        best: Ints = np.where(usable, values, np.inf).argmin(axis=1)
        return best

    def _objective(self, prepared: _Prepared, menu: Menu) -> Objective:
        if self.planner.pressure is Pressure.NONE:
            return Latency()
        return DriftPlusPenalty(
            prepared.penalty,
            prepared.weights,
            menu.queues[:, None, :],
            menu.virtual[:, None, :],
            self.budgets,
            menu.remaining_tokens[:, None],
            menu.waited_s[:, None],
            menu.past.waiting[:, None] if menu.past else 0.0,
        )

    def _prepare(self, table: Table) -> _Prepared:
        kept = self._tables.get(id(table))
        if kept is None:
            kept = table, _prepare(self, table)  # the table is kept, too: its id stays its own
            self._tables[id(table)] = kept
        return kept[1]


def _prepare(chooser: TableChooser, table: Table) -> _Prepared:
    planner, tools, limits = chooser.planner, chooser.tools, chooser.limits
    world, job = table.world, table.bills[0].job
    decisions = [bill.decision for bill in table.bills]
    allowed = np.array([tools.allow(decision) for decision in decisions])
    if planner.partitions is not None:
        mine = set(planner.decisions(world, job, tools, limits))
        allowed &= np.array([decision in mine for decision in decisions])
    if not allowed.any():
        raise RequestError(f"{planner.name} finds none of its plans among the {len(table)} of the table")
    penalty, weights = typical(world, job, tools, limits, chooser.arrivals_per_s)
    penalty = replace(penalty, v=chooser.v, wait_term=chooser.wait_term)
    if planner.pressure is Pressure.SELFISH:
        weights = weights * np.array([1.0, 1.0, 1.0, 0.0])
    fixed = None
    if planner.when is When.BEFORE:
        value = table.at(world.conditions()).total_s
        fixed = int(np.where(allowed, value, np.inf).argmin())
    return _Prepared(allowed, fixed, penalty, weights * chooser.v)


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """Always the same plan: static plans, best in hindsight once it is known, and what a published program plans."""

    plan: Callable[[Table], int]
    in_flight: bool = False

    @classmethod
    def number(cls, plan: int) -> Fixed:
        """A plan by its number."""
        return cls(lambda _: plan)

    @classmethod
    def of(cls, policy: Policy, tools: Tools, limits: Limits) -> Fixed:
        """What a policy decides under the expected conditions of a table's world. Raises RequestError when that is
        not among the table's plans."""

        known: dict[int, tuple[Table, int]] = {}

        def find(table: Table) -> int:
            if id(table) not in known:
                known[id(table)] = (
                    table,
                    number_of(table, planned(policy, table.world, table.bills[0].job, tools, limits)),
                )
            return known[id(table)][1]

        return cls(find)

    def choose(self, menu: Menu) -> Ints:
        return np.where(menu.current < 0, self.plan(menu.table), -1)


def planned(policy: Policy, world: World, job: Job, tools: Tools, limits: Limits) -> Decision:
    """What a policy decides for a job when nothing is known but what was expected."""
    seen = Observation(
        world.spec, (), job.prompt_tokens, job.tokens_out, world=world, nominal=world, limits=limits, tools=tools
    )
    return policy.decide(seen)


def number_of(table: Table, decision: Decision) -> int:
    """The number of a decision in a table. Raises RequestError when it is not there."""
    for number, bill in enumerate(table.bills):
        if bill.decision == decision:
            return number
    raise RequestError(f"the plan {decision.partition.text([str(n) for n in range(9)])} is not in the table")


def find_chooser(
    name: str,
    tools: Tools,
    limits: Limits,
    *,
    budgets: Budgets | None = None,
    v: float = 1.0,
    arrivals_per_s: float = 0.0,
    wait_term: bool = True,
) -> Chooser:
    """A policy of `POLICIES` for many systems at a time. Raises RequestError for an unknown name."""
    policy = EDGESHARD_REPLANNED if name == EDGESHARD_REPLANNED.name else find_policy(name)
    budgets = budgets or Budgets()
    if isinstance(policy, (Splitwise, Tuned)):
        return policy.chooser(tools, limits, budgets, v, arrivals_per_s)
    if isinstance(policy, Planner):
        return TableChooser(policy, tools, limits, budgets, v, arrivals_per_s, wait_term)
    if isinstance(policy, PerLayer):
        return LayerChooser(policy, tools.allow, limits, arrivals_per_s)
    return Fixed.of(policy, tools, limits)
