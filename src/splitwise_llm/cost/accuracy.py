"""Nats per token that a choice loses, from a table that was measured on text.

The table is additive: what one lossy layer group or crossing loses does not depend on the others. That holds for
small losses and is checked against whole-model measurements where the table is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import SpecError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Kind, Plan, Serial
from splitwise_llm.spec import Weights

_SHIPPED = Path(str(resources.files("splitwise_llm"))) / "data" / "accuracy"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Nats per token above the full-precision model. Layer groups are equal spans of the model's depth."""

    weights: Mapping[Weights, tuple[float, ...]]
    """By weight form: the loss when one layer group alone is in that form."""
    wire: Mapping[WirePrecision, tuple[float, ...]]
    """By wire precision: the loss of one crossing of the residual stream in the middle of each layer group."""
    source: str
    """Where the figures are from, or that they are assumed."""

    def weights_by_half(self, form: Weights, layers: int) -> tuple[float, ...]:
        """Loss of each half layer in a weight form."""
        groups = self.weights.get(form, ()) or (0.0,)
        of_half = [half // 2 * len(groups) // layers for half in range(2 * layers)]
        return tuple(groups[group] / of_half.count(group) for group in of_half)

    def wire_by_boundary(self, wire: WirePrecision, layers: int) -> tuple[float, ...]:
        """Loss of one crossing before each half layer, and after the last."""
        groups = self.wire.get(wire, ()) or (0.0,)
        return tuple(groups[min(half * len(groups) // (2 * layers), len(groups) - 1)] for half in range(2 * layers + 1))

    def by_boundary(self, wires: Iterable[WirePrecision], layers: int) -> tuple[float, ...]:
        """Loss of one crossing before each half layer, and after the last, where each precision is used in some phase.

        The largest counts as if it were used throughout. For a lossy prefill that is cautious: nobody has measured how
        much less a loss weighs that only the prompt's keys and values have.
        """
        each = [self.wire_by_boundary(wire, layers) for wire in wires]
        return tuple(max(losses) for losses in zip(*each, strict=True))

    def of_weights(self, partition: Partition, forms: Sequence[Weights]) -> float:
        """Loss by the weight form of the machine (`forms[machine]`) that runs each unit."""
        layers, lost = len(partition.layers), 0.0
        for machine in partition.machines:
            by_half = self.weights_by_half(forms[machine], layers)
            for half, loss in enumerate(by_half):
                owners = partition.owners(half)
                lost += loss * owners.count(machine) / len(owners)
        return lost

    def of_wire(self, plan: Plan, layers: int) -> float:
        """Loss by what crosses: the residual stream counts once per boundary, and so do the parts of a shared half."""
        by_boundary = self.by_boundary(plan.decision.wires, layers)
        lost = 0.0
        for index, stage in enumerate(plan.stages):
            kinds = {move.kind for move in plan.moves_after(index)} & {Kind.RESIDUAL, Kind.PARTIAL}
            end = stage.stop if isinstance(stage, Serial) else stage.half + 1
            lost += len(kinds) * by_boundary[end]
        return lost

    def of(self, plan: Plan, forms: Sequence[Weights]) -> float:
        """Nats per token lost by a plan on machines whose weights are in `forms`."""
        partition = plan.decision.partition
        return self.of_weights(partition, forms) + self.of_wire(plan, len(partition.layers))

    def to_json(self) -> str:
        return json.dumps({"weights": self.weights, "wire": self.wire, "source": self.source}, indent=1)

    @classmethod
    def from_file(cls, path: str | Path) -> Accuracy:
        """Read what `to_json` wrote. Raises SpecError that names the file."""
        try:
            data = json.loads(Path(path).read_text())
            weights = {Weights(name): tuple(map(float, losses)) for name, losses in data["weights"].items()}
            wire = {WirePrecision(name): tuple(map(float, losses)) for name, losses in data["wire"].items()}
            return cls(weights, wire, str(data["source"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpecError(
                f"{path} is no accuracy table ({error!r}); expected 'weights', 'wire' and 'source', as "
                "`splitwise profile --accuracy` writes them"
            ) from error

    @classmethod
    def shipped(cls, name: str) -> Accuracy:
        """The table that comes with the package for a model, `NO_LOSS` where there is none."""
        path = _SHIPPED / f"{name}.json"
        return cls.from_file(path) if name.replace("-", "").replace(".", "").isalnum() and path.is_file() else NO_LOSS


NO_LOSS = Accuracy({}, {}, "nothing measured: every precision counts as lossless")
