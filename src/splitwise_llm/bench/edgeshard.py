"""EdgeShard's testbed (arXiv 2405.14371), rebuilt from device files: what fits, how fast, and how many tokens.

The only figures taken from the paper besides the machines' are the one their device file names as calibrated (an AGX
Orin alone). Assumed, since the parts of the paper that say so were not at hand: full precision is fp32, on the wire,
too; the device reaches the cloud at 1 Mbit/s; all other links carry 50 Mbit/s +-20 %; delays as given here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np

from splitwise_llm.bench.comparison import Fact, Listing, Row
from splitwise_llm.bench.pipeline import Barrier, completions, stations, steady_per_s
from splitwise_llm.cost import Host, Job, Limits, World, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.policies.chains import ALONE, Chain, Flow, Route, chain
from splitwise_llm.policies.pipelines import best_throughput, exact_latency, published_latency
from splitwise_llm.spec import Dtype, LinkSpec, find_device, find_model
from splitwise_llm.units import parse_rate

JOB = Job(32, 96)
MACHINES = (*("agx-orin-32gb",) * 12, *("orin-nx-16gb:pytorch-fp32",) * 2, "rtx-3090:pytorch-fp32")
CLOUD = len(MACHINES) - 1


@dataclass(frozen=True, slots=True)
class Testbed:
    """The links of one set-up."""

    __test__ = False  # not a test, whatever its name says to pytest

    device_cloud: str = "1mbit"
    others_cloud: str = "50mbit"
    edge: str = "50mbit"
    spread: float = 0.0
    """Every link but the device's to the cloud is drawn within +- this share."""
    edge_rtt_s: float = 0.0005
    cloud_rtt_s: float = 0.005
    seed: int = 0
    dtype: Dtype = Dtype.FP32
    """In what weights, caches and activations are kept, and computed with the speeds of fp32."""

    def world(self, model: str) -> World:
        """All fifteen machines, linked pair by pair; machine 0 is an AGX Orin that holds the prompts."""
        dice = np.random.default_rng(self.seed)
        links = {}
        for a, b in combinations(range(len(MACHINES)), 2):
            to_cloud = b == CLOUD
            text = (self.device_cloud if a == 0 else self.others_cloud) if to_cloud else self.edge
            drawn = 1.0 if to_cloud and a == 0 else dice.uniform(1 - self.spread, 1 + self.spread)
            rate = parse_rate(text) * drawn
            links[a, b] = LinkSpec(self.cloud_rtt_s if to_cloud else self.edge_rtt_s, rate, rate)
        hosts = {name: Host(find_device(name), self.dtype) for name in set(MACHINES)}
        return World(find_model(model), tuple(hosts[name] for name in MACHINES), links)

    @property
    def wire(self) -> WirePrecision:
        return WirePrecision(self.dtype.value)


ONE_SWITCH = Testbed(cloud_rtt_s=0.0005)
"""The cloud's delay is not emulated: all machines hang on one switch."""
METRO = Testbed()
"""The cloud is 5 ms away, as a city's is."""


def _chain(
    world: World, bed: Testbed, only: set[int] | None = None, flow: Flow = ALONE, occupancy: bool = False
) -> Chain:
    limits = Limits(only=frozenset(only) if only else None)
    return chain(world, JOB, bed.wire, limits=limits, flow=flow, occupancy=occupancy)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds per token, the prompt's time among them; None: does not fit."""

    solo: float | None
    even: float | None
    opt: float | None
    """Best cut of device and cloud."""
    published: float | None
    """EdgeShard's recurrence."""
    exact: float | None
    plan: Route | None
    """The exact program's."""


def latencies(model: str, bed: Testbed) -> Latencies:
    """EdgeShard's comparison, one request at a time."""
    world = bed.world(model)

    def per_token(route: Route | None) -> float | None:
        return route.seconds / JOB.tokens_out if route else None

    half = Decision(Partition.cut(world.spec, world.spec.num_layers // 2, second=CLOUD), bed.wire)
    even = None if obstacle(world, half, JOB) else price(world, half, JOB).total_s / JOB.tokens_out
    everything = _chain(world, bed)
    exact = exact_latency(everything)
    return Latencies(
        per_token(exact_latency(_chain(world, bed, {0}))),
        even,
        per_token(exact_latency(_chain(world, bed, {CLOUD}))),
        per_token(published_latency(everything)),
        per_token(exact),
        exact,
    )


def fewest_boards(model: str, bed: Testbed) -> int | None:
    """AGX Orin boards that hold a model together with the RTX 3090; None: not even twelve."""
    world = bed.world(model)
    for count in range(1, 13):
        if exact_latency(_chain(world, bed, {*range(1, count), CLOUD})):
            return count
    return None


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second with some micro-batches under way."""

    bound: float
    """What the program promises a full pipeline: one over its bottleneck."""
    throughput_plan: float
    """Its plan, simulated, without bubbles."""
    throughput_plan_bubbles: float
    latency_plan: float
    """The exact latency program's plan, pipelined, without bubbles."""
    stages: int


def rates(model: str, bed: Testbed, flow: Flow, only: set[int] | None = None, batches: int = 8) -> Rates | None:
    """EdgeShard's throughput, as promised and as a discrete-event pipeline gives it; None: does not fit."""
    world = bed.world(model)
    of = partial(_chain, world, bed, only, flow)
    fast, short = best_throughput(of(occupancy=True), of()), exact_latency(of())
    if fast is None or short is None:
        return None

    def simulated(route: Route, barrier: Barrier) -> float:
        line = stations(world, JOB, route, flow, bed.wire)
        times = completions(line, flow.in_flight, JOB.tokens_out, batches * flow.in_flight, barrier)
        return steady_per_s(times, flow.in_flight) * flow.batch * JOB.tokens_out

    return Rates(
        flow.batch * JOB.tokens_out / fast.seconds,
        simulated(fast, Barrier.NONE),
        simulated(fast, Barrier.PROMPT),
        simulated(short, Barrier.NONE),
        len(fast.spans),
    )


SPREAD = replace(METRO, spread=0.2)
SEEDS = range(5)
SEQUENCES = 4
"""Under way at a time. Not stated where we read; published throughput x latency is 4.0 for 7B and 3.9 for 70B."""
_ES = "EdgeShard"


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def latency_rows() -> Iterator[Row]:
    """ms per token, the median over draws of the links."""
    draws = [latencies("llama-2-7b", replace(SPREAD, seed=seed)) for seed in SEEDS]
    solo, even = draws[0].solo, draws[0].even
    recurrence = _median([draw.published for draw in draws if draw.published])
    exact = _median([draw.exact for draw in draws if draw.exact])
    assert solo
    switch = latencies("llama-2-7b", replace(ONE_SWITCH, spread=0.2))
    assert switch.published
    yield Row(_ES, "edgeshard_7b_solo_ms", "7B, edge-solo, ms/token", _ms(solo), 140.3, "", True)
    yield Row(
        _ES,
        "edgeshard_7b_even_ms",
        "7B, device and cloud evenly, ms/token",
        _ms(even),
        227.35,
        "1 Mbit/s carries 16 kB in 131 ms",
    )
    yield Row(_ES, "edgeshard_7b_ms", "7B, its recurrence, ms/token", _ms(recurrence), 75.88)
    yield Row(_ES, "edgeshard_7b_exact_ms", "7B, exact program, ms/token", _ms(exact), None)
    yield Row(
        _ES, "edgeshard_7b_ratio", "7B, edge-solo over its recurrence", solo / recurrence, 140.3 / 75.88,
        "the plan needs a detour: device, a second board, cloud, because the device's own link to the cloud carries "
        "1 Mbit/s; ours fills the RTX 3090 with 27 layers",
    )  # fmt: skip
    yield Row(
        _ES, "edgeshard_7b_ratio_one_switch", "the same, the cloud on the boards' switch (0.5 ms)",
        solo / switch.published, 140.3 / 75.88, "without 5 ms to the cloud the split gains more than published",
    )  # fmt: skip
    thirteen = latencies("llama-2-13b", SPREAD)
    yield Row(_ES, "edgeshard_13b_ms", "13B, its recurrence, ms/token", _ms(thirteen.published), 173.43)
    yield Row(_ES, "edgeshard_13b_exact_ms", "13B, exact program, ms/token", _ms(thirteen.exact), None)
    yield Row(
        _ES, "edgeshard_13b_opt_ms", "13B, best cut of device and cloud, ms/token", _ms(thirteen.opt), 243.45,
        "does not fit here: 22 layers and the embedding on the board, 18 and the head are 23.5 GB on a card with 23",
    )  # fmt: skip
    seventy = latencies("llama-2-70b", SPREAD)
    yield Row(
        _ES, "edgeshard_70b_ms", "70B, its recurrence, ms/token", _ms(seventy.published), 3086,
        "at the speed of the 7B run 276 GB are read in 1.5 s, and eleven hops take 0.07 s; the published time is "
        "twice that, which neither links nor this roofline explain (boards filled to the brim, perhaps)",
    )  # fmt: skip
    yield Row(_ES, "edgeshard_70b_exact_ms", "70B, exact program, ms/token", _ms(seventy.exact), None)


def fit_facts() -> Iterator[Fact]:
    """What fits, and whether its recurrence finds plans as good as published."""
    thirteen, seventy = (latencies(model, SPREAD) for model in ("llama-2-13b", "llama-2-70b"))
    yield Fact(_ES, "13B fits one AGX Orin", False, thirteen.solo is not None)
    yield Fact(_ES, "13B fits half on an AGX Orin, half on the RTX 3090", False, thirteen.even is not None)
    yield Fact(_ES, "13B fits an AGX Orin and the RTX 3090, cut at the best layer", True, thirteen.opt is not None)
    two = seventy.solo is not None or seventy.even is not None or seventy.opt is not None
    yield Fact(_ES, "70B fits an AGX Orin, alone or with the RTX 3090", False, two)
    seven = latencies("llama-2-7b", SPREAD)
    for name, found, published_s in (("7B", seven, 0.07588), ("13B", thirteen, 0.17343), ("70B", seventy, 3.086)):
        good = found.published is not None and found.published <= published_s
        yield Fact(_ES, f"its recurrence finds a plan for {name} as fast as published, or faster", True, good)
    boards = fewest_boards("llama-2-70b", METRO)
    yield Fact(_ES, "70B fits 11 AGX Orin and the RTX 3090", True, boards is not None and boards <= 11)


def throughput_rows() -> Iterator[Row]:
    """Tokens per second of plans for 8 sequences under way, simulated."""
    flow, alone = Flow(1, SEQUENCES), Flow(SEQUENCES, 1)
    bed = METRO  # equal links: fewer kinds of machines
    solo = rates("llama-2-7b", bed, alone, {0})
    why = {
        "7b": "the program divides 7B over 15 machines for its bottleneck, and 4 sequences do not fill them: the "
        "latency program's plan is faster",
        "13b": "published throughput x latency is 1.8 sequences, hardly a pipeline; ours has 4 on 11 machines",
        "70b": "as the latency: twice as fast as published",
    }
    assert solo
    yield Row(_ES, "edgeshard_7b_solo_per_s", "7B, edge-solo, 4 sequences in a batch, tok/s", solo.bound, 52.45 / 2.2,
              "published as 2.2 times less than EdgeShard's")  # fmt: skip
    for model, published in (("7b", 52.45), ("13b", 10.45), ("70b", 1.25)):
        found = rates(f"llama-2-{model}", bed, flow)
        assert found
        what = f"{model.upper()}, throughput program's plan"
        yield Row(
            _ES, f"edgeshard_{model}_per_s", f"{what}, simulated, tok/s", found.throughput_plan, published, why[model]
        )
        yield Row(
            _ES, f"edgeshard_{model}_bubbles_per_s", f"{what}, with bubbles, tok/s", found.throughput_plan_bubbles, None
        )
        yield Row(_ES, f"edgeshard_{model}_bound_per_s", f"{what}, if the pipeline were full, tok/s", found.bound, None)
        what = f"{model.upper()}, exact latency program's plan, simulated, tok/s"
        yield Row(_ES, f"edgeshard_{model}_latency_plan_per_s", what, found.latency_plan, None)


def link_listing() -> Listing:
    """7B under other links to the cloud."""
    lines: list[tuple[str, ...]] = [
        ("Mbit/s to the cloud", "RTT to the cloud", "from the device only", "from every board")
    ]
    for rtt_s in (0.0005, 0.005, 0.02):
        for rate in (1, 2, 5, 10, 20, 50):
            cells = []
            for others in ("50mbit", f"{rate}mbit"):
                bed = replace(METRO, device_cloud=f"{rate}mbit", others_cloud=others, cloud_rtt_s=rtt_s)
                found = latencies("llama-2-7b", bed)
                assert found.solo
                assert found.published
                cells.append(f"{1e3 * found.published:.1f} ms, {found.solo / found.published:.2f}x")
            lines.append((str(rate), f"{1e3 * rtt_s:g} ms", *cells))
    remark = (
        "ms per token of EdgeShard's recurrence and its gain over edge-solo; other links 50 Mbit/s, 0.5 ms. "
        "Published: 75.88 ms, 1.85x. If every board reaches the cloud at 1 Mbit/s only, splitting gains nothing."
    )
    return Listing("EdgeShard, Llama-2-7B, by the link to the cloud", remark, tuple(lines))


def sequences_listing() -> Listing:
    """Throughput by how many sequences are under way, each a micro-batch."""
    counts = (1, 2, 4, 8, 16, 32)
    lines: list[tuple[str, ...]] = [("model", "plan", *(f"{count}" for count in counts), "full", "published")]
    for model, published in (("7b", "52.45"), ("13b", "10.45"), ("70b", "1.25")):
        found = [rates(f"llama-2-{model}", METRO, Flow(1, count), batches=4) for count in counts]
        for name in ("throughput_plan", "latency_plan"):
            cells = [f"{getattr(one, name):.1f}" if one else "-" for one in found]
            full = f"{found[0].bound:.1f}" if found[0] and name == "throughput_plan" else ""
            lines.append((model.upper(), name.replace("_", " "), *cells, full, published))
    remark = (
        "Tokens per second of a discrete-event pipeline without bubbles, by sequences under way (`-`: their caches do "
        "not fit). The throughput program minimises the bottleneck as if the pipeline were full; with few sequences "
        "its many stages only delay, and the exact latency program's plan can be the faster one."
    )
    return Listing("EdgeShard, throughput by sequences under way", remark, tuple(lines))
