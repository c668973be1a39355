"""Many devices on one worker: what they get together, how evenly, in what memory, and what is said to one too many."""

from __future__ import annotations

import asyncio
import random
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from splitwise_llm import cost
from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.overhead import NO_WORDS, PROMPT, Tell
from splitwise_llm.bench.processes import Child, worker
from splitwise_llm.bench.random_models import OVERHEAD_LLAMA, make_model
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.errors import BrokenInvariant, WorkerFailed
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, ModelSpec

CLOUD, U_SHAPE = "all:cloud", "edge[0:1] cloud[1:{0}] edge[{0}:{1}]"
SESSIONS, MANY = 8, 64
HALF_LOAD_REQUESTS = 40
STARVED = 10.0
"""A session starves when it waits for a token so many times as long as a token takes on average in its run."""
LONG_PROMPT, ENDLESS = 640, 900


@dataclass(frozen=True, slots=True)
class Run:
    """One generation: when it was asked for and when its tokens came (s, monotonic clock)."""

    asked_s: float
    came_s: tuple[float, ...]

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first."""
        return (self.came_s[-1] - self.came_s[0]) / (len(self.came_s) - 1)

    @property
    def gaps_s(self) -> list[float]:
        """From token to token."""
        return [after - before for before, after in zip(self.came_s, self.came_s[1:], strict=False)]


async def _generate(edge: Edge, partition: str, tokens: int, prompt: Sequence[int]) -> Run:
    asked_s, came_s = time.monotonic(), list[float]()
    async with edge.generate(prompt, partition, max_new_tokens=tokens, stop_ids=()) as generation:
        async for _ in generation:
            came_s.append(time.monotonic())
    return Run(asked_s, tuple(came_s))


async def _together(edge: Edge, partition: str, tokens: int, sessions: int) -> list[Run]:
    """So many sessions that begin at once; their prompts differ."""
    prompts = [[(token + 7 * number) % 1000 for token in PROMPT] for number in range(sessions)]
    tasks = [asyncio.create_task(_generate(edge, partition, tokens, prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:  # or what is left of them would outlive the machine
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _rate(runs: Sequence[Run]) -> float:
    """Tokens per second of all while all of them decode: after the last first token, until the first is done."""
    start_s, stop_s = max(run.came_s[0] for run in runs), min(run.came_s[-1] for run in runs)
    if stop_s <= start_s:
        raise BrokenInvariant("the sessions did not decode at the same time; ask for more tokens")
    return sum(start_s < at_s <= stop_s for run in runs for at_s in run.came_s) / (stop_s - start_s)


def _whole_rate(runs: Sequence[Run]) -> float:
    """The same from the first request to the last token, prompts and all."""
    first_s, last_s = min(run.asked_s for run in runs), max(run.came_s[-1] for run in runs)
    return sum(len(run.came_s) for run in runs) / (last_s - first_s)


def starved(runs: Sequence[Run], tokens: int) -> int:
    """Sessions that did not get all their tokens, or waited for one `STARVED` times as long as tokens take on
    average."""
    mean_s = statistics.mean(gap for run in runs for gap in run.gaps_s)
    return sum(len(run.came_s) < tokens or max(run.gaps_s) > STARVED * mean_s for run in runs)


async def _half_load(edge: Edge, tokens: int, capacity_per_s: float) -> list[Run]:
    """Requests that come at random (Poisson, seeded) at half of the rate that the worker can answer at."""
    dice, runs = random.Random(0), list[asyncio.Task[Run]]()
    for _ in range(HALF_LOAD_REQUESTS):
        prompt = [dice.randrange(1000) for _ in PROMPT]
        runs.append(asyncio.create_task(_generate(edge, CLOUD, tokens, prompt)))
        await asyncio.sleep(dice.expovariate(capacity_per_s / tokens / 2))
    return await asyncio.gather(*runs)


async def _beside_a_long_prompt(edge: Edge, tokens: int) -> tuple[list[Run], Run]:
    """Decoding sessions, and one that comes with a long prompt in their midst."""
    running = asyncio.create_task(_together(edge, CLOUD, tokens, SESSIONS - 1))
    await asyncio.sleep(1.0)
    long = await _generate(edge, CLOUD, 3, [number % 1000 for number in range(LONG_PROMPT)])
    return await running, long


def _peak_bytes(child: Child) -> int:
    """The most memory a process has had, from the system's own count; Linux only."""
    status = Path(f"/proc/{child.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise BrokenInvariant("the system does not say how much memory a process has had")
    return int(found.group(1)) * 1024


async def _one_too_many(edge: Edge) -> float:
    """Fill a worker that takes `SESSIONS`, and ask once more: when to come back, s; 0 if that was not said."""
    filled, leave = [asyncio.Event() for _ in range(SESSIONS)], asyncio.Event()

    async def stay(here: asyncio.Event) -> None:
        async with edge.generate(PROMPT, CLOUD, max_new_tokens=ENDLESS, stop_ids=()) as generation:
            async for _ in generation:
                here.set()
                if leave.is_set():
                    return

    staying = [asyncio.create_task(stay(here)) for here in filled]
    try:
        for here in filled:
            await here.wait()
        await _generate(edge, CLOUD, 2, PROMPT)
    except WorkerFailed as error:
        return error.retry_after_s or 0.0
    finally:
        leave.set()
        await asyncio.gather(*staying)
    return 0.0


async def run_serving(rounds: int, tokens: int, tell: Tell) -> Figures:
    """`throughput_8_over_1` (decoding, cloud-only; `u_...`: in a U, where the clients compute the ends on the same
    processors; `whole_...`: prompts and all), `p95_over_mean_tpot` of requests at half load, `starved_sessions` of all
    runs, `memory_64_over_predicted`, `ninth_retry_after_s`. One thread per process; all clients are one process."""
    settings: dict[str, object] = {"rounds": rounds, "tokens": tokens, "threads_per_process": 1, "prompt": len(PROMPT)}
    result = Figures("serving", settings)
    torch.set_num_threads(1)
    tell("making a random llama of the size of GPT-2 small")
    with tempfile.TemporaryDirectory() as place:
        directory = make_model(Path(place), OVERHEAD_LLAMA)
        (directory / "tokenizer.json").write_text(NO_WORDS)
        model = str(directory)
        with worker(model) as cloud, edge_with(model, {"cloud": cloud.address}) as edge:
            await _throughput(result, edge, rounds, tokens, tell)
        with worker(model, "--max-sessions", str(MANY)) as cloud, edge_with(model, {"cloud": cloud.address}) as edge:
            await _many(result, edge, cloud, tell)
        with (
            worker(model, "--max-sessions", str(SESSIONS)) as cloud,
            edge_with(model, {"cloud": cloud.address}) as edge,
        ):
            result.add("ninth_retry_after_s", await _one_too_many(edge), "a session beyond the limit of 8")
    return result


async def _throughput(result: Figures, edge: Edge, rounds: int, tokens: int, tell: Tell) -> None:
    layers = edge.machine.spec.num_layers
    u_shape = U_SHAPE.format(layers - 1, layers)
    num_starved, whole = 0, dict[int, list[float]]()

    async def rate(partition: str, sessions: int) -> float:
        nonlocal num_starved
        runs = await _together(edge, partition, tokens, sessions)
        num_starved += starved(runs, tokens)
        if partition == CLOUD:
            whole.setdefault(sessions, []).append(_whole_rate(runs))
        return _rate(runs)

    rates = await interleaved(
        {
            "1": lambda: rate(CLOUD, 1),
            "8": lambda: rate(CLOUD, SESSIONS),
            "u_1": lambda: rate(u_shape, 1),
            "u_8": lambda: rate(u_shape, SESSIONS),
        },
        rounds,
        tell,
    )
    result.add_median("throughput_8_over_1", ratios(rates["8"], rates["1"]), "cloud-only, decoding")
    result.add_median("u_throughput_8_over_1", ratios(rates["u_8"], rates["u_1"]), "one process computes all ends")
    result.add_median("whole_8_over_1", ratios(whole[SESSIONS][1:], whole[1][1:]), "with prompts")
    for name, values in rates.items():
        result.add_median(f"tokens_per_s_{name}", values)

    tell(f"{HALF_LOAD_REQUESTS} requests at half load")
    runs = await _half_load(edge, tokens, statistics.median(whole[SESSIONS][1:]))
    num_starved += starved(runs, tokens)
    tpots = sorted(run.tpot_s for run in runs)
    p95_s = tpots[int(0.95 * len(tpots))]
    result.add("p95_over_mean_tpot", p95_s / statistics.mean(tpots), f"{len(runs)} requests")
    result.add("half_load_mean_tpot_ms", 1e3 * statistics.mean(tpots))
    gaps = sorted(gap for run in runs for gap in run.gaps_s)
    result.add("half_load_p95_over_mean_gap", gaps[int(0.95 * len(gaps))] / statistics.mean(gaps), "single tokens")

    tell(f"{SESSIONS - 1} sessions beside a prompt of {LONG_PROMPT}")
    beside, long = await _beside_a_long_prompt(edge, 2 * tokens)
    num_starved += starved(beside, 2 * tokens)
    result.add("long_prompt_ttft_s", long.came_s[0] - long.asked_s, f"{LONG_PROMPT} tokens beside 7 that decode")
    result.add("longest_gap_beside_long_prompt_ms", 1e3 * max(max(run.gaps_s) for run in beside))
    result.add("starved_sessions", num_starved, f"of all runs: a token took {STARVED:g} times the mean, or never came")


async def _one_after_another(edge: Edge, tokens: int) -> tuple[list[Run], int]:
    """`MANY` sessions, ten beginning per second, and how many of them failed."""
    tasks: list[asyncio.Task[Run]] = []
    for number in range(MANY):
        prompt = [(token + 7 * number) % 1000 for token in PROMPT]
        tasks.append(asyncio.create_task(_generate(edge, CLOUD, tokens, prompt)))
        await asyncio.sleep(0.1)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return [run for run in answers if isinstance(run, Run)], sum(not isinstance(run, Run) for run in answers)


async def _many(result: Figures, edge: Edge, cloud: Child, tell: Tell) -> None:
    """What memory 64 sessions take, over what one took and the caches of the others."""
    tokens = 32
    one = await _together(edge, CLOUD, tokens, 1)
    before = _peak_bytes(cloud)
    tell(f"{MANY} sessions at once")
    runs, lost = await _one_after_another(edge, tokens)
    caches = (MANY - 1) * _cache_bytes(edge.machine.spec, len(PROMPT) + tokens)
    result.add("memory_64_over_predicted", _peak_bytes(cloud) / (before + caches), "of the worker, peak")
    result.add("memory_64_mb", _peak_bytes(cloud) / 1e6)
    result.add("throughput_64_over_1", _whole_rate(runs) / _whole_rate(one), "with prompts, once")
    result.figures["starved_sessions"] += starved(runs, tokens) + lost


def _cache_bytes(spec: ModelSpec, positions: int) -> int:
    return cost.assigned_kv_bytes(spec, Partition.all_on(spec, 1), 1, Dtype.FP32, positions)
