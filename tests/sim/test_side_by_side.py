"""Several decision makers on the same traces at a time: nobody may notice the others."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from worlds import CLOUD, EDGE, LINK, Exact, Only, U, table

from splitwise_llm.cost import Job
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import Menu
from splitwise_llm.sim import episode
from splitwise_llm.sim.draws import draw
from splitwise_llm.sim.episode import Records, simulate, simulate_each
from splitwise_llm.sim.params import Arrivals, CloudProcess, LinkClass, LinkProcess, Params, SharedCloud
from splitwise_llm.sim.physics import Physics

PHYSICS = Physics([table()])
UP = LinkClass.of(LINK, 6.0)
FLAKY = LinkProcess((UP, LinkClass(UP.rtt_s, UP.up_bytes_per_s, UP.down_bytes_per_s, 2.0, is_up=False)))
PENALTY = Penalty(t_ref_s=1.0)
CHOOSERS = [
    Exact(PENALTY), Only(U, in_flight=False), Exact(PENALTY, in_flight=False), Only(EDGE), Only(CLOUD, in_flight=False),
    Exact(Penalty(t_ref_s=3.0)),
]  # fmt: skip


def settings(cloud: CloudProcess | SharedCloud, devices: int) -> Params:
    budgets = Budgets(energy_j=30.0, battery_w=20.0)
    return Params(PHYSICS, FLAKY, cloud, Arrivals(0.2), penalty=PENALTY, budgets=budgets, num_devices=devices)


def assert_same(these: Records, those: Records) -> None:
    for item in fields(Records):
        if item.name not in ("params", "traces"):
            one, other = getattr(these, item.name), getattr(those, item.name)
            np.testing.assert_array_equal(one, other, err_msg=item.name)


# Dies when sim/endings.py says `some["world"] })` for `some["world"] - worlds.start})`.
@pytest.mark.parametrize("worlds", [1, 3])
@pytest.mark.parametrize(("cloud", "devices"), [(CloudProcess(), 1), (SharedCloud(3), 8)])
def test_each_gets_the_very_figures_it_would_get_alone(
    cloud: CloudProcess | SharedCloud, devices: int, worlds: int
) -> None:
    params = settings(cloud, devices)
    traces = draw(params, 4, range(worlds), 5, 0.2)
    for chooser, records in zip(CHOOSERS, simulate_each(params, traces, CHOOSERS), strict=True):
        assert_same(records, simulate(params, traces, chooser))


def test_more_devices_than_go_together_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    params = settings(CloudProcess(), 1)
    traces = draw(params, 4, range(2), 4)
    whole = simulate_each(params, traces, CHOOSERS)
    monkeypatch.setattr(episode, "SIDE_BY_SIDE", 5)
    for one, other in zip(simulate_each(params, traces, CHOOSERS), whole, strict=True):
        assert_same(one, other)


# Dies when sim/episode.py says `if not chosen:` for `if chosen[-1].shape != (last - first,):`.
@pytest.mark.parametrize("answers", [1, 2])
def test_too_few_answers_are_an_error_and_are_not_laid_over_all(answers: int) -> None:
    class Terse:
        def choose(self, menu: Menu) -> NDArray[np.int64]:
            return np.zeros(answers, np.int64)

    params = settings(CloudProcess(), 1)
    traces = draw(params, 4, range(3), 2, 0.2)
    with pytest.raises(ValueError, match=r"answered .* about \d systems"):
        simulate_each(params, traces, [Terse(), Only(EDGE)])


def test_the_same_figures_with_several_tables_until_a_moment_and_on_a_battery() -> None:
    several = Physics([table(), table(job=Job(512, 64)), table(), table(job=Job(512, 64))])
    asleep = replace(FLAKY, idle_after_s=1.0, wake_s=0.3)
    params = replace(
        settings(CloudProcess(), 2), physics=several, link=asleep, kinds=(0, 1), prompt_classes=(128, 512),
        battery=True, failed_moves=0.3,
    )  # fmt: skip
    traces = draw(params, 4, range(2), 3, 0.2)
    for chooser, records in zip(CHOOSERS, simulate_each(params, traces, CHOOSERS, 12.0), strict=True):
        assert_same(records, simulate(params, traces, chooser, 12.0))


def test_nobody_is_simulated_for_nobody() -> None:
    params = settings(CloudProcess(), 1)
    assert simulate_each(params, draw(params, 4, [0], 1), []) == []


# Dies when sim/physics.py says `pairwise((0, len(conditions)))` for `pairwise((0, *(ends or (len(conditions),))))`.
def test_what_is_asked_beside_it_does_not_round_a_price_otherwise() -> None:
    x = np.random.default_rng(0).uniform(0.5, 2.0, (64, PHYSICS._forms.shape[-1]))
    together = PHYSICS.all_units(0, 0, x, list(range(1, 65)))
    each = np.concatenate([PHYSICS.all_units(0, 0, row) for row in x[:, None]])
    np.testing.assert_array_equal(together, each)
