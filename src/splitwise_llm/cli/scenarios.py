"""The grid of scenarios as tables, figures and one page."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, out, tell, write_json
from splitwise_llm.cli.output import whole
from splitwise_llm.errors import RequestError

if TYPE_CHECKING:
    from splitwise_llm.bench.scenarios import Grid


@bench.command("scenarios")
def bench_scenarios(
    quick: Annotated[bool, typer.Option(help="A case or two of each scenario, fewer policies and traces.")] = False,
    few: Annotated[bool, typer.Option("--few", help="Every case, only the policies that bars are about.")] = False,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    traces: Annotated[Path | None, typer.Option(help="Folder of recorded links, for real-traces.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Recorded requests, for real-traces.")] = None,
    cut_gaps: Annotated[bool, typer.Option("--cut-gaps", help="Leave out what recorders paused in.")] = False,
    worlds: Annotated[int, typer.Option(help="Traces per cell; 0: as many as the mode has.", min=0)] = 0,
    requests_per_trace: Annotated[int, typer.Option(help="0: as many as the mode has.", min=0)] = 0,
    seed: Annotated[int, typer.Option(min=0, max=1_000_000, help="Other traces.")] = 0,
    keep: Annotated[
        Path | None, typer.Option(help="Folder for finished cells; what is there is not run again.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of weights (*.npz) and constants (*.json): a row each, as splitwise@NAME."),
    ] = None,
    bars: Annotated[
        Path | None, typer.Option(help="Write what splitwise must reach, row by row, there (Markdown).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the cells there.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Every scenario under every policy on paired traces: latency, energy, money, queues, and what must come out."""
    from splitwise_llm.bench.cells import Size
    from splitwise_llm.bench.scenarios import Grid

    if cut_gaps and not (traces and requests):
        raise RequestError("--cut-gaps is of recordings: give --traces DIR and --requests FILE, too")
    usual = Size(8, 50, 10) if quick else Size(32, 70, 20)
    size = Size(worlds or usual.traces, requests_per_trace or usual.requests, usual.fixed_requests)
    grid = Grid(quick, tuple(scenario or ()), size, traces, requests, seed, keep, cut_gaps, weights, few)
    with whole(html) as page, whole(csv) as table, whole(json_file) as figures, whole(bars) as judged:
        _run(grid, page, table, figures, judged)


def _run(grid: Grid, page: Path | None, table: Path | None, figures_file: Path | None, bars: Path | None) -> None:
    from splitwise_llm.bench.bars import bars_of, losses_of, markdown
    from splitwise_llm.bench.claims import claims_of, judged
    from splitwise_llm.bench.evidence import gather
    from splitwise_llm.bench.scenarios import figures_of, page_settings, run_grid
    from splitwise_llm.bench.variants import is_ours
    from splitwise_llm.page import Contents, Provenance, to_csv, to_html
    from splitwise_llm.report import claims_table

    begin = time.monotonic()
    results = run_grid(grid, tell)
    evidence = gather(grid, results, tell) if bars else None
    took = time.monotonic() - begin
    claims = claims_of(results.cells)
    out.print(claims_table([(claim.scenario, claim.text, claim.holds, claim.measured) for claim in claims]))
    for skipped in results.skipped:
        out.print(f"not run: {skipped}", style="yellow", markup=False)
    settings: dict[str, object] = {
        "quick": grid.quick, "traces": grid.size.traces, "requests_per_trace": grid.size.requests, "seed": grid.seed,
        "cut_gaps": grid.cut_gaps, "few": grid.few, "run_s": took,
    }  # fmt: skip
    figures = figures_of(results.cells, settings)
    decided = [claim for claim in claims if claim.holds is not None]
    figures.add("claims_decided", len(decided))
    figures.add("claims_held", sum(bool(claim.holds) for claim in decided))
    if bars and evidence:
        reached = bars_of(evidence)
        bars.write_text(markdown(reached, losses_of(evidence)))
        figures.add("bars_decided", sum(bar.met is not None for bar in reached))
        figures.add("bars_met", sum(bool(bar.met) for bar in reached))
    write_json(figures_file, figures.to_dict())
    if table:
        table.write_text(to_csv(results.cells))
    if page:
        first = judged({one.policy for one in results.cells})
        variants = sorted({one.policy for one in results.cells if is_ours(one.policy)} - {first, first + "+tools"})
        ours = (first, first + "+tools", *variants)
        contents = Contents(
            tuple(results.cells),
            page_settings(),
            tuple(claims),
            Provenance(
                command=shlex.join(["splitwise", *sys.argv[1:]]),
                seed=grid.seed,
                traces=tuple(path.name for path in (grid.traces, grid.requests) if path) or ("generated",),
                version=version("splitwise-llm"),
                date=datetime.now(UTC).date().isoformat(),
                machine=platform.machine(),
                cpus=os.cpu_count() or 1,
                run_s=took,
                remarks=(
                    "drafting at an assumed acceptance of 0.6",
                    "joules and prices are modelled",
                    *(["pauses of recorders are cut out of the recorded links"] if grid.cut_gaps else []),
                    *results.skipped,
                ),
            ),
            ours=ours,
            ablations=tuple(results.ablations),
            memory=tuple(results.memory),
            scalings=tuple(results.scalings),
        )
        page.write_text(to_html(contents))
    held = sum(bool(claim.holds) for claim in decided)
    out.print(f"{len(results.cells)} cells in {took:.0f} s; {held} of {len(decided)} claims hold")
