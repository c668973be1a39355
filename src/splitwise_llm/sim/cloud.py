"""A cloud that the simulated devices load: continuous batching, sessions, cache blocks, preemption.

An iteration is a roofline of the sequences it decodes, of the keys and values they read and of a chunk of prompts
that it takes in. Sequences join at its boundaries; chunks slow everybody. A split session decodes only while it
visits, and holds its session and its blocks all the time.
"""

from __future__ import annotations

import numpy as np

from splitwise_llm.sim.batching import REFERENCE_CONTEXT
from splitwise_llm.sim.params import NEVER_S, Params, SharedCloud
from splitwise_llm.sim.physics import CLOUD_S, Bools, Floats, Ints
from splitwise_llm.sim.state import DECODE, MOVE, PROMPT, WAIT, State

SOONEST_S = 1e-6
SETTLED = 1e-4
"""Relative change of a load below which nothing is priced anew."""
RESIDENCE_STEP = 0.05
"""Weight of the newest in the mean time a session is held."""


def _shared(params: Params) -> SharedCloud:
    assert isinstance(params.cloud, SharedCloud)
    return params.cloud


def _positions(params: Params, s: State) -> Floats:
    """Cached positions of every session (e, d, s), of the layers that are in the cloud."""
    plan = np.where(params.physics.uses_cloud[s.plan], s.plan, s.home)
    held = s.granted & ((s.phase >= PROMPT) | (s.tokens > 0))
    share = params.physics.cloud_layers[plan]
    return np.where(held, (params.physics.prompt_tokens[plan] + s.tokens) * share, 0.0)


def _used(params: Params, s: State) -> Floats:
    """Blocks in use (e, d, s)."""
    used: Floats = np.ceil(_positions(params, s) / _shared(params).block_positions)
    return used


def load(params: Params, s: State) -> None:
    """What the sessions make of the cloud now, in place; those that use it are priced anew where that changed."""
    cloud = _shared(params)
    decoding = s.granted & (s.phase == DECODE) & (s.hold_s <= 0)
    # A split session is in the share of the iterations in which its layers are computed.
    joined = np.where(decoding, np.where(params.physics.streams[s.plan], 1.0, _visits(params, s)), 0.0)
    joined += (s.ghost > 0) & s.granted
    batch = joined.sum(axis=(1, 2)) + cloud.background
    rows = (joined * params.physics.rows_per_step[s.plan]).sum(axis=(1, 2)) + cloud.background
    positions = (joined * _positions(params, s)).sum(axis=(1, 2)) + cloud.background * REFERENCE_CONTEXT
    filling = s.granted & ((s.phase == PROMPT) | (s.phase == MOVE)) & (s.unit[..., CLOUD_S] > 0)
    wanted = np.where(filling, s.unit[..., CLOUD_S] * s.fill[:, None, None] / np.maximum(s.unit[..., 0], 1e-9), 0.0)
    mixing = np.minimum(wanted.sum(axis=(1, 2)), 1.0)
    server, one = params.server, params.server.one_s
    plain = server.iteration_s(np.maximum(rows, 1.0), np.maximum(positions, REFERENCE_CONTEXT))
    mixed = server.iteration_s(rows, positions, float(cloud.chunk))
    alone = server.iteration_s(np.zeros(1), np.zeros(1), float(cloud.chunk))
    seconds = (1 - mixing) * plain + mixing * mixed
    slow, fill = seconds / one, mixed / alone
    others = batch + mixing > 1 + 1e-6
    new = np.stack(
        [slow, slow / np.maximum(batch, 1.0), np.where(others, seconds / 2, 0.0), _admission_s(params, s)], axis=1
    )
    changed = (np.abs(new[:, :3] - s.load[:, :3]) > SETTLED * (new[:, :3] + 1e-9)).any(axis=1)
    changed |= np.abs(fill - s.fill) > SETTLED * fill
    s.load[changed, :3], s.fill[changed] = new[changed, :3], fill[changed]
    s.load[:, 3] = new[:, 3]
    s.dirty |= changed[:, None, None] & s.granted & (s.phase >= PROMPT)
    if not cloud.information_s:
        s.published[:, :4] = s.load
        s.published[:, 4] = backlog_s(params, s)


def _visits(params: Params, s: State) -> Floats:
    """Share of the iterations that a session is in: what its layers take, over what its tokens take."""
    share = params.physics.cloud_layers[s.plan]
    one = params.server.one_s
    result: Floats = np.minimum(share * one * s.load[:, 0, None, None] / np.maximum(s.token[..., 0], 1e-9), 1.0)
    return result


def _admission_s(params: Params, s: State) -> Floats:
    """How long whoever asks now will wait: until as many sessions have ended as are before it."""
    cloud = _shared(params)
    waiting = ((s.phase == WAIT) & (s.asked_s < NEVER_S)).sum(axis=(1, 2))
    free = np.maximum(cloud.sessions - s.granted.sum(axis=(1, 2)), 0)
    ahead = np.maximum(waiting + 1 - free, 0)
    result: Floats = ahead * s.residence_s / cloud.sessions
    return result


def backlog_s(params: Params, s: State) -> Floats:
    """Work before the cloud (e,): slot-seconds over slots and prompts, of all devices."""
    share = params.physics.slot_share[s.plan]
    tokens = np.maximum(s.guess - s.tokens, params.fewest_left)
    decode = tokens * (s.token[..., 0] * share + s.token[..., CLOUD_S])
    prompt = np.where((s.phase == PROMPT) | (s.phase == MOVE), s.left * s.unit[..., CLOUD_S], 0.0)
    there = (s.phase >= WAIT) & params.physics.uses_cloud[s.plan]
    result: Floats = np.where(there, decode + prompt, 0.0).sum(axis=(1, 2))
    return result


def shares(s: State, rate: Floats) -> Floats:
    """By what prompts are slowed (e, d, s) because several want to be taken in at once."""
    filling = (s.phase == PROMPT) | (s.phase == MOVE)
    use = np.where(filling, s.unit[..., CLOUD_S] * s.fill[:, None, None] * rate, 0.0)
    total = use.sum(axis=(1, 2))[:, None, None]
    result: Floats = np.where((use > 0) & (total > 1), 1 / np.maximum(total, 1.0), 1.0)
    return result


def until(params: Params, s: State, rate: Floats) -> Floats:
    """Seconds (e,) until the cache is full or the load is published."""
    cloud = _shared(params)
    growth = np.where(s.granted & (s.phase == DECODE), rate, 0.0) * params.physics.cloud_layers[s.plan]
    free = params.blocks - _used(params, s).sum(axis=(1, 2))
    with np.errstate(divide="ignore"):
        full: Floats = np.maximum(free, 1.0) * cloud.block_positions / growth.sum(axis=(1, 2))
    if cloud.information_s:
        full = np.minimum(full, s.published[:, 5] - s.now)
    return np.maximum(full, SOONEST_S)


def govern(params: Params, s: State, go: Bools) -> None:
    """Preempt while the cache is overfull, admit while there is room, publish the load."""
    cloud = _shared(params)
    limit = params.blocks
    used = _used(params, s)
    over = (used.sum(axis=(1, 2)) > limit) & go
    for e in np.nonzero(over)[0].tolist():
        _preempt(params, s, e, used[e], limit)
    waiting = (s.phase == WAIT) & (s.asked_s < NEVER_S) & go[:, None, None]
    for e in np.nonzero(waiting.any(axis=(1, 2)))[0].tolist():
        _admit(params, s, e, waiting[e], limit)
    if cloud.information_s:
        due = (s.published[:, 5] <= s.now + 1e-9) & go
        s.published[due, :4], s.published[due, 4] = s.load[due], backlog_s(params, s)[due]
        s.published[due, 5] = s.now[due] + cloud.information_s


def _preempt(params: Params, s: State, e: int, used: Floats, limit: int) -> None:
    """The last ones admitted give their blocks back; they ask again and compute what was cached anew."""
    d, k = np.nonzero(s.granted[e] & (s.phase[e] == DECODE) & params.physics.uses_cloud[s.plan[e]])
    total = used.sum()
    for n in np.argsort(-s.granted_s[e, d, k], kind="stable")[: max(len(d) - 1, 0)].tolist():
        if total <= limit:
            return
        i = (e, d[n], k[n])
        total -= used[d[n], k[n]]
        s.granted[i], s.phase[i], s.left[i], s.dirty[i] = False, WAIT, 1.0, True
        s.asked_s[i] = s.now[e]
        s.preempted[i] += 1


def _admit(params: Params, s: State, e: int, waiting: Bools, limit: int) -> None:
    """First come, first served, as long as there are sessions and blocks."""
    cloud = _shared(params)
    room = cloud.sessions - int(s.granted[e].sum())
    if room <= 0:
        return
    d, k = np.nonzero(waiting)
    free = limit - float(_used(params, s)[e].sum())
    for n in np.argsort(s.asked_s[e, d, k], kind="stable").tolist():
        i = (e, d[n], k[n])
        plan = s.plan[i]
        positions = (params.physics.prompt_tokens[plan] + s.tokens[i]) * params.physics.cloud_layers[plan]
        need = np.ceil(positions / cloud.block_positions)
        alone = not s.granted[e].any()  # whatever does not fit beside others has to fit alone
        if room <= 0 or (need > free and not alone):
            return
        room, free = room - 1, free - need
        s.granted[i], s.granted_s[i] = True, s.now[e]
        s.phase[i] = PROMPT if s.tokens[i] == 0 else MOVE
        s.left[i], s.dirty[i] = 1.0, True


def release(params: Params, s: State, i: tuple[Ints, ...]) -> None:
    """Sessions of slots `i` end, if they had any."""
    held = s.granted[i]
    if not held.any():
        return
    j = tuple(part[held] for part in i)
    for e, seconds in zip(j[0].tolist(), (s.now[j[0]] - s.granted_s[j]).tolist(), strict=True):
        s.residence_s[e] += RESIDENCE_STEP * (seconds - s.residence_s[e])
    s.granted[j] = False
