"""The figure of decisions over round-trip time and load: the policy beside the plain solver. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitwise_llm.page.colours import mode_colours

INCHES = (8.0, 3.4)
KNOBS = ("#000000", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#d55e00", "#009e73")
FALLBACK = "x"


@dataclass(frozen=True, slots=True)
class Point:
    """One question and its answers."""

    rtt_s: float
    batch: int
    """Sequences on the worker."""
    mode: str
    plain_mode: str
    turned: tuple[str, ...]
    """Knobs that are not neutral, as `cloud x0.5`."""
    fell_back: bool


def draw_map(points: Sequence[Point], title: str, file: Path, kind: str = "png") -> None:
    """A panel each for the policy and the plain solver; in the policy's, knobs as dots, fallbacks as crosses. `kind` is
    the file's format."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and only a figure needs it
    from matplotlib.lines import Line2D  # noqa: PLC0415

    trips = sorted({point.rtt_s for point in points})
    batches = sorted({point.batch for point in points})
    modes = [mode for mode in ("edge", "cloud", "split") if any(mode in (p.mode, p.plain_mode) for p in points)]
    colours = mode_colours(modes)
    knobs = sorted({name for point in points for name in point.turned})
    dots = {name: KNOBS[number % len(KNOBS)] for number, name in enumerate(knobs)}
    figure = Figure(figsize=INCHES, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("splitwise", "the plain solver"), strict=True):
        for point in points:
            at = (trips.index(point.rtt_s), batches.index(point.batch))
            mode = point.mode if name == "splitwise" else point.plain_mode
            axes.bar(at[0], 1.0, 1.0, at[1] - 0.5, color=colours[mode], linewidth=0)
            if name == "splitwise" and point.fell_back:
                axes.plot(*at, FALLBACK, color="black", markersize=4)
            for number, knob in enumerate(point.turned if name == "splitwise" and not point.fell_back else ()):
                axes.plot(at[0] - 0.3 + 0.2 * number, at[1], "o", color=dots[knob], markersize=3)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(trips)), [f"{1e3 * trip:.3g}" for trip in trips], fontsize=6, rotation=60)
        axes.set_yticks(range(len(batches)), [str(batch) for batch in batches], fontsize=6)
        axes.set_xlabel("round-trip time, ms", fontsize=8)
        axes.set_xlim(-0.5, len(trips) - 0.5)
        axes.set_ylim(-0.5, len(batches) - 0.5)
    panels[0].set_ylabel("sequences on the worker", fontsize=8)
    legend = [Line2D([], [], marker="s", color=colours[mode], linestyle="", label=mode) for mode in modes]
    legend += [Line2D([], [], marker="o", color=dots[name], linestyle="", label=name, markersize=4) for name in knobs]
    if any(point.fell_back for point in points):
        legend.append(Line2D([], [], marker=FALLBACK, color="black", linestyle="", label="fell back", markersize=4))
    figure.legend(handles=legend, loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120, format=kind)


__all__ = ["Point", "draw_map"]
