"""Raspberry Pi 5 boards that share every layer, and a board beside an A100 that should share none.

Prices only: nothing runs. Published speeds: distributed-llama README at e8dc8ec, Llama-2-7B Q40.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from splitwise_llm.bench.comparison import Fact, Row
from splitwise_llm.cost import Floor, Host, Job, Limits, Price, World, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.policies.chains import chain
from splitwise_llm.policies.pipelines import exact_latency
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

WIRE = WirePrecision.FP16
LAN = LinkSpec(0.0005, 1.25e8, 1.25e8)
"""Gigabit Ethernet through a switch, a link between every two boards; the RTT is assumed."""
PUBLISHED_PER_S = {1: 2.26, 2: 2.92, 4: 4.56}
"""Boards -> tokens per second."""
JOB = Job(16, 64)
"""A short context; theirs is not stated."""


def boards(count: int, with_software: bool = True) -> World:
    """Boards on one switch; without the software time of a message, what the wires alone would allow."""
    device = find_device("raspberry-pi-5:distributed-llama")
    host = Host(device if with_software else replace(device, message_s=0.0), Dtype.FP16, Weights.INT4)
    links = dict.fromkeys(combinations(range(count), 2), LAN)
    return World(find_model("llama-2-7b"), (host,) * count, links)


def shared_tokens_per_s(count: int, with_software: bool = True) -> float:
    """Decoding speed when all layers are divided evenly."""
    world = boards(count, with_software)
    partition = Partition.shared(world.spec, dict.fromkeys(range(count), 1.0))
    return 1 / price(world, Decision(partition, WIRE), JOB).tpot_s


def layers_tokens_per_s(count: int) -> float:
    """Decoding speed of the best plan of whole and half layers in a row."""
    world = boards(count)
    route = exact_latency(chain(world, JOB, WIRE, halves=True))
    assert route is not None  # one board holds the model
    return 1 / price(world, Decision(route.partition(world.spec), WIRE), JOB).tpot_s


@dataclass(frozen=True, slots=True)
class Beside:
    """The best plans of a board beside an A100 on the same switch, by what they do with a layer."""

    edge: Price
    cloud: Price
    cut: Price
    """The best cut or U that uses both."""
    shared: Price
    """The best that divides sub-blocks, over all fractions of one layer, half of them, and all."""

    @property
    def is_anything_shared(self) -> bool:
        """Whether dividing is the best."""
        return self.shared.total_s < min(self.edge.total_s, self.cloud.total_s, self.cut.total_s)


def beside_a100(
    floor: Floor | None = None, job: Job | None = None, fractions: Sequence[int] = tuple(range(1, 32))
) -> Beside:
    """Price shared layers, `fractions` being the heads of 32 on the A100, against cuts, edge and cloud. With a floor,
    only plans that keep it, and edge-only stands in for cloud-only."""
    spec, job = find_model("llama-2-7b"), job or Job(128, 128)
    hosts = (Host(find_device("pi5"), Dtype.FP16, Weights.INT4), Host(find_device("a100-80gb")))
    world = World(spec, hosts, {(0, 1): LAN})
    limits, layers = Limits(floor=floor), spec.num_layers

    def best(partitions: list[Partition]) -> Price:
        decisions = [Decision(partition, WIRE) for partition in partitions]
        allowed = [d for d in decisions if obstacle(world, d, job, limits) is None]
        return min((price(world, d, job) for d in allowed), key=lambda p: p.total_s)

    first, last = (floor.first_layers, floor.last_layers) if floor else (0, 0)
    cuts = [] if floor else [Partition.cut(spec, half / 2) for half in range(1, 2 * layers)]
    cuts += [
        Partition.u_shape(spec, a / 2, b / 2)
        for a in range(2 * first, 2 * layers)
        for b in range(2 * last, 2 * layers - a)
        if a in (2 * first, 2 * layers - b - 1) or b == 2 * last
    ]
    shared = [
        Partition.shared(spec, {0: spec.num_kv_heads - k, 1: k}, range(first, first + number), home)
        for k in fractions
        for number in (1, (layers - first - last) // 2, layers - first - last)
        for home in ((0,) if floor else (0, 1))
    ]
    edge = best([Partition.all_on(spec, 0)])
    return Beside(edge, edge if floor else best([Partition.all_on(spec, 1)]), best(cuts), best(shared))


_PI = "distributed-llama"


def rows() -> Iterator[Row]:
    """Boards that share every layer, beside the best plan of layers in a row."""
    alone = shared_tokens_per_s(1)
    for count, published in PUBLISHED_PER_S.items():
        ours = shared_tokens_per_s(count)
        why = {2: "fits the software time of a message, 0.7 ms at each end"}.get(count, "")
        yield Row(_PI, f"pi_{count}_per_s", f"{count} Raspberry Pi 5, 7B int4, tok/s", ours, published, why, count < 4)
    two = PUBLISHED_PER_S[2] / PUBLISHED_PER_S[1]
    yield Row(_PI, "pi_2_gain", "two boards over one", shared_tokens_per_s(2) / alone, two, "", True)
    yield Row(_PI, "pi_2_gain_ideal", "two boards over one, messages free of software time",
              shared_tokens_per_s(2, with_software=False) / alone, None, "what 0.5 ms of RTT alone allow")  # fmt: skip
    layers = layers_tokens_per_s(2)
    yield Row(_PI, "pi_2_layers_per_s", "two boards, best plan of layers in a row, tok/s", layers, None,
              "equal boards: all layers on one")  # fmt: skip
    yield Row(_PI, "pi_2_over_layers", "two boards sharing, over layers in a row",
              shared_tokens_per_s(2) / layers, None)  # fmt: skip


def facts() -> Iterator[Fact]:
    """A board beside an A100: nothing is shared."""
    for floor, name in ((None, "no floor"), (Floor(2, 2), "floor 2+2")):
        found = beside_a100(floor)
        told = f"cloud {found.cloud.total_s:.2f} s, " if floor is None else ""
        told += f"cut {found.cut.total_s:.2f} s, shared {found.shared.total_s:.2f} s, board {found.edge.total_s:.2f} s"
        yield Fact(
            "tensor parallel", f"sub-blocks are shared with an A100 ({name}: {told})", False, found.is_anything_shared
        )
