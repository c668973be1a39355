"""One worker as a session sees it: connected, silent, lost, tried again, back. It knows no socket, clock or thread.

Events go in with the time, actions come out, and `next_deadline_s` says when it wants a `Tick`. What follows from what
stands in `transitions.TRANSITIONS`; here is what the words in that table mean.
"""

from __future__ import annotations

import math
import random

from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.signals import (
    Action,
    AskPolicy,
    Attach,
    Dial,
    Died,
    Event,
    Expect,
    HangUp,
    Heard,
    Mismatch,
    PatienceOver,
    Ping,
    Reached,
    Resumed,
    Tell,
    Tick,
    Unreached,
    Wait,
    Word,
)
from splitwise_llm.engine.transitions import TRANSITIONS, Do, On, State


class Recovery:
    """One worker of one session. It starts connected, over link number 0, at `now_s`.

    `random` draws the delays: seeded, a run can be repeated. Times are any monotonic seconds; one that lies before
    the last is taken for the last.
    """

    def __init__(self, name: str, rules: RecoveryRules, random: random.Random, now_s: float) -> None:
        self.name, self.rules, self._random = name, rules, random
        self.state = State.CONNECTED
        self.link: int | None = 0
        """The number of the link, None without one."""
        self._now_s = now_s
        self._timers: dict[On, float] = {}
        self._late_s = 0.0
        self._out: list[Action] = []
        # Silence: when it began to count, and the last frame, ping or greeting.
        self._sign_s = self._since_s = now_s
        self._awaited_s: float | None = None  # the predicted step, while the session awaits something
        self._step_s = 0.0  # the longest step awaited since the last frame
        self._unanswered = self._pinged = self._doubted = self._woken = False
        # Attempts. Trouble begins with a fault after steady times, and ends when times are steady again.
        self._dialling: int | None = None
        self._attempts = self._failures = 0
        self._began_s = now_s  # the last attempt, or the fault before the first
        self._trouble_s = self._fault_s = now_s
        self._settled_s: float | None = -math.inf
        self._spent = False
        self._arm()

    @property
    def next_deadline_s(self) -> float:
        """When it wants a `Tick`; infinite: never."""
        return min((at for on, at in self._timers.items() if (self.state, on) in TRANSITIONS), default=math.inf)

    @property
    def degraded(self) -> bool:
        """Whether anything but a working link is to be reported of this worker."""
        return self.state is not State.CONNECTED

    def dialling(self, attempt: int) -> bool:
        """Whether this attempt is under way."""
        return self._dialling == attempt

    def on(self, event: Event, now_s: float) -> tuple[Action, ...]:
        """Take in what happened, and say what to do now, in order. Never raises; see `transitions.IGNORED`."""
        self._now_s = max(self._now_s, now_s)
        self._out = []
        if isinstance(event, Tick):
            for on, at in sorted(self._timers.items(), key=lambda timer: timer[1]):
                if at <= self._now_s and self._timers.get(on) == at and (self.state, on) in TRANSITIONS:
                    del self._timers[on]
                    self._late_s = self._now_s - at
                    self._follow(self._slept(on), None)
        elif not self._stale(event):
            self._follow(event.kind, event)
        return tuple(self._out)

    def _stale(self, event: Word) -> bool:
        """Whether this is of a link or an attempt that is no longer the present one."""
        if isinstance(event, Reached | Unreached | Mismatch):
            return event.attempt not in (self._dialling, self.link)
        return isinstance(event, Heard | Died | Resumed) and event.link not in (None, self.link)

    def _slept(self, on: On) -> On:
        """A tick for the end of silence that comes after the limit, which was left for the event loop, means that
        this process did not run. That is forgiven once in a row; a machine that is always late is no excuse."""
        return On.WOKE if on is On.SILENT and self._late() and not self._woken else on

    def _late(self) -> bool:
        return self._late_s > (1 - self.rules.dead_share) * self.rules.limit_s(self._step_s)

    def _follow(self, on: On, event: Word | None) -> None:
        then = TRANSITIONS.get((self.state, on))
        if then is None:
            return
        self.state = then.to
        for do in then.do:
            self._do(do, event)
        if self._spent:
            self._spent = False
            self._follow(On.SPENT, None)

    def _do(self, do: Do, event: Word | None) -> None:  # noqa: PLR0912 - one short arm per word of the table
        match do:
            case Do.LISTEN:
                self._listen()
            case Do.AWAIT:
                self._await(event.step_s if isinstance(event, Expect) else None)
            case Do.REST:
                self._rest()
            case Do.PING:
                self._pinged = True
                self._sign_s = self._now_s
                self._out.append(Ping())
            case Do.DOUBT:
                self._doubt()
            case Do.GRACE:
                self._woken = True
                self._timers[On.SILENT] = self._now_s + self._grace_s()
            case Do.HANG_UP:
                self._hang_up(_reason(event))
            case Do.LOSE:
                self._lose(event)
            case Do.ASK_FAULT:
                self._out.append(AskPolicy("fault"))
            case Do.ASK_RETURN:
                self._out.append(AskPolicy("return"))
            case Do.ASK_GONE:
                self._out.append(AskPolicy("gone"))
            case Do.NOTE:
                self._tell("unreached", _reason(event) or f"no greeting within {self.rules.attempt_s:g} s")
            case Do.SCHEDULE:
                self._schedule(event)
            case Do.DIAL:
                self._dial()
            case Do.ATTACH:
                self._attach()
            case Do.SETTLE:
                self._settle(event)
            case Do.PATIENCE:
                self._tell(
                    "patience", f"waited {_seconds(self._now_s - self._fault_s)}, as long as the policy wants to"
                )
                self._out.append(PatienceOver())
            case Do.SET_PATIENCE:
                if isinstance(event, Wait) and event.wait_s < math.inf:
                    self._timers[On.IMPATIENT] = self._fault_s + event.wait_s
            case Do.PART:
                self._timers.pop(On.IMPATIENT, None)
                self._tell("elsewhere", f"the generation goes on {getattr(event, 'where', 'elsewhere')}")
            case Do.END:
                self._timers.clear()
                self._tell("gone", _reason(event) or "the time for attempts is spent")

    # -- silence --

    def _listen(self) -> None:
        if self._doubted:
            self._tell("alive", f"answers after {_seconds(self._now_s - self._since_s)}")
        self._sign_s = self._since_s = self._now_s
        self._unanswered = self._awaited_s is not None
        self._step_s = self._awaited_s or 0.0
        self._pinged = self._doubted = self._woken = False
        self._arm()

    def _await(self, step_s: float | None) -> None:
        """Something is awaited: by the session, predicted to take `step_s`, or (None) just the answer to a ping."""
        if step_s is not None:
            # A prediction that is no time is none: then the shortest limit holds, and a ping finds out.
            self._awaited_s = step_s = step_s if 0 <= step_s < math.inf else 0.0
        if self._unanswered:
            self._step_s = max(self._step_s, step_s or 0.0)
        else:
            self._unanswered, self._step_s = True, step_s or 0.0
            # Silence before this was no sign, as nothing was awaited; but not longer than a heartbeat.
            if self._now_s - self._sign_s <= self.rules.heartbeat_s:
                self._since_s = self._now_s
        self._arm()

    def _rest(self) -> None:
        self._awaited_s, self._step_s = None, 0.0
        self._unanswered = self._pinged  # a ping that is out is still to be answered
        self._arm()

    def _arm(self) -> None:
        """The next deadline of silence; while in doubt, there is one already."""
        if self._doubted:
            return
        for on in (On.QUIET, On.OVERDUE, On.SILENT):
            self._timers.pop(on, None)
        if self._unanswered:
            limit_s = self.rules.limit_s(self._step_s)
            self._timers[On.OVERDUE] = self._since_s + self.rules.suspect_share * limit_s
        else:
            self._timers[On.QUIET] = self._since_s + self.rules.heartbeat_s

    def _doubt(self) -> None:
        self._doubted = True
        limit_s = self.rules.limit_s(self._step_s)
        end_s = self._since_s + self.rules.dead_share * limit_s
        self._timers[On.SILENT] = self._now_s + self._grace_s() if self._late() else end_s
        self._tell("suspect", f"silent for {_seconds(self._now_s - self._since_s)}, a ping is out")

    def _grace_s(self) -> float:
        return (self.rules.dead_share - self.rules.suspect_share) * self.rules.limit_s(self._step_s)

    # -- attempts --

    def _hang_up(self, reason: str) -> None:
        number = self.link if self._dialling is None else self._dialling
        if number is not None:
            self._out.append(HangUp(number, reason or "it did not answer in time"))
        self.link = self._dialling = None

    def _lose(self, event: Word | None) -> None:
        silent_s = self._now_s - self._since_s
        if self._settled_s is not None:  # else it had not resumed: still the same fault
            self._fault_s = self._now_s
            self._timers.pop(On.IMPATIENT, None)
            if self._now_s - self._settled_s >= self.rules.steady_s:
                self._trouble_s, self._failures = self._now_s, 0
            self._settled_s = None
        self._awaited_s, self._step_s = None, 0.0
        self._unanswered = self._pinged = self._doubted = self._woken = False
        for on in (On.QUIET, On.OVERDUE, On.SILENT):
            self._timers.pop(on, None)
        self._began_s = self._now_s
        self._tell("lost", _reason(event) or f"silent for {_seconds(silent_s)}, no answer to a ping")

    def _schedule(self, event: Word | None) -> None:
        self._dialling = None
        self._timers.pop(On.STUCK, None)
        rules, draw = self.rules, self._random.random()
        asked_s = event.retry_after_s if isinstance(event, Unreached) else None
        if asked_s is not None and asked_s >= 0:
            at_s = self._now_s + rules.after_s(asked_s, draw)
        else:
            at_s = self._now_s + rules.delay_s(self._failures, self._now_s - self._began_s, draw)
        self._failures += 1
        end_s = self._trouble_s + rules.budget_s
        if asked_s is None and self._now_s + rules.floor_s <= end_s < at_s:
            at_s = end_s  # the last attempt, when the time is up and not before
        if at_s > end_s:
            self._spent = True
            return
        self._timers[On.DUE] = at_s
        self._tell("attempt", f"attempt {self._failures} in {_seconds(at_s - self._now_s)}")

    def _dial(self) -> None:
        self._attempts += 1
        self._dialling, self._began_s = self._attempts, self._now_s
        self._timers[On.STUCK] = self._now_s + self.rules.attempt_s
        self._out.append(Dial(self._attempts))

    def _attach(self) -> None:
        assert self._dialling is not None  # `_stale` let it pass
        self.link, self._dialling = self._dialling, None
        self._timers.pop(On.STUCK, None)
        self._sign_s = self._now_s
        self._out.append(Attach(self.link))

    def _settle(self, event: Word | None) -> None:
        self._settled_s = self._now_s
        self._timers.pop(On.IMPATIENT, None)
        held = isinstance(event, Resumed) and event.held
        self._tell("back", "back, nothing was lost" if held else "back, with nothing of the session left")

    def _tell(self, kind: str, text: str) -> None:
        self._out.append(Tell(kind, f"{self.name}: {text}"))


def _reason(event: Word | None) -> str:
    return getattr(event, "reason", "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
