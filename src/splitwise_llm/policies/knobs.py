"""What the high level may turn: a way of running, and what the exact solver is told of prices. It solves nothing.

| head | values | neutral |
| --- | --- | --- |
| mode | auto; only plans on the device, in the cloud, on both; race, shadow; ask again later; refuse | auto |
| device, link, cloud | times 1/4, 1/2, 1, 2, 4: the weights of their queues | 1 |
| budgets | times 1, 2, 4: the virtual queues; never below 1 | 1 |
| patience | times 0, 1/2, 1, 2: what it takes to go away from a machine that is out of reach | 1 |
| draft | times 1/2, 1, 2: the odds that a drafted token is accepted | 1 |
| outlook | 0, 1: whether plans on the device count, in an outage, as what can be left when it ends | 0 |

Neutral is exact drift plus penalty. The weight V is no knob: scaling it is the same as scaling all prices.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.errors import RequestError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Mode(IntEnum):
    """Ways of running. `RACE` and `SHADOW` keep the device ready beside a plan that uses the cloud: with `RACE` it
    computes the answer, too, with `SHADOW` only keys and values."""

    AUTO = 0
    EDGE = 1
    CLOUD = 2
    BOTH = 3
    RACE = 4
    SHADOW = 5
    WAIT = 6
    SHED = 7


PRICES = (0.25, 0.5, 1.0, 2.0, 4.0)
BUDGETS = (1.0, 2.0, 4.0)
PATIENCE = (0.0, 0.5, 1.0, 2.0)
ODDS = (0.5, 1.0, 2.0)
OUTLOOKS = (0.0, 1.0)
HEADS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("mode", tuple(map(float, Mode))),
    ("device", PRICES),
    ("link", PRICES),
    ("cloud", PRICES),
    ("budgets", BUDGETS),
    ("patience", PATIENCE),
    ("draft", ODDS),
    ("outlook", OUTLOOKS),
)
"""Name and values of each, in the order of an action."""
_VALUES = tuple(np.asarray(values) for _, values in HEADS)
SIZES = tuple(len(values) for _, values in HEADS)
NEUTRAL = tuple(0 if name in ("mode", "outlook") else values.index(1.0) for name, values in HEADS)
"""The action that is exact drift plus penalty."""
START = (*NEUTRAL[:-1], 1)
"""The same with the outlook, which costs nothing in nearly every setting."""


@dataclass(frozen=True, slots=True, eq=False)
class Knobs:
    """How they are set for some systems: arrays (systems,). Constants need not be on the grid."""

    mode: Ints
    device: Floats
    link: Floats
    cloud: Floats
    budgets: Floats
    patience: Floats
    draft: Floats
    outlook: Floats

    @classmethod
    def of(cls, actions: Ints) -> Knobs:
        """Of actions (systems, heads): the number of a value in each head."""
        columns = [values[actions[:, n]] for n, values in enumerate(_VALUES)]
        return cls(columns[0].astype(np.int64), *columns[1:])

    @classmethod
    def neutral(cls, systems: int) -> Knobs:
        return cls.of(np.tile(np.array(NEUTRAL), (systems, 1)))

    def at(self, which: Ints | NDArray[np.bool_]) -> Knobs:
        """Of some of the systems."""
        return Knobs(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Constants:
    """The same, set once for all systems: what a plain optimiser tunes. All 1 is exact drift plus penalty."""

    device: float = 1.0
    link: float = 1.0
    cloud: float = 1.0
    budgets: float = 1.0
    patience: float = 1.0
    draft: float = 1.0

    def __post_init__(self) -> None:
        least = min(self.device, self.link, self.cloud, self.patience)
        if not all(map(math.isfinite, astuple(self))) or least < 0 or self.budgets < 1 or self.draft <= 0:
            raise RequestError(
                f"prices and patience are 0 or more, budgets 1 or more, odds above 0, all finite; got {self}"
            )

    def knobs(self, systems: int) -> Knobs:
        columns = [np.full(systems, getattr(self, field.name)) for field in fields(self)] + [np.zeros(systems)]
        return Knobs(np.zeros(systems, np.int64), *columns)
