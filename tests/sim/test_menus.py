"""Decisions for many at a time are those for one at a time, priced bill by bill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from test_worlds import BUSY, Chance
from worlds import Exact

from splitwise_llm import lyapunov
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import Menu
from splitwise_llm.plan import DEVICE
from splitwise_llm.sim.asking import questions
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import Run

CHOOSER = Exact(Penalty(t_ref_s=2.0, w_energy=0.1, e_ref_j=10.0), Budgets(energy_j=30.0))


def menus(count: int) -> Iterator[Menu]:
    """Menus from worlds in which everything is decided by chance."""
    traces = draw(BUSY, 11, range(64), 20)
    run = Run.begin(BUSY, traces, Chance())
    made = 0
    while made < count and not run.state.is_over.all():
        for question in questions(BUSY, traces, run.state):
            made += len(question.slots[0])
            yield question.menu
            run.take(question, run.chooser.choose(question.menu))
        run.advance()


def bill_by_bill(menu: Menu, n: int) -> int:
    """The best plan for system n, in scalars, without `Table`."""
    x, penalty, best = menu.conditions[n], CHOOSER.penalty, (np.inf, -1)
    device = menu.table.world.hosts[DEVICE].device
    later, fresh = float(menu.remaining_tokens[n]), menu.current[n] < 0
    for number, bill in enumerate(menu.table.bills):
        if not menu.admissible[n, number]:
            continue
        tpot = float(bill.tpot.at(x))
        first = float(bill.ttft.at(x)) if fresh else float(menu.entry_s[n, number])
        wait = float(bill.wait.at(x)) if fresh else 0.0
        service = first + later * tpot
        token, prompt = bill.token, bill.prompt
        if fresh:
            work = [float(form @ x) for form in (prompt.device_s, prompt.up_s, prompt.down_s, prompt.cloud_s)]
            joules = float(prompt.device_j @ x)
        else:
            work = [float(menu.entry_device_s[n, number]), 0.0, 0.0, float(menu.entry_cloud_s[n, number])]
            joules = work[0] * (device.prefill_w - device.idle_w)
        each = [float(form @ x) for form in (token.device_s, token.up_s, token.down_s, token.cloud_s)]
        slots = 1 / 48 if 1 in bill.decision.partition.machines else 0.0
        work = [w + later * t for w, t in zip(work, each, strict=True)]
        work[3] += slots * later * tpot
        joules += later * float(token.device_j @ x) + device.idle_w * (wait + service)
        value = service / penalty.t_ref_s + penalty.w_energy * joules / penalty.e_ref_j
        value += min(wait, penalty.wait_cap_s) / penalty.t_ref_s
        value += sum((q * w + w * w / 2) / penalty.t_ref_s for q, w in zip(menu.queues[n], work, strict=True))
        value += float(menu.virtual[n, 0]) * (joules / 30.0 - 1)
        best = min(best, (value, number))
    return best[1]


def test_decisions_for_many_are_those_for_one_bill_by_bill() -> None:
    """At admission and in flight. Dies when a queue, an entry or a wait is put in the row of another system."""
    rng, checked, in_flight = np.random.default_rng(1), 0, 0
    for menu in menus(1500):
        shaken = replace(menu, virtual=menu.virtual + rng.exponential(1.0, menu.virtual.shape))
        choices = CHOOSER.choose(shaken)
        for n in range(len(choices)):
            assert choices[n] == bill_by_bill(shaken, n)
            checked += 1
            in_flight += int(shaken.current[n] >= 0)
    assert checked >= 1500
    assert in_flight > 500


def test_a_row_of_a_menu_asked_alone_gets_the_same_answer() -> None:
    for menu in menus(800):
        together = CHOOSER.choose(menu)
        for n in range(len(together)):
            assert CHOOSER.choose(menu.at(np.array([n])))[0] == together[n]


def test_what_a_menu_says_of_queues_is_the_work_of_the_others() -> None:
    """Never negative, nothing at an idle device, and the asker's own work is not in it."""
    traces = draw(BUSY, 12, range(64), 10)
    run = Run.begin(BUSY, traces, CHOOSER)
    alone = 0
    while not run.state.is_over.all():
        for question in questions(BUSY, traces, run.state):
            e, d, _ = question.slots
            assert (question.menu.queues >= 0).all()
            single = run.state.num_in_flight[e, d] == 1
            assert (question.menu.queues[single] == 0).all()
            alone += int(single.sum())
            run.take(question, CHOOSER.choose(question.menu))
        run.advance()
    assert alone > 100


@pytest.mark.parametrize("bad", [-3, 7])
def test_an_answer_that_is_no_plan_is_an_error(bad: int) -> None:
    traces = draw(BUSY, 12, [0], 1)
    run = Run.begin(BUSY, traces, CHOOSER)
    while not run.state.is_asking.any():
        run.advance()
    question = next(iter(questions(BUSY, traces, run.state)))
    with pytest.raises(ValueError, match="a plan below 7"):
        run.take(question, np.array([bad]))


def test_virtual_queues_enter_the_menu_as_lyapunov_keeps_them() -> None:
    params = replace(BUSY, budgets=Budgets(energy_j=1.0))
    traces = draw(params, 3, [0], 4)
    run = Run.begin(params, traces, CHOOSER)
    seen = []
    while not run.state.is_over.all():
        for question in questions(params, traces, run.state):
            seen.append(float(question.menu.virtual[0, 0]))
            run.take(question, np.array([0]))
        run.advance()
    assert seen[0] == 0.0
    assert max(seen) == pytest.approx(lyapunov.CAP)
