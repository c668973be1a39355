"""The report as one HTML text that fetches nothing. It computes no figure that the cells do not hold, only ratios."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from splitwise_llm.page import figures
from splitwise_llm.page.colours import COLOURS, Stroke, featured, strokes
from splitwise_llm.page.inputs import Ablation, Claim, Contents, Setting
from splitwise_llm.page.metrics import Metric, columns, decimals, show, show_limits
from splitwise_llm.page.standing import Standing, best, judge, overlap, ratios
from splitwise_llm.records import Cell

JUDGED = ("mean_s", "p95_s", "device_j", "total_j")
"""The metrics of the summary."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One figure in a table, as it is shown."""

    text: str
    limits: str = ""
    mark: str = ""
    """`best`, `near` (limits overlap the best one's), or nothing."""
    sort: float = math.inf


@dataclass(frozen=True, slots=True)
class Row:
    """A policy's row."""

    cell: Cell
    yardstick: bool
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A case's table and pictures."""

    name: str
    anchor: str
    columns: tuple[Metric, ...]
    rows: tuple[Row, ...]
    pictures: tuple[tuple[str, Markup], ...]
    """Caption and SVG."""


@dataclass(frozen=True, slots=True)
class Section:
    """A scenario."""

    name: str
    setting: Setting | None
    claims: tuple[Claim, ...]
    cases: tuple[Case, ...]


def to_html(contents: Contents) -> str:
    """The page: about 0.3 s for each case of 20 policies; the same contents give the same text."""
    table = strokes(contents)
    number = itertools.count()
    sections = tuple(_section(contents, name, table, number) for name in contents.scenarios)
    cases = [cells for name in contents.scenarios for cells in contents.cases(name).values()]
    judged = [[judge(contents, cells, metric) for metric in JUDGED] for cells in cases]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show
    environment.filters["percent"] = _percent
    source = files("splitwise_llm.page")
    return environment.from_string(source.joinpath("scenarios.html.j2").read_text("utf-8")).render(
        contents=contents,
        style=Markup(_colour_variables() + source.joinpath("scenarios.css").read_text("utf-8")),
        sections=sections,
        judged=judged,
        counts={metric: _counts(row[n] for row in judged) for n, metric in enumerate(JUDGED)},
        winners={
            metric: Counter(row[n].best for row in judged if row[n].best).most_common()
            for n, metric in enumerate(JUDGED)
        },
        heads={metric.name: metric for metric in columns(set(JUDGED))},
        policies=[policy for policy in table if policy not in contents.yardsticks] + [*contents.yardsticks],
        matrix=[(cells[0], ratios(contents, cells)) for cells in cases],
        yardsticks=_yardsticks(contents, cases),
        ablations=_ablations(contents.ablations),
        cost=_picture(
            figures.cost_figure({f"{c[0].scenario}: {c[0].case}": c for c in cases}, table, f"f{next(number)}-")
        ),
        memory=[
            (
                model,
                _picture(figures.memory_figure([r for r in contents.memory if r.model == model], f"f{next(number)}-")),
            )
            for model in dict.fromkeys(row.model for row in contents.memory)
        ],
        scalings=[
            (scaling, _picture(figures.scaling_figure(scaling, table, f"f{next(number)}-")))
            for scaling in contents.scalings
        ],
    )


def _section(contents: Contents, name: str, table: dict[str, Stroke], number: itertools.count[int]) -> Section:
    return Section(
        name,
        next((setting for setting in contents.settings if setting.name == name), None),
        tuple(claim for claim in contents.claims if claim.scenario == name),
        tuple(_case(contents, case, cells, table, number) for case, cells in contents.cases(name).items()),
    )


def _case(
    contents: Contents, name: str, cells: list[Cell], table: dict[str, Stroke], number: itertools.count[int]
) -> Case:
    shown = columns({metric for cell in cells for metric in cell.metrics})
    winners = {
        metric.name: best([cell for cell in cells if cell.policy not in contents.yardsticks], metric.name, metric.sign)
        for metric in shown
        if metric.sign
    }
    named = featured(contents, cells, table)
    drawn = (
        ("Latency distribution", figures.latency_figure(cells, named, table, f"f{next(number)}-")),
        (
            "Energy (modelled; solid: the device, pale: with the cloud), operating cost, modes",
            figures.bars_figure(cells, table, f"f{next(number)}-"),
        ),
        ("Queues over time", figures.queues_figure(named, table, f"f{next(number)}-")),
    )
    rows = [
        Row(
            cell,
            cell.policy in contents.yardsticks,
            tuple(
                _entry(cell, metric, winners.get(metric.name), cell.policy in contents.yardsticks) for metric in shown
            ),
        )
        for cell in cells
    ]
    return Case(
        name,
        f"{cells[0].scenario}.{name}",
        shown,
        tuple(sorted(rows, key=lambda row: (row.yardstick, _mean(row.cell)))),
        tuple((caption, Markup(svg)) for caption, svg in drawn if svg is not None),
    )


def _entry(cell: Cell, metric: Metric, winner: Cell | None, yardstick: bool) -> Entry:
    if metric.name not in cell.metrics:
        return Entry("–")
    estimate = cell.metrics[metric.name]
    mark = ""
    if winner and not yardstick:
        best_estimate = winner.metrics[metric.name]
        mark = "best" if estimate.value == best_estimate.value else "near" if overlap(estimate, best_estimate) else ""
    value = metric.scale * estimate.value
    return Entry(show(value), show_limits(estimate, metric.scale), mark, value)


def _yardsticks(contents: Contents, cases: Sequence[Sequence[Cell]]) -> list[tuple[Cell, list[tuple[str, str, str]]]]:
    """Per case with a regret: (policy, causal, clairvoyant) for ours, and for the rival that is best in the mean."""
    found = []
    for cells in cases:
        rival = judge(contents, cells, "mean_s").rival
        rows: list[tuple[str, str, str]] = []
        for policy in dict.fromkeys((contents.ours[0], rival)):
            cell = next((cell for cell in cells if cell.policy == policy), None)
            if cell and {"regret_causal", "regret_clairvoyant"} & set(cell.metrics):
                rows.append((policy, _regret(cell, "regret_causal"), _regret(cell, "regret_clairvoyant")))
        if rows:
            found.append((cells[0], rows))
    return found


def _regret(cell: Cell, name: str) -> str:
    if name not in cell.metrics:
        return "–"
    limits = show_limits(cell.metrics[name], 100.0)
    return f"{show(100 * cell.metrics[name].value)} %" + (f" ({limits})" if limits else "")


def _ablations(ablations: Sequence[Ablation]) -> list[tuple[tuple[str, ...], list[tuple[Ablation, list[Entry]]]]]:
    """One table for each sequence of step names: cumulative factor, limits, and beside it what the step itself did."""
    tables: dict[tuple[str, ...], list[tuple[Ablation, list[Entry]]]] = {}
    for ablation in ablations:
        entries, before = [], math.nan
        for _, factor in ablation.steps:
            own = factor.value / before if before and math.isfinite(before) else math.nan
            step = "" if math.isnan(own) else f"this step ×{own:.2f}"
            mark = "best" if own >= 1.1 else ""
            entries.append(Entry(f"×{factor.value:.2f}" if math.isfinite(factor.value) else "–", step, mark, before))
            before = factor.value
        tables.setdefault(tuple(name for name, _ in ablation.steps), []).append((ablation, entries))
    return list(tables.items())


def _counts(standings: Iterable[Standing]) -> dict[str, int]:
    verdicts = Counter(standing.verdict for standing in standings)
    return {verdict: verdicts[verdict] for verdict in ("wins", "level", "loses", "absent")}


def _picture(svg: str | None) -> Markup | None:
    return None if svg is None else Markup(svg)


def _percent(fraction: float) -> str:
    """`+1.2 %`, `−42 %`, `–`."""
    if math.isnan(fraction):
        return "–"
    return f"{'+' if fraction > 0 else ''}{show(100 * fraction, min(1, decimals(100 * fraction)))} %"


def _mean(cell: Cell) -> float:
    value = cell.metrics["mean_s"].value if "mean_s" in cell.metrics else math.inf
    return math.inf if math.isnan(value) else value


def _colour_variables() -> str:
    """`:root{--x0072b2:#0072b2;...}`, and the other set for dark screens; paper is white."""
    light = "".join(f"--x{colour[1:]}:{colour};" for colour in COLOURS)
    dark = "".join(f"--x{colour[1:]}:{other};" for colour, other in COLOURS.items())
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
