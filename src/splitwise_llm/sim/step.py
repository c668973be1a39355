"""From one event to the next, in every world that waits for no decision. Who decides is not known here.

Between events everything flows at constant rates:

- a phase takes what its plan's bill says, under the conditions of the moment;
- a device computes for its requests in the order in which they came: each gets what it can use of what the earlier
  ones leave, so that whole-device requests are served first come, first served, and splits interleave;
- a link is shared in proportion to what its users could carry;
- in an outage nothing that needs the link goes on. A cloud that has the prompt does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitwise_llm import lyapunov
from splitwise_llm.sim import cloud
from splitwise_llm.sim.draws import Path, Traces
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.physics import CLOUD_S, DEVICE_S, DOWN_S, TOKEN, UP_S, Bools, Floats, Ints
from splitwise_llm.sim.physics import PROMPT as PER_PROMPT
from splitwise_llm.sim.state import DECODE, DELIVER, FREE, HELD, MOVE, PROMPT, WAIT, State

EPS = 1e-9
SMALL_S = 1e-9
GOLDEN = 0.6180339887498949
DONE, SHED, ABANDONED = 0, 1, 2
"""How a request ended: answered; refused; cut off by an empty battery or the end of the simulation."""


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """Requests that ended in one step: arrays (n,)."""

    world: Ints
    device: Ints
    request: Ints
    status: Ints
    arrival_s: Floats
    first_s: Floats
    end_s: Floats
    spent: Floats  # (n, 3): device J, others J, USD without electricity
    tokens: Floats
    first_plan: Ints
    last_plan: Ints
    moves: Ints
    preempted: Ints
    mode_s: Floats  # (n, modes)


@dataclass(frozen=True, slots=True, eq=False)
class Noted:
    """Queues of some worlds at one moment: arrays (n,)."""

    world: Ints
    now: Floats
    in_flight: Floats
    """Requests at all devices, those at the doors included."""
    work: Floats
    """(n, 4): seconds of work left for device, up, down (mean over devices), and cloud (all)."""


def conditions(params: Params, rows: Floats, link: Ints, load: Floats) -> Floats:
    """Conditions (n, conditions) of link rows (n,) and loads (n, 4), the device free."""
    places = params.physics.places
    x = np.zeros((len(link), places.size))
    x[:, 0] = x[:, places.device_slow] = x[:, places.device_share] = 1.0
    x[:, places.slow : places.slow + 4] = load
    x[:, places.rtt : places.rtt + 3] = rows[link, :3]
    return x


def refresh(params: Params, traces: Traces, s: State) -> None:
    """Price the phases of slots that are marked as changed."""
    e, d, k = np.nonzero(s.dirty)
    if not len(e):
        return
    s.dirty[e, d, k] = False
    physics, phase, plan = params.physics, s.phase[e, d, k], s.plan[e, d, k]
    load = s.load[e]
    x = conditions(params, traces.link_rows, s.row[e, d], load)
    token = physics.units(TOKEN, plan, x)
    unit = token.copy()
    needs_link = physics.needs_link[TOKEN, plan]
    if params.is_shared:
        x[:, params.physics.places.slow] = s.fill[e]
    for number in np.unique(phase):
        at = phase == number
        if number == PROMPT:
            unit[at] = physics.units(PER_PROMPT, plan[at], x[at])
            needs_link[at] = physics.needs_link[PER_PROMPT, plan[at]]
        elif number == MOVE:
            unit[at], needs_link[at] = _move_units(params, s, (e[at], d[at], k[at]), x[at])
        elif number == WAIT:
            unit[at] = 0.0
            unit[at, 0] = NEVER_S if params.is_shared else load[at, 3]
            needs_link[at] = s.asked_s[e[at], d[at], k[at]] >= NEVER_S
        elif number == DELIVER:
            unit[at] = 0.0
            unit[at, 0] = 1.0
            needs_link[at] = True
    unit[:, 0] = np.maximum(unit[:, 0], SMALL_S)
    s.unit[e, d, k], s.token[e, d, k], s.needs_link[e, d, k] = unit, token, needs_link


def _move_units(params: Params, s: State, slots: tuple[Ints, ...], x: Floats) -> tuple[Floats, Bools]:
    """What moving takes (n, 8), and whether it needs the link."""
    physics = params.physics
    home, plan = s.home[slots], s.plan[slots]
    context = physics.prompt_tokens[home] + s.tokens[slots]
    again = home == plan  # preempted: its own cache is made anew
    entry = physics.moves.entry(physics.table_of[plan], home, plan, context, x)
    world = physics.tables[0].world
    result = np.zeros((len(home), 8))
    result[:, 0], result[:, DEVICE_S], result[:, CLOUD_S] = entry.seconds, entry.device_s, entry.cloud_s
    places = physics.places
    result[:, UP_S], result[:, DOWN_S] = entry.up_bytes * x[:, places.up], entry.down_bytes * x[:, places.down]
    needs = entry.needs_link
    if again.any():
        prompt = physics.units(PER_PROMPT, plan, x)
        share = context / physics.prompt_tokens[plan]
        redo = np.zeros_like(result)
        redo[:, CLOUD_S] = prompt[:, CLOUD_S] * share
        redo[:, 0] = redo[:, CLOUD_S] * x[:, places.slow]
        result, needs = np.where(again[:, None], redo, result), needs & ~again
    device = np.array([t.world.hosts[0].device.prefill_w - t.world.hosts[0].device.idle_w for t in physics.tables])
    radio = np.array([t.world.hosts[0].device.radio_w for t in physics.tables])
    table, server = physics.table_of[plan], world.hosts[1].device
    carried = result[:, UP_S] + result[:, DOWN_S]
    result[:, 1] = result[:, DEVICE_S] * device[table] + carried * radio[table]
    watts = server.prefill_w - (0.0 if world.hosts[1].is_shared else server.idle_w)
    busy = result[:, CLOUD_S] * x[:, places.slow]
    result[:, 2], result[:, 3] = busy * watts * server.pue, busy * server.usd_per_hour / 3600
    return result, needs


def rates(params: Params, traces: Traces, s: State) -> tuple[Floats, Bools]:
    """Units per second of every slot (e, d, s), and which links are up (e, d)."""
    up = traces.link_rows[s.row, 3] > 0
    running = (s.phase >= WAIT) & (s.hold_s <= 0) & (~s.needs_link | up[:, :, None])
    rate = np.zeros(s.left.shape)
    np.divide(1.0, s.unit[..., 0], out=rate, where=running)
    use = s.unit[..., DEVICE_S : DOWN_S + 1] * rate[..., None]  # (e, d, s, 3): share of device, up, down
    total = use.sum(axis=2)
    if params.slots > 1:
        e, d = np.nonzero(total[..., 0] > 1 + EPS)
        if len(e):
            rate[e, d] *= _first_come(use[e, d, :, 0], s.request[e, d])
        for lane in (1, 2):
            e, d = np.nonzero(total[..., lane] > 1 + EPS)
            if len(e):
                users = use[e, d, :, lane] > EPS
                rate[e, d] *= np.where(users, 1 / total[e, d, lane, None], 1.0)
    if params.is_shared:
        rate *= cloud.shares(s, rate)
    return rate, up


def _first_come(use: Floats, request: Ints) -> Floats:
    """By what each slot (n, s) is slowed when earlier requests take of the device what they can use."""
    earlier = request[:, None, :] < request[:, :, None]
    ahead = (use[:, None, :] * earlier).sum(axis=2)
    given = np.minimum(use, np.maximum(1 - ahead, 0))
    result = np.ones_like(use)
    np.divide(given, use, out=result, where=use > EPS)
    return result


def step(params: Params, traces: Traces, s: State) -> tuple[list[Ended], Noted | None]:
    """Advance every world that asks nothing to its next event, in place."""
    ended: list[Ended] = []
    go = ~(s.ask.any(axis=(1, 2)) | s.is_over)
    _hear(traces, s, go)
    if params.is_shared:
        cloud.govern(params, s, go)
        cloud.load(params, s)
    refresh(params, traces, s)
    rate, up = rates(params, traces, s)
    dt = np.where(go, _until(params, traces, s, rate, up), 0.0)
    _flow(params, traces, s, rate, up, dt)
    moved = go[:, None, None] & (s.phase >= WAIT)
    _pass(params, traces, s, moved & (s.left <= EPS), up, ended)
    _change_links(params, traces, s, go)
    _change_cloud(params, traces, s, go)
    _learn(params, traces, s, go)
    _arrive(params, traces, s, go)
    if params.battery:
        _run_down(params, traces, s, go, ended)
    now = s.now[:, None, None]
    due = (s.epoch_s <= now + EPS) | ((s.phase == DECODE) & (s.tokens >= s.epoch_tokens - 1e-7))
    s.ask |= due & (s.phase != FREE) & go[:, None, None]
    finished = (s.taken >= traces.num_requests).all(axis=1) & (s.phase == FREE).all(axis=(1, 2))
    s.is_over |= go & finished
    return ended, _note(params, traces, s, go)


def _until(params: Params, traces: Traces, s: State, rate: Floats, up: Bools) -> Floats:
    """Seconds (e,) to the next event."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        decoding = (s.phase == DECODE) & (rate > 0)
        units = np.where(decoding, np.minimum(s.left, s.epoch_tokens - s.tokens), s.left)
        slot = np.where(rate > 0, units / rate, np.inf)
    now = s.now[:, None]
    slot = np.minimum(slot, np.where(s.phase != FREE, s.epoch_s - now[..., None], np.inf))
    slot = np.minimum(slot, np.where((s.hold_s > 0) & up[:, :, None], s.hold_s, np.inf))
    device = np.minimum(slot.min(axis=2), s.next_s - now)
    room = (s.phase == FREE).any(axis=2) & (s.taken < traces.num_requests)
    device = np.minimum(device, np.where(room, s.ready_s - now, np.inf))
    if params.battery:
        watts = (s.unit[..., 1] * rate).sum(axis=2) + params.idle_w
        device = np.minimum(device, np.maximum(s.battery_j, 0) / np.maximum(watts, EPS))
    result = np.minimum(device.min(axis=1), s.cloud_next_s - s.now)
    if params.is_shared:
        result = np.minimum(result, cloud.until(params, s, rate))
    soonest: Floats = np.maximum(result, 0.0)
    return soonest


def _flow(params: Params, traces: Traces, s: State, rate: Floats, up: Bools, dt: Floats) -> None:
    """Let time pass."""
    physics = params.physics
    by_slot = dt[:, None, None]
    done = rate * by_slot
    s.left -= done
    decoding = s.phase == DECODE
    s.tokens += np.where(decoding, done, 0.0)
    arrives = decoding & (up[:, :, None] | ~physics.streams[s.plan])
    np.copyto(s.delivered, s.tokens, where=arrives)
    held = s.hold_s > 0
    if held.any():
        s.hold_s = np.where(held & up[:, :, None], np.maximum(s.hold_s - by_slot, 0.0), s.hold_s)
    busy = s.phase != FREE
    idle_w = params.idle_w
    active_j = done * s.unit[..., 1]
    count = np.maximum(busy.sum(axis=2), 1)
    s.spent[..., 0] += active_j + np.where(busy, (idle_w * dt[:, None] / count)[:, :, None], 0.0)
    s.spent[..., 1] += done * s.unit[..., 2] + np.where(busy, physics.others_idle_w[s.plan] * by_slot, 0.0)
    s.spent[..., 2] += done * s.unit[..., 3]
    mode = np.where(s.phase >= DECODE, physics.mode[s.plan], 3)
    mode = np.where(s.phase == PROMPT, physics.mode[s.plan], mode)
    mode = np.where(s.phase == MOVE, 4, mode)
    for number in range(s.mode_s.shape[3]):
        s.mode_s[..., number] += np.where(busy & (mode == number), by_slot, 0.0)
    joules = active_j.sum(axis=2) + idle_w * dt[:, None]
    s.drawn_j += joules
    if params.battery:
        s.battery_j -= joules
    if params.budgets.battery_w is not None:
        s.virtual = lyapunov.drained(s.virtual, params.budgets, joules, dt[:, None])
    s.now += dt
    used = (busy & physics.uses_cloud[s.plan] & (s.phase >= PROMPT)).any(axis=2) & up
    np.copyto(s.used_s, np.broadcast_to(s.now[:, None], used.shape), where=used)
    if s.ghost.any():
        _haunt(params, traces, s, up, by_slot)


def _haunt(params: Params, traces: Traces, s: State, up: Bools, by_slot: Floats) -> None:
    """A cloud that has not heard that its work is no longer wanted goes on, at somebody's expense."""
    e, d, k = np.nonzero(s.ghost > 0)
    x = conditions(params, traces.link_rows, s.row[e, d], s.load[e])
    unit = params.physics.units(TOKEN, s.ghost_plan[e, d, k], x)
    seconds = by_slot[e, 0, 0]
    done = np.minimum(seconds / unit[:, 0], s.ghost[e, d, k])
    s.spent[e, d, k, 1:] += done[:, None] * unit[:, 2:4]
    heard = up[e, d]
    s.ghost[e, d, k] = np.where(heard, 0.0, np.maximum(s.ghost[e, d, k] - done, EPS))
    settled = heard & (s.phase[e, d, k] == DECODE) & ~params.physics.uses_cloud[s.plan[e, d, k]]
    cloud.release(params, s, (e[settled], d[settled], k[settled]))


def _pass(params: Params, traces: Traces, s: State, over: Bools, up: Bools, ended: list[Ended]) -> None:
    """Slots whose phase is over go on to the next."""
    if not over.any():
        return
    e, d, k = np.nonzero(over)
    phase = s.phase[e, d, k]
    s.dirty[e, d, k] = True
    for number in np.unique(phase):
        at = phase == number
        i = (e[at], d[at], k[at])
        if number == WAIT:
            begins = s.tokens[i] == 0
            s.phase[i], s.left[i] = np.where(begins, PROMPT, MOVE), 1.0
        elif number == PROMPT:
            s.tokens[i] = s.delivered[i] = 1.0
            s.first_s[i], s.left[i], s.phase[i] = s.now[i[0]], s.output[i] - 1, DECODE
            s.epoch_tokens[i] = 1 + params.epoch_tokens
        elif number == MOVE:
            _arrived(params, traces, s, i)
        elif number == DECODE:
            _answered(params, traces, s, i, up, ended)
        else:
            end(params, traces, s, i, DONE, ended)
    # One token is all there is to some answers.
    e, d, k = np.nonzero((s.phase == DECODE) & (s.left <= EPS) & over)
    if len(e):
        _answered(params, traces, s, (e, d, k), up, ended)


def _arrived(params: Params, traces: Traces, s: State, i: tuple[Ints, ...]) -> None:
    """A move has ended: on the new plan, or, if it failed, on the old one."""
    draw = np.mod(traces.luck[i[0], i[1], s.request[i]] + GOLDEN * s.moves[i], 1.0)
    failed = (draw < params.failed_moves) & (s.plan[i] != s.home[i])
    s.plan[i] = np.where(failed, s.home[i], s.plan[i])
    s.home[i] = s.plan[i]
    s.phase[i], s.left[i] = DECODE, s.output[i] - s.tokens[i]
    s.epoch_tokens[i] = s.tokens[i] + params.epoch_tokens
    s.ask[i] |= failed & (params.epoch_s < NEVER_S)
    leaves = ~params.physics.uses_cloud[s.plan[i]] & (s.ghost[i] <= 0)
    cloud.release(params, s, tuple(part[leaves] for part in i))


def _answered(params: Params, traces: Traces, s: State, i: tuple[Ints, ...], up: Bools, ended: list[Ended]) -> None:
    """The last token is there, or it waits in the cloud for the link."""
    physics = params.physics
    stuck = physics.streams[s.plan[i]] & ~up[i[0], i[1]]
    if stuck.any():
        j = tuple(part[stuck] for part in i)
        s.phase[j], s.dirty[j] = DELIVER, True
        s.left[j] = traces.link_rows[s.row[j[0], j[1]], 0] / 2
        s.tokens[j] = s.output[j]
        i = tuple(part[~stuck] for part in i)
    if len(i[0]):
        end(params, traces, s, i, DONE, ended)


def end(params: Params, traces: Traces, s: State, i: tuple[Ints, ...], status: int, ended: list[Ended]) -> None:
    """Requests in slots `i` leave, and their slots are free."""
    e, d, _ = i
    now = s.now[e]
    done = status == DONE
    tokens = s.output[i] if done else s.delivered[i]
    spent = s.spent[i].copy()
    ended.append(
        Ended(
            e, d, s.request[i], np.full(len(e), status), s.arrival_s[i], s.first_s[i], now, spent, tokens,
            s.first_plan[i], s.plan[i], s.moves[i], s.preempted[i], s.mode_s[i].copy(),
        )
    )  # fmt: skip
    total = now - s.arrival_s[i] if done else np.full(len(e), params.t_max_s)
    deadline = params.budgets.deadline_s
    missed = (total > deadline).astype(np.float64) if deadline is not None else np.zeros(len(e))
    nats = params.physics.nats[s.plan[i]]
    g = (params.budgets, spent[:, 0], missed, nats, s.output[i])
    if len(np.unique(e * s.row.shape[1] + d)) == len(e):
        s.virtual[e, d] = lyapunov.completed(s.virtual[e, d], *g)
    else:  # several of one device at a time: one after the other
        for n in range(len(e)):
            one = (params.budgets, *(array[n : n + 1] for array in g[1:]))
            s.virtual[e[n], d[n]] = lyapunov.completed(s.virtual[e[n : n + 1], d[n]], *one)[0]  # type: ignore[arg-type]
    cloud.release(params, s, i)
    s.phase[i], s.ask[i], s.epoch_s[i], s.epoch_tokens[i] = FREE, False, NEVER_S, NEVER_S
    s.needs_link[i], s.hold_s[i], s.ghost[i], s.dirty[i], s.left[i] = False, 0.0, 0.0, False, 0.0
    s.unit[i], s.token[i] = 0.0, 0.0
    if params.arrivals.think_s is not None:
        following = np.minimum(s.taken[e, d], traces.num_requests - 1)
        s.ready_s[e, d] = now + traces.arrival_s[e, d, following]


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


def _change_links(params: Params, traces: Traces, s: State, go: Bools) -> None:
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


def _change_cloud(params: Params, traces: Traces, s: State, go: Bools) -> None:
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


def _hear(traces: Traces, s: State, go: Bools) -> None:
    """The cloud hears who asks for admission."""
    waiting = (s.phase == WAIT) & (s.asked_s >= NEVER_S)
    if waiting.any():
        up = traces.link_rows[s.row, 3] > 0
        e, d, k = np.nonzero(waiting & up[:, :, None] & (s.hold_s <= 0) & go[:, None, None])
        s.asked_s[e, d, k], s.dirty[e, d, k] = s.now[e], True


def _learn(params: Params, traces: Traces, s: State, go: Bools) -> None:
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


def _arrive(params: Params, traces: Traces, s: State, go: Bools) -> None:
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


def _run_down(params: Params, traces: Traces, s: State, go: Bools, ended: list[Ended]) -> None:
    """A device whose battery is empty gives up what it has, and will not take more."""
    dead = (s.battery_j <= EPS) & go[:, None] & (s.taken < traces.num_requests)
    if dead.any():
        busy = np.nonzero(dead[:, :, None] & (s.phase != FREE))
        if len(busy[0]):
            end(params, traces, s, busy, ABANDONED, ended)
        s.taken[dead] = traces.num_requests


def _note(params: Params, traces: Traces, s: State, go: Bools) -> Noted | None:
    due = go & (np.floor(s.now / params.sample_s) > s.noted)
    if not due.any():
        return None
    (e,) = np.nonzero(due)
    s.noted[e] = np.floor(s.now[e] / params.sample_s).astype(np.int64)
    work = work_left(params, s, e)
    per_device = work.sum(axis=2).mean(axis=1)
    per_device[:, 3] *= s.row.shape[1]
    at_door = 0.0
    if params.arrivals.think_s is None:
        at_door = ((traces.arrival_s[e] <= s.now[e, None, None]).sum(axis=2) - s.taken[e]).sum(axis=1).clip(min=0)
    return Noted(e, s.now[e], s.num_in_flight[e].sum(axis=1) + at_door, per_device)


def work_left(params: Params, s: State, who: tuple[Ints, ...] | Ints) -> Floats:
    """Seconds of work (..., s, 4) that requests in flight still are to device, up, down and cloud, by the lengths
    that were predicted for them."""
    phase, unit, token = s.phase[who], s.unit[who], s.token[who]
    decoding = phase >= DECODE
    decoding &= phase != MOVE
    tokens = np.where(phase == FREE, 0.0, expected_left(params, s, who))
    own = np.where(decoding | (phase <= HELD), 0.0, np.minimum(s.left[who], 1.0))
    share = params.physics.slot_share[s.plan[who]]
    work = own[..., None] * unit[..., DEVICE_S:] + tokens[..., None] * token[..., DEVICE_S:]
    work[..., 3] += tokens * token[..., 0] * share
    work[phase <= HELD] = 0.0
    unasked = (phase == WAIT) & (s.tokens[who] == 0)
    if unasked.any():
        work[unasked] += params.physics.prompt_work[s.plan[who][unasked]]
    return work


def expected_left(params: Params, s: State, who: tuple[Ints, ...] | Ints) -> Floats:
    """Later tokens that requests are expected to need still, as far as devices know."""
    known = s.delivered[who]
    later: Floats = np.where(known == 0, s.guess[who] - 1, np.maximum(s.guess[who] - known, params.fewest_left))
    if params.seeing.length_error == 0.0:
        later = np.maximum(s.guess[who] - np.maximum(known, 1), 0.0)
    return later
