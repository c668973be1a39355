"""Every machine of a session walks the same plan and does what concerns it: receive, compute, send, sample.

One walker runs on the device and on each worker; a run in one process and a run over a network differ
only in the links of its `Post`. It does not know which links those are, nor how a session was opened.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from splitwise_llm import cost
from splitwise_llm.cost import Host
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.drafting import Drafting
from splitwise_llm.engine.machine import Machine, T
from splitwise_llm.engine.pieces import Piece
from splitwise_llm.engine.post import Letter, Post
from splitwise_llm.engine.stops import Stop, stops
from splitwise_llm.errors import BrokenInvariant, LinkDied, ProtocolError, RequestError, WorkerFailed
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.model.share import Positions, Share
from splitwise_llm.plan import DEVICE, Kind, Move, Plan, Serial, Shared, Step
from splitwise_llm.records import Interval
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire import codec
from splitwise_llm.wire.codec import ElementLoss
from splitwise_llm.wire.messages import MAX_PRIORITY

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
    priority: int = 0
    """0 to 3: prompts get 2^priority times the turns of others; decode steps are computed together anyway."""

    def check(self, max_context: int) -> None:
        """Raise RequestError unless prompt and answer fit the model's context."""
        if self.prompt_tokens < 1:
            raise RequestError("the prompt is empty; give at least one token")
        if self.max_new_tokens < 1:
            raise RequestError(f"{self.max_new_tokens} new tokens were asked for; expected at least 1")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise RequestError(f"the priority is {self.priority}; expected 0 (usual) to {MAX_PRIORITY} (most turns)")
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


@dataclass(frozen=True, slots=True)
class _Made:
    """What a step came to: the tokens, in order, and the depth of the chain that led to them. Where the head is not on
    the machine that judges: what follows each position, if the drafted ones before it are right."""

    ids: tuple[int, ...]
    depth: int


Choose = Callable[[Tensor, int], int]
"""From logits (vocab,), fp32, and a position, the token at that position."""
OnToken = Callable[[Sampled], None]


@dataclass(slots=True)
class _Pass:
    """One machine's walk through one step. `pending` makes the residual stream once the compute thread has it."""

    step: Step
    """Of a round, what its number alone says, until a message has come or it was drafted here."""
    done: dict[int, asyncio.Event]
    """Prefill only: set when the chunk has passed a stage, for the chunk behind it."""
    before: dict[int, asyncio.Event]
    at: Positions | None = None
    pending: Callable[[], Tensor] | None = None
    depth: int = 0
    drafted: tuple[int, ...] = ()
    is_known: bool = False
    """Of a round: whether a message has said where it is."""


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
    drafting: Drafting | None = None
    """Where the token loop is."""
    on_chunk: Callable[[int], object] | None = None
    """Called with the positions of the prompt that this machine is done with."""
    choose: Choose | None = None
    """Replaces sampling where the head is on this machine."""
    intervals: list[Interval] = field(default_factory=list)
    halting: bool = False
    """Whether to end at the next token."""
    made: list[int] = field(default_factory=list)
    """Ids so far, where the token loop is."""
    rounds: list[tuple[int, int]] = field(default_factory=list)
    """Positions computed and tokens made in each decode step, as far as they are known here."""
    certain: int = field(init=False)
    """Positions whose ids are known to be right: what is cached behind them was drafted, and nobody has judged it."""
    me: int = field(init=False)
    _stops: tuple[Stop, ...] = field(init=False)
    _entering: tuple[Move, ...] = field(init=False)
    _handing: tuple[Move, ...] = field(init=False)
    _count: int = 0
    """Tokens so far, where they are seen."""
    _never_waits: bool = field(init=False)
    """Whether no message comes here while tokens flow."""

    def __post_init__(self) -> None:
        self.me = self.post.me
        self.certain = self.post.extent.known
        self._stops = stops(self.plan, self.me)
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
        made = await self._prefill()
        first = self.plan.decision.num_chunks(extent.known - extent.start) - 1
        for number in range(extent.tokens):
            one, began_s = _Pass(self.post.step(first + number), {}, {}), time.monotonic()
            if number:
                made = await self._round(one, made)
            made = await self._hand_over(one, made)
            if made:
                self._count += len(made.ids)
                if self.me == self.plan.loop_machine:
                    self.made += made.ids
            if number:
                self._judged(one, made, time.monotonic() - began_s)
            if self.halting or (made and self._is_last(made)):
                return

    def _is_last(self, made: _Made) -> bool:
        """Whether these are tokens, and no other follows."""
        is_over = self._count >= self.post.extent.tokens or not self.request.stop_ids.isdisjoint(made.ids)
        return is_over and (self.me in (DEVICE, self.plan.loop_machine) or not self.plan.decision.draft)

    async def _round(self, one: _Pass, made: _Made | None) -> _Made | None:
        """A decode step, of drafted tokens too where the loop is here; elsewhere a message says how many."""
        if made and self.me == self.plan.loop_machine:
            room = self.post.extent.tokens - self._count - 1
            if self.drafting and self.plan.decision.draft and room > 0:
                one.drafted = await self.drafting.propose(self.ids, min(room, self.plan.decision.draft))
            start = self.post.extent.known + self._count - 1
            one.step = self.plan.round(one.step.index, start, 1 + len(one.drafted))
            made = _Made((made.ids[-1], *one.drafted), made.depth)
        return await self._walk(one, made)

    def _judged(self, one: _Pass, made: _Made | None, seconds: float) -> None:
        """Note what a round came to."""
        knows = made is not None and self.me in (DEVICE, self.plan.loop_machine)
        tokens = len(made.ids) if made and knows else 1
        self.rounds.append((one.step.count, tokens))
        self.certain = one.step.start + tokens
        if self.drafting and made and self.me == self.plan.loop_machine:
            self.drafting.judged(one.drafted, made.ids, seconds)

    async def fill(self) -> None:
        """Walk an excerpt, for the caches' sake. Raises PeerError."""
        await self._prefill()

    @property
    def makes_tokens_alone(self) -> bool:
        """Whether the token loop runs here without the device."""
        return self.me != DEVICE and self.plan.embed == self.plan.head == self.me

    @property
    def needs_nobody(self) -> bool:
        """Whether it goes on to the last token without the device, once it has the prompt."""
        return self.makes_tokens_alone and all(set(stage.machines) == {self.me} for stage in self.plan.stages)

    async def _prefill(self) -> _Made | None:
        """All chunks, each stage in order but several stages at once. The token if the head is here."""
        extent = self.post.extent
        walks: list[Awaitable[_Made | None]] = []
        before: dict[int, asyncio.Event] = {}
        for index in range(self.plan.decision.num_chunks(extent.known - extent.start)):
            done = {stop.index: asyncio.Event() for stop in self._stops if not stop.only_if_emits}
            walks.append(self._chunk(_Pass(self.post.step(index), done, before)))
            before = done
        tokens = await _all(walks)
        return tokens[-1]

    async def _chunk(self, one: _Pass) -> _Made | None:
        made = await self._walk(one, None)
        if self.on_chunk:
            self.on_chunk(one.step.start + one.step.count)
        return made

    async def _hand_over(self, one: _Pass, made: _Made | None) -> _Made | None:
        """Bring the tokens of a step to the device; it judges what was drafted where the loop is its own."""
        for move in self._handing:
            if self.me == move.dst:
                letter = await self.post.receive(move, one.step.index)
                made = _Made(tuple(self._ids_in(letter.payload)), letter.depth)
                if self.plan.loop_machine == DEVICE:
                    self._learn(one, letter)
                    made = _Made(self._right(one.drafted, made.ids), made.depth)
                elif letter.step.start not in (one.step.start, self.post.extent.known + self._count - 1):
                    raise ProtocolError(f"tokens of position {letter.step.start} came, others are awaited")
            elif made:
                one.step = replace(one.step, made=len(made.ids))
                with suppress(LinkDied) if self.needs_nobody else nullcontext():  # who comes back is told of them
                    await self.post.send(move, one.step, _ids_out(made.ids), made.depth)
        if made and self.me == self.plan.loop_machine != DEVICE and self.drafting:
            self.drafting.follows(self.post.extent.known + self._count, made.ids)
        if self.me == DEVICE and made and self.on_token:
            for token in made.ids:
                self.on_token(Sampled(token, made.depth))
        if self._never_waits:
            await asyncio.sleep(0)  # whoever waits for the token, or wants to end this, gets a turn
        return made

    def _right(self, drafted: Sequence[int], follows: Iterable[int]) -> tuple[int, ...]:
        """The tokens of a round: what was drafted as far as it is what follows, and one more; none behind a last."""
        right: list[int] = []
        for number, token in enumerate(follows):
            right.append(token)
            if token in self.request.stop_ids or number == len(drafted) or drafted[number] != token:
                break
        return tuple(right)

    def _learn(self, one: _Pass, letter: Letter) -> None:
        """Take from a message where a round is. Raises ProtocolError where two say different things."""
        if one.step.is_prefill or not self.plan.decision.draft:
            return
        said, known = letter.step, one.step
        if one.is_known and (said.start, said.count) != (known.start, known.count):
            raise ProtocolError(
                f"step {known.index} is at positions {known.start} to {known.start + known.count}, and a message of it "
                f"at {said.start} to {said.start + said.count}"
            )
        one.step, one.is_known = replace(known, start=said.start, count=said.count), True
        self.certain = said.start + 1

    async def _walk(self, one: _Pass, made: _Made | None) -> _Made | None:
        """One step through all stages of this machine. What it came to if it has the head."""
        await self._enter(one, made)
        sampled = None
        for stop in self._stops:
            if stop.only_if_emits and not one.step.emits:
                break
            if stop.arrives:
                letter = await self.post.receive(stop.arrives, one.step.index)
                self._learn(one, letter)
                one.depth = max(one.depth, letter.depth)
                self.keep(stop.arrives, one.step, letter.payload)
                one.pending = partial(self._decode, one, letter.payload, self.plan.rows(stop.arrives, one.step))
            if stop.index in one.before:  # chunks pass a stage in order: its keys and values grow from the front
                await one.before[stop.index].wait()
            if isinstance(stop.stage, Serial):
                sampled = await self._serial(one, stop, stop.stage)
            else:
                await self._shared(one, stop, stop.stage)
        return sampled

    async def _enter(self, one: _Pass, made: _Made | None) -> None:
        """The ids of a step reach the embedding: a part of the prompt, or the last token and what was drafted."""
        step, depth = one.step, made.depth if made else 0
        ids = list(made.ids) if made else []
        if step.is_prefill:
            ids = list(self.ids[step.start : step.start + step.count])
        if self.me == self.plan.feeder:
            await self._feed(one)
        for move in self._entering:
            if not self.plan.rows(move, step):
                continue
            if self.me == move.src:
                await self.post.send(move, step, _ids_out(ids), depth)
            else:
                letter = await self.post.receive(move, step.index)
                self._learn(one, letter)
                ids, depth = self._ids_in(letter.payload), letter.depth
                if step.is_prefill and self.drafting:
                    self.drafting.follows(step.start, ids)
        if self.me == self.plan.embed and self.plan.feeder is None:
            one.depth = depth
            one.pending = lambda: self.share.embed(ids, self._at(one))

    async def _feed(self, one: _Pass) -> None:
        """The stream before an excerpt, as it was kept, goes to those who begin with it."""
        step, wire = one.step, self.plan.wire(one.step)
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
        one.pending = partial(self._decode, one, memoryview(payload), step.count)

    def keep(self, move: Move, step: Step, payload: bytes | memoryview) -> None:
        """Keep a residual stream that crossed, unless only a part of it did."""
        if self.kept is not None and move.kind is Kind.RESIDUAL and not move.last_only and move.after >= 0:
            stage = self.plan.stages[move.after]
            half = stage.stop if isinstance(stage, Serial) else stage.half + 1
            self.kept.put(half, step.start, step.count, self.plan.wire(step), payload)

    async def _serial(self, one: _Pass, stop: Stop, stage: Serial) -> _Made | None:
        tapped: list[tuple[int, bytes]] = []
        step, emits = one.step, stage.head and one.step.emits

        def finish(x: Tensor, logits: Tensor | None) -> tuple[Tensor, bytes, tuple[int, ...]]:
            if logits is not None:
                return x, b"", self._sampled(one, logits)
            return (*self._crossed(one, stop, x), ())

        piece = Piece(
            self.share, stage.start, stage.stop, step.count, step.start + step.count,
            stream=lambda: (self._residual(one), self._at(one)),
            finish=finish,
            is_prefill=step.is_prefill,
            head_rows=(1 if step.is_prefill else step.count) if emits else 0,
            priority=self.request.priority,
            taps=tuple(half for half in self.taps if stage.start < half < stage.stop),
            tap=lambda half, x: tapped.append((half, codec.encode(x, self.plan.wire(step)))),
        )  # fmt: skip
        result = await self.machine.run(piece, here=self.post.may_block)
        self._note(one, stop, result.start_s, result.stop_s)
        x, payload, sampled = result.value
        for half, kept in tapped:
            if self.kept is not None:
                self.kept.put(half, step.start, step.count, self.plan.wire(step), kept)
        if sampled:
            return _Made(sampled, one.depth)
        await self._send_residual(one, stop, x, payload)
        return None

    async def _shared(self, one: _Pass, stop: Stop, stage: Shared) -> None:
        wire = self.plan.wire(one.step)

        def work() -> tuple[Tensor, Tensor, bytes]:
            x = self._residual(one)
            summand = self.share.partial(x, stage.half, self._at(one))
            if stop.last_only and one.step.is_prefill:
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

    async def _join(self, one: _Pass, stop: Stop, stage: Shared, x: Tensor, own: Tensor) -> None:
        """Gather the partial sums of the others; they are added when the compute thread next has this pass."""
        others: dict[int, memoryview] = {}
        for move in stop.partials_in:
            letter = await self.post.receive(move, one.step.index)
            self._learn(one, letter)
            others[move.src] = letter.payload
            one.depth = max(one.depth, letter.depth)

        def joined() -> Tensor:
            partials = [own if m == self.me else self._decode(one, others[m], own.shape[0]) for m in stage.machines]
            return self.share.join(x, partials, stage.half)

        if stop.crossing is None:
            one.pending = joined
            return
        result, payload = await self._compute(lambda: self._crossed(one, stop, joined()), one, stop, adding=True)
        await self._send_residual(one, stop, result, payload)

    async def _send_residual(self, one: _Pass, stop: Stop, x: Tensor, payload: bytes) -> None:
        for move in stop.residuals_out:
            if self.plan.rows(move, one.step):
                self.keep(move, one.step, payload)
                await self.post.send(move, one.step, payload, one.depth)
        one.pending = lambda: x

    def _crossed(self, one: _Pass, stop: Stop, x: Tensor) -> tuple[Tensor, bytes]:
        """The stream as it goes on here, and as bytes where it leaves: whoever keeps a copy keeps what the
        others will decode."""
        if stop.crossing is None:
            return x, b""
        if stop.last_only and one.step.is_prefill:
            x = x[-1:]
        x = self._lose(x, stop.index, Kind.RESIDUAL, stop.crossing.src, one.step)
        wire = self.plan.wire(one.step)
        payload = codec.encode(x, wire) if stop.residuals_out else b""
        return codec.round_trip(x, wire) if stop.goes_on else x, payload

    # Small things

    def _choose(self, logits: Tensor, position: int) -> int:
        return self.choose(logits, position) if self.choose else sample(logits, self.request.sampling, position)

    def _sampled(self, one: _Pass, logits: Tensor) -> tuple[int, ...]:
        """What follows each position of a step that emits (of a prefill: the last one), from logits (rows, vocab);
        where the loop is here, no further than the first drafted token that is wrong."""
        first = one.step.start + one.step.count - len(logits) + 1
        choices = (self._choose(row, first + n) for n, row in enumerate(logits))
        return self._right(one.drafted, choices) if self.me == self.plan.loop_machine else tuple(choices)

    def _at(self, one: _Pass) -> Positions:
        if one.at is None:
            if self.plan.decision.draft and not one.step.is_prefill:
                self.share.cut(one.step.start)  # what was drafted last and not accepted
            one.at = self.share.positions(one.step.start, one.step.count)
        return one.at

    def _residual(self, one: _Pass) -> Tensor:
        if one.pending is None:
            raise ProtocolError("the residual stream is not here")
        pending, one.pending = one.pending, None
        return pending()

    def _decode(self, one: _Pass, payload: memoryview, rows: int) -> Tensor:
        x = codec.decode(payload, self.plan.wire(one.step), rows, self.plan.d_model)
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

    async def _compute(self, work: Callable[[], T], one: _Pass, stop: Stop, adding: bool = False) -> T:
        """Run on the compute thread, or right here where a short step may hold the event loop; and note when.
        Additions weigh nothing beside the products around them."""
        machine, step = self.machine, one.step

        def predicted(device: DeviceSpec) -> float:
            if adding:
                return 0.0
            host = Host(device, machine.dtype, machine.weights)
            return cost.stage_seconds(machine.spec, host, stop.stage, self.me, step)

        here = self.share if not step.is_prefill and self.post.may_block else None
        result = await machine.compute(work, predicted, here)
        if not adding:
            machine.clock.ran(step.count if step.is_prefill else 1, result.stop_s - result.start_s)
        self._note(one, stop, result.start_s, result.stop_s)
        return result.value

    def _note(self, one: _Pass, stop: Stop, start_s: float, stop_s: float) -> None:
        """A stage of a step was computed; the chunk behind may follow."""
        if stop.index in one.done:
            one.done[stop.index].set()
        self.intervals.append(Interval(stop.index, one.step.index, start_s, stop_s, self.post.extent.run))


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
