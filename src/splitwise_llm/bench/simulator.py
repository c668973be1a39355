"""How fast the simulator steps and decides, and whether deciding for many at a time decides the same.

Speed is per second of this process's processor time, all threads together, so that neighbours on the machine do not
count; the wall clock is in the notes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from splitwise_llm.bench.decision_time import add_decision_ms
from splitwise_llm.bench.figures import Figures
from splitwise_llm.cost import Job, Table, World
from splitwise_llm.cost.terms import Form
from splitwise_llm.errors import ModelError
from splitwise_llm.observation import EVERYTHING, PLAIN, Chooser, Menu
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.menus import menu as make_table
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.planners import typical
from splitwise_llm.policies.solver import Solver
from splitwise_llm.sim.asking import questions
from splitwise_llm.sim.counters import uniforms
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import Run, simulate
from splitwise_llm.sim.params import CloudClass, CloudProcess, LinkProcess, Params
from splitwise_llm.sim.scenarios import Case, Scenario, build, find_scenario, worlds
from splitwise_llm.spec import LinkSpec

POLICY = "drift"
SOLVED = 60
"""States in which every cut, U-shape and tool is tried, too; each takes a tenth of a second."""


def expected_states(world: World, link: LinkProcess, classes: tuple[CloudClass, ...]) -> list[Form]:
    """Conditions under which tables of a case should hold the best plans: every class of link with every load."""
    links = [LinkSpec(kind.rtt_s, kind.up_bytes_per_s, kind.down_bytes_per_s) for kind in link.classes if kind.is_up]
    loads = [{1: world.load(1, kind.batch, kind.wait_s)} for kind in classes]
    return [world.basis.conditions({(0, 1): one}, load) for one in links for load in loads]


def case_tables(scenario: Scenario, case: Case, acceptance: float = 0.6) -> list[Table]:
    """A table for each world of a case, with what every planner chooses under any of its classes."""
    cloud = case.cloud or scenario.cloud
    link = case.link or scenario.link
    classes = cloud.classes if isinstance(cloud, CloudProcess) else (CloudClass(), CloudClass(32), CloudClass(48, 2.0))
    parts: list[LinkProcess] = [link, *(segment.link for segment in scenario.segments)]
    tables = []
    for world, job in worlds(scenario, case, acceptance):
        states = [state for part in parts for state in expected_states(world, part, classes)]
        penalty, weights = typical(world, job, EVERYTHING, scenario.limits, case.per_s)
        goals: list[Objective] = [Latency(), DriftPlusPenalty(penalty, weights)]
        tables.append(make_table(world, job, [EVERYTHING, PLAIN], scenario.limits, states, goals))
    return tables


def run_simulator(
    worlds_: int, requests: int, states: int, tell: Callable[[str], None], scenario: str = "private-wan"
) -> Figures:
    """Decisions and events per second with drift plus penalty in the loop, batched and one world at a time."""
    row = find_scenario(scenario)
    case = row.cases[0]
    tell(f"plans for {row.name}.{case.name}")
    params = build(row, case, case_tables(row, case))
    chooser = find_chooser(POLICY, EVERYTHING, row.limits, arrivals_per_s=case.per_s)
    figures = Figures(
        "simulator",
        {
            "scenario": f"{row.name}.{case.name}", "policy": POLICY, "plans": len(params.physics.tables[0]),
            "worlds": worlds_, "requests": requests, "states": states, "clock": "processor time of the process",
        },
    )  # fmt: skip
    for name, count, tag in (("", worlds_, "env_steps_per_s"), ("unbatched_", 1, "unbatched_env_steps_per_s")):
        tell(f"{count} world{'s' if count > 1 else ''}")
        each = requests if count > 1 else 10 * requests
        simulate(params, draw(params, 1, range(count), 2), chooser)  # warm
        traces = draw(params, 0, range(count), each)
        wall, begin = time.perf_counter(), time.process_time()
        records = simulate(params, traces, chooser)
        seconds, wall = time.process_time() - begin, time.perf_counter() - wall
        note = f"{records.decisions} decisions in {wall:.2f} s on the wall"
        figures.add(f"{name}decisions_per_s", records.decisions / seconds, note)
        figures.add(tag, records.steps / seconds, f"{records.steps} events")
    moves = params.physics.moves
    figures.add("move_cache_hits", moves.hits / (moves.hits + moves.misses), f"{moves.misses} of its prices were made")
    with suppress(ModelError):  # no weights, no policy
        policy = find_policy("splitwise")
        assert isinstance(policy, Splitwise)
        tell("one live session at a time")
        add_decision_ms(figures, policy)
    tell(f"{states} random states, decided together and one by one")
    _compare(params, row, case, chooser, states, figures)
    return figures


def _compare(params: Params, row: Scenario, case: Case, chooser: Chooser, states: int, figures: Figures) -> None:
    equal = total = 0
    solver: Solver | None = None
    regrets: list[float] = []
    for menu in random_menus(params, states):
        together = chooser.choose(menu)
        alone = [int(chooser.choose(part)[0]) for part in _one_by_one(menu)]
        equal += int((together == alone).sum())
        total += len(alone)
        if len(regrets) < SOLVED:
            world, job = menu.table.world, menu.table.bills[0].job
            solver = solver or Solver(world, job, EVERYTHING, row.limits)
            regrets += _regrets(menu, solver, world, job, row, case, SOLVED - len(regrets))
    figures.add("choices_equal", equal / total, f"{equal} of {total} states")
    figures.add("table_regret_mean", float(np.mean(regrets)), "share of the objective, over every cut and tool")
    figures.add("table_regret_max", max(regrets), f"of {len(regrets)} states at admission")


def random_menus(params: Params, states: int) -> Iterator[Menu]:
    """Menus of states that a run passes through in which everything is decided by chance, under conditions, queues
    and virtual queues drawn at random around theirs."""
    traces, made, number = draw(params, 7, range(256), 20), 0, 0
    run = Run.begin(params, traces, _Chance())
    while made < states and not run.state.is_over.all():
        for question in questions(params, traces, run.state):
            number += 1
            menu = _shaken(params, question.menu, number)
            short = states - made
            part = menu.at(np.arange(short)) if len(menu.current) > short else menu
            if len(part.current):
                made += len(part.current)
                yield part
            run.take(question, run.chooser.choose(question.menu))
        run.advance()


class _Chance:
    in_flight = True

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def choose(self, menu: Menu) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return self._rng.integers(0, len(menu.table), len(menu.current))


def _shaken(params: Params, menu: Menu, number: int) -> Menu:
    places, count = params.physics.places, len(menu.current)
    u = uniforms(3, number, "shaken", 8 * count).reshape(count, 8)
    x = menu.conditions.copy()
    x[:, places.rtt] *= 4 ** (2 * u[:, 0] - 1)
    x[:, places.up] *= 8 ** (2 * u[:, 1] - 1)
    x[:, places.down] *= 8 ** (2 * u[:, 2] - 1)
    queues = menu.queues - 2 * np.log(u[:, 3:7])
    virtual = menu.virtual + np.where(u[:, 7:] < 0.5, -np.log(u[:, 4:8]), 0.0)
    return replace(menu, conditions=x, queues=queues, virtual=virtual)


def _one_by_one(menu: Menu) -> Iterator[Menu]:
    for number in range(len(menu.current)):
        yield menu.at(np.array([number]))


def _regrets(menu: Menu, solver: Solver, world: World, job: Job, row: Scenario, case: Case, limit: int) -> list[float]:
    """By how much the table's best exceeds the best of everything, at admission with the link up."""
    penalty, weights = typical(world, job, EVERYTHING, row.limits, case.per_s)
    fresh = np.nonzero((menu.current < 0) & menu.admissible.all(axis=1))[0][:limit]
    result = []
    for n in fresh.tolist():
        goal = DriftPlusPenalty(penalty, weights, menu.queues[n], menu.virtual[n])
        ours = float(goal.value(menu.table.at(menu.conditions[n])).min())
        best = next(iter(solver.cuts(menu.conditions[n], goal))).value
        result.append(max(ours / best - 1, 0.0))
    return result
