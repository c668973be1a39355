"""`splitwise bench live`: sessions that run, beside the simulator."""

from __future__ import annotations

from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, out, report, tell, write_json
from splitwise_llm.cli.output import whole

QUICK_CELLS = 2


@bench.command("live")
def bench_live(
    policy: Annotated[str, typer.Option(help="Who decides, live and simulated.")] = "splitwise",
    quick: Annotated[bool, typer.Option("--quick", help="A minute instead of ten, and few cells.")] = False,
    cells: Annotated[bool, typer.Option(help="A request on each device and model, too.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Three devices and a worker as processes, over a link with outages, beside the simulator on the same requests."""
    from splitwise_llm.bench.live import CELLS, Setting, run_cells, run_live
    from splitwise_llm.bench.live_client import decides

    decides(policy)  # says now, not after minutes, that it has no weights
    with whole(json_file) as part:
        compared = run_live(Setting.quick() if quick else Setting(), policy, tell)
        if cells:
            compared.add_cells(run_cells(policy, tell, cells=CELLS[:: len(CELLS) // QUICK_CELLS] if quick else CELLS))
        report(compared.figures, None)
        for line in compared.modes_text():
            out.print(line, markup=False)
        write_json(part, compared.to_dict())


__all__ = ["bench_live"]
