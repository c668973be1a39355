"""Caches made whole for a partition: pieces of its plan walked again, or keys and values carried, as it was decided.

It does not decide which way is the better, nor when a partition is to move.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.account import Account, Run
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.direct import DirectLinks
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.peer import Peer
from splitwise_llm.engine.post import Extent, Office, Post
from splitwise_llm.engine.shares import Shares
from splitwise_llm.engine.walk import Request, Walker
from splitwise_llm.errors import LinkDied, PeerError, WorkerFailed
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Plan
from splitwise_llm.rebuild import NOTHING, Carry, Fill, Held, Holdings, Way, written
from splitwise_llm.records import RunRecord
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Begin, Fetch, Filled, Halt, Halted, Rows

OTHERS_RUNS = 1000
"""Numbers left out after another process's last run: it may have begun fills that its journal does not name."""


@dataclass(slots=True)
class Filling:
    """The caches of one session on all machines, as the device knows them."""

    machine: Machine
    names: tuple[str, ...]
    links_between: DirectLinks
    """Of workers."""
    request: Request
    journal: Journal
    peers: dict[int, Peer]
    office: Office
    shares: Shares
    controller: Controller
    account: Account
    tell: Callable[[str, str], None]
    patient: Callable[[], float] = lambda: 1.0
    """Times longer than predicted that an answer may take now."""
    wires: set[WirePrecision] = field(default_factory=set)
    """All that runs have used: what is kept is in one of them."""
    last_run: int = 0
    broken: dict[int, Run] = field(default_factory=dict)
    """By worker, the last run that failed there."""

    def __post_init__(self) -> None:
        self.last_run = max((one.run + OTHERS_RUNS for one in self.journal.decisions), default=0)

    def next_run(self) -> int:
        """A number that no run of the session has had."""
        self.last_run += 1
        return self.last_run

    @property
    def context(self) -> int:
        """Positions that caches should hold: all but the last known id's."""
        return len(self.journal.ids) - 1

    @property
    def links(self) -> dict[int, Link]:
        """To every worker that has one."""
        return {number: peer.link for number, peer in self.peers.items() if peer.link is not None}

    @property
    def held(self) -> Holdings:
        """What every machine has of the session."""
        kept = self.journal.boundaries
        streams = ((half, start, stop) for half in kept.halves for start, stop in kept.kept(half))
        mine = Held.of(self.shares.cached, streams)
        others = (self.peers[n].held if self.peers[n].is_up else NOTHING for n in range(1, len(self.names)))
        return Holdings((mine, *others))

    async def fill(self, decision: Decision) -> int:
        """Make the caches of a partition whole up to the last known id; where its run is to begin. Raises
        SplitwiseError."""
        ways = self.controller.ways(self.held, decision, self.context)
        last = 2 * self.machine.spec.num_layers - 1
        if len(ways) == 1 and isinstance(ways[0], Fill) and (ways[0].first, ways[0].stop) == (0, last):
            self._count(ways[0], decision.partition)
            return ways[0].start  # the run itself prefills all of it
        for way in ways:
            await self._close(way, decision)
        return self.context

    async def fill_beside(self, decision: Decision, running: Partition) -> None:
        """Fill for another partition what can be filled while a run goes on: where no cache that it uses is cut.
        Raises SplitwiseError."""
        new = decision.partition
        for way in self.controller.ways(self.held, decision, self.context):
            if not any(running.units_on(m, half) == new.units_on(m, half) for m, half in written(way, new)):
                await self._close(way, decision)

    def direct(self, partition: Partition) -> dict[tuple[int, int], str]:
        """The direct links between machines of a partition, as they are now: a run keeps to those it began with."""
        return self.links_between.among(partition.machines)

    def begin(
        self,
        number: int,
        plan: Plan,
        extent: Extent,
        direct: Mapping[tuple[int, int], str],
        fill: Fill | None = None,
        last: Sequence[int] = (),
    ) -> Begin:
        """What a worker is told of a run that was planned over these direct links."""
        decision = plan.decision
        return Begin(
            run=extent.run,
            partition=decision.partition.to_bytes(),
            wire=decision.wire,
            prefill_wire=decision.prefill_wire or "",
            prefill_chunk=decision.prefill_chunk or 0,
            start=extent.start,
            known=extent.known,
            tokens=extent.tokens,
            draft=decision.draft if extent.tokens else 0,
            first=fill.first if fill else 0,
            stop=fill.stop if fill else 0,
            feeder=fill.feeder if fill and fill.first else -1,
            last=list(last),
            direct=list(direct),
            dial={second: address for (first, second), address in direct.items() if first == number},
        )

    def apart(self, first: int, second: int, why: str) -> None:
        """A worker does not reach another one: the other dials it, or the device passes on what is between them."""
        left = self.links_between.failed((first, second))
        self.controller.direct = self.links_between.pairs
        names = self.names
        instead = f"{names[left[0]]} dials {names[left[1]]} instead" if left else "the device passes on what is between"
        self.tell("no-direct", f"{why}; {instead}")

    def expect(self, workers: tuple[int, ...], decision: Decision, extent: Extent) -> None:
        """The first answers of a run are awaited."""
        step_s = self.controller.step_s(decision, extent) * self.patient()
        for number in workers:
            self.peers[number].expect(step_s)

    async def _close(self, way: Way, decision: Decision) -> None:
        if isinstance(way, Fill):
            await self._fill(way, decision)
        else:
            for carry in way:
                await self._carry(carry, decision)

    async def _fill(self, fill: Fill, decision: Decision) -> None:
        """Walk an excerpt of a plan on all machines that it concerns. Raises SplitwiseError."""
        wire = next(iter(self.wires)) if len(self.wires) == 1 else WirePrecision.FP32
        decision = replace(decision, wire=wire, prefill_wire=None) if fill.first else decision
        partition, feeder = decision.partition, fill.feeder if fill.first else None
        spec, num_machines = self.machine.spec, len(self.names)
        last = self._lacking(fill, partition)
        direct = self.direct(partition)
        plan = plans.excerpt(decision, spec, num_machines, direct, fill.first, fill.stop, feeder, last)
        extent = Extent(self.next_run(), fill.start, fill.context, 0)
        self._count(fill, partition, last)
        share = await self.shares.filling(partition, fill.start, fill.context, plan.cached_halves(DEVICE))
        post = Post(DEVICE, plan, extent, self.links, self.names)
        walker = Walker(
            plan, self.request, share, self.machine, post, ids=self.journal.ids, kept=self.journal.boundaries
        )
        post.keep = walker.keep
        involved = {m for stage in plan.stages for m in stage.machines} | ({feeder} if feeder else set())
        workers = tuple(sorted(involved - {DEVICE}))
        at_s = time.monotonic() - self.account.start_s
        await self.office.open(post)
        filled = [self.peers[n].answer(Filled, extent.run) for n in workers]
        walking = asyncio.create_task(walker.fill())
        try:
            self.expect(workers, decision, extent)
            for number in workers:
                await self.peers[number].send(self.begin(number, plan, extent, direct, fill, last))
            async with asyncio.timeout(self.controller.stuck_s(decision, extent)):
                await asyncio.gather(walking, *filled)
            for number in workers:  # which says what the worker holds now
                await self.peers[number].ask(Halt(extent.run), Halted, extent.run)
        except TimeoutError:
            raise LinkDied("a fill does not come to its end, though every machine answers") from None
        finally:
            walking.cancel()
            await asyncio.gather(walking, return_exceptions=True)
            undone = [future for future in filled if not future.done()]
            for future in undone:
                future.cancel()
            if undone:
                for number in workers:
                    with suppress(PeerError):
                        await self.peers[number].send(Halt(extent.run, at_once=True))
            self.office.close(extent.run)
            await self.machine.settle()
        what = f"halves {fill.first} to {fill.stop}, positions {fill.start} to {fill.context}"
        self.account.fills.append(
            RunRecord(
                extent.run,
                partition.text(self.names),
                decision.wire_in(is_prefill=True),
                fill.start,
                fill.context,
                0,
                at_s,
                f"fill {what}",
            )
        )
        self.tell("fill", f"computed {what} again on {' and '.join(self.names[m] for m in sorted(involved))}")

    def _lacking(self, fill: Fill, partition: Partition) -> tuple[int, ...]:
        """Who lacks something in the last half of a fill: the others need not take part, as nobody takes the sum."""
        held, half = self.held, fill.stop - 1
        owners = sorted(set(partition.owners(half)))
        return tuple(n for n in owners if held.machines[n].covered(half, partition.units_on(n, half)) < fill.context)

    def _count(self, fill: Fill, partition: Partition, last: Sequence[int] = ()) -> None:
        """Note how many positions behind which a token had come some machine computes again though it has them: in none
        of the fills that make good what one machine lost, unless halves that it shares follow each other."""
        if len(self.journal.ids) == self.request.prompt_tokens:
            return
        held, again = self.held, 0
        for half in range(fill.first + fill.first % 2, fill.stop, 2):
            owners = last if last and half == fill.stop - 1 else set(partition.owners(half))
            for number in owners:
                units = partition.units_on(number, half)
                has = self._computed(number, half, units, held.machines[number].covered(half, units))
                again = max(again, min(has, fill.context) - fill.start)
        self.account.recomputed_tokens += again

    def _computed(self, number: int, half: int, units: Sequence[int], has: int) -> int:
        """How many positions a machine had, of which it still has some: whose link was lost between two rounds was not
        told which drafted tokens were right, and has forgotten them."""
        run = self.broken.get(number)
        if run is None or not run.depths or not set(units) <= set(run.decision.partition.units_on(number, half)):
            return has
        return run.certain if 0 < run.certain - has <= run.post.plan.decision.draft and has else has

    async def _carry(self, carry: Carry, decision: Decision) -> None:
        """Bring keys and values from one machine to another, by way of the device. Raises SplitwiseError."""
        partition = decision.partition
        for half, units in carry.units:
            if carry.src == DEVICE:
                rows = await self.shares.rows(half, units, carry.start, carry.context)
            else:
                fetch = Fetch(half, list(units), carry.start, carry.context)
                found, payload = await self.peers[carry.src].ask(fetch, Rows, half)
                asked = (fetch.units, fetch.start, fetch.stop)  # what was asked before may be answered only now
                if not isinstance(found, Rows) or (found.units, found.start, found.stop) != asked:
                    await self._inquire(carry.src)
                    raise WorkerFailed(f"{self.names[carry.src]} did not give what was to be carried away")
                rows = bytes(payload)
            if carry.dst == DEVICE:
                await self.shares.put(partition, half, units, carry.start, carry.context, memoryview(rows))
            else:
                header = Rows(half, list(units), carry.start, carry.context, partition.to_bytes())
                await self.peers[carry.dst].send(header, rows)
        if carry.dst != DEVICE:
            await self._inquire(carry.dst)
            held = self.peers[carry.dst].held
            if any(held.covered(half, units) < carry.context for half, units in carry.units):
                raise WorkerFailed(f"{self.names[carry.dst]} could not take what was carried there; see its log")
        self.tell("carry", f"{carry.num_units} units' cache from {self.names[carry.src]} to {self.names[carry.dst]}")

    async def _inquire(self, number: int) -> None:
        """What does a worker hold now? Raises SplitwiseError."""
        run = self.next_run()
        await self.peers[number].ask(Halt(run), Halted, run)
