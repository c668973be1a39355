"""The bills of all menus as arrays, gathered for many requests at a time; it knows no clock, no queue and no policy.

A *row* is a plan of one of the tables; a *unit* is what a phase is made of: the whole prompt, one token, one move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Bill, Pair, Table, moving
from splitwise_llm.cost.bill import Spending
from splitwise_llm.errors import SpecError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CLOUD = 1
LINK: Pair = (DEVICE, CLOUD)
PROMPT, TOKEN = 0, 1
SECONDS, DEVICE_J, OTHERS_J, USD, DEVICE_S, UP_S, DOWN_S, CLOUD_S = range(8)
"""What a unit takes, as `units` returns it."""
SPENT = tuple(field.name for field in fields(Spending))
MODES = ("edge", "cloud", "split", "wait", "move")
"""Where a request spends its time: all on the device, all in the cloud, on both; not begun; changing plans."""
CONTEXT_CLASS = 64
"""Positions that count as equal when a move is priced."""
MAX_GAINS = 4
MAX_PLANS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where in a condition vector of a device and a cloud what stands."""

    device_slow: int
    device_share: int
    device_wait: int
    slow: int
    share: int
    join: int
    wait: int
    rtt: int
    up: int
    down: int
    size: int

    @classmethod
    def of(cls, table: Table) -> Places:
        basis = table.world.basis
        return cls(
            basis.slow(DEVICE), basis.share(DEVICE), basis.wait(DEVICE), basis.slow(CLOUD), basis.share(CLOUD),
            basis.join(CLOUD), basis.wait(CLOUD), basis.rtt(*LINK), basis.inverse(*LINK), basis.inverse(*LINK[::-1]),
            basis.size,
        )  # fmt: skip


class Physics:
    """Tables of one model on one cloud and one device each, packed. Raises SpecError for what cannot be simulated.

    `tables[t]` has the rows `first[t]` to `first[t + 1]`.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        if not tables or any(not 1 <= len(table) <= MAX_PLANS for table in tables):
            raise SpecError(f"a simulation has tables of 1 to {MAX_PLANS} plans; got {[len(t) for t in tables]}")
        worlds = [table.world for table in tables]
        if any(len(world.hosts) != 2 for world in worlds):
            raise SpecError("a simulation has a device and a cloud; make each world of two machines")
        if len({(world.spec, world.hosts[CLOUD]) for world in worlds}) > 1:
            raise SpecError("all devices of a simulation use one model and one cloud; make the worlds agree on both")
        self.tables = tuple(tables)
        self.places = Places.of(tables[0])
        self.first = np.cumsum([0, *map(len, tables)])
        bills = [bill for table in tables for bill in table.bills]
        self.num_rows = len(bills)
        self.table_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self._groups = max(len(d.groups) for b in bills for d in (b.ttft, b.tpot))
        self._maxima = max(len(g) for b in bills for d in (b.ttft, b.tpot) for g in d.groups)
        self._forms = np.stack([[self._packed(bill, phase) for bill in bills] for phase in (PROMPT, TOKEN)])
        """(2, rows, forms, conditions): a phase's maxima group by group, then what it spends."""
        delays = self._forms[:, :, : self._groups * self._maxima]
        on_link = delays[..., [self.places.rtt, self.places.up, self.places.down]]
        self.needs_link: Bools = np.asarray((on_link > 0).any(axis=(2, 3)))
        """(2, rows)"""
        machines = [bill.decision.partition.machines for bill in bills]
        self.uses_device = np.array([DEVICE in m for m in machines])
        self.uses_cloud = np.array([CLOUD in m for m in machines])
        self.streams: Bools = self.uses_cloud & ~self.needs_link[TOKEN]
        """The cloud goes on without the device; its tokens are delivered when the link lets them."""
        self.mode = np.where(self.uses_cloud, np.where(self.uses_device, 2, 1), 0)
        self.nats = np.array([bill.nats for bill in bills])
        self.others_idle_w = np.array([bill.others_idle_w for bill in bills])
        self.prompt_tokens = np.array([bill.job.prompt_tokens for bill in bills])
        self.cloud_layers = np.array([_cloud_share(bill.decision.partition) for bill in bills])
        """Share of the key/value groups that are in the cloud."""
        self.rows_per_step = np.array([bill.decision.draft + 1 for bill in bills])
        """Positions that a decoding step computes: one, and the drafted ones."""
        slots = worlds[0].hosts[CLOUD].device.slots
        self.slot_share = np.where(self.uses_cloud & worlds[0].hosts[CLOUD].is_shared, 1 / slots, 0.0)
        devices = [world.hosts[DEVICE].device for world in worlds]
        self.idle_w = np.array([device.idle_w for device in devices])  # (tables,)
        self.kwh_usd = np.array([world.tariff.usd_per_kwh for world in worlds])
        nominal = np.stack([table.world.conditions() for table in tables])[self.table_of]
        self.prompt_work: Floats = self.units(PROMPT, np.arange(self.num_rows), nominal)[:, DEVICE_S:]
        """(rows, 4): seconds of work of a prompt under the expected conditions."""
        self.moves = Moves(self)

    def _packed(self, bill: Bill, phase: int) -> Floats:
        delay = bill.tpot if phase else bill.ttft
        spending = bill.token if phase else bill.prompt
        forms = np.zeros((self._groups, self._maxima, self.places.size))
        for number, group in enumerate(delay.groups):
            forms[number, : len(group)] = group
        spent = [getattr(spending, name) for name in SPENT]
        return np.concatenate([forms.reshape(-1, self.places.size), np.stack(spent)])

    def units(self, phase: Ints | int, rows: Ints, conditions: Floats) -> Floats:
        """What a prompt or a token of plans `rows` (n,) takes under conditions (n, conditions): (n, 8) as named."""
        return self._summed(np.matmul(self._forms[phase, rows], conditions[..., None])[..., 0])

    def all_units(self, phase: int, table: int, conditions: Floats, ends: Sequence[int] = ()) -> Floats:
        """As `units`, for all plans of a table: (n, plans, 8). With `ends` the rows up to each are multiplied by
        themselves: a product of one row rounds otherwise than one of many, and what else is asked must not matter."""
        forms = self._forms[phase, self.first[table] : self.first[table + 1]]
        factor = forms.reshape(-1, forms.shape[-1]).T
        values = np.empty((len(conditions), factor.shape[1]))
        for first, last in pairwise((0, *(ends or (len(conditions),)))):
            np.matmul(conditions[first:last], factor, out=values[first:last])
        return self._summed(values.reshape(len(conditions), *forms.shape[:2]))

    def _summed(self, values: Floats) -> Floats:
        """Values of forms (..., forms) -> (..., 8): the sum of each group's largest, and what is spent."""
        split = self._groups * self._maxima
        if split == 1:
            return values
        result = np.empty((*values.shape[:-1], 8))
        delays = values[..., :split].reshape(*values.shape[:-1], self._groups, self._maxima)
        result[..., 0] = delays.max(-1).sum(-1)
        result[..., 1:] = values[..., split:]
        return result


def _cloud_share(partition: Partition) -> float:
    groups = [owner for layer in partition.layers for owner in layer.groups]
    return groups.count(CLOUD) / len(groups)


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """What moves take: (n, destinations), or (n,) of one destination each."""

    seconds: Floats
    """Without waiting for admission."""
    device_s: Floats
    cloud_s: Floats
    up_bytes: Floats
    down_bytes: Floats
    needs_link: Bools
    new_device: Bools
    """The device was not used before, so it has to be waited for."""
    new_cloud: Bools


class Moves:
    """Costs of going on with another plan, from `cost.moving`, kept by (partition, context class, partition).

    Plans of a table that differ only in chunk or draft are one *place*: between them nothing moves.
    """

    def __init__(self, physics: Physics) -> None:
        self._physics = physics
        self.place = np.zeros(physics.num_rows, np.int64)
        self._plans: list[list[Bill]] = []
        for table, start in zip(physics.tables, physics.first, strict=False):
            places: dict[object, int] = {}
            firsts: list[Bill] = []
            for number, bill in enumerate(table.bills):
                key = (bill.decision.partition.to_bytes(), bill.decision.wire, bill.decision.prefill_wire)
                if key not in places:
                    places[key] = len(places)
                    firsts.append(bill)
                self.place[start + number] = places[key]
            self._plans.append(firsts)
        self._width = max(map(len, self._plans))
        self._index: dict[tuple[int, int, int], int] = {}
        size = physics.places.size
        self._forms = np.zeros((0, self._width, 2, MAX_GAINS, size))  # recompute, transfer
        self._facts = np.zeros((0, self._width, 2, MAX_GAINS, 4))  # device s, cloud s, bytes up, bytes down
        self._new = np.zeros((0, self._width, 2), np.bool_)
        self.hits = self.misses = 0

    def _lines(self, tables: Ints, homes: Ints, contexts: Ints) -> Ints:
        """Where the moves from plans `homes` (rows) at these contexts are kept; priced on first use."""
        keys = list(zip(tables.tolist(), self.place[homes].tolist(), contexts.tolist(), strict=True))
        missing = {key for key in keys if key not in self._index}
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            new = sorted(missing)
            built = [self._price(*key) for key in new]
            for number, key in enumerate(new):
                self._index[key] = len(self._forms) + number
            self._forms = np.concatenate([self._forms, np.stack([forms for forms, _, _ in built])])
            self._facts = np.concatenate([self._facts, np.stack([facts for _, facts, _ in built])])
            self._new = np.concatenate([self._new, np.stack([fresh for _, _, fresh in built])])
        index = self._index
        return np.array([index[key] for key in keys], np.int64)

    def _price(self, table: int, place: int, context: int) -> tuple[Floats, Floats, Bools]:
        world, plans = self._physics.tables[table].world, self._plans[table]
        old = plans[place].decision.partition
        forms = np.zeros((self._width, 2, MAX_GAINS, self._physics.places.size))
        facts = np.zeros((self._width, 2, MAX_GAINS, 4))
        fresh = np.zeros((self._width, 2), np.bool_)
        for number, bill in enumerate(plans):
            new = bill.decision.partition
            fresh[number] = [m in new.machines and m not in old.machines for m in (DEVICE, CLOUD)]
            if number == place:
                continue
            gains = moving(world, old, bill.decision, max(context * CONTEXT_CLASS, 1)).gains
            for position, gain in enumerate(gains):
                at = min(position, MAX_GAINS - 1)  # what is left over is added up, and its way chosen once
                forms[number, :, at] += [gain.recompute, gain.transfer]
                lane = 2 if gain.machine == CLOUD else 3
                facts[number, 0, at, :2] += [gain.busy_s[DEVICE], gain.busy_s[CLOUD]]
                facts[number, 0, at, lane] += gain.recompute_bytes
                facts[number, 1, at, lane] += gain.transfer_bytes
        return forms, facts, fresh

    def entries(self, tables: Ints, homes: Ints, contexts: Floats, conditions: Floats) -> Entries:
        """From plans `homes` (n,) with `contexts` positions cached to every place: arrays (n, places)."""
        lines = self._lines(tables, homes, context_class(contexts))
        return self._entries(lines, slice(None), conditions[:, None, None, None, :])

    def entry(self, tables: Ints, homes: Ints, plans: Ints, contexts: Floats, conditions: Floats) -> Entries:
        """From plans `homes` (n,) to `plans` (n,): arrays (n,)."""
        lines = self._lines(tables, homes, context_class(contexts))
        return self._entries(lines, self.place[plans], conditions[:, None, None, :])

    def _entries(self, lines: Ints, to: Ints | slice, conditions: Floats) -> Entries:
        seconds = (self._forms[lines, to] * conditions).sum(-1)  # (n, [places,] 2, gains)
        transfers = seconds[..., 1, :] < seconds[..., 0, :]
        facts = self._facts[lines, to]
        chosen = np.where(transfers[..., None], facts[..., 1, :, :], facts[..., 0, :, :]).sum(-2)
        fresh = self._new[lines, to]
        return Entries(
            seconds.min(-2).sum(-1),
            chosen[..., 0],
            chosen[..., 1],
            chosen[..., 2],
            chosen[..., 3],
            (chosen[..., 2] > 0) | (chosen[..., 3] > 0),
            fresh[..., 0],
            fresh[..., 1],
        )


def context_class(contexts: Floats) -> Ints:
    """Cached positions in classes of `CONTEXT_CLASS`, rounded to the nearest."""
    return np.rint(contexts / CONTEXT_CLASS).astype(np.int64)
