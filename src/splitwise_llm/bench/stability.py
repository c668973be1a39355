"""What is claimed of drift plus penalty, measured in the simulator: penalty and backlog against V, stability up to the
fluid bound, budgets that are met. It does not know what would be a good result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm import lyapunov
from splitwise_llm.bench.cells import WARM_UP, by_trace, load_states, mean_estimate
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.fluid import capacity, least_penalty
from splitwise_llm.bench.outcome import resampled
from splitwise_llm.bench.variants import chooser_of
from splitwise_llm.cost import NO_LOSS, Accuracy, Limits, Table
from splitwise_llm.decision import WirePrecision
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import PLAIN, Chooser, Menu, Tools
from splitwise_llm.policies.choosers import TableChooser
from splitwise_llm.policies.menus import menu as make_table
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.planners import PLANNERS, typical
from splitwise_llm.records import Estimate
from splitwise_llm.sim.asking import questions
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Records, Run, simulate, slope
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.scenarios import build, find_scenario, worlds
from splitwise_llm.spec import Weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Tell = Callable[[str], None]

DRIFT = next(row for row in PLANNERS if row.name == "drift")
MANY_SLOTS = 64
"""As many requests as a simulated device can hold: what waits at its door is in no queue of the Lyapunov function."""
SETTLED = 0.3
"""Share of a run's time that is dropped before backlogs are looked at."""
SAMPLE_S = 5.0
BOUND = 0.01
"""Stable: the backlog grows by less than this share of what is offered."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is run: a case of a scenario, at a rate, with so many traces of so many requests."""

    scenario: str
    case: str
    per_s: float
    """Requests per second; for `STABILITY` only what weights are made for, as shares of the bound replace it."""
    slots: int = MANY_SLOTS


TRADE_OFF = Row("capable-edge", "orin-gpt2xl", 0.6)
"""The cheapest plan, all on the device, takes 1.9 s of the device: at 0.6 requests per second it is overloaded by
15 %, and some have to go by the dearer splits."""
SWEPT = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Up to where `MANY_SLOTS` hold the backlog."""
FITTED = 2.0
"""Slopes are fitted from this V on: below, what a request does to an empty queue (w x^2 / 2 = 2) outweighs V times the
penalty's difference between plans (about 1), and V decides little."""
STABILITY = Row("private-mec", "orin-7b", 0.07)
LOADS = (0.7, 0.8, 0.9, 0.95, 1.05)
LOSSES = Accuracy(
    {Weights.INT4: (0.007,)},
    {WirePrecision.INT8: (0.0004,), WirePrecision.INT4: (0.012,)},
    "the bundled model's nats per token lost, of docs/log.md; assumed to hold for 7B",
)
LOSSY = Tools((WirePrecision.FP16, WirePrecision.INT8, WirePrecision.INT4))
CALM, BUSY = Row("private-wan", "orin-7b", 0.04, 4), Row("capable-edge", "orin-gpt2xl", 0.4, 4)
BUDGETED = (
    ("energy", CALM, Budgets(energy_j=75.0), Budgets(energy_j=35.0)),
    ("deadline", BUSY, Budgets(deadline_s=5.0, misses=0.25), Budgets(deadline_s=1.5, misses=0.25)),
    ("accuracy", CALM, Budgets(nats=0.004), Budgets(nats=0.0005)),
)
"""Name, where, a budget that plans of the table allow and that is overrun by who ignores it, and one that no plan
keeps to (the cheapest takes 44 J, the fastest 1.9 s; the device's own int4 layers lose 0.0009 nats)."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is simulated: traces, and requests of each."""

    traces: int
    requests: int


@dataclass(frozen=True, slots=True, eq=False)
class System:
    """A case made ready, with one table."""

    params: Params
    limits: Limits
    tools: Tools

    @property
    def table(self) -> Table:
        return self.params.physics.tables[0]

    @property
    def allowed(self) -> NDArray[np.bool_]:
        return np.ones(len(self.table), bool)

    def at(self, per_s: float, requests: int) -> System:
        """At another rate; links and clouds do not repeat within the run."""
        arrivals = replace(self.params.arrivals, per_s=per_s)
        params = replace(self.params, arrivals=arrivals, horizon_s=2 * requests / per_s)
        return replace(self, params=params)

    def traces(self, amount: Amount) -> Traces:
        return draw(self.params, 3_000, tuple(range(amount.traces)), amount.requests)

    def typical(self) -> tuple[Penalty, Floats]:
        """Reference and weights of the physical queues at this rate, for V = 1."""
        job = self.table.bills[0].job
        return typical(self.table.world, job, self.tools, self.limits, self.params.arrivals.per_s)


def system(row: Row, tools: Tools = PLAIN, accuracy: Accuracy = NO_LOSS, budgets: Budgets | None = None) -> System:
    """The plans that planners choose in any of the case's classes, with each wire precision by itself, too."""
    scenario = find_scenario(row.scenario)
    case = replace(scenario.case(row.case), per_s=row.per_s)
    world, job = worlds(scenario, case, accuracy=accuracy)[0]
    penalty, weights = typical(world, job, tools, scenario.limits, case.per_s)
    goals: list[Objective] = [Latency(), DriftPlusPenalty(penalty, weights)]
    each = [replace(tools, wires=(wire,)) for wire in tools.wires]
    table = make_table(world, job, each, scenario.limits, load_states(world, scenario, case), goals)
    params = build(scenario, case, [table], budgets=budgets)
    return System(replace(params, slots=row.slots, sample_s=SAMPLE_S), scenario.limits, tools)


@dataclass(frozen=True, slots=True, eq=False)
class FixedWeights:
    """Drift plus penalty at admission, weights given: those of `TableChooser` are nominal and grow with V, so that its
    V counts against budgets only."""

    penalty: Penalty
    weights: Floats
    in_flight: bool = False

    def priced(self, menu: Menu) -> tuple[Ints, Floats]:
        """Per system the number of a plan, and its c0."""
        prices = menu.table.at(menu.conditions, menu.remaining_tokens[:, None])
        objective = DriftPlusPenalty(self.penalty, self.weights, menu.queues[:, None, :], menu.virtual[:, None, :])
        best = np.where(menu.admissible, objective.value(prices), np.inf).argmin(axis=1)
        c0 = self.penalty.c0(prices.service_s, prices.device_j, prices.nats + np.zeros_like(prices.service_s))
        return best, c0[np.arange(len(best)), best]

    def choose(self, menu: Menu) -> Ints:
        return self.priced(menu)[0]


def _decided(params: Params, traces: Traces, chooser: FixedWeights, until_s: float) -> tuple[Records, Floats]:
    """As `simulate`, and for each decision its world, time, and c0: (decisions, 3)."""
    run, notes = Run.begin(params, traces, chooser), []
    while not run.state.is_over.all():
        for question in questions(run.params, traces, run.state, False):
            choice, c0 = chooser.priced(question.menu)
            world = question.slots[0]
            notes.append(np.stack([world, run.state.now[world], c0], axis=1))
            run.take(question, choice)
        run.advance()
        run.state.is_over |= run.state.now > until_s
        run.state.ask[run.state.is_over] = False
    return run.finish(), np.concatenate(notes)


def _by_world(worlds: Ints | Floats, values: Floats, count: int) -> Floats:
    return np.array([values[worlds == world].mean() for world in range(count)])


def _log_slope(v: Floats, values: Floats) -> Estimate:
    """Slope of the logarithm of means over traces, values (V's, traces), against that of V; NaN where a mean is not
    above 0."""

    def fitted(at: Ints) -> float:
        mean = values[:, at].mean(axis=1)
        return slope(np.log(v), np.log(mean)) if len(v) > 1 and (mean > 0).all() else np.nan

    if np.isnan(fitted(np.arange(values.shape[1]))):
        return Estimate(np.nan, np.nan, np.nan)
    return resampled(fitted, values.shape[1])


def trade_off(amount: Amount, swept: Sequence[float], figures: Figures, tell: Tell) -> None:
    """Mean c0 and mean backlog against V, the wait term off; mean latency against V, the wait term on."""
    made = system(TRADE_OFF).at(TRADE_OFF.per_s, amount.requests)
    traces = made.traces(amount)
    end_s = 0.98 * amount.requests / TRADE_OFF.per_s
    penalty, weights = made.typical()
    least = least_penalty(made.params, traces, made.allowed, penalty)
    figures.add("c0_limit", least, "linear program: no choice of plans by class costs less and keeps up")
    gaps, backlogs, latencies = list[Floats](), list[tuple[Floats, Floats]](), list[float]()
    for v in swept:
        tell(f"V = {v:g}")
        chooser = FixedWeights(replace(penalty, v=v, wait_term=False), weights)
        records, decided = _decided(made.params, traces, chooser, end_s)
        assert records.queue_s is not None
        assert records.queue_world is not None
        assert records.work_s is not None
        late = decided[:, 1] > SETTLED * end_s
        c0 = _by_world(decided[late, 0], decided[late, 2], amount.traces)
        late = records.queue_s > SETTLED * end_s
        backlog = _by_world(records.queue_world[late], records.work_s[late].sum(axis=1), amount.traces)
        device = _by_world(records.queue_world[late], records.work_s[late, 0], amount.traces)
        waiting = simulate(made.params, traces, replace(chooser, penalty=replace(penalty, v=v)), end_s)
        done = np.where((waiting.status == 0) & (waiting.arrival_s > SETTLED * end_s), waiting.total_s, np.nan)
        latency = by_trace(waiting, done, np.nanmean)
        for name, values in (("c0", c0), ("backlog_s", backlog), ("device_backlog_s", device), ("latency_s", latency)):
            _add(figures, f"v_{v:g}/{name}", mean_estimate(values))
        gaps.append(c0 - least)
        backlogs.append((backlog, device))
        latencies.append(float(latency.mean()))
    _slopes(np.array(swept), np.array(gaps), np.array(backlogs), figures)
    figures.add("latency_best_v", swept[int(np.argmin(latencies))], "wait term on")


def _slopes(v: Floats, gaps: Floats, backlogs: Floats, figures: Figures) -> None:
    """How the gap (V's, traces) and the backlogs (V's, 2, traces) of all queues and of the device follow V."""
    fitted = v >= FITTED
    clear = fitted & np.array([mean_estimate(of_v).low > 0 for of_v in gaps])  # the logarithm of noise says nothing
    told = f"log-log, V = {', '.join(f'{one:g}' for one in v[clear])}; -1: the gap falls as 1/V"
    _add(figures, "c0_gap_slope", _log_slope(v[clear], gaps[clear]), told)
    _add(figures, "backlog_slope", _log_slope(v[fitted], backlogs[fitted, 0]), "log-log; at most 1: O(V)")
    _add(figures, "device_backlog_slope", _log_slope(v[fitted], backlogs[fitted, 1]), "the queue that V fills")
    times_v = (gaps.mean(axis=1) * v)[fitted]
    figures.add("c0_gap_times_v_max", float(times_v.max()), "bounded as V grows, if the gap is O(1/V)")
    traces = backlogs.shape[2]
    per_v = resampled(lambda at: slope(v[fitted], backlogs[fitted, 0][:, at].mean(axis=1)), traces)
    _add(figures, "backlog_s_per_v", per_v, "of a line through the backlogs")
    mean = backlogs[fitted, 0].mean(axis=1)
    line = mean.mean() + per_v.value * (v[fitted] - v[fitted].mean())
    figures.add("backlog_off_line", float(np.abs(mean / line - 1).max()), "largest relative distance from that line")


def growth(records: Records, per_s: float, end_s: float) -> Floats:
    """Per trace: by what share of the requests offered those at the device, its door included, grow per second."""
    assert records.queue_s is not None
    assert records.queue_world is not None
    assert records.in_flight is not None
    result = []
    for world in range(len(records.status)):
        at = (records.queue_world == world) & (records.queue_s > SETTLED * end_s) & (records.queue_s <= end_s)
        result.append(slope(records.queue_s[at], records.in_flight[at]) / per_s)
    return np.array(result)


def stability(
    amount: Amount, loads: Sequence[float], figures: Figures, tell: Tell, tag: str = "", *,
    slots: int = MANY_SLOTS, moves: bool = True, policy: str = DRIFT.name,
) -> None:  # fmt: skip
    """Growth of the backlog under a policy, by default the priced one, at shares of the fluid bound."""
    made = system(replace(STABILITY, slots=slots))
    few = made.traces(Amount(1, 1))
    bound = capacity(made.params, few, made.allowed, moves=moves)
    figures.add(f"fluid_bound_per_s{tag}", bound, "linear program over fractions of requests by plan and class")
    stable = 0.0
    for load in loads:
        tell(f"{load:g} of the fluid bound{tag.replace('_', ' ')}")
        per_s = load * bound
        end_s = amount.requests / per_s
        here = made.at(per_s, amount.requests)
        traces = here.traces(replace(amount, requests=int(1.3 * amount.requests)))  # nobody runs out of requests
        chooser = _chooser(policy, made.tools, made.limits, Budgets(), per_s, moves)
        one = mean_estimate(growth(simulate(here.params, traces, chooser, end_s), per_s, end_s))
        _add(figures, f"slope_at_{load:g}{tag}", one, "share of the requests offered that pile up")
        if one.high < BOUND:
            stable = max(stable, load)
    figures.add(f"largest_stable_share{tag}", stable, f"of {', '.join(f'{x:g}' for x in loads)}: upper limit below 1 %")


def _chooser(policy: str, tools: Tools, limits: Limits, spend: Budgets, per_s: float, moves: bool = True) -> Chooser:
    if policy == DRIFT.name:
        return TableChooser(DRIFT, tools, limits, spend, arrivals_per_s=per_s, moves=moves)
    return chooser_of(policy, tools, limits, per_s, {}, budgets=spend)


def budgets(amount: Amount, figures: Figures, tell: Tell, policy: str = DRIFT.name) -> None:
    """Average spending beyond each budget, and whether its virtual queue ends at the cap."""
    for index, (name, row, feasible, infeasible) in enumerate(BUDGETED):
        for label, budget in (("", feasible), ("_infeasible", infeasible)):
            tell(f"{name} budget{label.replace('_', ', ')}")
            made = system(row, LOSSY, LOSSES, budget).at(row.per_s, amount.requests)
            traces = made.traces(amount)
            for tag, chosen in ((f"{name}{label}", budget), (f"{name}{label}_ignored", Budgets())):
                chooser = _chooser(policy, LOSSY, made.limits, chosen, row.per_s)
                records = simulate(made.params, traces, chooser)
                assert records.virtual is not None
                spent = {"energy": records.device_j, "deadline": records.missed, "accuracy": records.nats}[name]
                limit = {"energy": budget.energy_j, "deadline": budget.misses, "accuracy": budget.nats}[name]
                assert limit is not None
                over = mean_estimate(by_trace(records, spent) / limit - 1)
                _add(figures, f"{tag}_over", over, "average spending over the budget, less 1")
                if chosen is budget:
                    z = records.virtual[:, 0, index]
                    figures.add(f"{tag}_z_per_request", float(z.mean() / amount.requests), "Z(t)/t at the end")
                    figures.add(f"{tag}_at_cap", float(lyapunov.at_cap(z).mean()), "share of traces: infeasible")


def _add(figures: Figures, name: str, one: Estimate, note: str = "") -> None:
    limits = f"{one.low:.4g} to {one.high:.4g}"
    figures.add(name, one.value, f"{limits}; {note}" if note else limits)
    figures.add(f"{name}_lo", one.low)
    figures.add(f"{name}_hi", one.high)


def run_stability(quick: bool, tell: Tell, policy: str = DRIFT.name) -> Figures:
    """All three measurements; quick: fewer V's and loads, and fewer and shorter traces. Of another policy than drift
    plus penalty no sweep of V, which is not its own. Raises RequestError for unknown names, ModelError where weights
    are missing."""
    _chooser(policy, PLAIN, Limits(), Budgets(), STABILITY.per_s)
    sweep, long, spending = (
        (Amount(16, 400), Amount(12, 250), Amount(8, 200)) if quick
        else (Amount(48, 1500), Amount(32, 2000), Amount(16, 400))
    )  # fmt: skip
    figures = Figures(
        "stability",
        {
            "quick": quick, "policy": policy,
            "trade_off": f"{TRADE_OFF.scenario}.{TRADE_OFF.case} at {TRADE_OFF.per_s}/s",
            "stability": f"{STABILITY.scenario}.{STABILITY.case}",
            "budgets": [f"{row.scenario}.{row.case} at {row.per_s}/s" for _, row, *_ in BUDGETED],
            "traces": [sweep.traces, long.traces, spending.traces],
            "requests_per_trace": [sweep.requests, long.requests, spending.requests], "limits": "95 % over traces",
            "warm_up": [SETTLED, WARM_UP],
        },
    )  # fmt: skip
    ours = policy == DRIFT.name
    if ours:
        trade_off(sweep, SWEPT[::2] if quick else SWEPT, figures, tell)
    stability(long, (0.9, 1.05) if quick else LOADS, figures, tell, policy=policy)
    if not quick:
        shorter = replace(long, requests=long.requests // 2)
        stability(shorter, LOADS, figures, tell, "_4_slots", slots=4, policy=policy)
        if ours:
            stability(shorter, LOADS, figures, tell, "_admission_only", moves=False)
    budgets(spending, figures, tell, policy)
    return figures


__all__ = ["Amount", "FixedWeights", "budgets", "growth", "run_stability", "stability", "system", "trade_off"]
