"""How links and clouds change, drawn beforehand or as recorded: from which time on which row of a table holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.counters import exponentials, factor, uniforms
from splitwise_llm.sim.params import CloudProcess, LinkClass, LinkProcess, Params
from splitwise_llm.sim.physics import Floats, Ints
from splitwise_llm.traces import RateTrace, RttTrace

Process = LinkProcess | CloudProcess


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """What a thing is from which time on, in rows of a table; it starts over after the last time."""

    times_s: Floats
    """(..., changes + 1): from 0; the last, and what pads, is when it starts over."""
    rows: Ints
    """(..., changes)"""


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


def link_rows(params: Params) -> tuple[list[tuple[float, int]], Floats]:
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


def as_recorded(link: LinkProcess, up: RateTrace, down: RateTrace | None, rtt: RttTrace | None) -> LinkProcess:
    """The link as recorded. Its classes sum the recording up, for who prices it beforehand: the fastest, the middle and
    the slowest third of the time that it is up (nearly: what stays alike is not divided), and outages of the mean
    length.

    Without `down` the rates of `up` hold both ways, without `rtt` the round trip of the first class of `link`. Raises
    SpecError for a recording that is never up.
    """
    recorded = replace(link, periodic=False, up=up, down=down or up, rtt=rtt)
    starts, meaning = _recorded_rows(recorded)
    lasts_s = np.diff([start for start, _ in starts])
    is_up = meaning[:, 3] > 0
    fastest_first = np.argsort(np.where(is_up, meaning[:, 1], np.inf), kind="stable")
    middles_s = np.cumsum(lasts_s[fastest_first]) - lasts_s[fastest_first] / 2
    kinds = np.full(len(meaning), _OUTAGE)
    kinds[fastest_first] = (3 * middles_s / lasts_s[is_up].sum()).astype(np.int64).clip(0, _OUTAGE - 1)
    kinds[~is_up] = _OUTAGE
    begins = kinds != np.roll(kinds, 1)
    classes = list[LinkClass]()
    for kind in np.unique(kinds).tolist():
        at = kinds == kind
        dwell_s = float(lasts_s[at].sum() / max((begins & at).sum(), 1))
        if kind == _OUTAGE:
            classes.append(replace(classes[-1], mean_dwell_s=dwell_s, is_up=False))
        else:
            ways = [np.average(1 / meaning[at, n], weights=lasts_s[at]) for n in (1, 2)]
            rtt_s = np.average(meaning[at, 0], weights=lasts_s[at])
            classes.append(LinkClass(float(rtt_s), float(ways[0]), float(ways[1]), dwell_s))
    return replace(recorded, classes=tuple(classes))


_OUTAGE = 3
"""The last of the kinds of time in a recording, after three thirds."""
_DEAD_BYTES_PER_S = 1e3
"""Below 8 kbit/s a step of a recording counts as an outage."""


def link_path(
    params: Params, seed: int, number: int, device: int, spread: float, recorded: list[tuple[float, int]]
) -> tuple[Floats, Ints]:
    if recorded:
        period = recorded[-1][0]
        begin = float(uniforms(seed, number, f"link/{device}", 1)[0]) * period
        starts = np.array([start for start, _ in recorded[:-1]])
        return _rotated(starts, np.array([row for _, row in recorded[:-1]]), period, begin)
    return _segmented(params, seed, number, f"link/{device}", params.links, spread)


def cloud_path(params: Params, seed: int, number: int, spread: float) -> tuple[Floats, Ints]:
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
        dwell = [mean * factor(seed, number, f"{purpose[:4]} dwell {at} {n}", spread) for n, mean in enumerate(means)]
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


def stacked(paths: Sequence[tuple[Floats, Ints]], shape: tuple[int, ...]) -> Path:
    """Paths of unlike lengths as one; times are padded with the end."""
    longest = max(len(rows) for _, rows in paths)
    times = np.stack([np.concatenate([t, np.full(longest + 1 - len(t), t[-1])]) for t, _ in paths])
    rows = np.stack([np.concatenate([r, np.full(longest - len(r), r[-1])]) for _, r in paths])
    return Path(times.reshape(*shape, longest + 1), rows.reshape(*shape, longest).astype(np.int64))
