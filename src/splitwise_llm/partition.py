"""Which machine runs which part of the model: the central noun. It knows nothing of time, bytes or networks.

Machines are numbered; 0 is the device that holds the session (`edge`). A *half* is half a layer:
half `2 l` is layer `l`'s attention, half `2 l + 1` its feed-forward block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby

from splitwise_llm.errors import PartitionError
from splitwise_llm.spec import ModelSpec

MAX_MACHINES = 255
_WIRE_VERSION = 1


class Part(StrEnum):
    """The two sub-blocks of a layer."""

    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True, slots=True)
class Placement:
    """The machine of each unit of one layer."""

    groups: tuple[int, ...]
    """Machine of each key/value group."""
    shards: tuple[int, ...]
    """Machine of each FFN shard."""

    @property
    def is_shared(self) -> bool:
        return len(set(self.groups)) > 1 or len(set(self.shards)) > 1


@dataclass(frozen=True, slots=True)
class Partition:
    """An assignment of every unit, the embedding and the head (final norm, projection, sampling) to a machine.

    Three encodings, each with its inverse: text (`parse`, `text`), wire bytes (`from_bytes`,
    `to_bytes`) and the action vector of a policy (`from_vector`, `to_vector`).
    """

    layers: tuple[Placement, ...]
    embed: int
    head: int
    machines: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The machines it uses, in order."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise PartitionError("a partition has at least one layer")
        first = self.layers[0]
        for number, layer in enumerate(self.layers):
            if len(layer.groups) != len(first.groups) or len(layer.shards) != len(first.shards):
                raise PartitionError(f"layer {number} has other numbers of groups or shards than layer 0")
        if not first.groups or not first.shards:
            raise PartitionError("every layer has at least one key/value group and one FFN shard")
        object.__setattr__(self, "machines", tuple(sorted(set(self._machines()))))
        bad = [machine for machine in self.machines if not 0 <= machine < MAX_MACHINES]
        if bad:
            raise PartitionError(f"machine {bad[0]} is out of range: machines are numbered 0 to {MAX_MACHINES - 1}")

    def _machines(self) -> Iterator[int]:
        yield self.embed
        yield self.head
        for layer in self.layers:
            yield from layer.groups
            yield from layer.shards

    def renumbered(self, numbers: Mapping[int, int]) -> Partition:
        """The same partition with some machines in the places of others."""
        layers = {
            layer: Placement(
                tuple(numbers.get(m, m) for m in layer.groups), tuple(numbers.get(m, m) for m in layer.shards)
            )
            for layer in set(self.layers)
        }
        ends = (numbers.get(self.embed, self.embed), numbers.get(self.head, self.head))
        return Partition(tuple(layers[layer] for layer in self.layers), *ends)

    # Named constructors

    @classmethod
    def all_on(cls, spec: ModelSpec, machine: int) -> Partition:
        """Everything on one machine."""
        return cls.of_spans(spec, [(machine, spec.num_layers)])

    @classmethod
    def cut(cls, spec: ModelSpec, at: float, first: int = 0, second: int = 1) -> Partition:
        """Layers before `at` on `first`, the rest on `second`; `at` may end in .5 (after the attention)."""
        return cls.of_spans(spec, [(first, at), (second, spec.num_layers)])

    @classmethod
    def u_shape(cls, spec: ModelSpec, prefix: float, suffix: float, outer: int = 0, inner: int = 1) -> Partition:
        """`prefix` first and `suffix` last layers, embedding and head on `outer`; the middle on `inner`."""
        ends = [(outer, prefix), (inner, spec.num_layers - suffix), (outer, float(spec.num_layers))]
        partition = cls.of_spans(spec, ends)
        return cls(partition.layers, embed=outer, head=outer)

    @classmethod
    def shared(
        cls, spec: ModelSpec, weights: Mapping[int, float], layers: Iterable[int] | None = None, home: int = 0
    ) -> Partition:
        """Divide groups and shards of `layers` (all, unless given) in proportion to `weights` of machines.

        Embedding, head and the other layers stay on `home`.
        """
        chosen = set(range(spec.num_layers) if layers is None else layers)
        divided = Placement(_divide(weights, spec.num_kv_heads), _divide(weights, spec.num_ffn_shards))
        alone = Placement((home,) * spec.num_kv_heads, (home,) * spec.num_ffn_shards)
        return cls(tuple(divided if n in chosen else alone for n in range(spec.num_layers)), home, home)

    @classmethod
    def of_spans(cls, spec: ModelSpec, ends: Sequence[tuple[int, float]]) -> Partition:
        """Consecutive spans `(machine, end layer)`, ends non-decreasing, in half layers, the last the model's."""
        machines: list[int] = []
        for machine, end in ends:
            half = round(2 * end)
            if half != 2 * end or half < len(machines) or half > 2 * spec.num_layers:
                raise PartitionError(
                    f"a span that ends at layer {end:g} after layer {len(machines) / 2:g} cannot be: ends are "
                    f"halves of layers, in order, up to {spec.num_layers}"
                )
            machines += [machine] * (half - len(machines))
        if len(machines) != 2 * spec.num_layers:
            raise PartitionError(f"layers {len(machines) / 2:g} to {spec.num_layers} are on no machine")
        return cls(
            tuple(
                Placement((attention,) * spec.num_kv_heads, (ffn,) * spec.num_ffn_shards)
                for attention, ffn in zip(machines[::2], machines[1::2], strict=True)
            ),
            embed=machines[0],
            head=machines[-1],
        )

    # What it says

    def owners(self, half: int) -> tuple[int, ...]:
        """The machine of each unit of a half layer."""
        layer = self.layers[half // 2]
        return layer.shards if half % 2 else layer.groups

    def units_on(self, machine: int, half: int) -> tuple[int, ...]:
        """The units of a half layer that a machine runs."""
        owners = self.owners(half)
        number = owners.count(machine)
        if number in (0, len(owners)):  # nearly always, and much faster
            return tuple(range(number))
        return tuple(unit for unit, owner in enumerate(owners) if owner == machine)

    def check(self, spec: ModelSpec, num_machines: int) -> None:
        """Raise PartitionError unless it fits the model's numbers and uses only machines that exist."""
        sizes = (len(self.layers), len(self.layers[0].groups), len(self.layers[0].shards))
        wanted = (spec.num_layers, spec.num_kv_heads, spec.num_ffn_shards)
        if sizes != wanted:
            raise PartitionError(
                "the partition has {} layers of {} key/value groups and {} FFN shards, ".format(*sizes)
                + "the model {} layers of {} and {}".format(*wanted)
            )
        if self.machines[-1] >= num_machines:
            raise PartitionError(
                f"the partition uses machine {self.machines[-1]}, but there are only machines 0 to {num_machines - 1}"
            )

    # Text

    def text(self, names: Sequence[str]) -> str:
        """The short form, as in `edge[0:2] cloud[2:6] edge[6:8]`; `parse` is its inverse.

        Raises PartitionError when a machine it uses has no name in `names`.
        """
        if self.machines[-1] >= len(names):
            raise PartitionError(f"machine {self.machines[-1]} has no name among {', '.join(names)}")
        if len(self.machines) == 1:
            return f"all:{names[self.embed]}"
        pieces, first, last = [], self.embed, self.head
        runs = list(self._runs())
        for start, stop, placement in runs:
            if placement is None:
                pieces.append(f"{names[self.owners(start)[0]]}[{start / 2:g}:{stop / 2:g}]")
            else:
                pieces.append(_shared_text(start // 2, stop // 2, placement, names))
        first, last = (min(self._run_machines(runs[index])) for index in (0, -1))
        if self.embed != first:
            pieces.append(f"embed={names[self.embed]}")
        if self.head != last:
            pieces.append(f"head={names[self.head]}")
        return " ".join(pieces)

    def _runs(self) -> Iterator[tuple[int, int, Placement | None]]:
        """Maximal spans of halves `(start, stop, None)` on one machine, or of equally shared layers."""

        def key(half: int) -> tuple[int, Placement | None]:
            layer = self.layers[half // 2]
            return (0, layer) if layer.is_shared else (self.owners(half)[0], None)

        for (_, placement), halves in groupby(range(2 * len(self.layers)), key):
            span = list(halves)
            yield span[0], span[-1] + 1, placement

    def _run_machines(self, run: tuple[int, int, Placement | None]) -> set[int]:
        start, _, placement = run
        return {*placement.groups, *placement.shards} if placement else {self.owners(start)[0]}

    @classmethod
    def parse(cls, text: str, spec: ModelSpec, names: Sequence[str]) -> Partition:
        """Read the short form against a model and the names of machines 0, 1, ...

        Raises PartitionError that says which piece is wrong and what would be right.
        """
        return _Parser(text, spec, names).partition()

    # Wire bytes and vector

    def to_vector(self) -> tuple[int, ...]:
        """The action vector of a policy: embed, then per layer its groups and its shards, then head."""
        units = [machine for layer in self.layers for machine in (*layer.groups, *layer.shards)]
        return (self.embed, *units, self.head)

    @classmethod
    def from_vector(cls, vector: Sequence[int], spec: ModelSpec) -> Partition:
        """The inverse of `to_vector` for this model. Raises PartitionError for another length."""
        groups, shards = spec.num_kv_heads, spec.num_ffn_shards
        width = groups + shards
        wanted = 2 + spec.num_layers * width
        if len(vector) != wanted:
            raise PartitionError(f"an action vector of this model has {wanted} numbers, this one has {len(vector)}")
        rows = [vector[1 + n * width : 1 + (n + 1) * width] for n in range(spec.num_layers)]
        layers = tuple(Placement(tuple(row[:groups]), tuple(row[groups:])) for row in rows)
        return cls(layers, embed=vector[0], head=vector[-1])

    def to_bytes(self) -> bytes:
        """Wire form: a version byte, then the vector, one byte a machine."""
        return bytes([_WIRE_VERSION, *self.to_vector()])

    @classmethod
    def from_bytes(cls, data: bytes, spec: ModelSpec) -> Partition:
        """The inverse of `to_bytes` for this model. Raises PartitionError for anything else."""
        if not data or data[0] != _WIRE_VERSION:
            raise PartitionError(f"partition bytes start with version {data[:1].hex() or 'nothing'}, expected 01")
        return cls.from_vector(tuple(data[1:]), spec)


def _divide(weights: Mapping[int, float], count: int) -> tuple[int, ...]:
    """`count` units over machines in proportion to their weights, by largest remainder, in machine order."""
    total = sum(weights.values())
    if not weights or total <= 0 or min(weights.values()) < 0:
        raise PartitionError(f"cannot divide {count} units by weights {dict(weights)}")
    exact = {machine: count * weight / total for machine, weight in sorted(weights.items())}
    counts = {machine: int(share) for machine, share in exact.items()}
    short = count - sum(counts.values())
    for machine in sorted(exact, key=lambda m: counts[m] - exact[m])[:short]:
        counts[machine] += 1
    return tuple(machine for machine, number in counts.items() for _ in range(number))


def _shared_text(start: int, stop: int, placement: Placement, names: Sequence[str]) -> str:
    who = "+".join(names[m] for m in sorted({*placement.groups, *placement.shards}))
    span = f"{start}" if stop == start + 1 else f"{start}:{stop}"
    return f"{who}[{span}](kv={_owners_text(placement.groups, names)} ffn={_owners_text(placement.shards, names)})"


def _owners_text(owners: Sequence[int], names: Sequence[str]) -> str:
    runs = []
    for machine, units in groupby(range(len(owners)), lambda unit: owners[unit]):
        span = list(units)
        runs.append(f"{names[machine]}:{span[0]}" + (f"-{span[-1]}" if len(span) > 1 else ""))
    return ",".join(runs)


_NAME = r"[A-Za-z_][A-Za-z0-9_.-]*"
NAME = re.compile(_NAME)
"""What a machine may be called."""
_PIECE = re.compile(rf"\s*({_NAME}(?:\+{_NAME})*)\[([0-9.]+)(?::([0-9.]+))?\](?:\(([^()]*)\))?(?=\s|$)")
_PLACE = re.compile(rf"\s*(embed|head)=({_NAME})(?=\s|$)")
_ALL = re.compile(rf"\s*all:({_NAME})\s*")
_UNITS = re.compile(rf"({_NAME}):(\d+)(?:-(\d+))?")


class _Parser:
    """Reads the text form piece by piece, from left to right."""

    def __init__(self, text: str, spec: ModelSpec, names: Sequence[str]) -> None:
        self.text, self.spec, self.names = text, spec, names
        self.halves: list[tuple[int, ...]] = []
        self.ends: list[int] = []

    def partition(self) -> Partition:
        whole = _ALL.fullmatch(self.text)
        if whole:
            return Partition.all_on(self.spec, self._machine(whole.group(1)))
        at, places = 0, dict[str, int]()
        while self.text[at:].strip():
            piece = _PIECE.match(self.text, at)
            place = None if piece else _PLACE.match(self.text, at)
            if piece:
                self._piece(piece)
            elif place and place.group(1) in places:
                raise PartitionError(f"{place.group(1)}= is written twice in {self.text!r}")
            elif place:
                places[place.group(1)] = self._machine(place.group(2))
            else:
                raise PartitionError(
                    f"cannot read {self.text[at:].strip()!r}: expected a piece such as 'edge[0:2]', "
                    "'edge+cloud[3](kv=edge:0,cloud:1 ffn=edge:0-3,cloud:4-7)', 'embed=edge' or 'all:edge'"
                )
            at = (piece or place).end()  # type: ignore[union-attr]
        if len(self.halves) != 2 * self.spec.num_layers:
            raise PartitionError(
                f"{self.text!r} ends at layer {len(self.halves) / 2:g}, the model has {self.spec.num_layers} layers"
            )
        layers = tuple(Placement(a, f) for a, f in zip(self.halves[::2], self.halves[1::2], strict=True))
        return Partition(layers, places.get("embed", self.ends[0]), places.get("head", self.ends[-1]))

    def _machine(self, name: str) -> int:
        if name not in self.names:
            raise PartitionError(f"unknown machine {name!r}; the machines are {', '.join(self.names)}")
        return self.names.index(name)

    def _piece(self, piece: re.Match[str]) -> None:
        who, first, last, units = piece.groups()
        machines = [self._machine(name) for name in who.split("+")]
        if len(set(machines)) < len(machines):
            raise PartitionError(f"piece {piece.group().strip()!r} names a machine twice")
        start = self._half(first)
        stop = self._half(last) if last else start + 2
        if start != len(self.halves):
            raise PartitionError(
                f"piece {piece.group().strip()!r} starts at layer {start / 2:g}, "
                f"but the pieces before it end at layer {len(self.halves) / 2:g}"
            )
        if stop <= start:
            raise PartitionError(f"piece {piece.group().strip()!r} is empty; write [first:end] with first < end")
        if len(machines) == 1 and units is None:
            counts = (self.spec.num_kv_heads, self.spec.num_ffn_shards)
            self.halves += [(machines[0],) * counts[half % 2] for half in range(start, stop)]
        else:
            self._shared(piece.group().strip(), machines, start, stop, units)
        self.ends.append(min(machines))

    def _shared(self, piece: str, machines: list[int], start: int, stop: int, units: str | None) -> None:
        if start % 2 or stop % 2:
            raise PartitionError(f"shared piece {piece!r} must begin and end between layers")
        if units is None:
            weights = dict.fromkeys(machines, 1.0)
            kv, ffn = _divide(weights, self.spec.num_kv_heads), _divide(weights, self.spec.num_ffn_shards)
        else:
            lists = dict(item.split("=", 1) for item in units.split() if "=" in item)
            if set(lists) != {"kv", "ffn"} or len(units.split()) != 2:
                raise PartitionError(f"shared piece {piece!r} needs both lists: (kv=... ffn=...)")
            kv = self._owners(piece, machines, lists["kv"], self.spec.num_kv_heads, "key/value groups")
            ffn = self._owners(piece, machines, lists["ffn"], self.spec.num_ffn_shards, "FFN shards")
        idle = set(machines) - {*kv, *ffn}
        if idle:
            raise PartitionError(
                f"shared piece {piece!r} gives {self.names[min(idle)]} nothing to do: the model has "
                f"{self.spec.num_kv_heads} key/value groups and {self.spec.num_ffn_shards} FFN shards a layer"
            )
        self.halves += [kv, ffn] * ((stop - start) // 2)

    def _owners(self, piece: str, machines: list[int], text: str, count: int, what: str) -> tuple[int, ...]:
        owners: dict[int, int] = {}
        for item in text.split(","):
            found = _UNITS.fullmatch(item)
            if not found:
                raise PartitionError(f"cannot read {item!r} in {piece!r}: write machine:first-last, as in 'edge:0-1'")
            machine = self._machine(found.group(1))
            if machine not in machines:
                raise PartitionError(f"{found.group(1)!r} has {what} in {piece!r} but is not named before the bracket")
            first = int(found.group(2))
            for unit in range(first, int(found.group(3) or first) + 1):
                if unit >= count:
                    raise PartitionError(
                        f"{piece!r} names number {unit} of the {what}; a layer has {count} (0 to {count - 1})"
                    )
                if unit in owners:
                    raise PartitionError(f"{piece!r} gives number {unit} of the {what} to two machines")
                owners[unit] = machine
        missing = set(range(count)) - owners.keys()
        if missing:
            raise PartitionError(f"{piece!r} leaves number {min(missing)} of the {what} to nobody; a layer has {count}")
        return tuple(owners[unit] for unit in range(count))

    def _half(self, text: str) -> int:
        try:
            half = 2 * float(text)
        except ValueError:
            half = math.nan
        if not math.isfinite(half):
            raise PartitionError(f"{text[:40]!r} is no layer; write a whole or half number")
        if half != int(half):
            raise PartitionError(
                f"layer {text} is neither whole nor half; a cut lies between layers or after the attention"
            )
        if half > 2 * self.spec.num_layers:
            raise PartitionError(f"layer {text} does not exist: the model has layers 0 to {self.spec.num_layers}")
        return int(half)
