"""Many devices after one outage: the real recovery of each, a simulated network, and the door of one worker.

It knows no socket and no clock: the time is that of the next event in a heap.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from splitwise_llm.bench.figures import Figures
from splitwise_llm.engine.backoff import Door, RecoveryRules
from splitwise_llm.engine.recovery import Recovery
from splitwise_llm.engine.signals import (
    Action,
    Attach,
    Dial,
    Died,
    Event,
    Expect,
    Heard,
    Ping,
    Reached,
    Resumed,
    Tick,
    Unreached,
)
from splitwise_llm.engine.transitions import State

SYN_AGAIN_S = (0.0, 1.0, 3.0, 7.0, 15.0)
"""A dial into a dead network is sent by TCP so long after its start (RFC 6298: again after 1 s, then doubled)."""
FRAME_AGAIN_S = (0.0, 0.2, 0.6, 1.4, 3.0, 6.2)
"""A frame of a link that was up: Linux sends it again after 0.2 s at least, then doubled."""
BEGINS_S = 2.0
"""All is well before."""
WINDOW_S = 1.0
"""Rates are counted in windows of this length."""


class Told(StrEnum):
    """What a device believes of how many sessions the worker has (`RecoveryRules.beside`)."""

    ALL = "all"
    THEN = "as many as there were when it was greeted"
    NONE = "nothing"


OUTAGES_S = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Outage:
    """One outage of one worker, and who suffers from it. Times in seconds."""

    outage_s: float
    refused: bool
    """The worker's process dies: links are reset, dials are refused at once. Otherwise the network dies: silence."""
    devices: int = 120
    accepts_per_s: float = 50.0
    """Sessions the worker takes in per second."""
    queue: int = 50
    """Sessions that may wait to be taken in."""
    rtt_s: float = 0.04
    step_s: float = 0.1
    """Time per token, predicted and true; each device is at another point of its step."""
    resume_s: float = 0.2
    """From greeting to going on: asking what it still holds."""
    told: Told = Told.ALL
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Reconnected:
    """How a fleet came back. A peak is the most in any window of a second."""

    outage: Outage
    dialled_peak_per_s: float
    """Attempts started, whether anybody could hear them or not."""
    arrived_peak_per_s: float
    """Attempts that arrived at a worker that lives."""
    dials: int
    refusals: int
    """Attempts that the worker sent away, with a word when to come back."""
    finished: int
    """Devices that are connected in the end."""
    last_s: float
    """From the end of the outage until all are connected; infinite when some never are."""

    @property
    def peak_over_accepted(self) -> float:
        """The larger of the two peaks over what the worker accepts per second."""
        return max(self.dialled_peak_per_s, self.arrived_peak_per_s) / self.outage.accepts_per_s


class NoJitter(random.Random):
    """Draws the longest delay every time: what full jitter is compared with."""

    def random(self) -> float:
        return 1.0


def reconnect(
    outage: Outage,
    rules: RecoveryRules,
    draws: Callable[[int], random.Random] = random.Random,
    until_s: float = 600.0,
) -> Reconnected:
    """Let a fleet suffer an outage, and follow it until all are back or `until_s` after its end. `draws` makes each
    device's random numbers from its seed."""
    fleet = _Fleet(outage, rules, draws)
    fleet.run(BEGINS_S + outage.outage_s + until_s)
    connected = [r.state is State.CONNECTED for r in fleet.recoveries]
    last_s = max([fleet.ends_s, *fleet.resumed_s]) - fleet.ends_s
    return Reconnected(
        outage=outage,
        dialled_peak_per_s=peak_per_s(fleet.dialled_s),
        arrived_peak_per_s=peak_per_s(fleet.arrived_s),
        dials=len(fleet.dialled_s),
        refusals=fleet.refusals,
        finished=sum(connected),
        last_s=last_s if all(connected) else math.inf,
    )


def peak_per_s(times_s: Iterable[float]) -> float:
    """The most events in any window of a second (half open)."""
    ordered = sorted(times_s)
    most, first = 0, 0
    for last, time_s in enumerate(ordered):
        while time_s - ordered[first] >= WINDOW_S:
            first += 1
        most = max(most, last - first + 1)
    return most / WINDOW_S


def run_fleet(quick: bool, tell: Callable[[str], None]) -> Figures:
    """`fleet_peak_over_accepted` (bar: 2) and the rest of part 9, the worst over outages and seeds; and what becomes
    of it without jitter, and without knowing how many others there are."""
    rules, seeds = RecoveryRules(), range(2 if quick else 10)
    result = Figures("fleet", {"devices": Outage(0, False).devices, "seeds": len(seeds), "outages_s": OUTAGES_S})
    cases: tuple[tuple[str, Outage, Callable[[int], random.Random]], ...] = (
        ("", Outage(0, False), random.Random),
        ("late_news_", Outage(0, False, told=Told.THEN), random.Random),
        ("no_news_", Outage(0, False, told=Told.NONE), random.Random),
        ("no_jitter_", Outage(0, False), NoJitter),
    )
    for name, case, draws in cases:
        tell(f"a fleet of {case.devices}: {name.replace('_', ' ') or 'as it is'}")
        runs = [
            reconnect(replace(case, outage_s=outage_s, refused=refused, seed=seed), rules, draws)
            for outage_s in OUTAGES_S
            for refused in (True, False)
            for seed in seeds
        ]
        worst = max(runs, key=lambda run: run.peak_over_accepted)
        kind = "a dead worker" if worst.outage.refused else "a dead network"
        result.add(
            f"fleet_{name}peak_over_accepted",
            worst.peak_over_accepted,
            f"after {worst.outage.outage_s:g} s of {kind}; the worker takes in {case.accepts_per_s:g} per second",
        )
        result.add(f"fleet_{name}finished_share", min(run.finished / run.outage.devices for run in runs))
        result.add(f"fleet_{name}last_back_s", max(run.last_s for run in runs), "after the end of the outage")
    return result


def _believed(rules: RecoveryRules, outage: Outage, device: int) -> RecoveryRules:
    sessions = {Told.ALL: outage.devices, Told.THEN: device + 1, Told.NONE: 1}
    return rules.beside(sessions[outage.told])


class _Fleet:
    """The simulation of one outage: a heap of what happens when."""

    def __init__(self, outage: Outage, rules: RecoveryRules, draws: Callable[[int], random.Random]) -> None:
        self.outage, self.ends_s = outage, BEGINS_S + outage.outage_s
        self.door = Door(outage.accepts_per_s, outage.queue)
        self.heap: list[tuple[float, int, Callable[[float], None]]] = []
        self.count = self.refusals = 0
        self.dialled_s: list[float] = []
        self.arrived_s: list[float] = []
        self.resumed_s: list[float] = []
        self.ticking_s = [math.inf] * outage.devices
        phases = random.Random(outage.seed)
        self.recoveries = [
            Recovery("worker", _believed(rules, outage, device), draws(outage.seed * outage.devices + device), 0.0)
            for device in range(outage.devices)
        ]
        for device in range(outage.devices):
            self.say(device, Expect(outage.step_s), 0.0)
            self.frames(device, 0, phases.uniform(0, outage.step_s))
            if outage.refused:
                self.later(BEGINS_S + outage.rtt_s / 2, self.saying(device, Died("connection reset", link=0)))

    def run(self, until_s: float) -> None:
        """Until the time is up, or all are connected and the outage is over."""
        while self.heap and self.heap[0][0] <= until_s:
            now_s, _, happen = heapq.heappop(self.heap)
            happen(now_s)
            if now_s > self.ends_s + 10 and all(r.state is State.CONNECTED for r in self.recoveries):
                return

    def later(self, at_s: float, happen: Callable[[float], None]) -> None:
        self.count += 1
        heapq.heappush(self.heap, (at_s, self.count, happen))

    def saying(self, device: int, event: Event) -> Callable[[float], None]:
        return lambda now_s: self.say(device, event, now_s)

    def say(self, device: int, event: Event, now_s: float) -> None:
        """Tell a device's recovery, do what it wants, and see to its next tick."""
        recovery = self.recoveries[device]
        if isinstance(event, Tick):
            self.ticking_s[device] = math.inf
        for action in recovery.on(event, now_s):
            self.act(device, action, now_s)
        if recovery.next_deadline_s < self.ticking_s[device]:
            self.ticking_s[device] = recovery.next_deadline_s
            self.later(max(now_s, recovery.next_deadline_s), self.saying(device, Tick()))

    def act(self, device: int, action: Action, now_s: float) -> None:
        """What the network and the worker make of it; the other actions are words for people and policies."""
        match action:
            case Ping():
                link = self.recoveries[device].link
                if (heard_s := self.passes(now_s, FRAME_AGAIN_S)) is not None:
                    self.later(heard_s + self.outage.rtt_s, self.saying(device, Heard(link)))
            case Dial(attempt):
                self.dialled_s.append(now_s)
                self.dial(device, attempt, now_s)
            case Attach(link):
                self.later(now_s + self.outage.resume_s, lambda at_s: self.resume(device, link, at_s))

    def passes(self, now_s: float, again: Sequence[float]) -> float | None:
        """When something sent now gets through, sent again as TCP does; None: too late for anyone."""
        return next((now_s + a for a in again if not BEGINS_S <= now_s + a < self.ends_s), None)

    def frames(self, device: int, link: int, now_s: float) -> None:
        """The worker's frames of a running generation, one per step, while that link is the device's."""
        if self.recoveries[device].link != link:
            return
        heard_s = self.passes(now_s, FRAME_AGAIN_S)
        if heard_s is not None and not (self.outage.refused and link == 0 and now_s >= BEGINS_S):
            self.later(heard_s, self.saying(device, Heard(link)))
            self.later(heard_s + self.outage.step_s, lambda at_s: self.frames(device, link, at_s))

    def dial(self, device: int, attempt: int, now_s: float) -> None:
        outage = self.outage
        if outage.refused and BEGINS_S <= now_s < self.ends_s:
            self.later(now_s + outage.rtt_s, self.saying(device, Unreached(attempt, "connection refused")))
        elif (heard_s := self.passes(now_s, SYN_AGAIN_S)) is not None:
            self.later(heard_s + outage.rtt_s / 2, lambda at_s: self.knock(device, attempt, at_s))

    def knock(self, device: int, attempt: int, now_s: float) -> None:
        """An attempt arrives at the worker, unless it was broken off before."""
        if not self.recoveries[device].dialling(attempt):
            return
        self.arrived_s.append(now_s)
        taken, after_s = self.door.knock(now_s)
        if taken:
            self.later(now_s + after_s + self.outage.rtt_s / 2, self.saying(device, Reached(attempt)))
        else:
            self.refusals += 1
            full = Unreached(attempt, "the worker is full", retry_after_s=after_s)
            self.later(now_s + self.outage.rtt_s / 2, self.saying(device, full))

    def resume(self, device: int, link: int, now_s: float) -> None:
        if self.recoveries[device].link != link:
            return
        self.say(device, Resumed(held=True, link=link), now_s)
        self.resumed_s.append(now_s)
        self.say(device, Expect(self.outage.step_s), now_s)
        self.frames(device, link, now_s + self.outage.step_s)
