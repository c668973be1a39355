"""What a lossy choice costs on real text: nats per token by weight form and wire precision, for spans of a model.

The text is decoded token by token as in a session, each position told the true next token; the figure of a choice
is its mean loss minus that of full weights and an exact wire on the same positions. It does not use a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import fmean, stdev

import torch
from torch import Tensor

from splitwise_llm.bench.figures import Figures
from splitwise_llm.cost.accuracy import Accuracy
from splitwise_llm.decision import WirePrecision
from splitwise_llm.engine.machine import need_of
from splitwise_llm.errors import RequestError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire.codec import round_trip

GROUPS = 4
PROMPT_TOKENS, WINDOW_TOKENS = 32, 480
LOSSY_WEIGHTS: tuple[Weights, ...] = (Weights.INT8, Weights.INT4)
LOSSY_WIRES: tuple[WirePrecision, ...] = tuple(wire for wire in WirePrecision if wire is not WirePrecision.FP32)


@dataclass(frozen=True, slots=True)
class Choice:
    """The form of every half's weights, and the wire precision of what crosses before some halves."""

    weights: tuple[Weights, ...]
    crossings: Mapping[int, WirePrecision]


def spans(num_layers: int, groups: int = GROUPS) -> list[range]:
    """The halves of each group of layers, as `Accuracy` divides the depth."""
    groups = min(groups, num_layers)
    of_half = [half // 2 * groups // num_layers for half in range(2 * num_layers)]
    return [range(of_half.index(g), of_half.index(g) + of_half.count(g)) for g in range(groups)]


def boundaries(num_layers: int, groups: int = GROUPS) -> list[int]:
    """The half in the middle of each group of boundaries, again as `Accuracy` divides them."""
    groups = min(groups, num_layers)
    of_half = [half * groups // (2 * num_layers) for half in range(2 * num_layers)]
    return [of_half.index(g) + of_half.count(g) // 2 for g in range(groups)]


class Text:
    """A model and a text cut into windows; `nats` decodes all of it under a choice."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], prompt: int, dtype: Dtype) -> None:
        self.spec, self._windows, self._prompt = checkpoint.architecture.spec, windows, prompt
        self._capacity = max(len(window) for window in windows)
        need = need_of(Partition.all_on(self.spec, 0), 0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._need = need
        self._residents = {form: Resident(checkpoint, dtype, form, device) for form in (Weights.FULL, *LOSSY_WEIGHTS)}
        for resident in self._residents.values():
            resident.load(need)

    def nats(self, choice: Choice) -> list[float]:
        """Loss of each position after the prompts, in nats."""
        lost: list[float] = []
        with torch.inference_mode():
            for window in self._windows:
                shares = {
                    form: Share(self._residents[form], self._need, self._capacity)
                    for form in {Weights.FULL, *choice.weights}
                }
                start = 0
                for stop in range(self._prompt, len(window)):
                    logits = self._step(shares, choice, window[start:stop], start)
                    lost.append(-float(logits.log_softmax(-1)[window[stop]]))
                    start = stop
        return lost

    def _step(self, shares: Mapping[Weights, Share], choice: Choice, ids: Sequence[int], start: int) -> Tensor:
        ends = shares[Weights.FULL]
        at = ends.positions(start, len(ids))
        x = ends.embed(ids, at)
        for half in range(2 * self.spec.num_layers):
            if wire := choice.crossings.get(half):
                x = round_trip(x, wire)
            share = shares[choice.weights[half]]
            x = share.join(x, [share.partial(x, half, at)], half)
        return ends.logits(x)


def windows(ids: Sequence[int], tokens: int, max_context: int) -> tuple[list[Sequence[int]], int]:
    """Pieces spread evenly over a text that hold about `tokens` positions after their prompts, and the length of
    those. Raises RequestError for a text that is too short."""
    length = min(PROMPT_TOKENS + WINDOW_TOKENS, max_context, len(ids))
    prompt = min(PROMPT_TOKENS, length // 2)
    if length - prompt < 16:
        raise RequestError(f"the text has {len(ids)} tokens; expected at least 32, and a thousand for a useful figure")
    count = max(1, min(tokens // (length - prompt), len(ids) // length))
    starts = [(len(ids) - length) * n // max(count - 1, 1) for n in range(count)]
    return [ids[start : start + length] for start in starts], prompt


def measure(
    checkpoint: Checkpoint, ids: Sequence[int], where: str, tokens: int, dtype: Dtype, tell: Callable[[str], None]
) -> tuple[Accuracy, Figures]:
    """The table, and figures with what was measured to make it: standard errors, and each sum beside the whole.

    A negative difference is noise and stands as 0 in the table. Raises RequestError.
    """
    spec = checkpoint.architecture.spec
    pieces, prompt = windows(ids, tokens, spec.max_context)
    text = Text(checkpoint, pieces, prompt, dtype)
    full = (Weights.FULL,) * (2 * spec.num_layers)
    groups = spans(spec.num_layers)
    base = text.nats(Choice(full, {}))
    result = Figures("accuracy", {"tokens": len(base), "groups": len(groups), "dtype": str(dtype)})
    result.add("nats_per_token", fmean(base), "full weights, exact wire")
    tell(f"{len(base)} positions, {fmean(base):.4f} nats per token")

    def lost(choice: Choice) -> tuple[float, float]:
        differences = [a - b for a, b in zip(text.nats(choice), base, strict=True)]
        return fmean(differences), stdev(differences) / len(differences) ** 0.5

    def table(name: str, choices: Sequence[Choice], whole: Choice) -> tuple[float, ...]:
        parts = [lost(choice) for choice in choices]
        together, error = lost(whole)
        total = sum(mean for mean, _ in parts)
        for number, (mean, its_error) in enumerate(parts):
            result.add(f"{name}_{number}", mean, f"standard error {its_error:.1g}")
        result.add(f"{name}_sum", total)
        result.add(f"{name}_whole", together, f"standard error {error:.1g}; the sum is {total - together:+.1g} off")
        tell(f"{name}: sum of groups {total:.5f}, all at once {together:.5f} (standard error {error:.1g})")
        return tuple(float(f"{max(mean, 0.0):.4g}") for mean, _ in parts)

    weights = {
        form: table(
            f"weights_{form}",
            [Choice(tuple(form if h in span else Weights.FULL for h in range(len(full))), {}) for span in groups],
            Choice((form,) * len(full), {}),
        )
        for form in LOSSY_WEIGHTS
    }
    middles = boundaries(spec.num_layers)
    wires = {
        wire: table(
            f"wire_{wire}",
            [Choice(full, {middle: wire}) for middle in middles],
            Choice(full, dict.fromkeys(middles, wire)),
        )
        for wire in LOSSY_WIRES
    }
    source = (
        f"measured on {date.today().isoformat()} on {where}: {len(base)} tokens in {len(pieces)} pieces, decoded one "
        f"by one in {dtype} ({fmean(base):.4f} nats per token in full); a wire figure is one crossing in the middle of "
        "its group; differences below zero are noise and stand as 0"
    )
    return Accuracy(weights, wires, source), result
