"""What the engine costs: a split over the same engine unsplit, and unsplit over Hugging Face's `generate`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.random_models import OVERHEAD_GPT2, OVERHEAD_LLAMA, make_model
from splitwise_llm.bench.reference import hugging_face
from splitwise_llm.engine.edge import Edge, edge_with

PROMPT = list(range(100, 132))
Tell = Callable[[str], None]


async def tpot_s(edge: Edge, partition: str, tokens: int) -> float:
    """Mean seconds per token after the first, of one greedy generation that does not stop early."""
    async with edge.generate(PROMPT, partition, max_new_tokens=tokens, stop_ids=()) as generation:
        async for _ in generation:
            pass
    return generation.record.tpot_s


class _Clock:
    """Stands where `generate` streams tokens to, and notes when they come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def hugging_face_tpot_s(model: Any, tokens: int) -> float:
    """The same of the reference's greedy `generate`."""
    clock = _Clock()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock)
    _, first, *_, last = clock.times  # the prompt comes first, then each token
    return (last - first) / (tokens - 1)


async def run_overhead(rounds: int, tokens: int, tell: Tell) -> Figures:
    """`split_over_unsplit`, `unsplit_over_hf` and `gpt2_unsplit_over_hf`, one thread per process."""
    result = Figures("overhead", {"rounds": rounds, "tokens": tokens, "threads_per_process": 1})
    torch.set_num_threads(1)
    for name, config in (("llama", OVERHEAD_LLAMA), ("gpt2", OVERHEAD_GPT2)):
        tell(f"making a random {name} of the size of GPT-2 small")
        with tempfile.TemporaryDirectory() as place:
            await _one_model(result, name, config, Path(place), rounds, tokens, tell)
    return result


async def _one_model(
    result: Figures, name: str, config: Mapping[str, Any], place: Path, rounds: int, tokens: int, tell: Tell
) -> None:
    directory = make_model(place, config)
    (directory / "tokenizer.json").write_text(NO_WORDS)
    with worker(str(directory)) as cloud, edge_with(str(directory), {"cloud": cloud.address}) as edge:
        half = edge.machine.spec.num_layers // 2
        reference = hugging_face(directory)

        async def theirs() -> float:
            return hugging_face_tpot_s(reference, tokens)

        runs = {
            "unsplit": lambda: tpot_s(edge, "all:edge", tokens),
            "split": lambda: tpot_s(edge, f"edge[0:{half}] cloud[{half}:{2 * half}]", tokens),
            "hf": theirs,
        }
        times = await interleaved(runs, rounds, tell)
    prefix = "" if name == "llama" else f"{name}_"
    result.add_median(f"{prefix}split_over_unsplit", ratios(times["split"], times["unsplit"]))
    result.add_median(f"{prefix}unsplit_over_hf", ratios(times["unsplit"], times["hf"]))
    for run, values in times.items():
        result.add_median(f"{prefix}{run}_ms_per_token", [1e3 * value for value in values])


NO_WORDS = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}'
"""A tokenizer for models that have ids but no text."""
