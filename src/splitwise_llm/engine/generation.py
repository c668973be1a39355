"""One prompt being answered: open the session on every machine it needs, walk, and account for what was sent.

It does not know how links are made, nor how the decision is found.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from splitwise_llm import plan as plans
from splitwise_llm.cost import UNLIMITED, Limits, price
from splitwise_llm.decision import Decision
from splitwise_llm.engine.greeting import ECHOES, Greeted, answer, greet, unexpected
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.post import Post
from splitwise_llm.engine.survey import Rates, Survey
from splitwise_llm.engine.walk import Choose, Request, Sampled, Walker
from splitwise_llm.errors import BrokenInvariant, RequestError, SplitwiseError
from splitwise_llm.model.tokenizer import TextStream, Tokenizer
from splitwise_llm.observation import Always, Observation, Policy, Tools
from splitwise_llm.plan import DEVICE, Crossings
from splitwise_llm.records import Interval, MachineRecord, Prediction, RequestRecord
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Close, Closed, Open, Opened, pack

Connect = Callable[[str], Awaitable[Link]]
"""Opens a link to a machine, by its name. Raises Unreachable."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a generation needs of the machine that holds it."""

    machine: Machine
    tokenizer: Tokenizer
    names: tuple[str, ...]
    """Of machines 0 (this one), 1, ..."""
    connect: Connect
    direct: Mapping[tuple[int, int], str]
    """For a pair of workers with a link of their own, the address at which the first reaches the second."""
    rates: Mapping[tuple[int, int], Rates]
    """Of links, lower number first, as far as they are known."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it arrived: its id, the text that became certain with it, and when (s after the prompt)."""

    id: int
    text: str
    at_s: float


@dataclass(slots=True)
class _Worker:
    """A worker as one generation sees it."""

    name: str
    link: Link
    greeted: Greeted
    closed: Closed | None = None
    intervals: tuple[Interval, ...] = ()


class Generation:
    """One prompt being answered. After the last token, `record` says how it went."""

    def __init__(
        self,
        device: Device,
        prompt: list[int],
        policy: Policy,
        request: Request,
        choose: Choose | None,
        *,
        called: str = "",
        limits: Limits = UNLIMITED,
        tools: Tools | None = None,
    ) -> None:
        self._device, self._prompt, self._policy, self._request = device, prompt, policy, request
        self._choose, self._called, self._limits, self._tools = choose, called, limits, tools
        self._workers: dict[int, _Worker] = {}
        self._tokens: asyncio.Queue[tuple[Sampled, float] | None] = asyncio.Queue()
        self._driving: asyncio.Task[None] | None = None
        self._arrived: list[tuple[Sampled, float]] = []
        self._start_s = 0.0
        self._open_s = 0.0
        self._record: RequestRecord | None = None
        self.observation: Observation
        self.decision: Decision
        self.predicted: Prediction | None = None
        self.unreachable: dict[str, SplitwiseError] = {}
        """By name, the workers that did not answer as they should, and why."""

    @property
    def record(self) -> RequestRecord:
        """What happened; only after the last token. Raises BrokenInvariant before."""
        if self._record is None:
            raise BrokenInvariant("a generation has a record once its last token was taken")
        return self._record

    async def __aenter__(self) -> Self:
        start = time.monotonic()
        try:
            await self._greet_all()
            self._decide()
            await self._open_all()
        except BaseException:
            await self._leave()
            raise
        self._start_s = time.monotonic()
        self._open_s = self._start_s - start
        self._driving = asyncio.create_task(self._drive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._driving:
            self._driving.cancel()
            await asyncio.gather(self._driving, return_exceptions=True)
        await self._leave()

    async def __aiter__(self) -> AsyncIterator[Token]:
        stream, count = TextStream(self._device.tokenizer), 0
        if self._driving is None:
            raise BrokenInvariant("enter a generation (async with) before taking its tokens")
        while (arrived := await self._tokens.get()) is not None:
            # Decoded here and not on arrival: the next step does not wait for text.
            (sampled, at_s), count = arrived, count + 1
            text = stream.push(sampled.id)
            if count == self._request.max_new_tokens or sampled.id in self._request.stop_ids:
                text += stream.finish()
            yield Token(sampled.id, text, at_s)
        await self._driving  # raises what ended it, if anything did

    # Opening

    async def _greet_all(self) -> None:
        """Say hello to every worker at once. Those that do not answer matter only if they are needed."""
        names = list(enumerate(self._device.names))[1:]
        met = await asyncio.gather(*(self._greet(name) for _, name in names), return_exceptions=True)
        for (number, _), worker in zip(names, met, strict=True):
            if isinstance(worker, _Worker):
                self._workers[number] = worker
        for (_, name), worker in zip(names, met, strict=True):
            if isinstance(worker, SplitwiseError):
                self.unreachable[name] = worker
            elif isinstance(worker, BaseException):
                raise worker

    async def _greet(self, name: str) -> _Worker:
        link = await self._device.connect(name)
        try:
            # A partition that was given asks for no figures.
            echoes = 0 if isinstance(self._policy, Always) else ECHOES
            return _Worker(name, link, await greet(link, self._device.machine.checkpoint.fingerprint, echoes))
        except BaseException:
            await link.close()
            raise

    def _decide(self) -> None:
        """Ask the policy, once; what it may not decide is refused here, whoever it is. Raises SplitwiseError."""
        device, greeted = self._device, {number: worker.greeted for number, worker in self._workers.items()}
        direct = frozenset((min(pair), max(pair)) for pair in device.direct)
        survey = Survey(device.machine, device.names, greeted, device.rates, direct)
        self.observation = observation = survey.observe(self._request, self._limits, self._tools)
        try:
            decision = self.decision = self._policy.decide(observation)
        except RequestError as error:
            if not self.unreachable:
                raise
            raise RequestError("; ".join(map(str, (error, *self.unreachable.values())))) from error
        if decision.draft:
            raise RequestError(f"{decision.draft} drafted tokens: drafting is priced, not executed; use 0")
        for number in decision.partition.machines:
            if device.names[number] in self.unreachable:
                raise self.unreachable[device.names[number]]
        floor = self._limits.floor
        if floor and not floor.holds(decision.partition):
            raise RequestError(
                f"{decision.partition.text(device.names)} takes from the device what the floor {floor.first_layers}+"
                f"{floor.last_layers} keeps there: its first and last layers, embedding and head"
            )
        if (world := observation.world) is not None:
            expected = price(world, decision, observation.job, world.conditions(observation.loads))
            links = survey.links(world)
            self.predicted = Prediction(expected.ttft_s, expected.tpot_s, expected.device_j, expected.total_j, links)

    async def _open_all(self) -> None:
        """Open the session on every machine the decision uses; say good-bye to the others."""
        partition = self.decision.partition
        if self._choose and partition.head != DEVICE:
            raise RequestError("tokens can only be chosen here where the head is on the device: add head=edge")
        for number in set(self._workers) - set(partition.machines):
            await self._workers.pop(number).link.close()
        self._direct = {
            pair: address for pair, address in self._device.direct.items() if set(pair) <= set(partition.machines)
        }
        self._plan = plans.compile(self.decision, self._device.machine.spec, len(self._device.names), self._direct)
        session = uuid.uuid4().hex  # whoever knows it may join, so it is not short
        opening = [self._open(session, number, worker) for number, worker in self._workers.items()]
        capacity = self._request.prompt_tokens + self._request.max_new_tokens
        self._share, _ = await asyncio.gather(
            self._device.machine.open_share(self, self._device.names[DEVICE], partition, DEVICE, capacity),
            asyncio.gather(*opening),
        )

    async def _open(self, session: str, number: int, worker: _Worker) -> None:
        request, decision = self._request, self.decision
        await worker.link.send(
            pack(
                Open(
                    session=session,
                    machine=number,
                    names=list(self._device.names),
                    partition=decision.partition.to_bytes(),
                    wire=decision.wire,
                    prefill_chunk=decision.prefill_chunk or 0,
                    prompt_tokens=request.prompt_tokens,
                    max_new_tokens=request.max_new_tokens,
                    stop_ids=sorted(request.stop_ids),
                    temperature=request.sampling.temperature,
                    top_k=request.sampling.top_k,
                    top_p=request.sampling.top_p,
                    seed=request.sampling.seed,
                    element_loss=request.loss.probability,
                    loss_seed=request.loss.seed,
                    direct=list(self._direct),
                    dial={second: address for (first, second), address in self._direct.items() if first == number},
                )
            )
        )
        await answer(worker.link, Opened)

    # Running

    async def _drive(self) -> None:
        """Walk and take in frames until the last token, then collect what the workers counted."""
        links = {number: worker.link for number, worker in self._workers.items()}
        request = self._request
        post = Post(DEVICE, self._plan, links, self._device.names, request.prompt_tokens, request.max_new_tokens)
        walker = Walker(
            self._plan,
            request,
            self._share,
            self._device.machine,
            post,
            prompt=self._prompt,
            on_token=self._take,
            choose=self._choose,
        )
        pumps = [asyncio.create_task(self._pump(post, number)) for number in self._workers]
        try:
            await walker.run()
            for worker in self._workers.values():
                await worker.link.send(pack(Close()))
            await asyncio.gather(*pumps)
            self._record = self._account(walker, post)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tokens.put_nowait(None)

    async def _pump(self, post: Post, number: int) -> None:
        """Take in what a worker sends, until its account. A worker that fails fails the walk with its name."""
        worker = self._workers[number]
        try:
            said = await post.pump(number)
            header, payload = said or (None, memoryview(b""))
            if not isinstance(header, Closed):
                raise unexpected(worker.link, header, Closed)
            worker.closed, worker.intervals = header, messages.unpack_intervals(payload)
        except SplitwiseError as error:
            post.fail(error)
            raise

    def _take(self, sampled: Sampled) -> None:
        arrived = (sampled, time.monotonic() - self._start_s)
        self._arrived.append(arrived)
        self._tokens.put_nowait(arrived)

    def _account(self, walker: Walker, post: Post) -> RequestRecord:
        """The record, with everyone's counts. Raises BrokenInvariant if they are not the plan's."""
        crossings = list(post.crossings)
        machine = self._device.machine
        machines = [
            MachineRecord(self._device.names[DEVICE], peak_memory_bytes(), tuple(walker.intervals), machine.emulated)
        ]
        frame_bytes = post.frame_bytes
        for worker in self._workers.values():
            if worker.closed is None:
                raise BrokenInvariant(f"{worker.name} closed without an account")
            said = worker.closed
            crossings += [Crossings(c.after, c.kind, c.src, c.dst, c.count, c.payload_bytes) for c in said.crossed]
            emulated = worker.greeted.welcome.emulated
            machines.append(MachineRecord(worker.name, said.peak_memory_bytes, worker.intervals, emulated))
            frame_bytes += said.frame_bytes
        crossings.sort(key=lambda c: (c.after, c.kind, c.src, c.dst))
        planned = self._plan.traffic(self._request.prompt_tokens, len(self._arrived))
        if tuple(crossings) != planned:
            raise BrokenInvariant(f"the session sent {crossings}, its plan says {planned}")
        times = [at_s for _, at_s in self._arrived]
        later = max(len(times) - 1, 1)
        depths = [sampled.depth for sampled, _ in self._arrived]
        ids = [sampled.id for sampled, _ in self._arrived]
        return RequestRecord(
            partition=self.decision.partition.text(self._device.names),
            wire=self.decision.wire,
            prompt_tokens=self._request.prompt_tokens,
            token_ids=tuple(ids),
            text=self._device.tokenizer.decode(ids),
            open_s=self._open_s,
            ttft_s=times[0],
            tpot_s=(times[-1] - times[0]) / later,
            round_trips_per_token=(depths[-1] - depths[0]) / 2 / later,
            crossings=tuple(crossings),
            frame_bytes=frame_bytes,
            machines=tuple(machines),
            policy=self._called,
            predicted=self.predicted,
        )

    async def _leave(self) -> None:
        """Close every link and give the share back."""
        self._device.machine.release(self)
        links = [worker.link.close() for worker in self._workers.values()]
        await asyncio.gather(*links, return_exceptions=True)
        self._workers.clear()
