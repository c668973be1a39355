"""How the proposer learns: propose, price exactly, imitate the best (LyDROO's actor with a model as its critic).

A pool of random states each remembers the best plans anyone has found for it. In every round some states are asked
again: the network proposes (its most probable plans, and some drawn at random), the best plan known is varied by a
few quantised changes, everything is priced, and what is best is remembered. Then the network takes a step towards the
remembered plans, each weighted by how little it is worse than the best. No label comes from a solver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from splitwise_llm.errors import RequestError
from splitwise_llm.learn.few_runs import best_of_few_runs, is_quick
from splitwise_llm.learn.states import DEFAULT, Spread, State, random_state
from splitwise_llm.policies.low_level import sheet_of
from splitwise_llm.policies.proposer import (
    HIDDEN,
    MAX_RUNS,
    NUM_FEATURES,
    Nodes,
    Proposer,
    Prospect,
    Spans,
    Weights,
    candidates,
    probabilities,
    settled,
)
from splitwise_llm.policies.runs import Sheet

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Tell = Callable[[str], None]

TRAINING_SEEDS, VALIDATION_SEEDS, TEST_SEEDS = 1_000_000, 2_000_000, 3_000_000
"""Where the seeds of training states, of those watched in training, and of a bench's begin."""


class Writer(Protocol):
    """Where curves go, such as TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Config:
    """How much is learned from what."""

    states: int = 4000
    rounds: int = 2000
    batch: int = 64
    """States of a step."""
    asked: int = 12
    """States of a round that are asked again."""
    width: int = 8
    """Plans proposed, and as many drawn, and as many changes tried."""
    kept: int = 4
    """Plans a state remembers."""
    softness: float = 0.01
    """Relative excess at which a plan weighs 1/e of the best."""
    learning_rate: float = 2e-3
    hidden: int = HIDDEN
    spread: Spread = field(default_factory=lambda: DEFAULT)
    validation: int = 100
    """States watched."""
    every: int = 250
    """Rounds between checkpoints."""


class Network(nn.Module):
    """`proposer.Weights` with gradients."""

    into: nn.Parameter
    into_bias: nn.Parameter
    context: nn.Parameter
    context_bias: nn.Parameter
    own: nn.Parameter
    around: nn.Parameter
    own_bias: nn.Parameter
    out: nn.Parameter

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name in Weights.names():
            setattr(self, name, nn.Parameter(torch.tensor(getattr(weights, name))))

    def weights(self) -> Weights:
        return Weights(*(getattr(self, name).detach().numpy().copy() for name in Weights.names()))

    def forward(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Log probability of each candidate (candidates, features) among those of its node (sizes: (nodes,))."""
        node = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        hidden = torch.relu(features @ self.into + self.into_bias)
        zeros = hidden.new_zeros(len(sizes), hidden.shape[1])
        mean = zeros.index_add(0, node, hidden) / sizes[:, None]
        most = zeros.scatter_reduce(0, node[:, None].expand_as(hidden), hidden, "amax", include_self=False)
        pooled = torch.cat([mean, most], dim=1)
        context = torch.relu(pooled @ self.context + self.context_bias) @ self.around + self.own_bias
        scores = torch.relu(hidden @ self.own + context[node]) @ self.out
        top = scores.new_zeros(len(sizes)).scatter_reduce(0, node, scores.detach(), "amax", include_self=False)
        shifted = scores - top[node]
        total = scores.new_zeros(len(sizes)).index_add(0, node, shifted.exp())
        log: Tensor = shifted - total.log()[node]
        return log


@dataclass(slots=True, eq=False)
class Lesson:
    """A state and what is known of it."""

    prospect: Prospect
    plans: list[tuple[float, Spans]] = field(default_factory=list)
    """Values and sequences, best first."""
    nodes: tuple[Floats32, Ints, Floats32] | None = None
    """Features, sizes of nodes, and weights of candidates; None: to be made again."""

    @property
    def sheet(self) -> Sheet:
        return self.prospect.sheet

    def learn(self, paths: Sequence[Spans], kept: int) -> bool:
        """Price some sequences; whether one is better than all that were known."""
        known = {path for _, path in self.plans}
        new = [path for path in dict.fromkeys(paths) if path not in known]
        before = self.plans[0][0] if self.plans else np.inf
        values, _ = settled(self.sheet, new)
        found = [(float(value), path) for value, path in zip(values, new, strict=True) if np.isfinite(value)]
        merged = sorted([*self.plans, *found], key=lambda one: one[0])[:kept]
        if merged != self.plans:
            self.plans, self.nodes = merged, None
        return bool(self.plans) and self.plans[0][0] < before

    def excess(self, value: float) -> float:
        """By how much a value is above the best known, relative."""
        best = self.plans[0][0]
        return (value - best) / max(abs(best), 1e-12)

    def targets(self, softness: float) -> tuple[Floats32, Ints, Floats32]:
        """What to imitate, node by node: of each node that a remembered plan passes, where they go from there."""
        if self.nodes is None:
            weights = np.exp([-self.excess(value) / softness for value, _ in self.plans])
            self.nodes = _targets(self.prospect, [path for _, path in self.plans], weights / weights.sum())
        return self.nodes


def _targets(prospect: Prospect, paths: Sequence[Spans], weights: Floats) -> tuple[Floats32, Ints, Floats32]:
    goes: dict[Spans, dict[tuple[int, int], float]] = {}
    for path, weight in zip(paths, weights.tolist(), strict=True):
        for n, run in enumerate(path):
            at = goes.setdefault(path[:n], {})
            at[run] = at.get(run, 0.0) + weight
    features, sizes, wanted = [], [], []
    for prefix, following in goes.items():
        some = candidates(prospect, _node(prospect, prefix))
        place = {(s, e): n for n, (s, e) in enumerate(zip(some.seat.tolist(), some.end.tolist(), strict=True))}
        target = np.zeros(len(some.node), np.float32)
        for run, weight in following.items():
            if run in place:
                target[place[run]] = weight
        if target.any():
            features.append(some.features)
            sizes.append(len(target))
            wanted.append(target)
    if not sizes:
        return np.zeros((0, NUM_FEATURES), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)
    return np.concatenate(features), np.array(sizes), np.concatenate(wanted)


def _node(prospect: Prospect, prefix: Spans) -> Nodes:
    node = Nodes.root(prospect)
    for seat, end in prefix:
        node = node.grown(prospect, np.zeros(1, np.int64), np.array([seat]), np.array([end]))
    return node


def drawn(proposer: Proposer, prospect: Prospect, number: int, rng: np.random.Generator) -> list[Spans]:
    """Sequences drawn from the network's own probabilities; those that get stuck are left out."""
    result: list[Spans] = []
    current = Nodes.root(prospect).some(np.zeros(number, np.int64))
    for turn in range(MAX_RUNS):
        some = candidates(prospect, current, turn == MAX_RUNS - 1)
        if not len(some.node):
            break
        logs = probabilities(proposer.weights.scores(some.features, some.starts), some.starts)
        chosen = logs + rng.gumbel(size=len(logs))
        sizes = np.diff(np.append(some.starts, len(chosen)))
        best = np.array([at + int(chosen[at : at + n].argmax()) for at, n in zip(some.starts, sizes, strict=True)])
        current = current.grown(prospect, some.node[best], some.seat[best], some.end[best])
        ended = current.layer == prospect.num_layers
        result += [current.paths[n] for n in np.flatnonzero(ended)]
        if ended.all():
            break
        current = current.some(np.flatnonzero(~ended))
    return result


def changed(prospect: Prospect, path: Spans, number: int, rng: np.random.Generator) -> list[Spans]:
    """A sequence with one quantised change each: an end moved, a seat exchanged, a run put in or left out."""
    layers, seats = prospect.num_layers, prospect.num_seats
    result: list[Spans] = []
    for _ in range(number):
        runs = list(path)
        at = int(rng.integers(len(runs)))
        kind = int(rng.integers(5))
        if kind <= 1 and len(runs) > 1:
            at = min(at, len(runs) - 2)
            runs[at] = (runs[at][0], runs[at][1] + int(rng.choice([-8, -4, -2, -1, 1, 2, 4, 8])))
        elif kind == 2:
            runs[at] = (int(rng.integers(seats)), runs[at][1])
        elif kind == 3 and len(runs) > 1:
            end = runs.pop(at)[1]
            if at:
                runs[at - 1] = (runs[at - 1][0], end)
        else:
            runs.insert(at, (int(rng.integers(seats)), int(rng.integers(layers))))
        result += _tidy(runs, layers)
    return [one for one in dict.fromkeys(result) if one != path and _is_allowed(prospect.sheet, one)]


def _is_allowed(sheet: Sheet, path: Spans) -> bool:
    return bool(sheet.keeps([seat for seat, _ in path], np.array([[end for _, end in path]]))[0])


def _tidy(runs: Sequence[tuple[int, int]], layers: int) -> Iterator[Spans]:
    """The same with ends in order and neighbours on one seat joined; nothing where no run is left at the end."""
    tidy: list[tuple[int, int]] = []
    at = 0
    for seat, end in runs:
        if at < end <= layers:
            if tidy and tidy[-1][0] == seat:
                tidy.pop()
            tidy.append((seat, end))
            at = end
    if at == layers:
        yield tuple(tidy)


def lesson_of(state: State) -> Lesson:
    """The first tools of a state are those it is learned under."""
    tools = state.tools
    way = (tools.wires[0], tools.chunks[0], tools.drafts[0])
    sheet = sheet_of(state.world, state.job, state.limits, state.conditions, state.objective, way)
    return Lesson(Prospect(sheet))


def train_low_level(
    config: Config,
    tell: Tell,
    writer: Writer | None = None,
    folder: Path | None = None,
    seed: int = 0,
    states: Sequence[State] | None = None,
) -> Weights:
    """Weights learned from nothing, from `states` if there are any, else from random ones.

    With a `folder`, progress is kept there every `config.every` rounds and taken up again; the same seed gives the
    same weights on the same machine, interrupted or not; for that torch is left with one thread. Raises RequestError
    where the folder holds another run.
    """
    return _Training(config, tell, writer, folder, seed, states).run()


class _Training:
    def __init__(
        self, config: Config, tell: Tell, writer: Writer | None, folder: Path | None, seed: int,
        states: Sequence[State] | None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)  # other numbers sum in another order, and no two of them learn the same
        self.config, self.tell, self.writer, self.folder, self.seed = config, tell, writer, folder, seed
        self.network = Network(Weights.random(seed, config.hidden))
        self.optimiser = torch.optim.Adam(self.network.parameters(), config.learning_rate)
        self.round = 0
        tell(f"{len(states) if states else config.states} states to learn from, {config.validation} to watch")
        seeds = range(TRAINING_SEEDS + 100_000 * seed, TRAINING_SEEDS + 100_000 * seed + config.states)
        self.lessons = [lesson_of(state) for state in states or (random_state(n, config.spread) for n in seeds)]
        self.watched = [lesson_of(random_state(VALIDATION_SEEDS + n, config.spread)) for n in range(config.validation)]
        for lesson in self.watched:
            if is_quick(lesson.sheet) and (best := best_of_few_runs(lesson.sheet)[1]):
                lesson.learn([best], config.kept)

    @property
    def _file(self) -> Path | None:
        return self.folder / "low_level.pt" if self.folder else None

    def run(self) -> Weights:
        self._resume()
        begin, first, losses = time.monotonic(), self.round, list[float]()
        while self.round < self.config.rounds:
            losses.append(self._step(np.random.default_rng([self.seed, self.round])))
            self.round += 1
            if self.round % self.config.every == 0 or self.round == self.config.rounds:
                self._keep()
                share, mean = self._watch()
                left = (time.monotonic() - begin) / (self.round - first) * (self.config.rounds - self.round)
                self.tell(
                    f"round {self.round} of {self.config.rounds}: loss {np.mean(losses):.3f}; "
                    f"{share:.1%} within 2 % of the best known, {mean:.2%} above it on average; {left:.0f} s left"
                )
                for name, value in (("loss", float(np.mean(losses))), ("within_2", share), ("excess", mean)):
                    if self.writer:
                        self.writer.add_scalar(f"low_level/{name}", value, self.round)
                losses = []
        return self.network.weights()

    def _step(self, rng: np.random.Generator) -> float:
        """Ask some states again, then take a step towards what is remembered of them and of others."""
        config = self.config
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.round / config.rounds)) + 1e-5
        proposer = Proposer(self.network.weights())
        asked = [self.lessons[n] for n in rng.choice(len(self.lessons), min(config.asked, len(self.lessons)), False)]
        for lesson in asked:
            self._ask(lesson, proposer, rng)
        known = [n for n, lesson in enumerate(self.lessons) if lesson.plans]
        batch = [self.lessons[known[n]] for n in rng.integers(len(known), size=config.batch - len(asked))]
        parts = [lesson.targets(config.softness) for lesson in (*batch, *asked) if lesson.plans]
        features, sizes, wanted = (np.concatenate([part[n] for part in parts]) for n in range(3))
        logs = self.network(torch.from_numpy(features), torch.from_numpy(sizes))
        loss = -(torch.from_numpy(wanted) * logs).sum() / len(parts)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        return float(loss.detach())

    def _ask(self, lesson: Lesson, proposer: Proposer, rng: np.random.Generator) -> None:
        width, prospect = self.config.width, lesson.prospect
        paths = proposer.paths(prospect, width) + drawn(proposer, prospect, width, rng)
        lesson.learn(paths, self.config.kept)
        for _ in range(6):
            if not lesson.plans or not lesson.learn(
                changed(prospect, lesson.plans[0][1], 3 * width, rng), self.config.kept
            ):
                break

    def _watch(self) -> tuple[float, float]:
        """Of the states watched: the share within 2 % of the best anyone has found, and the mean excess."""
        proposer, rng = Proposer(self.network.weights()), np.random.default_rng(self.seed)
        excess: list[float] = []
        for lesson in self.watched:
            paths = proposer.paths(lesson.prospect, 24)
            values, _ = settled(lesson.sheet, paths)
            lesson.learn(paths, self.config.kept)
            for _ in range(3):
                if lesson.plans:
                    lesson.learn(changed(lesson.prospect, lesson.plans[0][1], 64, rng), self.config.kept)
            if lesson.plans:
                excess.append(min(lesson.excess(float(values.min(initial=np.inf))), 1.0))
        return (float(np.mean(np.array(excess) <= 0.02)), float(np.mean(excess))) if excess else (1.0, 0.0)

    def _keep(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        torch.save(
            {
                "config": repr(self.config), "seed": self.seed, "round": self.round,
                "network": self.network.state_dict(), "optimiser": self.optimiser.state_dict(),
                "plans": [lesson.plans for lesson in self.lessons],
                "watched": [lesson.plans for lesson in self.watched],
            },
            part,
        )  # fmt: skip
        part.replace(self._file)

    def _resume(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        kept = torch.load(self._file, weights_only=True)
        if (kept["config"], kept["seed"]) != (repr(self.config), self.seed):
            raise RequestError(
                f"{self._file} is of another run (seed {kept['seed']}, {kept['config']}); use another folder, or "
                "remove it"
            )
        self.round = kept["round"]
        self.network.load_state_dict(kept["network"])
        self.optimiser.load_state_dict(kept["optimiser"])
        for lessons, name in ((self.lessons, "plans"), (self.watched, "watched")):
            for lesson, plans in zip(lessons, kept[name], strict=True):
                lesson.plans = plans
        self.tell(f"going on from round {self.round}")
