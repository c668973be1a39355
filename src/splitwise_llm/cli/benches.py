"""The benches of the running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import JsonFile, KernelsOption, Rounds, Threads, Tokens, bench, report, run, tell
from splitwise_llm.cli.output import whole
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import Kernels


@bench.command()
def exactness(
    partitions: Annotated[int, typer.Option(min=1, help="Random partitions per model.")] = 24,
    tokens: Tokens = 64,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text; default: the bundled excerpt, of --live all that is bundled.")
    ] = None,
    live: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: nats through a worker process beside the shipped table, of weights, wires or plans; "
            "repeatable."
        ),
    ] = None,
    live_tokens: Annotated[
        int | None,
        typer.Option(min=16, help="Of --live, about so many, in pieces of 480.", show_default="42000"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Logits and tokens of any partition against Hugging Face, and the nats that lossy choices cost."""
    if live:
        from splitwise_llm.bench.accuracy_live import TOKENS, run_live

        report(run(lambda: run_live(live, text, live_tokens or TOKENS, tell), json_file), json_file)
        return
    if live_tokens:
        raise RequestError("--live-tokens is of --live: give --live weights, too")
    from splitwise_llm.bench.exactness import run_exactness

    report(run(lambda: run_exactness(partitions, tokens, text, tell), json_file), json_file)


@bench.command()
def overhead(rounds: Rounds = 9, tokens: Tokens = 64, json_file: JsonFile = None) -> None:
    """A split over unsplit, and unsplit over Hugging Face, per token, one thread per process."""
    from splitwise_llm.bench.overhead import run_overhead

    report(run(lambda: run_overhead(rounds, tokens, tell), json_file), json_file)


@bench.command("link")
def bench_link(rounds: Rounds = 9, tokens: Tokens = 64, json_file: JsonFile = None) -> None:
    """What a split takes over a 20 ms, 20 Mbit/s link, over the least it could take."""
    from splitwise_llm.bench.link import run_link

    report(run(lambda: run_link(rounds, tokens, tell), json_file), json_file)


@bench.command("peers")
def bench_peers(
    llamacpp: Annotated[Path, typer.Option(help="Folder with llama-server, llama-quantize and the RPC server.")],
    quick: Annotated[bool, typer.Option(help="4 layers instead of 22, and 2 rounds.")] = False,
    threads: Threads = 1,
    kernels: KernelsOption = Kernels.AUTO,
    rounds: Rounds = 5,
    tokens: Tokens = 24,
    part: Annotated[list[str] | None, typer.Option(help="Only local, link, kill or draft; repeatable.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Where models are made (up to 20 GB, removed again).", show_default="temporary")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Beside llama.cpp: tokens/s on one machine, ms/token over a link, and what is left when the far process dies."""
    from splitwise_llm.bench.peers import PARTS, PeersOptions, run_peers

    unknown = {*(part or ())} - {*PARTS}
    if unknown:
        raise RequestError(f"--part {min(unknown)}: the parts are {', '.join(PARTS)}")
    options = PeersOptions(
        llamacpp, quick, threads, 2 if quick else rounds, tokens, tuple(part or PARTS), folder, kernels
    )  # fmt: skip
    report(run(lambda: run_peers(options, tell), json_file), json_file)


@bench.command("pipeline")
def bench_pipeline(
    rounds: Rounds = 5,
    in_flight: Annotated[int, typer.Option(min=2, help="Sequences under way at a time.")] = 4,
    json_file: JsonFile = None,
) -> None:
    """Four processes in a row, several sequences in flight: against one, and against what EdgeShard's program says."""
    from splitwise_llm.bench.pipeline_live import Setting, run_pipeline

    report(run(lambda: run_pipeline(rounds, Setting(in_flight), tell), json_file), json_file)


@bench.command()
def serving(
    rounds: Rounds = 5,
    tokens: Tokens = 32,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead: peak memory of device and worker beside what is predicted, weights in bf16, int8 or int4; "
            "repeatable."
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Of --memory: folder for finished runs; what is there is not run again.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Eight sessions on one worker over one: tokens per second, evenness, memory, and what a ninth is told."""
    if memory:
        from splitwise_llm.bench.memory import run_memory

        with whole(json_file) as part:
            report(run_memory(memory, tell, keep), part)
        return
    if keep:
        raise RequestError("--keep is of --memory: give --memory bf16, too")
    from splitwise_llm.bench.serving import run_serving

    report(run(lambda: run_serving(rounds, tokens, tell), json_file), json_file)


@bench.command()
def drafting(
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions where drafting is of no use.")] = 7,
    tokens: Tokens = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Spread over the bundled excerpt.")] = 8,
    json_file: JsonFile = None,
) -> None:
    """Tokens per round trip, and per second over plain decoding, of every drafter over 40 ms and 20 Mbit/s."""
    from splitwise_llm.bench.drafting import run_drafting

    report(run(lambda: run_drafting(rounds, tokens, prompts, tell), json_file), json_file)
