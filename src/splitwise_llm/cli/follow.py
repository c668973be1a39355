"""A policy that moves the partition over a recorded mobile uplink, beside partitions that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, Model, bench, report, run, tell, write_json
from splitwise_llm.units import parse_seconds


@bench.command()
def follow(
    up: Annotated[str, typer.Option(help="Recorded uplink, as ATT-LTE-driving.up.gz.")],
    down: Annotated[str, typer.Option(help="Recorded downlink.")],
    rtt: Annotated[str, typer.Option(help="Round trip of the link, without queueing.")] = "50ms",
    model: Model = "bundled",
    slower: Annotated[float, typer.Option(min=1, help="The device computes so many times as slow.")] = 48.0,
    floor: Annotated[str, typer.Option(help="First and last layers that stay on the device; '' for none.")] = "1+1",
    requests: Annotated[int, typer.Option(min=2, help="Spread evenly over the recording.")] = 50,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 1,
    figure: Annotated[Path | None, typer.Option(help="Draw it, too: an SVG or PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Drift plus penalty against fixed partitions over a recorded uplink with outages, request by request."""
    from splitwise_llm.bench.follow import Setting, run_follow
    from splitwise_llm.bench.follow_figure import draw_follow

    setting = Setting(up, down, parse_seconds(rtt), model, slower, floor, requests, seed=seed)
    followed = run(lambda: run_follow(setting, tell), json_file)
    report(followed.figures, None)
    data = followed.to_dict()
    write_json(json_file, data)
    if figure:
        draw_follow(data, figure)
