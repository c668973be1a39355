"""Records of live sessions as courses of the simulator: what came when, over which link, to which machines, and what
was decided. It plays them as they were decided; other decision makers it does not know.

Requests come when they came, as long as they were. Between two samples the link and the cloud's load are as in the
first of them; what was measured counts before what was believed. From the last sign of life before a worker was
suspected or lost until the next one, nothing passes. The load is what the worker said of others; a session's neighbours
on the same device are among them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path as File
from statistics import mean
from typing import TypeVar

import numpy as np

from splitwise_llm.cost import Drafter, Host, Job, Table, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import BrokenInvariant, SpecError
from splitwise_llm.observation import Tools
from splitwise_llm.partition import Partition
from splitwise_llm.records import Event, LinkSample, RequestRecord, Setup, read_records
from splitwise_llm.sim.asking import questions
from splitwise_llm.sim.draws import Traces, nearest_class
from splitwise_llm.sim.episode import Records, Run
from splitwise_llm.sim.params import CloudClass, CloudProcess, LinkClass, LinkProcess, Params
from splitwise_llm.sim.paths import Path, link_rows
from splitwise_llm.sim.physics import Ints
from splitwise_llm.sim.scenarios import Case, Recordings, Scenario
from splitwise_llm.sim.state import HELD
from splitwise_llm.spec import LinkSpec
from splitwise_llm.traces import RateTrace, RttTrace
from splitwise_llm.workload import RecordedRequest, RequestTrace

T = TypeVar("T", int, float)

PAUSE_S = 600.0
"""A longer time without a request ends a course: nothing is known of the link meanwhile."""
STEP_S = 0.25
"""Links change at multiples of it."""
MOST_CLASSES = 5
"""Of prompt lengths, each with a table, and of cloud loads."""
GONE, THERE = ("suspect", "lost"), ("alive", "back")
"""Kinds of events that begin and end a stretch in which nothing passes."""


@dataclass(frozen=True, slots=True)
class Live:
    """One request as it ran live. Times in seconds, `began_s` from the beginning of the course."""

    where: str
    """File and number of the record."""
    began_s: float
    prompt_tokens: int
    output_tokens: int
    expected_tokens: int
    """As many as were allowed, which is what the policy reckoned with."""
    ttft_s: float
    tpot_s: float
    total_s: float
    device_j: float | None
    policy: str
    """Empty: the partition was given."""
    decisions: tuple[tuple[float, Decision], ...]
    """What ran, and from when on (s after the prompt); one at least."""


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """Requests that came one after another to the same machines, and the world that they met."""

    name: str
    scenario: Scenario
    case: Case
    worlds: tuple[tuple[World, Job], ...]
    """What tables are to be made for, by prompt length, as `scenarios.worlds` gives them."""
    recordings: Recordings
    tools: Tools
    requests: tuple[Live, ...]
    loads: tuple[tuple[float, int], ...]
    """From when on (s) how many sequences were in the cloud's batch, an own one included; the first from 0 on."""
    outages: tuple[tuple[float, float], ...]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All that were taken, the most frequent ones first: tables should hold them."""
        counts = Counter(decision for one in self.requests for _, decision in one.decisions)
        return tuple(decision for decision, _ in counts.most_common())

    def traces(self, params: Params) -> Traces:
        """The course as it was, for `params` that `scenarios.build` made of it: one world, one device."""
        arrays = (
            [one.began_s for one in self.requests], [one.prompt_tokens for one in self.requests],
            [one.output_tokens for one in self.requests], [one.expected_tokens for one in self.requests],
        )  # fmt: skip
        began, prompt, output, expected = (np.array(values, np.float64)[None, None] for values in arrays)
        starts, meaning = link_rows(params)
        link = _held([start for start, _ in starts[:-1]], [row for _, row in starts[:-1]])
        assert isinstance(params.cloud, CloudProcess)
        batches = [kind.batch for kind in params.cloud.classes]
        cloud = _held([start for start, _ in self.loads], [_nearest(batches, batch) for _, batch in self.loads])
        return Traces(
            0, (0,), began, prompt.astype(np.int64), output.astype(np.int64), expected,
            nearest_class(prompt, params.prompt_classes), np.zeros(prompt.shape),
            Path(link.times_s[None, None], link.rows[None, None]), meaning,
            Path(cloud.times_s[None], cloud.rows[None]),
        )  # fmt: skip


FOR_EVER_S = 1e9


def _held(starts_s: Sequence[float], rows: Sequence[int]) -> Path:
    """What holds from which time on; the last for ever."""
    return Path(np.array([*starts_s, FOR_EVER_S]), np.array(rows, np.int64))


def _nearest(among: Sequence[int], value: int) -> int:
    return min(range(len(among)), key=lambda n: abs(math.log(among[n] / value)))


# From records to courses

Found = tuple[str, RequestRecord, Setup]


def courses_from_records(paths: Iterable[str | File]) -> list[Course]:
    """The courses in files of records, in order of time; other machines, another floor or `PAUSE_S` without a request
    begin another course. What a resumed process answered is left out: nobody timed its beginning.

    Raises SpecError for what no simulation can be made of, naming the record, what it lacks and how to get it.
    """
    found: list[Found] = []
    for path in paths:
        for number, record in enumerate(read_records(path), start=1):
            where = f"{path}, record {number}"
            if not (record.runs and record.runs[0].why == "resume"):
                found.append((where, record, _checked(where, record)))
    if not found:
        raise SpecError("no record is left to replay; give files that `splitwise generate --records` wrote")
    first = found[0]
    for where, _, setup in found[1:]:
        if (setup.fingerprint, setup.model) != (first[2].fingerprint, first[2].model):
            raise SpecError(
                f"{where} is of model {setup.fingerprint}, {first[0]} of {first[2].fingerprint}; records of one model "
                "can be replayed together: give the others on their own"
            )
    found = _met(found)
    found.sort(key=lambda one: (repr(_machines(one[2])), one[2].began_unix_s))
    courses = []
    for _, alike in groupby(found, key=lambda one: _machines(one[2])):
        for part in _sittings(list(alike)):
            courses.append((part[0][2].began_unix_s, part))
    return [_course(f"course-{n}", part) for n, (_, part) in enumerate(sorted(courses, key=lambda c: c[0]), start=1)]


def _checked(where: str, record: RequestRecord) -> Setup:
    setup = record.setup
    if setup is None:
        raise SpecError(
            f"{where} does not say when it began, over which link and on which machines: an older version wrote it; "
            "record a session with this one"
        )
    if not record.token_times_s:
        raise SpecError(f"{where} has no times of tokens; leave it out")
    if len(setup.names) != 2:
        raise SpecError(
            f"{where} is of {len(setup.names)} machines ({', '.join(setup.names)}); the simulator has a device and one "
            "cloud: give records of sessions with one --machine"
        )
    if not setup.hosts:
        raise SpecError(
            f"{where} does not say what its machines can do: start both with --profile FILE or --emulate DEVICE"
        )
    return setup


def _met(found: Sequence[Found]) -> list[Found]:
    """With the worker of the nearest session that met it where a session did not, for want of a link."""
    known = [setup for _, _, setup in found if len(setup.hosts) > 1]
    result = []
    for where, record, setup in found:
        if len(setup.hosts) < 2:
            mine = [other for other in known if _machines(other)[:2] == _machines(setup)[:2]]
            if not mine:
                raise SpecError(
                    f"{where}: {setup.names[1]} never answered, here or in another record of this device: nobody knows "
                    "what it can do; give the records of a session in which it did, too"
                )
            other = min(mine, key=lambda one: abs(one.began_unix_s - setup.began_unix_s))
            setup = replace(setup, hosts=(setup.hosts[0], other.hosts[1]), tools=other.tools)  # noqa: PLW2901
        result.append((where, record, setup))
    return result


def _machines(setup: Setup) -> tuple[object, ...]:
    """What is the same in all records of a course. What is free of a machine's memory wavers."""
    device, *workers = (replace(host, device=replace(host.device, memory_bytes=1e9)) for host in setup.hosts)
    return setup.names, device, setup.floor, tuple(workers), setup.tools


def _sittings(found: Sequence[Found]) -> Iterator[list[Found]]:
    """Split where nobody asked anything for long; in order of time."""
    part: list[Found] = []
    end_s = -math.inf
    for one in found:
        _, record, setup = one
        if part and setup.began_unix_s - end_s > PAUSE_S:
            yield part
            part = []
        part.append(one)
        end_s = max(end_s, setup.began_unix_s + record.token_times_s[-1])
    yield part


def _course(name: str, found: Sequence[Found]) -> Course:
    begin_s = found[0][2].began_unix_s
    setup = found[0][2]
    requests = tuple(_live(where, record, one, one.began_unix_s - begin_s) for where, record, one in found)
    samples = sorted(
        (
            replace(sample, at_s=max(one.began_unix_s - begin_s + sample.at_s, 0.0))
            for _, _, one in found
            for sample in one.links
        ),
        key=lambda sample: sample.at_s,
    )
    if not samples:
        raise SpecError(
            f"{found[0][0]}{' and those after it' * (len(found) > 1)}: nobody measured the link, as of a --partition "
            "that is given; record sessions with --policy"
        )
    last_s = max(*(one.began_s + one.total_s for one in requests), samples[-1].at_s)
    period_s = STEP_S * (math.floor(last_s / STEP_S) + 1)
    heard_s = [sample.at_s for sample in samples]
    stretches: list[tuple[float, float]] = []
    for _, record, one in found:
        at_s = one.began_unix_s - begin_s
        answered = len(record.setup.hosts) > 1 if record.setup else True
        own_s = [heard - at_s for heard in heard_s]
        stretches += (
            (at_s + start, at_s + stop)
            for start, stop in silent(record.events, own_s, record.token_times_s[-1], answered)
        )
    outages = _merged(stretches, heard_s)
    up = _rates(samples, lambda s: s.up_bytes_per_s, lambda s: s.up_age_s, outages, period_s)
    down = _rates(samples, lambda s: s.down_bytes_per_s, lambda s: s.down_age_s, outages, period_s)
    rtts = _steps([(s.at_s, s.rtt_s) for s in samples], outages, math.inf, period_s)
    rtt = RttTrace(*_apart(rtts), period_s)
    trace = _requests(requests, period_s)
    link = LinkProcess(_link_classes(up, down, rtt, outages), step_s=STEP_S)
    loads = tuple(_steps([(s.at_s, 1 + s.others) for s in samples], (), 1, period_s))
    tokens_out = max(round(mean(one.output_tokens for one in requests)), 1)
    scenario = Scenario(
        name, f"{len(requests)} requests as recorded from {found[0][0]} on", "", link=link,
        cloud=CloudProcess(_cloud_classes(loads, period_s)), floor=setup.floor,
        job=Job(requests[0].prompt_tokens, tokens_out), slots=_slots(requests), is_recorded=True,
    )  # fmt: skip
    case = Case((setup.names[0],), setup.fingerprint, trace.mean_per_s)
    base = link.classes[0]
    hosts = tuple(
        Host(
            replace(host.device, memory_bytes=min(one.hosts[n].device.memory_bytes for _, _, one in found)),
            host.dtype, host.weights, stretch=host.stretch,
        )
        for n, host in enumerate(setup.hosts)
    )  # fmt: skip
    world = World(
        setup.model, hosts, {(0, 1): LinkSpec(base.rtt_s, base.up_bytes_per_s, base.down_bytes_per_s)},
        drafter=Drafter(mean(one.acceptance for _, _, one in found)),
    )  # fmt: skip
    worlds = tuple((world, Job(prompt, tokens_out)) for prompt in _prompt_classes(requests))
    recordings = Recordings(trace, up, down, rtt)
    return Course(name, scenario, case, worlds, recordings, setup.tools or Tools(), requests, loads, outages)


def _live(where: str, record: RequestRecord, setup: Setup, began_s: float) -> Live:
    decisions = tuple(
        (
            run.at_s,
            Decision(
                Partition.parse(run.partition, setup.model, setup.names), WirePrecision(run.wire), run.prefill_chunk,
                run.draft, WirePrecision(run.prefill_wire) if run.prefill_wire else None,
            ),
        )
        for run in record.runs
        if not run.why.startswith("fill")
    )  # fmt: skip
    if not decisions:
        raise SpecError(f"{where} has no history of what ran; leave it out")
    return Live(
        where, began_s, record.prompt_tokens, len(record.token_ids), setup.max_new_tokens, record.ttft_s, record.tpot_s,
        record.token_times_s[-1], record.device_j, record.policy, decisions,
    )  # fmt: skip


def silent(
    events: Sequence[Event], heard_s: Sequence[float], end_s: float, answered: bool = True
) -> list[tuple[float, float]]:
    """(start, stop) of the stretches of one request, s after its prompt, in which nothing was heard of the worker:
    from the last sample of any session before a suspicion to the next one, or to where the request got its answer;
    and from its beginning to the first answer, if that came late, or never (not `answered`).

    `heard_s`: when samples were taken, rising.
    """
    found: list[tuple[float, float]] = []
    ordered = [one for one in sorted(events, key=lambda one: one.at_s) if one.kind in (*GONE, *THERE)]
    late = bool(ordered) and ordered[0].kind in THERE
    since_s = 0.0 if late or not answered else None
    for event in [*ordered, Event(end_s, THERE[0], "")]:
        if event.kind in GONE and since_s is None:
            since_s = event.at_s
        elif event.kind in THERE and since_s is not None:
            start_s = max((at for at in heard_s if at <= since_s), default=since_s) if since_s else 0.0
            stop_s = min((at for at in heard_s if since_s < at < event.at_s), default=event.at_s)
            found.append((start_s, stop_s))
            since_s = None
    return [(start_s, stop_s) for start_s, stop_s in found if stop_s > start_s]


def _merged(stretches: Iterable[tuple[float, float]], heard_s: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Stretches between which nobody heard anything are one."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted((max(start, 0.0), stop) for start, stop in stretches):
        if found and (start <= found[-1][1] or not any(found[-1][1] <= at <= start for at in heard_s)):
            found[-1] = found[-1][0], max(found[-1][1], stop)
        elif stop > start:
            found.append((start, stop))
    return tuple(found)


def _rates(
    samples: Sequence[LinkSample],
    rate: Callable[[LinkSample], float],
    age: Callable[[LinkSample], float | None],
    outages: Sequence[tuple[float, float]],
    period_s: float,
) -> RateTrace:
    """One direction; what was only believed counts where nothing was measured at all."""
    measured = [sample for sample in samples if age(sample) is not None]
    steps = _steps([(s.at_s, rate(s)) for s in measured or samples], outages, 0.0, period_s)
    return RateTrace(*_apart(steps), period_s)


def _steps(
    samples: Sequence[tuple[float, T]], outages: Sequence[tuple[float, float]], gone: T, period_s: float
) -> list[tuple[float, T]]:
    """Values from which time on, the first one from 0; `gone` in outages. Equal neighbours are one."""
    edges = sorted({0.0, *(at for at, _ in samples), *(at for stretch in outages for at in stretch)})
    found: list[tuple[float, T]] = []
    for at in (edge for edge in edges if edge < period_s):
        is_gone = any(start <= at < stop for start, stop in outages)
        value = gone if is_gone else next((v for t, v in reversed(samples) if t <= at), samples[0][1])
        if not found or found[-1][1] != value:
            found.append((at, value))
    return found


def _apart(steps: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(at for at, _ in steps), tuple(value for _, value in steps)


def _requests(requests: Sequence[Live], period_s: float) -> RequestTrace:
    return RequestTrace(
        tuple(RecordedRequest(one.began_s, one.prompt_tokens, one.output_tokens) for one in requests), period_s
    )


def _link_classes(
    up: RateTrace, down: RateTrace, rtt: RttTrace, outages: Sequence[tuple[float, float]]
) -> tuple[LinkClass, ...]:
    """The link in short, by which plans are made: as it was in the middle of the times when it was up, then when it
    was slow and when it was fast; and down, if it was."""
    rates = [sorted(rate for rate in trace.bytes_per_s if rate > 0) for trace in (up, down)]
    rtts = sorted(one for one in rtt.rtt_s if math.isfinite(one))

    def at(share: float) -> LinkClass:
        ups, downs = (values[round(share * (len(values) - 1))] for values in rates)
        return LinkClass(rtts[round((1 - share) * (len(rtts) - 1))], ups, downs)

    classes = list(dict.fromkeys((at(0.5), at(0.1), at(0.9))))
    if outages:
        lasting = mean(stop - start for start, stop in outages)
        classes.append(replace(classes[0], is_up=False, mean_dwell_s=max(lasting, STEP_S)))
    return tuple(classes)


def _cloud_classes(loads: Sequence[tuple[float, int]], period_s: float) -> tuple[CloudClass, ...]:
    """At most `MOST_CLASSES` sizes of its batch, rising, with how long each lasted on average."""
    sizes = sorted({batch for _, batch in loads})
    if len(sizes) > MOST_CLASSES:
        sizes = sorted({sizes[round(n * (len(sizes) - 1) / (MOST_CLASSES - 1))] for n in range(MOST_CLASSES)})
    spans = pairwise([*loads, (period_s, 0)])
    visits = [(sizes[_nearest(sizes, batch)], stop - start) for (start, batch), (stop, _) in spans]
    return tuple(CloudClass(size, 0.0, mean(lasts for batch, lasts in visits if batch == size)) for size in sizes)


def _prompt_classes(requests: Sequence[Live]) -> list[int]:
    """Prompt lengths that tables are made for, rising: all there are, or the longest of each of some equal parts."""
    lengths = sorted({one.prompt_tokens for one in requests})
    if len(lengths) <= MOST_CLASSES:
        return lengths
    return sorted({lengths[round(n * (len(lengths) - 1) / (MOST_CLASSES - 1))] for n in range(MOST_CLASSES)})


def _slots(requests: Sequence[Live]) -> int:
    """As many as were ever under way at a time: live, nobody waits at a door."""
    most = max(
        sum(other.began_s <= one.began_s < other.began_s + other.total_s for other in requests) for one in requests
    )
    return min(max(most, 4), 64)


# Playing a course


def play_as_decided(params: Params, course: Course) -> Records:
    """The course with the decisions that were taken live: each request begins with its first, and goes on with a later
    one from the next epoch on."""
    chooser = _Taken(course)
    run = Run.begin(params, course.traces(params), chooser)
    while not run.state.is_over.all():
        for question in questions(run.params, run.traces, run.state):
            e, d, k = question.slots
            state = run.state
            asked = state.request[e, d, k]
            since_s = state.now[e] - state.arrival_s[e, d, k]
            fresh = state.phase[e, d, k] == HELD
            choice = [
                chooser.number(question.menu.table, int(n), 0.0 if new else float(at) + 1e-9)
                for n, at, new in zip(asked, since_s, fresh, strict=True)
            ]
            run.take(question, np.array(choice))
            run.records.decisions += len(choice)
        run.advance()
    return run.finish()


@dataclass(frozen=True, slots=True, eq=False)
class _Taken:
    """What was decided live. It is asked by number of request, and not by menu."""

    course: Course
    in_flight: bool = True

    def choose(self, menu: object) -> Ints:
        raise BrokenInvariant("what was decided is known by request: ask `number`")

    def number(self, table: Table, request: int, since_s: float) -> int:
        """The plan of a table that is most like what ran so long after the prompt."""
        taken = self.course.requests[request].decisions
        decision = [what for at, what in taken if at <= since_s] or [taken[0][1]]
        return most_alike(table, decision[-1])


def most_alike(table: Table, wanted: Decision) -> int:
    """The number of a decision in a table, or of the one that places most units as it does."""

    def likeness(number: int) -> tuple[bool, int, bool]:
        other = table.bills[number].decision
        pairs = zip(other.partition.layers, wanted.partition.layers, strict=True)
        same = sum(
            a == b
            for mine, theirs in pairs
            for a, b in zip((*mine.groups, *mine.shards), (*theirs.groups, *theirs.shards), strict=True)
        )
        return other == wanted, same, other.wire == wanted.wire

    return max(range(len(table)), key=likeness)


__all__ = ["Course", "Live", "courses_from_records", "most_alike", "play_as_decided", "silent"]
