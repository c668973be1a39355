"""The links of one session from its worker to the other workers: dialled as a run asks for them, or opened from there.

It knows who may be at the other end. It does not know what passes, nor when a run begins or ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from splitwise_llm.engine.post import Office
from splitwise_llm.errors import ProtocolError, SplitwiseError, Unreachable, WorkerFailed
from splitwise_llm.plan import DEVICE
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Data, Failed, Join, Opened, pack, unpack

JOINING_S = 10.0
"""How long another worker may take to say that it knows the session."""


class NoWay(Unreachable):
    """Another worker is not reached directly; the device may find a way round."""

    def __init__(self, message: str, machine: int) -> None:
        super().__init__(message)
        self.machine = machine


@dataclass(slots=True)
class Neighbours:
    """Machine `number` of a session and the workers beside it; `leave` them in the end."""

    session: str
    number: int
    names: list[str]
    dial: Callable[[str], Awaitable[Link]]
    office: Office
    """Where what they send belongs."""
    links: dict[int, Link]
    """By machine; they are put here, and taken out when they end."""
    _hearing: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    async def reach(self, addresses: Mapping[int, str]) -> None:
        """Have a link to each of these machines. Raises NoWay."""
        for machine, address in addresses.items():
            if machine in self.links and machine in self._hearing and not self._hearing[machine].done():
                continue
            try:
                self._take(machine, await self._joined(machine, address))
            except SplitwiseError as error:
                here, there = self.names[self.number], self.names[machine]
                raise NoWay(f"{here} does not reach {there} at {address}: {error}", machine) from error

    async def _joined(self, machine: int, address: str) -> Link:
        """A link to another worker of this session, which has taken it for that. Raises SplitwiseError."""
        link, frame = await self.dial(address), None
        try:
            await link.send(pack(Join(self.session, self.number)))
            with suppress(TimeoutError):
                async with asyncio.timeout(JOINING_S):
                    frame = await link.receive()
            answer = unpack(frame)[0] if frame is not None else None
            if not isinstance(answer, Opened):
                why = answer.message if isinstance(answer, Failed) else "it says nothing of the kind"
                raise WorkerFailed(f"{self.names[machine]} ({address}) does not join: {why}")
        except BaseException:
            await link.close()
            raise
        return link

    async def join(self, link: Link, machine: int) -> None:
        """Serve a link that another worker of this session has opened, until it ends. Raises ProtocolError."""
        if machine in (DEVICE, self.number) or machine >= len(self.names):
            raise ProtocolError(f"machine {machine} is not to be reached directly in this session")
        await link.send(pack(Opened()))
        await asyncio.wait({self._take(machine, link)})  # ended from here, too, when the session is

    def _take(self, machine: int, link: Link) -> asyncio.Task[None]:
        if machine in self._hearing:
            self._hearing[machine].cancel()
        self.links[machine] = link
        task = self._hearing[machine] = asyncio.create_task(self._hear(machine, link))
        return task

    async def _hear(self, machine: int, link: Link) -> None:
        """Take in what another worker sends until it closes; its failure is the run's."""
        try:
            while (frame := await link.receive()) is not None:
                header, payload = unpack(frame)
                if not isinstance(header, Data):
                    raise ProtocolError(f"got {type(header).__name__} on a direct link, expected data")
                await self.office.accept(header, payload, frame, machine)
        except SplitwiseError as error:
            self.office.fail(error)
        finally:
            if self.links.get(machine) is link:
                del self.links[machine]
            with suppress(SplitwiseError):  # or the other end goes on sending to nobody
                await link.close()

    async def leave(self) -> None:
        """Close all of them."""
        for task in self._hearing.values():
            task.cancel()
        await asyncio.gather(*self._hearing.values(), return_exceptions=True)
