"""Every machine of a session walks the same plan and does what concerns it: receive, compute, send, sample.

One walker runs on the device and on each worker; a run in one process and a run over a network differ
only in the links of its `Post`. It does not know which links those are, nor how a session was opened.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from splitwise_llm import cost
from splitwise_llm.cost import Host
from splitwise_llm.decision import WirePrecision
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.machine import Machine, T
from splitwise_llm.engine.post import Post
from splitwise_llm.errors import BrokenInvariant, ProtocolError, RequestError, WorkerFailed
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.model.share import Positions, Share
from splitwise_llm.plan import DEVICE, Kind, Move, Plan, Serial, Shared, Stage, Step
from splitwise_llm.records import Interval
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire import codec
from splitwise_llm.wire.codec import ElementLoss

GREEDY = Sampling()
NO_LOSS = ElementLoss()


@dataclass(frozen=True, slots=True)
class Request:
    """What every machine of a session is told besides the decisions."""

    prompt_tokens: int
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    loss: ElementLoss = NO_LOSS

    def check(self, max_context: int) -> None:
        """Raise RequestError unless prompt and answer fit the model's context."""
        if self.prompt_tokens < 1:
            raise RequestError("the prompt is empty; give at least one token")
        if self.max_new_tokens < 1:
            raise RequestError(f"{self.max_new_tokens} new tokens were asked for; expected at least 1")
        if self.prompt_tokens >= max_context:
            raise RequestError(
                f"the prompt has {self.prompt_tokens} tokens, the model's context {max_context}; shorten the prompt"
            )
        if self.prompt_tokens + self.max_new_tokens > max_context:
            raise RequestError(
                f"{self.prompt_tokens} prompt tokens and {self.max_new_tokens} new ones exceed the model's context of "
                f"{max_context}; ask for at most {max_context - self.prompt_tokens}"
            )


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token and the depth of the causal chain of messages that led to it."""

    id: int
    depth: int


Choose = Callable[[Tensor, int], int]
"""From logits (vocab,), fp32, and a position, the token at that position."""
OnToken = Callable[[Sampled], None]


@dataclass(frozen=True, slots=True)
class _Stop:
    """One stage of the plan as this machine takes part in it, worked out once per session."""

    index: int
    stage: Stage
    arrives: Move | None
    """The residual stream comes with this move; None: it is here already."""
    partials_out: tuple[Move, ...]
    partials_in: tuple[Move, ...]
    joins: bool
    residuals_out: tuple[Move, ...]
    crossing: Move | None
    """A move of the residual stream after this stage, whoever sends it: all copies become what it carries."""
    goes_on: bool
    """Whether this machine keeps its copy: it has a part in the next stage, and the stream does not come to it."""
    last_only: bool
    """Only the last position of the last chunk matters after this stage."""
    only_if_emits: bool
    """A head without layers, which has nothing to do in an earlier chunk."""


def _stops(plan: Plan, me: int) -> tuple[_Stop, ...]:
    stops: list[_Stop] = []
    for index, stage in enumerate(plan.stages):
        if me not in stage.machines:
            continue
        moves = plan.moves_after(index)
        residuals = [move for move in moves if move.kind is Kind.RESIDUAL]
        partials = [move for move in moves if move.kind is Kind.PARTIAL]
        here = [m for m in plan.moves_after(index - 1) if m.kind is Kind.RESIDUAL and m.dst == me]
        stops.append(
            _Stop(
                index,
                stage,
                arrives=here[0] if here else None,
                partials_out=tuple(move for move in partials if move.src == me),
                partials_in=tuple(move for move in partials if move.dst == me),
                joins=me in plan.joiners[index],
                residuals_out=tuple(move for move in residuals if move.src == me),
                crossing=residuals[0] if residuals else None,
                goes_on=_goes_on(plan, index, me),
                last_only=any(move.last_only for move in moves),
                only_if_emits=isinstance(stage, Serial) and stage.is_head_only,
            )
        )
    return tuple(stops)


def _goes_on(plan: Plan, index: int, me: int) -> bool:
    return index + 1 < len(plan.stages) and me in plan.stages[index + 1].machines


@dataclass(slots=True)
class _Pass:
    """One machine's walk through one step. `pending` makes the residual stream once the compute thread has it."""

    step: Step
    done: dict[int, asyncio.Event]
    """Prefill only: set when the chunk has passed a stage, for the chunk behind it."""
    before: dict[int, asyncio.Event]
    at: Positions | None = None
    pending: Callable[[], Tensor] | None = None
    depth: int = 0


@dataclass(slots=True)
class Walker:
    """Machine `post.me` in one run. `request.prompt_tokens` are the ids there were at the session's start."""

    plan: Plan
    request: Request
    share: Share
    machine: Machine
    post: Post
    ids: Sequence[int] = ()
    """All there are; only the device has them."""
    kept: Boundaries | None = None
    """Where residual streams are kept as they cross."""
    taps: tuple[int, ...] = ()
    """Halves, ascending, before which the stream is kept though it does not cross: it would, and will again, under
    another partition."""
    on_token: OnToken | None = None
    """Called on the device for each token, in order."""
    on_chunk: Callable[[int], object] | None = None
    """Told after each prefill chunk that is not the last how many positions this machine is done with."""
    choose: Choose | None = None
    """Replaces sampling where the head is on this machine."""
    intervals: list[Interval] = field(default_factory=list)
    halting: bool = False
    """Whether to end at the next token."""
    me: int = field(init=False)
    _stops: tuple[_Stop, ...] = field(init=False)
    _entering: tuple[Move, ...] = field(init=False)
    _handing: tuple[Move, ...] = field(init=False)
    _never_waits: bool = field(init=False)
    """Whether no message comes here while tokens flow."""

    def __post_init__(self) -> None:
        self.me = self.post.me
        self._stops = _stops(self.plan, self.me)
        mine = [move for move in self.plan.moves if self.me in (move.src, move.dst)]
        self._entering = tuple(move for move in mine if move.kind in (Kind.PROMPT, Kind.NEXT))
        self._handing = tuple(move for move in mine if move.kind is Kind.TOKEN)
        self._never_waits = not any(move.dst == self.me and move.kind is not Kind.PROMPT for move in mine)

    async def run(self) -> None:
        """Prefill and decode until the last token, or the next one once it is to halt; a machine that never sees
        tokens waits to be cancelled.

        Raises PeerError when another machine or a link fails.
        """
        extent = self.post.extent
        token = await self._prefill()
        first = self.plan.decision.num_chunks(extent.known - extent.start) - 1
        for number in range(extent.tokens):
            step = self.post.step(first + number)
            if number:
                token = await self._walk(_Pass(step, {}, {}), token)
            token = await self._hand_over(step, token)
            if self.halting or (token and token.id in self.request.stop_ids):
                return

    async def fill(self) -> None:
        """Walk an excerpt, for the caches' sake. Raises PeerError."""
        await self._prefill()

    @property
    def makes_tokens_alone(self) -> bool:
        """Whether the token loop runs here without the device."""
        return self.me != DEVICE and self.plan.embed == self.plan.head == self.me

    async def _prefill(self) -> Sampled | None:
        """All chunks, each stage in order but several stages at once. The token if the head is here."""
        extent = self.post.extent
        walks: list[Awaitable[Sampled | None]] = []
        before: dict[int, asyncio.Event] = {}
        for index in range(self.plan.decision.num_chunks(extent.known - extent.start)):
            done = {stop.index: asyncio.Event() for stop in self._stops if not stop.only_if_emits}
            walks.append(self._walk(_Pass(self.post.step(index), done, before), None))
            before = done
        tokens = await _all(walks)
        return tokens[-1]

    async def _hand_over(self, step: Step, token: Sampled | None) -> Sampled | None:
        """Bring the token of a step to the device."""
        for move in self._handing:
            if self.me == move.dst:
                payload, depth = await self.post.receive(move, step)
                token = Sampled(self._ids_in(payload)[0], depth)
            elif token:
                await self.post.send(move, step, _ids_out([token.id]), token.depth)
        if self.me == DEVICE and token and self.on_token:
            self.on_token(token)
        if self._never_waits:
            await asyncio.sleep(0)  # whoever waits for the token, or wants to end this, gets a turn
        return token

    async def _walk(self, one: _Pass, token: Sampled | None) -> Sampled | None:
        """One step through all stages of this machine. The sampled token if it has the head."""
        await self._enter(one, token)
        sampled = None
        for stop in self._stops:
            if stop.only_if_emits and not one.step.emits:
                break
            if stop.arrives:
                payload, depth = await self.post.receive(stop.arrives, one.step)
                one.depth = max(one.depth, depth)
                self.keep(stop.arrives, one.step, payload)
                one.pending = partial(self._decode, payload, self.plan.rows(stop.arrives, one.step), one.step)
            if stop.index in one.before:  # chunks pass a stage in order: its keys and values grow from the front
                await one.before[stop.index].wait()
            if isinstance(stop.stage, Serial):
                sampled = await self._serial(one, stop, stop.stage)
            else:
                await self._shared(one, stop, stop.stage)
        if self.on_chunk and not one.step.emits:
            self.on_chunk(one.step.start + one.step.count)
        return sampled

    async def _enter(self, one: _Pass, token: Sampled | None) -> None:
        """The ids of a step reach the embedding: a part of the prompt, or the last token."""
        step, depth = one.step, token.depth if token else 0
        ids = list(self.ids[step.start : step.start + step.count]) if step.is_prefill else [token.id] if token else []
        if self.me == self.plan.feeder:
            await self._feed(one)
        for move in self._entering:
            if not self.plan.rows(move, step):
                continue
            if self.me == move.src:
                await self.post.send(move, step, _ids_out(ids), depth)
            else:
                payload, depth = await self.post.receive(move, step)
                ids = self._ids_in(payload)
        if self.me == self.plan.embed and self.plan.feeder is None:
            one.depth = depth
            one.pending = lambda: self.share.embed(ids, self._at(one))

    async def _feed(self, one: _Pass) -> None:
        """The stream before an excerpt, as it was kept, goes to those who begin with it."""
        step, wire = one.step, self._wire(one.step)
        if self.kept is None:
            raise BrokenInvariant("a machine without memory is to feed an excerpt")
        if not self.kept.covers(self.plan.first, step.start, step.start + step.count):
            raise WorkerFailed(f"what went into half {self.plan.first} was dropped for want of room; try again without")
        kept, payload = self.kept.take(self.plan.first, step.start, step.start + step.count)
        if kept is not wire:  # kept in several precisions: fp32 holds them all
            payload = codec.encode(codec.decode(payload, kept, step.count, self.plan.d_model).float(), wire)
        for move in self.plan.moves_after(-1):
            if move.kind is Kind.RESIDUAL:
                await self.post.send(move, step, payload, one.depth)
        one.pending = partial(self._decode, memoryview(payload), step.count, step)

    def keep(self, move: Move, step: Step, payload: bytes | memoryview) -> None:
        """Keep a residual stream that crossed, unless only a part of it did."""
        if self.kept is not None and move.kind is Kind.RESIDUAL and not move.last_only and move.after >= 0:
            stage = self.plan.stages[move.after]
            half = stage.stop if isinstance(stage, Serial) else stage.half + 1
            self.kept.put(half, step.start, step.count, self._wire(step), payload)

    async def _serial(self, one: _Pass, stop: _Stop, stage: Serial) -> Sampled | None:
        tapped: list[tuple[int, bytes]] = []

        def work() -> tuple[Tensor, bytes, int | None]:
            x, at = self._residual(one), self._at(one)
            start = stage.start
            for tap in (half for half in self.taps if start < half < stage.stop):
                x = self.share.run(x, start, tap, at)
                tapped.append((tap, codec.encode(x, self._wire(one.step))))
                start = tap
            x = self.share.run(x, start, stage.stop, at)
            if stage.head and one.step.emits:
                return x, b"", self._choose(self.share.logits(x), one.step.start + one.step.count)
            return (*self._crossed(one, stop, x), None)

        x, payload, token = await self._compute(work, one, stop)
        for half, kept in tapped:
            if self.kept is not None:
                self.kept.put(half, one.step.start, one.step.count, self._wire(one.step), kept)
        if token is not None:
            return Sampled(token, one.depth)
        await self._send_residual(one, stop, x, payload)
        return None

    async def _shared(self, one: _Pass, stop: _Stop, stage: Shared) -> None:
        wire = self._wire(one.step)

        def work() -> tuple[Tensor, Tensor, bytes]:
            x = self._residual(one)
            summand = self.share.partial(x, stage.half, self._at(one))
            if stop.last_only:
                x, summand = x[-1:], summand[-1:]
            summand = self._lose(summand, stop.index, Kind.PARTIAL, self.me, one.step)
            return x, codec.round_trip(summand, wire), codec.encode(summand, wire) if stop.partials_out else b""

        x, own, payload = await self._compute(work, one, stop)
        if stop.last_only and not one.step.emits:
            return
        for move in stop.partials_out:
            await self.post.send(move, one.step, payload, one.depth)
        if stop.joins:
            await self._join(one, stop, stage, x, own)

    async def _join(self, one: _Pass, stop: _Stop, stage: Shared, x: Tensor, own: Tensor) -> None:
        """Gather the partial sums of the others; they are added when the compute thread next has this pass."""
        others: dict[int, memoryview] = {}
        for move in stop.partials_in:
            others[move.src], depth = await self.post.receive(move, one.step)
            one.depth = max(one.depth, depth)

        def joined() -> Tensor:
            partials = [
                own if m == self.me else self._decode(others[m], own.shape[0], one.step) for m in stage.machines
            ]
            return self.share.join(x, partials, stage.half)

        if stop.crossing is None:
            one.pending = joined
            return
        result, payload = await self._compute(lambda: self._crossed(one, stop, joined()), one, stop, adding=True)
        await self._send_residual(one, stop, result, payload)

    async def _send_residual(self, one: _Pass, stop: _Stop, x: Tensor, payload: bytes) -> None:
        for move in stop.residuals_out:
            if self.plan.rows(move, one.step):
                self.keep(move, one.step, payload)
                await self.post.send(move, one.step, payload, one.depth)
        one.pending = lambda: x

    def _crossed(self, one: _Pass, stop: _Stop, x: Tensor) -> tuple[Tensor, bytes]:
        """The stream as it goes on here, and as bytes where it leaves: whoever keeps a copy keeps what the
        others will decode."""
        if stop.crossing is None:
            return x, b""
        if stop.last_only:
            x = x[-1:]
        x = self._lose(x, stop.index, Kind.RESIDUAL, stop.crossing.src, one.step)
        wire = self._wire(one.step)
        payload = codec.encode(x, wire) if stop.residuals_out else b""
        return codec.round_trip(x, wire) if stop.goes_on else x, payload

    # Small things

    def _choose(self, logits: Tensor, position: int) -> int:
        return self.choose(logits, position) if self.choose else sample(logits, self.request.sampling, position)

    def _at(self, one: _Pass) -> Positions:
        if one.at is None:
            one.at = self.share.positions(one.step.start, one.step.count)
        return one.at

    def _residual(self, one: _Pass) -> Tensor:
        if one.pending is None:
            raise ProtocolError("the residual stream is not here")
        pending, one.pending = one.pending, None
        return pending()

    def _wire(self, step: Step) -> WirePrecision:
        return self.plan.decision.wire_in(step.is_prefill)

    def _decode(self, payload: memoryview, rows: int, step: Step) -> Tensor:
        x = codec.decode(payload, self._wire(step), rows, self.plan.d_model)
        return x.to(dtype=self.share.dtype, device=self.share.device)

    def _lose(self, x: Tensor, index: int, kind: Kind, src: int, step: Step) -> Tensor:
        start = step.start + step.count - x.shape[0]
        return self.request.loss.apply(x, f"{index}/{kind}/{src}", start)

    def _ids_in(self, payload: memoryview) -> list[int]:
        ids = list(struct.unpack(f"<{len(payload) // 4}i", payload))
        vocabulary = self.share.architecture.spec.vocab_size
        if any(not 0 <= token < vocabulary for token in ids):
            raise ProtocolError(f"got token ids outside the vocabulary of {vocabulary}")
        return ids

    async def _compute(self, work: Callable[[], T], one: _Pass, stop: _Stop, adding: bool = False) -> T:
        """Run on the compute thread, or right here where a short step may hold the event loop; and note when.
        Additions weigh nothing beside the products around them."""
        machine, step = self.machine, one.step

        def predicted(device: DeviceSpec) -> float:
            if adding:
                return 0.0
            host = Host(device, machine.dtype, machine.weights)
            return cost.stage_seconds(machine.spec, host, stop.stage, self.me, step)

        here = not step.is_prefill and self.post.may_block
        result = await machine.compute(work, predicted, here)
        if stop.index in one.done:
            one.done[stop.index].set()
        if not adding:
            self.machine.clock.ran(step.count, result.stop_s - result.start_s)
        self.intervals.append(Interval(stop.index, step.index, result.start_s, result.stop_s, self.post.extent.run))
        return result.value


def _ids_out(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


async def _all(walks: Sequence[Awaitable[T]]) -> list[T]:
    """All results, in order; the first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(walk) for walk in walks]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
