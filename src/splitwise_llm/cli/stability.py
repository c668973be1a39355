"""What is claimed of drift plus penalty, measured in the simulator."""

from __future__ import annotations

from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, report, tell


@bench.command("stability")
def bench_stability(
    quick: Annotated[bool, typer.Option(help="Fewer and shorter traces: wide limits, two minutes.")] = False,
    policy: Annotated[str, typer.Option(help="Whose; of any but drift no sweep of V.")] = "drift",
    json_file: JsonFile = None,
) -> None:
    """Penalty and backlog against V, backlog at shares of the fluid bound, budgets kept or found infeasible."""
    from splitwise_llm.bench.stability import run_stability

    if json_file:
        json_file.open("a").close()  # tried before, not after minutes
    report(run_stability(quick, tell, policy), json_file)
