"""Commands that run a model: demo, generate, worker, link, keys."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import (
    DEMO_PROMPT,
    DtypeOption,
    Emulate,
    JsonFile,
    Memory,
    Model,
    Threads,
    Tls,
    WeightsOption,
    Wire,
    app,
    machine_options,
    out,
    pairs,
    read_prompt,
    run,
    tell,
    two_names,
    until_told,
    valid_text,
    write_json,
)
from splitwise_llm.cost import UNLIMITED, Floor, Limits
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import EVERYTHING, Always, Tools
from splitwise_llm.spec import Dtype, Weights, find_device
from splitwise_llm.units import parse_bytes

Profile = Annotated[str, typer.Option(help="What this machine can do: a device file, as `splitwise profile` writes.")]


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads standard input.")],
    model: Model = "bundled",
    machine: Annotated[list[str] | None, typer.Option(help="A worker, as cloud=127.0.0.1:7070; repeatable.")] = None,
    partition: Annotated[
        str, typer.Option(help="As in 'edge[0:2] cloud[2:6] edge[6:8]'.", show_default="all:edge")
    ] = "",
    policy: Annotated[str, typer.Option(help="Who chooses instead, as in neurosurgeon; asked once.")] = "",
    floor: Annotated[str, typer.Option(help="First and last layers that stay on the device, as in 2+2.")] = "",
    allow_lossy: Annotated[bool, typer.Option(help="The policy may use int8 and int4 on the wire.")] = False,
    explain: Annotated[bool, typer.Option(help="Say what is chosen, its price, and the fastest other.")] = False,
    wire: Annotated[WirePrecision | None, typer.Option(help="Activations on the wire.", show_default="fp32")] = None,
    chunk: Annotated[
        int | None, typer.Option(min=0, help="Prompt positions per prefill chunk; 0: all at once.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    loss: Annotated[float, typer.Option(help="Probability that an element is lost on the wire.")] = 0.0,
    link: Annotated[list[str] | None, typer.Option(help="Shape a link, as 'cloud=rtt=20ms rate=20mbit'.")] = None,
    link_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="What to believe of a link, as cloud=20mbit, 'cloud=up=5mbit down=50mbit', cloud+third=1gbit."
        ),
    ] = None,
    direct: Annotated[list[str] | None, typer.Option(help="Workers that reach each other, as cloud+third.")] = None,
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    profile: Profile = "",
    tls: Tls = None,
    json_file: JsonFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Answer one prompt, alone or with running workers."""
    from splitwise_llm.cli.choice import Explained, asked_policy, hindsight

    asked = asked_policy(policy, partition, wire, chunk, allow_lossy)
    limits = Limits(Floor.parse(floor)) if floor else UNLIMITED
    from splitwise_llm.engine.edge import LinkTo, edge_with
    from splitwise_llm.engine.survey import LOSSLESS, LOSSY, Rates
    from splitwise_llm.model.sampling import Sampling
    from splitwise_llm.wire.codec import ElementLoss
    from splitwise_llm.wire.keys import device_files
    from splitwise_llm.wire.shaper import LinkShape

    text = read_prompt(prompt)
    addresses = pairs(machine, "--machine", "cloud=127.0.0.1:7070")
    shapes = {n: LinkShape.parse(s) for n, s in pairs(link, "--link", "'cloud=rtt=20ms rate=20mbit'").items()}
    rates = {n: Rates.parse(s) for n, s in pairs(link_rate, "--link-rate", "cloud=20mbit").items()}
    reach = LinkTo(addresses, tls=device_files(tls) if tls else None, shapes=shapes)
    tools = Tools((LOSSLESS[dtype], *LOSSY), EVERYTHING.chunks) if allow_lossy else None
    sampling = Sampling(temperature, top_k, top_p, seed)
    joined = [two_names(pair) for pair in direct or []]

    async def work() -> None:
        options = machine_options(memory, emulate) | {"profile": find_device(profile) if profile else None}
        options |= {"dtype": dtype, "weights": weights, "threads": threads, "direct": joined, "rates": rates}
        with edge_with(model, reach, **options) as edge:
            given = partition or "all:edge"
            decides = asked or Always(Decision(edge.partition(given), wire or WirePrecision.FP32, chunk or None))
            if explain:
                decides = Explained(decides, policy or "--partition", edge.names, note)
            async with edge.generate(
                text, decides, max_new_tokens=max_new_tokens, sampling=sampling, loss=ElementLoss(loss, seed),
                called=policy, limits=limits, tools=tools,
            ) as generation:  # fmt: skip
                for name, error in generation.unreachable.items() if asked and not quiet else ():
                    note(f"going on without {name}: {error}")
                try:
                    async for token in generation:
                        print(token.text, end="", flush=True)
                finally:
                    print()
            record = generation.record
        write_json(json_file, record.to_dict())
        if not quiet:
            print(
                f"[{record.partition}] {len(record.token_ids)} tokens, TTFT {1e3 * record.ttft_s:.1f} ms, "
                f"{1e3 * record.tpot_s:.2f} ms/token, {record.round_trips_per_token:g} round trips/token, "
                f"{record.up_bytes} B up, {record.down_bytes} B down" + (" (emulated)" if record.is_emulated else ""),
                file=sys.stderr,
            )
        for line in hindsight(record) if explain else ():
            note(line)

    run(work, json_file)


@app.command()
def worker(
    model: Model = "bundled",
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7070",
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    profile: Profile = "",
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
    options = machine_options(memory, emulate) | {"profile": find_device(profile) if profile else None}
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
                await until_told(until_stdin_closes)

    run(work)


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
            await until_told(until_stdin_closes)

    run(work)


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
    tell("loading torch")
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
        step=tell,
        begin=begin,
        token=lambda text: out.print(text, end="", markup=False),
        end=end,
    )
    sampling = Sampling(temperature, seed=seed)
    options = DemoOptions(model, valid_text(prompt), max_new_tokens, rtt, rate, threads, wire, sampling)
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
    if any(record.token_ids != reference for record in records.values()) and not wire.is_quantised:
        sys.exit(1)
