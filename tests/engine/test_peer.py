"""A worker as a session has it, over in-memory links: what it says when it is asked to go on is heeded."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.peer import Owner, Peer
from splitwise_llm.engine.transitions import State
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.messages import PROTOCOL_VERSION, Failed, Open, Opened, Welcome, pack
from splitwise_llm.wire.sequence import Sequenced

RULES = RecoveryRules(base_s=0.01, cap_s=0.3, floor_s=0.005, attempt_s=0.2, budget_s=30.0)
OPENING = Open("s", 1, ["edge", "cloud"], 8, [], 0.0, 0, 1.0, 0, 0.0, 0)


class Listener:
    """An owner that only notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def lost(self, number: int, error: Exception) -> None: ...

    def apart(self, number: int, other: int, why: str) -> None:
        self.heard.append(("apart", str(other)))

    def failed(self, number: int, run: int, error: Exception) -> None: ...

    def asked(self, number: int, why: str) -> None:
        self.heard.append(("asked", why))

    def told(self, kind: str, text: str) -> None:
        self.heard.append((kind, text))


@pytest.mark.parametrize(
    ("refusal", "state", "says"),
    [
        (Failed("WorkerFailed", "full", 9.0), State.BACKING_OFF, "attempt 2 in"),
        (Failed("PeerMismatch", "another model"), State.GONE, "another model"),
    ],
)
def test_a_worker_that_refuses_a_session_on_its_way_back_is_heeded(refusal: Failed, state: State, says: str) -> None:
    async def play() -> None:
        ends: list[MemoryLink] = []
        serving: list[asyncio.Task[None]] = []

        async def serve(far: Link, answer: bytes) -> None:
            link = Sequenced(far)
            await link.receive()
            await link.send(pack(Welcome(PROTOCOL_VERSION, "m", "fp32", "full", 1, 1 << 20, 1, "")))
            await link.receive()
            await link.send(answer)

        async def connect(_: str) -> Link:
            near, far = memory_pair(("device", "cloud"))
            answer = pack(refusal) if ends else pack(Opened())
            ends.append(near)
            serving.append(asyncio.create_task(serve(far, answer)))
            return near

        listener = Listener()
        peer = Peer(1, "cloud", connect, "m", cast(Owner, listener), RULES)
        await peer.meet(0)
        await peer.open(OPENING)
        ends[0].kill()
        await asyncio.sleep(0.5)
        await peer.leave()
        await asyncio.gather(*serving, return_exceptions=True)
        assert len(ends) == 2, "asked sooner than it said"
        assert peer.state is state
        assert any(says in text for _, text in listener.heard)
        assert ("asked", "back") not in listener.heard

    asyncio.run(asyncio.wait_for(play(), 10))


# Dies when engine/peer.py says `> 255:` for `>= len(self.opening.names):`.
@pytest.mark.parametrize(("machine", "is_there"), [(1, True), (2, False), (200, False)])
def test_a_worker_that_names_a_machine_that_is_not_there_is_hung_up_on(machine: int, is_there: bool) -> None:
    async def play() -> None:
        near, far = memory_pair(("device", "cloud"))

        async def connect(_: str) -> Link:
            return near

        async def serve() -> None:
            link = Sequenced(far)
            await link.receive()
            await link.send(pack(Welcome(PROTOCOL_VERSION, "m", "fp32", "full", 1, 1 << 20, 1, "")))
            await link.receive()
            await link.send(pack(Opened()))
            await link.send(pack(Failed("Unreachable", "no way", run=1, machine=machine)))

        serving = asyncio.create_task(serve())
        listener = Listener()
        peer = Peer(1, "cloud", connect, "m", cast(Owner, listener), RULES)
        await peer.meet(0)
        await peer.open(OPENING)
        await serving
        await asyncio.sleep(0.05)
        assert (("apart", str(machine)) in listener.heard) == is_there
        assert any("machine" in text for kind, text in listener.heard if kind == "lost") == (not is_there)
        assert (peer.state is State.CONNECTED) == is_there
        await peer.leave()

    asyncio.run(asyncio.wait_for(play(), 10))
