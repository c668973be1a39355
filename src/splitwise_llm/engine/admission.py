"""How a session begins: its workers are greeted, the policy decides for the first time, sessions are opened there.

It does not know what is run, nor what becomes of a worker once it was greeted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from splitwise_llm.decision import Decision
from splitwise_llm.engine.background import Background
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.controller import Controller
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.peer import Connect, Owner, Peer
from splitwise_llm.engine.walk import Request
from splitwise_llm.errors import LinkDied, RequestError, SplitwiseError, Unreachable
from splitwise_llm.observation import Observation, Occasion, Policy
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.wire.messages import Open


@dataclass(slots=True)
class Admission:
    """The first words of one session with all its workers."""

    machine: Machine
    names: tuple[str, ...]
    connect: Connect
    owner: Owner
    """Of the peers."""
    rules: RecoveryRules
    session: str
    request: Request
    is_fresh: bool
    """Whether there is no token yet."""
    policy: Policy
    peers: dict[int, Peer]
    """They are put here."""
    controller: Controller
    background: Background
    tell: Callable[[str, str], None]
    unreachable: dict[str, SplitwiseError] = field(default_factory=dict)
    """By name, the workers that did not answer as they should, and why."""
    misses: list[int] = field(default_factory=list)
    """Machines that a session needed when it was gone on with, and that did not answer."""
    observation: Observation = field(init=False)
    """What the policy decided by."""

    async def greet_all(self) -> list[asyncio.Task[None]]:
        """Say hello to every worker at once. Those that do not answer matter only if they are needed. For a policy
        whose device could begin alone, greetings that take long go on beside it, and are returned."""
        fingerprint = self.machine.checkpoint.fingerprint
        peers = [
            Peer(number, name, self.connect, fingerprint, self.owner, self.rules, self.controller.view(number))
            for number, name in enumerate(self.names)
            if number != DEVICE
        ]
        self.peers |= {peer.number: peer for peer in peers}
        alone = Partition.all_on(self.machine.spec, DEVICE)
        begins_alone = bool(peers) and self.controller.begins_alone(alone)
        meeting = {peer: asyncio.create_task(peer.meet(self.controller.echoes)) for peer in peers}
        suspect_s = self.rules.suspect_share * self.rules.limit_s(0.0)
        try:
            if meeting:
                await asyncio.wait(meeting.values(), timeout=suspect_s if begins_alone else None)
        except BaseException:
            for task in meeting.values():
                task.cancel()
            raise
        for peer, task in meeting.items():
            error = task.exception() if task.done() else Unreachable(f"{peer.name} has not answered yet")
            if isinstance(error, SplitwiseError):
                self.unreachable[peer.name] = error
            elif error is not None:
                for other in meeting.values():
                    other.cancel()
                raise error
            if begins_alone and isinstance(error, Unreachable | LinkDied):
                self.background.start("greet", self._greet_late(peer, task), peer.name)
        return [task for task in meeting.values() if not task.done()]

    async def _greet_late(self, peer: Peer, meeting: asyncio.Task[None]) -> None:
        """A worker that was silent at admission is greeted when it answers, and then it is there like one that came
        back."""
        failures = 0
        while True:
            begun_s = time.monotonic()
            try:
                await meeting
                break
            except (Unreachable, LinkDied) as error:
                self.unreachable[peer.name] = error
                took_s = time.monotonic() - begun_s
                await asyncio.sleep(self.rules.delay_s(failures, took_s, random.random()))
                failures += 1
                meeting = asyncio.create_task(peer.meet(self.controller.echoes))
            except SplitwiseError as error:
                self.unreachable[peer.name] = error
                self.tell("refused", str(error))
                return
        if peer.greeted:
            self.controller.greeted[peer.number] = peer.greeted
        self.unreachable.pop(peer.name, None)
        self.tell("back", f"{peer.name}: answers at last")
        self.controller.note(Occasion.RETURN)

    def decide(self) -> Decision:
        """Ask the policy for the first time; what it may not decide is refused here, whoever it is. Raises
        SplitwiseError."""
        greeted = self.controller.greeted = {n: peer.greeted for n, peer in self.peers.items() if peer.greeted}
        self.observation = observation = self.controller.observe(Occasion.ADMISSION, None)
        try:
            decision = self.policy.decide(observation)
        except RequestError as error:
            if not self.unreachable:
                raise
            raise RequestError("; ".join(map(str, (error, *self.unreachable.values())))) from error
        self.controller.check(decision)
        for number in decision.partition.machines:
            if number != DEVICE and number not in greeted:
                missing = self.unreachable[self.names[number]]
                if self.is_fresh or not isinstance(missing, Unreachable | LinkDied):
                    raise missing
                self.misses.append(number)  # a session that goes on waits for it, or does without
                self.peers[number].miss(self._opening(number), missing)
        return decision

    async def open_sessions(self, partition: Partition) -> None:
        """Open the session on every worker that a partition uses. Raises SplitwiseError."""
        await asyncio.gather(*(self.peers[n].open(self._opening(n)) for n in partition.machines if n != DEVICE))

    def _opening(self, number: int) -> Open:
        request = self.request
        return Open(
            session=self.session,
            machine=number,
            names=list(self.names),
            capacity=request.prompt_tokens + request.max_new_tokens,
            stop_ids=sorted(request.stop_ids),
            temperature=request.sampling.temperature,
            top_k=request.sampling.top_k,
            top_p=request.sampling.top_p,
            seed=request.sampling.seed,
            element_loss=request.loss.probability,
            loss_seed=request.loss.seed,
            priority=request.priority,
        )
