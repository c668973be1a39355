"""The third way of an FFN, its first matrices on the device and the second on a worker, never pays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.cost import Host, World
from splitwise_llm.decision import WirePrecision
from splitwise_llm.policies.inner_cut import boundary_cut, column_split, first_share, inner_cut
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

DEVICES = ("orin-nx-16gb", "galaxy-s23", "raspberry-pi-5", "a100-80gb", "l4")


def world(model: str, device: str, worker: str, rtt_s: float, rate: float) -> World:
    hosts = (Host(find_device(device), Dtype.FP16, Weights.INT4), Host(find_device(worker)))
    return World(find_model(model), hosts, {(0, 1): LinkSpec(rtt_s, rate, rate)})


@pytest.mark.parametrize(
    ("model", "share", "widened"), [("gpt2-xl", 1 / 2, 5.0), ("llama-7b", 2 / 3, 1 + 11008 / 4096)]
)
def test_what_is_first_and_what_crosses(model: str, share: float, widened: float) -> None:
    one = world(model, "orin-nx-16gb", "a100-80gb", 0.02, 1e6)
    x = one.conditions()
    third, cut = (ways(one, 1, 1, WirePrecision.FP16, x) for ways in (inner_cut, boundary_cut))
    assert first_share(one.spec) == pytest.approx(share)
    assert third.up_bytes == pytest.approx(widened * cut.up_bytes)
    device = one.hosts[0].device
    whole = one.spec.ffn_matrices * one.spec.d_ff * one.spec.d_model
    size = Weights.INT4.num_bytes(one.spec.d_ff, one.spec.d_model, Dtype.FP16) * one.spec.ffn_matrices
    assert third.device_s == pytest.approx(device.seconds(share * 2 * whole, share * size), rel=1e-3)


@given(
    model=st.sampled_from(["gpt2-xl", "gpt2", "llama-7b", "llama-13b", "llama-3.1-8b", "qwen2.5-0.5b"]),
    device=st.sampled_from(DEVICES),
    worker=st.sampled_from(DEVICES),
    rtt_s=st.floats(0.0, 0.3),
    rate=st.floats(1e4, 1e10),
    rows=st.sampled_from([1, 4, 128, 1024]),
    wire=st.sampled_from([WirePrecision.FP16, WirePrecision.INT8, WirePrecision.INT4]),
    slow=st.floats(1.0, 8.0),
)
def test_it_is_dominated(
    model: str, device: str, worker: str, rtt_s: float, rate: float, rows: int, wire: WirePrecision, slow: float
) -> None:
    """By a cut at the layer's boundary in time and bytes; by a column split of the same shares in everything, so
    that no weights of the queues and no price of energy can prefer it."""
    one = world(model, device, worker, rtt_s, rate)
    x = one.conditions()
    x[one.basis.slow(1)] = slow
    third = inner_cut(one, 1, rows, wire, x)
    cut = boundary_cut(one, 1, rows, wire, x)
    # Dies when policies/inner_cut.py says `spec.d_model` for `spec.d_ff + spec.d_model`.
    assert cut.up_bytes < 0.4 * third.up_bytes
    assert cut.seconds < third.seconds
    columns = column_split(one, 1, rows, wire, x, first_share(one.spec))
    assert columns.seconds < third.seconds
    assert columns.up_bytes < third.up_bytes
    assert columns.device_s <= third.device_s
    assert columns.worker_s <= third.worker_s


def test_no_share_of_columns_is_no_split() -> None:
    one = world("llama-7b", "orin-nx-16gb", "a100-80gb", 0.02, 1e6)
    x = one.conditions()
    none = column_split(one, 1, 1, WirePrecision.FP16, x, 0.0)
    assert none.device_s == 0.0
    assert np.isfinite(none.seconds)
