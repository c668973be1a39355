"""With nothing to compute and rates without end, a token costs its round trips and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from splitwise_llm.cost import Host, Job, World, price
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec
from strategies import partitions

SPEC = ModelSpec("llama", 3, 64, 4, 2, 16, 128, 100, 512, 3, True)
FAST = Host(DeviceSpec("fast", 1e16, 1e16, 1e12))
WORLD = World(SPEC, (FAST, FAST), {(0, 1): LinkSpec(1.0, 1e11, 1e11)})


# Killed by: `return Lead(self.pair, self.ahead)` in Lead.after_a_half, or by pricing every shared half as a barrier.
@given(partition=partitions(SPEC, 2))
@settings(max_examples=200, deadline=None)
def test_a_token_over_two_machines_takes_as_many_round_trips_as_its_plan_counts(partition: Partition) -> None:
    decision = Decision(partition)
    trips = WORLD.plan(decision).round_trips_per_token
    if partition.embed == partition.head == 1:  # the loop never waits for the device
        trips = min(trips, price(WORLD, decision, Job(4, 8)).tpot_s)
    assert price(WORLD, decision, Job(4, 8)).tpot_s == pytest.approx(trips, abs=1e-3)
