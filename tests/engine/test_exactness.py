"""Any partition of any family says what Hugging Face's model says; lossy wires differ, and only they."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.random_models import TINY
from splitwise_llm.bench.reference import compare
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine import walk
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.wire.codec import ElementLoss
from strategies import NAMES, partitions

PROMPT = [17, 3, 99, 54, 180, 7, 61, 120, 33, 2, 88]

EVERY_KIND = [
    "all:edge",
    "all:cloud",
    "edge[0:1] cloud[1:3]",
    "edge[0:0.5] cloud[0.5:2.5] edge[2.5:3]",
    "edge[0:1] cloud[1:2] third[2:3]",
    "edge+cloud[0:3]",
    "cloud+third[0:3] embed=third head=edge",
]


async def run(
    directory: Path,
    decision: Decision,
    prompt: list[int],
    count: int,
    sampling: Sampling | None = None,
    loss: ElementLoss | None = None,
) -> RequestRecord:
    async with (
        in_process(directory) as edge,
        edge.generate(prompt, decision, max_new_tokens=count, sampling=sampling, stop_ids=(), loss=loss) as generation,
    ):
        tokens = [token.id async for token in generation]
        assert tuple(tokens) == generation.record.token_ids
        return generation.record


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits that were sampled from, wherever in this process the head was."""
    logits: list[Tensor] = []
    original = walk.sample

    def recording(values: Tensor, sampling: Sampling, position: int) -> int:
        logits.append(values.clone())
        return original(values, sampling, position)

    monkeypatch.setattr(walk, "sample", recording)
    return logits


@pytest.mark.parametrize("family", TINY)
def test_the_unsplit_model_is_hugging_faces(family: str, tiny: Callable[[str], Path], seen: list[Tensor]) -> None:
    directory = tiny(family)
    spec = Checkpoint(directory).architecture.spec
    record = asyncio.run(run(directory, Decision(Partition.all_on(spec, 0)), PROMPT, 64))
    assert len(set(record.token_ids)) >= 16, "a run that repeats itself would prove nothing"
    assert compare(directory, PROMPT, record.token_ids, seen).is_same


@pytest.mark.parametrize("family", TINY)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_partition_is_hugging_faces(
    family: str, tiny: Callable[[str], Path], seen: list[Tensor], data: st.DataObject
) -> None:
    directory = tiny(family)
    spec = Checkpoint(directory).architecture.spec
    chunk = data.draw(st.none() | st.integers(1, 12))
    decision = Decision(data.draw(partitions(spec)), prefill_chunk=chunk)
    seen.clear()
    record = asyncio.run(run(directory, decision, PROMPT, 12))
    assert compare(directory, PROMPT, record.token_ids, seen).is_same


SENTENCES = [
    "It was a bright morning, and the Prince said to his old friend:",
    "She looked at him with",
    "The whale rose from the sea, and all the men in the boats",
]


@pytest.mark.parametrize("text", EVERY_KIND)
def test_the_bundled_model_on_real_prompts(text: str, seen: list[Tensor]) -> None:
    directory = locate("bundled")
    text = text.replace("3", "8")  # the model has eight layers
    partition = Partition.parse(text, Checkpoint(directory).architecture.spec, NAMES)
    for sentence in SENTENCES:
        prompt = Tokenizer(directory).encode(sentence)
        seen.clear()
        record = asyncio.run(run(directory, Decision(partition, prefill_chunk=16), prompt, 48))
        assert len(set(record.token_ids)) >= 12
        assert compare(directory, prompt, record.token_ids, seen).is_same


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_partition_of_the_bundled_model_on_a_real_prompt(seen: list[Tensor], data: st.DataObject) -> None:
    directory = locate("bundled")
    prompt = Tokenizer(directory).encode(data.draw(st.sampled_from(SENTENCES)))
    spec = Checkpoint(directory).architecture.spec
    decision = Decision(data.draw(partitions(spec)), prefill_chunk=data.draw(st.none() | st.integers(1, 12)))
    seen.clear()
    record = asyncio.run(run(directory, decision, prompt, 12))
    assert compare(directory, prompt, record.token_ids, seen).is_same


@pytest.mark.parametrize("wire", WirePrecision)
@pytest.mark.parametrize("text", EVERY_KIND)
def test_a_seeded_run_repeats_to_the_bit(
    text: str, wire: WirePrecision, tiny: Callable[[str], Path], seen: list[Tensor]
) -> None:
    directory = tiny("qwen3")
    partition = Partition.parse(text, Checkpoint(directory).architecture.spec, NAMES)
    decision = Decision(partition, wire, prefill_chunk=5)
    sampling, loss = Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=5), ElementLoss(0.05, seed=3)
    first = asyncio.run(run(directory, decision, PROMPT, 10, sampling, loss))
    once, seen[:] = list(seen), []
    second = asyncio.run(run(directory, decision, PROMPT, 10, sampling, loss))
    assert first.token_ids == second.token_ids
    assert all(torch.equal(a, b) for a, b in zip(once, seen, strict=True))


@pytest.mark.parametrize("text", EVERY_KIND)
def test_a_prompt_in_a_lossy_precision_leaves_the_later_tokens_crossings_exact(
    text: str, tiny: Callable[[str], Path], seen: list[Tensor]
) -> None:
    """The first logits are those of an int8 wire, the bytes those of each phase (the engine checks them by itself)."""
    directory = tiny("qwen3")
    partition = Partition.parse(text, Checkpoint(directory).architecture.spec, NAMES)
    first: dict[tuple[WirePrecision, WirePrecision | None], list[Tensor]] = {}
    for wire, early in ((WirePrecision.FP32, WirePrecision.INT8), (WirePrecision.INT8, None)):
        seen.clear()
        record = asyncio.run(run(directory, Decision(partition, wire, 5, prefill_wire=early), PROMPT, 3))
        assert not record.is_degraded
        first[wire, early] = list(seen)
    mixed, lossy = first.values()
    assert torch.equal(mixed[0], lossy[0])
    assert len(partition.machines) == 1 or not torch.equal(mixed[-1], lossy[-1])


def test_a_lossy_wire_changes_logits_and_an_exact_one_does_not(tiny: Callable[[str], Path], seen: list[Tensor]) -> None:
    directory = tiny("llama")
    spec = Checkpoint(directory).architecture.spec
    first: dict[str, Tensor] = {}
    for name, wire, loss in [
        ("unsplit", None, 0.0),
        ("fp32", WirePrecision.FP32, 0.0),
        ("fp16", WirePrecision.FP16, 0.0),
        ("int8", WirePrecision.INT8, 0.0),
        ("int4", WirePrecision.INT4, 0.0),
        ("loss", WirePrecision.FP32, 0.1),
    ]:
        seen.clear()
        partition = Partition.cut(spec, 2) if wire else Partition.all_on(spec, 0)
        asyncio.run(run(directory, Decision(partition, wire or WirePrecision.FP32), PROMPT, 1, loss=ElementLoss(loss)))
        first[name] = seen[0]
    distance = {name: float((logits - first["unsplit"]).abs().max()) for name, logits in first.items()}
    assert distance["fp32"] == 0
    assert 0 < distance["fp16"] < distance["int8"] < distance["int4"]
    assert distance["loss"] > distance["fp16"]


def test_all_machines_compute_a_shared_stage_at_the_same_time(tiny: Callable[[str], Path]) -> None:
    directory = tiny("llama")
    partition = Partition.parse("edge+cloud+third[0:4]", Checkpoint(directory).architecture.spec, NAMES)
    record = asyncio.run(run(directory, Decision(partition), PROMPT, 8))
    stages = {machine.name: {(i.stage, i.step) for i in machine.intervals} for machine in record.machines}
    assert stages["cloud"] == stages["third"] <= stages["edge"]
