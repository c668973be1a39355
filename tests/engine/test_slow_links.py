"""A slow link is no dead one: how long a prompt may keep it silent where nobody has measured the machines."""

from __future__ import annotations

import asyncio

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.controller import UNKNOWN_RATE, UNKNOWN_STEP_S
from splitwise_llm.engine.post import Extent
from splitwise_llm.model.checkpoint import locate

CROSSES, STAYS = "edge[0:2] cloud[2:6] edge[6:8]", "all:edge"


# Dies when engine/controller.py says `self._token_s or 0.0)` for `self._token_s or 0.0) + crossing_s`.
def test_a_prompt_may_keep_a_link_silent_for_as_long_as_it_takes_to_cross() -> None:
    async def play() -> None:
        async with in_process(locate("bundled"), ("cloud",)) as edge, edge.generate("One", CROSSES) as generation:
            controller, rules = generation._controller, RecoveryRules()
            for text in (CROSSES, STAYS):
                long, short = (controller.step_s(Decision(edge.partition(text)), Extent(1, 0, n, 3)) for n in (900, 1))
                size = WirePrecision.FP32.payload_bytes(900, edge.machine.spec.d_model)
                if text == STAYS:
                    assert long == short == UNKNOWN_STEP_S
                else:
                    assert rules.limit_s(long) > size / UNKNOWN_RATE > rules.limit_s(short)

    asyncio.run(play())
