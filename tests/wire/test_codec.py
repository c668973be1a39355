"""Activations on the wire: sizes, errors within bounds, strict decoding, and losses that depend on position only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import BrokenInvariant, ProtocolError, RequestError
from splitwise_llm.wire.codec import ElementLoss, decode, encode, glue, round_trip, rows

RELATIVE_ERROR = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.5 / 127, "int4": 0.5 / 7}
"""Largest error of an element, over the largest of its row."""

shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))


def activations(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10


@given(shapes, st.sampled_from(WirePrecision), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_decoding_gives_the_round_trip_in_the_planned_size(
    shape: tuple[int, int], wire: WirePrecision, seed: int, dtype: torch.dtype
) -> None:
    x = activations(shape, seed).to(dtype)
    payload = encode(x, wire)
    assert len(payload) == wire.payload_bytes(*shape)
    decoded = decode(payload, wire, *shape)
    assert torch.equal(decoded.to(dtype), round_trip(x, wire))
    largest = x.float().abs().amax(dim=1, keepdim=True)
    if dtype is torch.float32:
        assert bool(((decoded.float() - x).abs() <= RELATIVE_ERROR[wire] * largest + 1e-6).all())
    again = round_trip(round_trip(x, wire), wire)
    assert torch.allclose(again.float(), round_trip(x, wire).float(), rtol=1e-5)


def test_zeros_stay_zeros() -> None:
    for wire in WirePrecision:
        assert not decode(encode(torch.zeros(2, 6), wire), wire, 2, 6).any()


@pytest.mark.parametrize("wire", WirePrecision)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(wire: WirePrecision, bad: float) -> None:
    x = torch.zeros(2, 6)
    x[1, 3] = bad
    with pytest.raises(ProtocolError, match="NaN or infinity"):
        decode(encode(x, wire), wire, 2, 6)


def test_fp16_overflow_says_what_to_try() -> None:
    with pytest.raises(ProtocolError, match="bf16"):
        decode(encode(torch.full((1, 4), 1e6), WirePrecision.FP16), WirePrecision.FP16, 1, 4)


@given(st.binary(max_size=64), st.sampled_from(WirePrecision))
def test_a_wrong_length_is_refused(data: bytes, wire: WirePrecision) -> None:
    if len(data) != wire.payload_bytes(3, 7):
        with pytest.raises(ProtocolError, match="bytes, got"):
            decode(data, wire, 3, 7)


def test_lost_elements_depend_on_seed_stream_and_position_not_on_chunking() -> None:
    x, loss = torch.ones(40, 64), ElementLoss(0.3, seed=1)
    whole = loss.apply(x, "3/residual/0", 0)
    parts = [loss.apply(x[a : a + 8], "3/residual/0", a) for a in range(0, 40, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert 0.27 < float((whole == 0).float().mean()) < 0.33
    assert not torch.equal(whole, loss.apply(x, "4/residual/0", 0))
    assert not torch.equal(whole, ElementLoss(0.3, seed=2).apply(x, "3/residual/0", 0))
    assert torch.equal(ElementLoss().apply(x, "any", 0), x)
    with pytest.raises(RequestError, match="element loss"):
        ElementLoss(1.0)


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(WirePrecision), st.data())
def test_encoded_rows_are_what_encoding_those_rows_gives(
    count: int, columns: int, wire: WirePrecision, data: st.DataObject
) -> None:
    x = activations((count, columns), seed=count)
    payload = encode(x, wire)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    alone = encode(x[start:stop], wire) if stop > start else b""
    assert rows(payload, wire, count, columns, start, stop) == alone
    assert rows(memoryview(payload), wire, count, columns, 0, count) == payload
    assert rows(payload, wire, count, columns, 0, count) is payload


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 70), st.sampled_from(WirePrecision))
def test_glued_pieces_decode_to_the_concatenation_of_the_pieces_to_the_bit(
    counts: list[int], columns: int, wire: WirePrecision
) -> None:
    pieces = [(encode(activations((n, columns), seed), wire), n) for seed, n in enumerate(counts)]
    glued = glue([(memoryview(payload) if n % 2 else payload, n) for payload, n in pieces], wire, columns)
    total = sum(counts)
    assert torch.equal(
        decode(glued, wire, total, columns), torch.cat([decode(payload, wire, n, columns) for payload, n in pieces])
    )
    start = 0
    for payload, n in pieces:
        assert rows(glued, wire, total, columns, start, start + n) == payload
        start += n


@pytest.mark.parametrize("wire", WirePrecision)
def test_rows_that_are_not_there_and_pieces_of_another_length_are_refused(wire: WirePrecision) -> None:
    payload = encode(torch.ones(3, 7), wire)
    for start, stop in [(-1, 2), (2, 1), (0, 4)]:
        with pytest.raises(BrokenInvariant, match="of 3 encoded"):
            rows(payload, wire, 3, 7, start, stop)
    with pytest.raises(ProtocolError, match="bytes, got"):
        rows(payload, wire, 4, 7, 0, 1)
    with pytest.raises(ProtocolError, match="bytes, got"):
        glue([(payload, 3), (payload, 2)], wire, 7)
