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
from splitwise_llm.sim.changes import arrive, change_cloud, change_links, hear, learn
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.endings import EPS, Ended, go_on, run_down
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.phases import SMALL_S, conditions, refresh, work_left
from splitwise_llm.sim.physics import DEVICE_S, DOWN_S, TOKEN, Bools, Floats, Ints
from splitwise_llm.sim.state import DECODE, FREE, MOVE, PROMPT, WAIT, State

SETTLING_ROUNDS = 30


@dataclass(frozen=True, slots=True, eq=False)
class Noted:
    """Queues of some worlds at one moment: arrays (n,)."""

    world: Ints
    now: Floats
    in_flight: Floats
    """Requests at all devices, those at the doors included."""
    work: Floats
    """(n, 4): seconds of work left for device, up, down (mean over devices), and cloud (all)."""

    def of_worlds(self, worlds: range) -> Noted:
        """Of some worlds alone, counted from the first of them."""
        at = (self.world >= worlds.start) & (self.world < worlds.stop)
        return Noted(self.world[at] - worlds.start, self.now[at], self.in_flight[at], self.work[at])


def rates(params: Params, traces: Traces, s: State) -> tuple[Floats, Bools]:
    """Units per second of every slot (e, d, s), and which links are up (e, d)."""
    up = traces.link_rows[s.row, 3] > 0
    running = (s.phase >= WAIT) & (s.hold_s <= 0) & (~s.needs_link | up[:, :, None])
    rate = np.zeros(s.left.shape)
    np.divide(1.0, s.unit[..., 0], out=rate, where=running)
    for lane in range(DEVICE_S, DOWN_S + 1) if params.slots > 1 else ():
        use = s.unit[..., lane] * rate  # (e, d, s); whom an earlier lane holds up asks for less of the later ones
        total = use.sum(axis=2)
        e, d = np.nonzero(total > 1 + EPS)
        if len(e):
            slowed = np.where(use[e, d] > EPS, 1 / total[e, d, None], 1.0)
            rate[e, d] *= _first_come(use[e, d], s.request[e, d]) if lane == DEVICE_S else slowed
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
    hear(traces, s, go)
    served = None
    if params.is_shared:
        cloud.govern(params, s, go)
        served = _settle(params, traces, s)
    refresh(params, traces, s)
    rate, up = rates(params, traces, s)
    dt = np.where(go, _until(params, traces, s, rate, up, served), 0.0)
    _flow(params, traces, s, rate, up, dt)
    moved = go[:, None, None] & (s.phase >= WAIT)
    go_on(params, traces, s, moved & (s.left <= EPS), up, ended)
    change_links(params, traces, s, go)
    change_cloud(params, traces, s, go)
    learn(params, traces, s, go)
    arrive(params, traces, s, go)
    if params.battery:
        run_down(params, traces, s, go, ended)
    now = s.now[:, None, None]
    due = (s.epoch_s <= now + EPS) | ((s.phase == DECODE) & (s.tokens >= s.epoch_tokens - 1e-7))
    s.ask |= due & (s.phase != FREE) & go[:, None, None]
    finished = (s.taken >= traces.num_requests).all(axis=1) & (s.phase == FREE).all(axis=(1, 2))
    s.is_over |= go & finished
    return ended, _note(params, traces, s, go)


def _settle(params: Params, traces: Traces, s: State) -> cloud.Served:
    """Load follows from prices and prices from load: go on until neither changes, so that an event at which nothing
    happens changes nothing."""
    served = cloud.Served.of(params, s)
    cloud.load(params, s, served)
    for _ in range(SETTLING_ROUNDS - 1):
        if not s.dirty.any():
            break
        refresh(params, traces, s)
        if not served.follows_prices:
            break
        cloud.load(params, s, served)
    cloud.publish(params, s)
    return served


def _until(
    params: Params, traces: Traces, s: State, rate: Floats, up: Bools, served: cloud.Served | None
) -> Floats:  # fmt: skip
    """Seconds (e,) to the next event."""
    units = np.where(s.phase == DECODE, np.minimum(s.left, s.epoch_tokens - s.tokens), s.left)
    slot = np.full(rate.shape, np.inf)
    with np.errstate(over="ignore"):
        np.divide(units, rate, out=slot, where=rate > 0)
    now = s.now[:, None]
    np.minimum(slot, s.epoch_s - now[..., None], out=slot, where=s.phase != FREE)
    held = s.hold_s > 0
    if held.any():
        np.minimum(slot, s.hold_s, out=slot, where=held & up[:, :, None])
    device = np.minimum(slot.min(axis=2), s.next_s - now)
    room = (s.phase == FREE).any(axis=2) & (s.taken < traces.num_requests)
    device = np.minimum(device, np.where(room, s.ready_s - now, np.inf))
    if params.battery:
        watts = (s.unit[..., 1] * rate).sum(axis=2) + params.idle_w
        device = np.minimum(device, np.maximum(s.battery_j, 0) / np.maximum(watts, EPS))
    result = np.minimum(device.min(axis=1), s.cloud_next_s - s.now)
    if served is not None:
        result = np.minimum(result, cloud.until(params, s, rate, served))
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
    arrives = decoding if up.all() else decoding & (up[:, :, None] | ~physics.streams[s.plan])
    np.copyto(s.delivered, s.tokens, where=arrives)
    held = s.hold_s > 0
    if held.any():
        np.copyto(s.hold_s, np.maximum(s.hold_s - by_slot, 0.0), where=held & up[:, :, None])
    busy = s.phase != FREE
    idle_w = params.idle_w
    active_j = done * s.unit[..., 1]
    count = np.maximum(busy.sum(axis=2), 1)
    i = e, d, k = np.nonzero(busy)
    plan, phase, seconds = s.plan[i], s.phase[i], dt[e]
    spent = s.spent[i] + done[i][:, None] * s.unit[i][:, 1:4]
    spent[:, 0] += idle_w[d] * seconds / count[e, d]
    spent[:, 1] += physics.others_idle_w[plan] * seconds
    s.spent[i] = spent
    mode = np.where(phase < PROMPT, 3, np.where(phase == MOVE, 4, physics.mode[plan]))
    s.mode_s[e, d, k, mode] += seconds
    joules = active_j.sum(axis=2) + idle_w * dt[:, None]
    s.drawn_j += joules
    if params.battery:
        s.battery_j -= joules
    if params.budgets.battery_w is not None:
        s.virtual[:] = lyapunov.drained(s.virtual, params.budgets, joules, dt[:, None])
    s.now += dt
    if params.link.wake_s:
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


__all__ = ["EPS", "SMALL_S", "Noted", "conditions", "rates", "refresh", "step", "work_left"]
