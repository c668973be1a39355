"""One session's question as a row of a menu, and the answer as a decision. It chooses nothing.

A table holds at most 64 plans. Which ones, is sought once per model, machines, floor, tools and class of request, under
conditions around those of then; their bills are those of the request itself. What is asked without figures, or about
more machines than two, has no row here: `Unfit` says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import log2

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import (
    IDLE,
    Bill,
    Form,
    Host,
    Job,
    Limits,
    Load,
    Table,
    World,
    bill,
    memory_bytes,
    obstacle,
)
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Menu, Observation, Placement, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.entries import Entries
from splitwise_llm.policies.menus import MAX_PLANS, menu
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.policies.planners import PLANNERS, typical
from splitwise_llm.rebuild import Holdings
from splitwise_llm.spec import LinkSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hosts = tuple[Host, ...]
Bools = NDArray[np.bool_]

WORKER = 1
RATES, TRIPS = (1 / 16, 1 / 4, 1.0, 4.0), (1 / 4, 1.0, 4.0)
"""Times the rates and the round-trip time of now: the links among which plans are sought."""
SLOW = 4.0
"""The same of the worker's step time."""
REACH = 2.0
"""A link that is faster or slower than these by more than this factor is sought plans for anew."""
REMEMBERED = 8
"""Sets of plans, and tables."""
ROOMY_BYTES = 1e15
ROOMS = 8
"""Steps of the model for which a machine has room, beyond which it is room enough."""
_SEEKING = tuple(row for row in PLANNERS if row.name in ("edge-only", "cloud-only", "router"))


class Unfit(RequestError):
    """A question that is no row of a table."""


@dataclass(frozen=True, slots=True, eq=False)
class Plans:
    """A table, and what is known of its plans whatever the conditions."""

    table: Table
    tools: Tools
    limits: Limits
    """Without who is out of reach."""
    numbers: dict[Decision, int]
    entries: Entries
    uses: Bools
    """(plans, machines)"""
    memory: Floats
    """(plans, machines): bytes needed; 0 where a machine is not used."""
    lawful: Bools
    """(plans,): nothing but memory and reach can forbid it."""

    cut: Ints
    """(plans,): equal where only chunks, drafts and the precision for prompts differ."""
    sends: Ints
    """(plans,): equal where a prompt is cut into as large pieces, in the same precision."""

    @classmethod
    def of(cls, world: World, tools: Tools, limits: Limits, bills: Sequence[Bill]) -> Plans:
        """At least one bill, all of the same job."""
        table, chosen = Table(world, bills), [one.decision for one in bills]
        roomy = replace(world, hosts=_roomy(world.hosts))
        machines = range(len(world.hosts))
        uses = np.array([[m in one.partition.machines for m in machines] for one in chosen])
        cuts: dict[tuple[object, ...], int] = {}
        sends: dict[tuple[object, ...], int] = {}
        return cls(
            table, tools, limits, {one: number for number, one in enumerate(chosen)}, Entries(world, chosen), uses,
            np.where(uses, np.array([one.memory_bytes for one in bills]), 0.0),
            np.array([tools.allow(one) and obstacle(roomy, one, bills[0].job, limits) is None for one in chosen]),
            np.array([cuts.setdefault((one.partition, one.wire), len(cuts)) for one in chosen]),
            np.array([sends.setdefault((one.prefill_chunk, one.prefill_wire), len(sends)) for one in chosen]),
        )  # fmt: skip

    _latest: list[tuple[Decision, int | None]] = field(default_factory=list, repr=False)

    @property
    def job(self) -> Job:
        return self.table.bills[0].job

    def number(self, decision: Decision) -> int | None:
        """Of a plan; None where it is not in the table. The one asked for last is known by itself: comparing large
        partitions takes longer than all the rest."""
        if self._latest and self._latest[0][0] is decision:
            return self._latest[0][1]
        found = self.numbers.get(decision)
        self._latest[:] = [(decision, found)]
        return found

    def with_plan(self, decision: Decision) -> Plans:
        """With the plan that a session runs; in a full table, instead of the last one."""
        world = self.table.world
        kept = self.table.bills[: MAX_PLANS - 1]
        return Plans.of(world, self.tools, self.limits, [*kept, bill(world, decision, self.job)])

    def alike(self, number: int) -> Bools:
        """(plans,): what differs from a plan in no more than drafts and how a prompt is sent, but for those that differ
        in drafts alone: once the prompt is over they are the same, and no reason for another run."""
        result: Bools = (self.cut == self.cut[number]) & (self.sends != self.sends[number])
        return result

    def possible(self, world: World, unreachable: frozenset[int]) -> Bools:
        """(plans,): what nothing forbids, as `cost.obstacle` has it."""
        have = np.array([host.device.memory_bytes for host in world.hosts])
        result: Bools = self.lawful & (self.memory <= have).all(axis=1)
        for machine in unreachable:
            result &= ~self.uses[:, machine]
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A row, and the session it is about."""

    observation: Observation
    plans: Plans
    menu: Menu
    is_possible: Bools
    """(plans,): nothing forbids it; the menu leaves out some that are the present one in all that counts, too."""

    @property
    def present(self) -> int:
        """The number of the plan that runs; -1 at admission."""
        return int(self.menu.current[0])

    def decision(self, choice: int, patience: float, *, shadow: bool) -> Decision:
        """What the number of a plan, or a number below 0 for the present one, means for the session."""
        placement = self.observation.placement
        chosen = self.plans.table.bills[choice].decision
        found = placement.decision if placement is not None and choice < 0 else chosen
        is_so = found.patience == patience and found.shadow is shadow
        return found if is_so else replace(found, patience=patience, shadow=shadow)


def ask(observation: Observation, plans: Plans) -> Question:
    """The row of a session. Raises Unfit where none of the plans is possible now."""
    world, placement = observation.world, observation.placement
    assert world is not None
    unreachable = observation.limits.unreachable
    gone = {number for number, view in enumerate(observation.machines) if not view.reachable}
    possible = plans.possible(world, unreachable | gone)
    if not possible.any():
        raise Unfit("none of the table's plans is possible now")
    size, admissible = len(plans.table), possible
    x = world.conditions(observation.loads)
    entries, current = np.zeros((3, 1, size)), -1
    if placement is not None:
        number = plans.number(placement.decision)
        if number is None:
            raise Unfit("the table lacks the plan that runs")
        current = number
        if placement.tokens_out and possible[current]:
            admissible = possible & ~plans.alike(current)
        entries[:, 0] = _entries(observation, plans, placement, current, x, unreachable | gone)
    row = Menu(
        plans.table, x[None], admissible[None], np.array([observation.queues]), np.array([observation.virtual]),
        np.array([current]), np.array([float(observation.remaining_tokens)]), entries[0], entries[1], entries[2],
        np.array([observation.waited_s]), observation.past,
    )  # fmt: skip
    return Question(observation, plans, row, possible)


def _entries(
    observation: Observation, plans: Plans, placement: Placement, current: int, x: Form, gone: frozenset[int] | set[int]
) -> Floats:
    """(3, plans): seconds until the generation can go on with each plan, and of them work of device and worker."""
    if not placement.tokens_out:
        return _prompt(plans, placement, current, x)
    held = placement.holdings
    if held is None:
        world = plans.table.world
        held = Holdings.of(placement.decision.partition, placement.context, len(world.hosts), world.direct)
    for machine in gone:
        held = held.without(machine)
    job = observation.job
    found = plans.entries.at(
        held, placement.context, job.prompt_tokens + observation.max_new_tokens, x,
        placement.decision.partition.machines,
    )  # fmt: skip
    result = np.array(found)
    if placement.holdings is None:
        result[:, plans.entries.place == plans.entries.place[current]] = 0.0
    return result


def _prompt(plans: Plans, placement: Placement, current: int, x: Form) -> Floats:
    """As `in_flight.Running` has it: every plan starts with the prompt, the present one with its rest."""
    prompt = plans.table.at(x, np.zeros(1))
    ways = np.stack([prompt.total_s, prompt.work.device_s, prompt.work.cloud_s])
    left = max(1 - placement.context / plans.job.prompt_tokens, 0.0)
    ways[:, current] *= left
    ways[0, current] -= left * float(prompt.wait_s[current])
    return ways


@dataclass(frozen=True, slots=True, eq=False)
class _Sought:
    """Which plans are good for some machines and a class of requests, and the link they were sought for."""

    key: tuple[object, ...]
    world: World
    decisions: tuple[Decision, ...]

    def covers(self, world: World) -> bool:
        """Whether the link of now is among those that were tried."""
        then, now = self.world.links[DEVICE, WORKER], world.links[DEVICE, WORKER]
        up, down = now.up_bytes_per_s / then.up_bytes_per_s, now.down_bytes_per_s / then.down_bytes_per_s
        rates = all(RATES[0] / REACH <= ratio <= RATES[-1] * REACH for ratio in (up, down))
        least = TRIPS[0] * then.rtt_s / REACH  # a shorter one than that is as good as none
        return rates and now.rtt_s <= max(TRIPS[-1] * then.rtt_s * REACH, 1e-3) and (now.rtt_s >= least or least < 5e-3)


@dataclass(slots=True, eq=False)
class Shelf:
    """The tables of a process, made once and kept."""

    _sought: deque[_Sought] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _tables: deque[tuple[tuple[object, ...], Plans]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _machines: deque[tuple[Hosts, Job, Hosts, tuple[int, ...]]] = field(
        default_factory=lambda: deque(maxlen=REMEMBERED)
    )
    made: int = 0
    """Tables."""

    def plans(self, observation: Observation) -> Plans:
        """Of an observation that is fit, the plan that it runs included. Raises Unfit, RequestError."""
        why = unfit(observation)
        world, placement, job, tools = observation.world, observation.placement, observation.job, observation.tools
        if why or world is None:
            raise Unfit(why)
        limits = observation.limits
        if limits.unreachable:
            limits = replace(limits, unreachable=frozenset())
        sought = self._seek(world, job, tools, limits, observation.loads.get(WORKER, IDLE))
        key = (sought, world.drafter, job)
        found = self._known(key)
        if found is None:  # what requests are measured by is the link as it was at admission
            then = replace(world, links=(observation.nominal or world).links)
            found = self._keep(key, Plans.of(then, tools, limits, [bill(then, one, job) for one in sought.decisions]))
        if placement is None or found.number(placement.decision) is not None:
            return found
        present = (*key, placement.decision)
        return self._known(present) or self._keep(present, found.with_plan(placement.decision))

    def _known(self, key: tuple[object, ...]) -> Plans | None:
        return next((plans for known, plans in self._tables if _same(known, key)), None)

    def _keep(self, key: tuple[object, ...], plans: Plans) -> Plans:
        self.made += 1
        self._tables.appendleft((key, plans))
        return plans

    def _seek(self, world: World, job: Job, tools: Tools, limits: Limits, load: Load) -> _Sought:
        hosts, rooms = self._known_machines(world, job)
        key = (
            hosts, rooms, world.spec, world.accuracy, _class(job.prompt_tokens), _class(job.tokens_out),
            round(4 * world.drafter.acceptance), tools, limits,
        )  # fmt: skip
        for known in self._sought:
            if _same(known.key, key) and known.covers(world):
                return known
        found = _Sought(key, world, tuple(seek(world, job, tools, limits, load)))
        self._sought.appendleft(found)
        return found

    def _known_machines(self, world: World, job: Job) -> tuple[Hosts, tuple[int, ...]]:
        """Machines but for their memory, and of how much of the model there is room in each: free memory wavers."""
        for known, of_job, hosts, rooms in self._machines:
            if known is world.hosts and of_job == job:
                return hosts, rooms
        hosts = _roomy(world.hosts)
        hosts = next((one for _, _, one, _ in self._machines if one == hosts), hosts)
        whole = [
            memory_bytes(world, Partition.all_on(world.spec, m), m, job, None) for m in range(len(world.hosts))
        ]  # fmt: skip
        rooms = tuple(
            min(int(ROOMS * host.device.memory_bytes / need), ROOMS + 1)
            for host, need in zip(world.hosts, whole, strict=True)
        )
        self._machines.appendleft((world.hosts, job, hosts, rooms))
        return hosts, rooms


def _roomy(hosts: Hosts) -> Hosts:
    return tuple(replace(host, device=replace(host.device, memory_bytes=ROOMY_BYTES)) for host in hosts)


def unfit(observation: Observation) -> str:
    """Why a question is no row of a table; empty where it is."""
    world, views = observation.world, observation.machines
    if world is None:
        return "nobody has measured these machines"
    if len(world.hosts) != WORKER + 1:
        return "it was trained with one worker"
    if len(views) > WORKER and not views[WORKER].reachable:
        return "the worker was never met, so its figures are nobody's"
    return ""


def seek(world: World, job: Job, tools: Tools, limits: Limits, load: Load) -> list[Decision]:
    """What is best under conditions around the present ones, and what is purely on one machine. Raises RequestError
    where nothing is admissible."""
    link = world.links[DEVICE, WORKER]
    states = [_state(world, link, rate, trip, load) for rate, trip in product(RATES, TRIPS)]
    busy = Load(load.slow * SLOW, load.batch * SLOW, load.join_s, load.wait_s)
    states += [_state(world, link, rate, 1.0, busy) for rate in RATES]
    penalty, weights = typical(world, job, tools, limits)
    table = menu(
        world, job, (tools,), limits, states, [DriftPlusPenalty(penalty, weights)], planners=_SEEKING
    )  # fmt: skip
    return [one.decision for one in table.bills]


def _state(world: World, link: LinkSpec, rate: float, trip: float, load: Load) -> Form:
    changed = LinkSpec(trip * link.rtt_s, rate * link.up_bytes_per_s, rate * link.down_bytes_per_s)
    return world.basis.conditions({**world.links, (DEVICE, WORKER): changed}, {WORKER: load})


def _class(tokens: int) -> int:
    """Of lengths: by factors of two."""
    return round(log2(tokens))


def _same(known: Sequence[object], key: Sequence[object]) -> bool:
    return len(known) == len(key) and all(a is b or a == b for a, b in zip(known, key, strict=True))
