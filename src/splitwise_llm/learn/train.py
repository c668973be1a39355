"""How the policy `splitwise` learns, from nothing to the weights that are shipped: read it from top to bottom.

1. Settings are drawn (`courses`), and simulated many worlds at a time (`env`): an action turns knobs, the reward is
   what that saved against exact drift plus penalty on the same trace.
2. The network (`Reader`, two tanh layers, one head per knob) starts at neutral knobs, which are drift plus penalty.
3. For each setting the best simple rules are searched by simulation (`search`), and the network imitates them: it
   learns to tell from what it sees which setting it is in.
4. Proximal policy optimisation with action masks (sb3-contrib's `MaskablePPO`) goes on from there, moment by moment.
   Two things are ours: decisions are not equally far apart in time, so each step has a discount of its own (`Buffer`);
   and the prices of budgets rise while they are overspent (`env`).
5. From time to time what was learned is judged on courses set apart (`judging`), as it is and knob by knob, and the
   best is kept, beside the learner's state: a run that was stopped goes on from there. The first to be judged is the
   outlook alone, which stays unless something saves more than it, and than nothing turned, by more than two standard
   errors.

Same seed, same machine type: the same weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
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
from splitwise_llm.learn.env import CourseEnv, Learnable
from splitwise_llm.learn.judging import SEED as APART_SEED
from splitwise_llm.learn.judging import WHOLE, Judgement, Validation, candidates, freed
from splitwise_llm.learn.parallel import ParallelEnv
from splitwise_llm.learn.recorded import Recorded
from splitwise_llm.learn.search import Lesson, lessons
from splitwise_llm.observation import EPOCHS, SEEN
from splitwise_llm.policies.features import COUNT
from splitwise_llm.policies.knobs import NEUTRAL, SIZES
from splitwise_llm.policies.network import NAMES, Network
from splitwise_llm.sim.scenarios import TRAIN

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that weights depend on, beside the source and the machine type."""

    seed: int = 0
    courses: int = 48
    recorded: float = 0.25
    """Share of the courses whose link is a recorded one, where recordings are given."""
    worlds: int = 8
    """Of each course, side by side."""
    requests: int = 40
    """Of each trace, all devices together."""
    lesson_worlds: int = 48
    lesson_requests: int = 16
    lesson_samples: int = 1500
    """Decisions of each course that are imitated."""
    imitation: int = 1500
    """Gradient steps."""
    decisions: int = 50_000
    """Of proximal policy optimisation; 0 leaves it out."""
    steps: int = 32
    """Of each world between two updates."""
    minibatch: int = 2048
    epochs: int = 4
    learning_rate: float = 3e-4
    clip: float = 0.2
    gae: float = 0.95
    entropy: float = 0.001
    hidden: int = 16
    width: int = 64
    boldness: float = 1.5
    """Logit that neutral values have over the others in the beginning: the larger, the more knobs are left alone."""
    validate_every: int = 5
    """Updates."""
    validation: int = 24
    """Courses set apart."""
    validation_worlds: int = 24

    def __post_init__(self) -> None:
        if min(self.courses, self.worlds, self.steps, self.validate_every, self.validation) < 1:
            raise SpecError(f"every count of a training configuration is 1 or more: {self}")
        if not 0 < self.recorded <= 1:
            raise SpecError(f"`recorded` is a share of the courses, above 0 and at most 1, not {self.recorded}")

    @property
    def environments(self) -> int:
        return self.courses * self.worlds

    @property
    def updates(self) -> int:
        return self.decisions // (self.environments * self.steps)


CONFIGS: dict[str, Config] = {
    "default": Config(),
    "tiny": Config(
        courses=2,
        worlds=4,
        lesson_worlds=3,
        lesson_requests=8,
        imitation=20,
        decisions=2048,
        minibatch=128,
        validate_every=2,
        validation=1,
    ),
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

    env: Learnable

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


def learner(config: Config, env: Learnable, device: str = "cpu") -> MaskablePPO:
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
        device=device,
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
    buffer = Buffer(config.steps, env.observation_space, env.action_space, device, config.gae, 1.0, env.num_envs)
    buffer.env = env
    model.rollout_buffer = buffer
    return model


def network(model: MaskablePPO, env: Learnable) -> Network:
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


def begin_at(model: MaskablePPO, start: Network) -> None:
    """Give the learner's actor weights that there are; what they are worth it learns anew."""
    policy: Any = model.policy
    gru, layers, head = policy.features_extractor.gru, policy.mlp_extractor.policy_net, policy.action_net
    pairs = (
        (gru.weight_ih_l0, start.gru_input), (gru.weight_hh_l0, start.gru_hidden),
        (gru.bias_ih_l0, start.gru_input_bias), (gru.bias_hh_l0, start.gru_hidden_bias),
        (layers[0].weight, start.first), (layers[0].bias, start.first_bias),
        (layers[2].weight, start.second), (layers[2].bias, start.second_bias),
        (head.weight, start.heads), (head.bias, start.heads_bias),
    )  # fmt: skip
    with torch.no_grad():
        for mine, theirs in pairs:
            if mine.shape != theirs.shape:
                sizes = f"hidden {start.gru_hidden.shape[1]} and width {start.second.shape[0]}"
                raise SpecError(f"the weights to begin at are of {sizes}; give a --config FILE that says so, too")
            mine.copy_(torch.as_tensor(theirs))


def imitate(model: MaskablePPO, taught: Sequence[Lesson], steps: int, seed: int) -> float:
    """Teach the actor the best rules of each course, from what was seen there; the last loss (nats per head)."""
    policy: Any = model.policy
    x = np.concatenate([one.seen for one in taught])
    y = np.concatenate([one.actions for one in taught])
    weight = np.concatenate([np.full(len(one.seen), 1 / max(len(one.seen), 1)) for one in taught])
    dice = np.random.Generator(np.random.Philox([seed, 23]))
    modules = (policy.features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
    optimiser = torch.optim.Adam([p for module in modules for p in module.parameters()], lr=1e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = dice.choice(len(x), 1024, p=weight / weight.sum())
        shown = torch.as_tensor(x[rows], device=model.device)
        latent = policy.mlp_extractor.forward_actor(policy.extract_features(shown))
        heads = torch.split(policy.action_net(latent), list(SIZES), dim=1)
        wanted = torch.as_tensor(y[rows], device=model.device)
        loss = torch.stack([nn.functional.cross_entropy(head, wanted[:, n]) for n, head in enumerate(heads)]).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return float(loss.detach())


def train(
    config: Config, folder: Path, tell: Tell, *, start: Network | None = None, more: Sequence[Course] = (),
    recorded: Recorded | None = None, processes: int = 1, device: str = "cpu",
) -> Path:  # fmt: skip
    """Learn, or go on learning what `folder` holds; the file of the best weights. `start` are weights to begin at in
    place of neutral knobs, `more` are courses to learn in beside those that are drawn, which choose among the weights
    beside those that are set apart, too: else what is learned of them is kept only if it helps elsewhere. For the same
    reason some courses that choose are in links which were `recorded`, others than those learned in. So many
    `processes` simulate, and the network learns on `device`.

    Raises SpecError where the folder holds another run.
    """
    torch.set_num_threads(1)  # other numbers sum in another order, and two are no faster for so small a network
    torch.manual_seed(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(config, folder, _origin(start, more, recorded))
    links = recorded.learn if recorded else ()
    tell(
        f"{config.courses} courses are drawn"
        + (f", {config.recorded:.0%} of them in recorded links" if links else "")
        + (f", beside {', '.join(one.name for one in more)}" if more else "")
    )
    drawn = courses(TRAIN.seed + config.seed, config.courses, processes, links, config.recorded)
    given = ([*drawn, *more], config.worlds, config.seed, config.requests)
    env = ParallelEnv(*given, processes) if processes > 1 else CourseEnv(*given)
    apart = [*more, *_chosen_by(config, recorded, processes)]
    validation = Validation(config.validation, config.validation_worlds, config.lesson_requests, processes, apart)
    model = learner(config, env, device)
    if start is not None:
        begin_at(model, start)
        env.low, env.high = start.low.copy(), start.high.copy()
    model.set_logger(_logger(folder))
    if "alone" in state:  # which is written last of what going on needs
        model.set_parameters(str(folder / "learner.zip"), device=device)
        with np.load(folder / "range.npz") as kept:
            env.low, env.high = kept["low"], kept["high"]
        tell(f"going on after {state['updates']} of {config.updates} updates")
    elif start is None:
        taught = _taught(config, drawn, folder, processes, tell)
        _imitate(config, folder, state, model, env, taught, validation, tell)
    else:
        state["alone"] = _saved(*validation.judge(freed(start, ())))
        state["began"] = _judge(folder, state, "the weights it began at", start, validation, tell).worth
    model._setup_learn(config.updates * config.steps * env.num_envs, None, reset_num_timesteps=True)
    if start is None and not state["curve"]:
        _validate(folder, state, model, env, validation, tell)
    began, first = time.monotonic(), state["updates"]
    for update in range(first, config.updates):
        model.collect_rollouts(env, _NOTHING, model.rollout_buffer, config.steps, use_masking=True)
        model._current_progress_remaining = 1 - update / config.updates
        model.train()
        _note(model.logger, env, model, update)
        state["updates"] = update + 1
        if update + 1 == config.updates or (update + 1) % config.validate_every == 0:
            pace = (time.monotonic() - began) / (update + 1 - first)
            tell(f"update {update + 1} of {config.updates}, {pace * (config.updates - update - 1):.0f} s to go")
            _validate(folder, state, model, env, validation, tell)
        model.logger.dump((update + 1) * config.steps * env.num_envs)
    env.close()
    model.logger.close()
    if state["best"] == state.get("began"):
        tell("nothing that was learned saves more than the weights it began at: those are kept")
    return folder / "splitwise.npz"


def _imitate(
    config: Config, folder: Path, state: dict[str, Any], model: MaskablePPO, env: Learnable, taught: Sequence[Lesson],
    validation: Validation, tell: Tell,
) -> None:  # fmt: skip
    """Widen the range of what was seen to the lessons, judge the outlook alone, and teach the lessons."""
    network(model, env).save(folder / "splitwise.npz")  # neutral, which saves nothing: what is kept must save more
    state["best"] = 0.0
    for one in taught:
        env.low, env.high = np.minimum(env.low, one.low[:COUNT]), np.maximum(env.high, one.high[:COUNT])
    alone = _judge(folder, state, "the outlook alone", freed(network(model, env), ()), validation, tell)
    state["alone"] = _saved(alone)
    loss = imitate(model, taught, config.imitation, config.seed)
    tell(f"imitated to {loss:.3f} nats per knob")


def _chosen_by(config: Config, recorded: Recorded | None, processes: int) -> list[Course]:
    """Courses in recorded links that only choose among weights: as large a share as of those learned in, one at
    least."""
    if recorded is None or not recorded.apart:
        return []
    return courses(APART_SEED + 1, max(round(config.recorded * config.validation), 1), processes, recorded.apart)


def _origin(start: Network | None, more: Sequence[Course], recorded: Recorded | None = None) -> dict[str, Any]:
    """Where a run began and what it was given, so that another one is not taken for it."""
    digest = start and sha256(b"".join(getattr(start, name).tobytes() for name in NAMES)).hexdigest()
    origin: dict[str, Any] = {"start": digest, "given": [one.name for one in more]}
    return origin | {"recorded": recorded.digest} if recorded else origin


def _taught(
    config: Config, drawn: Sequence[Course], folder: Path, processes: int, tell: Tell
) -> list[Lesson]:  # fmt: skip
    count = 0

    def told(one: Lesson) -> None:
        nonlocal count
        count += 1
        saves = f"{one.rules} saves {100 * one.saved:.2f} %" if one.rules else "neutral knobs"
        tell(f"course {count} of {len(drawn)}, {one.course}: {saves}")

    sizes = (config.lesson_worlds, config.lesson_requests, config.lesson_samples)
    return lessons(drawn, 100_000 * (config.seed + 1), *sizes, processes, told, folder / "lessons")


def _validate(
    folder: Path, state: dict[str, Any], model: MaskablePPO, env: Learnable, validation: Validation, tell: Tell
) -> None:  # fmt: skip
    """Judge the network on courses set apart, keep the best, and everything that going on needs."""
    alone, began = Judgement(**state["alone"]), "began" in state

    def helps(found: Judgement) -> bool:
        """Beside the outlook alone, and beside nothing turned at all. With weights to begin at, what was lived counts,
        which is one course among many: there its worth is enough."""
        if began:
            return found.worth > alone.worth
        neutral = Judgement.neutral(len(found.each))
        return found.surpasses(alone) and found.surpasses(neutral)

    for name, mind, found in candidates(network(model, env), validation, helps):
        if name == WHOLE:
            model.logger.record("validation/gain", found.gain)
            for course, one in zip(validation.names, found.each, strict=True):
                model.logger.record(f"validation/{course}", one)
            state["curve"].append([state["updates"], found.gain])
        _keep(folder, state, name, mind, found, tell, may=began or helps(found))
    model.save(str(folder / "learner.zip"), exclude=["rollout_buffer", "env"])
    np.savez(folder / "range.npz", low=env.low, high=env.high)
    _write(folder, state)


def _judge(
    folder: Path, state: dict[str, Any], name: str, mind: Network, validation: Validation, tell: Tell
) -> Judgement:  # fmt: skip
    """What these weights save; the best so far are kept."""
    (found,) = validation.judge(mind)
    _keep(folder, state, name, mind, found, tell)
    return found


def _saved(found: Judgement) -> dict[str, list[float]]:
    return {"each": list(found.each), "errors": list(found.errors)}


def _keep(
    folder: Path, state: dict[str, Any], name: str, mind: Network, found: Judgement, tell: Tell, *, may: bool = True
) -> None:  # fmt: skip
    """The weights, if they `may` be kept and are the best so far by what they save and lose."""
    is_best = may and (state["best"] is None or found.worth > state["best"])
    if is_best:
        state["best"] = found.worth
        mind.save(folder / "splitwise.npz")
    tell(f"{name}: {found}{', the best so far' if is_best else ''}")


def _write(folder: Path, state: dict[str, Any]) -> None:
    part = folder / "state.json.part"
    part.write_text(json.dumps(state))
    part.replace(folder / "state.json")


def _state(config: Config, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """What a run has come to. Raises SpecError where the folder holds another one."""
    file = folder / "state.json"
    asked = json.loads(json.dumps(asdict(config)))  # as it is read again
    if not file.exists():
        begun: dict[str, Any] = {"config": asked, "origin": origin, "updates": 0, "best": None, "curve": []}
        file.write_text(json.dumps(begun))  # what is kept from now on is of this configuration
        return begun
    anew = "give another --out, or --fresh to begin anew"
    try:
        state: dict[str, Any] = json.loads(file.read_text())
        was = {"recorded": Config().recorded, **state["config"]}  # older runs had no such share, nor used it
        is_older = bool(state["curve"]) and not isinstance(state.get("alone"), dict)
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file} tells of no run; {anew}") from error
    if was != asked or is_older:
        raise SpecError(f"{folder} holds a run with another configuration, or of another version; {anew}")
    if state.get("origin", _origin(None, ())) != origin:
        raise SpecError(f"{folder} holds a run that began at other weights, records or recordings; {anew}")
    return state


def _logger(folder: Path) -> Logger:
    return configure(str(folder / "curves"), ["tensorboard", "csv"])


def _note(logger: Logger, env: Learnable, model: MaskablePPO, update: int) -> None:
    gains = np.array(env.gains())
    if np.isfinite(gains).any():
        logger.record("train/saved_per_request", float(np.nanmean(gains)))
    logger.record("train/filtered_share", env.kept / max(env.decisions, 1))  # of all so far
    logger.record("train/mean_reward", float(model.rollout_buffer.rewards.mean()))
    logger.record("train/updates", update + 1)


class _Nothing:
    """A callback of the learner's library that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *args, **kwargs: True


_NOTHING: Any = _Nothing()
__all__ = ["CONFIGS", "Config", "network", "read_config", "train"]
