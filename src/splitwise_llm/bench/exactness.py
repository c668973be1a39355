"""Is it the same? Logits and greedy tokens of any partition against the reference, and what lossy choices cost."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from splitwise_llm.bench.accuracy_live import told
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.overhead import NO_WORDS, Tell
from splitwise_llm.bench.random_models import TINY, make_model
from splitwise_llm.bench.reference import Verdict, compare
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.walk import GREEDY
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import sample
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition, Placement
from splitwise_llm.spec import Dtype, ModelSpec, Weights
from splitwise_llm.wire.codec import ElementLoss

PROMPT_TOKENS, WINDOW_TOKENS = 32, 192


def random_partition(spec: ModelSpec, machines: int, dice: random.Random) -> Partition:
    """Any assignment: half of the halves on one machine, the others divided unit by unit."""

    def owners(count: int) -> tuple[int, ...]:
        alone = dice.randrange(machines)
        return tuple(alone if dice.random() < 0.5 else dice.randrange(machines) for _ in range(count))

    layers = tuple(Placement(owners(spec.num_kv_heads), owners(spec.num_ffn_shards)) for _ in range(spec.num_layers))
    return Partition(layers, embed=dice.randrange(machines), head=dice.randrange(machines))


async def judge(directory: Path, decision: Decision, prompt: list[int], tokens: int) -> Verdict:
    """Run a decision greedily over three machines in this process and hold it against the reference."""
    logits: list[Tensor] = []

    def record(values: Tensor, position: int) -> int:
        logits.append(values.clone())
        return sample(values, GREEDY, position)

    mine = record if decision.partition.head == 0 else None
    async with (
        in_process(directory, choose=record) as edge,
        edge.generate(prompt, decision, max_new_tokens=tokens, stop_ids=(), choose=mine) as generation,
    ):
        ids = [token.id async for token in generation]
    return compare(directory, prompt, ids, logits)


async def run_exactness(partitions: int, tokens: int, text: Path | None, tell: Tell) -> Figures:
    """`max_rel_logit_diff_fp32`, `greedy_mismatches`, `ties`, and `nats_lost_<weights>_<wire>` on held-out text."""
    text = text or Path(str(resources.files("splitwise_llm") / "data" / "excerpt.txt"))
    passage = text.read_text(encoding="utf-8")  # now, and not after minutes
    result = Figures("exactness", {"partitions_per_model": partitions, "tokens": tokens, "seed": 0})
    torch.set_num_threads(1)
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as place:
        directories = {"bundled": locate("bundled")}
        for name, config in TINY.items():
            directories[name] = make_model(Path(place) / name, config, seed=len(name))
            (directories[name] / "tokenizer.json").write_text(NO_WORDS)
        for name, directory in directories.items():
            mine = await _judge_model(directory, partitions, tokens)
            worst = max(verdict.relative_difference for verdict in mine)
            tell(f"{name}: {len(mine)} partitions, largest relative difference of logits {worst:.1e}")
            verdicts += mine
    result.add("max_rel_logit_diff_fp32", max(v.relative_difference for v in verdicts), "at most 5e-05")
    result.add("greedy_mismatches", sum(v.mismatches for v in verdicts), f"of {tokens * len(verdicts)} tokens")
    result.add("ties", sum(v.ties for v in verdicts), "the reference's top two too close to call")
    await _lossy(result, passage, tell)
    return result


async def _judge_model(directory: Path, count: int, tokens: int) -> list[Verdict]:
    spec = Checkpoint(directory).architecture.spec
    dice = random.Random(0)
    prompt = [dice.randrange(spec.vocab_size) for _ in range(24)]
    decisions = [Decision(Partition.all_on(spec, 0))]
    decisions += [
        Decision(random_partition(spec, 3, dice), prefill_chunk=dice.choice([None, 5, 16])) for _ in range(count)
    ]
    return [await judge(directory, decision, prompt, tokens) for decision in decisions]


LOSSY: Sequence[tuple[str, Dtype, Weights]] = (
    ("fp32", Dtype.FP32, Weights.FULL),
    ("bf16", Dtype.BF16, Weights.FULL),
    ("fp16", Dtype.FP16, Weights.FULL),
    ("int8", Dtype.BF16, Weights.INT8),
    ("int4", Dtype.BF16, Weights.INT4),
)
ELEMENT_LOSSES = (0.05, 0.2)


async def _lossy(result: Figures, passage: str, tell: Tell) -> None:
    """Nats per token above fp32 weights over an fp32 wire, on text, in a U shape (the stream crosses twice)."""
    directory = locate("bundled")
    ids = Tokenizer(directory).encode(passage)
    starts = [len(ids) * part // 3 for part in range(3)]
    windows = [ids[start : start + PROMPT_TOKENS + WINDOW_TOKENS] for start in starts]
    base = 0.0
    for name, dtype, weights in LOSSY:
        wires = [(wire.value, wire, 0.0) for wire in WirePrecision]
        wires += [(f"loss{loss:g}", WirePrecision.FP32, loss) for loss in ELEMENT_LOSSES] if name == "fp32" else []
        for label, wire, loss in wires:
            nats = await nats_per_token(directory, windows, dtype, weights, wire, loss)
            if (name, label) == ("fp32", "fp32"):
                base = nats
                result.add("nats_per_token", nats, f"fp32 weights and wire, {len(windows) * WINDOW_TOKENS} tokens")
            else:
                result.add(f"nats_lost_{name}_{label}", nats - base)
        tell(f"weights {name}: measured over {len(wires)} wires")


async def nats_per_token(
    directory: Path,
    windows: Sequence[Sequence[int]],
    dtype: Dtype,
    weights: Weights,
    wire: WirePrecision,
    loss: float = 0.0,
) -> float:
    """Mean negative log-likelihood of the tokens of `windows` after their first PROMPT_TOKENS, decoded one by one
    as in a real session whose middle half runs on another machine."""
    async with in_process(directory, ("cloud",), dtype, weights) as edge:
        spec = edge.machine.spec
        decision = Decision(Partition.u_shape(spec, spec.num_layers // 4, spec.num_layers // 4), wire)
        noise = ElementLoss(loss, seed=1)
        return fmean([
            nats for window in windows for nats in await told(edge, decision, window, PROMPT_TOKENS, noise)
        ])  # fmt: skip
