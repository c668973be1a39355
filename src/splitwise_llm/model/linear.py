"""Linear layers and token tables in every form a machine may hold them; knows no layers, biases or models.

| form | resident | where oneDNN's packing is known | elsewhere |
| --- | --- | --- | --- |
| full | the weight in the compute dtype | packed, one product | one product |
| int8 | a byte per weight, a scale per output | packed, one integer product | few: torch's int8 kernel; many: blocks |
| int4 | half a byte, a bf16 scale and zero per 32 | as elsewhere | few: torch's int4 kernel; many: blocks |

Few rows (decode) wait for the weights to be read once, many (prefill) for the arithmetic. What oneDNN has packed
serves both. torch's own low-bit kernels serve few rows only, so for many some blocks of the weight are up-cast at
a time and multiplied. No second copy is kept: a block is dropped before the next is made.
Kernels of our own (`compiled.py`), where a machine asks for them, multiply int4 by all rows, and what is packed by few.
Where two ways cross is a constant and not a timing, so that equal shapes always give equal bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from splitwise_llm.errors import ModelError
from splitwise_llm.model import compiled
from splitwise_llm.model.packed import Packed, exact_int8_product, pack, pack_int8
from splitwise_llm.spec import INT4_GROUP, Kernels, Weights

INT4_TURN_ROWS = 64
"""More are multiplied in turns by our own kernel: it leaves fp32 beside the result. 3 % slower than all of 398 rows at
once, and the prompt of a machine with half of TinyLlama takes 20 MB less for each 100 rows."""
INT8_FEW_ROWS = 20
INT4_FEW_ROWS = 80
FP16_FEW_ROWS = 4
"""Up to here the kernel wins (for fp16: torch's plain loop). Zen 5, one thread, 768x2048 to 4096x4096."""
BLOCK_BYTES = 2 << 20
"""Up-cast weights that exist at one time; with the steps on the way a block takes up to twice this."""
COLUMN_STEP = 32
"""The int8 kernel reads past the end of rows that are no multiple of 16, the int4 kernel knows whole groups."""
OUTPUT_STEP = 64
"""A multiple of the outputs that the int4 kernel stores together, on every processor."""
TINY = 1e-38
"""Instead of the scale 0 of weights that are all equal, where one divides by it."""


class Linear(ABC):
    """y = x @ weight.T for x (rows, in_features); y (rows, out_features) has the dtype of x, the compute dtype."""

    in_features: int
    out_features: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def dequantised(self) -> Tensor:
        """The weight that this layer stands for, fp32 (out_features, in_features)."""

    @property
    def num_bytes(self) -> int:
        """Memory it keeps resident."""
        return sum(held.nbytes for held in vars(self).values() if isinstance(held, Tensor | Packed))


def linear_of(weight: Tensor, form: Weights, dtype: torch.dtype, kernels: Kernels = Kernels.TORCH) -> Linear:
    """A layer with its own copy of weight (out, in), which may be of any float dtype and strides."""
    match form:
        case Weights.FULL:
            return Full(weight, dtype, kernels=kernels)
        case Weights.INT8:
            return Int8(weight, kernels=kernels)
        case Weights.INT4:
            return Int4(weight, kernels)


@final
class Full(Linear):
    """The weight as it is, packed by oneDNN or plain. Plain fp32 lies transposed, which one row reads up to 1.7 times
    as fast."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, multiplied: bool = True, kernels: Kernels = Kernels.TORCH
    ) -> None:
        """Without `multiplied` it lies so that looking up is cheap. Our own kernels serve what is packed."""
        self.out_features, self.in_features = weight.shape
        self._packed = pack(weight.to(dtype)) if multiplied else None
        self._plain: Tensor | None = None
        if self._packed is None:
            self._transposed = multiplied and dtype is torch.float32
            plain = weight.t() if self._transposed else weight
            self._plain = plain.to(dtype, copy=True, memory_format=torch.contiguous_format)
        own = self._packed is not None and kernels is Kernels.COMPILED
        self._own = compiled.kernels() if own else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            if self._own is not None and len(x) <= compiled.OWN_FULL_ROWS:
                return self._own.full(x, self._packed)
            return self._packed.product(x)
        plain = cast(Tensor, self._plain)
        if self._transposed:
            return torch.mm(x, plain)
        if len(x) <= FP16_FEW_ROWS or _product_dtype(x) is x.dtype:
            return F.linear(x, plain)
        return _by_blocks(x, plain).to(x.dtype)

    def lookup(self, ids: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed.lookup(ids)
        plain = cast(Tensor, self._plain)
        return (plain.t() if self._transposed else plain).index_select(0, ids)

    def dequantised(self) -> Tensor:
        return self.lookup(torch.arange(self.out_features)).float()


@final
class Int8(Linear):
    """weight = value * scale of its output (a bf16 number). Plain columns are padded with zeros to a multiple of 32."""

    def __init__(
        self, weight: Tensor, offset: Tensor | None = None, multiplied: bool = True, kernels: Kernels = Kernels.TORCH
    ) -> None:
        """`offset` (in_features,) is first subtracted from every row; `multiplied` as above. Our own kernels serve
        what is packed."""
        self.out_features, self.in_features = weight.shape
        columns = _up(self.in_features, COLUMN_STEP)
        values = weight.new_zeros(self.out_features, columns, dtype=torch.int8)
        self._scale = weight.new_empty(self.out_features, dtype=torch.bfloat16)
        for some in _runs(self.out_features, columns * 4):
            rows = weight[some].float() if offset is None else weight[some].float() - offset
            scale = _finite(rows.abs().amax(1) / 127).bfloat16()
            scaled = (rows / scale.float().clamp(min=TINY).unsqueeze(1)).round_().clamp_(-127, 127)
            self._scale[some], values[some, : self.in_features] = scale, scaled
        self._packed = pack_int8(values[:, : self.in_features]) if multiplied else None
        self._plain: Tensor | None = None
        if self._packed is None:
            self._plain = values
        else:
            self._scale = self._scale.float()  # as the product wants it
        self._own: compiled.Int8Product | None = None
        if self._packed is not None and kernels is Kernels.COMPILED:
            self._own = compiled.Int8Product(self._packed, self._scale)

    def __call__(self, x: Tensor) -> Tensor:
        if self._own is not None:
            return self._own(x)
        if self._packed is not None:
            return exact_int8_product(x, self._packed, self._scale)
        plain = cast(Tensor, self._plain)
        padded = _padded(x, self.in_features, plain.shape[1])
        if x.device.type == "cpu" and len(x) <= INT8_FEW_ROWS:
            y = cast(Tensor, torch.ops.aten._weight_int8pack_mm(padded, plain, self._scale))
        else:
            y = _by_blocks(padded, plain).mul_(self._scale)
        return y.to(x.dtype)

    def lookup(self, ids: Tensor) -> Tensor:
        scale = self._scale[ids, None].float()
        if self._packed is not None:
            return self._packed.lookup(ids) * scale
        return cast(Tensor, self._plain)[ids, : self.in_features] * scale

    def dequantised(self) -> Tensor:
        return self.lookup(torch.arange(self.out_features))


@final
class Int4(Linear):
    """weight = (value - 8) * scale + zero of its group; value 0 is the group's least weight, 15 its largest.

    Padded with zeros to whole groups of columns and to 64 outputs. The zero costs no memory (the kernel keeps
    one anyway) and takes the error of y from 0.086 to 0.078 (Gaussian weights) or 0.128 to 0.100 (heavy tails)
    against the best scale without it.
    """

    def __init__(self, weight: Tensor, kernels: Kernels = Kernels.TORCH) -> None:
        layout = int4_layout() if kernels is Kernels.COMPILED else None
        self._own = compiled.kernels() if layout == Int4Layout(OUTPUT_STEP, None) else None
        self.out_features, self.in_features = weight.shape
        outputs, columns = _up(self.out_features, OUTPUT_STEP), _up(self.in_features, INT4_GROUP)
        self._packed = weight.new_empty(outputs, columns // 2, dtype=torch.uint8)
        self._scale_zero = weight.new_empty(columns // INT4_GROUP, outputs, 2, dtype=torch.bfloat16)
        for some in _runs(outputs, columns * 4, OUTPUT_STEP):
            rows = weight[some].float()
            rows = F.pad(rows, (0, columns - self.in_features, 0, some.stop - some.start - len(rows)))
            values, self._scale_zero[:, some] = quantise_int4(rows)
            self._packed[some] = _pack(values)

    def __call__(self, x: Tensor) -> Tensor:
        if self._own is not None:
            if len(x) > INT4_TURN_ROWS:
                return torch.cat([self(some) for some in torch.split(x, INT4_TURN_ROWS)])
            rounded = self._own.rounded(x, self.in_features, self._packed.shape[1] * 2, is_signed=True)
            return self._own.int4(rounded, self._packed, self._scale_zero)[:, : self.out_features].to(x.dtype)
        padded, layout = _padded(x, self.in_features, self._packed.shape[1] * 2), int4_layout()
        if layout is None or (x.device.type == "cpu" and len(x) <= INT4_FEW_ROWS):
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
            y = cast(Tensor, kernel(padded, self._packed, INT4_GROUP, self._scale_zero))
        else:
            padded = padded.to(_product_dtype(padded))
            blocks = (block.to(padded.dtype) for block in self._blocks(layout))
            y = torch.cat([torch.bmm(padded.expand(len(block), -1, -1), block) for block in blocks])
            y = layout.in_order(y).transpose(0, 1).reshape(len(x), -1)
        return (y if y.shape[1] == self.out_features else y[:, : self.out_features]).to(x.dtype)

    def _blocks(self, layout: Int4Layout) -> Iterator[Tensor]:
        """The transposed weight, some blocks at a time: fp32 (blocks, columns, outputs as packed)."""
        outputs, columns = len(self._packed), self._packed.shape[1] * 2
        packed = self._packed.view(outputs // layout.size, columns, -1)
        scale_zero = self._scale_zero.view(-1, len(packed), layout.size, 2).permute(3, 1, 0, 2)
        for some in _runs(len(packed), columns * layout.size * 4):
            values = layout.values(packed[some]).view(-1, columns // INT4_GROUP, INT4_GROUP, layout.size)
            scale, zero = layout.as_packed(scale_zero[:, some]).float().unsqueeze(3)
            yield torch.addcmul(zero, values, scale).flatten(1, 2)

    def dequantised(self) -> Tensor:
        layout = int4_layout()
        if layout is None:
            return self(torch.eye(self.in_features, device=self._packed.device)).t()
        weight = layout.in_order(torch.cat(list(self._blocks(layout)))).transpose(1, 2).flatten(0, 1)
        return weight[: self.out_features, : self.in_features]


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (rows, columns) to values 0..15 (int32) and bf16 (groups, rows, scale and zero).

    Scale and zero are rounded first and the values fitted to them.
    """
    groups = weight.view(len(weight), -1, INT4_GROUP)
    low = groups.amin(2)
    scale = _finite((groups.amax(2) - low) / 15).bfloat16()
    zero = (low + 8 * scale).bfloat16()
    values = (groups - zero.float().unsqueeze(2)) / scale.float().clamp(min=TINY).unsqueeze(2) + 8
    return values.flatten(1).round_().clamp_(0, 15).to(torch.int32), torch.stack([scale, zero], 2).transpose(0, 1)


class Int4Layout(NamedTuple):
    """How this processor packs int4: blocks of `size` outputs, in each for every column size / 2 bytes."""

    size: int
    outputs: Tensor | None
    """The output of the block that each nibble belongs to, low nibbles first; None if simply in order."""

    def values(self, packed: Tensor) -> Tensor:
        """Bytes (blocks, columns, size / 2) to values -8..7, int8 (blocks, columns, size)."""
        return torch.cat([packed & 15, packed >> 4], 2).view(torch.int8).sub_(8)

    def as_packed(self, ordered: Tensor) -> Tensor:
        """The last dimension, outputs in order, reordered as they are packed."""
        return ordered.contiguous() if self.outputs is None else ordered[..., self.outputs.to(ordered.device)]

    def in_order(self, packed: Tensor) -> Tensor:
        """The last dimension, outputs as they are packed, brought back in order."""
        return packed if self.outputs is None else packed[..., self.outputs.argsort().to(packed.device)]


@cache
def int4_layout() -> Int4Layout | None:
    """Found by packing known values, because torch does not tell; None if they follow no rule of this kind."""
    output = torch.arange(OUTPUT_STEP, dtype=torch.int32).unsqueeze(1).expand(-1, COLUMN_STEP)
    low, high = _pack(output % 16), _pack(output // 16)
    random = torch.randint(16, (2 * OUTPUT_STEP, COLUMN_STEP), generator=torch.Generator().manual_seed(0))
    for size in (64, 32, 16):
        shape = -1, COLUMN_STEP, size // 2
        layout = Int4Layout(size, None)
        found = (layout.values(high.view(shape)) + 8)[0, 0] * 16 + (layout.values(low.view(shape)) + 8)[0, 0]
        if found.tolist() != list(range(size)):
            layout = Int4Layout(size, found.long())
        if found.sort().values.tolist() == list(range(size)):
            values = layout.in_order(layout.values(_pack(random.int()).view(shape))) + 8
            if torch.equal(values.transpose(1, 2).flatten(0, 1).long(), random):
                return layout
    return None


def _pack(values: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.cpu(), 1))


@final
class Table:
    """One row per token, (vocabulary, d_model), held once for both ends of a model.

    Int8 holds what is left after the mean row, and the mean row in fp32: torch's kernel rounds its sums to bf16,
    and logits that have much in common (GPT-2's lie around -100, where bf16 has steps of 0.5) would lose what
    tells them apart.
    """

    def __init__(self, rows: Full | Int8, mean: Tensor | None, dtype: torch.dtype) -> None:
        self._rows, self._mean, self._dtype = rows, mean, dtype

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows of these ids in the compute dtype, (ids, d_model)."""
        rows = self._rows.lookup(ids)
        return (rows if self._mean is None else rows + self._mean).to(self._dtype)

    def project(self, x: Tensor) -> Tensor:
        """x @ table.T for x (rows, d_model): logits (rows, vocabulary) in fp32."""
        if self._mean is None:
            return self._rows(x).float()
        x = x.float()  # and so the sums are not rounded to a narrower dtype
        return self._rows(x).add_(torch.mv(x, self._mean).unsqueeze(1))

    @property
    def num_bytes(self) -> int:
        """Memory it keeps resident."""
        return self._rows.num_bytes + (0 if self._mean is None else self._mean.nbytes)


def table_of(
    weight: Tensor, form: Weights, dtype: torch.dtype, multiplied: bool = True, kernels: Kernels = Kernels.TORCH
) -> Table:
    """A table with its own copy of weight (vocabulary, d_model); int8 also where the layers are int4. Without
    `multiplied` it is only looked up in."""
    if form is Weights.FULL:
        return Table(Full(weight, dtype, multiplied, kernels), None, dtype)
    sums = [weight[some].float().sum(0) for some in _runs(len(weight), weight.shape[1] * 4)]
    mean = torch.stack(sums).sum(0) / len(weight)
    return Table(Int8(weight, mean, multiplied, kernels), mean, dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What many rows are best multiplied in: fp32 on processors where torch has only a plain loop for x's dtype."""
    return x.dtype if x.device.type != "cpu" or has_fast_product(x.dtype) else torch.float32


@cache
def has_fast_product(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of this dtype by more than torch's plain loop."""
    if dtype is torch.float32 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return dtype is torch.float32
    onednn = torch.ops.mkldnn
    bf16 = dtype is torch.bfloat16
    return bool(onednn._is_mkldnn_bf16_supported() if bf16 else onednn._is_mkldnn_fp16_supported())


def _by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T for a weight (out, in) of another dtype, some rows of it up-cast at a time."""
    x = x.to(_product_dtype(x))
    runs = _runs(len(weight), weight.shape[1] * x.dtype.itemsize)
    return torch.cat([torch.mm(x, weight[some].to(x.dtype).t()) for some in runs], 1)


def _runs(count: int, bytes_each: int, step: int = 1) -> list[slice]:
    """0..count cut into runs of at most BLOCK_BYTES, or of `step` where that is more."""
    run = max(1, BLOCK_BYTES // (bytes_each * step)) * step
    return [slice(start, min(start + run, count)) for start in range(0, count, run)]


def _padded(x: Tensor, features: int, columns: int) -> Tensor:
    """x as the kernels take it: bf16, contiguous, with zeros in the padded columns."""
    x = x.to(torch.bfloat16).contiguous()
    return x if columns == features else F.pad(x, (0, columns - features))


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _finite(scale: Tensor) -> Tensor:
    if not scale.isfinite().all():
        raise ModelError("a weight to quantise is infinite or not a number: the model file is damaged, load it anew")
    return scale
