"""The device: its own machine, the links it opens to workers, and the generations it runs across them.

`async with edge.generate(...) as generation: async for token in generation: ...` is the whole interface.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
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
from splitwise_llm.engine.worker import check_length
from splitwise_llm.errors import (
    BrokenInvariant,
    LinkDied,
    PeerMismatch,
    ProtocolError,
    RequestError,
    SplitwiseError,
    Unreachable,
    UserError,
    WorkerFailed,
)
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.model.tokenizer import TextStream, Tokenizer
from splitwise_llm.observation import Always, MachineView, Observation, Policy
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE, Crossings, Kind
from splitwise_llm.records import Interval, MachineRecord, RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.codec import ElementLoss
from splitwise_llm.wire.grpc_link import dial
from splitwise_llm.wire.link import Link, TlsFiles
from splitwise_llm.wire.messages import Close, Closed, Failed, Header, Hello, Open, Opened, Welcome, pack, unpack
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

Connect = Callable[[str], Awaitable[Link]]
"""Opens a link to a machine, by its name."""

EDGE = "edge"
OPENING_S = 600.0
"""Loading a large share from a slow disk takes a while; keepalive finds a dead worker sooner."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it arrived: its id, the text that became certain with it, and when (s after the prompt)."""

    id: int
    text: str
    at_s: float


class Edge:
    """A device with a model and the names of the workers it can reach. Closing it closes its machine.

    `direct` gives, for a pair of workers with a link of their own, the address at which the first reaches
    the second.
    """

    def __init__(
        self,
        machine: Machine,
        workers: Sequence[str] = (),
        connect: Connect | None = None,
        direct: Mapping[tuple[str, str], str] | None = None,
    ) -> None:
        if EDGE in workers or len(set(workers)) != len(workers):
            raise RequestError(f"machine names must differ from each other and from '{EDGE}': {', '.join(workers)}")
        self.machine = machine
        self.names = (EDGE, *workers)
        self._connect = connect
        self.direct = {(self._number(a), self._number(b)): address for (a, b), address in (direct or {}).items()}
        self.tokenizer = Tokenizer(machine.checkpoint.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine's compute thread."""
        self.machine.close()

    def _number(self, name: str) -> int:
        if name not in self.names[1:]:
            raise RequestError(f"unknown worker {name!r}; the workers are {', '.join(self.names[1:]) or 'none'}")
        return self.names.index(name)

    def partition(self, text: str) -> Partition:
        """Read a partition of this model over these machines. Raises PartitionError."""
        return Partition.parse(text, self.machine.spec, self.names)

    def generate(
        self,
        prompt: str | Sequence[int],
        policy: Policy | Decision | Partition | str = "all:edge",
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop_ids: Sequence[int] | None = None,
        loss: ElementLoss | None = None,
        choose: Choose | None = None,
    ) -> Generation:
        """One generation, to be entered as a context and iterated. `policy` may be a partition or its text;
        `choose` replaces sampling, where the head is on the device.

        Raises UserError now; entering it raises what opening the session meets.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        spec = self.machine.spec
        check_length(len(ids), max_new_tokens, spec.max_context)
        if any(not 0 <= token < spec.vocab_size for token in ids):
            raise RequestError(f"the prompt has token ids outside the model's vocabulary of {spec.vocab_size}")
        stops = self.machine.checkpoint.stop_ids if stop_ids is None else stop_ids
        request = Request(len(ids), max_new_tokens, frozenset(stops), sampling or Sampling(), loss or ElementLoss())
        if isinstance(policy, str):
            policy = self.partition(policy)
        if isinstance(policy, Partition):
            policy = Decision(policy)
        if isinstance(policy, Decision):
            policy = Always(policy)
        return Generation(self, ids, policy, request, choose)

    async def connect(self, name: str) -> Link:
        """A fresh link to a worker. Raises Unreachable."""
        if self._connect is None:
            raise Unreachable(f"no way to reach {name!r} was given")
        return await self._connect(name)


@dataclass(slots=True)
class _Worker:
    """A worker as one generation sees it."""

    name: str
    link: Link
    welcome: Welcome
    rtt_s: float
    closed: Closed | None = None


class Generation:
    """One prompt being answered. After the last token, `record` says how it went."""

    def __init__(self, edge: Edge, prompt: list[int], policy: Policy, request: Request, choose: Choose | None) -> None:
        self._edge, self._prompt, self._policy, self._request = edge, prompt, policy, request
        self._choose = choose
        self._workers: dict[int, _Worker] = {}
        self._tokens: asyncio.Queue[Token | None] = asyncio.Queue()
        self._driving: asyncio.Task[None] | None = None
        self._text = TextStream(edge.tokenizer)
        self._arrived: list[tuple[Sampled, float, str]] = []
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
        while (token := await self._tokens.get()) is not None:
            yield token
        if self._driving:
            await self._driving  # raises what ended it, if anything did

    # Opening

    async def _greet_all(self) -> dict[int, SplitwiseError]:
        """Say hello to every worker at once. Those that do not answer matter only if they are needed."""
        names = list(enumerate(self._edge.names))[1:]
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
        link = await self._edge.connect(name)
        try:
            start = time.monotonic()
            mine = self._edge.machine.checkpoint.fingerprint
            await link.send(pack(Hello(messages.PROTOCOL_VERSION, mine)))
            welcome = await _answer(name, link, Welcome)
            if welcome.protocol != messages.PROTOCOL_VERSION:
                raise PeerMismatch(
                    f"{name} ({link.peer}) speaks protocol {welcome.protocol}, "
                    f"this device {messages.PROTOCOL_VERSION}; install the same version on both"
                )
            if welcome.fingerprint != mine:
                raise PeerMismatch(
                    f"{name} ({link.peer}) holds model {welcome.fingerprint}, this device {mine}; "
                    "start both with the same --model"
                )
            return _Worker(name, link, welcome, time.monotonic() - start)
        except BaseException:
            await link.close()
            raise

    def _observation(self) -> Observation:
        machine = self._edge.machine
        views = [MachineView(EDGE, True, machine.memory_bytes, machine.dtype, machine.weights)]
        for number, name in list(enumerate(self._edge.names))[1:]:
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
            pair: address for pair, address in self._edge.direct.items() if set(pair) <= set(partition.machines)
        }
        self._plan = plans.compile(self.decision, self._edge.machine.spec, len(self._edge.names), self._direct)
        session = uuid.uuid4().hex  # whoever knows it may join, so it is not short
        opening = [self._open(session, number, worker) for number, worker in self._workers.items()]
        capacity = self._request.prompt_tokens + self._request.max_new_tokens
        self._share, _ = await asyncio.gather(
            self._edge.machine.open_share(self, EDGE, partition, DEVICE, capacity), asyncio.gather(*opening)
        )

    async def _open(self, session: str, number: int, worker: _Worker) -> None:
        request, decision = self._request, self.decision
        await worker.link.send(
            pack(
                Open(
                    session=session,
                    machine=number,
                    names=list(self._edge.names),
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
        await _answer(worker.name, worker.link, Opened)

    # Running

    async def _drive(self) -> None:
        """Walk and take in frames until the last token, then collect what the workers counted."""
        links = {number: worker.link for number, worker in self._workers.items()}
        request = self._request
        post = Post(DEVICE, self._plan, links, self._edge.names, request.prompt_tokens, request.max_new_tokens)
        walker = Walker(
            self._plan,
            request,
            self._share,
            self._edge.machine,
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
            header = await post.pump(number)
            if not isinstance(header, Closed):
                raise _unexpected(worker.name, worker.link, header, Closed)
            worker.closed = header
        except SplitwiseError as error:
            post.fail(error)
            raise

    def _take(self, sampled: Sampled) -> None:
        at_s = time.monotonic() - self._start_s
        text = self._text.push(sampled.id)
        if len(self._arrived) + 1 == self._request.max_new_tokens or sampled.id in self._request.stop_ids:
            text += self._text.finish()
        self._arrived.append((sampled, at_s, text))
        self._tokens.put_nowait(Token(sampled.id, text, at_s))

    def _account(self, walker: Walker, post: Post) -> RequestRecord:
        """The record, with everyone's counts. Raises BrokenInvariant if they are not the plan's."""
        crossings = list(post.crossings)
        machine = self._edge.machine
        machines = [MachineRecord(EDGE, peak_memory_bytes(), tuple(walker.intervals), machine.emulated)]
        frame_bytes = post.frame_bytes
        for worker in self._workers.values():
            if worker.closed is None:
                raise BrokenInvariant(f"{worker.name} closed without an account")
            said = worker.closed
            crossings += [
                Crossings(c.after, Kind(c.kind), c.src, c.dst, c.count, c.payload_bytes) for c in said.crossed
            ]
            intervals = tuple(Interval(i.stage, i.step, i.start_s, i.stop_s) for i in said.intervals)
            machines.append(MachineRecord(worker.name, said.peak_memory_bytes, intervals, worker.welcome.emulated))
            frame_bytes += said.frame_bytes
        crossings.sort(key=lambda c: (c.after, c.kind, c.src, c.dst))
        planned = self._plan.traffic(self._request.prompt_tokens, len(self._arrived))
        if tuple(crossings) != planned:
            raise BrokenInvariant(f"the session sent {crossings}, its plan says {planned}")
        times = [at_s for _, at_s, _ in self._arrived]
        later = max(len(times) - 1, 1)
        depths = [sampled.depth for sampled, *_ in self._arrived]
        return RequestRecord(
            partition=self.decision.partition.text(self._edge.names),
            wire=self.decision.wire,
            prompt_tokens=self._request.prompt_tokens,
            token_ids=tuple(sampled.id for sampled, *_ in self._arrived),
            text="".join(text for *_, text in self._arrived),
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
        self._edge.machine.release(self)
        links = [worker.link.close() for worker in self._workers.values()]
        await asyncio.gather(*links, return_exceptions=True)
        self._workers.clear()


async def _answer(name: str, link: Link, kind: type[messages.H]) -> messages.H:
    """The worker's next word, which must be of this kind. Raises what the worker says it met, or PeerError."""
    try:
        async with asyncio.timeout(OPENING_S):
            frame = await link.receive()
    except TimeoutError:
        raise LinkDied(f"{name} ({link.peer}) did not answer for {OPENING_S:g} s") from None
    header = unpack(frame)[0] if frame is not None else None
    if not isinstance(header, kind):
        raise _unexpected(name, link, header, kind)
    return header


def _unexpected(name: str, link: Link, header: Header | None, wanted: type) -> SplitwiseError:
    """The error for anything but the answer that was due; a worker's own error keeps its class if it is the user's."""
    if header is None:
        return LinkDied(f"{name} ({link.peer}) closed the link; see its log")
    if not isinstance(header, Failed):
        return ProtocolError(f"{name} ({link.peer}) sent {type(header).__name__}, expected {wanted.__name__}")
    kind = getattr(errors, header.error, None)
    if isinstance(kind, type) and issubclass(kind, UserError | PeerMismatch):
        return kind(f"{name} ({link.peer}): {header.message}")
    return WorkerFailed(f"{name} ({link.peer}) ended the session: {header.message}")


class LinkTo:
    """How to reach workers over the network: their addresses, the certificates, and a shape to put around a link."""

    def __init__(
        self,
        addresses: Mapping[str, str],
        *,
        tls: TlsFiles | None = None,
        shapes: Mapping[str, LinkShape] | None = None,
    ) -> None:
        self.addresses, self._tls, self._shapes = dict(addresses), tls, dict(shapes or {})
        unknown = set(self._shapes) - set(self.addresses)
        if unknown:
            raise RequestError(f"a link shape was given for {min(unknown)!r}, which is no machine of this call")

    async def __call__(self, name: str) -> Link:
        link = await dial(self.addresses[name], name=name, tls=self._tls)
        return ShapedLink(link, self._shapes[name]) if name in self._shapes else link


def edge_with(
    model: str,
    workers: Mapping[str, str] | LinkTo,
    *,
    dtype: Dtype = Dtype.FP32,
    weights: Weights = Weights.FULL,
    threads: int = 1,
    memory_bytes: int | None = None,
    emulate: float | DeviceSpec | None = None,
    direct: Iterable[tuple[str, str]] = (),
) -> Edge:
    """The device end of a model (`bundled`, a directory or a hub id) with workers at `host:port`, by name.

    `direct` names pairs of workers that reach each other, the second at the address given for it here.
    Close it, or use it as a context manager. Raises ModelError, RequestError.
    """
    reach = workers if isinstance(workers, LinkTo) else LinkTo(workers)
    checkpoint = Checkpoint(locate(model))
    machine = Machine(
        checkpoint, dtype=dtype, weights=weights, threads=threads, memory_bytes=memory_bytes, emulate=emulate
    )
    pairs = {(a, b): reach.addresses.get(b, "") for a, b in direct}
    return Edge(machine, tuple(reach.addresses), reach, pairs)
