"""One policy in one case of a scenario, over paired traces: simulated, and summed up with limits over traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from splitwise_llm.bench.outcome import resampled
from splitwise_llm.bench.variants import chooser_of, per_layer_policies
from splitwise_llm.cost import Job, Limits, Table, World
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import PLAIN, Chooser, Menu, Tools
from splitwise_llm.policies import POLICIES
from splitwise_llm.policies.choosers import Fixed, planned
from splitwise_llm.policies.layer_chooser import layer_plans
from splitwise_llm.policies.menus import MAX_PLANS, menu
from splitwise_llm.policies.mind import Mind, Splitwise, Tally
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.per_layer import PerLayer
from splitwise_llm.policies.planners import Planner, typical
from splitwise_llm.policies.tuned import Tuned
from splitwise_llm.records import Cell, Estimate
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Records, simulate_each, slope
from splitwise_llm.sim.params import CloudProcess, LinkProcess, Params
from splitwise_llm.sim.physics import MODES
from splitwise_llm.sim.scenarios import TEST, Case, Recordings, Scenario, Split, build, worlds
from splitwise_llm.spec import LinkSpec

Floats = NDArray[np.float64]

WITH_TOOLS = "+tools"
HINDSIGHT = "best-static"
"""The fixed plan with the smallest mean on the very traces it is judged by."""
TOOLS = Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 32, 128), (0, 1, 2, 3, 4, 6))
WARM_UP = 0.1
CURVE_POINTS = 120
MOST_EXTRA = MAX_PLANS * 3 // 4
"""Plans of a table beside those that planners need, from which on weights of rows add none: what else they decide is
the nearest of those there are."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated per cell."""

    traces: int
    requests: int
    """Per device and trace, warm-up included."""
    fixed_requests: int
    """The same for the search of the best static plan in hindsight."""


def load_states(world: World, scenario: Scenario, case: Case) -> list[Form]:
    """The conditions a case can be in: every link class that is up, with every class of cloud load."""
    links = [kind for process in _links(scenario, case) for kind in process.classes if kind.is_up]
    cloud = case.cloud or scenario.cloud
    if isinstance(cloud, CloudProcess):
        clouds = [cloud, *(s.cloud for s in scenario.segments if isinstance(s.cloud, CloudProcess))]
        loads = [(kind.batch, kind.wait_s) for process in clouds for kind in process.classes]
    else:
        loads = [(1, 0.0), (cloud.sessions // 2, 0.0), (cloud.sessions, 0.0), (cloud.sessions, 5.0)]
    return [
        world.basis.conditions(
            {(0, 1): LinkSpec(kind.rtt_s, kind.up_bytes_per_s, kind.down_bytes_per_s)},
            {1: world.load(1, batch, wait_s)},
        )
        for kind in dict.fromkeys(links)
        for batch, wait_s in dict.fromkeys(loads)
    ]


def _links(scenario: Scenario, case: Case) -> list[LinkProcess]:
    return [case.link or scenario.link, *(segment.link for segment in scenario.segments)]


@dataclass(eq=False)
class Setting:
    """A case made ready: its tables, and its traces, which are the same for every policy."""

    scenario: Scenario
    case: Case
    size: Size
    recordings: Recordings | None = None
    split: Split = TEST
    acceptance: float = 0.6
    first_trace: int = 0
    weights: Mapping[str, Path] = field(default_factory=dict)
    """Of rows of learned policies with weights of their own, as `splitwise@NAME`."""
    _results: dict[str, Records] = field(default_factory=dict)
    _choosers: dict[str, Chooser] = field(default_factory=dict)
    _minds: dict[str, Mind] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def limits(self) -> Limits:
        return self.scenario.limits

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """One per kind of device and prompt class. Raises RequestError where nothing is admissible."""
        return tuple(self._table(world, job) for world, job in worlds(self.scenario, self.case, self.acceptance))

    def _table(self, world: World, job: Job) -> Table:
        states = load_states(world, self.scenario, self.case)
        extra: dict[Decision, None] = {}
        theirs: dict[Decision, None] = {}
        objectives: dict[Tools, list[Objective]] = {}
        for tools in (PLAIN, TOOLS):
            penalty, weights = typical(world, job, tools, self.limits, self.case.per_s)
            objectives[tools] = [Latency(), DriftPlusPenalty(penalty, weights)]
            for paper in per_layer_policies(self.weights):
                plans = layer_plans(paper, world, job, tools, self.limits, states, self.case.per_s)
                theirs |= dict.fromkeys(plans)
            for name, (_, policy) in POLICIES.items():
                if isinstance(policy, PerLayer):
                    plans = layer_plans(policy, world, job, tools, self.limits, states, self.case.per_s)
                    extra |= dict.fromkeys(plans)
                elif not isinstance(policy, (Planner, Splitwise, Tuned)) and not name.endswith("replanned"):
                    try:
                        extra[planned(policy, world, job, tools, self.limits)] = None
                    except RequestError:
                        continue  # this program has no plan here, and so no cell
        extra |= dict.fromkeys(islice(theirs, max(MOST_EXTRA - len(extra), 0)))
        return menu(world, job, (PLAIN, TOOLS), self.limits, states, objectives[TOOLS], extra)

    @cached_property
    def params(self) -> Params:
        return build(self.scenario, self.case, self.tables, self.recordings)

    @cached_property
    def traces(self) -> Traces:
        numbers = range(self.first_trace, self.first_trace + self.size.traces)
        return draw(self.params, self.split.seed, tuple(numbers), self.size.requests, self.split.spread)

    def chooser(self, policy: str) -> Chooser:
        """A policy by its name, with `+tools` where it has them. Raises RequestError where it has no plan here,
        ModelError where its weights are missing."""
        if policy not in self._choosers:
            name, tools = (policy.removesuffix(WITH_TOOLS), TOOLS) if policy.endswith(WITH_TOOLS) else (policy, PLAIN)
            found = chooser_of(name, tools, self.limits, self.case.per_s, self.weights)
            for table in self.tables:
                found.choose(idle_question(table))  # says now, not after minutes, that it has no plan
            self._choosers[policy] = found
        return self._choosers[policy]

    def run(self, policy: str) -> Records:
        """Simulate a policy on the traces; kept, for pairing."""
        self.run_each([policy])
        return self._results[policy]

    def run_each(self, policies: Sequence[str]) -> None:
        """The same of several policies at a time, which takes less time than one after the other."""
        choosers: dict[str, Chooser] = {}
        for policy in policies:
            if policy not in self._results:
                chooser = self.best_static(policy) if policy.startswith(HINDSIGHT) else self.chooser(policy)
                if isinstance(chooser, Mind):  # its tables are kept, its counts begin with the traces
                    chooser = self._minds[policy] = replace(chooser, tally=Tally())
                choosers[policy] = chooser
        if choosers:  # else tables would be made that nobody needs
            found = simulate_each(self.params, self.traces, list(choosers.values()))
            self._results |= dict(zip(choosers, found, strict=True))

    def turned(self, policy: str) -> tuple[float, dict[str, float]] | None:
        """How a learned policy that was run decided: share of the decisions that exact drift plus penalty made in its
        place, and shares in which each knob was not neutral, the commonest first. None for all others."""
        mind = self._minds.get(policy)
        if mind is None:
            return None
        tally = mind.tally
        shares = {name: count / max(tally.decisions, 1) for name, count in tally.turned.most_common()}
        return tally.fallback_share, shares

    def best_static(self, policy: str) -> Chooser:
        """The fixed plan that does best on these traces, among those with the policy's tools: tried on their first
        requests, the three best then on all of them. Of several tables, the plan of the same shape in each."""
        tools = TOOLS if policy.endswith(WITH_TOOLS) else PLAIN
        table = self.tables[0]
        numbers = [n for n, bill in enumerate(table.bills) if tools.allow(bill.decision)]
        few = draw(self.params, self.split.seed, self.traces.numbers, self.size.fixed_requests, self.split.spread)

        def by_mean(traces: Traces, numbers: Sequence[int]) -> list[int]:
            found = simulate_each(self.params, traces, [self._fixed(number) for number in numbers])
            means = [float(np.nanmean(records.total_s[records.counted(WARM_UP)])) for records in found]
            return [number for _, number in sorted(zip(means, numbers, strict=True), key=lambda one: one[0])]

        return self._fixed(by_mean(self.traces, by_mean(few, numbers)[:3])[0])

    def _fixed(self, number: int) -> Chooser:
        wanted = self.tables[0].bills[number].decision

        def find(table: Table) -> int:
            alike = [n for n, bill in enumerate(table.bills) if bill.decision.partition == wanted.partition]
            exact = [n for n in alike if table.bills[n].decision == wanted]
            return (exact or alike or [min(number, len(table) - 1)])[0]

        return Fixed(find)


def idle_question(table: Table) -> Menu:
    """A question about one idle system."""
    plans, zero = len(table), np.zeros((1, 4))
    empty = np.zeros((1, plans))
    return Menu(
        table, table.world.conditions()[None], np.ones((1, plans), bool), zero, zero, np.array([-1]),
        np.array([float(table.bills[0].later_tokens)]), empty, empty, empty, np.zeros(1),
    )  # fmt: skip


# From records to figures


def by_trace(records: Records, values: Floats, reduce: Callable[[Floats], float] = np.nanmean) -> Floats:
    """One figure per trace, over the requests that count."""
    counted = records.counted(WARM_UP)
    return np.array([reduce(values[e][counted[e]]) if counted[e].any() else np.nan for e in range(len(values))])


def mean_estimate(per_trace: Floats, least: float = -np.inf, most: float = np.inf) -> Estimate:
    """Mean over traces and its 95 % limits (Student's t), cut to what the figure can be: from `least` to `most`.

    Of few traces the limits are wide (of two, nine standard deviations either way), and would else reach below 0
    for what cannot be negative; cut to the range of the figure they hold it as often as before.
    """
    values = per_trace[np.isfinite(per_trace)]
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    middle = float(values.mean())
    if len(values) == 1:
        return Estimate(middle, middle, middle)
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Estimate(middle, max(middle - half, least), min(middle + half, most))


def _quantile(records: Records, share: float) -> Estimate:
    counted = records.counted(WARM_UP)
    pools = [records.total_s[e][counted[e]] for e in range(len(counted))]
    return resampled(lambda at: float(np.quantile(np.concatenate([pools[e] for e in at]), share)), len(pools))


def metrics(records: Records) -> dict[str, Estimate]:
    """Every figure of a cell that needs no other cell."""
    seconds = records.seconds if records.seconds is not None else np.full(len(records.status), np.nan)
    done = (records.status == 0).sum(axis=(1, 2))
    running = np.nansum(records.mode_s.sum(axis=-1), axis=(1, 2))
    result = {
        "mean_s": mean_estimate(by_trace(records, records.total_s), 0.0),
        "p50_s": _quantile(records, 0.5),
        "p95_s": _quantile(records, 0.95),
        "p99_s": _quantile(records, 0.99),
    }
    result["nats"] = mean_estimate(by_trace(records, records.nats))  # as measured on text, which may gain by chance
    for name in ("ttft_s", "tpot_s", "device_j", "total_j"):
        result[name] = mean_estimate(by_trace(records, getattr(records, name)), 0.0)
    result["usd_per_1k"] = mean_estimate(1e3 * by_trace(records, records.usd), 0.0)
    result["done_per_s"] = mean_estimate(done / seconds, 0.0)
    result["moves_per_min"] = mean_estimate(60 * records.moves.sum(axis=(1, 2)) / np.maximum(running, 1e-9), 0.0)
    result["unfinished"] = mean_estimate(by_trace(records, (records.status != 0).astype(float)), 0.0, 1.0)
    result["queue_slope"] = _slopes(records)
    return result


def _slopes(records: Records) -> Estimate:
    """Growth of the work in the system, in seconds per second, until the last request has come."""
    if records.work_s is None or records.queue_s is None or records.queue_world is None:
        return Estimate(np.nan, np.nan, np.nan)
    ends = np.nanmax(np.where(np.isfinite(records.traces.arrival_s), records.traces.arrival_s, np.nan), axis=(1, 2))
    slopes = []
    for world in range(len(records.status)):
        at = (records.queue_world == world) & (records.queue_s <= ends[world])
        if at.sum() > 10:
            slopes.append(slope(records.queue_s[at], records.work_s[at].sum(axis=1)))
    return mean_estimate(np.array(slopes or [np.nan]))


def modes(records: Records) -> dict[str, float]:
    """Share of the time of requests per way of running."""
    total = np.nansum(records.mode_s, axis=(0, 1, 2))
    return {mode: float(share) for mode, share in zip(MODES, total / max(total.sum(), 1e-12), strict=True)}


def queues(records: Records) -> tuple[tuple[float, ...], dict[str, tuple[float, ...]]]:
    """Backlog over time in the first trace, thinned."""
    if records.queue_s is None or records.work_s is None or records.queue_world is None:
        return (), {}
    at = np.nonzero(records.queue_world == 0)[0]
    at = at[:: max(len(at) // 240, 1)]
    names = ("device", "up", "down", "cloud")
    series = {name: tuple(np.round(records.work_s[at, n], 4).tolist()) for n, name in enumerate(names)}
    return tuple(np.round(records.queue_s[at], 3).tolist()), series


def decision_ms_p99(setting: Setting, policy: str, repeats: int = 60) -> float:
    """99th percentile of one decision about one system, in ms."""
    chooser, question = setting.chooser(policy), idle_question(setting.tables[0])
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        chooser.choose(question)
        took.append(time.perf_counter() - start)
    return float(1e3 * np.quantile(took, 0.99))


def cell(setting: Setting, policy: str, extra: Mapping[str, Estimate] | None = None, note: str = "") -> Cell:
    """The cell of a policy; `extra` are figures that need other cells."""
    records = setting.run(policy)
    counted = records.counted(WARM_UP)
    totals = np.sort(records.total_s[counted])
    ranks = np.linspace(0, len(totals) - 1, min(CURVE_POINTS, len(totals))).round().astype(int)
    times, series = queues(records)
    figures = metrics(records) | dict(extra or {})
    turned = setting.turned(policy)
    if turned is not None:
        figures["fallback_share"] = Estimate(turned[0], turned[0], turned[0])
    return Cell(
        setting.scenario.name, setting.name, policy, len(records.status), int(counted.sum()), figures,
        tuple(np.round(totals[ranks], 5).tolist()), modes(records), times, series, note=note or _enough(figures),
        knobs=turned[1] if turned else {},
    )  # fmt: skip


def _enough(figures: Mapping[str, Estimate]) -> str:
    """Empty where the limits are as narrow as cells should be (0.5 % of the mean, 2 % of p95); else how wide."""
    wide = []
    for name, bound in (("mean_s", 0.005), ("p95_s", 0.02)):
        one = figures[name]
        half = (one.high - one.low) / 2 / max(one.value, 1e-12)
        if half > bound:
            wide.append(f"{name} +-{100 * half:.1f} %")
    return f"stopped at the given number of traces: {', '.join(wide)}" if wide else ""
