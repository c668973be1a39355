"""`bench survival`: the fault matrix, what recovery takes, and what it costs when nothing fails. It breaks nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path

from splitwise_llm.bench.breaking import Bench, Setup
from splitwise_llm.bench.edge_killed import play_edge_killed
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.fleet import run_fleet
from splitwise_llm.bench.journal_cost import journal_cost
from splitwise_llm.bench.matrix import (
    Cell,
    Mode,
    Moment,
    Outcome,
    all_cells,
    crowded_cells,
    drafted_cells,
    pairwise,
)
from splitwise_llm.bench.recovery_times import recovery_times
from splitwise_llm.bench.telemetry import run_telemetry
from splitwise_llm.wire.faults import Fault

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run."""

    cells: tuple[Cell, ...]
    setup: Setup = field(default_factory=Setup)
    keep: Path | None = None
    """A folder for finished cells; what is there is not run again."""

    @classmethod
    def of(cls, full: bool, keep: Path | None) -> Plan:
        """The whole matrix, with drafting in the middle of the answer, and some faults of crowds and pipelines; or a
        fourth of it in which every two of fault, way, moment and drafting meet."""
        return cls((*all_cells(), *drafted_cells(), *crowded_cells()) if full else pairwise(all_cells()), keep=keep)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that a cell depends on: the setup, and the source itself."""
        digest = hashlib.sha256(repr(self.setup).encode())
        for file in sorted(Path(str(resources.files("splitwise_llm"))).rglob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


async def run_matrix(plan: Plan, tell: Tell) -> dict[Cell, Outcome]:
    """Play every cell that is not kept yet."""
    outcomes: dict[Cell, Outcome] = {}
    quiet = logging.getLogger("splitwise_llm.wire.proxy")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # that nobody answers behind the link is what was asked for
    try:
        with tempfile.TemporaryDirectory() as place, Bench(plan.setup, Path(place)) as bench:
            for number, cell in enumerate(plan.cells):
                outcome = _kept(plan, cell)
                if outcome is None:
                    play = play_edge_killed(bench, cell, number) if cell.fault is Fault.EDGE_KILLED else None
                    outcome = await (play or bench.play(cell, number))
                    _keep(plan, cell, outcome)
                    remark = outcome.error or outcome.told
                    said = f": {remark}" if remark else ""
                    tell(f"{number + 1}/{len(plan.cells)} {cell.name} {outcome.verdict} {outcome.took_s:.1f} s{said}")
                outcomes[cell] = outcome
    finally:
        quiet.setLevel(level)
    return outcomes


def _file(plan: Plan, cell: Cell) -> Path | None:
    return plan.keep / f"{cell.name.replace('/', '.')}.json" if plan.keep else None


def _kept(plan: Plan, cell: Cell) -> Outcome | None:
    """What a file keeps, if it was made with the same setup and the same source."""
    file = _file(plan, cell)
    if file is None or not file.exists():
        return None
    with suppress(ValueError, KeyError, TypeError):  # cut short, or of another kind
        data = json.loads(file.read_text())
        if data["made_with"] == plan.fingerprint:
            return Outcome.from_dict(data["kept"])
    return None


def _keep(plan: Plan, cell: Cell, outcome: Outcome) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    file = _file(plan, cell)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"made_with": plan.fingerprint, "kept": outcome.to_dict()}))
    part.replace(file)


def add_matrix(result: Figures, outcomes: dict[Cell, Outcome]) -> None:
    """`identical_share` and `extra_tokens_recomputed`, and how many cells they are of."""
    counted = [outcome for outcome in outcomes.values() if not outcome.inapplicable]
    well = [outcome for outcome in counted if outcome.is_well]
    same = [outcome for outcome in counted if outcome.identical and outcome.fired]
    result.add("identical_share", len(same) / max(len(counted), 1), f"of {len(counted)} generations whose fault struck")
    result.add("cells_well_share", len(well) / max(len(counted), 1), "and the record says what happened")
    result.add("cells_inapplicable", len(outcomes) - len(counted))
    lost = {cell: outcome for cell, outcome in outcomes.items() if cell.fault is Fault.WORKER_RESTARTED}
    if lost:
        worst = max(lost, key=lambda cell: lost[cell].extra_tokens)
        result.add("extra_tokens_recomputed", lost[worst].extra_tokens, f"the worst of {len(lost)}: {worst.name}")
        for mode in Mode:
            most = max((one.extra_tokens for cell, one in lost.items() if cell.mode is mode), default=0)
            result.add(f"extra_tokens_recomputed_{mode}", most)


def verdicts(outcomes: dict[Cell, Outcome]) -> list[tuple[str, dict[str, str]]]:
    """Rows for a table: per fault and way of running the worst moment's verdict, and which moment where it is not
    well."""
    rows: dict[str, dict[str, str]] = {}
    for cell, outcome in outcomes.items():
        row = rows.setdefault(cell.row, {})
        said = outcome.verdict if outcome.is_well else f"{outcome.verdict} ({cell.moment})"
        if cell.mode not in row or _badness(said) > _badness(row[cell.mode]):
            row[cell.mode] = said
    return list(rows.items())


def _badness(said: str) -> int:
    return {"n/a": 0, "same": 1}.get(said, 2)


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that was found."""

    outcomes: dict[Cell, Outcome]
    figures: Figures


async def run_survival(plan: Plan, quick: bool, tell: Tell) -> Survey:
    """The matrix and every figure. `quick`: fewer repetitions of all."""
    settings: dict[str, object] = {"cells": len(plan.cells), "quick": quick, "link": plan.setup.link}
    result = Figures("survival", settings | {"emulate": plan.setup.emulate, "moments": len(Moment)})
    outcomes = await run_matrix(plan, tell)
    add_matrix(result, outcomes)
    await recovery_times(result, 3 if quick else 9, tell)
    await journal_cost(result, 5 if quick else 15, tell)
    for other in (await run_telemetry(8 if quick else 32, tell), run_fleet(quick, tell)):
        _add(result, other)
    return Survey(outcomes, result)


def _add(result: Figures, other: Figures) -> None:
    result.figures |= other.figures
    result.intervals |= other.intervals
    result.notes |= other.notes
    result.settings[other.bench] = other.settings


def failures(outcomes: dict[Cell, Outcome]) -> Sequence[tuple[Cell, Outcome]]:
    """Those that are not well, in order."""
    return [(cell, outcome) for cell, outcome in outcomes.items() if not outcome.is_well]
