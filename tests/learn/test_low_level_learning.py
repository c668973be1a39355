"""The proposer's learner: it finds a known optimum, the same seed gives the same weights, and it can be taken up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch

from splitwise_llm.cost import Limits, memory_bytes, obstacle
from splitwise_llm.errors import RequestError
from splitwise_llm.learn.few_runs import best_of_few_runs, is_quick
from splitwise_llm.learn.low_level import Config, Network, lesson_of, train_low_level
from splitwise_llm.learn.states import Spread, State, random_state
from splitwise_llm.partition import Partition
from splitwise_llm.policies.proposer import Nodes, Proposer, Weights, candidates, probabilities, settled

SMALL = Config(states=4, rounds=12, batch=8, asked=2, validation=1, every=6, spread=Spread(machines=(2, 3)))


def quiet(_: str) -> None:
    pass


def toy(seed: int) -> State:
    """Three machines, six layers, and memory for about half of the model on each machine."""
    state = random_state(seed, Spread(machines=(3,)))
    world = replace(state.world, spec=replace(state.world.spec, num_layers=6))
    hosts = []
    for m, host in enumerate(world.hosts):
        whole = memory_bytes(world, Partition.all_on(world.spec, m), m, state.job, None)
        hosts.append(replace(host, device=replace(host.device, memory_bytes=0.6 * whole)))
    return replace(state, world=replace(world, hosts=tuple(hosts)), limits=Limits())


def by_enumeration(state: State) -> float:
    """The best of every machine for every layer."""
    sheet = lesson_of(state).sheet
    best = np.inf
    for seats in product(range(3), repeat=6):
        runs = tuple((a, n + 1) for n, (a, b) in enumerate(pairwise((*seats, -1))) if a != b)
        best = min(best, float(settled(sheet, [runs])[0][0]))
    return best


def test_on_a_toy_problem_the_greedy_plan_becomes_the_known_optimum() -> None:
    """Killed in low_level.py by weights that grow with the excess; by a loss of the other sign."""
    states = [toy(seed) for seed in (1, 5)]
    config = replace(SMALL, rounds=120, asked=2, validation=0, every=1000)
    learned = Proposer(train_low_level(config, quiet, states=states))
    untrained = Proposer(Weights.random(0, config.hidden))
    missed = 0
    for state in states:
        lesson, least = lesson_of(state), by_enumeration(state)
        assert np.isfinite(least)
        assert float(settled(lesson.sheet, learned.paths(lesson.prospect, 1))[0][0]) == pytest.approx(least, rel=0.005)
        greedy = settled(lesson.sheet, untrained.paths(lesson.prospect, 1))[0]
        missed += float(greedy.min(initial=np.inf)) > 1.005 * least
    assert missed  # else there was nothing to learn


# Dies when learn/low_level.py says `pass` for `torch.set_num_threads(1)`.
@pytest.mark.usefixtures("two_threads")
def test_the_same_seed_gives_the_same_weights_interrupted_or_not(tmp_path: Path) -> None:
    whole = train_low_level(SMALL, quiet, seed=3)
    assert torch.get_num_threads() == 1
    said = list[str]()

    def stop(text: str) -> None:
        said.append(text)
        if text.startswith("round 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_low_level(SMALL, stop, folder=tmp_path, seed=3)
    resumed = train_low_level(SMALL, said.append, folder=tmp_path, seed=3)
    assert any("going on from round 6" in text for text in said)
    other = train_low_level(SMALL, quiet, seed=4)
    for name in Weights.names():
        assert np.array_equal(getattr(whole, name), getattr(resumed, name)), name
    assert not np.array_equal(whole.into, other.into)
    with pytest.raises(RequestError, match="another run"):
        train_low_level(replace(SMALL, rounds=20), quiet, folder=tmp_path, seed=3)


def test_curves_are_written() -> None:
    class Curves:
        def __init__(self) -> None:
            self.seen: list[tuple[str, int]] = []

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            assert np.isfinite(scalar_value)
            self.seen.append((tag, global_step))

    curves = Curves()
    train_low_level(SMALL, quiet, curves)
    assert ("low_level/within_2", 12) in curves.seen


def test_the_network_that_learns_says_what_the_one_that_decides_says() -> None:
    lesson, weights = lesson_of(random_state(9, Spread(machines=(4,)))), Weights.random(5)
    root = candidates(lesson.prospect, Nodes.root(lesson.prospect))
    grown = Nodes.root(lesson.prospect).grown(
        lesson.prospect, np.zeros(3, np.int64), root.seat[:3], np.minimum(root.end[:3], lesson.prospect.num_layers - 1)
    )
    some = candidates(lesson.prospect, grown)
    decides = probabilities(weights.scores(some.features, some.starts), some.starts)
    sizes = np.diff(np.append(some.starts, len(some.features)))
    learns = Network(weights)(torch.from_numpy(some.features), torch.from_numpy(sizes)).detach().numpy()
    assert learns == pytest.approx(decides, abs=1e-4)


def test_few_runs_are_as_good_as_every_placement_of_whole_layers_where_three_are_enough() -> None:
    """Killed in few_runs.py by `ends[:, 0]` for all starts; by `>` for `<`."""
    for seed in (2, 6):
        sheet, least = lesson_of(toy(seed)).sheet, by_enumeration(toy(seed))
        value, path = best_of_few_runs(sheet)
        assert path is not None
        assert value == pytest.approx(float(settled(sheet, [path])[0][0]), rel=1e-12)
        assert value == pytest.approx(least, rel=1e-9)


def test_states_are_a_function_of_their_seed_and_most_have_a_plan_of_few_runs() -> None:
    found = 0
    for seed in range(30):
        state, again = random_state(seed, Spread(machines=(2, 3))), random_state(seed, Spread(machines=(2, 3)))
        assert state.world == again.world
        assert np.array_equal(state.conditions, again.conditions)
        sheet = lesson_of(state).sheet
        path = best_of_few_runs(sheet)[1] if is_quick(sheet) else None
        if path:
            (plan,) = settled(sheet, [path])[1]
            assert obstacle(state.world, sheet.decision(plan), state.job, state.limits) is None
            found += 1
    assert found >= 25
