"""Everything random, drawn before anyone decides: arrivals, lengths, and how link and cloud change.

Numbers come from counters: a Philox generator keyed by (seed, trace, purpose), whose n-th number belongs to request
or change n. So all policies meet the same world, and a longer run begins like a shorter one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.params import Arrivals, CloudProcess, LinkProcess, Params
from splitwise_llm.sim.physics import Floats, Ints

Process = LinkProcess | CloudProcess


def uniforms(seed: int, trace: int, purpose: str, count: int) -> Floats:
    """`count` numbers in (0, 1); the first ones do not depend on how many are asked for."""
    key = [(seed << 32) ^ zlib.crc32(purpose.encode()), trace]
    words = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
    result: Floats = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return result


def exponentials(seed: int, trace: int, purpose: str, count: int) -> Floats:
    """As `uniforms`, with mean 1."""
    result: Floats = -np.log(uniforms(seed, trace, purpose, count))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """What a thing is from which time on, in rows of a table; it starts over after the last time."""

    times_s: Floats
    """(..., changes + 1): from 0; the last, and what pads, is when it starts over."""
    rows: Ints
    """(..., changes)"""


@dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """The random part of many simulated worlds: arrays lead with the world (e), then device (d) and request (n)."""

    seed: int
    numbers: tuple[int, ...]
    """Of each world: what it was drawn by."""
    arrival_s: Floats
    """(e, d, n): when a request comes; in a closed loop, how long after the answer before."""
    prompt_tokens: Ints
    output_tokens: Ints
    predicted_tokens: Floats
    prompt_class: Ints
    luck: Floats
    """(e, d, n): what decides whether this request's moves succeed."""
    link: Path
    """(e, d, ...)"""
    link_rows: Floats
    """(rows, 5): RTT (s), up and down (s per byte), 1 while it is up, and the class it counts as."""
    cloud: Path
    """(e, ...)"""

    @property
    def num_requests(self) -> int:
        """Per device."""
        return int(self.arrival_s.shape[2])

    def part(self, worlds: slice) -> Traces:
        """Some of the worlds."""
        return Traces(
            self.seed, self.numbers[worlds], self.arrival_s[worlds], self.prompt_tokens[worlds],
            self.output_tokens[worlds], self.predicted_tokens[worlds], self.prompt_class[worlds], self.luck[worlds],
            Path(self.link.times_s[worlds], self.link.rows[worlds]), self.link_rows,
            Path(self.cloud.times_s[worlds], self.cloud.rows[worlds]),
        )  # fmt: skip


def exchanged(traces: Traces, world: int, other: Traces) -> Traces:
    """The same worlds but for one, which becomes the only one of `other`."""

    def put(mine: NDArray[Any], its: NDArray[Any]) -> NDArray[Any]:
        longest = max(mine.shape[-1], its.shape[-1])
        both = [
            np.concatenate([a, np.repeat(a[..., -1:], longest - a.shape[-1], axis=-1)], axis=-1) for a in (mine, its)
        ]
        both[0][world] = both[1][0]
        return both[0]

    names = ("arrival_s", "prompt_tokens", "output_tokens", "predicted_tokens", "prompt_class", "luck")
    numbers = tuple(other.numbers[0] if n == world else number for n, number in enumerate(traces.numbers))
    paths: dict[str, Any] = {
        name: Path(
            put(getattr(traces, name).times_s, getattr(other, name).times_s),
            put(getattr(traces, name).rows, getattr(other, name).rows),
        )
        for name in ("link", "cloud")
    }
    arrays: dict[str, Any] = {name: put(getattr(traces, name), getattr(other, name)) for name in names}
    return replace(traces, numbers=numbers, **arrays, **paths)


def draw(params: Params, seed: int, numbers: Sequence[int], requests: int, spread: float = 0.0) -> Traces:
    """Worlds number `numbers` of a seed, each device with so many requests.

    `spread` lets each world differ: rates and dwell times by up to that share either way.
    """
    if requests < 1 or not numbers:
        raise SpecError(f"{requests} requests in {len(numbers)} traces; draw at least one of each")
    worlds = [_world(params, seed, number, requests, spread) for number in numbers]
    rows, link_rows = _link_rows(params)
    paths = [
        [_link_path(params, seed, number, device, spread, rows) for device in range(params.num_devices)]
        for number in numbers
    ]
    link = _stack([path for of_world in paths for path in of_world], (len(numbers), params.num_devices))
    clouds = [_cloud_path(params, seed, number, spread) for number in numbers]
    prompt, output, predicted = (np.stack([world[n] for world in worlds]) for n in (1, 2, 3))
    return Traces(
        seed,
        tuple(numbers),
        np.stack([world[0] for world in worlds]),
        prompt.astype(np.int64),
        output.astype(np.int64),
        predicted,
        _nearest(prompt, params.prompt_classes),
        np.stack([world[4] for world in worlds]),
        link,
        link_rows,
        _stack(clouds, (len(numbers),)),
    )


def _factor(seed: int, number: int, purpose: str, spread: float) -> float:
    return 1.0 + spread * (2 * float(uniforms(seed, number, purpose, 1)[0]) - 1)


def _world(params: Params, seed: int, number: int, count: int, spread: float) -> tuple[Floats, ...]:
    """(devices, requests) each: arrival, prompt, output and predicted tokens, luck."""
    arrivals = params.arrivals
    shape = (params.num_devices, count)
    scale = 1 / _factor(seed, number, "rate", spread)
    if arrivals.recorded is not None:
        at, prompt, output = _recorded(arrivals, seed, number, shape, scale)
    else:
        prompt = np.full(shape, float(arrivals.prompt_tokens))
        output = np.full(shape, float(arrivals.output_tokens))
        if arrivals.output_spread:
            sigma = arrivals.output_spread
            normal = ndtri(_per_device(uniforms, seed, number, "length", shape))
            output = np.maximum(np.rint(output * np.exp(sigma * normal - sigma**2 / 2)), 1.0)
        gaps = _per_device(exponentials, seed, number, "gap", shape) * scale
        if arrivals.think_s is not None:
            at = gaps * arrivals.think_s
        else:
            at = _modulated(arrivals, seed, number, np.cumsum(gaps, axis=1))
            at = _by_segment(params, seed, number, at)
    error = params.seeing.length_error
    if error is None:
        predicted = np.full(shape, params.mean_tokens)
    else:
        normal = ndtri(_per_device(uniforms, seed, number, "prediction", shape)) if error else np.zeros(shape)
        predicted = np.maximum(output * np.exp(error * normal), 1.0)
    return at, prompt, output, predicted, _per_device(uniforms, seed, number, "luck", shape)


def _per_device(kind: object, seed: int, number: int, purpose: str, shape: tuple[int, int]) -> Floats:
    return np.stack([kind(seed, number, f"{purpose}/{d}", shape[1]) for d in range(shape[0])])  # type: ignore[operator]


def _modulated(arrivals: Arrivals, seed: int, number: int, unit: Floats) -> Floats:
    """Times at which a process of unit rate (devices, n), run at the rate of the moment, has its events."""
    if arrivals.burst == 1:
        return unit / arrivals.per_s
    mean = (arrivals.calm_s + arrivals.burst * arrivals.burst_s) / (arrivals.calm_s + arrivals.burst_s)
    calm = arrivals.per_s / mean
    dwell_s, rate = (arrivals.calm_s, arrivals.burst_s), (calm, calm * arrivals.burst)
    in_burst = uniforms(seed, number, "burst first", 1)[0] < arrivals.burst_s / (arrivals.calm_s + arrivals.burst_s)
    if in_burst:
        dwell_s, rate = dwell_s[::-1], rate[::-1]
    need, chunk = float(unit.max()), 64
    while True:
        lengths = exponentials(seed, number, "bursts", chunk) * np.resize(dwell_s, chunk)
        done = np.concatenate([[0.0], np.cumsum(lengths * np.resize(rate, chunk))])
        if done[-1] >= need:
            times: Floats = np.interp(unit, done, np.concatenate([[0.0], np.cumsum(lengths)]))
            return times
        chunk *= 2


def day(params: Params, seed: int, number: int) -> list[tuple[float, float, int]]:
    """(start, end, segment) until the horizon; one segment where there is no day."""
    if not params.segments:
        return [(0.0, params.horizon_s, 0)]
    size, (shortest, longest) = len(params.segments), params.segment_s
    count = int(params.horizon_s / shortest) + 1
    lengths = shortest + (longest - shortest) * uniforms(seed, number, "day lengths", count)
    picks = uniforms(seed, number, "day order", count)
    plan, start, last = list[tuple[float, float, int]](), 0.0, -1
    for length, pick in zip(lengths.tolist(), picks.tolist(), strict=True):
        others = [n for n in range(size) if n != last or size == 1]
        last = others[int(pick * len(others))]
        plan.append((start, min(start + length, params.horizon_s), last))
        start += length
        if start >= params.horizon_s:
            break
    return plan


def _by_segment(params: Params, seed: int, number: int, at: Floats) -> Floats:
    """Arrivals (devices, n) of a day, each kind of device at its rate in each segment."""
    if not params.segments:
        return at
    plan = day(params, seed, number)
    edges = np.array([0.0, *(end for _, end, _ in plan)])
    result = at.copy()
    for device in range(len(at)):
        kind = params.kinds[device % len(params.kinds)]
        rates = [params.segments[n].rates for _, _, n in plan]
        factor = np.array([rate[kind] if kind < len(rate) else rate[0] for rate in rates])
        done = np.concatenate([[0.0], np.cumsum(np.diff(edges) * factor)])
        laps, rest = np.divmod(at[device], done[-1])
        result[device] = np.interp(rest, done, edges) + laps * edges[-1]
    return result


def _recorded(arrivals: Arrivals, seed: int, number: int, shape: tuple[int, int], scale: float) -> tuple[Floats, ...]:
    """Each device begins at its own place of the recording, which repeats; the rate is `per_s`, whatever was
    recorded, and silences stay silences in proportion."""
    trace = arrivals.recorded
    assert trace is not None
    requests = trace.requests
    if not requests:
        raise SpecError("the request trace is empty; give one with requests, or a window that holds some")
    begin = (_per_device(uniforms, seed, number, "begin", (shape[0], 1))[:, :1] * len(requests)).astype(np.int64)
    index = begin + np.arange(shape[1])
    lap, place = np.divmod(index, len(requests))
    at = np.array([request.arrival_s for request in requests])
    stretch = trace.mean_per_s / arrivals.per_s * scale
    times = (at[place] + lap * trace.duration_s - at[begin[:, 0], None]) * stretch
    prompt = np.array([float(request.prompt_tokens) for request in requests])[place]
    return times, prompt, np.array([float(request.output_tokens) for request in requests])[place]


def _nearest(prompt: Floats, classes: tuple[int, ...]) -> Ints:
    """The class whose prompt is nearest by ratio."""
    if not classes:
        return np.zeros(prompt.shape, np.int64)
    borders = [np.sqrt(a * b) for a, b in pairwise(classes)]
    return np.searchsorted(borders, prompt).astype(np.int64)


def _link_rows(params: Params) -> tuple[list[tuple[float, int]], Floats]:
    """(start, row) of one period of a recording (empty without one), and what each row means."""
    link = params.link
    if link.up is not None or link.down is not None or link.rtt is not None:
        return _recorded_rows(link)
    classes = [kind for process in params.links for kind in process.classes]
    rows = [(c.rtt_s, 1 / c.up_bytes_per_s, 1 / c.down_bytes_per_s, c.is_up, n) for n, c in enumerate(classes)]
    return [], np.array(rows, np.float64)


def _recorded_rows(link: LinkProcess) -> tuple[list[tuple[float, int]], Floats]:
    """A recording in steps: what is not recorded is as in the first class; a step in which (almost) nothing got
    through, or no answer came, is an outage with the figures of the step before."""
    base = next(kind for kind in link.classes if kind.is_up)
    period = max(trace.period_s for trace in (link.up, link.down, link.rtt) if trace is not None)
    steps = max(int(period / link.step_s), 1)
    starts: list[tuple[float, int]] = []
    rows: list[tuple[float, ...]] = []
    before = (base.rtt_s, 1 / base.up_bytes_per_s, 1 / base.down_bytes_per_s)
    for number in range(steps):
        start, stop = number * link.step_s, (number + 1) * link.step_s
        up = link.up.mean_over(start, stop) if link.up else base.up_bytes_per_s
        down = link.down.mean_over(start, stop) if link.down else base.down_bytes_per_s
        rtt = link.rtt.at(start) if link.rtt else base.rtt_s
        is_up = min(up, down) > _DEAD_BYTES_PER_S and np.isfinite(rtt)
        figures = (rtt, 1 / up, 1 / down) if is_up else before
        level = np.rint(np.log2(figures[1])) * 64 + np.rint(np.log2(figures[2])) if is_up else 1.0
        row = (*figures, float(is_up), float(level))
        if not rows or row != rows[-1]:
            rows.append(row)
            starts.append((start, len(rows) - 1))
        before = figures
    if not any(row[3] for row in rows):
        raise SpecError("the recorded link is never up; check its units and direction")
    return [*starts, (steps * link.step_s, -1)], np.array(rows)


_DEAD_BYTES_PER_S = 1e3
"""Below 8 kbit/s a step of a recording counts as an outage."""


def _link_path(
    params: Params, seed: int, number: int, device: int, spread: float, recorded: list[tuple[float, int]]
) -> tuple[Floats, Ints]:
    if recorded:
        period = recorded[-1][0]
        begin = float(uniforms(seed, number, f"link/{device}", 1)[0]) * period
        starts = np.array([start for start, _ in recorded[:-1]])
        return _rotated(starts, np.array([row for _, row in recorded[:-1]]), period, begin)
    return _segmented(params, seed, number, f"link/{device}", params.links, spread)


def _cloud_path(params: Params, seed: int, number: int, spread: float) -> tuple[Floats, Ints]:
    return _segmented(params, seed, number, "cloud", params.cloud_processes, spread)


def _segmented(
    params: Params, seed: int, number: int, purpose: str, processes: Sequence[Process], spread: float
) -> tuple[Floats, Ints]:
    """The walk of each segment of the day, one after the other; rows of later processes follow those of earlier."""
    first = np.cumsum([0, *(len(process.classes) for process in processes)])
    times, rows = list[Floats](), list[Ints]()
    for lap, (start, end, segment) in enumerate(day(params, seed, number)):
        at = min(segment, len(processes) - 1)
        process, tag = processes[at], purpose if len(processes) == 1 else f"{purpose}/{lap}"
        means = [kind.mean_dwell_s for kind in process.classes]
        dwell = [mean * _factor(seed, number, f"{purpose[:4]} dwell {at} {n}", spread) for n, mean in enumerate(means)]
        walk_s, walk = _path(dwell, seed, number, tag, end - start, process.periodic)
        while walk_s[-1] < end - start:  # one lap of a periodic process
            if len(params.segments) == 0:
                return walk_s, walk + first[at]
            walk_s, walk = np.concatenate([walk_s[:-1], walk_s + walk_s[-1]]), np.concatenate([walk, walk])
        kept = walk_s[:-1] < end - start
        times.append(walk_s[:-1][kept] + start)
        rows.append(walk[kept] + first[at])
    return np.concatenate([*times, [end]]), np.concatenate(rows)


def _path(
    dwell_s: list[float], seed: int, number: int, purpose: str, horizon_s: float, periodic: bool
) -> tuple[Floats, Ints]:
    """A walk between neighbouring classes, begun in its long-run distribution; or all classes in turn."""
    size = len(dwell_s)
    if size == 1:
        return np.array([0.0, horizon_s]), np.zeros(1, np.int64)
    begin = float(uniforms(seed, number, purpose + " begin", 1)[0])
    if periodic:
        return _rotated(np.cumsum([0.0, *dwell_s[:-1]]), np.arange(size), sum(dwell_s), begin * sum(dwell_s))
    visits = np.array([1.0 if n in (0, size - 1) else 2.0 for n in range(size)]) if size > 2 else np.ones(size)
    weight = np.cumsum(visits * dwell_s)
    row = int(np.searchsorted(weight, begin * weight[-1]))
    chunk = int(4 * horizon_s / min(dwell_s)) + 16 if min(dwell_s) < horizon_s else 16
    lengths = exponentials(seed, number, purpose + " dwell", chunk)
    sides = uniforms(seed, number, purpose + " side", chunk)
    times, rows_seen, at = [0.0], [row], 0.0
    for length, side in zip(lengths, sides, strict=True):
        at += float(length) * dwell_s[row]
        if at >= horizon_s:
            break
        up = row < size - 1 and (row == 0 or side < 0.5)
        row += 1 if up else -1
        times.append(at)
        rows_seen.append(row)
    return np.array([*times, horizon_s]), np.array(rows_seen)


def _rotated(starts_s: Floats, rows: Ints, period_s: float, begin_s: float) -> tuple[Floats, Ints]:
    """One period of a path (rows that begin at times from 0), read from `begin_s` on."""
    first = int(np.searchsorted(starts_s, begin_s, side="right")) - 1
    later, earlier = starts_s[first + 1 :] - begin_s, starts_s[: first + 1] + (period_s - begin_s)
    times = np.concatenate([[0.0], later, earlier, [period_s]])
    return times, np.concatenate([rows[first:], rows[: first + 1]]).astype(np.int64)


def _stack(paths: Sequence[tuple[Floats, Ints]], shape: tuple[int, ...]) -> Path:
    """Paths of unlike lengths as one; times are padded with the end."""
    longest = max(len(rows) for _, rows in paths)
    times = np.stack([np.concatenate([t, np.full(longest + 1 - len(t), t[-1])]) for t, _ in paths])
    rows = np.stack([np.concatenate([r, np.full(longest - len(r), r[-1])]) for _, r in paths])
    return Path(times.reshape(*shape, longest + 1), rows.reshape(*shape, longest).astype(np.int64))
