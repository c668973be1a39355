"""One run walked to its end: its last token, the next one where the partition is to move, or what it failed with.

It knows a run's workers and what they answer in the end. It does not know why a run is to end, nor how one begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from splitwise_llm.decision import Decision
from splitwise_llm.engine.account import Run
from splitwise_llm.engine.background import Background
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.peer import Peer
from splitwise_llm.engine.post import Office
from splitwise_llm.errors import LinkDied, PeerError, SplitwiseError
from splitwise_llm.plan import DEVICE, TOKEN_ID_BYTES, Kind
from splitwise_llm.wire import messages
from splitwise_llm.wire.messages import Halt, Halted


@dataclass(slots=True)
class Halting:
    """The ends of a session's runs, one at a time."""

    machine: Machine
    rules: RecoveryRules
    peers: dict[int, Peer]
    office: Office
    controller: Controller
    background: Background
    upcoming: Callable[[], Decision]
    """What the next run will be of."""
    silent: Callable[[Run, str], None]
    """Told of a run that makes nothing, though its machines answer."""
    current: Run | None = None
    """The run that is under way."""
    is_due: asyncio.Event = field(default_factory=asyncio.Event)
    """The run that is under way is to end at its next token."""
    came: asyncio.Event = field(default_factory=asyncio.Event)
    """A token."""

    async def walk(self, run: Run) -> None:
        """Walk until the answer is complete or the partition is to move. Raises PeerError, and what is our fault."""
        self.current = run
        walking = asyncio.create_task(run.walker.run())
        halting = asyncio.create_task(self.is_due.wait())
        try:
            await self._ended(run, walking, halting)
            if not walking.done() and not await self._halt_walk(run, walking):
                walking.cancel()
                run.ended = "left behind: its link let nothing through, and the next partition does without it"
            await walking
        except asyncio.CancelledError:
            if not walking.cancelled():  # it is this task that was cancelled
                raise
        finally:
            self.current = None
            for task in (walking, halting):
                task.cancel()
            await asyncio.gather(walking, halting, return_exceptions=True)
        await self._forget_drafts(run)
        if run.ended:
            await self._leave_behind(run)
            return
        with suppress(PeerError):  # the tokens are there; whoever dies now is noticed by the next run
            await self._collect(run)
        self.office.close(run.extent.run)

    async def _ended(self, run: Run, walking: asyncio.Task[None], halting: asyncio.Task[Any]) -> None:
        """Wait until a run has ended or is to. One that makes nothing for very long fails, though its machines answer
        pings: a link between two workers may be dead and neither know it."""
        while not walking.done() and not halting.done():
            made, most_s = len(run.depths), self.controller.stuck_s(run.decision, run.extent)
            either: set[asyncio.Task[Any]] = {walking, halting}
            done, _ = await asyncio.wait(either, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
            if not done and len(run.depths) == made:
                error = LinkDied(f"no token came for {most_s:.0f} s, though every machine answers")
                self.silent(run, str(error))
                self.office.fail(error, run.extent.run)

    async def _halt_walk(self, run: Run, walking: asyncio.Task[None]) -> bool:
        """Bring a walk to its end at the next token, wherever its token loop runs; False where none comes any more and
        the next partition can do without. Raises PeerError."""
        if run.loop_machine == DEVICE:
            run.walker.halting = True
            return await self._ends(run, walking)
        asking = asyncio.ensure_future(self._ask_halt(run, run.loop_machine))
        answered = await self._ends(run, walking, asking)
        if not answered or (walking.done() and walking.exception()):
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return answered
        await asking
        halted, _ = run.halted[run.loop_machine]
        sent = sum(c.payload_bytes for c in halted.crossed if c.kind is Kind.TOKEN) // TOKEN_ID_BYTES
        while len(run.depths) < sent and not walking.done():
            self.came.clear()
            taking = asyncio.ensure_future(self.came.wait())
            await asyncio.wait({walking, taking}, return_when=asyncio.FIRST_COMPLETED)
            taking.cancel()
        walking.cancel()
        return True

    async def _ends(self, run: Run, *ways: asyncio.Future[None]) -> bool:
        """Wait until one of these is done; False once no token came for so long that something is amiss, if the next
        partition uses none of this one's workers."""
        stays = set(run.workers) & set(self.upcoming().partition.machines)
        while True:
            made = len(run.depths)
            suspect_s = self.rules.suspect_share * self.rules.limit_s(self.controller.token_s(run.decision))
            left_s = None if stays else suspect_s
            done, _ = await asyncio.wait(ways, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return True
            if len(run.depths) == made:
                return False

    async def _leave_behind(self, run: Run) -> None:
        """End a run without waiting for what its workers say of it: that comes when their links let it through."""
        await self.machine.settle()
        self.office.close(run.extent.run)
        for number in run.workers:
            self.peers[number].expect(None)
            halt = Halt(run.extent.run, at_once=True, keep=self._keep(run, number, at_once=True))
            self.background.start("halt", self._quietly(self.peers[number].send(halt)), f"{run.extent.run} {number}")

    @staticmethod
    async def _quietly(work: Awaitable[object]) -> None:
        with suppress(PeerError):
            await work

    async def _ask_halt(self, run: Run, number: int, at_once: bool = False) -> None:
        halt = Halt(run.extent.run, at_once, self._keep(run, number, at_once))
        answer, payload = await self.peers[number].ask(halt, Halted, run.extent.run)
        if isinstance(answer, Halted):
            run.halted[number] = answer, messages.unpack_intervals(payload)

    @staticmethod
    def _keep(run: Run, number: int, at_once: bool) -> int:
        """How far what a worker has cached is right, where it may be ahead of the text there is: by what was drafted,
        or, in a run that ends before its time, by what a token loop made and nobody takes any more."""
        is_ahead = bool(run.post.plan.decision.draft) or (at_once and run.loop_machine != DEVICE)
        tells = number == run.loop_machine and not at_once
        return run.certain if is_ahead and not tells else -1

    async def _forget_drafts(self, run: Run) -> None:
        """What was drafted last and not accepted is in no cache any more."""
        if run.post.plan.decision.draft and run.walker.kept is not None:
            await self.machine.compute(lambda: run.walker.share.cut(run.certain))
            run.walker.kept.truncate(run.certain)

    async def _collect(self, run: Run) -> None:
        """What every worker counted; the sum is the plan's. Raises PeerError, BrokenInvariant."""
        left = [n for n in run.workers if n not in run.halted]
        await asyncio.gather(*(self._ask_halt(run, number) for number in left))
        for number in run.workers:
            self.peers[number].expect(None)
        run.check()

    async def abandon(self, run: Run, error: SplitwiseError) -> None:
        """A run has failed. Those of its machines that are there end it at once, and say what they hold."""
        run.ended = str(error)
        left = [n for n in run.workers if n not in run.halted and self.peers[n].is_up]  # who comes back says it all
        await self.machine.settle()
        await self._forget_drafts(run)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.rules.limit_s(0.0)):
                halts = (self._ask_halt(run, number, at_once=True) for number in left)
                await asyncio.gather(*halts, return_exceptions=True)
        self.office.close(run.extent.run)
        for number in run.workers:
            self.peers[number].expect(None)
