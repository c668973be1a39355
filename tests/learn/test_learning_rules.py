"""Rules tried in simulation: what is tried where, when a rule holds, what it is worth, and how the actor is taught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitwise_llm.learn.courses import Course, course, courses
from splitwise_llm.learn.env import CourseEnv
from splitwise_llm.learn.search import Lesson, Moment, Rule, _actions, _rows, candidates, lesson, moments, shrunk
from splitwise_llm.learn.train import CONFIGS, learner, network, teach
from splitwise_llm.observation import Past
from splitwise_llm.policies.features import TOTAL
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Mode
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.worlds import Worlds

WHERE = {name: n for n, (name, _) in enumerate(HEADS)}


@pytest.fixture(scope="module")
def drawn() -> list[Course]:
    return courses(7, 12)


def test_a_moment_is_admission_or_flight_and_whether_the_link_is_down(drawn: list[Course]) -> None:
    one = drawn[0]
    worlds = Worlds(one.params, draw(one.params, 5, range(4), 6))
    worlds.go_on()
    menu = worlds.questions()[0].menu.at(np.zeros(4, np.int64))
    past = replace(Past.nothing(4), is_down=np.array([False, True, False, True]))
    menu = replace(menu, current=np.array([-1, -1, 0, 0]), past=past)
    assert moments(menu).tolist() == [Moment.FRESH, Moment.FRESH_DOWN, Moment.GOING, Moment.GOING_DOWN]
    assert moments(replace(menu, past=None)).tolist() == [Moment.FRESH, Moment.FRESH, Moment.GOING, Moment.GOING]


# Dies when search.py says `np.isin(now, rule.when) | allowed` for `np.isin(now, rule.when) & allowed`.
def test_a_rule_holds_in_its_moments_as_far_as_masks_allow() -> None:
    rules = [Rule(WHERE["mode"], Mode.EDGE, (Moment.GOING_DOWN,)), Rule(WHERE["cloud"], 0)]
    masks = np.ones((3, sum(SIZES)), np.bool_)
    masks[1, Mode.EDGE] = False
    now = np.array([Moment.GOING_DOWN, Moment.GOING_DOWN, Moment.FRESH])
    actions = _actions(rules, now, masks)
    assert actions[:, WHERE["mode"]].tolist() == [Mode.EDGE, NEUTRAL[0], NEUTRAL[0]]
    assert (actions[:, WHERE["cloud"]] == 0).all()
    others = [n for n in range(len(HEADS)) if n not in (WHERE["mode"], WHERE["cloud"])]
    assert (actions[:, others] == np.array(NEUTRAL)[others]).all()


def test_rules_are_told_in_words() -> None:
    assert str(Rule(WHERE["cloud"], 0)) == "cloud x 0.25"
    assert str(Rule(0, Mode.WAIT, (Moment.FRESH_DOWN,))) == "mode wait (fresh, down)"


def test_what_cannot_matter_is_not_tried(drawn: list[Course]) -> None:
    for one in drawn:
        heads = {HEADS[rule.head][0] for rule in candidates(one)}
        assert "cloud" in heads
        assert ("device" in heads) == (one.params.slots > 1)
        assert ("link" in heads) == (one.params.num_devices > 1)
        assert ("mode" in heads) == any(not kind.is_up for kind in one.params.link.classes)
        assert "budgets" not in heads


# Dies when search.py says `enumerate(kinds)` for `enumerate(sorted(kinds, key=len))`.
def test_rare_moments_are_kept_whole() -> None:
    when = np.repeat(list(Moment), [600, 300, 5, 80])
    kept = when[_rows(when, 400, np.random.Generator(np.random.Philox(1)))]
    assert np.bincount(kept, minlength=4).tolist() == [158, 157, 5, 80]


# Dies when search.py says `1 + (error / mean) ** 2` for `1 - (error / mean) ** 2`.
def test_what_may_be_chance_counts_less_and_nothing_below_its_standard_error() -> None:
    sure, unsure = np.full(9, 2.0), np.array([8.0, -4.0] * 4 + [2.0])
    assert shrunk(sure) == 2.0
    error = unsure.std(ddof=1) / 3
    assert shrunk(unsure) == pytest.approx(max(2 * (1 - (error / 2) ** 2), 0))
    assert shrunk(unsure - 1.5) == 0.0
    assert shrunk(-sure) == -2.0


@pytest.mark.parametrize("number", [10, 11])
def test_a_lesson_is_the_same_again_and_says_what_was_tried(number: int) -> None:
    one = course(7, number)
    first, again = (lesson(one, 3, 6, 16, 200) for _ in range(2))
    assert first.rules == again.rules
    assert np.array_equal(first.seen, again.seen)
    assert len(first.seen) == len(first.when) <= 200
    tried = np.zeros(first.worth.shape, np.bool_)
    tried[:, np.cumsum([0, *SIZES[:-1]]) + np.array(NEUTRAL)] = True
    assert (first.worth[tried] == 0).all()
    for rule in candidates(one):
        tried[rule.when, sum(SIZES[: rule.head]) + rule.value] = True
    assert np.array_equal(~np.isnan(first.worth), tried)


# Dies when train.py says `(value.softmax(dim=1)` for `-(value.softmax(dim=1)`.
def test_the_actor_is_taught_what_saves_most_where_it_does() -> None:
    """Two courses, told apart by one feature: a cheap cloud saves in one and costs in the other."""
    env = CourseEnv([course(7, 0)], 2, 0, requests=6)
    model = learner(replace(CONFIGS["tiny"], hidden=4, width=16), env)
    dice = np.random.default_rng(3)
    column = sum(SIZES[: WHERE["cloud"]])
    taught = []
    for number, saves in enumerate((0.01, -0.01)):
        seen = dice.uniform(0, 1, (50, TOTAL)).astype(np.float32)
        seen[:, 0] = number
        worth = np.full((4, sum(SIZES)), np.nan)
        worth[:, np.cumsum([0, *SIZES[:-1]]) + np.array(NEUTRAL)] = 0.0
        worth[:, column] = saves
        taught.append(Lesson(str(number), "", worth, seen, np.zeros(50, np.int64)))
    teach(model, taught, 800, 1)
    mind = network(model, env)
    for number, wanted in ((0, 0), (1, NEUTRAL[WHERE["cloud"]])):
        logits = mind.logits(taught[number].seen)[:, column : column + SIZES[WHERE["cloud"]]]
        assert (logits.argmax(axis=1) == wanted).mean() > 0.95
