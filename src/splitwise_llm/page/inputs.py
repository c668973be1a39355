"""What a report is made from: cells and what is said about them. It knows neither how they came about nor HTML."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from splitwise_llm.errors import SpecError
from splitwise_llm.records import Cell, Estimate

TOOLS = "+tools"
"""Ends the name of a policy that had int8 wire, prefill chunks and drafting."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table of scenarios."""

    number: int
    name: str
    text: str
    """The setting: link, load, devices, models, floor."""
    must: str
    """What must come out, as it was written down before anything ran."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A part of what must come out, and whether it did."""

    scenario: str
    text: str
    holds: bool | None
    """None: the cells that would decide it were not run."""
    measured: str
    """The figures that decided it, with their limits."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """Where a factor comes from: tools and freedoms added one after the other in one case."""

    scenario: str
    case: str
    steps: tuple[tuple[str, Estimate], ...]
    """Name and factor in mean latency over the first step (the static plan, 1), cumulative, paired by trace."""


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """What one plan of one model holds on the device and in the cloud."""

    model: str
    device: str
    plan: str
    device_bytes: float
    cloud_bytes: float
    fits: bool
    capacity_bytes: float = 0.0
    """Of the device, for models and caches; 0 where it is not known."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Speed-up over cloud-only, policy by policy, as one thing grows."""

    what: str
    """As in `devices that share one A100`."""
    x_label: str
    xs: tuple[float, ...] | tuple[str, ...]
    series: dict[str, tuple[Estimate, ...]]
    """Policy -> cloud-only's mean latency over its own, for every x; NaN where it was not run."""
    setting: str = ""
    """Scenario and case, and what is held fixed."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """How to make the report again."""

    command: str
    seed: int
    traces: tuple[str, ...]
    """Files, or generators with their parameters."""
    version: str
    date: str
    machine: str
    cpus: int
    run_s: float
    remarks: tuple[str, ...] = ()
    """What is assumed, shortened or left out."""


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything a report says. Raises SpecError where two cells are the same or one is about nothing."""

    cells: tuple[Cell, ...]
    settings: tuple[Setting, ...]
    claims: tuple[Claim, ...]
    provenance: Provenance
    ours: tuple[str, ...]
    """The policy that is judged, then its variants, which do not count as its rivals."""
    yardsticks: tuple[str, ...] = ()
    """Bounds that nothing can be asked to beat (best causal, clairvoyant): they win nothing."""
    ablations: tuple[Ablation, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    scalings: tuple[Scaling, ...] = ()

    def __post_init__(self) -> None:
        if not self.cells:
            raise SpecError("a report needs at least one cell, got none: run at least one scenario")
        if not self.ours:
            raise SpecError("a report needs the name of the policy that is judged: give `ours`")
        seen = Counter((cell.scenario, cell.case, cell.policy) for cell in self.cells)
        for (scenario, case, policy), times in seen.items():
            if times > 1:
                raise SpecError(f"{scenario}.{case}/{policy} was given {times} times, expected once: merge its traces")
        for cell in self.cells:
            for queue, backlog in cell.queues_s.items():
                if len(backlog) != len(cell.queue_times_s):
                    raise SpecError(
                        f"{cell.scenario}.{cell.case}/{cell.policy}: queue {queue!r} has {len(backlog)} values for "
                        f"{len(cell.queue_times_s)} times: record both together"
                    )
        for scaling in self.scalings:
            for policy, points in scaling.series.items():
                if len(points) != len(scaling.xs):
                    raise SpecError(
                        f"scaling {scaling.what!r}: {policy} has {len(points)} values for {len(scaling.xs)} "
                        "positions: give NaN where it was not run"
                    )

    @property
    def scenarios(self) -> tuple[str, ...]:
        """In the order of the settings, then those that no setting describes, as they came."""
        settings = [setting.name for setting in self.settings]
        cells, claims = [cell.scenario for cell in self.cells], [claim.scenario for claim in self.claims]
        return tuple(dict.fromkeys([*settings, *cells, *claims]))

    def cases(self, scenario: str) -> dict[str, list[Cell]]:
        """Case -> its cells, both in the order they came."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.scenario == scenario:
                found.setdefault(cell.case, []).append(cell)
        return found
