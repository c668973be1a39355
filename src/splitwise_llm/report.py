"""Tables and pictures from records, for a terminal or a file. It knows nothing that runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from splitwise_llm.cost import Price
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.units import show_bytes

_BLOCKS = " ░▒▓█"
_PLAIN = ".-=+#"


def partition_picture(partition: Partition, names: Sequence[str], plain: bool = False) -> str:
    """Layers from left to right, machines from top to bottom; each layer has a cell for its attention and one for
    its FFN, darker the more of it a machine runs. E and H mark embedding and head."""
    shades = _PLAIN if plain else _BLOCKS
    used = partition.machines
    width = max(len(names[machine]) for machine in used)
    numbers = "".join(f"{layer:<3}" for layer in range(len(partition.layers)))
    lines = [" " * (width + 3) + numbers.rstrip()]
    for machine in used:
        cells = ""
        for half in range(2 * len(partition.layers)):
            share = len(partition.units_on(machine, half)) / len(partition.owners(half))
            cells += shades[0 if share == 0 else max(1, round(share * (len(shades) - 1)))]
            cells += " " if half % 2 else ""
        embed = "E" if partition.embed == machine else " "
        head = "H" if partition.head == machine else " "
        lines.append(f"{names[machine]:>{width}} {embed} {cells}{head}".rstrip())
    return "\n".join(lines)


def requests_table(records: Mapping[str, RequestRecord], reference: Sequence[int]) -> Table:
    """One row per mode: times, round trips, payload, memory, and whether the tokens equal the reference's."""
    emulated = any(record.is_emulated for record in records.values())
    table = Table(title="emulated machines" if emulated else None, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("mode", no_wrap=True)
    machines = list(dict.fromkeys(machine.name for record in records.values() for machine in record.machines))
    memories = [f"{name}\npeak" for name in machines]
    for column in ("TTFT", "ms/\ntoken", "trips/\ntoken", "up", "down", *memories, "same\ntokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for mode, record in records.items():
        peaks = {machine.name: f"{machine.peak_memory_bytes / 1e6:.0f} MB" for machine in record.machines}
        table.add_row(
            mode,
            f"{1e3 * record.ttft_s:.0f} ms",
            f"{1e3 * record.tpot_s:.2f}",
            f"{record.round_trips_per_token:g}",
            show_bytes(record.up_bytes),
            show_bytes(record.down_bytes),
            *(peaks.get(name, "-") for name in machines),
            "yes" if tuple(record.token_ids) == tuple(reference) else "NO",
        )
    return table


def plans_table(rows: Mapping[str, tuple[str, Price] | str], best_s: float) -> Table:
    """One row per planner: its plan, what that takes, and its total time over that of the best; or, for a planner
    without a plan, what forbids it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("planner", no_wrap=True)
    table.add_column("chooses", overflow="fold")
    for column in ("TTFT", "ms/\ntoken", "total", "x best", "device\nJ", "all\nJ", "nats", "USD per\n1000"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        if isinstance(row, str):
            table.add_row(name, row)
            continue
        plan, price = row
        table.add_row(
            name, plan, seconds_text(price.ttft_s), f"{1e3 * price.tpot_s:.2f}", seconds_text(price.total_s),
            f"{price.total_s / best_s:.2f}", f"{price.device_j:.3g}", f"{price.total_j:.3g}", f"{price.nats:.3g}",
            f"{1e3 * price.usd:.3g}",
        )  # fmt: skip
    return table


def flips_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """What would change the choice: a figure and its value, and the nearest flip below and above it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("is", justify="right", no_wrap=True)
    table.add_column("the choice becomes, when it falls", overflow="fold")
    table.add_column("when it rises", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def seconds_text(seconds: float) -> str:
    """`0.4 ms`, `412 ms` or `2.35 s`, for people."""
    if seconds >= 1:
        return f"{seconds:.4g} s"
    return f"{1e3 * seconds:.3g} ms"


def figures_table(title: str, figures: Mapping[str, float], notes: Mapping[str, str] | None = None) -> Table:
    """Short names and numbers of a bench, with a remark each."""
    table = Table(title=title)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}", (notes or {}).get(name, ""))
    return table


def claims_table(rows: Sequence[tuple[str, str, bool | None, str]]) -> Table:
    """(scenario, what must come out, whether it did, the figures): None is "not decided"."""
    table = Table(title="what must come out", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("scenario", "claim", "holds", "measured"):
        table.add_column(column)
    words = {True: "yes", False: "NO", None: "-"}
    for scenario, text, holds, measured in rows:
        table.add_row(scenario, text, words[holds], measured)
    return table
