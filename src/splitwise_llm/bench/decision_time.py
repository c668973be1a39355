"""How long the policy `splitwise` takes to decide about one live session, the exact solver included, once its table is
made. Processor time of one thread, so that neighbours on the machine count for little; it decides nothing itself.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from splitwise_llm.bench.figures import Figures
from splitwise_llm.cost import Drafter, Floor, Host, Job, Limits, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.observation import EPOCHS, SEEN, MachineView, Observation, Occasion, Past, Placement, Tools
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.rebuild import Holdings
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

JOB = Job(128, 128)
TOOLS = Tools((WirePrecision.FP16,), (None, 32, 128), (0, 1, 2, 4))


def asked(floor: Floor | None) -> Observation:
    """A 7B on an Orin NX and a server over 20 Mbit/s."""
    hosts = (Host(find_device("orin-nx"), Dtype.FP16, Weights.INT4), Host(find_device("a100"), Dtype.FP16))
    link = LinkSpec(0.04, 2.5e6, 5e6)
    world = World(find_model("llama-2-7b"), hosts, {(0, 1): link}, drafter=Drafter(0.6))
    views = tuple(
        MachineView(name, True, int(host.device.memory_bytes), host.dtype, host.weights, link.rtt_s, True)
        for name, host in zip(("edge", "cloud"), hosts, strict=True)
    )
    epochs = np.tile(np.array([1.0, 1.0, link.rtt_s, 2.5e6, 5e6, 1.0, 0.0]), (1, EPOCHS, 1))
    assert epochs.shape == (1, EPOCHS, len(SEEN))
    past = replace(Past.nothing(1), epochs=epochs, since_s=np.array([20.0]))
    return Observation(
        world.spec, views, JOB.prompt_tokens, JOB.tokens_out, world=world, nominal=world, limits=Limits(floor),
        tools=TOOLS, past=past,
    )  # fmt: skip


def add_decision_ms(figures: Figures, policy: Splitwise, repeats: int = 300) -> None:
    """`decision_ms` (p50, over admission and flight, with and without a floor), `decision_p99_ms`; the same in an
    outage, whose end the policy weighs, too (`outage_`); and what it takes to make a table and to price the ways from
    another pattern of caches, which is rarer."""
    took: list[float] = []
    in_outage: list[float] = []
    for floor in (None, Floor(2, 2)):
        seen = asked(floor)
        table_ms, decision = _timed(policy, seen)
        name = "floor" if floor else "open"
        figures.add(f"table_{name}_ms", table_ms, "once per class of request, its plans sought")
        flying = []
        for tokens in range(1, JOB.tokens_out):
            held = Holdings.of(decision.partition, JOB.prompt_tokens + tokens, 2)
            placement = Placement(decision, JOB.prompt_tokens + tokens, tokens, holdings=held)
            flying.append(replace(seen, placement=placement, occasion=Occasion.EPOCH))
        figures.add(f"pattern_{name}_ms", _timed(policy, flying[0])[0], "once per move")
        for number in range(repeats):
            took.append(_timed(policy, seen)[0])
            took.append(_timed(policy, flying[number % len(flying)])[0])
            for up in (seen, flying[number % len(flying)]):
                in_outage.append(_timed(policy, _cut_off(up))[0])
    for name, all_of_them in (("decision", took), ("outage_decision", in_outage)):
        figures.add(f"{name}_ms", float(np.median(all_of_them)), "processor time; bar 1")
        figures.add(f"{name}_p99_ms", float(np.quantile(all_of_them, 0.99)), "bar 1")


def _cut_off(seen: Observation) -> Observation:
    """The same with the link down, as a device sees it."""
    assert seen.past is not None
    return replace(seen, past=replace(seen.past, is_down=np.array([True]), since_s=np.array([2.0])))


def _timed(policy: Splitwise, seen: Observation) -> tuple[float, Decision]:
    begun_s = time.thread_time()
    decision = policy.decide(seen)
    return 1e3 * (time.thread_time() - begun_s), decision


__all__ = ["add_decision_ms", "asked"]
