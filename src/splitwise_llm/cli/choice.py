"""What a policy chose, in words: its price, the fastest other partition, and in the end what was measured.

It does not decide anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from splitwise_llm.cost import Price, World, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Observation, Policy
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.pipelines import EdgeShard, Program
from splitwise_llm.policies.solver import Solver
from splitwise_llm.records import RequestRecord


def asked_policy(
    name: str, partition: str, wire: WirePrecision | None, chunk: int | None, allow_lossy: bool
) -> Policy | None:
    """The policy of a name; None for no name. Raises RequestError for an unknown one, one that needs more than a
    session, and for options that say what it is to find out."""
    if not name:
        if allow_lossy:
            raise RequestError("--allow-lossy is for a --policy; with a --partition write --wire int8 or int4")
        return None
    if partition:
        raise RequestError("--policy and --partition exclude each other: give the one that is to decide")
    if wire is not None or chunk is not None:
        raise RequestError(
            "with --policy the wire precision and the chunk are the policy's to choose: leave out --wire and --chunk; "
            "--allow-lossy lets it use int8 and int4"
        )
    policy = find_policy(name)
    if isinstance(policy, EdgeShard) and policy.program is Program.THROUGHPUT:
        raise RequestError(
            f"{name} plans for many requests under way at a time, and sessions are not pipelined yet: one request "
            "would only wait in its pipeline; use edgeshard-exact, or simulate it"
        )
    return policy


@dataclass(frozen=True, slots=True)
class Explained:
    """A policy that says what it chose before anything is opened, so that no token waits for the explanation."""

    policy: Policy
    called: str
    names: Sequence[str]
    say: Callable[[str], None]

    def decide(self, observation: Observation) -> Decision:
        """What the policy decides."""
        decision = self.policy.decide(observation)
        for line in explanation(self.called, decision, observation, self.names):
            self.say(line)
        return decision


def explanation(called: str, decision: Decision, observation: Observation, names: Sequence[str]) -> Iterator[str]:
    """The choice, its price, and the fastest other partition with its own, a line each."""
    yield f"{called} chooses {_decision(decision, names)}"
    if observation.world is None:
        yield f"  {observation.unpriced('a price')}"
        return
    world, job = observation.world, observation.job
    conditions = world.conditions(observation.loads)
    yield f"  predicted: {_price(price(world, decision, job, conditions))}"
    other = _fastest_other(world, decision, observation)
    if other is None:
        yield "  no other partition is admissible"
    else:
        said = _price(price(world, other, job, conditions))
        yield f"  fastest other partition: {_decision(other, names)}: {said}"


def _fastest_other(world: World, decision: Decision, observation: Observation) -> Decision | None:
    solver = Solver(world, observation.job, observation.tools, observation.limits)
    try:
        found = solver.solve(world.conditions(observation.loads), Latency())
    except RequestError:  # nothing is admissible, as for a partition that was given against the limits
        return None
    for choice in (found.best, found.runner_up):
        if choice and choice.decision.partition != decision.partition:
            return choice.decision
    return None


def _decision(decision: Decision, names: Sequence[str]) -> str:
    if len(decision.partition.machines) == 1:
        return decision.partition.text(names)
    chunks = f"chunks of {decision.prefill_chunk}" if decision.prefill_chunk else "the prompt at once"
    return f"{decision.partition.text(names)}, {decision.wire} on the wire, {chunks}"


def _price(one: Price) -> str:
    joules = f"{one.device_j:.3g} J on the device, {one.total_j:.3g} J in all" if one.total_j else "power not known"
    return f"TTFT {1e3 * one.ttft_s:.1f} ms, {1e3 * one.tpot_s:.2f} ms/token, {joules}"


def hindsight(record: RequestRecord) -> Iterator[str]:
    """Predicted against measured, and the links as they were believed to be; nothing where nothing was predicted."""
    expected = record.predicted
    if expected is None:
        return
    said = [_against("TTFT", expected.ttft_s, record.ttft_s)]
    if len(record.token_ids) > 1:
        said.append(_against("per token", expected.tpot_s, record.tpot_s))
    yield f"  measured: {'; '.join(said)}"
    for link in expected.links:
        up, down = (8e-6 * rate for rate in (link.up_bytes_per_s, link.down_bytes_per_s))
        yield (
            f"  believed of {link.first}-{link.second}: RTT {1e3 * link.rtt_s:.1f} ms, up {up:g} Mbit/s, "
            f"down {down:g} Mbit/s ({link.rates_from})"
        )


def _against(what: str, expected_s: float, measured_s: float) -> str:
    off = 100 * (expected_s / measured_s - 1)
    return f"{what} {1e3 * measured_s:.2f} ms, predicted {1e3 * expected_s:.2f} ms ({off:+.0f} %)"
