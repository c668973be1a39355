"""The Gymnasium face, single and vectorised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from test_worlds import BUSY
from worlds import EDGE, STEADY

from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.gym import BETA_PER_S, Splitwise, VectorSplitwise
from splitwise_llm.sim.params import Arrivals, Params

QUIET = Params(BUSY.physics, STEADY, arrivals=Arrivals(per_s=1e-3), penalty=BUSY.penalty)


def test_the_single_environment_passes_check_env() -> None:
    check_env(Splitwise(BUSY, requests=5), skip_render_check=True)


def test_an_episode_terminates_when_all_is_done_and_is_truncated_when_time_is_up() -> None:
    for until, expected in ((np.inf, (True, False)), (30.0, (False, True))):
        env = Splitwise(BUSY, requests=5, until_s=until)
        env.reset(seed=3)
        ends = (False, False)
        steps = 0
        while not any(ends):
            seen, _, *ends, info = env.step(np.int64(EDGE))
            assert env.observation_space.contains(seen)
            assert 0 < info["discount"] <= 1
            steps += 1
        assert tuple(ends) == expected, until
        assert steps > 3


def test_rewards_add_up_to_the_time_that_requests_took() -> None:
    """One request at a time, discounted from decision to decision: the sum is the discounted time in the system."""
    env = Splitwise(QUIET, requests=1)
    env.reset(seed=0)
    total, weight, passed = 0.0, 1.0, 0.0
    over = False
    while not over:
        _, reward, over, _, info = env.step(np.int64(EDGE))
        total += weight * reward
        weight *= float(info["discount"])
        passed += float(info["tau_s"])
    expected = -(1 - np.exp(-BETA_PER_S * passed)) / BETA_PER_S / QUIET.penalty.t_ref_s
    assert total == pytest.approx(expected)


def test_vectorised_worlds_see_what_single_ones_see_and_start_anew_when_they_end() -> None:
    many = VectorSplitwise(BUSY, 3, requests=3)
    seen, info = many.reset(seed=5)
    assert seen.shape == (3, *many.single_observation_space.shape)
    assert info["admissible"].shape == (3, many.single_action_space.n)
    single = Splitwise(BUSY, requests=3)
    one, _ = single.reset(seed=5)
    over = renewed = False
    for _ in range(120):
        assert over or np.array_equal(one, seen[0])
        before = many._over.copy()
        seen, reward, terminated, truncated, _ = many.step(np.full(3, EDGE))
        assert not truncated.any()
        if before.any():
            renewed = True
            assert (reward[before] == 0).all()
            assert not terminated[before].any()
        if not over:
            one, _, over, _, _ = single.step(np.int64(EDGE))
            assert over == bool(terminated[0])
    assert over
    assert renewed


def test_the_same_seed_gives_the_same_episode_and_resetting_without_one_the_next() -> None:
    env = Splitwise(BUSY, requests=3)
    first = env.reset(seed=1)[0]
    assert np.array_equal(env.reset(seed=1)[0], first)
    waits = [env._many._worlds.traces.arrival_s[0, 0, 0]]
    env.reset()
    waits.append(env._many._worlds.traces.arrival_s[0, 0, 0])
    assert waits[0] != waits[1]
    assert waits[0] == draw(replace(BUSY), 1, [0], 3).arrival_s[0, 0, 0]
