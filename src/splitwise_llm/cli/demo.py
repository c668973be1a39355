"""The demo: one text over five partitions, or one text while everything around it breaks."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import (
    DEMO_PROMPT,
    JsonFile,
    Model,
    Threads,
    Wire,
    app,
    out,
    run,
    tell,
    valid_text,
    write_json,
)
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.units import parse_seconds

if TYPE_CHECKING:
    from splitwise_llm.bench.break_demo import BreakOptions, Broken
    from splitwise_llm.model.sampling import Sampling
    from splitwise_llm.partition import Partition
    from splitwise_llm.records import Event, RequestRecord

MODE_TOKENS, BREAK_TOKENS = 48, 200
SLOWER = 30.0
"""Times, of a device with the bundled model: about 70 ms per token, which can be watched."""


@app.command()
def demo(
    model: Model = "bundled",
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = DEMO_PROMPT,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=2, help="Per text; 48, with --break 200.")
    ] = None,
    rtt: Annotated[str, typer.Option(help="Of the link.")] = "20ms",
    rate: Annotated[str, typer.Option(help="Of the link, each way.")] = "20mbit",
    threads: Threads = 1,
    wire: Wire = WirePrecision.FP32,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 7,
    breaks: Annotated[
        bool, typer.Option("--break", help="Silence the link, kill the worker and bring it back, in mid-text.")
    ] = False,
    silence: Annotated[str | None, typer.Option(help="With --break: how long the link is silent; 2s.")] = None,
    away: Annotated[
        str | None, typer.Option(help="With --break: from the worker's death to the start of another; 2s.")
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(min=0, help="With --break: wait so many times the time of moving for the worker; 1."),
    ] = None,
    emulate: Annotated[
        float | None,
        typer.Option(min=1, help="With --break: the device is so many times slower; 30 with the bundled model."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run one prompt in five partitions over two processes and a shaped link; the tokens must agree. With --break, run
    it undisturbed, then with everything breaking; the tokens must agree, too."""
    from splitwise_llm.model.sampling import Sampling

    prompt, sampling = valid_text(prompt), Sampling(temperature, seed=seed)
    only_break = {"--silence": silence, "--away": away, "--patience": patience, "--emulate": emulate}
    if breaks:
        from splitwise_llm.bench.break_demo import BreakOptions

        if wire is not WirePrecision.FP32:
            raise RequestError(
                f"--break compares texts, and --wire {wire} changes them with the partition: leave it out"
            )
        _break(
            BreakOptions(
                model, prompt, max_new_tokens or BREAK_TOKENS, rtt, rate, threads, sampling,
                patience=1.0 if patience is None else patience,
                silence_s=_lasting("--silence", silence or "2s"),
                away_s=_lasting("--away", away or "2s"),
                emulate=SLOWER if emulate is None and model == "bundled" else emulate,
            ),
            json_file,
        )  # fmt: skip
        return
    if given := [name for name, value in only_break.items() if value is not None]:
        raise RequestError(f"{', '.join(given)}: only with --break, which nothing else breaks")
    _five_ways(model, prompt, max_new_tokens or MODE_TOKENS, rtt, rate, threads, wire, sampling, json_file)


def _lasting(option: str, text: str) -> float:
    seconds = parse_seconds(text)
    if not 0 < seconds < math.inf:
        raise RequestError(f"{option} {text}: expected more than nothing and less than for ever, as in 2s")
    return seconds


def _five_ways(
    model: str, prompt: str, tokens: int, rtt: str, rate: str, threads: int, wire: WirePrecision, sampling: Sampling,
    json_file: Path | None,
) -> None:  # fmt: skip
    tell("loading torch")
    from splitwise_llm.bench.demo import DemoOptions, Show, run_demo
    from splitwise_llm.report import partition_picture, requests_table

    names = ("edge", "cloud")
    pictures: list[str] = []
    plain = not out.is_terminal

    def begin(mode: str, partition: Partition) -> None:
        pictures.append(f"{mode}: {partition.text(names)}\n{partition_picture(partition, names, plain)}")
        out.rule(f"{mode}: {partition.text(names)}")
        out.print(prompt, end="", style="dim", markup=False)

    def end(record: RequestRecord) -> None:
        said = f"TTFT {1e3 * record.ttft_s:.1f} ms, {1e3 * record.tpot_s:.2f} ms/token"
        out.print(f"\n({said}, {record.round_trips_per_token:g} round trips per token)", style="dim")

    show = Show(
        step=tell,
        begin=begin,
        token=lambda text: out.print(text, end="", markup=False),
        end=end,
    )
    options = DemoOptions(model, prompt, tokens, rtt, rate, threads, wire, sampling)
    records = run(lambda: run_demo(options, show), json_file)
    reference = records["edge"].token_ids
    out.print()
    for picture in pictures:
        out.print(picture, markup=False)
        out.print()
    out.print(requests_table(records, reference))
    write_json(
        json_file,
        {
            mode: record.to_dict(intervals=False) | {"same_tokens": record.token_ids == reference}
            for mode, record in records.items()
        },
    )
    called = sys.argv[0] if Path(sys.argv[0]).name == "splitwise" else "splitwise"
    out.print(f"and while everything breaks: {called} demo --break", style="dim", markup=False)
    if any(record.token_ids != reference for record in records.values()) and not wire.is_quantised:
        sys.exit(1)


def _break(options: BreakOptions, json_file: Path | None) -> None:
    tell("loading torch")
    from splitwise_llm.bench.break_demo import BreakShow, run_break_demo
    from splitwise_llm.report import happenings, timeline

    logging.getLogger("splitwise_llm.wire.proxy").setLevel(logging.ERROR)  # that nobody answers is the point
    plain = not out.is_terminal
    in_line = False

    def say(text: str, style: str = "") -> None:
        nonlocal in_line
        in_line = not text.endswith("\n") if text else in_line
        out.print(text, end="", style=style, markup=False)

    def end_line() -> None:
        say("\n" if in_line else "")

    def step(text: str) -> None:
        end_line()
        tell(text)

    def begin(title: str) -> None:
        end_line()
        out.rule(title)
        say(options.prompt, "dim")

    def line(event: Event, style: str) -> None:
        end_line()
        text = f"[{event.at_s:6.2f} s] {event.kind}: {event.text}"
        out.print(text, style=style, markup=False, no_wrap=True, overflow="ellipsis")

    show = BreakShow(
        step=step,
        begin=begin,
        token=lambda token, elsewhere: say(token.text, "yellow" if elsewhere else ""),
        struck=lambda event: line(event, "bold red"),
        told=lambda event: line(event, "dim"),
    )
    broken = run(lambda: run_break_demo(options, show), json_file)
    end_line()
    out.rule("what happened")
    out.print(timeline(broken.record, broken.outages, plain, min(max(out.width, 40), 100)), markup=False)
    out.print(f"\n{happenings(broken.record, broken.struck)}\n", markup=False, no_wrap=True, overflow="ellipsis")
    for said in _verdict(broken, options):
        out.print(said, markup=False)
    write_json(json_file, broken.to_dict())
    if not broken.is_same:
        sys.exit(1)


def _verdict(broken: Broken, options: BreakOptions) -> Iterator[str]:
    """What a person wants to know at the end."""
    before, after = broken.reference.token_times_s[-1], broken.record.token_times_s[-1]
    if options.emulate:
        yield f"(the device plays one that is {options.emulate:g} times slower, so that there is something to see)"
    for outage, stop_s in zip(broken.outages, broken.stops_s, strict=True):
        lasted_s = outage.stop_s - outage.start_s
        yield f"{outage.what} for {lasted_s:.1f} s: the longest wait for a token in that time was {stop_s:.2f} s"
    yield f"{len(broken.record.token_ids)} tokens in {after:.1f} s, undisturbed {before:.1f} s"
    if broken.missed:
        yield f"not shown: {broken.missed}; give more tokens (-n)"
    if broken.is_same:
        yield "the same text: yes, token for token"
    else:
        pairs = zip(broken.reference.token_ids, broken.record.token_ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(broken.record.token_ids))
        yield f"the same text: NO, from token {first} on"
