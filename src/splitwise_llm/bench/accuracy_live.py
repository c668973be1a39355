"""What lossy choices cost running sessions: nats per token through a worker process, beside what the table says.

Text and positions are those of the table (`accuracy.py`); the device, which has the head, is told the true next token
each time. It makes no table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from torch import Tensor

from splitwise_llm import plan as plans
from splitwise_llm.bench.accuracy import LOSSY_WEIGHTS, LOSSY_WIRES, boundaries, spans, windows
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import Accuracy
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.errors import RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.spec import Kernels, ModelSpec, Weights
from splitwise_llm.wire.codec import ElementLoss

WORKER = 1
TOKENS = 42_000
"""About as many as the shipped table's wires, partial sums and ends were measured on; weights on fewer, of the
excerpt (data/README.md): compare those on the same."""
AT_ONCE = 8
"""Sessions side by side."""
CROSSINGS = 4
"""As many of the table's as are run: in the middle of each quarter."""
CLEAR = 2.0
"""Nats below so many of their standard errors are noise: nothing can be said of their ratio to anything."""


@dataclass(frozen=True, slots=True)
class Row:
    """A lossy choice as sessions run it. Machines compute in fp32; the worker, or the device, has its weights in a form
    of its own."""

    name: str
    decision: Decision
    on_worker: Weights = Weights.FULL
    on_device: Weights = Weights.FULL
    is_bound: bool = False
    """Whether the table promises no more than that it loses no more (`Accuracy.by_boundary`)."""

    @property
    def forms(self) -> tuple[Weights, Weights]:
        """Of the device and of the worker."""
        return self.on_device, self.on_worker

    def said(self, table: Accuracy, spec: ModelSpec) -> float:
        """Nats per token by the cost model."""
        return table.of(plans.compile(self.decision, spec, 2), self.forms)


def weight_rows(spec: ModelSpec) -> Iterator[Row]:
    """Each group of layers on a worker with low-bit weights, the rest on the device in full, the wire exact."""
    for form in LOSSY_WEIGHTS:
        for number, halves in enumerate(spans(spec.num_layers)):
            start, stop = halves.start // 2, halves.stop // 2
            inside = Partition.u_shape(spec, start, spec.num_layers - stop)
            yield Row(f"weights_{form}_{number}", Decision(inside), form)


def wire_rows(spec: ModelSpec) -> Iterator[Row]:
    """One crossing, before a half: the worker has the embedding and what comes before, the device the rest."""
    for wire in LOSSY_WIRES:
        for half in boundaries(spec.num_layers, CROSSINGS):
            yield Row(f"wire_{wire}_before_{half}", Decision(Partition.cut(spec, half / 2, WORKER, DEVICE), wire))


def plan_rows(spec: ModelSpec) -> Iterator[Row]:
    """Plans as policies choose them, whose losses the table adds up. What loses less than it can tell has one row."""
    quarter = spec.num_layers // 4
    u_shape = Partition.u_shape(spec, quarter, quarter)
    inside = Partition.u_shape(spec, 0, 0)
    cut = replace(Partition.cut(spec, spec.num_layers / 2), head=DEVICE)
    shared = Partition.shared(spec, {DEVICE: 1, WORKER: 1}, [spec.num_layers // 2])
    int8, int4, fp16 = WirePrecision.INT8, WirePrecision.INT4, WirePrecision.FP16
    for wire in (fp16, int8, int4):
        yield Row(f"u_{wire}", Decision(u_shape, wire))
    yield Row("cut_int4", Decision(cut, int4))
    yield Row("shared_int4", Decision(shared, int4))
    yield Row("inside_int4", Decision(inside, int4))
    yield Row("inside_weights_int4", Decision(inside), Weights.INT4)
    for form in LOSSY_WEIGHTS:
        yield Row(f"device_weights_{form}", Decision(Partition.all_on(spec, DEVICE)), on_device=form)
    yield Row("u_int4_weights_int4", Decision(u_shape, int4), Weights.INT4)
    yield Row("u_prompt_int4", Decision(u_shape, fp16, prefill_wire=int4), is_bound=True)


PARTS: Mapping[str, Callable[[ModelSpec], Iterator[Row]]] = {
    "weights": weight_rows, "wires": wire_rows, "plans": plan_rows,
}  # fmt: skip


async def told(
    edge: Edge, decision: Decision, piece: Sequence[int], prompt: int, loss: ElementLoss | None = None
) -> list[float]:
    """Loss (nats) of each position of a text after its first `prompt` tokens, decoded one by one in a session that is
    told the true next token. The head is on the device."""
    lost: list[float] = []

    def follow(logits: Tensor, position: int) -> int:
        lost.append(-float(logits.log_softmax(-1)[piece[position]]))
        return piece[position]

    generation = edge.generate(
        piece[:prompt], decision, max_new_tokens=len(piece) - prompt, stop_ids=(), choose=follow, loss=loss
    )
    async with generation:
        async for _ in generation:
            pass
    return lost


async def told_all(edge: Edge, decision: Decision, pieces: Sequence[Sequence[int]], prompt: int) -> list[float]:
    """The same of several texts, in sessions side by side."""
    free = asyncio.Semaphore(AT_ONCE)

    async def in_turn(piece: Sequence[int]) -> list[float]:
        async with free:
            return await told(edge, decision, piece, prompt)

    tasks = [asyncio.create_task(in_turn(piece)) for piece in pieces]
    try:
        return [nats for lost in await asyncio.gather(*tasks) for nats in lost]
    finally:  # or what is left of them would outlive the machine
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_live(parts: Sequence[str], text: Path | None, tokens: int, tell: Callable[[str], None]) -> Figures:
    """Of each row NAME the nats lost per token, `NAME_table`, `NAME_error` (standard error), and where it is clear of
    noise `NAME_over_table`; `PART_worst` is the ratio farthest from 1. Bundled model, its table, its held-out text.

    Raises RequestError for unknown parts and for texts that are too short.
    """
    if unknown := {*parts} - {*PARTS}:
        raise RequestError(f"there is no part {min(unknown)!r}; the parts are {', '.join(PARTS)}")
    text = text or Path(str(resources.files("splitwise_llm") / "data" / "held_out.txt"))
    checkpoint = Checkpoint(locate("bundled"))
    spec = checkpoint.architecture.spec
    ids = Tokenizer(checkpoint.directory).encode(text.read_text(encoding="utf-8"))
    pieces, prompt = windows(ids, tokens, spec.max_context)
    table = Accuracy.shipped("bundled")
    with edge_with("bundled", {}) as edge:
        base = await told_all(edge, Decision(Partition.all_on(spec, DEVICE)), pieces, prompt)
    result = Figures("exactness", {"live": list(parts), "tokens": len(base), "table": table.source})
    result.add("nats_per_token", fmean(base), "full weights, exact wire")
    tell(f"{len(base)} positions, {fmean(base):.4f} nats per token; the table: {table.source}")
    for part in parts:
        ratios: list[float] = []
        for forms, rows in groupby(PARTS[part](spec), lambda row: row.forms):
            with ExitStack() as stack:
                on_device, on_worker = forms
                cloud = stack.enter_context(worker("bundled", "--weights", on_worker.value))
                reach = {"cloud": cloud.address}
                edge = stack.enter_context(edge_with("bundled", reach, weights=on_device, kernels=Kernels.AUTO))
                for row in rows:
                    lost = await told_all(edge, row.decision, pieces, prompt)
                    differences = [a - b for a, b in zip(lost, base, strict=True)]
                    ratio = add_row(result, row, differences, row.said(table, spec))
                    tell(f"{row.name}: {result.figures[row.name]:.5f}, {result.notes[row.name]}")
                    ratios += [] if ratio is None or row.is_bound else [ratio]
        if ratios:
            worst = max(ratios, key=lambda ratio: abs(ratio - 1))
            result.add(f"{part}_worst", worst, f"over the table; of {len(ratios)} rows that are clear of noise")
    return result


def add_row(result: Figures, row: Row, differences: Sequence[float], said: float) -> float | None:
    """The figures of one row; its ratio to the table, None where it is not clear of noise or the table has nothing."""
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    ratio = mean / said if said and mean > CLEAR * error else None
    beside = "noise" if ratio is None else f"{ratio:.3f} of it"
    result.add(row.name, mean, f"standard error {error:.1g}; the table says {said:.5f}: {beside}")
    result.add(f"{row.name}_table", said)
    result.add(f"{row.name}_error", error)
    if ratio is not None:
        result.add(f"{row.name}_over_table", ratio, "at most 1: it is a bound" if row.is_bound else "within 10 %")
    return ratio


__all__ = ["PARTS", "TOKENS", "Row", "add_row", "plan_rows", "run_live", "told", "told_all", "weight_rows", "wire_rows"]
