"""Equal sessions side by side: batches where they fill a machine, and nothing where it has a gap for each."""

from __future__ import annotations

import pytest

from splitwise_llm.cost import Host, Job, World, price
from splitwise_llm.cost.crowd import crowded
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec

SPEC = ModelSpec("llama", 4, 64, 8, 4, 8, 128, 100, 256, 3, True)
JOB = Job(16, 97)
CLOUD, U = Decision(Partition.all_on(SPEC, 1)), Decision(Partition.u_shape(SPEC, 1, 1))


def world(rtt_s: float, bytes_per_s: float = 1e9) -> World:
    """A device that computes at once, and a worker that takes milliseconds, mostly to read its weights."""
    fast, slow = Host(DeviceSpec("fast", 1e15, 1e15, 1e9)), Host(DeviceSpec("slow", 1e10, 2e7, 1e9))
    return World(SPEC, (fast, slow), {(0, 1): LinkSpec(rtt_s, bytes_per_s, bytes_per_s)})


def batch(at: World, decision: Decision, sessions: int) -> float:
    """Sequences that the worker computes together."""
    x = crowded(at, decision, JOB, sessions)
    return float(x[at.basis.slow(1)] / x[at.basis.share(1)])


def tpot_s(at: World, decision: Decision, sessions: int) -> float:
    return price(at, decision, JOB, crowded(at, decision, JOB, sessions)).tpot_s


def test_one_session_finds_machines_and_links_as_they_are() -> None:
    at = world(0.01)
    assert (crowded(at, U, JOB, 1) == at.conditions()).all()
    with pytest.raises(RequestError, match="0 sessions side by side"):
        crowded(at, U, JOB, 0)


def test_where_the_loop_never_leaves_the_worker_all_are_one_batch() -> None:
    at, host = world(0.01), world(0.01).hosts[1]
    assert batch(at, CLOUD, 4) == 4
    slow = host.model_s(SPEC, 1, JOB.mean_context, 4) / host.model_s(SPEC, 1, JOB.mean_context)
    assert tpot_s(at, CLOUD, 4) == pytest.approx(slow * tpot_s(at, CLOUD, 1))


def test_over_a_long_way_the_worker_has_a_gap_for_each_and_none_waits() -> None:
    at = world(10.0)
    assert batch(at, U, 4) == 1
    assert tpot_s(at, U, 4) == tpot_s(at, U, 1)


def test_where_it_has_no_gap_it_computes_as_many_together_as_keep_up() -> None:
    busy_s = tpot_s(world(0.0), U, 1)
    at = world(2 * busy_s)  # room for three, one after another
    assert batch(at, U, 3) == 1
    # Dies when cost/crowd.py says `and loads[machine].slow` for `and sessions / batch * loads[machine].slow`.
    assert 1 < batch(at, U, 6) < batch(at, U, 24) < 24


def test_a_link_that_they_fill_sets_their_pace() -> None:
    at = world(0.01, 1e4)
    one_way_s = 4 * SPEC.d_model / 1e4
    assert tpot_s(at, U, 1) < 4 * one_way_s
    assert tpot_s(at, U, 8) == pytest.approx(8 * one_way_s, rel=1e-6)
