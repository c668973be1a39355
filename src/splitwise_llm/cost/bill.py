"""What a decision costs a job before the conditions are known: its time and spending as forms over them.

Rules of counting, one formula each:

- one walk through the stages costs what its machines compute, one after another, plus every crossing on the way; a
  shared half ends when the last partial sum has arrived at each machine that adds them (a barrier);
- a crossing costs `rtt/2 + bytes/rate`, and the software at both ends;
- K prefill chunks overlap as in a pipeline: a mean walk plus (1 - 1/K) of what the busiest machine or link has to do;
- a token costs one walk of the loop: the way back to the embedding counts unless the head is on its machine, and a
  visit to a shared machine waits for its running iteration unless the loop never leaves it. Where the loop passes the
  device, the device's software for a token lies in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import counts
from splitwise_llm.cost.hosts import stage_seconds
from splitwise_llm.cost.terms import NOTHING, Delay, Form, Pair
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE, Kind, Move, Plan, Serial, Stage, Step

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Spending:
    """What one phase takes besides time, as forms."""

    device_j: Form
    """J of the device beyond idling."""
    others_j: Form
    """J of all other machines beyond idling."""
    usd: Form
    """Rent and traffic; electricity apart."""
    device_s: Form
    """Seconds of work for the device, alone."""
    up_s: Form
    down_s: Form
    """Seconds of work for what leaves the device, and for what reaches it."""
    cloud_s: Form
    """Seconds of work for the other machines, alone; decoding on a shared one counts by slots, elsewhere."""


@dataclass(frozen=True, slots=True, eq=False)
class Bill:
    """One decision's costs for one job, before the conditions are known. Sequences are per machine."""

    decision: Decision
    plan: Plan
    job: Job
    ttft: Delay
    """s from the prompt to the first token, waiting for admission apart."""
    tpot: Delay
    """s per later token."""
    wait: Delay
    """s until every machine has admitted the session."""
    prefill_busy_s: tuple[float, ...]
    """Compute of the prompt, each machine alone."""
    token_busy_s: tuple[float, ...]
    """Compute per later token, each machine alone."""
    prefill_bytes: dict[Pair, float]
    """Payload per directed link until the first token."""
    token_bytes: dict[Pair, float]
    """Payload per directed link and later token."""
    prompt: Spending
    """Until the first token."""
    token: Spending
    """Per later token."""
    others_idle_w: float
    """W of machines that serve nobody else, for as long as the request lasts."""
    memory_bytes: tuple[float, ...]
    """Weights, cache, buffers of the job."""
    nats: float
    """Per token."""

    @property
    def later_tokens(self) -> int:
        return self.job.tokens_out - 1

    def busy_s(self, machine: int) -> float:
        """Compute of the whole request on a machine, alone."""
        return self.prefill_busy_s[machine] + self.later_tokens * self.token_busy_s[machine]

    def lane_bytes(self, src: int, dst: int) -> float:
        """Payload of the whole request over one directed link."""
        return self.prefill_bytes.get((src, dst), 0.0) + self.later_tokens * self.token_bytes.get((src, dst), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Lead:
    """Two machines that share halves do not wait for each other but for each other's messages: their clocks stay about
    one way apart, and whoever is ahead is behind after the next half. Who had the stream first begins ahead."""

    ahead: int
    behind: int
    lag: Form
    """How much later the one behind can begin."""


@dataclass(slots=True)
class _Walk:
    """One walk through the stages of a plan, as forms."""

    world: World
    plan: Plan
    step: Step
    critical: list[Delay]
    busy_s: list[float]
    bytes: defaultdict[Pair, float]
    ended_on: int | None = None
    """The machine of the last serial stage; after a shared one, none."""
    lead: Lead | None = None
    """In a run of halves shared by two machines: which of them is ahead."""

    @classmethod
    def of(cls, world: World, plan: Plan, step: Step) -> _Walk:
        walk = cls(world, plan, step, [], [0.0] * len(world.hosts), defaultdict(float))
        walk._enter()
        arrivals: dict[int, Form] = {}
        for index, stage in enumerate(plan.stages):
            if isinstance(stage, Serial) and stage.is_head_only and not step.emits:
                break
            arrivals = walk._stage(index, stage, arrivals)
        walk._hand_over()
        return walk

    @property
    def seconds(self) -> Delay:
        return Delay(group for delay in self.critical for group in delay.groups)

    def _enter(self) -> None:
        """Ids reach the embedding. While tokens flow, a machine with both ends never waits for any."""
        for move in self.plan.moves:
            if move.kind in (Kind.PROMPT, Kind.NEXT) and self.plan.rows(move, self.step):
                self.critical.append(Delay.of([self._crossing(move)]))
        loops = not self.step.is_prefill and self.plan.embed == self.plan.head
        self.ended_on = self.plan.embed if loops else None

    def _hand_over(self) -> None:
        """The token reaches the device; the loop waits for it only if it starts there, else just for its sending."""
        for move in self.plan.moves:
            if move.kind is Kind.TOKEN and self.plan.rows(move, self.step):
                crossing = self._crossing(move)
                if not self.step.is_prefill and self.plan.embed == self.plan.head:
                    sending_s = self.world.hosts[move.src].sending_s(self.plan.payload_bytes(move, self.step))
                    crossing = self.world.basis.form({0: sending_s})
                self.critical.append(Delay.of([crossing]))
        if not self.step.is_prefill and (self.plan.embed != self.plan.head or self.plan.embed == DEVICE):
            self.critical.append(Delay.of([self.world.basis.form({0: self.world.hosts[DEVICE].token_s})]))

    def _stage(self, index: int, stage: Stage, arrivals: dict[int, Form]) -> dict[int, Form]:
        """Price a stage and what crosses after it; what the next stage's machines wait for."""
        plan = self.plan
        moves = [move for move in plan.moves_after(index) if plan.rows(move, self.step)]
        crossings = {(m.src, m.dst): self._crossing(m) for m in moves if m.kind is Kind.PARTIAL}
        lead = self._lead(stage, arrivals)
        late = {lead.behind: lead.lag} if lead else arrivals
        computed = {machine: late.get(machine, 0) + self._compute(stage, machine) for machine in stage.machines}
        joiners = plan.joiners[index] if crossings else stage.machines
        self.lead = None
        if lead and crossings and plan.stages[index + 1].machines == stage.machines:
            joiners = (lead.behind,)  # it goes on first; how late the other is then, is nobody's delay yet
            self.lead = Lead(lead.behind, lead.ahead, crossings[lead.behind, lead.ahead])
        ends = [computed[machine] for machine in joiners]
        ends += [computed[src] + crossing for (src, dst), crossing in crossings.items() if dst in joiners]
        ends += [form for move in moves if move.dst in joiners for form in self._queued(index, move, arrivals)]
        self.critical.append(Delay.of(ends))
        self.ended_on = stage.machine if isinstance(stage, Serial) else None
        return {move.dst: self._crossing(move) for move in moves if move.kind is Kind.RESIDUAL}

    def _queued(self, index: int, move: Move, arrivals: dict[int, Form]) -> list[Form]:
        """When a partial sum is there that left while the stream for the same half was still on the same way: on
        none of its legs does it overtake it."""
        before = any(m.kind is Kind.RESIDUAL and (m.src, m.dst) == (move.src, move.dst) for m in self._into(index))
        if move.kind is not Kind.PARTIAL or not before:
            return []
        size, basis = self.plan.payload_bytes(move, self.step), self.world.basis
        legs = self.plan.legs(move.src, move.dst)
        return [arrivals[move.dst] + basis.form({basis.inverse(*leg): size}) for leg in legs]

    def _into(self, index: int) -> list[Move]:
        return [move for move in self.plan.moves_after(index - 1) if self.plan.rows(move, self.step)] if index else []

    def _lead(self, stage: Stage, arrivals: dict[int, Form]) -> Lead | None:
        """Who is ahead in a half shared by two machines, if one is."""
        if self.lead or len(stage.machines) != 2 or len(arrivals) != 1:
            return self.lead
        ((behind, lag),) = arrivals.items()
        return Lead(next(machine for machine in stage.machines if machine != behind), behind, lag)

    def _compute(self, stage: Stage, machine: int) -> Form:
        basis = self.world.basis
        # Where the loop never leaves one machine, its caches still hold what the last token left there.
        rested = self.step.is_prefill or len(self.plan.decision.partition.machines) > 1
        visit = 0.0 if self.ended_on == machine else 1.0
        waited = self.step.is_prefill or visit > 0
        seconds = stage_seconds(self.world.spec, self.world.hosts[machine], stage, machine, self.step, rested, waited)
        self.busy_s[machine] += seconds
        return basis.form({basis.slow(machine): seconds, basis.join(machine): visit})

    def _crossing(self, move: Move) -> Form:
        """Latency of a message, leg by leg; its bytes are counted."""
        basis, hosts = self.world.basis, self.world.hosts
        size = self.plan.payload_bytes(move, self.step)
        form = basis.form({})
        for src, dst in self.plan.legs(move.src, move.dst):
            self.bytes[src, dst] += size
            software_s = hosts[src].message_s(size) + hosts[dst].message_s(size)
            form += basis.form({0: software_s, basis.rtt(src, dst): 0.5, basis.inverse(src, dst): size})
        return form


def _prefill(world: World, plan: Plan, job: Job) -> tuple[Delay, _Walk]:
    """Time to the first token, and the sums of all chunks in one walk."""
    chunks = plan.decision.num_chunks(job.prompt_tokens)
    steps = [plan.step(index, job.prompt_tokens) for index in range(chunks)]
    if chunks == 1:
        walk = _Walk.of(world, plan, steps[0])
        return walk.seconds, walk
    walks = [_Walk.of(world, plan, step) for step in steps]
    body = _Walk.of(world, plan, replace(steps[-1], emits=False))
    # What only the last chunk does (head, and the way to it) comes once, after the pipeline has run dry.
    end = _end_only(walks[-1], body)
    piped = _sum([*walks[:-1], body])
    mean = NOTHING
    for walk in (*walks[:-1], body):
        mean += walk.seconds.times(1 / chunks)
    basis = world.basis
    stations = [basis.form({basis.slow(m): seconds}) for m, seconds in enumerate(piped.busy_s) if seconds]
    stations += [basis.form({basis.inverse(*lane): size}) for lane, size in piped.bytes.items()]
    return mean + Delay.of(stations).times(1 - 1 / chunks) + end, _sum(walks)


def _sum(walks: Sequence[_Walk]) -> _Walk:
    """Compute and payload of some walks of one plan."""
    busy_s = [sum(each) for each in zip(*(walk.busy_s for walk in walks), strict=True)]
    total = replace(walks[0], critical=[], busy_s=busy_s, bytes=defaultdict(float))
    for walk in walks:
        for lane, size in walk.bytes.items():
            total.bytes[lane] += size
    return total


def _end_only(last: _Walk, body: _Walk) -> Delay:
    """What an emitting walk has beyond one that does not emit, in order: partial sums, stream, head, token."""
    plan, basis = last.plan, last.world.basis
    probe = replace(last, critical=[], busy_s=list(last.busy_s), bytes=defaultdict(float))
    only = [move for move in plan.moves_after(len(plan.stages) - 2) if move.last_only]
    together = [[move for move in only if move.kind is kind] for kind in (Kind.PARTIAL, Kind.RESIDUAL)]
    together += [[move] for move in plan.moves if move.kind is Kind.TOKEN]
    seconds = sum(last.busy_s) - sum(body.busy_s)
    visit = float(isinstance(plan.stages[-1], Serial) and plan.stages[-1].is_head_only)
    delays = [Delay.of([basis.form({basis.slow(plan.head): seconds, basis.join(plan.head): visit})])]
    delays += [Delay.of([probe._crossing(move) for move in moves]) for moves in together if moves]
    return Delay(group for delay in delays for group in delay.groups)


def _decode(world: World, plan: Plan, job: Job) -> tuple[Delay, list[float], dict[Pair, float]]:
    """Per later token: seconds, compute of each machine, payload of each lane."""
    draft = plan.decision.draft
    step = Step(1, job.mean_context - 1, draft + 1, emits=True, is_prefill=False)
    walk = _Walk.of(world, plan, step)
    delay = walk.seconds
    if draft and world.drafter.model is not None:
        basis = world.basis
        host = world.hosts[plan.embed]  # what was measured is another model's
        host = replace(host, measured=None, weights=world.drafter.weights or host.weights)
        seconds = draft * host.model_s(world.drafter.model, 1, job.mean_context)
        walk.busy_s[plan.embed] += seconds
        delay += Delay.of([basis.form({basis.slow(plan.embed): seconds})])
    tokens = world.drafter.tokens_per_round(draft)
    return (
        delay.times(1 / tokens),
        [seconds / tokens for seconds in walk.busy_s],
        {lane: size / tokens for lane, size in walk.bytes.items()},
    )


HELD_BACK = 0.1
"""Share of the memory that a person allows which no plan counts on: processes were measured to grow by up to 1.095 of
`memory_bytes`, since the C library keeps some of what tensors had and freed."""


def memory_bytes(
    world: World, partition: Partition, machine: int, job: Job, chunk: int | None, draft: int = 0
) -> float:
    """Weights, cache and activations of a job on a machine, and a drafting model; 0 where it has nothing to do."""
    if machine not in partition.machines:
        return 0.0
    spec, host = world.spec, world.hosts[machine]
    weights = counts.assigned_weight_bytes(spec, partition, machine, host.dtype, host.weights)
    positions = job.prompt_tokens + job.tokens_out
    cache = counts.assigned_kv_bytes(spec, partition, machine, host.dtype, positions)
    rows = min(chunk or job.prompt_tokens, job.prompt_tokens)
    buffers = counts.activation_bytes(spec, rows, host.dtype)
    drafter = world.drafter.model
    if draft and drafter is not None and machine == partition.embed:
        whole = Partition.all_on(drafter, machine)
        theirs = world.drafter.weights or host.weights
        weights += counts.assigned_weight_bytes(drafter, whole, machine, host.dtype, theirs)
        cache += counts.assigned_kv_bytes(drafter, whole, machine, host.dtype, positions)
    return weights + cache + buffers


def _spending(
    world: World, plan: Plan, busy_s: Sequence[float], lanes: Mapping[Pair, float], *, is_prefill: bool
) -> Spending:
    """What computing and carrying take. A server shared with others is paid by its part of a batch in decoding."""
    basis = world.basis
    device_j, others_j, usd, device_s, cloud_s, up_s, down_s = (basis.form({}) for _ in range(7))
    for machine in plan.decision.partition.machines:
        host, seconds = world.hosts[machine], busy_s[machine]
        device = host.device
        shared = host.is_shared and machine != DEVICE
        idle_w = 0.0 if shared else device.idle_w  # a server idles for the others, too
        watts = (device.prefill_w if is_prefill else device.decode_w) - idle_w
        # A prompt adds its own seconds to a shared machine's iterations, however many others are in them.
        place = (0 if is_prefill else basis.share(machine)) if shared else basis.slow(machine)
        active = basis.form({place: seconds})
        usd += device.usd_per_hour / 3600 * active
        if machine == DEVICE:
            device_j += watts * active
            device_s[0] += seconds
        else:
            others_j += device.pue * watts * active
            if is_prefill or not shared:
                cloud_s[0] += seconds
    for (src, dst), size in lanes.items():
        carried = basis.form({basis.inverse(src, dst): size})
        if src == DEVICE:
            up_s += carried
        if dst == DEVICE:
            down_s += carried
            if world.hosts[src].device.usd_per_hour:
                usd[0] += world.tariff.usd_per_gb_down * size / 1e9
    device_j += world.hosts[DEVICE].device.radio_w * (up_s + down_s)
    return Spending(device_j, others_j, usd, device_s, up_s, down_s, cloud_s)


def bill(world: World, decision: Decision, job: Job) -> Bill:
    """Price a decision for a job in a world. Raises PartitionError."""
    plan, basis = world.plan(decision), world.basis
    ttft, prompt = _prefill(world, plan, job)
    tpot, token_busy, token_bytes = _decode(world, plan, job)
    partition = decision.partition
    alone = [m for m in partition.machines if m != DEVICE and not world.hosts[m].is_shared]
    return Bill(
        decision,
        plan,
        job,
        ttft,
        tpot,
        wait=Delay.of([basis.form({basis.wait(machine): 1.0}) for machine in partition.machines]),
        prefill_busy_s=tuple(prompt.busy_s),
        token_busy_s=tuple(token_busy),
        prefill_bytes=dict(prompt.bytes),
        token_bytes=token_bytes,
        prompt=_spending(world, plan, prompt.busy_s, prompt.bytes, is_prefill=True),
        token=_spending(world, plan, token_busy, token_bytes, is_prefill=False),
        others_idle_w=sum(world.hosts[m].device.pue * world.hosts[m].device.idle_w for m in alone),
        memory_bytes=tuple(
            memory_bytes(world, partition, machine, job, decision.prefill_chunk, decision.draft)
            for machine in range(len(world.hosts))
        ),
        nats=world.accuracy.of(plan, [host.weights for host in world.hosts]),
    )


def flop(world: World, partition: Partition, job: Job, machine: int) -> float:
    """FLOP of a request's units on one machine: the prompt in one piece, and every later token at mean context."""
    spec, later = world.spec, job.tokens_out - 1
    total = 0.0
    for half in range(2 * spec.num_layers):
        part = Part.FFN if half % 2 else Part.ATTENTION
        units = len(partition.units_on(machine, half))
        if units:
            prompt = counts.unit_flop(spec, part, job.prompt_tokens, job.prompt_tokens)
            total += units * (prompt + later * counts.unit_flop(spec, part, 1, job.mean_context))
    return total + (job.tokens_out * counts.head_flop(spec) if partition.head == machine else 0.0)
