"""The best decisions of whoever knows the statistics but not the future: value iteration on small cases.

A request is alone with a device, a link and a cloud whose classes change at random between neighbours (as
`sim.draws` draws them). Its *stand* is the plan it is on and the tokens that have arrived; whatever takes time is
divided into equal steps, within which the value is taken to be linear in what is done. A class change interrupts a
step, and then anything may be decided: go on, move, give a move up. Costs are seconds, and joules of the device times
a weight. What it does not know: other requests. It shares the link and the device with them all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.params import CloudClass, CloudProcess, LinkClass, Params
from splitwise_llm.sim.physics import CONTEXT_CLASS, DEVICE_J, TOKEN, Bools, Floats
from splitwise_llm.sim.physics import PROMPT as PER_PROMPT
from splitwise_llm.sim.step import SMALL_S, conditions

STEP_TOKENS = 2.0
PARTS = 6
"""Steps of a prompt, a move and an admission."""
EPOCH_TOKENS = 16.0
"""After the first token a plan stays until about so many are there."""
CLOSE_S = 1e-7
MAX_SWEEPS = 2000
FAR_S = 1e4
"""More than any request costs: sweeps begin above, so that moves in circles gain nothing."""
NEVER_PER_S = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """The joint classes of link and cloud as a Markov process in continuous time."""

    x: Floats
    """(classes, conditions)"""
    up: Bools
    wait_s: Floats
    leave_per_s: Floats
    to: Floats
    """(classes, classes): where a change leads, by probability; a class that is never left leads to itself."""

    @classmethod
    def of(cls, params: Params) -> Classes:
        """Raises SpecError for links and clouds that are no such process."""
        link, cloud = params.link, params.cloud
        if not isinstance(cloud, CloudProcess) or params.segments or params.num_devices > 1 or params.prompt_classes:
            raise SpecError("value iteration is for one device with one table and a cloud that it does not load")
        if link.up is not None or link.down is not None or link.rtt is not None:
            raise SpecError("value iteration needs classes of the link with mean dwell times, not a recording")
        links, clouds = _generator(link.classes), _generator(cloud.classes)
        joint = np.kron(links, np.eye(len(clouds))) + np.kron(np.eye(len(links)), clouds)
        rows = np.array([(c.rtt_s, 1 / c.up_bytes_per_s, 1 / c.down_bytes_per_s, c.is_up, 0) for c in link.classes])
        at, load = np.divmod(np.arange(len(joint)), len(clouds))
        load = params.cloud_rows[load]
        leave = -np.diag(joint)
        leave = np.where(leave < NEVER_PER_S, 0.0, leave)
        size = np.arange(len(joint))
        to = np.where(leave[:, None] > 0, joint / np.where(leave > 0, leave, 1.0)[:, None], 0.0)
        to[size, size] = np.where(leave > 0, 0.0, 1.0)
        return cls(conditions(params, rows, at, load), rows[at, 3] > 0, load[:, 3], leave, to)


def _generator(classes: Sequence[LinkClass | CloudClass]) -> Floats:
    """Changes per second between neighbours, either way alike."""
    size = len(classes)
    result = np.zeros((size, size))
    for n, kind in enumerate(classes):
        beside = [at for at in (n - 1, n + 1) if 0 <= at < size]
        for at in beside:
            result[n, at] = 1 / kind.mean_dwell_s / len(beside)
        result[n, n] = -result[n].sum()
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of something in every class: arrays (..., classes) of its cost until it ends or is interrupted, and
    of the weights of what follows: ended; interrupted, valued as at its end and as at its begin."""

    cost: Floats
    ended: Floats
    late: Floats
    early: Floats

    @classmethod
    def of(cls, classes: Classes, seconds: Floats, cost_per_s: Floats) -> Step:
        """A step that takes `seconds` (..., classes), infinity where it stands still."""
        leave = np.broadcast_to(classes.leave_per_s, seconds.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            x = np.where(leave > 0, leave * seconds, 0.0)
        ended = np.exp(-x)
        small = np.where(x > 1e-4, x, 1.0)
        with np.errstate(invalid="ignore"):
            late = np.where(x > 1e-4, (1 - ended * (1 + x)) / small, x / 2 - x * x / 3)
        late = np.where(np.isfinite(x), late, 0.0)
        lasts = np.where(leave > 0, -np.expm1(-x) / np.where(leave > 0, leave, 1.0), seconds)
        stuck = ~np.isfinite(lasts)  # it stands still in a class that is never left
        cost = np.where(stuck, FAR_S, lasts * cost_per_s)
        return cls(cost, np.where(stuck, 0.0, ended), late, np.where(stuck, 0.0, 1 - ended - late))

    def value(self, to: Floats, begin: Floats, end: Floats) -> Floats:
        """The value of taking the step, from those at its begin and end."""
        result: Floats = self.cost + self.ended * end + self.late * (end @ to.T) + self.early * (begin @ to.T)
        return result

    def part(self, at: Any) -> Step:
        """Some of the steps, by what indexes their arrays."""
        return Step(self.cost[at], self.ended[at], self.late[at], self.early[at])


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """Costs still to come of going on, at least until something happens, and deciding freely then.

    A *place* is a partition with a wire; plans of one place differ in chunk and draft, and between them nothing
    moves. Stages k count tokens; parts j of what takes time run from 0 to done.
    """

    stand: Floats
    """(k, places, classes): at a place, deciding freely."""
    stay: Floats
    """(k, places, classes): going on there until something happens."""
    start: Floats
    """(k, places, places, classes): setting out for another."""
    admitting: Floats
    """(k, j, places, places, classes): on the way, before the cloud has let it in."""
    moving: Floats
    """(k, j, places, places, classes): after that."""
    filling: Floats
    """(j, plans, classes): the prompt."""
    waiting: Floats
    """(j, classes): for the cloud, before the prompt, whatever its plan."""
    first: Floats
    """(plans, classes): beginning with a plan."""


class Iteration:
    """Backwards over tokens, and for each stage to a fixed point over places, moves and classes."""

    def __init__(self, params: Params, w_energy: float = 0.0, step_tokens: float = STEP_TOKENS) -> None:
        self.physics, self.w = params.physics, w_energy
        self.classes = Classes.of(params)
        self.size = len(self.classes.up)
        job = self.physics.tables[0].bills[0].job
        self.stages = max(round((job.tokens_out - 1) / step_tokens), 1)
        self.delta = max((job.tokens_out - 1) / self.stages, SMALL_S)
        self.prompt_tokens = job.prompt_tokens
        self.idle = 1 + w_energy * float(self.physics.idle_w[0])
        """Cost of a second in which the device does nothing."""
        self.place = self.physics.moves.place
        self.places = int(self.place.max()) + 1
        firsts = [int(np.argmax(self.place == place)) for place in range(self.places)]
        self.cloud, self.streams = self.physics.uses_cloud[firsts], self.physics.streams[firsts]
        self.device = self.physics.uses_device[firsts]
        self._firsts = firsts
        self._fill = self._phase(PER_PROMPT, 1 / PARTS)
        token = self._phase(TOKEN, self.delta)
        units = self.physics.all_units(TOKEN, 0, self.classes.x)
        cost = (units[..., 0] * self.idle + w_energy * units[..., DEVICE_J]).T
        best = [np.where((self.place == place)[:, None], cost, np.inf).argmin(axis=0) for place in range(self.places)]
        self.best = np.stack(best)
        """(places, classes): the plan that is driven there."""
        self._lost = EPOCH_TOKENS * (cost - cost[self.best, np.arange(self.size)][self.place])
        """(plans, classes): what it costs to have begun with a plan that is not the one to be driven there."""
        self._token = token.part((self.best, np.arange(self.size)))
        idle = np.full(self.size, self.idle)
        self._wait = Step.of(self.classes, np.maximum(self.classes.wait_s, SMALL_S) / PARTS, idle)
        self._halt = Step.of(self.classes, np.full(self.size, np.inf), idle)
        self._moves: dict[int, tuple[Step, Floats]] = {}
        self._waits = self.classes.wait_s > 0
        self._enters = self.cloud[None, :] & ~self.cloud[:, None]
        self._rtt_half_s = self.classes.x[:, self.physics.places.rtt] / 2

    def _phase(self, phase: int, share: float) -> Step:
        """Steps of a share of a prompt, or of tokens: (plans, classes)."""
        units = self.physics.all_units(phase, 0, self.classes.x)  # (classes, plans, 8)
        seconds = np.maximum(units[..., 0].T, SMALL_S)
        cost = self.idle + self.w * units[..., DEVICE_J].T / seconds
        stalls = self.physics.needs_link[phase][:, None] & ~self.classes.up
        return Step.of(self.classes, np.where(stalls, np.inf, seconds * share), np.where(stalls, self.idle, cost))

    def moves(self, tokens: float) -> tuple[Step, Floats]:
        """Parts of moves when so many tokens are there, and the whole moves' seconds: (places, places, classes)."""
        context = int(np.rint((self.prompt_tokens + tokens) / CONTEXT_CLASS))
        if context not in self._moves:
            x, shape = self.classes.x, (self.places, self.places, self.size)
            seconds, cost, stalls = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.bool_)
            device = self.physics.tables[0].world.hosts[0].device
            up, down = self.physics.places.up, self.physics.places.down
            table, contexts = np.zeros(self.size, np.int64), np.full(self.size, float(context * CONTEXT_CLASS))
            for place, row in enumerate(self._firsts):
                way = self.physics.moves.entries(table, table + row, contexts, x)
                seconds[place] = np.maximum(way.seconds, SMALL_S).T
                carried = way.up_bytes * x[:, up, None] + way.down_bytes * x[:, down, None]
                joules = way.device_s * (device.prefill_w - device.idle_w) + carried * device.radio_w
                cost[place] = self.idle + self.w * joules.T / seconds[place]
                stalls[place] = way.needs_link.T & ~self.classes.up
            took, spent = np.where(stalls, np.inf, seconds / PARTS), np.where(stalls, self.idle, cost)
            self._moves[context] = Step.of(self.classes, took, spent), seconds
        return self._moves[context]

    def solve(self) -> Values:
        """Raises SpecError when sweeps do not settle."""
        places, size, count = self.places, self.size, self.stages
        rows = self.physics.num_rows
        v = Values(
            np.zeros((count + 1, places, size)), np.zeros((count + 1, places, size)),
            np.zeros((count + 1, places, places, size)),
            np.zeros((count + 1, PARTS + 1, places, places, size)),
            np.zeros((count + 1, PARTS + 1, places, places, size)),
            np.full((PARTS + 1, rows, size), FAR_S), np.full((PARTS + 1, size), FAR_S), np.full((rows, size), FAR_S),
        )  # fmt: skip
        away = np.zeros((0, places, size))
        for k in range(count - 1, -1, -1):
            v.stand[k] = v.stay[k] = v.stand[k + 1] + FAR_S
            v.admitting[k], v.moving[k], v.start[k] = v.stand[k], v.stand[k], v.stand[k, :, None]
            away = np.full((count - k + 1, places, size), v.stand[k].max() + FAR_S)
            _settle(lambda k=k, away=away: self._sweep(v, k, away), v.stand[k], v.start[k])  # type: ignore[misc]
        v.filling[PARTS] = v.stay[0][self.place] + self._lost
        _settle(lambda: self._begin(v), v.first)
        return v

    def _sweep(self, v: Values, k: int, away: Floats) -> None:
        """Every value of stage k anew, in place; `away` (tokens more, places, classes) are those of streams whose
        later tokens wait in the cloud for the link."""
        to, stand = self.classes.to, v.stand[k]
        home = stand[:, None]
        step, _ = self.moves(1 + self.delta * k)
        # Nobody is asked on arrival: what begins goes on at least until something happens.
        v.moving[k, PARTS] = after = np.broadcast_to(v.stay[k][None], v.moving[k, 0].shape)
        for j in range(PARTS - 1, -1, -1):
            v.moving[k, j] = step.value(to, np.minimum(v.moving[k, j], home), after)
            after = np.minimum(v.moving[k, j], home)
        v.admitting[k, PARTS] = after = v.moving[k, 0]
        for j in range(PARTS - 1, -1, -1):
            v.admitting[k, j] = self._wait.value(to, np.minimum(v.admitting[k, j], home), after)
            after = np.minimum(v.admitting[k, j], home)
        heard = np.minimum(np.where(self.classes.up, v.admitting[k, 0], v.start[k]), home)
        asks = np.where(self.classes.up, v.admitting[k, 0], self._halt.value(to, heard, heard))
        v.start[k] = np.where(self._enters[:, :, None] & self._waits, asks, v.moving[k, 0])
        v.stay[k] = self._token.value(to, stand, v.stand[k + 1])
        others = np.where(np.eye(self.places, dtype=np.bool_)[:, :, None], np.inf, v.start[k]).min(axis=1)
        if self.streams.any() and not self.classes.up.all():
            self._undelivered(v, k, away, others)
            v.stay[k] = np.where(self.streams[:, None] & ~self.classes.up, away[0], v.stay[k])
        v.stand[k] = np.minimum(v.stay[k], others)

    def _undelivered(self, v: Values, k: int, away: Floats, others: Floats) -> None:
        """Streams in an outage that began at stage k: the cloud goes on, and who leaves loses what it did since."""
        to, up, more = self.classes.to, self.classes.up, len(away) - 1
        back = np.broadcast_to(self._rtt_half_s * self.idle, others.shape)
        after = np.where(up, back, away[more])
        away[more] = np.where(up, 0.0, np.minimum(self._halt.value(to, after, after), others))
        end = np.where(up, back, away[more])
        for i in range(more - 1, -1, -1):
            begin = np.where(up, v.stand[k + i], np.minimum(away[i], others))
            away[i] = np.where(up, 0.0, self._token.value(to, begin, end))
            end = np.where(up, v.stand[k + i], np.minimum(away[i], others))

    def _begin(self, v: Values) -> None:
        """From arrival to the first token, in place: it may begin anew at any time."""
        to, anew = self.classes.to, v.first.min(axis=0)
        cloud = self.physics.uses_cloud
        for j in range(PARTS - 1, -1, -1):
            end = np.minimum(v.filling[j + 1], anew) if j + 1 < PARTS else v.filling[PARTS]
            v.filling[j] = self._fill.value(to, np.minimum(v.filling[j], anew), end)
        v.waiting[PARTS] = end = np.where(cloud[:, None], v.filling[0], np.inf).min(axis=0)
        for j in range(PARTS - 1, -1, -1):
            v.waiting[j] = self._wait.value(to, np.minimum(v.waiting[j], anew), end)
            end = np.minimum(v.waiting[j], anew)
        heard = np.minimum(np.where(self.classes.up, v.waiting[0], anew), anew)
        asks = np.where(self.classes.up, v.waiting[0], self._halt.value(to, heard, heard))
        v.first[:] = np.where(cloud[:, None] & self._waits, asks, v.filling[0])


def _settle(sweep: Callable[[], None], *values: Floats) -> None:
    for _ in range(MAX_SWEEPS):
        before = [array.copy() for array in values]
        sweep()
        if all(np.abs(now - then).max() < CLOSE_S for now, then in zip(values, before, strict=True)):
            return
    raise SpecError(f"values do not settle within {MAX_SWEEPS} sweeps; is there a plan that ever ends?")
