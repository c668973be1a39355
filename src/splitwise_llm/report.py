"""Tables and pictures from records, for a terminal or a file. It knows nothing that runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from splitwise_llm.cost import Price
from splitwise_llm.partition import Partition
from splitwise_llm.records import Event, RequestRecord, RunRecord
from splitwise_llm.units import show_bytes

_BLOCKS = " ░▒▓█"
_PLAIN = ".-=+#"
_LABEL = 12
_MARKS = {"runs": "─", "up": "━", "outages": "░✕▒", "there": "─", "doubt": "?", "away": "·", "tried": "|",
    "failed": "×", "back": "●", "filled": "▒", "levels": " ▁▂▃▄▅▆▇█"}  # fmt: skip
_PLAIN_MARKS = {"runs": "-", "up": "=", "outages": ":x%", "there": "-", "doubt": "?", "away": ".", "tried": "|",
    "failed": "x", "back": "o", "filled": "#", "levels": " .:-=+*#@"}  # fmt: skip
_OF_A_WORKER = ("suspect", "alive", "lost", "attempt", "unreached", "back", "gone")
_ATTEMPT = re.compile(r"attempt \d+ in ([\d.]+) s")


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which a link or a machine was broken on purpose (s, in a record's time)."""

    what: str
    start_s: float
    stop_s: float


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


def timeline(record: RequestRecord, outages: Sequence[Outage] = (), plain: bool = False, width: int = 100) -> str:
    """What happened to a request, time from left to right, a row each: tokens (higher: more of them), which partition
    ran, what was broken on purpose (if anything), each worker as the session saw it and the attempts to reach it
    again, and when positions were computed again. Below it, what the marks mean."""
    marks = _PLAIN_MARKS if plain else _MARKS
    end_s = max((*record.token_times_s, *(event.at_s for event in record.events)), default=0.0) or 1.0
    cells = width - _LABEL
    row = _Row(cells, end_s)
    counts = [0] * cells
    for at_s in record.token_times_s:
        counts[row.cell(at_s)] += 1
    top, levels = max((*counts, 1)), marks["levels"]
    lanes = [("tokens", "".join(levels[-(-count * (len(levels) - 1) // top)] for count in counts))]
    letters: dict[str, str] = {}
    for run in record.runs:
        if not _is_fill(run):
            letters.setdefault(run.partition, chr(ord("A") + len(letters) % 26))
    spans = [(start, stop, marks["runs"]) for _, start, stop in _run_spans(record)]
    lanes.append(("partition", row.drawn(" ", spans, ((at, letters[p]) for p, at, _ in _run_spans(record)))))
    legend = [f"partition    {', '.join(f'{letter} {text}' for text, letter in letters.items())}"]
    if outages:
        kinds = {what: marks["outages"][i % 3] for i, what in enumerate(dict.fromkeys(one.what for one in outages))}
        lanes.append(("link", row.drawn(marks["up"], ((one.start_s, one.stop_s, kinds[one.what]) for one in outages))))
        legend.append(f"link         {marks['up']} up, {', '.join(f'{mark} {what}' for what, mark in kinds.items())}")
    workers = dict.fromkeys(name for event in record.events for name, _ in _told_of(event))
    for name in workers:
        lanes += _worker_lanes(record, name, row, marks)
        legend.append(
            f"{name:<12.12} {marks['there']} there, {marks['doubt']} in doubt, {marks['away']} lost; attempts "
            f"{marks['tried']} made, {marks['failed']} failed, {marks['back']} back"
        )
    fills = [*_fill_spans(record)]
    if fills:
        lanes.append(("recomputed", row.drawn(" ", ((start, stop, marks["filled"]) for _, start, stop in fills))))
        again = ", ".join(f"{run.known - run.start} ({1e3 * (stop - start):.0f} ms)" for run, start, stop in fills)
        legend.append(f"recomputed   positions: {again}")
    ruler = " " * _LABEL + row.ruler()
    return "\n".join([*(f"{label:<{_LABEL}.{_LABEL - 1}}{lane}".rstrip() for label, lane in lanes), ruler, *legend])


@dataclass(frozen=True, slots=True)
class _Row:
    """A time axis of so many characters."""

    cells: int
    end_s: float

    def cell(self, at_s: float) -> int:
        return min(max(int(at_s / self.end_s * self.cells), 0), self.cells - 1)

    def drawn(
        self, ground: str, spans: Iterable[tuple[float, float, str]], points: Iterable[tuple[float, str]] = ()
    ) -> str:
        """Spans over a ground, then points over both; the later over the earlier."""
        drawn = [ground] * self.cells
        for start_s, stop_s, mark in spans:
            for cell in range(self.cell(start_s), self.cell(stop_s) + 1):
                drawn[cell] = mark
        for at_s, mark in points:
            drawn[self.cell(at_s)] = mark
        return "".join(drawn)

    def ruler(self) -> str:
        """Seconds, about every ten characters."""
        step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 500, 1e9) if self.cells * s / self.end_s >= 9)
        text = " " * self.cells
        for number in range(int(self.end_s / step) + 1):
            at, said = self.cell(number * step), f"{number * step:g} s" if number == 0 else f"{number * step:g}"
            if at + len(said) <= self.cells:
                text = text[:at] + said + text[at + len(said) :]
        return text.rstrip()


def _is_fill(run: RunRecord) -> bool:
    return run.why.startswith("fill")


def _run_spans(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Partition, begin and last token of every run that made tokens."""
    first = 0
    for run in record.runs:
        if run.tokens:
            first += run.tokens
            yield run.partition, run.at_s, record.token_times_s[min(first, len(record.token_times_s)) - 1]


def _fill_spans(record: RequestRecord) -> Iterator[tuple[RunRecord, float, float]]:
    """Everything that computed positions of the context again: fills, and runs that began with a prefill of it."""
    ends = [event.at_s for event in record.events if event.kind == "fill"]
    for run, end_s in zip((run for run in record.runs if _is_fill(run)), ends, strict=False):
        yield run, run.at_s, end_s
    made, times = 0, record.token_times_s
    for run in record.runs:
        if not _is_fill(run) and run.tokens:
            if made and run.start < run.known - 1:
                yield run, run.at_s, times[min(made, len(times) - 1)]
            made += run.tokens


def _told_of(event: Event) -> Iterator[tuple[str, str]]:
    """The worker that an event is about, and what is said of it; nothing for an event of another kind."""
    name, colon, text = event.text.partition(": ")
    if event.kind in _OF_A_WORKER and colon:
        yield name, text


def _worker_lanes(
    record: RequestRecord, name: str, row: _Row, marks: Mapping[str, str]
) -> list[tuple[str, str]]:  # fmt: skip
    """How the session saw a worker, and its attempts to reach it again. An attempt is made when its delay is over."""
    told = [(event, text) for event in record.events for who, text in _told_of(event) if who == name]
    states = {"suspect": "doubt", "alive": "there", "lost": "away", "back": "there", "gone": "away"}
    changes = [(event.at_s, marks[states[event.kind]]) for event, _ in told if event.kind in states]
    starts = [*(at_s for at_s, _ in changes[1:]), row.end_s]
    seen = row.drawn(marks["there"], ((at, until, mark) for (at, mark), until in zip(changes, starts, strict=False)))
    tries = [(event.at_s + _delay_s(text), marks["tried"]) for event, text in told if event.kind == "attempt"]
    tries += [(event.at_s, marks["failed"]) for event, _ in told if event.kind == "unreached"]
    tries += [(event.at_s, marks["back"]) for event, _ in told if event.kind == "back"]
    return [(name, seen), ("attempts", row.drawn(" ", (), tries))]


def _delay_s(text: str) -> float:
    found = _ATTEMPT.match(text)
    return float(found.group(1)) if found else 0.0


def happenings(record: RequestRecord, struck: Sequence[Event] = ()) -> str:
    """The events of a request as a list with times, what was done to it on purpose among them; attempts are counted,
    not listed."""
    lines: list[str] = []
    tries = 0
    for event in sorted([*record.events, *struck], key=lambda one: one.at_s):
        if event.kind in ("attempt", "unreached"):
            tries += event.kind == "attempt"
            continue
        after = f" ({tries} attempt{'s' if tries > 1 else ''})" if event.kind == "back" and tries else ""
        tries = 0 if event.kind == "back" else tries
        lines.append(f"{event.at_s:7.2f} s  {event.kind:<11} {event.text}{after}")
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
