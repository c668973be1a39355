"""A cloud that the simulated devices load: continuous batching, sessions, cache blocks, preemption.

An iteration is a roofline of the sequences it decodes, of the keys and values they read and of a chunk of prompts
that it takes in. Sequences join at its boundaries; chunks slow everybody. A split session decodes only while it
visits, and holds its session and its blocks all the time.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def _blocks(params: Params, positions: Floats) -> Floats:
    """That so many positions (e, d, s) take."""
    blocks: Floats = np.ceil(positions / _shared(params).block_positions)
    return blocks


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """Those of a batch: arrays (e,)."""

    batch: Floats
    """Sequences in it."""
    plain_s: Floats
    mixed_s: Floats
    """With a chunk of prompts."""

    @classmethod
    def of(cls, params: Params, s: State, joined: Floats, positions: Floats) -> Iterations:
        """Of sequences that are in them at these shares (e, d, s)."""
        cloud, server = _shared(params), params.server
        batch = joined.sum(axis=(1, 2)) + cloud.background
        rows = (joined * params.physics.rows_per_step[s.plan]).sum(axis=(1, 2)) + cloud.background
        cached = (joined * positions).sum(axis=(1, 2)) + cloud.background * REFERENCE_CONTEXT
        plain = server.iteration_s(np.maximum(rows, 1.0), np.maximum(cached, REFERENCE_CONTEXT))
        return cls(batch, plain, server.iteration_s(rows, cached, float(cloud.chunk)))


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What the sessions of a moment make of the cloud, as far as prices do not change it."""

    joined: Floats
    """(e, d, s): 1 of those that are in every iteration."""
    positions: Floats
    """(e, d, s): cached."""
    visiting: tuple[Ints, ...]
    """Slots (n,) of split sessions that decode: they are in the iterations in which their layers are computed."""
    filling: tuple[Ints, ...]
    """Slots (n,) of prompts and moves."""
    iterations: Iterations
    """Without those that visit."""
    wait_s: Floats
    """(e,): for admission."""

    @property
    def follows_prices(self) -> bool:
        """Whether the load is another one where prices are: whole sessions that decode are in every iteration."""
        return len(self.visiting[0]) > 0 or len(self.filling[0]) > 0

    @classmethod
    def of(cls, params: Params, s: State) -> Served:
        physics = params.physics
        decoding = s.granted & (s.phase == DECODE) & (s.hold_s <= 0)
        streams = physics.streams[s.plan]
        joined = np.where(decoding & streams, 1.0, 0.0)
        joined += (s.ghost > 0) & s.granted
        positions = _positions(params, s)
        filling = s.granted & ((s.phase == PROMPT) | (s.phase == MOVE))
        return cls(
            joined, positions, np.nonzero(decoding & ~streams), np.nonzero(filling),
            Iterations.of(params, s, joined, positions), _admission_s(params, s),
        )  # fmt: skip


def load(params: Params, s: State, served: Served) -> None:
    """What the sessions make of the cloud now, in place; those that use it are priced anew where that changed."""
    now = served.iterations
    if len(served.visiting[0]):
        joined = served.joined.copy()
        joined[served.visiting] += _visits(params, s, served.visiting)
        now = Iterations.of(params, s, joined, served.positions)
    mixing = np.zeros(len(now.batch))
    if len(served.filling[0]):
        wanted = np.zeros(s.left.shape)
        unit = s.unit[served.filling]
        wanted[served.filling] = unit[:, CLOUD_S] * s.fill[served.filling[0]] / np.maximum(unit[:, 0], 1e-9)
        mixing = np.minimum(wanted.sum(axis=(1, 2)), 1.0)
    seconds = (1 - mixing) * now.plain_s + mixing * now.mixed_s
    slow, fill = seconds / params.server.one_s, now.mixed_s / params.chunk_s
    others = now.batch + mixing > 1 + 1e-6
    new = np.array([slow, slow / np.maximum(now.batch, 1.0), np.where(others, seconds / 2, 0.0)]).T
    changed = (np.abs(new - s.load[:, :3]) > SETTLED * (new + 1e-9)).any(axis=1)
    changed |= np.abs(fill - s.fill) > SETTLED * fill
    s.load[:, 3] = served.wait_s
    if changed.any():
        s.load[changed, :3], s.fill[changed] = new[changed], fill[changed]
        s.dirty |= changed[:, None, None] & s.granted & (s.phase >= PROMPT)


def publish(params: Params, s: State) -> None:
    """Devices know the load as it is, where it is live."""
    if not _shared(params).information_s:
        s.published[:, :4] = s.load


def _visits(params: Params, s: State, i: tuple[Ints, ...]) -> Floats:
    """Share (n,) of the iterations that sessions are in: what their layers take, over what their tokens take."""
    share = params.physics.cloud_layers[s.plan[i]]
    one = params.server.one_s
    result: Floats = np.minimum(share * one * s.load[i[0], 0] / np.maximum(s.token[i][:, 0], 1e-9), 1.0)
    return result


def _admission_s(params: Params, s: State) -> Floats:
    """How long whoever asks now will wait: until as many sessions have ended as are before it."""
    cloud = _shared(params)
    waiting = ((s.phase == WAIT) & (s.asked_s < NEVER_S)).sum(axis=(1, 2))
    free = np.maximum(cloud.sessions - s.granted.sum(axis=(1, 2)), 0)
    ahead = np.maximum(waiting + 1 - free, 0)
    result: Floats = ahead * s.residence_s / cloud.sessions
    return result


def shares(s: State, rate: Floats) -> Floats:
    """By what prompts are slowed (e, d, s) because several want to be taken in at once."""
    filling = np.nonzero((s.phase == PROMPT) | (s.phase == MOVE))
    result = np.ones_like(rate)
    if len(filling[0]):
        use = np.zeros_like(rate)
        one = s.unit[filling][:, CLOUD_S] * s.fill[filling[0]] * rate[filling]
        use[filling] = one
        total = use.sum(axis=(1, 2))[filling[0]]
        result[filling] = np.where((one > 0) & (total > 1), 1 / np.maximum(total, 1.0), 1.0)
    return result


def until(params: Params, s: State, rate: Floats, served: Served) -> Floats:
    """Seconds (e,) until the cache is full or the load is published."""
    cloud = _shared(params)
    growth = np.where(s.granted & (s.phase == DECODE), rate, 0.0) * params.physics.cloud_layers[s.plan]
    free = params.blocks - _blocks(params, served.positions).sum(axis=(1, 2))
    with np.errstate(divide="ignore"):
        full: Floats = np.maximum(free, 1.0) * cloud.block_positions / growth.sum(axis=(1, 2))
    if cloud.information_s:
        full = np.minimum(full, s.published[:, 4] - s.now)
    return np.maximum(full, SOONEST_S)


def govern(params: Params, s: State, go: Bools) -> None:
    """Preempt while the cache is overfull, admit while there is room, publish the load."""
    cloud = _shared(params)
    limit = params.blocks
    used = _blocks(params, _positions(params, s))
    over = (used.sum(axis=(1, 2)) > limit) & go
    for e in np.nonzero(over)[0].tolist():
        _preempt(params, s, e, used[e], limit)
    waiting = (s.phase == WAIT) & (s.asked_s < NEVER_S) & go[:, None, None]
    for e in np.nonzero(waiting.any(axis=(1, 2)))[0].tolist():
        _admit(params, s, e, waiting[e], limit)
    if cloud.information_s:
        due = (s.published[:, 4] <= s.now + 1e-9) & go
        s.published[due, :4], s.published[due, 4] = s.load[due], s.now[due] + cloud.information_s


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
    free = limit - float(_blocks(params, _positions(params, s))[e].sum())
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
