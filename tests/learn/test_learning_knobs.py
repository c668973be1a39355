"""Learning of the high level: the same seed, the same weights; the same network in numpy; what it cannot judge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.learn.courses import Course, course, courses
from splitwise_llm.learn.env import CourseEnv, Twin
from splitwise_llm.learn.parallel import ParallelEnv
from splitwise_llm.learn.train import (
    CONFIGS,
    _origin,
    _state,
    begin_at,
    learner,
    network,
    read_config,
    train,
)
from splitwise_llm.observation import Past
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.features import COUNT, FORECASTS, NAMES, TOTAL, features
from splitwise_llm.policies.guided import Constant
from splitwise_llm.policies.knobs import NEUTRAL, SIZES
from splitwise_llm.policies.mind import STALE_S, Mind
from splitwise_llm.policies.network import NAMES as WEIGHTS
from splitwise_llm.policies.network import Network
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.worlds import Worlds

TINY = replace(CONFIGS["tiny"], courses=1, decisions=512, steps=16, minibatch=64, validate_every=2)


@pytest.fixture(scope="module")
def one() -> Course:
    """One device, and no weight on energy, which the twin knows by request only."""
    drawn = (course(7, number) for number in range(20))
    return next(each for each in drawn if each.params.num_devices == 1 and not each.params.penalty.w_energy)


@pytest.fixture(scope="module")
def env(one: Course) -> CourseEnv:
    made = CourseEnv([one], 4, 0, requests=8)
    made.reset()
    return made


def test_neutral_knobs_save_nothing(one: Course) -> None:
    """The twin is the same run, so that only the potential is left, which telescopes; who comes to a busy device's door
    between two events is counted at once by both."""
    made = CourseEnv([one], 4, 0, requests=8)
    made.reset()
    neutral = np.tile(np.array(NEUTRAL), (4, 1))
    saved = []
    while len(saved) < 4:
        made.play(neutral)
        saved += made._classes[0].gained
        made._classes[0].gained.clear()
    assert np.abs(saved).max() < 1e-9


def test_the_twin_counts_requests_in_flight(one: Course) -> None:
    traces = draw(one.params, 5, range(2), 6)
    records = simulate(one.params, traces, Constant(one.guide))
    twin = Twin.of(records, 1)
    total = (records.end_s[1] - records.arrival_s[1]).sum()
    assert twin.waited(1e9) == pytest.approx(total)
    assert twin.total == pytest.approx(total)
    middle = float(np.median(records.end_s[1]))
    in_flight = np.clip(middle - records.arrival_s[1], 0, None) - np.clip(middle - records.end_s[1], 0, None)
    assert twin.waited(middle) == pytest.approx(in_flight.sum())


def test_courses_on_processes_are_the_same_courses() -> None:
    two = courses(7, 2)
    assert [one.name for one in courses(7, 2, 2)] == [one.name for one in two]
    alone, several = CourseEnv(two, 2, 0, 6), ParallelEnv(two, 2, 0, 6, 2)
    try:
        assert np.array_equal(alone.reset(), several.reset())
        actions = np.tile(np.array(NEUTRAL), (4, 1))
        for _ in range(5):
            for each in (alone, several):
                each.step_async(actions)
            mine, theirs = alone.step_wait(), several.step_wait()
            for n in range(3):
                assert np.array_equal(mine[n], theirs[n])
            assert np.array_equal(alone.action_masks(), several.action_masks())
    finally:
        several.close()


def test_the_network_is_the_same_in_numpy(env: CourseEnv) -> None:
    model = learner(TINY, env)
    mind = network(model, env)
    x = np.random.default_rng(0).uniform(0, 1, (5, TOTAL)).astype(np.float32)
    with torch.no_grad():
        policy = model.policy
        latent, _ = policy.mlp_extractor(policy.extract_features(torch.as_tensor(x)))
        theirs = policy.action_net(latent).numpy()
    assert np.allclose(mind.logits(x), theirs, atol=1e-5)
    other = learner(replace(TINY, seed=9), env)
    begin_at(other, mind)
    assert np.array_equal(network(other, env).heads, mind.heads)


def test_a_new_learner_is_drift_plus_penalty(one: Course, env: CourseEnv) -> None:
    mind = Mind(one.guide, replace(network(learner(TINY, env), env), low=np.zeros(COUNT), high=np.ones(COUNT)))
    traces = draw(one.params, 5, range(2), 6)
    drift, new = (simulate(one.params, traces, chooser) for chooser in (Constant(one.guide), mind))
    assert np.array_equal(drift.total_s, new.total_s)
    assert mind.tally.fallback_share == 0.0
    assert not mind.tally.turned


def test_what_it_cannot_judge_is_left_to_drift_and_counted(one: Course, env: CourseEnv) -> None:
    net = replace(network(learner(TINY, env), env), low=np.zeros(COUNT), high=np.ones(COUNT))
    bold = replace(net, heads_bias=np.arange(sum(SIZES), dtype=np.float32))  # turns every knob to its last value
    worlds = Worlds(one.params, draw(one.params, 5, range(3), 6))
    worlds.go_on()
    menu = worlds.questions()[0].menu
    count, past = len(menu.current), menu.past
    assert past is not None
    neutral = np.tile(np.array(NEUTRAL), (count, 1))

    mind = Mind(one.guide, bold)
    assert not np.array_equal(mind.actions(one.guide.price(menu)), neutral)

    stale = replace(menu, past=replace(past, age_s=np.full(count, 2 * STALE_S)))
    assert np.array_equal(mind.actions(one.guide.price(stale)), neutral)
    assert mind.tally.stale == count

    narrow = Mind(one.guide, replace(bold, low=np.full(COUNT, 2.0)))
    assert np.array_equal(narrow.actions(one.guide.price(menu)), neutral)
    assert narrow.tally.outside == count

    broken = Mind(one.guide, replace(bold, heads_bias=np.full(sum(SIZES), np.nan, np.float32)))
    assert np.array_equal(broken.actions(one.guide.price(menu)), neutral)
    assert broken.tally.not_finite == count
    assert broken.tally.fallback_share == 1.0


# Dies when policies/mind.py says `self.network.is_outside(x)` for
# `self.network.is_outside(x, () if self.forecasts else FORECASTS)`.
def test_what_is_kept_from_it_is_nothing_that_it_cannot_judge(one: Course, env: CourseEnv) -> None:
    low = np.zeros(COUNT, np.float32)
    low[list(FORECASTS)] = 0.5  # it learned where forecasts were never 0
    net = replace(network(learner(TINY, env), env), low=low, high=np.ones(COUNT, np.float32))
    worlds = Worlds(one.params, draw(one.params, 5, range(3), 6))
    worlds.go_on()
    priced = one.guide.price(worlds.questions()[0].menu)
    blind, seeing = Mind(one.guide, net, forecasts=False), Mind(one.guide, net)
    for mind in (blind, seeing):
        mind.actions(priced)
    assert blind.tally.fallback_share == 0.0
    assert seeing.tally.outside > 0


def test_features_are_bounded_and_named(one: Course) -> None:
    worlds = Worlds(one.params, draw(one.params, 5, range(3), 6))
    worlds.go_on()
    menu = worlds.questions()[0].menu
    x = features(one.guide.price(menu))
    assert x.shape == (len(menu.current), TOTAL)
    assert np.isfinite(x).all()
    assert x.min() >= 0.0
    assert x.max() <= 1.0
    assert len(set(NAMES)) == COUNT
    without = features(one.guide.price(replace(menu, past=Past.nothing(len(menu.current)))), forecasts=False)
    assert (without[:, [n for n, name in enumerate(NAMES) if name.startswith("forecast")]] == 0).all()


@pytest.mark.long
def test_the_same_seed_gives_the_same_weights_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    first, second = (train(TINY, tmp_path / name, lambda _: None) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(SpecError, match="another configuration"):
        train(replace(TINY, seed=1), tmp_path / "a", lambda _: None)


def test_weights_that_do_not_fit_say_so(tmp_path: Path, env: CourseEnv) -> None:
    mind = network(learner(TINY, env), env)
    mind.save(tmp_path / "w.npz")
    assert np.array_equal(Network.load(tmp_path / "w.npz").first, mind.first)
    (tmp_path / "w.npz").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="splitwise train"):
        Network.load(tmp_path / "w.npz")
    with pytest.raises(ModelError, match="another version"):
        replace(mind, low=np.zeros(3, np.float32))
    mind.save(tmp_path / "w.npz")
    whole = (tmp_path / "w.npz").read_bytes()
    np.savez(tmp_path / "other.npz", **{name: getattr(mind, name)[..., :-1] for name in WEIGHTS})
    np.save(tmp_path / "one.npy", mind.low)
    (tmp_path / "cut.npz").write_bytes(whole[:-400])
    (tmp_path / "empty.npz").touch()
    for name in ("other.npz", "one.npy", "cut.npz", "empty.npz", "nowhere.npz", "."):
        with pytest.raises(ModelError, match=r"splitwise train") as refused:
            find_policy(f"splitwise:{tmp_path / name}")
        assert str(tmp_path / name) in str(refused.value)


def test_weights_to_begin_at_are_as_wide_as_the_network(env: CourseEnv) -> None:
    # Dies when learn/train.py leaves out the comparison of shapes.
    start = network(learner(TINY, env), env)
    with pytest.raises(SpecError, match="hidden 16 and width 64"):
        begin_at(learner(replace(TINY, hidden=8, width=32), env), start)


def test_a_run_that_began_elsewhere_is_not_gone_on_with(tmp_path: Path, one: Course, env: CourseEnv) -> None:
    start, lived = network(learner(TINY, env), env), replace(one, name="course-1 (3 requests in 5.5 s)")
    begun = _state(TINY, tmp_path, _origin(start, [lived]))
    assert _state(TINY, tmp_path, _origin(start, [lived])) == begun
    for other in (_origin(None, []), _origin(start, []), _origin(replace(start, heads=start.heads + 1), [lived])):
        with pytest.raises(SpecError, match="began at other weights, records or recordings"):
            _state(TINY, tmp_path, other)


def test_configurations_are_named_or_read(tmp_path: Path) -> None:
    assert read_config("tiny", 5).seed == 5
    (tmp_path / "c.json").write_text('{"courses": 3}')
    assert read_config(str(tmp_path / "c.json")).courses == 3
    (tmp_path / "c.json").write_text('{"coursez": 3}')
    with pytest.raises(SpecError, match="coursez"):
        read_config(str(tmp_path / "c.json"))
    with pytest.raises(SpecError, match="unknown training configuration"):
        read_config("defualt")
