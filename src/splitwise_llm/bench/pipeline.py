"""A pipeline of machines and links as a discrete-event simulation: what EdgeShard's throughput program promises, run.

Stations serve micro-batches in the order of their arrival, one at a time. It knows no partition program, no model
and no randomness.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from splitwise_llm.cost import Job, World
from splitwise_llm.decision import WirePrecision
from splitwise_llm.policies.chains import Chain, Flow, Route, chain


@dataclass(frozen=True, slots=True)
class Station:
    """A machine's segment, or a link: seconds that a prompt and a token keep it busy, and the way to the next one."""

    prompt_s: float
    token_s: float
    delay_s: float = 0.0


class Barrier(StrEnum):
    """When micro-batches wait for one another. Whoever waits leaves bubbles in the pipeline."""

    NONE = "no-bubbles"
    """EdgeShard-No-bubbles: a micro-batch generates as soon as its own prompt is done."""
    PROMPT = "bubbles"
    """EdgeShard-Bubbles: generation begins when all prompts of the batch are done, a batch when the last has ended."""
    EVERY = "lock-step"
    """All wait after every token, too."""


def stations(
    world: World, job: Job, route: Route, flow: Flow, wire: WirePrecision = WirePrecision.FP32
) -> tuple[Station, ...]:
    """Segments and crossings of a route that begins on the device, in turn, ending with the way back."""
    first = Job(job.prompt_tokens, 1)
    whole, prompt = (chain(world, j, wire, flow=flow, occupancy=True) for j in (job, first))
    latency = chain(world, first, wire, flow=flow)
    rows = [whole.machines.index(machine) for machine in route.machines]
    ends = [whole.ends.index(end) + 1 for _, end in route.spans]
    later = max(job.tokens_out - 1, 1)

    def station(of_whole: float, of_prompt: float, delay_s: float = 0.0) -> Station:
        return Station(of_prompt, (of_whole - of_prompt) / later, delay_s)

    found: list[Station] = []
    for n, (row, end) in enumerate(zip(rows, ends, strict=True)):
        start = ends[n - 1] if n else 0
        found.append(station(*(_segment_s(of, row, start, end) for of in (whole, prompt))))
        if n + 1 < len(rows):
            crossing = [float(of.hop_s[row, rows[n + 1]]) for of in (whole, prompt, latency)]
        elif row:
            crossing = [float(of.back_s[row]) for of in (whole, prompt, latency)]
        else:
            continue
        found.append(station(crossing[0], crossing[1], crossing[2] - crossing[1]))
    return tuple(found)


def _segment_s(columns: Chain, row: int, start: int, end: int) -> float:
    seconds = columns.enter_s[row] + columns.unit_s[row, start:end].sum()
    return float(seconds + (columns.tail_s[row] if end == columns.num_units else 0.0))


def completions(
    line: Sequence[Station],
    in_flight: int,
    tokens_out: int,
    number: int,
    barrier: Barrier = Barrier.NONE,
    *,
    runs_dry: bool = False,
) -> list[float]:
    """Times at which the first `number` micro-batches are complete, when `in_flight` are always under way: each is a
    prompt and `tokens_out` - 1 later tokens through the whole line, and is followed by the next one at once; where the
    line `runs_dry`, nothing follows the last of them. It does so without a barrier only."""
    begun = min(in_flight, number) if runs_dry else in_flight
    free = [0.0] * len(line)
    done: list[float] = []
    waiting: list[tuple[int, int]] = []
    events = [(0.0, slot, slot, 0, 0) for slot in range(begun)]  # time, tie, slot, station, token
    ties = in_flight
    while len(done) < number:
        now, _, slot, index, token = heapq.heappop(events)
        station = line[index]
        start = max(now, free[index])
        free[index] = start + (station.token_s if token else station.prompt_s)
        there = free[index] + station.delay_s
        following = [(slot, token)]
        if index + 1 == len(line):
            token += 1
            if token == tokens_out:
                done.append(there)
                token = 0
                if runs_dry and begun == number:
                    continue
                begun += 1
            following = [(slot, token)]
            if barrier is Barrier.EVERY or (barrier is Barrier.PROMPT and token < 2):
                waiting += following
                following = waiting if len(waiting) == in_flight else []
                waiting = [] if following else waiting
        for other, its_token in following:
            heapq.heappush(events, (there, ties, other, (index + 1) % len(line), its_token))
            ties += 1
    return sorted(done)


def steady_per_s(times: Sequence[float], in_flight: int) -> float:
    """Completions per second after the first half, over whole batches where they come in batches."""
    first = len(times) // 2 // in_flight * in_flight
    last = (len(times) - 1 - first) // in_flight * in_flight + first
    return (last - first) / (times[last] - times[first])
