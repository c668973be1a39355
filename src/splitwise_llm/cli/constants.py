"""Constants for the policy's knobs by a plain optimiser: what learning has to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import bench, out, tell


@bench.command("constants")
def bench_constants(
    to: Annotated[Path, typer.Option(help="Write the constants there (JSON).")],
    decisions: Annotated[
        int, typer.Option(min=1, help="Budget in simulated decisions; the learner's own.")
    ] = 2_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Other draws.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="File of what was judged so far: goes on there.")] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems per generation.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests per device and trace.")] = 20,
    check_traces: Annotated[int, typer.Option(min=0, help="Traces per problem that check the outcome; 0: none.")] = 4,
) -> None:
    """One vector of constants for all scenarios, tuned by CMA-ES on training traces."""
    from splitwise_llm.bench.tuning_problems import problems as all_problems
    from splitwise_llm.cli.output import whole
    from splitwise_llm.learn.tuning import Settings, accepted, checked, told, tune, write_constants
    from splitwise_llm.sim.scenarios import SCENARIOS, find_scenario

    chosen = [find_scenario(name) for name in scenario] if scenario else SCENARIOS
    settings = Settings(seed, decisions, problems, requests=requests)
    with whole(to) as part:
        assert part is not None
        these = list(all_problems(chosen))
        found = tune(these, settings, tell, keep)
        looked_at = these if check_traces else []
        ratios = checked(looked_at, found.constants, check_traces, settings.requests, tell)
        outcome = accepted(found, ratios)
        if outcome != found:
            out.print(f"no better than neutral on the checking traces, which are kept: {told(found.constants)}")
        write_constants(part, settings, outcome, found, dict(zip((one.name for one in looked_at), ratios, strict=True)))
    out.print(f"{told(outcome.constants)}; {outcome.generations} generations, {outcome.decisions} decisions")
