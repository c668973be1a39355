"""Activations to bytes and back: fp32, bf16, fp16, int8 and int4 with one fp32 scale per token, and element loss.

`decode(encode(x)) == round_trip(x)` to the bit, and encoded rows can be cut out and joined without decoding them. A
codec does not know where the tensor goes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import BrokenInvariant, ProtocolError, RequestError

_FLOAT = {
    WirePrecision.FP32: torch.float32,
    WirePrecision.BF16: torch.bfloat16,
    WirePrecision.FP16: torch.float16,
}
_LARGEST = {WirePrecision.INT8: 127, WirePrecision.INT4: 7}
_SCALE_BYTES = 4
_TINY = 2.0**-149
"""The least that fp32 holds."""


@dataclass(frozen=True, slots=True)
class ElementLoss:
    """A lossy channel: each element of an activation is lost (becomes zero) with this probability.

    What is lost is a function of (seed, link use, position), not of chunking or of time.
    """

    probability: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise RequestError(f"element loss is {self.probability}; expected 0 up to, not including, 1")

    def apply(self, x: Tensor, stream: str, start: int) -> Tensor:
        """`x` (positions, d_model) of `stream`, whose first position is `start`, with the lost elements zero."""
        if not self.probability:
            return x
        keep = torch.empty(x.shape, dtype=torch.bool)
        for row in range(x.shape[0]):
            key = hashlib.blake2b(f"{self.seed}/{stream}/{start + row}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
            keep[row] = torch.rand(x.shape[1], generator=generator) >= self.probability
        return x * keep.to(x.device)


def encode(x: Tensor, precision: WirePrecision) -> bytes:
    """The payload of activations (positions, d_model): scales first where there are any, then the rows."""
    if precision in _FLOAT:
        return _raw(x.to(device="cpu", dtype=_FLOAT[precision]))
    scales, levels = _quantise(x.cpu(), _LARGEST[precision])
    if precision is WirePrecision.INT8:
        return b"".join((scales.numpy().data, levels.numpy().data))
    if levels.shape[1] % 2:
        levels = torch.nn.functional.pad(levels, (0, 1))
    pairs = (levels + 8).numpy().view("<u2")  # two neighbours at a time: the even one is the low byte
    return b"".join((scales.numpy().data, (pairs | (pairs >> 4)).astype(np.uint8).data))


def decode(payload: bytes | memoryview, precision: WirePrecision, rows: int, columns: int) -> Tensor:
    """Activations (rows, columns) in the wire's float format (fp32 for the quantised ones), freshly allocated.

    Raises ProtocolError for a wrong length and for NaN or infinity.
    """
    _measure(payload, precision, rows, columns)
    if precision in _FLOAT:
        x = torch.frombuffer(bytearray(payload), dtype=_FLOAT[precision]).view(rows, columns)
    else:
        x = _dequantise(payload, precision, rows, columns)
    if not math.isfinite(x.sum().item()) and not bool(torch.isfinite(x).all()):
        raise ProtocolError(
            f"{precision} activations ({rows}, {columns}) hold NaN or infinity; the sender's arithmetic overflowed"
            + (" or fp16 cannot hold them: try wire precision bf16" if precision is WirePrecision.FP16 else "")
        )
    return x


def round_trip(x: Tensor, precision: WirePrecision) -> Tensor:
    """What the other end would decode, in the dtype and on the device of `x`."""
    if precision in _FLOAT and x.dtype == _FLOAT[precision]:
        return x
    if precision in _FLOAT:
        return x.to(_FLOAT[precision]).to(x.dtype)
    scales, levels = _quantise(x.cpu(), _LARGEST[precision])
    return (levels.float() * scales.unsqueeze(1)).to(dtype=x.dtype, device=x.device)


def rows(
    payload: bytes | memoryview, precision: WirePrecision, rows: int, columns: int, start: int, stop: int
) -> bytes:
    """The encoded rows `start` to `stop` of encoded activations (rows, columns), scales included, to the bit.

    All rows of a `bytes` are the object itself. Raises ProtocolError for a wrong length, BrokenInvariant for rows that
    are not there.
    """
    _measure(payload, precision, rows, columns)
    if not 0 <= start <= stop <= rows:
        raise BrokenInvariant(f"rows {start} to {stop} of {rows} encoded ones")
    if (start, stop) == (0, rows):
        return bytes(payload)
    scale, row = _row_bytes(precision, columns)
    first, view = rows * scale, memoryview(payload)
    return b"".join((view[start * scale : stop * scale], view[first + start * row : first + stop * row]))


def glue(pieces: Sequence[tuple[bytes | memoryview, int]], precision: WirePrecision, columns: int) -> bytes:
    """One payload of all rows of encoded pieces (payload, rows), in order: what encoding them together would give.

    Raises ProtocolError for a piece of a wrong length.
    """
    scale, row = _row_bytes(precision, columns)
    for payload, count in pieces:
        if len(payload) != count * (scale + row):
            _measure(payload, precision, count, columns)
    if not scale:
        return b"".join(payload for payload, _ in pieces)
    scales = [memoryview(payload)[: count * scale] for payload, count in pieces]
    levels = [memoryview(payload)[count * scale :] for payload, count in pieces]
    return b"".join(scales + levels)


def _row_bytes(precision: WirePrecision, columns: int) -> tuple[int, int]:
    """Bytes that one row takes among the scales, and among the elements."""
    scale = _SCALE_BYTES if precision.is_quantised else 0
    return scale, precision.payload_bytes(1, columns) - scale


def _measure(payload: bytes | memoryview, precision: WirePrecision, rows: int, columns: int) -> None:
    wanted = precision.payload_bytes(rows, columns)
    if len(payload) != wanted:
        raise ProtocolError(f"{precision} activations ({rows}, {columns}) take {wanted} bytes, got {len(payload)}")


def _raw(x: Tensor) -> bytes:
    if x.dtype is torch.bfloat16:  # numpy has no such type
        x = x.view(torch.int16)
    return x.numpy().tobytes()


def _quantise(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Scale per row (rows,) fp32, and levels (rows, columns) int8 in [-largest, largest]."""
    x = x.float()
    scales = x.abs().amax(dim=1) / largest
    divisor = scales.clamp_min(_TINY).unsqueeze(1)  # a row of zeros
    return scales, (x / divisor).round_().clamp_(-largest, largest).to(torch.int8)


def _dequantise(payload: bytes | memoryview, precision: WirePrecision, rows: int, columns: int) -> Tensor:
    scales = torch.from_numpy(np.frombuffer(payload, np.float32, rows).copy())  # what comes is not to be written to
    first = rows * _SCALE_BYTES
    if precision is WirePrecision.INT8:
        x = np.frombuffer(payload, np.int8, offset=first).reshape(rows, columns).astype(np.float32)
    else:
        packed = np.frombuffer(payload, np.uint8, offset=first).astype("<u2")
        nibbles = ((packed | (packed << 4)) & 0x0F0F).view(np.uint8).reshape(rows, -1)[:, :columns]
        x = nibbles.astype(np.float32)
        x -= 8
    return torch.from_numpy(x).mul_(scales.unsqueeze(1))
