"""What commands share: the application, option types, and reading and writing at the rim."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import Dtype, Kernels, Weights, parse_emulation
from splitwise_llm.units import parse_bytes

if TYPE_CHECKING:
    from splitwise_llm.bench.figures import Figures
    from splitwise_llm.records import RequestRecord

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
KernelsOption = Annotated[
    Kernels, typer.Option(help="Products with few rows; compiled: faster, made by a C compiler, on AVX-512.")
]
Memory = Annotated[
    str,
    typer.Option(help="What it may take, as in 2GB; plans count on nine tenths; default: what is free."),
]
Emulate = Annotated[str, typer.Option(help="Stretch compute: a factor (2.5) or a device file (JSON).")]
Profile = Annotated[str, typer.Option(help="What this machine can do: a device file, as `splitwise profile` writes.")]
Tls = Annotated[Path | None, typer.Option(help="Directory made by `splitwise keys`.")]
R = TypeVar("R")
LowLevel = Annotated[
    str,
    typer.Option(
        help="Who finds the plans of --policy drift, drift-selfish and splitwise: exact (a search) or learned (a "
        "network proposes, each is priced exactly; two workers and more).",
        show_default="learned with two workers and more",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result there, too.")]
Wire = Annotated[WirePrecision, typer.Option(help="Activations on the wire.")]


Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds, after one that is thrown away.")]
Tokens = Annotated[int, typer.Option(min=3, help="Tokens per run.")]


def machine_options(memory: str, emulate: str) -> dict[str, Any]:
    """As machines take them; of the memory, what plans may count on."""
    from splitwise_llm.cost import HELD_BACK

    return {
        "memory_bytes": int((1 - HELD_BACK) * parse_bytes(memory)) if memory else None,
        "emulate": parse_emulation(emulate) if emulate else None,
    }


def valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the prompt is not valid UTF-8; convert it, for example with iconv -t UTF-8") from None
    return text


def read_prompt(text: str) -> str:
    if text != "-":
        return valid_text(text)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not valid UTF-8 ({error}); convert it with iconv -t UTF-8") from None


def pairs(items: list[str] | None, what: str, example: str) -> dict[str, str]:
    """`name=value` options as a mapping. Raises RequestError."""
    pairs: dict[str, str] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value or name in pairs:
            raise RequestError(f"{what} {item!r}: write name=value, each name once, as in {example}")
        pairs[name] = value
    return pairs


def two_names(pair: str) -> tuple[str, str]:
    first, plus, second = pair.partition("+")
    if not plus or not first or not second:
        raise RequestError(f"--direct {pair!r}: write two workers, as in cloud+third")
    return first, second


def write_json(path: Path | None, data: object) -> None:
    if path:
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def keep_records(path: Path | None, records: Iterable[RequestRecord] = ()) -> None:
    """Append a line of JSON per record, each without the machines' intervals; none: see that one could. Raises
    OSError."""
    if path:
        with path.open("a") as file:
            for record in records:
                file.write(json.dumps(record.to_dict(intervals=False), ensure_ascii=False) + "\n")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    out.print(f"... {text}", style="dim", markup=False)


async def until_told(stop_with_stdin: bool) -> None:
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


def run(work: Callable[[], Coroutine[Any, Any, R]], json_file: Path | None = None) -> R:
    """Run `work` to its end; Ctrl-C cancels it in order. The file for its result is tried before, not after."""
    if json_file:
        json_file.open("a").close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return asyncio.run(work())


def report(figures: Figures, json_file: Path | None) -> None:
    from splitwise_llm.report import figures_table

    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    out.print(figures_table(f"bench {figures.bench}", figures.figures, figures.notes))
    out.print(f"load average {load} on {os.cpu_count()} processors; {figures.settings}", markup=False)
    write_json(json_file, figures.to_dict())
