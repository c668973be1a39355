"""Phases that are over, and requests that leave. It does not know why time passed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from splitwise_llm import lyapunov
from splitwise_llm.sim import cloud
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.past import answered
from splitwise_llm.sim.physics import Bools, Floats, Ints
from splitwise_llm.sim.state import DECODE, DELIVER, FREE, MOVE, PROMPT, WAIT, State

EPS = 1e-9
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

    def of_worlds(self, worlds: range) -> Ended:
        """Of some worlds alone, counted from the first of them."""
        at = (self.world >= worlds.start) & (self.world < worlds.stop)
        some = {item.name: getattr(self, item.name)[at] for item in fields(self)}
        return Ended(**some | {"world": some["world"] - worlds.start})


def go_on(params: Params, traces: Traces, s: State, over: Bools, up: Bools, ended: list[Ended]) -> None:
    """Slots whose phase is over go on to the next."""
    if not over.any():
        return
    e, d, k = np.nonzero(over)
    phase = s.phase[e, d, k]
    s.dirty[e, d, k] = True
    for number in sorted(set(phase.tolist())):
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
    if done:
        answered(s, e, d, s.output[i])
    total = now - s.arrival_s[i] if done else np.full(len(e), params.t_max_s)
    deadline = params.budgets.deadline_s
    missed = (total > deadline).astype(np.float64) if deadline is not None else np.zeros(len(e))
    nats = params.physics.nats[s.plan[i]]
    g = (params.budgets, spent[:, 0], missed, nats, s.output[i])
    if len(set((e * s.row.shape[1] + d).tolist())) == len(e):
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


def run_down(params: Params, traces: Traces, s: State, go: Bools, ended: list[Ended]) -> None:
    """A device whose battery is empty gives up what it has, and will not take more."""
    dead = (s.battery_j <= EPS) & go[:, None] & (s.taken < traces.num_requests)
    if dead.any():
        busy = np.nonzero(dead[:, :, None] & (s.phase != FREE))
        if len(busy[0]):
            end(params, traces, s, busy, ABANDONED, ended)
        s.taken[dead] = traces.num_requests
