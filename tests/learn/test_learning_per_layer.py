"""The paper's per-layer policy learns: what is known to be best, the same from the same seed, from where it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from splitwise_llm.cost import Host, Job, Limits, World
from splitwise_llm.errors import RequestError
from splitwise_llm.learn.layer_worlds import Place, Streams, Weather, place, places
from splitwise_llm.learn.per_layer import Learner, PerLayerConfig, advantages, roll, train_per_layer
from splitwise_llm.partition import Partition
from splitwise_llm.policies.per_layer_network import CLOUD, EDGE, Network
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

SMALL = PerLayerConfig(updates=3, places=4, streams=8, requests=2, minibatch=8, checkpoint_every=1)
QUICK = replace(SMALL, updates=12, streams=32, requests=4, minibatch=32, learning_rate=3e-3)
HEALTHY = Weather(("500mbit", "500mbit"), (0.001, 0.001), 0.0, (1,), (0.0,), 0.0)
DEAD = Weather(("0.001mbit", "0.001mbit"), (5.0, 5.0), 0.0, (1,), (0.0,), 0.0)


def toy() -> Place:
    """GPT-2 on a Pi beside an A100."""
    spec = find_model("gpt2")
    hosts = (Host(find_device("raspberry-pi-5"), Dtype.FP16, Weights.INT4), Host(find_device("a100-80gb")))
    world = World(spec, hosts, {(0, 1): LinkSpec(0.02, 1e6, 1e6)})
    return place(world, Job(32, 32), Limits(), 0.01)


@pytest.mark.parametrize(("weather", "machine"), [(HEALTHY, CLOUD), (DEAD, EDGE)], ids=["healthy cloud", "dead link"])
def test_it_finds_the_known_optimum(weather: Weather, machine: int, tmp_path: Path) -> None:
    one = toy()
    network = Network(train_per_layer(QUICK, None, None, tmp_path, 0, [one], weather))
    streams = Streams([one] * 8, np.random.default_rng(5), weather)
    actions = network.act(streams.figures(), streams.past, streams.allowed())
    best = Partition.all_on(one.site.world.spec, machine)
    assert [one.site.partition(actions, n) for n in range(8)] == [best] * 8
    drawn = roll(network, streams, 8, np.random.default_rng(6))
    assert drawn.over_plain < 1.0, "an even draw of the first machine costs the dead link 3 or more"


# Dies when learn/per_layer.py says `pass` for `torch.set_num_threads(1)`.
@pytest.mark.usefixtures("two_threads")
def test_the_same_seed_learns_the_same_and_another_does_not(tmp_path: Path) -> None:
    somewhere = places(4, np.random.default_rng(3))
    first, again, other = (
        train_per_layer(SMALL, None, None, tmp_path / str(n), seed, somewhere) for n, seed in enumerate((0, 0, 1))
    )
    assert torch.get_num_threads() == 1
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["ffn.weight"], other["ffn.weight"])


def test_a_training_that_was_interrupted_comes_to_the_same(tmp_path: Path) -> None:
    somewhere = places(4, np.random.default_rng(3))
    whole = train_per_layer(SMALL, None, None, tmp_path / "whole", 0, somewhere)
    said: list[int] = []

    def tell(done: int, of: int, figures: Mapping[str, float]) -> None:
        assert of == 3
        assert np.isfinite(list(figures.values())).all()
        said.append(done)
        if said == [1, 2]:  # before the checkpoint of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_per_layer(SMALL, tell, None, tmp_path / "parts", 0, somewhere)
    parts = train_per_layer(SMALL, tell, None, tmp_path / "parts", 0, somewhere)
    assert said == [1, 2, 2, 3]
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    with np.load(tmp_path / "parts" / "per_layer.npz") as kept:
        assert set(kept.files) == set(parts)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    somewhere = places(2, np.random.default_rng(3))
    train_per_layer(replace(SMALL, updates=1), None, None, tmp_path, 0, somewhere)
    with pytest.raises(RequestError, match=r"seed 0 .* seed 1 .* another folder"):
        train_per_layer(SMALL, None, None, tmp_path, 1, somewhere)


def test_a_writer_gets_curves(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.curves: dict[str, list[int]] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            assert np.isfinite(scalar_value)
            self.curves.setdefault(tag, []).append(global_step)

    writer = Kept()
    train_per_layer(SMALL, None, writer, tmp_path, 0, [toy()])
    assert writer.curves["per_layer/log_over_plain"] == [0, 1, 2]


def test_the_probabilities_learned_with_are_those_of_the_stored_actions() -> None:
    """Mixed depths, floors and memories; numpy draws, PyTorch counts again."""
    somewhere = places(24, np.random.default_rng(4))
    learner = Learner((2.0, 1.0))  # loose, so that layers are shared
    torch.manual_seed(0)
    for value in learner.actor:
        torch.nn.init.normal_(value, std=0.2)
    streams = Streams(somewhere, np.random.default_rng(5))
    drawn = roll(Network(learner.weights()), streams, 3, np.random.default_rng(6))
    with torch.no_grad():
        again, entropy = learner.log_prob(drawn.batch)
    assert drawn.batch.groups.any()
    assert not drawn.batch.free_ffn.all()
    # Dies when learn/per_layer.py says `-logits, logits` for `logits, -logits`.
    assert torch.allclose(again, drawn.batch.log_prob, atol=2e-4)
    assert (entropy >= 0).all()


def test_generalised_advantages() -> None:
    rewards = np.array([[1.0], [2.0]])
    values = np.array([[0.5], [1.0], [4.0]])
    assert advantages(rewards, values, 0.9, 0.0).ravel() == pytest.approx([1 + 0.9 - 0.5, 2 + 3.6 - 1])
    whole = advantages(rewards, values, 0.9, 1.0)
    assert whole[0, 0] == pytest.approx(1 + 0.9 * (2 + 0.9 * 4) - 0.5)
