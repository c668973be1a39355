"""Our own kernels compute what torch's do, row by row the same bits, and say what they lack."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear import BF16_ROUNDING, DTYPES, error, gaussian, packing, product_error

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.errors import BrokenInvariant, RequestError
from splitwise_llm.model import compiled
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.linear import Full, Int4, Int8, linear_of, table_of
from splitwise_llm.model.packed import DEEP, TOGETHER, Packed
from splitwise_llm.model.weights import Resident
from splitwise_llm.spec import Dtype, Kernels, Weights

CPU = torch.device("cpu")
OUT = st.sampled_from([1, 63, 64, 65, 200, 257])
IN = st.sampled_from([16, 33, 64, 136, 768])
FULL_IN = st.sampled_from([1, 33, 64, 136, 768, 1047])
FULL_DTYPES = [torch.float32, torch.bfloat16]


def lacking() -> str:
    """What this computer lacks for them; that a compiler which is there fails is no excuse."""
    if not (os.environ.get("CC") or shutil.which("cc")):
        return "no C compiler"
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    return "" if "avx512_vnni" in flags and "avx512vbmi" in flags else "no AVX-512 VNNI and VBMI"


served = pytest.mark.skipif(bool(lacking()), reason=f"no compiled kernels here: {lacking()}")


@pytest.fixture
def unmade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is in the cache, or loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.kernels.cache_clear()
    yield tmp_path
    compiled.kernels.cache_clear()


@served
@given(st.integers(1, 40), st.sampled_from(DTYPES), OUT, IN, st.floats(-30, 30))
@settings(max_examples=100)
def test_an_int8_product_has_the_bits_of_oneDNN(
    rows: int, dtype: torch.dtype, outputs: int, inputs: int, exponent: float
) -> None:
    with packing():
        torchs, ours = (
            linear_of(gaussian(outputs, inputs), Weights.INT8, dtype, kernels)
            for kernels in (Kernels.TORCH, Kernels.COMPILED)
        )
    assert isinstance(ours, Int8)
    assert ours._own is not None
    x = gaussian(rows, inputs, seed=1)
    x[-1] *= 2.0 ** (exponent if dtype is not torch.float16 else exponent / 4)
    x = x.to(dtype)
    assert torch.equal(ours(x), torchs(x))
    assert torch.equal(ours(x), torch.cat([ours(row) for row in x.split(1)]))


@served
@given(st.integers(1, 150), st.sampled_from(DTYPES), OUT, IN)
@settings(max_examples=100)
def test_an_int4_row_is_exact_and_has_the_same_bits_whatever_rows_come_with_it(
    rows: int, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    torchs, layer = (
        linear_of(gaussian(outputs, inputs), Weights.INT4, dtype, kernels)
        for kernels in (Kernels.TORCH, Kernels.COMPILED)
    )
    assert isinstance(layer, Int4)
    assert layer._own is not None
    assert torch.equal(layer.dequantised(), torchs.dequantised())
    assert layer.num_bytes == torchs.num_bytes
    x = gaussian(rows, inputs, seed=1).to(dtype)
    together = layer(x)
    assert together.dtype is dtype
    assert together.shape == (rows, outputs)
    few = 3 if together.numel() < 16 else 1
    assert product_error(together, x, layer.dequantised()) < few * (1e-4 if dtype is torch.float32 else BF16_ROUNDING)
    assert torch.equal(together, torch.cat([layer(row) for row in x.split(1)]))


# Dies when model/linear.py says `len(x) > 9999` for `len(x) > INT4_TURN_ROWS`.
@served
def test_a_prompt_leaves_no_more_beside_an_int4_product_than_a_turn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    rounded = compiled.Library.rounded

    def seen(self: compiled.Library, x: torch.Tensor, *rest: int, **more: bool) -> compiled.Rows:
        turns.append(len(x))
        return rounded(self, x, *rest, **more)

    layer = linear_of(gaussian(64, 32), Weights.INT4, torch.bfloat16, Kernels.COMPILED)
    monkeypatch.setattr(compiled.Library, "rounded", seen)
    assert len(layer(gaussian(398, 32).bfloat16())) == 398
    assert turns == [64] * 6 + [14]


@served
@given(st.integers(1, 17), st.sampled_from(FULL_DTYPES), OUT, FULL_IN, st.booleans())
@settings(max_examples=150)
def test_a_full_row_has_the_same_bits_whatever_rows_come_with_it(
    rows: int, dtype: torch.dtype, outputs: int, inputs: int, in_pairs: bool
) -> None:
    weight = gaussian(outputs, inputs).to(dtype)
    with packing(), pytest.MonkeyPatch.context() as patch:
        layer = linear_of(weight, Weights.FULL, dtype, Kernels.COMPILED)
        assert isinstance(layer, Full)
        if layer._packed is None:
            assert (dtype, outputs) == (torch.float32, 1), "which oneDNN leaves plain"
            return
        assert layer._own is not None
        if not in_pairs:  # as on a processor without products of pairs
            patch.setattr(layer._own, "bf16_product", layer._own._library.bf16_product)
        apart = gaussian(rows, inputs + 3, seed=1).to(dtype)
        x = apart[:, 3:]  # no row begins where memory likes it
        together = layer(x)
        assert together.dtype is dtype
        assert together.shape == (rows, outputs)
        want = x.double() @ weight.double().t()
        room = 1e-6 * x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
        if dtype is torch.bfloat16:
            room += want.abs() * 2**-8  # nothing is rounded but the sum
        assert ((together.double() - want).abs() <= room).all()
        few = x[: compiled.OWN_FULL_ROWS]
        assert torch.equal(layer(few), torch.cat([layer(row) for row in few.split(1)]))


def packed_by_hand(weight: torch.Tensor, width: int) -> Packed:
    """As oneDNN packs, on any processor: some in blocks of 64 outputs, some of 32."""
    (outputs, columns), together = weight.shape, TOGETHER[weight.dtype]
    padded = F.pad(weight, (0, -columns % (DEEP * together), 0, -outputs % width))
    lines = padded.view(-1, width, padded.shape[1] // (DEEP * together), DEEP, together)
    blocks = lines.permute(0, 2, 3, 1, 4).contiguous()
    return Packed(blocks, blocks, outputs, columns, blocks.nbytes)


# Dies when model/products.c says `gap = {128, width * 4}` for `gap = {width == 64 ? 128 : deep / 2, width * 4}`.
# Dies when model/compiled.py says `len(weight.blocks) // 2, weight.nbytes` for
# `-(-weight.out_features // OUTPUTS), weight.nbytes`.
@served
@given(st.integers(1, 16), st.sampled_from(FULL_DTYPES), OUT, FULL_IN, st.booleans())
@settings(max_examples=100)
def test_blocks_of_32_outputs_have_the_bits_of_blocks_of_64(
    rows: int, dtype: torch.dtype, outputs: int, inputs: int, in_pairs: bool
) -> None:
    own, weight, x = compiled.kernels(), gaussian(outputs, inputs).to(dtype), gaussian(rows, inputs, seed=1).to(dtype)
    wide, narrow = (packed_by_hand(weight, width) for width in (64, 32))
    every = torch.arange(outputs)
    assert torch.equal(wide.lookup(every), weight)
    assert torch.equal(narrow.lookup(every), weight)
    with pytest.MonkeyPatch.context() as patch:
        if not in_pairs:
            patch.setattr(own, "bf16_product", own._library.bf16_product)
        y = own.full(x, narrow)
        assert torch.equal(y, own.full(x, wide))
    want = x.double() @ weight.double().t()
    room = 1e-6 * x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + want.abs() * 2**-8
    assert ((y.double() - want).abs() <= room).all()


@served
@pytest.mark.parametrize("outputs", [32, 1056, 2080, 2112])
def test_threads_share_blocks_of_32_outputs(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "SPREAD_BYTES", 0)  # or one block is never shared
    weight, x = gaussian(outputs, 1056).bfloat16(), gaussian(3, 1056, seed=1).bfloat16()
    own, narrow, before = compiled.kernels(), packed_by_hand(weight, 32), torch.get_num_threads()
    alone = own.full(x, narrow)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(own.full(x, narrow), alone)
    finally:
        torch.set_num_threads(before)


@served
def test_int8_in_blocks_of_32_outputs_is_not_taken_for_64() -> None:
    with pytest.raises(BrokenInvariant, match="blocks of 32 outputs"):
        compiled.Int8Product(packed_by_hand(gaussian(64, 64).to(torch.int8), 32), torch.ones(64))


@served
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_a_part_of_the_outputs_has_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    weight, x = gaussian(257, 768).to(dtype), gaussian(5, 768, seed=1).to(dtype)
    with packing():
        whole, *parts = (
            linear_of(some, Weights.FULL, dtype, Kernels.COMPILED) for some in (weight, weight[:100], weight[100:])
        )
    assert torch.equal(torch.cat([part(x) for part in parts], 1), whole(x))


@served
@given(st.integers(1, 40), st.sampled_from(FULL_DTYPES), st.sampled_from([16, 48, 2048]), st.floats(-20, 20))
def test_an_rms_norm_and_a_gate_round_once_and_row_by_row(
    rows: int, dtype: torch.dtype, width: int, exponent: float
) -> None:
    own = compiled.kernels()
    x, weight = gaussian(rows, 2 * width + 1, seed=1).to(dtype)[:, 1:], gaussian(2 * width)
    x[0] *= 2.0**exponent
    normed, gated = own.rms_norm(x, weight, 2e-4), own.gated(x)
    wide = x.double()
    gate, up = wide.chunk(2, 1)
    for y, want in (
        (normed, wide / (wide.square().sum(1, keepdim=True) + 2e-4).sqrt() * weight.double()),
        (gated, F.silu(gate) * up),
    ):
        assert y.dtype is dtype
        rounding = 2e-6 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(y.double(), want, rtol=rounding * 1.01, atol=1e-25)
    assert torch.equal(torch.cat([own.rms_norm(row, weight, 2e-4) for row in x.split(1)]), normed)
    assert torch.equal(torch.cat([own.gated(row) for row in x.split(1)]), gated)


@served
def test_a_gate_that_is_far_off_or_no_number_says_so() -> None:
    gate = torch.tensor([-1e30, -200.0, -104.0, 200.0, 1e30, torch.inf, torch.nan, 0.0]).repeat(2)
    y = compiled.kernels().gated(torch.cat([gate, torch.ones(16)]).unsqueeze(0))[0, :8]
    torch.testing.assert_close(y, F.silu(gate[:8]), rtol=1e-6, atol=1e-7, equal_nan=True)


@served
@pytest.mark.parametrize(
    ("form", "dtype", "is_there"),
    [
        (Weights.FULL, Dtype.FP32, True),
        (Weights.INT4, Dtype.BF16, True),
        (Weights.INT4, Dtype.FP16, False),
        (Weights.INT8, Dtype.FP32, False),
    ],
)
def test_between_products_of_int8_nothing_differs_from_torchs(form: Weights, dtype: Dtype, is_there: bool) -> None:
    checkpoint = Checkpoint(locate("bundled"))
    assert (Resident(checkpoint, dtype, form, CPU, Kernels.COMPILED).between is not None) is is_there
    assert Resident(checkpoint, dtype, form, CPU).between is None


@served
def test_sums_in_bf16_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    given = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.39e38, 3.4e38, 2.0**-120])
    lines = given.repeat(64 // len(given) + 1)[:64]
    parts = [lines.bfloat16()]
    for _ in range(2):
        parts.append((lines - sum(part.float() for part in parts)).bfloat16())
    weight = torch.stack(parts, 1)  # of three columns that sum to the fp32 number
    weight = torch.where(weight.isfinite(), weight, torch.zeros(()).bfloat16())
    want = weight.float().sum(1).bfloat16()
    with packing():
        layer = linear_of(weight, Weights.FULL, torch.bfloat16, Kernels.COMPILED)
    assert torch.equal(layer(torch.ones(1, 3, dtype=torch.bfloat16))[0], want)


@served
@pytest.mark.parametrize("form", [Weights.FULL, Weights.INT8, Weights.INT4])
def test_threads_change_no_bit(form: Weights) -> None:
    layer, x = linear_of(gaussian(2048, 1056), form, torch.float32, Kernels.COMPILED), gaussian(3, 1056, seed=1)
    alone, before = layer(x), torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


# Dies when model/products.c says `product(x + step * 4` for `product(x + row * stride + step * 4`.
@served
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("form", Weights)
def test_what_is_no_number_stays_in_its_row(form: Weights, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with packing():
        layer = linear_of(gaussian(100, 96).to(dtype), form, dtype, Kernels.COMPILED)
    if isinstance(layer, Full) and layer._own:  # as on a processor without products of pairs
        monkeypatch.setattr(layer._own, "bf16_product", layer._own._library.bf16_product)
    x = gaussian(8, 96, seed=1).to(dtype)  # more rows than take their turn together
    want = torch.cat([layer(row) for row in x[3:].split(1)])
    x[0] = 0
    x[1, 5] = float("nan")
    x[2, 7] = float("inf")
    y = layer(x)
    assert y[0].eq(0).all()
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3:], want)


@served
def test_a_table_projects_the_same_logits() -> None:
    weight, x = gaussian(5027, 256), gaussian(3, 256, seed=1)
    tables = [
        table_of(weight, Weights.INT4, torch.float32, kernels=kernels) for kernels in (Kernels.TORCH, Kernels.COMPILED)
    ]
    logits, want = (table.project(x) for table in tables)
    assert error(logits, x @ weight.t()) < 0.01
    assert torch.equal(logits, want)


@served
def test_an_input_of_another_width_is_an_error() -> None:
    for form in Weights:
        with packing():
            layer = linear_of(gaussian(64, 64), form, torch.float32, Kernels.COMPILED)
        for columns in (32, 96):
            with pytest.raises(BrokenInvariant):
                layer(torch.ones(2, columns))


# Dies when model/compiled.py says `if False:` for
# `if x.dtype is not weight.blocks.dtype or len(x) > OWN_FULL_ROWS:  # or memory of others is read, or written`.
@served
def test_rows_that_memory_was_not_made_for_are_an_error() -> None:
    with packing():
        layer = linear_of(gaussian(64, 64), Weights.FULL, torch.bfloat16, Kernels.COMPILED)
    assert isinstance(layer, Full)
    assert layer._own is not None
    assert layer._packed is not None
    with pytest.raises(BrokenInvariant, match=r"bfloat16 was given 2 rows of torch\.float32"):
        layer(gaussian(2, 64))
    with pytest.raises(BrokenInvariant, match="was given 17 rows"):
        layer._own.full(gaussian(17, 64).bfloat16(), layer._packed)


# Dies when model/compiled.py says `*x.shape, weight.out_features - 1` for `*x.shape, weight.out_features`.
@served
@pytest.mark.parametrize("form", [Weights.FULL, Weights.INT8, Weights.INT4])
def test_a_split_model_says_the_same_as_one_machine(form: Weights) -> None:
    async def say(partition: str, kernels: Kernels = Kernels.COMPILED) -> list[int]:
        async with (
            in_process(locate("bundled"), ("cloud",), weights=form, kernels=kernels) as edge,
            edge.generate(list(range(20, 60)), partition, max_new_tokens=12, stop_ids=()) as generation,
        ):
            return [token.id async for token in generation]

    split = asyncio.run(say("edge[0:4] cloud[4:8]"))
    assert split == asyncio.run(say("all:edge"))
    assert split == asyncio.run(say("all:edge", Kernels.TORCH)), "and as other kernels do"


@pytest.mark.parametrize(
    ("weights", "dtype", "device", "said"),
    [
        (Weights.FULL, Dtype.FP16, "cpu", "add --dtype bf16"),
        (Weights.FULL, Dtype.FP32, "cuda", "on the processor"),
        (Weights.INT8, Dtype.FP16, "cuda", "on the processor"),
    ],
)
def test_what_they_do_not_serve_is_refused(weights: Weights, dtype: Dtype, device: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        compiled.settled(Kernels.COMPILED, weights, dtype, torch.device(device))
    assert compiled.settled(Kernels.AUTO, weights, dtype, torch.device(device)) is Kernels.TORCH


def test_without_a_compiler_it_says_what_to_install(unmade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(unmade))
    with pytest.raises(RequestError, match="install one"):
        compiled.settled(Kernels.COMPILED, Weights.INT4, Dtype.BF16, CPU)
    assert compiled.settled(Kernels.AUTO, Weights.INT4, Dtype.BF16, CPU) is Kernels.TORCH


@pytest.mark.parametrize(("compiler", "said"), [("false", "failed"), ("no-such-compiler", "cannot be made")])
def test_a_compiler_that_fails_is_named(
    unmade: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(RequestError, match=said):
        compiled.settled(Kernels.COMPILED, Weights.INT4, Dtype.BF16, CPU)
    assert not list(unmade.rglob("*.so"))


# Dies when model/compiled.py says `if library.exists():` for
# `if os.path.exists(library):  # False, unlike Path.exists, where the folder may not be looked into`.
@served
def test_a_cache_that_may_not_be_looked_into_is_named(unmade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(unmade / ("x" * 300)))  # no name of a file: also root may not
    with pytest.raises(RequestError, match="cannot be made in"):
        compiled.settled(Kernels.COMPILED, Weights.INT4, Dtype.BF16, CPU)
    assert compiled.settled(Kernels.AUTO, Weights.INT4, Dtype.BF16, CPU) is Kernels.TORCH


@served
def test_a_damaged_library_is_named(unmade: Path) -> None:
    compiled._made().write_bytes(b"rubbish")
    with pytest.raises(RequestError, match="delete it"):
        compiled.kernels()


@served
def test_they_are_made_once(unmade: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.kernels()
    assert len(list(unmade.rglob("*"))) == 2, "the folder and the library"
    compiled.kernels.cache_clear()
    monkeypatch.setenv("CC", "false")
    compiled.kernels()


@served
def test_they_are_taken_where_there_are_such() -> None:
    for dtype, weights in ((Dtype.FP32, Weights.FULL), (Dtype.BF16, Weights.FULL), (Dtype.FP16, Weights.INT4)):
        assert compiled.settled(Kernels.AUTO, weights, dtype, CPU) is Kernels.COMPILED
    assert compiled.settled(Kernels.TORCH, Weights.INT4, Dtype.BF16, CPU) is Kernels.TORCH
