"""Each weight form computes what it stands for, stands for what was given, and holds no more than it says."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from splitwise_llm.errors import ModelError
from splitwise_llm.model import linear, packed
from splitwise_llm.model.linear import Full, Int4, Int8, int4_layout, linear_of, quantise_int4, table_of
from splitwise_llm.spec import Weights

QUANTISED = [Weights.INT8, Weights.INT4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16_ROUNDING = 0.005  # relative error of a bf16 product of Gaussian numbers is about 0.002 to 0.003
ROWS = st.sampled_from([1, 2, 5, 6, 7, 21, 33, 81, 128, 300])
OUT = st.sampled_from([1, 16, 63, 64, 65, 200, 257])
IN = st.sampled_from([16, 33, 64, 96, 136, 768])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


def product_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Against x @ weight.T, relative to its expected size: one product may happen to be near zero."""
    x, weight = x.double(), weight.double()
    return float((y.double() - x @ weight.t()).norm() / (x.norm() * weight.norm()) * weight.shape[1] ** 0.5)


@contextmanager
def few_rows_are(count: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "INT8_FEW_ROWS", count)
        patch.setattr(linear, "INT4_FEW_ROWS", count)
        yield


@contextmanager
def packing(wanted: bool = True) -> Iterator[None]:
    """Weights of every size are packed wherever the processor can, or none is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "LEAST_BYTES", 0 if wanted else 1 << 60)
        patch.setattr(packed, "MOST_PADDING", 1e9)
        yield


@given(st.sampled_from(Weights), st.sampled_from(DTYPES), ROWS, OUT, IN, st.booleans())
@settings(max_examples=150)
def test_a_layer_multiplies_by_the_weight_it_stands_for(
    form: Weights, dtype: torch.dtype, rows: int, outputs: int, inputs: int, is_packed: bool
) -> None:
    with packing(is_packed):
        layer = linear_of(gaussian(outputs, inputs), form, dtype)
    x = gaussian(rows, inputs, seed=1).to(dtype)
    y = layer(x)
    assert y.shape == (rows, outputs)
    assert y.dtype is dtype
    exact = form is Weights.FULL and dtype is torch.float32
    few = 2 if y.numel() < 16 else 1  # one product may be three times its expected size, and so its rounding
    assert product_error(y, x, layer.dequantised()) < few * (1e-6 if exact else BF16_ROUNDING)
    assert torch.equal(y, layer(x)), "the same call gave other bits"


PACKABLE = [(Weights.FULL, torch.float32), (Weights.FULL, torch.bfloat16), *((Weights.INT8, dtype) for dtype in DTYPES)]


@given(st.sampled_from(PACKABLE), OUT, IN)
@settings(max_examples=60)
def test_packed_and_plain_stand_for_the_same_weight(
    kind: tuple[Weights, torch.dtype], outputs: int, inputs: int
) -> None:
    weight, ids = gaussian(outputs, inputs), torch.tensor([outputs - 1, 0, outputs // 2])
    with packing():
        one = linear_of(weight, *kind)
    with packing(False):
        other = linear_of(weight, *kind)
    assert torch.equal(one.dequantised(), other.dequantised())
    assert isinstance(one, Full | Int8)
    assert isinstance(other, Full | Int8)
    assert torch.equal(one.lookup(ids), other.lookup(ids))
    assert one.lookup(ids).is_contiguous()
    assert other.lookup(ids).is_contiguous(), "what is computed from other strides has other bits"


@pytest.mark.parametrize(("form", "dtype"), PACKABLE)
def test_this_processor_packs_what_oneDNN_multiplies_fast(form: Weights, dtype: torch.dtype) -> None:
    if not torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_vnni_supported():
        pytest.skip("no AVX-512 with bf16 and VNNI here")
    layer = linear_of(gaussian(2048, 768), form, dtype)
    assert isinstance(layer, Full | Int8)
    assert layer._packed is not None
    assert layer.num_bytes <= 1.02 * (1 if form is Weights.INT8 else dtype.itemsize) * 2048 * 768
    small = linear_of(gaussian(256, 256), form, dtype)
    assert isinstance(small, Full | Int8)
    assert small._packed is None, "a call of oneDNN costs more than reading so little"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filled", [5, 37, 70])
@pytest.mark.parametrize("widths", [(64, 32), (32, 64)])  # on any processor the first of one of these is wrong
def test_a_weight_of_almost_all_zeros_is_read_as_it_was_packed(
    widths: tuple[int, int], filled: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packed.WIDTHS, dtype, widths)
    weight = torch.zeros(256, 768, dtype=dtype)  # nor do the lines tell that are looked at first
    weight[filled] = gaussian(1, 768)[0].to(dtype)
    with packing():
        layer = linear_of(weight, Weights.FULL, dtype)
    assert torch.equal(layer.dequantised(), weight.float())


@given(st.integers(1, 17), st.sampled_from(DTYPES), st.floats(-30, 30))
@settings(max_examples=40)
def test_a_packed_int8_row_gives_the_same_bits_whatever_rows_come_with_it(
    rows: int, dtype: torch.dtype, exponent: float
) -> None:
    with packing():
        layer = linear_of(gaussian(200, 768), Weights.INT8, dtype)
    assert isinstance(layer, Int8)
    if layer._packed is None:
        pytest.skip("no exact products of bytes here")
    x = gaussian(rows, 768, seed=1)
    x[-1] *= 2.0 ** (exponent if dtype is not torch.float16 else exponent / 4)
    x = x.to(dtype)
    together, alone = layer(x), torch.cat([layer(row) for row in x.split(1)])
    assert torch.equal(together, alone)


def test_packed_int8_rounds_activations_to_16_bits() -> None:
    with packing():
        layer = linear_of(gaussian(200, 768), Weights.INT8, torch.float32)
    assert isinstance(layer, Int8)
    if layer._packed is None:
        pytest.skip("no exact products of bytes here")
    x = gaussian(3, 768, seed=1)
    assert product_error(layer(x), x, layer.dequantised()) < 1e-4
    x[0] = 0
    x[1, 5] = float("nan")
    y = layer(x)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    assert y[2].isfinite().all()


@given(st.sampled_from(QUANTISED), st.integers(1, 40), OUT, IN)
@settings(max_examples=30)
def test_decode_and_prefill_agree(form: Weights, rows: int, outputs: int, inputs: int) -> None:
    layer, x = linear_of(gaussian(outputs, inputs), form, torch.float32), gaussian(rows, inputs, seed=1)
    with few_rows_are(0):
        prefill = layer(x)
    with few_rows_are(rows):
        decode = layer(x)
    for y in (prefill, decode):
        assert product_error(y, x, layer.dequantised()) < BF16_ROUNDING


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("rows", [1, 128])
def test_quantising_costs_what_was_measured(form: Weights, rows: int) -> None:
    weight, x = gaussian(512, 1024), gaussian(rows, 1024, seed=1)
    allowed = {Weights.INT8: 0.0095, Weights.INT4: 0.083}[form]
    assert error(linear_of(weight, form, torch.float32)(x), x @ weight.t()) < allowed


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=20)
def test_unpacking_gives_back_the_quantised_integers(blocks: int, groups: int, seed: int) -> None:
    weight = gaussian(64 * blocks, 32 * groups, seed=seed)
    layout = int4_layout()
    assert layout is not None, "this processor's packing follows no rule we know; prefill will be slow"
    values, scale_zero = quantise_int4(weight)
    packed = Int4(weight)._packed.view(-1, weight.shape[1], layout.size // 2)
    unpacked = layout.in_order(layout.values(packed)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(unpacked.int(), values - 8)
    scale, zero = scale_zero.float().transpose(0, 1).repeat_interleave(32, 1).unbind(2)
    torch.testing.assert_close(Int4(weight).dequantised(), (values - 8) * scale + zero)


def test_other_processors_pack_otherwise_and_compute_the_same() -> None:
    """torch's fallback without vector instructions interleaves the outputs of smaller blocks."""
    code = """
import torch
from splitwise_llm.model.linear import Int4, int4_layout
layer, x = Int4(torch.randn(96, 64)), torch.randn(100, 64)
want = x @ layer.dequantised().t()
assert int4_layout().outputs is not None and int4_layout().size < 64
for y in (layer(x), layer(x[:8])):
    assert (y - want[: len(y)]).norm() < 0.005 * want.norm()
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_an_unknown_packing_leaves_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int4(gaussian(64, 64)), gaussian(100, 64, seed=1)
    want = x @ layer.dequantised().t()
    monkeypatch.setattr(linear, "int4_layout", lambda: None)
    assert error(layer(x), want) < BF16_ROUNDING
    assert error(x @ layer.dequantised().t(), want) < BF16_ROUNDING


@pytest.mark.parametrize("form", Weights)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_owns_its_memory_and_nothing_else(form: Weights, dtype: torch.dtype) -> None:
    stored = gaussian(128, 192).to(dtype)  # as GPT-2 keeps it: (in, out)
    weight = stored.t()[64:, 32:96]
    layer, x = linear_of(weight, form, dtype), gaussian(3, 64, seed=1).to(dtype)
    before = layer(x)
    given, storage = weakref.ref(weight), weakref.ref(stored)
    stored.zero_()
    assert torch.equal(layer(x), before)
    del weight, stored
    assert given() is None
    assert storage() is None
    assert all(held.is_contiguous() for held in vars(layer).values() if isinstance(held, Tensor))


def test_memory_is_what_the_form_promises() -> None:
    weight = gaussian(256, 512)
    for form, dtype in [(form, dtype) for form in Weights for dtype in DTYPES]:
        itemsize = {Weights.FULL: dtype.itemsize, Weights.INT8: 1 + 2 / 512, Weights.INT4: 0.5 + 4 / 32}[form]
        assert linear_of(weight, form, dtype).num_bytes == itemsize * weight.numel()


@pytest.mark.parametrize("form", QUANTISED)
def test_prefill_makes_no_second_copy_of_the_weight(form: Weights) -> None:
    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        num_bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and "view" not in str(func):
                self.num_bytes = max(self.num_bytes, made.untyped_storage().nbytes())
            return made

    layer, x = linear_of(gaussian(2048, 1024), form, torch.bfloat16), gaussian(128, 1024, seed=1).bfloat16()
    with few_rows_are(0), pytest.MonkeyPatch.context() as patch, Largest() as largest:  # type: ignore[no-untyped-call]
        patch.setattr(linear, "BLOCK_BYTES", 1 << 19)
        y = layer(x)
    assert largest.num_bytes <= max(layer.num_bytes, 2 * y.nbytes)
    assert error(y, x.float() @ layer.dequantised().t()) < BF16_ROUNDING


@pytest.mark.parametrize("form", Weights)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [97, 5027])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_table_is_looked_up_and_multiplied(
    form: Weights, dtype: torch.dtype, vocabulary: int, is_packed: bool
) -> None:
    weight, ids = gaussian(vocabulary, 64), torch.tensor([0, vocabulary - 1, 3, 3])
    with packing(is_packed):
        table, x = table_of(weight, form, dtype), gaussian(2, 64, seed=1).to(dtype)
        rows_only = table_of(weight, form, dtype, multiplied=False)
    assert torch.equal(rows_only.lookup(ids), table.lookup(ids))
    rows, logits = table.lookup(ids), table.project(x)
    assert rows.dtype is dtype
    assert logits.dtype is torch.float32
    close = BF16_ROUNDING if form is Weights.FULL else 0.01
    assert error(rows, weight[ids]) < close
    assert error(logits, x.float() @ weight.t()) < close
    every = table.lookup(torch.arange(vocabulary)).float()
    assert error(logits, x.float() @ every.t()) < BF16_ROUNDING, "the two ends hold different tables"
    assert is_packed or table.num_bytes <= (dtype.itemsize if form is Weights.FULL else 1.05) * weight.numel() + 4 * 64


def test_logits_keep_what_tells_them_apart_however_far_they_lie_from_zero() -> None:
    weight, x = gaussian(500, 64), gaussian(4, 64, seed=1)
    far = weight - 100 * x.mean(0) / x.mean(0).square().sum()
    assert (x @ far.t()).mean() < -90
    logits = table_of(far, Weights.INT8, torch.float32).project(x)
    assert error(logits - logits.mean(1, keepdim=True), x @ (weight - weight.mean(0)).t()) < 0.01


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_equal_weights_are_kept_exactly(form: Weights, value: float) -> None:
    layer = linear_of(torch.full((70, 64), value), form, torch.float32)
    torch.testing.assert_close(layer.dequantised(), torch.full((70, 64), value), rtol=0.005, atol=0)
    for rows in (1, 100):
        torch.testing.assert_close(layer(torch.ones(rows, 64)), torch.full((rows, 70), 64 * value), rtol=0.01, atol=0)


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_refused(form: Weights, value: float) -> None:
    weight = gaussian(64, 64)
    weight[5, 7] = value
    with pytest.raises(ModelError, match="damaged"):
        linear_of(weight, form, torch.float32)


@pytest.mark.parametrize("form", Weights)
@pytest.mark.parametrize("inputs", [64, 40])
@pytest.mark.parametrize("is_packed", [True, False])
def test_an_input_of_another_width_is_an_error(form: Weights, inputs: int, is_packed: bool) -> None:
    with packing(is_packed):
        layer = linear_of(gaussian(64, inputs), form, torch.bfloat16)
    for rows in (1, 100):
        with pytest.raises(RuntimeError):
            layer(torch.ones(rows, 32, dtype=torch.bfloat16))


def test_int8_rows_keep_their_own_scale() -> None:
    small_and_large = torch.stack([gaussian(64) * 1e-4, gaussian(64) * 1e4])
    for row, kept in zip(small_and_large, Int8(small_and_large).dequantised(), strict=True):
        assert error(kept, row) < 0.01
