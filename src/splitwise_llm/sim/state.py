"""What a simulated system is at one moment: arrays only, one row per world; the next moment is `step.advance`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from splitwise_llm.lyapunov import NUM_VIRTUAL
from splitwise_llm.observation import EPOCHS, SEEN
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.paths import Path
from splitwise_llm.sim.physics import MODES, Bools, Floats, Ints

FREE, HELD, WAIT, PROMPT, DECODE, MOVE, DELIVER = range(7)
"""Phases of a slot: nobody; at the device, undecided; waiting for the cloud's admission; until the first token;
later tokens; going to another plan; everything is generated, and the link has to come back."""


@dataclass(slots=True, eq=False)
class State:
    """Of worlds (e,), devices (e, d) and slots (e, d, s). A slot holds one request in flight.

    Fields beside the obvious: `left` is what the phase still takes, in units (1: the whole prompt, move or
    admission; tokens; seconds of delivery); `unit` what one unit takes (as `Physics.units`); `token` what a later
    token of the plan takes. `home` is the plan whose caches are in place. Tokens count as generated; `delivered`
    are those that have reached the device.
    """

    now: Floats  # (e,)
    is_over: Bools  # (e,)
    cloud_row: Ints  # (e,)
    cloud_at: Ints  # (e,) position on the path
    cloud_lap_s: Floats  # (e,)
    cloud_next_s: Floats  # (e,)
    noted: Ints  # (e,) samples of queue lengths so far
    load: Floats  # (e, 4): slow, share, join, wait of the cloud now
    fill: Floats  # (e,) by how much slower a prompt is filled in than alone
    published: Floats  # (e, 5): load as devices know it, and when it is published next (s)
    residence_s: Floats  # (e,) mean time a session holds its slot

    row: Ints  # (e, d) of the link
    at: Ints
    lap_s: Floats
    next_s: Floats
    seen: Ints  # (e, d) row of the link as the device knows it
    seen_cloud: Ints
    taken: Ints  # (e, d) requests that have left the door
    ready_s: Floats  # (e, d) when the next request is at the door
    used_s: Floats  # (e, d) when the link was last used
    drawn_j: Floats  # (e, d) energy of the device so far
    battery_j: Floats  # (e, d) what is left; infinite on mains
    virtual: Floats  # (e, d, 4)
    since_s: Floats  # (e, d) when the link was last seen to come or go
    epochs: Floats  # (e, d, EPOCHS, SEEN) as in `observation.Past`, with the time in place of the age
    counts: Floats  # (e, d, 3, 3) outages, gaps, answers of `observation.Past`

    phase: Ints  # (e, d, s)
    ask: Bools
    request: Ints
    plan: Ints  # row of `Physics`
    home: Ints
    left: Floats
    tokens: Floats
    delivered: Floats
    output: Floats
    guess: Floats
    arrival_s: Floats
    first_s: Floats
    epoch_s: Floats
    epoch_tokens: Floats
    hold_s: Floats
    dirty: Bools
    needs_link: Bools
    asked_s: Floats  # when it asked the cloud for admission; NEVER_S: it has not been heard yet
    granted: Bools  # holds a session of the shared cloud
    granted_s: Floats
    ghost: Floats  # tokens that the cloud goes on with, unaware that it is no longer asked to
    ghost_plan: Ints
    moves: Ints
    preempted: Ints
    first_plan: Ints
    unit: Floats  # (e, d, s, 8)
    token: Floats  # (e, d, s, 8)
    spent: Floats  # (e, d, s, 3): device J, others J, USD
    mode_s: Floats  # (e, d, s, modes)

    def copy(self) -> State:
        """Another state with equal content and no shared arrays."""
        return State(*(getattr(self, field.name).copy() for field in fields(self)))

    def part(self, worlds: slice) -> State:
        """Some of the worlds; arrays are shared, so what changes there changes here."""
        return State(*(getattr(self, field.name)[worlds] for field in fields(self)))

    @property
    def num_in_flight(self) -> Ints:
        """(e, d)"""
        return np.asarray((self.phase != FREE).sum(axis=2))

    @property
    def is_asking(self) -> Bools:
        """(e,) whether a decision is due."""
        return np.asarray(self.ask.any(axis=(1, 2)))


def initial(params: Params, traces: Traces) -> State:
    """The state at time 0: nobody has come, links and cloud are as their paths begin."""
    worlds, devices = len(traces.numbers), params.num_devices
    per_world, per_device = (worlds,), (worlds, devices)
    per_slot = (worlds, devices, params.slots)

    def number(shape: tuple[int, ...], value: float = 0.0) -> Floats:
        return np.full(shape, value, np.float64)

    def count(shape: tuple[int, ...], value: int = 0) -> Ints:
        return np.full(shape, value, np.int64)

    def no(shape: tuple[int, ...]) -> Bools:
        return np.zeros(shape, np.bool_)

    load = np.tile(np.array([1.0, 1.0, 0.0, 0.0]), (worlds, 1))
    cloud_row = traces.cloud.rows[..., 0].copy()
    if not params.is_shared:
        load = params.cloud_rows[cloud_row]
    cells = [params.physics.tables[table].world.hosts[0].device.battery_j for table in params.device_tables]
    battery = np.array([np.inf if cell is None or not params.battery else cell for cell in cells])
    link_row = traces.link.rows[..., 0]
    return State(
        now=number(per_world), is_over=no(per_world), cloud_row=cloud_row, cloud_at=count(per_world),
        cloud_lap_s=number(per_world), cloud_next_s=_second(traces.cloud), noted=count(per_world), load=load.copy(),
        fill=number(per_world, 1.0), published=np.concatenate([load, number((worlds, 1))], axis=1),
        residence_s=number(per_world, params.penalty.t_ref_s),
        row=link_row.copy(), at=count(per_device), lap_s=number(per_device), next_s=_second(traces.link),
        seen=link_row.copy(), seen_cloud=np.repeat(cloud_row[:, None], devices, axis=1),
        taken=count(per_device), ready_s=traces.arrival_s[..., 0].copy(), used_s=number(per_device),
        drawn_j=number(per_device), battery_j=np.tile(battery, (worlds, 1)),
        virtual=number((*per_device, NUM_VIRTUAL)), since_s=number(per_device),
        epochs=number((*per_device, EPOCHS, len(SEEN))), counts=number((*per_device, 3, 3)),
        phase=count(per_slot), ask=no(per_slot), request=count(per_slot), plan=count(per_slot), home=count(per_slot),
        left=number(per_slot), tokens=number(per_slot), delivered=number(per_slot), output=number(per_slot),
        guess=number(per_slot), arrival_s=number(per_slot), first_s=number(per_slot),
        epoch_s=number(per_slot, NEVER_S), epoch_tokens=number(per_slot, NEVER_S), hold_s=number(per_slot),
        dirty=no(per_slot), needs_link=no(per_slot), asked_s=number(per_slot, NEVER_S), granted=no(per_slot),
        granted_s=number(per_slot), ghost=number(per_slot), ghost_plan=count(per_slot), moves=count(per_slot),
        preempted=count(per_slot), first_plan=count(per_slot),
        unit=number((*per_slot, 8)), token=number((*per_slot, 8)), spent=number((*per_slot, 3)),
        mode_s=number((*per_slot, len(MODES))),
    )  # fmt: skip


def _second(path: Path) -> Floats:
    """When each path changes first; one that never changes starts over, which nobody notices."""
    return path.times_s[..., 1].copy()
