"""The figures of bills under given conditions: one (`price`), or many at a time (`Table`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost.bill import Bill, Spending, bill, flop
from splitwise_llm.cost.terms import Form
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision
from splitwise_llm.plan import DEVICE
from splitwise_llm.spec import DeviceSpec

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """The figures of many bills under many conditions: every array is (..., bills)."""

    ttft_s: Floats
    tpot_s: Floats
    service_s: Floats
    """From admission to the last token."""
    wait_s: Floats
    total_s: Floats
    device_j: Floats
    total_j: Floats
    usd: Floats
    nats: Floats
    """Per token (bills,)."""
    work: Work


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a decision adds to each physical queue, in seconds at nominal speed; of a shared machine, slot-seconds
    over its slots plus the prefill."""

    device_s: Floats
    up_s: Floats
    down_s: Floats
    cloud_s: Floats


_SPENT = tuple(field.name for field in fields(Spending))
_KIND = {name: n for n, name in enumerate(_SPENT)}


class Table:
    """Bills of one world packed for evaluation under many conditions at a time."""

    def __init__(self, world: World, bills: Sequence[Bill]) -> None:
        self.world, self.bills = world, tuple(bills)
        groups = [getattr(bill, name).groups for name in ("ttft", "tpot", "wait") for bill in bills]
        flat = [group for of_delay in groups for group in of_delay]
        self._delays = np.concatenate(flat).T.copy()  # (conditions, forms)
        self._group_at = np.cumsum([0] + [len(group) for group in flat[:-1]])
        self._delay_at = np.cumsum([0] + [len(of_delay) for of_delay in groups[:-1]])
        self._spent = {
            phase: np.stack([getattr(getattr(bill, phase), name) for name in _SPENT for bill in bills]).T.copy()
            for phase in ("prompt", "token")
        }  # (conditions, kinds x bills)
        self._later = np.array([float(bill.later_tokens) for bill in bills])
        self._nats = np.array([bill.nats for bill in bills])
        self._others_idle_w = np.array([bill.others_idle_w for bill in bills])
        self._slot_share = np.array([self._slots(bill) for bill in bills])
        self._recompute_w, self._recompute_usd = np.array([self._recomputing(bill) for bill in bills]).T

    def _slots(self, bill: Bill) -> float:
        """What holding a slot for a second takes of the shared machines it uses."""
        hosts = [self.world.hosts[machine] for machine in bill.decision.partition.machines if machine != DEVICE]
        return max((1 / host.device.slots for host in hosts if host.is_shared), default=0.0)

    def _recomputing(self, bill: Bill) -> tuple[float, float]:
        """W beyond idling and USD/s of a machine beside the device that recomputes; of several, the dearest."""
        hosts = [self.world.hosts[machine] for machine in bill.decision.partition.machines if machine != DEVICE]
        watts = [h.device.pue * (h.device.prefill_w - (0.0 if h.is_shared else h.device.idle_w)) for h in hosts]
        return max(watts, default=0.0), max((h.device.usd_per_hour / 3600 for h in hosts), default=0.0)

    def __len__(self) -> int:
        return len(self.bills)

    def at(self, conditions: Floats, later_tokens: Floats | None = None, entry: Entry | None = None) -> Prices:
        """All figures under conditions (..., num_conditions).

        `later_tokens` (..., 1) replaces the number of tokens after the first; `entry` replaces the prompt: what
        it takes a running generation to go on with each plan, after which all its remaining tokens are "later".
        """
        return self.under(conditions)(later_tokens, entry)

    def under(self, conditions: Floats) -> Callable[[Floats | None, Entry | None], Prices]:
        """`at` these conditions, for whoever asks several times: what depends on nothing else is computed once."""
        delays = _sums_of_maxima(conditions @ self._delays, self._group_at, self._delay_at)
        spent = {phase: conditions @ forms for phase, forms in self._spent.items()}

        def at(later_tokens: Floats | None, entry: Entry | None) -> Prices:
            later = self._later if later_tokens is None else later_tokens
            return self._prices(delays, spent, later, entry, self._others_idle_w, self._slot_share)

        return at

    def mixed(self, mix: Floats, conditions: Floats) -> Prices:
        """The figures of plans whose bills are mixes of these, (plans, bills), under one set of conditions.

        All bills must be of one shape: group by group as many forms. Nats do not mix and are those of no loss.
        """
        rows = conditions @ self._delays
        mixed: list[Floats] = []
        group_at: list[NDArray[np.intp]] = []
        delay_at: list[NDArray[np.intp]] = []
        at = 0
        per_kind = len(self)
        starts = [*self._group_at.tolist(), len(rows)]
        for kind in range(3):
            first, last = (self._delay_at[kind * per_kind], self._delay_at[kind * per_kind + 1 : kind * per_kind + 2])
            groups = int(last[0] if len(last) else len(self._group_at)) - int(first)
            widths = np.diff(starts[first : first + groups + 1])
            block = rows[starts[first] :][: per_kind * widths.sum()].reshape(per_kind, -1)
            mixed.append((mix @ block).ravel())
            offsets = np.concatenate([[0], np.cumsum(widths)[:-1]])
            here = at + (np.arange(len(mix))[:, None] * widths.sum() + offsets).ravel()
            delay_at.append(sum(len(one) for one in group_at) + np.arange(len(mix)) * groups)
            group_at.append(here)
            at += len(mixed[-1])
        delays = _sums_of_maxima(np.concatenate(mixed), np.concatenate(group_at), np.concatenate(delay_at))
        spent = {
            phase: (mix @ (conditions @ forms).reshape(len(_SPENT), per_kind, 1))[..., 0].ravel()
            for phase, forms in self._spent.items()
        }
        return self._prices(delays, spent, mix @ self._later, None, mix @ self._others_idle_w, mix @ self._slot_share)

    def _prices(
        self,
        delays: Floats,
        spent: dict[str, Floats],
        later: Floats,
        entry: Entry | None,
        others_idle_w: Floats,
        slot_share: Floats,
    ) -> Prices:
        size = delays.shape[-1] // 3
        ttft, tpot, wait = delays[..., :size], delays[..., size : 2 * size], delays[..., 2 * size :]
        kinds = (*delays.shape[:-1], len(_SPENT), size)
        whole = later[..., None, :] * spent["token"].reshape(kinds)  # all kinds at a time: a live decision has one row
        if entry is None:
            whole += spent["prompt"].reshape(kinds)
        else:
            ttft, wait = entry.seconds, np.zeros_like(entry.seconds)
            whole[..., _KIND["device_j"], :] += entry.device_s * (self._device.prefill_w - self._device.idle_w)
            whole[..., _KIND["others_j"], :] += entry.cloud_s * self._recompute_w
            whole[..., _KIND["usd"], :] += entry.cloud_s * self._recompute_usd
            whole[..., _KIND["device_s"], :] += entry.device_s
            whole[..., _KIND["cloud_s"], :] += entry.cloud_s
        active_j, others_j, usd, device_s, up_s, down_s, cloud_s = (whole[..., n, :] for n in range(len(_SPENT)))
        after = later * tpot
        service = ttft + after
        total = wait + service
        device_j = active_j + self._device.idle_w * total
        total_j = device_j + others_j + others_idle_w * total
        usd = usd + self.world.tariff.usd_per_kwh * device_j / 3.6e6  # a rented machine's is in its rent
        slots = slot_share * later * tpot
        return Prices(
            ttft, tpot, service, wait, total, device_j, total_j, usd, self._nats,
            Work(device_s, up_s, down_s, cloud_s + slots),
        )  # fmt: skip

    @property
    def _device(self) -> DeviceSpec:
        return self.world.hosts[DEVICE].device


def _sums_of_maxima(forms: Floats, group_at: NDArray[np.intp], delay_at: NDArray[np.intp]) -> Floats:
    groups = np.maximum.reduceat(forms, group_at, axis=-1)
    sums: Floats = np.add.reduceat(groups, delay_at, axis=-1)
    return sums


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What it takes a running generation to go on with each plan: arrays (..., bills)."""

    seconds: Floats
    device_s: Floats
    cloud_s: Floats


@dataclass(frozen=True, slots=True)
class Price:
    """What one decision costs under given conditions. Sequences are per machine."""

    decision: Decision
    ttft_s: float
    tpot_s: float
    wait_s: float
    total_s: float
    device_j: float
    total_j: float
    usd: float
    nats: float
    up_bytes: float
    down_bytes: float
    round_trips_per_token: float
    busy_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    flop: tuple[float, ...]


def price(world: World, decision: Decision, job: Job, conditions: Form | None = None) -> Price:
    """What a decision costs a job, under the links as given and idle machines unless conditions are.

    Raises PartitionError.
    """
    one = bill(world, decision, job)
    x = world.conditions() if conditions is None else conditions
    at = Table(world, [one]).at(x)
    lanes = {*one.prefill_bytes, *one.token_bytes}
    scale = one.plan.round_trips_per_token / world.drafter.tokens_per_round(decision.draft)
    return Price(
        decision, float(at.ttft_s[0]), float(at.tpot_s[0]), float(at.wait_s[0]), float(at.total_s[0]),
        float(at.device_j[0]), float(at.total_j[0]), float(at.usd[0]), one.nats,
        sum(one.lane_bytes(*lane) for lane in lanes if lane[0] == DEVICE),
        sum(one.lane_bytes(*lane) for lane in lanes if lane[1] == DEVICE),
        scale,
        tuple(one.busy_s(machine) for machine in range(len(world.hosts))),
        one.memory_bytes,
        tuple(flop(world, decision.partition, job, machine) for machine in range(len(world.hosts))),
    )  # fmt: skip
