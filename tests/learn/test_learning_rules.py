"""Rules sought in simulation: what is tried where, when a rule holds, and what is kept of it to be imitated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from splitwise_llm.cost import Job
from splitwise_llm.learn.courses import Course, _job, course, courses
from splitwise_llm.learn.search import (
    LEAST,
    Moment,
    Rule,
    _actions,
    _loses_nothing,
    _rows,
    candidates,
    lesson,
    moments,
    outlooks,
)
from splitwise_llm.observation import Past
from splitwise_llm.policies.knobs import HEADS, NEUTRAL, SIZES, Mode
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.worlds import Worlds
from splitwise_llm.spec import find_model

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
    assert str(Rule(WHERE["outlook"], 1, (Moment.GOING_DOWN,))) == "outlook (going, down)"


def test_what_cannot_matter_is_not_tried(drawn: list[Course]) -> None:
    for one in drawn:
        heads = {HEADS[rule.head][0] for rule in candidates(one)}
        assert "cloud" in heads
        assert ("device" in heads) == (one.params.slots > 1)
        assert ("link" in heads) == (one.params.num_devices > 1)
        assert not heads & {"mode", "budgets", "patience", "outlook"}
        has_outages = any(not kind.is_up for kind in one.params.link.classes)
        assert {rule.when for rule in outlooks(one)} == (
            {(Moment.GOING_DOWN,), (Moment.FRESH_DOWN,)} if has_outages else set()
        )


# Dies when search.py says `enumerate(kinds)` for `enumerate(sorted(kinds, key=len))`.
def test_rare_moments_are_kept_whole() -> None:
    when = np.repeat(list(Moment), [600, 300, 5, 80])
    kept = when[_rows(when, 400, np.random.Generator(np.random.Philox(1)))]
    assert np.bincount(kept, minlength=4).tolist() == [158, 157, 5, 80]


@pytest.mark.parametrize("number", [10, 11])
def test_a_lesson_is_the_same_again_and_its_actions_are_those_of_its_rules(number: int) -> None:
    one = course(7, number)
    first, again = (lesson(one, 3, 6, 16, 200) for _ in range(2))
    assert first.rules == again.rules
    assert np.array_equal(first.seen, again.seen)
    assert len(first.seen) == len(first.actions) <= 200
    assert bool(first.rules) == bool((first.actions != np.array(NEUTRAL)).any())
    assert first.saved > -LEAST
    assert (first.low <= first.seen.min(axis=0)).all()
    assert (first.high >= first.seen.max(axis=0)).all()


# Dies when search.py says `saved.mean() <= ` for `saved.mean() >= ` in `_loses_nothing`.
def test_what_costs_nothing_is_left_on_and_what_loses_more_than_noise_is_not() -> None:
    neutral, dice = np.ones(40), np.random.default_rng(2)
    assert _loses_nothing(np.zeros(40), neutral)
    assert _loses_nothing(dice.normal(0.01, 0.01, 40), neutral)
    assert not _loses_nothing(dice.normal(-0.01, 0.01, 40), neutral)


@pytest.mark.parametrize("model", ["gpt2-xl", "llama-7b"])
def test_jobs_differ_in_length_and_fit_their_model(model: str) -> None:
    dice = np.random.default_rng(1)
    jobs = [_job(model, dice) for _ in range(200)]
    plain = sum(job == Job(128, 128) for job in jobs)
    assert 70 < plain < 130
    most = find_model(model).max_context
    assert all(job.prompt_tokens + job.tokens_out <= most for job in jobs)
    assert max(job.prompt_tokens for job in jobs) > (1024 if most > 1024 else 640)
