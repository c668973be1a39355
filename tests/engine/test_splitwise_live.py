"""The policy `splitwise` on running sessions: it is asked at its epochs, sees a past, and loses no token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from engine.test_policies_live import FAST, SLOWEST, lab
from policies.neutral_networks import network
from splitwise_llm.decision import Decision
from splitwise_llm.observation import Observation
from splitwise_llm.policies import one_session
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.wire.shaper import LinkShape


@dataclass
class Watching:
    """It keeps what the policy was shown."""

    policy: Splitwise
    seen: list[Observation] = field(default_factory=list)

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        return self.policy.decide(observation)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_whatever_knobs_it_turns_the_text_is_that_of_one_machine(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_session, "RATES", (1.0,))
    monkeypatch.setattr(one_session, "TRIPS", (1.0,))
    policy = Splitwise(weights=network(seed=seed))

    async def play() -> tuple[list[Observation], tuple[int, ...], tuple[int, ...]]:
        async with lab(SLOWEST, FAST, shape=LinkShape.parse("rtt=10ms rate=8mbit")) as one:
            watching = Watching(policy)
            alone, _, _ = await one.run("all:edge", tokens=40)
            record, _, _ = await one.run(watching, tokens=40)
            await one.run(watching, tokens=3)
            return watching.seen, alone.token_ids, record.token_ids

    seen, alone, ids = asyncio.run(play())
    assert ids == alone
    assert len(seen) >= 3, "it was asked in flight, too"
    assert policy.tally.decisions == len(seen)
    assert not policy.elsewhere
    past = seen[-1].past
    assert past is not None
    assert past.answers[0, 0] == 2.0, "of this edge, whoever decided"
    assert (past.epochs[0, : min(len(seen) - 1, 8), 5] > 0).all()
    assert past.epochs[0, 0, 3] > 0
    assert past.epochs[0, 0, 1] == 1.0
