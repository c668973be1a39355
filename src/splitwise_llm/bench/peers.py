"""Beside llama.cpp and its RPC server: the same random Llama, the same cut behind the same link, as many threads; and
what is left of a generation when the far process is killed. Both take turns within every round.

The halves of the cut are the same on both sides, and embedding and head stay on the device: what crosses is then least
for llama.cpp, which would otherwise send all logits back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from splitwise_llm.bench.figures import Figures, interleaved, ratios
from splitwise_llm.bench.overhead import NO_WORDS, Tell
from splitwise_llm.bench.peers_gguf import write_gguf
from splitwise_llm.bench.peers_llamacpp import (
    Binaries,
    Program,
    Taken,
    half_remote,
    processor_s,
    quantised,
    rpc_server,
    server,
    take,
)
from splitwise_llm.bench.random_models import make_model
from splitwise_llm.bench.rig import Host, Line
from splitwise_llm.decision import Decision
from splitwise_llm.engine.drafting import Draft
from splitwise_llm.engine.edge import Edge, edge_with
from splitwise_llm.engine.memory import available_memory_bytes
from splitwise_llm.engine.survey import LOSSLESS
from splitwise_llm.engine.walk import Choose
from splitwise_llm.errors import LinkDied, MemoryTooSmall, UserError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.spec import Dtype, Kernels, ModelSpec, Weights
from splitwise_llm.units import show_bytes
from splitwise_llm.wire.shaper import LinkShape

TINYLLAMA: Mapping[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 22, "hidden_size": 2048, "num_attention_heads": 32,
    "num_key_value_heads": 4, "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}  # fmt: skip
QUICK_LAYERS = 4
PROMPT_TOKENS, SHORT_TOKENS, SHORT_TEXT = 128, 16, 96
RTTS_MS = (1, 20, 80)
RATE = "20mbit"
PARTS = ("local", "link", "kill", "draft")
MEMORY_SHARE, DISK_SHARE = 2.6, 4.0
"""Of the fp32 weights: both programs hold them once; the model lies there as it is, as GGUF, and in four formats."""


Meter = Callable[[], float]
TEXT_TOKENS = 48
DRAFT = Draft("ngram", 8, is_free=True)
"""As `--draft auto`: lookup in the text so far, as far as it pays."""
OUR_WAYS: Mapping[str, Draft | None] = {
    "plain": None,
    "lookup": DRAFT,
    "int4": Draft("bundled", 8, is_free=False, weights=Weights.INT4),
}
"""By what ours drafts the bundled model's text; int4: as `--draft bundled:int4`, the model's own copy on the device."""
THEIR_WAYS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "lookup": (
        "--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3", "--spec-ngram-simple-size-m", "8",
    ),
    "int4": ("--spec-type", "draft-simple", "--spec-draft-n-max", "8", "-devd", "none", "-ngld", "0", "-md"),
}  # fmt: skip
"""llama.cpp without drafting, with its own lookup (as it comes it looks for 12 ids in a row; prose has none), and with
the model's Q4_0 copy, whose file is to follow, all of it on the device."""
TEXT_FIGURES = (
    ("text_over_llamacpp", "int4", "plain", "ours drafts by its int4 copy, llama.cpp does not"),
    ("text_over_llamacpp_int4", "int4", "int4", "both draft by a 4-bit copy of the model"),
    ("text_lookup_over_llamacpp", "lookup", "plain", "ours drafts by lookup, llama.cpp does not"),
    ("text_lookup_over_llamacpp_lookup", "lookup", "lookup", "both draft by lookup"),
    ("text_plain_over_llamacpp", "plain", "plain", "nobody drafts"),
)
"""Name, our way, their way, and what that is in words."""


@dataclass(frozen=True, slots=True)
class Format:
    """As many bits a weight, here and there; of several of theirs the fastest counts."""

    name: str
    dtype: Dtype
    weights: Weights
    theirs: tuple[str, ...]


SIXTEEN = Format("16", Dtype.BF16, Weights.FULL, ("BF16", "F16"))
FORMATS = (
    Format("fp32", Dtype.FP32, Weights.FULL, ("F32",)),
    SIXTEEN,
    Format("8", Dtype.BF16, Weights.INT8, ("Q8_0",)),
    Format("4", Dtype.BF16, Weights.INT4, ("Q4_0",)),
)
"""Q4_0 as it is handed out: its head has more bits (Q6_K), as our token table has (int8)."""


@dataclass(frozen=True, slots=True)
class PeersOptions:
    """What is compared, and how long."""

    llamacpp: Path
    quick: bool = False
    threads: int = 1
    rounds: int = 5
    tokens: int = 24
    parts: tuple[str, ...] = PARTS
    folder: Path | None = None
    """Where models are made; a temporary folder otherwise."""
    kernels: Kernels = Kernels.AUTO
    """Ours for few rows."""


@dataclass(frozen=True, slots=True)
class _Setup:
    options: PeersOptions
    binaries: Binaries
    model: Path
    gguf: Path
    spec: ModelSpec
    tell: Tell

    def edge(self, workers: Mapping[str, str], form: Format) -> Edge:
        return edge_with(
            str(self.model), workers, dtype=form.dtype, weights=form.weights, threads=self.options.threads,
            kernels=self.options.kernels,
        )  # fmt: skip

    def prompt(self, tokens: int) -> list[int]:
        """Ids without a pattern, none of them special."""
        return [3 + 7919 * number % (self.spec.vocab_size - 3) for number in range(tokens)]


async def run_peers(options: PeersOptions, tell: Tell) -> Figures:
    """See docs/peers.md for every figure. Raises UserError, MemoryTooSmall, WorkerFailed."""
    binaries = Binaries.find(options.llamacpp)
    layers = QUICK_LAYERS if options.quick else TINYLLAMA["num_hidden_layers"]
    settings: dict[str, object] = {
        "layers": layers, "rounds": options.rounds, "tokens": options.tokens, "prompt": PROMPT_TOKENS, "rate": RATE,
        "threads_per_process": options.threads, "kernels": str(options.kernels),
    }  # fmt: skip
    result = Figures("peers", settings)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        if {*options.parts} - {"draft"}:
            setup = _setup(options, binaries, Path(place), {**TINYLLAMA, "num_hidden_layers": layers}, tell)
            if "local" in options.parts:
                for one in FORMATS:
                    await _local(result, setup, one)
            if {"link", "kill"} & {*options.parts}:
                await _across(result, setup)
        if "draft" in options.parts:
            await _drafted(result, options, binaries, Path(place), tell)
    return result


def _setup(options: PeersOptions, binaries: Binaries, place: Path, config: Mapping[str, Any], tell: Tell) -> _Setup:
    check_room(weight_bytes(config), available_memory_bytes(), shutil.disk_usage(place).free)
    tell(f"making a random Llama of TinyLlama's shape, {config['num_hidden_layers']} layers, and the same as GGUF")
    model, gguf = make_model(place / "model", config), place / "model.gguf"
    gc.collect()
    (model / "tokenizer.json").write_text(NO_WORDS)
    write_gguf(model, gguf)
    return _Setup(options, binaries, model, gguf, Checkpoint(model).architecture.spec, tell)


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Of an untied Llama in fp32, norms apart."""
    width, heads, groups = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    attention = 2 * width * width + 2 * width * width * groups // heads
    layer = attention + 3 * width * config["intermediate_size"]
    return 4 * int(config["num_hidden_layers"] * layer + 2 * config["vocab_size"] * width)


def check_room(weights: int, memory: int, disk: int) -> None:
    """Bytes of weights against what is free. Raises MemoryTooSmall, UserError."""
    if memory < MEMORY_SHARE * weights:
        raise MemoryTooSmall(
            f"{show_bytes(weights)} of weights, held by both programs, need {show_bytes(int(MEMORY_SHARE * weights))} "
            f"of memory and {show_bytes(memory)} are free; --quick takes fewer layers"
        )
    if disk < DISK_SHARE * weights:
        raise UserError(
            f"the models need {show_bytes(int(DISK_SHARE * weights))} on disk and {show_bytes(disk)} are free; --quick "
            "takes fewer layers, --folder another place"
        )


async def _ours(
    edge: Edge, decision: Decision | str, prompt: Sequence[int], tokens: int, meter: Meter, *,
    draft: Draft | None = None, choose: Choose | None = None,
) -> Taken:  # fmt: skip
    shown: list[float] = []
    asked = edge.generate(prompt, decision, max_new_tokens=tokens, stop_ids=(), draft=draft, choose=choose)
    async with asked as generation:
        async for _ in generation:
            shown.append(meter())
    record = generation.record
    return Taken(record.token_ids, record.token_times_s, tuple(shown), record.round_trips_per_token)


async def _theirs(program: Program, prompt: Sequence[int], tokens: int, meter: Meter) -> Taken:
    return await asyncio.to_thread(lambda: take(program.completion(prompt, tokens), meter))


def _carried(line: Line) -> Meter:
    """Bytes over a link."""
    return lambda: line.carried_bytes


async def _rounds(
    runs: Mapping[str, Callable[[], Awaitable[Taken]]], rounds: int, tell: Tell
) -> dict[str, list[Taken]]:
    """Interleaved, by name; the first round is thrown away."""
    all_taken: dict[str, list[Taken]] = {name: [] for name in runs}

    async def once(name: str) -> float:
        taken = await runs[name]()
        all_taken[name].append(taken)
        return taken.typical_tpot_s

    await interleaved({name: partial(once, name) for name in runs}, rounds, tell)
    return {name: taken[1:] for name, taken in all_taken.items()}


def fastest(taken: Mapping[str, Sequence[Taken]], seconds: Callable[[Taken], float]) -> tuple[str, list[float]]:
    """Whose median is the least, and its times."""
    name = min(taken, key=lambda one: statistics.median(map(seconds, taken[one])))
    return name, [seconds(one) for one in taken[name]]


def same_share(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Of so many tokens, those before the first that differs."""
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return same / max(len(ours), len(theirs))


async def _local(result: Figures, setup: _Setup, form: Format) -> None:
    """`decode_over_llamacpp_*` and `prefill_over_llamacpp_*`: tokens/s, all in one process."""
    options = setup.options
    setup.tell(f"one machine, {form.name} bits" if form.name.isdigit() else f"one machine, {form.name}")
    prompt = setup.prompt(PROMPT_TOKENS)
    with contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[], Awaitable[Taken]]] = {}
        edge = stack.enter_context(setup.edge({}, form))
        runs["ours"] = partial(_ours, edge, "all:edge", prompt, options.tokens, partial(processor_s, os.getpid()))
        for kind in form.theirs:
            file = await asyncio.to_thread(quantised, setup.binaries, setup.gguf, kind)
            program = stack.enter_context(server(setup.binaries, file, options.threads))
            runs[kind] = partial(_theirs, program, prompt, options.tokens, partial(processor_s, program.process.pid))
        taken = await _rounds(runs, options.rounds, setup.tell)
    del edge, runs
    gc.collect()
    ours = taken.pop("ours")
    for what, seconds in (("decode", _typical), ("prefill", _ttft), ("decode_processor", _metered)):
        name, theirs = fastest(taken, seconds)
        mine = [seconds(one) for one in ours]
        if math.isnan(sum(mine) + sum(theirs)):
            continue
        unit = "tokens per second of processor" if seconds is _metered else "tokens/s"
        result.add_median(f"{what}_over_llamacpp_{form.name}", ratios(theirs, mine), f"{unit}, over its {name}")
        for whose, times in (("ours", mine), ("llamacpp", theirs)):
            many = PROMPT_TOKENS if what == "prefill" else 1
            result.add_median(f"{what}_tokens_per_s_{whose}_{form.name}", [many / one for one in times])
    if form is SIXTEEN:
        result.add("prefill_over_llamacpp", result.figures[f"prefill_over_llamacpp_{form.name}"], "the same, 16 bits")
    if form.dtype is Dtype.FP32:
        result.add("same_tokens_fp32", same_share(ours[0].ids, taken[form.theirs[0]][0].ids), "up to a tie")


def _typical(one: Taken) -> float:
    return one.typical_tpot_s


def _metered(one: Taken) -> float:
    return one.metered


def _ttft(one: Taken) -> float:
    return one.ttft_s


def link_shape(rtt_ms: float) -> LinkShape:
    """Of the link that both are behind."""
    return LinkShape.parse(f"rtt={rtt_ms:g}ms rate={RATE}")


async def _across(result: Figures, setup: _Setup) -> None:
    """`link_over_llamacpp_*`, bytes per token, and the kill."""
    options, spec, form = setup.options, setup.spec, SIXTEEN
    setup.tell("half of the layers on another process behind a link; its weights travel unshaped")
    file = await asyncio.to_thread(quantised, setup.binaries, setup.gguf, form.theirs[0])
    words = ("--dtype", str(form.dtype), "--weights", str(form.weights), "--threads", str(options.threads))
    with (
        Host(str(setup.model), *words) as cloud,
        Line(cloud.address, LinkShape()) as our_line,
        setup.edge({"cloud": our_line.address}, form) as edge,
        rpc_server(setup.binaries, options.threads) as far,
        Line(far.address, LinkShape()) as their_line,
        server(setup.binaries, file, options.threads, *half_remote(spec.num_layers, their_line.address)) as near,
    ):
        half = spec.num_layers // 2
        cut = edge.partition(f"edge[0:{half}] cloud[{half}:{spec.num_layers}] head=edge")
        pair = _Pair(setup, edge, Decision(cut, LOSSLESS[form.dtype]), our_line, near, their_line)
        if "link" in options.parts:
            await _links(result, pair)
        if "kill" in options.parts:
            await _kill(result, pair, cloud, far)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both, each behind a link of its own that is the same."""

    setup: _Setup
    edge: Edge
    decision: Decision
    our_line: Line
    near: Program
    their_line: Line

    async def ours(self, rtt_ms: float, prompt: Sequence[int], tokens: int) -> Taken:
        self.our_line.reshape(link_shape(rtt_ms))
        return await _ours(self.edge, self.decision, prompt, tokens, _carried(self.our_line))

    async def drafted(self, rtt_ms: float, text: Sequence[int], at: Iterator[int]) -> Taken:
        """What ours takes to write a text that is given, another part of it each time."""
        self.our_line.reshape(link_shape(rtt_ms))
        part = text[next(at) :][: SHORT_TEXT + TEXT_TOKENS]
        decision = replace(self.decision, draft=DRAFT.most)
        return await _ours(
            self.edge, decision, part[:SHORT_TEXT], TEXT_TOKENS, _carried(self.our_line), draft=DRAFT,
            choose=lambda _, position: part[position],
        )  # fmt: skip

    async def theirs(self, rtt_ms: float, prompt: Sequence[int], tokens: int) -> Taken:
        self.their_line.reshape(link_shape(rtt_ms))
        return await _theirs(self.near, prompt, tokens, _carried(self.their_line))


class Killable(Protocol):
    """A process that can be ended without a good-bye."""

    def kill(self) -> int: ...


def held_out() -> list[int]:
    """Text that the bundled model was not trained on, as its ids."""
    text = (resources.files("splitwise_llm") / "data" / "excerpt.txt").read_text()
    return Tokenizer(locate("bundled")).encode(text)


async def _links(result: Figures, pair: _Pair) -> None:
    options, prompt = pair.setup.options, pair.setup.prompt(SHORT_TOKENS)
    text = held_out()
    runs: dict[str, Callable[[], Awaitable[Taken]]] = {}
    for rtt_ms in RTTS_MS:
        runs[f"ours {rtt_ms}"] = partial(pair.ours, rtt_ms, prompt, options.tokens)
        runs[f"theirs {rtt_ms}"] = partial(pair.theirs, rtt_ms, prompt, options.tokens)
        places = iter(range(0, len(text) - SHORT_TEXT - TEXT_TOKENS, SHORT_TEXT + TEXT_TOKENS))
        runs[f"drafted {rtt_ms}"] = partial(pair.drafted, rtt_ms, text, places)
    taken = await _rounds(runs, options.rounds, pair.setup.tell)
    for rtt_ms in RTTS_MS:
        ours, theirs = ([_typical(one) for one in taken[f"{who} {rtt_ms}"]] for who in ("ours", "theirs"))
        result.add_median(f"link_over_llamacpp_{rtt_ms}ms", ratios(ours, theirs), "ms/token, 16 bits, not drafted")
        drafted = [one.tpot_s for one in taken[f"drafted {rtt_ms}"]]
        over = ratios(drafted, theirs)
        result.add_median(f"link_drafted_over_llamacpp_{rtt_ms}ms", over, "ours drafts by lookup, held-out text")
        result.add_median(f"link_ms_per_token_ours_{rtt_ms}ms", [1e3 * one for one in ours])
        result.add_median(f"link_ms_per_token_llamacpp_{rtt_ms}ms", [1e3 * one for one in theirs])
    several = [1 / one.round_trips for rtt_ms in RTTS_MS for one in taken[f"drafted {rtt_ms}"]]
    result.add_median("link_drafted_tokens_per_round_trip", several)
    for who, name in (("ours", "ours"), ("theirs", "llamacpp")):
        counted = [one.metered for rtt_ms in RTTS_MS for one in taken[f"{who} {rtt_ms}"]]
        result.add_median(f"link_bytes_per_token_{name}", counted, "both ways, framing included")


async def _kill(result: Figures, pair: _Pair, cloud: Host, far: Program) -> None:
    """`tokens_after_kill_*`: what comes after SIGKILL of the far process at the same token."""
    total = pair.setup.options.tokens
    at, prompt = max(2, total // 3), pair.setup.prompt(SHORT_TOKENS)
    pair.setup.tell(f"killing the far process of each at token {at} of {total}")
    pair.our_line.reshape(link_shape(RTTS_MS[1]))
    pair.their_line.reshape(link_shape(RTTS_MS[1]))
    count, killed_s, next_s = 0, 0.0, math.inf
    async with pair.edge.generate(prompt, pair.decision, max_new_tokens=total, stop_ids=()) as generation:
        async for _ in generation:
            count += 1
            if count == at:
                cloud.kill()
                killed_s = time.perf_counter()
            elif count == at + 1:
                next_s = time.perf_counter() - killed_s
    theirs, error = await asyncio.to_thread(after_kill, pair.near.completion(prompt, total), far, at)
    result.add("tokens_after_kill_ours", count - at, f"of {total - at}; the first after {next_s:.2f} s")
    result.add("tokens_after_kill_llamacpp", theirs, f"of {total - at}; {error}" if error else f"of {total - at}")


def after_kill(tokens: Iterable[int], far: Killable, at: int) -> tuple[int, str]:
    """Kill the far process once `at` tokens are there; how many come then, and why not more."""
    count = 0
    try:
        for _ in tokens:
            count += 1
            if count == at:
                far.kill()
    except LinkDied as error:
        return count - at, str(error)
    return count - at, ""


async def _drafted(result: Figures, options: PeersOptions, binaries: Binaries, place: Path, tell: Tell) -> None:
    """`text_over_llamacpp_*`: the bundled model goes on from held-out text, both programs with their own words, which
    are the same. Each drafts in every way that it has."""
    tell("the bundled model on held-out text, drafting by lookup and by its 4-bit copy")
    model, gguf = locate("bundled"), place / "bundled.gguf"
    write_gguf(model, gguf)
    copy = await asyncio.to_thread(quantised, binaries, gguf, "Q4_0")
    prompt, layers = held_out()[:PROMPT_TOKENS], Checkpoint(model).architecture.spec.num_layers
    half, threads = layers // 2, options.threads
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        cloud = enter(Host(str(model), "--threads", str(threads)))
        line = enter(Line(cloud.address, LinkShape()))
        edge = enter(edge_with(str(model), {"cloud": line.address}, threads=threads))
        cut = edge.partition(f"edge[0:{half}] cloud[{half}:{layers}] head=edge")
        pairs: dict[str, tuple[Program, Line]] = {}
        for way, flags in THEIR_WAYS.items():
            far = enter(rpc_server(binaries, threads))
            theirs = enter(Line(far.address, LinkShape()))
            remote = (*half_remote(layers, theirs.address), *flags, *([str(copy)] if way == "int4" else []))
            pairs[way] = enter(server(binaries, gguf, threads, *remote)), theirs

        async def our(way: str, rtt_ms: int) -> Taken:
            draft = OUR_WAYS[way]
            decision = Decision(cut, draft=draft.most if draft else 0)
            line.reshape(link_shape(rtt_ms))
            return await _ours(edge, decision, prompt, TEXT_TOKENS, _carried(line), draft=draft)

        async def their(way: str, rtt_ms: int) -> Taken:
            program, their_line = pairs[way]
            their_line.reshape(link_shape(rtt_ms))
            return await _theirs(program, prompt, TEXT_TOKENS, _carried(their_line))

        runs: dict[str, Callable[[], Awaitable[Taken]]] = {}
        for rtt_ms in RTTS_MS:
            runs |= {f"ours {way} {rtt_ms}": partial(our, way, rtt_ms) for way in OUR_WAYS}
            runs |= {f"llamacpp {way} {rtt_ms}": partial(their, way, rtt_ms) for way in THEIR_WAYS}
        taken = await _rounds(runs, options.rounds, tell)
    for rtt_ms in RTTS_MS:
        times = {
            (who, way): [one.tpot_s for one in taken[f"{who} {way} {rtt_ms}"]]
            for who, ways in (("ours", OUR_WAYS), ("llamacpp", THEIR_WAYS))
            for way in ways
        }
        for name, mine, its, words in TEXT_FIGURES:
            over = ratios(times["ours", mine], times["llamacpp", its])
            result.add_median(f"{name}_{rtt_ms}ms", over, f"ms/token, bundled model; {words}")
        for (who, way), values in times.items():
            result.add_median(f"text_ms_per_token_{who}_{way}_{rtt_ms}ms", [1e3 * one for one in values])
    for way in ("int4", "lookup"):
        several = [1 / one.round_trips for rtt_ms in RTTS_MS for one in taken[f"ours {way} {rtt_ms}"]]
        result.add_median(f"text_{way}_tokens_per_round_trip", several, "ours")
    plain = taken[f"ours plain {RTTS_MS[0]}"][0].ids
    same = [one.ids == plain for name, all_taken in taken.items() if name.startswith("ours") for one in all_taken]
    result.add("text_identical_share", statistics.fmean(same), "of ours, drafted or not, at every round trip")
    theirs_plain = taken[f"llamacpp plain {RTTS_MS[0]}"][0].ids
    result.add("same_tokens_text", same_share(plain, theirs_plain), "of both programs, up to a tie")
