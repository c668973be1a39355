"""Drafted tokens are verified a group at a time: one round trip per group, and more bytes. Modelled, with an assumed
acceptance."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import CHAT, SMALL, box, jobs, only, world, worlds
from splitwise_llm.cost import Drafter, World, bill, obstacle, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Partition
from splitwise_llm.spec import LinkSpec, ModelSpec
from strategies import partitions

LITTLE = ModelSpec("llama", 2, 32, 4, 4, 8, 64, 100, 4096, 3, True)
U = Partition.u_shape(SMALL, 2, 2)


def with_drafter(here: World, drafter: Drafter) -> World:
    return World(here.spec, here.hosts, here.links, drafter=drafter)


# Dies when cost/world.py says `range(draft))` for `range(draft + 1))`.
@given(st.floats(0, 0.99), st.integers(0, 16))
def test_tokens_of_a_round_are_a_geometric_sum(acceptance: float, draft: int) -> None:
    expected = (1 - acceptance ** (draft + 1)) / (1 - acceptance)
    assert Drafter(acceptance).tokens_per_round(draft) == pytest.approx(expected)


@pytest.mark.parametrize("acceptance", [-0.1, 1.0, 2.0])
def test_an_impossible_acceptance_is_refused(acceptance: float) -> None:
    with pytest.raises(RequestError, match="expected 0 up to"):
        Drafter(acceptance)


# Dies when cost/bill.py says `delay.times(1),` for `delay.times(1 / tokens),`.
@pytest.mark.parametrize("draft", [1, 2, 4])
def test_a_group_takes_one_round_trip_and_carries_every_drafted_position(draft: int) -> None:
    here = world(SMALL, box(), box(), link=LinkSpec(0.1, 1e6, 1e6), drafter=Drafter(0.6))
    one = bill(here, Decision(U, WirePrecision.FP32, draft=draft), CHAT)
    tokens = (1 - 0.6 ** (draft + 1)) / 0.4
    assert one.tpot.at(only(here, rtt=1.0)) == pytest.approx(1 / tokens)
    assert price(here, one.decision, CHAT).round_trips_per_token == pytest.approx(1 / tokens)
    stream = (draft + 1) * 4 * SMALL.d_model / tokens
    assert one.token_bytes == pytest.approx({(0, 1): stream, (1, 0): stream})


@given(st.data())
def test_no_draft_is_plain_decoding_whoever_would_draft(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    decision = Decision(data.draw(partitions(here.spec)))
    drafter = Drafter(data.draw(st.floats(0, 0.9)), data.draw(st.none() | st.just(LITTLE)))
    plain, other = price(here, decision, job), price(with_drafter(here, drafter), decision, job)
    assert all(getattr(plain, field.name) == getattr(other, field.name) for field in fields(plain))


# Dies when cost/world.py says `self.acceptance ** max(n - 1, 0)` for `self.acceptance**n`.
@given(st.data())
def test_drafts_that_are_never_accepted_are_never_better_than_none(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    here = with_drafter(here, Drafter(0.0, data.draw(st.none() | st.just(LITTLE))))
    partition = data.draw(partitions(here.spec))
    plain, drafted = (price(here, Decision(partition, draft=k), job) for k in (0, data.draw(st.integers(1, 16))))
    assert drafted.ttft_s == plain.ttft_s
    for name in ("tpot_s", "total_s", "device_j", "total_j", "up_bytes", "down_bytes"):
        assert getattr(drafted, name) >= getattr(plain, name) * (1 - 1e-12)


def test_good_drafts_pay_on_a_long_link_and_more_the_longer_it_is() -> None:
    def gain(rtt_s: float, draft: int) -> float:
        here = world(SMALL, box(), box(), link=LinkSpec(rtt_s, 1e8, 1e8), drafter=Drafter(0.75, LITTLE))
        plain, drafted = (price(here, Decision(U, draft=k), CHAT).tpot_s for k in (0, draft))
        return plain / drafted

    assert 1.5 < gain(0.02, 4) < gain(0.1, 4) < Drafter(0.75).tokens_per_round(4)


# Dies when cost/bill.py says `seconds = host.model_s(` for `seconds = draft * host.model_s(`.
# Dies when cost/bill.py says `if draft > 99 and drafter is not None` for `if draft and drafter is not None`.
def test_a_drafting_model_takes_time_and_memory_where_the_embedding_is() -> None:
    here = world(SMALL, box(), box(), drafter=Drafter(0.5, LITTLE))
    lookup = with_drafter(here, Drafter(0.5))
    decision = Decision(U, draft=3)
    tokens = 1 + 0.5 + 0.25 + 0.125
    extra = 3 * here.hosts[0].model_s(LITTLE, 1, CHAT.mean_context) / tokens
    with_model, without = bill(here, decision, CHAT), bill(lookup, decision, CHAT)
    x = here.conditions()
    assert with_model.tpot.at(x) - without.tpot.at(x) == pytest.approx(extra)
    assert with_model.token_busy_s[0] - without.token_busy_s[0] == pytest.approx(extra)
    weights = 2 * (2 * 32 * (4 * 32 + 3 * 64) + 100 * 32)  # two layers and a tied table
    cache = (128 + 128) * 2 * 2 * 32 * 2
    assert with_model.memory_bytes[0] - without.memory_bytes[0] == weights + cache
    assert with_model.memory_bytes[1] == without.memory_bytes[1]
    tight = world(SMALL, box(memory_bytes=without.memory_bytes[0]), box(), drafter=Drafter(0.5, LITTLE))
    assert "would hold" in (obstacle(tight, decision, CHAT) or "")
    assert obstacle(with_drafter(tight, Drafter(0.5)), decision, CHAT) is None
