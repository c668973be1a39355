"""Prefill in chunks that overlap, against a timeline in which machines and links do one thing at a time.

The cost model adds a mean walk and (1 - 1/K) of the busiest machine or link. That is exact for equal chunks through a
chain of stations. It is late where the busiest machine is visited again after something else, as the device is in a
U-shape; early where the last chunk is short; and off both ways where messages of shared halves queue for one link.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from physics.examples import FP16, LINKS, SMALL, box, edge_and_cloud, jobs, on, serial_partitions, world, worlds
from physics.timeline import first_token_s, token_s
from splitwise_llm.cost import Job, World, bill
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Step
from splitwise_llm.spec import LinkSpec
from strategies import partitions


def ratio(here: World, decision: Decision, prompt: int) -> float:
    """Predicted time to the first token over that of the timeline."""
    one = bill(here, decision, Job(prompt, 1))
    return float(one.ttft.at(here.conditions())) / first_token_s(here, one.plan, prompt)


# Dies when cost/bill.py says `piped = _sum(walks)` for `piped = _sum([*walks[:-1], body])`.
@given(st.data())
def test_chunks_on_one_machine_take_the_sum_of_their_times(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    one = bill(here, on(here.spec, 0, data.draw(st.integers(1, 40))), job)
    assert one.ttft.at(here.conditions()) == pytest.approx(one.prefill_busy_s[0])


def test_equal_chunks_through_a_chain_take_one_walk_and_the_slowest_station_for_the_rest() -> None:
    here = world(SMALL, box(), box(flop_per_s=3e12), box(), link=LinkSpec(0.01, 1e6, 2e6))
    for text in ("edge[0:3] cloud[3:8]", "edge[0:1] cloud[1:5] third[5:8]"):
        decision = Decision(Partition.parse(text, SMALL, ("edge", "cloud", "third")), FP16, 16)
        assert ratio(here, decision, 160) == pytest.approx(1, rel=0.03)


# Dies when cost/bill.py says `Delay.of(stations).times(0)` for `Delay.of(stations).times(1 - 1 / chunks)`.
# Dies when cost/bill.py says `Delay.of(stations).times(1)` for `Delay.of(stations).times(1 - 1 / chunks)`.
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("edge", ["orin-nx", "s23", "pi5"])
def test_shipped_machines_prefill_as_on_the_timeline_and_behind_a_floor_up_to_a_third_later(
    edge: str, link: str
) -> None:
    """Later where the device is the busiest, for it works on other chunks while one is in the cloud: 1.30 at most,
    on a phone whose two ends take about as long as the way there and back."""
    here = edge_and_cloud(edge, "a100", link=link)
    for chunk in (128, 256, 512):
        u = Decision(Partition.u_shape(here.spec, 2, 2), FP16, chunk)
        assert 0.98 < ratio(here, u, 1024) < 4 / 3
        cut = Decision(Partition.cut(here.spec, 2), FP16, chunk)
        assert ratio(here, cut, 1024) == pytest.approx(1, rel=0.05)


def test_of_any_chunks_of_whole_halves_nine_in_ten_are_within_a_twentieth_of_the_timeline() -> None:
    """And none is twice as late: a mean walk and the busiest station are each a lower bound of it."""
    ratios: list[float] = []

    @given(st.data())
    def collect(data: st.DataObject) -> None:
        here = data.draw(worlds())
        decision = Decision(data.draw(serial_partitions(here.spec)), FP16, data.draw(st.integers(1, 40)))
        prompt = data.draw(st.integers(2, 200))
        assume(1 < decision.num_chunks(prompt) <= 40)
        ratios.append(ratio(here, decision, prompt))
        assert 0.8 < ratios[-1] < 2

    collect()
    assert np.all(np.percentile(np.abs(np.array(ratios) - 1), [50, 90]) < [0.01, 0.05])


# Dies when cost/bill.py says `for moves in together[1:] if moves]` for `for moves in together if moves]`.
def test_partial_sums_reach_the_joiner_before_the_stream_goes_on_to_a_head_elsewhere() -> None:
    here = world(SMALL, box(), box(), box(), link=LinkSpec(0.1, 1e9, 1e9))
    whole = Partition.shared(SMALL, {1: 1, 2: 1})
    for chunk in (None, 16):
        one = bill(here, Decision(Partition(whole.layers, 0, 0), FP16, chunk), Job(64, 1))
        rtts = one.ttft.at(here.basis.form({here.basis.rtt(0, 1): 1.0, here.basis.rtt(0, 2): 1.0}))
        # to both, fifteen exchanges over two legs, the last sum to one of them, and back
        assert rtts == pytest.approx(0.5 + 15 + 1 + 0.5)


# Dies when cost/bill.py says `form += 0 * basis.form({0: software_s` for `form += basis.form({0: software_s`.
def test_a_shared_layer_and_a_shared_model_cost_the_one_way_trips_of_their_plans() -> None:
    """Two for a layer, for what carries the other's attention on to the FFN does not wait; 2 L for L layers."""
    here = world(SMALL, box(), box(), link=LinkSpec(0.1, 1e9, 1e9))
    x = here.basis.form({here.basis.rtt(0, 1): 1.0})
    for layers, trips in (([3], 1.0), (None, 8.0)):
        one = bill(here, Decision(Partition.shared(SMALL, {0: 1, 1: 1}, layers), FP16), Job(8, 8))
        assert one.tpot.at(x) == one.plan.round_trips_per_token == trips


# Dies when cost/bill.py says `crossings[lead.behind, lead.ahead] * 0)` for `crossings[lead.behind, lead.ahead])`.
@given(st.data())
def test_a_token_is_never_priced_earlier_than_it_is_on_a_timeline_without_queues(data: st.DataObject) -> None:
    """Nor, over two machines, a quarter later than with queues: a clock that is behind is taken to be so by a whole
    crossing."""
    machines = data.draw(st.sampled_from([2, 3]))
    here, job = data.draw(worlds(machines)), data.draw(jobs())
    one = bill(here, Decision(data.draw(partitions(here.spec, machines))), job)
    step = Step(1, job.mean_context - 1, 1, emits=True, is_prefill=False)
    exact, queued = (token_s(here, one.plan, step, contended) for contended in (False, True))
    assert exact * (1 - 1e-9) <= one.tpot.at(here.conditions()) <= queued * (1.25 if machines == 2 else 2)


# Dies when cost/bill.py says `Kind.PARTIAL or True` for `Kind.PARTIAL or not before`.
def test_a_partial_sum_queues_behind_the_stream_that_left_just_before_it() -> None:
    """One divided layer: the device's summand of its attention follows the stream on the same way."""
    here = world(SMALL, box(), box(), link=LinkSpec(0.01, 1e4, 1e9))
    one = bill(
        here, Decision(Partition.parse("edge[0:3] edge+cloud[3] edge[4:8]", SMALL, ("edge", "cloud"))), Job(8, 8)
    )
    step = Step(1, 11, 1, emits=True, is_prefill=False)
    assert one.tpot.at(here.conditions()) == pytest.approx(token_s(here, one.plan, step, True), rel=0.01)
