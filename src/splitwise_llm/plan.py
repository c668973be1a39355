"""A decision compiled to stages and moves: the single place that knows what crosses, when, and how large.

The engine walks a plan, the cost model prices it; both take what crosses from here. A plan knows
sizes and order, never seconds or sockets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import PartitionError
from splitwise_llm.partition import Part
from splitwise_llm.spec import ModelSpec

DEVICE = 0
TOKEN_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class Serial:
    """Consecutive halves `start` to `stop` on one machine, with the embedding before or the head after them."""

    machine: int
    start: int
    stop: int
    embed: bool = False
    head: bool = False

    @property
    def machines(self) -> tuple[int, ...]:
        return (self.machine,)

    @property
    def is_head_only(self) -> bool:
        return self.head and self.start == self.stop


@dataclass(frozen=True, slots=True)
class Share:
    """The units of a shared half that one machine computes."""

    machine: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """One half computed by several machines at the same time, whose partial sums are added."""

    half: int
    shares: tuple[Share, ...]

    @property
    def layer(self) -> int:
        return self.half // 2

    @property
    def part(self) -> Part:
        return Part.FFN if self.half % 2 else Part.ATTENTION

    @property
    def machines(self) -> tuple[int, ...]:
        return tuple(share.machine for share in self.shares)


Stage = Serial | Shared


class Kind(StrEnum):
    """What a message carries."""

    PROMPT = "prompt"  # ids of a prefill chunk, device -> embedding
    RESIDUAL = "residual"  # the residual stream
    PARTIAL = "partial"  # one machine's part of a shared sub-block
    TOKEN = "token"  # a sampled id, head -> device  # noqa: S105
    NEXT = "next"  # a sampled id, device -> embedding


@dataclass(frozen=True, slots=True)
class Move:
    """One message per step from `src` to `dst` after stage `after` (-1: before the first)."""

    kind: Kind
    after: int
    src: int
    dst: int
    last_only: bool = False
    """Only the last position of the last prefill chunk crosses: the receiver has a head and no layers."""


@dataclass(frozen=True, slots=True)
class Crossings:
    """Messages and payload bytes of one kind after one stage over one directed link."""

    after: int
    kind: Kind
    src: int
    dst: int
    count: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """One walk through the stages: `count` positions from `start`; `emits` unless a later chunk follows. A decode
    step of more than one position verifies drafted tokens: it is a round."""

    index: int
    start: int
    count: int
    emits: bool
    is_prefill: bool
    made: int = 1
    """Tokens that a round made: the drafted ones that were right, and one more; of a token loop away from the device,
    they alone go to it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in order and the moves between them, for one decision on one model: the whole of it, or an excerpt."""

    decision: Decision
    d_model: int
    stages: tuple[Stage, ...]
    moves: tuple[Move, ...]
    joiners: tuple[tuple[int, ...], ...]
    """Per stage, the machines that hold its result: those that add the partial sums where it is shared."""
    direct: frozenset[tuple[int, int]] = frozenset()
    """Pairs of workers with a link of their own; everyone else meets through the device."""
    feeder: int | None = None
    """Of an excerpt that begins with the residual stream: the machine that has kept it; None: ids come first."""
    first: int = 0
    """The first half; behind 0 only in an excerpt."""
    _after: dict[int, tuple[Move, ...]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        after = {n: tuple(move for move in self.moves if move.after == n) for n in range(-1, len(self.stages))}
        object.__setattr__(self, "_after", after)

    @property
    def embed(self) -> int:
        return self.decision.partition.embed

    @property
    def head(self) -> int:
        return self.decision.partition.head

    @property
    def loop_machine(self) -> int:
        """Who runs the token loop: knows each token first, drafts what may follow it, and judges."""
        return self.embed if self.embed == self.head else DEVICE

    def cached_halves(self, machine: int) -> range:
        """The halves of an excerpt in which a machine that takes part makes caches anew."""
        last = self.stages[-1]
        stop = last.stop if isinstance(last, Serial) else last.half + 1
        return range(self.first, stop if machine in last.machines or isinstance(last, Serial) else stop - 1)

    def legs(self, src: int, dst: int) -> tuple[tuple[int, int], ...]:
        """The directed links a message takes: one, or two through the device."""
        if DEVICE in (src, dst) or (src, dst) in self.direct:
            return ((src, dst),)
        return ((src, DEVICE), (DEVICE, dst))

    def moves_after(self, stage: int) -> tuple[Move, ...]:
        """What crosses once stage `stage` is computed."""
        return self._after[stage]

    def rows(self, move: Move, step: Step) -> int:
        """Positions (or ids) a move carries in a step; 0 when nothing is sent."""
        match move.kind:
            case Kind.PROMPT:
                return step.count if step.is_prefill else 0
            case Kind.NEXT:
                return 0 if step.is_prefill else step.count
            case _ if step.is_prefill and (move.last_only or move.kind is Kind.TOKEN):
                return int(step.emits)
            case Kind.TOKEN if self.loop_machine != DEVICE:
                return step.made
            case _:
                return step.count

    def payload_bytes(self, move: Move, step: Step) -> int:
        """Payload of a move in a step."""
        rows = self.rows(move, step)
        if move.kind in (Kind.RESIDUAL, Kind.PARTIAL):
            return self.wire(step).payload_bytes(rows, self.d_model)
        return TOKEN_ID_BYTES * rows

    def wire(self, step: Step) -> WirePrecision:
        """The precision on the wire in a step."""
        return self.decision.wire_in(step.is_prefill)

    def step(self, index: int, known: int, start: int = 0) -> Step:
        """Step number `index` of a run over ids of which `known` are there and the first `start` are cached: a
        prefill chunk, or the decode step after token `index - chunks`."""
        chunks = self.decision.num_chunks(known - start)
        if index >= chunks:
            return Step(index, known + index - chunks, 1, emits=True, is_prefill=False)
        size = self.decision.prefill_chunk or known - start
        first = start + index * size
        return Step(index, first, min(size, known - first), emits=index == chunks - 1, is_prefill=True)

    @staticmethod
    def round(index: int, start: int, count: int, made: int = 1) -> Step:
        """A decode step that verifies `count` - 1 drafted tokens."""
        return Step(index, start, count, emits=True, is_prefill=False, made=made)

    def num_steps(self, known: int, tokens_out: int, start: int = 0) -> int:
        """The prefill chunks, then one decode step for each generated token but the last."""
        return self.decision.num_chunks(known - start) + max(tokens_out - 1, 0)

    def traffic(
        self, known: int, tokens_out: int, start: int = 0, rounds: Sequence[tuple[int, int]] | None = None
    ) -> tuple[Crossings, ...]:
        """Every crossing of a run that generates so many tokens (of an excerpt: none), each leg counted, in a fixed
        order. `rounds`: (positions, tokens made) of each decode step, where some were drafted."""
        counts: Counter[tuple[int, Kind, int, int]] = Counter()
        sizes: Counter[tuple[int, Kind, int, int]] = Counter()
        steps = [self.step(index, known, start) for index in range(self.num_steps(known, tokens_out, start))]
        if rounds is not None:
            chunks = self.decision.num_chunks(known - start)
            steps[chunks:] = [self.round(chunks + n, known + n, *one) for n, one in enumerate(rounds)]
        for step in steps:
            for move in self.moves:
                rows = self.rows(move, step)
                for src, dst in self.legs(move.src, move.dst) if rows else ():
                    counts[move.after, move.kind, src, dst] += 1
                    sizes[move.after, move.kind, src, dst] += self.payload_bytes(move, step)
        return crossings(counts, sizes)

    @property
    def round_trips_per_token(self) -> float:
        """Half the one-way trips on the longest chain of messages from one token to the next."""
        depth = {self.embed: 0}
        for index, stage in enumerate(self.stages):
            held = (
                {m: depth[m] for m in self.joiners[index]} if isinstance(stage, Serial) else self._joined(index, depth)
            )
            for move in self.moves_after(index):
                if move.kind is Kind.RESIDUAL:
                    held[move.dst] = held[move.src] + len(self.legs(move.src, move.dst))
            depth = held
        back = [move for move in self.moves if move.kind in (Kind.TOKEN, Kind.NEXT)] if self.embed != self.head else []
        return (depth[self.head] + sum(len(self.legs(move.src, move.dst)) for move in back)) / 2

    def _joined(self, index: int, depth: dict[int, int]) -> dict[int, int]:
        """Depth at each machine that adds the partial sums of shared stage `index`."""
        workers = self.stages[index].machines
        return {
            joiner: max(depth[w] + (len(self.legs(w, joiner)) if w != joiner else 0) for w in workers)
            for joiner in self.joiners[index]
        }


def crossings(
    counts: Counter[tuple[int, Kind, int, int]], sizes: Counter[tuple[int, Kind, int, int]]
) -> tuple[Crossings, ...]:
    """Tallies as records, in the order of stage, kind and link."""
    return tuple(Crossings(*key, count=counts[key], payload_bytes=sizes[key]) for key in sorted(counts))


def compile(  # noqa: A001 - the verb of the field; nothing here needs the built-in
    decision: Decision, spec: ModelSpec, num_machines: int, direct: Iterable[tuple[int, int]] = ()
) -> Plan:
    """The plan of a decision on a model, for machines 0 to `num_machines` - 1.

    `direct` names pairs of workers with a link of their own (both directions); the default is a star
    through the device. Raises PartitionError when the partition does not fit.
    """
    decision.partition.check(spec, num_machines)
    stages = _stages(decision, spec)
    moves: list[Move] = []
    joiners: list[tuple[int, ...]] = []
    for index, stage in enumerate(stages):
        following = stages[index + 1] if index + 1 < len(stages) else None
        held, crossing = _boundary(index, stage, following)
        joiners.append(held)
        moves += crossing
    embed, head = decision.partition.embed, decision.partition.head
    if embed != DEVICE:
        moves.append(Move(Kind.PROMPT, -1, DEVICE, embed))
    if head != DEVICE:
        moves.append(Move(Kind.TOKEN, len(stages) - 1, head, DEVICE))
    if embed not in (DEVICE, head):
        moves.append(Move(Kind.NEXT, -1, DEVICE, embed))
    both_ways = frozenset(pair for a, b in direct for pair in ((a, b), (b, a)))
    return Plan(decision, spec.d_model, stages, tuple(moves), tuple(joiners), both_ways)


def excerpt(
    decision: Decision,
    spec: ModelSpec,
    num_machines: int,
    direct: Iterable[tuple[int, int]],
    first: int,
    stop: int,
    feeder: int | None = None,
    last: Collection[int] = (),
) -> Plan:
    """The part of a plan that fills caches again: halves `first` to `stop`, whose result nobody takes; in the last of
    them only the machines `last` take part, for the sake of their own caches (none named: all).

    The residual stream before half `first` comes from `feeder`, who has kept it; None: from the ids, and `first` is
    0. Raises PartitionError.
    """
    partition = decision.partition
    partition.check(spec, num_machines)
    if not 0 <= first < stop <= 2 * spec.num_layers or (feeder is None) != (first == 0):
        raise PartitionError(f"halves {first} to {stop} fed by {feeder} are no part of {2 * spec.num_layers} halves")
    stages = _halves(decision, first, stop, [Serial(partition.embed, 0, 0, embed=True)] if feeder is None else [])
    if last and isinstance(stages[-1], Shared):
        shares = tuple(share for share in stages[-1].shares if share.machine in last)
        stages[-1] = replace(stages[-1], shares=shares)
    moves: list[Move] = []
    joiners: list[tuple[int, ...]] = []
    for index, stage in enumerate(stages[:-1]):
        held, crossing = _boundary(index, stage, stages[index + 1])
        joiners.append(held)
        moves += crossing
    if feeder is not None:
        moves += [Move(Kind.RESIDUAL, -1, feeder, machine) for machine in stages[0].machines if machine != feeder]
    elif partition.embed != DEVICE:
        moves.append(Move(Kind.PROMPT, -1, DEVICE, partition.embed))
    both_ways = frozenset(pair for a, b in direct for pair in ((a, b), (b, a)))
    return Plan(decision, spec.d_model, tuple(stages), tuple(moves), (*joiners, ()), both_ways, feeder, first)


def _stages(decision: Decision, spec: ModelSpec) -> tuple[Stage, ...]:
    partition = decision.partition
    stages = _halves(decision, 0, 2 * spec.num_layers, [Serial(partition.embed, 0, 0, embed=True)])
    last = stages[-1]
    if isinstance(last, Serial) and last.machine == partition.head:
        stages[-1] = replace(last, head=True)
    else:
        stages.append(Serial(partition.head, 2 * spec.num_layers, 2 * spec.num_layers, head=True))
    return tuple(stages)


def _halves(decision: Decision, first: int, stop: int, before: list[Stage]) -> list[Stage]:
    """The stages of some halves, behind those before."""
    partition, stages = decision.partition, before
    for half in range(first, stop):
        owners = sorted(set(partition.owners(half)))
        last = stages[-1] if stages else None
        if len(owners) > 1:
            stages.append(Shared(half, tuple(Share(m, partition.units_on(m, half)) for m in owners)))
        elif isinstance(last, Serial) and last.machine == owners[0]:
            stages[-1] = replace(last, stop=half + 1)
        else:
            stages.append(Serial(owners[0], half, half + 1))
    return stages


def _boundary(index: int, stage: Stage, following: Stage | None) -> tuple[tuple[int, ...], Sequence[Move]]:
    """Who holds the result of a stage, and what crosses to the machines of the following one."""
    if following is None:
        return stage.machines, ()
    needed = following.machines
    last_only = isinstance(following, Serial) and following.is_head_only
    held = stage.machines
    moves: list[Move] = []
    if isinstance(stage, Shared):
        held = tuple(m for m in stage.machines if m in needed) or stage.machines[:1]
        moves = [
            Move(Kind.PARTIAL, index, worker, joiner, last_only)
            for worker in stage.machines
            for joiner in held
            if worker != joiner
        ]
    moves += [Move(Kind.RESIDUAL, index, held[0], machine, last_only) for machine in needed if machine not in held]
    return held, moves
