"""What forbids a decision: memory, a privacy floor, a machine out of reach. Each obstacle can be said in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from splitwise_llm.cost.bill import memory_bytes
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.units import show_bytes


@dataclass(frozen=True, slots=True)
class Floor:
    """What must stay on the device so that raw tokens never leave it: embedding, head with sampling, and so many
    first and last layers. A constraint, not a guarantee: hidden states can be inverted to a degree."""

    first_layers: int
    last_layers: int

    @classmethod
    def parse(cls, text: str) -> Floor:
        """From `2+2`. Raises RequestError."""
        first, plus, last = text.partition("+")
        if not plus or not first.strip().isdigit() or not last.strip().isdigit():
            raise RequestError(f"{text!r} is no floor: write first+last layers that stay on the device, as in 2+2")
        return cls(int(first), int(last))

    def holds(self, partition: Partition) -> bool:
        """Whether a partition keeps embedding, head and these layers on the device."""
        layers = len(partition.layers)
        inside = {*range(min(self.first_layers, layers)), *range(max(layers - self.last_layers, 0), layers)}
        ends = partition.embed == partition.head == DEVICE
        return ends and all(
            machine == DEVICE for n in inside for machine in (*partition.layers[n].groups, *partition.layers[n].shards)
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a decision must respect besides memory."""

    floor: Floor | None = None
    first_layer_on_device: bool = False
    """EdgeShard's form of privacy: embedding and layer 0 stay where the text is; the head may leave."""
    unreachable: frozenset[int] = frozenset()
    only: frozenset[int] | None = None
    """Machines that may be used; None: all."""
    in_turn: bool = False
    """The device takes one request at a time: others wait for all of it, wherever it is worked at."""


UNLIMITED = Limits()


def obstacle(world: World, decision: Decision, job: Job, limits: Limits = UNLIMITED) -> str | None:
    """What forbids a decision, in words for a person; None where nothing does."""
    partition = decision.partition
    if limits.floor and not limits.floor.holds(partition):
        return f"the floor {limits.floor.first_layers}+{limits.floor.last_layers} keeps those layers on the device"
    first = partition.layers[0]
    if limits.first_layer_on_device and {partition.embed, *first.groups, *first.shards} != {DEVICE}:
        return "the first layer must stay on the device"
    for machine in partition.machines:
        name = world.hosts[machine].device.name
        if machine in limits.unreachable:
            return f"machine {machine} ({name}) cannot be reached"
        if limits.only is not None and machine not in limits.only:
            return f"machine {machine} ({name}) may not be used"
        need = memory_bytes(world, partition, machine, job, decision.prefill_chunk, decision.draft)
        have = world.hosts[machine].device.memory_bytes
        if need > have:
            return f"machine {machine} ({name}) would hold {show_bytes(need)} and has {show_bytes(have)}"
    return None
