"""The per-layer policy for many systems at a time: what it decides, looked up among the plans of a table.

A table that was made with `layer_plans` holds what it decides in the states of its case. In between, where it decides
something else, the plan on the same machines that differs in the fewest units stands for it; and where that is out of
reach, any plan that is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Job, Limits, Table, World, obstacle
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Menu, Observation, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.per_layer import PerLayer, Site
from splitwise_llm.policies.per_layer_network import Floats
from splitwise_llm.policies.pipelines import driven

Ints = NDArray[np.int64]
MOST_PLANS = 12
"""Of one table and one set of tools."""
QUEUES = ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1), (4, 0, 0, 0), (0, 0, 0, 4))
"""In units of the reference request, for a table's plans."""


def layer_plans(
    policy: PerLayer, world: World, job: Job, tools: Tools, limits: Limits, states: Sequence[Form],
    arrivals_per_s: float,
) -> list[Decision]:  # fmt: skip
    """What the policy decides under the expected conditions and under each of `states`, with short and long queues:
    at most `MOST_PLANS`, the commonest first. Only for worlds of two machines. Raises RequestError."""
    site = Site.of(world, job, limits, arrivals_per_s)
    seen = Observation(world.spec, (), job.prompt_tokens, job.tokens_out, world=world, limits=limits, tools=tools)
    pairs = list(product([world.conditions(), *states], np.array(QUEUES) * site.penalty.t_ref_s))
    conditions, queues = (np.stack(part) for part in zip(*pairs, strict=True))
    found: Counter[Decision] = Counter()
    for away in (False, True):
        rules = site.rules.repeated(len(pairs)).without_cloud(np.full(len(pairs), away))
        actions = policy.act(site, conditions, queues, rules)
        votes: Counter[tuple[Partition, int]] = Counter()
        for n in np.flatnonzero(actions.possible).tolist():
            votes[site.partition(actions, n), n // len(QUEUES)] += 1
        for (partition, state), number in votes.most_common():
            if obstacle(world, Decision(partition, tools.wires[0]), job, limits) is None:
                found[driven(world, [partition], seen, conditions[state * len(QUEUES)])] += number
    return [decision for decision, _ in found.most_common(MOST_PLANS)]


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    site: Site
    vectors: Ints
    """(plans, units): as `Partition` writes them."""
    allowed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class LayerChooser:
    """The policy over tables of a device and one worker. It decides at admission, and moves nothing."""

    policy: PerLayer
    keeps: Callable[[Decision], bool]
    """Whether a decision keeps to the tools there are."""
    limits: Limits
    arrivals_per_s: float = 0.0
    in_flight: bool = False
    _tables: dict[int, tuple[Table, _Prepared]] = field(default_factory=dict, repr=False)

    def choose(self, menu: Menu) -> Ints:
        """Per system the number of a plan; -1 leaves a running generation as it is."""
        chosen = np.full(len(menu.conditions), -1)
        fresh = np.flatnonzero(menu.current < 0)
        if not len(fresh):
            return chosen
        prepared = self._prepare(menu.table)
        site, conditions, queues = prepared.site, menu.conditions[fresh], menu.queues[fresh]
        usable = menu.admissible[fresh] & prepared.allowed
        usable = np.where(usable.any(axis=1, keepdims=True), usable, prepared.allowed)
        away = np.logical_not((usable & prepared.vectors.any(axis=1)).any(axis=1))  # machine 0 is the device
        rules = site.rules.repeated(len(fresh)).without_cloud(away)
        actions = self.policy.act(site, conditions, queues, rules)
        service = menu.table.at(conditions, menu.remaining_tokens[fresh, None]).service_s
        for row, system in enumerate(fresh.tolist()):
            wanted = np.array(site.vector(actions, row)) if actions.possible[row] else None
            chosen[system] = self._nearest(prepared, wanted, usable[row], service[row])
        return chosen

    def _nearest(self, prepared: _Prepared, wanted: Ints | None, usable: NDArray[np.bool_], service: Floats) -> int:
        """The usable plan on the same machines that differs in the fewest units; of equal ones the fastest."""
        if wanted is None:
            return int(np.where(usable, service, np.inf).argmin())
        differ = (prepared.vectors != wanted).sum(axis=1).astype(np.float64)
        same = (prepared.vectors.min(axis=1) == wanted.min()) & (prepared.vectors.max(axis=1) == wanted.max())
        near = np.where(usable & same, differ, np.where(usable, differ + 1e6, np.inf))
        return int(np.where(near == near.min(), service, np.inf).argmin())

    def _prepare(self, table: Table) -> _Prepared:
        kept = self._tables.get(id(table))
        if kept is None:
            kept = table, self._of(table)  # the table is kept, too: its id stays its own
            self._tables[id(table)] = kept
        return kept[1]

    def _of(self, table: Table) -> _Prepared:
        allowed = np.array([self.keeps(bill.decision) for bill in table.bills])
        if len(table.world.hosts) != 2 or not allowed.any():
            raise RequestError(
                f"splitwise-paper knows a device and one worker, and finds {int(allowed.sum())} plans for its tools "
                f"in a table of {len(table.world.hosts)} machines"
            )
        site = Site.of(table.world, table.bills[0].job, self.limits, self.arrivals_per_s)
        vectors = np.array([bill.decision.partition.to_vector() for bill in table.bills])
        return _Prepared(site, vectors, allowed)


__all__ = ["LayerChooser", "layer_plans"]
