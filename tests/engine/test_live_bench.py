"""The bench of running sessions beside the simulator: the same requests, the same link, and honest sums."""

from __future__ import annotations

import numpy as np
import pytest

from policies.neutral_networks import network
from splitwise_llm.bench import live
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.live import DEVICE, POOR, WORKER, Setting, agreement, draw_requests, outages, scaled, trace
from splitwise_llm.bench.live_client import Answered, Asked, Client, Stretch, mode_of
from splitwise_llm.cost import UNLIMITED, Host, Job
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.spec import Dtype, Weights, find_device, find_model
from splitwise_llm.wire.shaper import LinkShape

SHORT = Setting(seconds=4.0, clients=1, per_s=0.3, new_tokens=(6,), outage_every_s=40.0)


def test_the_link_has_its_outages_and_both_classes() -> None:
    setting = Setting()
    link = trace(setting)
    out = outages(link)
    assert len([one for one in out if one[1] < setting.seconds]) == 5
    assert all(stop - start == pytest.approx(setting.outage_s) for start, stop in out)
    assert {POOR, 0.0} <= set(link.bytes_per_s)
    assert link.period_s > setting.seconds


def test_requests_are_the_same_for_the_same_seed_and_come_in_time() -> None:
    setting = Setting()
    assert draw_requests(setting) == draw_requests(setting)
    assert len(draw_requests(setting)) == 3
    rate = np.mean([len(of_client) for of_client in draw_requests(setting)]) / setting.seconds
    assert rate == pytest.approx(setting.per_s, rel=0.3)
    assert all(0 <= one.at_s <= setting.seconds for of_client in draw_requests(setting) for one in of_client)


def test_the_simulator_gets_the_very_requests_and_the_very_link() -> None:
    """One request on a quiet link takes what its plan costs, a detection and an opening beside."""
    setting = Setting.quick()
    at = 2.0
    asked = ((Asked(at, 64, 48),), (Asked(90.0, 64, 48),), (Asked(95.0, 64, 48),))
    totals, modes = live.simulated(setting, Splitwise(weights=network()), trace(setting), asked)
    assert [len(one) for one in totals] == [1, 1, 1]
    assert 3.0 < totals[0][0] < 6.0
    assert modes["cloud"][int(at) + 1] == 1
    assert int(totals[0][0]) <= sum(modes["cloud"]) <= int(totals[0][0]) + 1
    assert not any(modes["edge"])


def test_a_small_model_takes_as_long_as_the_one_that_it_plays() -> None:
    spec, small = find_model("llama-7b"), find_model("bundled")
    real = Host(find_device("orin-nx"), Dtype.FP16, Weights.INT4)
    played = Host(scaled(real, spec, small, Job(64, 24), 5.0), Dtype.FP32)
    for rows, context in ((64, 64), (1, 76)):
        assert played.model_s(small, rows, context) == pytest.approx(5 * real.model_s(spec, rows, context), rel=0.1)


def test_sums_and_modes_are_those_of_the_answers() -> None:
    assert (mode_of("all:edge"), mode_of("all:cloud"), mode_of("edge[0:4] cloud[4:8]")) == ("edge", "cloud", "split")
    one = Answered(1.0, 4.0, 0.5, 6, (Stretch(1.5, "cloud"), Stretch(3.2, "edge")), ())
    modes = live.live_modes([[one]], SHORT)
    assert modes == {"edge": [0, 0, 0, 0, 1], "cloud": [0, 0, 1, 1, 0], "split": [0, 0, 0, 0, 0]}
    assert agreement(modes, modes) == 1.0
    assert agreement(modes, modes | {"cloud": [0, 0, 1, 0, 0], "edge": [0, 0, 0, 1, 1]}) == pytest.approx(2 / 3)
    figures = Figures("live")
    live.summarise(figures, [[one]], [[2.0]])
    assert figures.figures["mean_over_simulated"] == 2.0
    assert figures.figures["live_moves"] == 1


def test_a_client_that_dies_says_why() -> None:
    client = Client(
        "no-such-model", "127.0.0.1:1", DEVICE, LinkShape(), "drift", None, UNLIMITED, live.TOOLS, (Asked(0.0, 4, 2),)
    )  # fmt: skip
    with pytest.raises(BrokenInvariant, match=r"client 0 of the bench died: .*no-such-model"):
        live.play([client], 1.0)


@pytest.mark.long
def test_a_live_run_stands_beside_the_simulated_one() -> None:
    compared = live.run_live(SHORT, "splitwise", lambda _: None, network())
    figures = compared.figures.figures
    assert figures["failed"] == 0
    assert figures["requests"] == sum(map(len, compared.requests))
    assert 0.5 < figures["mean_over_simulated"] < 3.0
    assert compared.to_dict()["cells"] == []
    assert WORKER.slots > 1
    assert next(compared.modes_text()).startswith("modes")
