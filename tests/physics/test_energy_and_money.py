"""Joules and money by hand: the mistakes of a cloud that serves one request at a time, and of waiting for nothing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import CHAT, SMALL, box, edge_and_cloud, jobs, on, world, worlds
from splitwise_llm.cost import Job, Load, Table, Tariff, World, bill, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Partition
from splitwise_llm.spec import LinkSpec
from strategies import decisions

FP32 = WirePrecision.FP32


def cloud_j(here: World, job: Job, batch: int) -> float:
    shown = price(here, on(here.spec, 1), job, here.conditions({1: here.load(1, batch)}))
    return shown.total_j - shown.device_j


# Dies when cost/bill.py says `basis.slow(machine)) if shared` for `basis.share(machine)) if shared`.
def test_cloud_energy_of_a_request_alone_is_about_twenty_times_that_in_a_batch_of_32() -> None:
    here = edge_and_cloud("orin-nx", "a100")
    joules = [cloud_j(here, CHAT, batch) for batch in (1, 2, 4, 8, 16, 32, 64)]
    assert all(a > b for a, b in pairwise(joules))
    assert 15 < joules[0] / joules[5] < 25
    assert 450 < joules[0] < 700  # J, all of the server for a request of 128/128


# Dies when cost/bill.py says `place = (basis.slow(machine) if is_prefill` for `place = (0 if is_prefill`.
@given(st.integers(1, 4000), st.integers(1, 200), st.integers(1, 64))
def test_cloud_energy_and_rent_of_a_request_never_rise_with_the_batch(prompt: int, out: int, batch: int) -> None:
    here, job = edge_and_cloud("orin-nx", "a100"), Job(prompt, out)
    assert cloud_j(here, job, batch) >= cloud_j(here, job, batch + 1) * (1 - 1e-12)
    alone, joined = (
        price(here, on(here.spec, 1), job, here.conditions({1: load})) for load in (Load(), Load(1.5, 4.0))
    )
    assert alone.usd > joined.usd or out == 1


# Dies when cost/price.py says `+ self._device.idle_w * service` for `+ self._device.idle_w * total`.
def test_the_device_pays_from_arrival_to_the_last_token() -> None:
    device = box(idle_w=2, decode_w=7, prefill_w=9, radio_w=1)
    here = world(
        SMALL, device, box(slots=8, idle_w=100, decode_w=400, prefill_w=480, pue=1.5), link=LinkSpec(0.1, 1e6, 2e6)
    )
    decision = Decision(Partition.cut(SMALL, 4), FP32)
    one, x = bill(here, decision, Job(100, 11)), here.conditions({1: Load(2.0, 4.0, 0.01, 3.0)})
    shown = price(here, decision, one.job, x)
    stream = 4 * SMALL.d_model
    up_s, down_s = (100 + 10) * stream / 1e6, 11 * 4 / 2e6
    compute = (9 - 2) * one.prefill_busy_s[0] + (7 - 2) * 10 * one.token_busy_s[0]
    assert shown.wait_s == 3.0
    assert shown.total_s == pytest.approx(3.0 + shown.ttft_s + 10 * shown.tpot_s)
    assert shown.device_j == pytest.approx(2 * shown.total_s + compute + 1 * (up_s + down_s))
    # A shared server is paid by its part of the batch, idle power and all; a prompt by the time it takes.
    servers_j = 1.5 * (480 * one.prefill_busy_s[1] + 400 * 10 * one.token_busy_s[1] * 2.0 / 4.0)
    assert shown.total_j == pytest.approx(shown.device_j + servers_j)


# Dies when cost/price.py says `others_j + 0 * others_idle_w` for `others_j + others_idle_w`.
def test_a_peer_idles_for_as_long_as_the_request_lasts() -> None:
    peer = box(idle_w=3, decode_w=8, prefill_w=10, pue=1.25)
    here = world(SMALL, box(idle_w=2, decode_w=7, prefill_w=9), peer, link=LinkSpec(0.1, 1e6, 1e6))
    one = bill(here, Decision(Partition.shared(SMALL, {0: 1, 1: 1})), Job(100, 11))
    shown = price(here, one.decision, one.job)
    active = (10 - 3) * one.prefill_busy_s[1] + (8 - 3) * 10 * one.token_busy_s[1]
    assert shown.total_j - shown.device_j == pytest.approx(1.25 * (3 * shown.total_s + active))
    alone = price(here, on(SMALL, 0), Job(100, 11))
    assert alone.total_j == alone.device_j


@given(st.data())
def test_joules_are_at_least_idling_and_in_total_at_least_the_devices(data: st.DataObject) -> None:
    here, job = data.draw(worlds()), data.draw(jobs())
    shown = price(here, data.draw(decisions(here.spec)), job)
    assert shown.device_j >= here.hosts[0].device.idle_w * shown.total_s * (1 - 1e-12)
    assert shown.total_j >= shown.device_j
    assert min(shown.usd, shown.ttft_s, shown.tpot_s) >= 0


# Dies when cost/bill.py says `device.usd_per_hour / 60 * active` for `device.usd_per_hour / 3600 * active`.
# Dies when cost/bill.py says `if src == DEVICE and world` for `if world`.
def test_money_by_hand() -> None:
    server = box(usd_per_hour=3.6, slots=8)  # 0.001 USD/s
    here = World(
        SMALL,
        world(SMALL, box(idle_w=5, decode_w=5, prefill_w=5), server).hosts,
        {(0, 1): LinkSpec(0.0, 1e6, 1e6)},
        tariff=Tariff(usd_per_kwh=0.36, usd_per_gb_down=0.1),
    )
    one = bill(here, Decision(Partition.u_shape(SMALL, 2, 2), FP32), Job(100, 11))
    shown = price(here, one.decision, one.job)
    rent = 0.001 * one.busy_s(1)
    traffic = 0.1 * (100 + 10) * 4 * SMALL.d_model / 1e9
    electricity = 0.36 / 3.6e6 * 5 * shown.total_s
    assert shown.usd == pytest.approx(rent + traffic + electricity)
    x = here.conditions({1: Load(2.0, 4.0)})
    spent = price(here, one.decision, one.job, x)
    rent = 0.001 * (one.prefill_busy_s[1] + 10 * one.token_busy_s[1] * 2 / 4)
    assert spent.usd == pytest.approx(rent + traffic + 0.36 / 3.6e6 * 5 * spent.total_s)


# Dies when cost/price.py says `slots = slot_share * tpot` for `slots = slot_share * later * tpot`.
def test_work_in_the_cloud_is_slot_seconds_over_slots_and_the_prompt() -> None:
    here = world(SMALL, box(), box(slots=8), link=LinkSpec(0.1, 1e6, 2e6))
    one = bill(here, Decision(Partition.cut(SMALL, 4), FP32), Job(100, 11))
    x = here.conditions({1: Load(2.0, 4.0, 0.01, 3.0)})
    at = Table(here, [one]).at(x)
    held = 10 * at.tpot_s[0]  # also while the link travels
    assert at.work.cloud_s[0] == pytest.approx(one.prefill_busy_s[1] + held / 8)
    assert at.work.device_s[0] == pytest.approx(one.busy_s(0))
    assert at.work.up_s[0] == pytest.approx(110 * 4 * SMALL.d_model / 1e6)
    assert at.work.down_s[0] == pytest.approx(11 * 4 / 2e6)
    assert np.all(Table(here, [bill(here, on(SMALL, 0), CHAT)]).at(x).work.cloud_s == 0)
