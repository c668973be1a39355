"""When dividing a sub-block between two machines pays: the mistakes of joins that are free and of links without delay.

With e and c the times of two machines for a sub-block, the best division takes e c / (e + c), so it saves
min(e, c)^2 / (e + c) and pays if that is more than an exchange of partial sums costs.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import CHAT, FP16, LINKS, box, edge_and_cloud, model, on, only, shipped, world
from splitwise_llm.cost import Host, Job, World, bill, price
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.partition import Part, Partition
from splitwise_llm.spec import DeviceSpec, LinkSpec, ModelSpec, Weights

EIGHTHS = ModelSpec("llama", 8, 1024, 8, 8, 128, 4096, 1000, 4096, 3, False)


def times(device: DeviceSpec, factor: float) -> DeviceSpec:
    return box(
        flop_per_s=device.flop_per_s * factor,
        memory_bytes_per_s=device.memory_bytes_per_s * factor,
        message_s=device.message_s,
    )


def half_s(here: World, machine: int, part: Part, rows: int, context: int) -> float:
    """e or c: one machine alone."""
    return here.hosts[machine].half_s(here.spec, part, 8, rows, context)


# Dies when cost/hosts.py says `units = 8 * sum(1 for share` for `units = sum(len(share.units) for share`.
@pytest.mark.parametrize("eighths", range(1, 8))
def test_without_delay_a_shared_half_takes_e_c_over_e_plus_c(eighths: int) -> None:
    here = world(EIGHTHS, box(), times(box(), eighths / (8 - eighths)))
    shared = Partition.shared(EIGHTHS, {0: 8 - eighths, 1: eighths})
    one = bill(here, Decision(shared, FP16), CHAT)

    def ideal(rows: int, context: int) -> float:
        total = here.hosts[0].head_s(EIGHTHS)
        for part in Part:
            e, c = (half_s(here, machine, part, rows, context) for machine in (0, 1))
            total += EIGHTHS.num_layers * e * c / (e + c)
        return total

    x = only(here, slow=1.0)
    assert one.tpot.at(x) == pytest.approx(ideal(1, CHAT.mean_context))
    assert one.ttft.at(x) == pytest.approx(ideal(128, 128))


# Dies when cost/bill.py says `form += 0 * basis.form({0: software_s` for `form += basis.form({0: software_s`.
@pytest.mark.parametrize("exchange_over_saving", [0.8, 0.9, 1.1, 1.2])
def test_sharing_pays_if_and_only_if_the_exchange_costs_less_than_it_saves(exchange_over_saving: float) -> None:
    fast = world(EIGHTHS, box(), times(box(), 1 / 3))
    saved = 0.0
    for part in Part:
        e, c = (half_s(fast, machine, part, 1, CHAT.mean_context) for machine in (0, 1))
        saved += EIGHTHS.num_layers * min(e, c) ** 2 / (e + c)
    crossings = 2 * EIGHTHS.num_layers + 1  # the stream must first reach the other machine
    one_way = exchange_over_saving * saved / crossings
    here = world(EIGHTHS, box(), times(box(), 1 / 3), link=LinkSpec(2 * one_way, 1e11, 1e11))
    shared = price(here, Decision(Partition.shared(EIGHTHS, {0: 6, 1: 2}), FP16), CHAT)
    alone = price(here, on(EIGHTHS, 0), CHAT)
    assert (shared.tpot_s < alone.tpot_s) == (exchange_over_saving < 1)


# Dies when cost/bill.py says `form += 0 * basis.form({0: software_s` for `form += basis.form({0: software_s`.
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("edge", ["orin-nx", "s23", "pi5"])
def test_beside_a_datacentre_card_any_division_is_worse_than_a_cut(edge: str, link: str) -> None:
    here = edge_and_cloud(edge, "a100", link=link)
    layers = here.spec.num_layers
    cuts = [price(here, Decision(Partition.cut(here.spec, at), FP16), CHAT) for at in (1, layers / 2, layers - 1)]
    for units in (1, 8, 16):
        for chosen in (range(layers), [layers // 2]):
            partition = Partition.shared(here.spec, {0: units, 1: 32 - units}, chosen, home=1)
            divided = price(here, Decision(partition, FP16), CHAT)
            assert divided.tpot_s > price(here, on(here.spec, 1), CHAT).tpot_s
            assert divided.total_s > price(here, on(here.spec, 1), CHAT).total_s
            if len(chosen) > 1:
                assert divided.tpot_s > min(cut.tpot_s for cut in cuts)


def boards(number: int, name: str = "llama-2-7b") -> World:
    """Raspberry Pi 5 on a gigabit switch, every one with a link to every other."""
    host = Host(shipped("pi5:distributed-llama"), weights=Weights.INT4)
    pairs = {(a, b): LINKS["lan"] for b in range(number) for a in range(b)}
    return World(model(name), (host,) * number, pairs)


def board_tokens_per_s(number: int, name: str = "llama-2-7b") -> float:
    here, short = boards(number, name), Job(32, 32)
    whole = Partition.shared(here.spec, dict.fromkeys(range(number), 1.0))
    return 1 / price(here, Decision(whole, WirePrecision.INT8), short).tpot_s


# Dies when cost/bill.py says `form += 0 * basis.form({0: software_s` for `form += basis.form({0: software_s`.
@pytest.mark.parametrize(
    ("number", "name", "published"),
    [
        (1, "llama-2-7b", 2.26),
        (2, "llama-2-7b", 2.92),
        (4, "llama-2-7b", 4.56),
        (1, "llama-3.1-8b", 1.77),
        (2, "llama-3.1-8b", 2.25),
        (4, "llama-3.1-8b", 3.01),
    ],
)
def test_boards_that_share_every_half_give_the_published_speeds_within_a_fifth(
    number: int, name: str, published: float
) -> None:
    assert board_tokens_per_s(number, name) == pytest.approx(published, rel=0.2)


def test_two_boards_on_a_lan_without_software_overhead_would_gain_about_1_6() -> None:
    here = boards(2)
    device = here.hosts[0].device
    quiet = Host(
        DeviceSpec(device.name, device.flop_per_s, device.memory_bytes_per_s, device.memory_bytes,
                   device.compute_efficiency, device.memory_efficiency, device.launch_s),
        weights=Weights.INT4,
    )  # fmt: skip
    bare = World(here.spec, (quiet, quiet), here.links)
    shared = price(bare, Decision(Partition.shared(here.spec, {0: 1, 1: 1}), WirePrecision.INT8), CHAT)
    assert 1.6 < price(bare, on(here.spec, 0), CHAT).tpot_s / shared.tpot_s < 1.95


@given(st.data())
def test_a_machine_with_little_to_do_does_not_make_a_walk_shorter_than_its_own_part(data: st.DataObject) -> None:
    units = data.draw(st.integers(1, 7))
    here = world(EIGHTHS, box(), times(box(), data.draw(st.floats(0.1, 10))))
    one = bill(here, Decision(Partition.shared(EIGHTHS, {0: units, 1: 8 - units}), FP16), CHAT)
    assert one.tpot.at(here.conditions()) >= max(one.token_busy_s)
