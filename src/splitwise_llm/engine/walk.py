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
from splitwise_llm.engine.machine import Machine, T
from splitwise_llm.engine.post import Post
from splitwise_llm.errors import ProtocolError, RequestError
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
    """What every machine of a session is told besides the decision."""

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


@dataclass(slots=True)
class _Pass:
    """One machine's walk through one step. `pending` makes the residual stream once the compute thread has it."""

    step: Step
    done: dict[int, asyncio.Event]
    before: dict[int, asyncio.Event]
    at: Positions | None = None
    pending: Callable[[], Tensor] | None = None
    depth: int = 0


@dataclass(slots=True)
class Walker:
    """Machine `post.me` in one session."""

    plan: Plan
    request: Request
    share: Share
    machine: Machine
    post: Post
    prompt: Sequence[int] = ()
    """The ids; only the device has them."""
    on_token: OnToken | None = None
    """Called on the device for each token, in order."""
    choose: Choose | None = None
    """Replaces sampling where the head is on this machine."""
    intervals: list[Interval] = field(default_factory=list)

    @property
    def _with_layers(self) -> list[int]:
        """The stages of this machine that keep keys and values, or stand between those that do."""
        return [
            index
            for index, stage in enumerate(self.plan.stages)
            if self.me in stage.machines and not (isinstance(stage, Serial) and stage.is_head_only)
        ]

    @property
    def me(self) -> int:
        return self.post.me

    async def run(self) -> None:
        """Prefill and decode until the last token; a machine that never sees tokens waits to be cancelled.

        Raises PeerError when another machine or a link fails.
        """
        token = await self._prefill()
        first = self.plan.decision.num_chunks(self.request.prompt_tokens) - 1
        for number in range(self.request.max_new_tokens):
            step = self.plan.step(first + number, self.request.prompt_tokens)
            if number:
                token = await self._walk(self._pass(step), [token] if token else None)
            token = await self._hand_over(step, token)
            if token and token.id in self.request.stop_ids:
                return

    async def _prefill(self) -> Sampled | None:
        """All chunks, each stage in order but several stages at once. The token if the head is here."""
        walks: list[Awaitable[Sampled | None]] = []
        before: dict[int, asyncio.Event] = {}
        for index in range(self.plan.decision.num_chunks(self.request.prompt_tokens)):
            one = self._pass(self.plan.step(index, self.request.prompt_tokens), before)
            before = one.done
            walks.append(self._walk(one, None))
        tokens = await _all(walks)
        return tokens[-1]

    def _pass(self, step: Step, before: dict[int, asyncio.Event] | None = None) -> _Pass:
        return _Pass(step, {index: asyncio.Event() for index in self._with_layers}, before or {})

    async def _hand_over(self, step: Step, token: Sampled | None) -> Sampled | None:
        """Bring the token of a step to the device and, for the next step, to the embedding."""
        for move in self.plan.moves:
            if move.kind is Kind.TOKEN and self.me == move.src and token:
                await self.post.send(move, step, _ids_out([token.id]), token.depth)
            if move.kind is Kind.TOKEN and self.me == move.dst:
                payload, depth = await self.post.receive(move, step)
                token = Sampled(self._ids_in(payload)[0], depth)
        if self.me == DEVICE and token and self.on_token:
            self.on_token(token)
        if self._never_waits:
            await asyncio.sleep(0)  # whoever waits for the token, or wants to end this, gets a turn
        return token

    @property
    def _never_waits(self) -> bool:
        """Whether no message comes here while tokens flow."""
        return not any(move.dst == self.me and move.kind is not Kind.PROMPT for move in self.plan.moves)

    async def _walk(self, one: _Pass, tokens: list[Sampled] | None) -> Sampled | None:
        """One step through all stages. The sampled token if this machine has the head."""
        if self.me in (self.plan.embed, DEVICE):
            await self._enter(one, tokens)
        token = None
        for index, stage in enumerate(self.plan.stages):
            if isinstance(stage, Serial) and stage.is_head_only and not one.step.emits:
                break
            if self.me in stage.machines:
                await self._arrive(one, index)
                await self._turn(one, index)
                if isinstance(stage, Serial):
                    token = await self._serial(one, index, stage)
                else:
                    await self._shared(one, index, stage)
        return token

    async def _enter(self, one: _Pass, tokens: list[Sampled] | None) -> None:
        """The ids of a step reach the embedding: a part of the prompt, or the last token."""
        step = one.step
        ids = (
            list(self.prompt[step.start : step.start + step.count]) if step.is_prefill else [t.id for t in tokens or ()]
        )
        depth = max((t.depth for t in tokens or ()), default=0)
        for move in self.plan.moves_after(-1):
            if self.me == move.src and self.plan.rows(move, step):
                await self.post.send(move, step, _ids_out(ids), depth)
            if self.me == move.dst and self.plan.rows(move, step):
                payload, depth = await self.post.receive(move, step)
                ids = self._ids_in(payload)
        if self.me == self.plan.embed:
            one.depth = depth
            one.pending = lambda: self.share.embed(ids, self._at(one))

    async def _arrive(self, one: _Pass, index: int) -> None:
        """Wait for the residual stream if it comes from elsewhere."""
        for move in self.plan.moves_after(index - 1):
            if move.kind is Kind.RESIDUAL and move.dst == self.me:
                payload, depth = await self.post.receive(move, one.step)
                one.depth = max(one.depth, depth)
                rows = self.plan.rows(move, one.step)
                one.pending = partial(self._decode, payload, rows)

    async def _turn(self, one: _Pass, index: int) -> None:
        """Chunks pass a stage in order: its keys and values grow from the front."""
        if index in one.before:
            await one.before[index].wait()

    async def _serial(self, one: _Pass, index: int, stage: Serial) -> Sampled | None:
        def work() -> tuple[Tensor, bytes, int | None]:
            x = self._residual(one)
            x = self.share.run(x, stage.start, stage.stop, self._at(one))
            if stage.head and one.step.emits:
                return x, b"", self._choose(self.share.logits(x), one.step.start + one.step.count)
            return (*self._encode_residual(index, one, x), None)

        x, payload, token = await self._compute(work, one, index, stage)
        if index in one.done:
            one.done[index].set()
        if token is not None:
            return Sampled(token, one.depth)
        await self._send_residual(one, index, x, payload)
        return None

    async def _shared(self, one: _Pass, index: int, stage: Shared) -> None:
        outgoing = self._outgoing(index, Kind.PARTIAL)
        last_only = any(move.last_only for move in self.plan.moves_after(index))

        def work() -> tuple[Tensor, Tensor, bytes]:
            x = self._residual(one)
            summand = self.share.partial(x, stage.half, self._at(one))
            if last_only:
                x, summand = x[-1:], summand[-1:]
            summand = self._lose(summand, index, Kind.PARTIAL, self.me, one.step)
            payload = codec.encode(summand, self.plan.decision.wire) if outgoing else b""
            return x, codec.round_trip(summand, self.plan.decision.wire), payload

        x, own, payload = await self._compute(work, one, index, stage)
        one.done[index].set()
        if last_only and not one.step.emits:
            return
        for move in outgoing:
            await self.post.send(move, one.step, payload, one.depth)
        if self.me in self.plan.joiners[index]:
            await self._join(one, index, stage, x, own)

    async def _join(self, one: _Pass, index: int, stage: Shared, x: Tensor, own: Tensor) -> None:
        """Gather the partial sums of the others; they are added when the compute thread next has this pass."""
        others: dict[int, memoryview] = {}
        for move in self.plan.moves_after(index):
            if move.kind is Kind.PARTIAL and move.dst == self.me:
                others[move.src], depth = await self.post.receive(move, one.step)
                one.depth = max(one.depth, depth)

        def joined() -> Tensor:
            partials = [own if m == self.me else self._decode(others[m], own.shape[0]) for m in stage.machines]
            return self.share.join(x, partials, stage.half)

        if not any(move.kind is Kind.RESIDUAL for move in self.plan.moves_after(index)):
            one.pending = joined
            return
        result, payload = await self._compute(lambda: self._encode_residual(index, one, joined()), one, index, None)
        await self._send_residual(one, index, result, payload)

    async def _send_residual(self, one: _Pass, index: int, x: Tensor, payload: bytes) -> None:
        for move in self._outgoing(index, Kind.RESIDUAL):
            if self.plan.rows(move, one.step):
                await self.post.send(move, one.step, payload, one.depth)
        one.pending = lambda: x

    def _encode_residual(self, index: int, one: _Pass, x: Tensor) -> tuple[Tensor, bytes]:
        """The stream as it goes on here, and as bytes where it leaves: whoever keeps a copy keeps what the
        others will decode."""
        crossing = [move for move in self.plan.moves_after(index) if move.kind is Kind.RESIDUAL]
        if not crossing:
            return x, b""
        if crossing[0].last_only:
            x = x[-1:]
        x = self._lose(x, index, Kind.RESIDUAL, crossing[0].src, one.step)
        sends = self.me == crossing[0].src
        payload = codec.encode(x, self.plan.decision.wire) if sends else b""
        return codec.round_trip(x, self.plan.decision.wire), payload

    # Small things

    def _choose(self, logits: Tensor, position: int) -> int:
        return self.choose(logits, position) if self.choose else sample(logits, self.request.sampling, position)

    def _outgoing(self, index: int, kind: Kind) -> list[Move]:
        return [move for move in self.plan.moves_after(index) if move.kind is kind and move.src == self.me]

    def _at(self, one: _Pass) -> Positions:
        if one.at is None:
            one.at = self.share.positions(one.step.start, one.step.count)
        return one.at

    def _residual(self, one: _Pass) -> Tensor:
        if one.pending is None:
            raise ProtocolError("the residual stream is not here")
        pending, one.pending = one.pending, None
        return pending()

    def _decode(self, payload: memoryview, rows: int) -> Tensor:
        x = codec.decode(payload, self.plan.decision.wire, rows, self.plan.d_model)
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

    async def _compute(self, work: Callable[[], T], one: _Pass, index: int, stage: Stage | None) -> T:
        """Run on the compute thread, or right here where a short step may hold the event loop; and note when."""

        def predicted(device: DeviceSpec) -> float:
            if stage is None:
                return 0.0  # additions, of no weight beside the products around them
            machine = self.machine
            return cost.stage_seconds(machine.spec, device, stage, self.me, one.step, machine.dtype, machine.weights)

        here = not one.step.is_prefill and self.post.may_block
        done = await self.machine.compute(work, predicted, here)
        self.intervals.append(Interval(index, one.step.index, done.start_s, done.stop_s))
        return done.value


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
