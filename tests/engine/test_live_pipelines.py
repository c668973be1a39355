"""More machines in a row than two, several sequences in flight, and what becomes of both when a link fails."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from forked import splitwise_text
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.decision import Decision
from splitwise_llm.engine import controller
from splitwise_llm.engine.direct import RELAYED_S, DirectLinks
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.flight import Agreed, Flight
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.observation import Always
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.shaper import LinkShape

pytestmark = pytest.mark.usefixtures("forks")
PROMPTS = [
    "It was a bright morning, and the Prince said to his old friend:",
    "She looked at the letter once more, and then",
    "There had been no rain for a month when",
    "Nobody in the village knew why",
]
IN_A_ROW = "edge[0:2] cloud[2:5] third[5:8]"
NOBODY = "127.0.0.1:1"
NEW = 24


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    with worker("bundled") as cloud, worker("bundled") as third:
        yield {"cloud": cloud.address, "third": third.address}


@pytest.fixture(scope="module")
def texts() -> list[tuple[int, ...]]:
    """The answers, each on its own and on one machine."""

    async def play() -> list[tuple[int, ...]]:
        with edge_with("bundled", {}) as edge:
            return [(await told(edge.generate(p, max_new_tokens=NEW, stop_ids=()))).token_ids for p in PROMPTS]

    return asyncio.run(play())


async def told(generation: Generation) -> RequestRecord:
    async with generation:
        async for _ in generation:
            pass
    return generation.record


def crossings(record: RequestRecord) -> set[tuple[int, int]]:
    """By which links the stream went on from the first worker."""
    return {(c.src, c.dst) for c in record.crossings if c.kind == "residual" and c.after == 1}


def with_links(direct: str, turned: str | None, reach: dict[str, str]) -> Edge:
    """A device, where the first worker would dial the second at `direct`, and the second the first at `turned`."""
    ways = {("third", "cloud"): turned} if turned else {}
    return Edge(
        Machine(Checkpoint(locate("bundled"))),
        tuple(reach),
        lambda name: dial(reach[name], name=name),
        {("cloud", "third"): direct},
        turned=ways,
    )


# Workers that do not reach each other


def test_of_two_workers_the_one_dials_that_can(addresses: dict[str, str], texts: list[tuple[int, ...]]) -> None:
    async def play() -> RequestRecord:
        with with_links(NOBODY, addresses["cloud"], addresses) as edge:
            return await told(edge.generate(PROMPTS[0], IN_A_ROW, max_new_tokens=NEW, stop_ids=()))

    record = asyncio.run(play())
    assert record.token_ids == texts[0]
    assert crossings(record) == {(1, 2)}
    said = [event.text for event in record.events if event.kind == "no-direct"]
    assert len(said) == 1
    assert f"cloud does not reach third at {NOBODY}" in said[0]
    assert said[0].endswith("third dials cloud instead")


def test_what_two_workers_cannot_tell_each_other_the_device_passes_on(
    addresses: dict[str, str], texts: list[tuple[int, ...]]
) -> None:
    async def play() -> list[RequestRecord]:
        with with_links(NOBODY, NOBODY, addresses) as edge:
            return [await told(edge.generate(p, IN_A_ROW, max_new_tokens=NEW, stop_ids=())) for p in PROMPTS[:2]]

    first, second = asyncio.run(play())
    assert [first.token_ids, second.token_ids] == texts[:2]
    assert crossings(first) == crossings(second) == {(1, 0), (0, 2)}
    said = [event.text for event in first.events if event.kind == "no-direct"]
    assert [text.rsplit("; ", 1)[1] for text in said] == [
        "third dials cloud instead", "the device passes on what is between"
    ]  # fmt: skip
    # Dies when direct.py says `self._failed[way] = -RELAYED_S` for `self._failed[way] = self._clock()`.
    assert not [event for event in second.events if event.kind == "no-direct"]


def test_a_neighbour_that_accepts_and_says_nothing_holds_nobody_up(
    addresses: dict[str, str], texts: list[tuple[int, ...]]
) -> None:
    async def play(place: str) -> RequestRecord:
        async with asyncio.timeout(30):
            with with_links(place, None, addresses) as edge:
                return await told(edge.generate(PROMPTS[0], IN_A_ROW, max_new_tokens=NEW, stop_ids=()))

    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        record = asyncio.run(play(f"127.0.0.1:{deaf.getsockname()[1]}"))
    assert record.token_ids == texts[0]
    assert crossings(record) == {(1, 0), (0, 2)}
    assert "did not answer within" in next(event.text for event in record.events if event.kind == "no-direct")


class Deaf(MemoryLink):
    """Lets greetings through, and loses a residual stream without a word."""

    async def send(self, frame: bytes) -> None:
        if len(frame) < 1000:
            await super().send(frame)


def test_a_link_between_workers_that_loses_everything_in_silence_is_given_up(
    monkeypatch: pytest.MonkeyPatch, texts: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(controller, "STUCK_S", 0.5)
    monkeypatch.setattr(controller, "STUCK_STEPS", 1.0)

    async def play() -> RequestRecord:
        served: dict[str, Worker] = {}
        serving: set[asyncio.Task[None]] = set()

        def connect(deaf: bool) -> Callable[[str], Awaitable[Link]]:
            async def reach(name: str) -> Link:
                near, far = memory_pair(("peer", name))
                if deaf:
                    near.__class__ = Deaf
                serving.add(asyncio.create_task(served[name].handle(far)))
                return near

            return reach

        checkpoint = Checkpoint(locate("bundled"))
        with ExitStack() as stack:
            for name in ("cloud", "third"):
                served[name] = Worker(stack.enter_context(Machine(checkpoint)), connect=connect(deaf=True))
            edge = Edge(
                stack.enter_context(Machine(checkpoint)), tuple(served), connect(deaf=False),
                {("cloud", "third"): "third"}, turned={("third", "cloud"): "cloud"},
            )  # fmt: skip
            async with asyncio.timeout(30):
                record = await told(edge.generate(PROMPTS[0], IN_A_ROW, max_new_tokens=NEW, stop_ids=()))
                await asyncio.wait(serving)
            return record

    record = asyncio.run(play())
    assert record.token_ids == texts[0]
    # Dies when generation.py says `self._device.direct.pairs` for `self._device.direct.failed((second, first))`.
    assert crossings(record) == {(1, 2), (1, 0), (0, 2)}  # what was lost was sent
    assert [event.kind for event in record.events].count("no-direct") == 1
    assert len(record.runs) > 1


def test_a_way_that_led_nowhere_is_tried_again_after_a_while() -> None:
    now_s = [0.0]
    links = DirectLinks({(1, 2): "b", (2, 3): "c"}, {(2, 1): "a"}, lambda: now_s[0])
    assert links.among((0, 1, 2)) == {(1, 2): "b"}
    assert links.failed((1, 2)) == (2, 1)
    assert links.among((0, 1, 2, 3)) == {(2, 1): "a", (2, 3): "c"}
    assert links.pairs == {(1, 2), (2, 3)}
    assert links.failed((2, 1)) is None
    # Dies when direct.py says `left = list(ways)` for `left = [way for way in ways if not self._is_failed(way)]`.
    assert links.pairs == {(2, 3)}
    now_s[0] = RELAYED_S
    assert links.among((1, 2)) == {(1, 2): "b"}


# Several sequences in flight


def test_the_throughput_program_drives_three_machines_with_several_sequences_in_flight(
    tmp_path: Path, texts: list[tuple[int, ...]]
) -> None:
    slow = DeviceSpec("slow", 5e9, 4e8, 1e9, launch_s=2e-4)
    (tmp_path / "slow.json").write_text(json.dumps(asdict(slow)))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS) + "\n")
    playing = ("--emulate", str(tmp_path / "slow.json"))
    with worker("bundled", *playing) as cloud, worker("bundled", *playing) as third:
        arguments = [
            "generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--in-flight", "3", "-n", str(NEW),
            "--policy", "edgeshard-throughput", "--direct", "cloud+third", "--json", str(tmp_path / "out.json"),
            "--machine", f"cloud={cloud.address}", "--machine", f"third={third.address}", *playing,
        ]  # fmt: skip
        done = splitwise_text(*arguments, timeout=150)
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "out.json").read_text())
    assert [tuple(answer["token_ids"]) for answer in said["answers"]] == texts
    assert [answer["number"] for answer in said["answers"]] == [1, 2, 3, 4]
    partitions = {answer["partition"] for answer in said["answers"]}
    assert len(partitions) == 1
    assert all(name in partitions.copy().pop() for name in ("edge[", "cloud[", "third["))
    assert said["in_flight"] == 3
    # one sequence keeps each of three like machines busy for a third of the time, and three for most of it
    assert said["bubble_share"] < 0.5
    assert "4 answers, 3 in flight" in done.stderr
    for number in range(1, 5):
        assert f"[{number}] " in done.stdout


def test_who_finds_no_room_waits_until_another_answer_is_complete(texts: list[tuple[int, ...]]) -> None:
    told_of: list[str] = []

    async def play(memory: str) -> tuple[Flight, dict[int, tuple[int, ...]]]:
        with worker("bundled", "--memory", memory) as cloud, edge_with("bundled", {"cloud": cloud.address}) as edge:
            decides = Agreed(Always(Decision(edge.partition("edge[0:2] cloud[2:8]"))))
            flight = Flight(
                lambda number: edge.generate(PROMPTS[number], decides, max_new_tokens=NEW, stop_ids=()),
                len(PROMPTS), len(PROMPTS), lambda kind, text: told_of.append(f"{kind}: {text}"),
            )  # fmt: skip
            return flight, {a.number: a.record.token_ids async for a in flight.answers() if a.record}

    flight, found = asyncio.run(play("21MB"))
    assert [found[number] for number in range(len(PROMPTS))] == texts
    assert 1 <= flight.room < len(PROMPTS)
    assert told_of
    assert all("cache" in text for text in told_of)


# Faults in a pipeline of three machines

CELLS: Sequence[tuple[str, Fault, int]] = [
    ("between", Fault.RESET, NEW // 2),
    ("between", Fault.CONNECT_REFUSED, 1),
    ("between", Fault.DROP_BOTH, NEW // 2),
    ("between", Fault.DROP_UP, NEW - 2),
    ("between", Fault.CORRUPT, 1),
    ("between", Fault.DELAY_SPIKE, 0),
    ("cloud", Fault.WORKER_KILLED, NEW // 2),
    ("third", Fault.WORKER_KILLED, 0),
    ("cloud", Fault.WORKER_RESTARTED, 1),
    ("third", Fault.WORKER_RESTARTED, NEW - 2),
]
"""Where, what, and after how many tokens of the first of two sequences: every fault of the link between two workers and
of each worker, at changing moments."""
QUICK = (0, 2, 6, 9)
"""Of the cells, those that are not left to the long tests: a reset, a silence, a worker killed, a worker restarted."""


def _marked(cell: tuple[str, Fault, int]) -> Any:
    return pytest.param(*cell, marks=() if CELLS.index(cell) in QUICK else pytest.mark.long)


SCRIPTS = {
    Fault.RESET: ("reset",),
    Fault.CONNECT_REFUSED: ("connect-refused for=600s", "reset"),
    Fault.DROP_BOTH: ("drop-both for=600s",),
    Fault.DROP_UP: ("drop-up for=600s",),
    Fault.CORRUPT: ("corrupt",),
    Fault.DELAY_SPIKE: ("delay-spike delay=0.4s for=1s",),
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Host("bundled", "--emulate", "3")) for name in ("cloud", "third")}


@pytest.mark.parametrize(("where", "fault", "after"), [_marked(cell) for cell in CELLS])
def test_two_sequences_in_a_pipeline_of_three_machines_survive(
    where: str, fault: Fault, after: int, hosts: dict[str, Host], texts: list[tuple[int, ...]]
) -> None:
    for host in hosts.values():
        host.start()

    fired = Counter[Fault]()

    async def play() -> list[RequestRecord]:
        with Line(hosts["third"].address, LinkShape.parse("rtt=20ms rate=20mbit")) as line:
            reach = {name: host.address for name, host in hosts.items()}
            with with_links(line.address, None, reach) as edge:
                decision = Decision(edge.partition(IN_A_ROW), prefill_chunk=8)
                patient = fault is not Fault.WORKER_KILLED
                decision = replace(decision, patience=float("inf") if patient else 0.0)

                def strike() -> None:
                    if fault is Fault.WORKER_KILLED:
                        hosts[where].kill()
                    elif fault is Fault.WORKER_RESTARTED:
                        hosts[where].kill()
                        hosts[where].start()
                    else:
                        line.inject(*(Injection.parse(script) for script in SCRIPTS[fault]))

                async def one(number: int) -> RequestRecord:
                    generation = edge.generate(PROMPTS[number], decision, max_new_tokens=NEW, stop_ids=())
                    async with generation:
                        if number == 0 and after == 0:
                            await asyncio.to_thread(strike)
                        count = 0
                        async for _ in generation:
                            count += 1
                            if number == 0 and count == after:
                                await asyncio.to_thread(strike)
                    return generation.record

                async with asyncio.timeout(60):
                    done = await asyncio.gather(one(0), one(1))
                fired.update(line.fired)
                return list(done)

    records = asyncio.run(play())
    assert [record.token_ids for record in records] == texts[:2]
    assert where != "between" or fired[fault]
    assert all(record.recomputed_tokens == 0 for record in records if fault is Fault.RESET)
    kinds = {event.kind for record in records for event in record.events}
    if fault in (Fault.CONNECT_REFUSED, Fault.DROP_BOTH, Fault.DROP_UP):
        assert "no-direct" in kinds
        assert records[0].is_degraded
    if fault is Fault.WORKER_KILLED:
        assert "failed-over" in kinds
    if fault is Fault.WORKER_RESTARTED:
        assert "back" in kinds
