"""Links between two workers of a session: who is let in, and what becomes of a link that is of no use."""

from __future__ import annotations

import asyncio

import pytest

from splitwise_llm.engine.neighbours import Neighbours, NoWay
from splitwise_llm.engine.post import Office
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.messages import Closed, Failed, pack


# Dies when engine/neighbours.py says `except TimeoutError:` for `except BaseException:`.
@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"rubbish", "header"),
        (pack(Closed(0)), "nothing of the kind"),
        (pack(Failed("WorkerFailed", "I know no such session")), "I know no such session"),
    ],
    ids=["rubbish", "another word", "a refusal"],
)
def test_a_worker_that_does_not_join_is_hung_up_on(said: bytes, why: str) -> None:
    async def play() -> None:
        near, far = memory_pair()

        async def dial(_: str) -> Link:
            return near

        links: dict[int, Link] = {}
        beside = Neighbours("s", 1, ["edge", "one", "two"], dial, Office(), links)
        await far.send(said)
        with pytest.raises(NoWay, match=why) as refused:
            await beside.reach({2: "there"})
        assert (refused.value.machine, links) == (2, {})
        assert await far.receive() is not None, "it says what it wants"
        assert await far.receive() is None, "it hangs up"

    asyncio.run(asyncio.wait_for(play(), 5))
