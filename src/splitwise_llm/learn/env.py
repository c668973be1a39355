"""Courses as one batched environment: an action turns knobs, the reward is what that saved.

The reward for the time between two decisions is what the same trace cost exact drift plus penalty in that time, less
what it cost now, in reference times: `-(integral (N - N0) / T_ref dt + ...)`. What drift plus penalty costs does not
depend on what is done here, so as a baseline it changes no expectation of the gradient, and it takes away nearly all of
the noise of traffic, links and clouds. To that come what budgets are overspent, at prices that rise while they are
(dual ascent), and a potential `Phi = -kappa sum w_i Q_i^2 / V`, which changes no best policy either.

All devices of a world count: whoever makes others wait pays for it. The safety filter is part of the environment: the
learner keeps the probability of what it sampled, not of what was executed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from splitwise_llm import lyapunov
from splitwise_llm.learn.courses import Course
from splitwise_llm.lyapunov import NUM_VIRTUAL
from splitwise_llm.policies.features import COUNT, TOTAL, features
from splitwise_llm.policies.guided import Constant, Priced
from splitwise_llm.policies.knobs import SIZES, Knobs
from splitwise_llm.sim.asking import Question
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.endings import DONE, Ended
from splitwise_llm.sim.episode import MISSING, Records, simulate
from splitwise_llm.sim.scenarios import TRAIN
from splitwise_llm.sim.worlds import BETA_PER_S, Worlds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KAPPA = 0.02
DUAL_STEP, DUAL_MOST = 0.05, 10.0
REWARD_MOST = 20.0
"""One decision's reward is cut there: a request that was shed by chance would else drown everything."""


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """What a trace costs exact drift plus penalty until any moment."""

    begin_s: Floats
    """Sorted arrivals, and sorted ends, of all requests of one world; running sums of both."""
    end_s: Floats
    begin_sum: Floats
    end_sum: Floats
    joules: Floats
    """Of requests, by the time they end."""
    total: float

    @classmethod
    def of(cls, records: Records, world: int) -> Twin:
        at = records.status[world] != MISSING
        begin, end = np.sort(records.arrival_s[world][at]), np.sort(records.end_s[world][at])
        order = np.argsort(records.end_s[world][at])
        joules = np.cumsum(records.device_j[world][at][order])
        begun, ended = (np.concatenate([[0.0], np.cumsum(one)]) for one in (begin, end))
        return cls(begin, end, begun, ended, np.concatenate([[0.0], joules]), float((end - begin).sum()))

    def waited(self, t: float) -> float:
        """Integral of the number of requests in flight, until then."""
        begun, ended = np.searchsorted(self.begin_s, t), np.searchsorted(self.end_s, t)
        return float(begun * t - self.begin_sum[begun] - (ended * t - self.end_sum[ended]))

    def spent(self, t: float) -> float:
        """Joules of requests that had ended by then."""
        return float(self.joules[np.searchsorted(self.end_s, t)])


class _Class:
    """The worlds of one course."""

    def __init__(self, course: Course, seed: int, worlds: int, pool: int, requests: int) -> None:
        self.course, self.worlds = course, worlds
        self._seed, self._pool, self._requests, self._drawn = seed, pool, requests, 0
        self.duals = np.zeros(NUM_VIRTUAL)
        self._over = np.zeros(NUM_VIRTUAL)
        self._count = 0
        self._renew_pool()
        self.live = Worlds(course.params, self.traces.part(slice(0, worlds)), beta_per_s=0.0)
        self.which = np.arange(worlds)
        self._next = worlds % pool
        self.potential = np.zeros(worlds)
        self.gained: list[float] = []
        """Of worlds that have ended: seconds per request saved, in reference times."""
        self._saved = np.zeros(worlds)
        self.asked: list[tuple[Question, Priced]] = []
        self.live.go_on()

    def _renew_pool(self) -> None:
        """Other traces, and what they cost exact drift plus penalty."""
        params = self.course.params
        numbers = range(self._drawn, self._drawn + self._pool)
        self._drawn += self._pool
        self.traces = draw(params, self._seed, tuple(numbers), self._requests, TRAIN.spread)
        records = simulate(params, self.traces, Constant(self.course.guide))
        self.twins = [Twin.of(records, world) for world in range(self._pool)]

    def observe(self, seen: NDArray[np.float32], masks: NDArray[np.bool_], potential: Floats) -> None:
        """Fill in (worlds, ...) what they ask; a world that has ended asks nothing."""
        guide = self.course.guide
        self.asked = []
        for question in self.live.questions():
            priced = guide.price(question.menu)
            e = question.slots[0]
            seen[e], masks[e] = features(priced), guide.masks(priced)
            queues, weights = question.menu.queues, priced.prepared.weights / guide.v
            potential[e] = -KAPPA * np.minimum((weights * queues**2).sum(axis=1), 100.0)
            self.asked.append((question, priced))

    def act(self, actions: Ints) -> tuple[Floats, Floats, NDArray[np.bool_], int]:
        """Rewards, seconds, whether worlds have ended (they begin anew), and how often the filter had to act."""
        params, guide = self.course.params, self.course.guide
        penalty = params.penalty
        begin = self.live.state.now.copy()
        kept = 0
        answers = []
        for question, priced in self.asked:
            guided = guide.guide(priced, Knobs.of(actions[question.slots[0]]))
            kept += int(guided.kept.sum())
            answers.append((question, guided.choice))
        passed = self.live.go_on(self.live.answer(answers))
        end = self.live.state.now
        over = self.live.is_over.copy()
        reward = -passed.cost
        for world in range(self.worlds):
            twin = self.twins[self.which[world]]
            later = float(end[world])
            waited = (twin.total if over[world] else twin.waited(later)) - twin.waited(float(begin[world]))
            reward[world] += waited / penalty.t_ref_s
            if penalty.w_energy:
                idle = params.idle_w.sum() * passed.tau_s[world]
                spent = (twin.joules[-1] if over[world] else twin.spent(later)) - twin.spent(float(begin[world]))
                reward[world] += penalty.w_energy * (spent + idle) / penalty.e_ref_j
        reward -= self._overspent(passed.ended)
        self._saved += reward
        for world in np.nonzero(over)[0].tolist():
            self.gained.append(self._saved[world] / (self._requests * params.num_devices))
            self._saved[world] = 0.0
            self.which[world] = self._next
            self.live.renew(world, self.traces.part(slice(self._next, self._next + 1)))
            self._next = (self._next + 1) % self._pool
        if over.any():
            self.live.go_on()
        return np.clip(reward, -REWARD_MOST, REWARD_MOST), passed.tau_s, over, kept

    def _overspent(self, ended: Sequence[Ended]) -> Floats:
        """(worlds,): what ended requests overspent, at the prices of now."""
        result, budgets = np.zeros(self.worlds), self.course.params.budgets
        for part in ended:
            total = part.end_s - part.arrival_s
            missed = np.zeros(len(total)) if budgets.deadline_s is None else (total > budgets.deadline_s).astype(float)
            nats = self.course.params.physics.nats[part.last_plan]
            g = lyapunov.overspending(budgets, part.spent[:, 0], missed, nats, part.tokens)
            self._over += g.sum(axis=0)
            self._count += int((part.status == DONE).sum())
            np.add.at(result, part.world, g @ self.duals)
        return result

    def raise_prices(self) -> None:
        """One step of the dual variables: up where a budget was overspent since the last, down where not."""
        if self._count:
            self.duals = np.clip(self.duals + DUAL_STEP * self._over / self._count, 0.0, DUAL_MOST)
        self._over, self._count = np.zeros(NUM_VIRTUAL), 0


class Learnable(VecEnv):
    """What a masked learner needs of an environment, whoever simulates it."""

    def __init__(self, count: int) -> None:
        self._seen = np.zeros((count, TOTAL), np.float32)
        self._masks = np.ones((count, sum(SIZES)), np.bool_)
        self._actions: Ints = np.zeros((count, len(SIZES)), np.int64)
        self.discounts = np.ones(count, np.float32)
        """(environments,): e^(-beta tau) of the latest step."""
        self.decisions = self.kept = 0
        """So far; and how many of them the filter replaced."""
        self.low, self.high = np.full(COUNT, np.inf, np.float32), np.full(COUNT, -np.inf, np.float32)
        """Smallest and largest value of each feature so far."""
        self.render_mode = None
        super().__init__(
            count, gymnasium.spaces.Box(-1.0, 1.0, (TOTAL,), np.float32), gymnasium.spaces.MultiDiscrete(list(SIZES))
        )

    @abstractmethod
    def gains(self) -> list[float]:
        """Of each course: reference times saved per request, mean over the worlds that have ended since the last
        call; NaN without any."""

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = np.asarray(actions, np.int64)

    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Only what a masked learner asks for."""
        assert method_name == "action_masks", method_name
        return list(self._masks)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def action_masks(self) -> NDArray[np.bool_]:
        """(environments, sum of SIZES)"""
        return self._masks.copy()


class CourseEnv(Learnable):
    """All courses side by side, `worlds` of each, as an environment of stable-baselines3."""

    def __init__(
        self, courses: Sequence[Course], worlds: int, seed: int, requests: int = 40, pool: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """`numbers` of courses say which traces they draw; None: as they stand."""
        super().__init__(worlds * len(courses))
        pool = max(pool, worlds)
        self._classes = [
            _Class(course, TRAIN.seed + 7919 * seed + n, worlds, pool, max(requests // course.params.num_devices, 6))
            for n, course in zip(numbers or range(len(courses)), courses, strict=True)
        ]
        self._worlds = worlds
        self._potential = np.zeros(self.num_envs)

    def _parts(self) -> list[tuple[_Class, slice]]:
        w = self._worlds
        return [(one, slice(n * w, (n + 1) * w)) for n, one in enumerate(self._classes)]

    def _observe(self) -> None:
        for one, at in self._parts():
            one.observe(self._seen[at], self._masks[at], self._potential[at])
        plain = self._seen[:, :COUNT]
        self.low, self.high = np.minimum(self.low, plain.min(axis=0)), np.maximum(self.high, plain.max(axis=0))

    def reset(self) -> NDArray[np.float32]:
        """What every world asks now; worlds go on where they are."""
        self._observe()
        return self._seen.copy()

    def play(self, actions: Ints) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """What is asked next, rewards, and whether worlds have ended."""
        reward, over = np.zeros(self.num_envs), np.zeros(self.num_envs, np.bool_)
        before = self._potential.copy()
        for one, at in self._parts():
            reward[at], tau, over[at], kept = one.act(actions[at])
            self.discounts[at] = np.exp(-BETA_PER_S * tau)
            self.kept += kept
        self.decisions += self.num_envs
        self._observe()
        reward += np.where(over, 0.0, self.discounts * self._potential) - before
        return self._seen.copy(), reward.astype(np.float32), over

    def step_wait(self) -> Any:
        return *self.play(self._actions), [{} for _ in range(self.num_envs)]

    def gains(self) -> list[float]:
        """As in `Learnable`; prices of budgets go one step on, too."""
        result = [float(np.mean(one.gained)) if one.gained else float("nan") for one in self._classes]
        for one in self._classes:
            one.gained.clear()
            one.raise_prices()
        return result


__all__ = ["CourseEnv", "Learnable", "Twin"]
