"""What one controller of a whole crowd would come to: the ceiling that is shown where devices share a cloud.

Requests come as they did. So many per second are done as were measured while so many were there. The controller knows
how many are there and sends home who comes beyond a number, the best in hindsight for each trace; at home a request
takes as long as on a device that does nothing else. With arrivals and service that have no memory a number is the best
rule there is (Naor 1969). It says what there is to win, to about a hundredth, and is no bound in the strict sense.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.sim.endings import DONE
from splitwise_llm.sim.episode import Records

Floats = NDArray[np.float64]

MOST = 480
"""Requests in the cloud at a time whose speed is told apart."""
BINS = (0, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46)
"""Numbers of requests from which on speeds are measured together, and from the cloud's sessions on."""
LEAST_S = 0.5
"""Of a bin, to be a measurement."""
EMPTYING = 0.97
"""Share of a trace's arrivals after which queues only empty."""
TRIED = 1.06
"""Ratio of the numbers that are tried."""


def done_per_s(records: Records, sessions: int) -> Floats:
    """(MOST + 1,): completions per second while so many requests are in the cloud, measured on those that began there,
    stayed and were answered; never less with more of them, from `sessions` on all alike, and 0 where nothing was done.
    While the first ones come nothing is measured: nobody can be done yet."""
    there = np.zeros(MOST + 1)
    done = np.zeros(MOST + 1)
    full = min(sessions, MOST)
    stayed = (records.status == DONE) & (records.moves == 0)
    stayed &= records.params.physics.uses_cloud[np.maximum(records.first_plan, 0)]
    for e in np.nonzero(stayed.any(axis=(1, 2)))[0].tolist():
        begun = records.arrival_s[e][stayed[e]]
        ended = begun + records.total_s[e][stayed[e]]
        times = np.concatenate([begun, ended])
        steps = np.repeat([1, -1], len(begun))
        order = np.argsort(times, kind="stable")
        times, steps = times[order], steps[order]
        number = np.minimum(np.cumsum(steps) - steps, MOST)  # before each
        steady = (times > ended.min()) & (times < np.quantile(begun, EMPTYING))
        np.add.at(there, number[steady], np.diff(times, prepend=0.0)[steady])
        np.add.at(done, number[steady & (steps < 0)], 1.0)
    edges = [*(edge for edge in BINS if edge < full), full, MOST + 1]
    at, speed = [0.0], [0.0]
    for low, high in pairwise(edges):
        seconds, count = there[low:high].sum(), done[low:high].sum()
        if seconds > LEAST_S and count:
            middle = float((there[low:high] * np.arange(low, high)).sum() / seconds)
            at.append(min(middle, float(full)))
            speed.append(float(count / seconds))
    result: Floats = np.interp(np.arange(MOST + 1), at, np.maximum.accumulate(speed))
    return result


def mean_s(arrival_s: Floats, done: Floats, most: int, home_s: float, warm_up: int = 0) -> float:
    """Mean seconds of requests that come at `arrival_s` (rising), if the cloud does `done[n]` per second while n are
    there, and who comes beyond `most` is sent home; until `warm_up` have come nothing counts."""
    speed = [*done.tolist(), *[float(done[-1])] * max(most + 1 - len(done), 0)]
    there, part, spent, now = 0, 0.0, 0.0, 0.0
    for number, at in enumerate(arrival_s.tolist()):
        left, counts = at - now, number > warm_up
        now = at
        while left > 0 and there:
            one = (1 - part) / speed[there]
            took = min(one, left)
            spent += there * took * counts
            part = 0.0 if one <= left else part + took * speed[there]
            there -= one <= left
            left -= took
        if there < most:
            there += 1
        else:
            spent += home_s * (number >= warm_up)
    while there:  # the last ones
        took = (1 - part) / speed[there]
        spent, part, there = spent + there * took, 0.0, there - 1
    return spent / (len(arrival_s) - warm_up)


def controlled(records: Records, sessions: int, home_s: float, warm_up: float) -> Floats:
    """(traces,): the least mean, with speeds as measured in all traces; a share `warm_up` of each does not count. NaN
    where nobody came, and where no speed was measured."""
    done = done_per_s(records, sessions)
    tried = np.unique((TRIED ** np.arange(0, np.log(50 * sessions) / np.log(TRIED))).astype(int)).tolist()
    found = []
    for arrival_s in records.arrival_s:
        times = np.sort(arrival_s[np.isfinite(arrival_s)])
        if not len(times) or not done[1]:
            found.append(np.nan)
            continue
        found.append(min(mean_s(times, done, most, home_s, int(warm_up * len(times))) for most in (0, *tried)))
    return np.array(found)


__all__ = ["controlled", "done_per_s", "mean_s"]
