"""A whole run: worlds, a decision maker, and what became of every request. The loop, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

import numpy as np

from splitwise_llm.decision import Decision
from splitwise_llm.observation import Chooser
from splitwise_llm.sim.asking import Question, answer, questions
from splitwise_llm.sim.draws import Traces
from splitwise_llm.sim.endings import ABANDONED, DONE, SHED, Ended, end
from splitwise_llm.sim.params import NEVER_S, Params
from splitwise_llm.sim.physics import MODES, Bools, Floats, Ints
from splitwise_llm.sim.state import FREE, State, initial
from splitwise_llm.sim.step import Noted, step

MISSING = -1
SIDE_BY_SIDE = 4096
"""Devices in all worlds that are simulated at a time: with more, a step takes longer by as much."""
STATUS = {DONE: "done", SHED: "shed", ABANDONED: "abandoned", MISSING: "never came"}


@dataclass(slots=True, eq=False)
class Records:
    """Every request of every trace: arrays (e, d, n); NaN where there is no such figure.

    `total_s` of a request that was shed or not finished is `t_max_s`, and its deadline counts as missed. Joules of
    the device are those from arrival to the last token; a device shares its idle power among requests in flight.
    """

    params: Params
    traces: Traces
    status: Ints
    arrival_s: Floats
    ttft_s: Floats
    tpot_s: Floats
    total_s: Floats
    device_j: Floats
    total_j: Floats
    usd: Floats
    nats: Floats
    """Per token."""
    tokens: Floats
    first_plan: Ints
    """Row of `Physics`; as the number in its table: `plan - physics.first[physics.table_of[plan]]`."""
    last_plan: Ints
    moves: Ints
    preempted: Ints
    mode_s: Floats
    """(e, d, n, modes): seconds in each of `MODES`."""
    missed: Floats
    """1 where the deadline was missed, 0 where not or where there is none."""
    end_s: Floats
    decisions: int = 0
    steps: int = 0
    """Events, summed over worlds."""
    device_total_j: Floats | None = None
    """(e, d): all that devices drew, idle between requests included."""
    seconds: Floats | None = None
    """(e,): simulated."""
    queue_world: Ints | None = None
    queue_s: Floats | None = None
    in_flight: Floats | None = None
    work_s: Floats | None = None
    """Samples of queues: (samples,) world, time, requests at the devices; (samples, 4) seconds of work."""
    virtual: Floats | None = None
    """(e, d, 4): virtual queues at the end."""

    @classmethod
    def empty(cls, params: Params, traces: Traces) -> Records:
        shape = traces.arrival_s.shape

        def nan() -> Floats:
            return np.full(shape, np.nan)

        def count() -> Ints:
            return np.zeros(shape, np.int64)

        return cls(
            params, traces, np.full(shape, MISSING), arrival_s=nan(), ttft_s=nan(), tpot_s=nan(), total_s=nan(),
            device_j=nan(), total_j=nan(), usd=nan(), nats=nan(), tokens=nan(), first_plan=count(), last_plan=count(),
            moves=count(), preempted=count(), mode_s=np.zeros((*shape, len(MODES))), missed=np.zeros(shape),
            end_s=nan(),
        )  # fmt: skip

    def add(self, e: Ended) -> None:
        """Note how requests ended."""
        params, physics, at = self.params, self.params.physics, (e.world, e.device, e.request)
        done = e.status == DONE
        total = np.where(done, e.end_s - e.arrival_s, params.t_max_s)
        with np.errstate(invalid="ignore"):
            self.tpot_s[at] = np.where(
                done & (e.tokens > 1), (e.end_s - e.first_s) / np.maximum(e.tokens - 1, 1), np.nan
            )
            self.tpot_s[at] = np.where(done & (e.tokens == 1), 0.0, self.tpot_s[at])
        self.status[at], self.arrival_s[at], self.end_s[at] = e.status, e.arrival_s, e.end_s
        self.ttft_s[at], self.total_s[at] = e.first_s - e.arrival_s, total
        self.device_j[at], self.total_j[at] = e.spent[:, 0], e.spent[:, 0] + e.spent[:, 1]
        kwh = physics.kwh_usd[physics.table_of[e.last_plan]]
        self.usd[at] = e.spent[:, 2] + kwh * e.spent[:, 0] / 3.6e6
        self.nats[at], self.tokens[at] = physics.nats[e.last_plan], e.tokens
        self.first_plan[at], self.last_plan[at] = e.first_plan, e.last_plan
        self.moves[at], self.preempted[at], self.mode_s[at] = e.moves, e.preempted, e.mode_s
        deadline = params.budgets.deadline_s
        self.missed[at] = 0.0 if deadline is None else (~done | (total > deadline))

    def counted(self, warm_up: float = 0.1) -> Bools:
        """(e, d, n): requests that came, without the first share of each device's."""
        skip = int(warm_up * self.status.shape[2])
        return np.asarray((self.status != MISSING) & (np.arange(self.status.shape[2]) >= skip))

    def lines(self) -> Iterator[dict[str, object]]:
        """One plain mapping per request, in order of world, device and number; plans and machines in words. The plans
        of a request that never began are None."""
        physics = self.params.physics
        bills = [one for table in physics.tables for one in table.bills]  # by row
        for e, d, n in np.argwhere(self.status != MISSING).tolist():
            at = (e, d, n)
            begun = self.status[at] != SHED and np.isfinite(self.tokens[at])
            first, last = (
                _driven(bills[int(plan[at])].decision) if begun else None for plan in (self.first_plan, self.last_plan)
            )
            edge, cloud = physics.tables[self.params.device_tables[d] + self.traces.prompt_class[at]].world.hosts
            figures = {
                name: _plain(getattr(self, name)[at])
                for name in (
                    "arrival_s", "ttft_s", "tpot_s", "total_s", "device_j", "total_j", "usd", "nats", "tokens",
                )
            }  # fmt: skip
            yield {
                "trace": self.traces.numbers[e], "device": d, "request": n, "status": STATUS[int(self.status[at])],
                "prompt_tokens": int(self.traces.prompt_tokens[at]), **figures,
                "missed": bool(self.missed[at]), "shed": int(self.status[at]) == SHED,
                "moves": int(self.moves[at]), "preempted": int(self.preempted[at]),
                "edge": edge.device.name, "cloud": cloud.device.name,
                "first_plan": first, "last_plan": last,
                "mode_s": dict(zip(MODES, self.mode_s[at].round(6).tolist(), strict=True)),
            }  # fmt: skip

    def write(self, file: IO[str]) -> None:
        """One line of JSON per request."""
        for line in self.lines():
            file.write(json.dumps(line) + "\n")


def _driven(decision: Decision) -> dict[str, object]:
    """A decision for people: where each part of the model runs, and how it is driven."""
    driven: dict[str, object] = {
        "partition": decision.partition.text(("edge", "cloud")), "wire": decision.wire.value,
        "prefill_chunk": decision.prefill_chunk, "draft": decision.draft,
    }  # fmt: skip
    return driven | ({"prefill_wire": decision.prefill_wire.value} if decision.prefill_wire else {})


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.9g}")


@dataclass(slots=True)
class Run:
    """Worlds under way with a decision maker; `state` is owned by the run and changes in place."""

    params: Params
    traces: Traces
    chooser: Chooser
    state: State
    records: Records
    notes: list[Noted]

    @classmethod
    def begin(cls, params: Params, traces: Traces, chooser: Chooser) -> Run:
        if not getattr(chooser, "in_flight", True):  # nobody to ask: no epochs
            params = replace(params, epoch_s=NEVER_S, epoch_tokens=NEVER_S)
        return cls(params, traces, chooser, initial(params, traces), Records.empty(params, traces), [])

    def ask(self) -> int:
        """Have every decision made that is due now; how many there were."""
        count, in_flight = 0, getattr(self.chooser, "in_flight", True)
        for question in questions(self.params, self.traces, self.state, in_flight):
            self.take(question, np.asarray(self.chooser.choose(question.menu)))
            count += len(question.slots[0])
        self.records.decisions += count
        return count

    def take(self, question: Question, choice: Ints) -> None:
        """Do what was chosen."""
        for ended in answer(self.params, self.traces, self.state, question, choice):
            self.records.add(ended)

    def advance(self) -> None:
        """Let every world that waits for no decision go on to its next event."""
        self.records.steps += int((~(self.state.is_asking | self.state.is_over)).sum())
        self.note(*step(self.params, self.traces, self.state))

    def note(self, ended: list[Ended], noted: Noted | None) -> None:
        """Keep what happened in a step."""
        for part in ended:
            self.records.add(part)
        if noted is not None and len(noted.world):
            self.notes.append(noted)

    def finish(self) -> Records:
        """Requests that are not done are abandoned, those that were at a door count as unfinished; the records."""
        s, records = self.state, self.records
        rest = np.nonzero(s.phase != FREE)
        if len(rest[0]):
            ended: list[Ended] = []
            end(self.params, self.traces, s, rest, ABANDONED, ended)
            for part in ended:
                records.add(part)
        if self.params.arrivals.think_s is None:
            at_door = (self.traces.arrival_s <= s.now[:, None, None]) & (records.status == MISSING)
            records.status[at_door], records.total_s[at_door] = ABANDONED, self.params.t_max_s
            records.arrival_s[at_door], records.missed[at_door] = self.traces.arrival_s[at_door], 1.0
        records.device_total_j, records.seconds, records.virtual = s.drawn_j, s.now, s.virtual
        if self.notes:
            records.queue_world = np.concatenate([note.world for note in self.notes])
            records.queue_s = np.concatenate([note.now for note in self.notes])
            records.in_flight = np.concatenate([note.in_flight for note in self.notes])
            records.work_s = np.concatenate([note.work for note in self.notes])
        return records


def simulate(params: Params, traces: Traces, chooser: Chooser, until_s: float = np.inf) -> Records:
    """Run every world until its requests are done, or for so long; a chooser with `in_flight = False` is asked at
    admission only."""
    return simulate_each(params, traces, [chooser], until_s)[0]


def simulate_each(
    params: Params, traces: Traces, choosers: Sequence[Chooser], until_s: float = np.inf
) -> list[Records]:
    """What `simulate` gives for each of some choosers, number for number, in less time: a step of few worlds takes
    about as long as one of many, so the worlds of all choosers take theirs together. No chooser may be twice among
    them, as each is asked while the others' worlds are under way."""
    found: dict[int, Records] = {}
    at_a_time = max(SIDE_BY_SIDE // (len(traces.numbers) * params.num_devices), 1)
    for in_flight in (False, True):  # who is never asked again has other epochs
        alike = [n for n, one in enumerate(choosers) if getattr(one, "in_flight", True) == in_flight]
        for first in range(0, len(alike), at_a_time):
            some = alike[first : first + at_a_time]
            found |= dict(zip(some, _side_by_side(params, traces, [choosers[n] for n in some], until_s), strict=True))
    return [found[n] for n in range(len(choosers))]


def _side_by_side(params: Params, traces: Traces, choosers: Sequence[Chooser], until_s: float) -> list[Records]:
    """Of choosers that are asked at the same times."""
    all_traces, size = traces.times(len(choosers)), len(traces.numbers)
    run = Run.begin(params, all_traces, choosers[0])
    params, state = run.params, run.state
    worlds = [slice(n * size, (n + 1) * size) for n in range(len(choosers))]
    each = [
        Run(params, traces, chooser, state.part(mine), Records.empty(params, traces), [])
        for chooser, mine in zip(choosers, worlds, strict=True)
    ]
    while not state.is_over.all():
        _ask(params, all_traces, state, each)
        going = ~(state.is_asking | state.is_over)
        for one, mine in zip(each, worlds, strict=True):
            one.records.steps += int(np.count_nonzero(going[mine]))
        _note(each, *step(params, all_traces, state))
        state.is_over |= state.now > until_s
        if state.is_over.any():
            state.ask[state.is_over] = False
    return [one.finish() for one in each]


def _ask(params: Params, traces: Traces, state: State, each: Sequence[Run]) -> None:
    """Have every decision made that is due now, each by whose world it is."""
    in_flight, size = getattr(each[0].chooser, "in_flight", True), len(state.now) // len(each)
    for question in questions(params, traces, state, in_flight, apart=size):
        ends = np.searchsorted(question.slots[0], np.arange(len(each) + 1) * size).tolist()
        chosen: list[Ints] = []
        for run, first, last in zip(each, ends, ends[1:], strict=False):
            if first < last:
                is_whole = last - first == len(question.slots[0])
                some = question.menu if is_whole else question.menu.at(slice(first, last))
                chosen.append(np.asarray(run.chooser.choose(some)))
                if chosen[-1].shape != (last - first,):  # or it is laid over all, or taken for a neighbour's
                    raise ValueError(f"a chooser answered {chosen[-1].shape} about {last - first} systems")
                run.records.decisions += last - first
        _note(each, answer(params, traces, state, question, np.concatenate(chosen)), None)


def _note(each: Sequence[Run], ended: list[Ended], noted: Noted | None) -> None:
    """Keep what happened, each of its own worlds."""
    if len(each) == 1:
        each[0].note(ended, noted)
        return
    for number, run in enumerate(each if ended or noted is not None else ()):
        mine = range(number * len(run.state.now), (number + 1) * len(run.state.now))
        some = [part.of_worlds(mine) for part in ended]
        run.note([part for part in some if len(part.world)], None if noted is None else noted.of_worlds(mine))


def advance(
    params: Params, traces: Traces, state: State, answers: Sequence[tuple[Question, Ints]] = ()
) -> tuple[State, list[Ended]]:
    """The state after some answers and the next event of every world that then asks nothing: a pure function of
    what it is given, randomness (`traces`) included."""
    after = state.copy()
    ended = [part for question, choice in answers for part in answer(params, traces, after, question, choice)]
    if not after.is_asking.all():
        ended += step(params, traces, after)[0]
    return after, ended


def slope(times_s: Sequence[float] | Floats, values: Floats) -> float:
    """Least-squares slope of values over time."""
    t = np.asarray(times_s) - np.mean(times_s)
    return float((t * (values - values.mean())).sum() / max((t * t).sum(), 1e-30))


__all__ = ["MISSING", "STATUS", "Records", "Run", "advance", "simulate", "simulate_each", "slope"]
