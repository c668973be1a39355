"""What one machine does at a stage, worked out before the first step."""

from __future__ import annotations

from hypothesis import given

from physics.examples import SMALL
from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision
from splitwise_llm.engine.stops import stops
from splitwise_llm.partition import Partition
from strategies import NAMES, partitions


# Dies when engine/stops.py says `return index + 1 < len(plan.stages)` for
# `return index + 1 < len(plan.stages) and me in plan.stages[index + 1].machines`.
@given(partitions(SMALL))
def test_a_copy_is_kept_where_the_next_stage_does_not_receive_one(partition: Partition) -> None:
    plan = plans.compile(Decision(partition), SMALL, len(NAMES))
    for me in partition.machines:
        here = {stop.index: stop for stop in stops(plan, me)}
        for index, stop in here.items():
            following = here.get(index + 1)
            assert stop.goes_on == (following is not None and following.arrives is None)
