"""The chunk of a prompt: what its price says, and a sensible one where nothing can be priced."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from physics.examples import FP16, SMALL, box, edge_and_cloud, world, worlds
from splitwise_llm.cli.choice import Chunked
from splitwise_llm.cost import Job, best_chunk, default_chunk, price
from splitwise_llm.cost.chunking import GRID, UNPROFILED
from splitwise_llm.decision import Decision
from splitwise_llm.observation import MachineView, Observation, Placement
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, LinkSpec, Weights
from strategies import partitions

U = Partition.u_shape(SMALL, 2, 2)


# Dies when cost/chunking.py says `.argmax()` for `.argmin()`.
@given(st.data())
def test_no_size_of_the_grid_brings_the_first_token_sooner(data: st.DataObject) -> None:
    here, prompt = data.draw(worlds()), data.draw(st.integers(1, 300))
    decision = Decision(data.draw(partitions(here.spec)), FP16)
    job = Job(prompt, 1)
    chosen = price(here, replace(decision, prefill_chunk=best_chunk(here, decision, job)), job).ttft_s
    for size in GRID:
        if len(decision.partition.machines) > 1 and (size is None or size < prompt):
            assert chosen <= price(here, replace(decision, prefill_chunk=size), job).ttft_s * (1 + 1e-9)


def test_a_slow_link_wants_small_chunks_and_slow_launches_want_large_ones() -> None:
    job = Job(1000, 1)
    slow = LinkSpec.parse("rtt=20ms up=1mbit down=1mbit")
    free, dear = (world(SMALL, box(launch_s=s), box(launch_s=s), link=slow) for s in (0.0, 0.05))
    assert best_chunk(free, Decision(U, FP16), job) == 16
    assert best_chunk(dear, Decision(U, FP16), job) in (256, 512, None)


def test_one_machine_needs_no_chunks() -> None:
    here = edge_and_cloud("raspberry-pi-5", "a100")
    alone = Decision(Partition.all_on(here.spec, 0), FP16)
    assert best_chunk(here, alone, Job(1000, 1)) is None


# Dies when cost/chunking.py says `prompt_tokens >= 0` for `prompt_tokens >= 2 * UNPROFILED`.
@pytest.mark.parametrize(("text", "prompt", "chunk"), [
    ("all:edge", 1000, None), ("all:cloud", 1000, None), ("edge[0:2] cloud[2:6] edge[6:8]", 1000, UNPROFILED),
    ("edge[0:2] cloud[2:6] edge[6:8]", 2 * UNPROFILED - 1, None),
])  # fmt: skip
def test_without_figures_a_prompt_is_cut_where_machines_could_overlap(
    text: str, prompt: int, chunk: int | None
) -> None:
    assert default_chunk(Decision(Partition.parse(text, SMALL, ("edge", "cloud"))), prompt) == chunk


# Dies when cli/choice.py says `observation.placement is None` for `observation.placement is not None`.
def test_a_given_partition_is_chunked_at_admission_and_stays_so() -> None:
    link = LinkSpec.parse("rtt=20ms up=1mbit down=1mbit")
    here, told = world(SMALL, box(), box(), link=link), Decision(U, FP16)
    views = tuple(MachineView(name, True, 10**9, Dtype.FP32, Weights.FULL) for name in ("edge", "cloud"))
    unknown = Observation(SMALL, views, 1000, 8)
    assert Chunked(told).decide(unknown) == replace(told, prefill_chunk=UNPROFILED)
    seen = replace(unknown, world=here)
    chosen = Chunked(told).decide(seen)
    assert chosen.prefill_chunk == best_chunk(here, told, seen.job) == 16
    later = replace(unknown, placement=Placement(chosen, 1003, 3))
    assert Chunked(told).decide(later) == chosen
