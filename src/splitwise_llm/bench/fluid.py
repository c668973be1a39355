"""What no policy can beat in the long run: capacity and least penalty as linear programs over fractions of time.

It does not know any policy, and nothing of the order in which things happen: work of every class of link and cloud
is averaged by how much of the time that class lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from splitwise_llm.errors import SpecError
from splitwise_llm.lyapunov import Penalty
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.params import CloudProcess, LinkProcess, Params
from splitwise_llm.sim.physics import DEVICE_S, DOWN_S, PROMPT, TOKEN
from splitwise_llm.sim.step import conditions

ADMISSION = 2

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def long_run(process: LinkProcess | CloudProcess) -> Floats:
    """(classes,): the share of the time of each class. A walk between neighbours visits inner classes twice as often
    as the two ends; in turn, all are visited equally often."""
    dwell = np.array([kind.mean_dwell_s for kind in process.classes])
    inner = np.full(len(dwell), 1.0 if process.periodic or len(dwell) < 3 else 2.0)
    inner[[0, -1]] = 1.0
    share: Floats = inner * dwell / (inner * dwell).sum()
    return share


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Every pair of a link class and a cloud class: conditions, how much of the time, and whether the link is up."""

    conditions: Floats  # (states, conditions)
    share: Floats  # (states,)
    is_up: Bools  # (states,)

    @classmethod
    def of(cls, params: Params, traces: Traces) -> States:
        """Raises SpecError for a cloud that devices load, recorded links and days: their classes are not given."""
        link, cloud = params.link, params.cloud
        if not isinstance(cloud, CloudProcess) or params.segments or link.up or link.down or link.rtt:
            raise SpecError("a fluid bound is for generated links and a cloud that the devices do not load")
        pairs = np.array(list(product(range(len(link.classes)), range(len(cloud.classes)))))
        x = conditions(params, traces.link_rows, pairs[:, 0], params.cloud_rows[pairs[:, 1]])
        share = np.outer(long_run(link), long_run(cloud)).ravel()
        return cls(x, share, np.array([kind.is_up for kind in link.classes])[pairs[:, 0]])


def capacity(params: Params, traces: Traces, allowed: Bools, *, moves: bool = False) -> float:
    """Requests per second and device that fractions of them over the `allowed` plans (plans,) can carry.

    Unknown are the prompts, tokens and admissions that each plan does per second in each class, so that device, uplink
    and downlink work for at most one second per second, requests hold no more slots than there are, and nothing that
    needs the link happens in an outage. With `moves` a request may do each token by another plan, at no cost. An upper
    bound: order, chance and what stands still while it waits take the rest.
    """
    physics, states = params.physics, States.of(params, traces)
    plans, size = np.nonzero(allowed)[0], len(states.share)
    cloud = physics.uses_cloud[plans]
    phases = (PROMPT, TOKEN, ADMISSION)
    load = np.zeros((4, size, len(phases), size, len(plans)))  # device, up, down, slots: of a state, by unknown
    blocked = np.zeros((len(phases), size, len(plans)), bool)
    for c in range(size):
        for phase in (PROMPT, TOKEN):
            unit = physics.all_units(phase, 0, states.conditions[c : c + 1])[0, plans]
            load[:3, c, phase, c] = unit[:, DEVICE_S : DOWN_S + 1].T
            load[3, c, phase, c] = unit[:, 0]
            blocked[phase, c] = physics.needs_link[phase, plans] & ~states.is_up[c]
        load[3, c, ADMISSION, c] = states.conditions[c, physics.places.wait] * cloud
    room = np.repeat([1.0, 1.0, 1.0, float(params.slots)], size) * np.tile(states.share, 4)
    balance = []
    for phase, per_request in zip(phases, (1.0, params.mean_tokens - 1, 1.0), strict=True):
        if moves and phase == ADMISSION:
            continue  # whoever asks for nothing waits for nothing
        for own in [np.ones(len(plans))] if moves else np.eye(len(plans)):
            done = np.zeros((len(phases), size, len(plans)))
            done[phase] = own
            balance.append(np.concatenate([done.ravel(), -per_request * own]))
    requests = np.zeros((4 * size, len(plans)))
    rows = np.concatenate([load.reshape(4 * size, -1), requests], axis=1)
    gain = np.concatenate([np.zeros(blocked.size), -np.ones(len(plans))])
    bounds = [(0.0, 0.0 if no else None) for no in [*blocked.ravel(), *([False] * len(plans))]]
    found = linprog(gain, rows, room, np.array(balance), np.zeros(len(balance)), bounds)
    if not found.success:
        raise SpecError(f"no fluid bound: {found.message}")
    return float(-found.fun)


def least_penalty(params: Params, traces: Traces, allowed: Bools, penalty: Penalty) -> float:
    """The smallest mean c0 of requests at `params.arrivals.per_s` when their plans are chosen by the class of the
    moment, and device and links have no more than a second of work per second that they are there."""
    states, per_s = States.of(params, traces), params.arrivals.per_s
    physics = params.physics
    prices = physics.tables[0].at(states.conditions)
    c0 = penalty.c0(prices.service_s, prices.device_j, prices.nats + np.zeros_like(prices.service_s))
    usable = allowed & (states.is_up[:, None] | ~physics.uses_cloud)
    work = np.stack([prices.work.device_s, prices.work.up_s, prices.work.down_s])  # (3, states, plans)
    there = np.array([1.0, *[float(states.share @ states.is_up)] * 2])
    share = np.broadcast_to(states.share[:, None], c0.shape)
    found = linprog(
        (share * c0).ravel(),
        (per_s * share * work).reshape(3, -1),
        there,
        np.kron(np.eye(len(states.share)), np.ones(c0.shape[1])),
        np.ones(len(states.share)),
        [(0.0, None if can else 0.0) for can in usable.ravel()],
    )
    if not found.success:
        raise SpecError(f"{per_s:.3g} requests per second are more than any choice of plans can carry")
    return float(found.fun)
