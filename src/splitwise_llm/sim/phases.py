"""What the phases of requests in flight take, and what work they have left. It lets no time pass."""

from __future__ import annotations

import numpy as np

from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.physics import CLOUD_S, DEVICE_S, DOWN_S, TOKEN, UP_S, Bools, Floats, Ints
from splitwise_llm.sim.physics import PROMPT as PER_PROMPT
from splitwise_llm.sim.state import DECODE, DELIVER, FREE, HELD, MOVE, PROMPT, WAIT, State

SMALL_S = 1e-9


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
    i = e, d, k = np.nonzero(s.dirty)
    if not len(e):
        return
    s.dirty[i] = False
    physics, phase, plan = params.physics, s.phase[i], s.plan[i]
    load = s.load[e]
    x = conditions(params, traces.link_rows, s.row[e, d], load)
    token = physics.units(TOKEN, plan, x)
    unit = token.copy()
    needs_link = physics.needs_link[TOKEN, plan]
    if params.is_shared:
        x[:, params.physics.places.slow] = s.fill[e]
    for number in set(phase.tolist()):
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
    s.unit[i], s.token[i], s.needs_link[i] = unit, token, needs_link


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
