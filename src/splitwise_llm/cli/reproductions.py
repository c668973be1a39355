"""Published results beside ours, and the measurement one of them needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from splitwise_llm.cli.options import JsonFile, bench, out, report, tell, write_json


@bench.command()
def reproductions(
    plain_steps: Annotated[int, typer.Option(min=100, help="Training steps in the plain environment.")] = 20_000,
    surrogate_steps: Annotated[int, typer.Option(min=400, help="The same in the surrogate's.")] = 60_000,
    page: Annotated[Path | None, typer.Option(help="Write the comparison there as Markdown, too.")] = None,
    json_file: JsonFile = None,
) -> None:
    """EdgeShard, DynoPipe, layer splitting and Raspberry Pi boards: ours beside what was published."""
    from splitwise_llm.bench.reproductions import run_reproductions, to_markdown

    for path in (page, json_file):
        if path:
            path.open("a").close()  # tried before, not after minutes
    result = run_reproductions(tell, plain_steps, surrogate_steps)
    report(result.figures, None)
    for fact in result.facts:
        out.print(f"{fact.verdict}: {fact.what}; published {fact.published}, ours {fact.ours}", markup=False)
    for listing in result.listings:
        table = Table(title=listing.title, caption=listing.remark)
        for column in listing.lines[0]:
            table.add_column(column)
        for line in listing.lines[1:]:
            table.add_row(*line)
        out.print(table)
    write_json(json_file, result.to_dict())
    if page:
        page.write_text(to_markdown(result), encoding="utf-8")


@bench.command("layer-splitting")
def layer_splitting(
    table: Annotated[Path, typer.Option("--out", help="Where to write the table (JSON).")],
    seeds: Annotated[int, typer.Option(min=1, help="Draws of lost elements per passage.")] = 4,
) -> None:
    """Measure what element loss after each layer costs the bundled model, in nats per token; ten minutes."""
    from splitwise_llm.bench.layer_splitting import measure, write

    table.open("a").close()
    write(measure(tell, seeds=seeds), table)
