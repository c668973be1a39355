"""Everything random, drawn before anyone decides: arrivals, lengths, and how link and cloud change.

Numbers come from counters: a Philox generator keyed by (seed, trace, purpose), whose n-th number belongs to request
or change n. So all policies meet the same world, and a longer run begins like a shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.counters import exponentials, factor, uniforms
from splitwise_llm.sim.params import Arrivals, Params
from splitwise_llm.sim.paths import Path, cloud_path, day, link_path, link_rows, stacked
from splitwise_llm.sim.physics import Floats, Ints


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

    def times(self, count: int) -> Traces:
        """So many copies of the worlds, one after another."""
        if count == 1:
            return self

        def copies(a: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([a] * count)

        return Traces(
            self.seed, self.numbers * count, copies(self.arrival_s), copies(self.prompt_tokens),
            copies(self.output_tokens), copies(self.predicted_tokens), copies(self.prompt_class), copies(self.luck),
            Path(copies(self.link.times_s), copies(self.link.rows)), self.link_rows,
            Path(copies(self.cloud.times_s), copies(self.cloud.rows)),
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
    rows, meaning = link_rows(params)
    paths = [
        [link_path(params, seed, number, device, spread, rows) for device in range(params.num_devices)]
        for number in numbers
    ]
    link = stacked([path for of_world in paths for path in of_world], (len(numbers), params.num_devices))
    clouds = [cloud_path(params, seed, number, spread) for number in numbers]
    prompt, output, predicted = (np.stack([world[n] for world in worlds]) for n in (1, 2, 3))
    return Traces(
        seed,
        tuple(numbers),
        np.stack([world[0] for world in worlds]),
        prompt.astype(np.int64),
        output.astype(np.int64),
        predicted,
        nearest_class(prompt, params.prompt_classes),
        np.stack([world[4] for world in worlds]),
        link,
        meaning,
        stacked(clouds, (len(numbers),)),
    )


def _world(params: Params, seed: int, number: int, count: int, spread: float) -> tuple[Floats, ...]:
    """(devices, requests) each: arrival, prompt, output and predicted tokens, luck."""
    arrivals = params.arrivals
    shape = (params.num_devices, count)
    scale = 1 / factor(seed, number, "rate", spread)
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


def nearest_class(prompt: Floats, classes: tuple[int, ...]) -> Ints:
    """The class whose prompt is nearest by ratio."""
    if not classes:
        return np.zeros(prompt.shape, np.int64)
    borders = [np.sqrt(a * b) for a, b in pairwise(classes)]
    return np.searchsorted(borders, prompt).astype(np.int64)


__all__ = ["Path", "Traces", "day", "draw", "exchanged", "exponentials", "nearest_class", "uniforms"]
