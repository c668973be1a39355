"""Simulated requests: a scenario under a policy, and how fast the simulator is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import JsonFile, app, bench, out, report, tell
from splitwise_llm.errors import SpecError

if TYPE_CHECKING:
    from splitwise_llm.sim.scenarios import Recordings


@app.command()
def simulate(
    scenario: Annotated[str, typer.Option(help="As in flaky-wan; `splitwise bench scenarios` runs them all.")],
    out_file: Annotated[Path, typer.Option("--out", help="Where to write a line of JSON per request.")],
    policy: Annotated[str, typer.Option(help="Who decides, as in cloud-only, neurosurgeon or drift.")] = "drift",
    case: Annotated[str, typer.Option(help="Device and model, as in orin-7b; default: the scenario's first.")] = "",
    traces: Annotated[
        Path | None, typer.Option(help="Folder of recorded links: *up*, and *down*, *rtt* if any.")
    ] = None,
    requests: Annotated[Path | None, typer.Option(help="Recorded requests (Azure CSV or Mooncake JSON lines).")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1)] = 0,
    worlds: Annotated[int, typer.Option(min=1, max=4096, help="Traces: independent repetitions.")] = 8,
    requests_per_trace: Annotated[int, typer.Option(min=1, max=100_000, help="Per device.")] = 125,
    acceptance: Annotated[float, typer.Option(min=0.0, max=0.99, help="Of drafted tokens; assumed.")] = 0.6,
    plain: Annotated[bool, typer.Option(help="Without int8 wire, prefill chunks and drafts.")] = False,
) -> None:
    """Run a scenario under a policy and write what became of every request."""
    import numpy as np

    from splitwise_llm.bench.cells import TOOLS, Setting, Size
    from splitwise_llm.observation import PLAIN
    from splitwise_llm.policies.choosers import find_chooser
    from splitwise_llm.sim.draws import draw
    from splitwise_llm.sim.episode import simulate as run
    from splitwise_llm.sim.scenarios import TEST, find_scenario

    row = find_scenario(scenario)
    one = row.case(case or (row.cases[0].name if row.cases else ""))
    chooser = find_chooser(policy, PLAIN if plain else TOOLS, row.limits, arrivals_per_s=one.per_s)
    if (traces or requests) and not row.is_recorded:
        raise SpecError(
            f"scenario {row.name} draws its links and requests; --traces and --requests are for real-traces"
        )
    recordings = read_recordings(traces, requests) if row.is_recorded else None
    with out_file.open("w") as file:
        tell(f"plans for {row.name}.{one.name}")
        params = Setting(row, one, Size(worlds, requests_per_trace, 1), recordings, acceptance=acceptance).params
        tell(f"{worlds} traces of {requests_per_trace} requests for each of {params.num_devices} devices")
        begin = time.perf_counter()
        records = run(params, draw(params, TEST.seed + seed, range(worlds), requests_per_trace), chooser)
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


def read_recordings(traces: Path | None, requests: Path | None) -> Recordings:
    """The links in a folder and the requests in a file. Raises SpecError that says what is missing."""
    from splitwise_llm.sim.scenarios import Recordings
    from splitwise_llm.traces import read_rtt, read_trace
    from splitwise_llm.workload import read_requests

    if traces is None or requests is None:
        raise SpecError("this scenario replays recordings: give --traces DIR and --requests FILE")
    if not traces.is_dir():
        raise SpecError(f"{traces} is no folder; give one that holds link traces (*up*, and *down* and *rtt* if any)")
    found = {name: sorted(path for path in traces.iterdir() if name in path.name) for name in ("up", "down", "rtt")}
    if not found["up"]:
        raise SpecError(f"{traces} has no file with 'up' in its name; put an uplink trace there, as in lte.up")
    return Recordings(
        read_requests(requests),
        read_trace(found["up"][0], "up", gaps="cut"),
        read_trace(found["down"][0], "down", gaps="cut") if found["down"] else None,
        read_rtt(found["rtt"][0], gaps="cut") if found["rtt"] else None,
    )


@bench.command("simulator")
def bench_simulator(
    worlds: Annotated[int, typer.Option(min=1, help="Worlds side by side.")] = 512,
    requests: Annotated[int, typer.Option(min=1, help="Per world; ten times as many where there is one world.")] = 30,
    states: Annotated[int, typer.Option(min=1, help="Random states to decide together and one by one.")] = 10_000,
    json_file: JsonFile = None,
) -> None:
    """Decisions and events per second with drift plus penalty in the loop, batched and not, and that both agree."""
    from splitwise_llm.bench.simulator import run_simulator

    if json_file:
        json_file.open("a").close()
    report(run_simulator(worlds, requests, states, tell), json_file)


__all__ = ["bench_simulator", "read_recordings", "simulate"]
