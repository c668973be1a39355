"""Weights as oneDNN packs them for its products, and what it computes from them; knows no models.

oneDNN reads a plain weight (out, in) at half the speed of memory or less; packed beforehand, near all of it, and
many rows cost what their arithmetic costs. It does not say how it packs. Here one rule is known, and each weight is
packed only if it is found to follow it: then rows can be looked up in it and no second copy is needed. Where oneDNN is
missing or packs otherwise (other processors), there is no packed form, and nothing is said.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

WIDTHS = {torch.float32: (64,), torch.bfloat16: (64, 32), torch.int8: (64,)}
"""Outputs that lie together, as seen so far: 64, but 32 of bf16 on processors with AMX."""
TOGETHER = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}
"""Columns of one output that lie together: four bytes."""
DEEP = 16
"""Such groups of columns in a block."""
ROWS = 16
"""What oneDNN is told to expect; for 1 it leaves fp32 plain."""
LEAST_BYTES = 1 << 20
"""A smaller weight is soon read, and what a call of oneDNN costs on top (0.01 to 0.03 ms) is never won back."""
INT8_ROWS = 64
"""More are multiplied in turns: on the way a product takes eight bytes per output of each row. Larger turns were no
faster, of 398 rows by 11264 x 2048."""
MOST_PADDING = 1.03
"""A packed weight may take so many times its bytes."""
_HALF = torch.tensor([32512.0])
"""Activations are rounded to -32512..32512: two bytes, both of which stay in range after the shift below."""
_SHIFT = torch.tensor([2.0**23 + 128 * 257])
"""Added to such a number in fp32, it leaves 256 * (high - 128) + (low - 128) in the last two bytes of the sum."""
_NO_ZERO = torch.zeros(1, dtype=torch.int64)


class Packed(NamedTuple):
    """A weight in oneDNN's own layout. `blocks` shows the same memory, which `opaque` owns:
    (out / width, in / deep, 16, width, columns together)."""

    opaque: Tensor
    blocks: Tensor
    out_features: int
    in_features: int
    nbytes: int

    @property
    def width(self) -> int:
        """Outputs that lie together."""
        return self.blocks.shape[3]

    def product(self, x: Tensor) -> Tensor:
        """x @ weight.T for x (rows, in_features) of the dtype of the weight."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, self.opaque, None, "none", [], ""))

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the weight, (ids, in_features)."""
        return self.blocks[ids // self.width, :, :, ids % self.width].flatten(1)[:, : self.in_features].contiguous()


def pack(weight: Tensor) -> Packed | None:
    """A packed copy of a float weight (out, in), or None where that is not known to serve."""
    if weight.device.type != "cpu" or weight.nbytes < LEAST_BYTES or not _can_pack(weight.dtype):
        return None
    return _known(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS), weight)


def pack_int8(values: Tensor) -> Packed | None:
    """A packed copy of an int8 weight (out, in) for `exact_int8_product`, or None where that is not known to serve."""
    if values.device.type != "cpu" or values.nbytes < LEAST_BYTES or not _multiplies_bytes_exactly():
        return None
    return _pack_int8(values)


def _pack_int8(values: Tensor) -> Packed | None:
    return _known(torch.ops.onednn.qlinear_prepack(values.contiguous(), [ROWS, values.shape[1]]), values)


def exact_int8_product(x: Tensor, weight: Packed, scale: Tensor) -> Tensor:
    """x @ (values * scale).T, with scale (out_features,) fp32, in the dtype of x.

    Rows of x are rounded to 16 bits (a bf16 has 8), whose halves are multiplied as rows of their own: the weights are
    read once, the sums are exact integers, and a row gives the same bits whatever rows come with it.
    """
    if len(x) > INT8_ROWS:
        return torch.cat([exact_int8_product(some, weight, scale) for some in torch.split(x, INT8_ROWS)])
    rows, columns = x.shape
    wide = x.float()
    per_unit = torch.div(_HALF, wide.abs().amax(1, keepdim=True))
    shifted = torch.addcmul(_SHIFT, wide, per_unit).view(torch.uint8)
    halves = shifted.as_strided((2, rows, columns), (1, 4 * columns, 4))
    return product_of_halves(halves, per_unit, weight, scale).to(x.dtype)


def product_of_halves(halves: Tensor, per_unit: Tensor, weight: Packed, scale: Tensor) -> Tensor:
    """Of rows rounded as above, (2, rows, in_features) of bytes and (rows, 1); fp32 (rows, out_features)."""
    low, high = _bytes_product(halves, weight.opaque, scale).unbind()
    # A row of zeros is infinite per unit: whatever came out is divided by that.
    return low.add_(high, alpha=256).div_(per_unit)


def _bytes_product(x: Tensor, opaque: Tensor, scale: Tensor) -> Tensor:
    """(x - 128) @ (values * scale).T for x (..., in_features) of bytes; fp32 (..., out_features)."""
    product = torch.ops.onednn.qlinear_pointwise.default
    y = product(x, 1.0, 128, opaque, scale, _NO_ZERO, None, 1.0, 0, torch.float32, "none", [], "")
    return cast(Tensor, y)


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    onednn = torch.ops.mkldnn
    match dtype:
        case torch.float32:
            return True
        case torch.bfloat16:
            return bool(onednn._is_mkldnn_bf16_supported())
        case _:
            return False  # fp16 is for processors with fp16 arithmetic, which none of ours has


@cache
def _multiplies_bytes_exactly() -> bool:
    """Whether products of bytes are fast here and their sums exact: without VNNI they are one or the other."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():  # type: ignore[no-untyped-call]
        return False
    # Neighbours that are both large: without VNNI their sum is cut off at 16 bits.
    values = torch.tensor([127, 127, 127, 127, -127, -127, 1, 64], dtype=torch.int8).repeat(64, 32)
    x = torch.tensor([255, 255, 0, 0, 255, 255, 128, 129], dtype=torch.uint8).repeat(2, 32)
    packed = _pack_int8(values)
    if packed is None:
        return False
    want = (x.float() - 128) @ values.float().t()
    return torch.equal(_bytes_product(x, packed.opaque, torch.ones(64)), want)


def _known(opaque: Tensor, weight: Tensor) -> Packed | None:
    """`weight` as packed, if that follows the rule."""
    if int(torch.ops.mkldnn._nbytes(opaque)) > MOST_PADDING * weight.nbytes:
        return None
    outputs = len(weight)
    some = torch.tensor(sorted({0, 1 % outputs, outputs // 2, outputs - 1}))
    read = (_read(opaque, weight, width) for width in WIDTHS[weight.dtype])
    found = [packed for packed in read if packed is not None and torch.equal(packed.lookup(some), weight[some])]
    if len(found) > 1:  # those rows are zeros, or as alike
        found = [packed for packed in found if torch.equal(packed.lookup(torch.arange(outputs)), weight)]
    return found[0] if found else None


def _read(opaque: Tensor, weight: Tensor, width: int) -> Packed | None:
    """As if so many outputs lay together, if there is memory for that."""
    outputs, columns = weight.shape
    together = TOGETHER[weight.dtype]
    shape = -(-outputs // width), -(-columns // (DEEP * together)), DEEP, width, together
    count = math.prod(shape)
    num_bytes = int(torch.ops.mkldnn._nbytes(opaque))
    if count * weight.element_size() > num_bytes:
        return None
    memory = (ctypes.c_byte * num_bytes).from_address(int(torch.ops.mkldnn.data_ptr(opaque)))
    blocks = torch.frombuffer(memory, dtype=weight.dtype, count=count).view(shape)
    return Packed(opaque, blocks, outputs, columns, num_bytes)
