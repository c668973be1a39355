"""Identical layers make the best single cut all or nothing: the mistake of a hidden bias towards the middle.

For a cut at k the time is k e + (L - k) c and a crossing that is there whenever 0 < k < L, so without a constraint the
least is at an end. What breaks the sum up, chunks that overlap in a pipeline, also breaks the rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from physics.examples import FP16, edge_and_cloud
from splitwise_llm.cost import Form, Job, Load, Table, World, bill
from splitwise_llm.decision import Decision
from splitwise_llm.partition import Partition
from splitwise_llm.spec import LinkSpec

MODELS = ("gpt2-xl", "llama-2-7b", "llama-2-13b")
EDGES = ("orin-nx", "s23", "pi5")
SERVERS = ("a100", "l4")
BATCHES = ((1, 0.0), (32, 0.1), (64, 1.0), (96, 6.0))
"""Sequences in the cloud's batch, and the wait for admission (s)."""
RATES = ("5mbit", "20mbit", "50mbit", "100mbit", "1gbit", "10gbit")
RTTS = ("0.05ms", "0.5ms", "5ms", "20ms", "100ms")
SHAPES = (Job(128, 128), Job(1024, 64))
OBJECTIVES = ("total_s", "ttft_s", "tpot_s", "device_j")


def cuts(here: World, job: Job, chunk: int | None = None) -> Table:
    """Every single cut, also after the attention, from all in the cloud to all on the device."""
    spec = here.spec
    return Table(
        here,
        [
            bill(here, Decision(Partition.cut(spec, half / 2), FP16, chunk), job)
            for half in range(2 * spec.num_layers + 1)
        ],
    )


def conditions(here: World, loads: list[Load]) -> Form:
    """(combinations, conditions)"""
    links = [LinkSpec.parse(f"rtt={rtt} up={rate} down={rate}") for rtt, rate in product(RTTS, RATES)]
    return np.stack([here.basis.conditions({(0, 1): link}, {1: load}) for link, load in product(links, loads)])


def interior(table: Table, x: Form) -> Iterator[tuple[str, int]]:
    """(objective, combinations in which some cut inside beats both ends)"""
    prices = table.at(x)
    for name in OBJECTIVES:
        values = getattr(prices, name)
        ends = values[:, [0, -1]].min(axis=1)
        yield name, int((values[:, 1:-1].min(axis=1) < ends * (1 - 1e-12)).sum())


def count(models: tuple[str, ...], servers: tuple[str, ...], shapes: tuple[Job, ...]) -> tuple[int, dict[str, int]]:
    number, found = 0, dict.fromkeys(OBJECTIVES, 0)
    for name, edge, server in product(models, EDGES, servers):
        here = edge_and_cloud(edge, server, name)
        x = conditions(here, [here.load(1, batch, wait) for batch, wait in BATCHES])
        for job in shapes:
            number += len(x)
            for objective, inside in interior(cuts(here, job), x):
                found[objective] += inside
    return number, found


# Dies when cost/bill.py says `basis.inverse(src, dst): -4 * size})` for `basis.inverse(src, dst): size})`.
def test_the_best_single_cut_is_at_an_end_over_a_grid_of_360() -> None:
    assert count(("llama-2-7b",), ("a100",), SHAPES[:1]) == (360, dict.fromkeys(OBJECTIVES, 0))


@pytest.mark.long
def test_the_best_single_cut_is_at_an_end_over_the_grid_of_4320() -> None:
    assert count(MODELS, SERVERS, SHAPES) == (4320, dict.fromkeys(OBJECTIVES, 0))


def test_both_ends_are_best_somewhere() -> None:
    here = edge_and_cloud("orin-nx", "a100")
    x = conditions(here, [here.load(1, batch, wait) for batch, wait in BATCHES])
    assert set(cuts(here, SHAPES[0]).at(x).total_s.argmin(axis=1)) == {0, 2 * here.spec.num_layers}


# Dies when cost/bill.py says `mean += walk.seconds` for `mean += walk.seconds.times(1 / chunks)`.
def test_chunks_that_overlap_can_make_an_inner_cut_best_for_the_first_token() -> None:
    """Device and server work at the same time; on a fast link between machines of a kind nothing else is lost."""
    here = edge_and_cloud("orin-nx", "agx-orin", link="lan")
    at = cuts(here, Job(1024, 1), 128).at(here.conditions()).ttft_s
    assert 0 < at.argmin() < len(at) - 1
    assert at.min() < 0.9 * min(at[0], at[-1])
    whole = cuts(here, Job(1024, 1)).at(here.conditions()).ttft_s
    assert whole.argmin() in (0, len(whole) - 1)


def test_chunks_do_not_make_an_inner_cut_best_beside_a_datacentre_card_on_a_wan() -> None:
    here = edge_and_cloud("orin-nx", "a100", link="wan")
    at = cuts(here, Job(1024, 1), 128).at(here.conditions()).ttft_s
    assert at.argmin() == 0
