"""Who is asked, what they are shown, and what becomes of their answer. It knows no decision maker.

| answer | at admission | in flight |
| --- | --- | --- |
| a plan of the table | start with it | go on with it; the present one: stay; the one a move left: return, for free |
| -1 | refuse the request | stay |
| -2 | wait, and be asked again at the next epoch | stay |

A plan that is out of reach may be chosen: the request waits for the link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from splitwise_llm.observation import Menu
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.endings import SHED, Ended, end
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.past import decided, past
from splitwise_llm.sim.phases import conditions, expected_left, work_left
from splitwise_llm.sim.physics import CLOUD_S, DEVICE_S, TOKEN, Bools, Floats, Ints
from splitwise_llm.sim.physics import PROMPT as PER_PROMPT
from splitwise_llm.sim.state import DECODE, DELIVER, HELD, MOVE, PROMPT, WAIT, State

REFUSE = STAY = -1
LATER = -2


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A menu, and the slots it is about: index arrays (n,) each."""

    table: int
    slots: tuple[Ints, Ints, Ints]
    menu: Menu


def questions(
    params: Params, traces: Traces, s: State, in_flight: bool = True, *, one_each: bool = False, apart: int = 0
) -> Iterator[Question]:
    """What is due: of each device the earliest request that asks, table by table.

    Without `in_flight` only requests at admission are asked about, and the others go on as they are. With `one_each`
    no more than one device of each world is asked. With `apart` every so many worlds are somebody's own, and get the
    very figures that they would get without the others.
    """
    if not in_flight:
        s.ask &= s.phase == HELD
    asking = s.ask.any(axis=2)
    if not asking.any():
        return
    e, d = np.nonzero(asking)
    if one_each:
        e, first = np.unique(e, return_index=True)
        d = d[first]
    number = np.where(s.ask[e, d], s.request[e, d], np.iinfo(np.int64).max)
    k = number.argmin(axis=1)
    if len(params.physics.tables) == 1:
        yield Question(0, (e, d, k), _menu(params, traces, s, 0, (e, d, k), apart))
        return
    tables = params.physics.table_of[s.plan[e, d, k]]
    for table in np.unique(tables).tolist():
        at = tables == table
        slots = (e[at], d[at], k[at])
        yield Question(table, slots, _menu(params, traces, s, table, slots, apart))


def _menu(params: Params, traces: Traces, s: State, table: int, i: tuple[Ints, Ints, Ints], apart: int) -> Menu:
    physics, places = params.physics, params.physics.places
    e, d, k = i
    rows, own = traces.link_rows, np.arange(len(e))
    load = s.published[e, :4] if params.is_shared else params.cloud_rows[s.seen_cloud[e, d]]
    x = conditions(params, rows, s.seen[e, d], load)
    down = rows[s.seen[e, d], 3] == 0
    guess = np.where(down, params.outage_guess_s, 0.0)
    x[:, places.wait] += guess
    work = work_left(params, s, (e, d))  # (n, s, 4)
    earlier = s.request[e, d] < s.request[i][:, None]
    ahead = (work[..., 0] * earlier).sum(axis=1)
    x[:, places.device_wait] = ahead
    work[own, k] = 0.0
    queues = work.sum(axis=1)
    if params.is_shared:  # what waits for a slot, and nothing for who is in one: that was priced (docs/lyapunov.md)
        queues[:, 3] = np.where(s.granted[i], 0.0, s.published[e, 3])
    first = physics.first[table]
    mine = slice(first, physics.first[table + 1])
    cloud = physics.uses_cloud[mine]
    admissible = np.where(down[:, None], ~cloud, True)
    admissible |= ~admissible.any(axis=1, keepdims=True)
    fresh = s.phase[i] == HELD
    current = np.where(fresh, -1, s.plan[i] - first)
    entry = np.zeros((3, len(e), len(cloud)))
    if not fresh.all():
        at = ~fresh
        part = tuple(a[at] for a in i)
        entry[:, at] = _entries(params, s, table, part, x[at], down[at], guess[at], ahead[at], apart)
        admissible[at, current[at]] = True
    return Menu(
        table=physics.tables[table],
        conditions=x,
        admissible=admissible,
        queues=queues,
        virtual=s.virtual[e, d],
        current=current,
        remaining_tokens=expected_left(params, s, i),
        entry_s=entry[0],
        entry_device_s=entry[1],
        entry_cloud_s=entry[2],
        waited_s=s.now[e] - s.arrival_s[i],
        past=past(params, traces, s, e, d),
        outage_s=guess,
    )


def _entries(
    params: Params, s: State, table: int, i: tuple[Ints, ...], x: Floats, down: Bools, guess: Floats, ahead: Floats,
    apart: int,
) -> Floats:  # fmt: skip
    """(3, n, plans): seconds until requests in flight can go on with each plan, and work of device and cloud."""
    physics, places = params.physics, params.physics.places
    first, last = physics.first[table], physics.first[table + 1]
    cloud, device = physics.uses_cloud[first:last], physics.uses_device[first:last]
    phase, plan, home, n = s.phase[i], s.plan[i], s.home[i], np.arange(len(i[0]))
    result = np.zeros((3, len(n), len(cloud)))
    begun = s.tokens[i] > 0
    if not begun.all():  # nothing is cached: start over with any plan
        at = ~begun
        whose = i[0][at] // (apart or len(s.now))
        ends = [*(np.flatnonzero(np.diff(whose)) + 1).tolist(), len(whose)]
        units = physics.all_units(PER_PROMPT, table, x[at], ends)
        wait = np.maximum(
            np.where(cloud, x[at, places.wait, None], 0), np.where(device, x[at, places.device_wait, None], 0)
        )
        result[:, at] = [wait + units[..., 0], units[..., DEVICE_S], units[..., CLOUD_S]]
    if begun.any():
        at = begun
        moves = physics.moves.entries(np.full(at.sum(), table), home[at], _context(params, s, i)[at], x[at])
        place = physics.moves.place[first:last]
        wait = np.maximum(
            np.where(moves.new_cloud, x[at, places.wait, None], 0),
            np.where(moves.new_device, x[at, places.device_wait, None], 0),
        )
        # A plan that keeps using the cloud, or is moved to over the link, waits for the end of an outage.
        wait = np.maximum(wait, np.where(moves.needs_link, guess[at, None], 0))
        result[:, at] = np.stack([wait + moves.seconds, moves.device_s, moves.cloud_s])[:, :, place]
        stalls = down[at, None] & cloud
        result[0, at] = np.maximum(result[0, at], np.where(stalls, guess[at, None], 0))
    result[:, n, plan - first] = _staying(params, s, i, x, down, guess, ahead, phase, plan, home)
    return result


def _context(params: Params, s: State, i: tuple[Ints, ...]) -> Floats:
    context: Floats = params.physics.prompt_tokens[s.home[i]] + s.delivered[i]
    return context


def _staying(
    params: Params, s: State, i: tuple[Ints, ...], x: Floats, down: Bools, guess: Floats, ahead: Floats, phase: Ints,
    plan: Ints, home: Ints,
) -> Floats:  # fmt: skip
    """(3, n): the same of going on as they are. What streams from the cloud goes on in an outage: its entry makes
    the end of the outage or of the generation, whichever is later, the time of completion."""
    physics, places = params.physics, params.physics.places
    left = np.minimum(s.left[i], 1.0)
    cloud, device = physics.uses_cloud[plan], physics.uses_device[plan]
    unit = s.unit[i]
    seconds = np.where(phase == DECODE, 0.0, left * np.where(phase == WAIT, 0.0, unit[:, 0]))
    early = (phase == WAIT) | (phase == PROMPT)
    if early.any():
        prompt = physics.units(PER_PROMPT, plan, x)
        wait = np.where(phase == WAIT, x[:, places.wait] - guess, 0.0)
        begun = s.tokens[i] > 0
        fill = np.where(begun, 0.0, np.where(phase == PROMPT, left, 1.0) * prompt[:, 0])
        seconds = np.where(early, left * wait + fill, seconds)
        moving = (phase == WAIT) & begun
        if moving.any():
            move = physics.moves.entry(physics.table_of[plan], home, plan, _context(params, s, i), x)
            seconds = np.where(moving, seconds + move.seconds, seconds)
    seconds = seconds + np.where(device & (phase != DECODE), ahead, 0.0)
    seconds = seconds + np.where(s.hold_s[i] > 0, s.hold_s[i], 0.0)
    streams = physics.streams[plan] & ((phase == DECODE) | (phase == DELIVER))
    stalls = down & cloud & ~streams
    seconds = np.where(stalls, seconds + guess, seconds)
    away = down & streams
    if away.any():
        tpot = physics.units(TOKEN, plan, x)[:, 0]
        still = np.maximum(s.guess[i] - s.tokens[i], 0.0) * tpot
        seconds = np.where(away, np.maximum(guess, still) - expected_left(params, s, i) * tpot, seconds)
    busy = np.where((phase == PROMPT) | (phase == MOVE), left, 0.0)
    return np.stack([seconds, busy * unit[:, DEVICE_S], busy * unit[:, CLOUD_S]])


def answer(params: Params, traces: Traces, s: State, question: Question, choice: Ints) -> list[Ended]:
    """Do as was decided, in place."""
    ended: list[Ended] = []
    i, first = question.slots, params.physics.first[question.table]
    plans = len(params.physics.tables[question.table])
    if len(choice) != len(i[0]) or (choice >= plans).any() or (choice < LATER).any():
        raise ValueError(f"an answer is {LATER}, {STAY} or a plan below {plans} for each of {len(i[0])} systems")
    if params.epoch_s >= NEVER_S and (choice == LATER).any():
        raise ValueError(f"{LATER} (ask again later) was answered where nobody is ever asked again")
    decided(params, traces, s, i[0], i[1])
    s.ask[i] = False
    s.epoch_s[i] = s.now[i[0]] + params.epoch_s
    s.epoch_tokens[i] = s.tokens[i] + params.epoch_tokens
    held = s.phase[i] == HELD
    row = first + choice
    refused = held & (choice == REFUSE)
    begins = held & (choice >= 0)
    other = ~held & (choice >= 0) & (row != s.plan[i])
    if refused.any():
        end(params, traces, s, _of(i, refused), SHED, ended)
    if begins.any():
        j = _of(i, begins)
        s.first_plan[j] = row[begins]
        _begin(params, s, j, row[begins])
    if other.any():
        _change(params, traces, s, _of(i, other), row[other])
    return ended


def _of(i: tuple[Ints, ...], at: Bools) -> tuple[Ints, ...]:
    return tuple(part[at] for part in i)


def _begin(params: Params, s: State, i: tuple[Ints, ...], row: Ints) -> None:
    """Requests start, or start over, with plans `row`: nothing of theirs is cached anywhere."""
    cloud = params.physics.uses_cloud[row]
    waits = cloud & ~s.granted[i] & (np.full(len(row), params.is_shared) | (s.load[i[0], 3] > 0))
    s.plan[i] = s.home[i] = row
    s.phase[i], s.left[i], s.dirty[i] = np.where(waits, WAIT, PROMPT), 1.0, True
    s.asked_s[i] = NEVER_S
    gone = s.granted[i] & ~cloud
    s.granted[_of(i, gone)] = False
    _wake(params, s, i, cloud)


def _wake(params: Params, s: State, i: tuple[Ints, ...], cloud: Bools) -> None:
    """A radio that has slept takes its time."""
    link = params.link
    if link.wake_s:
        asleep = cloud & (s.now[i[0]] - s.used_s[i[0], i[1]] > link.idle_after_s)
        s.hold_s[i] = np.where(asleep, np.maximum(s.hold_s[i], link.wake_s), s.hold_s[i])


def _change(params: Params, traces: Traces, s: State, i: tuple[Ints, ...], row: Ints) -> None:
    """Requests in flight go on with plans `row`."""
    physics = params.physics
    s.dirty[i] = True
    begun = s.tokens[i] > 0
    cloud = physics.uses_cloud[row]
    waiting = ~begun & (s.phase[i] == WAIT) & cloud
    over = ~begun & ~waiting
    if waiting.any():  # it keeps its place in the queue
        j = _of(i, waiting)
        s.plan[j] = s.home[j] = row[waiting]
    if over.any():
        j = _of(i, over)
        s.moves[j] += 1
        _begin(params, s, j, row[over])
    place = physics.moves.place
    there = begun & (place[row] == place[s.home[i]])
    if there.any():
        j = _of(i, there)
        back = (s.phase[j] == MOVE) | (s.phase[j] == WAIT)
        ghost = s.ghost[j]
        s.tokens[j] = np.where(ghost > 0, s.output[j] - ghost, s.tokens[j])
        s.ghost[j] = 0.0
        s.plan[j] = s.home[j] = row[there]
        stuck = s.phase[j] == DELIVER
        s.phase[j] = np.where(stuck, DELIVER, DECODE)
        s.left[j] = np.where(back, s.output[j] - s.tokens[j], s.left[j])
    moves = begun & ~there
    if moves.any():
        _move(params, traces, s, _of(i, moves), row[moves])


def _move(params: Params, traces: Traces, s: State, i: tuple[Ints, ...], row: Ints) -> None:
    physics, home = params.physics, s.home[i]
    up = traces.link_rows[s.row[i[0], i[1]], 3] > 0
    settled = (s.phase[i] == DECODE) | (s.phase[i] == DELIVER)
    # What the cloud has generated and the link not delivered is lost to the new plan; the cloud does not know yet.
    haunted = settled & physics.streams[home] & ~up
    s.ghost[i] = np.where(haunted, np.maximum(s.output[i] - s.tokens[i], 1e-9), s.ghost[i])
    s.ghost_plan[i] = home
    s.tokens[i] = np.where(settled, s.delivered[i], s.tokens[i])
    enters = physics.uses_cloud[row] & ~physics.uses_cloud[home] & ~s.granted[i]
    enters &= np.full(len(row), params.is_shared) | (s.load[i[0], 3] > 0)
    s.plan[i], s.left[i], s.phase[i] = row, 1.0, np.where(enters, WAIT, MOVE)
    s.asked_s[i] = np.where(enters, NEVER_S, s.asked_s[i])
    s.moves[i] += 1
    _wake(params, s, i, physics.uses_cloud[row])


__all__ = ["LATER", "REFUSE", "STAY", "Question", "answer", "questions"]
