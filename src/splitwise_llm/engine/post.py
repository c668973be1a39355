"""A machine's letter box in one session: sends moves, receives them in any order, relays for others, counts.

Nothing arrives here that the plan does not call for; it does not know what the numbers mean.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from splitwise_llm.errors import LinkDied, ProtocolError, RequestError, SplitwiseError
from splitwise_llm.plan import DEVICE, Crossings, Kind, Move, Plan, Step, crossings
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Data, Header, pack, unpack

_Key = tuple[int, int, str, int]
IDS = "ids"


@dataclass(frozen=True, slots=True)
class _Form:
    """How one move looks here, worked out once: its format, where it goes first, and from whom to whom it passes."""

    move: Move
    dtype: str
    columns: int
    first_hop: int
    onward: dict[int, int | None]
    """From which neighbour it may come, and to whom it goes on; None: it stays."""


class Post:
    """Moves in and out of machine `me`. `links` leads to every machine this one can reach by itself."""

    def __init__(
        self,
        me: int,
        plan: Plan,
        links: dict[int, Link],
        names: Sequence[str],
        prompt_tokens: int,
        max_new_tokens: int,
    ) -> None:
        self.me, self.plan, self.links, self._names = me, plan, links, names
        relays = me == DEVICE and any(len(plan.legs(move.src, move.dst)) > 1 for move in plan.moves)
        self.may_block = not relays and not any(link.lives_on_loop for link in links.values())
        """Whether nothing stands still while this machine's event loop does: no relay, no link that lives on it."""
        self._prompt_tokens = prompt_tokens
        self._num_steps = plan.num_steps(prompt_tokens, max_new_tokens)
        self._forms = {(move.after, move.kind.value, move.src, move.dst): self._form(move) for move in plan.moves}
        self._arrived: dict[_Key, tuple[Data, memoryview]] = {}
        self._awaited: dict[_Key, asyncio.Future[tuple[Data, memoryview]]] = {}
        self._seen: set[_Key] = set()
        self._failure: SplitwiseError | None = None
        self._counts: Counter[tuple[int, Kind, int, int]] = Counter()
        self._sizes: Counter[tuple[int, Kind, int, int]] = Counter()
        self.frame_bytes = 0
        self.last_active_s = time.monotonic()

    def _form(self, move: Move) -> _Form:
        activations = move.kind in (Kind.RESIDUAL, Kind.PARTIAL)
        dtype, columns = (self.plan.decision.wire.value, self.plan.d_model) if activations else (IDS, 1)
        legs = self.plan.legs(move.src, move.dst)
        hops = [hop for _, hop in legs[1:]] + [None]
        onward = {src: hop for (src, dst), hop in zip(legs, hops, strict=True) if dst == self.me}
        return _Form(move, dtype, columns, legs[0][1], onward)

    @property
    def crossings(self) -> tuple[Crossings, ...]:
        """What this machine has sent, relays included."""
        return crossings(self._counts, self._sizes)

    async def send(self, move: Move, step: Step, payload: bytes, depth: int) -> None:
        """Send one move of a step. Raises LinkDied."""
        form = self._forms[move.after, move.kind.value, move.src, move.dst]
        rows = self.plan.rows(move, step)
        header = Data(
            step.index, move.after, move.kind.value, move.src, move.dst, depth, form.dtype, rows, form.columns
        )
        await self._send(form.first_hop, move, pack(header, payload), len(payload))

    async def _send(self, hop: int, move: Move, frame: bytes, payload_bytes: int) -> None:
        key = (move.after, move.kind, self.me, hop)
        self._counts[key] += 1
        self._sizes[key] += payload_bytes
        self.frame_bytes += len(frame)
        self.last_active_s = time.monotonic()
        try:
            await self.links[hop].send(frame)
        except LinkDied as error:
            raise self._lost(hop, error) from error
        except RequestError as error:  # the link's frame limit; only prefill activations come near it
            raise RequestError(f"{error}; use a smaller prefill chunk") from error

    async def receive(self, move: Move, step: Step) -> tuple[memoryview, int]:
        """The payload of a move of a step, and its depth here. Raises what ended the session if it ends."""
        key = (step.index, move.after, move.kind.value, move.src)
        found = self._arrived.pop(key, None)
        if found is None:
            if self._failure:
                raise self._failure
            future = self._awaited.setdefault(key, asyncio.get_running_loop().create_future())
            found = await future
        header, payload = found
        return payload, header.depth + len(self.plan.legs(move.src, move.dst))

    async def pump(self, peer: int) -> tuple[Header, memoryview] | None:
        """Take frames off the link to `peer` until one is not data, and return that (None: the link was closed).

        Raises ProtocolError for data that the plan does not call for, LinkDied.
        """
        link = self.links[peer]
        while (frame := await self._next(link, peer)) is not None:
            header, payload = unpack(frame)
            if not isinstance(header, Data):
                return header, payload
            await self._accept(header, payload, frame, peer)
        return None

    async def _next(self, link: Link, peer: int) -> bytes | None:
        try:
            return await link.receive()
        except LinkDied as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: int, error: LinkDied) -> LinkDied:
        return LinkDied(f"{self._names[peer]} was lost in mid-generation: {error}")

    async def _accept(self, header: Data, payload: memoryview, frame: bytes, peer: int) -> None:
        self.last_active_s = time.monotonic()
        form = self._forms.get((header.after, header.kind, header.src, header.dst))
        if form is None or header.step >= self._num_steps:
            raise ProtocolError(f"{_what(header)}: no such message in this plan")
        if peer not in form.onward:
            raise ProtocolError(f"{_what(header)}: it does not come by way of machine {peer}")
        move, hop = form.move, form.onward[peer]
        rows = self.plan.rows(move, self.plan.step(header.step, self._prompt_tokens))
        if rows == 0 or (header.dtype, header.rows, header.columns) != (form.dtype, rows, form.columns):
            raise ProtocolError(
                f"{_what(header)}: got {header.dtype} ({header.rows}, {header.columns}), "
                f"expected {form.dtype} ({rows}, {form.columns})"
            )
        size = self.plan.payload_bytes(move, rows)
        if len(payload) != size:
            raise ProtocolError(f"{_what(header)}: got {len(payload)} bytes, expected {size}")
        if hop is None:
            self._deliver(header, payload)
        else:
            await self._send(hop, move, frame, size)

    def _deliver(self, header: Data, payload: memoryview) -> None:
        key = (header.step, header.after, header.kind, header.src)
        if key in self._seen:
            raise ProtocolError(f"{_what(header)}: it came twice")
        self._seen.add(key)
        future = self._awaited.pop(key, None)
        if future is None:
            self._arrived[key] = (header, payload)
        elif not future.done():
            future.set_result((header, payload))

    def fail(self, error: SplitwiseError) -> None:
        """End every wait, now and later, with this error; the first one counts."""
        self._failure = self._failure or error
        for future in self._awaited.values():
            if not future.done():
                future.set_exception(self._failure)
                future.exception()  # retrieved here, in case nobody waits any more
        self._awaited.clear()


def _what(header: Data) -> str:
    return f"{header.kind} after stage {header.after} of step {header.step} from machine {header.src}"
