"""The best policy of whoever knows the statistics, as a chooser: it reads off which way costs least from here.

Where a request is follows from its menu: the tokens that have arrived from those expected, and how far a prompt, an
admission or a move has come from the seconds until it can go on. It knows values only, not how they were found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from splitwise_llm.learn.iteration import PARTS, STEP_TOKENS, Iteration, Values
from splitwise_llm.observation import Menu
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.physics import PROMPT, Floats, Ints

SAME_S = 1e-6
"""Two ways whose values differ by less are equally good, and the present one is kept."""
_NOW_S = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class _Here:
    """Where systems are: arrays (n,), and (n, plans) of what is before each plan."""

    kind: Ints
    plan: Ints
    ahead_s: Floats
    entry_s: Floats
    """(n, plans): until each plan can go on, without waiting for the link."""
    stage: Floats

    def of(self, at: Ints) -> _Here:
        return _Here(self.kind[at], self.plan[at], self.ahead_s[at], self.entry_s[at], self.stage[at])


class Causal:
    """Solves on construction; seconds of work for a dozen plans and classes. Raises SpecError for what is no small
    case: more than one device or table, recorded links, a cloud that the device loads."""

    in_flight = True

    def __init__(self, params: Params, w_energy: float = 0.0, step_tokens: float = STEP_TOKENS) -> None:
        self._iteration = it = Iteration(params, w_energy, step_tokens)
        self._values: Values = it.solve()
        places = it.physics.places
        self._fields = np.array([*range(places.slow, places.slow + 4), *range(places.rtt, places.rtt + 3)])
        self._ahead = places.device_wait
        self._guess_s = params.outage_guess_s
        seen = it.classes.x.copy()
        seen[:, places.wait] += np.where(it.classes.up, 0.0, self._guess_s)
        self._seen = seen[:, self._fields]
        self._fill_s = it.physics.all_units(PROMPT, 0, it.classes.x)[..., 0]  # (classes, plans)
        self._cloud, self._device = it.physics.uses_cloud, it.physics.uses_device
        self.expected_cost = float((_long_run(params) * self._values.first.min(axis=0)).sum())
        """Of a request that is alone and comes at any time, by the values."""

    def choose(self, menu: Menu) -> Ints:
        """Per system the number of a plan, -1 to go on as it is."""
        it, n = self._iteration, np.arange(len(menu.current))
        x = menu.conditions[:, self._fields]
        scale = np.maximum(np.abs(self._seen).max(axis=0), 1e-30)
        kind = np.abs((x[:, None] - self._seen) / scale).sum(axis=-1).argmin(axis=1)
        ahead = menu.conditions[:, self._ahead]
        later = it.stages * it.delta
        stage = np.clip((later - menu.remaining_tokens) / it.delta, 0.0, it.stages - 1)
        stalled = ~it.classes.up[kind][:, None] & self._cloud
        entry = menu.entry_s - np.where(stalled, self._guess_s, 0.0) - ahead[:, None] * self._device
        here = _Here(kind, menu.current, ahead, entry, stage)
        chosen = np.full(len(n), -1)
        fresh = menu.current < 0
        early = ~fresh & (menu.remaining_tokens >= later - _NOW_S)
        late = n[~fresh & ~early]
        for choose, at in ((self._admit, n[fresh]), (self._fill, n[early]), (self._run, late)):
            if len(at):
                chosen[at] = choose(here.of(at))
        return chosen

    def _first(self, here: _Here) -> Floats:
        """(n, plans): the costs of beginning now."""
        costs: Floats = self._values.first[:, here.kind].T + here.ahead_s[:, None] * self._device
        return costs

    def _admit(self, here: _Here) -> Ints:
        best: Ints = self._first(here).argmin(axis=1)
        return best

    def _fill(self, here: _Here) -> Ints:
        """Before the first token: go on, go over to another plan of the cloud in its queue, or begin anew."""
        v, n = self._values, np.arange(len(here.kind))
        took = self._fill_s[here.kind, here.plan]
        left = here.entry_s[n, here.plan]
        wait_s = self._iteration.classes.wait_s[here.kind]
        waits = self._cloud[here.plan] & (wait_s > 0) & (left > took + _NOW_S)
        with np.errstate(divide="ignore", invalid="ignore"):
            waited = _between(v.waiting[:, here.kind], np.where(waits, 1 - (left - took) / wait_s, 0.0))
        filled = _between(v.filling[:, here.plan, here.kind], 1 - left / took)
        unheard = waits & ~self._iteration.classes.up[here.kind] & (left - took >= wait_s - _NOW_S)
        anew = self._first(here)
        going = np.where(waits, waited, filled)
        going = np.where(unheard, anew[n, here.plan], going)
        fills = np.where(self._cloud, v.filling[0][:, here.kind].T, np.inf)
        other = np.where(fills.min(axis=1) < fills[n, here.plan] - SAME_S, fills.argmin(axis=1), -1)
        result: Ints = np.where(anew.min(axis=1) < going - SAME_S, anew.argmin(axis=1), np.where(waits, other, -1))
        return np.where(result == here.plan, -1, result)

    def _run(self, here: _Here) -> Ints:
        """After it: on a plan, or on the way to one."""
        it, n = self._iteration, np.arange(len(here.kind))
        place = it.place[here.plan]
        home = np.where(here.entry_s[n, here.plan] > _NOW_S, self._home(here, place), place)
        start = self._at(self._values.start, here, home)
        start[n, home] = self._at(self._values.stay, here, home)
        start += here.ahead_s[:, None] * it.device
        stay = start[n, home].copy()
        best = start.argmin(axis=1)
        best = np.where(start[n, best] < stay - SAME_S, best, home)
        moving = home != place
        going = np.where(moving, self._going(here, home, place), np.inf)
        goes_on = moving & ((going < start.min(axis=1) - SAME_S) | (best == place))
        plan = it.best[best, here.kind]
        return np.where(goes_on | (plan == here.plan), -1, plan)

    def _home(self, here: _Here, place: Ints) -> Ints:
        """Where a request that is on the way comes from: to return there takes no time."""
        back = (np.abs(here.entry_s + here.ahead_s[:, None] * self._device) <= _NOW_S) | (
            np.abs(here.entry_s) <= _NOW_S
        )
        back &= self._iteration.place != place[:, None]
        home: Ints = np.where(back.any(axis=1), self._iteration.place[back.argmax(axis=1)], place)
        return home

    @staticmethod
    def _at(values: Floats, here: _Here, home: Ints) -> Floats:
        """Values (stages, places, [places,] classes) of systems at their homes."""
        k = here.stage.astype(np.int64)
        share = (here.stage - k).reshape(-1, *(1,) * (values.ndim - 3))
        low, high = (values[at, home, ..., here.kind] for at in (k, k + (share.ravel() > 0)))
        between: Floats = (1 - share) * low + share * high
        return between

    def _going(self, here: _Here, home: Ints, place: Ints) -> Floats:
        """The values of being on the way (n,)."""
        it, v, n = self._iteration, self._values, np.arange(len(here.kind))
        k = np.rint(here.stage).astype(np.int64)
        took = np.array(
            [it.moves(1 + it.delta * s)[1][h, p, c] for s, h, p, c in zip(k, home, place, here.kind, strict=True)]
        )
        left = here.entry_s[n, here.plan]
        wait_s = it.classes.wait_s[here.kind]
        waits = self._cloud[here.plan] & (wait_s > 0) & (left > took + _NOW_S)
        with np.errstate(divide="ignore", invalid="ignore"):
            waited = _between(
                v.admitting[k, :, home, place, here.kind].T, np.where(waits, 1 - (left - took) / wait_s, 0.0)
            )
        moved = _between(v.moving[k, :, home, place, here.kind].T, 1 - left / took)
        unheard = waits & ~it.classes.up[here.kind] & (left - took >= wait_s - _NOW_S)
        asked = np.where(unheard, v.start[k, home, place, here.kind], waited)
        going: Floats = np.where(waits, asked, moved) + here.ahead_s * it.device[place]
        return going


def _between(values: Floats, done: Floats) -> Floats:
    """Values (parts + 1, n) at shares (n,) that are done."""
    at = np.clip(done, 0.0, 1.0) * PARTS
    low = np.minimum(at.astype(np.int64), PARTS - 1)
    share, n = at - low, np.arange(len(at))
    result: Floats = (1 - share) * values[low, n] + share * values[low + 1, n]
    return result


def _long_run(params: Params) -> Floats:
    """(classes,): the share of time in each, of link and cloud in the order of the values."""
    shares = []
    for process in (params.link, params.cloud):
        dwell = np.array([kind.mean_dwell_s for kind in process.classes])  # type: ignore[union-attr]
        visits = np.ones(len(dwell))
        visits[1:-1] = 2.0
        shares.append(visits * dwell / (visits * dwell).sum())
    return np.kron(*shares)


__all__ = ["Causal"]
