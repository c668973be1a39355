"""Products of weights with a few rows, and some of what stands between them, by small kernels of our own.

For a machine that asks: its C compiler makes them of `products.c`, once; they are kept in the user's cache under the
hash of what they were made of. Without a compiler, or on a processor without AVX-512 VNNI and VBMI, there are none, and
torch's serve. Weights are read where torch and oneDNN have packed them, so nothing is held twice. Knows no models.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from splitwise_llm.errors import BrokenInvariant, RequestError
from splitwise_llm.model.packed import DEEP, INT8_ROWS, Packed, product_of_halves
from splitwise_llm.spec import Dtype, Kernels, Weights

FLAGS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")  # no step may be fused for one number of rows only
OWN_INT8_ROWS = 16
"""More are multiplied by oneDNN, with the same bits."""
OWN_FULL_ROWS = 16
"""More are multiplied by oneDNN. A few of `products.c`'s have one's bits each, which those of oneDNN have not."""
OUTPUTS = 64
"""Outputs that are computed together; for full weights also where they lie in blocks of 32."""
BETWEEN_STEP = 16
"""Numbers of a row that are computed together."""
COMPILE_S = 120.0
CALL = "--kernels compiled"
LEAVE_OUT = "or leave --kernels out"
SPREAD_BYTES = 1 << 20
"""What is read sooner than threads are woken is not spread over them."""
_COLUMN_STEP = DEEP * 4


def settled(kernels: Kernels, weights: Weights, dtype: Dtype, device: torch.device) -> Kernels:
    """Torch's or our own. Raises RequestError where our own are asked for and cannot be."""
    if kernels is Kernels.COMPILED:
        _check(weights, dtype, device)
    elif kernels is Kernels.AUTO:
        try:
            _check(weights, dtype, device)
        except RequestError:
            return Kernels.TORCH
        return Kernels.COMPILED
    return kernels


def _check(weights: Weights, dtype: Dtype, device: torch.device) -> None:
    """Raise RequestError, with what to do, unless there are compiled kernels here for such weights."""
    if weights is Weights.FULL and dtype is Dtype.FP16:
        raise RequestError(f"{CALL} has none for weights in fp16: add --dtype bf16, or --weights int8, {LEAVE_OUT}")
    if device.type != "cpu":
        raise RequestError(f"{CALL} computes on the processor, and this machine on {device}: leave it out")
    kernels()


class Rows(NamedTuple):
    """Rows of activations, rounded to 16 bits; columns padded with zeros."""

    halves: Tensor
    """Low and high bytes, each the half of a number plus 128, or `is_signed` and without: uint8 (2, rows, padded)."""
    per_unit: Tensor
    """By what a row was multiplied, fp32 (rows,)."""
    sums: Tensor
    """Of 32 rounded numbers each, fp32 (rows, padded / 32)."""


class Library:
    """The library, loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.bf16_product = library.bf16_pairs_product if library.can_multiply_pairs() else library.bf16_product
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def rounded(self, x: Tensor, columns: int, padded: int, is_signed: bool = False) -> Rows:
        """x (rows, columns) of any float dtype; `padded` is a multiple of 32."""
        wide = x.float().contiguous()
        rows = len(wide)
        if wide.shape[1] != columns:
            raise BrokenInvariant(f"a product of {columns} columns was given rows of {wide.shape[1]}")
        made = Rows(
            torch.empty(2, rows, padded, dtype=torch.uint8),
            torch.empty(rows),
            torch.empty(rows, padded // 32),
        )
        into = map(_at, (*made.halves, made.per_unit, made.sums))
        self._library.halves_of(_at(wide), rows, columns, padded, *into, is_signed)
        return made

    def int8_sums(self, weight: Packed) -> Tensor:
        """Of all weights of each output, int32 (outputs, padded to blocks)."""
        if weight.width != OUTPUTS:  # or weights are taken for those of other outputs
            raise BrokenInvariant(f"a product of int8 was given blocks of {weight.width} outputs")
        blocks, deep = weight.blocks.shape[:2]
        sums = torch.empty(blocks * OUTPUTS, dtype=torch.int32)
        self._library.int8_sums(_at(weight.blocks), deep * _COLUMN_STEP, blocks, _at(sums))
        return sums

    def int8(self, x: Rows, weight: Packed, scale: Tensor, sums: Tensor) -> Tensor:
        """x @ (values * scale).T, fp32 (rows, out), for scale and sums (outputs padded to blocks)."""
        return self._product(
            self._library.int8_product, (*x.halves, x.per_unit, weight.blocks, scale, sums), x, len(scale)
        )[:, : weight.out_features]

    def int4(self, x: Rows, packed: Tensor, scale_zero: Tensor) -> Tensor:
        """The same for signed halves and torch's int4 weights in blocks of 64 outputs, fp32 (rows, outputs)."""
        return self._product(
            self._library.int4_product, (*x.halves, x.sums, x.per_unit, packed, scale_zero), x, len(packed)
        )

    def full(self, x: Tensor, weight: Packed) -> Tensor:
        """x @ weight.T in the dtype of both, fp32 or bf16: at most 16 rows (rows, in_features) to (rows, out)."""
        if x.shape[1] != weight.in_features:
            raise BrokenInvariant(f"a product of {weight.in_features} columns was given rows of {x.shape[1]}")
        if x.dtype is not weight.blocks.dtype or len(x) > OWN_FULL_ROWS:  # or memory of others is read, or written
            raise BrokenInvariant(f"a product with {weight.blocks.dtype} was given {len(x)} rows of {x.dtype}")
        if x.dtype is torch.float32:
            product = self._library.fp32_product
        else:
            product = self.bf16_product
            x = F.pad(x, (0, x.shape[1] % 2))
        x = x.contiguous()
        y = torch.empty(len(x), weight.out_features, dtype=x.dtype)
        given = _at(x), _at(weight.blocks), _at(y), *x.shape, weight.out_features, weight.width
        self._spread(product, given, -(-weight.out_features // OUTPUTS), weight.nbytes)
        return y

    # Between products, in fp32 or bf16: widths are multiples of BETWEEN_STEP

    def rms_norm(self, x: Tensor, weight: Tensor, least: float) -> Tensor:
        """x / sqrt(the sum of its squares + least) * weight, row by row: x (rows, width), weight (width,) in fp32."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._library.rms_norm(_at(x), _at(weight), _at(y), *x.shape, least, x.dtype is torch.bfloat16)
        return y

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up, (rows, width), for x (rows, gate and up)."""
        x = x.contiguous()
        y = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype)
        self._library.gated(_at(x), _at(y), *y.shape, x.dtype is torch.bfloat16)
        return y

    def _product(self, product: Callable[..., None], read: tuple[Tensor, ...], x: Rows, outputs: int) -> Tensor:
        rows, columns = x.halves.shape[1:]
        y = torch.empty(rows, outputs)
        given = *map(_at, read), _at(y), rows, columns, outputs
        self._spread(product, given, outputs // OUTPUTS, outputs * columns)
        return y

    def _spread(self, product: Callable[..., None], given: tuple[int, ...], blocks: int, num_bytes: int) -> None:
        """Call `product` for all blocks of outputs, on as many threads as torch has."""
        threads = torch.get_num_threads()
        if threads == 1 or num_bytes < SPREAD_BYTES:
            product(*given, 0, blocks)
            return
        ends = [blocks * part // threads for part in range(threads + 1)]
        others = [self._others(threads).submit(product, *given, *some) for some in pairwise(ends[1:])]
        product(*given, 0, ends[1])
        for other in others:
            other.result()

    def _others(self, threads: int) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != threads:
            self._pool = threads, ThreadPoolExecutor(threads - 1, "products")
        return self._pool[1]


class Int8Product:
    """Of one packed weight: x (rows, in) to (rows, out), with the bits of `exact_int8_product`."""

    def __init__(self, weight: Packed, scale: Tensor) -> None:
        """`scale` (out,), fp32."""
        self._kernels, self._weight, self._scale = kernels(), weight, scale
        self._sums = self._kernels.int8_sums(weight)
        self._padded_scale = F.pad(scale, (0, len(self._sums) - len(scale)))
        self._columns = weight.blocks.shape[1] * _COLUMN_STEP

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > INT8_ROWS:
            return torch.cat([self(some) for some in torch.split(x, INT8_ROWS)])
        rounded = self._kernels.rounded(x, self._weight.in_features, self._columns)
        if len(x) <= OWN_INT8_ROWS:
            y = self._kernels.int8(rounded, self._weight, self._padded_scale, self._sums)
        else:
            halves = rounded.halves[..., : self._weight.in_features]
            y = product_of_halves(halves, rounded.per_unit.unsqueeze(1), self._weight, self._scale)
        return y.to(x.dtype)


@cache
def kernels() -> Library:
    """Made first where they are not in the cache. Raises RequestError."""
    made = _made()
    try:
        library = ctypes.CDLL(str(made))
    except OSError as error:
        raise RequestError(f"{CALL}: {made} cannot be loaded ({error}); delete it, {LEAVE_OUT}") from error
    if not library.can_multiply():
        raise RequestError(f"{CALL} needs a processor with AVX-512 VNNI and VBMI: leave it out")
    pointer, count = ctypes.c_void_p, ctypes.c_long
    library.halves_of.argtypes = [pointer, count, count, count, pointer, pointer, pointer, pointer, ctypes.c_int]
    library.int8_sums.argtypes = [pointer, count, count, pointer]
    for product in (library.int8_product, library.int4_product):
        product.argtypes = [*[pointer] * 7, *[count] * 5]
    full = [library.fp32_product, library.bf16_product]
    if library.can_multiply_pairs():
        full.append(library.bf16_pairs_product)
    for product in full:
        product.argtypes = [*[pointer] * 3, *[count] * 6]
    library.rms_norm.argtypes = [*[pointer] * 3, count, count, ctypes.c_float, ctypes.c_int]
    library.gated.argtypes = [pointer, pointer, count, count, ctypes.c_int]
    low_bit = [library.halves_of, library.int8_sums, library.int8_product, library.int4_product]
    for function in (*low_bit, *full, library.rms_norm, library.gated):
        function.restype = None
    return Library(library)


def _made() -> Path:
    source = resources.files("splitwise_llm.model") / "products.c"
    code = source.read_bytes()
    name = hashlib.sha256(code + " ".join(FLAGS).encode()).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "splitwise-llm"
    library = cached / f"products-{name}.so"
    if os.path.exists(library):  # False, unlike Path.exists, where the folder may not be looked into
        return library
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        raise RequestError(f"{CALL} needs a C compiler, once: install one (apt-get install gcc), {LEAVE_OUT}")
    try:
        cached.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached) as place:
            made = Path(place) / "products.so"
            command = [*compiler.split(), *FLAGS, "-x", "c", "-", "-o", str(made)]
            subprocess.run(command, input=code, check=True, capture_output=True, timeout=COMPILE_S)
            made.replace(library)  # at once: another process may do the same
    except subprocess.CalledProcessError as error:
        said = (error.stderr.decode(errors="replace").strip() or f"status {error.returncode}").splitlines()[0]
        raise RequestError(f"{CALL}: {compiler} failed: {said}; {LEAVE_OUT}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise RequestError(f"{CALL}: the kernels cannot be made in {cached} ({error}); {LEAVE_OUT}") from error
    return library


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()
