"""Cells as comma-separated rows, one figure each. It rounds nothing and judges nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from splitwise_llm.records import Cell

HEAD = ("scenario", "case", "policy", "metric", "value", "low", "high", "requests", "traces", "note")


def to_csv(cells: Iterable[Cell]) -> str:
    """RFC 4180 text with a head. Besides the figures: `wins` (traces), `mode_<name>` (shares of time) and `knob <name>`
    (shares of decisions), which have no limits. A cell without any figure keeps one row with an empty metric, so that
    its note is not lost."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    for cell in cells:
        for metric, *figures in _figures(cell):
            writer.writerow(
                (cell.scenario, cell.case, cell.policy, metric, *figures, cell.requests, cell.traces, cell.note)
            )
    return text.getvalue()


def _figures(cell: Cell) -> Iterator[tuple[str, float | str, float | str, float | str]]:
    if not cell.metrics:
        yield "", "", "", ""
        return
    for metric, estimate in cell.metrics.items():
        yield metric, estimate.value, estimate.low, estimate.high
    yield "wins", cell.wins, "", ""
    for mode, share in cell.modes.items():
        yield f"mode_{mode}", share, "", ""
    for knob, share in cell.knobs.items():
        yield f"knob {knob}", share, "", ""
