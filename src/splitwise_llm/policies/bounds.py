"""The least time any decision could take: what a search that was cut short is measured by. It finds no decision."""

from __future__ import annotations

from collections.abc import Sequence

from splitwise_llm.cost import Form, Host, Job, Limits, World
from splitwise_llm.cost.counts import units_in
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Part
from splitwise_llm.plan import DEVICE


def least_total_s(world: World, job: Job, tools: Tools, limits: Limits, conditions: Form) -> float:
    """Seconds below which no admissible decision's `total_s` can fall; 0 where a machine is priced by measurements.

    Links, memory, admission and drafting take nothing. In a step each half takes at least `1 / sum(1 / t)` over the
    machines that may run it, as if it were divided without a rest (`units` of a roofline take at least their share of
    what all take). Of n chunks that overlap, one walks alone, and the busiest of M machines has at least an M-th of
    the work of the others, each half on the machine that is quickest with it.
    """
    if any(host.measured for host in world.hosts):
        return 0.0
    machines = [m for m in range(len(world.hosts)) if m not in limits.unreachable]
    if limits.only is not None:
        machines = [m for m in machines if m in limits.only]
    bound = _Bound(world, limits, conditions, machines)
    later = (job.tokens_out - 1) * min(
        bound.step_s(draft + 1, job.mean_context + draft, heads=draft + 1)[0] / world.drafter.tokens_per_round(draft)
        for draft in tools.drafts
    )
    first = min(_first_s(bound, job, chunk) for chunk in tools.chunks if chunk is None or chunk < job.prompt_tokens)
    return first + later


def _first_s(bound: _Bound, job: Job, chunk: int | None) -> float:
    size = chunk or job.prompt_tokens
    starts = range(0, job.prompt_tokens, size)
    ends = [min(start + size, job.prompt_tokens) for start in starts]
    steps = [bound.step_s(end - start, end) for start, end in zip(starts, ends, strict=True)]
    number = len(steps)
    walking, working = sum(walk for walk, _ in steps) / number, sum(work for _, work in steps)
    return walking + (1 - 1 / number) * working / bound.num_machines + bound.head_s(1)


class _Bound:
    def __init__(self, world: World, limits: Limits, conditions: Form, machines: Sequence[int]) -> None:
        self.world, self.limits, self.x, self.machines = world, limits, conditions, machines
        self.num_machines = len(machines)

    def _kept(self, layer: int) -> bool:
        floor, layers = self.limits.floor, self.world.spec.num_layers
        kept = self.limits.first_layer_on_device and layer == 0
        return kept or bool(floor and (layer < floor.first_layers or layer >= layers - floor.last_layers))

    def _slow(self, machine: int) -> tuple[Host, float]:
        return self.world.hosts[machine], float(self.x[self.world.basis.slow(machine)])

    def head_s(self, rows: int) -> float:
        """The output projection on the machine that is quickest with it."""
        allowed = [DEVICE] if self.limits.floor else self.machines
        hosts = [self._slow(machine) for machine in allowed]
        return min(slow * host.head_s(self.world.spec, rows) for host, slow in hosts)

    def step_s(self, rows: int, context: int, heads: int = 0) -> tuple[float, float]:
        """Of a step over `rows` positions that see up to `context`: the least it can take, and the least machine
        seconds it can cost; with the output projection of `heads` positions."""
        spec, layers = self.world.spec, self.world.spec.num_layers
        kept = sum(self._kept(layer) for layer in range(layers))
        walking = working = self.head_s(heads) if heads else 0.0
        for part in Part:
            units = units_in(spec, part)
            hosts = {machine: self._slow(machine) for machine in {DEVICE, *self.machines}}
            takes = {
                machine: slow * host.half_s(spec, part, units, rows, context) for machine, (host, slow) in hosts.items()
            }
            free = [takes[machine] for machine in self.machines]
            divided = 1 / sum(1 / max(one, 1e-30) for one in free)
            walking += kept * takes[DEVICE] + (layers - kept) * divided
            working += kept * takes[DEVICE] + (layers - kept) * min(free)
        return walking, working


__all__ = ["least_total_s"]
