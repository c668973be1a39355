"""What recovery does, as one table: states, what can happen, what follows. It does nothing itself.

docs/recovery.md is written from it: `python -m splitwise_llm.engine.transitions docs/recovery.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType


class _Said(StrEnum):
    """A name with a sentence for people."""

    sentence: str

    def __new__(cls, value: str, sentence: str = "") -> _Said:
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member


class State(_Said):
    """Where things stand with one worker."""

    CONNECTED = "connected", "The link works."
    SUSPECT = "suspect", "Nothing was heard for longer than it should have taken; a ping is out."
    BACKING_OFF = "backing off", "The link is dead; waiting for the next attempt."
    PROBING = "probing", "An attempt is being made: dialling and greeting."
    RESYNCING = "resyncing", "Greeted again: asking what it still holds, and filling what it lost."
    FAILED_OVER = "failed over", "The generation goes on elsewhere; attempts continue in the background."
    RETURNING = "returning", "Reached again while the generation goes on elsewhere: asking what it still holds."
    GONE = "gone", "No more attempts: the budget is spent, it is another worker than it was, or we gave up."


class On(_Said):
    """What can happen. The last seven are no words from outside: a `Tick` finds that their time has come."""

    HEARD = "heard", "any frame arrived"
    EXPECT = "expect", "an answer is awaited, and predicted to take so long"
    IDLE = "idle", "nothing is awaited"
    DIED = "died", "the link broke, or its frames are damaged"
    REACHED = "reached", "the attempt dialled and was greeted"
    UNREACHED = "unreached", "the attempt failed, or the worker takes no session now"
    MISMATCH = "mismatch", "greeted, but by another model or version"
    RESUMED = "resumed", "the worker holds what it should; the session can go on there"
    WAIT = "wait", "how long the policy has patience, from the fault on"
    ELSEWHERE = "elsewhere", "the generation goes on without it"
    GIVE_UP = "give up", "the session wants it no more"
    QUIET = "(quiet)", "no frame for a heartbeat while nothing is awaited"
    OVERDUE = "(overdue)", "no frame for half the limit while something is awaited"
    SILENT = "(silent)", "no frame for the whole limit"
    WOKE = "(woke)", "the same, but the tick came so late that this process cannot have run"
    DUE = "(due)", "the delay before the next attempt is over"
    STUCK = "(stuck)", "an attempt takes too long"
    IMPATIENT = "(impatient)", "the policy's patience is over"
    SPENT = "(spent)", "the next attempt would start after the total budget"


class Do(_Said):
    """What the machine does about it."""

    LISTEN = "listen", "the silence starts anew; a doubt is taken back, and told"
    AWAIT = "await", "the silence counts against the predicted step"
    REST = "rest", "the silence counts against the heartbeat"
    PING = "ping", "send a ping"
    DOUBT = "doubt", "tell; the silence may last to the end of its limit"
    GRACE = "grace", "the ping gets its time again, once"
    HANG_UP = "hang up", "break the link or the attempt off"
    LOSE = "lose", "tell; the fault is dated"
    ASK_FAULT = "ask (fault)", "ask the policy what to do, and how long to wait"
    ASK_RETURN = "ask (return)", "ask the policy whether to use it again"
    ASK_GONE = "ask (gone)", "ask the policy to do without it"
    NOTE = "note", "tell why the attempt failed"
    SCHEDULE = "schedule", "draw the delay before the next attempt; tell"
    DIAL = "dial", "start an attempt"
    ATTACH = "attach", "ask what it still holds of the session"
    SETTLE = "settle", "tell; patience is forgotten"
    PATIENCE = "patience over", "say that the waiting is over; tell"
    SET_PATIENCE = "set patience", "patience ends so long after the fault"
    PART = "part", "tell that the generation goes on elsewhere"
    END = "end", "tell why; every deadline is dropped"


@dataclass(frozen=True, slots=True)
class Transition:
    """The next state, and what is done on the way, in order."""

    to: State
    do: tuple[Do, ...]


_FAILED = (Do.NOTE, Do.SCHEDULE)
_LOST = (Do.HANG_UP, Do.LOSE, Do.SCHEDULE)
_FAULT = (Do.HANG_UP, Do.LOSE, Do.ASK_FAULT, Do.SCHEDULE)
_LISTEN, _AWAIT, _REST = (Do.LISTEN,), (Do.AWAIT,), (Do.REST,)


def _rows() -> Iterator[tuple[State, On, State, tuple[Do, ...]]]:
    s = State
    yield s.CONNECTED, On.HEARD, s.CONNECTED, _LISTEN
    yield s.CONNECTED, On.EXPECT, s.CONNECTED, _AWAIT
    yield s.CONNECTED, On.IDLE, s.CONNECTED, _REST
    yield s.CONNECTED, On.QUIET, s.CONNECTED, (Do.PING, Do.AWAIT)
    yield s.CONNECTED, On.OVERDUE, s.SUSPECT, (Do.PING, Do.DOUBT)
    yield s.CONNECTED, On.DIED, s.BACKING_OFF, _FAULT

    yield s.SUSPECT, On.HEARD, s.CONNECTED, _LISTEN
    yield s.SUSPECT, On.EXPECT, s.SUSPECT, _AWAIT
    yield s.SUSPECT, On.IDLE, s.SUSPECT, _REST
    yield s.SUSPECT, On.WOKE, s.SUSPECT, (Do.PING, Do.GRACE)
    yield s.SUSPECT, On.SILENT, s.BACKING_OFF, _FAULT
    yield s.SUSPECT, On.DIED, s.BACKING_OFF, _FAULT

    yield s.BACKING_OFF, On.DUE, s.PROBING, (Do.DIAL,)
    yield s.PROBING, On.REACHED, s.RESYNCING, (Do.ATTACH, Do.AWAIT)
    yield s.PROBING, On.UNREACHED, s.BACKING_OFF, _FAILED
    yield s.PROBING, On.STUCK, s.BACKING_OFF, (Do.HANG_UP, *_FAILED)
    yield s.RESYNCING, On.RESUMED, s.CONNECTED, (Do.LISTEN, Do.SETTLE)

    yield s.FAILED_OVER, On.DUE, s.FAILED_OVER, (Do.DIAL,)
    yield s.FAILED_OVER, On.REACHED, s.RETURNING, (Do.ATTACH, Do.AWAIT)
    yield s.FAILED_OVER, On.UNREACHED, s.FAILED_OVER, _FAILED
    yield s.FAILED_OVER, On.STUCK, s.FAILED_OVER, (Do.HANG_UP, *_FAILED)
    yield s.RETURNING, On.RESUMED, s.CONNECTED, (Do.LISTEN, Do.SETTLE, Do.ASK_RETURN)

    for linked, back in ((s.RESYNCING, s.BACKING_OFF), (s.RETURNING, s.FAILED_OVER)):
        yield linked, On.HEARD, linked, _LISTEN
        yield linked, On.EXPECT, linked, _AWAIT
        yield linked, On.IDLE, linked, _REST
        yield linked, On.QUIET, linked, (Do.PING, Do.AWAIT)
        yield linked, On.OVERDUE, linked, (Do.PING, Do.DOUBT)
        yield linked, On.WOKE, linked, (Do.PING, Do.GRACE)
        yield linked, On.SILENT, back, _LOST
        yield linked, On.DIED, back, _LOST
        yield linked, On.UNREACHED, back, _LOST

    for waiting in (s.BACKING_OFF, s.PROBING, s.RESYNCING):
        yield waiting, On.WAIT, waiting, (Do.SET_PATIENCE,)
        yield waiting, On.ELSEWHERE, s.RETURNING if waiting is s.RESYNCING else s.FAILED_OVER, (Do.PART,)
    for waiting in (s.BACKING_OFF, s.PROBING):
        yield waiting, On.IMPATIENT, waiting, (Do.PATIENCE,)

    yield s.BACKING_OFF, On.SPENT, s.GONE, (Do.END, Do.ASK_GONE)
    yield s.FAILED_OVER, On.SPENT, s.GONE, (Do.END,)
    for waiting in (s.PROBING, s.RESYNCING):
        yield waiting, On.MISMATCH, s.GONE, (Do.HANG_UP, Do.END, Do.ASK_GONE)
    for away in (s.FAILED_OVER, s.RETURNING):
        yield away, On.MISMATCH, s.GONE, (Do.HANG_UP, Do.END)
    for alive in State:
        if alive is not s.GONE:
            yield alive, On.GIVE_UP, s.GONE, (Do.HANG_UP, Do.END)


TRANSITIONS: Mapping[tuple[State, On], Transition] = MappingProxyType(
    {(state, on): Transition(to, do) for state, on, to, do in _rows()}
)
"""What happens where. A pair that is not here changes nothing and does nothing, for the reason in `IGNORED`."""

IGNORED: Mapping[On, str] = MappingProxyType(
    {
        On.HEARD: "a frame of a link that was given up; its run is over as well",
        On.EXPECT: "there is no link over which an answer could come",
        On.IDLE: "there is no link that could be idle",
        On.DIED: "there is no link, so it is the death of one that was given up already",
        On.REACHED: "no attempt is under way, so it was broken off, and its link is closed",
        On.UNREACHED: "no attempt is under way, so it was broken off before",
        On.MISMATCH: "no attempt is under way: the next one will find the same",
        On.RESUMED: "said twice, or of a link that has died since",
        On.WAIT: "nobody waits: there is no fault, or the generation has moved",
        On.ELSEWHERE: "said twice, or the link works: what a decision does not use stays connected",
        On.QUIET: "there is no link; or a ping is out already",
        On.OVERDUE: "there is no link; or a ping is out already",
        On.SILENT: "there is no link; or no ping was sent that could have been answered",
        On.WOKE: "there is no link; or no ping is out",
        On.DUE: "there is a link, or an attempt under way",
        On.STUCK: "no attempt is under way",
        On.IMPATIENT: "nobody waits; while resyncing the worker is back, and what filling costs is for the policy",
        On.SPENT: "only a new delay can find the budget spent",
        On.GIVE_UP: "gone already",
    }
)
"""Why an event does nothing in the states where the table lacks it. In `State.GONE` nothing has any effect, and a
deadline runs only in states that have an entry for it. Words of another link or attempt than the present one are
dropped before the table is asked: that is what makes late and duplicate ones harmless."""


def table() -> str:
    """The states, the transitions and what is ignored, as Markdown."""
    lines = ["| state | meaning |", "| --- | --- |"]
    lines += [f"| **{state}** | {state.sentence} |" for state in State]
    lines += ["", "| event | meaning |", "| --- | --- |"]
    lines += [f"| {on} | {on.sentence} |" for on in On]
    lines += ["", "| action | meaning |", "| --- | --- |"]
    lines += [f"| {do} | {do.sentence} |" for do in Do]
    lines += ["", "| in state | event | next state | actions, in order |", "| --- | --- | --- | --- |"]
    ordered = sorted(TRANSITIONS.items(), key=lambda item: (list(State).index(item[0][0]), list(On).index(item[0][1])))
    for (state, on), then in ordered:
        to = "stays" if then.to is state else f"**{then.to}**"
        lines.append(f"| **{state}** | {on} | {to} | {', '.join(then.do)} |")
    lines += ["", "| ignored | in states | because |", "| --- | --- | --- |"]
    for on, why in IGNORED.items():
        states = [state for state in State if state is not State.GONE and (state, on) not in TRANSITIONS]
        lines.append(f"| {on} | {', '.join(states) or 'gone only'} | {why} |")
    return "\n".join(lines)


BEGIN, END = "<!-- generated: transitions -->", "<!-- /generated -->"


def with_table(page: str) -> str:
    """A page with the present table between its two marks. Raises ValueError where a mark is missing."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {BEGIN} followed by {END}, between which the table goes")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.write_text(with_table(where.read_text()))
