"""What the policy `splitwise` turned, in words, beside what the plain solver would have done. It decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from splitwise_llm.cli.choice import decision_text
from splitwise_llm.cost import price
from splitwise_llm.decision import Decision
from splitwise_llm.observation import Observation
from splitwise_llm.policies.in_flight import Running
from splitwise_llm.policies.mind import Judged, Splitwise


def turned(policy: Splitwise, observation: Observation, names: Sequence[str]) -> Iterator[str]:
    """Of one decision: the knobs, the plain solver's choice, and what either is expected to take, a line each."""
    judged = policy.judge(observation, counts=False)
    yield f"  knobs: {_knobs(judged)}"
    if judged.decision == judged.plain:
        yield "  the plain solver (drift plus penalty) decides the same"
    else:
        yield f"  the plain solver (drift plus penalty) would choose {decision_text(judged.plain, names)}"
    if observation.world is None:
        return
    mine, plain = (_expected(observation, one) for one in (judged.decision, judged.plain))
    yield f"  expected: {_figures(judged.d1, *mine)}"
    if judged.decision != judged.plain:
        yield f"  of the plain solver: {_figures(judged.plain_d1, *plain)}; D up to {judged.bound:.4g} may pass"


def counted(policy: Splitwise) -> Iterator[str]:
    """Of all its decisions: how many fell back and why, and which knobs it turned how often."""
    tally, elsewhere = policy.tally, policy.elsewhere
    decisions = tally.decisions + sum(elsewhere.values())
    if not decisions:
        return
    reasons = {
        "stale figures": tally.stale, "outside of training": tally.outside, "no numbers": tally.not_finite,
        "filtered": tally.filtered, **elsewhere,
    }  # fmt: skip
    said = "; ".join(f"{reason}: {count}" for reason, count in reasons.items() if count)
    share = f"{100 * policy.fallback_share:.3g} % of them by the plain solver" + (f" ({said})" if said else "")
    yield f"  {decisions} decision{'s' if decisions > 1 else ''}, {share}"
    knobs = ", ".join(f"{name} ({count} times)" for name, count in tally.turned.most_common())
    yield f"  knobs turned: {knobs or 'none'}"


def _knobs(judged: Judged) -> str:
    if judged.why:
        wanted = f" (it wanted {', '.join(judged.turned)})" if judged.turned else ""
        return f"fell back to the plain solver: {judged.why}{wanted}"
    return ", ".join(judged.turned) or "all neutral"


def _expected(observation: Observation, decision: Decision) -> tuple[float, float]:
    """Seconds until the last token, the way there included, and joules of the device."""
    if observation.placement is not None:
        one = Running.of(observation).prices([decision])
        return float(one.total_s[0]), float(one.device_j[0])
    world = observation.world
    assert world is not None
    priced = price(world, decision, observation.job, world.conditions(observation.loads))
    return priced.total_s, priced.device_j


def _figures(d1: float, seconds: float, joules: float) -> str:
    worth = "" if math.isnan(d1) else f"D {d1:.4g}, "
    return f"{worth}{seconds:.3g} s" + (f", {joules:.3g} J on the device" if joules else "")
