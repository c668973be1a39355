"""The figures of the report as inline SVG. They know cells and colours, not the page that holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from splitwise_llm.page.colours import GRID, INK, MUTED, OTHER, Stroke, bare, mode_colours
from splitwise_llm.page.inputs import MemoryRow, Scaling
from splitwise_llm.page.svg import INCH, canvas, log_axis, place, thin, to_svg
from splitwise_llm.records import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Finish = Callable[["Figure", str, str], Any]
"""What becomes of a drawn figure: `to_svg`, or a test that wants to look at it."""

_WIDTH = 7.4  # inches
_ROW = 0.165  # inches per row of bars
_BAR = 0.7 * _ROW * INCH  # points: bars are thick lines, which matplotlib draws ten times faster than rectangles
_POINTS = 300  # per curve of the whole width


def latency_figure(
    cells: Sequence[Cell], named: Sequence[Cell], strokes: Mapping[str, Stroke], prefix: str, finish: Finish = to_svg
) -> Any:
    """Share of requests that were done within a time, log time; the cells in `named` in colour, the others grey.
    None where no cell kept its latencies."""
    drawn = [cell for cell in cells if cell.latencies_s]
    if not drawn:
        return None
    spread = [value for cell in drawn for value in cell.latencies_s if 0 < value < math.inf]
    if not spread:
        return None
    with canvas(_WIDTH, 2.7) as figure:
        axes = place(figure, 0.42, 0.12, 4.35, 2.1)
        log_axis(axes, min(spread), max(spread))
        picked = {cell.policy for cell in named}
        for cell in sorted(drawn, key=lambda cell: cell.policy in picked):
            count = len(cell.latencies_s)
            places, values = thin(cell.latencies_s, _POINTS if cell.policy in picked else _POINTS // 3)
            ranks = [(n + 0.5) / count for n in places]
            stroke = strokes[cell.policy] if cell.policy in picked else Stroke(OTHER)
            axes.plot(
                values, ranks, color=stroke.colour, linestyle=stroke.dash, lw=1.6 if cell.policy in picked else 0.6
            )
        axes.set_ylim(0, 1.005)
        axes.set_yticks([0, 0.5, 0.95], ["0", "0.5", "0.95"])
        axes.grid(axis="y")
        axes.set_xlabel("total latency, s (simulated)")
        entries = [(strokes[c.policy], f"{c.policy}, {_p95(c)}") for c in sorted(named, key=_p95_value) if c in drawn]
        _legend(figure, 4.95, 0.2, entries, "p95, ascending", len(drawn) - len(entries))
        return finish(figure, prefix, "Share of requests done within a time, per policy")


def bars_figure(cells: Sequence[Cell], strokes: Mapping[str, Stroke], prefix: str, finish: Finish = to_svg) -> Any:
    """Per policy, ascending in mean latency: joules of the device and with the cloud's, operating cost, mode shares.
    None where no cell has any of them."""
    rows = sorted((cell for cell in cells if cell.metrics or cell.modes), key=lambda cell: _value(cell, "mean_s"))
    if not any({"device_j", "total_j", "usd_per_1k"} & set(cell.metrics) or cell.modes for cell in rows):
        return None
    height = _ROW * len(rows)
    names = 0.075 * max(len(cell.policy) for cell in rows) + 0.1
    each = (_WIDTH - names - 0.3) / 3
    with canvas(_WIDTH, height + 0.75) as figure:
        panels = [place(figure, names + number * (each + 0.14), 0.3, each, height) for number in range(3)]
        colours = [strokes[cell.policy].colour for cell in rows]
        energy, cost, share = panels
        energy.set_title("J per request (modelled)")
        _bars(energy, rows, "total_j", colours, alpha=0.35)
        _bars(energy, rows, "device_j", colours)
        cost.set_title("$ per 1,000 (modelled)")
        _bars(cost, rows, "usd_per_1k", colours)
        share.set_title("share of running time")
        _modes(share, rows)
        for axes in panels:
            _rows(axes, [cell.policy for cell in rows], axes is energy)
        return finish(figure, prefix, "Energy, operating cost and mode shares per policy")


def queues_figure(named: Sequence[Cell], strokes: Mapping[str, Stroke], prefix: str, finish: Finish = to_svg) -> Any:
    """Backlog over time in the first trace, one panel per queue. None where no named cell kept its queues."""
    drawn = [cell for cell in named if cell.queues_s and cell.queue_times_s]
    queues = list(dict.fromkeys(queue for cell in drawn for queue in cell.queues_s))
    if not queues:
        return None
    deep = math.ceil(len(queues) / 2)
    with canvas(_WIDTH, 1.35 * deep + 0.25) as figure:
        for number, queue in enumerate(queues):
            across = 4.35 if len(queues) == 1 else 2.0
            axes = place(figure, 0.42 + (number % 2) * 2.4, 0.25 + 1.35 * (number // 2), across, 0.9)
            axes.set_title(f"{queue} queue, s of work")
            for cell in drawn:
                places, values = thin(cell.queues_s.get(queue, ()), _POINTS // 3)
                stroke = strokes[cell.policy]
                times = [cell.queue_times_s[n] for n in places]
                axes.plot(times, values, color=stroke.colour, linestyle=stroke.dash, lw=1.0)
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", nbins=3)
            axes.locator_params(axis="x", nbins=5)
            axes.grid(axis="y")
            if number >= len(queues) - 2:
                axes.set_xlabel("s", labelpad=0)
        _legend(figure, 4.95, 0.35, [(strokes[cell.policy], cell.policy) for cell in drawn], "first trace", 0)
        return finish(figure, prefix, "Backlog of each queue over time, per policy")


def cost_figure(
    cases: Mapping[str, Sequence[Cell]], strokes: Mapping[str, Stroke], prefix: str, finish: Finish = to_svg
) -> Any:
    """Operating cost of 1,000 requests in every case (the keys), a dot per policy. None without any figure."""
    rows = {case: [c for c in cells if _value(c, "usd_per_1k") < math.inf] for case, cells in cases.items()}
    rows = {case: cells for case, cells in rows.items() if cells}
    values = [_value(cell, "usd_per_1k") for cells in rows.values() for cell in cells]
    if not any(value > 0 for value in values):
        return None
    height, names = _ROW * len(rows), 0.068 * max(map(len, rows)) + 0.15
    policies = list(dict.fromkeys(c.policy for cells in rows.values() for c in cells))
    names_of = {bare(p): Stroke(strokes[p].colour) for p in policies if strokes[p].colour != OTHER}
    entries = [(stroke, name) for name, stroke in names_of.items()]
    others = len({bare(p) for p in policies} - set(names_of))
    wide = _WIDTH + 1.0
    with canvas(wide, max(height, _ROW * len(entries)) + 0.75) as figure:
        axes = place(figure, names, 0.15, wide - names - 2.1, height)
        log_axis(axes, 0.8 * min(value for value in values if value > 0), 1.25 * max(values))
        for policy in sorted(policies, key=lambda policy: strokes[policy].colour != OTHER):
            spots = [
                (_value(cell, "usd_per_1k"), row)
                for row, cells in enumerate(rows.values())
                for cell in cells
                if cell.policy == policy and _value(cell, "usd_per_1k") > 0
            ]
            stroke = strokes[policy]
            hollow = stroke.dash == "--"
            axes.plot(
                [x for x, _ in spots],
                [y for _, y in spots],
                linestyle="none",
                marker="o",
                markersize=3 if stroke.colour == OTHER else 4.5,
                markerfacecolor="none" if hollow else stroke.colour,
                markeredgecolor=stroke.colour,
                markeredgewidth=1.0,
            )
        _rows(axes, list(rows), True)
        axes.hlines(range(len(rows)), 0, 1, GRID, transform=axes.get_yaxis_transform(), lw=0.6, zorder=0)
        axes.set_xlabel("$ per 1,000 requests (modelled)")
        _legend(figure, wide - 1.9, 0.2, entries, "hollow: without the tools", others, dots=True)
        return finish(figure, prefix, "Operating cost of 1,000 requests per policy and case")


def memory_figure(rows: Sequence[MemoryRow], prefix: str, finish: Finish = to_svg) -> Any:
    """What the plans of one model (at least one row) hold: device on the left, cloud on the right, in GB (10^9)."""
    labels = [f"{row.device}, {row.plan}" for row in rows]
    height, names = _ROW * len(rows), 0.068 * max(map(len, labels)) + 0.15
    each = (_WIDTH - names - 0.35) / 2
    with canvas(_WIDTH, height + 0.75) as figure:
        device = place(figure, names, 0.3, each, height)
        cloud = place(figure, names + each + 0.2, 0.3, each, height)
        spots = range(len(rows))
        reach = max(max(row.device_bytes, row.capacity_bytes) for row in rows) / 1e9
        for axes, title, sizes in (
            (device, "GB on the device; line: what it has", [row.device_bytes / 1e9 for row in rows]),
            (cloud, "GB in the cloud", [row.cloud_bytes / 1e9 for row in rows]),
        ):
            colours = [strokes_fit(row.fits) for row in rows]
            axes.hlines(spots, 0, sizes, colours, lw=_BAR)
            axes.set_title(title)
            _rows(axes, labels, axes is device)
            axes.locator_params(axis="x", nbins=5)
        known = [(n, row.capacity_bytes / 1e9) for n, row in enumerate(rows) if row.capacity_bytes]
        if known:
            device.vlines([x for _, x in known], [n - 0.45 for n, _ in known], [n + 0.45 for n, _ in known], INK, lw=1)
        for spot, row in enumerate(rows):
            if not row.fits:
                device.text(
                    max(row.device_bytes, row.capacity_bytes) / 1e9 + 0.015 * reach,
                    spot,
                    "does not fit",
                    va="center",
                    fontsize=7,
                )
        device.set_xlim(0, 1.25 * reach or 1)
        cloud.set_xlim(0, 1.05 * max(row.cloud_bytes for row in rows) / 1e9 or 1)
        return finish(figure, prefix, f"Memory on device and cloud for {rows[0].model}")


def strokes_fit(fits: bool) -> str:
    """The colour of a plan that fits, and of one that does not."""
    return "#56b4e9" if fits else OTHER


def scaling_figure(scaling: Scaling, strokes: Mapping[str, Stroke], prefix: str, finish: Finish = to_svg) -> Any:
    """Speed-up over cloud-only against what grows; bands are the 95 % limits, the line at 1 is cloud-only. Words on
    the x axis are set at even steps and not joined by lines."""
    words = any(isinstance(x, str) for x in scaling.xs)
    xs = [float(n) for n in range(len(scaling.xs))] if words else [float(x) for x in scaling.xs]
    with canvas(_WIDTH, 2.6) as figure:
        axes = place(figure, 0.45, 0.3, 4.3, 1.75)
        axes.axhline(1.0, color=MUTED, lw=0.8)
        ends: list[tuple[float, float, Stroke, str]] = []
        for number, (policy, points) in enumerate(scaling.series.items()):
            stroke = strokes.get(policy, Stroke(OTHER))
            shift = (number - (len(scaling.series) - 1) / 2) * 0.6 / len(scaling.series) if words else 0.0
            known = [(x + shift, p) for x, p in zip(xs, points, strict=True) if math.isfinite(p.value)]
            if not known:
                continue
            at, values = [x for x, _ in known], [p.value for _, p in known]
            low, high = [p.low for _, p in known], [p.high for _, p in known]
            if words:
                axes.vlines(at, low, high, color=stroke.colour, lw=1.2)
            else:
                axes.fill_between(at, low, high, color=stroke.colour, alpha=0.18, linewidth=0)
            axes.plot(
                at, values, color=stroke.colour, linestyle="none" if words else stroke.dash, marker="o", markersize=3.5
            )
            ends.append((-values[-1], values[-1], stroke, policy))
        spread = [p for points in scaling.series.values() for e in points for p in (e.low, e.high) if 0 < p < math.inf]
        log_axis(axes, 0.9 * min([*spread, 1.0]), 1.1 * max([*spread, 1.0]), "y")
        if words:
            axes.set_xticks(xs, [str(x) for x in scaling.xs])
            if sum(len(str(x)) for x in scaling.xs) > 60:
                axes.tick_params(axis="x", labelsize=6)
        axes.grid(axis="y")
        axes.set_xlabel(scaling.x_label)
        axes.set_title("speed-up over cloud-only, ×")
        entries = [
            (stroke, f"{policy} ({value:.3g}×)") for _, value, stroke, policy in sorted(ends, key=lambda e: e[0])
        ]
        _legend(figure, 4.95, 0.2, entries, "at the right end, in brackets", 0, dots=words)
        return finish(figure, prefix, f"Speed-up over cloud-only: {scaling.what}")


def _rows(axes: Axes, names: Sequence[str], named: bool) -> None:
    """Rows from top to bottom with their names at the left; as text, since ticks cost a hundred times more."""
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks([])
    for row, name in enumerate(names if named else ()):
        spot = axes.get_yaxis_transform()
        axes.text(-0.02, row, name, transform=spot, ha="right", va="center")


def _bars(axes: Axes, rows: Sequence[Cell], metric: str, colours: Sequence[str], alpha: float = 1.0) -> None:
    able = [(n, cell.metrics[metric]) for n, cell in enumerate(rows) if _value(cell, metric) < math.inf]
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x")
    if not able:
        axes.text(0.5, 0.5, "no figures", ha="center", transform=axes.transAxes, color=MUTED)
        axes.set_xticks([])
        return
    spots = [n for n, _ in able]
    axes.hlines(spots, 0, [e.value for _, e in able], [colours[n] for n in spots], lw=_BAR, alpha=alpha, clip_on=False)
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.06 * max(e.value for _, e in able)))
    limited = [(n, e) for n, e in able if math.isfinite(e.low) and math.isfinite(e.high) and e.low < e.high]
    if limited:
        axes.hlines(
            [n for n, _ in limited],
            [e.low for _, e in limited],
            [e.high for _, e in limited],
            INK,
            lw=0.8,
            clip_on=False,
        )


def _modes(axes: Axes, rows: Sequence[Cell]) -> None:
    """Stacked shares, named inside the bar where there is room."""
    modes = list(dict.fromkeys(mode for cell in rows for mode in cell.modes))
    left = [0.0] * len(rows)
    for mode, colour in mode_colours(modes).items():
        sizes = [cell.modes.get(mode, 0.0) for cell in rows]
        able = [n for n, size in enumerate(sizes) if size > 0]
        axes.hlines(
            able, [left[n] for n in able], [left[n] + sizes[n] for n in able], colour, lw=1.15 * _BAR, clip_on=False
        )
        for n in able:
            if sizes[n] > max(0.12, 0.045 * len(mode)):
                axes.text(left[n] + sizes[n] / 2, n, mode, ha="center", va="center", fontsize=6.5)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.set_xlim(0, max([1.0, *left]))
    axes.set_xticks([])
    spot, below = 0.0, axes.get_xaxis_transform()
    for mode, colour in mode_colours(modes).items():
        deep = -0.17 / (_ROW * max(1, len(rows)))
        axes.plot(spot + 0.02, deep, marker="s", color=colour, transform=below, clip_on=False, markersize=5)
        axes.text(spot + 0.05, deep, mode, transform=below, va="center", fontsize=6.5)
        spot += 0.1 + 0.028 * len(mode)


def _legend(
    figure: Figure,
    left: float,
    top: float,
    entries: Iterable[tuple[Stroke, str]],
    note: str,
    others: int,
    dots: bool = False,
) -> None:
    """Names beside the axes, in the order of the curves: swatch in colour, text in ink, which is readable on both."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    width, height = figure.get_size_inches()
    rows = [*entries, *([(Stroke(OTHER), f"{others} more")] if others else [])]
    figure.text(left / width, 1 - top / height, note, fontsize=7, color=MUTED, va="center")
    for number, (stroke, name) in enumerate(rows, 1):
        y = 1 - (top + 0.16 * number) / height
        if dots:
            face = "none" if stroke.dash == "--" else stroke.colour
            spot = [(left + 0.1) / width], [y]
            line = Line2D(*spot, linestyle="none", marker="o", markersize=4, mfc=face, mec=stroke.colour)
        else:
            line = Line2D([left / width, (left + 0.22) / width], [y, y], color=stroke.colour, linestyle=stroke.dash)
        figure.add_artist(line)
        figure.text((left + 0.3) / width, y, name, fontsize=7.5, va="center")


def _value(cell: Cell, metric: str) -> float:
    """Infinite where it is missing or no number, so that it sorts last."""
    value = cell.metrics[metric].value if metric in cell.metrics else math.inf
    return value if math.isfinite(value) else math.inf


def _p95_value(cell: Cell) -> float:
    return _value(cell, "p95_s")


def _p95(cell: Cell) -> str:
    return f"{_p95_value(cell):.3g} s" if _p95_value(cell) < math.inf else "–"
