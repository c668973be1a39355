"""How the policy `splitwise` learns, from nothing to the weights that are shipped: read it from top to bottom.

1. Settings are drawn (`courses`), and simulated many worlds at a time (`env`): an action turns knobs, the reward is
   what that saved against exact drift plus penalty on the same trace.
2. The network (`Reader`, two tanh layers, one head per knob) starts at neutral knobs, which are drift plus penalty.
3. Proximal policy optimisation with action masks (sb3-contrib's `MaskablePPO`) makes it better. Two things are ours:
   decisions are not equally far apart in time, so each step has a discount of its own (`Buffer`); and the prices of
   budgets rise while they are overspent (`env`).
4. From time to time the weights are kept beside the learner's state: a run that was stopped goes on from there. What is
   kept at the end is the best by the saving on courses set apart, which no gradient has seen.

Same seed, same machine type: the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from splitwise_llm.errors import SpecError
from splitwise_llm.learn.courses import Course, courses
from splitwise_llm.learn.env import CourseEnv
from splitwise_llm.observation import EPOCHS, SEEN
from splitwise_llm.policies.features import COUNT
from splitwise_llm.policies.guided import Constant
from splitwise_llm.policies.knobs import NEUTRAL, SIZES
from splitwise_llm.policies.mind import Mind
from splitwise_llm.policies.network import Network
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import simulate
from splitwise_llm.sim.scenarios import TRAIN

Tell = Callable[[str], None]

VALIDATION_SEED = TRAIN.seed + 500_000
"""Of the courses, and of the traces, that only choose among weights."""


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that weights depend on, beside the source and the machine type."""

    seed: int = 0
    courses: int = 32
    worlds: int = 8
    """Of each course, side by side."""
    requests: int = 40
    """Of each trace, all devices together."""
    decisions: int = 1_500_000
    steps: int = 64
    """Of each world between two updates."""
    minibatch: int = 2048
    epochs: int = 4
    learning_rate: float = 3e-4
    clip: float = 0.2
    gae: float = 0.95
    entropy: float = 0.002
    hidden: int = 16
    width: int = 64
    boldness: float = 3.0
    """Logit that neutral values have over the others in the beginning: 3 leaves a knob alone in 4 to 6 of 7 cases."""
    validate_every: int = 8
    """Updates."""
    validation: int = 10
    """Courses set apart."""
    threads: int = 1

    def __post_init__(self) -> None:
        if min(self.courses, self.worlds, self.steps, self.validate_every, self.validation, self.threads) < 1:
            raise SpecError(f"every count of a training configuration is 1 or more: {self}")

    @property
    def environments(self) -> int:
        return self.courses * self.worlds

    @property
    def updates(self) -> int:
        return max(self.decisions // (self.environments * self.steps), 1)


CONFIGS: dict[str, Config] = {
    "default": Config(),
    "tiny": Config(courses=2, worlds=4, decisions=2048, steps=32, minibatch=128, validate_every=2, validation=1),
}
"""By name, for `splitwise train --config`."""


def read_config(name: str, seed: int | None = None) -> Config:
    """A named configuration, or a JSON file with fields of `Config`. Raises SpecError."""
    config = CONFIGS.get(name)
    if config is None:
        if not Path(name).is_file():
            raise SpecError(f"unknown training configuration {name!r}: {', '.join(CONFIGS)}, or a JSON file")
        try:
            config = replace(CONFIGS["default"], **json.loads(Path(name).read_text()))
        except (TypeError, ValueError) as error:
            fields = ", ".join(asdict(CONFIGS["default"]))
            raise SpecError(f"{name}: {error}; expected a JSON object with some of {fields}") from error
    return config if seed is None else replace(config, seed=seed)


class Reader(BaseFeaturesExtractor):
    """Plain features beside the last state of a GRU over the epochs, the oldest first."""

    def __init__(self, space: gymnasium.Space[Any], hidden: int) -> None:
        super().__init__(space, COUNT + hidden)
        self.gru = nn.GRU(len(SEEN), hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        epochs = x[:, COUNT:].reshape(-1, EPOCHS, len(SEEN)).flip(1)
        return torch.cat([x[:, :COUNT], self.gru(epochs)[1][0]], dim=1)


class Buffer(MaskableRolloutBuffer):
    """Advantages where each step has its own discount; `env` knows that of the latest."""

    env: CourseEnv

    def reset(self) -> None:
        super().reset()
        self.discounts = np.ones((self.buffer_size, self.n_envs), np.float32)

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.discounts[self.pos] = self.env.discounts
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[np.bool_]) -> None:
        """Generalised advantage estimation (Schulman et al. 2016) with gamma_t = e^(-beta tau_t)."""
        following = last_values.clone().cpu().numpy().flatten()
        alive = 1.0 - dones.astype(np.float32)
        gained = np.zeros(self.n_envs, np.float32)
        for step in reversed(range(self.buffer_size)):
            discount = self.discounts[step] * alive
            gained = self.rewards[step] + discount * following - self.values[step] + discount * self.gae_lambda * gained
            self.advantages[step] = gained
            following, alive = self.values[step], 1.0 - self.episode_starts[step]
        self.returns = self.advantages + self.values


def learner(config: Config, env: CourseEnv) -> MaskablePPO:
    """At neutral knobs."""
    model = MaskablePPO(
        "MlpPolicy",
        env,
        learning_rate=config.learning_rate,
        n_steps=config.steps,
        batch_size=config.minibatch,
        n_epochs=config.epochs,
        gae_lambda=config.gae,
        clip_range=config.clip,
        ent_coef=config.entropy,
        seed=config.seed,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": Reader,
            "features_extractor_kwargs": {"hidden": config.hidden},
            "net_arch": {"pi": [config.width] * 2, "vf": [config.width] * 2},
            "activation_fn": nn.Tanh,
        },
    )
    head: Any = model.policy.action_net
    with torch.no_grad():
        head.weight.mul_(0.1)
        head.bias.zero_()
        at = np.cumsum([0, *SIZES[:-1]]) + np.array(NEUTRAL)
        head.bias[torch.as_tensor(at)] = config.boldness
    buffer = Buffer(config.steps, env.observation_space, env.action_space, "cpu", config.gae, 1.0, env.num_envs)
    buffer.env = env
    model.rollout_buffer = buffer
    return model


def network(model: MaskablePPO, env: CourseEnv) -> Network:
    """What decides, without the learner."""
    policy: Any = model.policy

    def array(x: Tensor) -> NDArray[np.float32]:
        return x.detach().cpu().numpy().astype(np.float32)

    gru, layers = policy.features_extractor.gru, policy.mlp_extractor.policy_net
    return Network(
        array(gru.weight_ih_l0), array(gru.weight_hh_l0), array(gru.bias_ih_l0), array(gru.bias_hh_l0),
        array(layers[0].weight), array(layers[0].bias), array(layers[2].weight), array(layers[2].bias),
        array(policy.action_net.weight), array(policy.action_net.bias), env.low.copy(), env.high.copy(),
    )  # fmt: skip


class Validation:
    """Courses set apart, and what exact drift plus penalty costs on them."""

    def __init__(self, config: Config) -> None:
        self._cases = []
        for number, one in enumerate(courses(VALIDATION_SEED, config.validation)):
            requests = max(2 * config.requests // one.params.num_devices, 8)
            traces = draw(one.params, VALIDATION_SEED + number, range(6), requests)
            self._cases.append((one, traces, self._cost(one, traces, None)))

    @staticmethod
    def _cost(course: Course, traces: Any, mind: Network | None) -> float:
        chooser = Constant(course.guide) if mind is None else Mind(course.guide, mind)
        records = simulate(course.params, traces, chooser)
        penalty, at = course.params.penalty, records.counted()
        cost = records.total_s / penalty.t_ref_s + penalty.w_energy * records.device_j / penalty.e_ref_j
        return float(np.nanmean(cost[at]))

    def gain(self, mind: Network) -> tuple[float, list[float]]:
        """How much less the network costs, as mean of logs over the courses; and each course's share."""
        each = [1 - self._cost(course, traces, mind) / cost for course, traces, cost in self._cases]
        return float(np.mean(np.log1p(-np.minimum(each, 0.99)))) * -1.0, each

    @property
    def names(self) -> list[str]:
        return [course.name for course, _, _ in self._cases]


def train(config: Config, folder: Path, tell: Tell, *, more: list[Course] | None = None) -> Path:
    """Learn, or go on learning what `folder` holds; the file of the best weights. `more` courses are learned in, too.

    Raises SpecError where the folder holds another run.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(config, folder)
    tell(f"{config.courses} courses are drawn")
    env = CourseEnv([*courses(TRAIN.seed + config.seed, config.courses), *(more or [])], config.worlds, config.seed,
                    config.requests)  # fmt: skip
    validation = Validation(config)
    model = learner(config, env)
    if (folder / "learner.zip").exists():
        model.set_parameters(str(folder / "learner.zip"), device="cpu")
        with np.load(folder / "range.npz") as kept:
            env.low, env.high = kept["low"], kept["high"]
        tell(f"going on after {state['updates']} of {config.updates} updates")
    model.set_logger(_logger(folder))
    total = config.updates * config.steps * env.num_envs
    model._setup_learn(total, None, reset_num_timesteps=True)
    began = time.monotonic()
    for update in range(state["updates"], config.updates):
        if not model.collect_rollouts(env, _NOTHING, model.rollout_buffer, config.steps, use_masking=True):
            break
        model._current_progress_remaining = 1 - update / config.updates
        model.train()
        _note(model.logger, env, model, update)
        state["updates"] = update + 1
        last = update + 1 == config.updates
        if last or (update + 1) % config.validate_every == 0:
            mind = network(model, env)
            gain, each = validation.gain(mind)
            model.logger.record("validation/gain", gain)
            for name, one in zip(validation.names, each, strict=True):
                model.logger.record(f"validation/{name}", one)
            state["curve"].append([update + 1, gain])
            if gain > state["best"]:
                state["best"] = gain
                mind.save(folder / "splitwise.npz")
            model.save(str(folder / "learner.zip"), exclude=["rollout_buffer"])
            np.savez(folder / "range.npz", low=env.low, high=env.high)
            (folder / "state.json").write_text(json.dumps(state))
            pace = (time.monotonic() - began) / (update + 1)
            tell(
                f"update {update + 1} of {config.updates}: saves {100 * gain:+.2f} % of drift's cost on courses set "
                f"apart (best {100 * state['best']:+.2f} %), {pace * (config.updates - update - 1):.0f} s to go"
            )
        model.logger.dump((update + 1) * config.steps * env.num_envs)
    if not (folder / "splitwise.npz").exists():
        network(model, env).save(folder / "splitwise.npz")
    return folder / "splitwise.npz"


def _state(config: Config, folder: Path) -> dict[str, Any]:
    """What a run has come to. Raises SpecError where the folder holds another one."""
    file = folder / "state.json"
    if not file.exists():
        return {"config": asdict(config), "updates": 0, "best": -np.inf, "curve": []}
    state: dict[str, Any] = json.loads(file.read_text())
    if state["config"] != asdict(config):
        raise SpecError(f"{folder} holds a run with another configuration; give another folder, or delete it")
    return state


def _logger(folder: Path) -> Logger:
    return configure(str(folder / "curves"), ["tensorboard", "csv"])


def _note(logger: Logger, env: CourseEnv, model: MaskablePPO, update: int) -> None:
    gains = np.array(env.gains())
    if np.isfinite(gains).any():
        logger.record("train/saved_per_request", float(np.nanmean(gains)))
    logger.record("train/filtered_share", env.kept / max(env.decisions, 1))
    logger.record("train/mean_reward", float(model.rollout_buffer.rewards.mean()))
    env.kept = env.decisions = 0
    logger.record("train/updates", update + 1)


class _Nothing:
    """A callback of the learner's library that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **kwargs: True


_NOTHING: Any = _Nothing()
__all__ = ["CONFIGS", "Config", "Validation", "network", "read_config", "train"]
