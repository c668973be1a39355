"""The fault matrix and the figures of recovery."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, out, report, run, tell, write_json

if TYPE_CHECKING:
    from splitwise_llm.bench.survival import Survey


@bench.command("survival")
def bench_survival(
    quick: Annotated[bool, typer.Option(help="Fewer repetitions of every figure.")] = False,
    full: Annotated[bool, typer.Option(help="The whole matrix, not a fourth in which every two things meet.")] = False,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for finished cells; what is there is not run again.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Every fault, in every way of running, at every moment, on real processes; and what recovery takes and costs."""
    tell("loading torch")
    from splitwise_llm.bench.survival import Plan, run_survival

    plan = Plan.of(full, keep)
    _show(run(lambda: run_survival(plan, quick, tell), json_file), json_file)


def _show(survey: Survey, json_file: Path | None) -> None:
    from rich.table import Table

    from splitwise_llm.bench.matrix import Mode
    from splitwise_llm.bench.survival import failures, verdicts

    table = Table("fault", *Mode, title="the worst of the moments, by fault and way of running")
    for fault, row in verdicts(survey.outcomes):
        table.add_row(fault, *(row.get(mode, "") for mode in Mode))
    out.print(table)
    for cell, outcome in survey.outcomes.items():
        if outcome.inapplicable:
            out.print(f"n/a {cell.name}: {outcome.inapplicable}", style="dim", markup=False)
    failed = failures(survey.outcomes)
    for cell, outcome in failed:
        why = outcome.error or outcome.told or ("other text" if outcome.fired else "the fault did not strike")
        out.print(f"{cell.name}: {outcome.verdict}: {why}", style="red", markup=False)
        for at_s, kind, text in outcome.events:
            out.print(f"    {at_s:7.3f} s {kind}: {text}", style="dim", markup=False)
        for one in outcome.runs:
            out.print(f"    run {one}", style="dim", markup=False)
    report(survey.figures, None)
    data = survey.figures.to_dict()
    data["cells"] = {cell.name: outcome.to_dict() for cell, outcome in survey.outcomes.items()}
    write_json(json_file, data)
    if failed:
        sys.exit(1)


@bench.command("soak")
def bench_soak(
    seconds: Annotated[float, typer.Option(min=10, help="So long.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, partitions and faults.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Sessions under random faults: is every text right, and does nothing pile up?"""
    tell("loading torch")
    from splitwise_llm.bench.soak import run_soak

    report(run(lambda: run_soak(seconds, seed, tell), json_file), json_file)
