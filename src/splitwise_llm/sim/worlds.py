"""Many worlds side by side that wait for answers, and what the time between answers costs. It knows no learner.

The cost of the time `tau` until a world asks again is `integral (N / T_ref + w_E P / E_ref) dt`, with N requests in
flight (those at the doors included) and P watts of all devices of the world, plus `w_A nats / n_ref` of requests that
ended, plus `T_max / T_ref` of each that was refused or given up: latency is paid as it passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitwise_llm.sim.asking import Question, answer, questions
from splitwise_llm.sim.draws import Traces, exchanged
from splitwise_llm.sim.endings import DONE, Ended
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.physics import Bools, Floats, Ints
from splitwise_llm.sim.state import FREE, State, initial
from splitwise_llm.sim.step import step

BETA_PER_S = 1 / 300
"""How fast what comes later loses weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What happened until every world asked again, or ended: arrays (worlds,)."""

    tau_s: Floats
    cost: Floats
    """Discounted to where it began."""
    ended: tuple[Ended, ...]


class Worlds:
    """Worlds of one kind; each asks one question at a time. Owns their states, which change in place."""

    def __init__(self, params: Params, traces: Traces, until_s: float = np.inf, beta_per_s: float = BETA_PER_S) -> None:
        self.params, self.traces, self.until_s, self.beta_per_s = params, traces, until_s, beta_per_s
        self.state = initial(params, traces)

    @property
    def is_over(self) -> Bools:
        """(worlds,)"""
        over: Bools = self.state.is_over | (self.state.now >= self.until_s)
        return over

    def renew(self, world: int, trace: Traces) -> None:
        """Another trace for one world, from its beginning."""
        self.traces = exchanged(self.traces, world, trace)
        fresh = initial(self.params, trace)
        for name in State.__slots__:
            getattr(self.state, name)[world] = getattr(fresh, name)[0]

    def questions(self) -> list[Question]:
        """One of each world that asks."""
        return list(questions(self.params, self.traces, self.state, one_each=True))

    def answer(self, asked: Sequence[tuple[Question, Ints]]) -> tuple[Ended, ...]:
        """Do as was decided; requests that were refused end at once."""
        return tuple(
            ended
            for question, choice in asked
            for ended in answer(self.params, self.traces, self.state, question, choice)
        )

    def go_on(self, before: Sequence[Ended] = ()) -> Passed:
        """Until every world asks or has ended. `before` ended with the answers, and is paid for here."""
        s, params, penalty = self.state, self.params, self.params.penalty
        tau, cost, ended = np.zeros(len(s.now)), np.zeros(len(s.now)), list(before)
        while True:
            idle = s.is_over | (s.now >= self.until_s) | s.is_asking
            if idle.all():
                break
            held = s.is_over.copy()
            s.is_over |= s.now >= self.until_s
            begin, drawn = s.now.copy(), s.drawn_j.sum(axis=1)
            there, taken = (s.phase != FREE).sum(axis=(1, 2)), s.taken.copy()
            ended += step(params, self.traces, s)[0]
            s.is_over &= held | ~(s.now >= self.until_s)
            dt = s.now - begin
            weight = np.exp(-self.beta_per_s * tau)
            cost += weight * (there * self._discounted(dt) + self._at_door(begin, dt, taken)) / penalty.t_ref_s
            cost += weight * penalty.w_energy * (s.drawn_j.sum(axis=1) - drawn) / penalty.e_ref_j
            tau += dt
        for part in ended:
            done = part.status == DONE
            lump = np.where(
                done,
                penalty.w_accuracy * params.physics.nats[part.last_plan] / penalty.n_ref,
                params.t_max_s / penalty.t_ref_s,
            )
            np.add.at(cost, part.world, lump)
        return Passed(tau, cost, tuple(ended))

    def _at_door(self, begin: Floats, dt: Floats, taken: Ints) -> Floats | float:
        """(worlds,): discounted seconds that requests waited there, who came in this time included. `taken` are those
        of each device that had been let in when it began."""
        if self.params.arrivals.think_s is not None:
            return 0.0
        arrival_s = self.traces.arrival_s
        waits = np.arange(arrival_s.shape[2]) >= taken[:, :, None]
        begun = np.clip(arrival_s - begin[:, None, None], 0.0, dt[:, None, None])  # after dt: no time at all
        waited: Floats = self._discounted(dt[:, None, None]) - self._discounted(begun)
        result: Floats = np.where(waits, waited, 0.0).sum(axis=(1, 2))
        return result

    def _discounted(self, seconds: Floats) -> Floats:
        """What so many seconds from now on weigh."""
        beta = self.beta_per_s
        result: Floats = -np.expm1(-beta * seconds) / beta if beta else seconds
        return result


__all__ = ["BETA_PER_S", "Passed", "Worlds"]
