"""Small simulated worlds that the tests of the simulator share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm import lyapunov
from splitwise_llm.cost import Drafter, Entry, Host, Job, Table, World, bill
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.observation import Menu
from splitwise_llm.partition import Partition
from splitwise_llm.sim.params import LinkClass, LinkProcess
from splitwise_llm.sim.physics import Physics
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, Weights, find_device, find_model

LINK = LinkSpec.parse("rtt=20ms up=50mbit down=50mbit")
STEADY = LinkProcess((LinkClass.of(LINK),))
EDGE, CLOUD, U, CUT, U_TOOLS, EDGE_DRAFT, SHARED = range(7)


def world(device: str = "orin-nx-16gb", model: str = "llama-7b", link: LinkSpec = LINK) -> World:
    hosts = (Host(find_device(device), Dtype.FP16, Weights.INT4), Host(find_device("a100-80gb")))
    return World(find_model(model), hosts, {(0, 1): link}, drafter=Drafter(0.6))


def table(at: World | None = None, job: Job | None = None) -> Table:
    """Edge, cloud, U, cut; the U with chunks, int8 wire and drafts; edge with drafts; a shared plan."""
    at, job = at or world(), job or Job(128, 128)
    spec = at.spec
    u = Partition.u_shape(spec, 2, 2)
    decisions = [
        Decision(Partition.all_on(spec, 0), WirePrecision.FP16),
        Decision(Partition.all_on(spec, 1), WirePrecision.FP16),
        Decision(u, WirePrecision.FP16),
        Decision(Partition.cut(spec, spec.num_layers // 2), WirePrecision.FP16),
        Decision(u, WirePrecision.INT8, 32, 3),
        Decision(Partition.all_on(spec, 0), WirePrecision.FP16, None, 2),
        Decision(Partition.shared(spec, {0: 1.0, 1: 3.0}), WirePrecision.FP16),
    ]
    return Table(at, [bill(at, decision, job) for decision in decisions])


def constant_table(seconds: float, tokens: int = 2) -> Table:
    """One device-only plan whose requests take so many seconds, all of them work of the device."""
    base = world().hosts[0].device
    flat = DeviceSpec("flat", 1e9, 1e9, 1e12, launch_s=0.0, idle_w=base.idle_w, decode_w=10, prefill_w=10)
    spec = find_model("gpt2")
    probe = World(spec, (Host(flat), Host(flat)), {(0, 1): LINK})
    decision = Decision(Partition.all_on(spec, 0))
    job = Job(8, tokens)
    stretch = seconds / float(Table(probe, [bill(probe, decision, job)]).at(probe.conditions()).total_s[0])
    scaled = World(spec, (Host(flat, stretch=stretch), Host(flat)), {(0, 1): LINK})
    return Table(scaled, [bill(scaled, decision, job)])


@dataclass(frozen=True)
class Only:
    """Always the same plan."""

    plan: int
    in_flight: bool = True

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        return np.full(len(menu.current), self.plan, np.int64)


@dataclass(frozen=True)
class Exact:
    """Drift plus penalty over all admissible plans, in the plainest way."""

    penalty: lyapunov.Penalty
    budgets: lyapunov.Budgets = lyapunov.Budgets()  # noqa: RUF009
    in_flight: bool = True

    def objective(self, menu: Menu) -> NDArray[np.float64]:
        later = menu.remaining_tokens[:, None]
        fresh = menu.table.at(menu.conditions, later)
        going = menu.table.at(menu.conditions, later, Entry(menu.entry_s, menu.entry_device_s, menu.entry_cloud_s))
        at_door = (menu.current < 0)[:, None]

        def pick(name: str) -> NDArray[np.float64]:
            return np.where(at_door, getattr(fresh, name), getattr(going, name))

        names = ("device_s", "up_s", "down_s", "cloud_s")
        work = np.stack([np.where(at_door, getattr(fresh.work, n), getattr(going.work, n)) for n in names], axis=-1)
        nats = np.broadcast_to(fresh.nats, later.shape[:1] + fresh.nats.shape)
        c0 = self.penalty.c0(pick("service_s"), pick("device_j"), nats)
        zero = np.zeros_like(c0)
        g = lyapunov.overspending(self.budgets, pick("device_j"), zero, nats, later + 1)
        weights = np.array([1.0, 1.0, 1.0, 1.0]) / self.penalty.t_ref_s
        terms = lyapunov.Terms.of(self.penalty, c0, pick("wait_s"), menu.queues[:, None, :], work, g)
        return terms.objective(weights, menu.virtual[:, None, :])

    def choose(self, menu: Menu) -> NDArray[np.int64]:
        value = np.where(menu.admissible, self.objective(menu), np.inf)
        best = value.argmin(axis=1)
        return best.astype(np.int64)


def physics() -> Physics:
    return Physics([table()])
