"""Nats per token that a choice loses, from a table that was measured on text.

The table is additive: what one lossy layer group or crossing loses does not depend on the others. That holds for
small losses and is checked against whole-model measurements where the table is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """By wire precision: the loss of one crossing of the residual stream in the middle of each group of crossings,
    equal spans of the depth, too, of which there may be more than of layers."""
    source: str
    """Where the figures are from, or that they are assumed."""
    partials: Mapping[WirePrecision, tuple[float, ...]] = field(default_factory=dict)
    """By wire precision: the loss when every half of one layer group alone is shared by two machines and nothing but
    their partial sums is lossy. A precision that is not here counts those of a half as a crossing of the stream, the
    careful side."""
    ends: Mapping[WirePrecision, tuple[float, float]] = field(default_factory=dict)
    """By wire precision: the loss of one crossing before the first layer, and of one after the last. A precision that
    is not here has those of the first and the last group."""

    def weights_by_half(self, form: Weights, layers: int) -> tuple[float, ...]:
        """Loss of each half layer in a weight form."""
        return _divided(self.weights.get(form, ()) or (0.0,), layers)

    def wire_by_boundary(self, wire: WirePrecision, layers: int) -> tuple[float, ...]:
        """Loss of one crossing of the stream before each half layer, and after the last."""
        inside = self._inside(wire, layers)
        first, last = self.ends.get(wire, (inside[0], inside[-1]))
        return (first, *inside[1:-1], last)

    def partials_by_boundary(self, wire: WirePrecision, layers: int) -> tuple[float, ...]:
        """Loss of the partial sums that cross before each half layer, and after the last, where the half before it is
        shared. Nothing is before the first, whose figure stands for no plan."""
        if wire not in self.partials:
            return self._inside(wire, layers)
        by_half = _divided(self.partials[wire] or (0.0,), layers)
        return (by_half[0], *by_half)

    def _inside(self, wire: WirePrecision, layers: int) -> tuple[float, ...]:
        """The figure of the group of each boundary, be it an end or not."""
        groups = self.wire.get(wire, ()) or (0.0,)
        return tuple(groups[min(half * len(groups) // (2 * layers), len(groups) - 1)] for half in range(2 * layers + 1))

    def by_boundary(self, wires: Iterable[WirePrecision], layers: int) -> tuple[float, ...]:
        """Loss of one crossing before each half layer, and after the last, where each precision is used in some phase.

        The largest counts as if it were used throughout. For a lossy prefill that is cautious: nobody has measured how
        much less a loss weighs that only the prompt's keys and values have.
        """
        return _largest(self.wire_by_boundary, wires, layers)

    def by_shared_boundary(self, wires: Iterable[WirePrecision], layers: int) -> tuple[float, ...]:
        """The same of partial sums."""
        return _largest(self.partials_by_boundary, wires, layers)

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
        """Loss by what crosses: the residual stream counts once per boundary, and so do the parts of a shared half,
        with figures of their own."""
        wires = plan.decision.wires
        losses = {
            Kind.RESIDUAL: self.by_boundary(wires, layers),
            Kind.PARTIAL: self.by_shared_boundary(wires, layers),
        }
        lost = 0.0
        for index, stage in enumerate(plan.stages):
            end = stage.stop if isinstance(stage, Serial) else stage.half + 1
            kinds = {move.kind for move in plan.moves_after(index)}
            lost += sum(by_boundary[end] for kind, by_boundary in losses.items() if kind in kinds)
        return lost

    def of(self, plan: Plan, forms: Sequence[Weights]) -> float:
        """Nats per token lost by a plan on machines whose weights are in `forms`."""
        partition = plan.decision.partition
        return self.of_weights(partition, forms) + self.of_wire(plan, len(partition.layers))

    def to_json(self) -> str:
        figures = {"weights": self.weights, "wire": self.wire, "partials": self.partials, "ends": self.ends}
        return json.dumps({**figures, "source": self.source}, indent=1)

    @classmethod
    def from_file(cls, path: str | Path) -> Accuracy:
        """Read what `to_json` wrote; tables from before there were `partials` and `ends` do without them. Raises
        SpecError that names the file."""
        try:
            data = json.loads(Path(path).read_text())
            weights = {Weights(name): tuple(map(float, losses)) for name, losses in data["weights"].items()}
            wire, partials = (
                {WirePrecision(name): tuple(map(float, losses)) for name, losses in found.items()}
                for found in (data["wire"], data.get("partials", {}))
            )
            ends = {
                WirePrecision(name): (float(first), float(last)) for name, (first, last) in data.get("ends", {}).items()
            }
            return cls(weights, wire, str(data["source"]), partials, ends)
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


def _divided(groups: Sequence[float], layers: int) -> tuple[float, ...]:
    """The part that each half layer has in what its group loses."""
    of_half = [half // 2 * len(groups) // layers for half in range(2 * layers)]
    return tuple(groups[group] / of_half.count(group) for group in of_half)


def _largest(
    of: Callable[[WirePrecision, int], tuple[float, ...]], wires: Iterable[WirePrecision], layers: int
) -> tuple[float, ...]:
    each = [of(wire, layers) for wire in wires]
    return tuple(max(losses) for losses in zip(*each, strict=True))


NO_LOSS = Accuracy({}, {}, "nothing measured: every precision counts as lossless")
