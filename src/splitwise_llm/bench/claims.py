"""What must come out of each scenario, as functions of its cells: the written expectation, decided by figures.

A claim whose cells were not run says so. Values decide, not their limits: few traces can decide wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from splitwise_llm.bench.cells import HINDSIGHT, WITH_TOOLS
from splitwise_llm.bench.variants import OURS
from splitwise_llm.page import Claim
from splitwise_llm.records import Cell, Estimate

NO_RIVALS = (HINDSIGHT, OURS, "drift", "tuned")
ByPolicy = Mapping[str, Cell]
Judge = Callable[[str, ByPolicy], list[Claim]]


def judged(cells: Collection[str]) -> str:
    """The policy that claims are about, of those there are: the learned one, or without its weights drift plus
    penalty."""
    return OURS if {OURS, OURS + WITH_TOOLS} & set(cells) else "drift"


def _figure(cells: ByPolicy, policy: str, metric: str) -> Estimate | None:
    cell = cells.get(policy)
    return cell.metrics.get(metric) if cell else None


def _factor(cells: ByPolicy, above: str, below: str, metric: str = "mean_s") -> float | None:
    one, other = _figure(cells, above, metric), _figure(cells, below, metric)
    return one.value / other.value if one and other and other.value > 0 else None


def _say(scenario: str, text: str, value: float | None, holds: Callable[[float], bool], show: str) -> Claim:
    if value is None:
        return Claim(scenario, text, None, "the cells that decide it were not run")
    return Claim(scenario, text, holds(value), show.format(value))


def _within_one_percent(scenario: str, case: str, cells: ByPolicy, best: str, ours: str) -> list[Claim]:
    claims = []
    for metric, what in (("mean_s", "mean"), ("p95_s", "p95"), ("device_j", "device energy")):
        value = _factor(cells, ours, best, metric)
        text = f"{case}: {ours} within 1 % of {best} in {what}"
        claims.append(_say(scenario, text, value, lambda v: v <= 1.01, "{:.4f} of it"))
    return claims


def _smallest(cells: ByPolicy, policy: str, tools: bool) -> Claim | None:
    """That no rival with the same tools has a smaller mean by more than 1 %."""
    rivals = [
        name
        for name in cells
        if name.endswith(WITH_TOOLS) == tools and name != policy and not name.startswith(NO_RIVALS)
    ]
    mine = _figure(cells, policy, "mean_s")
    if not mine or not rivals:
        return None
    best = min(rivals, key=lambda name: cells[name].metrics["mean_s"].value)
    value = mine.value / cells[best].metrics["mean_s"].value
    return Claim(
        cells[policy].scenario, f"{cells[policy].case}: {policy} wins", value <= 1.01,
        f"{mine.value:.3f} s; next: {best} {cells[best].metrics['mean_s'].value:.3f} s",
    )  # fmt: skip


def _healthy_cloud(case: str, cells: ByPolicy) -> list[Claim]:
    wins = [claim for claim in (_smallest(cells, "cloud-only", False),) if claim]
    return wins + _within_one_percent("healthy-cloud", case, cells, "cloud-only", judged(cells))


def _capable_edge(case: str, cells: ByPolicy) -> list[Claim]:
    best = "edge-only" + WITH_TOOLS
    wins = [claim for claim in (_smallest(cells, best, True),) if claim]
    return wins + _within_one_percent("capable-edge", case, cells, best, judged(cells) + WITH_TOOLS)


def _against_cloud(
    scenario: str, case: str, cells: ByPolicy, expected: Mapping[str, tuple[float, float]]
) -> list[Claim]:
    """p95 of ours with tools over cloud-only's: within the range that is expected of this case."""
    low, high = next((limits for name, limits in expected.items() if case.startswith(name)), (0.0, 1.01))
    value = _factor(cells, judged(cells) + WITH_TOOLS, "cloud-only", "p95_s")
    text = f"{case}: p95 against cloud-only changes by {100 * (low - 1):+.0f} to {100 * (high - 1):+.0f} %"
    if value is None:
        return [_say(scenario, text, None, bool, "")]
    return [Claim(scenario, text, low <= value <= high, f"{100 * (value - 1):+.1f} %")]


def _flaky_wan(case: str, cells: ByPolicy) -> list[Claim]:
    return _against_cloud("flaky-wan", case, cells, {"orin-gpt2xl": (0.0, 0.5), "orin-7b": (0.0, 0.8)})


def _tunnel(case: str, cells: ByPolicy) -> list[Claim]:
    return _against_cloud("tunnel", case, cells, {"pi5-7b": (0.0, 1.01), "": (0.0, 0.47)})


def _rush_hour(case: str, cells: ByPolicy) -> list[Claim]:
    value = _factor(cells, "drift-selfish", judged(cells))
    text = f"{case}: the priced policy's mean at least 20 % below the selfish one's"
    must = any(rate in case for rate in ("0.15", "0.2-"))
    if not must:
        text = f"{case}: the priced policy is not worse than the selfish one"
    bound = 1.25 if must else 0.99
    return [_say("rush-hour", text, value, lambda v: v >= bound, "selfish over priced {:.3f}")]


def _private(scenario: str, low: float, high: float) -> Judge:
    def judge(case: str, cells: ByPolicy) -> list[Claim]:
        static = "edgeshard-latency"
        value = _factor(cells, static, judged(cells) + WITH_TOOLS)
        text = f"{case}: {low:g} to {high:g} times faster than the static fp16 layer plan"
        return [_say(scenario, text, value, lambda v: low <= v <= high, "{:.2f}")]

    return judge


def _long_prompt(case: str, cells: ByPolicy) -> list[Claim]:
    claims = []
    value = _factor(cells, judged(cells), judged(cells) + WITH_TOOLS)
    text = f"{case}: wire precision, chunks and drafting matter"
    claims.append(_say("long-prompt", text, value, lambda v: v > 1.05, "without them {:.2f} times as long"))
    if case.startswith("orin") and case.endswith("-5mbit"):
        value = _factor(cells, "edge-only" + WITH_TOOLS, judged(cells) + WITH_TOOLS)
        claims.append(
            _say("long-prompt", f"{case}: edge-only wins", value, lambda v: v <= 1.01, "edge-only {:.3f} of the policy")
        )
    return claims


def _too_big(case: str, cells: ByPolicy) -> list[Claim]:
    value = _factor(cells, "cloud-only", judged(cells) + WITH_TOOLS)
    text = f"{case}: splitting relieves a rationed cloud"
    return [_say("too-big", text, value, lambda v: v >= 1.0, "cloud-only over the policy {:.2f}")]


def _peer_lan(case: str, cells: ByPolicy) -> list[Claim]:
    value = _factor(cells, "whole-halves", "exact")
    if "a100" in case:
        return [_say("peer-lan", f"{case}: nothing is divided", value, lambda v: v <= 1.0 + 1e-9, "gain {:.3f}")]
    if case.count("pi5") == 2:
        low = 1.5 if "ideal" in case else 1.2
        text = f"{case}: dividing halves gains over whole ones"
        return [_say("peer-lan", text, value, lambda v: v >= low, "{:.2f} times faster")]
    return [_say("peer-lan", f"{case}: dividing gains or is not chosen", value, lambda v: v >= 1 - 1e-9, "{:.3f}")]


def _day(case: str, cells: ByPolicy) -> list[Claim]:
    value = _factor(cells, HINDSIGHT + WITH_TOOLS, judged(cells) + WITH_TOOLS)
    text = f"{case}: adapting beats any constant plan by at least 3 %"
    return [_say("day", text, value, lambda v: v >= 1.03, "{:.3f} times faster than the best constant plan")]


def _real_traces(case: str, cells: ByPolicy) -> list[Claim]:
    value = _factor(cells, HINDSIGHT + WITH_TOOLS, judged(cells) + WITH_TOOLS)
    text = f"{case}: not worse than the best constant plan in hindsight"
    return [_say("real-traces", text, value, lambda v: v >= 0.99, "{:.3f}")]


JUDGES: Mapping[str, Judge] = {
    "healthy-cloud": _healthy_cloud,
    "capable-edge": _capable_edge,
    "flaky-wan": _flaky_wan,
    "tunnel": _tunnel,
    "rush-hour": _rush_hour,
    "private-mec": _private("private-mec", 1.4, 1.8),
    "private-wan": _private("private-wan", 1.5, 4.0),
    "long-prompt": _long_prompt,
    "too-big": _too_big,
    "peer-lan": _peer_lan,
    "day": _day,
    "real-traces": _real_traces,
}


def claims_of(cells: Sequence[Cell]) -> list[Claim]:
    """Every claim that these cells are about, case by case."""
    grouped: dict[tuple[str, str], dict[str, Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.scenario, cell.case), {})[cell.policy] = cell
    return [
        claim
        for (scenario, case), by_policy in grouped.items()
        if scenario in JUDGES
        for claim in JUDGES[scenario](case, by_policy)
    ]
