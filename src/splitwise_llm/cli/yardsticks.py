"""Small cases in which drift plus penalty stands beside the best causal policy and a bound that knows the future."""

from __future__ import annotations

from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, report, tell


@bench.command()
def yardsticks(
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only this row; may be repeated.")] = None,
    traces: Annotated[int, typer.Option(min=2, help="Traces per row; limits are over traces.")] = 40,
    requests: Annotated[int, typer.Option(min=10, help="Requests per trace, the first tenth dropped.")] = 100,
    policy: Annotated[list[str] | None, typer.Option(help="Beside drift, this one too: splitwise, tuned.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Eleven small cases, with and without a weight on energy: regret to the best causal and clairvoyant policies."""
    from splitwise_llm.bench.yardsticks import ROWS, Size, find_row, run_yardsticks

    if json_file:
        json_file.open("a").close()  # tried before, not after minutes
    chosen = tuple(find_row(name) for name in rows) if rows else ROWS
    figures = run_yardsticks(tell, chosen, size=Size(traces, requests), learned=tuple(policy or ()))
    report(figures, json_file)
