"""The bench of memory: fresh processes, limits that are what is predicted, and growth without what a process takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitwise_llm.bench import memory
from splitwise_llm.bench.memory import (
    CASES,
    FORMS,
    LETTERS,
    LITTLE,
    LONG_CASES,
    MODEL,
    Stand,
    Taken,
    bare_bytes,
    compared,
    predicted,
)
from splitwise_llm.bench.random_models import TINY
from splitwise_llm.cost import Job
from splitwise_llm.errors import RequestError, WorkerFailed
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.spec import Weights

MB = 1_000_000.0


# Dies when bench/memory.py says `(peak - before) / said, note` for `peak / said, note`.
def test_what_a_process_takes_by_itself_is_no_part_of_its_growth() -> None:
    bare = bare_bytes(Taken((5 * MB, 900 * MB), (305_000_000, 1), 16), Taken((900 * MB, 7 * MB), (1, 347_000_000), 16))
    assert bare == (300 * MB, 340 * MB)
    found = list(compared(Taken((100 * MB, 200 * MB), (405_000_000, 520_000_000), 16), bare))
    assert [name for name, *_ in found] == ["edge", "cloud"]
    assert [ratio for _, ratio, _ in found] == [pytest.approx(1.05), pytest.approx(0.9)]


def test_a_machine_that_has_nothing_to_do_is_not_judged() -> None:
    found = list(compared(Taken((0.0, 200 * MB), (300_000_000, 540_000_000), 16), (300 * MB, 340 * MB)))
    assert [(name, ratio) for name, ratio, _ in found] == [("cloud", 1.0)]


SMALL = {
    **TINY["llama"], "num_hidden_layers": 22, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512,
    "vocab_size": 4096,
}  # fmt: skip


@pytest.mark.usefixtures("forks")
def test_both_processes_run_with_as_much_memory_as_is_predicted_and_not_with_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, SMALL)
    taken = stand.run(CASES["u"], Weights.INT8)
    assert taken.prompt_tokens == 16
    assert all(15 * MB > said > MB for said in taken.predicted)
    assert all(1e10 > peak > 5e7 for peak in taken.peaks)  # of whole processes
    monkeypatch.setattr(memory, "predicted", lambda *asked: tuple(size / 2 for size in predicted(*asked)))
    monkeypatch.setattr(memory, "_LEAST_LIMIT", 0)
    with pytest.raises(WorkerFailed, match=r"would hold .* and may count on"):
        stand.run(CASES["u"], Weights.INT8)
    spec = Checkpoint(tmp_path / "model").architecture.spec
    for machine, little in enumerate(LITTLE):
        least = predicted(spec, little, Weights.FULL, Job(16, 16))[machine]
        assert (
            0
            < least
            < min(filter(None, (predicted(spec, one, Weights.FULL, Job(16, 16))[machine] for one in CASES.values())))
            / 4
        )


def test_forms_that_there_are_not_are_refused_before_a_model_is_made() -> None:
    with pytest.raises(RequestError, match=r"no form 'fp4'; the forms are bf16, int8, int4"):
        memory.run_memory(["int8", "fp4"], print)
    assert set(FORMS) == {"bf16", "int8", "int4"}
    assert MODEL["num_hidden_layers"] == 22


# Dies when bench/memory.py says `= f"{letters}"` for `= hashlib.sha256(f"{form} {partition} {letters}"`.
def test_what_is_kept_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Weights, int]] = []

    def run(_: Stand, partition: str, weights: Weights, letters: int = LETTERS) -> Taken:
        asked.append((partition, weights, letters))
        little = partition in LITTLE
        said = (MB, MB) if little else (100 * MB, 200 * MB)
        return Taken(said, (301_000_000, 301_000_000) if little else (405_000_000, 480_000_000), letters)

    monkeypatch.setattr(Stand, "__init__", lambda *_: None)
    monkeypatch.setattr(Stand, "run", run)
    first = memory.run_memory(["int8"], lambda _: None, tmp_path)
    assert len(asked) == len(set(asked)) == len(LITTLE) + len(CASES) + len(LONG_CASES)
    assert memory.run_memory(["int8"], lambda _: None, tmp_path).figures == first.figures
    assert len(asked) == len(set(asked))
    assert first.figures["least_over_predicted"] == pytest.approx(0.9)
    assert first.figures["most_over_predicted_long_prompt"] == pytest.approx(1.05)
    assert first.figures["most_over_limit"] == pytest.approx(0.9 * 1.05)
    memory.run_memory(["int4"], lambda _: None, tmp_path)
    assert {weights for _, weights, _ in asked} == {Weights.INT8, Weights.INT4}
