"""Simulated requests: a scenario under a policy, and how fast the simulator is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import JsonFile, app, bench, note, out, report, tell
from splitwise_llm.cli.output import whole
from splitwise_llm.errors import SpecError

if TYPE_CHECKING:
    from splitwise_llm.sim.scenarios import Recordings

REPLAYED = ("requests", "TTFT ms", "ms/token", "total s", "p95 s", "device J", "moves")


@app.command()
def simulate(
    out_file: Annotated[Path, typer.Option("--out", help="Where to write a line of JSON per request.")],
    scenario: Annotated[
        str, typer.Option(help="As in flaky-wan; `splitwise bench scenarios` runs them all.", show_default=False)
    ] = "",
    from_records: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a scenario: what `generate --records` kept of live sessions; repeatable."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="Who decides, as in cloud-only, neurosurgeon or drift; splitwise:FILE, splitwise-paper:FILE with "
            "weights that `train` made, tuned:FILE with constants of `bench constants`.",
            show_default="drift; with --from-records only those who decided live",
        ),
    ] = "",
    case: Annotated[str, typer.Option(help="Device and model, as in orin-7b; default: the scenario's first.")] = "",
    traces: Annotated[
        Path | None, typer.Option(help="Folder of recorded links: manifest.csv, or *up*, and *down*, *rtt* if any.")
    ] = None,
    recording: Annotated[str, typer.Option(help="Which link of the folder, by its name; default: the first.")] = "",
    requests: Annotated[Path | None, typer.Option(help="Recorded requests (Azure CSV or Mooncake JSON lines).")] = None,
    cut_gaps: Annotated[bool, typer.Option("--cut-gaps", help="Leave out what recorders paused in.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    worlds: Annotated[int, typer.Option(min=1, max=4096, help="Traces: independent repetitions.")] = 8,
    requests_per_trace: Annotated[int, typer.Option(min=1, max=100_000, help="Per device.")] = 125,
    acceptance: Annotated[float, typer.Option(min=0.0, max=0.99, help="Of drafted tokens; assumed.")] = 0.6,
    plain: Annotated[bool, typer.Option(help="Without int8 wire, prefill chunks and drafts.")] = False,
) -> None:
    """Run a scenario under a policy, or live sessions again, and write what became of every request."""
    import numpy as np

    if from_records:
        if scenario or case or traces or requests or recording or cut_gaps or plain:
            raise SpecError(
                "--from-records brings requests, links and machines of its own; leave out --scenario, --case, "
                "--traces, --recording, --requests, --cut-gaps and --plain"
            )
        _replay(from_records, policy, out_file)
        return
    if not scenario:
        raise SpecError("nothing to simulate: give --scenario NAME, or --from-records FILE of live sessions")
    policy = policy or "drift"

    from splitwise_llm.bench.cells import TOOLS, Setting, Size
    from splitwise_llm.observation import PLAIN
    from splitwise_llm.policies.choosers import find_chooser
    from splitwise_llm.sim.draws import draw
    from splitwise_llm.sim.episode import simulate as run
    from splitwise_llm.sim.scenarios import TEST, find_scenario

    row = find_scenario(scenario)
    one = row.case(case or (row.cases[0].name if row.cases else ""))
    chooser = find_chooser(policy, PLAIN if plain else TOOLS, row.limits, arrivals_per_s=one.per_s)
    if (traces or requests or recording or cut_gaps) and not row.is_recorded:
        raise SpecError(
            f"scenario {row.name} draws its links and requests; --traces, --recording, --cut-gaps and --requests are "
            "for real-traces"
        )
    recordings = _recordings(traces, recording, requests, cut_gaps) if row.is_recorded else None
    with whole(out_file) as part:
        assert part is not None
        tell(f"plans for {row.name}.{one.name}")
        params = Setting(row, one, Size(worlds, requests_per_trace, 1), recordings, acceptance=acceptance).params
        tell(f"{worlds} traces of {requests_per_trace} requests for each of {params.num_devices} devices")
        begin = time.perf_counter()
        records = run(params, draw(params, TEST.seed + seed, range(worlds), requests_per_trace), chooser)
        with part.open("w") as file:
            records.write(file)
    counted = records.counted()
    total, joules = records.total_s[counted], records.device_j[counted]
    ttft = np.nanmean(records.ttft_s[counted])
    said = (
        f"{row.name}.{one.name} under {policy}: {counted.sum()} requests after warm-up",
        f"mean {total.mean():.3f} s, p95 {np.percentile(total, 95):.3f} s, ttft {ttft:.3f} s",
        f"{np.nanmean(joules):.1f} J on the device (modelled), {records.moves[counted].sum()} moves",
        f"{records.decisions} decisions in {time.perf_counter() - begin:.1f} s; records in {out_file}",
    )
    out.print("\n".join(said), markup=False)


def _replay(files: Sequence[Path], policy: str, out_file: Path) -> None:
    """Play live sessions again, print means beside what was measured, and write every request. Raises UserError."""
    from rich.table import Column, Table

    from splitwise_llm.bench.replaying import compare
    from splitwise_llm.sim.replay import courses_from_records

    with whole(out_file) as part:
        assert part is not None
        courses = courses_from_records(files)
        for course in courses:
            link = course.scenario.link.classes[0]
            lost_s = sum(stop - start for start, stop in course.outages)
            tell(
                f"{course.name}: {len(course.requests)} requests in {course.recordings.up.period_s:.1f} s; link rtt "
                f"{1e3 * link.rtt_s:.1f} ms, {8e-6 * link.up_bytes_per_s:.1f} Mbit/s up and "
                f"{8e-6 * link.down_bytes_per_s:.1f} down (medians), silent for {lost_s:.1f} s"
            )
        compared = compare(courses, policy)
        with part.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in compared.lines())
    for name, why in compared.unplanned.items():
        note(f"{name} is not played again: {why}")
    table = Table("", *(Column(head, justify="right") for head in REPLAYED))
    for row in compared.rows:
        figures = (1e3 * row.ttft_s, 1e3 * row.tpot_s, row.total_s, row.p95_s, row.device_j)
        shown = [f"{value:.4g}" if math.isfinite(value) else "-" for value in figures]
        table.add_row(row.name, str(row.requests), *shown, str(row.moves))
    out.print(table)
    out.print(f"means; per request in {out_file}", markup=False)


def _recordings(traces: Path | None, recording: str, requests: Path | None, cut_gaps: bool) -> Recordings:
    """One link of a folder with the requests in a file. Raises SpecError that says what is missing."""
    from splitwise_llm.sim.recordings import link_files, named, read_recordings

    if traces is None or requests is None:
        raise SpecError("this scenario replays recordings: give --traces DIR and --requests FILE")
    files = link_files(traces)
    one = named(files, recording)
    tell(f"the link is {one.name}, one of {len(files)} (--recording): {one.text}")
    return read_recordings([one], requests, cut_gaps=cut_gaps)[0]


@bench.command("simulator")
def bench_simulator(
    worlds: Annotated[int, typer.Option(min=1, help="Worlds side by side.")] = 512,
    requests: Annotated[int, typer.Option(min=1, help="Per world; ten times as many where there is one world.")] = 30,
    states: Annotated[int, typer.Option(min=1, help="Random states to decide together and one by one.")] = 10_000,
    json_file: JsonFile = None,
) -> None:
    """Decisions and events per second with drift plus penalty in the loop, batched and not, and that both agree."""
    from splitwise_llm.bench.simulator import run_simulator

    with whole(json_file) as part:
        report(run_simulator(worlds, requests, states, tell), part)


__all__ = ["bench_simulator", "simulate"]
