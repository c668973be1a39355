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

from splitwise_llm import errors
from splitwise_llm import plan as plans
from splitwise_llm.decision import Decision
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.memory import peak_memory_bytes
from splitwise_llm.engine.post import Post
from splitwise_llm.engine.walk import Choose, Request, Sampled, Walker
from splitwise_llm.errors import (
    BrokenInvariant,
    LinkDied,
    PeerMismatch,
    ProtocolError,
    RequestError,
    SplitwiseError,
    UserError,
    WorkerFailed,
)
from splitwise_llm.model.tokenizer import TextStream, Tokenizer
from splitwise_llm.observation import MachineView, Observation, Policy
from splitwise_llm.plan import DEVICE, Crossings
from splitwise_llm.records import Interval, MachineRecord, RequestRecord
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Close, Closed, Failed, Header, Hello, Open, Opened, Welcome, pack, unpack

OPENING_S = 600.0
"""Loading a large share from a slow disk takes a while; keepalive finds a dead worker sooner."""

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
    welcome: Welcome
    rtt_s: float
    closed: Closed | None = None
    intervals: tuple[Interval, ...] = ()


class Generation:
    """One prompt being answered. After the last token, `record` says how it went."""

    def __init__(
        self, device: Device, prompt: list[int], policy: Policy, request: Request, choose: Choose | None
    ) -> None:
        self._device, self._prompt, self._policy, self._request = device, prompt, policy, request
        self._choose = choose
        self._workers: dict[int, _Worker] = {}
        self._tokens: asyncio.Queue[tuple[Sampled, float] | None] = asyncio.Queue()
        self._driving: asyncio.Task[None] | None = None
        self._arrived: list[tuple[Sampled, float]] = []
        self._start_s = 0.0
        self._open_s = 0.0
        self._record: RequestRecord | None = None
        self.decision: Decision

    @property
    def record(self) -> RequestRecord:
        """What happened; only after the last token. Raises BrokenInvariant before."""
        if self._record is None:
            raise BrokenInvariant("a generation has a record once its last token was taken")
        return self._record

    async def __aenter__(self) -> Self:
        start = time.monotonic()
        try:
            unreachable = await self._greet_all()
            self.decision = self._policy.decide(self._observation())
            if self.decision.draft:
                raise RequestError(f"{self.decision.draft} drafted tokens: drafting is priced, not executed; use 0")
            await self._open_all(unreachable)
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

    async def _greet_all(self) -> dict[int, SplitwiseError]:
        """Say hello to every worker at once. Those that do not answer matter only if they are needed."""
        names = list(enumerate(self._device.names))[1:]
        met = await asyncio.gather(*(self._greet(name) for _, name in names), return_exceptions=True)
        unreachable: dict[int, SplitwiseError] = {}
        for (number, _), worker in zip(names, met, strict=True):
            if isinstance(worker, _Worker):
                self._workers[number] = worker
        for (number, _), worker in zip(names, met, strict=True):
            if isinstance(worker, SplitwiseError):
                unreachable[number] = worker
            elif isinstance(worker, BaseException):
                raise worker
        return unreachable

    async def _greet(self, name: str) -> _Worker:
        link = await self._device.connect(name)
        try:
            start = time.monotonic()
            mine = self._device.machine.checkpoint.fingerprint
            await link.send(pack(Hello(messages.PROTOCOL_VERSION, mine)))
            welcome = await _answer(link, Welcome)
            if welcome.dtype not in set(Dtype) or welcome.weights not in set(Weights):
                raise ProtocolError(f"{link.peer} computes in unknown formats {welcome.dtype}, {welcome.weights}")
            if welcome.protocol != messages.PROTOCOL_VERSION:
                raise PeerMismatch(
                    f"{link.peer} speaks protocol {welcome.protocol}, "
                    f"this device {messages.PROTOCOL_VERSION}; install the same version on both"
                )
            if welcome.fingerprint != mine:
                raise PeerMismatch(
                    f"{link.peer} holds model {welcome.fingerprint}, this device {mine}; "
                    "start both with the same --model"
                )
            link.max_frame_bytes = min(link.max_frame_bytes, welcome.max_frame_bytes)
            return _Worker(name, link, welcome, time.monotonic() - start)
        except BaseException:
            await link.close()
            raise

    def _observation(self) -> Observation:
        machine = self._device.machine
        views = [MachineView(self._device.names[DEVICE], True, machine.memory_bytes, machine.dtype, machine.weights)]
        for number, name in list(enumerate(self._device.names))[1:]:
            worker = self._workers.get(number)
            if worker is None:
                views.append(MachineView(name, False, 0, Dtype.FP32, Weights.FULL))
            else:
                said = worker.welcome
                dtype, weights = Dtype(said.dtype), Weights(said.weights)
                views.append(MachineView(name, True, said.memory_bytes, dtype, weights, worker.rtt_s))
        request = self._request
        return Observation(machine.spec, tuple(views), request.prompt_tokens, request.max_new_tokens)

    async def _open_all(self, unreachable: Mapping[int, SplitwiseError]) -> None:
        """Open the session on every machine the decision uses; say good-bye to the others."""
        partition = self.decision.partition
        if self._choose and partition.head != DEVICE:
            raise RequestError("tokens can only be chosen here where the head is on the device: add head=edge")
        for number in partition.machines:
            if number in unreachable:
                raise unreachable[number]
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
        await _answer(worker.link, Opened)

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
                raise _unexpected(worker.link, header, Closed)
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
            emulated = worker.welcome.emulated
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
        )

    async def _leave(self) -> None:
        """Close every link and give the share back."""
        self._device.machine.release(self)
        links = [worker.link.close() for worker in self._workers.values()]
        await asyncio.gather(*links, return_exceptions=True)
        self._workers.clear()


async def _answer(link: Link, kind: type[messages.H]) -> messages.H:
    """The worker's next word, which must be of this kind. Raises what the worker says it met, or PeerError."""
    try:
        async with asyncio.timeout(OPENING_S):
            frame = await link.receive()
    except TimeoutError:
        raise LinkDied(f"{link.peer} did not answer for {OPENING_S:g} s") from None
    header = unpack(frame)[0] if frame is not None else None
    if not isinstance(header, kind):
        raise _unexpected(link, header, kind)
    return header


def _unexpected(link: Link, header: Header | None, wanted: type) -> SplitwiseError:
    """The error for anything but the answer that was due; a worker's own error keeps its class if it is the user's."""
    if header is None:
        return LinkDied(f"{link.peer} closed the link; see its log")
    if not isinstance(header, Failed):
        return ProtocolError(f"{link.peer} sent {type(header).__name__}, expected {wanted.__name__}")
    kind = getattr(errors, header.error, None)
    if isinstance(kind, type) and issubclass(kind, UserError | PeerMismatch):
        return kind(f"{link.peer}: {header.message}")
    return WorkerFailed(f"{link.peer} ended the session: {header.message}")
