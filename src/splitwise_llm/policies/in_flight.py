"""What a running request may do next: the rest of it priced, the way there included. It moves nothing.

| who | is asked in flight | answers |
| --- | --- | --- |
| decides at every epoch | always | the least value of the rest, moving included |
| decides once | the plan is still possible | that plan; or back to what it chose at admission, if that is cheaper |
| decides once | a machine of the plan is lost | what it chose at admission, else what it decides among what is left |
| decides once | and nothing it considers is left | the fastest of the pure plans and cuts, moving included |

What keeps a request where it is, is the price of moving alone: there is no threshold, and equal values mean staying.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Entry, Form, Host, Job, Limits, Prices, Table, World, bill, obstacle
from splitwise_llm.cost.moving import Moving, moving_from
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Observation, Placement, usable_bytes
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import rules
from splitwise_llm.policies.objective import Latency, Objective
from splitwise_llm.rebuild import Holdings
from splitwise_llm.spec import DeviceSpec, LinkSpec

Floats = NDArray[np.float64]

SAME = 1e-9
"""Values that differ by less than this part of them are equal: arithmetic, not hysteresis."""


def is_less(value: float, other: float) -> bool:
    """Whether a value is smaller than another, rounding apart."""
    return value < other - SAME * abs(other)


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """A request in flight under the conditions of now."""

    world: World
    conditions: Form
    job: Job
    limits: Limits
    """Machines out of reach included."""
    placement: Placement
    tokens: int
    """Expected still to come."""
    holdings: Holdings
    """Who is out of reach has nothing."""

    @classmethod
    def of(cls, observation: Observation, world: World | None = None) -> Running:
        """What is observed in flight; `world` replaces the observed one. Raises RequestError without any."""
        placement, world = observation.placement, world or observation.world
        if placement is None or world is None:
            raise RequestError(observation.unpriced("the rest of a request") if placement else "nothing is in flight")
        limits = reachable(observation)
        held = placement.holdings
        if held is None:
            held = Holdings.of(placement.decision.partition, placement.context, len(world.hosts), world.direct)
        for machine in limits.unreachable:
            held = held.without(machine)
        return cls(
            world, world.conditions(observation.loads), observation.job, limits, placement,
            observation.remaining_tokens, held,
        )  # fmt: skip

    @property
    def present(self) -> Decision:
        return self.placement.decision

    def is_possible(self, decision: Decision) -> bool:
        """Whether nothing forbids a decision now."""
        return obstacle(self.world, decision, self.job, self.limits) is None

    def moving(self, decision: Decision) -> Moving:
        """The way to a decision from what the machines have."""
        admitted = {*self.holdings.holders, *self.present.partition.machines}
        return moving_from(self.world, self.holdings, decision, self.placement.context, admitted=admitted)

    def prices(self, decisions: Sequence[Decision]) -> Prices:
        """The rest of the request with each decision, the way there included; staying costs nothing, unless it is
        known that machines have lost what they had."""
        table = Table(self.world, [bill(self.world, decision, self.job) for decision in decisions])
        if self.placement.tokens_out:
            ways = np.array([self._way(decision) for decision in decisions]).T
        else:
            ways = self._prompt(table)
        return table.at(self.conditions, np.array([float(self.tokens)]), Entry(*ways))

    def _way(self, decision: Decision) -> tuple[float, float, float]:
        """Seconds, and of them work of the device and of the others. What is carried is nobody's work."""
        if self.placement.holdings is None and decision.partition == self.present.partition:
            return 0.0, 0.0, 0.0
        way = self.moving(decision)
        chosen = way.choose(self.conditions)
        filled = [gain for gain in way.gains if gain.gap.fill in chosen]
        device_s = sum(gain.busy_s[DEVICE] for gain in filled)
        return float(way.seconds(self.conditions)), device_s, sum(sum(gain.busy_s) for gain in filled) - device_s

    def _prompt(self, table: Table) -> Floats:
        """The same where there is no token yet: every plan starts with the prompt, the present one with its rest."""
        prompt = table.at(self.conditions, np.zeros(1))
        ways = np.stack([prompt.total_s, prompt.work.device_s, prompt.work.cloud_s])
        left = max(1 - self.placement.context / self.job.prompt_tokens, 0.0)
        for number, each in enumerate(table.bills):
            if each.decision == self.present:
                ways[:, number] *= left
                ways[0, number] -= left * float(prompt.wait_s[number])
        return ways

    def values(self, objective: Objective, decisions: Sequence[Decision]) -> Floats:
        """(decisions,): what going on with each is worth; smaller is better."""
        return objective.value(self.prices(decisions)) if decisions else np.zeros(0)

    def best(self, objective: Objective, decisions: Sequence[Decision]) -> Decision:
        """The least value; of equal ones the first."""
        values = self.values(objective, decisions)
        return decisions[int(np.flatnonzero(values <= values.min() + SAME * abs(values.min()))[0])]

    def answer(self, decision: Decision) -> Decision:
        """A decision with the patience of the present one, for which nobody has said anything else."""
        return replace(decision, patience=self.present.patience, shadow=self.present.shadow)


def reachable(observation: Observation) -> Limits:
    """The limits, with all machines that are seen to be out of reach."""
    gone = {number for number, view in enumerate(observation.machines) if not view.reachable}
    return replace(observation.limits, unreachable=observation.limits.unreachable | gone)


def unmeasured(observation: Observation) -> World:
    """Machines of which nothing but the memory is known; speeds and links stand for nothing and price nothing."""
    hosts = tuple(
        Host(DeviceSpec(view.name, 1e9, 1e9, usable_bytes(view.memory_bytes)), view.dtype, view.weights)
        for view in observation.machines
    )
    links = {(DEVICE, worker): LinkSpec(0.0, 1e9, 1e9) for worker in range(1, len(hosts))}
    return World(observation.model, hosts, links)


def decided_once(
    observation: Observation, anew: Callable[[Observation], Decision], objective: Objective | None = None
) -> Decision:
    """What a policy answers in flight that decides only at admission: see the table above. `anew` decides among what
    the limits of the observation it is given allow; `objective` (None: seconds) compares what it chose at admission
    with staying. Raises RequestError where nothing at all is possible."""
    placement = observation.placement
    if placement is None:
        return anew(observation)
    measured = observation.world is not None
    running = Running.of(observation, observation.world or unmeasured(observation))
    objective = objective or Latency()
    present, first = placement.decision, placement.admitted or placement.decision
    stays = running.is_possible(present)
    returns = first.partition != present.partition and running.is_possible(first)
    if returns and (not stays or (measured and running.best(objective, [present, first]) == first)):
        return first
    if stays:
        return present
    try:
        return running.answer(anew(replace(observation, limits=running.limits)))
    except RequestError:
        return running.answer(_instead(running, observation, objective if measured else None))


def _instead(running: Running, observation: Observation, objective: Objective | None) -> Decision:
    """The best pure plan or cut, where a policy has none of its own left; the first, where nothing is measured."""
    said = list[str]()
    wire = observation.tools.wires[0]
    for rule in (rules.either, rules.cuts):
        plans = [Decision(partition, wire) for partition in rules.that_exist(rule, running.world, running.limits)]
        possible = [plan for plan in plans if running.is_possible(plan)]
        if possible:
            return running.best(objective, possible) if objective else possible[0]
        said += [obstacle(running.world, plan, running.job, running.limits) or "allowed" for plan in plans]
    raise RequestError(
        "nothing can go on with this request: " + "; ".join(list(dict.fromkeys(said))[:4]) + "; wait for a machine to "
        "come back, or use machines with more memory"
    )
