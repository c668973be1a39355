"""What the reproductions rest on: the simulated pipeline, the queueing model, the environments, the table's form."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from splitwise_llm.bench import dynopipe, edgeshard, tensor_parallel
from splitwise_llm.bench.comparison import Fact, Listing, Row
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.layer_splitting import negative_log_likelihoods, passages, session
from splitwise_llm.bench.pipeline import Barrier, Station, completions, stations, steady_per_s
from splitwise_llm.bench.reproductions import Result, to_markdown
from splitwise_llm.bench.splitting_envs import SplittingEnv, fit_surrogate, learn, moving_table, table_nats
from splitwise_llm.cost import Host, Job, World, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.policies.chains import Flow, chain
from splitwise_llm.policies.pipelines import best_throughput, exact_latency
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec
from splitwise_llm.wire.codec import ElementLoss

SPEC = ModelSpec("llama", 12, 512, 4, 4, 128, 1024, 100, 256, 3, False)


def four_machines(bytes_per_s: float = 2e6, rtt_s: float = 0.004) -> World:
    speeds = (1e9, 2e9, 1.5e9, 4e9)
    hosts = tuple(
        Host(DeviceSpec(f"m{n}", 100 * speed, speed, 4.5e7, message_s=1e-4)) for n, speed in enumerate(speeds)
    )
    links = {(a, b): LinkSpec(rtt_s, bytes_per_s * (1 + a / 2), bytes_per_s) for a in range(4) for b in range(a + 1, 4)}
    return World(SPEC, hosts, links)


def test_a_lone_micro_batch_takes_what_the_route_is_priced() -> None:
    world, job = four_machines(), Job(8, 16)
    route = exact_latency(chain(world, job))
    assert route is not None
    assert len(route.spans) > 1
    alone = completions(stations(world, job, route, Flow()), 1, job.tokens_out, 1)[0]
    assert alone == pytest.approx(price(world, Decision(route.partition(SPEC), WirePrecision.FP32), job).total_s)


@pytest.mark.parametrize("flow", [Flow(1, 48), Flow(2, 48)])
@pytest.mark.parametrize("link_bound", [False, True])
def test_a_full_pipeline_agrees_with_the_programs_bottleneck_within_two_per_cent(flow: Flow, link_bound: bool) -> None:
    """Killed by a crossing that keeps its link busy for the delay, too, and by a program that forgets the links."""
    world, job = four_machines(5e4, 0.1) if link_bound else four_machines(), Job(8, 16)
    route = best_throughput(chain(world, job, flow=flow, occupancy=True), chain(world, job, flow=flow))
    assert route is not None
    assert len(route.spans) > 1
    line = stations(world, job, route, flow)
    busiest = max(range(len(line)), key=lambda n: line[n].prompt_s + line[n].token_s * (job.tokens_out - 1))
    assert busiest % 2 == link_bound  # a machine, a link, a machine, ...
    times = completions(line, flow.in_flight, job.tokens_out, 16 * flow.in_flight)
    assert steady_per_s(times, flow.in_flight) == pytest.approx(1 / route.seconds, rel=0.02)


def test_waiting_for_one_another_leaves_bubbles() -> None:
    line = [Station(3.0, 1.0), Station(2.0, 1.0), Station(3.0, 1.0)]
    rates = [
        steady_per_s(completions(line, 4, 10, 48, barrier), 4)
        for barrier in (Barrier.NONE, Barrier.PROMPT, Barrier.EVERY)
    ]
    assert rates[0] > rates[1] > rates[2]
    assert rates[0] <= 1 / 12.0 * (1 + 1e-9)


def test_a_line_that_runs_dry_answers_no_more_than_it_was_given() -> None:
    """Two stations of 1 s and 2 s, two tokens each: one sequence alone takes 6 s; of three, two at a time, the second
    station works from 1 s to 13 s without a break, unless another one follows and stands in the last one's way."""
    line = [Station(1.0, 1.0), Station(2.0, 2.0)]
    assert completions(line, 2, 2, 1, runs_dry=True) == [6.0]
    assert completions(line, 2, 2, 3, runs_dry=True)[-1] == 14.0
    # Dies when bench/pipeline.py says `if runs_dry and begun == 2 * number:` for `if runs_dry and begun == number:`.
    assert len(completions(line, 2, 2, 3, runs_dry=True)) == 3
    assert completions(line, 2, 2, 3)[-1] == 15.0


def test_a_single_station_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: rho s / (2 (1 - rho)); a faster station before it changes no total wait."""
    gaps = dynopipe.poisson(np.random.default_rng(1), 5.0, (400, 4000))
    expected = 0.6 * 0.12 / (2 * 0.4)
    assert dynopipe.waits(gaps, 0.0, 0.12)[:, 500:].mean() == pytest.approx(expected, rel=0.03)
    assert dynopipe.waits(gaps, 0.1, 0.12)[:, 500:].mean() == pytest.approx(expected, rel=0.03)


def test_bursty_gaps_have_the_mean_and_variation_asked_for() -> None:
    gaps = dynopipe.bursty(np.random.default_rng(1), 4.0, (1000, 1000))
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(2.5, rel=0.03)


def test_dynopipes_case_cloud_only_wins_alone_and_a_split_of_twelve_under_load() -> None:
    alone = {split: sum(dynopipe.service_s(split)) + dynopipe.network_s(split, 0.005) for split in range(33)}
    assert min(alone, key=alone.__getitem__) == 0
    assert alone[12] == pytest.approx(0.215, rel=0.01)
    loaded = {split: dynopipe.latency(split, 5, 0.005, runs=500).mean_s for split in range(0, 33, 4)}
    assert min(loaded, key=loaded.__getitem__) == 12


def test_edgeshards_testbed_holds_what_it_held_and_gains_what_it_gained() -> None:
    bed = edgeshard.METRO
    seven, thirteen, seventy = (edgeshard.latencies(f"llama-2-{size}", bed) for size in ("7b", "13b", "70b"))
    assert seven.solo
    assert seven.published
    assert seven.solo / seven.published == pytest.approx(140.3 / 75.88, rel=0.25)
    assert (thirteen.solo, thirteen.even, seventy.solo, seventy.even, seventy.opt) == (None,) * 5
    assert thirteen.exact
    halved = edgeshard.latencies("llama-2-13b", replace(bed, dtype=Dtype.FP16))
    assert halved.solo, "full precision cannot have been fp16: 13B would have fitted a board"
    assert seventy.plan
    assert len(seventy.plan.machines) <= 12
    for found in (seven, thirteen, seventy):
        assert found.exact
        assert found.published
        assert found.exact <= found.published * (1 + 1e-12)


def test_boards_share_layers_and_nothing_is_shared_with_an_a100() -> None:
    alone, two, four = (tensor_parallel.shared_tokens_per_s(count) for count in (1, 2, 4))
    assert (alone, two, four) == (
        pytest.approx(2.26, rel=0.2),
        pytest.approx(2.92, rel=0.2),
        pytest.approx(4.56, rel=0.2),
    )
    assert two / tensor_parallel.layers_tokens_per_s(2) == pytest.approx(1.29, rel=0.1)
    assert not tensor_parallel.beside_a100(job=Job(8, 8), fractions=(1, 16, 31)).is_anything_shared


@pytest.mark.parametrize("plain", [True, False])
def test_the_released_environments_pass_the_checker_and_start_where_they_say(plain: bool) -> None:
    table = moving_table()
    env = SplittingEnv(7, nats=table_nats(table)) if plain else SplittingEnv(7, accuracy=lambda loss, split: 0.0)
    check_env(env, skip_render_check=True)
    starts = [env.reset(seed=seed)[0] for seed in range(200)]
    low, high = ((0.08, 3), (0.22, 6)) if plain else ((0.01, 1), (0.3, 6))
    assert (np.min(starts, axis=0) >= np.float32(low)).all()
    assert (np.max(starts, axis=0) <= np.float32(high)).all()
    env.reset(options={"loss": 0.2, "split": 6})
    ends = [env.step(np.int64(1)) for _ in range(5)]
    assert [end[2] for end in ends] == [False] * 4 + [True]
    assert env.split == (2 if plain else 1)


def test_the_rewards_are_the_released_ones() -> None:
    env = SplittingEnv(7, nats=table_nats(moving_table()))
    env.reset(options={"loss": 0.15, "split": 4})
    wanted = 10.5 * (1 - np.exp(0.001 * (5 - 3))) + 5 / 7  # split 2 after 4
    assert env.step(np.int64(1))[1] == pytest.approx(wanted, rel=1e-2)
    surrogate = SplittingEnv(7, accuracy=lambda loss, split: loss * split)
    surrogate.reset(options={"loss": 0.1, "split": 4})
    assert surrogate.step(np.int64(2))[1] == pytest.approx(10 * 0.1 * 0.9995 * 5 + 2 / 7)


def test_the_surrogate_follows_its_table() -> None:
    accuracy, error = fit_surrogate(moving_table(), steps=500)
    assert error < 0.01
    assert accuracy(0.3, 1) == pytest.approx(1 - np.exp(0.06 * 7), abs=0.01)


def test_a_real_session_loses_what_the_reference_pass_loses() -> None:
    """The table's figures are those of sessions: the same elements of the same positions."""
    passage = passages()[0][:60]
    loss = ElementLoss(0.2, seed=3)
    real = asyncio.run(session(passage, 3, loss))
    assert negative_log_likelihoods(passage, 3, loss) == pytest.approx(real, abs=1e-4)


@pytest.mark.long
def test_the_learner_finds_an_optimum_that_moves_with_the_loss() -> None:
    env = SplittingEnv(7, nats=table_nats(moving_table()))
    found = learn(env, (0.08, 0.1, 0.12, 0.2, 0.22), 20_000, is_scaled=True)
    assert set(found.optimum.values()) == {1, 7}
    assert found.optimal_share > 0.8


def test_a_miss_is_called_a_miss() -> None:
    assert [Row("s", "n", "w", ours, 4.0).verdict for ours in (3.0, 5.0, 2.9, 5.1, None)] == ["yes"] * 2 + ["miss"] * 3
    assert Row("s", "n", "w", 1.0, None).verdict == ""
    assert Row("s", "n", "w", 1.0, 9.0, "", True).verdict == "calibrated"
    assert Fact("s", "w", published=True, ours=False).verdict == "miss"
    rows = (Row("s", "n", "what", None, 2.0, "because"),)
    facts, listings = (Fact("s", "w", published=True, ours=True),), (Listing("t", "r", (("a",), ("b",))),)
    page = to_markdown(Result(Figures("x", {}, {"compared": 1, "missed": 1}), rows, facts, listings))
    assert "| s | what | does not fit | 2 | - | miss | because |" in page
    assert "| s | w | yes | yes | yes |" in page
