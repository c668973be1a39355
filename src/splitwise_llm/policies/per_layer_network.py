"""The paper's network over layers, forward only and in numpy, so that deciding needs no torch. It prices nothing.

One step for the embedding, one per layer, one for the head. A step sees the state, what the step before it decided
and what its masks leave; it says which key/value groups go to the cloud (a sigmoid each) and which of three ways the
FFN goes (`FfnMode`). Actions are laid out once, here, as (steps, groups) and (steps,), for sampling, for learning and
for decoding alike.

A sigmoid per group cannot make groups agree, and a layer whose groups disagree costs an exchange per token: with 32
groups at random nearly every layer is shared. So each half begins by doing what the half before it did (`copy`), and
where the model changes machines is what is explored; the first choice of all, the embedding's, is even. Without
it plans cost e^4.8 times the best plain one after 45 updates of learning, as after 5; with it e^0.1 after 50.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PAST = 10
"""Steps of history, the present one last."""
PAST_FIGURES = 3
"""Queue, bandwidth, arrivals."""
WAVES = 4
"""Cosines over the groups of a layer, that tell one group from another whatever their number."""
STEP_INPUTS = 9
HISTORY_WIDTH, STATE_WIDTH, WIDTH = 16, 32, 64
ATTENTION, FFN, EMBED, HEAD = range(4)
EDGE, CLOUD = 0, 1


class FfnMode(IntEnum):
    """Where a layer's FFN runs. `INNER_CUT` (first matrices on the edge, second in the cloud) is always masked: see
    `inner_cut`."""

    EDGE = 0
    CLOUD = 1
    INNER_CUT = 2


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """What is allowed to many systems, which may have different models; arrays lead with the system."""

    layers: Ints
    groups: Ints
    forced: Bools
    """(systems, steps, 2): halves that stay on the device: attention and FFN of a step; the ends have an FFN only."""
    size: Floats
    """(systems, 2, 4): bytes on edge and cloud of an attention half, an FFN half, the embedding and the head."""
    room: Floats
    """(systems, 2): bytes for them."""
    tied: Bools
    """Whether a machine with both ends holds one table."""

    @property
    def steps(self) -> int:
        return int(self.forced.shape[1])

    @classmethod
    def stack(cls, rules: Sequence[Rules]) -> Rules:
        """Systems one after another, padded to the longest."""
        steps = max(each.steps for each in rules)
        forced = [np.pad(each.forced, ((0, 0), (0, steps - each.steps), (0, 0))) for each in rules]
        names = ("layers", "groups", "size", "room", "tied")
        return cls(
            **{name: np.concatenate([getattr(each, name) for each in rules]) for name in names},
            forced=np.concatenate(forced),
        )

    def repeated(self, times: int) -> Rules:
        """The rules of one system for many alike."""
        return Rules(*(np.repeat(getattr(self, name), times, axis=0) for name in self.__slots__))

    def without_cloud(self, away: Bools) -> Rules:
        """The same where the cloud of some is out of reach."""
        room = self.room.copy()
        room[away, CLOUD] = -1.0
        return replace(self, room=room)


@dataclass(frozen=True, slots=True, eq=False)
class Actions:
    """What was decided, and everything that its probability depends on. Learning uses these, and draws none anew."""

    groups: Bools
    """(systems, steps, most groups): in the cloud."""
    ffn: Ints
    """(systems, steps): an `FfnMode`; of the ends, where they are."""
    inputs: Floats
    """(systems, steps, STEP_INPUTS): what each step was shown besides the state."""
    copied: Floats
    """(systems, steps, 2): -1 edge to 1 cloud, of the half before the attention and before the FFN."""
    free_groups: Bools
    """(systems, steps, most groups): whether there was a choice."""
    free_ffn: Bools
    """(systems, steps)"""
    log_prob: Floats
    """(systems, steps)"""
    possible: Bools
    """(systems,): False where memory left a half no machine."""

    def vector(self, system: int, layers: int, groups: int, shards: int) -> tuple[int, ...]:
        """As the action vector that `Partition` owns: embedding, groups and shards of each layer, head; the edge is
        machine 0 and the cloud machine 1."""
        units = [int(self.ffn[system, 0])]
        for step in range(1, layers + 1):
            units += self.groups[system, step, :groups].astype(int).tolist()
            units += [int(self.ffn[system, step])] * shards
        return (*units, int(self.ffn[system, layers + 1]))


def waves(groups: Ints, most: int) -> Floats:
    """(systems, most, WAVES): a basis over the groups of a layer."""
    at = (np.arange(most)[None] + 0.5) / np.maximum(groups, 1)[:, None]
    result: Floats = np.cos(np.pi * np.arange(1, WAVES + 1) * at[..., None])
    return result


def _sigmoid(x: Floats) -> Floats:
    result: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return result


def _log_sigmoid(x: Floats) -> Floats:
    result: Floats = -np.logaddexp(0.0, -x)
    return result


def shapes(num_figures: int) -> dict[str, tuple[int, ...]]:
    """Of a network's weights by name, for a state of so many figures."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def gru(name: str, inputs: int, width: int) -> dict[str, tuple[int, ...]]:
        wide = 3 * width
        sizes = {"weight_ih": (wide, inputs), "weight_hh": (wide, width), "bias_ih": (wide,), "bias_hh": (wide,)}
        return {f"{name}.{part}_l0": shape for part, shape in sizes.items()}

    return {
        "copy": (2,),
        **dict.fromkeys(("figures_mean", "figures_std"), (num_figures,)),
        **dict.fromkeys(("past_mean", "past_std"), (PAST_FIGURES,)),
        **gru("history", PAST_FIGURES, HISTORY_WIDTH),
        **linear("first", num_figures + HISTORY_WIDTH, WIDTH),
        **linear("second", WIDTH, STATE_WIDTH),
        **gru("layers", STEP_INPUTS + STATE_WIDTH, WIDTH),
        **linear("groups", WIDTH, 1 + WAVES),
        **linear("ffn", WIDTH, len(FfnMode)),
    }


class Network:
    """The policy's weights by name, as PyTorch lays them out."""

    def __init__(self, weights: Mapping[str, NDArray[np.floating]]) -> None:
        self.weights = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}

    def _linear(self, name: str, x: Floats) -> Floats:
        result: Floats = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return result

    def _gru(self, name: str, x: Floats, hidden: Floats) -> Floats:
        w, width = self.weights, hidden.shape[-1]
        seen = x @ w[f"{name}.weight_ih_l0"].T + w[f"{name}.bias_ih_l0"]
        kept = hidden @ w[f"{name}.weight_hh_l0"].T + w[f"{name}.bias_hh_l0"]
        reset, update = np.split(_sigmoid(seen[..., : 2 * width] + kept[..., : 2 * width]), 2, axis=-1)
        new = np.tanh(seen[..., 2 * width :] + reset * kept[..., 2 * width :])
        result: Floats = (1 - update) * new + update * hidden
        return result

    def state(self, figures: Floats, past: Floats) -> Floats:
        """(systems, STATE_WIDTH) from figures (systems, figures) and past (systems, PAST, PAST_FIGURES)."""
        figures = (figures - self.weights["figures_mean"]) / self.weights["figures_std"]
        past = (past - self.weights["past_mean"]) / self.weights["past_std"]
        hidden = np.zeros((len(past), HISTORY_WIDTH))
        for n in range(past.shape[1]):
            hidden = self._gru("history", past[:, n], hidden)
        wide = np.tanh(self._linear("first", np.concatenate([figures, hidden], axis=1)))
        result: Floats = np.tanh(self._linear("second", wide))
        return result

    def act(self, figures: Floats, past: Floats, rules: Rules, dice: np.random.Generator | None = None) -> Actions:
        """Decide step by step: drawn with `dice`, or the likelier of each choice without."""
        return _Walk(self, self.state(figures, past), rules, dice).run()


class _Walk:
    """One pass over the steps of many systems."""

    def __init__(self, network: Network, state: Floats, rules: Rules, dice: np.random.Generator | None) -> None:
        systems, most = len(state), int(rules.groups.max())
        self.network, self.state, self.rules, self.dice = network, state, rules, dice
        self.copy = network.weights["copy"]
        self.basis = waves(rules.groups, most)
        self.real = np.arange(most)[None] < rules.groups[:, None]
        self.last = np.zeros(systems)  # -1 edge to 1 cloud: the FFN, or end, of the step before
        self.share = np.zeros(systems)  # the same of the groups of the step before
        self.used = np.zeros((systems, 2))
        self.possible = np.ones(systems, dtype=bool)
        self.reserve = _reserve(rules)
        self.embed = np.zeros(systems, dtype=np.int64)

    def run(self) -> Actions:
        rules, systems = self.rules, len(self.state)
        hidden = np.zeros((systems, WIDTH))
        steps = []
        for step in range(rules.steps):
            embeds, heads = np.full(systems, step == 0), rules.layers + 1 == step
            inner = ~embeds & (step <= rules.layers)
            free = [self._free(step, half, inner, heads) for half in (ATTENTION, FFN)]
            place = step / (rules.layers + 1.0)
            masks = (*free[0].T, free[1][:, EDGE])
            shown = np.stack([self.last, self.share, embeds, heads, place, 1 - place, *masks], axis=1)
            hidden = self.network._gru("layers", np.concatenate([shown, self.state], axis=1), hidden)
            steps.append((*self._decide(hidden, free, inner, heads, step), shown))
        groups, ffn, copied, free_groups, free_ffn, log_prob, shown_all = (
            np.stack(part, axis=1) for part in zip(*steps, strict=True)
        )
        return Actions(groups, ffn, shown_all, copied, free_groups, free_ffn, log_prob, self.possible)

    def _free(self, step: int, half: int, inner: Bools, heads: Bools) -> Bools:
        """(systems, 2): whether edge and cloud may take the half of this step."""
        rules = self.rules
        size = self._size(half, inner, heads, step)
        left = rules.room - self.used
        left[:, EDGE] -= self.reserve[:, step, half]
        if half == FFN:  # the attention before it is not placed yet when this is first asked: both must fit
            left = left - rules.size[:, :, ATTENTION] * inner[:, None]
        free = size <= left
        forced = rules.forced[:, step, half]
        return np.stack([free[:, EDGE] | forced, free[:, CLOUD] & ~forced], axis=1)

    def _size(self, half: int, inner: Bools, heads: Bools, step: int) -> Floats:
        """(systems, 2): bytes of a half of this step on each machine."""
        size = self.rules.size
        if half == ATTENTION:
            return size[:, :, ATTENTION] * inner[:, None]
        if step == 0:
            return size[:, :, EMBED]
        head = size[:, :, HEAD].copy()
        both = self.rules.tied & heads
        head[both, self.embed[both]] = 0.0
        return np.where(inner[:, None], size[:, :, FFN], head * heads[:, None])

    def _decide(
        self, hidden: Floats, free: list[Bools], inner: Bools, heads: Bools, step: int
    ) -> tuple[Bools, Ints, Floats, Bools, Bools, Floats]:
        net = self.network
        before = self.last
        logits = net._linear("groups", hidden)
        logits = logits[:, :1] + (self.basis * logits[:, None, 1:]).sum(axis=-1) + (self.copy[0] * before)[:, None]
        choice = free[0].all(axis=1) & inner
        free_groups = self.real & choice[:, None]
        drawn = logits > 0 if self.dice is None else self.dice.random(logits.shape) < _sigmoid(logits)
        groups = np.where(choice[:, None], drawn, free[0][:, CLOUD, None] & ~free[0][:, EDGE, None])
        groups = groups & self.real & inner[:, None]
        log_prob = np.where(free_groups, _log_sigmoid(np.where(groups, logits, -logits)), 0.0).sum(axis=1)
        share = np.where(inner, 2.0 * groups.sum(axis=1) / self.rules.groups - 1, before)
        ffn_logits = net._linear("ffn", hidden)  # the third, INNER_CUT, is masked
        to_cloud = ffn_logits[:, FfnMode.CLOUD] - ffn_logits[:, FfnMode.EDGE] + self.copy[1] * share
        active = inner | heads | (step == 0)
        free_ffn = free[1].all(axis=1) & active
        drawn_ffn = to_cloud > 0 if self.dice is None else self.dice.random(len(to_cloud)) < _sigmoid(to_cloud)
        cloud = np.where(free_ffn, drawn_ffn, free[1][:, CLOUD] & ~free[1][:, EDGE]) & active
        log_prob += np.where(free_ffn, _log_sigmoid(np.where(cloud, to_cloud, -to_cloud)), 0.0)
        self._place(groups, cloud, free, inner, heads, step)
        copied = np.stack([before, share], axis=1)
        ffn = np.where(cloud, FfnMode.CLOUD, FfnMode.EDGE).astype(np.int64)
        self.share, self.last = share, np.where(active, 2.0 * cloud - 1, before)
        return groups, ffn, copied, free_groups, free_ffn, log_prob

    def _place(self, groups: Bools, cloud: Bools, free: list[Bools], inner: Bools, heads: Bools, step: int) -> None:
        part = groups.sum(axis=1) / self.rules.groups
        self.used += self._size(ATTENTION, inner, heads, step) * np.stack([1 - part, part], axis=1)
        self.used += self._size(FFN, inner, heads, step) * np.stack([~cloud, cloud], axis=1)
        if step == 0:
            self.embed = cloud.astype(np.int64)
        active = inner | heads | (step == 0)
        self.possible &= ~active | (free[0].any(axis=1) & free[1].any(axis=1))


def _reserve(rules: Rules) -> Floats:
    """(systems, steps, 2): bytes of what must still come to the device after each half."""
    steps = np.arange(rules.steps)[None]
    inner = (steps >= 1) & (steps <= rules.layers[:, None])
    heads = steps == rules.layers[:, None] + 1
    sizes = np.stack(
        [
            inner * rules.size[:, EDGE, ATTENTION, None],
            inner * rules.size[:, EDGE, FFN, None] + heads * (rules.size[:, EDGE, HEAD] * ~rules.tied)[:, None],
        ],
        axis=2,
    )
    flat = (sizes * rules.forced).reshape(len(sizes), -1)
    after: Floats = (flat[:, ::-1].cumsum(axis=1)[:, ::-1] - flat).reshape(sizes.shape)
    return after
