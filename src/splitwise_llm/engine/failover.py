"""What a session does when a run has failed: try again, wait for what is lost, or go on without it.

It knows who is there and what waiting costs. It does not know how a run ends or begins, nor how a lost worker is tried
again: that is its `Peer`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from splitwise_llm.decision import Decision
from splitwise_llm.engine.account import Account
from splitwise_llm.engine.backoff import RecoveryRules, wait_s
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.filling import Filling
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.peer import Peer
from splitwise_llm.errors import LinkDied, SplitwiseError, UserError
from splitwise_llm.observation import Placement
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

MAX_FAILURES = 5
"""So often a run may fail at the same token while every machine it needs is there; then it is no accident."""
REFUSED_S = 1.0
"""A worker that had no room is asked again after so long."""


@dataclass(slots=True)
class Failover:
    """The faults of one session."""

    names: tuple[str, ...]
    rules: RecoveryRules
    journal: Journal
    peers: dict[int, Peer]
    controller: Controller
    account: Account
    filling: Filling
    tell: Callable[[str, str], None]
    placement: Callable[[], Placement]
    """Where the session is."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Something happened to a peer."""
    impatient: set[int] = field(default_factory=set)
    """Machines that were waited for long enough."""
    gone: dict[int, str] = field(default_factory=dict)
    """Why machines were given up."""
    failures: tuple[int, int] = (0, 0)
    """Ids there were when a run failed last, and how often one has failed there."""
    refused_s: float | None = None
    """Since when the session has waited for room somewhere."""

    @property
    def unreachable(self) -> frozenset[int]:
        """Machines that no partition can use now."""
        return frozenset(n for n, peer in self.peers.items() if peer.link is None or peer.refusal is not None)

    def down(self, partition: Partition) -> list[int]:
        """Its machines that cannot be asked for anything now."""
        return [n for n in partition.machines if n != DEVICE and not self.peers[n].is_up]

    def check_up(self, partition: Partition) -> None:
        """Raise LinkDied for a machine that is not there."""
        if down := self.down(partition):
            raise LinkDied(f"{self.names[down[0]]} cannot be reached")

    def asked(self, number: int, why: str) -> None:
        """A worker came back, is given up, or was waited for long enough."""
        if why == "patience":
            self.impatient.add(number)
        if why == "gone":
            self.gone[number] = self.journal.events[-1].text
        self.changed.set()

    def token(self) -> None:
        """One came: who has no room from now on may be asked again for the whole time for attempts."""
        self.refused_s = None

    async def recover(self, error: SplitwiseError) -> Decision:
        """Return what can be run, once it can: the same, or another without what is lost. Raises what happened when
        nothing can be done about it."""
        decision = self.placement().decision
        if isinstance(error, UserError) and not any(peer.refusal for peer in self.peers.values()):
            raise error
        context, count = self.failures
        self.failures = (len(self.journal.ids), count + 1 if context == len(self.journal.ids) else 1)
        if not self.down(decision.partition):
            if self.failures[1] > MAX_FAILURES:
                raise error
            self.tell("retry", str(error))
            await asyncio.sleep(self.rules.floor_s * 2 ** self.failures[1])
            return decision
        refusals = [n for n in self.down(decision.partition) if self.peers[n].refusal is not None]
        self.tell("refused" if refusals else "fault", str(error))
        self.impatient.clear()
        self.impatient.update(refusals)  # waiting would not help
        return await self._wait(error, decision)

    async def _wait(self, error: SplitwiseError, decision: Decision) -> Decision:
        """Wait for what is lost: as long as there is patience where the session could go on elsewhere, and otherwise as
        long as there is hope. Raises what happened when there is none."""
        fallback: Decision | None = None
        told = False
        while down := self.down(decision.partition):
            self.changed.clear()  # here: what changes while a fallback is looked for must not be missed
            if fallback is None or self.down(fallback.partition):
                fallback = await self._fallback()
                if fallback is not None:
                    self._set_patience(decision, fallback)
            # A machine whose link is back may be part of it, and can be asked for nothing until its session is open.
            is_usable = fallback is not None and not self.down(fallback.partition)
            if fallback and is_usable and any(n in self.impatient or self.peers[n].is_gone for n in down):
                where = fallback.partition.text(self.names)
                for number in down:
                    self.peers[number].elsewhere(f"as {where}")
                self.tell("failed-over", f"going on as {where}")
                self.account.is_degraded = True
                return fallback
            if fallback is None:
                if all(self.peers[n].is_gone for n in down):
                    raise self._given_up(down, error) from error
                if not told:
                    names = ", ".join(self.names[n] for n in down)
                    self.tell("waiting", f"no partition without {names} is possible; waiting for it")
                told = True
            with suppress(TimeoutError):
                async with asyncio.timeout(REFUSED_S if any(self.peers[n].refusal for n in down) else None):
                    await self.changed.wait()
                    continue
            self._ask_again(down)
        return decision

    def _given_up(self, down: Sequence[int], error: SplitwiseError) -> LinkDied:
        """What to say when nothing can be done any more."""
        why = "; ".join(self.gone.get(n, f"{self.names[n]} is gone") for n in down)
        kept = f"{len(self.journal.tokens)} tokens are there"
        if self.journal.path is not None and not self.journal.failed:
            kept += f", and `splitwise resume {self.journal.path}` goes on from them"
        return LinkDied(f"{why}. Nothing else can go on with the answer ({kept}). First of all: {error}")

    def _ask_again(self, down: Sequence[int]) -> None:
        """What a worker had no room for it may have room for now. Raises the refusal once the time for attempts is
        spent."""
        since_s = self.refused_s or time.monotonic()
        for number in down:
            refusal = self.peers[number].refusal
            if refusal is not None and time.monotonic() - since_s > self.rules.budget_s:
                raise refusal
            self.peers[number].refusal = None
        self.refused_s = since_s

    def _set_patience(self, decision: Decision, fallback: Decision) -> None:
        """How long to wait for what is lost before going on elsewhere."""
        down = self.down(decision.partition)
        move_s = self.controller.move_s(self.filling.held, fallback, self.filling.context)
        patience_s = wait_s(decision.patience, move_s)
        for number in down:
            self.peers[number].wait(patience_s)
        if patience_s == 0:
            self.impatient.update(down)

    async def _fallback(self) -> Decision | None:
        """The best decision without what is lost; None: there is none."""
        placement = self.placement()
        home = placement.admitted or placement.decision
        return await self.controller.fallback(home, placement, self.unreachable)

    def patient(self) -> float:
        """How many times longer than predicted an answer may take: twice for each failure at this token. A link that
        is slower than anybody thought is not dead, and would be given up for ever."""
        context, count = self.failures
        return 2.0 ** (min(count, 16) if context == len(self.journal.ids) else 0)
