"""What the engine costs: a split over the same engine unsplit, unsplit over Hugging Face's `generate`, and decoding
over what reading the weights alone would take."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from splitwise_llm import cost
from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.random_models import OVERHEAD_GPT2, OVERHEAD_LLAMA, make_model
from splitwise_llm.bench.reference import hugging_face
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.machine import need_of
from splitwise_llm.errors import RequestError
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Kernels, Weights

PROMPT = list(range(100, 132))
Tell = Callable[[str], None]
FORMS = {
    "fp32": (Dtype.FP32, Weights.FULL, Kernels.TORCH),
    "bf16": (Dtype.BF16, Weights.FULL, Kernels.TORCH),
    "int8": (Dtype.BF16, Weights.INT8, Kernels.TORCH),
    "int4": (Dtype.BF16, Weights.INT4, Kernels.TORCH),
    "fp32_compiled": (Dtype.FP32, Weights.FULL, Kernels.COMPILED),
    "bf16_compiled": (Dtype.BF16, Weights.FULL, Kernels.COMPILED),
    "int8_compiled": (Dtype.BF16, Weights.INT8, Kernels.COMPILED),
    "int4_compiled": (Dtype.BF16, Weights.INT4, Kernels.COMPILED),
}
COMPILED = "_compiled"
WIDE_LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 1024,
}  # fmt: skip
"""Four of TinyLlama's 22 layers: in every form, far more weights than caches hold."""
READ_BYTES = 256 << 20


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
    """`split_over_unsplit`, `unsplit_over_hf` and `gpt2_unsplit_over_hf`; `int8_over_bf16` and `int4_over_bf16`
    (ms/token), `bandwidth_share_FORM`, and `bandwidth_share`, the smaller of bf16's and int8's by the kernels that a
    command takes of itself. FORM_compiled is by our own kernels, FORM_compiled_over_torch in ms/token; all are over
    bf16 by torch's. One thread per process.
    """
    result = Figures("overhead", {"rounds": rounds, "tokens": tokens, "threads_per_process": 1})
    torch.set_num_threads(1)
    for name, config in (("llama", OVERHEAD_LLAMA), ("gpt2", OVERHEAD_GPT2)):
        tell(f"making a random {name} of the size of GPT-2 small")
        with tempfile.TemporaryDirectory() as place:
            await _one_model(result, name, config, Path(place), rounds, tokens, tell)
    tell("making a random llama of four of TinyLlama's layers")
    with tempfile.TemporaryDirectory() as place:
        await _forms(result, Path(place), rounds, tokens, tell)
    return result


async def _forms(result: Figures, place: Path, rounds: int, tokens: int, tell: Tell) -> None:
    """Decoding with weights in every form, by every kernel there is here, and a plain read, in turn."""
    directory = make_model(place, WIDE_LLAMA)
    (directory / "tokenizer.json").write_text(NO_WORDS)
    with contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[], Awaitable[float]]] = {}
        read_bytes: dict[str, float] = {}
        for form, (dtype, weights, kernels) in FORMS.items():
            try:
                machine = edge_with(str(directory), {}, dtype=dtype, weights=weights, kernels=kernels)
            except RequestError as error:  # a processor or a system without compiled kernels
                tell(f"{form} is left out: {error}")
                continue
            edge = stack.enter_context(machine)
            runs[form] = partial(tpot_s, edge, "all:edge", tokens)
            read_bytes[form] = bytes_per_token(edge)
        runs["read"] = partial(plain_read_s, torch.ones(READ_BYTES // 4))
        times = await interleaved(runs, rounds, tell)
    for form, size in read_bytes.items():
        result.add_median(f"{form}_ms_per_token", [1e3 * value for value in times[form]], f"{size / 1e6:.0f} MB")
        shares = [size / READ_BYTES * ratio for ratio in ratios(times["read"], times[form])]
        result.add_median(f"bandwidth_share_{form}", shares)
    for form in [form for form in read_bytes if form.startswith("int")]:
        result.add_median(f"{form}_over_bf16", ratios(times[form], times["bf16"]))
    for form in [form for form in read_bytes if form.endswith(COMPILED)]:
        result.add_median(f"{form}_over_torch", ratios(times[form], times[form.removesuffix(COMPILED)]))
    taken = (form + COMPILED * (form + COMPILED in read_bytes) for form in ("bf16", "int8"))
    smaller = min((f"bandwidth_share_{form}" for form in taken), key=lambda name: result.figures[name])
    result.add("bandwidth_share", result.figures[smaller], smaller)
    result.add_median("plain_read_gb_per_s", [READ_BYTES / 1e9 / value for value in times["read"]])


def bytes_per_token(edge: Edge) -> float:
    """Bytes of weights that a decode step reads: all but the embedding, of which it reads a row."""
    machine = edge.machine
    pieces = need_of(Partition.all_on(machine.spec, 0), 0).units
    return cost.weight_bytes(machine.spec, pieces, False, True, machine.dtype, machine.weights)


async def plain_read_s(values: torch.Tensor) -> float:
    """The fastest of three sums of fp32 values in memory, seconds."""
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start)
    return min(times)


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
