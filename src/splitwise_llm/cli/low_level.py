"""The learned low level beside the exact search, on states that nobody learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, report, tell
from splitwise_llm.cli.output import whole


@bench.command("low-level")
def bench_low_level(
    states: Annotated[int, typer.Option(min=2, help="States for each number of machines.")] = 40,
    machines: Annotated[
        list[int] | None,
        typer.Option(min=2, max=5, help="So many of them, device included; repeatable.", show_default="3 and 4"),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="low_level.npz of a training; default: the shipped.")] = None,
    json_file: JsonFile = None,
) -> None:
    """What the learned low level's plans are worth beside those of the exact search, and how long either takes."""
    from splitwise_llm.bench.low_level import run_low_level

    with whole(json_file) as target:
        report(run_low_level(states, tell, machines or (3, 4), weights), target)
