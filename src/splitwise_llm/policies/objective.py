"""What a planner makes small. It does not know how plans are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from splitwise_llm import lyapunov
from splitwise_llm.cost import Prices
from splitwise_llm.lyapunov import Budgets, Penalty, Terms

Floats = NDArray[np.float64]


class Objective(Protocol):
    """A value per plan, smaller is better; it never falls when a figure of the plan rises."""

    @property
    def only_time(self) -> bool:
        """Whether the value depends on the total time alone."""
        ...

    def value(self, prices: Prices) -> Floats: ...


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from asking to the last token."""

    @property
    def only_time(self) -> bool:
        return True

    def value(self, prices: Prices) -> Floats:
        return prices.total_s


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules of the device from asking to the last token."""

    @property
    def only_time(self) -> bool:
        return False

    def value(self, prices: Prices) -> Floats:
        return prices.device_j


@dataclass(frozen=True, slots=True, eq=False)
class DriftPlusPenalty:
    """D of `lyapunov`: the request's penalty and what its work does to the queues."""

    penalty: Penalty
    weights: Floats
    """(4,) of the physical queues: device, up, down, cloud."""
    queues: Floats = field(default_factory=lambda: np.zeros(4))
    """(4,) or (systems, 1, 4)"""
    virtual: Floats = field(default_factory=lambda: np.zeros(4))
    budgets: Budgets = field(default_factory=Budgets)
    tokens: Floats | float = 128.0
    """Of the request, for the accuracy budget."""
    waited_s: Floats | float = 0.0
    """Since the request arrived: the deadline counts from there."""
    waiting: Floats | float = 0.0
    """Requests at the door of a device that takes them in turn."""

    @property
    def only_time(self) -> bool:
        return False

    def value(self, prices: Prices) -> Floats:
        return self.terms(prices).objective(self.weights, self.virtual)

    def terms(self, prices: Prices) -> Terms:
        """All of it but the weights and the virtual queues."""
        work = np.empty((*prices.total_s.shape, lyapunov.NUM_PHYSICAL))  # (..., plans, 4)
        for n, seconds in enumerate((prices.work.device_s, prices.work.up_s, prices.work.down_s, prices.work.cloud_s)):
            work[..., n] = seconds
        missed = np.zeros_like(prices.total_s)
        if self.budgets.deadline_s is not None:
            missed = (self.waited_s + prices.total_s > self.budgets.deadline_s).astype(float)
        tokens = np.asarray(self.tokens)
        g = lyapunov.overspending(self.budgets, prices.device_j, missed, prices.nats, tokens)
        cost = self.penalty.c0(prices.service_s, prices.device_j, prices.nats)
        cost = cost + self.penalty.turn(prices.total_s, self.waiting)
        return Terms.of(self.penalty, cost, prices.wait_s, self.queues, work, g)
