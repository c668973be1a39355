"""The forward pass of the high level, in numpy: deciding needs no learning library. It knows no meaning of its inputs.

A GRU reads the remembered epochs, the oldest first; its last state and the other features go through two tanh layers
to the logits of all heads, side by side.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.errors import ModelError
from splitwise_llm.observation import EPOCHS, SEEN
from splitwise_llm.policies.features import COUNT, TOTAL
from splitwise_llm.policies.knobs import SIZES

Array = NDArray[np.float32]
NAMES = (
    "gru_input", "gru_hidden", "gru_input_bias", "gru_hidden_bias", "first", "first_bias", "second", "second_bias",
    "heads", "heads_bias", "low", "high",
)  # fmt: skip
_ONE, _LOW, _HIGH = np.array([1, -30, 30], np.float32)[:, None, None]
"""Arrays: a plain number is converted anew by each call, which takes as long as the call."""
UNREADABLE = (OSError, ValueError, EOFError, AttributeError, TypeError, RuntimeError, BadZipFile, zlib.error)
"""What reading a damaged or strange file of arrays raises."""
MARGIN = 0.05
"""What a feature may lie outside of what was seen in training, of [0, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """Matrices are (out, in). Those of the GRU are stacked as reset, update, new."""

    gru_input: Array
    gru_hidden: Array
    gru_input_bias: Array
    gru_hidden_bias: Array
    first: Array
    first_bias: Array
    second: Array
    second_bias: Array
    heads: Array
    heads_bias: Array
    low: Array
    """(COUNT,): smallest and largest value of each feature in training."""
    high: Array

    def __post_init__(self) -> None:
        size, first, second = self.gru_hidden_bias.size // 3, self.first_bias.size, self.second_bias.size
        shapes = (
            (3 * size, len(SEEN)), (3 * size, size), (3 * size,), (3 * size,), (first, COUNT + size), (first,),
            (second, first), (second,), (sum(SIZES), second), (sum(SIZES),), (COUNT,), (COUNT,),
        )  # fmt: skip
        for name, shape in zip(NAMES, shapes, strict=True):
            if getattr(self, name).shape != shape:
                raise ModelError(
                    f"weights of the policy: {name} is {getattr(self, name).shape}, expected {shape}; made by another "
                    "version: run `splitwise train` again"
                )

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Network:
        """Raises ModelError where something is missing or of another shape."""
        missing = [name for name in NAMES if name not in arrays]
        if missing:
            raise ModelError(f"weights of the policy: {', '.join(missing)} missing; run `splitwise train` again")
        return cls(*(np.asarray(arrays[name], np.float32) for name in NAMES))

    @classmethod
    def load(cls, file: Path) -> Network:
        """Raises ModelError where the file is not what `save` writes."""
        try:
            with file.open("rb") as opened, np.load(opened) as arrays:  # one array alone is no context
                return cls.of(arrays)
        except ModelError as error:
            raise ModelError(f"{file}: {error}") from None
        except UNREADABLE as error:
            raise ModelError(f"{file}: no weights of a policy ({error}); make some with `splitwise train`") from error

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez_compressed(part, **{name: getattr(self, name) for name in NAMES})
        part.replace(file)

    def logits(self, x: Array) -> Array:
        """(systems, TOTAL) -> (systems, sum of SIZES)."""
        if x.shape[1] != TOTAL:
            raise ModelError(f"the policy takes {TOTAL} features, not {x.shape[1]}")
        plain, epochs = x[:, :COUNT], x[:, COUNT:].reshape(len(x), EPOCHS, len(SEEN))
        size = self.gru_hidden.shape[1]
        hidden, recur, bias = np.zeros((len(x), size), np.float32), self.gru_hidden.T, self.gru_hidden_bias
        inputs = (epochs[:, ::-1] @ self.gru_input.T + self.gru_input_bias).swapaxes(0, 1)  # (EPOCHS, systems, ...)
        for to_gates, to_new in zip(inputs[..., : 2 * size], inputs[..., 2 * size :], strict=True):
            kept = hidden @ recur + bias
            gates = _sigmoid(to_gates + kept[:, : 2 * size])
            reset, update = gates[:, :size], gates[:, size:]
            hidden = (_ONE - update) * np.tanh(to_new + reset * kept[:, 2 * size :]) + update * hidden
        both = np.concatenate([plain, hidden], axis=1)
        both = np.tanh(both @ self.first.T + self.first_bias)
        both = np.tanh(both @ self.second.T + self.second_bias)
        result: Array = both @ self.heads.T + self.heads_bias
        return result

    def is_outside(self, x: Array, unseen: Sequence[int] = ()) -> NDArray[np.bool_]:
        """(systems,): whether any feature is outside of what was seen in training, or no number; those that are kept
        from it, `unseen`, may be anything."""
        plain = x[:, :COUNT]
        inside = (plain >= self.low - MARGIN) & (plain <= self.high + MARGIN)
        if unseen:
            inside[:, unseen] = True
        return np.asarray(~(inside.all(axis=1) & np.isfinite(x).all(axis=1)))


def _sigmoid(x: Array) -> Array:
    y: Array = _ONE / (_ONE + np.exp(-np.minimum(np.maximum(x, _LOW), _HIGH)))
    return y
