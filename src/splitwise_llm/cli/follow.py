"""A policy that moves the partition over a recorded mobile uplink, beside partitions that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, bench, report, run, tell, write_json
from splitwise_llm.errors import RequestError
from splitwise_llm.units import parse_seconds


@bench.command()
def follow(
    up: Annotated[str, typer.Option(help="Recorded uplink, as ATT-LTE-driving.up.gz.")],
    down: Annotated[str, typer.Option(help="Recorded downlink.")],
    rtt: Annotated[str, typer.Option(help="Round trip of the link, without queueing.")] = "50ms",
    model: Annotated[
        str, typer.Option(help="As elsewhere, or random-24x256: as deep as small models are.")
    ] = "random-24x256",
    slower: Annotated[float, typer.Option(min=1, help="The device computes so many times as slow.")] = 24.0,
    floor: Annotated[str, typer.Option(help="First and last layers that stay on the device; '' for none.")] = "1+1",
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of prompts, drawn evenly.")] = "16-128",
    new_tokens: Annotated[str, typer.Option(help="Lengths of answers, drawn evenly.")] = "16-40",
    requests: Annotated[int, typer.Option(min=2, help="Spread evenly over the recording.")] = 50,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 1,
    figure: Annotated[Path | None, typer.Option(help="Draw it, too: an SVG or PNG file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Drift plus penalty against fixed partitions over a recorded uplink with outages, request by request."""
    from splitwise_llm.bench.follow import run_follow
    from splitwise_llm.bench.follow_course import Setting
    from splitwise_llm.bench.follow_figure import draw_follow

    lengths = (_span(prompt_tokens, "--prompt-tokens"), _span(new_tokens, "--new-tokens"))
    setting = Setting(up, down, parse_seconds(rtt), model, slower, floor, requests, *lengths, seed)
    followed = run(lambda: run_follow(setting, tell), json_file)
    report(followed.figures, None)
    data = followed.to_dict()
    write_json(json_file, data)
    if figure:
        draw_follow(data, figure)


def _span(text: str, option: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not dash or not low.isdecimal() or not high.isdecimal() or not 0 < int(low) <= int(high):
        raise RequestError(f"{option} {text!r}: write the least and the most, as in 16-64")
    return int(low), int(high)
