"""Number formats and how weights are kept; knows no model and no machine."""

from __future__ import annotations

from enum import StrEnum

INT4_GROUP = 32
"""Input columns that share one scale in int4 weights; FFN shards are multiples of it where the model allows."""


class Dtype(StrEnum):
    """The number format a machine computes in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def num_bytes(self) -> int:
        return 4 if self is Dtype.FP32 else 2


class Kernels(StrEnum):
    """Whose products multiply weights with a few rows: torch's, or our own, which a C compiler makes; auto: our own
    where there are such."""

    AUTO = "auto"
    TORCH = "torch"
    COMPILED = "compiled"


class Weights(StrEnum):
    """How the weights of linear layers stay in memory: as computed in, or weight-only quantised."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"

    def num_bytes(self, rows: int, columns: int, dtype: Dtype) -> float:
        """Bytes of a (rows, columns) matrix. int8: a byte each and a bf16 scale per row; int4: half a byte
        each and a bf16 scale and zero per INT4_GROUP columns."""
        match self:
            case Weights.FULL:
                return float(rows * columns * dtype.num_bytes)
            case Weights.INT8:
                return rows * (columns + 2.0)
            case Weights.INT4:
                return rows * columns * (0.5 + 4 / INT4_GROUP)
