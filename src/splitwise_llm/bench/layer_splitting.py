"""What element loss after a cut costs the bundled model, measured: the table behind the layer-splitting paper's rerun.

Every token's activations lose elements where they cross to the other machine, by the engine's own codec. `session`
decodes in a real session; `measure` gets the same figures in one pass per passage through the reference model, with
the same elements lost in the same places, because real sessions would take an hour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitwise_llm.bench.exactness import PROMPT_TOKENS, WINDOW_TOKENS
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.bench.reference import hugging_face
from splitwise_llm.decision import Decision
from splitwise_llm.model.checkpoint import locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Kind
from splitwise_llm.wire.codec import ElementLoss

LOSSES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
SEEDS = 4
_STREAM = f"0/{Kind.RESIDUAL}/{DEVICE}"
"""What the engine calls the residual stream from the device after the first stage."""


def passages() -> list[list[int]]:
    """The held-out text in consecutive windows of PROMPT_TOKENS + WINDOW_TOKENS tokens."""
    text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text(encoding="utf-8")
    ids = Tokenizer(locate("bundled")).encode(text)
    size = PROMPT_TOKENS + WINDOW_TOKENS
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def negative_log_likelihoods(passage: Sequence[int], split: int, loss: ElementLoss) -> NDArray[np.float64]:
    """(WINDOW_TOKENS,): nats of each token after the first PROMPT_TOKENS, when `split` layers run on the device."""

    def lose(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return loss.apply(output[0], _STREAM, 0).unsqueeze(0)

    model = hugging_face(locate("bundled"))
    hook = model.model.layers[split - 1].register_forward_hook(lose)
    try:
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([list(passage[:-1])])).logits[0, PROMPT_TOKENS - 1 :]
    finally:
        hook.remove()
    wanted = torch.tensor(passage[PROMPT_TOKENS:])
    return -logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().numpy()


async def session(passage: Sequence[int], split: int, loss: ElementLoss) -> list[float]:
    """The same from a real session."""
    scores: list[float] = []

    def follow(logits: Tensor, position: int) -> int:
        scores.append(-float(logits.log_softmax(-1)[passage[position]]))
        return passage[position]

    prompt, answers = list(passage[:PROMPT_TOKENS]), len(passage) - PROMPT_TOKENS
    async with in_process(locate("bundled"), ("cloud",), choose=follow) as edge:
        decision = Decision(Partition.cut(edge.machine.spec, split))
        async with edge.generate(prompt, decision, max_new_tokens=answers, stop_ids=(), loss=loss) as generation:
            async for _ in generation:
                pass
    return scores


def measure(tell: Tell, losses: Sequence[float] = LOSSES, seeds: int = SEEDS) -> dict[str, object]:
    """Nats per token for every split and loss, in the form of `data/accuracy/layer_splitting.json`."""
    torch.set_num_threads(1)
    texts = passages()
    layers = len(hugging_face(locate("bundled")).model.layers)
    splits = range(1, layers)
    nats, errors = np.zeros((2, len(splits), len(losses)))
    clean = np.stack([negative_log_likelihoods(text, 1, ElementLoss()) for text in texts])
    for row, split in enumerate(splits):
        for column, loss in enumerate(losses):
            each = np.stack(
                [
                    [negative_log_likelihoods(text, split, ElementLoss(loss, 1000 * seed + n)) for seed in range(seeds)]
                    for n, text in enumerate(texts)
                ]
            ) if loss else clean[:, None]  # fmt: skip
            nats[row, column] = each.mean()
            lost = (each.mean(axis=1) - clean).mean(axis=1)  # per passage
            errors[row, column] = lost.std(ddof=1) / len(texts) ** 0.5
        tell(f"split {split}: {', '.join(f'{value:.3f}' for value in nats[row])} nats per token")
    return {
        "model": "bundled",
        "num_layers": layers,
        "splits": list(splits),
        "losses": list(losses),
        "nats": nats.round(5).tolist(),
        "standard_errors": errors.round(5).tolist(),
        "source": (
            "measured by `splitwise bench layer-splitting`: nats per token of the bundled model in fp32 on data/"
            f"excerpt.txt, {len(texts)} passages of {WINDOW_TOKENS} tokens after {PROMPT_TOKENS} of prompt, {seeds}"
            " seeds; every element of the residual stream after `split` layers is lost (zero) with probability `loss`"
        ),
    }  # fmt: skip


def write(table: dict[str, object], path: Path) -> None:
    """As JSON, one line per field and row."""
    rows = [f" {json.dumps(name)}: {_text(value)}" for name, value in table.items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def _text(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"
    return json.dumps(value)
