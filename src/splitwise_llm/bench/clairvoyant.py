"""The earliest a request can be done for whoever knows the whole trace. It knows no decision maker.

A time-dependent network in which nobody overtakes: a *stand* is a plan with a number of tokens done, and setting out
later never means arriving earlier. Its edges are one more token with the same plan, and a move to another plan with
at most one token gained on the way, so that moves inside a token are counted in: the bound is at most a token's time
a move below what can be reached. What other requests take from device and link is left out, and so are waking and
reconnecting radios and failed moves, which only cost time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.draws import Path, Traces
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.physics import CONTEXT_CLASS, DEVICE_J, TOKEN, Bools, Floats, Ints, Physics
from splitwise_llm.sim.physics import PROMPT as PER_PROMPT
from splitwise_llm.sim.step import SMALL_S, conditions

_DOUBLINGS = 6
_KEPT = 8
_AT_ONCE = 512
"""Classes whose moves are priced at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """Which class holds from when: of every link of every world, with its cloud."""

    starts_s: Floats
    """(paths, spans), padded with infinity."""
    ends_s: Floats
    kind: Ints
    """(paths, spans): a class, that is a row of link with a row of cloud."""
    up_next: Ints
    """(paths, spans): the first span from this one on in which the link is up; the number of spans if none is."""
    up: Bools
    """(classes,)"""
    wait_s: Floats
    """(classes,): the cloud's admission."""
    x: Floats
    """(classes, conditions)"""


def timeline(params: Params, traces: Traces, until_s: float) -> Timeline:
    """The classes of all paths (world by world, device by device) up to a time; the last one is taken to stay."""
    worlds, devices = traces.arrival_s.shape[:2]
    pairs: dict[tuple[int, int], int] = {}
    spans: list[tuple[Floats, Ints]] = []
    for e in range(worlds):
        cloud = _unrolled(traces.cloud, (e,), until_s)
        for d in range(devices):
            link = _unrolled(traces.link, (e, d), until_s)
            starts = np.union1d(link[0], cloud[0])
            rows = [of[1][np.searchsorted(of[0], starts, side="right") - 1].tolist() for of in (link, cloud)]
            kinds = [pairs.setdefault(pair, len(pairs)) for pair in zip(*rows, strict=True)]
            spans.append((starts, np.array(kinds, np.int64)))
    most = max(len(kinds) for _, kinds in spans)
    starts_s = np.stack([np.concatenate([s, np.full(most - len(s), np.inf)]) for s, _ in spans])
    kind = np.stack([np.concatenate([k, np.full(most - len(k), k[-1])]) for _, k in spans])
    link_row, cloud_row = np.array(list(pairs), np.int64).T
    load = params.cloud_rows[cloud_row]
    up = traces.link_rows[link_row, 3] > 0
    up_next = np.where(up[kind], np.arange(most), most)
    up_next = np.minimum.accumulate(up_next[:, ::-1], axis=1)[:, ::-1]
    ends_s = np.concatenate([starts_s[:, 1:], np.full((len(spans), 1), np.inf)], axis=1)
    x = conditions(params, traces.link_rows, link_row, load)
    return Timeline(starts_s, ends_s, kind, up_next, up, load[:, 3], x)


def _unrolled(path: Path, who: tuple[int, ...], until_s: float) -> tuple[Floats, Ints]:
    times, rows = path.times_s[who], path.rows[who]
    period = float(times[-1])
    real = times[:-1] < period
    laps = max(int(np.ceil(until_s / period)), 1) if len(np.unique(rows[real])) > 1 else 1
    starts = (np.arange(laps)[:, None] * period + times[:-1][real]).ravel()
    return starts, np.tile(rows[real], laps)


@dataclass(frozen=True, slots=True, eq=False)
class When:
    """Moments on some paths: arrays (n,) of path, time and the span that holds it."""

    path: Ints
    time_s: Floats
    span: Ints

    def of(self, at: Ints | Bools) -> When:
        return When(self.path[at], self.time_s[at], self.span[at])


def _advance(line: Timeline, begin: When, rates: Floats, column: Ints) -> When:
    """When one unit is done whose progress per second is `rates[column, class]`."""
    path, t, span = begin.path, begin.time_s.copy(), begin.span.copy()
    left, live = np.ones(len(t)), np.nonzero(np.isfinite(t))[0]
    while live.size:
        of, at = path[live], span[live]
        rate, end = rates[column[live], line.kind[of, at]], line.ends_s[of, at]
        now = t[live]
        with np.errstate(divide="ignore"):
            done = now + np.where(rate > 0, left[live] / rate, np.inf)
        over = done <= end
        t[live] = np.where(over, done, end)
        rest = live[~over]
        left[rest] = np.maximum(left[rest] - (rate * (end - now))[~over], 0.0)
        span[rest] += 1
        live = rest
    return When(path, t, span)


def _up(line: Timeline, begin: When) -> When:
    """The same moments, or when the link is up again."""
    span = line.up_next[begin.path, begin.span]
    found = span < line.kind.shape[1]
    at = np.where(found, span, 0)
    t = np.maximum(begin.time_s, np.where(found, line.starts_s[begin.path, at], np.inf))
    return When(begin.path, t, np.where(found, span, begin.span))


def _admitted(line: Timeline, begin: When) -> When:
    """When the cloud lets in who asks then; it hears nobody in an outage, unless it lets everybody in at once."""
    waits = (line.wait_s[line.kind[begin.path, begin.span]] > 0) & np.isfinite(begin.time_s)
    if not waits.any():
        return begin
    rate = 1 / np.maximum(line.wait_s, SMALL_S)[None]
    some = _advance(line, _up(line, begin.of(waits)), rate, np.zeros(waits.sum(), np.int64))
    t, span = begin.time_s.copy(), begin.span.copy()
    t[waits], span[waits] = some.time_s, some.span
    return When(begin.path, t, span)


class Network:
    """The plans of one table as stands: those between which nothing moves are one."""

    def __init__(self, physics: Physics, table: int, line: Timeline) -> None:
        self._physics, self._table, self._line = physics, table, line
        first, last = int(physics.first[table]), int(physics.first[table + 1])
        self.rows = np.arange(first, last)
        keys = [self._key(row) for row in self.rows.tolist()]
        names = list(dict.fromkeys(keys))
        self.group = np.array([names.index(key) for key in keys])
        self.size = len(names)
        members = [self.rows[self.group == g] for g in range(self.size)]
        self.cloud = physics.uses_cloud[[rows[0] for rows in members]]
        self.streams = physics.streams[[rows[0] for rows in members]]
        self.fill = self._rates(PER_PROMPT)
        token = self._rates(TOKEN)
        self.token = np.stack([token[self.group == g].max(axis=0) for g in range(self.size)])
        pairs = np.maximum(self.token[:, None], self.token[None])
        self.either = pairs.reshape(self.size**2, -1)
        """(pairs, classes): tokens per second with whichever of two plans is faster."""
        self.prompt_tokens = int(physics.prompt_tokens[first])
        self._moves: dict[tuple[int, int], tuple[Floats, Floats]] = {}

    def _key(self, row: int) -> tuple[object, ...]:
        physics = self._physics
        bill = physics.tables[self._table].bills[row - physics.first[self._table]]
        owners = tuple(layer.groups for layer in bill.decision.partition.layers)
        return owners, bool(physics.uses_cloud[row]), bool(physics.streams[row])

    def _rates(self, phase: int) -> Floats:
        """Units per second (plans, classes)."""
        physics, line = self._physics, self._line
        seconds = physics.all_units(phase, self._table, line.x)[..., 0].T
        stalls = physics.needs_link[phase, self.rows][:, None] & ~line.up
        rates: Floats = np.where(stalls, 0.0, 1 / np.maximum(seconds, SMALL_S))
        return rates

    def moves(self, tokens: int) -> tuple[Floats, Floats]:
        """Moves per second (pairs, classes) between stands when `tokens` to `tokens` + 1 are done, and the seconds
        that each takes at the least (stands, stands)."""
        low = -(-(self.prompt_tokens + tokens - CONTEXT_CLASS // 2) // CONTEXT_CLASS)
        high = (self.prompt_tokens + tokens + 1 + CONTEXT_CLASS // 2) // CONTEXT_CLASS
        if (low, high) not in self._moves:
            if len(self._moves) >= _KEPT:  # a recorded link has thousands of classes
                self._moves.clear()
            rates = np.maximum.reduce([self._move_rates(context) for context in range(low, high + 1)])
            with np.errstate(divide="ignore"):
                least = 1 / rates.max(axis=-1)
            self._moves[low, high] = rates.reshape(self.size**2, -1), least
        return self._moves[low, high]

    def _move_rates(self, context: int) -> Floats:
        """(stands, stands, classes): of all plans of a stand, the fastest way to any of another."""
        physics, line, classes = self._physics, self._line, len(self._line.up)
        rates = np.zeros((self.size, self.size, classes))
        place = physics.moves.place[self.rows]
        for home, begin in product(np.unique(place).tolist(), range(0, classes, _AT_ONCE)):
            part = slice(begin, begin + _AT_ONCE)
            plan = int(np.argmax(place == home))
            x, up = line.x[part], line.up[part]
            alike = np.ones(len(up), np.int64)
            entries = physics.moves.entries(
                alike * self._table, alike * self.rows[plan], np.full(len(up), float(context * CONTEXT_CLASS)), x
            )
            stalls = entries.needs_link & ~up[:, None]
            rate = np.where(stalls, 0.0, 1 / np.maximum(entries.seconds, SMALL_S))[:, place].T  # (plans, classes)
            for g in range(self.size):
                here = rates[self.group[plan], g, part]
                np.maximum(here, rate[self.group == g].max(axis=0), out=here)
        return rates

    def completion(self, begin: When, tokens: Ints) -> Floats:
        """The earliest seconds at which requests of so many tokens that come then can be done."""
        count = len(tokens)
        times, spans = self._first_tokens(begin)
        result = np.full(count, np.inf)
        path = np.repeat(begin.path[:, None], self.size, axis=1)
        alive = np.arange(count)
        done = 1
        while alive.size:
            over = tokens[alive] == done
            if over.any():
                result[alive[over]] = self._delivered(path[alive[over]], times[over], spans[over])
                alive, times, spans = alive[~over], times[~over], spans[~over]
            if alive.size:
                times, spans = self._token(path[alive], times, spans, self.moves(done))
            done += 1
        return result

    def _first_tokens(self, begin: When) -> tuple[Floats, Ints]:
        """(n, stands) times and spans."""
        line, n = self._line, len(begin.path)
        admitted = _admitted(line, begin)
        times, spans = np.full((n, self.size), np.inf), np.zeros((n, self.size), np.int64)
        for number, row in enumerate(self.rows.tolist()):
            start = admitted if self._physics.uses_cloud[row] else begin
            filled = _advance(line, start, self.fill, np.full(n, number))
            g = self.group[number]
            sooner = filled.time_s < times[:, g]
            times[sooner, g], spans[sooner, g] = filled.time_s[sooner], filled.span[sooner]
        return times, spans

    def _token(self, path: Ints, times: Floats, spans: Ints, moves: tuple[Floats, Floats]) -> tuple[Floats, Ints]:
        """From the earliest times of all stands to those with one more token."""
        line, (n, size) = self._line, times.shape
        rates, least = moves
        here = When(path.ravel(), times.ravel(), spans.ravel())
        stayed = _advance(line, here, self.token, np.tile(np.arange(size), n))
        after, span = stayed.time_s.reshape(n, size), stayed.span.reshape(n, size)
        may = times[:, :, None] + least < after[:, None, :]
        may[:, np.arange(size), np.arange(size)] = False
        i, a, b = np.nonzero(may)
        if not i.size:
            return after, span
        begin = When(path[i, a], times[i, a], spans[i, a])
        moved = self._move(begin, a, b, rates)
        useful = moved.time_s < after[i, b]
        i, a, b, begin, moved = i[useful], a[useful], b[useful], begin.of(useful), moved.of(useful)
        ran = _advance(line, begin, self.either, a * size + b)
        later = np.where(ran.time_s > moved.time_s, 1, 0)
        time = np.where(later, ran.time_s, moved.time_s)
        order = np.argsort(-time, kind="stable")  # the soonest is written last
        i, b, time, its = i[order], b[order], time[order], np.where(later, ran.span, moved.span)[order]
        best, best_span = np.full((n, size), np.inf), np.zeros((n, size), np.int64)
        best[i, b], best_span[i, b] = time, its
        sooner = best < after
        return np.where(sooner, best, after), np.where(sooner, best_span, span)

    def _move(self, begin: When, a: Ints, b: Ints, rates: Floats) -> When:
        """When moves from stands `a` to `b` are over. What streams leaves with all its tokens, so once the link is
        up; whoever leaves it without those of an outage had better left when the outage began."""
        line = self._line
        t, span = begin.time_s.copy(), begin.span.copy()
        for chosen, change in ((self.streams[a], _up), (self.cloud[b] & ~self.cloud[a], _admitted)):
            some = change(line, When(begin.path[chosen], t[chosen], span[chosen]))
            t[chosen], span[chosen] = some.time_s, some.span
        return _advance(line, When(begin.path, t, span), rates, a * self.size + b)

    def _delivered(self, path: Ints, times: Floats, spans: Ints) -> Floats:
        """The earliest of all stands (n,); the last tokens of a stream come when the link is up."""
        for g in np.nonzero(self.streams)[0].tolist():
            times[:, g] = _up(self._line, When(path[:, g], times[:, g], spans[:, g])).time_s
        earliest: Floats = times.min(axis=1)
        return earliest

    def least_joules(self) -> tuple[float, float]:
        """What the device spends at the least, beside idling, on a prompt and on a token, under any class."""
        units = [self._physics.all_units(phase, self._table, self._line.x) for phase in (PER_PROMPT, TOKEN)]
        return float(units[0][..., DEVICE_J].min()), float(units[1][..., DEVICE_J].min())


def clairvoyant_bound(
    params: Params, traces: Traces, *, arrival_s: Floats | None = None, in_turn: bool = False
) -> Floats:
    """(e, d, n): seconds from arrival to the last token that no decision maker undercuts, or `t_max_s` if less.

    Holds for who moves at most once within a token, and sheds nothing if `in_turn`. NaN for a cloud that the devices
    load: there is no such network. `in_turn`: devices take one request at a time (`slots` = 1), so that a request
    also waits for those before it; as nobody overtakes, finishing each as early as possible is best for all.
    `arrival_s` replaces the traces' arrivals. Raises SpecError for closed loops without it, and for `in_turn` with
    more than one slot.
    """
    arrival = traces.arrival_s if arrival_s is None else arrival_s
    if params.is_shared:
        return np.full(arrival.shape, np.nan)
    if params.arrivals.think_s is not None and arrival_s is None:
        raise SpecError("in a closed loop arrivals depend on who decides: give arrival_s, as the records have them")
    if in_turn and params.slots != 1:
        raise SpecError(f"requests that are served in turn have one slot, and there are {params.slots}")
    margin_s = 4 * params.t_max_s
    for _ in range(_DOUBLINGS):
        until_s = float(arrival.max()) + margin_s
        line = timeline(params, traces, until_s)
        done = _in_turn(params, traces, line, arrival) if in_turn else _alone(params, traces, line, arrival)
        if (done <= until_s).all():
            break
        margin_s *= 2
    bound: Floats = np.minimum(done - arrival, params.t_max_s)
    return bound


def _begin(line: Timeline, path: Ints, time_s: Floats) -> When:
    span = (line.starts_s[path] <= time_s[:, None]).sum(axis=1) - 1
    return When(path, time_s, span)


def _alone(params: Params, traces: Traces, line: Timeline, arrival: Floats) -> Floats:
    """Times (e, d, n) of completion of requests that meet nobody."""
    e, d, n = arrival.shape
    path = np.repeat(np.arange(e * d), n)
    table = (params.device_tables[:, None] + traces.prompt_class).ravel()
    output, at = traces.output_tokens.ravel(), arrival.ravel()
    done = np.empty(e * d * n)
    for number in np.unique(table).tolist():
        network = Network(params.physics, number, line)
        mine = np.nonzero(table == number)[0]
        for part in np.array_split(mine, -(-len(mine) // 4096)):
            done[part] = network.completion(_begin(line, path[part], at[part]), output[part])
    return done.reshape(arrival.shape)


def _in_turn(params: Params, traces: Traces, line: Timeline, arrival: Floats) -> Floats:
    """The same of requests that begin when those before them are done."""
    done, free = np.empty_like(arrival), np.zeros(arrival.shape[:2])
    networks: dict[int, Network] = {}
    table = params.device_tables[:, None] + traces.prompt_class
    for n in range(arrival.shape[2]):
        start = np.maximum(arrival[:, :, n], free).ravel()
        these = np.empty(len(start))
        for number in np.unique(table[:, :, n]).tolist():
            network = networks.setdefault(number, Network(params.physics, number, line))
            mine = np.nonzero((table[:, :, n] == number).ravel())[0]
            begin = _begin(line, mine, start[mine])
            these[mine] = network.completion(begin, traces.output_tokens[:, :, n].ravel()[mine])
        done[:, :, n] = free = these.reshape(free.shape)
    return done


def least_cost(params: Params, traces: Traces, bound_s: Floats, w_energy: float) -> Floats:
    """(e, d, n): seconds plus `w_energy` (s/J) times the device's joules that nobody undercuts, where `bound_s` are
    seconds that nobody undercuts. Time and joules are made small apart from each other: a loose bound where the
    fastest plan is not the thriftiest. Of idle power a request bears its share among `slots` while it is served."""
    if not w_energy:
        return bound_s
    line = timeline(params, traces, float(traces.arrival_s.max()) + 4 * params.t_max_s)
    joules = params.idle_w[:, None] / params.slots * clairvoyant_bound(params, traces)
    table = np.broadcast_to(params.device_tables[:, None] + traces.prompt_class, bound_s.shape)
    for number in np.unique(table).tolist():
        prompt, token = Network(params.physics, number, line).least_joules()
        joules = joules + np.where(table == number, prompt + token * (traces.output_tokens - 1), 0.0)
    cost: Floats = bound_s + w_energy * joules
    return cost
