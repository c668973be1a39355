"""Which colour and line a policy has, the same in every figure of a page. It draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from splitwise_llm.page.inputs import TOOLS, Contents
from splitwise_llm.page.standing import best
from splitwise_llm.records import Cell

INK, MUTED, GRID, OTHER = "#1b1d20", "#666d75", "#dfe2e6", "#b4b9bf"
_POLICIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, told apart with any colour vision, less its yellow, which is lost on white."""
_MODES = {
    "edge": "#b5dfc8",
    "cloud": "#b4d3f0",
    "u": "#f5d5a6",
    "cut": "#e9c3dc",
    "shared": "#d6d0f0",
    "waiting": "#e4e4e4",
}
_MORE_MODES = ("#f3c1b4", "#cfe3a8", "#c9d4dc")

COLOURS = {
    INK: "#e8eaed",
    MUTED: "#a3abb3",
    GRID: "#3a3f45",
    OTHER: "#6a7178",
    "#0072b2": "#4aa8e0",
    "#d55e00": "#ff8a3d",
    "#009e73": "#2cc79c",
    "#cc79a7": "#e39ac2",
    "#e69f00": "#f2b632",
    "#56b4e9": "#86cdf5",
    "#b5dfc8": "#2b6a4b",
    "#b4d3f0": "#2a5580",
    "#f5d5a6": "#7a5a1f",
    "#e9c3dc": "#754060",
    "#d6d0f0": "#4d4587",
    "#e4e4e4": "#4a4f55",
    "#f3c1b4": "#7d4030",
    "#cfe3a8": "#52692a",
    "#c9d4dc": "#46545e",
}
"""On white -> on black. Figures carry the first; the page lets the style sheet choose."""


@dataclass(frozen=True, slots=True)
class Stroke:
    """How a policy is drawn."""

    colour: str
    dash: Literal["-", "--", ":"] = "-"


def mode_colours(modes: Sequence[str]) -> dict[str, str]:
    """Mode -> colour; the known ones keep theirs whatever else there is."""
    strange = [mode for mode in modes if mode not in _MODES]
    return {mode: _MODES.get(mode) or _MORE_MODES[strange.index(mode) % len(_MORE_MODES)] for mode in modes}


def strokes(contents: Contents) -> dict[str, Stroke]:
    """Every policy of the page. Colours go to the judged one, to cloud-only and edge-only, then to those that are
    best in most cases, with one colour for a policy with the tools (solid) and without (dashed); the rest is grey,
    yardsticks are dotted in the ink of the text."""
    policies = list(dict.fromkeys(cell.policy for cell in contents.cells))
    wins: Counter[str] = Counter()
    for scenario in contents.scenarios:
        for cells in contents.cases(scenario).values():
            first = best([cell for cell in cells if cell.policy not in contents.yardsticks], "mean_s")
            if first:
                wins[bare(first.policy)] += 1
    rest = sorted({bare(p) for p in policies if p not in contents.yardsticks}, key=lambda name: (-wins[name], name))
    present = [name for name in (bare(contents.ours[0]), "cloud-only", "edge-only") if name in rest]
    coloured = dict(zip(dict.fromkeys([*present, *rest]), _POLICIES, strict=False))
    return {
        policy: Stroke(INK, ":")
        if policy in contents.yardsticks
        else Stroke(coloured.get(bare(policy), OTHER), "-" if policy.endswith(TOOLS) else "--")
        for policy in policies
    }


def bare(policy: str) -> str:
    """Its name without the tools."""
    return policy.removesuffix(TOOLS)


def featured(contents: Contents, cells: Sequence[Cell], table: dict[str, Stroke], most: int = 6) -> list[Cell]:
    """The cells of a case that a figure names: ours, the best rival, the better of each coloured policy with and
    without the tools, up to `most`; then the yardsticks. Ascending in mean latency."""
    able = sorted(
        (cell for cell in cells if "mean_s" in cell.metrics and cell.metrics["mean_s"].value < float("inf")),
        key=lambda cell: cell.metrics["mean_s"].value,
    )
    field = [cell for cell in able if cell.policy not in contents.yardsticks]
    ours = [cell for cell in field if cell.policy == contents.ours[0]]
    rival = [cell for cell in field if cell.policy not in contents.ours][:1]
    families: dict[str, Cell] = {}
    for cell in field:
        if table[cell.policy].colour != OTHER and cell.policy not in contents.ours:
            families.setdefault(bare(cell.policy), cell)
    plain = [families[name] for name in ("cloud-only", "edge-only") if name in families]
    named: list[Cell] = []
    for cell in [*ours, *rival, *plain, *families.values()]:
        if cell not in named and len(named) < most:
            named.append(cell)
    chosen = {cell.policy for cell in named} | set(contents.yardsticks)
    return [cell for cell in able if cell.policy in chosen]
