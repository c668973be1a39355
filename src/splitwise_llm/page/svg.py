"""A matplotlib figure as a small piece of SVG that may stand many times in one page. It knows no policies."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from splitwise_llm.page.colours import COLOURS, GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCH = 72.0  # points; a figure's view box is in points

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, searchable, and in the page's own font
    "text.parse_math": False,  # a dollar is a dollar
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.3,
}

_TAG = re.compile(r"<[^>]*>")
_LONG = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")
_CURVE = re.compile(r" d=\"[^\"]*[CQ]")
_IDS = re.compile(r"(?<![\w-])id=\"([^\"]+)\"")
_USES = re.compile(r"(href=\"#|url\(#)([^\")]+)")


@contextmanager
def canvas(width_in: float, height_in: float) -> Iterator[Figure]:
    """A figure outside pyplot's register, so that nothing has to be closed; drawn on and saved inside the context."""
    from matplotlib import rc_context  # noqa: PLC0415 - half a second, and only a page needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with rc_context(_RC):
        yield Figure(figsize=(width_in, height_in))


def to_svg(figure: Figure, prefix: str, title: str) -> str:
    """`<svg ...>` with ids that begin with `prefix`, colours as variables of the style sheet (`COLOURS`), numbers to a
    tenth of a point. The same figure gives the same text."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    text = text[text.index("<svg") :]  # the date goes with the metadata, random ids are numbered as they occur
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r"<svg[^>]*?viewBox=\"([^\"]+)\"[^>]*>", r'<svg viewBox="\1">', text, count=1)
    used = {
        name: f"{prefix}{number}" for number, name in enumerate(dict.fromkeys(name for _, name in _USES.findall(text)))
    }
    text = _TAG.sub(lambda tag: _shorter(tag.group(), used), text)
    text = re.sub(r">\s+<", "><", text)
    while "<g></g>" in text:
        text = text.replace("<g></g>", "")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    width = figure.get_size_inches()[0] * INCH
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" style="--w:{width:.0f}" ', 1).strip()


def _shorter(tag: str, used: dict[str, str]) -> str:
    """One tag without what the page does not need."""
    tag = tag.replace("xlink:href", "href")
    tag = _USES.sub(lambda use: use.group(1) + used[use.group(2)], tag)
    tag = _IDS.sub(lambda own: f'id="{used[own.group(1)]}"' if own.group(1) in used else "", tag)
    tag = _LONG.sub(lambda number: f"{float(number.group()):.1f}".replace("-0.0", "0").removesuffix(".0"), tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?| ?transform=\"rotate\(-0 [^\"]*\"", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}", lambda c: f"var(--x{c.group()[1:]})" if c.group() in COLOURS else c.group(), tag)
    tag = tag.replace("; fill: var(--x1b1d20)", "") if tag.startswith("<text") else tag
    if tag.startswith("<path") and not _CURVE.search(tag):
        tag = re.sub(r"\s*([Mz])\s*", r"\1", re.sub(r"\s*L\s*", " ", tag))  # after M, a pair alone is a line
    tag = tag.replace("; stroke-linejoin: miter", "").replace("; stroke-dashoffset: 0", "")
    return re.sub(r"\s+", " ", tag).replace(" >", ">").replace(" />", "/>").replace("; ", ";").replace(": ", ":")


def place(figure: Figure, left_in: float, top_in: float, width_in: float, height_in: float) -> Axes:
    """Axes by inches from the upper left corner: no layout engine, which would draw everything twice."""
    width, height = figure.get_size_inches()
    bottom = height - top_in - height_in
    return figure.add_axes((left_in / width, bottom / height, width_in / width, height_in / height))


def log_axis(axes: Axes, low: float, high: float, axis: str = "x") -> None:
    """A logarithmic axis from low to high (both above 0) with plain numbers, at most about seven of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator  # noqa: PLC0415

    low, high = (low, high) if high > 1.2 * low else (low / 1.2, high * 1.2)
    steps = (1, 2, 5) if math.log10(high / low) < 2.4 else (1, 3) if math.log10(high / low) < 4 else (1,)
    ticks = [
        float(f"{step}e{power}")
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for step in steps
    ]
    if high < 4 * low:
        ticks = [float(tick) for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)]
    (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
    (axes.set_xlim if axis == "x" else axes.set_ylim)(low, high)
    ruler = axes.xaxis if axis == "x" else axes.yaxis
    ruler.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ruler.set_minor_locator(NullLocator())
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def thin(values: Sequence[float], most: int = 300) -> tuple[list[int], list[float]]:
    """At most `most` of the values at even steps, the first and the last among them, with their places."""
    count = len(values)
    if count <= most:
        return list(range(count)), list(values)
    places = [round(n * (count - 1) / (most - 1)) for n in range(most)]
    return places, [values[place] for place in places]
