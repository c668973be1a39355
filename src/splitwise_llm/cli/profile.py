"""Commands that measure this machine, a link, and whether the cost model tells the truth."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import (
    DtypeOption,
    JsonFile,
    KernelsOption,
    Model,
    Rounds,
    Threads,
    Tls,
    Tokens,
    WeightsOption,
    app,
    bench,
    out,
    pairs,
    report,
    run,
    tell,
    write_json,
)
from splitwise_llm.cli.output import whole
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import DeviceSpec, Dtype, Kernels, LinkSpec, Weights

if TYPE_CHECKING:
    from splitwise_llm.cost import Accuracy
    from splitwise_llm.engine.probing import Probe
    from splitwise_llm.wire.link import TlsFiles


@bench.command()
def fidelity(
    rounds: Rounds = 3,
    tokens: Tokens = 16,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer partitions.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Predicted against measured TTFT, TPOT, bytes and crossings: 13 partitions, 4 links, 2 models, slowed machines."""
    from splitwise_llm.bench.fidelity import run_fidelity

    with whole(json_file) as part:
        report(run(lambda: run_fidelity(rounds, tokens, quick, tell)), part)


@app.command()
def profile(
    model: Model = "bundled",
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Device file; unit tables go to NAME.units.json beside it.")
    ] = None,
    name: Annotated[str, typer.Option(help="What to call this machine; default: its host name.")] = "",
    machine: Annotated[list[str] | None, typer.Option(help="Measure the link to a worker, cloud=HOST:PORT.")] = None,
    budget: Annotated[float, typer.Option(min=1, max=3600, help="Seconds to spend on the units.")] = 40.0,
    accuracy: Annotated[
        Path | None, typer.Option(help="Measure nats lost on this text instead; writes NAME.accuracy.json.")
    ] = None,
    accuracy_tokens: Annotated[
        int | None, typer.Option(min=16, help="Of --accuracy: about so many, in pieces of 480.", show_default="2000")
    ] = None,
    accuracy_groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="4",
            help="Of --accuracy: of layers, each with figures; of crossings twice as many.",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    kernels: KernelsOption = Kernels.AUTO,
    threads: Threads = 1,
    tls: Tls = None,
) -> None:
    """Measure this machine: units of a model, memory, energy where there is a meter, links to workers."""
    if accuracy:
        _accuracy(model, accuracy, accuracy_tokens or 2000, accuracy_groups or 4, dtype, threads, out_file)
        return
    if accuracy_tokens or accuracy_groups:
        raise RequestError("--accuracy-tokens and --accuracy-groups are of --accuracy: give it a text, too")
    tell("loading torch")
    from splitwise_llm.wire.keys import device_files

    addresses = pairs(machine, "--machine", "cloud=127.0.0.1:7070")
    files = device_files(tls) if tls else None
    called = name or platform.node() or "this machine"
    with contextlib.ExitStack() as stack:
        outputs = {
            ending: stack.enter_context(whole(out_file.with_suffix(ending) if out_file else None))
            for ending in (*(f".{machine}.link.json" for machine in addresses), ".units.json")
        }
        outputs[""] = stack.enter_context(whole(out_file))
        run(lambda: _profile(model, called, addresses, files, budget, (dtype, weights, kernels, threads), outputs))


async def _profile(
    model: str,
    name: str,
    addresses: dict[str, str],
    tls: TlsFiles | None,
    budget_s: float,
    form: tuple[Dtype, Weights, Kernels, int],
    outputs: Mapping[str, Path | None],
) -> None:
    """Measure, show, and write the device file (``), the units (`.units.json`) and each link where one is asked for."""
    from splitwise_llm.bench.processes import worker
    from splitwise_llm.engine.edge import LinkTo, edge_with
    from splitwise_llm.engine.meters import NO_METER, find_meter
    from splitwise_llm.engine.profiling import Profiler
    from splitwise_llm.engine.roofline import device_figures, peaks, watts

    dtype, weights, kernels, threads = form
    options = ["--dtype", dtype.value, "--weights", weights.value, "--kernels", kernels.value]
    options += ["--threads", str(threads)]
    with contextlib.ExitStack() as stack:
        tell("starting a worker on loopback")
        loopback = stack.enter_context(worker(model, *options)).address
        reach = LinkTo({"loopback": loopback})
        edge = stack.enter_context(
            edge_with(model, reach, dtype=dtype, weights=weights, kernels=kernels, threads=threads)
        )
        tell("memory and arithmetic peaks")
        at_most = await peaks(edge.machine)
        tell("loading weights")
        async with await Profiler.fitting(edge.machine, budget_s) as profiler:
            until_s, rounds = time.monotonic() + budget_s, 0
            while rounds < 2 or time.monotonic() < until_s:
                await profiler.round()
                profiler.forget() if not rounds else None  # the first touch of everything counts for nothing
                rounds += 1
                tell(f"units of the model, round {rounds}")
            tell("messages over loopback")
            await profiler.messages(edge, "loopback")
            units = profiler.table()
            meter = find_meter()
            power = None
            if meter:
                tell(f"energy by {meter.name}")
                power = await watts(profiler, meter)
                meter.close()
                if power.idle > min(power.decode, power.prefill):
                    tell("no power figures: it drew more idle than at work; other programs were running, try again")
                    power = None
        figures = device_figures(name, edge.machine, units, at_most, profiler.load_bytes_per_s, power)
        fingerprint = edge.machine.checkpoint.fingerprint
        software_s = (await _probe("loopback", loopback, None, fingerprint)).echo_s if addresses else 0.0
        links = {
            machine: (await _probe(machine, address, tls, fingerprint)).link(software_s)
            for machine, address in addresses.items()
        }
    _show(figures, links, None if power else NO_METER)
    device, table = outputs[""], outputs[".units.json"]
    if device and table:
        write_json(device, figures)
        if device.is_file():
            DeviceSpec.from_file(device)  # what was written can be read
        table.write_text(units.to_json())
        for machine, spec in links.items():
            said = {"link": spec.text, "source": f"{units.source}, payloads over the engine's own link"}
            write_json(outputs[f".{machine}.link.json"], said)


async def _probe(machine: str, address: str, tls: TlsFiles | None, fingerprint: str) -> Probe:
    from splitwise_llm.engine.probing import probe
    from splitwise_llm.wire.grpc_link import dial

    tell(f"the link to {machine}")
    link = await dial(address, name=machine, tls=tls)
    try:
        return await probe(link, fingerprint)
    finally:
        await link.close()


def _show(figures: dict[str, object], links: dict[str, LinkSpec], said: str | None) -> None:
    from rich.table import Table

    table = Table("figure", "value", "source")
    for field, figure in figures.items():
        if isinstance(figure, dict):
            table.add_row(field, f"{figure['value']:.4g}", figure["source"])
    out.print(table)
    for machine, spec in links.items():
        out.print(f"link to {machine}: {spec.text}", markup=False)
    if said:
        out.print(said)
    load = os.getloadavg()[0]
    if load > 1.5:
        out.print(f"load average {load:.1f}: other programs were running, and the figures are slower than the machine")


def _accuracy(
    model: str, text: Path, tokens: int, groups: int, dtype: Dtype, threads: int, out_file: Path | None
) -> None:
    try:
        passage = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{text} is not valid UTF-8 ({error}); convert it with iconv -t UTF-8") from None
    with whole(out_file.with_suffix(".accuracy.json") if out_file else None) as target:
        table = _measure_accuracy(model, text.name, passage, tokens, groups, dtype, threads)
        if target:
            target.write_text(table.to_json() + "\n")


def _measure_accuracy(
    model: str, name: str, passage: str, tokens: int, groups: int, dtype: Dtype, threads: int
) -> Accuracy:
    tell("loading torch")
    import torch

    from splitwise_llm.bench.accuracy import measure
    from splitwise_llm.model.checkpoint import Checkpoint, locate
    from splitwise_llm.model.tokenizer import Tokenizer

    torch.set_num_threads(threads)
    checkpoint = Checkpoint(locate(model))
    ids = Tokenizer(checkpoint.directory).encode(passage)
    table, figures = measure(checkpoint, ids, name, tokens, dtype, tell, groups)
    report(figures, None)
    return table
