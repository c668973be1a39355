"""`bench live`: running sessions under a policy beside the simulator, on the same link and the same requests.

Devices and worker are processes that play emulated machines; the link of each is shaped by the same trace, in which
there is an outage. The simulator is given what the live side is given, and nothing that came out of it. Nothing here
knows how a policy decides.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.live_client import NAMES, Answered, Asked, Client, decides, run_client
from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import IDLE, UNLIMITED, Drafter, Host, Job, Table, World, bill, memory_bytes, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import BrokenInvariant, RequestError
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.observation import Chooser, Policy, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.network import Network
from splitwise_llm.policies.one_session import seek
from splitwise_llm.sim.draws import Traces, draw
from splitwise_llm.sim.episode import Run
from splitwise_llm.sim.params import Arrivals, LinkClass, LinkProcess, Params, Seeing, SharedCloud
from splitwise_llm.sim.paths import Path as Rows
from splitwise_llm.sim.paths import link_rows
from splitwise_llm.sim.physics import Physics
from splitwise_llm.sim.state import FREE
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights, find_device, find_model
from splitwise_llm.traces import RateTrace
from splitwise_llm.wire.shaper import LinkShape

Floats = NDArray[np.float64]
Tell = Callable[[str], None]

TOOLS = Tools((WirePrecision.FP32,))
CLOUD = "a100"
DEVICE = DeviceSpec(
    "emulated-device", 1e10, 1e8, 1e9, launch_s=2e-4, idle_w=2.0, decode_w=6.0, prefill_w=8.0
)  # fmt: skip
WORKER = DeviceSpec(
    "emulated-worker", 1e11, 3.5e8, 3e9, launch_s=2e-4, idle_w=50.0, decode_w=150.0, prefill_w=200.0, slots=8
)  # fmt: skip
"""About 0.25 and 0.07 s per token of the bundled model: time goes several times as slowly as with a 7B on an Orin NX
and on a server, so that what this computer adds to both is small beside it."""
DETECTION_S = 0.9
"""Until the engine takes a silent link for a dead one (docs/recovery.md)."""
OPENING_TRIPS = 4.0
"""Round trips before the first frame of a session: 3 to 5 (docs/live.md)."""
GOOD, POOR = 2.5e6, 2.5e5
"""Bytes/s of the generated link, both ways."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run. Seconds, tokens."""

    seconds: float = 600.0
    """In which requests come."""
    clients: int = 3
    per_s: float = 0.06
    """Requests of each."""
    prompt_tokens: int = 64
    new_tokens: tuple[int, ...] = (48, 80)
    rtt_s: float = 0.06
    outage_every_s: float = 120.0
    outage_s: float = 8.0
    model: str = "bundled"
    seed: int = 1

    @classmethod
    def quick(cls) -> Setting:
        """A minute, with one outage."""
        return cls(seconds=60.0, per_s=0.08, outage_every_s=60.0)


@dataclass(slots=True)
class Compared:
    """Both sides: per request, in the same order, and how many sessions ran in which way, second by second."""

    setting: Setting
    policy: str
    requests: tuple[tuple[Asked, ...], ...]
    live: tuple[tuple[Answered, ...], ...]
    simulated_s: tuple[tuple[float, ...], ...]
    live_modes: dict[str, list[int]]
    simulated_modes: dict[str, list[int]]
    outages: list[tuple[float, float]]
    figures: Figures
    cells: list[CellRun] = field(default_factory=list)

    def add_cells(self, cells: Sequence[CellRun]) -> None:
        """Runs of single cells, to be told with the rest."""
        self.cells += cells
        for one in cells:
            ratio = one.live_s / one.simulated_s
            self.figures.add(f"{one.device} {one.model} over simulated", ratio, f"{one.partition}, {one.live_s:.3g} s")

    def modes_text(self) -> Iterator[str]:
        """Second by second, what most requests ran on: E the device, C the worker, S both, . nothing, x an outage."""
        yield "modes, a letter per second: E device, C worker, S both, x outage"
        seconds = range(len(self.live_modes["edge"]))
        out = "".join("x" if any(a <= second < b for a, b in self.outages) else " " for second in seconds)
        for start in range(0, len(seconds), 60):
            for name, line in (
                ("link", out), ("live", _letters(self.live_modes)), ("simulated", _letters(self.simulated_modes))
            ):  # fmt: skip
                yield f"{start:4d} s {name:>9} {line[start : start + 60]}"

    def to_dict(self) -> dict[str, object]:
        """For `--json`."""
        return self.figures.to_dict() | {
            "policy": self.policy,
            "outages_s": self.outages,
            "cells": [asdict(one) for one in self.cells],
            "live_modes": self.live_modes,
            "simulated_modes": self.simulated_modes,
            "requests": [
                [
                    asdict(one) | {"live": asdict(answer), "simulated_s": simulated}
                    for one, answer, simulated in zip(*of_client, strict=True)
                ]
                for of_client in zip(self.requests, self.live, self.simulated_s, strict=True)
            ],
        }


def _letters(modes: dict[str, list[int]]) -> str:
    rows = zip(modes["edge"], modes["cloud"], modes["split"], strict=True)
    return "".join("ECS"[row.index(max(row))] if any(row) else "." for row in rows)


def trace(setting: Setting) -> RateTrace:
    """The link of every device, generated: good and poor in turn, and silent in the last part of each lap."""
    dice, times, rates, at_s = random.Random(setting.seed), [0.0], [GOOD], 0.0
    end_s = setting.seconds + setting.outage_every_s
    while True:
        lap_s = at_s + setting.outage_every_s
        out_s = lap_s - setting.outage_s - 0.2 * setting.outage_every_s
        while (at_s := at_s + dice.uniform(5.0, 25.0)) < out_s - 2.0:
            times.append(at_s)
            rates.append(POOR if rates[-1] == GOOD else GOOD)
        times += [out_s, out_s + setting.outage_s]
        rates += [0.0, GOOD]
        at_s = out_s + setting.outage_s
        if at_s >= end_s:
            return RateTrace(tuple(times), tuple(rates), at_s + 60.0)
        at_s = max(at_s, lap_s - 1.0)


def draw_requests(setting: Setting) -> tuple[tuple[Asked, ...], ...]:
    """Of each client: Poisson, the same for the same seed; at least one."""
    found = []
    for client in range(setting.clients):
        dice, at_s, of_client = random.Random(f"{setting.seed}/{client}"), 0.0, list[Asked]()
        while (at_s := at_s + dice.expovariate(setting.per_s)) < setting.seconds or not of_client:
            of_client.append(
                Asked(min(at_s, setting.seconds), setting.prompt_tokens, dice.choice(setting.new_tokens))
            )  # fmt: skip
        found.append(tuple(of_client))
    return tuple(found)


def outages(link: RateTrace) -> list[tuple[float, float]]:
    """(start, end) of silences."""
    ends = (*link.times_s[1:], link.period_s)
    return [(a, b) for a, b, rate in zip(link.times_s, ends, link.bytes_per_s, strict=True) if not rate]


def run_live(setting: Setting, policy: str, tell: Tell, weights: Network | None = None) -> Compared:
    """The live run, then the simulated one. Raises UserError, BrokenInvariant where a client died."""
    link, requests = trace(setting), draw_requests(setting)
    shape = LinkShape(link, link, setting.rtt_s / 2)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        file = Path(place) / "worker.json"
        file.write_text(json.dumps(asdict(WORKER)))
        tell("starting the worker")
        cloud = stack.enter_context(worker(setting.model, "--emulate", str(file)))
        clients = [
            Client(setting.model, cloud.address, DEVICE, shape, policy, weights, UNLIMITED, TOOLS, of_client)
            for of_client in requests
        ]
        count = sum(map(len, requests))
        tell(f"{setting.clients} clients, {count} requests within {setting.seconds:.0f} s, live")
        neighbours = Neighbours((cloud.process.pid,))
        live = play(clients, setting.seconds)
        foreign = neighbours.share
    tell("the same in the simulator")
    totals, modes = simulated(setting, decides(policy, weights), link, requests)
    figures = Figures("live", asdict(setting))
    summarise(figures, live, totals)
    figures.add("foreign_share", foreign, "of the processors, by other programs, the clients included")
    mine = live_modes(live, setting)
    figures.add("same_mode_share", agreement(mine, modes), "of the seconds with requests on both sides: the same ways")
    return Compared(
        setting, policy, requests, live, totals, mine, modes, outages(link), figures
    )  # fmt: skip


def play(clients: Sequence[Client], seconds: float) -> tuple[tuple[Answered, ...], ...]:
    """Every client as a process; they begin together. Raises BrokenInvariant where one dies."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(len(clients))
    started: list[tuple[BaseProcess, Connection]] = []
    try:
        for client in clients:
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=run_client, args=(client, ready, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, mine))
        said = []
        for number, (_, mine) in enumerate(started):
            if not mine.poll(seconds * 3 + 300.0):
                raise BrokenInvariant(f"client {number} has not answered in {seconds * 3 + 300:.0f} s")
            said.append(mine.recv())
        for number, one in enumerate(said):
            if isinstance(one, str):
                raise BrokenInvariant(f"client {number} of the bench died: {one}")
        return tuple(map(tuple, said))
    finally:
        for running, mine in started:
            mine.close()
            running.join(5.0)
            if running.is_alive():
                running.terminate()


# The same, simulated


def table_for(spec: ModelSpec, link: LinkSpec, job: Job) -> Table:
    """The plans that a live session would choose among."""
    world = World(spec, (Host(DEVICE, Dtype.FP32), Host(WORKER, Dtype.FP32)), {(0, 1): link}, drafter=Drafter(0.0))
    return Table(world, [bill(world, one, job) for one in seek(world, job, TOOLS, UNLIMITED, IDLE)])


def simulated(
    setting: Setting, policy: Policy, link: RateTrace, requests: Sequence[Sequence[Asked]]
) -> tuple[tuple[tuple[float, ...], ...], dict[str, list[int]]]:
    """Seconds of each request, and the ways of running, second by second."""
    spec = Checkpoint(locate(setting.model)).architecture.spec
    mean = LinkSpec(setting.rtt_s, GOOD, GOOD)
    job = Job(setting.prompt_tokens, round(sum(setting.new_tokens) / len(setting.new_tokens)))
    table = table_for(spec, mean, job)
    params = Params(
        physics=Physics([table]),
        link=LinkProcess(
            (LinkClass.of(mean),),
            up=link,
            down=link,
            step_s=0.5,
            idle_after_s=1e-3,
            wake_s=OPENING_TRIPS * setting.rtt_s,
        ),
        cloud=SharedCloud(WORKER.slots),
        arrivals=Arrivals(setting.per_s, prompt_tokens=setting.prompt_tokens, output_tokens=job.tokens_out),
        seeing=Seeing(delay_s=DETECTION_S, outage_guess_s=setting.outage_s),
        penalty=Penalty(t_ref_s=float(table.at(table.world.conditions()).total_s.min())),
        num_devices=setting.clients,
        horizon_s=max(3600.0, 2 * setting.seconds),
    )
    traces = _traces(params, setting, requests)
    if isinstance(policy, Splitwise):
        chooser: Chooser = policy.chooser(TOOLS, UNLIMITED, Budgets(), 1.0, 0.0)
    else:
        chooser = find_chooser(str(getattr(policy, "name", "")), TOOLS, UNLIMITED)
    run = Run.begin(params, traces, chooser)
    seen: dict[str, list[int]] = {mode: [0] * (int(setting.seconds) + 1) for mode in ("edge", "cloud", "split")}
    second = 0
    while not run.state.is_over.all():
        run.ask()
        until_now = _running(params, run)
        run.advance()
        while second <= setting.seconds and second < run.state.now[0]:
            for mode, count in until_now.items():
                seen[mode][second] = count
            second += 1
    totals = run.records.total_s[0]
    return tuple(
        tuple(totals[d, : len(of_client)].tolist()) for d, of_client in enumerate(requests)
    ), seen  # fmt: skip


def _running(params: Params, run: Run) -> dict[str, int]:
    """Requests in flight by way of running."""
    s, physics = run.state, params.physics
    busy = s.phase[0] != FREE
    rows = s.plan[0][busy]
    device, cloud = physics.uses_device[rows], physics.uses_cloud[rows]
    kinds = {"edge": device & ~cloud, "cloud": cloud & ~device, "split": device & cloud}
    return {mode: int(which.sum()) for mode, which in kinds.items()}


def _traces(params: Params, setting: Setting, requests: Sequence[Sequence[Asked]]) -> Traces:
    """Drawn, and then the very requests and the very link, from its beginning. Clients with fewer requests get some
    that come when all is over, and count for nothing."""
    most = max(map(len, requests))
    traces = draw(params, setting.seed, (0,), most)
    arrival, output = np.zeros((1, setting.clients, most)), np.ones((1, setting.clients, most), np.int64)
    for d, of_client in enumerate(requests):
        late = [setting.seconds * 1.5 + n for n in range(most - len(of_client))]
        arrival[0, d] = [*(one.at_s for one in of_client), *late]
        output[0, d] = [*(one.new_tokens for one in of_client), *(1 for _ in late)]
    starts, meaning = link_rows(params)
    times = np.array([start for start, _ in starts])
    rows = np.array([row for _, row in starts[:-1]])
    shape = (1, setting.clients)
    return replace(
        traces, arrival_s=arrival, output_tokens=output, predicted_tokens=output.astype(np.float64), link_rows=meaning,
        link=Rows(np.tile(times, (*shape, 1)), np.tile(rows, (*shape, 1))),
    )  # fmt: skip


# One request per device and model


CELLS = tuple((device, model) for device in ("orin-nx", "s23", "pi5") for model in ("gpt2-xl", "llama-7b", "llama-13b"))
CELL_LINK = LinkSpec(0.01, 2.5e6, 5e6)
CELL_JOB = Job(64, 64)
CELL_STEP_S = 0.08
"""What a token takes the server at the least, live. Time goes more slowly for that, but no more: the engine's own
times, such as the half second that it waits for a greeting, stay as they are."""


@dataclass(frozen=True, slots=True)
class CellRun:
    """A cell that was run live. Seconds are those of the real machines: what was measured is divided by `dilation`.
    Both are from the first frame of the session on; `open_s` came before."""

    device: str
    model: str
    partition: str
    dilation: float
    live_s: float
    simulated_s: float
    open_s: float
    events: tuple[str, ...]


def scaled(real: Host, spec: ModelSpec, small: ModelSpec, job: Job, dilation: float) -> DeviceSpec:
    """The device on which a small model takes `dilation` times as long as the real one on the real device, for a prompt
    and for a token, with room for the same share of it."""
    device = replace(real.device, launch_s=0.0, battery_j=None)
    one = Host(device, Dtype.FP32)
    prompt_s = dilation * real.model_s(spec, job.prompt_tokens, job.prompt_tokens)
    token_s = dilation * real.model_s(spec, 1, job.mean_context)
    computing = Host(replace(device, memory_bytes_per_s=1e17), Dtype.FP32)
    reading = Host(replace(device, flop_per_s=1e17), Dtype.FP32)
    flop_s = computing.model_s(small, job.prompt_tokens, job.prompt_tokens)
    read_s = reading.model_s(small, 1, job.mean_context)
    whole, part = (
        memory_bytes(World(model, (host,)), Partition.all_on(model, 0), 0, job, None)
        for model, host in ((spec, real), (small, one))
    )
    return replace(
        device, name=f"{device.name}, played", flop_per_s=device.flop_per_s * flop_s / prompt_s,
        memory_bytes_per_s=device.memory_bytes_per_s * read_s / token_s,
        memory_bytes=device.memory_bytes * part / whole, message_s=0.0, token_s=0.0,
    )  # fmt: skip


def run_cells(
    policy: str, tell: Tell, weights: Network | None = None, cells: Sequence[tuple[str, str]] = CELLS
) -> list[CellRun]:
    """One live request of each cell, on a small model that plays it; those where nothing is admissible are left out."""
    found = []
    for device, model in cells:
        one = _run_cell(device, model, policy, weights)
        if one is None:
            tell(f"{device}, {model}: nothing is admissible")
            continue
        tell(
            f"{device}, {model}: {one.partition}, {one.live_s:.2f} s live, {one.simulated_s:.2f} s simulated "
            f"(time goes {one.dilation:.2g} times as slowly)"
        )
        found.append(one)
    return found


def _run_cell(device: str, model: str, policy: str, weights: Network | None) -> CellRun | None:
    spec, small = find_model(model), Checkpoint(locate("bundled")).architecture.spec
    near, far = Host(find_device(device), Dtype.FP16, Weights.INT4), Host(find_device(CLOUD), Dtype.FP16)
    world = World(spec, (near, far), {(0, 1): CELL_LINK})
    try:
        seek(world, CELL_JOB, Tools((WirePrecision.FP16,)), UNLIMITED, IDLE)
    except RequestError:
        return None
    dilation = max(CELL_STEP_S / far.model_s(spec, 1, CELL_JOB.mean_context), 1.0)
    ratio = WirePrecision.FP32.payload_bytes(1, small.d_model) / WirePrecision.FP16.payload_bytes(1, spec.d_model)
    link = LinkSpec(
        dilation * CELL_LINK.rtt_s, CELL_LINK.up_bytes_per_s * ratio / dilation,
        CELL_LINK.down_bytes_per_s * ratio / dilation,
    )  # fmt: skip
    played = [scaled(host, spec, small, CELL_JOB, dilation) for host in (near, far)]
    shape = LinkShape(
        RateTrace.constant(link.up_bytes_per_s), RateTrace.constant(link.down_bytes_per_s), link.rtt_s / 2
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        file = Path(place) / "worker.json"
        file.write_text(json.dumps(asdict(played[1])))
        cloud = stack.enter_context(worker("bundled", "--emulate", str(file)))
        asked = Asked(0.1, CELL_JOB.prompt_tokens, CELL_JOB.tokens_out)
        client = Client("bundled", cloud.address, played[0], shape, policy, weights, UNLIMITED, TOOLS, (asked,))
        (answered,) = play([client], 60.0)[0]
    if answered.error:
        raise BrokenInvariant(f"{device}, {model}: {answered.error}")
    there = World(small, tuple(Host(one, Dtype.FP32) for one in played), {(0, 1): link})
    ran = Partition.parse(answered.partition, small, NAMES)
    expected_s, live_s = price(there, Decision(ran), CELL_JOB).total_s, answered.total_s - answered.open_s
    return CellRun(
        device, model, answered.partition, dilation, live_s / dilation, expected_s / dilation,
        answered.open_s / dilation, answered.events,
    )  # fmt: skip


# Beside each other


def live_modes(live: Sequence[Sequence[Answered]], setting: Setting) -> dict[str, list[int]]:
    """Sessions by way of running at each full second."""
    found = {mode: [0] * (int(setting.seconds) + 1) for mode in ("edge", "cloud", "split")}
    for of_client in live:
        for one in of_client:
            end_s = one.at_s + one.total_s
            ends = [*(stretch.at_s for stretch in one.stretches[1:]), end_s]
            for stretch, stop_s in zip(one.stretches, ends, strict=True):
                for second in range(max(int(np.ceil(stretch.at_s)), 0), min(int(stop_s), int(setting.seconds)) + 1):
                    found[stretch.mode][second] += 1
    return found


def agreement(one: dict[str, list[int]], other: dict[str, list[int]]) -> float:
    """Of the sessions at seconds in which there are some on both sides, the share in the same way of running."""
    same = total = 0
    for counts in zip(*(one[mode] for mode in one), *(other[mode] for mode in one), strict=True):
        a, b = counts[: len(one)], counts[len(one) :]
        if sum(a) and sum(b):
            same += sum(min(x / sum(a), y / sum(b)) for x, y in zip(a, b, strict=True)) > 0.5
            total += 1
    return same / total if total else float("nan")


def summarise(figures: Figures, live: Sequence[Sequence[Answered]], simulated_s: Sequence[Sequence[float]]) -> None:
    """Means and 95th percentiles of both sides, and how far they are apart."""
    mine = np.array([one.total_s for of_client in live for one in of_client])
    theirs = np.array([seconds for of_client in simulated_s for seconds in of_client])
    figures.add("requests", len(mine))
    figures.add("failed", sum(bool(one.error) for of_client in live for one in of_client), "must be 0")
    for name, value in (("mean", np.mean), ("p95", lambda x: np.quantile(x, 0.95)), ("p50", np.median)):
        a, b = float(value(mine)), float(value(theirs))
        figures.add(f"live_{name}_s", a)
        figures.add(f"simulated_{name}_s", b)
        figures.add(f"{name}_over_simulated", a / b, "bar: 0.9 to 1.1" if name != "p50" else "")
    figures.add("open_s", float(np.mean([one.open_s for of_client in live for one in of_client])), "not simulated")
    moves = [max(len(one.stretches) - 1, 0) for of_client in live for one in of_client]
    figures.add("live_moves", sum(moves))


__all__ = ["Compared", "Setting", "agreement", "run_live", "trace"]
