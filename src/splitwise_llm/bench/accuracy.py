"""What a lossy choice costs on real text: nats per token by weight form and wire precision, for spans of a model.

The text is decoded token by token as in a session (in full weights at once, which is the same), each position told the
true next token; the figure of a choice is its mean loss minus that of full weights and an exact wire on the same
positions. It does not use a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
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
from splitwise_llm.model.weights import Need, Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire.codec import round_trip

GROUPS = 4
"""Of layers, unless told otherwise."""
PROMPT_TOKENS, WINDOW_TOKENS = 32, 480
LOSSY_WEIGHTS: tuple[Weights, ...] = (Weights.INT8, Weights.INT4)
LOSSY_WIRES: tuple[WirePrecision, ...] = tuple(wire for wire in WirePrecision if wire is not WirePrecision.FP32)


@dataclass(frozen=True, slots=True)
class Choice:
    """The form of every half's weights, the wire precision of what crosses before some halves (behind the last one:
    before the head), and that of the partial sums of those that two machines share, in full weights."""

    weights: tuple[Weights, ...]
    crossings: Mapping[int, WirePrecision]
    shared: Mapping[int, WirePrecision] = field(default_factory=dict)


def spans(num_layers: int, groups: int = GROUPS) -> list[range]:
    """The halves of each group of layers, as `Accuracy` divides the depth."""
    groups = min(groups, num_layers)
    of_half = [half // 2 * groups // num_layers for half in range(2 * num_layers)]
    return [range(of_half.index(g), of_half.index(g) + of_half.count(g)) for g in range(groups)]


def boundaries(num_layers: int, groups: int) -> list[int]:
    """The half in the middle of each group of boundaries, again as `Accuracy` divides them; as many groups as halves,
    and each boundary is one."""
    groups = min(groups, 2 * num_layers)
    of_half = [half * groups // (2 * num_layers) for half in range(2 * num_layers)]
    return [of_half.index(g) + of_half.count(g) // 2 for g in range(groups)]


class Text:
    """A model and a text cut into windows; `nats` decodes all of it under a choice."""

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Sequence[int]], prompt: int, dtype: Dtype) -> None:
        self.spec, self._windows, self._prompt = checkpoint.architecture.spec, windows, prompt
        self._capacity = max(len(window) for window in windows)
        need = need_of(Partition.all_on(self.spec, 0), 0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._need, self._halved = need, Partition.shared(self.spec, {0: 1, 1: 1})
        self._residents = {form: Resident(checkpoint, dtype, form, device) for form in (Weights.FULL, *LOSSY_WEIGHTS)}
        for resident in self._residents.values():
            resident.load(need)

    def nats(self, choice: Choice) -> list[float]:
        """Loss of each position after the prompts, in nats. In full weights a window is read at once: each position
        has a scale of its own on the wire, so that it loses what it would alone. For many rows of low-bit weights torch
        has other kernels than for one, so those are decoded one by one."""
        lost: list[float] = []
        is_full = set(choice.weights) == {Weights.FULL}
        with torch.inference_mode():
            for window in self._windows:
                shares = {
                    form: Share(self._residents[form], self._need, self._capacity)
                    for form in {Weights.FULL, *choice.weights}
                }
                parts = self._parts(choice) if choice.shared else {}
                stops = [len(window) - 1] if is_full else range(self._prompt, len(window))
                start = 0
                for stop in stops:
                    x = self._step(shares, parts, choice, window[start:stop], start)
                    told = torch.tensor(window[max(start + 1, self._prompt) : stop + 1])
                    logits = shares[Weights.FULL].all_logits(x[-len(told) :]).cpu().log_softmax(-1)
                    lost += (-logits[torch.arange(len(told)), told]).tolist()
                    start = stop
        self._residents[Weights.FULL].keep_only([self._need])
        return lost

    def _parts(self, choice: Choice) -> Mapping[int, Share]:
        """What each of two machines has of the halves that they share."""
        needs = {machine: need_of(self._halved, machine) for machine in (0, 1)}
        return {
            machine: Share(
                self._residents[Weights.FULL],
                Need(tuple((half, units) for half, units in need.units if half in choice.shared), False, False),
                self._capacity,
            )
            for machine, need in needs.items()
        }

    def _step(
        self,
        shares: Mapping[Weights, Share],
        parts: Mapping[int, Share],
        choice: Choice,
        ids: Sequence[int],
        start: int,
    ) -> Tensor:
        ends = shares[Weights.FULL]
        at = ends.positions(start, len(ids))
        x = ends.embed(ids, at)
        for half in range(2 * self.spec.num_layers):
            if wire := choice.crossings.get(half):
                x = round_trip(x, wire)
            if wire := choice.shared.get(half):  # each adds what the others get of its own part, too
                sharers = sorted(set(self._halved.owners(half)))
                x = ends.join(x, [round_trip(parts[m].partial(x, half, at), wire) for m in sharers], half)
                continue
            share = shares[choice.weights[half]]
            x = share.join(x, [share.partial(x, half, at)], half)
        if wire := choice.crossings.get(2 * self.spec.num_layers):
            x = round_trip(x, wire)
        return x


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
    checkpoint: Checkpoint, ids: Sequence[int], where: str, tokens: int, dtype: Dtype, tell: Callable[[str], None],
    groups: int = GROUPS,
) -> tuple[Accuracy, Figures]:  # fmt: skip
    """The table, and figures with what was measured to make it: standard errors, and each sum beside the whole. Of
    weights and partial sums it has `groups` figures, of crossings twice as many, since a layer has two halves.

    A negative difference is noise and stands as 0 in the table. Raises RequestError.
    """
    spec = checkpoint.architecture.spec
    pieces, prompt = windows(ids, tokens, spec.max_context)
    text = Text(checkpoint, pieces, prompt, dtype)
    full = (Weights.FULL,) * (2 * spec.num_layers)
    of_layers, middles = spans(spec.num_layers, groups), boundaries(spec.num_layers, 2 * groups)
    base = text.nats(Choice(full, {}))
    result = Figures("accuracy", {"tokens": len(base), "groups": len(of_layers), "dtype": str(dtype)})
    result.add("nats_per_token", fmean(base), "full weights, exact wire")
    tell(f"{len(base)} positions, {fmean(base):.4f} nats per token")

    table = partial(_figures, text, base, result, tell)
    weights = {
        form: table(
            f"weights_{form}",
            [Choice(tuple(form if h in span else Weights.FULL for h in range(len(full))), {}) for span in of_layers],
            Choice((form,) * len(full), {}),
        )
        for form in LOSSY_WEIGHTS
    }
    halves = range(len(full))
    wires, partials, ends = {}, {}, {}
    for wire in LOSSY_WIRES:
        wires[wire] = table(
            f"wire_{wire}",
            [Choice(full, {middle: wire}) for middle in middles],
            Choice(full, dict.fromkeys(middles, wire)),
        )
        partials[wire] = table(
            f"partials_{wire}",
            [Choice(full, {}, dict.fromkeys(span, wire)) for span in of_layers],
            Choice(full, {}, dict.fromkeys(halves, wire)),
        )
        both = (0, len(full))
        first, last = table(
            f"ends_{wire}", [Choice(full, {end: wire}) for end in both], Choice(full, dict.fromkeys(both, wire))
        )
        ends[wire] = first, last
    source = (
        f"measured on {date.today().isoformat()} on {where}: {len(base)} tokens in {len(pieces)} pieces, "
        f"decoded one by one in {dtype} ({fmean(base):.4f} nats per token in full); a wire figure is one crossing in "
        "the middle of its group, one of partials all halves of a group shared by two machines, ends are one crossing "
        "before the first layer and one after the last; differences below zero are noise and stand as 0"
    )
    return Accuracy(weights, wires, source, partials, ends), result


def _figures(
    text: Text,
    base: Sequence[float],
    result: Figures,
    tell: Callable[[str], None],
    name: str,
    choices: Sequence[Choice],
    whole: Choice,
) -> tuple[float, ...]:
    """What choices lose above `base`, as a table has it; `result` also gets their sum beside what `whole` loses."""

    def lost(choice: Choice) -> tuple[float, float]:
        differences = [a - b for a, b in zip(text.nats(choice), base, strict=True)]
        return fmean(differences), stdev(differences) / len(differences) ** 0.5

    parts = [lost(choice) for choice in choices]
    together, error = lost(whole)
    total = sum(mean for mean, _ in parts)
    for number, (mean, its_error) in enumerate(parts):
        result.add(f"{name}_{number}", mean, f"standard error {its_error:.1g}")
    result.add(f"{name}_sum", total)
    result.add(f"{name}_whole", together, f"standard error {error:.1g}; the sum is {total - together:+.1g} off")
    tell(f"{name}: sum of groups {total:.5f}, all at once {together:.5f} (standard error {error:.1g})")
    return tuple(float(f"{max(mean, 0.0):.4g}") for mean, _ in parts)
