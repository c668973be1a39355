"""Commands that stand in for machines and links: worker, link, keys."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import (
    DtypeOption,
    Emulate,
    KernelsOption,
    Memory,
    Model,
    Profile,
    Threads,
    Tls,
    WeightsOption,
    app,
    machine_options,
    run,
    until_told,
)
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import Dtype, Kernels, Weights, find_device
from splitwise_llm.units import parse_bytes


@app.command()
def worker(
    model: Model = "bundled",
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7070",
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    kernels: KernelsOption = Kernels.AUTO,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    profile: Profile = "",
    tls: Tls = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sessions at a time.")] = 16,
    idle: Annotated[float, typer.Option(min=1, help="Seconds without a message that end a session.")] = 300.0,
    lease: Annotated[
        float, typer.Option(min=0, help="Seconds for which a session that lost its device is kept.")
    ] = 120.0,
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
    options = machine_options(memory, emulate) | {
        "profile": find_device(profile) if profile else None,
        "kernels": kernels,
    }
    limit = parse_bytes(max_message)
    if not 1000 <= limit < 2**31 - 1000:
        raise RequestError(f"--max-message {max_message}: expected 1 kB up to 2 GB")

    async def work() -> None:
        checkpoint = Checkpoint(locate(model))
        with Machine(checkpoint, dtype=dtype, weights=weights, threads=threads, **options) as machine:
            connect = partial(dial, tls=files)
            serving = Worker(machine, max_sessions=max_sessions, idle_s=idle, lease_s=lease, connect=connect)
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
            await serving.close()

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
    fault: Annotated[
        str,
        typer.Option(help="What breaks, as in 'reset after=2s; drop-both after=5s for=3s', from the first connection."),
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the jitter.")] = 0,
    exposed: Annotated[bool, typer.Option(help="Allow listening beyond this machine.")] = False,
    until_stdin_closes: Annotated[bool, typer.Option(help="End when standard input does.")] = False,
) -> None:
    """Put any program's TCP connection behind a link that is slow, or breaks."""
    from splitwise_llm.wire.faults import Layer, parse_schedule
    from splitwise_llm.wire.proxy import run_proxy
    from splitwise_llm.wire.shaper import LinkShape

    settings = {"rtt": rtt, "jitter": jitter, "rate": trace or rate, "up": up, "down": down, "outage": outage}
    given = " ".join(f"{name}='{value}'" for name, value in settings.items() if value) + f" seed={seed}"
    shape = LinkShape.parse(given)
    faults = parse_schedule(fault, Layer.PROXY) if fault else ()
    if listen == to:
        raise RequestError(f"--listen and --to are both {to}; the link would lead to itself")

    async def work() -> None:
        async with await run_proxy(listen, to, shape, exposed=exposed, faults=faults) as proxy:
            print(f"link to {to} ready on {proxy.address[0]}:{proxy.address[1]}", flush=True)
            await until_told(until_stdin_closes)
        if faults:
            print("faults fired: " + (", ".join(f"{f} {n}" for f, n in proxy.fired.items()) or "none"), flush=True)

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
