"""Who is under way beside whom, without any model: places, order, failures, and the bubbles that intervals show."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from splitwise_llm.decision import Decision
from splitwise_llm.engine.flight import Agreed, Answer, Flight, idling
from splitwise_llm.engine.generation import Generation
from splitwise_llm.errors import BrokenInvariant, LinkDied, MemoryTooSmall, RequestError, SplitwiseError
from splitwise_llm.observation import Always, MachineView, Observation
from splitwise_llm.partition import Partition
from splitwise_llm.records import Interval, MachineRecord, RequestRecord
from splitwise_llm.spec import Dtype, ModelSpec, Weights

SPEC = ModelSpec("llama", 4, 64, 4, 4, 16, 128, 4, 64, 3, True)


class Played:
    """A generation that takes so many turns of the loop."""

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab, self.number = lab, number
        self.record = number

    async def __aenter__(self) -> Played:
        await asyncio.sleep(0)
        if len(self._lab.under_way) >= self._lab.places:
            raise MemoryTooSmall("no room for another cache")
        if error := self._lab.opening.get(self.number):
            raise error
        self._lab.under_way.add(self.number)
        self._lab.most = max(self._lab.most, len(self._lab.under_way))
        self._lab.begun.append((self.number, self._lab.now))
        return self

    async def __aiter__(self) -> Any:
        for _ in range(self._lab.turns[self.number]):
            self._lab.now += 1
            yield await asyncio.sleep(0)
        if error := self._lab.ending.get(self.number):
            raise error

    async def __aexit__(self, *_: object) -> None:
        self._lab.under_way.discard(self.number)


class Lab:
    """What a flight is tried on."""

    def __init__(self, *turns: int) -> None:
        self.turns, self.places, self.now, self.most = turns, len(turns), 0, 0
        self.opening: dict[int, SplitwiseError] = {}
        self.ending: dict[int, SplitwiseError] = {}
        self.under_way: set[int] = set()
        self.begun: list[tuple[int, int]] = []
        self.told: list[str] = []

    def fly(self, room: int) -> list[Answer]:
        async def play() -> list[Answer]:
            self.flight = Flight(
                lambda number: cast(Generation, Played(self, number)), len(self.turns), room,
                lambda kind, text: self.told.append(text),
            )  # fmt: skip
            return [answer async for answer in self.flight.answers()]

        return asyncio.run(play())


def test_the_next_one_begins_as_soon_as_any_is_complete_and_never_one_too_many() -> None:
    lab = Lab(50, 4, 4, 4, 4)
    answers = lab.fly(2)
    assert lab.most == 2
    assert [answer.number for answer in answers] == [1, 2, 3, 4, 0]  # nobody waits for the long one
    assert not lab.under_way


def test_the_first_is_opened_alone_and_what_it_meets_ends_everything() -> None:
    lab = Lab(3, 3, 3)
    lab.opening[0] = RequestError("no such worker")
    with pytest.raises(RequestError, match="no such worker"):
        lab.fly(3)
    assert lab.begun == []


@pytest.mark.parametrize("when", ["opening", "ending"])
def test_what_one_meets_later_is_its_own(when: str) -> None:
    lab = Lab(3, 3, 3)
    getattr(lab, when)[1] = LinkDied("gone")
    answers = {answer.number: answer for answer in lab.fly(2)}
    assert str(answers[1].error) == "gone"
    assert answers[1].record is None
    assert [answers[number].error for number in (0, 2)] == [None, None]


def test_our_own_fault_is_nobodys_answer() -> None:
    lab = Lab(3, 3)
    lab.ending[1] = BrokenInvariant("bug")
    with pytest.raises(BrokenInvariant):
        lab.fly(2)
    assert not lab.under_way


def test_fewer_are_under_way_where_there_is_room_for_fewer() -> None:
    lab = Lab(*[5] * 6)
    lab.places = 2
    answers = lab.fly(5)
    assert sorted(answer.number for answer in answers) == list(range(6))
    assert all(answer.error is None for answer in answers)
    assert lab.flight.room == 2
    assert "no room for another cache" in lab.told[0]


def test_who_finds_no_room_alone_is_told_so() -> None:
    lab = Lab(3, 3)
    lab.opening[1] = MemoryTooSmall("a prompt too long for any")
    answers = {answer.number: answer for answer in lab.fly(2)}
    assert "too long for any" in str(answers[1].error)


def observation(*reachable: bool, **changes: Any) -> Observation:
    machines = tuple(
        MachineView(f"m{number}", there, 10**9, Dtype.FP32, Weights.FULL) for number, there in enumerate(reachable)
    )
    return Observation(SPEC, machines, 4, 4, **changes)


def test_one_decision_is_made_for_all_until_a_machine_of_it_is_away() -> None:
    asked: list[int] = []

    class Counting:
        def decide(self, seen: Observation) -> Decision:
            asked.append(1)
            there = max(number for number, machine in enumerate(seen.machines) if machine.reachable)
            return Decision(Partition.cut(SPEC, 2, second=there))

    agreed = Agreed(Counting())
    first = agreed.decide(observation(True, True, True))
    assert agreed.decide(observation(True, True, True)) == first
    assert agreed.decide(observation(True, False, True)) == first  # nobody of it
    assert len(asked) == 1
    # Dies when flight.py says `if self._answer is None:` for `if self._answer is None or away & set`.
    assert agreed.decide(observation(True, True, False)) == Decision(Partition.cut(SPEC, 2, second=1))


def test_a_partition_that_was_given_is_not_asked_about_again() -> None:
    given = Always(Decision(Partition.all_on(SPEC, 0)))
    assert Agreed(given).policy is given


def record(**spans: list[tuple[float, float]]) -> RequestRecord:
    machines = tuple(
        MachineRecord(name, 0, tuple(Interval(0, n, *span) for n, span in enumerate(each)), "")
        for name, each in spans.items()
    )
    return RequestRecord("", "fp32", 1, (1,), "", 0.0, 0.0, 0.0, 0.0, (), 0, machines)


def test_bubbles_are_what_the_busiest_machine_idles_and_joint_steps_count_once() -> None:
    one = record(edge=[(0, 1), (8, 9)], cloud=[(100, 103), (105, 107)])
    two = record(edge=[(2, 3)], cloud=[(103, 104), (106, 108), (109, 110)])
    found = idling([one, two])
    assert found.machine == "cloud"
    assert found.bubble_share == pytest.approx(1 - 8 / 10)
    assert idling([record()]).bubble_share == 0.0
