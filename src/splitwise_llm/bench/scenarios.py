"""The grid of scenarios: every case under every policy on paired traces, cell by cell, and what must come out.

Cells are kept in a folder, case by case as they are done, so a long run can be stopped and gone on with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.bench.cells import (
    HINDSIGHT,
    TOOLS,
    WARM_UP,
    WITH_TOOLS,
    Setting,
    Size,
    by_trace,
    cell,
    decision_ms_p99,
    idle_question,
)
from splitwise_llm.bench.clairvoyant import clairvoyant_bound
from splitwise_llm.bench.crowd import controlled
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.kept import Shelf
from splitwise_llm.bench.outcome import Outcome, ratio
from splitwise_llm.bench.peers_lan import peer_cells
from splitwise_llm.bench.variants import LEARNED, OURS, PAPER, SPREAD, VARIANTS, digest_of, weight_files
from splitwise_llm.errors import ModelError, RequestError, SpecError
from splitwise_llm.learn.causal import Causal
from splitwise_llm.observation import PLAIN, Tools
from splitwise_llm.page import Ablation, MemoryRow, Scaling
from splitwise_llm.page import Setting as PageSetting
from splitwise_llm.policies.choosers import TableChooser
from splitwise_llm.policies.planners import PLANNERS, When
from splitwise_llm.records import Cell, Estimate
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.params import SharedCloud
from splitwise_llm.sim.recordings import judged_by, link_files, read_recordings
from splitwise_llm.sim.scenarios import SCENARIOS, Case, Recordings, Scenario

Tell = Callable[[str], None]
Floats = NDArray[np.float64]

CAUSAL, CLAIRVOYANT = "causal", "clairvoyant"
CONTROLLER = "one controller"
"""Of a crowd on one cloud (`crowd`): a mean per trace, no requests."""
NO_FIGURES = ("cli", "engine", "learn", "model", "page", "report.py", "wire")
"""Rooms whose source no cell depends on, but for `YARDSTICK`."""
YARDSTICK = ("causal.py", "iteration.py")

RIVALS = (
    "cloud-only", "edge-only", "even-split", "memory-proportional", "best-static", "neurosurgeon",
    "edgeshard-latency", "edgeshard-exact", "edgeshard-throughput", "edgeshard-replanned", "layer-splitting", "router",
    "exact", "drift-selfish", "drift", *LEARNED,
)  # fmt: skip
"""Every one is run with and without the shared tools."""
FEW = (
    "cloud-only", "edge-only", "edgeshard-latency", "edgeshard-replanned", "drift", *LEARNED, "cloud-only+tools",
    "edge-only+tools", "best-static+tools", "edgeshard-replanned+tools", "drift+tools",
    *(name + WITH_TOOLS for name in LEARNED),
)  # fmt: skip
"""What is quick, or `few`: those that claims and bars are about."""
CROWD = 10
QUICK_CROWD = 12
"""Requests of each device."""
CROWDED = ("cloud-only", "edge-only", "router", "drift-selfish", "drift", *LEARNED, "cloud-only+tools", "drift+tools")
FEW_CROWDED = ("drift-selfish", "drift", *LEARNED[:2])
ABLATED = tuple(one.name + WITH_TOOLS for one in VARIANTS)
"""What the learned policy's ingredients contribute: each left out; beside drift (nothing learned) and tuned
(constants)."""
QUICKLY_ABLATED = ("flaky-wan", "tunnel", "private-wan")
ABLATION = (
    ("static layer plan", "edgeshard-latency", PLAIN, False),
    ("+ planned anew per request", "drift", PLAIN, False),
    ("+ moves in mid-request", "drift", PLAIN, True),
    ("+ int8 wire", "drift", Tools(TOOLS.wires), True),
    ("+ prefill chunks", "drift", Tools(TOOLS.wires, TOOLS.chunks), True),
    ("+ drafting", "drift", TOOLS, True),
)
"""What a factor over the static layer plan is made of, one thing after the other."""


@dataclass(frozen=True)
class Grid:
    """What to run."""

    quick: bool = False
    scenarios: tuple[str, ...] = ()
    """Empty: all."""
    size: Size = Size(24, 60, 20)  # noqa: RUF009 - frozen
    traces: Path | None = None
    requests: Path | None = None
    seed: int = 0
    keep: Path | None = None
    """A folder for cells; those that are there already are not run again."""
    cut_gaps: bool = False
    """Leave out what recorders paused in, instead of refusing it."""
    weights: Path | None = None
    """A folder of weights and constants, each of which becomes a row, as `splitwise@NAME` (`variants.weight_files`)."""
    few: bool = False
    """Every case, but the policies of what is quick only."""

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that figures depend on: size, seed, recordings, and the source itself. Of the source, rooms
        that neither simulator nor policies may import (`pyproject.toml`) are left out; weights are cells' own, but for
        the paper's policy, whose plans stand in tables that all choose from."""
        papers = [digest_of(row, self.weight_files) for row in self.weight_files if row.startswith(f"{PAPER}@")]
        settings = (self.quick, self.few, self.size, self.seed, self.traces, self.requests, self.cut_gaps, papers)
        digest = hashlib.sha256(repr(settings).encode())
        root = Path(str(resources.files("splitwise_llm")))
        for file in sorted(root.rglob("*.py")):
            counts = file.relative_to(root).parts[0] not in NO_FIGURES or file.name in YARDSTICK
            if counts and file.name not in ("bars.py", "claims.py"):
                digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

    @cached_property
    def weight_files(self) -> dict[str, Path]:
        return weight_files(self.weights)

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.keep, self.fingerprint)

    def policies(self, scenario: Scenario) -> tuple[str, ...]:
        """Every rival with and without tools, ours with other weights, and ours without each ingredient; a crowd of
        devices on one cloud is slow to simulate, so fewer there."""
        seeds = tuple(self.weight_files)
        few = self.quick or self.few
        if scenario.num_devices > CROWD:
            return (*(FEW_CROWDED if few else CROWDED), *seeds)
        both = tuple(name + tools for tools in ("", WITH_TOOLS) for name in (*(() if few else RIVALS), *seeds))
        ablated = ABLATED if not few or scenario.name in QUICKLY_ABLATED else ()
        return (*(FEW if few else ()), *both, *ablated)

    def cases(self, scenario: Scenario) -> tuple[Case, ...]:
        """All, or where it is quick the first (of rush-hour the one near capacity)."""
        if not self.quick:
            return scenario.cases
        if scenario.name == "rush-hour":
            return tuple(case for case in scenario.cases if case.name.endswith("0.15-live"))
        one = scenario.name == "long-prompt" or scenario.num_devices > 1 or scenario.is_recorded
        return scenario.cases[: 1 if one else 2]

    def size_of(self, scenario: Scenario) -> Size:
        """Worlds of many devices are fewer. One has to last: a crowd's queues take minutes to fill, and after 12
        requests each whoever is selfish still looks best (docs/log.md)."""
        if scenario.num_devices == 1:
            return self.size
        least = QUICK_CROWD if self.quick else self.size.requests
        share = max(least, math.ceil(self.size.traces * self.size.requests / scenario.num_devices / 4))
        is_short = self.quick or (self.few and scenario.num_devices > CROWD)
        return Size(2 if is_short else 4, share, max(6, share // 3))


@dataclass(slots=True)
class Results:
    """Everything the report is made from."""

    cells: list[Cell]
    ablations: list[Ablation]
    memory: list[MemoryRow]
    scalings: list[Scaling]
    skipped: list[str]
    outcomes: dict[tuple[str, str], dict[str, Outcome]] = field(default_factory=dict)
    """(scenario, case) -> policy -> what became of each request; bounds (`CAUSAL` and others) among the policies."""


def run_grid(grid: Grid, tell: Tell) -> Results:
    """Run what is not kept yet. Raises SpecError for unknown scenarios and for recordings that cannot be replayed,
    before anything is run."""
    known = {scenario.name: scenario for scenario in SCENARIOS}
    for name in grid.scenarios:
        if name not in known:
            raise SpecError(f"unknown scenario {name!r}; the scenarios are {', '.join(known)}")
    results = Results([], [], [], [], [])
    chosen = [scenario for scenario in SCENARIOS if not grid.scenarios or scenario.name in grid.scenarios]
    replayed = any(scenario.is_recorded for scenario in chosen)
    recordings = recorded(grid.traces, grid.requests, grid.quick, grid.cut_gaps) if replayed else []
    for scenario in chosen:
        if scenario.name == "peer-lan":
            tell(scenario.name)
            made = grid.shelf.or_made(scenario.name, lambda: [one.to_dict() for one in peer_cells()])
            results.cells += [cell_from(one) for one in made]
            continue
        for setting in _settings(grid, scenario, recordings, results):
            _run_case(grid, setting, results, tell)
    results.scalings = scalings(results.cells)
    return results


def _settings(
    grid: Grid, scenario: Scenario, recordings: Sequence[tuple[str, Recordings]], results: Results
) -> Iterator[Setting]:
    for case in grid.cases(scenario):
        size = grid.size_of(scenario)
        if not scenario.is_recorded:
            yield Setting(scenario, case, size, first_trace=grid.seed * 1000, weights=grid.weight_files)
        elif not recordings:
            results.skipped.append(f"{scenario.name}: no recordings were given (--traces DIR --requests FILE)")
            return
        else:
            for name, one in recordings:
                labelled = replace(case, label=name)
                first = grid.seed * 1000
                yield Setting(scenario, labelled, size, one, first_trace=first, weights=grid.weight_files)


def _run_case(grid: Grid, setting: Setting, results: Results, tell: Tell) -> None:
    where = f"{setting.scenario.name}.{setting.name}"
    tell(where)
    try:
        done, outcomes = _cells(grid, setting, tell)
    except RequestError as error:
        results.skipped.append(f"{where}: {error}")
        return
    results.cells += done
    results.outcomes[setting.scenario.name, setting.name] = outcomes
    if setting.scenario.floor and setting.scenario.num_devices == 1:
        results.ablations.append(
            _ablation_from(grid.shelf.or_made(f"{where}/ablation", lambda: _ablation_to(ablation(setting))))
        )
    rows = grid.shelf.or_made(f"{where}/memory", lambda: [asdict(row) for row in memory_rows(setting)])
    results.memory += [row for row in (MemoryRow(**one) for one in rows) if row not in results.memory]


def _ablation_to(made: Ablation) -> dict[str, object]:
    steps = [[name, one.value, one.low, one.high] for name, one in made.steps]
    return {"scenario": made.scenario, "case": made.case, "steps": steps}


def _ablation_from(data: dict[str, Any]) -> Ablation:
    steps = tuple((name, Estimate(*rest)) for name, *rest in data["steps"])
    return Ablation(str(data["scenario"]), str(data["case"]), steps)


def cell_from(data: dict[str, object]) -> Cell:
    """The inverse of `Cell.to_dict`."""
    plain = dict(data)
    figures = plain.pop("metrics")
    queues = plain.pop("queues_s")
    assert isinstance(figures, dict)
    assert isinstance(queues, dict)
    for name in ("latencies_s", "queue_times_s"):
        values = plain[name]
        assert isinstance(values, (list, tuple))
        plain[name] = tuple(values)
    return Cell(
        metrics={name: Estimate(**one) for name, one in figures.items()},
        queues_s={name: tuple(values) for name, values in queues.items()},
        **plain,  # type: ignore[arg-type]
    )


def _cells(grid: Grid, setting: Setting, tell: Tell) -> tuple[list[Cell], dict[str, Outcome]]:
    """Every policy that has a plan here; figures relative to others are paired by trace. Raises RequestError where
    nobody has one."""
    where, shelf = f"{setting.scenario.name}.{setting.name}", grid.shelf
    cells: dict[str, Cell] = {}
    outcomes: dict[str, Outcome] = {}
    policies = {policy: digest_of(policy, grid.weight_files) for policy in grid.policies(setting.scenario)}
    new = [policy for policy, digest in policies.items() if shelf.read(f"{where}/{policy}", digest) is None]
    setting.run_each([policy for policy in new if _applies(setting, policy)])
    for policy, digest in policies.items():
        kept = shelf.or_made(f"{where}/{policy}", partial(_one, setting, policy), digest)
        if "refused" in kept:
            tell(f"  {policy} does not apply: {kept['refused'][:160]}")
            continue
        cells[policy], outcomes[policy] = cell_from(kept["cell"]), Outcome.from_dict(kept["requests"])
    if not cells:
        raise RequestError("no policy has a plan here")
    for name, bound in ((CLAIRVOYANT, _clairvoyant), (CAUSAL, _causal), (CONTROLLER, _controller)):
        kept = shelf.or_made(f"{where}/{name}", partial(_bound, setting, bound))
        if kept["requests"] is not None:
            outcomes[name] = Outcome.from_dict(kept["requests"])
    means = {name: one.mean() for name, one in outcomes.items()}
    best = np.stack([means[name] for name in cells]).argmin(axis=0)
    for number, (name, one) in enumerate(cells.items()):
        extra: dict[str, Estimate] = {}
        static = HINDSIGHT + (WITH_TOOLS if name.endswith(WITH_TOOLS) else "")
        if static in means:
            extra["factor_over_static"] = ratio(means[static], means[name])
        for yardstick in (CLAIRVOYANT, CAUSAL):
            if yardstick in means:
                extra[f"regret_{yardstick}"] = _regret(means[name], means[yardstick])
        cells[name] = replace(one, metrics=one.metrics | extra, wins=int((best == number).sum()))
    return list(cells.values()), outcomes


def _applies(setting: Setting, policy: str) -> bool:
    """Whether a policy has a plan here; `_one` says why not."""
    try:
        if not policy.startswith(HINDSIGHT):
            setting.chooser(policy)
    except (RequestError, ModelError):
        return False
    return True


def _one(setting: Setting, policy: str) -> dict[str, object]:
    """A cell and its requests, or why there is none."""
    extra: dict[str, Estimate] = {}
    try:
        if not policy.startswith(HINDSIGHT):
            value = decision_ms_p99(setting, policy)
            extra["decision_ms_p99"] = Estimate(value, value, value)
    except (RequestError, ModelError) as error:
        return {"refused": str(error)}
    made = cell(setting, policy, extra)
    return {"cell": made.to_dict(), "requests": Outcome.of(setting.run(policy), WARM_UP).to_dict()}


def _bound(setting: Setting, find: Callable[[Setting], Outcome | None]) -> dict[str, object]:
    found = find(setting)
    return {"requests": found.to_dict() if found else None}


def _clairvoyant(setting: Setting) -> Outcome | None:
    """Latencies that nobody can undercut, with all tools; None where they are not known."""
    if setting.params.is_shared:
        return None
    bound = clairvoyant_bound(setting.params, setting.traces)
    return Outcome.of_seconds(bound, setting.run("cloud-only").counted(WARM_UP))


def _causal(setting: Setting) -> Outcome | None:
    """What becomes of requests under the best policy that knows the statistics and not the future, for a request
    alone, with all tools; None where there is none to compute."""
    try:
        chooser = Causal(setting.params)
    except SpecError:
        return None
    return Outcome.of(simulate(setting.params, setting.traces, chooser), WARM_UP)


def _controller(setting: Setting) -> Outcome | None:
    """The mean that one controller of a whole crowd would come to, without tools, if every device were of the fastest
    kind there is; None where no crowd is."""
    params = setting.params
    if not isinstance(params.cloud, SharedCloud) or setting.scenario.num_devices <= CROWD:
        return None
    home_s = []
    for table in setting.tables:
        seconds = table.at(table.world.conditions()[None]).service_s[0]
        at_home = [
            seconds[n]
            for n, one in enumerate(table.bills)
            if PLAIN.allow(one.decision) and one.decision.partition.machines == (0,)
        ]
        home_s += [float(min(at_home))] if at_home else []
    if not home_s:
        return None
    means = controlled(setting.run("drift-selfish"), params.cloud.sessions, min(home_s), WARM_UP)
    if not np.isfinite(means).all():
        return None
    return Outcome.of_seconds(means[:, None, None], np.ones((len(means), 1, 1), np.bool_))


def _regret(mine: Floats, bound: Floats) -> Estimate:
    over = ratio(mine, bound)
    return Estimate(over.value - 1, over.low - 1, over.high - 1)


def ablation(setting: Setting) -> Ablation:
    """Factors over the static layer plan in mean latency, tools and freedoms added one after the other."""
    means = []
    for _, name, tools, moves in ABLATION:
        if name == "drift":
            planner = next(row for row in PLANNERS if row.name == name)
            row = planner if moves else replace(planner, when=When.REQUEST)
            chooser = TableChooser(row, tools, setting.limits, arrivals_per_s=setting.case.per_s)
            records = simulate(setting.params, setting.traces, chooser)
        else:
            records = setting.run(name)
        means.append(by_trace(records, records.total_s))
    steps = tuple((row[0], ratio(means[0], mean)) for row, mean in zip(ABLATION, means, strict=True))
    return Ablation(setting.scenario.name, setting.name, steps)


def memory_rows(setting: Setting) -> list[MemoryRow]:
    """What some policies' plans for the expected conditions hold, on the device and in the cloud."""
    table = setting.tables[0]
    device = table.world.hosts[0].device
    rows = []
    for name in ("edge-only", "cloud-only", "even-split", "edgeshard-latency"):
        try:
            number = int(setting.chooser(name).choose(idle_question(table))[0])
        except RequestError:
            continue
        mine, cloud = table.bills[number].memory_bytes
        fits = mine <= device.memory_bytes
        rows.append(MemoryRow(setting.case.model, device.name, name, mine, cloud, fits, device.memory_bytes))
    return rows


def scalings(cells: Sequence[Cell]) -> list[Scaling]:
    """Speed-up over cloud-only as load grows (rush-hour), as devices change, and as models grow."""
    by_case: dict[tuple[str, str], dict[str, Cell]] = {}
    for one in cells:
        by_case.setdefault((one.scenario, one.case), {})[one.policy] = one
    shown = ("edge-only", "router", "drift-selfish", "drift", "drift" + WITH_TOOLS, OURS, OURS + WITH_TOOLS)
    result = []
    for what, label, scenario, names in (
        ("120 devices on one A100, as they ask more often", "requests per second and device", "rush-hour",
         ("orin-7b-0.08-live", "orin-7b-0.12-live", "orin-7b-0.15-live", "orin-7b-0.2-live")),
        ("devices", "device with 7B", "flaky-wan", ("orin-7b", "s23-7b", "pi5-7b")),
        ("models", "model on Orin NX", "flaky-wan", ("orin-gpt2xl", "orin-7b")),
    ):  # fmt: skip
        there = [name for name in names if (scenario, name) in by_case]
        if len(there) < 2:
            continue
        found = {policy for name in there for policy in by_case[scenario, name]}
        series = {
            policy: tuple(_speed_up(by_case[scenario, name], policy) for name in there)
            for policy in shown
            if policy in found or not policy.startswith(OURS)
        }
        result.append(Scaling(what, label, tuple(there), series, f"scenario {scenario}"))
    return result


def _speed_up(cells: dict[str, Cell], policy: str) -> Estimate:
    """Over cloud-only; the relative limits of both means are added as of independent figures, which paired ones are
    closer than."""
    base, mine = cells.get("cloud-only"), cells.get(policy)
    if not base or not mine:
        return Estimate(math.nan, math.nan, math.nan)
    above, below = base.metrics["mean_s"], mine.metrics["mean_s"]
    value = above.value / below.value
    wide = math.hypot(*((one.high - one.low) / 2 / one.value for one in (above, below)))
    return Estimate(value, value * math.exp(-wide), value * math.exp(wide))


def recorded(
    traces: Path | None, requests: Path | None, quick: bool, cut_gaps: bool = False
) -> list[tuple[str, Recordings]]:
    """The recorded links of a folder that are judged by, by their names, with the thinned requests; none where one of
    the two is not given. Raises SpecError."""
    if traces is None or requests is None:
        return []
    files = judged_by(link_files(traces), quick=quick)
    read = read_recordings(files, requests, cut_gaps=cut_gaps)
    return [(one.name, recordings) for one, recordings in zip(files, read, strict=True)]


def figures_of(cells: Sequence[Cell], settings: dict[str, object]) -> Figures:
    """`<scenario>.<case>/<policy>/<metric>`, each with `_lo` and `_hi`."""
    result = Figures("scenarios", settings)
    for one in cells:
        for metric, estimate in one.metrics.items():
            name = f"{one.scenario}.{one.case}/{one.policy}/{metric}"
            result.add(name, estimate.value)
            result.add(f"{name}_lo", estimate.low)
            result.add(f"{name}_hi", estimate.high)
        for knob, share in one.knobs.items():
            result.add(f"{one.scenario}.{one.case}/{one.policy}/knob {knob}", share)
    _add_spread(result, cells)
    return result


def _add_spread(figures: Figures, cells: Sequence[Cell]) -> None:
    """`<scenario>.<case>/splitwise@seeds/mean_s`: mean over the weights that a learned policy was given, with standard
    deviation, least and most."""
    seeds: dict[str, list[float]] = {}
    for one in cells:
        learner, at, _ = one.policy.partition("@")
        if at:
            tools = WITH_TOOLS if one.policy.endswith(WITH_TOOLS) else ""
            for metric in ("mean_s", "p95_s", "device_j"):
                name = f"{one.scenario}.{one.case}/{learner}@{SPREAD}{tools}/{metric}"
                seeds.setdefault(name, []).append(one.metrics[metric].value)
    for name, values in seeds.items():
        figures.add(name, float(np.mean(values)))
        figures.add(f"{name}_sd", float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
        figures.add(f"{name}_least", min(values))
        figures.add(f"{name}_most", max(values))


def page_settings() -> tuple[PageSetting, ...]:
    """The rows of the table of scenarios, for the report."""
    return tuple(
        PageSetting(number, scenario.name, scenario.says, scenario.expects)
        for number, scenario in enumerate(SCENARIOS, start=1)
    )


__all__ = ["Grid", "Results", "figures_of", "page_settings", "run_grid"]
