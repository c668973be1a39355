"""What the high level sees of a question, as numbers that mean the same whatever the model, the machines and the table.

Times are in units of the reference time T_ref, joules of E_ref. What is not bounded is squashed to [0, 1) by
x / (1 + x). Plans are seen by what is best of each class: on the device, in the cloud, on both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost.terms import Pair
from splitwise_llm.observation import EPOCHS, SEEN, Past
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import forecast
from splitwise_llm.policies.guided import CLASSES, Priced

Floats = NDArray[np.float64]

REQUEST = ("fresh", "waited", "left", "left p90")
LINK = ("rtt", "up", "down", "down now", "since", "age")
CLOUD = ("slow", "wait", "join")
QUEUES = ("device", "up", "down", "cloud")
VIRTUAL = ("energy", "deadline", "accuracy", "battery")
DEVICE_ = ("one slot", "others", "at door", "energy weight", "acceptance")
FORECAST = ("outage left", "outage mean", "outage soon", "outage in a request", "up ratio", "down ratio")
OUTLOOK = ("device", "later")
OF_CLASS = ("there", "worse by", "service", "device work", "cloud work", "joules", "entry", "now")
NAMES = (
    *REQUEST, *LINK, *CLOUD, *(f"queue {name}" for name in QUEUES), *(f"over {name}" for name in VIRTUAL), *DEVICE_,
    *(f"forecast {name}" for name in FORECAST), *(f"outlook {name}" for name in OUTLOOK),
    *(f"{mode.name.lower()} {name}" for mode in CLASSES for name in OF_CLASS),
)  # fmt: skip
"""Of the features that are not epochs, in order."""
COUNT = len(NAMES)
FORECASTS = tuple(n for n, name in enumerate(NAMES) if name.startswith("forecast "))
"""Places of what is forecast: zero where that is left out."""
TOTAL = COUNT + EPOCHS * len(SEEN)
_BOUNDED = {"fresh", "down now", "one slot", "acceptance", "forecast outage soon", "forecast outage in a request"} | {
    f"{mode.name.lower()} {name}" for mode in CLASSES for name in ("there", "now")
}
_OPEN = np.array([[name not in _BOUNDED] for name in NAMES])
"""(COUNT, 1): what is squashed."""
FULL = 2.0
"""Reference times of waiting for the cloud from which on it is seen as full. A large crowd's cloud backs up further in
an hour than any that can be learned in; how far is priced by the solver, which sees all of it."""
_LINK: Pair = (DEVICE, 1)
_BACK: Pair = (1, DEVICE)
_FAR = 1e9
_MOST = np.array([[_FAR], [_FAR], [_FAR], [FULL]])
"""Of the queues, in reference times."""


def _squashed(x: Floats) -> Floats:
    x = np.minimum(np.maximum(x, 0.0), _FAR)  # what is out of reach is infinitely far
    squashed: Floats = x / (1 + x)
    return squashed


def features(priced: Priced, *, forecasts: bool = True) -> NDArray[np.float32]:
    """(systems, TOTAL): NAMES, then EPOCHS times SEEN, the latest epoch first."""
    menu, prepared = priced.menu, priced.prepared
    basis, penalty = menu.table.world.basis, prepared.penalty
    t, count = penalty.t_ref_s, len(priced.least)
    n = np.arange(count)
    past = menu.past or Past.nothing(count)
    raw, at = np.empty((COUNT, count)), 0

    def put(*rows: NDArray[np.generic] | float) -> None:
        nonlocal at
        for row in rows:
            raw[at] = row
            at += 1

    x = menu.conditions
    _, high = forecast.answer_tokens(past, menu.remaining_tokens)
    put(priced.fresh, menu.waited_s / t, menu.remaining_tokens / 100, high / 100)
    put(x[:, basis.rtt(*_LINK)] * 10 / t, x[:, basis.inverse(*_LINK)] * 1e5 / t, x[:, basis.inverse(*_BACK)] * 1e5 / t)
    put(past.is_down, past.since_s / 10, past.age_s / 10)
    put(x[:, basis.slow(1)] - 1, x[:, basis.wait(1)] / t, x[:, basis.join(1)] * 10 / t)
    put(*np.minimum(menu.queues.T / t, _MOST))
    put(*menu.virtual.T)
    put(1 / past.slots, past.others[:, 0] / past.slots, past.others[:, 1] / 4)
    put(penalty.w_energy, menu.table.world.drafter.acceptance)
    prices, best = priced.prices, priced.best
    service = prices.service_s[n, best] + prices.wait_s[n, best]
    outages_s = priced.prospect.outages_s if priced.prospect else forecast.outages_s(past)
    put(*(seconds / t for seconds in outages_s))
    put(*forecast.outage_within(past, np.array([np.full(count, t), service])))
    put(*forecast.rate_ratio(past).T)
    put(*_outlook(priced))
    here = prepared.classes[np.maximum(menu.current, 0)]
    one, least = priced.best_of_class, priced.least_of_class  # (classes, systems), as all that follows
    there = np.isfinite(least)
    best_of = raw[at:].reshape(len(CLASSES), len(OF_CLASS), count)
    some = (
        np.where(there, least - priced.least, 0.0) / priced.unit, prices.service_s[n, one] / t,
        prices.work.device_s[n, one] / t, prices.work.cloud_s[n, one] / t,
        prices.device_j[n, one] / penalty.e_ref_j, np.where(priced.fresh, 0.0, menu.entry_s[n, one] / t),
    )  # fmt: skip
    best_of[:, 0] = there
    for number, value in enumerate(some, 1):
        best_of[:, number] = np.where(there, value, _FAR)
    best_of[:, -1] = ~priced.fresh & (here == np.arange(len(CLASSES))[:, None])
    raw = np.where(_OPEN, _squashed(raw), raw)
    if not forecasts:
        raw[FORECASTS, :] = 0.0
    return np.concatenate([raw.T, _epochs(past, t).reshape(count, -1)], axis=1).astype(np.float32)


def _outlook(priced: Priced) -> tuple[Floats, Floats]:
    """(systems,) each: by how much less than of the best plan of now is expected of one that is left when the outage
    ends, in units of what the filter that ships lets pass; and the share that waiting for that spares."""
    device, later = np.zeros(len(priced.least)), np.zeros(len(priced.least))
    if priced.prospect is not None:
        at = priced.prospect.at
        least = priced.least[at]
        device[at] = (least - priced.prospect.d1.min(axis=1)) / priced.unit[at]
        later[at] = np.maximum(priced.prospect.spared, 0.0)
    return device, later


def _epochs(past: Past, t: float) -> Floats:
    """(systems, EPOCHS, SEEN) squashed; rates as the time that 100 kB take."""
    seen = past.epochs
    raw = seen.copy()
    raw[..., 0] = seen[..., 0] / 10
    raw[..., 2] = seen[..., 2] * 10 / t
    raw[..., 3:5] = 1e5 / t / np.maximum(seen[..., 3:5], 1e-3)
    raw[..., 5] = seen[..., 5] - 1
    raw[..., 6] = seen[..., 6] / t
    result = _squashed(raw)
    result[..., 1] = seen[..., 1]
    there = seen[..., 5] > 0
    return np.where(there[..., None], result, 0.0)


__all__ = ["COUNT", "FORECASTS", "NAMES", "TOTAL", "features"]
