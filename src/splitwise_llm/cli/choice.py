"""What a policy chose, in words: its price, the fastest other partition, and in the end what was measured.

It does not decide anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from splitwise_llm.cost import Price, World, best_chunk, default_chunk, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Always, Observation, Occasion, Policy
from splitwise_llm.policies import find_policy, with_low_level
from splitwise_llm.policies.chains import Flow
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.policies.low_level import level_for, parse_level
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.pipelines import EdgeShard, Program
from splitwise_llm.policies.solver import Solver
from splitwise_llm.rebuild import Fill
from splitwise_llm.records import RequestRecord


def asked_policy(
    name: str,
    partition: str,
    wire: WirePrecision | None,
    chunk: int | None,
    allow_lossy: bool,
    in_flight: int | None = None,
    low_level: str = "",
    machines: int = 1,
) -> Policy | None:
    """The policy of a name; None for no name. `in_flight` sequences will be under way at a time (None: a single one
    is asked for), on so many machines. Raises RequestError for an unknown one, one that needs several sequences or
    machines, and for options that say what it is to find out."""
    if not name:
        if allow_lossy:
            raise RequestError("--allow-lossy is for a --policy; with a --partition write --wire int8 or int4")
        if low_level:
            raise RequestError("--low-level says how a --policy finds plans; name one, as in --policy drift")
        return None
    if partition:
        raise RequestError("--policy and --partition exclude each other: give the one that is to decide")
    if wire is not None or chunk is not None:
        raise RequestError(
            "with --policy the wire precision and the chunk are the policy's to choose: leave out --wire and --chunk; "
            "--allow-lossy lets it use int8 and int4"
        )
    low = parse_level(low_level)
    policy = with_low_level(find_policy(name), low)
    level_for(low, machines)  # what cannot be is said before any machine is asked
    if not isinstance(policy, EdgeShard):
        return policy
    if policy.program is Program.THROUGHPUT and in_flight is None:
        raise RequestError(
            f"{name} plans for several sequences in flight, and one would only wait in its pipeline: give more with "
            "--prompts FILE, or use edgeshard-exact"
        )
    return replace(policy, flow=Flow(1, in_flight or 1))  # whose caches all machines hold


@dataclass(frozen=True, slots=True)
class Insisting:
    """A policy whose decisions wait as long, and keep a shadow, as a person said."""

    policy: Policy
    patience: float | None
    shadow: bool

    @classmethod
    def where_asked(cls, policy: Policy, patience: float | None, shadow: bool) -> Policy:
        """The policy itself where nothing was said."""
        return cls(policy, patience, shadow) if shadow or patience is not None else policy

    def decide(self, observation: Observation) -> Decision:
        """What the policy decides, but for these."""
        decision = self.policy.decide(observation)
        patience = decision.patience if self.patience is None else self.patience
        return replace(decision, patience=patience, shadow=self.shadow or decision.shadow)


@dataclass(frozen=True, slots=True)
class Chunked:
    """A partition that was given, whose prompt is cut as its price says; by a rule where nobody has measured."""

    policy: Always

    def decide(self, observation: Observation) -> Decision:
        """The decision with a chunk; the one there is if it goes on with a generation."""
        decision = self.policy.decide(observation)
        if observation.placement is not None:
            return observation.placement.decision
        if observation.world is None:
            return replace(decision, prefill_chunk=default_chunk(decision, observation.prompt_tokens))
        conditions = observation.world.conditions(observation.loads)
        return replace(decision, prefill_chunk=best_chunk(observation.world, decision, observation.job, conditions))


@dataclass(frozen=True, slots=True)
class Explained:
    """A policy that says what it chose: at admission before anything is opened, so that no token waits for the
    explanation; in flight, where it is asked beside the generation, in one line when it stays."""

    policy: Policy
    called: str
    names: Sequence[str]
    say: Callable[[str], None]
    besides: Callable[[Observation], Iterator[str]] | None = None
    """What else there is to say of this policy."""

    def decide(self, observation: Observation) -> Decision:
        """What the policy decides."""
        decision = self.policy.decide(observation)
        says = explanation if observation.placement is None else move
        for line in says(self.called, decision, observation, self.names):
            self.say(line)
        for line in self.besides(observation) if self.besides else ():
            self.say(line)
        return decision


def explanation(called: str, decision: Decision, observation: Observation, names: Sequence[str]) -> Iterator[str]:
    """The choice, its price, and the fastest other partition with its own, a line each."""
    yield f"{called} chooses {decision_text(decision, names)}"
    if observation.world is None:
        yield f"  {observation.unpriced('a price')}"
        return
    world, job = observation.world, observation.job
    conditions = world.conditions(observation.loads)
    yield f"  predicted: {_price(price(world, decision, job, conditions))}"
    for without, plain in _without(decision):
        yield f"  {without}: {_price(price(world, plain, job, conditions))}{_right(world) if decision.draft else ''}"
    other = _fastest_other(world, decision, observation)
    if other is None:
        yield "  no other partition is admissible"
    else:
        said = _price(price(world, other, job, conditions))
        yield f"  fastest other partition: {decision_text(other, names)}: {said}"


_WHY = {
    Occasion.ADMISSION: "admission",
    Occasion.EPOCH: "asked regularly",
    Occasion.LINK: "a link changed class",
    Occasion.LOAD: "a machine's load changed class",
    Occasion.FAULT: "a machine was lost",
    Occasion.RETURN: "a machine is back",
}


def move(called: str, decision: Decision, observation: Observation, names: Sequence[str]) -> Iterator[str]:
    """A decision in flight: when, why, and the rest with it. If it moves, also what is believed of the links, the rest
    without moving, and the way there, a line each."""
    placement = observation.placement
    assert placement is not None
    present = placement.decision
    moves = replace(decision, draft=present.draft) != present
    told = f"{called} {'moves to' if moves else 'stays on'} {decision_text(decision, names)}"
    if not moves and decision.draft != present.draft:
        told += f" instead of {_drafts(present.draft)}"
    running = Running.of(observation) if observation.world else None
    rest = f": {_rest(running, decision)}{_right(running.world)}" if running and not moves else ""
    yield f"token {placement.tokens_out}, {observation.waited_s:.1f} s, {_WHY[observation.occasion]}: {told}{rest}"
    if not moves:
        return
    if running is None:
        yield f"  {observation.unpriced('a price')}"
        return
    yield from _believed(observation, running.world, names)
    forbidden = obstacle(running.world, present, running.job, running.limits)
    yield f"  staying on {decision_text(present, names)}: {forbidden or _rest(running, present)}"
    yield f"  moving, the way there included: {_rest(running, decision)}"
    yield f"  the way there: {_way(running, decision, names)}"


def _believed(observation: Observation, world: World, names: Sequence[str]) -> Iterator[str]:
    """Links within reach, with the age of each figure where somebody keeps it."""

    def old(age_s: float | None) -> str:
        if age_s is None:
            return ""
        return f" ({age_s:.1f} s old)" if age_s < float("inf") else " (never measured)"

    for pair, link in sorted(world.links.items()):
        if not set(pair) & observation.limits.unreachable:
            ages = observation.ages_s.get(pair)
            rtt, up, down = (ages.rtt_s, ages.up_s, ages.down_s) if ages else (None, None, None)
            yield (
                f"  believed of {names[pair[0]]}-{names[pair[1]]}: RTT {1e3 * link.rtt_s:.1f} ms{old(rtt)}, "
                f"up {8e-6 * link.up_bytes_per_s:.3g} Mbit/s{old(up)}, "
                f"down {8e-6 * link.down_bytes_per_s:.3g} Mbit/s{old(down)}"
            )


def _rest(running: Running, decision: Decision) -> str:
    one = running.prices([decision])
    joules = f", {float(one.device_j[0]):.3g} J on the device" if one.total_j[0] else ""
    return f"{float(one.total_s[0]):.3g} s for about {running.tokens} tokens{joules}"


def _way(running: Running, decision: Decision, names: Sequence[str]) -> str:
    """Seconds, and which halves are computed again or carried, by whom."""
    if not running.placement.tokens_out:
        return "the prompt from its start, for no token is there yet"
    way = running.moving(decision)
    said = []
    for chosen in way.choose(running.conditions):
        if isinstance(chosen, Fill):
            source = "the ids" if chosen.first == 0 else f"what {names[chosen.feeder]} keeps"
            said.append(f"layers {chosen.first / 2:g} to {chosen.stop / 2:g} computed again from {source}")
        else:
            said += [f"{each.num_units} caches carried from {names[each.src]} to {names[each.dst]}" for each in chosen]
    return f"{float(way.seconds(running.conditions)):.3g} s: {'; '.join(said) or 'nothing is missing'}"


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


def decision_text(decision: Decision, names: Sequence[str]) -> str:
    """A decision in words."""
    drafts = f", {_drafts(decision.draft)}" if decision.draft else ""
    if len(decision.partition.machines) == 1:
        return decision.partition.text(names) + drafts
    chunks = f"chunks of {decision.prefill_chunk}" if decision.prefill_chunk else "the prompt at once"
    return f"{decision.partition.text(names)}, {decision.wire} on the wire, {chunks}{drafts}"


def _drafts(draft: int) -> str:
    return f"up to {draft} drafted tokens a step" if draft else "no drafts"


def _right(world: World) -> str:
    """How often drafted tokens are taken to be right, as last seen."""
    return f" (a drafted token is right in {100 * world.drafter.acceptance:.0f} % of cases)"


def _without(decision: Decision) -> Iterator[tuple[str, Decision]]:
    """The same partition without each tool that was chosen: what the tool is worth is the difference."""
    if decision.draft:
        yield "without drafts", replace(decision, draft=0)
    if decision.prefill_chunk is not None:
        yield "with the prompt at once", replace(decision, prefill_chunk=None)


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
