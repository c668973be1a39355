"""Queues, drift, and drift-plus-penalty: the one place where they are defined. It knows no simulator and no policy.

Physical queues hold seconds of work at nominal speed; virtual queues are dimensionless and hold what was spent
beyond a budget. Arrays are (..., 4) in the order of the fields of `Queues`, so that one call serves many systems.

A quantity sits in the penalty `c0` or in a budget, not in both. Scaling V, the weights and the virtual queues
together changes no choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.errors import SpecError

Floats = NDArray[np.float64]

NUM_PHYSICAL = 4
"""device, up, down, cloud."""
NUM_VIRTUAL = 4
"""energy, deadline, accuracy, battery."""
CAP = 100.0
"""A virtual queue stops here; a budget whose queue is at the cap is reported as infeasible."""


@dataclass(frozen=True, slots=True)
class Penalty:
    """What a request costs, in units of the reference request: `S/T_ref + w_E E/E_ref + w_A n/n_ref`."""

    t_ref_s: float
    """A typical service time; all costs are relative to it."""
    e_ref_j: float = 1.0
    n_ref: float = 1.0
    w_energy: float = 0.0
    """0 where energy has a budget instead."""
    w_accuracy: float = 0.0
    v: float = 1.0
    """Weight of the penalty against the drift."""
    wait_cap_s: float = 60.0
    wait_term: bool = True
    """Whether waiting counts beside the penalty. Without it the O(1/V), O(V) trade-off holds for c0."""
    in_turn: float | None = None
    """Load of a device that takes one request at a time; None: of any other, whose queues say enough."""

    def __post_init__(self) -> None:
        if min(self.t_ref_s, self.e_ref_j, self.n_ref, self.v) <= 0:
            raise SpecError(f"reference values and V are positive: {self}")
        if min(self.w_energy, self.w_accuracy, self.wait_cap_s) < 0:
            raise SpecError(f"weights are not negative: {self}")
        if self.in_turn is not None and not 0 <= self.in_turn < 1:
            raise SpecError(f"the load of a device is from 0 to below 1: {self}")

    def c0(self, service_s: Floats, joules: Floats, nats: Floats) -> Floats:
        """The penalty of a request that is served for `service_s`, waiting apart."""
        energy = self.w_energy * joules / self.e_ref_j
        return service_s / self.t_ref_s + energy + self.w_accuracy * nats / self.n_ref

    def turn(self, total_s: Floats, waiting: Floats | float) -> Floats | float:
        """What others wait when a request takes the device for `total_s` while so many wait: those, and whoever comes
        before they are all done, `n x/T_ref + rho/(1 - rho) (n x/T_ref + x^2/(2 T_ref^2))`; 0 unless `in_turn`."""
        if self.in_turn is None:
            return 0.0
        x, more = total_s / self.t_ref_s, self.in_turn / (1 - self.in_turn)
        return waiting * x + more * (waiting * x + x**2 / 2)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What may be spent on average per request. None: no such budget, and its queue stays empty."""

    energy_j: float | None = None
    deadline_s: float | None = None
    misses: float = 0.05
    """Share of requests that may miss the deadline."""
    nats: float | None = None
    """Per token."""
    tokens_ref: float = 128.0
    battery_w: float | None = None
    """Power the battery may give on average."""
    t_ref_s: float = 1.0
    """Time scale of the battery's queue."""


def nominal_weights(penalty: Penalty, mean_work_s: Floats, load: Floats | float = 0.8) -> Floats:
    """Weights w_i of the physical queues (..., 4): the delay that a request's work causes to later arrivals of a
    first-come queue at this load, `V rho / ((1 - rho) s_i T_ref)`; 0 where no work is ever done."""
    with np.errstate(divide="ignore", invalid="ignore"):  # also 0 / 0, of a queue that neither works nor loads
        weights = penalty.v * load / ((1 - load) * mean_work_s * penalty.t_ref_s)
    return np.where(mean_work_s > 0, weights, 0.0)


def served(queues: Floats, speed: Floats, seconds: Floats) -> Floats:
    """Physical queues (..., 4) after some time: `max(Q - mu t, 0)`; the speed of a link is 0 in an outage."""
    result: Floats = np.maximum(queues - speed * seconds, 0.0)
    return result


def added(queues: Floats, work: Floats) -> Floats:
    """What adding `work` (..., 4) adds to `1/2 Q_i^2` of each queue, exactly: `Q_i x_i + x_i^2 / 2`."""
    return queues * work + work * work / 2


def drift(queues: Floats, work: Floats, weights: Floats) -> Floats:
    """What adding `work` (..., 4) adds to `1/2 sum w_i Q_i^2`."""
    result: Floats = (weights * added(queues, work)).sum(axis=-1)
    return result


def lyapunov(queues: Floats, weights: Floats, virtual: Floats) -> Floats:
    """`L = 1/2 sum w_i Q_i^2 + 1/2 sum Z_j^2`."""
    result: Floats = (weights * queues**2).sum(axis=-1) / 2 + (virtual**2).sum(axis=-1) / 2
    return result


def overspending(budgets: Budgets, joules: Floats, miss_probability: Floats, nats: Floats, tokens: Floats) -> Floats:
    """g_j of a decision (..., 4): what it is expected to add to the virtual queues, before the floor at 0.

    The deadline's is `P[T > D] / eps`: a constant -1 would not change the choice. The battery's is left to time.
    """
    g = np.zeros((*np.broadcast(joules, miss_probability, nats, tokens).shape, NUM_VIRTUAL))
    if budgets.energy_j is not None:
        g[..., 0] = joules / budgets.energy_j - 1
    if budgets.deadline_s is not None:
        g[..., 1] = miss_probability / budgets.misses
    if budgets.nats is not None:
        g[..., 2] = tokens / budgets.tokens_ref * (nats / budgets.nats - 1)
    if budgets.battery_w is not None:
        g[..., 3] = joules / (budgets.battery_w * budgets.t_ref_s)
    return g


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Drift plus penalty before it is said what the queues weigh."""

    paid: Floats
    """(...): `V [c0 + min(wait, cap)/T_ref]`."""
    added: Floats
    """(..., 4): to half the square of each physical queue."""
    g: Floats
    """(..., 4): to each virtual queue."""

    @classmethod
    def of(cls, penalty: Penalty, c0: Floats, wait_s: Floats, queues: Floats, work: Floats, g: Floats) -> Terms:
        wait = np.minimum(wait_s, penalty.wait_cap_s) / penalty.t_ref_s if penalty.wait_term else 0.0
        return cls(penalty.v * (c0 + wait), added(queues, work), g)

    def objective(self, weights: Floats, virtual: Floats) -> Floats:
        """D (...): `V [c0 + min(wait, cap)/T_ref] + drift + sum Z_j g_j`. Choose the smallest."""
        result: Floats = self.paid + (weights * self.added).sum(axis=-1) + (virtual * self.g).sum(axis=-1)
        return result


def completed(
    virtual: Floats, budgets: Budgets, joules: Floats, missed: Floats, nats: Floats, tokens: Floats
) -> Floats:
    """Virtual queues (..., 4) after a request has ended: energy, deadline and accuracy, floored at 0, capped."""
    g = overspending(budgets, joules, missed, nats, tokens)
    if budgets.deadline_s is not None:
        g[..., 1] -= 1.0
    g[..., 3] = 0.0
    result: Floats = np.clip(virtual + g, 0.0, CAP)
    return result


def drained(virtual: Floats, budgets: Budgets, joules: Floats, seconds: Floats) -> Floats:
    """Virtual queues after some time in which the device took `joules`: the battery's."""
    if budgets.battery_w is None:
        return virtual
    after = virtual.copy()
    after[..., 3] += joules / (budgets.battery_w * budgets.t_ref_s) - seconds / budgets.t_ref_s
    return np.clip(after, 0.0, CAP)


def ratio_objective(
    penalty: Penalty, cost: Floats, queues: Floats, work: Floats, weights: Floats, speed: Floats, virtual: Floats,
    y: Floats, frame_s: Floats, theta: Floats,
) -> Floats:  # fmt: skip
    """For objectives per time whose frames the action makes (closed loop, think time):
    `V c + sum w_i Q_i (x_i - mu_i F) + sum Z_j y_j - theta F`; theta follows `V c` per second (`next_theta`)."""
    physical = (weights * queues * (work - speed * frame_s[..., None])).sum(axis=-1)
    result: Floats = penalty.v * cost + physical + (virtual * y).sum(axis=-1) - theta * frame_s
    return result


def next_theta(theta: Floats, value: Floats, frame_s: Floats, elapsed_s: Floats) -> Floats:
    """Theta after a frame that took `value` (`V c`), the last of frames that took `elapsed_s` together: a 1/k step
    in units of the mean frame, so that no unit of time matters. Theta is then what all frames took per second."""
    return theta + (value - theta * frame_s) / elapsed_s


def at_cap(virtual: Floats) -> NDArray[np.bool_]:
    """Which virtual queues (..., 4) have come to the cap, or are the one step below it that a thrifty request of
    reference length takes: their budgets are infeasible and are to be reported."""
    return np.asarray(virtual > CAP - 1)


def scaled(penalty: Penalty, factor: float) -> Penalty:
    """The penalty with another V."""
    return replace(penalty, v=penalty.v * factor)
