"""EdgeShard's programs: consecutive layers over many machines, for the least latency or the most throughput.

After arXiv 2405.14371: the first layer stays on the device, each machine's memory is respected, the token returns.
Beside the published latency recurrence stands an exact one; the throughput program is exact. Exact means: the best
of all ordered choices of machines, each used once, and all cuts. Nothing here knows a model or a link, only a `Chain`
(and whoever decides makes one).

Machines with the same figures are interchangeable, so a state counts how many of each *kind* are used: 2^M states
when all differ, 72 for EdgeShard's testbed under equal links.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Form, Table, World, bill, obstacle
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Observation
from splitwise_llm.partition import Partition
from splitwise_llm.policies.chains import ALONE, Chain, Floats, Flow, Route, chain
from splitwise_llm.policies.in_flight import decided_once

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
MAX_CELLS = 40_000_000
"""States x last machines x units of a table: 320 MB."""


def published_latency(chain: Chain) -> Route | None:
    """EdgeShard's recurrence `DP(i, j) = min_k DP(i - 1, k) + t_comp(i, j) + t_comm(k, j)`, O(units machines^2).

    Machines may be returned to. A state remembers one best way there and what it has put where, so a better plan
    whose beginning is slower but leaves more memory is not found; None means that no way was.
    """
    size, units = len(chain.machines), chain.num_units
    first = float(chain.enter_s[0] + chain.unit_s[0, : chain.pinned].sum())
    held = np.zeros(size)
    held[0] = chain.enter_bytes[0] + chain.unit_bytes[0, : chain.pinned].sum()
    last = chain.pinned == units
    if held[0] + last * chain.tail_bytes[0] > chain.memory_bytes[0]:
        return None
    ways: dict[int, tuple[float, Floats, tuple[int, ...]]] = {0: (first, held, (0,) * chain.pinned)}
    for unit in range(chain.pinned, units):
        following: dict[int, tuple[float, Floats, tuple[int, ...]]] = {}
        for row in range(size):
            for before, (seconds, used, path) in ways.items():
                if chain.head_at_home and row == 0 != before:
                    continue  # what stays at home is counted where the device is entered, so it is entered once
                after = used.copy()
                after[row] += chain.unit_bytes[row, unit] + (chain.enter_bytes[row] if not used[row] else 0.0)
                end = chain.tail_bytes[row] if unit == units - 1 else 0.0
                if after[row] + end > chain.memory_bytes[row]:
                    continue
                total = seconds + chain.unit_s[row, unit]
                if row != before:
                    total += chain.hop_s[before, row] + chain.enter_s[row]
                if row not in following or total < following[row][0]:
                    following[row] = (float(total), after, (*path, row))
        ways = following
    ends = {row: way[0] + chain.tail_s[row] + chain.back_s[row] for row, way in ways.items()}
    if not ends:
        return None
    best = min(ends, key=ends.__getitem__)
    path = ways[best][2]
    stops = [n for n in range(1, units + 1) if n == units or path[n] != path[n - 1]]
    return chain.route([(path[stop - 1], stop) for stop in stops], float(ends[best]))


def exact_latency(chain: Chain) -> Route | None:
    """The least sum of segments and crossings over ordered machines, each used once; None where nothing fits."""
    return _shortest(chain, _Space(_kinds([chain])), chain.fits(), chain.hop_s)


def best_throughput(busy: Chain, latency: Chain) -> Route | None:
    """The least bottleneck: the longest time that one request keeps one machine or one link busy (`seconds` of the
    route); of several such routes the one with the least latency. None where nothing fits.

    `busy` and `latency` are of the same job, with and without `occupancy`. By bisection over the values that a
    bottleneck can have: who may use the machines of a state for so long at most covers as many units as possible.
    """
    space = _Space(_kinds([busy, latency]))
    segments, fits = busy.segment_s(), busy.fits()
    found = [segments[fits], busy.hop_s.ravel(), busy.back_s]
    values = np.unique(np.concatenate(found))
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if _reaches_the_end(busy, space, fits & (segments <= values[middle]), values[middle]):
            high = middle
        else:
            low = middle + 1
    if low == len(values):
        return None
    bound = values[low]
    allowed = fits & (segments <= bound)
    allowed[:, :, -1] &= (busy.back_s <= bound)[:, None]
    route = _shortest(latency, space, allowed, np.where(busy.hop_s <= bound, latency.hop_s, np.inf))
    return None if route is None else replace(route, seconds=float(bound))


def _kinds(chains: list[Chain]) -> list[list[int]]:
    """Rows that nothing tells apart, together; the device, row 0, is in none."""
    kinds: list[list[int]] = []
    for row in range(1, len(chains[0].machines)):
        for kind in kinds:
            if all(_alike(chain, row, kind[0]) for chain in chains):
                kind.append(row)
                break
        else:
            kinds.append([row])
    return kinds


def _alike(chain: Chain, a: int, b: int) -> bool:
    own = [chain.unit_s, chain.unit_bytes]
    own += [getattr(chain, name)[:, None] for name in ("enter_s", "tail_s", "back_s")]
    own += [getattr(chain, name)[:, None] for name in ("enter_bytes", "tail_bytes", "memory_bytes")]
    swap = np.arange(len(chain.machines))
    swap[[a, b]] = b, a
    return all(np.array_equal(x[a], x[b]) for x in own) and np.array_equal(chain.hop_s, chain.hop_s[swap][:, swap])


class _Space:
    """How many machines of each kind are used: state numbers in mixed radix, and the ways from one to the next."""

    def __init__(self, kinds: list[list[int]]) -> None:
        self.kinds = kinds
        self.rows = [0, *(kind[0] for kind in kinds)]
        """A machine of each kind; of several the first stands for all."""
        sizes = [len(kind) + 1 for kind in kinds]
        self.num_states = int(np.prod(sizes, dtype=np.int64))
        if self.num_states * len(self.rows) > MAX_CELLS:
            raise RequestError(
                f"{sum(map(len, kinds))} machines of {len(kinds)} kinds are too many to try all choices of; give "
                "machines that are alike the same figures and links, or leave some out"
            )
        self.strides = np.cumprod([1, *sizes[:-1]], dtype=np.int64) if kinds else np.zeros(0, np.int64)
        used = np.array(list(product(*(range(size) for size in reversed(sizes)))), dtype=np.int64)[:, ::-1]
        total = used.sum(axis=1)
        self.entries: list[tuple[int, Ints, Ints]] = []
        """(kind, states that use one more of it, the states before), fewest machines first."""
        for level in range(1, int(total.max(initial=0)) + 1):
            for kind in range(len(kinds)):
                states = np.flatnonzero((total == level) & (used[:, kind] > 0))
                if len(states):
                    self.entries.append((kind, states, states - self.strides[kind]))

    def hops(self, between: Floats) -> Floats:
        """(last kind or device, next kind): a matrix over machines as one over kinds."""
        table = between[np.ix_(self.rows, self.rows[1:])]
        for number, kind in enumerate(self.kinds):
            if len(kind) > 1:
                table[number + 1, number] = between[kind[0], kind[1]]
        return table


def _reaches_the_end(chain: Chain, space: _Space, allowed: Bools, bound: float) -> bool:
    """Whether segments of `allowed` and crossings of at most `bound` lead to the last unit.

    Getting further with the same machines is never worse: any shorter segment is allowed, too."""
    units = chain.num_units
    # Furthest unit (but the last) that each kind reaches from each one; 0: none.
    reach = np.arange(units) + allowed[:, :units, :units].sum(axis=2)
    reach *= allowed[:, :units, :units].any(axis=2)
    ends = allowed[:, :units, units] & (chain.back_s <= bound)[:, None]
    if ends[0, 0]:
        return True
    hops = space.hops(chain.hop_s) <= bound
    far = np.zeros((space.num_states, len(space.rows)), dtype=np.int64)
    far[0, 0] = reach[0, 0] if reach[0, 0] >= chain.pinned else 0
    for kind, states, before in space.entries:
        row = space.rows[kind + 1]
        start = (far[before] * hops[:, kind]).max(axis=1)
        going = start > 0
        if (ends[row, start] & going).any():
            return True
        far[states, kind + 1] = np.where(going, reach[row, start], 0)
    return False


def _shortest(chain: Chain, space: _Space, allowed: Bools, hop_s: Floats) -> Route | None:
    """The least sum over routes of `allowed` segments; `best[state, last, i]` is the least for the first i units."""
    units, rows = chain.num_units, space.rows
    if space.num_states * len(rows) * (units + 1) > MAX_CELLS:
        raise RequestError(
            f"{space.num_states} choices among {len(chain.machines)} machines x {units} units are too many; cut at "
            "whole layers, give machines that are alike the same figures and links, or leave some out"
        )
    segments = chain.segment_s()
    segments[:, :, -1] += chain.back_s[:, None]
    segments[~allowed] = np.inf
    segments[0, :, : chain.pinned] = np.inf
    hops = space.hops(hop_s)
    best = np.full((space.num_states, len(rows), units + 1), np.inf)
    best[0, 0] = segments[0, 0]
    for kind, states, before in space.entries:
        arrived = (best[before, :, :units] + hops[:, kind, None]).min(axis=1)  # (states, units)
        row = segments[rows[kind + 1]]
        for end in range(2, units + 1):
            starts = np.flatnonzero(np.isfinite(row[:end, end]))
            if len(starts):
                window = slice(starts[0], end)
                best[states, kind + 1, end] = (arrived[:, window] + row[window, end]).min(axis=1)
    state, last = np.unravel_index(int(best[:, :, units].argmin()), best.shape[:2])
    total = float(best[state, last, units])
    if not np.isfinite(total):
        return None
    return chain.route(_trace(best, segments, hops, space, int(state), int(last)), total)


def _trace(best: Floats, segments: Floats, hops: Floats, space: _Space, state: int, last: int) -> list[tuple[int, int]]:
    """The segments `(row, end)` of the route that ends in a state, by looking which step gave each value."""
    found: list[tuple[int, int]] = []
    end = best.shape[2] - 1
    left = [list(kind) for kind in space.kinds]
    while last:
        row = segments[space.rows[last]][:end, end]
        found.append((left[last - 1].pop(), end))
        state -= int(space.strides[last - 1])
        steps = best[state, :, :end] + hops[:, last - 1, None] + row
        last, end = (int(n) for n in np.unravel_index(int(steps.argmin()), steps.shape))
    return [(0, end), *found[::-1]]


class Program(StrEnum):
    """What is minimised, and how."""

    PUBLISHED_LATENCY = "latency"
    EXACT_LATENCY = "exact-latency"
    THROUGHPUT = "throughput"


_LATENCY: dict[Program, Callable[[Chain], Route | None]] = {
    Program.PUBLISHED_LATENCY: published_latency,
    Program.EXACT_LATENCY: exact_latency,
}


@dataclass(frozen=True, slots=True)
class EdgeShard:
    """EdgeShard as a policy. `current` plans each request anew under the links and loads of now; without it, under
    those of when plans were made, as published. The equal-terms tools (wire, chunk, draft) are then chosen by price.
    """

    program: Program = Program.PUBLISHED_LATENCY
    current: bool = False
    flow: Flow = ALONE
    halves: bool = False

    def decide(self, observation: Observation) -> Decision:
        """The program's plan; in flight see `in_flight`. Raises RequestError where nothing is known of the machines, or
        no plan fits them."""
        return decided_once(observation, self._plan)

    def _plan(self, observation: Observation) -> Decision:
        world = observation.world if self.current else observation.nominal or observation.world
        if world is None:
            raise RequestError(observation.unpriced("EdgeShard"))
        conditions = world.conditions(observation.loads if self.current else None)
        away = {number for number, view in enumerate(observation.machines) if not view.reachable}
        limits = replace(observation.limits, unreachable=observation.limits.unreachable | away)
        found: dict[Partition, None] = {}
        for wire in observation.tools.wires:

            def filled(occupancy: bool, wire: WirePrecision = wire) -> Chain:
                return chain(
                    world, observation.job, wire, conditions=conditions, limits=limits, flow=self.flow,
                    halves=self.halves, occupancy=occupancy,
                )  # fmt: skip

            if self.program is Program.THROUGHPUT:
                route = best_throughput(filled(True), filled(False))
            else:
                route = _LATENCY[self.program](filled(False))
            if route:
                found[route.partition(world.spec)] = None
        return driven(world, list(found), replace(observation, limits=limits), conditions)


def driven(world: World, partitions: list[Partition], observation: Observation, conditions: Form) -> Decision:
    """The fastest way to drive any of some partitions with the tools there are."""
    job, tools = observation.job, observation.tools
    ways = [
        Decision(partition, wire, chunk, draft, early)
        for partition in partitions
        for (wire, early), chunk, draft in product(tools.by_phase, tools.chunks, tools.drafts)
    ]
    ways = [way for way in ways if obstacle(world, way, job, observation.limits) is None]
    if not ways:
        raise RequestError(
            f"EdgeShard finds no layers-in-a-row plan of this model for {len(world.hosts)} machines that keeps the "
            "first layer on the device and fits their memory; add a machine, or keep weights in int8 or int4"
        )
    return ways[int(Table(world, [bill(world, way, job) for way in ways]).at(conditions).service_s.argmin())]
