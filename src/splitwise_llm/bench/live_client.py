"""One device of `bench live`, as a process of its own: it asks at given times over a shaped link, and tells what became
of each request. It compares nothing.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import torch

from splitwise_llm.cost import Limits
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.survey import Rates
from splitwise_llm.errors import SplitwiseError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.observation import Policy, Tools
from splitwise_llm.policies import find_policy
from splitwise_llm.policies.mind import Splitwise, shipped
from splitwise_llm.policies.network import Network
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.pacing import LinkClock
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

NAMES = ("edge", "cloud")
PATIENCE_S = 180.0
"""For the others to be ready."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it comes (s after the start), and its lengths."""

    at_s: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Client:
    """What one device is told. Everything in it can be sent to another process."""

    model: str
    address: str
    device: DeviceSpec
    """That it plays."""
    shape: LinkShape
    policy: str
    weights: Network | None
    """Of the policy `splitwise`; None: the shipped ones."""
    limits: Limits
    tools: Tools
    requests: tuple[Asked, ...]
    slots: int = 4
    """Requests that it works at at a time; others wait."""


def decides(policy: str, weights: Network | None = None) -> Policy:
    """Raises RequestError for a policy that there is not, ModelError for one without weights."""
    found = find_policy(policy)
    if not isinstance(found, Splitwise):
        return found
    return replace(found, weights=weights or shipped())


@dataclass(frozen=True, slots=True)
class Stretch:
    """From `at_s` (s after the start of all) one request ran so: on the device, on the worker, on both."""

    at_s: float
    mode: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one request. Seconds; `at_s` after the start of all."""

    at_s: float
    total_s: float
    """From its arrival to the last token, waiting and opening included."""
    open_s: float
    tokens: int
    stretches: tuple[Stretch, ...]
    events: tuple[str, ...]
    partition: str = ""
    """Of the last run."""
    error: str = ""
    """Why there is no answer."""


def mode_of(partition: str) -> str:
    """Of a partition's text, in the simulator's words."""
    return "edge" if NAMES[1] not in partition else "cloud" if NAMES[0] not in partition else "split"


def run_client(client: Client, ready: Barrier, out: Connection) -> None:
    """As a process: begin with the others, answer everything, tell it."""
    torch.set_num_threads(1)
    try:
        out.send(asyncio.run(_answer_all(client, ready)))
    except BaseException as error:
        ready.abort()  # nobody waits for this one
        out.send(f"{type(error).__name__}: {error}")
        raise
    finally:
        out.close()


async def _answer_all(client: Client, ready: Barrier) -> list[Answered]:
    checkpoint = Checkpoint(locate(client.model))
    with Machine(checkpoint, emulate=client.device) as machine:
        clock = LinkClock()
        open_links: list[ShapedLink] = []

        async def reach(name: str) -> Link:
            link = await dial(client.address, name=name)
            beside = next((one for one in open_links if not one.is_closed), None)
            shaped = ShapedLink(link, client.shape, clock, beside=beside)
            open_links[:] = [*(one for one in open_links if not one.is_closed), shaped]
            return shaped

        def edge() -> Edge:
            return Edge(machine, NAMES[1:], reach, rates={NAMES[1]: Rates.of_shape(client.shape)})

        policy = decides(client.policy, client.weights)
        try:
            for new_tokens in sorted({one.new_tokens for one in client.requests}):
                warm = Asked(0.0, client.requests[0].prompt_tokens, new_tokens)
                await _answer(edge(), client, policy, warm, 0.0, 2)  # tables are made, weights are loaded
            await asyncio.to_thread(ready.wait, PATIENCE_S)
            clock.close()
            clock = LinkClock()  # the recording begins now, for all
            zero_s, fresh = time.monotonic(), edge()  # which remembers nothing
            slots = asyncio.Semaphore(client.slots)

            async def one(asked: Asked) -> Answered:
                await asyncio.sleep(max(zero_s + asked.at_s - time.monotonic(), 0.0))
                async with slots:
                    return await _answer(fresh, client, policy, asked, zero_s, asked.new_tokens)

            return list(await asyncio.gather(*map(one, client.requests)))
        finally:
            clock.close()


async def _answer(edge: Edge, client: Client, policy: Policy, asked: Asked, zero_s: float, tokens: int) -> Answered:
    """One request; `tokens` of its answer are taken, and the policy is told of all."""
    prompt = [(7 * n + int(1000 * asked.at_s)) % edge.machine.spec.vocab_size for n in range(asked.prompt_tokens)]
    begun_s = time.monotonic()
    arrival_s = zero_s + asked.at_s if zero_s else begun_s
    generation = edge.generate(
        prompt, policy, max_new_tokens=asked.new_tokens, stop_ids=(), limits=client.limits, tools=client.tools,
        called=client.policy,
    )  # fmt: skip
    last_s, count = begun_s, 0
    try:
        async with generation:
            async for _ in generation:
                last_s, count = time.monotonic(), count + 1
                if count >= tokens and tokens < asked.new_tokens:
                    break
    except SplitwiseError as error:
        failed = f"{type(error).__name__}: {error}"
        return Answered(asked.at_s, time.monotonic() - arrival_s, 0.0, count, (), (), "", failed)
    if count < asked.new_tokens:
        return Answered(asked.at_s, last_s - arrival_s, 0.0, count, (), ())
    return _told(asked, generation.record, arrival_s, last_s, zero_s)


def _told(asked: Asked, record: RequestRecord, arrival_s: float, last_s: float, zero_s: float) -> Answered:
    start_s = last_s - record.token_times_s[-1]
    ran = [run for run in record.runs if not run.why.startswith("fill")]
    runs = [(start_s + run.at_s - zero_s, mode_of(run.partition)) for run in ran]
    stretches = tuple(Stretch(at_s, mode) for at_s, mode in runs)
    told = tuple(f"{event.at_s:.2f} {event.kind}: {event.text}" for event in record.events)
    return Answered(
        asked.at_s, last_s - arrival_s, start_s - max(arrival_s, 0.0), len(record.token_ids), stretches, told,
        record.partition,
    )  # fmt: skip


__all__ = ["NAMES", "Answered", "Asked", "Client", "Stretch", "decides", "mode_of", "run_client"]
