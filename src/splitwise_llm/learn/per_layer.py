"""PPO for the per-layer policy: draw whole plans, price them, make the good ones likelier.

Written out rather than taken from a library: an action here is a sequence whose every step depends on the one before,
with masks that depend on both, and stable-baselines3 has no such distribution. One request is one decision of the
Markov chain and all steps of its plan share its advantage; the ratio is taken and clipped step by step: of a product
of up to fifty, a clip of 0.2 would leave each next to nothing. The probabilities in it are those of stored actions.

The paper's values: learning rate 3e-4, 4 epochs, clip 0.2, value coefficient 0.5, gradient clip 0.5, no entropy bonus.
The reward is -log(D / D of the best plain plan): the same best plan as for -D, on one scale for all worlds. Not the
paper's: gamma is 0 by default, for what a plan does to later requests is in D already, as its drift, and 0.99 counts
it twice; it learned no better so. And the learning rate falls to 0: in a trial without both it forgot what it knew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from splitwise_llm.errors import RequestError
from splitwise_llm.learn.layer_worlds import Place, Streams, Weather, places
from splitwise_llm.policies.per_layer import NUM_FIGURES
from splitwise_llm.policies.per_layer_network import (
    HISTORY_WIDTH,
    PAST_FIGURES,
    STATE_WIDTH,
    STEP_INPUTS,
    WAVES,
    WIDTH,
    Actions,
    FfnMode,
    Floats,
    Network,
    Rules,
    waves,
)
from splitwise_llm.sim.scenarios import TRAIN

WORST = 6.0
"""Rewards are cut there: a plan e^6 times as dear as another is bad enough."""


@dataclass(frozen=True, slots=True)
class PerLayerConfig:
    """How it learns. What is not the paper's is said."""

    updates: int = 300
    places: int = 400
    """Ours: different devices, models and requests, drawn once."""
    streams: int = 64
    """Ours: places that run at the same time."""
    requests: int = 8
    """Ours: of each, one after another, per update."""
    minibatch: int = 128
    learning_rate: float = 3e-4
    gamma: float = 0.0
    """Ours: the published code has 0.99."""
    gae: float = 0.95
    """Ours: the published code has none."""
    epochs: int = 4
    clip: float = 0.2
    value_coefficient: float = 0.5
    gradient_clip: float = 0.5
    entropy: float = 0.0
    copy: tuple[float, float] = (8.0, 4.0)
    """Ours: how strongly groups follow the FFN before them, and an FFN its layer's groups, to begin with."""
    checkpoint_every: int = 10


class Writer(Protocol):
    """A TensorBoard writer, or anything that keeps curves."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


Tell = Callable[[int, int, Mapping[str, float]], None]
"""Updates done, updates to do, figures."""


class Learner(nn.Module):
    """The network of `per_layer_network`, names and layout alike, and a critic that stays here."""

    figures_mean: Tensor
    figures_std: Tensor
    past_mean: Tensor
    past_std: Tensor

    def __init__(self, copy: tuple[float, float]) -> None:
        super().__init__()
        self.history = nn.GRU(PAST_FIGURES, HISTORY_WIDTH, batch_first=True)
        self.first = nn.Linear(NUM_FIGURES + HISTORY_WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, STATE_WIDTH)
        self.layers = nn.GRU(STEP_INPUTS + STATE_WIDTH, WIDTH, batch_first=True)
        self.groups = nn.Linear(WIDTH, 1 + WAVES)
        self.ffn = nn.Linear(WIDTH, len(FfnMode))
        self.copy = nn.Parameter(torch.tensor(copy))
        self.critic = nn.Sequential(
            nn.Linear(NUM_FIGURES + PAST_FIGURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(),
            nn.Linear(WIDTH, 1),
        )  # fmt: skip
        for name, size in (("figures", NUM_FIGURES), ("past", PAST_FIGURES)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        for layer in (self.groups, self.ffn):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @property
    def actor(self) -> list[nn.Parameter]:
        """All parameters but the critic's."""
        return [value for name, value in self.named_parameters() if not name.startswith("critic")]

    def scale(self, figures: Floats, past: Floats) -> None:
        """Take mean and spread of the inputs from a sample of them."""
        for name, values in (("figures", figures), ("past", past.reshape(-1, PAST_FIGURES))):
            getattr(self, f"{name}_mean").copy_(torch.from_numpy(values.mean(axis=0)))
            getattr(self, f"{name}_std").copy_(torch.from_numpy(np.maximum(values.std(axis=0), 0.1)))

    def weights(self) -> dict[str, np.ndarray]:
        """What deciding takes."""
        kept = {k: v for k, v in self.state_dict().items() if not k.startswith("critic")}
        return {name: value.detach().numpy().astype(np.float32) for name, value in kept.items()}

    def value(self, figures: Tensor, past: Tensor) -> Tensor:
        """(plans,): the reward that is still to come."""
        figures = (figures - self.figures_mean) / self.figures_std
        mean = ((past - self.past_mean) / self.past_std).mean(dim=1)
        result: Tensor = self.critic(torch.cat([figures, mean], dim=1))[:, 0]
        return result

    def log_prob(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(plans, steps): of the stored actions; and the entropy of each step."""
        figures = (batch.figures - self.figures_mean) / self.figures_std
        past = (batch.past - self.past_mean) / self.past_std
        history = self.history(past)[1][0]
        state = torch.tanh(self.second(torch.tanh(self.first(torch.cat([figures, history], dim=1)))))
        steps = batch.inputs.shape[1]
        hidden = self.layers(torch.cat([batch.inputs, state[:, None].expand(-1, steps, -1)], dim=2))[0]
        raw = self.groups(hidden)
        logits = raw[..., :1] + raw[..., 1:] @ batch.basis.transpose(1, 2) + self.copy[0] * batch.copied[..., :1]
        ffn = self.ffn(hidden)
        to_cloud = ffn[..., FfnMode.CLOUD] - ffn[..., FfnMode.EDGE] + self.copy[1] * batch.copied[..., 1]
        log_prob = _bernoulli(logits, batch.groups, batch.free_groups).sum(dim=2)
        log_prob = log_prob + _bernoulli(to_cloud, batch.ffn, batch.free_ffn)
        entropy = _entropy(logits, batch.free_groups).sum(dim=2) + _entropy(to_cloud, batch.free_ffn)
        return log_prob, entropy


def _bernoulli(logits: Tensor, chosen: Tensor, free: Tensor) -> Tensor:
    return torch.where(free, nn.functional.logsigmoid(torch.where(chosen, logits, -logits)), 0.0)


def _entropy(logits: Tensor, free: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return torch.where(free, nn.functional.softplus(logits) - logits * p, 0.0)


@dataclass(slots=True, eq=False)
class Batch:
    """Plans with everything their probability depends on; tensors lead with the plan."""

    figures: Tensor
    past: Tensor
    inputs: Tensor
    copied: Tensor
    basis: Tensor
    groups: Tensor
    free_groups: Tensor
    ffn: Tensor
    free_ffn: Tensor
    log_prob: Tensor

    @classmethod
    def of(cls, figures: Floats, past: Floats, rules: Rules, actions: Actions) -> Batch:
        """Padded to the most steps and groups there are."""

        def floats(values: Floats) -> Tensor:
            return torch.from_numpy(values.astype(np.float32))

        return cls(
            floats(figures),
            floats(past),
            floats(actions.inputs),
            floats(actions.copied),
            floats(waves(rules.groups, actions.groups.shape[2])),
            torch.from_numpy(actions.groups),
            torch.from_numpy(actions.free_groups),
            torch.from_numpy(actions.ffn == FfnMode.CLOUD),
            torch.from_numpy(actions.free_ffn),
            floats(actions.log_prob),
        )

    def rows(self, at: Tensor) -> Batch:
        """Some of them."""
        return Batch(*(getattr(self, name)[at] for name in self.__slots__))

    @classmethod
    def join(cls, batches: list[Batch]) -> Batch:
        """One after another."""
        return cls(*(torch.cat([getattr(batch, name) for batch in batches]) for name in cls.__slots__))


@dataclass(slots=True, eq=False)
class Rollout:
    """What was drawn and what it earned: rewards (requests, streams)."""

    batch: Batch
    rewards: Floats
    after: tuple[Floats, Floats]
    """Figures and past behind the last request."""
    over_plain: float
    """Mean of log(D / D of the best plain plan)."""


def roll(network: Network, streams: Streams, requests: int, dice: np.random.Generator | None) -> Rollout:
    """Let a network decide for a while: drawn with `dice`, or the likelier of each choice without."""
    batches, rewards = [], []
    for _ in range(requests):
        figures, past, rules = streams.figures(), streams.past.copy(), streams.allowed()
        actions = network.act(figures, past, rules, dice)
        paid, plain = streams.step(actions)
        batches.append(Batch.of(figures, past, rules, actions))
        rewards.append(-np.clip(np.log(paid / plain), -WORST, WORST))
    every = np.array(rewards)
    return Rollout(Batch.join(batches), every, (streams.figures(), streams.past), float(-every.mean()))


def advantages(rewards: Floats, values: Floats, gamma: float, gae: float) -> Floats:
    """Generalised advantages (requests, streams) from values (requests + 1, streams), the last a bootstrap."""
    result, running = np.zeros_like(rewards), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        error = rewards[t] + gamma * values[t + 1] - values[t]
        running = error + gamma * gae * running
        result[t] = running
    return result


def improve(learner: Learner, optimiser: torch.optim.Optimizer, rollout: Rollout, config: PerLayerConfig,
            dice: np.random.Generator) -> dict[str, float]:  # fmt: skip
    """The epochs of one update."""
    batch, shape = rollout.batch, rollout.rewards.shape
    with torch.no_grad():
        values = learner.value(batch.figures, batch.past).numpy().reshape(shape)
        last = learner.value(*(torch.from_numpy(each.astype(np.float32)) for each in rollout.after)).numpy()
    values = np.concatenate([values, last[None]])
    gains = advantages(rollout.rewards, values, config.gamma, config.gae)
    returns = torch.from_numpy((gains + values[:-1]).astype(np.float32)).flatten()
    advantage = torch.from_numpy(((gains - gains.mean()) / max(gains.std(), 0.1)).astype(np.float32)).flatten()
    free = batch.free_ffn | batch.free_groups.any(dim=2)
    figures: dict[str, list[float]] = {"value_loss": [], "clipped": [], "entropy": []}
    for _ in range(config.epochs):
        order = torch.from_numpy(dice.permutation(len(advantage)))
        for at in torch.split(order, config.minibatch):
            some, gain, choice = batch.rows(at), advantage[at, None], free[at].float()
            log_prob, entropy = learner.log_prob(some)
            ratio = torch.exp(log_prob - some.log_prob)
            inside = torch.clamp(ratio, 1 - config.clip, 1 + config.clip)
            worth = torch.minimum(ratio * gain, inside * gain) + config.entropy * entropy
            count = len(at)
            value_loss = nn.functional.mse_loss(learner.value(some.figures, some.past), returns[at])
            loss = -(worth * choice).sum() / count + config.value_coefficient * value_loss
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            for part in (learner.actor, learner.critic.parameters()):  # the critic's errors are no part of the actor's
                nn.utils.clip_grad_norm_(part, config.gradient_clip)
            optimiser.step()
            outside = ((ratio - 1).abs() > config.clip).float()
            figures["value_loss"].append(value_loss.item())
            figures["clipped"].append(((outside * choice).sum() / choice.sum().clamp(min=1)).item())
            figures["entropy"].append((entropy.sum() / count).item())
    return {name: float(np.mean(values)) for name, values in figures.items()}


def train_per_layer(
    config: PerLayerConfig, tell: Tell | None, writer: Writer | None, folder: Path, seed: int,
    somewhere: Sequence[Place] = (), weather: Weather = Weather(),  # noqa: B008 - frozen
) -> dict[str, np.ndarray]:  # fmt: skip
    """Weights of the policy, learned from nothing; also written to `folder`/per_layer.npz. It learns at `somewhere`,
    or at places that the seed draws.

    Every update depends on (seed, its number) and the weights alone, so that what was interrupted goes on from its
    checkpoint in `folder` and comes to the same; for that torch is left with one thread. Raises RequestError where
    the checkpoint is of another training.
    """
    torch.set_num_threads(1)  # other numbers sum in another order, and no two of them learn the same
    torch.manual_seed(seed)
    somewhere = somewhere or places(config.places, np.random.default_rng([TRAIN.seed, seed]))
    learner = Learner(config.copy)
    sample = Streams(somewhere, np.random.default_rng([TRAIN.seed, seed, 1]), weather)
    learner.scale(sample.figures(), sample.past)
    optimiser = torch.optim.Adam(learner.parameters(), lr=config.learning_rate, eps=1e-5)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "per_layer.pt"
    done = _resume(checkpoint, learner, optimiser, config, seed)
    for update in range(done, config.updates):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * (1 - update / config.updates)
        dice = np.random.default_rng([TRAIN.seed, seed, 2, update])
        chosen = dice.choice(len(somewhere), config.streams, replace=len(somewhere) < config.streams)
        streams = Streams([somewhere[n] for n in chosen], dice, weather)
        rollout = roll(Network(learner.weights()), streams, config.requests, dice)
        figures = improve(learner, optimiser, rollout, config, dice) | {"log_over_plain": rollout.over_plain}
        for name, value in figures.items() if writer else ():
            assert writer is not None
            writer.add_scalar(f"per_layer/{name}", value, update)
        if tell:
            tell(update + 1, config.updates, figures)
        if (update + 1) % config.checkpoint_every == 0 or update + 1 == config.updates:
            _keep(checkpoint, learner, optimiser, config, seed, update + 1)
    weights = learner.weights()
    np.savez_compressed(folder / "per_layer.npz", allow_pickle=False, **weights)
    return weights


def _keep(
    file: Path, learner: Learner, optimiser: torch.optim.Optimizer, config: PerLayerConfig, seed: int, done: int
) -> None:
    state = {"learner": learner.state_dict(), "optimiser": optimiser.state_dict(), "done": done}
    state |= {"config": asdict(config), "seed": seed}
    fresh = file.with_suffix(".tmp")
    torch.save(state, fresh)
    fresh.replace(file)


def _resume(file: Path, learner: Learner, optimiser: torch.optim.Optimizer, config: PerLayerConfig, seed: int) -> int:
    """Updates that are done."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    before, now = state["config"], asdict(config)
    if state["seed"] != seed or before != now:
        raise RequestError(
            f"{file} is of seed {state['seed']} and {before}; this training has seed {seed} and {now}: "
            "use another folder, or remove it"
        )
    learner.load_state_dict(state["learner"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["done"])
