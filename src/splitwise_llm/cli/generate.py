"""Commands that answer a prompt, and go on with an answer whose process died: generate, resume."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitwise_llm.cli.options import (
    DtypeOption,
    Emulate,
    JsonFile,
    KernelsOption,
    LowLevel,
    Memory,
    Model,
    Profile,
    Threads,
    Tls,
    WeightsOption,
    app,
    keep_records,
    machine_options,
    note,
    pairs,
    run,
    two_names,
    write_json,
)
from splitwise_llm.cli.prefill_bar import PrefillBar
from splitwise_llm.cli.several import IN_FLIGHT, asked_prompts
from splitwise_llm.cost import UNLIMITED, Floor, Limits
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import JournalError, RequestError
from splitwise_llm.observation import EVERYTHING, Always, Policy, Tools
from splitwise_llm.spec import Dtype, Kernels, Weights, find_device

if TYPE_CHECKING:
    from splitwise_llm.engine.backoff import RecoveryRules
    from splitwise_llm.engine.drafting import Draft
    from splitwise_llm.engine.edge import Edge
    from splitwise_llm.engine.generation import Generation
    from splitwise_llm.policies.mind import Splitwise
    from splitwise_llm.records import RequestRecord

QUIET_EVENTS = ("fill", "carry", "attempt", "unreached")
"""What is told only with --explain; the record has it all."""


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; - reads standard input.")] = None,
    model: Model = "bundled",
    machine: Annotated[list[str] | None, typer.Option(help="A worker, as cloud=127.0.0.1:7070; repeatable.")] = None,
    prompts: Annotated[
        str, typer.Option(help="Instead of one: a file with a prompt per line (.jsonl: JSON texts); - for stdin.")
    ] = "",
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Of --prompts, so many under way at a time.", show_default=str(IN_FLIGHT))
    ] = None,
    partition: Annotated[
        str, typer.Option(help="As in 'edge[0:2] cloud[2:6] edge[6:8]'.", show_default="all:edge")
    ] = "",
    policy: Annotated[
        str,
        typer.Option(
            help="Who chooses instead, now and while tokens flow, as in drift; splitwise:FILE, "
            "splitwise-paper:FILE with weights that `train` made, tuned:FILE with constants of `bench constants`."
        ),
    ] = "",
    low_level: LowLevel = "",
    floor: Annotated[str, typer.Option(help="First and last layers that stay on the device, as in 2+2.")] = "",
    allow_lossy: Annotated[bool, typer.Option(help="The policy may use int8 and int4 on the wire.")] = False,
    explain: Annotated[bool, typer.Option(help="Say what is chosen, each time, with its price.")] = False,
    wire: Annotated[WirePrecision | None, typer.Option(help="Activations on the wire.", show_default="fp32")] = None,
    prefill_wire: Annotated[
        WirePrecision | None, typer.Option(help="The prompt's activations on the wire.", show_default="as --wire")
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(min=0, help="Prompt positions per prefill chunk; 0: all at once.", show_default="by price"),
    ] = None,
    draft: Annotated[
        str,
        typer.Option(
            help="Who proposes tokens, so that one round trip brings several: ngram, a smaller MODEL of the same "
            "tokenizer (or MODEL:int4), early:N (the model's own first layers), auto (ngram as far as it pays), off.",
            show_default="off; with --policy as it says",
        ),
    ] = "",
    draft_tokens: Annotated[int, typer.Option(help="Proposed at a time, at most.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    loss: Annotated[float, typer.Option(help="Probability that an element is lost on the wire.")] = 0.0,
    link: Annotated[list[str] | None, typer.Option(help="Shape a link, as 'cloud=rtt=20ms rate=20mbit'.")] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(help="Replay recorded rates on a link, as cloud=walk.csv.gz (FILE:cut leaves out gaps)."),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(help="Break a link, as 'cloud=drop-both after=2s for=3s'; kinds and units: docs/recovery.md."),
    ] = None,
    link_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="What to believe of a link, as cloud=20mbit, 'cloud=up=5mbit down=50mbit', cloud+third=1gbit."
        ),
    ] = None,
    direct: Annotated[list[str] | None, typer.Option(help="Workers that reach each other, as cloud+third.")] = None,
    journal: Annotated[
        Path | None, typer.Option(help="Keep a journal there, from which `splitwise resume` can go on.")
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(min=0, help="Wait so many times the time of moving for a lost machine; inf: for ever."),
    ] = None,
    shadow: Annotated[
        bool, typer.Option(help="The device keeps a cache of everything, to go on alone at once.")
    ] = False,
    give_up: Annotated[float, typer.Option(min=0, help="Seconds after which a lost machine is given up.")] = 3600.0,
    dtype: DtypeOption = Dtype.FP32,
    weights: WeightsOption = Weights.FULL,
    kernels: KernelsOption = Kernels.AUTO,
    threads: Threads = 1,
    memory: Memory = "",
    emulate: Emulate = "",
    profile: Profile = "",
    tls: Tls = None,
    json_file: JsonFile = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Append a line per answer there, for `simulate --from-records`.", dir_okay=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Answer a prompt, or several at a time, alone or with running workers; answers survive links and machines that
    are lost."""
    from splitwise_llm.cli.several import show_answers
    from splitwise_llm.engine.flight import Agreed
    from splitwise_llm.model.sampling import Sampling
    from splitwise_llm.wire.codec import ElementLoss

    policy = _absolute_behind(policy)
    said = {
        "model": _absolute(model), "machine": machine or [], "partition": partition, "policy": policy,
        "low_level": low_level, "floor": floor,
        "allow_lossy": allow_lossy, "wire": wire, "chunk": chunk, "link": [_settled_link(one) for one in link or []],
        "trace": [_settled_file(one) for one in trace or []],
        "fault": fault or [], "link_rate": link_rate or [], "direct": direct or [],
        "patience": None if patience is None else str(patience),
        "shadow": shadow, "give_up": str(give_up), "dtype": dtype, "weights": weights, "kernels": kernels,
        "threads": threads,
        "memory": memory, "emulate": _absolute(emulate), "profile": _absolute(profile),
        "tls": _absolute(str(tls)) if tls else "",
        "prefill_wire": prefill_wire, "draft": _absolute_draft(draft), "draft_tokens": draft_tokens,
    }  # fmt: skip
    texts = asked_prompts(prompt, prompts, in_flight, journal)
    asked = _Asked(json.loads(json.dumps(said)), explain, (in_flight or IN_FLIGHT) if prompts else None)
    sampling = Sampling(temperature, top_k, top_p, seed)
    keep_records(records)  # what cannot be written is said now

    async def work() -> None:
        with asked.edge() as edge:
            if prompts:
                decides = Agreed(asked.decides(edge))
                await show_answers(
                    lambda number: edge.generate(
                        texts[number], decides, max_new_tokens=max_new_tokens, sampling=sampling,
                        loss=ElementLoss(loss, seed), called=policy, limits=asked.limits, tools=asked.tools,
                        rules=asked.rules,
                    ),
                    len(texts), asked.in_flight or IN_FLIGHT, json_file, quiet, QUIET_EVENTS if not explain else (),
                    records,
                )  # fmt: skip
                warn(edge)
                return
            generation = edge.generate(
                texts[0], asked.decides(edge), max_new_tokens=max_new_tokens, sampling=sampling,
                loss=ElementLoss(loss, seed), called=policy, limits=asked.limits, tools=asked.tools, rules=asked.rules,
                journal=journal, options=asked.said, draft=asked.draft,
            )  # fmt: skip
            await _show(generation, asked, json_file, quiet)
            keep_records(records, [generation.record])
            warn(edge)

    def warn(edge: Edge) -> None:
        if warning := edge.machine.emulation_warning:
            note(warning)

    run(work, json_file)


@app.command()
def resume(
    journal: Annotated[Path, typer.Argument(help="The file that `generate --journal` kept.")],
    machine: Annotated[
        list[str] | None, typer.Option(help="Where a worker is now, if it has moved; every name that was given.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Say what is chosen, each time, with its price.")] = False,
    json_file: JsonFile = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the text.")] = False,
) -> None:
    """Go on with an answer whose process died: the text so far, then the rest, as if nothing had happened."""
    from splitwise_llm.engine.journal import read_journal

    saved = read_journal(journal)
    said = dict(saved.entry.options)
    if not said.get("model"):
        raise JournalError(f"{journal}: it was not kept by `splitwise generate`; go on with `Edge.resume`")
    if saved.finished:
        from splitwise_llm.model.checkpoint import locate
        from splitwise_llm.model.tokenizer import Tokenizer

        print(Tokenizer(locate(str(said["model"]))).decode([token.id for token in saved.tokens]))
        if not quiet:
            note(f"{journal}: this answer is complete ({saved.finished})")
        return
    said["fault"] = []  # what was broken on purpose was the other process's
    if machine:
        names = list(pairs(_words(said["machine"]), "--machine", "cloud=127.0.0.1:7070"))
        given = pairs(machine, "--machine", "cloud=127.0.0.1:7070")
        if sorted(given) != sorted(names):
            raise RequestError(f"--machine names {', '.join(given)}; this session's workers are {', '.join(names)}")
        said["machine"] = [f"{name}={given[name]}" for name in names]
    asked = _Asked(said, explain)
    if saved.note and not quiet:
        note(saved.note)

    async def work() -> None:
        with asked.edge() as edge:
            generation = edge.resume(
                journal, asked.decides(edge), called=asked.policy_name, limits=asked.limits, tools=asked.tools,
                rules=asked.rules, draft=asked.draft,
            )  # fmt: skip
            print(generation.certain, end="", flush=True)
            await _show(generation, asked, json_file, quiet)

    run(work, json_file)


class _Asked:
    """What the command line said of machines, links and decisions, as both commands need it and a journal keeps it."""

    def __init__(self, said: Mapping[str, Any], explain: bool, in_flight: int | None = None) -> None:
        from splitwise_llm.cli.choice import asked_policy

        self.said, self._explain, self.in_flight = said, explain, in_flight
        self.policy_name: str = said["policy"]
        wire = WirePrecision(said["wire"]) if said["wire"] else None
        self._policy = asked_policy(
            self.policy_name, said["partition"], wire, said["chunk"], said["allow_lossy"], in_flight,
            said.get("low_level", ""), 1 + len(said["machine"]),
        )  # fmt: skip
        self._wire = wire or WirePrecision.FP32
        self.limits = Limits(Floor.parse(said["floor"])) if said["floor"] else UNLIMITED

    @property
    def tools(self) -> Tools | None:
        from splitwise_llm.engine.survey import DRAFTS, LOSSLESS, LOSSY

        if not self.said["allow_lossy"]:
            return None
        return Tools(
            (LOSSLESS[Dtype(self.said["dtype"])], *LOSSY), EVERYTHING.chunks, DRAFTS, (None, WirePrecision.INT8)
        )

    @property
    def draft(self) -> Draft | None:
        """Who proposes tokens; None where nothing was said. Raises RequestError."""
        from splitwise_llm.engine.drafting import Draft

        text = self.said.get("draft", "")
        return Draft.parse(text, self.said["draft_tokens"]) if text else None

    @property
    def rules(self) -> RecoveryRules:
        from splitwise_llm.engine.backoff import RecoveryRules

        return RecoveryRules(budget_s=float(self.said["give_up"]))

    def edge(self) -> Edge:
        """The device's end, with its ways to the workers. Raises UserError."""
        from splitwise_llm.engine.edge import LinkTo, edge_with
        from splitwise_llm.engine.survey import Rates
        from splitwise_llm.wire.faults import Layer, parse_schedule
        from splitwise_llm.wire.keys import device_files
        from splitwise_llm.wire.shaper import LinkShape

        said = self.said
        addresses = pairs(said["machine"], "--machine", "cloud=127.0.0.1:7070")
        links = pairs(said["link"], "--link", "'cloud=rtt=20ms rate=20mbit'")
        for name, file in pairs(said["trace"], "--trace", "cloud=walk.csv.gz").items():
            if "rate=" in links.get(name, ""):
                raise RequestError(f"--link and --trace both say what rate the link to {name} has; keep one")
            links[name] = f"{links.get(name, '')} rate='{file}'"
        faults = pairs(said["fault"], "--fault", "'cloud=reset after=2s'")
        reach = LinkTo(
            addresses,
            tls=device_files(Path(said["tls"])) if said["tls"] else None,
            shapes={name: LinkShape.parse(text) for name, text in links.items()},
            faults={name: parse_schedule(text, Layer.LINK) for name, text in faults.items()},
        )
        rates = {n: Rates.parse(s) for n, s in pairs(said["link_rate"], "--link-rate", "cloud=20mbit").items()}
        profile = find_device(said["profile"]) if said["profile"] else None
        return edge_with(
            said["model"], reach, dtype=Dtype(said["dtype"]), weights=Weights(said["weights"]),
            kernels=Kernels(said.get("kernels", Kernels.TORCH)), threads=said["threads"],
            direct=[two_names(pair) for pair in said["direct"]], rates=rates, profile=profile,
            **machine_options(said["memory"], said["emulate"]),
        )  # fmt: skip

    def decides(self, edge: Edge) -> Policy:
        """Who decides, with patience and shadow as they were asked for."""
        from splitwise_llm.cli.choice import Chunked, Explained, Insisting
        from splitwise_llm.cli.turned import turned

        said = self.said
        patience = None if said["patience"] is None else float(said["patience"])  # as text: JSON has no infinity
        if self._policy is None:
            partition = edge.partition(said["partition"] or "all:edge")
            draft = self.draft
            most = draft.most if draft and draft.by != "off" else 0
            prompt_wire = WirePrecision(said["prefill_wire"]) if said.get("prefill_wire") else None
            decision = Decision(
                partition, self._wire, said["chunk"] or None, most, shadow=said["shadow"], prefill_wire=prompt_wire
            )
            if patience is not None:
                decision = replace(decision, patience=patience)
            decides: Policy = Always(decision) if said["chunk"] is not None else Chunked(Always(decision))
        else:
            decides = Insisting.where_asked(self._policy, patience, said["shadow"])
        if not self._explain:
            return decides
        policy = self.splitwise
        besides = partial(turned, policy, names=edge.names) if policy else None
        return Explained(decides, self.policy_name or "--partition", edge.names, note, besides)

    @property
    def splitwise(self) -> Splitwise | None:
        """The policy of that name, if it is the one."""
        from splitwise_llm.policies.mind import Splitwise

        return self._policy if isinstance(self._policy, Splitwise) else None


async def _show(generation: Generation, asked: _Asked, json_file: Path | None, quiet: bool) -> None:
    """Print tokens as they come, and what happens to them besides."""
    if not quiet:
        generation.on_event = lambda kind, text: (
            None if kind in QUIET_EVENTS and not asked._explain else note(f"\n[{kind}] {text}")
        )
    bar = PrefillBar(not quiet)
    generation.on_prefill = bar.advance
    async with generation:
        for name, error in generation.unreachable.items() if asked.policy_name and not quiet else ():
            note(f"going on without {name}: {error}")
        try:
            async for token in generation:
                bar.stop()
                print(token.text, end="", flush=True)
        finally:
            bar.stop()
            print()
            path = generation.status.journal_path
            if path and not generation.is_complete and not quiet:
                note(f"`splitwise resume {path}` goes on from here")
    record = generation.record
    write_json(json_file, record.to_dict())
    if not quiet:
        note(_summary(record))
    if asked._explain:
        from splitwise_llm.cli.choice import hindsight

        for line in hindsight(record):
            note(line)
        if asked.splitwise:
            from splitwise_llm.cli.turned import counted

            for line in counted(asked.splitwise):
                note(line)


def _summary(record: RequestRecord) -> str:
    moves = sum(1 for one in record.runs if one.tokens) - 1
    return (
        f"[{record.partition}] {len(record.token_ids)} tokens, TTFT {1e3 * record.ttft_s:.1f} ms, "
        f"{1e3 * record.tpot_s:.2f} ms/token, {record.round_trips_per_token:g} round trips/token, "
        f"{record.up_bytes} B up, {record.down_bytes} B down"
        + (f", {moves} times on another partition or over another link" if moves > 0 else "")
        + (" (degraded)" if record.is_degraded else "")
        + (" (emulated)" if record.is_emulated else "")
    )


def _absolute(place: str) -> str:
    """A path that still leads there from elsewhere; what is no path stays."""
    return str(Path(place).resolve()) if place and Path(place).exists() else place


def _absolute_behind(policy: str) -> str:
    """A policy with the full path of its weights."""
    name, colon, file = policy.partition(":")
    return name + colon + _absolute(file)


def _absolute_draft(draft: str) -> str:
    """The same of a model with the format of its weights behind it."""
    model, colon, weights = draft.rpartition(":")
    return _absolute(draft) if Path(draft).exists() or not colon else f"{_absolute(model)}:{weights}"


def _settled_file(option: str) -> str:
    """`name=FILE` or `name=FILE:cut` with the file's full path."""
    name, equals, rest = option.partition("=")
    file, colon, how = rest.rpartition(":") if rest.endswith(":cut") else (rest, "", "")
    return name + equals + _absolute(file) + colon + how


def _settled_link(option: str) -> str:
    """`name=rtt=... rate=FILE ...` with files by their full paths; what cannot be read stays for who refuses it."""
    name, equals, rest = option.partition("=")
    try:
        words = [_settled_file(word) for word in shlex.split(rest)]
    except ValueError:
        return option
    return name + equals + shlex.join(words)


def _words(said: object) -> list[str]:
    return [str(word) for word in said] if isinstance(said, list) else []
