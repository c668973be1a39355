"""The simulator as Gymnasium environments, single and vectorised. It knows no learner.

An observation holds what `observation.Menu` does, and nothing else, squashed to [0, 1] by `x / (1 + x)` (times in
units of the reference time of the penalty) unless the table says otherwise:

| places | meaning |
| --- | --- |
| 1 | 1 at admission, 0 in flight |
| 1 | seconds since the request arrived |
| 1 | expected tokens still to come, in hundreds |
| 3 | RTT; seconds per 100 kB up and down, as last seen |
| 2 | the cloud's step time over that of one sequence; its admission wait |
| 4 | seconds of work before device, up, down, cloud |
| 4 | virtual queues: energy, deadline, accuracy, battery |
| plans | 1 on the present plan |
| plans | 1 where a plan can be chosen and is in reach |
| plans | seconds until a generation in flight can go on with a plan |

| action | meaning |
| --- | --- |
| 0 to plans - 1 | that plan; one that is out of reach waits for the link |
| plans | refuse the request; in flight: stay |
| plans + 1 | ask again at the next epoch; in flight: stay |

The reward for the time `tau` until the next decision is the cost of that time (`worlds`), discounted, below 0.
`info["discount"]` is `e^(-beta tau)`. An episode terminates when every request has ended, and
is truncated after `until_s` simulated seconds.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from splitwise_llm.errors import SpecError
from splitwise_llm.observation import Menu
from splitwise_llm.sim.asking import LATER, REFUSE, Question
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.params import Params
from splitwise_llm.sim.worlds import BETA_PER_S, Worlds

FIXED = 16
Observations = NDArray[np.float32]


def features(params: Params, menu: Menu, width: int) -> Observations:
    """Observations (n, FIXED + 3 width) of a menu; tables of fewer than `width` plans leave places empty."""
    places, t_ref = params.physics.places, params.penalty.t_ref_s
    x, plans = menu.conditions, menu.admissible.shape[1]
    result = np.zeros((len(x), FIXED + 3 * width))
    result[:, 0] = menu.current < 0
    result[:, 1] = menu.waited_s / t_ref
    result[:, 2] = menu.remaining_tokens / 100
    result[:, 3] = x[:, places.rtt] / t_ref
    result[:, 4:6] = x[:, [places.up, places.down]] * 1e5 / t_ref
    result[:, 6] = x[:, places.slow] - 1
    result[:, 7] = x[:, places.wait] / t_ref
    result[:, 8:12] = menu.queues / t_ref
    result[:, 12:16] = menu.virtual
    entry = menu.entry_s / t_ref
    result[:, FIXED + 2 * width : FIXED + 2 * width + plans] = entry
    np.maximum(result, 0.0, out=result)
    result /= 1 + result
    result[:, 0] = menu.current < 0
    n = np.nonzero(menu.current >= 0)[0]
    result[n, FIXED + menu.current[n]] = 1.0
    result[:, FIXED + width : FIXED + width + plans] = menu.admissible
    return result.astype(np.float32)


class VectorSplitwise(gymnasium.vector.VectorEnv[Observations, NDArray[np.int64], NDArray[Any]]):
    """Many worlds side by side; each asks one question at a time. A world that has ended starts anew, as another
    trace, in the step after (`AutoresetMode.NEXT_STEP`)."""

    def __init__(
        self, params: Params, num_envs: int, requests: int = 100, until_s: float = np.inf, spread: float = 0.0
    ) -> None:
        if num_envs < 1:
            raise SpecError(f"{num_envs} environments; give one at least")
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}
        self.params, self.num_envs = params, num_envs
        self._requests, self._until_s, self._spread = requests, until_s, spread
        self.width = max(map(len, params.physics.tables))
        self.single_observation_space = gymnasium.spaces.Box(0.0, 1.0, (FIXED + 3 * self.width,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(self.width + 2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._asked: list[Question] = []
        self._worlds: Worlds | None = None
        self._seed = 0

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start every world. The traces are those of `seed`, numbered from 0; without a seed, the next ones."""
        if isinstance(seed, list):
            seed = seed[0]
        if seed is not None or self._worlds is None:
            self._seed = int(seed or 0)
            self._episode = 0
        else:
            self._episode += self.num_envs
        numbers = range(self._episode, self._episode + self.num_envs)
        traces = draw(self.params, self._seed, numbers, self._requests, self._spread)
        self._worlds = Worlds(self.params, traces, self._until_s)
        self._episode += self.num_envs
        self._over = np.zeros(self.num_envs, np.bool_)
        self._worlds.go_on()
        seen = self._observe(self._worlds)
        return seen, {"admissible": self._admissible}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[Observations, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Answer every question; what then happens until each world asks again or has ended."""
        worlds = self._worlds
        assert worlds is not None, "call reset before step"
        renewed = self._over.copy()
        for world in np.nonzero(renewed)[0].tolist():
            worlds.renew(world, draw(self.params, self._seed, [self._episode], self._requests, self._spread))
            self._episode += 1
        ended = worlds.answer([(question, self._choice(question, actions)) for question in self._asked])
        passed = worlds.go_on(ended)
        reward = np.where(renewed, 0.0, -passed.cost)
        truncated = worlds.state.now >= self._until_s
        terminated = worlds.state.is_over & ~truncated
        self._over = terminated | truncated
        seen = self._observe(worlds)
        discount = np.exp(-BETA_PER_S * passed.tau_s)
        info = {"admissible": self._admissible, "discount": discount, "tau_s": passed.tau_s}
        return seen, reward, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Nothing is open."""

    def _choice(self, question: Question, actions: NDArray[np.int64]) -> NDArray[np.int64]:
        plans = len(self.params.physics.tables[question.table])
        choice = np.asarray(actions, np.int64)[question.slots[0]]
        choice = np.where(choice == self.width, REFUSE, np.where(choice == self.width + 1, LATER, choice))
        return np.where(choice >= plans, LATER, choice)  # no such plan in this world's table

    def _observe(self, worlds: Worlds) -> Observations:
        self._asked = worlds.questions()
        result = np.zeros((self.num_envs, FIXED + 3 * self.width), np.float32)
        self._admissible = np.zeros((self.num_envs, self.width + 2), np.bool_)
        self._admissible[:, self.width :] = True
        for question in self._asked:
            e, plans = question.slots[0], question.menu.admissible.shape[1]
            result[e] = features(self.params, question.menu, self.width)
            self._admissible[e, :plans] = question.menu.admissible
        return result


class Splitwise(gymnasium.Env[Observations, np.int64]):
    """One world; observation, action and reward as in this file's head."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, params: Params, requests: int = 100, until_s: float = np.inf, spread: float = 0.0) -> None:
        self._many = VectorSplitwise(params, 1, requests, until_s, spread)
        self.observation_space = self._many.single_observation_space
        self.action_space = self._many.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Start a trace: the first of `seed`; without a seed, the next one."""
        super().reset(seed=seed)
        seen, info = self._many.reset(seed=seed)
        return seen[0], {"admissible": info["admissible"][0]}

    def step(self, action: np.int64) -> tuple[Observations, float, bool, bool, dict[str, Any]]:
        """Answer the question; what happens until the next one."""
        seen, reward, terminated, truncated, info = self._many.step(np.array([action], np.int64))
        one = {name: value[0] for name, value in info.items()}
        return seen[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), one


__all__ = ["BETA_PER_S", "Splitwise", "VectorSplitwise", "features"]
