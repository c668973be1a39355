"""What happens of itself: links and clouds change, devices notice, requests arrive."""

from __future__ import annotations

import numpy as np

from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.endings import EPS
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.past import link_flipped
from splitwise_llm.sim.paths import Path
from splitwise_llm.sim.physics import Bools, Floats, Ints
from splitwise_llm.sim.state import FREE, HELD, WAIT, State


def _follow(path: Path, at: Ints, lap_s: Floats, next_s: Floats, who: tuple[Ints, ...]) -> Ints:
    """The paths `who` go on to their next rows, which are returned."""
    position = at[who] + 1
    times = path.times_s[who]  # (n, changes + 1)
    n = np.arange(len(position))
    period = times[:, -1]
    over = (position >= path.rows.shape[-1]) | (times[n, np.minimum(position, times.shape[1] - 1)] >= period)
    position = np.where(over, 0, position)
    lap_s[who] += np.where(over, period, 0.0)
    at[who] = position
    next_s[who] = lap_s[who] + times[n, position + 1]
    rows: Ints = path.rows[(*who, position)]
    return rows


def change_links(params: Params, traces: Traces, s: State, go: Bools) -> None:
    due = (s.next_s <= s.now[:, None] + EPS) & go[:, None]
    if not due.any():
        return
    e, d = np.nonzero(due)
    before = s.row[e, d]
    s.row[e, d] = _follow(traces.link, s.at, s.lap_s, s.next_s, (e, d))
    changed = s.row[e, d] != before
    e, d, before = e[changed], d[changed], before[changed]
    s.dirty[e, d] |= s.phase[e, d] >= WAIT
    returned = (traces.link_rows[before, 3] == 0) & (traces.link_rows[s.row[e, d], 3] > 0)
    if params.link.reconnect_s and returned.any():
        e, d = e[returned], d[returned]
        waits = (s.phase[e, d] >= WAIT) & params.physics.uses_cloud[s.plan[e, d]]
        s.hold_s[e, d] = np.where(waits, np.maximum(s.hold_s[e, d], params.link.reconnect_s), s.hold_s[e, d])


def change_cloud(params: Params, traces: Traces, s: State, go: Bools) -> None:
    due = (s.cloud_next_s <= s.now + EPS) & go
    if not due.any():
        return
    (e,) = np.nonzero(due)
    before = s.cloud_row[e]
    s.cloud_row[e] = _follow(traces.cloud, s.cloud_at, s.cloud_lap_s, s.cloud_next_s, (e,))
    if not params.is_shared:
        s.load[e] = params.cloud_rows[s.cloud_row[e]]
        e = e[s.cloud_row[e] != before]
        s.dirty[e] |= (s.phase[e] >= WAIT) & params.physics.uses_cloud[s.plan[e]]


def hear(traces: Traces, s: State, go: Bools) -> None:
    """The cloud hears who asks for admission."""
    waiting = (s.phase == WAIT) & (s.asked_s >= NEVER_S)
    if waiting.any():
        up = traces.link_rows[s.row, 3] > 0
        e, d, k = np.nonzero(waiting & up[:, :, None] & (s.hold_s <= 0) & go[:, None, None])
        s.asked_s[e, d, k], s.dirty[e, d, k] = s.now[e], True


def learn(params: Params, traces: Traces, s: State, go: Bools) -> None:
    """Devices learn what has changed, and are asked what to do."""
    row, cloud_row = s.row, np.broadcast_to(s.cloud_row[:, None], s.row.shape)
    seeing = params.seeing
    if seeing.delay_s:
        row = _row_at(traces.link, s.now[:, None] - seeing.delay_s)
        cloud_row = np.broadcast_to(_row_at(traces.cloud, s.now - seeing.delay_s)[:, None], s.row.shape)
    new = ((row != s.seen) | (cloud_row != s.seen_cloud)) & go[:, None]
    if not new.any():
        return
    if seeing.needs_traffic:  # a radio knows by itself whether it has a link
        rows = traces.link_rows
        talks = ((s.phase >= WAIT) & params.physics.uses_cloud[s.plan]).any(axis=2)
        new &= talks | (rows[row, 3] != rows[s.seen, 3])
    level = traces.link_rows[:, 4]
    tell = new & ((level[row] != level[s.seen]) | (traces.link_rows[row, 3] != traces.link_rows[s.seen, 3]))
    if not params.is_shared:
        tell |= new & (cloud_row != s.seen_cloud)
    flipped = new & (traces.link_rows[row, 3] != traces.link_rows[s.seen, 3])
    if flipped.any():
        e, d = np.nonzero(flipped)
        link_flipped(s, e, d, traces.link_rows[row[e, d], 3] > 0)
    np.copyto(s.seen, row, where=new)
    np.copyto(s.seen_cloud, cloud_row, where=new)
    if params.epoch_s < NEVER_S:
        s.ask |= tell[:, :, None] & (s.phase != FREE)


def _row_at(path: Path, t: Floats) -> Ints:
    """Rows of paths (...,) at times (...); before 0 as at 0."""
    within = np.mod(np.maximum(t, 0.0), path.times_s[..., -1])
    at = (path.times_s[..., :-1] <= within[..., None]).sum(axis=-1) - 1
    result: Ints = np.take_along_axis(path.rows, at[..., None], axis=-1)[..., 0]
    return result


def arrive(params: Params, traces: Traces, s: State, go: Bools) -> None:
    """Whoever is first at a door with a free slot behind it comes in and is to be decided on."""
    count = traces.num_requests
    at_door = (s.ready_s <= s.now[:, None] + EPS) & (s.taken < count) & go[:, None]
    if not at_door.any():
        return
    free = s.phase == FREE
    e, d = np.nonzero(at_door & free.any(axis=2))
    k = free[e, d].argmax(axis=1)
    n, i = s.taken[e, d], (e, d, k)
    s.phase[i], s.request[i], s.ask[i] = HELD, n, True
    s.arrival_s[i], s.first_s[i] = s.ready_s[e, d], np.nan
    s.output[i], s.guess[i] = traces.output_tokens[e, d, n], traces.predicted_tokens[e, d, n]
    s.tokens[i] = s.delivered[i] = s.left[i] = s.hold_s[i] = s.ghost[i] = 0.0
    s.moves[i] = s.preempted[i] = 0
    s.spent[i] = s.mode_s[i] = 0.0
    # Time at the door is time waited; the idle power meanwhile is paid by those inside.
    s.mode_s[(*i, np.full(len(e), 3))] = s.now[e] - s.arrival_s[i]
    table = params.device_tables[d] + traces.prompt_class[e, d, n]
    s.plan[i] = s.home[i] = s.first_plan[i] = params.physics.first[table]
    s.epoch_s[i] = NEVER_S
    s.taken[e, d] = n + 1
    if params.arrivals.think_s is None:
        s.ready_s[e, d] = np.where(n + 1 < count, traces.arrival_s[e, d, np.minimum(n + 1, count - 1)], NEVER_S)
    else:
        s.ready_s[e, d] = NEVER_S
