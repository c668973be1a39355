"""What a crossing costs, and how many there are: the mistakes of charging the cloud a round trip per token, of bits
taken for bytes, and of relays for nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import CHAT, LINKS, SMALL, box, edge_and_cloud, jobs, on, only, serial_partitions, world, worlds
from physics.timeline import first_token_s, token_s
from splitwise_llm.cost import Job, World, bill, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Step
from splitwise_llm.spec import LinkSpec
from strategies import NAMES, decisions


def decode_step(job: Job) -> Step:
    return Step(1, job.mean_context - 1, 1, emits=True, is_prefill=False)


def slower(one: World, rtt_s: float) -> World:
    """The same world with longer links."""
    links = {p: LinkSpec(ln.rtt_s + rtt_s, ln.up_bytes_per_s, ln.down_bytes_per_s) for p, ln in one.links.items()}
    return World(one.spec, one.hosts, links)


# Dies when cost/bill.py says `if False:` for `if not self.step.is_prefill and self.plan.embed == self.plan.head:`.
@pytest.mark.parametrize("tokens", [1, 2, 128])
def test_cloud_only_pays_one_round_trip_per_request_and_none_per_token(tokens: int) -> None:
    here = edge_and_cloud("orin-nx", "a100")
    decision, job = on(here.spec, 1), Job(128, tokens)
    extra = price(slower(here, 0.1), decision, job).total_s - price(here, decision, job).total_s
    assert extra == pytest.approx(0.1)


# Dies when cost/bill.py says `basis.rtt(src, dst): 0.0,` for `basis.rtt(src, dst): 0.5,`.
@pytest.mark.parametrize("text", ["edge[0:4] cloud[4:8]", "edge[0:2] cloud[2:6] edge[6:8]", "cloud[0:2] edge[2:8]"])
def test_a_cut_and_a_u_shape_pay_a_round_trip_for_every_token(text: str) -> None:
    here = world(SMALL, box(), box())
    decision = Decision(Partition.parse(text, SMALL, NAMES))
    extra = price(slower(here, 0.1), decision, CHAT).total_s - price(here, decision, CHAT).total_s
    assert extra == pytest.approx(0.1 * CHAT.tokens_out)


# Dies when cost/bill.py says `if move.kind is Kind.PROMPT and` for `if move.kind in (Kind.PROMPT, Kind.NEXT) and`.
@given(st.data())
def test_round_trips_of_a_token_are_those_of_the_plan_where_halves_are_whole(data: st.DataObject) -> None:
    here = data.draw(worlds())
    one = bill(here, Decision(data.draw(serial_partitions(here.spec))), CHAT)
    assert one.tpot.at(only(here, rtt=1.0)) == pytest.approx(one.plan.round_trips_per_token)


# Dies when plan.py says `return ((src, DEVICE),)` for `return ((src, DEVICE), (DEVICE, dst))`.
def test_a_relay_through_the_device_costs_both_legs_and_a_direct_link_one() -> None:
    star = world(SMALL, box(), box(), box(), link=LinkSpec(0.1, 1e6, 1e6))
    direct = World(SMALL, star.hosts, {**star.links, (1, 2): LinkSpec(0.1, 1e6, 1e6)})
    decision = Decision(Partition.parse("edge[0:2] cloud[2:4] third[4:8]", SMALL, NAMES), WirePrecision.FP32)
    relayed, straight = (bill(where, decision, CHAT) for where in (star, direct))
    assert relayed.tpot.at(only(star, rtt=1.0)) == pytest.approx(2.0)
    assert straight.tpot.at(only(direct, rtt=1.0)) == pytest.approx(1.5)
    stream = 4 * SMALL.d_model
    assert relayed.token_bytes == {(0, 1): stream, (1, 0): stream, (0, 2): stream, (2, 0): 4}
    assert straight.token_bytes == {(0, 1): stream, (1, 2): stream, (2, 0): 4}


# Dies when units.py says `"mbit": 1e6,` for `"mbit": 1e6 / 8,`.
def test_eight_megabits_a_second_move_a_megabyte_a_second() -> None:
    link = LinkSpec.parse("rtt=0ms up=8mbit down=16mbit")
    assert (link.up_bytes_per_s, link.down_bytes_per_s) == (1e6, 2e6)
    here = world(SMALL, box(), box(), link=link)
    one = bill(here, Decision(Partition.cut(SMALL, 4), WirePrecision.FP32), Job(4000, 1))
    x = here.conditions()
    x[[here.basis.slow(0), here.basis.slow(1)]] = 0.0
    assert one.ttft.at(x) == pytest.approx(4000 * SMALL.d_model * 4 / 1e6 + 4 / 2e6)


# Dies when cost/bill.py says `basis.inverse(src, dst): 0.0 * size})` for `basis.inverse(src, dst): size})`.
# Dies when decision.py says `"fp16": 4 * d_model` for `"fp16": 2 * d_model`.
def test_twice_the_bytes_take_twice_the_time_on_the_wire() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    x = here.conditions()
    x[[here.basis.slow(0), here.basis.slow(1), here.basis.rtt(0, 1)]] = 0.0
    u = Partition.u_shape(SMALL, 2, 2)
    wide, narrow = (bill(here, Decision(u, wire), CHAT) for wire in (WirePrecision.FP32, WirePrecision.FP16))
    for phase in ("ttft", "tpot"):
        assert getattr(wide, phase).at(x) == pytest.approx(2 * getattr(narrow, phase).at(x))
    assert narrow.tpot.at(x) == pytest.approx(2 * (2 * SMALL.d_model) / (5e6 / 8))


# Dies when cost/bill.py says `self.bytes[src, dst] = size` for `self.bytes[src, dst] += size`.
@given(st.data())
def test_bytes_are_those_the_plan_sends_for_any_decision(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    decision = data.draw(decisions(here.spec))
    one = bill(here, decision, job)
    sent: dict[tuple[int, int], int] = {}
    for crossing in one.plan.traffic(job.prompt_tokens, job.tokens_out):
        sent[crossing.src, crossing.dst] = sent.get((crossing.src, crossing.dst), 0) + crossing.payload_bytes
    lanes = {*one.prefill_bytes, *one.token_bytes, *sent}
    assert {lane: one.lane_bytes(*lane) for lane in lanes} == {lane: float(sent.get(lane, 0)) for lane in lanes}
    shown = price(here, decision, job)
    assert shown.up_bytes == sum(size for (src, _), size in sent.items() if src == 0)
    assert shown.down_bytes == sum(size for (_, dst), size in sent.items() if dst == 0)


# Dies when cost/bill.py says `.get(machine, 0) * 0 + self._compute(` for `.get(machine, 0) + self._compute(`.
@given(st.data())
def test_a_walk_takes_as_long_as_a_timeline_of_its_tasks_where_halves_are_whole(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    one = bill(here, Decision(data.draw(serial_partitions(here.spec))), job)
    x = here.conditions()
    assert one.tpot.at(x) == pytest.approx(token_s(here, one.plan, decode_step(job)))
    assert one.ttft.at(x) == pytest.approx(first_token_s(here, one.plan, job.prompt_tokens))
