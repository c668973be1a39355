"""Which plans a table should hold, so that every planner finds in it what it would have chosen among all.

Exact pruning is not possible for every objective (the drift is quadratic), so coverage is measured: winners are
collected under sampled conditions, and a test compares the table with full enumeration under others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from splitwise_llm.cost import Job, Limits, Table, World, bill
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision
from splitwise_llm.observation import Tools
from splitwise_llm.policies.objective import Objective
from splitwise_llm.policies.planners import PLANNERS, Planner
from splitwise_llm.policies.solver import Solver

MAX_PLANS = 64


def menu(
    world: World,
    job: Job,
    tools: Sequence[Tools],
    limits: Limits,
    states: Sequence[Form],
    objectives: Iterable[Objective],
    extra: Iterable[Decision] = (),
    planners: Iterable[Planner] = PLANNERS,
) -> Table:
    """A table of at most MAX_PLANS plans: for each set of tools, what each planner chooses under the expected
    conditions and under each of `states`, what is best of all for each objective, and `extra`.

    Raises RequestError when nothing is admissible.
    """
    needed: dict[Decision, None] = dict.fromkeys(extra)
    votes: Counter[Decision] = Counter()
    objectives = list(objectives)
    for some in tools:
        solver = Solver(world, job, some, limits, step=2)
        for planner in planners:
            if planner.partitions is None:
                continue
            ways = planner.decisions(world, job, some, limits)
            if ways:
                table = Table(world, [bill(world, way, job) for way in ways])
                total = table.at(np.stack([world.conditions(), *states])).total_s
                winners = [ways[n] for n in total.argmin(axis=1).tolist()]
                needed[winners[0]] = None
                votes.update(winners[1:])
        for number, conditions in enumerate([world.conditions(), *states]):
            for objective in objectives:
                best = solver.solve(conditions, objective).best.decision
                if number:
                    votes[best] += 1
                else:
                    needed[best] = None
    for decision, _ in votes.most_common():
        if len(needed) >= MAX_PLANS:
            break
        needed[decision] = None
    return Table(world, [bill(world, decision, job) for decision in needed])
