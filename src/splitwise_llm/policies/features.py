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
OF_CLASS = ("there", "worse by", "service", "device work", "cloud work", "joules", "entry", "now")
NAMES = (
    *REQUEST, *LINK, *CLOUD, *(f"queue {name}" for name in QUEUES), *(f"over {name}" for name in VIRTUAL), *DEVICE_,
    *(f"forecast {name}" for name in FORECAST),
    *(f"{mode.name.lower()} {name}" for mode in CLASSES for name in OF_CLASS),
)  # fmt: skip
"""Of the features that are not epochs, in order."""
COUNT = len(NAMES)
FORECASTS = tuple(n for n, name in enumerate(NAMES) if name.startswith("forecast "))
"""Places of what is forecast: zero where that is left out."""
TOTAL = COUNT + EPOCHS * len(SEEN)
_LINK: Pair = (DEVICE, 1)


def _squash(x: Floats) -> Floats:
    x = np.maximum(x, 0.0)
    squashed: Floats = x / (1 + x)
    return squashed


def features(priced: Priced, *, forecasts: bool = True) -> NDArray[np.float32]:
    """(systems, TOTAL): NAMES, then EPOCHS times SEEN, the latest epoch first."""
    menu, prepared = priced.menu, priced.prepared
    basis, penalty = menu.table.world.basis, prepared.penalty
    t, n = penalty.t_ref_s, np.arange(len(priced.least))
    past = menu.past or Past.nothing(len(n))
    x, result = menu.conditions, np.zeros((len(n), TOTAL))
    later = menu.remaining_tokens
    _, high = forecast.answer_tokens(past, later)
    up, down = x[:, basis.inverse(*_LINK)] * 1e5 / t, x[:, basis.inverse(*_LINK[::-1])] * 1e5 / t
    drafter = menu.table.world.drafter
    columns: list[Floats] = [
        priced.fresh.astype(float), _squash(menu.waited_s / t), _squash(later / 100), _squash(high / 100),
        _squash(x[:, basis.rtt(*_LINK)] / t * 10), _squash(up), _squash(down),
        past.is_down.astype(float), _squash(past.since_s / 10), _squash(past.age_s / 10),
        _squash(x[:, basis.slow(1)] - 1), _squash(x[:, basis.wait(1)] / t), _squash(x[:, basis.join(1)] / t * 10),
        *_squash(menu.queues / t).T, *_squash(menu.virtual).T,
        1 / past.slots, _squash(past.others[:, 0] / past.slots), _squash(past.others[:, 1] / 4),
        np.full(len(n), _squash(np.asarray(penalty.w_energy))), np.full(len(n), drafter.acceptance),
    ]  # fmt: skip
    service = priced.prices.service_s[n, priced.best] + priced.prices.wait_s[n, priced.best]
    columns += [
        _squash(forecast.outage_left_s(past) / t), _squash(forecast.outage_mean_s(past) / t),
        forecast.outage_within(past, np.full(len(n), t)), forecast.outage_within(past, service),
        *_squash(forecast.rate_ratio(past)).T,
    ]  # fmt: skip
    unit = priced.bound - priced.least
    here = prepared.classes[np.maximum(menu.current, 0)]
    for number in range(len(CLASSES)):
        of_class = np.where(prepared.classes == number, priced.d1, np.inf)
        best = of_class.argmin(axis=1)
        there = np.isfinite(of_class[n, best])
        worse = np.where(there, (of_class[n, best] - priced.least) / unit, 1e9)
        prices = priced.prices
        entry = np.where(priced.fresh, 0.0, menu.entry_s[n, best])
        some = [
            _squash(worse), _squash(prices.service_s[n, best] / t), _squash(prices.work.device_s[n, best] / t),
            _squash(prices.work.cloud_s[n, best] / t), _squash(prices.device_j[n, best] / penalty.e_ref_j),
            _squash(entry / t),
        ]  # fmt: skip
        columns += [there.astype(float), *(np.where(there, one, 1.0) for one in some), ~priced.fresh & (here == number)]
    result[:, :COUNT] = np.stack(columns, axis=-1)
    if not forecasts:
        result[:, FORECASTS] = 0.0
    result[:, COUNT:] = _epochs(past, t).reshape(len(n), -1)
    return result.astype(np.float32)


def _epochs(past: Past, t: float) -> Floats:
    """(systems, EPOCHS, SEEN) squashed; rates as the time that 100 kB take."""
    seen = past.epochs
    result = np.zeros_like(seen)
    there = seen[..., 5] > 0
    result[..., 0] = _squash(seen[..., 0] / 10)
    result[..., 1] = seen[..., 1]
    result[..., 2] = _squash(seen[..., 2] / t * 10)
    with np.errstate(divide="ignore"):
        result[..., 3:5] = _squash(np.where(seen[..., 3:5] > 0, 1e5 / np.maximum(seen[..., 3:5], 1e-9) / t, 1e9))
    result[..., 5] = _squash(seen[..., 5] - 1)
    result[..., 6:8] = _squash(seen[..., 6:8] / t)
    return np.where(there[..., None], result, 0.0)


__all__ = ["COUNT", "FORECASTS", "NAMES", "TOTAL", "features"]
