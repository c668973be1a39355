"""What is kept of what was learned: judged knob by knob, on courses that no gradient has seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitwise_llm.learn import train
from splitwise_llm.learn.courses import Course, course
from splitwise_llm.learn.forks import in_forks
from splitwise_llm.learn.judging import HARM, WHOLE, Judgement, Validation, candidates, freed
from splitwise_llm.observation import SEEN
from splitwise_llm.policies.features import COUNT, TOTAL
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, START
from splitwise_llm.policies.mind import best_actions
from splitwise_llm.policies.network import NAMES as WEIGHTS
from splitwise_llm.policies.network import Network

FIRST = np.cumsum([0, *SIZES[:-1]])
NAMES = [name for name, _ in HEADS]


def turning(**values: int) -> Network:
    """Weights that turn these knobs so, always, and leave the others neutral."""
    bias = np.zeros(sum(SIZES), np.float32)
    bias[FIRST + np.array(NEUTRAL)] = 1.0
    for name, value in values.items():
        bias[FIRST[NAMES.index(name)] + value] = 2.0
    zeros = [np.zeros(shape, np.float32) for shape in ((6, len(SEEN)), (6, 2), (6,), (6,), (4, COUNT + 2), (4,),
                                                       (4, 4), (4,), (sum(SIZES), 4))]  # fmt: skip
    rest = (bias, np.zeros(COUNT, np.float32), np.ones(COUNT, np.float32))
    return Network.of(dict(zip(WEIGHTS, (*zeros, *rest), strict=True)))


def actions(mind: Network) -> dict[str, int]:
    """With nothing masked."""
    logits = mind.logits(np.zeros((1, TOTAL), np.float32))
    return dict(zip(NAMES, best_actions(logits, np.ones_like(logits, np.bool_))[0].tolist(), strict=True))


def held(**values: int) -> dict[str, int]:
    return dict(zip(NAMES, START, strict=True)) | values


class Told:
    """A validation that says what each knob is worth, and asks what was judged."""

    def __init__(self, worth: dict[str, float], together: float = 0.0) -> None:
        self.worth, self.together = worth, together
        self.judged: list[tuple[str, ...]] = []

    def judge(self, *minds: Network) -> list[Judgement]:
        return [self._judged(mind) for mind in minds]

    def _judged(self, mind: Network) -> Judgement:
        now = actions(mind)
        turned = tuple(name for name in NAMES if now[name] != held()[name])
        self.judged.append(turned)
        total = 0.01 + sum(self.worth.get(name, 0.0) for name in turned)
        return Judgement((total + (self.together if len(turned) == 2 else 0.0),), (0.0,), frozenset(turned))


def test_all_knobs_but_those_that_are_free_are_held() -> None:
    bold = turning(cloud=0, device=4, outlook=0)
    assert actions(bold) == dict(zip(NAMES, NEUTRAL, strict=True)) | {"cloud": 0, "device": 4}
    assert actions(freed(bold, ())) == held()
    assert actions(freed(bold, {"cloud"})) == held(cloud=0)
    assert actions(freed(bold, {"outlook", "device"})) == held(device=4, outlook=0)


def best(found: Iterable[tuple[str, Network, Judgement]]) -> tuple[str, Network, Judgement]:
    return max(found, key=lambda each: each[2].worth)


def helps(found: Judgement) -> bool:
    """Beside an outlook that is worth 0.01."""
    return found.worth > 0.01 + 1e-9


def test_a_knob_that_harms_is_held_and_those_that_help_are_put_together() -> None:
    told = Told({"cloud": 0.02, "device": -0.05, "draft": 0.01})
    mind = turning(cloud=0, device=4, draft=2, outlook=1)
    name, kept, judged = best(candidates(mind, told, helps))  # type: ignore[arg-type]
    assert name == "cloud, draft"
    assert actions(kept) == held(cloud=0, draft=2)
    assert judged.each[0] == pytest.approx(0.04)
    assert told.judged[0] == ("device", "cloud", "draft")


def test_what_helps_alone_and_harms_together_is_not_put_together() -> None:
    """Dies when judging.py takes every knob that helps."""
    told = Told({"cloud": 0.02, "draft": 0.01}, together=-0.03)
    name, kept, _ = best(candidates(turning(cloud=0, draft=2, outlook=1), told, helps))  # type: ignore[arg-type]
    assert name.startswith("cloud")
    assert actions(kept) == held(cloud=0)


def test_a_network_that_turns_nothing_is_judged_as_it_is_and_by_its_outlook() -> None:
    found = [name for name, _, _ in candidates(turning(outlook=1), Told({}), helps)]  # type: ignore[arg-type]
    assert found[0] == WHOLE
    assert len(found) == 2


Each = tuple[float, ...]


def judged(*each: float) -> Judgement:
    return Judgement(each, (0.0,) * len(each))


# Dies when learn/judging.py says `> 0` for `> SURE * error`.
# Dies when learn/judging.py says `SURE = 1.0` for `SURE = SIGNIFICANT`.
def test_what_saves_more_by_chance_does_not_surpass_what_is_simpler() -> None:
    """Two standard errors: with equal costs but in one course of many, the mean of what is saved is its own standard
    error, whatever it is; with another that loses a little it is less, and is not enough either way."""
    simple = judged(0.01, 0.02, 0.0, 0.0)
    assert not judged(0.01, 0.02, 0.0, 0.5).surpasses(simple)
    assert not judged(0.01, 0.02, 0.1, 0.1).surpasses(simple)
    assert judged(0.03, 0.04, 0.03, 0.02).surpasses(simple)
    assert not judged(0.03, 0.04, 0.03, -0.02).surpasses(simple)
    assert not simple.surpasses(simple)
    assert judged(0.02).surpasses(judged(0.01))


def test_what_is_lost_beyond_doubt_counts_in_full() -> None:
    sure = Judgement((0.03, -0.02), (0.001, 0.001), frozenset())
    assert sure.worth == pytest.approx(sure.gain - (0.02 - 0.001 - HARM))
    assert replace(sure, errors=(0.001, 0.02)).worth == sure.gain


@pytest.fixture(scope="module")
def small() -> Course:
    drawn = (course(7, number) for number in range(20))
    return next(each for each in drawn if each.params.num_devices == 1)


def test_neutral_knobs_save_nothing_whoever_simulates_and_what_was_lived_counts_too(small: Course) -> None:
    found = []
    for processes in (1, 2):
        validation = Validation(1, 4, 16, processes, more=[replace(small, name="lived")])
        assert len(validation.names) == 2
        assert validation.names[-1] == "lived"
        neutral, turned = validation.judge(turning(), turning(cloud=0))
        assert [neutral] == validation.judge(turning()), "who is judged beside it does not matter"
        assert neutral.each == (0.0, 0.0)
        assert neutral.worth == 0.0
        assert neutral.turned == frozenset()
        found.append(turned)
    assert found[0] == found[1]
    assert found[0].turned == {"cloud"}


def test_forks_answer_in_order_and_inherit_what_cannot_travel() -> None:
    for processes in (1, 3):
        assert list(in_forks(lambda n: n * n, 5, processes)) == [0, 1, 4, 9, 16]


class Learner:
    """What a run writes of its learner, and nothing of it."""

    class logger:
        @staticmethod
        def record(name: str, value: float) -> None: ...

    low = high = np.zeros(1, np.float32)

    def save(self, path: str, exclude: list[str]) -> None: ...


# Dies when learn/train.py says `found.surpasses(alone)` for `found.surpasses(alone) and found.surpasses(neutral)`.
# Dies when learn/train.py says `may=True)` for `may=began or helps(found))`.
# Dies when learn/train.py says `may=helps(found))` for `may=began or helps(found))`.
@pytest.mark.parametrize(
    ("state", "alone", "found", "kept"),
    [
        # from nothing: worth more than the outlook alone, but in one course only
        ({"best": 0.0}, (0.01, 0.02, 0.0, 0.0), (0.01, 0.02, 0.0, 0.1), False),
        ({"best": 0.0}, (0.01, 0.02, 0.0, 0.0), (0.03, 0.04, 0.02, 0.03), True),
        # surely more than an outlook that loses, and not surely more than nothing turned
        ({"best": 0.0}, (-0.02, -0.02, -0.02, -0.02), (0.03, -0.004, 0.0, 0.0), False),
        # it began at less than the outlook alone: what is better is kept
        ({"best": -0.1, "began": -0.1}, (0.0, 0.01, 0.0, 0.0), (0.005, 0.01, 0.0, 0.0), True),
        ({"best": 0.2, "began": 0.2}, (0.0, 0.01, 0.0, 0.0), (0.005, 0.01, 0.0, 0.0), False),
    ],
)
def test_weights_are_kept_where_they_surpass_the_outlook_or_what_a_run_began_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], alone: Each, found: Each, kept: bool
) -> None:
    simple, one = judged(*alone), judged(*found)
    begun = {"alone": {"each": simple.each, "errors": simple.errors}, "updates": 0, "curve": []} | state
    told: list[str] = []
    monkeypatch.setattr(train, "network", lambda *_: turning())
    monkeypatch.setattr(train, "candidates", lambda mind, *_: [("a knob", mind, one)])
    train._validate(tmp_path, begun, Learner(), Learner(), None, told.append)  # type: ignore[arg-type]
    assert ("the best so far" in told[0]) == (tmp_path / "splitwise.npz").exists() == kept
