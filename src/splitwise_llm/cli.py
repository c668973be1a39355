"""The command line: the only place that knows everything, and turns errors into a message and an exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError, SplitwiseError, UserError
from splitwise_llm.spec import Dtype, Weights, parse_emulation
from splitwise_llm.units import parse_bytes

if TYPE_CHECKING:
    from splitwise_llm.bench.figures import Figures

app = typer.Typer(
    name="splitwise",
    help="One language model across a device and the cloud.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
bench = typer.Typer(help="Measure; each bench prints its figures and writes them with --json.", no_args_is_help=True)
app.add_typer(bench, name="bench")

out = Console(highlight=False, width=None if sys.stdout.isatty() else 132)

DEMO_PROMPT = "It was a bright morning, and the Prince said to his old friend:"

Model = Annotated[str, typer.Option(help="'bundled', a directory with config.json and safetensors, or a hub id.")]
Threads = Annotated[int, typer.Option(min=1, max=256, help="Compute threads of this process.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What to compute in.")]
WeightsOption = Annotated[Weights, typer.Option(help="How weights stay in memory.")]
Memory = Annotated[str, typer.Option(help="Memory for weights and cache, as in 2GB; default: what is free.")]
Emulate = Annotated[str, typer.Option(help="Stretch compute: a factor (2.5) or a device file (JSON).")]
Tls = Annotated[Path | None, typer.Option(help="Directory made by `splitwise keys`.")]
R = TypeVar("R")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")]
Wire = Annotated[WirePrecision, typer.Option(help="Activations on the wire.")]


def main() -> None:
    """Run the command line; errors of ours end in one line on stderr and their exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until something runs that must be ended in order
    try:
        app()
    except SplitwiseError as error:
        print(f"splitwise: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"splitwise: {error}; check the path, its permissions and the space left", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _machine_options(memory: str, emulate: str) -> dict[str, Any]:
    return {
        "memory_bytes": parse_bytes(memory) if memory else None,
        "emulate": parse_emulation(emulate) if emulate else None,
    }


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the prompt is not valid UTF-8; convert it, for example with iconv -t UTF-8") from None
    return text


def _prompt(text: str) -> str:
    if text != "-":
        return _text(text)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 ({error}); convert it with iconv -t UTF-8") from None


def _pairs(items: list[str] | None, what: str, example: str) -> dict[str, str]:
    """`name=value` options as a mapping. Raises RequestError."""
    pairs: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value or name in pairs:
            raise RequestError(f"{what} {item!r}: write name=value, each name once, as in {example}")
        pairs[name] = value
    return pairs


def _two(pair: str) -> tuple[str, str]:
    first, plus, second = pair.partition("+")
    if not plus or not first or not second:
        raise RequestError(f"--direct {pair!r}: write two workers, as in cloud+third")
    return first, second


def _write_json(path: Path | None, data: object) -> None:
    if path:
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _tell(text: str) -> None:
    out.print(f"... {text}", style="dim", markup=False)


async def _until_told(stop_with_stdin: bool) -> None:
    """Returns on SIGINT, SIGTERM, or, if asked, when standard input ends."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told.set)
    if stop_with_stdin:

        def watch() -> None:
            sys.stdin.buffer.read()
            with suppress(RuntimeError):  # the loop may be over by then
                loop.call_soon_threadsafe(told.set)

        threading.Thread(target=watch, daemon=True).start()
    await told.wait()


def _run(work: Callable[[], Coroutine[Any, Any, R]], json_file: Path | None = None) -> R:
    """Run `work` to its end; Ctrl-C cancels it in order. The file for its result is tried before, not after."""
    if json_file:
        json_file.open("a").close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return asyncio.run(work())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    model: Model = "bundled",
    machine: Annotated[list[str] | None, typer.Option(help="A worker, as cloud=127.0.0.1:7070; repeatable.")] = None,
    partition: Annotated[str, typer.Option(help="As in 'edge[0:2] cloud[2:6] edge[6:8]'.")] = "all:edge",
    wire: Wire = WirePrecision.FP32,
    chunk: Annotated[int, typer.Option(min=0, help="Prompt positions per prefill chunk; 0: all at once.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    loss: Annotated[float, typer.Option(help="Probability that an element is lost on the wire.")] = 0.0,
    link: Annotated[list[str] | None, typer.Option(help="Shape a link, as 'cloud=rtt=20ms rate=20mbit'.")] = None,
    direct: Annotated[list[str] | None, typer.Option(help="Workers that reach each other, as cloud+third.")] = None,
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    tls: Tls = None,
    json_file: JsonFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Answer one prompt, alone or with running workers."""
    from splitwise_llm.engine.edge import LinkTo, edge_with
    from splitwise_llm.model.sampling import Sampling
    from splitwise_llm.wire.codec import ElementLoss
    from splitwise_llm.wire.keys import device_files
    from splitwise_llm.wire.shaper import LinkShape

    text = _prompt(prompt)
    addresses = _pairs(machine, "--machine", "cloud=127.0.0.1:7070")
    shapes = {n: LinkShape.parse(s) for n, s in _pairs(link, "--link", "'cloud=rtt=20ms rate=20mbit'").items()}
    reach = LinkTo(addresses, tls=device_files(tls) if tls else None, shapes=shapes)
    sampling = Sampling(temperature, top_k, top_p, seed)
    pairs = [_two(pair) for pair in direct or []]

    async def work() -> None:
        options = _machine_options(memory, emulate)
        with edge_with(model, reach, dtype=dtype, weights=weights, threads=threads, direct=pairs, **options) as edge:
            decision = Decision(edge.partition(partition), wire, chunk or None)
            async with edge.generate(
                text, decision, max_new_tokens=max_new_tokens, sampling=sampling, loss=ElementLoss(loss, seed)
            ) as generation:
                try:
                    async for token in generation:
                        print(token.text, end="", flush=True)
                finally:
                    print()
            record = generation.record
        _write_json(json_file, record.to_dict())
        if not quiet:
            print(
                f"[{record.partition}] {len(record.token_ids)} tokens, TTFT {1e3 * record.ttft_s:.1f} ms, "
                f"{1e3 * record.tpot_s:.2f} ms/token, {record.round_trips_per_token:g} round trips/token, "
                f"{record.up_bytes} B up, {record.down_bytes} B down" + (" (emulated)" if record.is_emulated else ""),
                file=sys.stderr,
            )

    _run(work, json_file)


@app.command()
def worker(
    model: Model = "bundled",
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7070",
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    tls: Tls = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time.")] = 16,
    idle: Annotated[float, typer.Option(min=1, help="Seconds without a message that end a session.")] = 300.0,
    max_message: Annotated[str, typer.Option(help="Largest message, as in 256MiB.")] = "256MiB",
    until_stdin_closes: Annotated[bool, typer.Option(help="End when standard input does.")] = False,
) -> None:
    """Hold weights and compute a share for whoever opens a session."""
    from splitwise_llm.engine.machine import Machine
    from splitwise_llm.engine.worker import Worker
    from splitwise_llm.model.checkpoint import Checkpoint, locate
    from splitwise_llm.wire.grpc_link import dial, serve
    from splitwise_llm.wire.keys import worker_files

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    files = worker_files(tls) if tls else None
    options = _machine_options(memory, emulate)
    limit = parse_bytes(max_message)
    if not 1000 <= limit < 2**31 - 1000:
        raise RequestError(f"--max-message {max_message}: expected 1 kB up to 2 GB")

    async def work() -> None:
        checkpoint = Checkpoint(locate(model))
        with Machine(checkpoint, dtype=dtype, weights=weights, threads=threads, **options) as machine:
            connect = partial(dial, tls=files)
            serving = Worker(machine, max_sessions=max_sessions, idle_s=idle, connect=connect)
            server = await serve(
                listen,
                serving.handle,
                tls=files,
                max_links=2 * max_sessions,
                max_frame_bytes=limit,
            )
            async with server:
                held = f"{model} {checkpoint.fingerprint} in {dtype}, weights {weights}"
                playing = f", emulating {machine.emulated}" if machine.emulated else ""
                print(f"worker with {held}{playing} ready on {server.address}", flush=True)
                await _until_told(until_stdin_closes)

    _run(work)


@app.command()
def link(
    listen: Annotated[str, typer.Option(help="host:port to listen on; port 0 takes a free one.")],
    to: Annotated[str, typer.Option(help="host:port behind the link.")],
    rate: Annotated[str, typer.Option(help="Both ways, as in 20mbit.")] = "",
    up: Annotated[str, typer.Option(help="Towards --to.")] = "",
    down: Annotated[str, typer.Option(help="Back.")] = "",
    rtt: Annotated[str, typer.Option(help="As in 40ms; half of it each way.")] = "0ms",
    jitter: Annotated[str, typer.Option(help="As in 2ms.")] = "0ms",
    trace: Annotated[str, typer.Option(help="Rates from a recorded trace, both ways unless --up or --down.")] = "",
    outage: Annotated[str, typer.Option(help="As in 10s/3s: down 3 s of every 10 s.")] = "",
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    exposed: Annotated[bool, typer.Option(help="Allow listening beyond this machine.")] = False,
    until_stdin_closes: Annotated[bool, typer.Option(help="End when standard input does.")] = False,
) -> None:
    """Put any program's TCP connection behind a slow link."""
    from splitwise_llm.wire.proxy import run_proxy
    from splitwise_llm.wire.shaper import LinkShape

    settings = {"rtt": rtt, "jitter": jitter, "rate": trace or rate, "up": up, "down": down, "outage": outage}
    given = " ".join(f"{name}='{value}'" for name, value in settings.items() if value) + f" seed={seed}"
    shape = LinkShape.parse(given)
    if listen == to:
        raise RequestError(f"--listen and --to are both {to}; the link would lead to itself")

    async def work() -> None:
        async with await run_proxy(listen, to, shape, exposed=exposed) as proxy:
            print(f"link to {to} ready on {proxy.address[0]}:{proxy.address[1]}", flush=True)
            await _until_told(until_stdin_closes)

    _run(work)


@app.command()
def keys(
    out_dir: Annotated[Path, typer.Option("--out", help="Directory to make.")],
    host: Annotated[list[str] | None, typer.Option(help="A name or address of the worker; repeatable.")] = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="Valid for so long.")] = 365,
    force: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Make a small CA and the certificates of a worker and a device, for mutual TLS."""
    from splitwise_llm.wire.keys import make_keys

    for files in make_keys(out_dir, names=host or [], days=days, overwrite=force):
        print(f"{files.certificate}  {files.key}")
    print("copy ca.pem and worker.* to the worker, ca.pem and device.* to the device, then use --tls DIR on both")


@app.command()
def demo(
    model: Model = "bundled",
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = DEMO_PROMPT,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2, help="Per mode.")] = 48,
    rtt: Annotated[str, typer.Option(help="Of the link.")] = "20ms",
    rate: Annotated[str, typer.Option(help="Of the link, each way.")] = "20mbit",
    threads: Threads = 1,
    wire: Wire = WirePrecision.FP32,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 7,
    json_file: JsonFile = None,
) -> None:
    """Run one prompt in five partitions over two processes and a shaped link; the tokens must agree."""
    _tell("loading torch")
    from splitwise_llm.bench.demo import DemoOptions, Show, run_demo
    from splitwise_llm.model.sampling import Sampling
    from splitwise_llm.partition import Partition
    from splitwise_llm.records import RequestRecord
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
        step=_tell,
        begin=begin,
        token=lambda text: out.print(text, end="", markup=False),
        end=end,
    )
    sampling = Sampling(temperature, seed=seed)
    options = DemoOptions(model, _text(prompt), max_new_tokens, rtt, rate, threads, wire, sampling)
    records = _run(lambda: run_demo(options, show), json_file)
    reference = records["edge"].token_ids
    out.print()
    for picture in pictures:
        out.print(picture, markup=False)
        out.print()
    out.print(requests_table(records, reference))
    _write_json(
        json_file,
        {
            mode: record.to_dict(intervals=False) | {"same_tokens": record.token_ids == reference}
            for mode, record in records.items()
        },
    )
    if any(record.token_ids != reference for record in records.values()) and not wire.is_quantised:
        sys.exit(1)


Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds, after one that is thrown away.")]
Tokens = Annotated[int, typer.Option(min=3, help="Tokens per run.")]


def _report(figures: Figures, json_file: Path | None) -> None:
    from splitwise_llm.report import figures_table

    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    out.print(figures_table(f"bench {figures.bench}", figures.figures, figures.notes))
    out.print(f"load average {load} on {os.cpu_count()} processors; {figures.settings}", markup=False)
    _write_json(json_file, figures.to_dict())


@bench.command()
def exactness(
    partitions: Annotated[int, typer.Option(min=1, help="Random partitions per model.")] = 24,
    tokens: Tokens = 64,
    text: Annotated[Path | None, typer.Option(help="Held-out text; default: the bundled excerpt.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Logits and tokens of any partition against Hugging Face, and the nats that lossy choices cost."""
    from splitwise_llm.bench.exactness import run_exactness

    _report(_run(lambda: run_exactness(partitions, tokens, text, _tell), json_file), json_file)


@bench.command()
def overhead(rounds: Rounds = 9, tokens: Tokens = 64, json_file: JsonFile = None) -> None:
    """A split over unsplit, and unsplit over Hugging Face, per token, one thread per process."""
    from splitwise_llm.bench.overhead import run_overhead

    _report(_run(lambda: run_overhead(rounds, tokens, _tell), json_file), json_file)


@bench.command("link")
def bench_link(rounds: Rounds = 9, tokens: Tokens = 64, json_file: JsonFile = None) -> None:
    """What a split takes over a 20 ms, 20 Mbit/s link, over the least it could take."""
    from splitwise_llm.bench.link import run_link

    _report(_run(lambda: run_link(rounds, tokens, _tell), json_file), json_file)
