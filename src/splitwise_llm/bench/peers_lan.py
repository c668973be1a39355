"""Scenario peer-lan: machines of like speed on one local network, where dividing heads and FFN columns can pay.

Prices only: nothing changes while a request runs, so there is nothing to simulate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from splitwise_llm.cost import Host, Job, Limits, Price, World, price
from splitwise_llm.decision import WirePrecision
from splitwise_llm.observation import Observation, Tools
from splitwise_llm.policies import POLICIES
from splitwise_llm.policies.assignments import Search
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.solver import Solver
from splitwise_llm.records import Cell, Estimate
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

GIGABIT = LinkSpec(0.5e-3, 125e6, 125e6)
JOB = Job(128, 128)
TOOLS = Tools((WirePrecision.FP16, WirePrecision.INT8))
SOLVED = ("exact", "best-static", "drift-selfish", "drift", "splitwise", "tuned")
"""With nothing queueing and nothing changing these all solve the same problem: it is solved once, as `exact`."""


@dataclass(frozen=True, slots=True)
class Peers:
    """One pair of machines: names of shipped devices, their weights, and what must come out."""

    device: str
    other: str
    divides: bool | None
    """Whether the exact optimum must divide halves; None: whatever the prices say."""
    other_weights: Weights = Weights.INT4
    model: str = "llama-2-7b"

    def name(self, ideal: bool) -> str:
        return f"{self.device}+{self.other}/{self.model}" + ("/ideal-exchange" if ideal else "")


PEERS = (
    Peers("pi5:distributed-llama", "pi5:distributed-llama", True),
    Peers("pi5:distributed-llama", "agx-orin", None, Weights.FULL),
    Peers("s23", "agx-orin", None, Weights.FULL),
    Peers("pi5:distributed-llama", "a100", False, Weights.FULL),
    Peers("s23", "a100", False, Weights.FULL),
)


@cache
def world_of(peers: Peers, ideal: bool) -> World:
    """The two machines on gigabit Ethernet; `ideal`: messages cost no software."""
    hosts = []
    for name, weights in ((peers.device, Weights.INT4), (peers.other, peers.other_weights)):
        device = find_device(name)
        hosts.append(Host(replace(device, message_s=0.0) if ideal else device, Dtype.FP16, weights))
    return World(find_model(peers.model), tuple(hosts), {(0, 1): GIGABIT})


@dataclass(frozen=True, slots=True)
class Outcome:
    """The best plan of whole halves, and the best of all."""

    whole: Price
    best: Price

    @property
    def divides(self) -> bool:
        return any(layer.is_shared for layer in self.best.decision.partition.layers)

    @property
    def gain(self) -> float:
        return self.whole.total_s / self.best.total_s


@cache
def outcome(peers: Peers, ideal: bool) -> Outcome:
    """Search both exactly, over the wire precisions."""
    world = world_of(peers, ideal)

    halves = [
        Search(world, JOB, world.conditions(), Latency(), Limits(), wire, share=False).best() for wire in TOOLS.wires
    ]
    whole = min((found for found in halves if found), key=lambda found: found.value).decision
    best = Solver(world, JOB, TOOLS, Limits()).solve(world.conditions(), Latency()).best.decision
    return Outcome(price(world, whole, JOB), price(world, best, JOB))


def peer_cells() -> list[Cell]:
    """Every pair, with the measured exchange overhead and with an ideal one, under every policy."""
    cells = []
    for peers in PEERS:
        for ideal in (False, True):
            world, both = world_of(peers, ideal), outcome(peers, ideal)
            seen = Observation(world.spec, (), JOB.prompt_tokens, JOB.tokens_out, world=world, tools=TOOLS)
            decided = {name: policy.decide(seen) for name, (_, policy) in POLICIES.items() if name not in SOLVED}
            best = {"whole-halves": both.whole.decision, "exact": both.best.decision}
            for name, decision in {**decided, **best}.items():
                cells.append(_cell(peers.name(ideal), name, price(world, decision, JOB), both.whole.total_s))
    return cells


def _cell(case: str, policy: str, one: Price, whole_s: float) -> Cell:
    figures = {
        "mean_s": one.total_s, "ttft_s": one.ttft_s, "tpot_s": one.tpot_s, "device_j": one.device_j,
        "total_j": one.total_j, "usd_per_1k": 1e3 * one.usd, "nats": one.nats,
        "factor_over_static": whole_s / one.total_s,
    }  # fmt: skip
    shared = sum(layer.is_shared for layer in one.decision.partition.layers)
    return Cell(
        "peer-lan", case, policy, 1, 1, {name: Estimate(value, value, value) for name, value in figures.items()},
        note=f"{shared} divided layers of {len(one.decision.partition.layers)}; prices, not a simulation",
    )  # fmt: skip
