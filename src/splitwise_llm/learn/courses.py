"""What the high level learns in: settings drawn at random from the shipped devices and models. It knows no learner.

Test settings are rows of `sim.scenarios`; these are not. Links, clouds, rates, slots, staleness, budgets and weights on
energy are drawn here, and each trace differs again by `TRAIN.spread`. Where links were recorded (`recorded`), some of
the courses have one of those in place of the link that is drawn for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from splitwise_llm.cost import Host, Job, World, price
from splitwise_llm.cost.terms import Form
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import RequestError
from splitwise_llm.learn.forks import in_forks
from splitwise_llm.lyapunov import Budgets, Penalty
from splitwise_llm.observation import PLAIN, Tools
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.guided import Guide
from splitwise_llm.policies.menus import menu
from splitwise_llm.policies.objective import DriftPlusPenalty, Objective
from splitwise_llm.policies.planners import PLANNERS, typical
from splitwise_llm.sim.params import (
    NEVER_S,
    CloudClass,
    CloudProcess,
    LinkClass,
    LinkProcess,
    Params,
    Seeing,
    SharedCloud,
)
from splitwise_llm.sim.paths import as_recorded
from splitwise_llm.sim.scenarios import (
    AGX,
    ALWAYS_BUSY,
    BURSTY_CLOUD,
    CALM_CLOUD,
    FLOOR,
    GPT2,
    HEALTHY,
    L7,
    L13,
    LONGEST_ANSWER,
    MEC,
    ORIN,
    PI5,
    S23,
    TUNNEL,
    WAN,
    Case,
    Recordings,
    Scenario,
    build,
    prompt_classes,
    worlds,
)
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model

TOOLS = Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 32, 128), (0, 1, 2, 3, 4, 6))
FEW_TOOLS = Tools((WirePrecision.FP16, WirePrecision.INT8), (None, 32))
"""Without drafting."""
PLAIN_JOBS = 0.5
STATES = 8
"""Conditions that a table's plans are collected under."""
PAIRS = ((ORIN, GPT2), (S23, GPT2), (PI5, GPT2), *[(ORIN, L7)] * 3, (S23, L7), (S23, L7), (PI5, L7), (PI5, L7),
         (AGX, L7), *[(ORIN, L13)] * 3, (S23, L13))  # fmt: skip
"""Those oftener for which device and cloud are both worth a thought."""
CROWD_EVERY = 11
AGES_S = (0.0, 10.0, 2.0)
"""Of what a crowd knows of its cloud, in turn: where none was as old as in the reports, what was learned fell back
there."""
LINKS = (HEALTHY, WAN, WAN, MEC, MEC, TUNNEL)
CLOUDS = (ALWAYS_BUSY, CALM_CLOUD, BURSTY_CLOUD)
Named = tuple[str, Recordings]


@dataclass(frozen=True, eq=False)
class Course:
    """One setting: a simulated system, and the exact solver that is guided in it."""

    name: str
    params: Params
    guide: Guide


def _scaled(link: LinkProcess, dice: np.random.Generator) -> LinkProcess:
    """Rates, round trips and dwell times of all classes, each kind by a factor of its own."""
    rate, rtt, dwell = np.exp(dice.uniform(np.log([0.4, 0.5, 0.4]), np.log([2.5, 2.0, 2.5]))).tolist()
    classes = tuple(
        LinkClass(
            one.rtt_s * rtt, one.up_bytes_per_s * rate, one.down_bytes_per_s * rate, one.mean_dwell_s * dwell, one.is_up
        )
        for one in link.classes
    )
    return replace(link, classes=classes, periodic=bool(dice.random() < 0.2))


def _crowd(dice: np.random.Generator, age_s: float) -> tuple[SharedCloud, int]:
    """A cloud that the simulated devices load themselves: few of them, so that many worlds can be simulated, and as
    few sessions for each as in a large one; its load is known when it is `age_s` old."""
    devices = int(dice.integers(8, 17))
    sessions = max(round(devices * dice.uniform(0.25, 0.6)), 2)
    return SharedCloud(sessions, background=int(dice.choice([0, 16, 32])), information_s=age_s), devices


def _job(model: str, dice: np.random.Generator) -> Job:
    """Of 128 tokens each way, or of any: prompts up to half as long again as the longest in the reports."""
    prompt, answer = np.exp(dice.uniform(np.log([32, 16]), np.log([1536, 256]))).tolist()
    if dice.random() < PLAIN_JOBS:
        return Job(128, 128)
    return Job(int(min(prompt, find_model(model).max_context - 300)), int(answer))


def _reference_s(device: str, model: str, job: Job) -> float:
    """About what a request takes the device alone: to choose how often requests come."""
    spec, host = find_model(model), Host(find_device(device), Dtype.FP16, Weights.INT4)
    alone = World(spec, (host,), {})
    return float(price(alone, Decision(Partition.all_on(spec, DEVICE)), job).total_s)


def _asked(recordings: Recordings, model: str) -> Job:
    """The mean of the recorded requests, cut down as `build` does."""
    assert recordings.requests is not None
    requests = recordings.requests.clip(max(prompt_classes(model)), LONGEST_ANSWER).requests
    prompt, answer = (np.mean([getattr(one, name) for one in requests]) for name in ("prompt_tokens", "output_tokens"))
    return Job(round(prompt), round(answer))


def course(seed: int, number: int, recorded: Named | None = None) -> Course:
    """Number `number` of a seed; with the link that was `recorded`, and its requests if there are any, at the load that
    was drawn. Raises RequestError where what was drawn cannot run."""
    dice = np.random.Generator(np.random.Philox([seed, number]))
    is_crowd = number % CROWD_EVERY == 3
    device, model = PAIRS[int(dice.integers(len(PAIRS)))]
    floor = FLOOR if dice.random() < 0.5 else None
    link = _scaled(LINKS[int(dice.integers(len(LINKS)))], dice)
    cloud: CloudProcess | SharedCloud = _busier(CLOUDS[int(dice.integers(len(CLOUDS)))], dice)
    devices, slots, burst, crowd_per_s = 1, int(dice.choice([1, 1, 4])), 1.0, 0.0
    load = float(dice.uniform(0.15, 0.9))
    if is_crowd:
        cloud, devices = _crowd(dice, AGES_S[number // CROWD_EVERY % len(AGES_S)])
        device, model, floor, slots = (ORIN, L7, None, 4) if dice.random() < 0.6 else (S23, L7, None, 4)
        crowd_per_s, burst = float(dice.uniform(0.1, 0.24)), float(dice.choice([1.0, 2.0, 3.0]))
    job = Job(128, 128) if is_crowd else _job(model, dice)
    per_s = crowd_per_s if is_crowd else load / _reference_s(device, model, job)
    tools = TOOLS if dice.random() < 0.5 else FEW_TOOLS
    label, recordings = recorded or ("", None)
    has_requests = recordings is not None and recordings.requests is not None
    if recordings:
        link = as_recorded(link, recordings.up, recordings.down, recordings.rtt)
    if recordings and has_requests:
        asked = _asked(recordings, model)
        per_s *= _reference_s(device, model, job) / _reference_s(device, model, asked)
        job, recordings = asked, replace(recordings, down=link.down)
    case = Case((device,), model, per_s, label)
    scenario = Scenario(
        f"course-{number}", "", "", (case,), link, cloud, floor, job, burst, devices, slots, is_recorded=has_requests
    )
    w_energy = float(dice.choice([0.0, 0.02]))
    seeing = Seeing(delay_s=float(dice.choice([0.0, 0.0, 0.5, 2.0])))
    acceptance = float(dice.uniform(0.35, 0.8))
    told = bool(dice.random() < 0.9)
    return _made(scenario, case, tools, acceptance, w_energy, seeing, Budgets(), told, recordings)


def _busier(cloud: CloudProcess, dice: np.random.Generator) -> CloudProcess:
    batch, wait, dwell = np.exp(dice.uniform(np.log([0.6, 0.3, 0.4]), np.log([1.6, 2.0, 2.5]))).tolist()
    classes = tuple(
        CloudClass(max(round(one.batch * batch), 1), one.wait_s * wait, one.mean_dwell_s * dwell)
        for one in cloud.classes
    )
    return replace(cloud, classes=classes)


def _made(
    scenario: Scenario, case: Case, tools: Tools, acceptance: float, w_energy: float, seeing: Seeing, budgets: Budgets,
    told: bool, recordings: Recordings | None = None,
) -> Course:  # fmt: skip
    arrivals = case.per_s if told else 0.0
    tables = []
    for world, job in worlds(scenario, case, acceptance):
        penalty, weights = typical(world, job, tools, scenario.limits, arrivals)
        objectives: list[Objective] = [DriftPlusPenalty(penalty, weights), DriftPlusPenalty(penalty, 4 * weights)]
        few = [planner for planner in PLANNERS if planner.name in ("edge-only", "cloud-only", "neurosurgeon")]
        states = _states(scenario, world)
        tables.append(menu(world, job, (PLAIN, tools), scenario.limits, states, objectives, planners=few))
    params = build(scenario, case, tables, recordings, seeing=seeing, budgets=budgets)
    penalty = params.penalty
    first = tables[0]
    mine, _ = typical(first.world, first.bills[0].job, tools, scenario.limits, arrivals)
    energy = w_energy * mine.e_ref_j / mine.t_ref_s
    penalty = Penalty(mine.t_ref_s, mine.e_ref_j, w_energy=energy)
    params = replace(params, penalty=penalty, sample_s=NEVER_S)  # nobody reads samples
    guide = Guide(tools, scenario.limits, budgets, 1.0, arrivals, w_energy=w_energy)
    name = f"{scenario.name}.{case.name}" + (f"x{scenario.num_devices}" if scenario.num_devices > 1 else "")
    return Course(name, params, guide)


def _states(scenario: Scenario, world: World) -> list[Form]:
    """Conditions of every class of the link with the classes of the cloud, at most `STATES`."""
    links = [kind for kind in scenario.link.classes if kind.is_up]
    cloud = scenario.cloud
    if isinstance(cloud, CloudProcess):
        loads = [(kind.batch, kind.wait_s) for kind in cloud.classes]
    else:
        loads = [(1, 0.0), (cloud.sessions + cloud.background, 0.0), (cloud.sessions + cloud.background, 5.0)]
    found = [
        world.basis.conditions(
            {(0, 1): LinkSpec(kind.rtt_s, kind.up_bytes_per_s, kind.down_bytes_per_s)},
            {1: world.load(1, batch, wait_s)},
        )
        for kind in links
        for batch, wait_s in loads
    ]
    return found[:: max(len(found) // STATES, 1)][:STATES]


def recorded_in(number: int, recorded: Sequence[Named], share: float) -> Named | None:
    """What course `number` has of what was recorded: a share of the courses, evenly, take one recording after the
    other; the others None."""
    if not recorded or (number * share) % 1 >= share:
        return None
    return recorded[int(number * share) % len(recorded)]


def courses(
    seed: int, count: int, processes: int = 1, recorded: Sequence[Named] = (), share: float = 1.0
) -> list[Course]:
    """So many that can run, the same for the same seed, whoever makes them: their tables take most of the time. A
    share of them is in what was `recorded`; the others are as without."""
    found: list[Course] = []
    first = 0
    while len(found) < count:
        missing = count - len(found)

        def one(n: int, first: int = first) -> Course | None:
            return _if_possible(seed, first + n, recorded_in(first + n, recorded, share))

        found += filter(None, in_forks(one, missing, processes))
        first += missing
    return found


def _if_possible(seed: int, number: int, recorded: Named | None) -> Course | None:
    """None for a model that fits nowhere, as drawn."""
    with suppress(RequestError):
        return course(seed, number, recorded)
    return None


__all__ = ["TOOLS", "Course", "Named", "course", "courses", "recorded_in"]
