"""What drafting gains over a link of 40 ms, and what it costs where it gains nothing; and how often two models draw the
same token with the same noise, beside what the standard rejection scheme would accept.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files

import torch
from torch import Tensor

from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.bench.processes import shaped_link, worker
from splitwise_llm.engine.drafting import Draft
from splitwise_llm.engine.edge import edge_with
from splitwise_llm.engine.machine import need_of
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.share import Share
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import Dtype, Weights

RTT, RATE = "40ms", "20mbit"
U = "edge[0:2] cloud[2:6] edge[6:8]"
PROMPT_TOKENS, MOST = 48, 8
DRAFTERS = {"lookup": "ngram", "auto": "auto", "int4": "bundled:int4", "early": "early:2"}
"""By the name of their figures, what `--draft` is given."""
WARM = 0.8
"""Temperature of the text that is sampled."""
HOPELESS = {"noise": Sampling(100.0), "shuffle": Sampling(100.0, top_k=20)}
"""Text in which nothing can be foretold: any id at all; one of the twenty likeliest, whichever, so that most have
occurred before and something is proposed nearly every time."""


@dataclass(slots=True)
class _Tally:
    """What one way of drafting came to on one kind of text."""

    speedups: list[float] = field(default_factory=list)
    tokens: int = 0
    round_trips: float = 0.0
    same: list[bool] = field(default_factory=list)

    def add(self, one: RequestRecord, plain: RequestRecord) -> None:
        later = len(one.token_ids) - 1
        self.speedups.append(plain.tpot_s / one.tpot_s)
        self.tokens += later
        self.round_trips += one.round_trips_per_token * later
        self.same.append(one.token_ids == plain.token_ids)

    @property
    def tokens_per_round_trip(self) -> float:
        return self.tokens / self.round_trips


async def run_drafting(rounds: int, tokens: int, prompts: int, tell: Tell) -> Figures:
    """`tokens_per_round_trip` and `speedup_over_plain` of the drafter that gains most on greedy text, `identical_share`
    of all, `worst_case_over_plain`; and each drafter's own, greedy and sampled."""
    settings: dict[str, object] = {
        "rounds": rounds, "tokens": tokens, "prompts": prompts, "rtt": RTT, "rate": RATE, "partition": U,
        "drafted_at_most": MOST, "threads_per_process": 1,
    }  # fmt: skip
    result = Figures("drafting", settings)
    torch.set_num_threads(1)
    ids = Tokenizer(locate("bundled")).encode(files("splitwise_llm").joinpath("data/excerpt.txt").read_text("utf-8"))
    with worker("bundled") as cloud, shaped_link(cloud.address, "--rtt", RTT, "--rate", RATE) as link:
        say = partial(_generate, link.address)
        await _gains(result, say, spread(ids, prompts), tokens, tell)
        await _losses(result, say, ids[:PROMPT_TOKENS], rounds, 2 * tokens, tell)
    _same_noise(result, ids[: 8 * PROMPT_TOKENS])
    return result


def spread(ids: Sequence[int], count: int) -> list[list[int]]:
    """So many prompts, evenly spread over a text from its start."""
    step = (len(ids) - PROMPT_TOKENS) // count
    return [list(ids[n * step : n * step + PROMPT_TOKENS]) for n in range(count)]


async def _generate(
    address: str, prompt: Sequence[int], tokens: int, sampling: Sampling, draft: str = ""
) -> RequestRecord:
    """On a device that has learnt nothing yet."""
    with edge_with("bundled", {"cloud": address}) as edge:
        asked = Draft.parse(draft, MOST) if draft else None
        run = edge.generate(prompt, U, max_new_tokens=tokens, sampling=sampling, stop_ids=(), draft=asked)
        async with run as generation:
            async for _ in generation:
                pass
        return generation.record


_Say = Callable[..., Awaitable[RequestRecord]]


async def _gains(result: Figures, say: _Say, prompts: Sequence[list[int]], tokens: int, tell: Tell) -> None:
    tallies = {(name, kind): _Tally() for name in DRAFTERS for kind in ("", "_sampled")}
    for number, prompt in enumerate(prompts):
        for kind, sampling in (("", Sampling()), ("_sampled", Sampling(WARM, seed=number))):
            names = ["plain", *DRAFTERS]
            order = names if number % 2 else names[::-1]
            made = {name: await say(prompt, tokens, sampling, DRAFTERS.get(name, "")) for name in order}
            for name in DRAFTERS:
                tallies[name, kind].add(made[name], made["plain"])
        tell(f"prompt {number + 1} of {len(prompts)}")
    best = max(DRAFTERS, key=lambda name: statistics.median(tallies[name, ""].speedups))
    result.add("tokens_per_round_trip", tallies[best, ""].tokens_per_round_trip, f"greedy, {best}")
    result.add_median("speedup_over_plain", tallies[best, ""].speedups, f"greedy, {best}")
    result.add("identical_share", statistics.fmean(same for tally in tallies.values() for same in tally.same))
    for (name, kind), tally in tallies.items():
        result.add(f"{name}{kind}_tokens_per_round_trip", tally.tokens_per_round_trip)
        result.add_median(f"{name}{kind}_speedup_over_plain", tally.speedups)
        result.add(f"{name}{kind}_identical_share", statistics.fmean(tally.same))


async def _losses(result: Figures, say: _Say, prompt: list[int], rounds: int, tokens: int, tell: Tell) -> None:
    """Tokens per second with `auto` over those without, where drafting is of no use."""
    medians: dict[str, float] = {}
    for kind, sampling in HOPELESS.items():
        trips: list[float] = []

        async def once(draft: str, sampling: Sampling = sampling, trips: list[float] = trips) -> float:
            record = await say(prompt, tokens, sampling, draft)
            if draft:
                trips.append(record.round_trips_per_token)
            return record.tpot_s

        times = await interleaved({"plain": partial(once, ""), "auto": partial(once, "auto")}, rounds, tell)
        over = ratios(times["plain"], times["auto"])
        medians[kind] = statistics.median(over)
        result.add_median(f"worst_case_{kind}_over_plain", over)
        result.add(f"worst_case_{kind}_tokens_per_round_trip", 1 / statistics.fmean(trips))
    worst = min(medians, key=lambda kind: medians[kind])
    result.add("worst_case_over_plain", medians[worst], worst)


def _same_noise(result: Figures, ids: Sequence[int]) -> None:
    """How often a drafted token is accepted at each position of a text, if those before it are the text."""
    checkpoint = Checkpoint(locate("bundled"))
    full = _logits(checkpoint, ids, Weights.FULL, checkpoint.architecture.spec.num_layers)
    drafters = {
        "int4": _logits(checkpoint, ids, Weights.INT4, checkpoint.architecture.spec.num_layers),
        "early": _logits(checkpoint, ids, Weights.FULL, 2),
    }
    for temperature in (WARM, 1.0):
        p = (full.double() / temperature).softmax(-1)
        for name, logits in drafters.items():
            q = (logits.double() / temperature).softmax(-1)
            coupled = statistics.fmean(coupled_acceptance(a, b) for a, b in zip(p, q, strict=True))
            result.add(f"{name}_acceptance_coupled_{temperature:g}", coupled)
            result.add(f"{name}_acceptance_standard_{temperature:g}", float(torch.minimum(p, q).sum(-1).mean()))


def coupled_acceptance(p: Tensor, q: Tensor) -> float:
    """Probability that two distributions (vocab,) draw the same token with the same Gumbel noise: the sum over i of
    1 / sum over j of max(p_j / p_i, q_j / q_i). Both are taken from the smallest positive number on."""
    p, q = (x.double().clamp_min(1e-300) for x in (p, q))
    order = (q / p).argsort()
    p, q = p[order], q[order]
    others = (
        p.cumsum(0) / p + (q.sum() - q.cumsum(0)) / q
    )  # the first of the two is larger up to j = i, then the second
    return float((1 / others).sum())


@torch.inference_mode()
def _logits(checkpoint: Checkpoint, ids: Sequence[int], weights: Weights, layers: int) -> Tensor:
    """Of every position, (positions, vocab), with the head behind so many layers."""
    spec = checkpoint.architecture.spec
    need = need_of(Partition.all_on(spec, DEVICE), DEVICE)
    resident = Resident(checkpoint, Dtype.FP32, weights, torch.device("cpu"))
    resident.load(need)
    share = Share(resident, need, len(ids))
    at = share.positions(0, len(ids))
    return share.all_logits(share.run(share.embed(ids, at), 0, 2 * layers, at))
