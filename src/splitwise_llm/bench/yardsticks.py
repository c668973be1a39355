"""How far from the best: small cases in which drift plus penalty stands beside the best causal policy and a bound.

One device that takes its requests in turn, 128 tokens in and out, a link and a cloud whose classes change at random.
Nothing is clamped: the causal policy runs in the same simulator as all others, and where it loses the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.bench.cells import WARM_UP, by_trace, load_states, mean_estimate
from splitwise_llm.bench.clairvoyant import clairvoyant_bound, least_cost
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.kept import Shelf
from splitwise_llm.bench.outcome import ratio
from splitwise_llm.bench.variants import chooser_of, digest_of
from splitwise_llm.cost import Entry, Table
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import SpecError
from splitwise_llm.learn.causal import Causal
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.observation import Chooser, Menu, Tools
from splitwise_llm.policies.choosers import Fixed, find_chooser
from splitwise_llm.policies.menus import menu
from splitwise_llm.policies.objective import DriftPlusPenalty, Latency, Objective
from splitwise_llm.policies.planners import PLANNERS, typical
from splitwise_llm.records import Estimate
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Records, simulate
from splitwise_llm.sim.params import CloudProcess, LinkProcess, Params
from splitwise_llm.sim.scenarios import (
    ALWAYS_BUSY,
    BURSTY_CLOUD,
    CALM_CLOUD,
    FLOOR,
    HEALTHY,
    MEC,
    TUNNEL,
    WAN,
    Case,
    Scenario,
    build,
    worlds,
)

Tell = Callable[[str], None]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOOLS = Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 32))
"""Assumed: the research lists no drafting in these rows, and its times are those without."""
BOUND = "clairvoyant"
MOST_PLANS = 24
ENERGY_WEIGHTS = (0.0, 0.02)
"""Seconds that a joule of the device counts as."""
ONLY_FIRST = LinkProcess(HEALTHY.classes[:1])


@dataclass(frozen=True, slots=True)
class Row:
    """One small case, and what the research found without a weight on energy: mean seconds of the best static plan,
    the router, drift plus penalty, the best causal policy and the clairvoyant."""

    name: str
    device: str
    model: str
    link: LinkProcess
    cloud: CloudProcess
    per_s: float
    is_private: bool = False
    published: tuple[float, float, float, float, float] = (0.0,) * 5

    @property
    def scenario(self) -> Scenario:
        floor = FLOOR if self.is_private else None
        case = Case((self.device,), self.model, self.per_s)
        return Scenario(self.name, "", "", (case,), self.link, self.cloud, floor, slots=1)


ORIN, S23, PI5 = "orin-nx-16gb", "galaxy-s23", "raspberry-pi-5"
GPT2, L7, L13 = "gpt2-xl", "llama-7b", "llama-13b"
ROWS: tuple[Row, ...] = (
    Row("stable-orin-7b", ORIN, L7, HEALTHY, ALWAYS_BUSY, 0.2, False, (2.03, 2.03, 2.03, 2.03, 2.03)),
    Row("outages-bursts-orin-7b", ORIN, L7, WAN, BURSTY_CLOUD, 0.05, False, (4.24, 4.14, 3.57, 3.48, 3.48)),
    Row("outages-bursts-x2-orin-7b", ORIN, L7, WAN, BURSTY_CLOUD, 0.1, False, (5.68, 6.14, 4.84, 4.71, 4.71)),
    Row("tunnel-orin-7b", ORIN, L7, TUNNEL, CALM_CLOUD, 0.1, False, (10.55, 8.67, 3.63, 3.55, 3.55)),
    Row("bursts-orin-gpt2", ORIN, GPT2, ONLY_FIRST, BURSTY_CLOUD, 0.33, False, (3.93, 2.62, 2.58, 2.58, 2.58)),
    Row("outages-pi5-7b", PI5, L7, WAN, BURSTY_CLOUD, 0.01, False, (3.70, 8.57, 3.86, 3.70, 3.70)),
    Row("outages-s23-7b", S23, L7, WAN, BURSTY_CLOUD, 0.05, False, (4.11, 4.53, 4.06, 3.89, 3.87)),
    Row("private-wan-orin-7b", ORIN, L7, WAN, BURSTY_CLOUD, 0.08, True, (11.65, 11.59, 10.80, 10.80, 10.79)),
    Row("private-wan-s23-7b", S23, L7, WAN, BURSTY_CLOUD, 0.03, True, (18.61, 16.70, 15.15, 14.95, 14.87)),
    Row("private-mec-pi5-gpt2", PI5, GPT2, MEC, CALM_CLOUD, 0.04, True, (4.94, 5.20, 4.92, 4.91, 4.90)),
    Row("private-mec-orin-13b", ORIN, L13, MEC, CALM_CLOUD, 0.04, True, (9.65, 9.93, 9.46, 9.46, 9.43)),
)
"""Devices, models and what was found are the research's. Links and clouds are those of the scenarios that its names
point to; requests per second are ours, near what its queueing times imply."""


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """Drift plus penalty over all plans of a table at every epoch, with joules of the device in its penalty: the
    planner `drift` knows no weight on energy."""

    penalty: Penalty
    weights: Floats
    in_flight: bool = True

    def choose(self, menu: Menu) -> Ints:
        """Per system the number of a plan, -1 to go on as it is."""
        later, fresh = menu.remaining_tokens[:, None], (menu.current < 0)[:, None]
        waiting = menu.past.waiting[:, None] if menu.past else 0.0
        objective = DriftPlusPenalty(
            self.penalty, self.weights, menu.queues[:, None], menu.virtual[:, None], waiting=waiting
        )
        entry = Entry(menu.entry_s, menu.entry_device_s, menu.entry_cloud_s)
        values = np.where(
            fresh,
            objective.value(menu.table.at(menu.conditions, later)),
            objective.value(menu.table.at(menu.conditions, later, entry)),
        )
        best = np.where(menu.admissible, values, np.inf).argmin(axis=1)
        return np.where(best == menu.current, -1, best)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated per row."""

    traces: int = 40
    requests: int = 100
    seed: int = 3_000

    def __post_init__(self) -> None:
        if self.traces < 2 or self.requests < 10:
            raise SpecError(f"{self.traces} traces of {self.requests} requests; limits need 2 of 10 or more")


@dataclass(frozen=True, slots=True)
class Result:
    """A row as it came out: mean costs (seconds and weighted joules) of policies and of the bound, and how far drift
    plus penalty is from the best."""

    row: Row
    w_energy: float
    means: dict[str, Estimate]
    over: dict[str, Estimate] = field(default_factory=dict)
    costs: dict[str, Floats] = field(default_factory=dict)
    """Of each trace."""

    @classmethod
    def of(cls, row: Row, w_energy: float, costs: dict[str, Floats]) -> Result:
        learned = [name for name in costs if name not in ("drift", "drift_alone", "router", "causal", "static", BOUND)]
        pairs = [
            (above, below)
            for above in ("drift", "drift_alone", "causal", *learned)
            for below in ("causal", BOUND, *(["drift"] if above in learned else []))
            if above != below
        ]
        over = {f"{above}_over_{below}": ratio(costs[above], costs[below]) for above, below in pairs}
        return cls(row, w_energy, {name: mean_estimate(cost) for name, cost in costs.items()}, over, costs)

    @property
    def name(self) -> str:
        return self.row.name + ("+energy" if self.w_energy else "")


@dataclass(frozen=True, slots=True, eq=False)
class _Setting:
    """A row made ready: its system, its traces, and what drift plus penalty is given."""

    params: Params
    traces: Traces
    table: Table
    penalty: Penalty
    weights: Floats


def _setting(row: Row, w_energy: float, size: Size) -> _Setting:
    scenario = row.scenario
    case = scenario.cases[0]
    ((world, job),) = worlds(scenario, case)
    penalty, weights = typical(world, job, TOOLS, scenario.limits, row.per_s)
    penalty = replace(penalty, w_energy=w_energy * penalty.e_ref_j / penalty.t_ref_s)
    objectives: list[Objective] = [
        Latency(),
        DriftPlusPenalty(penalty, weights),
        DriftPlusPenalty(penalty, np.zeros(4)),
    ]
    states = load_states(world, scenario, case)
    few = [planner for planner in PLANNERS if planner.name in ("edge-only", "cloud-only", "router")]
    table = menu(world, job, (TOOLS,), scenario.limits, states, objectives, planners=few)
    if len(table) > MOST_PLANS:
        raise SpecError(f"{row.name} has {len(table)} plans; value iteration takes {MOST_PLANS}: give it fewer states")
    horizon_s = 1.5 * size.requests / row.per_s
    params = build(scenario, case, [table], horizon_s=horizon_s)
    return _Setting(params, draw(params, size.seed, range(size.traces), size.requests), table, penalty, weights)


def causal_row(
    row: Row, w_energy: float = 0.0, size: Size | None = None, learned: Sequence[str] = (),
    weights: Mapping[str, Path] | None = None,
) -> Result:  # fmt: skip
    """Every policy of a row on the same traces. `drift` is told how often requests come, `drift_alone` is not: it
    gives no weight to the work that it leaves to later requests. `learned`: names of `bench/variants.py`, told what
    `drift` is told; `weights` are files of theirs. Raises ModelError where weights are missing."""
    setting = _setting(row, w_energy, size or Size())
    params, traces, limits = setting.params, setting.traces, row.scenario.limits
    alone = replace(setting.penalty, in_turn=None)
    choosers: dict[str, Chooser] = {
        "drift": Drift(setting.penalty, setting.weights),
        "drift_alone": Drift(alone, setting.weights * np.array([0.0, 0.0, 0.0, 1.0])),
        "router": find_chooser("router", TOOLS, limits),
    }
    choosers |= {name: chooser_of(name, TOOLS, limits, row.per_s, weights or {}, w_energy=w_energy) for name in learned}
    choosers["causal"] = Causal(params, w_energy)
    costs = {name: _cost(simulate(params, traces, chooser), w_energy) for name, chooser in choosers.items()}
    fixed = [_cost(simulate(params, traces, Fixed.number(n)), w_energy) for n in range(len(setting.table))]
    costs["static"] = min(fixed, key=lambda cost: float(cost.mean()))
    bound = least_cost(params, traces, clairvoyant_bound(params, traces, in_turn=True), w_energy)
    skip = int(WARM_UP * bound.shape[2])
    costs[BOUND] = bound[:, :, skip:].mean(axis=(1, 2))
    return Result.of(row, w_energy, costs)


def _cost(records: Records, w_energy: float) -> Floats:
    """Mean cost of each trace."""
    return by_trace(records, records.total_s + w_energy * records.device_j)


def causal_rows(
    tell: Tell, rows: Sequence[Row] = ROWS, weights: Sequence[float] = ENERGY_WEIGHTS, size: Size | None = None, *,
    learned: Sequence[str] = (), files: Mapping[str, Path] | None = None, shelf: Shelf | None = None,
) -> list[Result]:  # fmt: skip
    """All rows, each with every weight on energy. What is on the shelf is not run again."""
    shelf, files = shelf or Shelf(None, ""), files or {}
    made_with = "".join([repr(size or Size()), *learned, *(digest_of(name, files) for name in learned)])
    results = []
    for w_energy in weights:
        for row in rows:
            name = f"yardsticks/{row.name}{'+energy' if w_energy else ''}"
            kept = shelf.or_made(name, partial(_costs, row, w_energy, size, learned, files), made_with)
            results.append(Result.of(row, w_energy, {one: np.array(values) for one, values in kept.items()}))
            tell(line(results[-1]))
    return results


def _costs(
    row: Row, w_energy: float, size: Size | None, learned: Sequence[str], files: Mapping[str, Path]
) -> dict[str, list[float]]:
    costs = causal_row(row, w_energy, size, learned, files).costs
    return {name: cost.tolist() for name, cost in costs.items()}


def line(result: Result) -> str:
    """A row in one line, with what the research found beside it."""
    means = ", ".join(f"{name.replace('_', ' ')} {one.value:.2f}" for name, one in result.means.items())
    over = ", ".join(f"{name.replace('_', ' ')} {100 * (one.value - 1):+.1f} %" for name, one in result.over.items())
    names = ("static", "router", "drift", "causal", "clairvoyant")
    found = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, result.row.published, strict=True))
    return f"{result.name}: {means}; {over}" + ("" if result.w_energy else f" (research: {found})")


def find_row(name: str) -> Row:
    """A row by its name. Raises SpecError that lists them."""
    for row in ROWS:
        if row.name == name:
            return row
    raise SpecError(f"unknown row {name!r}; the rows are {', '.join(row.name for row in ROWS)}")


def run_yardsticks(
    tell: Tell, rows: Sequence[Row] = ROWS, weights: Sequence[float] = ENERGY_WEIGHTS, size: Size | None = None,
    learned: Sequence[str] = (),
) -> Figures:  # fmt: skip
    """`<row>/<policy>_s` and `<row>/dpp_over_causal`, `<row>/dpp_over_clairvoyant`, the same of `dpp_alone`, and
    `<row>/causal_over_clairvoyant`; of `learned` policies over these and over `dpp`. Rows with a weight on energy end
    in `+energy`. Then the worst and the median."""
    size = size or Size()
    figures = Figures("yardsticks", {"traces": size.traces, "requests": size.requests, "seed": size.seed})
    results = causal_rows(tell, rows, weights, size, learned=learned)
    for result in results:
        for name, one in (*result.means.items(), *result.over.items()):
            short = name.replace("drift", "dpp") + ("_s" if name in result.means else "")
            key = f"{result.name}/{short}"
            figures.figures[key], figures.intervals[key] = one.value, (one.low, one.high)
            figures.notes[key] = f"{one.low:.4g} to {one.high:.4g}"
    for name in ("drift_over_causal", "drift_over_clairvoyant", "drift_alone_over_causal"):
        values = [result.over[name].value for result in results]
        short = name.replace("drift", "dpp")
        figures.add(f"worst_{short}", max(values))
        figures.add(f"median_{short}", float(np.median(values)))
    return figures
