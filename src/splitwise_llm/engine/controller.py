"""When a session's policy is asked, what it is shown, and what becomes of its answer's price.

It is given a `Policy` and never asks which. It sends nothing, and holds no caches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from splitwise_llm.cost import IDLE, Job, Limits, World, moving_from, obstacle, price
from splitwise_llm.decision import Decision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.drafting import Drafting
from splitwise_llm.engine.greeting import ECHOES, Greeted
from splitwise_llm.engine.link_log import LinkLog
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.meters import battery_share
from splitwise_llm.engine.post import Extent
from splitwise_llm.engine.remembering import Epoch, Memory
from splitwise_llm.engine.survey import ASSUMED, Pair, Rates, Survey
from splitwise_llm.engine.telemetry import (
    Advert,
    ClassWatch,
    LinkFigures,
    LinkView,
    link_figures,
    link_watch,
    load_figures,
    load_watch,
)
from splitwise_llm.engine.walk import Request
from splitwise_llm.errors import RequestError, SplitwiseError
from splitwise_llm.observation import Always, Observation, Occasion, Past, Placement, Policy, Tools, innermost
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.rebuild import Fill, Holdings, Way, gaps
from splitwise_llm.records import HostRecord, Prediction, Setup
from splitwise_llm.spec import LinkSpec

EPOCH_TOKENS, EPOCH_S = 16, 1.0
"""A policy is asked again after so many tokens or seconds, whichever comes first (docs/lyapunov.md)."""
STUCK_S, STUCK_STEPS = 60.0, 20.0
"""A run whose machines answer pings is given up after so long, or so many times its predicted step, without a token."""
UNKNOWN_STEP_S = 0.25
"""Of machines that nobody has measured: what a step is taken to last until tokens say it."""
UNKNOWN_RATE = 2.5e5
"""Bytes/s of a link of which nobody said what it carries: a slow one is not taken for a dead one."""
RECENT = 0.2
"""Weight of the latest time between tokens in the average of what was seen."""


@dataclass(slots=True)
class Controller:
    """The policy of one session, and its prices."""

    machine: Machine
    names: Sequence[str]
    rates: dict[Pair, Rates]
    direct: frozenset[Pair]
    policy: Policy
    request: Request
    limits: Limits
    tools: Tools | None
    fits: Callable[[Partition], bool]
    """Whether the device has room for its part of a partition."""
    drafting: Drafting | None = None
    """Who proposes tokens on the device."""
    greeted: dict[int, Greeted] = field(default_factory=dict)
    impossible: set[Partition] = field(default_factory=set)
    """What machines have said that they cannot run."""
    refused: int = 0
    """Answers that could not be run."""
    figures: dict[int, LinkFigures] = field(default_factory=dict)
    adverts: dict[int, Advert] = field(default_factory=dict)
    joined: frozenset[int] = frozenset()
    """Workers at which the session is open."""
    log: LinkLog = field(default_factory=LinkLog)
    """What was measured, for the record."""
    memory: Memory | None = None
    """Of this device and its one worker; None: nobody remembers."""
    began_s: float = field(default_factory=time.monotonic)
    _links: dict[int, ClassWatch] = field(default_factory=dict)
    _loads: dict[int, ClassWatch] = field(default_factory=dict)
    _survey: Survey | None = None
    _nominal: World | None = None
    """As it was at admission."""
    _met: int = 0
    """Workers that had been greeted by then; when another is, its figures are known at last."""
    _seen: Observation | None = None
    _heard_s: dict[int, float] = field(default_factory=dict)
    """By worker, when there was news of it last."""
    _noted: asyncio.Queue[Occasion] = field(default_factory=asyncio.Queue)
    _since_token: int = 0
    _last_s: float = 0.0
    _asked_s: float = 0.0
    _start_j: float = 0.0
    _token_s: float | None = None

    @property
    def is_asked_again(self) -> bool:
        """Whether the policy may want something else later on; one that was told its answer does not."""
        return not isinstance(innermost(self.policy), Always)

    def begins_alone(self, alone: Partition) -> bool:
        """Whether a silent network need not hold up the first token: the device may do it all, and workers may still
        be used later."""
        may = self.limits.only is None or DEVICE in self.limits.only
        return self.is_asked_again and may and self.fits(alone)

    @property
    def echoes(self) -> int:
        """A partition that was given asks for no figures."""
        return ECHOES if self.is_asked_again else 0

    # Asking

    def observe(
        self, occasion: Occasion, placement: Placement | None, unreachable: frozenset[int] = frozenset()
    ) -> Observation:
        """What the policy is shown now."""
        self._survey = Survey(
            self.machine, self.names, self.greeted, self.rates, self.direct, self.figures, self.adverts,
            self.drafting.as_priced if self.drafting else None, self.joined,
        )  # fmt: skip
        limits = replace(self.limits, unreachable=self.limits.unreachable | unreachable)
        seen = self._survey.observe(self.request, limits, self.tools)
        world = seen.world
        if self._nominal is None:
            self._start_j = self.machine.joules[0] or 0.0
        if self._nominal is None or (world is not None and len(self.greeted) > self._met):
            self._nominal, self._met = world, len(self.greeted)
        elif world is None:  # a machine is away: it is what it was
            world = self._nominal
        else:  # memory is read anew each time, and what is free wavers; the machines are the same
            world = replace(world, hosts=self._nominal.hosts)
        self._seen = replace(
            seen,
            world=world,
            nominal=self._nominal,
            occasion=occasion,
            placement=placement,
            waited_s=time.monotonic() - self.began_s,
            battery=battery_share(),
            joules=(self.machine.joules[0] or 0.0) - self._start_j,
        )
        if self.memory is not None and world is not None:
            self._seen = replace(self._seen, past=self._past(self.memory, self._seen, world))
        return self._seen

    def _past(self, memory: Memory, seen: Observation, world: World) -> Past:
        """What is remembered until now; then now is remembered, too."""
        now_s, worker = time.monotonic(), DEVICE + 1
        is_up = worker not in seen.limits.unreachable
        memory.saw(id(self), now_s, is_up=is_up)
        heard_s, figures = self._heard_s.get(worker), self.figures.get(worker)
        age_s = 0.0  # greeted just now; or out of reach, which is known at once
        if is_up and heard_s is not None and figures is not None:
            age_s = now_s - heard_s + figures.rtt_age_s
        past = memory.past(id(self), now_s, age_s)
        link, load = world.links[DEVICE, worker], seen.loads.get(worker, IDLE)
        memory.decided(
            Epoch(now_s, is_up, link.rtt_s, link.up_bytes_per_s, link.down_bytes_per_s, load.slow, load.wait_s)
        )
        return past

    def view(self, number: int) -> LinkView | None:
        """What measures the link to a worker as it is used; None where nobody would look at it."""
        if not self.is_asked_again:
            return None
        rates = self.rates.get((DEVICE, number), ASSUMED)
        return LinkView(LinkSpec(0.0, rates.up, rates.down), rates.source)

    def measured(self, number: int, figures: LinkFigures, advert: Advert | None) -> None:
        """News of a link and a worker; a change of class is a reason to ask."""
        self.figures[number] = figures
        others = max(advert.sessions - (number in self.joined), 0) if advert else 0
        self.log.add(number, time.monotonic(), figures, advert, others)
        self._heard_s[number] = time.monotonic()
        if number not in self._links:  # compared with what the policy was shown of it at first
            rates, greeted = self.rates.get((DEVICE, number), ASSUMED), self.greeted.get(number)
            self._links[number] = link_watch()
            if greeted is not None:
                self._links[number].changed((rates.up, rates.down, greeted.rtt_s))
        if self._links[number].changed(link_figures(figures.fast)):
            self.note(Occasion.LINK)
        if advert is not None:
            self.adverts[number] = advert
            if self._loads.setdefault(number, load_watch()).changed(load_figures(advert)):
                self.note(Occasion.LOAD)

    async def decide(
        self, occasion: Occasion, placement: Placement, unreachable: frozenset[int] = frozenset()
    ) -> Decision:
        """Ask again, beside whatever goes on. Raises SplitwiseError for no answer and for one that may not be."""
        seen = self.observe(occasion, placement, unreachable)
        self._asked_s, self._since_token = time.monotonic(), 0
        decision = await asyncio.to_thread(self.policy.decide, seen)
        self.check(decision)
        if gone := set(decision.partition.machines) & unreachable:
            raise RequestError(f"the policy chose {self.names[min(gone)]}, which cannot be reached")
        if decision.partition in self.impossible:
            raise RequestError(f"the policy chose {decision.partition.text(self.names)}, which was refused before")
        if not self.fits(decision.partition):
            text = decision.partition.text(self.names)
            raise RequestError(f"the policy chose {text}, for which {self.names[DEVICE]} has no memory now")
        if seen.world is not None:
            why = obstacle(seen.world, decision, seen.job, seen.limits)
            if why:
                raise RequestError(f"the policy chose {decision.partition.text(self.names)}: {why}")
        return decision

    def check(self, decision: Decision) -> None:
        """Raise RequestError for what no machine would run, PartitionError for what does not fit the model."""
        decision.partition.check(self.machine.spec, len(self.names))
        floor = self.limits.floor
        if floor and not floor.holds(decision.partition):
            raise RequestError(
                f"{decision.partition.text(self.names)} takes from the device what the floor {floor.first_layers}+"
                f"{floor.last_layers} keeps there: its first and last layers, embedding and head"
            )

    async def fallback(self, home: Decision, placement: Placement, unreachable: frozenset[int]) -> Decision | None:
        """What can be run without some machines: what the policy says, if it is one that looks; otherwise its decision
        with another worker in the place of a lost one; otherwise the device alone. None: nothing."""
        if self.is_asked_again:
            try:
                return await self.decide(Occasion.FAULT, placement, unreachable)
            except SplitwiseError:
                pass  # the device may still do it by itself
        for decision in self._spared(home, unreachable):
            return decision
        alone = replace(home, partition=Partition.all_on(self.machine.spec, DEVICE))
        return alone if self.fits(alone.partition) else None

    def _spared(self, home: Decision, unreachable: frozenset[int]) -> list[Decision]:
        """The decision with each lost worker's part on a worker that has none."""
        lost = [n for n in home.partition.machines if n in unreachable]
        spare = [n for n in self.greeted if n not in home.partition.machines and n not in unreachable]
        if len(spare) < len(lost):
            return []
        swapped = dict(zip(lost, spare, strict=False))
        return [replace(home, partition=home.partition.renumbered(swapped))]

    # Epochs

    def token(self, at_s: float) -> None:
        """A token came."""
        if self._last_s:
            took_s = at_s - self._last_s
            self._token_s = took_s if self._token_s is None else (1 - RECENT) * self._token_s + RECENT * took_s
        self._last_s = at_s
        self._since_token += 1
        if self._since_token == EPOCH_TOKENS and self.is_asked_again:
            self.note(Occasion.EPOCH)

    def note(self, occasion: Occasion) -> None:
        """The policy is to be asked for this reason."""
        self._noted.put_nowait(occasion)

    async def epoch(self) -> Occasion:
        """Return when the policy is to be asked, and why: what was noted, or so much time."""
        self._asked_s = self._asked_s or time.monotonic()
        while True:
            left_s = self._asked_s + EPOCH_S - time.monotonic()
            try:
                async with asyncio.timeout(max(left_s, 0.0)):
                    occasion = await self._noted.get()
            except TimeoutError:
                self._asked_s = time.monotonic()
                return Occasion.EPOCH
            while not self._noted.empty():  # a fault or a return before an epoch
                other = self._noted.get_nowait()
                occasion = other if occasion is Occasion.EPOCH else occasion
            if occasion is not Occasion.EPOCH or self._since_token:
                return occasion

    # For the record

    def setup(self, start_s: float, start_unix_s: float, acceptance: float | None) -> Setup:
        """What the request was decided in, its prompt handed over then: by the monotonic clock, and the wall's.
        `acceptance` was measured; None: as it was priced."""
        seen = self._seen
        if acceptance is None:
            acceptance = self.drafting.as_priced.acceptance if self.drafting else 0.0
        hosts = self._survey.answered if self._survey else ()
        return Setup(
            start_unix_s, self.request.max_new_tokens, self.machine.spec, self.machine.checkpoint.fingerprint,
            tuple(self.names), tuple(HostRecord(h.device, h.dtype, h.weights, h.stretch) for h in hosts),
            seen.tools if seen else None, self.limits.floor, acceptance,
            self.log.samples(self.names, start_s),
        )  # fmt: skip

    # Prices

    def predict(self, decision: Decision) -> Prediction | None:
        """What the request should take from here, all tokens coming; None where a machine is not profiled."""
        seen, survey = self._seen, self._survey
        if seen is None or survey is None or seen.world is None:
            return None
        expected = price(seen.world, decision, seen.job, seen.world.conditions(seen.loads))
        links = survey.links(seen.world)
        return Prediction(expected.ttft_s, expected.tpot_s, expected.device_j, expected.total_j, links)

    def step_s(self, decision: Decision, extent: Extent) -> float:
        """Until a run's first token."""
        seen = self._seen
        if seen is None or seen.world is None:
            crossing_s = self._carrying_s(decision, extent) / RecoveryRules().steps
            return max(UNKNOWN_STEP_S, self._token_s or 0.0) + crossing_s
        job = Job(extent.known, max(extent.tokens, 1))
        expected = price(seen.world, decision, job, seen.world.conditions(seen.loads))
        share = (extent.known - extent.start) / extent.known
        return expected.ttft_s * share + expected.tpot_s

    def _carrying_s(self, decision: Decision, extent: Extent) -> float:
        """What a run's prompt takes on the slowest link that it crosses, as far as one knows: nothing is heard
        meanwhile, since pings wait behind it."""
        workers = [n for n in decision.partition.machines if n != DEVICE]
        if len(decision.partition.machines) == 1:
            return 0.0
        wire = decision.wire_in(is_prefill=True)
        size = wire.payload_bytes(extent.known - extent.start, self.machine.spec.d_model)
        known = [self.rates[DEVICE, n] for n in workers if (DEVICE, n) in self.rates]
        return size / min([min(one.up, one.down) for one in known] or [UNKNOWN_RATE])

    def stuck_s(self, decision: Decision, extent: Extent) -> float:
        """After which silence of a run something must be wrong, whatever its machines say."""
        return max(STUCK_S, STUCK_STEPS * self.step_s(decision, extent))

    def most_drafted(self, decision: Decision) -> int:
        """The longest draft that may be wanted while a decision runs."""
        if self.drafting is None:
            return 0
        return max(decision.draft, *(self._seen.tools.drafts if self._seen and self.is_asked_again else (0,)))

    def begin_drafting(self, decision: Decision) -> Drafting | None:
        """Who proposes in a run of this decision."""
        if self.drafting is not None:
            self.drafting.most = decision.draft
            self.drafting.pace.begin(*self.round_s(decision))
        return self.drafting

    def round_s(self, decision: Decision) -> tuple[float | None, float | None]:
        """A step without drafts, and what each drafted token adds to it; None where a machine is not profiled."""
        seen, most = self._seen, 4
        if seen is None or seen.world is None:
            return None, None
        conditions = seen.world.conditions(seen.loads)
        plain, drafted = (price(seen.world, replace(decision, draft=k), seen.job, conditions).tpot_s for k in (0, most))
        return plain, max(drafted * seen.world.drafter.tokens_per_round(most) - plain, 0.0) / most

    def token_s(self, decision: Decision) -> float:
        """Between later tokens: as predicted, or longer if it has been."""
        seen = self._seen
        known_s = self._token_s or 0.0
        if seen is None or seen.world is None:
            return max(UNKNOWN_STEP_S, known_s)
        return max(price(seen.world, decision, seen.job, seen.world.conditions(seen.loads)).tpot_s, known_s)

    def ways(self, held: Holdings, decision: Decision, context: int) -> tuple[Way, ...]:
        """What is to be done so that a partition has its caches, the faster way for each gap; without prices, all is
        computed again."""
        seen = self._seen
        if seen is not None and seen.world is not None:
            return moving_from(seen.world, held, decision, context).choose(seen.world.conditions(seen.loads))
        found: list[Fill] = []
        later = None
        for gap in reversed(gaps(held, decision.partition, context)):
            if later is None or not later.fills(gap):
                found.append(gap.fill)
                later = gap
        return tuple(reversed(found))

    def move_s(self, held: Holdings, decision: Decision, context: int) -> float:
        """Until a partition could go on; without prices, one step's time for each way that is to be gone."""
        seen = self._seen
        if seen is not None and seen.world is not None:
            conditions = seen.world.conditions(seen.loads)
            return float(moving_from(seen.world, held, decision, context).seconds(conditions))
        return (len(self.ways(held, decision, context)) + 1) * self.token_s(decision)
