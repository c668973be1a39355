"""What the learned policy must reach, row by row: measured, the bar, met or not, and what nobody could exceed.

A row whose cells were not run says so and is neither met nor missed. Where a bar speaks of an upper limit that limit
decides, else the value does; limits (95 %) are of paired traces. It simulates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitwise_llm.bench.cells import HINDSIGHT, WITH_TOOLS
from splitwise_llm.bench.outcome import Outcome, compared, resampled, together
from splitwise_llm.bench.scenarios import CAUSAL, CLAIRVOYANT, CONTROLLER
from splitwise_llm.bench.variants import OURS, is_ours
from splitwise_llm.bench.yardsticks import Result
from splitwise_llm.records import Cell, Estimate

Outcomes = Mapping[str, Outcome]
"""Policy -> what became of each request of a case."""
TOOLED = OURS + WITH_TOOLS
REPLANNED = "edgeshard-replanned"
CLEAR = 0.01
"""Drift's regret that is worth recovering, when its lower limit is above."""
LIVE = "a live figure: `runs/live_bars.sh`, docs/results.md"


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of the table."""

    figure: str
    where: str
    bar: str
    measured: Estimate | None
    """None: not run, `says` says what would."""
    met: bool | None
    ceiling: str = ""
    """What the best causal, the clairvoyant policy or a crowd's one controller comes to, where the bar is missed."""
    says: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that bars are decided by."""

    outcomes: Mapping[tuple[str, str], Outcomes]
    cells: Sequence[Cell] = ()
    rows: Sequence[Result] = ()
    """The small cases."""
    stability: Mapping[str, float] = field(default_factory=dict)
    """Figures of `bench stability --policy splitwise`."""
    in_rows: str = ""
    """Why the small cases were not run."""

    def cases(self, *scenarios: str) -> Iterator[tuple[str, str, Outcomes]]:
        for (scenario, case), outcomes in self.outcomes.items():
            if scenario in scenarios:
                yield scenario, case, outcomes


def bars_of(evidence: Evidence) -> list[Bar]:
    """Every row of the table, in its order."""
    parts = (
        _pure, _small_cases, _rush_hour, _tuned, _tails, _private, _joules, _accuracy, _stability, _memory, _fallbacks,
    )  # fmt: skip
    return [bar for part in parts for bar in part(evidence)]


def _ratio(
    figure: str, where: str, outcomes: Outcomes, ours: str, other: str, metric: str, most: float, *,
    by_limit: bool = False, bound: bool = False,
) -> Bar:  # fmt: skip
    """That ours over the other is at most so much. `bound`: with the ceiling of whoever could do better."""
    words = f"{metric} over {other} at most {most:g}" + (" (upper limit)" if by_limit else "")
    if ours not in outcomes or other not in outcomes:
        return _not_run(figure, where, words)
    one = compared(outcomes[ours], outcomes[other], metric)
    met = (one.high if by_limit else one.value) <= most
    return Bar(figure, where, words, one, met, "" if met or not bound else _ceiling(outcomes, other, metric))


def _ceiling(outcomes: Outcomes, other: str, metric: str) -> str:
    """What the yardsticks come to over the same rival."""
    said = []
    for name in (CAUSAL, CLAIRVOYANT):
        if name in outcomes and other in outcomes and metric in ("mean_s", "p95_s"):
            said.append(f"{name} {compared(outcomes[name], outcomes[other], metric).value:.3f}")
    if CONTROLLER in outcomes and metric == "mean_s":
        said.append(f"{CONTROLLER} of the crowd {compared(outcomes[CONTROLLER], outcomes[other], metric).value:.3f}")
    return ", ".join(said)


def _not_run(figure: str, where: str, bar: str, says: str = "not run") -> Bar:
    return Bar(figure, where, bar, None, None, says=says)


def _pure(evidence: Evidence) -> Iterator[Bar]:
    """Where one pure mode wins: no worse than it, with the same tools."""
    for scenario, case, outcomes in evidence.cases("healthy-cloud", "capable-edge"):
        for tools in ("", WITH_TOOLS):
            pure = [name + tools for name in ("cloud-only", "edge-only") if name + tools in outcomes]
            where = f"{scenario}.{case}{tools}"
            if not pure:
                yield _not_run("as good as the pure mode", where, "at most 1.01, p95 1.02")
                continue
            best = min(pure, key=lambda name: float(np.nanmean(outcomes[name].mean())))
            for metric, most in (("mean_s", 1.01), ("p95_s", 1.02), ("device_j", 1.01)):
                yield _ratio(
                    "as good as the pure mode", where, outcomes, OURS + tools, best, metric, most,
                    by_limit=True, bound=True,
                )  # fmt: skip


def _small_cases(evidence: Evidence) -> Iterator[Bar]:
    figure = "regret to best causal"
    rows = [row for row in evidence.rows if OURS in row.costs]
    half = "at least half of drift's gap recovered, pooled"
    if not rows:
        yield _not_run(figure, "22 rows", half, evidence.in_rows or "not run: give --bars without --quick")
        return
    wide = [row for row in rows if row.over["drift_over_causal"].low > 1 + CLEAR]
    where = f"{len(wide)} of {len(rows)} rows whose gap is above 1 % with confidence"
    if wide:
        one = recovered(wide)
        yield Bar(figure, where, half, one, one.value >= 0.5, says="share of the gap; the causal policy has 1")
    else:
        yield _not_run(figure, where, half, "there is none")
    for row in rows:
        one = row.over[f"{OURS}_over_drift"]
        met = one.value <= 1.005
        reach = 1 / row.over["drift_over_causal"].value
        yield Bar(
            figure, row.name, "at most 1.005 x drift", one, met, "" if met else f"causal {reach:.3f}",
            f"over causal: drift {_percent(row.over['drift_over_causal'])}, ours "
            f"{_percent(row.over[OURS + '_over_causal'])}",
        )  # fmt: skip


def recovered(rows: Sequence[Result]) -> Estimate:
    """Of drift's gaps to the best causal policy, each in units of that policy's cost: which share ours closes."""

    def share(at: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
        closed = gap = 0.0
        for row in rows:
            drift, ours, causal = (float(row.costs[name][at].mean()) for name in ("drift", OURS, "causal"))
            closed, gap = closed + (drift - ours) / causal, gap + (drift - causal) / causal
        return closed / gap

    return resampled(share, min(len(row.costs[OURS]) for row in rows))


def _rush_hour(evidence: Evidence) -> Iterator[Bar]:
    figure, selfish = "rush-hour against selfish", "drift-selfish"
    cases = [
        (f"{scenario}.{case}", case.endswith("live"), outcomes)
        for scenario, case, outcomes in evidence.cases("rush-hour")
        if any(rate in case for rate in ("0.12", "0.15", "0.2-"))
    ]
    if not cases:
        bar = f"mean_s over {selfish} at most 0.75, 0.9 where the load is old; p95_s at most 1"
        yield _not_run(figure, "0.12, 0.15, 0.2 requests/s per device", bar, "not run: `--scenario rush-hour`")
    for where, fresh, outcomes in cases:
        yield _ratio(figure, where, outcomes, OURS, selfish, "mean_s", 0.75 if fresh else 0.9, bound=True)
        yield _ratio(figure, where, outcomes, OURS, selfish, "p95_s", 1.0)


def _tuned(evidence: Evidence) -> Iterator[Bar]:
    for (scenario, case), outcomes in evidence.outcomes.items():
        for tools in ("", WITH_TOOLS):
            if "tuned" + tools in outcomes:
                most = 0.97 if scenario == "day" else 1.005
                where = f"{scenario}.{case}{tools}"
                yield _ratio(
                    "tuned constants", where, outcomes, OURS + tools, "tuned" + tools, "mean_s", most, bound=True
                )


def _tails(evidence: Evidence) -> Iterator[Bar]:
    figure, cloud = "p95 against cloud-only", "cloud-only"
    for scenario, case, outcomes in evidence.cases("flaky-wan", "tunnel"):
        where = f"{scenario}.{case}"
        if TOOLED not in outcomes or cloud not in outcomes:
            yield _not_run(figure, where, "0.9 of the best causal policy's reduction")
            continue
        if case.startswith("pi5-7b"):
            yield _ratio(figure, where, outcomes, TOOLED, cloud, "p95_s", 1.02)
            continue
        best = CAUSAL if CAUSAL in outcomes else CLAIRVOYANT
        reach = 1 - compared(outcomes[best], outcomes[cloud], "p95_s").value
        one = compared(outcomes[TOOLED], outcomes[cloud], "p95_s")
        least = 0.9 * reach
        met = 1 - one.value >= least
        bar = f"p95_s over {cloud} at most {1 - least:.3f}: 0.9 of the reduction of the {best} policy"
        yield Bar(figure, where, bar, one, met, "" if met else f"{best} {1 - reach:.3f}")
        fast = ("orin-gpt2xl",) if scenario == "flaky-wan" else ("orin-gpt2xl", "orin-7b", "orin-13b")
        if case.startswith(fast):
            yield _ratio(figure, where, outcomes, TOOLED, cloud, "p95_s", 0.47, bound=True)


def _private(evidence: Evidence) -> Iterator[Bar]:
    figure = "private: latency"
    static, replanned, hindsight = "edgeshard-latency", REPLANNED + WITH_TOOLS, HINDSIGHT + WITH_TOOLS
    cases = [(f"{scenario}.{case}", one) for scenario, case, one in evidence.cases("private-mec", "private-wan")]
    for other, metric, gain in ((static, "mean_s", 1.5), (replanned, "mean_s", 1.04), (replanned, "p95_s", 1.1)):
        pairs = [(one[other], one[TOOLED]) for _, one in cases if {other, TOOLED} <= set(one)]
        bar = f"{other} over ours, {metric}, geometric mean at least {gain:g}"
        if not pairs:
            yield _not_run(figure, "private-mec, private-wan", bar)
            continue
        mean = together(pairs, metric)
        met = mean.value >= gain
        yield Bar(figure, f"{len(pairs)} rows", bar, mean, met, "" if met else _private_ceiling(cases, other, metric))
    for where, one in cases:
        for other, metric, gain in (
            (static, "mean_s", 1.3), (replanned, "mean_s", 0.99), (replanned, "p95_s", 0.99), (hindsight, "mean_s", 0),
        ):  # fmt: skip
            bar = f"{other} over ours, {metric}, at least {gain:g}" if gain else f"{other} over ours, {metric} (shown)"
            if not {other, TOOLED} <= set(one):
                yield _not_run(figure, where, bar)
                continue
            value = compared(one[other], one[TOOLED], metric)
            reached = value.value >= gain if gain else None
            ceiling = _private_ceiling([(where, one)], other, metric) if reached is False else ""
            yield Bar(figure, where, bar, value, reached, ceiling)


def _private_ceiling(cases: Sequence[tuple[str, Outcomes]], other: str, metric: str) -> str:
    said = []
    for name in (CAUSAL, CLAIRVOYANT):
        pairs = [(one[other], one[name]) for _, one in cases if {other, name} <= set(one)]
        if pairs:
            said.append(f"{name} {together(pairs, metric).value:.3f}")
    return ", ".join(said)


NINE = (
    ("private-wan", "orin-7b"), ("private-mec", "orin-7b"), ("private-wan", "s23-7b"), ("private-mec", "s23-7b"),
    ("private-mec", "pi5-7b"), ("capable-edge", "orin-gpt2xl"), ("capable-edge", "s23-gpt2xl"),
    ("private-wan", "pi5-gpt2xl"), ("private-mec", "orin-13b"),
)  # fmt: skip
"""The rows under a privacy floor of which the research tells joules."""


def _joules(evidence: Evidence) -> Iterator[Bar]:
    there = [(one, evidence.outcomes[one]) for one in NINE if one in evidence.outcomes]
    for other in (REPLANNED, REPLANNED + WITH_TOOLS):
        pairs = [(one, found) for one, found in there if {other, TOOLED} <= set(found)]
        barred = other == REPLANNED
        says = "" if len(pairs) == len(NINE) else f"{len(pairs)} of {len(NINE)} rows were run"
        for metric in ("device_j", "total_j"):
            figure = f"{metric} against {other}"
            if not pairs:
                yield _not_run(figure, "nine rows", "median at most 0.8, one at most 0.65")
                continue
            each = {one: compared(found[TOOLED], found[other], metric) for one, found in pairs}
            values = np.array([one.value for one in each.values()])
            middle = _median(pairs, other, metric)
            decided = barred and metric == "device_j"
            bar = "median at most 0.8" if decided else "median (shown)"
            yield Bar(figure, f"{len(pairs)} rows", bar, middle, middle.value <= 0.8 if decided else None, says=says)
            if decided:
                least = min(each.values(), key=lambda one: one.value)
                yield Bar(figure, "best row", "at most 0.65", least, bool(values.min() <= 0.65), says=says)
            for (scenario, case), one in each.items():
                yield Bar(figure, f"{scenario}.{case}", "(shown)", one, None)
        if barred:
            for (scenario, case), found in pairs:
                for metric in ("mean_s", "p95_s"):
                    yield _ratio(
                        "joules: at latency no worse", f"{scenario}.{case}", found, TOOLED, other, metric, 1.0,
                        bound=True,
                    )  # fmt: skip
                lost = resampled(_difference(found[TOOLED], found[other]), len(found[other].nats))
                yield Bar(
                    "joules: at nats no worse", f"{scenario}.{case}", "nats less those of " + other + " at most 0",
                    lost, lost.value <= 1e-12,
                )  # fmt: skip


def _difference(ours: Outcome, other: Outcome) -> Callable[[np.ndarray[tuple[int, ...], np.dtype[np.int64]]], float]:
    mine, theirs = ours.mean("nats"), other.mean("nats")
    return lambda at: float(np.nanmean(mine[at]) - np.nanmean(theirs[at]))


def _median(pairs: Sequence[tuple[tuple[str, str], Outcomes]], other: str, metric: str) -> Estimate:
    """The median over rows of the ratios, and its limits over traces."""
    means = [(found[TOOLED].mean(metric), found[other].mean(metric)) for _, found in pairs]
    traces = min(len(mine) for mine, _ in means)
    return resampled(
        lambda at: float(np.median([np.nanmean(mine[at]) / np.nanmean(theirs[at]) for mine, theirs in means])), traces
    )


def _accuracy(evidence: Evidence) -> Iterator[Bar]:
    figure, bar = "accuracy", "nats per token within the budget (upper limit of the excess at most 0)"
    made = "splitwise bench stability --policy splitwise"
    found = _of_stability(evidence, "accuracy_over")
    if found is None:
        yield _not_run(figure, "private-wan.orin-7b, lossy wires", bar, f"`{made}`")
    else:
        yield Bar(figure, "private-wan.orin-7b, lossy wires", bar, found, found.high <= 0)
    yield _not_run(figure, "live against the table", "within 10 %", LIVE)


def _of_stability(evidence: Evidence, name: str) -> Estimate | None:
    found = evidence.stability
    if name not in found:
        return None
    return Estimate(found[name], found.get(f"{name}_lo", np.nan), found.get(f"{name}_hi", np.nan))


def _stability(evidence: Evidence) -> Iterator[Bar]:
    figure = "stability"
    for share in (0.7, 0.8, 0.9, 0.95):
        bar, where = "growth below 1 % of what is offered (upper limit)", f"at {share:g} of the fluid bound"
        found = _of_stability(evidence, f"slope_at_{share:g}")
        if found is None:
            yield _not_run(figure, where, bar, "`splitwise bench stability --policy splitwise`")
        else:
            yield Bar(figure, where, bar, found, found.high < 0.01)


def _memory(evidence: Evidence) -> Iterator[Bar]:
    yield _not_run(
        "memory", "live", "measured peak within 10 % of predicted, never above the limit",
        LIVE,
    )  # fmt: skip


def _fallbacks(evidence: Evidence) -> Iterator[Bar]:
    for cell in evidence.cells:
        share = cell.metrics.get("fallback_share")
        if share is not None and cell.policy in (OURS, TOOLED):
            most = sorted(cell.knobs.items(), key=lambda one: -one[1])[:3]
            says = ", ".join(f"{name} in {100 * part:.0f} %" for name, part in most) or "no knob turned"
            where = f"{cell.scenario}.{cell.case}" + cell.policy.removeprefix(OURS)
            yield Bar("fallback_share", where, "at most 0.05", share, share.value <= 0.05, says=says)


# Where it loses


@dataclass(frozen=True, slots=True)
class Loss:
    """A case in which somebody else is better, whatever the traces."""

    where: str
    metric: str
    rival: str
    ratio: Estimate
    """Ours over the rival's; the lower limit is above 1."""


def losses_of(evidence: Evidence, metrics: Sequence[str] = ("mean_s", "p95_s", "device_j")) -> list[Loss]:
    """Every case and metric in which the best rival with the same tools is better with confidence. Bounds, plans that
    were chosen on the very traces, and other weights of a policy are no rivals."""
    found = []
    for (scenario, case), outcomes in evidence.outcomes.items():
        for tools in ("", WITH_TOOLS):
            ours = OURS + tools
            rivals = [
                name
                for name in outcomes
                if name.endswith(WITH_TOOLS) == bool(tools)
                and not is_ours(name)
                and "@" not in name
                and name not in (CAUSAL, CLAIRVOYANT, CONTROLLER)
                and not name.startswith(HINDSIGHT)
            ]
            if ours not in outcomes or not rivals:
                continue
            for metric in metrics:
                each = {name: compared(outcomes[ours], outcomes[name], metric) for name in rivals}
                rival = max(each, key=lambda name: each[name].value)
                if each[rival].low > 1:
                    found.append(Loss(f"{scenario}.{case}{tools}", metric, rival, each[rival]))
    return found


# As text


def markdown(bars: Sequence[Bar], losses: Sequence[Loss]) -> str:
    """The table, and below it where it loses."""
    decided = [bar for bar in bars if bar.met is not None]
    lines = [
        f"{sum(bool(bar.met) for bar in decided)} of {len(decided)} bars are met; {len(bars) - len(decided)} rows are "
        "only shown, or were not run. Limits are 95 %, paired by trace.",
        "",
        "| figure | where | bar | measured | met | ceiling, remarks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for bar in bars:
        met = "" if bar.met is None else "yes" if bar.met else "**no**"
        remarks = "; ".join(filter(None, (bar.ceiling, bar.says)))
        lines.append(f"| {bar.figure} | {bar.where} | {bar.bar} | {_shown(bar.measured)} | {met} | {remarks} |")
    lines += ["", "Where somebody with the same tools is better with confidence:", ""]
    if losses:
        lines += ["| where | figure | rival | ours over it |", "| --- | --- | --- | --- |"]
        lines += [f"| {one.where} | {one.metric} | {one.rival} | {_shown(one.ratio)} |" for one in losses]
    else:
        lines.append("nowhere in the cells that were run.")
    return "\n".join(lines) + "\n"


def _shown(one: Estimate | None) -> str:
    return "" if one is None else f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def _percent(one: Estimate) -> str:
    return f"{100 * (one.value - 1):+.1f} % ({100 * (one.low - 1):+.1f} to {100 * (one.high - 1):+.1f})"


__all__ = ["Bar", "Evidence", "Loss", "bars_of", "losses_of", "markdown", "recovered"]
