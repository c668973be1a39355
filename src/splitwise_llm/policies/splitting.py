"""The layer-splitting paper's question (arXiv 2406.02616) answered from a measured table: after which layer to cut a
model whose activations lose elements on the way. It does not learn; `bench` compares a learner with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import obstacle
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.observation import Observation
from splitwise_llm.partition import Partition
from splitwise_llm.policies.in_flight import decided_once
from splitwise_llm.policies.pipelines import driven

INFERENCE_FACTOR = 10.5
"""What the released code (Kanra13-ch/adaptive_layersplit, train.py) weighs a relative loss of perplexity with, against
the share of layers on the device."""


@dataclass(frozen=True, slots=True, eq=False)
class SplitTable:
    """Nats per token of a model by how many layers run before the cut, and by the loss of elements after it."""

    num_layers: int
    splits: tuple[int, ...]
    losses: tuple[float, ...]
    """Probabilities, ascending from 0."""
    nats: NDArray[np.float64]
    """(splits, losses)"""
    source: str

    def at(self, loss: float) -> NDArray[np.float64]:
        """(splits,): nats per token, interpolated between the losses that were measured. Raises RequestError."""
        if not self.losses[0] <= loss <= self.losses[-1]:
            raise RequestError(
                f"element loss {loss:g} was not measured; the table has {self.losses[0]:g} to {self.losses[-1]:g}"
            )
        return np.array([np.interp(loss, self.losses, row) for row in self.nats])

    def lost(self, loss: float) -> NDArray[np.float64]:
        """(splits,): nats per token above those without loss."""
        result: NDArray[np.float64] = self.at(loss) - self.nats[:, 0]
        return result

    @classmethod
    def from_file(cls, path: str | Path) -> SplitTable:
        """Read what `splitwise bench layer-splitting` wrote. Raises SpecError that names the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            table = cls(
                int(data["num_layers"]),
                tuple(map(int, data["splits"])),
                tuple(map(float, data["losses"])),
                np.array(data["nats"], dtype=float),
                str(data["source"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecError(
                f"{path} is no table of splits and losses ({error!r}); write one with `splitwise bench layer-splitting`"
            ) from error
        inside = all(0 < split < table.num_layers for split in table.splits)
        ascending = list(table.losses) == sorted(set(table.losses)) and table.losses[:1] == (0.0,)
        if not inside or not ascending or table.nats.shape != (len(table.splits), len(table.losses)):
            raise SpecError(
                f"{path}: expected splits between 1 and num_layers - 1, losses ascending from 0, and a row of nats for "
                f"each split; there are {len(table.splits)} splits, {len(table.losses)} losses, nats {table.nats.shape}"
            )
        return table

    @classmethod
    def shipped(cls) -> SplitTable:
        """The bundled model's."""
        return cls.from_file(Path(str(resources.files("splitwise_llm") / "data/accuracy/layer_splitting.json")))


@dataclass(frozen=True, slots=True, eq=False)
class LayerSplitting:
    """Cut where `nats lost + load_weight x share of layers on the device` is least, at a known element loss."""

    table: SplitTable
    loss: float
    load_weight: float = 1 / INFERENCE_FACTOR
    """Nats that it is worth to have the whole model off the device. The default follows the released reward, to first
    order: a relative loss of perplexity is a loss of nats."""

    @classmethod
    def lossless(cls) -> LayerSplitting:
        """With the shipped table, over a channel that loses nothing, as a link with retransmission is."""
        return cls(SplitTable.shipped(), 0.0)

    def costs(self) -> NDArray[np.float64]:
        """(splits,): what is minimised."""
        share = np.array(self.table.splits) / self.table.num_layers
        result: NDArray[np.float64] = self.table.lost(self.loss) + self.load_weight * share
        return result

    def split(self) -> int:
        """The best split of the table's model."""
        return self.table.splits[int(self.costs().argmin())]

    def decide(self, observation: Observation) -> Decision:
        """A cut at the best depth that fits, scaled to the model's, with the first worker within reach; in flight see
        `in_flight`. Raises RequestError where there is none."""
        return decided_once(observation, self._plan)

    def _plan(self, observation: Observation) -> Decision:
        spec, world = observation.model, observation.world
        gone = {n for n, view in enumerate(observation.machines) if not view.reachable}
        count = len(observation.machines) or (len(world.hosts) if world else 1)
        worker = next((n for n in range(1, count) if n not in gone | observation.limits.unreachable), None)
        if worker is None or spec.num_layers == 1:
            raise RequestError("layer splitting needs a worker within reach and a model of two layers or more")
        floor = observation.limits.floor
        last = floor.last_layers if floor else 0
        said: str | None = None
        for index in self.costs().argsort(kind="stable"):
            scaled = round(self.table.splits[index] * spec.num_layers / self.table.num_layers)
            at = min(max(scaled, floor.first_layers if floor else 1), spec.num_layers - max(last, 1))
            cut = Partition.u_shape(spec, at, last, inner=worker) if floor else Partition.cut(spec, at, second=worker)
            if world is None:
                return Decision(cut, observation.tools.wires[0])
            said = obstacle(world, Decision(cut, observation.tools.wires[0]), observation.job, observation.limits)
            if said is None:
                return driven(world, [cut], observation, world.conditions(observation.loads))
        raise RequestError(f"layer splitting: no split of this model is admissible: {said}")
