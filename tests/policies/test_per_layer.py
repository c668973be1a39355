"""What a network over the layers decides is one layout of actions, within every mask, whatever its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.cost import Floor, Host, Job, Limits, Load, World, obstacle
from splitwise_llm.decision import Decision
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.observation import EVERYTHING, MachineView, Observation
from splitwise_llm.partition import Partition
from splitwise_llm.policies import find_policy
from splitwise_llm.policies import network as high_level
from splitwise_llm.policies.choosers import find_chooser
from splitwise_llm.policies.layer_chooser import LayerChooser, layer_plans
from splitwise_llm.policies.menus import menu
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.per_layer import NUM_FIGURES, PAST, PerLayer, Site, read_network, shipped_network
from splitwise_llm.policies.per_layer_network import (
    HISTORY_WIDTH,
    PAST_FIGURES,
    STATE_WIDTH,
    STEP_INPUTS,
    WAVES,
    WIDTH,
    FfnMode,
    Network,
    Rules,
    shapes,
)
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights, find_device, find_model

SPEC = ModelSpec("llama", 6, 256, 8, 4, 32, 512, 100, 256, 3, False)
SHAPES = {
    "history.weight_ih_l0": (3 * HISTORY_WIDTH, PAST_FIGURES),
    "history.weight_hh_l0": (3 * HISTORY_WIDTH, HISTORY_WIDTH),
    "history.bias_ih_l0": (3 * HISTORY_WIDTH,), "history.bias_hh_l0": (3 * HISTORY_WIDTH,),
    "first.weight": (WIDTH, NUM_FIGURES + HISTORY_WIDTH), "first.bias": (WIDTH,),
    "second.weight": (STATE_WIDTH, WIDTH), "second.bias": (STATE_WIDTH,),
    "layers.weight_ih_l0": (3 * WIDTH, STEP_INPUTS + STATE_WIDTH), "layers.weight_hh_l0": (3 * WIDTH, WIDTH),
    "layers.bias_ih_l0": (3 * WIDTH,), "layers.bias_hh_l0": (3 * WIDTH,),
    "groups.weight": (1 + WAVES, WIDTH), "groups.bias": (1 + WAVES,), "ffn.weight": (3, WIDTH), "ffn.bias": (3,),
    "figures_mean": (NUM_FIGURES,), "past_mean": (PAST_FIGURES,),
}  # fmt: skip


def network(seed: int, copy: tuple[float, float] = (1.0, 1.0)) -> Network:
    dice = np.random.default_rng(seed)
    weights = {name: 0.7 * dice.standard_normal(shape) for name, shape in SHAPES.items()}
    return Network(
        weights | {"copy": np.array(copy), "figures_std": np.ones(NUM_FIGURES), "past_std": np.ones(PAST_FIGURES)}
    )


def tiny(memory_bytes: float = 1e9, workers: int = 1) -> World:
    hosts = [Host(DeviceSpec(f"m{n}", 1e12, 1e10, memory_bytes, slots=1 if n == 0 else 4)) for n in range(1 + workers)]
    return World(SPEC, tuple(hosts), {(0, n): LinkSpec(0.01, 1e6, 1e6) for n in range(1, 1 + workers)})


def observed(world: World, away: tuple[int, ...] = (), **changes: object) -> Observation:
    views = tuple(
        MachineView(f"m{n}", n not in away, 10**9, Dtype.FP16, Weights.FULL, profiled=True)
        for n in range(len(world.hosts))
    )
    return Observation(world.spec, views, 16, 16, world=world, **changes)  # type: ignore[arg-type]


def acted(
    site: Site, net: Network, rules: Rules | None = None, seed: int | None = None, count: int = 8
) -> list[Partition]:
    conditions = np.repeat(site.world.conditions()[None], count, axis=0)
    past = np.repeat(site.past(conditions, np.zeros((count, 4)), np.zeros(count))[:, None], PAST, axis=1)
    figures = site.figures(conditions, np.zeros((count, 4)), past)
    dice = None if seed is None else np.random.default_rng(seed)
    actions = net.act(figures, past, (rules or site.rules).repeated(count), dice)
    assert not (actions.ffn == FfnMode.INNER_CUT).any()
    return [site.partition(actions, n) for n in np.flatnonzero(actions.possible)]


def test_actions_are_laid_out_as_partitions_write_them() -> None:
    site = Site.of(tiny(), Job(16, 16), Limits(), 0.1)
    conditions = site.world.conditions()[None]
    past = np.zeros((1, PAST, PAST_FIGURES))
    actions = network(0).act(
        site.figures(conditions, np.zeros((1, 4)), past), past, site.rules, np.random.default_rng(1)
    )
    partition = site.partition(actions, 0)
    assert partition.embed == actions.ffn[0, 0]
    assert partition.head == actions.ffn[0, 7]
    for layer, placement in enumerate(partition.layers):
        # Dies when policies/per_layer_network.py says `range(0, layers)` for `range(1, layers + 1)`.
        assert placement.groups == tuple(actions.groups[0, layer + 1].astype(int))
        assert set(placement.shards) == {actions.ffn[0, layer + 1]}
    assert len({partition.embed, *partition.to_vector()}) == 2, "this seed uses both machines"


def test_the_same_seed_draws_the_same_plans() -> None:
    site = Site.of(tiny(), Job(16, 16), Limits(), 0.1)
    first, again, other = (acted(site, network(0), seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("seed", range(6))
def test_every_draw_keeps_floor_memory_and_reach(seed: int) -> None:
    job, net = Job(16, 16), network(seed, (0.0, 0.0))
    roomy = Site.of(tiny(), job, Limits(floor=Floor(2, 1)), 0.1)
    for partition in acted(roomy, net, seed=seed):
        assert Floor(2, 1).holds(partition)
    alone = acted(roomy, net, roomy.rules.without_cloud(np.array([True])), seed)
    assert alone == [Partition.all_on(SPEC, 0)] * 8
    whole = obstacle(tiny(6e6), Decision(Partition.all_on(SPEC, 0)), job)
    assert whole is not None
    assert "would hold" in whole, "no machine holds the model alone"
    world = tiny(6e6)
    small = Site.of(world, job, Limits(floor=Floor(1, 1)), 0.1)
    plans = acted(small, net, seed=seed)
    assert plans
    for partition in plans:
        # Dies when policies/per_layer_network.py says `size <= 9 * left` for `size <= left`.
        assert obstacle(world, Decision(partition), job, Limits(floor=Floor(1, 1))) is None


@pytest.mark.parametrize("seed", range(4))
def test_it_decides_for_any_worker_that_is_left(seed: int) -> None:
    policy = PerLayer(network(seed))
    three = tiny(workers=2)
    loads = {1: Load(slow=50.0, wait_s=9.0)}
    for away, allowed in (((), {0, 2}), ((2,), {0, 1}), ((1, 2), {0})):
        decision = policy.decide(observed(three, away, loads=loads, tools=EVERYTHING))
        assert set(decision.partition.machines) <= allowed
    assert policy.decide(observed(tiny(workers=0))).partition == Partition.all_on(SPEC, 0)


def test_where_nothing_is_known_or_admissible_it_says_so() -> None:
    policy = PerLayer(network(0))
    with pytest.raises(RequestError, match="needs figures"):
        policy.decide(replace(observed(tiny()), world=None))
    with pytest.raises(RequestError, match="no partition is admissible"):
        policy.decide(observed(tiny(), (1,), limits=Limits(only=frozenset())))


def test_a_table_has_what_it_decides_and_the_chooser_finds_it() -> None:
    spec, job, limits = find_model("gpt2"), Job(64, 64), Limits()
    hosts = (Host(find_device("orin-nx-16gb"), Dtype.FP16, Weights.INT4), Host(find_device("a100-80gb")))
    world = World(spec, hosts, {(0, 1): LinkSpec(0.02, 6e6, 6e6)})
    policy, tools = PerLayer(network(2)), replace(EVERYTHING, chunks=(None,))
    states = [world.conditions({1: world.load(1, 64, 1.0)})]
    plans = layer_plans(policy, world, job, tools, limits, states, 0.1)
    assert 1 <= len(plans) <= 12
    table = menu(world, job, (tools,), limits, states, [Latency()], plans)
    assert set(plans) <= {bill.decision for bill in table.bills}
    chooser = LayerChooser(policy, lambda decision: True, limits, 0.1)
    from splitwise_llm.bench.cells import idle_question  # noqa: PLC0415

    question = idle_question(table)
    site = Site.of(world, job, limits, 0.1)
    chosen = table.bills[int(chooser.choose(question)[0])].decision
    actions = policy.act(site, question.conditions, question.queues, site.rules)
    assert chosen.partition == site.partition(actions, 0)
    running = replace(question, current=np.array([0]))
    assert chooser.choose(running).tolist() == [-1]
    near = replace(
        question, admissible=question.admissible & np.array([bill.decision != chosen for bill in table.bills])
    )
    assert table.bills[int(chooser.choose(near)[0])].decision != chosen


@pytest.mark.parametrize(
    ("model", "link", "machine"),
    [
        ("llama-7b", LinkSpec(0.01, 2e7, 2e7), 1), ("gpt2-xl", LinkSpec(0.01, 2e7, 2e7), 1),
        ("llama-7b", LinkSpec(0.05, 1e6, 1e6), 1), ("gpt2", LinkSpec(0.2, 6.3e4, 6.3e4), 0),
    ],
)  # fmt: skip
def test_the_shipped_weights_are_small_and_know_the_plain_cases(model: str, link: LinkSpec, machine: int) -> None:
    file = resources.files("splitwise_llm") / "data/policies/per_layer.npz"
    assert len(file.read_bytes()) <= 500_000
    spec = find_model(model)
    hosts = (Host(find_device("orin-nx-16gb"), Dtype.FP16, Weights.INT4), Host(find_device("a100-80gb")))
    seen = observed(World(spec, hosts, {(0, 1): link}), arrivals_per_s=0.05)
    seen = replace(seen, prompt_tokens=128, max_new_tokens=128)
    decided = {name: find_policy(name).decide(seen).partition for name in ("splitwise-paper", "drift")}
    assert decided == dict.fromkeys(decided, Partition.all_on(spec, machine))


def test_the_simulator_is_given_a_chooser() -> None:
    assert isinstance(find_chooser("splitwise-paper", EVERYTHING, Limits()), LayerChooser)


def test_weights_of_ones_own_are_read_and_what_are_none_says_so(tmp_path: Path) -> None:
    shipped = Path(str(resources.files("splitwise_llm") / "data/policies/per_layer.npz"))
    policy = find_policy(f"splitwise-paper:{shipped}")
    assert isinstance(policy, PerLayer)
    assert policy.weights.weights.keys() == shipped_network().weights.keys() == shapes(NUM_FIGURES).keys()
    with np.load(shipped) as arrays:
        other = {name: arrays[name] for name in arrays.files} | {"copy": np.zeros(3)}
    for name, content in (("short", {"copy": other["copy"]}), ("wide", other)):
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(ModelError, match=rf"{name}.npz: .* of \(\d+,\) is not there"):
            read_network(tmp_path / f"{name}.npz")
    with pytest.raises(ModelError, match="no weights of splitwise-paper"):
        read_network(tmp_path / "none.npz")


# Dies when policies/network.py says `TypeError, RuntimeError, BadZipFile)` for
# `TypeError, RuntimeError, BadZipFile, zlib.error)`.
# Dies when policies/network.py says `TypeError, BadZipFile, ` for `TypeError, RuntimeError, BadZipFile, `.
@pytest.mark.parametrize(("name", "read"), [("per_layer", read_network), ("splitwise", high_level.Network.load)])
def test_weights_with_spoiled_bytes_say_so(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    whole = (resources.files("splitwise_llm") / f"data/policies/{name}.npz").read_bytes()
    data = 30 + int.from_bytes(whole[26:28], "little") + int.from_bytes(whole[28:30], "little")
    file = tmp_path / "spoiled.npz"
    for at, value, why in (
        (data, 0xFF, "invalid block type"),
        (whole.index(b"PK\x01\x02") + 8, 1, "encrypted"),
    ):
        file.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with pytest.raises(ModelError, match=rf"spoiled.npz: no weights .*{why}"):
            read(file)
