"""`splitwise plan`: the best partition for given machines and links, beside what every planner would choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from splitwise_llm.cli.decision_map import write_map
from splitwise_llm.cli.levels import compared
from splitwise_llm.cli.options import JsonFile, LowLevel, app, out, write_json
from splitwise_llm.cli.output import whole
from splitwise_llm.cli.seeking import Progress, Seeker
from splitwise_llm.cli.turned import turned
from splitwise_llm.cost import (
    NO_LOSS,
    UNLIMITED,
    Accuracy,
    Drafter,
    Floor,
    Host,
    Job,
    Limits,
    Load,
    Price,
    World,
    price,
)
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError, SplitwiseError
from splitwise_llm.observation import EVERYTHING, PLAIN, MachineView, Observation, Policy, Tools
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import POLICIES, find_policy, with_low_level
from splitwise_llm.policies.bounds import least_total_s
from splitwise_llm.policies.explain import Flip, Question, Sensitivity, sensitivities
from splitwise_llm.policies.low_level import Level, level_for, parse_level
from splitwise_llm.policies.mind import Splitwise
from splitwise_llm.policies.objective import Latency
from splitwise_llm.policies.planners import Planner
from splitwise_llm.policies.solver import Solution
from splitwise_llm.policies.tuned import Tuned
from splitwise_llm.report import flips_table, partition_picture, plans_table, seconds_text
from splitwise_llm.spec import Dtype, LinkSpec, ModelSpec, Weights, find_device, find_model
from splitwise_llm.units import parse_seconds, show_bytes


@dataclass(frozen=True, slots=True)
class _Asked:
    """The scenario of the command line."""

    world: World
    job: Job
    limits: Limits
    loads: Mapping[int, Load]
    batch: int
    wait_s: float
    names: tuple[str, ...]
    observation: Observation


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A shipped model (llama-2-7b), a directory or file with its sizes.")],
    edge: Annotated[str, typer.Option(help="The device: a file, or a shipped one (pi5, orin-nx, a100:llama.cpp).")],
    cloud: Annotated[list[str] | None, typer.Option(help="A worker, likewise; repeatable.")] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="'rtt=20ms up=50mbit down=50mbit', for all workers or one for each.")
    ] = None,
    request: Annotated[str, typer.Option(help="Prompt/output tokens.")] = "128/128",
    floor: Annotated[str, typer.Option(help="First+last layers that stay on the device, as in 2+2.")] = "",
    policy: Annotated[
        str,
        typer.Option(
            help="Show this planner's choice first; splitwise:FILE, splitwise-paper:FILE with weights that `train` "
            "made, tuned:FILE with constants of `bench constants`."
        ),
    ] = "",
    low_level: LowLevel = "",
    explain: Annotated[
        bool,
        typer.Option(
            help="Who found the plan of --policy splitwise or drift, and what the other low level would have; of "
            "splitwise also the knobs it turned, and the plain solver beside it."
        ),
    ] = False,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="With --policy splitwise: a figure of its decisions over RTT and load.")
    ] = None,
    edge_weights: Annotated[Weights, typer.Option(help="Weights on the device.")] = Weights.INT4,
    cloud_weights: Annotated[Weights, typer.Option(help="Weights on workers.")] = Weights.FULL,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that workers with slots run at a time.")] = 1,
    wait: Annotated[str, typer.Option(help="Until workers with slots admit a request, as in 100ms.")] = "0ms",
    tools: Annotated[str, typer.Option(help="plain, or all: wire precisions, prefill chunks, drafting.")] = "plain",
    acceptance: Annotated[float, typer.Option(help="Of drafted tokens; assumed, for --tools all.")] = 0.6,
    mesh: Annotated[bool, typer.Option(help="Join the workers with each other by the (first) link, too.")] = False,
    accuracy: Annotated[Path | None, typer.Option(help="Table of `splitwise profile --accuracy`.")] = None,
    budget: Annotated[
        float,
        typer.Option(min=0.1, max=86_400, help="Seconds for searches; then the best so far is taken, and said to be."),
    ] = 10.0,
    json_file: JsonFile = None,
) -> None:
    """Price every partition of a model over given machines: the best, each planner's, and what would change it."""
    if tools not in ("plain", "all"):
        raise RequestError(f"--tools {tools!r}: expected plain or all")
    policies = _policies(policy, parse_level(low_level), 1 + len(cloud or []))
    chosen = policies.get(policy)
    if map_file is not None and map_file.suffix not in (".png", ".svg", ".pdf"):
        raise RequestError(f"--map {map_file}: expected a file that ends in .png, .svg or .pdf")
    if map_file is not None and not isinstance(chosen, Splitwise):
        raise RequestError("--map is for --policy splitwise, which turns knobs")
    if explain and _drift(chosen) is None:
        raise RequestError("--explain is for --policy splitwise, drift and drift-selfish; others have only prices")
    spec, job = find_model(model), Job.parse(request)
    if job.prompt_tokens + job.tokens_out > spec.max_context:
        raise RequestError(
            f"{request} are {job.prompt_tokens + job.tokens_out} tokens, and {model} has a context of "
            f"{spec.max_context}; shorten the prompt or the answer"
        )
    hosts = [Host(find_device(edge), Dtype.FP16, edge_weights)]
    hosts += [Host(find_device(each), Dtype.FP16, cloud_weights) for each in cloud or []]
    table = Accuracy.from_file(accuracy) if accuracy else Accuracy.shipped(model) if model == "bundled" else NO_LOSS
    drafter = Drafter(acceptance if tools == "all" else 0.0)
    world = World(spec, tuple(hosts), _links(link or [], len(hosts) - 1, mesh), table, drafter)
    asked = _asked(world, job, _limits(floor, spec), batch, parse_seconds(wait), tools == "all")
    _say_what_is_assumed(asked, model, tools, acceptance)
    with whole(json_file) as part, Progress() as progress:
        _answer(asked, policies, policy, budget, progress, part, explain=explain)
        if map_file is not None and isinstance(chosen, Splitwise):
            progress.say("decisions over round-trip times and loads")
            with whole(map_file) as drawn:
                assert drawn is not None
                count = write_map(
                    chosen, asked.observation, f"{model} on {edge}, {request} tokens", drawn, map_file.suffix[1:]
                )
            out.print(f"{count} decisions over round-trip time and load: {map_file}", markup=False)


def _policies(named: str, low: Level | None, machines: int) -> dict[str, Policy]:
    """Everyone's row, and who is named, with the low level that was asked for. Raises RequestError."""
    level_for(low, machines)
    policies = {name: one for name, (_, one) in POLICIES.items()}
    if named:
        policies[named] = with_low_level(find_policy(named), low)
    return {name: with_low_level(one, low) if _drift(one) else one for name, one in policies.items()}


def _drift(policy: Policy | None) -> Planner | None:
    """Whose low level it is to choose for a policy; None: there is no choice."""
    if isinstance(policy, Splitwise):
        return policy.drift
    return policy if isinstance(policy, Planner) and policy.has_levels else None


def _links(texts: Sequence[str], workers: int, mesh: bool) -> dict[tuple[int, int], LinkSpec]:
    """Links of the device to each worker, and of workers to each other. Raises RequestError, SpecError."""
    if len(texts) not in ({0} if not workers else {1, workers}):
        wanted = "no --link without a --cloud" if not workers else f"one --link for all, or one for each of {workers}"
        raise RequestError(f"{len(texts)} links and {workers} workers; expected {wanted}")
    specs = [LinkSpec.parse(text) for text in texts]
    links = {(DEVICE, worker): specs[min(worker - 1, len(specs) - 1)] for worker in range(1, workers + 1)}
    if mesh:
        links |= {(a, b): specs[0] for a in range(1, workers + 1) for b in range(a + 1, workers + 1)}
    return links


def _limits(text: str, spec: ModelSpec) -> Limits:
    if not text:
        return UNLIMITED
    floor = Floor.parse(text)
    if floor.first_layers + floor.last_layers >= spec.num_layers:
        out.print(
            f"floor {text} covers all {spec.num_layers} layers of the model: everything stays on the device",
            markup=False,
        )
    return Limits(floor=floor)


def _asked(world: World, job: Job, limits: Limits, batch: int, wait_s: float, everything: bool) -> _Asked:
    """The scenario, with the load of the workers that serve others, too. Raises RequestError."""
    shared = [m for m, host in enumerate(world.hosts) if m != DEVICE and host.is_shared]
    if not shared and (batch > 1 or wait_s):
        raise RequestError("--batch and --wait are of workers that serve several requests at a time; none here does")
    for machine in shared:
        device = world.hosts[machine].device
        if batch > device.slots:
            raise RequestError(
                f"--batch {batch}: {device.name} runs at most {device.slots} sequences at a time (slots); whoever "
                "comes later waits: give --wait"
            )
    loads = {machine: world.load(machine, batch, wait_s, job.mean_context) for machine in shared}
    workers = len(world.hosts) - 1
    names = ("edge", "cloud") if workers == 1 else ("edge", *(f"cloud{n}" for n in range(1, workers + 1)))
    views = tuple(
        MachineView(name, True, int(host.device.memory_bytes), host.dtype, host.weights)
        for name, host in zip(names, world.hosts, strict=True)
    )
    observation = Observation(
        world.spec, views, job.prompt_tokens, job.tokens_out, world=world, loads=loads, limits=limits,
        tools=_tools(world, everything),
    )  # fmt: skip
    return _Asked(world, job, limits, loads, batch, wait_s, names, observation)


def _tools(world: World, everything: bool) -> Tools:
    """Nobody knows what int4 on the wire loses without a table, so it is left out then."""
    if not everything:
        return PLAIN
    known = world.accuracy is not NO_LOSS
    return replace(EVERYTHING, wires=EVERYTHING.wires if known else EVERYTHING.wires[:2])


def _say_what_is_assumed(asked: _Asked, model: str, tools: str, acceptance: float) -> None:
    out.print(f"{model}, {asked.job.prompt_tokens} prompt tokens, {asked.job.tokens_out} out", markup=False)
    for machine, (name, host) in enumerate(zip(asked.names, asked.world.hosts, strict=True)):
        said = f"{name}: {host.device.name}, weights {host.weights}, activations {host.dtype}"
        if machine:
            said += f", {asked.world.links[DEVICE, machine].text}"
        if machine in asked.loads:
            said += f", {asked.batch} in its batch, {seconds_text(asked.wait_s)} to be admitted"
        out.print(said, markup=False)
    if tools == "all":
        out.print(f"drafting by lookup; {acceptance:g} of drafted tokens are accepted (assumed)", markup=False)
    loss = asked.world.accuracy
    out.print(
        "nats: no table: counted as lossless" if loss is NO_LOSS else f"nats per token from {loss.source}", markup=False
    )


def _answer(
    asked: _Asked, policies: Mapping[str, Policy], policy: str, budget_s: float, progress: Progress,
    json_file: Path | None, *, explain: bool = False,
) -> None:  # fmt: skip
    tools = asked.observation.tools
    solver = Seeker(asked.world, asked.job, tools, asked.limits, budget_s, progress)
    conditions = asked.world.conditions(asked.loads)
    solution, is_spent = solver.solve(conditions, Latency()), solver.is_spent

    def priced(decision: Decision) -> Price:
        return price(asked.world, decision, asked.job, conditions)

    best = priced(solution.best.decision)
    other = priced(solution.runner_up.decision) if solution.runner_up else None
    choices, hurried = {}, []
    for name, one in policies.items():
        progress.say(f"what {name} would choose")
        hurry = is_spent and name != policy and _searches_alone(one, asked)
        choices[name] = (
            f"not asked, as its own search would not end in time; --policy {name} asks it"
            if hurry
            else _choice(one, asked, solver)
        )
        hurried += [name] if solver.is_spent else []
    prices = {name: priced(choice) if isinstance(choice, Decision) else choice for name, choice in choices.items()}
    if policy:
        _show(f"{policy} chooses", prices[policy], asked)
        chosen = policies[policy]
        if explain and not isinstance(prices[policy], str):
            lines = turned(chosen, asked.observation, asked.names) if isinstance(chosen, Splitwise) else ()
            drift = _drift(chosen)
            for line in (*lines, *(compared(drift, asked.observation, asked.names, solver) if drift else ())):
                out.print(line, markup=False)
    _show("best", best, asked)
    least_s = least_total_s(asked.world, asked.job, tools, asked.limits, conditions)
    above = None if solution.exact else best.total_s / least_s - 1
    if above is not None:
        out.print(_unproven(solution, above, budget_s if is_spent else None), style="dim", markup=False)
    rows: dict[str, tuple[str, Price] | str] = {"best": _row(best, asked)}
    divided = any(layer.is_shared for layer in best.decision.partition.layers)
    rows["runner-up"] = _row(other, asked) if other else "no other partition is admissible"
    rows |= {name: _row(one, asked) for name, one in prices.items()}
    out.print(plans_table({name: _escaped(row) for name, row in rows.items()}, best.total_s))
    if hurried:
        out.print(
            f"({', '.join(hurried)}: the best found before the {budget_s:g} s were over; --budget)",
            style="dim",
            markup=False,
        )
    progress.say("what would have to change for another choice")
    challengers = [one.decision for one in (other, *prices.values()) if isinstance(one, Price)]
    question = Question(solver, Latency(), asked.loads, best.decision)
    flips = sensitivities(question, challengers, asked.batch, asked.wait_s)
    out.print(flips_table([_flip_row(each, asked) for each in flips]))
    if divided:
        out.print(
            "(runner-up and flips are cuts or plans named here; other ways to divide halves are left out)", style="dim"
        )
    write_json(
        json_file,
        {
            "machines": [host.device.name for host in asked.world.hosts],
            "accuracy": asked.world.accuracy.source,
            "exact": solution.exact,
            "at_most_above": above,
            "in_time": not is_spent,
            "policies_not_in_time": hurried,
            "low_level": _level(policies["drift"], asked),
            "best": _data(best, asked),
            "runner_up": other and _data(other, asked),
            "policies": {
                name: _data(one, asked) if isinstance(one, Price) else {"forbidden": one}
                for name, one in prices.items()
            },
            "flips": {each.name: _flip_data(each, asked) for each in flips},
        },
    )


def _unproven(solution: Solution, above: float, spent_s: float | None) -> str:
    """How far the best can be from the best of all, and what was left out."""
    bound = f"not proven exact; at most {100 * above:.3g} % above the least that any partition can take"
    if spent_s is not None:
        tried = f"{solution.considered} cuts and U-shapes, and others"
        return f"(the best found in {spent_s:g} s, among {tried}; {bound}; --budget)"
    divided = "were not all tried" if solution.shared_considered else "cannot pay beside these"
    return f"(best of {solution.considered} cuts and U-shapes; halves divided between machines {divided}; {bound})"


def _level(policy: Policy, asked: _Asked) -> Level:
    """Who finds a policy's plans; of one that has no choice, who would unless somebody were asked for."""
    drift = _drift(policy)
    return drift.level(asked.world) if drift else level_for(None, len(asked.world.hosts))


def _searches_alone(policy: Policy, asked: _Asked) -> bool:
    """Whether a policy searches on its own, which the budget does not end."""
    return isinstance(policy, (Splitwise, Tuned)) and _level(policy, asked) is Level.EXACT


def _choice(policy: Policy, asked: _Asked, solver: Seeker) -> Decision | str:
    """What a policy chooses, or what forbids it any choice."""
    solver.is_spent = False
    try:
        if isinstance(policy, Planner):
            return policy.decide(asked.observation, solver)
        return policy.decide(asked.observation)
    except SplitwiseError as error:
        return str(error)


def _text(decision: Decision | None, asked: _Asked) -> str:
    if decision is None:
        return "nothing fits any more"
    text = decision.partition.text(asked.names)
    if len(decision.partition.machines) > 1 and len(asked.observation.tools.wires) > 1:
        text += f", {decision.wire}"
    if decision.prefill_wire:
        text += f", {decision.prefill_wire} in prefill"
    if decision.prefill_chunk:
        text += f", chunks of {decision.prefill_chunk}"
    return text + (f", drafts {decision.draft}" if decision.draft else "")


def _row(one: Price | str, asked: _Asked) -> tuple[str, Price] | str:
    return one if isinstance(one, str) else (_text(one.decision, asked), one)


def _escaped(row: tuple[str, Price] | str) -> tuple[str, Price] | str:
    return escape(row) if isinstance(row, str) else (escape(row[0]), row[1])


def _show(title: str, one: Price | str, asked: _Asked) -> None:
    """A plan with its picture and every figure."""
    if isinstance(one, str):
        out.print(f"\n{title}: {one}", markup=False)
        return
    out.print(f"\n{title}: {_text(one.decision, asked)}", markup=False)
    out.print(partition_picture(one.decision.partition, asked.names, not out.is_terminal), markup=False)
    memory = ", ".join(
        f"{name} {show_bytes(used)} of {show_bytes(host.device.memory_bytes)}"
        for name, used, host in zip(asked.names, one.memory_bytes, asked.world.hosts, strict=True)
    )
    waited = f" after {seconds_text(one.wait_s)} of waiting" if one.wait_s else ""
    out.print(
        f"TTFT {seconds_text(one.ttft_s)}{waited}, {1e3 * one.tpot_s:.2f} ms/token, total {seconds_text(one.total_s)}; "
        f"{one.round_trips_per_token:.3g} round trips per token, {show_bytes(one.up_bytes)} up, "
        f"{show_bytes(one.down_bytes)} down\n"
        f"{_joules(asked, one)}; {one.nats:.3g} nats per token; "
        f"{one.usd:.3g} USD\nmemory: {memory}",
        markup=False,
    )


def _joules(asked: _Asked, one: Price) -> str:
    """Modelled energy, or which machines' power nobody has said."""
    unknown = [n for n, host in zip(asked.names, asked.world.hosts, strict=True) if not host.device.decode_w]
    if asked.names[0] in unknown:
        return f"energy not known: no power figures of {', '.join(unknown)}"
    return f"{one.device_j:.3g} J on the device, {one.total_j:.3g} J in all (modelled)"


def _figure_text(value: float, unit: str) -> str:
    if unit == "s":
        return seconds_text(value)
    if unit == "bytes/s":
        return f"{8e-6 * value:.4g} Mbit/s"
    return f"x {value:.4g}" if unit == "x" else f"{value:.0f} {unit}"


def _flip_row(each: Sensitivity, asked: _Asked) -> tuple[str, str, str, str]:
    def said(flip: Flip | None, end: float, way: str) -> str:
        if flip:
            return escape(f"{_text(flip.becomes, asked)} at {_figure_text(flip.value, each.unit)}")
        return f"never {way} {_figure_text(end, each.unit)}" if end != each.value else "-"

    value = _figure_text(each.value, each.unit)
    return each.name, value, said(each.below, each.low, "down to"), said(each.above, each.high, "up to")


def _flip_data(each: Sensitivity, asked: _Asked) -> dict[str, Any]:
    """SI units; null where nothing flips within the range."""

    def side(flip: Flip | None) -> dict[str, Any] | None:
        return {"at": flip.value, "becomes": _text(flip.becomes, asked)} if flip else None

    return {
        "unit": each.unit, "value": each.value, "low": each.low, "high": each.high,
        "below": side(each.below), "above": side(each.above),
    }  # fmt: skip


def _data(one: Price, asked: _Asked) -> dict[str, Any]:
    """A price in SI units, its decision in words."""
    decision = one.decision
    how = {"wire": decision.wire, "prefill_chunk": decision.prefill_chunk, "draft": decision.draft}
    how |= {"prefill_wire": decision.prefill_wire} if decision.prefill_wire else {}
    figures = {name: value for name, value in asdict(one).items() if name != "decision"}
    return {"partition": decision.partition.text(asked.names), **how, **figures}
