"""Recovery, without a socket or a clock: any order of events at any times, and the promises made about silence,
attempts and patience."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitwise_llm.engine.backoff import LONGEST_RETRY_AFTER_S, Door, RecoveryRules, wait_s
from splitwise_llm.engine.recovery import Recovery
from splitwise_llm.engine.signals import (
    Action,
    AskPolicy,
    Attach,
    Dial,
    Died,
    Elsewhere,
    Event,
    Expect,
    GiveUp,
    HangUp,
    Heard,
    Idle,
    Mismatch,
    PatienceOver,
    Ping,
    Reached,
    Resumed,
    Tell,
    Tick,
    Unreached,
    Wait,
)
from splitwise_llm.engine.transitions import IGNORED, TRANSITIONS, On, State, table, with_table
from splitwise_llm.errors import RequestError

RULES = RecoveryRules()
SEEDS = st.integers(0, 2**32)
CLOSE = 1e-9
HEARD, TICK, IDLE = Heard(), Tick(), Idle()


def make(rules: RecoveryRules = RULES, seed: int = 0) -> Recovery:
    return Recovery("cloud", rules, random.Random(seed), 0.0)


def kinds(actions: tuple[Action, ...]) -> list[type[Action]]:
    """What is to be done, without the words for people."""
    return [type(action) for action in actions if not isinstance(action, Tell)]


def told(actions: tuple[Action, ...]) -> list[str]:
    return [action.kind for action in actions if isinstance(action, Tell)]


def dialled(actions: tuple[Action, ...]) -> int | None:
    return next((action.attempt for action in actions if isinstance(action, Dial)), None)


def until_dial(recovery: Recovery) -> tuple[int, float]:
    """Tick on time until an attempt starts: its number, and when."""
    for _ in range(10):
        now_s = recovery.next_deadline_s
        if (attempt := dialled(recovery.on(TICK, now_s))) is not None:
            return attempt, now_s
    raise AssertionError(f"no attempt; {recovery.state}")


# -- any order of events at any times --


class AnyOrder(RuleBasedStateMachine):
    """Every event in every state, with numbers of present and past links, ticks early, on time, late and missing."""

    @initialize(
        seed=SEEDS,
        budget_s=st.sampled_from([math.inf, 3600.0, 60.0, 5.0]),
        steady_s=st.sampled_from([0.0, 5.0]),
        sessions=st.sampled_from([1, 120]),
        state=st.sampled_from([state for state in State if state is not State.GONE]),
    )
    def begin(self, seed: int, budget_s: float, steady_s: float, sessions: int, state: State) -> None:
        self.rules = RecoveryRules(budget_s=budget_s, steady_s=steady_s).beside(sessions)
        self.recovery = Recovery("cloud", self.rules, random.Random(seed), 0.0)
        self.now_s = 0.0
        self.under_way: int | None = None
        self.last_dial = 0
        self.freed_s = 0.0  # when the last attempt, or link, ended
        self.pinged_s = -math.inf
        self.connected_s: float | None = 0.0
        self.trouble_s: float | None = None
        self.scheduled_s = -math.inf
        self.retry_after_s = 0.0
        self.go_to(state)

    def go_to(self, state: State) -> None:
        """The shortest way there from the beginning."""
        if state is State.CONNECTED:
            return
        if state is State.SUSPECT:
            self.tick_on_time()
            self.tick_on_time()
            return
        self.say(Died("reset"))
        if state in (State.FAILED_OVER, State.RETURNING):
            self.say(Elsewhere())
        if state in (State.PROBING, State.RESYNCING, State.RETURNING):
            self.tick_on_time()
        if state in (State.RESYNCING, State.RETURNING):
            self.say(Reached(self.last_dial))
        assert self.recovery.state is state

    def tick_on_time(self) -> None:
        self.now_s = max(self.now_s, self.recovery.next_deadline_s)
        self.say(TICK)

    def say(self, event: Event) -> tuple[Action, ...]:
        before = self.recovery.state
        deadline_s = self.recovery.next_deadline_s
        actions = self.recovery.on(event, self.now_s)
        self.check(before, deadline_s, event, actions)
        return actions

    def check(self, before: State, deadline_s: float, event: Event, actions: tuple[Action, ...]) -> None:
        after = self.recovery.state
        if before is State.GONE:
            assert not actions
            assert after is State.GONE
            assert self.recovery.next_deadline_s == math.inf
        if isinstance(event, Unreached | Reached | Mismatch) and event.attempt == self.under_way:
            self.under_way, self.freed_s = None, self.now_s
            if isinstance(event, Reached):
                assert kinds(actions) == [Attach]
        for action in actions:
            if isinstance(action, HangUp):
                if action.link == self.under_way:
                    self.under_way = None
                self.freed_s = self.now_s
            elif isinstance(action, Dial):
                assert self.under_way is None, "two attempts at once"
                assert self.recovery.link is None, "an attempt beside a link"
                assert action.attempt == self.last_dial + 1, "a number used twice"
                self.under_way = self.last_dial = action.attempt
                assert self.now_s >= self.freed_s + self.rules.floor_s - CLOSE, "hammering"
                longest_s = max(self.rules.cap_s, 1.5 * self.retry_after_s + self.rules.base_s)
                assert deadline_s <= self.freed_s + longest_s + CLOSE, "later than the cap"
                if self.trouble_s is not None:
                    assert deadline_s <= self.trouble_s + self.rules.budget_s + CLOSE, "after the budget"
            elif isinstance(action, Ping):
                shortest_s = (self.rules.dead_share - self.rules.suspect_share) * self.rules.least_limit_s
                assert self.now_s - self.pinged_s >= shortest_s - CLOSE, "too many pings"
                self.pinged_s = self.now_s
        connected = (State.CONNECTED, State.SUSPECT)
        if before in connected and after not in connected:
            steady = self.connected_s is not None and self.now_s - self.connected_s >= self.rules.steady_s
            if self.trouble_s is None or steady:
                self.trouble_s = self.now_s
        if before not in connected and after in connected:
            self.connected_s = self.now_s
        if isinstance(event, Unreached) and actions:  # a late one counts for nothing
            self.retry_after_s = min(event.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)

    @rule(seconds=st.one_of(st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 20), st.just(1e5)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(late_s=st.sampled_from([0.0, 0.0, 0.0, 0.05, 0.5, 100.0]))
    def tick(self, late_s: float) -> None:
        if self.recovery.next_deadline_s < math.inf:
            self.now_s = max(self.now_s, self.recovery.next_deadline_s + late_s)
        self.say(TICK)

    @rule()
    def tick_early(self) -> None:
        if self.recovery.next_deadline_s > self.now_s:
            assert not self.say(TICK), "nothing was due"

    @rule(event=st.sampled_from([HEARD, IDLE, Expect(0.02), Expect(2.0), Expect(math.inf), Expect(-1.0)]))
    def link_lives(self, event: Event) -> None:
        self.say(event)

    @rule(event=st.sampled_from([Died("reset"), Resumed(True), Resumed(False), Elsewhere(), Wait(0.0), Wait(3.0)]))
    def session_speaks(self, event: Event) -> None:
        self.say(event)

    @precondition(lambda self: self.recovery.link is None)
    @rule()
    def tick_until_an_attempt(self) -> None:
        while self.under_way is None and self.recovery.state is not State.GONE:
            self.tick_on_time()

    @precondition(lambda self: self.under_way is not None)
    @rule()
    def greeted(self) -> None:
        self.say(Reached(self.last_dial))

    @precondition(lambda self: self.last_dial > 0)
    @rule(
        back=st.sampled_from([0, 0, 1, 3]),
        retry_after_s=st.sampled_from([None, None, 0.0, 2.0, 1e9, math.nan, -1.0]),
    )
    def unreached(self, back: int, retry_after_s: float | None) -> None:
        self.say(Unreached(self.last_dial - back, "refused", retry_after_s))

    @rule(back=st.integers(0, 3))
    def greeted_perhaps_late_or_twice(self, back: int) -> None:
        self.say(Reached(self.last_dial - back))

    @rule(back=st.integers(1, 3), kind=st.sampled_from(["heard", "died", "resumed"]))
    def late_words_of_an_old_link(self, back: int, kind: str) -> None:
        old = self.last_dial - back
        if old == self.recovery.link:
            return
        state, deadline_s = self.recovery.state, self.recovery.next_deadline_s
        words = {"heard": Heard(old), "died": Died("reset", old), "resumed": Resumed(True, old)}
        assert not self.say(words[kind])
        assert (self.recovery.state, self.recovery.next_deadline_s) == (state, deadline_s)

    @rule(rarely=st.integers(0, 4), mismatch=st.booleans())
    def end(self, rarely: int, mismatch: bool) -> None:
        if rarely == 4:
            self.say(Mismatch(self.last_dial, "another model") if mismatch else GiveUp())

    @rule()
    def clock_goes_back(self) -> None:
        """It is taken for the last time that was heard of, so at most what is due now happens."""
        if self.recovery.next_deadline_s > self.now_s:
            assert not self.recovery.on(TICK, self.now_s - 1e6)

    @precondition(lambda self: self.recovery.state is not State.GONE)
    @rule()
    def the_worker_is_well_again(self) -> None:
        """From anywhere: whatever answers in time leads back to a working link, as long as there is budget."""
        for _ in range(20):
            state = self.recovery.state
            if state in (State.CONNECTED, State.GONE):
                break
            if state is State.SUSPECT:
                self.say(HEARD)
            elif state in (State.RESYNCING, State.RETURNING):
                self.say(Resumed(True))
            elif self.under_way is not None:
                self.say(Reached(self.under_way))
            else:
                self.tick_on_time()
        assert self.recovery.state in (State.CONNECTED, State.GONE)
        assert self.recovery.state is State.CONNECTED or self.rules.budget_s < math.inf

    @invariant()
    def a_link_or_an_attempt_or_a_deadline(self) -> None:
        """Nothing waits for ever: every state but gone has a next deadline."""
        if not hasattr(self, "recovery"):
            return
        assert (self.recovery.next_deadline_s == math.inf) == (self.recovery.state is State.GONE)
        linked = self.recovery.state in (State.CONNECTED, State.SUSPECT, State.RESYNCING, State.RETURNING)
        assert linked == (self.recovery.link is not None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=400, stateful_step_count=40)


# -- silence --


@given(steps=st.lists(st.tuples(st.floats(0.001, 3.0), st.floats(0.0, 0.45)), max_size=8), seed=SEEDS)
def test_a_dead_link_is_known_within_four_steps_or_a_second_after_its_last_frame(
    steps: list[tuple[float, float]], seed: int
) -> None:
    recovery, now_s, step_s = make(seed=seed), 0.0, 0.05
    recovery.on(Expect(step_s), now_s)
    for step_s, share in steps:
        now_s += share * RULES.limit_s(step_s)
        recovery.on(TICK, now_s) if recovery.next_deadline_s <= now_s else None
        recovery.on(Heard(), now_s)
        recovery.on(Expect(step_s), now_s)
        recovery.on(Heard(), now_s)
    limit_s, pings = max(4 * step_s, 1.0), 0
    while recovery.state in (State.CONNECTED, State.SUSPECT):
        assert recovery.next_deadline_s <= now_s + limit_s
        tick_s = recovery.next_deadline_s + 0.04 * limit_s  # an event loop is never on time
        pings += kinds(recovery.on(TICK, tick_s)).count(Ping)
    assert tick_s <= now_s + limit_s
    assert pings == 1, "no link is given up without a ping"


@given(pauses=st.lists(st.tuples(st.booleans(), st.floats(0.0, 0.4)), min_size=40, max_size=60))
def test_asking_and_resting_in_turn_hides_no_death(pauses: list[tuple[bool, float]]) -> None:
    recovery, now_s = make(), 0.0
    for expects, pause_s in pauses:
        recovery.on(Expect(0.1) if expects else IDLE, now_s)
        now_s += pause_s
        if recovery.next_deadline_s <= now_s:
            recovery.on(TICK, recovery.next_deadline_s)
        if recovery.state is State.BACKING_OFF:
            return
        assert now_s <= 2 * RULES.heartbeat_s + RULES.least_limit_s + 0.4


def test_a_half_open_link_is_noticed_though_nothing_is_awaited() -> None:
    recovery = make()
    recovery.on(Heard(), 3.0)
    assert kinds(recovery.on(TICK, 4.0)) == [Ping]
    assert recovery.state is State.CONNECTED, "a heartbeat is no doubt"
    recovery.on(TICK, 4.5)
    assert recovery.state is State.SUSPECT
    recovery.on(TICK, 4.9)
    assert recovery.state is State.BACKING_OFF


def test_any_frame_takes_a_doubt_back() -> None:
    recovery = make()
    recovery.on(Expect(0.1), 0.0)
    assert told(recovery.on(TICK, 0.5)) == ["suspect"]
    assert told(recovery.on(Heard(), 0.7)) == ["alive"]
    assert recovery.state is State.CONNECTED
    assert recovery.next_deadline_s == pytest.approx(1.2)


def test_a_process_that_slept_gives_the_worker_time_to_answer_once() -> None:
    recovery = make()
    recovery.on(Expect(0.1), 0.0)
    assert kinds(recovery.on(TICK, 1000.0)) == [Ping]  # asked for at 0.5
    assert recovery.next_deadline_s == pytest.approx(1000.4)
    assert kinds(recovery.on(TICK, 2000.0)) == [Ping]  # and slept again
    assert recovery.state is State.SUSPECT
    assert recovery.next_deadline_s == pytest.approx(2000.4)
    recovery.on(TICK, 3000.0)
    assert recovery.state is State.BACKING_OFF, "always late is no excuse"


def test_a_longer_step_is_waited_for_and_a_clock_that_goes_back_changes_nothing() -> None:
    recovery = make()
    recovery.on(Heard(), 9.9)
    recovery.on(Expect(0.1), 10.0)
    recovery.on(Expect(2.0), 10.1)
    assert recovery.next_deadline_s == pytest.approx(14.0)
    assert not recovery.on(TICK, 0.0)
    recovery.on(Heard(), 5.0)  # taken for 10.1
    assert recovery.next_deadline_s == pytest.approx(14.1)


# -- attempts --


@given(seed=SEEDS, hangs=st.lists(st.booleans(), min_size=1, max_size=12), sessions=st.sampled_from([1, 60, 120]))
def test_a_link_that_returns_is_tried_within_one_cap(seed: int, hangs: list[bool], sessions: int) -> None:
    recovery = make(RULES.beside(sessions), seed)
    recovery.on(Died("reset"), 100.0)
    began_s = 100.0
    for hung in hangs:
        attempt, now_s = until_dial(recovery)
        assert now_s - began_s <= RULES.cap_s + CLOSE, "a link that returned after the last attempt waited longer"
        began_s = now_s
        if hung:
            recovery.on(TICK, recovery.next_deadline_s)
        else:
            recovery.on(Unreached(attempt, "refused"), now_s + 0.001)


@given(failures=st.integers(0, 2000), took_s=st.floats(0, 10), draw=st.floats(0, 1, exclude_max=True))
def test_delays_are_jittered_between_the_floor_and_a_bound_that_doubles_up_to_the_cap(
    failures: int, took_s: float, draw: float
) -> None:
    longest_s = RULES.longest_delay_s(failures, took_s)
    assert RULES.floor_s <= RULES.delay_s(failures, took_s, draw) <= longest_s <= RULES.cap_s
    if took_s == 0:
        assert longest_s == (RULES.cap_s if failures > 5 else RULES.base_s * 2**failures)


@given(asked_s=st.floats(0, 50), seed=SEEDS)
def test_a_full_worker_is_not_asked_before_it_said(asked_s: float, seed: int) -> None:
    recovery = make(seed=seed)
    recovery.on(Died("reset"), 0.0)
    attempt, now_s = until_dial(recovery)
    recovery.on(Unreached(attempt, "full", retry_after_s=asked_s), now_s)
    _, again_s = until_dial(recovery)
    assert asked_s - CLOSE <= again_s - now_s <= max(1.5 * asked_s + RULES.base_s, RULES.floor_s) + CLOSE


def test_attempts_end_with_the_budget_and_the_policy_hears_of_it() -> None:
    recovery = make(RecoveryRules(budget_s=30.0))
    recovery.on(Died("reset"), 0.0)
    actions: tuple[Action, ...] = ()
    last_s = 0.0
    while recovery.state is not State.GONE:
        attempt, last_s = until_dial(recovery)
        actions = recovery.on(Unreached(attempt, "refused"), last_s + 0.01)
    assert 20.0 < last_s <= 30.0
    assert kinds(actions) == [AskPolicy]
    assert AskPolicy("gone") in actions


def test_a_worker_that_dies_of_every_session_is_dialled_ever_more_seldom() -> None:
    recovery, gaps = make(), []
    recovery.on(Died("reset"), 0.0)
    ended_s = 0.0
    for _ in range(40):
        attempt, now_s = until_dial(recovery)
        gaps.append(now_s - ended_s)
        recovery.on(Reached(attempt), now_s)
        recovery.on(Resumed(held=False), now_s + 0.1)
        ended_s = now_s + 0.2
        recovery.on(Died("out of memory", link=attempt), ended_s)
    assert sum(gaps[20:]) / 20 > 1.5, "as if each were the first fault"


def test_a_link_that_was_steady_starts_anew() -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    for _ in range(8):
        attempt, now_s = until_dial(recovery)
        recovery.on(Unreached(attempt, "refused"), now_s)
    attempt, now_s = until_dial(recovery)
    recovery.on(Reached(attempt), now_s)
    recovery.on(Resumed(held=True), now_s)
    recovery.on(Died("reset"), now_s + RULES.steady_s)
    assert until_dial(recovery)[1] <= now_s + RULES.steady_s + RULES.base_s


@pytest.mark.parametrize("late", [Reached(1), Unreached(1, "refused"), Mismatch(1, "another model")])
def test_the_late_answer_of_an_attempt_that_was_broken_off_changes_nothing(late: Event) -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    until_dial(recovery)
    assert HangUp(1, "it did not answer in time") in recovery.on(TICK, recovery.next_deadline_s)  # stuck
    assert not recovery.on(late, recovery.next_deadline_s)
    attempt, now_s = until_dial(recovery)
    assert attempt == 2
    before = recovery.state, recovery.next_deadline_s
    assert not recovery.on(late, now_s)
    assert (recovery.state, recovery.next_deadline_s) == before


def test_another_model_there_ends_it() -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    attempt, now_s = until_dial(recovery)
    assert kinds(recovery.on(Mismatch(attempt, "another model"), now_s)) == [HangUp, AskPolicy]
    assert recovery.state is State.GONE


def test_a_worker_that_is_full_while_resyncing_is_left_and_tried_later() -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    attempt, now_s = until_dial(recovery)
    recovery.on(Reached(attempt), now_s)
    assert kinds(recovery.on(Unreached(attempt, "all sessions are taken", 2.0), now_s)) == [HangUp]
    assert until_dial(recovery)[1] >= now_s + 2.0


# -- patience, and going elsewhere --


def test_patience_is_counted_from_the_fault_and_ends_once() -> None:
    recovery = make()
    assert AskPolicy("fault") in recovery.on(Died("reset"), 10.0)
    recovery.on(Wait(wait_s(2.0, predicted_move_s=0.75)), 10.2)
    over_s = []
    while recovery.next_deadline_s < 60:
        now_s = recovery.next_deadline_s
        actions = recovery.on(TICK, now_s)
        over_s += [now_s] * (PatienceOver() in actions)
        if (attempt := dialled(actions)) is not None:
            recovery.on(Unreached(attempt, "refused"), now_s)
    assert over_s == [pytest.approx(11.5)]


def test_infinite_patience_never_ends_and_none_ends_at_once() -> None:
    assert wait_s(math.inf, 0.0) == math.inf
    assert wait_s(0.0, math.inf) == 0.0
    recovery = make()
    recovery.on(Died("reset"), 10.0)
    recovery.on(Wait(math.inf), 10.0)
    due_s = recovery.next_deadline_s
    recovery.on(Wait(0.0), 10.0)
    assert recovery.next_deadline_s == 10.0 < due_s
    assert PatienceOver() in recovery.on(TICK, 10.0)


def test_a_worker_that_comes_back_after_a_failover_is_offered_to_the_policy() -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    recovery.on(Elsewhere("on edge"), 0.01)
    assert recovery.state is State.FAILED_OVER
    attempt, now_s = until_dial(recovery)
    assert recovery.state is State.FAILED_OVER, "attempts go on in the background"
    assert Attach(attempt) in recovery.on(Reached(attempt), now_s)
    assert recovery.state is State.RETURNING
    assert AskPolicy("return") in recovery.on(Resumed(held=False), now_s + 1)
    assert not recovery.degraded


def test_a_fault_while_resyncing_is_still_the_same_fault() -> None:
    recovery = make()
    recovery.on(Died("reset"), 0.0)
    recovery.on(Wait(0.5), 0.0)
    while dialled(recovery.on(TICK, now_s := recovery.next_deadline_s)) is None:
        pass
    recovery.on(Reached(1), now_s)
    recovery.on(Heard(), 0.6)
    assert PatienceOver() not in recovery.on(TICK, 0.7), "it is back"
    actions = recovery.on(Died("reset"), 0.8)
    assert AskPolicy("fault") not in actions
    assert PatienceOver() in recovery.on(TICK, 0.8)


# -- the numbers, the door, the page --


@pytest.mark.parametrize(
    "numbers",
    [
        {"base_s": 0.0},
        {"floor_s": -1.0},
        {"cap_s": math.inf},
        {"heartbeat_s": math.nan},
        {"suspect_share": 0.95},
        {"dead_share": 1.0},
        {"base_s": 9.0},
        {"attempt_s": 5.0},
        {"budget_s": -1.0},
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="recovery"):
        RecoveryRules(**numbers)


@given(
    gaps=st.lists(st.floats(0, 0.2), min_size=1, max_size=200),
    per_s=st.sampled_from([5.0, 50.0]),
    queue=st.integers(1, 60),
)
def test_a_door_takes_in_no_more_than_its_rate_and_promises_no_moment_twice(
    gaps: list[float], per_s: float, queue: int
) -> None:
    door, now_s, taken, promised = Door(per_s, queue), 0.0, [], []
    for gap in gaps:
        now_s += gap
        admitted, after_s = door.knock(now_s)
        assert after_s > 0
        (taken if admitted else promised).append(now_s + after_s)
        if admitted:
            assert after_s <= queue / per_s + CLOSE
    for moments in (taken, promised):
        assert all(later - sooner >= 1 / per_s - 1e-6 for sooner, later in pairwise(moments))


def brought_to(state: State) -> Recovery:
    """The shortest way there; an attempt is under way in probing and failed over."""
    recovery = make(RecoveryRules(budget_s=50.0))
    if state is State.CONNECTED:
        return recovery
    if state is State.SUSPECT:
        recovery.on(Expect(0.1), 0.0)
        recovery.on(TICK, 0.5)
        return recovery
    recovery.on(Died("reset"), 0.0)
    if state in (State.FAILED_OVER, State.RETURNING):
        recovery.on(Elsewhere(), 0.0)
    if state is not State.BACKING_OFF:
        attempt, now_s = until_dial(recovery)
        if state in (State.RESYNCING, State.RETURNING):
            recovery.on(Reached(attempt), now_s)
    return recovery


WORDS: dict[On, Event] = {
    On.HEARD: HEARD,
    On.EXPECT: Expect(0.1),
    On.IDLE: IDLE,
    On.DIED: Died("reset"),
    On.REACHED: Reached(1),
    On.UNREACHED: Unreached(1, "refused"),
    On.MISMATCH: Mismatch(1, "another model"),
    On.RESUMED: Resumed(held=True),
    On.WAIT: Wait(1.0),
    On.ELSEWHERE: Elsewhere(),
    On.GIVE_UP: GiveUp(),
}


@pytest.mark.parametrize(("state", "on"), list(TRANSITIONS), ids=str)
def test_the_machine_does_what_its_table_says(state: State, on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = brought_to(state)
    assert recovery.state is state
    followed: list[tuple[State, On]] = []
    follow = Recovery._follow
    monkeypatch.setattr(Recovery, "_follow", lambda r, o, e: (followed.append((r.state, o)), follow(r, o, e)))
    before = [Expect(0.1)] if on in (On.OVERDUE, On.SILENT, On.WOKE) else [HEARD] if on is On.QUIET else []
    if state is State.SUSPECT:
        before = []
    now_s = 0.0
    if on in WORDS:
        recovery.on(WORDS[on], now_s)
    elif on is On.SPENT:
        # An attempt is refused for longer than there is budget: the machine is backing off, and finds it spent.
        if state is State.BACKING_OFF:
            until_dial(recovery)
        recovery.on(Unreached(1, "full", retry_after_s=60.0), now_s)
    else:
        for event in before:
            recovery.on(event, now_s)
        if on is On.IMPATIENT:
            recovery.on(Wait(0.0), now_s)
        if on is On.DUE and state is State.FAILED_OVER:
            recovery.on(Unreached(1, "refused"), now_s)
        while (state, on) not in followed:
            late_s = 50.0 if on is On.WOKE and recovery._doubted else 0.0
            assert recovery.next_deadline_s < 100
            recovery.on(TICK, recovery.next_deadline_s + late_s)
    assert followed[-1] == (state, on)
    assert recovery.state is TRANSITIONS[state, on].to


def test_every_event_in_every_state_is_in_the_table_or_ignored_for_a_reason() -> None:
    for on in On:
        lacking = [state for state in State if (state, on) not in TRANSITIONS]
        assert not lacking or IGNORED[on], f"{on} in {lacking}"
    assert not any(state is State.GONE for state, _ in TRANSITIONS)
    assert {then.to for then in TRANSITIONS.values()} == set(State)


def test_the_page_holds_the_table_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs/recovery.md").read_text()
    assert table() in page, "run `python -m splitwise_llm.engine.transitions docs/recovery.md`"
    assert with_table(page) == page


def test_the_last_attempt_is_made_when_the_time_is_up_and_not_before() -> None:
    rules = RecoveryRules(budget_s=3.0)
    for seed in range(20):
        recovery = Recovery("cloud", rules, random.Random(seed), 0.0)
        recovery.on(Died("reset"), 10.0)
        dials = []
        while recovery.state is not State.GONE:
            attempt, now_s = until_dial(recovery)
            dials.append(now_s)
            recovery.on(Unreached(attempt, "refused"), now_s)
        assert dials[-1] == pytest.approx(13.0, abs=rules.floor_s)
