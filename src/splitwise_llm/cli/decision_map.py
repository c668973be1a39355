"""Decisions of the policy `splitwise` at admission over round-trip time and load, as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError
from splitwise_llm.observation import Observation
from splitwise_llm.page.decision_map import Point, draw_map
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.mind import Splitwise

TRIPS_S = (1e-3, 0.5)
NUM_TRIPS = 15
WORKER = 1


def points(policy: Splitwise, seen: Observation) -> Iterator[Point]:
    """The question that was asked, under round-trip times from `TRIPS_S` and batches up to the worker's slots."""
    world = seen.world
    if world is None or len(world.hosts) != WORKER + 1:
        raise RequestError("--map is for a device and one --cloud")
    slots = world.hosts[WORKER].device.slots
    batches = sorted({max(round(float(slots) ** share), 1) for share in np.linspace(0, 1, 9)})
    link = world.links[DEVICE, WORKER]
    for rtt_s in np.geomspace(*TRIPS_S, NUM_TRIPS).tolist():
        there = replace(world, links={(DEVICE, WORKER): replace(link, rtt_s=rtt_s)})
        for batch in batches:
            loads = {WORKER: world.load(WORKER, batch, context=seen.job.mean_context)}
            judged = policy.judge(replace(seen, world=there, loads=loads), counts=False)
            yield Point(rtt_s, batch, mode(judged.decision), mode(judged.plain), judged.turned, bool(judged.why))


def mode(decision: Decision) -> str:
    """On the device, on the worker, on both."""
    machines = decision.partition.machines
    return "split" if len(machines) > 1 else "edge" if machines == (DEVICE,) else "cloud"


def write_map(policy: Splitwise, seen: Observation, title: str, file: Path, kind: str) -> int:
    """Draw it; how many questions were asked."""
    found = list(points(policy, seen))
    draw_map(found, title, file, kind)
    return len(found)
