"""Norms and attention, where they are not torch's own, compute what torch's compute in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitwise_llm.model.share import ATTENTION_BLOCK, Positions, _attend_in_blocks, _rms_norm

BF16_ROUNDING = 0.005


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("width", [64, 2048])
def test_an_rms_norm_is_torchs_and_a_row_has_the_same_bits_alone(dtype: torch.dtype, size: float, width: int) -> None:
    x, weight = (size * gaussian(5, width)).to(dtype), gaussian(width, seed=1)
    before = x.clone()
    y = _rms_norm(x, weight * width**0.5, 1e-5)
    assert torch.equal(x, before), "the residual stream was written to"
    assert y.dtype is dtype
    want = F.rms_norm(x.float(), (width,), weight, 1e-5)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(y.float(), want, rtol=rounding, atol=1e-6)
    assert torch.equal(torch.cat([_rms_norm(row, weight * width**0.5, 1e-5) for row in x.split(1)]), y)


@given(
    st.sampled_from([0, 1, 40]),
    st.sampled_from([2, 5, ATTENTION_BLOCK, ATTENTION_BLOCK + 1, 3 * ATTENTION_BLOCK + 7]),
    st.sampled_from([(1, 4), (3, 1), (2, 2)]),
)
@settings(max_examples=30, deadline=None)
def test_attention_in_blocks_sees_what_is_before_a_position_and_nothing_else(
    start: int, count: int, heads: tuple[int, int]
) -> None:
    groups, ratio = heads
    queries = 3 * gaussian(count, groups * ratio, 64).bfloat16()
    # In a cache there is room behind what is filled: whatever lies there is not seen.
    keys, values = (gaussian(groups, start + count + 9, 64, seed=seed).bfloat16() for seed in (1, 2))
    keys[:, start + count :] = values[:, start + count :] = torch.nan
    keys, values = keys[:, : start + count], values[:, : start + count]
    seen = torch.arange(start + count) <= torch.arange(start, start + count).unsqueeze(1)
    y = _attend_in_blocks(queries, keys, values, ratio, Positions(start, count, None, None, None))
    every = (queries.transpose(0, 1), keys, values)
    q, k, v = (tensor.float().unsqueeze(0) for tensor in every)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1).flatten(1)
    assert float((y.float() - want).norm() / want.norm()) < BF16_ROUNDING
