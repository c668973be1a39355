"""A machine's letter boxes in one session, one for each run: sending moves, receiving them in any order, relaying,
counting.

Nothing gets into a box that its run's plan does not call for, and nothing twice: what is late, or was repeated on its
way, is dropped. It does not know what the numbers mean.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitwise_llm.errors import LinkDied, ProtocolError, RequestError, SplitwiseError
from splitwise_llm.plan import DEVICE, Crossings, Kind, Move, Plan, Step, crossings
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import Data, pack

_Key = tuple[int, int, str, int]
IDS = "ids"


@dataclass(frozen=True, slots=True)
class _Form:
    """How one move looks here, worked out once: its format, where it goes first, and from whom to whom it passes."""

    move: Move
    dtypes: tuple[str, str]
    """While tokens flow, and in a prefill."""
    columns: int
    first_hop: int
    onward: dict[int, int | None]
    """From which neighbour it may come, and to whom it goes on; None: it stays."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a run is: its number, the ids there are, how many of them are cached, and how many tokens may follow
    (0: a fill)."""

    run: int
    start: int
    known: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Letter:
    """What came: its payload, the depth of the causal chain behind it, and the step it belongs to; of a round, only
    a message says where it is and how many positions it has."""

    payload: memoryview
    depth: int
    step: Step


Keep = Callable[[Move, Step, bytes | memoryview], None]
"""Told of a residual stream, as it crosses."""


def _keep_nothing(move: Move, step: Step, payload: bytes | memoryview) -> None: ...


class Post:
    """Moves of one run in and out of machine `me`. `links` leads to every machine this one can reach by itself, and
    may change."""

    def __init__(
        self,
        me: int,
        plan: Plan,
        extent: Extent,
        links: Mapping[int, Link],
        names: Sequence[str],
    ) -> None:
        self.me, self.plan, self.extent, self.links, self._names = me, plan, extent, links, names
        self.keep: Keep = _keep_nothing
        """Told of residual streams that are passed on here."""
        relays = me == DEVICE and any(len(plan.legs(move.src, move.dst)) > 1 for move in plan.moves)
        self.may_block = not relays and not any(link.lives_on_loop for link in links.values())
        """Whether nothing stands still while this machine's event loop does: no relay, no link that lives on it."""
        self._num_steps = plan.num_steps(extent.known, extent.tokens, extent.start)
        self._forms = {(move.after, move.kind.value, move.src, move.dst): self._form(move) for move in plan.moves}
        self._arrived: dict[_Key, tuple[Data, memoryview]] = {}
        self._awaited: dict[_Key, asyncio.Future[tuple[Data, memoryview]]] = {}
        self._seen: set[tuple[int, int, str, int, int]] = set()
        self._failure: SplitwiseError | None = None
        self._counts: Counter[tuple[int, Kind, int, int]] = Counter()
        self._sizes: Counter[tuple[int, Kind, int, int]] = Counter()
        self.frame_bytes = 0
        self.last_active_s = time.monotonic()

    def step(self, index: int) -> Step:
        """Step number `index` of this run."""
        return self.plan.step(index, self.extent.known, self.extent.start)

    def _form(self, move: Move) -> _Form:
        activations = move.kind in (Kind.RESIDUAL, Kind.PARTIAL)
        decision, columns = self.plan.decision, self.plan.d_model if activations else 1
        dtypes = [decision.wire_in(is_prefill).value if activations else IDS for is_prefill in (False, True)]
        legs = self.plan.legs(move.src, move.dst)
        hops = [hop for _, hop in legs[1:]] + [None]
        onward = {src: hop for (src, dst), hop in zip(legs, hops, strict=True) if dst == self.me}
        return _Form(move, (dtypes[0], dtypes[1]), columns, legs[0][1], onward)

    @property
    def crossings(self) -> tuple[Crossings, ...]:
        """What this machine has sent, relays included."""
        return crossings(self._counts, self._sizes)

    async def send(self, move: Move, step: Step, payload: bytes, depth: int) -> None:
        """Send one move of a step. Raises LinkDied."""
        form = self._forms[move.after, move.kind.value, move.src, move.dst]
        rows = self.plan.rows(move, step)
        start = step.start if self.plan.decision.draft and not step.is_prefill else -1
        header = Data(
            self.extent.run, step.index, move.after, move.kind.value, move.src, move.dst, depth,
            form.dtypes[step.is_prefill], rows, form.columns, start,
        )  # fmt: skip
        await self._send(form.first_hop, move, pack(header, payload), len(payload))

    async def _send(self, hop: int, move: Move, frame: bytes, payload_bytes: int) -> None:
        key = (move.after, move.kind, self.me, hop)
        self._counts[key] += 1
        self._sizes[key] += payload_bytes
        self.frame_bytes += len(frame)
        self.last_active_s = time.monotonic()
        if hop not in self.links:
            raise self._lost(hop, LinkDied("there is no link to it"))
        try:
            await self.links[hop].send(frame)
        except LinkDied as error:
            raise self._lost(hop, error) from error
        except RequestError as error:  # the link's frame limit; only prefill activations come near it
            raise RequestError(f"{error}; use a smaller prefill chunk") from error

    async def receive(self, move: Move, index: int) -> Letter:
        """A move of step number `index`. Raises what ended the session if it ends."""
        key = (index, move.after, move.kind.value, move.src)
        found = self._arrived.pop(key, None)
        if found is None:
            if self._failure:
                raise self._failure
            future = self._awaited.setdefault(key, asyncio.get_running_loop().create_future())
            found = await future
        header, payload = found
        return Letter(payload, header.depth + len(self.plan.legs(move.src, move.dst)), self._step_of(header, move))

    def _step_of(self, header: Data, move: Move) -> Step:
        """The step that a message belongs to. Raises ProtocolError for one that cannot be."""
        step = self.step(header.step)
        if step.is_prefill or not self.plan.decision.draft:
            if header.start >= 0:
                raise ProtocolError(f"{_what(header)}: position {header.start} in a step whose positions are known")
            return step
        rows, stop = header.rows, self.extent.known + self.extent.tokens - 1
        if header.start < step.start or not 1 <= rows <= min(self.plan.decision.draft + 1, stop - header.start):
            raise ProtocolError(f"{_what(header)}: {rows} positions from {header.start} on are no round of this run")
        made = rows if move.kind is Kind.TOKEN else 1
        return self.plan.round(header.step, header.start, rows, made)

    def _lost(self, peer: int, error: LinkDied) -> LinkDied:
        return LinkDied(f"{self._names[peer]} was lost in mid-generation: {error}")

    async def accept(self, header: Data, payload: memoryview, frame: bytes, peer: int) -> None:
        """Take in, or relay, what came from a peer. Raises ProtocolError for what the plan does not call for."""
        self.last_active_s = time.monotonic()
        form = self._forms.get((header.after, header.kind, header.src, header.dst))
        if form is None or header.step >= self._num_steps:
            raise ProtocolError(f"{_what(header)}: no such message in this plan")
        if peer not in form.onward:
            raise ProtocolError(f"{_what(header)}: it does not come by way of machine {peer}")
        move, hop = form.move, form.onward[peer]
        step = self._step_of(header, move)
        rows = self.plan.rows(move, step)
        dtype = form.dtypes[step.is_prefill]
        if rows == 0 or (header.dtype, header.rows, header.columns) != (dtype, rows, form.columns):
            raise ProtocolError(
                f"{_what(header)}: got {header.dtype} ({header.rows}, {header.columns}), "
                f"expected {dtype} ({rows}, {form.columns})"
            )
        size = self.plan.payload_bytes(move, step)
        if len(payload) != size:
            raise ProtocolError(f"{_what(header)}: got {len(payload)} bytes, expected {size}")
        key = (header.step, header.after, header.kind, header.src, header.dst)
        if key in self._seen:
            return  # it came twice
        self._seen.add(key)
        if hop is None:
            self._deliver(header, payload)
        else:
            self.keep(move, step, payload)
            await self._send(hop, move, frame, size)

    def _deliver(self, header: Data, payload: memoryview) -> None:
        key = (header.step, header.after, header.kind, header.src)
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


MAX_EARLY_FRAMES = 4096


class Office:
    """The boxes of a session on one machine, by the number of the run."""

    def __init__(self) -> None:
        self._boxes: dict[int, Post] = {}
        self._latest = -1
        self._early: dict[int, list[tuple[Data, memoryview, bytes, int]]] = {}
        self.late = 0
        """Frames of runs that were over."""

    async def open(self, post: Post) -> None:
        """The box of a run, with what came before it was there. Raises ProtocolError, LinkDied."""
        run = post.extent.run
        self._boxes[run] = post
        self._latest = max(self._latest, run)
        for one in self._early.pop(run, []):
            await post.accept(*one)
        for number in [number for number in self._early if number < run]:
            self.late += len(self._early.pop(number))

    def close(self, run: int) -> None:
        """What still comes for this run is late."""
        self._boxes.pop(run, None)

    async def accept(self, header: Data, payload: memoryview, frame: bytes, peer: int) -> None:
        """Into its box; what comes before its box is there waits. Raises ProtocolError, LinkDied."""
        box = self._boxes.get(header.run)
        if box is not None:
            await box.accept(header, payload, frame, peer)
        elif header.run <= self._latest:
            self.late += 1
        else:  # from a machine that was told of the run before this one
            waiting = self._early.setdefault(header.run, [])
            if sum(map(len, self._early.values())) >= MAX_EARLY_FRAMES:
                raise ProtocolError(f"{MAX_EARLY_FRAMES} frames came for runs that were not begun")
            waiting.append((header, payload, frame, peer))

    def fail(self, error: SplitwiseError, run: int | None = None) -> None:
        """End every wait in every box, or in that of one run."""
        for number, box in self._boxes.items():
            if run in (None, number):
                box.fail(error)
