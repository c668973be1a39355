"""The figures of a cell as columns: heads, units, which way is better, digits. It compares no policies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitwise_llm.records import Estimate


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of the tables."""

    name: str
    head: str
    unit: str
    says: str
    sign: int = 1
    """1 where less is better, -1 where more is, 0 where neither is."""
    scale: float = 1.0
    """From the figure (SI) to the unit of the column."""


METRICS = (
    Metric("mean_s", "mean", "s", "Total latency, simulated, mean over requests"),
    Metric("p50_s", "p50", "s", "Total latency, simulated, median"),
    Metric("p95_s", "p95", "s", "Total latency, simulated, 95th percentile"),
    Metric("p99_s", "p99", "s", "Total latency, simulated, 99th percentile"),
    Metric("ttft_s", "TTFT", "s", "Time to the first token, simulated"),
    Metric("tpot_s", "TPOT", "ms", "Time per later token, simulated", scale=1e3),
    Metric("device_j", "device", "J, modelled", "Energy of the device per request: modelled, no meter"),
    Metric("total_j", "device + cloud", "J, modelled", "Energy of both sides per request: modelled, no meter"),
    Metric("usd_per_1k", "per 1,000", "$, modelled", "Operating cost of 1,000 requests at the dated prices"),
    Metric("nats", "loss", "nats/token", "Cross-entropy added by weight and wire precision"),
    Metric("done_per_s", "done", "1/s", "Completed requests per second", sign=-1),
    Metric("queue_slope", "queue slope", "s/s", "Growth of the backlog; above 0 for long means unstable", sign=0),
    Metric("moves_per_min", "moves", "1/min", "Repartitions in mid-request", sign=0),
    Metric("regret_causal", "regret, causal", "%", "Extra over the best policy that cannot see ahead", scale=100.0),
    Metric("regret_clairvoyant", "regret, clairvoyant", "%", "Extra over a bound that knows the trace", scale=100.0),
    Metric("factor_over_static", "over static", "×", "Best static plan's mean latency over this one's", sign=-1),
    Metric("fallback_share", "fell back", "%", "Decisions that exact drift plus penalty made in its place", 0, 100.0),
    Metric("decision_ms_p99", "decision p99", "ms", "Time to decide, 99th percentile, on the machine named below"),
)


def columns(names: set[str]) -> tuple[Metric, ...]:
    """The metrics that occur, in the order of the table; those it does not know follow under their own name."""
    known = [metric for metric in METRICS if metric.name in names]
    return (*known, *(Metric(name, name, "", name, sign=0) for name in sorted(names - {m.name for m in METRICS})))


def decimals(value: float) -> int:
    """Digits after the point that leave three that count: 2 for 4.21, 0 for 421, 4 for 0.0421."""
    if value == 0 or not math.isfinite(value):
        return 0
    return min(6, max(0, 2 - math.floor(math.log10(abs(value)))))


def show(value: float, places: int | None = None) -> str:
    """`4.21`, `1,234`, `∞`, `–` for what is no number."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:,.{decimals(value) if places is None else places}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def show_limits(estimate: Estimate, scale: float = 1.0) -> str:
    """`4.10–4.33` with the digits of the value; empty where there is no interval (one trace, or nothing known)."""
    low, high = scale * estimate.low, scale * estimate.high
    if math.isnan(low) or math.isnan(high) or low == high:
        return ""
    places = decimals(scale * estimate.value) or decimals(max(abs(low), abs(high)))
    return f"{show(low, places)} to {show(high, places)}" if low < 0 else f"{show(low, places)}–{show(high, places)}"
