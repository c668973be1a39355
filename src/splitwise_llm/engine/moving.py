"""Which partition a session runs, and its way to another: the policy is asked, caches are filled, the run is to end.

It does not know how a run begins or ends, nor what is done about faults.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from splitwise_llm.decision import Decision
from splitwise_llm.engine.account import Account
from splitwise_llm.engine.background import Background
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.failover import Failover
from splitwise_llm.engine.filling import Filling
from splitwise_llm.engine.halting import Halting
from splitwise_llm.engine.journal import Journal
from splitwise_llm.engine.peer import Peer
from splitwise_llm.errors import SplitwiseError, UserError
from splitwise_llm.observation import Occasion, Placement
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

FILL_CHUNK = 64
"""Positions per chunk of a fill that runs beside decoding: what it holds up is one token, and not many."""


@dataclass(slots=True)
class Moving:
    """The decisions of one session, and its moves between them."""

    names: tuple[str, ...]
    journal: Journal
    peers: dict[int, Peer]
    controller: Controller
    account: Account
    filling: Filling
    failover: Failover
    halting: Halting
    background: Background
    tell: Callable[[str, str], None]
    open_sessions: Callable[[Partition], Awaitable[None]]
    home: Decision = field(init=False)
    """What is run whenever all its machines are there, of a policy that does not look at the world."""
    decision: Decision = field(init=False)
    """What is run now, or next."""
    before: Decision | None = None
    """What ran before a move, until the next run has begun."""

    def admit(self, decision: Decision) -> None:
        """Begin with this."""
        self.decision = self.home = decision

    @property
    def placement(self) -> Placement:
        """Where the session is now."""
        filling = self.filling
        return Placement(
            self.decision, filling.context, len(self.journal.tokens), admitted=self.home, holdings=filling.held
        )

    @property
    def is_still(self) -> bool:
        """Whether no move is under way."""
        return not self.halting.is_due.is_set() and not self.background.is_running("move")

    @property
    def may_move(self) -> bool:
        """Whether a run is under way that no move is to end already."""
        return self.halting.current is not None and self.is_still

    def go_home(self) -> None:
        """Move back to what was admitted, for a policy that never looks again, if all of it is there and not used."""
        if self.controller.is_asked_again or not self.is_still:
            return
        if self.decision.partition != self.home.partition and not self.failover.down(self.home.partition):
            self.background.start("move", self._move(self.home, Occasion.RETURN))

    async def control(self) -> None:
        """Ask the policy at its epochs, and move when it says so."""
        while True:
            occasion = await self.controller.epoch()
            if not self.may_move:
                continue
            run = self.halting.current
            decision = await self._ask(occasion)
            if decision is None or self.halting.current is not run or not self.is_still:
                continue
            if self._is_another(decision):
                self.background.start("move", self._move(decision, occasion))
            else:  # perhaps with another patience, or another length of drafts
                self.decision = decision
                if self.controller.drafting is not None:
                    self.controller.drafting.most = decision.draft

    async def reconsider(self) -> None:
        """Between two runs, with a worker back that has gone on by itself: what is to run next?"""
        if self.controller.is_asked_again:
            decision = await self._ask(Occasion.RETURN)
        else:
            decision = None if self.failover.down(self.home.partition) else self.home
        if decision is not None and self._is_another(decision):
            old, new = (one.partition.text(self.names) for one in (self.decision, decision))
            self.tell("move", f"{old} -> {new} ({Occasion.RETURN})")
            self.before, self.decision = self.decision, decision

    def _is_another(self, decision: Decision) -> bool:
        """Whether it takes another run. Another length of drafts does not: where the loop is here it is heeded at the
        next step, and elsewhere the loop sees to it itself."""
        return replace(decision, draft=self.decision.draft) != self.decision

    async def _ask(self, occasion: Occasion) -> Decision | None:
        """What the policy wants now; None, and an event, for what may not be."""
        try:
            decision = await self.controller.decide(occasion, self.placement, self.failover.unreachable)
            self.failover.check_up(decision.partition)
        except SplitwiseError as error:
            self.tell("refused", f"{type(error).__name__}: {error}")
            self.controller.refused += 1
            return None
        return decision

    async def _move(self, decision: Decision, occasion: Occasion) -> None:
        """Fill for another partition beside the run that is under way, then end that run; what fails before that
        leaves everything as it was."""
        names, old, run = self.names, self.decision, self.halting.current
        try:
            await self.open_sessions(decision.partition)
            careful = replace(decision, prefill_chunk=min(decision.prefill_chunk or FILL_CHUNK, FILL_CHUNK))
            await self.filling.fill_beside(careful, old.partition)
        except SplitwiseError as error:
            self.tell("refused", f"{decision.partition.text(names)}: {error}; going on as before")
            return
        if run is not self.halting.current:
            return
        self.before = old
        self.tell("move", f"{old.partition.text(names)} -> {decision.partition.text(names)} ({occasion})")
        self.decision = decision
        self.halting.is_due.set()

    def goes_back(self, error: SplitwiseError) -> bool:
        """Where the next run could not begin, after a move above all, go on with what ran last, if its machines are
        there and that was another partition."""
        before, self.before = self.before or (self.account.runs[-1].decision if self.account.runs else None), None
        if before is None or before == self.decision:
            return False
        if any(self.peers[number].link is None for number in before.partition.machines if number != DEVICE):
            return False
        self.tell("refused", f"{error}; going back to what ran before")
        for number in before.partition.machines:
            if number != DEVICE:
                self.peers[number].refusal = None  # it was for the other partition
        if isinstance(error, UserError):
            self.controller.impossible.add(self.decision.partition)
        self.decision = before
        return True
