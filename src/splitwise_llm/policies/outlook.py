"""What plans on the device are worth in an outage to whoever goes over to the cloud when the link is back.

Drift plus penalty prices the device as if for good. Here the rest of the outage is random, exponential with the mean
that is expected, and at its end the cheaper of two is done: to stay, or to go on with a plan that uses the cloud. Who
is still on the way to the device returns to what there is in the cloud; later the cloud begins with all that has come
since. Who stays goes on as soon as the link is back, who has left when that is seen: where figures are old, leaving
costs so much more. It decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Entry, Prices, Work
from splitwise_llm.observation import Menu

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ENDS = -np.log1p(-(np.arange(8) + 0.5) / 8)
ENDS /= ENDS.mean()
"""When outages of mean 1 end, at equal odds."""
SMALL = 1e-9
_PLAIN = tuple(item.name for item in fields(Prices) if item.name not in ("work", "nats"))
_WORK = tuple(item.name for item in fields(Work))
_TOTAL, _SERVICE, _WAIT, _JOULES = map(_PLAIN.index, ("total_s", "service_s", "wait_s", "device_j"))


@dataclass(frozen=True, slots=True, eq=False)
class _Later:
    """Going on in the cloud when the link is back, with the plan that is the cheapest: (figures, systems)."""

    begin: Floats
    token: Floats
    """Of each token that is left."""

    @classmethod
    def of(cls, begin: Floats, token: Floats, left: Floats, goes: Bools, joule_s: float) -> _Later:
        """The best of plans that `goes` (systems, plans) leaves."""
        plan = np.where(goes, _cost(begin + left * token, joule_s), np.inf).argmin(axis=1)
        n = np.arange(len(plan))
        return cls(begin[:, n, plan], token[:, n, plan])

    def after(self, left: Floats) -> Floats:
        """(figures, systems, plans, ends), `left` tokens (systems, plans, ends) being missing."""
        return self.begin[:, :, None, None] + left * self.token[:, :, None, None]


def with_returns(menu: Menu, prices: Prices, device: Ints, goes: Bools, outage_s: Floats, joule_s: float) -> Prices:
    """Prices of systems in an outage that goes on for `outage_s` on average. `prices` are as if for good, plans
    `device` those on the device alone, `goes` (systems, plans) what may be gone over to; a joule counts `joule_s`."""
    there = np.asarray(goes.any(axis=1))
    if not len(device) or not there.any():
        return prices
    table, left = menu.table, menu.remaining_tokens[:, None]
    job = table.bills[0].job
    held = np.empty(menu.current.shape)
    held[:] = menu.outage_s
    x = menu.conditions.copy()  # as they will be
    x[:, table.world.basis.wait(1)] -= np.minimum(held, x[:, table.world.basis.wait(1)])
    at, none = table.under(x), np.zeros_like(left)
    good, zero = _stacked(prices), np.zeros_like(prices.total_s)
    anew = _stacked(at(none, None))
    token = _stacked(at(left, Entry(zero, zero, zero))) / np.maximum(left, SMALL)
    nothing = (menu.current < 0)[:, None] | (left >= job.tokens_out - 1 - SMALL)  # is cached
    back = anew
    if not nothing.all():
        way = Entry(np.maximum(menu.entry_s - held[:, None], 0.0), menu.entry_device_s, menu.entry_cloud_s)
        back = np.where(nothing, anew, _stacked(at(none, way)))
    grown = np.where(nothing, 1.0, 1 + np.maximum(job.tokens_out - 1 - left, 0.0) / job.prompt_tokens)
    home = _Later.of(back, token, left, goes, joule_s)
    again = anew * grown
    again[_WAIT] = anew[_WAIT]
    again[_TOTAL] = again[_SERVICE] + again[_WAIT]
    cloud = _Later.of(again, token, left, goes, joule_s)

    ends = outage_s[:, None, None] * ENDS
    begin, each = (good - left * token)[:, :, device, None], token[:, :, device, None]
    made = (ends - begin[_TOTAL]) / np.maximum(each[_TOTAL], SMALL)
    made = np.minimum(np.maximum(made, 0.0), left[..., None])
    arrived = np.minimum(ends / np.maximum(begin[_TOTAL], SMALL), 1.0)
    rest = left[..., None] - made
    returned = np.where(arrived < 1, home.after(rest), cloud.after(rest))
    returned = returned + arrived * begin + made * each
    if menu.past is not None:
        unseen = -outage_s * np.expm1(-menu.past.age_s / np.maximum(outage_s, SMALL))
        for figure in (_TOTAL, _SERVICE):
            returned[figure] += unseen[:, None, None]
    stayed = good[:, :, device, None]
    better = (_cost(returned, joule_s) < _cost(stayed, joule_s)) & there[:, None, None]
    good[:, :, device] = np.add.reduce(np.where(better, returned, stayed), axis=-1) / len(ENDS)
    work = Work(*good[len(_PLAIN) :])
    return Prices(**dict(zip(_PLAIN, good, strict=False)), nats=prices.nats, work=work)


def _stacked(prices: Prices) -> Floats:
    """(figures, systems, plans): all that are not per token."""
    work = prices.work
    return np.array([*(getattr(prices, name) for name in _PLAIN), *(getattr(work, name) for name in _WORK)])


def _cost(figures: Floats, joule_s: float) -> Floats:
    result: Floats = figures[_TOTAL] + joule_s * figures[_JOULES] if joule_s else figures[_TOTAL]
    return result


__all__ = ["with_returns"]
