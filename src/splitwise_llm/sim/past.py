"""What devices remember of what they saw: the latest epochs, outages, answers. Nothing here is hidden from them."""

from __future__ import annotations

import numpy as np

from splitwise_llm.observation import Past
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.params import Params, SharedCloud
from splitwise_llm.sim.physics import Bools, Floats, Ints
from splitwise_llm.sim.state import FREE, State

OUTAGES, GAPS, ANSWERS = range(3)


def _count(s: State, what: Ints, e: Ints, d: Ints, value: Floats) -> None:
    np.add.at(s.counts, (e, d, what), np.stack([np.ones_like(value), value, value**2], axis=-1))


def link_flipped(s: State, e: Ints, d: Ints, comes: Bools) -> None:
    """Links of devices were seen to come or to go. The first stretch counts like any other, though it began before."""
    _count(s, np.where(comes, OUTAGES, GAPS), e, d, s.now[e] - s.since_s[e, d])
    s.since_s[e, d] = s.now[e]


def answered(s: State, e: Ints, d: Ints, tokens: Floats) -> None:
    """Requests of devices were answered with so many tokens."""
    _count(s, np.full(len(e), ANSWERS), e, d, tokens)


def decided(params: Params, traces: Traces, s: State, e: Ints, d: Ints) -> None:
    """A decision was made on devices (no device twice): what they saw goes on top."""
    kept = s.epochs[e, d]
    kept[:, 1:] = kept[:, :-1]
    rows = traces.link_rows[s.seen[e, d]]
    kept[:, 0, 0] = s.now[e]
    kept[:, 0, 1] = rows[:, 3]
    kept[:, 0, 2] = rows[:, 0]
    with np.errstate(divide="ignore"):
        kept[:, 0, 3:5] = np.where(rows[:, 1:3] > 0, 1 / rows[:, 1:3], 0.0)
    load = s.published[e, :4] if params.is_shared else params.cloud_rows[s.seen_cloud[e, d]]
    kept[:, 0, 5], kept[:, 0, 6] = load[:, 0], load[:, 3]
    s.epochs[e, d] = kept


def past(params: Params, traces: Traces, s: State, e: Ints, d: Ints) -> Past:
    """Of devices that ask about one of their requests each, now."""
    epochs = s.epochs[e, d].copy()
    there = epochs[..., 5] > 0  # a cloud is never slower by nothing
    epochs[..., 0] = np.where(there, s.now[e][:, None] - epochs[..., 0], 0.0)
    counts = s.counts[e, d]
    down = traces.link_rows[s.seen[e, d], 3] == 0
    busy = (s.phase[e, d] != FREE).sum(axis=1) - 1.0
    at_door = np.zeros(len(e))
    if params.arrivals.think_s is None:
        at_door = ((traces.arrival_s[e, d] <= s.now[e][:, None]).sum(axis=1) - s.taken[e, d]).clip(min=0).astype(float)
    age = np.full(len(e), params.seeing.delay_s)
    if isinstance(params.cloud, SharedCloud) and params.cloud.information_s:
        age = np.maximum(age, params.cloud.information_s - (s.published[e, 4] - s.now[e]))
    return Past(
        down, s.now[e] - s.since_s[e, d], age, np.full(len(e), float(params.slots)),
        np.stack([busy, at_door], axis=-1), epochs, *(counts[:, n] for n in (OUTAGES, GAPS, ANSWERS)),
    )  # fmt: skip


__all__ = ["answered", "decided", "link_flipped", "past"]
