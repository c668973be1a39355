"""The cost model's parts: conditions and delays as algebra, tables, load, measured machines, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from physics.examples import CHAT, FP16, LINKS, SMALL, box, edge_and_cloud, jobs, on, world, worlds
from splitwise_llm.cost import (
    IDLE,
    Basis,
    Bill,
    Delay,
    Entry,
    Floor,
    Form,
    Host,
    Job,
    Load,
    Table,
    World,
    bill,
    price,
)
from splitwise_llm.decision import Decision
from splitwise_llm.errors import PartitionError, RequestError, SpecError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.spec import LinkSpec
from strategies import NAMES, decisions

PLACES = 6
FORMS = st.lists(arrays.arrays(np.float64, PLACES, elements=st.floats(0, 10)), min_size=1, max_size=5)
CONDITIONS = arrays.arrays(np.float64, (3, PLACES), elements=st.floats(0, 10))


# Conditions


# Dies when cost/terms.py says `(1 if src > dst else 2)` for `(1 if src < dst else 2)`.
def test_every_condition_has_a_place_of_its_own() -> None:
    basis = Basis(3, ((0, 1), (0, 2), (1, 2)))
    places = [0]
    for machine in range(3):
        places += [basis.slow(machine), basis.share(machine), basis.join(machine), basis.wait(machine)]
    for a, b in basis.pairs:
        assert basis.rtt(a, b) == basis.rtt(b, a)
        places += [basis.rtt(a, b), basis.inverse(a, b), basis.inverse(b, a)]
    assert sorted(places) == list(range(basis.size))
    x = basis.conditions({(0, 1): LinkSpec(0.1, 10.0, 20.0)}, {1: Load(3.0, 6.0, 0.5, 2.0)})
    assert x[[basis.rtt(1, 0), basis.inverse(0, 1), basis.inverse(1, 0)]] == pytest.approx([0.1, 1 / 10, 1 / 20])
    shown = x[[basis.slow(1), basis.share(1), basis.join(1), basis.wait(1)]]
    assert (shown.tolist(), x[basis.slow(0)], x[0]) == ([3.0, 0.5, 0.5, 2.0], 1.0, 1.0)
    assert Load(1.0, 1.0, 0.0, 0.0) == IDLE


# Dies when cost/terms.py says `single = group` for `single = group if single is None else single + group`.
@given(st.lists(FORMS, max_size=4), st.lists(FORMS, max_size=3), st.floats(0, 10), CONDITIONS)
def test_delays_add_and_scale_as_their_values_do(
    one: list[list[Form]], other: list[list[Form]], factor: float, x: Form
) -> None:
    def value(groups: list[list[Form]]) -> Form:
        return sum((np.max([x @ form for form in group], axis=0) for group in groups), np.zeros(3))

    first, second = (Delay(np.stack(group) for group in groups) for groups in (one, other))
    assert first.at(x) == pytest.approx(value(one))
    assert (first + second).at(x) == pytest.approx(value(one) + value(other))
    assert first.times(factor).at(x) == pytest.approx(factor * value(one))
    assert first.at(x[0]) == pytest.approx(value(one)[0])


# Dies when cost/terms.py says `(other >= form).any() and` for `(other >= form).all() and`.
@given(FORMS, CONDITIONS)
def test_the_largest_of_forms_drops_only_what_can_never_be_largest(forms: list[Form], x: Form) -> None:
    kept = Delay.of(forms)
    assert kept.at(x) == pytest.approx(np.max([x @ form for form in forms], axis=0))
    for number, one in enumerate(kept.groups[0]):
        assert not any((other >= one).all() for n, other in enumerate(kept.groups[0]) if n != number)


def test_equal_groups_are_joined() -> None:
    group = np.eye(2)
    assert [g.tolist() for g in Delay([group, group, group]).groups] == [[[3, 0], [0, 3]]]


# Tables


def prices_of(table: Table, x: Form) -> dict[str, Form]:
    shown = table.at(x)
    return {field.name: getattr(shown, field.name) for field in fields(shown) if field.name != "work"}


# Dies when cost/price.py says `("tpot", "ttft", "wait")` for `("ttft", "tpot", "wait")`.
@settings(max_examples=30)
@given(st.data())
def test_a_table_under_many_conditions_is_each_price_one_by_one(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    choices = data.draw(st.lists(decisions(here.spec), min_size=1, max_size=4))
    loads = [{m: here.load(m, 1 + 3 * n, 0.5 * n) for m in (1, 2)} for n in range(3)]
    x = np.stack([here.conditions(load) for load in loads])
    bills = [bill(here, choice, job) for choice in choices]
    shown = prices_of(Table(here, bills), x)
    for number, choice in enumerate(choices):
        for row, conditions in enumerate(x):
            one = price(here, choice, job, conditions)
            delays = (bills[number].ttft, bills[number].tpot, bills[number].wait)
            assert (one.ttft_s, one.tpot_s, one.wait_s) == pytest.approx(
                tuple(float(delay.at(conditions)) for delay in delays)
            )
            for name in ("ttft_s", "tpot_s", "wait_s", "total_s", "device_j", "total_j", "usd"):
                assert shown[name][row, number] == pytest.approx(getattr(one, name))
            assert one.total_s == pytest.approx(one.wait_s + one.ttft_s + (job.tokens_out - 1) * one.tpot_s)


# Dies when cost/price.py says `after = self._later * tpot` for `after = later * tpot`.
def test_tokens_still_to_come_replace_those_of_the_job() -> None:
    here = world(SMALL, box(), box(slots=8))
    table = Table(here, [bill(here, on(SMALL, m), Job(64, 10)) for m in (0, 1)])
    x = np.stack([here.conditions()] * 2)
    at = table.at(x, later_tokens=np.array([[9.0], [99.0]]))
    assert at.total_s[0] == pytest.approx(table.at(x[0]).total_s)
    assert at.service_s[1] == pytest.approx(at.ttft_s[1] + 99 * at.tpot_s[1])
    assert at.work.device_s[1, 0] == pytest.approx(
        table.bills[0].prefill_busy_s[0] + 99 * table.bills[0].token_busy_s[0]
    )


# Dies when cost/price.py says `entry.cloud_s * 0` for `entry.cloud_s * self._recompute_w`.
# Dies when cost/price.py says `np.zeros_like(entry.seconds) + wait` for `np.zeros_like(entry.seconds)`.
def test_in_flight_the_entry_takes_the_place_of_the_prompt_and_of_admission() -> None:
    server = box(slots=8, idle_w=50, prefill_w=400, decode_w=300, pue=1.5, usd_per_hour=3.6)
    here = world(SMALL, box(idle_w=2, prefill_w=9, decode_w=7), server)
    table = Table(here, [bill(here, on(SMALL, m), Job(64, 10)) for m in (0, 1)])
    x = here.conditions({1: Load(wait_s=5.0)})
    entry = Entry(np.array([3.0, 0.5]), np.array([2.0, 0.0]), np.array([0.0, 0.25]))
    at = table.at(x, later_tokens=np.array([20.0]), entry=entry)
    assert at.wait_s.tolist() == [0, 0]
    assert at.total_s == pytest.approx([3.0, 0.5] + 20 * at.tpot_s)
    device = table.bills[0].token_busy_s[0]
    assert at.work.device_s == pytest.approx([2.0 + 20 * device, 0.0])
    assert at.work.cloud_s == pytest.approx([0.0, 0.25 + 20 * at.tpot_s[1] / 8])
    assert at.device_j[0] == pytest.approx(2 * at.total_s[0] + (9 - 2) * 2.0 + (7 - 2) * 20 * device)
    cloud = 20 * table.bills[1].token_busy_s[1]
    assert (at.total_j - at.device_j)[1] == pytest.approx(1.5 * (400 * 0.25 + 300 * cloud))
    electricity = here.tariff.usd_per_kwh * at.device_j[1] / 3.6e6
    traffic = 0.09 * 20 * 4 / 1e9
    assert at.usd[1] == pytest.approx(0.001 * (0.25 + cloud) + electricity + traffic)


def test_mixes_of_bills_that_are_bills_are_those_bills() -> None:
    here = edge_and_cloud("orin-nx", "a100")
    bills = [bill(here, Decision(Partition.u_shape(here.spec, n, n), FP16), CHAT) for n in (1, 2, 3)]
    table, x = Table(here, bills), here.conditions({1: here.load(1, 8, 0.5)})
    mixed, plain = table.mixed(np.eye(3), x), table.at(x)
    for name in ("ttft_s", "tpot_s", "wait_s", "total_s", "device_j", "total_j", "usd"):
        assert getattr(mixed, name) == pytest.approx(getattr(plain, name))
    half = table.mixed(np.array([[0.5, 0.0, 0.5]]), x)
    assert half.total_s == pytest.approx(plain.total_s[1])  # identical layers


# Load


# Dies when cost/hosts.py says `units * batch * kv)` for `units * (weight + batch * (kv - weight)))`.
def test_a_batch_reads_weights_once_and_caches_once_each() -> None:
    here = world(SMALL, box(), box(flop_per_s=1e16, slots=8))
    cache = here.hosts[1].model_s(SMALL, 1, 256, 2) - here.hosts[1].model_s(SMALL, 1, 256, 1)
    assert cache == pytest.approx(256 * 8 * 2 * 8 * 16 * 2 / 1e10)
    load = here.load(1, 4, wait_s=0.5)
    step_s = here.hosts[1].model_s(SMALL, 1, 256, 4)
    assert load == Load(step_s / here.hosts[1].model_s(SMALL, 1, 256), 4, step_s / 2, 0.5)
    assert here.load(1, 1) == IDLE


# Dies when cost/bill.py says `basis.join(machine): 1.0})` for `basis.join(machine): visit})`.
@pytest.mark.parametrize(
    ("text", "prompt", "token"),
    [
        ("all:cloud", 1, 0),  # the loop never leaves
        ("edge[0:4] cloud[4:8]", 1, 1),
        ("edge[0:2] cloud[2:4] edge[4:5] cloud[5:7] edge[7:8]", 2, 2),
        ("edge[0:8] head=cloud", 1, 1),
        ("cloud[0:8] embed=edge", 1, 1),
        ("all:edge", 0, 0),
    ],
)
def test_a_visit_to_a_loaded_machine_waits_for_its_running_iteration(text: str, prompt: int, token: int) -> None:
    here = world(SMALL, box(), box(slots=8))
    x = here.basis.form({here.basis.join(1): 1.0})
    for chunk in (None, 16):
        one = bill(here, Decision(Partition.parse(text, SMALL, NAMES), prefill_chunk=chunk), CHAT)
        assert (one.ttft.at(x), one.tpot.at(x)) == pytest.approx((prompt, token))


# Hosts


class Stopwatch:
    """Measured times that are easy to recognise."""

    def half_s(self, part: Part, units: int, rows: int, context: int, rested: bool = False, batch: int = 1) -> float:
        return batch * units * rows * (1.0 if part is Part.ATTENTION else 2.0)

    def head_s(self, rows: int, rested: bool = False) -> float:
        return 1000.0 * rows

    def stage_s(self, rows: int, rested: bool = False, batch: int = 1) -> float:
        return 1e5

    def call_s(self, threaded: bool) -> float:
        return 0.0

    def message_s(self, num_bytes: float) -> float:
        return 1e7

    @property
    def token_s(self) -> float:
        return 0.0


# Dies when cost/hosts.py says `total += host.half_s(` for `total += number * host.half_s(`.
def test_what_was_measured_replaces_the_roofline_and_an_emulated_machine_is_stretched() -> None:
    measured = Host(box(), measured=Stopwatch())
    one = bill(world(SMALL, measured), on(SMALL, 0), Job(10, 5))
    assert one.prefill_busy_s == (8 * (8 * 10 * 1 + 8 * 10 * 2) + 1000 + 1e5,)
    assert one.token_busy_s == (8 * (8 * 1 + 8 * 2) + 1000 + 1e5,)
    slow = bill(world(SMALL, Host(box(), measured=Stopwatch(), stretch=2.0)), on(SMALL, 0), Job(10, 5))
    assert slow.token_busy_s[0] == 2 * one.token_busy_s[0]
    roofline, stretched = (bill(world(SMALL, Host(box(), stretch=s)), on(SMALL, 0), CHAT) for s in (1.0, 3.0))
    assert stretched.token_busy_s[0] == pytest.approx(3 * roofline.token_busy_s[0])


# Edges


def figures(one: Bill, x: Form) -> tuple[float, float]:
    return float(one.ttft.at(x)), float(one.tpot.at(x))


def test_one_chunk_of_the_whole_prompt_or_more_is_no_chunking() -> None:
    here = world(SMALL, box(), box(), link=LINKS["cell"])
    cut, x = Partition.cut(SMALL, 4), here.conditions()
    plain = figures(bill(here, Decision(cut), Job(64, 4)), x)
    for chunk in (64, 65, 10_000):
        assert figures(bill(here, Decision(cut, prefill_chunk=chunk), Job(64, 4)), x) == plain
    assert figures(bill(here, Decision(cut, prefill_chunk=63), Job(64, 4)), x) != plain


def test_one_token_out_costs_the_prompt_and_nothing_after() -> None:
    here = world(SMALL, box(idle_w=1, decode_w=2, prefill_w=2), box(slots=8, decode_w=9, prefill_w=9))
    one = price(here, Decision(Partition.u_shape(SMALL, 2, 2)), Job(64, 1))
    assert one.total_s == one.ttft_s
    assert one.down_bytes == one.up_bytes == 64 * 4 * SMALL.d_model


def test_one_machine_and_no_link_is_a_world() -> None:
    here = world(SMALL, box())
    assert price(here, on(SMALL, 0), CHAT).up_bytes == 0
    with pytest.raises(PartitionError, match="only machines 0 to 0"):
        price(here, on(SMALL, 1), CHAT)


@pytest.mark.parametrize("links", [{}, {(0, 1): LINKS["lan"]}, {(0, 1): LINKS["lan"], (1, 2): LINKS["lan"]}])
def test_a_worker_without_a_link_to_the_device_is_refused(links: dict[tuple[int, int], LinkSpec]) -> None:
    with pytest.raises(SpecError, match="a link from it to every other machine"):
        World(SMALL, (Host(box()),) * 3, links)


def test_links_between_machines_that_are_not_there_are_refused() -> None:
    for pair in ((1, 0), (0, 2), (0, 0)):
        with pytest.raises(SpecError, match="do not join machines 0 to 1"):
            World(SMALL, (Host(box()),) * 2, {(0, 1): LINKS["lan"], pair: LINKS["lan"]})


def test_a_request_is_written_as_prompt_and_output_tokens() -> None:
    assert Job.parse("128/64") == Job.parse(" 128 / 64 ") == Job(128, 64)
    assert (Job(10, 1).mean_context, Job(10, 20).mean_context) == (11, 20)
    for text in ("", "128", "128/", "/1", "a/b", "-1/2", "1.5/2", "1/2/3"):
        with pytest.raises(RequestError, match="write prompt/output tokens, as in 128/128"):
            Job.parse(text)
    for prompt, out in ((0, 1), (1, 0)):
        with pytest.raises(RequestError, match="expected at least 1/1"):
            Job(prompt, out)
    for text in ("", "2", "2+", "+2", "2-2", "a+b", "1+1+1"):
        with pytest.raises(RequestError, match=r"write first\+last layers"):
            Floor.parse(text)
