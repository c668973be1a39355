"""A small network that proposes plans, run by run over the layers. It does not know how it was trained, nor any price:
it ranks what `runs` says of a question, and whoever asked prices what it proposes.

A plan is a few runs of layers (`runs.Runs`). The network is asked at the beginning and after every run: given what
has been placed, which seat takes the next layers, and up to which? It scores every pair (seat, end layer) that memory
and limits leave; beam search follows the K most probable sequences. Nothing depends on the number of layers or
machines: a candidate is described by figures relative to the question's own, and candidates see each other through
the mean and the largest of their hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Host, World
from splitwise_llm.cost.counts import units_in
from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import SpecError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.policies.runs import Runs, Seat, Sheet, without_deadline

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

Spans = tuple[tuple[int, int], ...]
"""`(seat, end layer)` in order."""

MAX_RUNS = 6
NUM_FEATURES = 34
HIDDEN = 48
SHIPPED = Path(str(resources.files("splitwise_llm"))) / "data" / "policies" / "low_level.npz"


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Of the network: candidates -> hidden; mean and largest hidden of a node -> context; both -> score."""

    into: Floats32
    """(features, hidden)"""
    into_bias: Floats32
    context: Floats32
    """(2 hidden, hidden)"""
    context_bias: Floats32
    own: Floats32
    """(hidden, hidden)"""
    around: Floats32
    """(hidden, hidden)"""
    own_bias: Floats32
    out: Floats32
    """(hidden,)"""

    @classmethod
    def random(cls, seed: int, hidden: int = HIDDEN) -> Weights:
        """Untrained, by He's rule."""
        rng = np.random.default_rng(seed)

        def drawn(*shape: int) -> Floats32:
            return np.asarray(rng.standard_normal(shape) * (2 / shape[0]) ** 0.5, np.float32)

        zeros = np.zeros(hidden, np.float32)
        return cls(
            drawn(NUM_FEATURES, hidden), zeros, drawn(2 * hidden, hidden), zeros, drawn(hidden, hidden),
            drawn(hidden, hidden), zeros, drawn(hidden),
        )  # fmt: skip

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)

    @classmethod
    def load(cls, source: Path = SHIPPED) -> Weights:
        """Read what `save` wrote. Raises SpecError that names the file."""
        try:
            with source.open("rb") as opened, np.load(opened) as file:  # one array alone is no context
                found = cls(*(np.asarray(file[name], np.float32) for name in cls.names()))
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, BadZipFile) as error:
            raise SpecError(
                f"{source} holds no weights of the low level ({error}); `splitwise train --learner low` makes some"
            ) from error
        expected = cls.random(0, found.out.size)
        for name in cls.names():
            shape, wanted = getattr(found, name).shape, getattr(expected, name).shape
            if shape != wanted:
                raise SpecError(
                    f"{source}: {name} is {shape}, expected {wanted}; made by another version: train it anew with "
                    "`splitwise train --learner low`"
                )
        return found

    def save(self, target: Path) -> None:
        """As .npz."""
        np.savez(target, **{name: getattr(self, name) for name in self.names()})

    def scores(self, features: Floats32, starts: Ints) -> Floats32:
        """(candidates,): logits of candidates (candidates, features) whose nodes begin at `starts` (nodes,)."""
        sizes = np.diff(np.append(starts, len(features)))
        hidden = np.maximum(features @ self.into + self.into_bias, 0)
        mean = np.add.reduceat(hidden, starts, axis=0) / sizes[:, None].astype(np.float32)
        pooled = np.concatenate([mean, np.maximum.reduceat(hidden, starts, axis=0)], axis=1)
        context = np.maximum(pooled @ self.context + self.context_bias, 0) @ self.around + self.own_bias
        second = np.maximum(hidden @ self.own + np.repeat(context, sizes, axis=0), 0)
        scores: Floats32 = second @ self.out
        return scores


def probabilities(scores: Floats32, starts: Ints) -> Floats:
    """Log of the softmax of each node."""
    sizes = np.diff(np.append(starts, len(scores)))
    wide = scores.astype(np.float64)
    shifted = wide - np.repeat(np.maximum.reduceat(wide, starts), sizes)
    logs: Floats = shifted - np.repeat(np.log(np.add.reduceat(np.exp(shifted), starts)), sizes)
    return logs


def shared_seats(world: World, machines: Sequence[int], x: Floats, wire: WirePrecision, rows: Sequence[tuple[int, int]],
                 times: Sequence[float]) -> Iterator[Seat]:  # fmt: skip
    """Seats of two machines that may share layers: where dividing a half can save more than the exchange
    (`min(e, c)^2 / (e + c)`), by counts in proportion to speed. `rows`: (positions, context) of each kind of step,
    that come `times` each; proportions are those of the prompt, of later tokens, and of the request."""
    spec, basis = world.spec, world.basis
    for a, b in world.links:
        if not {a, b} <= set(machines):
            continue
        took = np.zeros((2, len(rows)))
        gains = False
        for n, (count, context) in enumerate(rows):
            for part in Part:
                both = [_half_s(world.hosts[m], world, part, count, context) * x[basis.slow(m)] for m in (a, b)]
                took[:, n] += both
                software_s = sum(world.hosts[m].device.message_s for m in (a, b))
                slower = max(x[basis.inverse(a, b)], x[basis.inverse(b, a)])
                exchange = software_s + x[basis.rtt(a, b)] / 2 + wire.payload_bytes(count, spec.d_model) * slower
                gains |= bool(min(both) ** 2 / sum(both) > exchange)
        if gains:
            found: dict[Seat, None] = {}
            for seconds in (*took.T, took @ np.asarray(times)):
                layer = Partition.shared(spec, {a: 1 / seconds[0], b: 1 / seconds[1]}, [0]).layers[0]
                if layer.is_shared:
                    size = range(len(world.hosts))
                    groups = tuple(layer.groups.count(m) for m in size)
                    found[Seat(groups, tuple(layer.shards.count(m) for m in size))] = None
            yield from found


def _half_s(host: Host, world: World, part: Part, rows: int, context: int) -> float:
    return host.half_s(world.spec, part, units_in(world.spec, part), rows, context)


class Prospect:
    """A sheet as the network sees it: linear prices around the best plan on one seat, and what fits where."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.num_layers, self.num_seats = sheet.num_layers, sheet.num_seats
        seats = range(self.num_seats)
        home = DEVICE if sheet.ends_at_home or sheet.limits.first_layer_on_device else None
        self.embeds = [sheet.seats[s].machines[0] if home is None else home for s in seats]
        heads = [DEVICE if sheet.ends_at_home else sheet.seats[s].machines[-1] for s in seats]
        starts = np.stack([sheet.start(s, e, e == h) for s, e, h in zip(seats, self.embeds, heads, strict=True)])
        ends = np.stack([sheet.finish(s, e, h) for s, e, h in zip(seats, self.embeds, heads, strict=True)])
        layers = sheet.layer.copy()
        layers[:, -1] = sheet.nats[:, -1] / self.num_layers
        whole = starts + (self.num_layers - 1) * layers + ends
        used = sheet.uses.copy()
        used[seats, self.embeds] = used[seats, heads] = True
        smooth = without_deadline(sheet.objective)
        values = sheet.value(whole, used, smooth)
        best = int(values.argmin())
        reference, present = whole[best], used[best]
        # One call: the gradient, what it takes to use a seat's machines at all, and what work does beyond its price.
        step = 1e-4 * np.maximum(np.abs(whole).max(axis=0), 1e-30)
        nearby = np.concatenate([reference + np.diag(step), np.tile(reference, (self.num_seats, 1))])
        joined = np.concatenate([np.tile(present, (len(step), 1)), present | sheet.uses])
        varied = sheet.value(nearby, joined, smooth) - values[best]
        price = varied[: len(step)] / step
        self.entry = np.maximum(varied[len(step) :], 0.0)
        self.layer = layers @ price
        self.hop = (sheet.enter - layers[None]) @ price
        partials, streams = float(np.mean(sheet.partial_nats)), float(np.mean(sheet.wire_nats))
        self.hop += (sheet.hop_partials * partials + sheet.hop_streams * streams) * price[-1]
        self.start, self.finish = self._ends(price)
        alone = self.start + self.num_layers * self.layer + self.entry + self.finish.diagonal()
        self.scale = max(float(alone.min()), 1e-30)
        self.bend = np.maximum(values - values[best] - (whole - reference) @ price - self.entry, 0.0)
        for figures in (self.entry, self.layer, self.hop, self.start, self.finish, self.bend):
            np.divide(figures, self.scale, out=figures)
        self.seconds, self.late = self._deadline(layers)
        self.lean = sheet.tables[:, 0, 0]
        self.is_device = np.array([seat.machines == (DEVICE,) for seat in sheet.seats])
        self.is_shared = np.array([len(seat.machines) > 1 for seat in sheet.seats])
        kept = sheet.last * (sheet.layer_bytes[self.is_device][0] if self.is_device.any() else 0.0)
        ends_bytes = sheet.tables[:, 1, 1] - self.lean
        self.reserved = np.zeros(len(sheet.memory))
        if sheet.last or sheet.ends_at_home:
            self.reserved = kept + np.where(np.arange(len(sheet.memory)) == DEVICE, self.lean + ends_bytes, 0.0)

    def _ends(self, price: Floats) -> tuple[Floats, Floats]:
        """(first seats,): the least that embedding and head can take; (first seats, last seats): what they take more
        between these two. Beyond a layer of the first seat each."""
        sheet, seats = self.sheet, range(self.num_seats)
        start: dict[tuple[int, int, bool], float] = {}
        finish: dict[tuple[int, int, int], float] = {}
        both = np.zeros((self.num_seats, self.num_seats))
        for first, last in product(seats, seats):
            taken = []
            for embed, head in sheet.ends(sheet.seats[first], sheet.seats[last]):
                begins, stops = (first, embed, embed == head), (last, embed, head)
                if begins not in start:
                    start[begins] = float(sheet.start(*begins) @ price)
                if stops not in finish:
                    finish[stops] = float(sheet.finish(*stops) @ price)
                taken.append(start[begins] + finish[stops])
            both[first, last] = min(taken)
        least: Floats = both.min(axis=1)
        return least - self.layer, both - least[:, None]

    def _deadline(self, layers: Floats) -> tuple[Floats, float]:
        """(seats,): seconds of a whole request on each as a share of the deadline, and what missing it adds; zeros
        without one."""
        objective = self.sheet.objective
        if not isinstance(objective, DriftPlusPenalty) or objective.budgets.deadline_s is None:
            return np.zeros(self.num_seats), 0.0
        prices = self.sheet.prices(layers * self.num_layers, self.sheet.uses)
        added = float(objective.virtual[1]) / objective.budgets.misses / self.scale
        return prices.total_s / objective.budgets.deadline_s, added


@dataclass(frozen=True, slots=True, eq=False)
class Nodes:
    """Partial plans: what each has placed. Arrays lead with the node."""

    layer: Ints
    seat: Ints
    """The last run's; -1 at the beginning."""
    first: Ints
    """The first run's."""
    visited: Bools
    """(nodes, seats)"""
    used: Bools
    """(nodes, machines)"""
    held: Floats
    """(nodes, machines): bytes of layers."""
    spent: Floats
    """Linear price so far."""
    seconds: Floats
    paths: list[Spans]

    @classmethod
    def root(cls, prospect: Prospect) -> Nodes:
        """Nothing placed."""
        machines, seats = len(prospect.sheet.memory), prospect.num_seats
        zero = np.zeros(1)
        return cls(
            np.zeros(1, np.int64), np.full(1, -1), np.full(1, -1), np.zeros((1, seats), bool),
            np.zeros((1, machines), bool), np.zeros((1, machines)), zero, zero, [()],
        )  # fmt: skip

    def some(self, which: Ints) -> Nodes:
        """Some of them, perhaps repeated."""
        return Nodes(
            self.layer[which], self.seat[which], self.first[which], self.visited[which], self.used[which],
            self.held[which], self.spent[which], self.seconds[which], [self.paths[n] for n in which.tolist()],
        )  # fmt: skip

    def grown(self, prospect: Prospect, node: Ints, seat: Ints, end: Ints) -> Nodes:
        """After one more run each."""
        length = end - self.layer[node]
        before = self.seat[node]
        way = np.where(before < 0, prospect.start[seat], prospect.hop[before, seat])
        entry = np.where(self.visited[node, seat], 0.0, prospect.entry[seat])
        visited = self.visited[node].copy()
        visited[np.arange(len(node)), seat] = True
        return Nodes(
            end, seat, np.where(before < 0, seat, self.first[node]), visited,
            self.used[node] | prospect.sheet.uses[seat],
            self.held[node] + length[:, None] * prospect.sheet.layer_bytes[seat],
            self.spent[node] + way + entry + length * prospect.layer[seat],
            self.seconds[node] + length / prospect.num_layers * prospect.seconds[seat],
            [(*self.paths[n], (s, e)) for n, s, e in zip(node.tolist(), seat.tolist(), end.tolist(), strict=True)],
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What may follow some nodes, node by node."""

    node: Ints
    seat: Ints
    end: Ints
    features: Floats32
    starts: Ints
    """Where each node's begin; nodes without any are left out."""


def candidates(prospect: Prospect, nodes: Nodes, last_run: bool = False) -> Candidates:
    """Every admissible next run of some nodes; with `last_run` only those that reach the end."""
    p, sheet = prospect, prospect.sheet
    layers = p.num_layers
    # (nodes, seats): layers that fit, leaving what must stay on the device room
    room = sheet.memory - nodes.held - np.where(p.reserved > 0, p.reserved, p.lean)
    each = sheet.layer_bytes[None]
    fits = np.where(each > 0, np.floor(room[:, None, :] / np.where(each > 0, each, 1.0) + 1e-9), np.inf).min(axis=2)
    # The last floor's layers are reserved: a run that takes them counts only the others.
    fits = np.clip(fits + sheet.last * p.is_device, 0, layers)
    strict = _strict(p, nodes, room, each)
    ends = np.arange(1, layers + 1)
    at = nodes.layer[:, None, None]
    length = ends - at  # (nodes, 1, layers)
    rest = layers - ends  # (layers,)
    ok = (length >= 1) & (length <= fits[:, :, None])
    ok &= (np.arange(p.num_seats) != nodes.seat[:, None])[:, :, None]
    away = ~p.is_device[None, :, None]
    ok &= ~(away & ((at < sheet.first) | (ends > layers - sheet.last)))
    alone = fits[:, :] * ~p.is_shared
    others = alone.sum(axis=1)[:, None] - alone + fits * p.is_shared  # (nodes, seats): a share uses the same memory
    ok &= (rest <= others[:, :, None]) | (rest == 0)
    if last_run:
        ok &= rest == 0
    node, seat, index = np.nonzero(ok)
    if not len(node):
        return Candidates(node, seat, index, np.zeros((0, NUM_FEATURES), np.float32), node)
    features = _features(p, nodes, node, seat, index + 1, fits, strict, others)
    starts = np.flatnonzero(np.append(True, node[1:] != node[:-1]))
    low = np.minimum.reduceat(features[:, :4], starts, axis=0)
    sizes = np.diff(np.append(starts, len(node)))
    features[:, 4:8] = features[:, :4] - np.repeat(low, sizes, axis=0)
    squeezed = np.sign(features) * np.log1p(4 * np.abs(features))
    return Candidates(node, seat, index + 1, squeezed.astype(np.float32), starts)


def _strict(p: Prospect, nodes: Nodes, room: Floats, each: Floats) -> Floats:
    """(nodes, seats): layers that fit where embedding and head are with the first and last layers."""
    tables = p.sheet.tables
    table = (tables[:, 1, 1] if p.sheet.ends_at_home else tables[:, 1, 0]) - p.lean
    less = room - np.where((nodes.layer[:, None] == 0) & (p.reserved <= 0), table, 0.0)
    fits = np.where(each > 0, np.floor(less[:, None, :] / np.where(each > 0, each, 1.0) + 1e-9), np.inf).min(axis=2)
    clipped: Floats = np.clip(fits + p.sheet.last * p.is_device, 0, p.num_layers)
    return clipped


def _features(
    p: Prospect, nodes: Nodes, node: Ints, seat: Ints, end: Ints, fits: Floats, strict: Floats, others: Floats
) -> Floats:
    """(candidates, NUM_FEATURES), before squeezing; places 4 to 7 are left for what is relative to the node."""
    layers, sheet = p.num_layers, p.sheet
    at, before = nodes.layer[node], nodes.seat[node]
    length, rest = (end - at).astype(float), (layers - end).astype(float)
    ends = rest == 0
    way = np.where(before < 0, p.start[seat], p.hop[before, seat])
    entry = np.where(nodes.visited[node, seat], 0.0, p.entry[seat])
    run = length * p.layer[seat]
    spent = nodes.spent[node] + way + entry + run
    finish = p.finish[np.where(before < 0, seat, nodes.first[node])]  # (candidates, seats)
    own = finish[np.arange(len(seat)), seat]
    # The best single run that could follow, where it fits and wherever: (nodes x seats that end, next) is small.
    unvisited = np.where(nodes.visited, 0.0, p.entry)  # (nodes, seats)
    following = p.hop[seat] + unvisited[node] + finish + rest[:, None] * p.layer  # (candidates, seats)
    following[np.arange(len(seat)), seat] = np.inf
    only_home = (sheet.last > 0) & ~p.is_device
    following[:, only_home] = np.inf
    anywhere = np.where(ends, own, following.min(axis=1))
    held = np.where(fits[node] >= rest[:, None], following, np.inf).min(axis=1)
    none = ~np.isfinite(held) & ~ends
    held = np.where(ends, own, np.where(none, anywhere + 0.5, held))
    anywhere = np.where(np.isfinite(anywhere), anywhere, 5.0)
    held = np.where(np.isfinite(held), held, 5.0)
    cheapest = np.where(fits > 0, p.layer, np.inf)[node]
    cheapest[np.arange(len(seat)), seat] = np.inf
    bound = np.where(ends, 0.0, np.where(np.isfinite(least := cheapest.min(axis=1)), least, p.layer.max())) * rest
    bent = p.bend[seat] * (length / layers) ** 2
    seconds = nodes.seconds[node] + length / layers * p.seconds[seat]
    fastest = p.seconds.min()
    fit, sure = fits[node, seat], strict[node, seat]
    lowest = p.layer.min()
    columns = [
        spent + held - 1, spent + anywhere - 1, spent + bound + bent - 1,
        length * (p.layer[seat] - lowest) + way + entry,
        *[np.zeros_like(spent)] * 4,
        length / layers, rest / layers, ends, before < 0, run, way, entry, anywhere, none,
        length * p.bend[seat] / layers, bent, p.layer[seat] * layers, np.full_like(spent, lowest * layers),
        np.log(np.maximum(p.layer[seat], 1e-12) / max(lowest, 1e-12)),
        length / np.maximum(fit, 1), length == fit, length == sure, length > sure,
        end == layers - sheet.last, p.is_device[seat], p.is_shared[seat], nodes.visited[node, seat],
        np.log1p(np.array([len(path) for path in nodes.paths], float))[node],
        np.minimum(others[node, seat] / np.maximum(rest, 1), 3.0) * ~ends,
        (seconds + rest / layers * fastest > 1) * p.late, np.minimum(seconds, 5.0),
    ]  # fmt: skip
    return np.stack([np.asarray(column, float) for column in columns], axis=1)


class Scorer(Protocol):
    """Who ranks candidates; `Weights` do."""

    def scores(self, features: Floats32, starts: Ints) -> Floats32:
        """(candidates,): logits of candidates (candidates, features) whose nodes begin at `starts` (nodes,)."""
        ...


class Proposer:
    """The network with its weights."""

    def __init__(self, weights: Scorer) -> None:
        self.weights = weights

    def paths(self, prospect: Prospect, width: int, alike: int | None = None) -> list[Spans]:
        """The `width` most probable sequences of runs, the most probable first: beam search. At most `alike` (a
        quarter of them) run over the same seats in the same order: a cut moved by a layer is no other idea."""
        alike = alike or max(width // 4, 1)
        nodes, logs = Nodes.root(prospect), np.zeros(1)
        done: list[tuple[float, Spans]] = []
        for number in range(MAX_RUNS):
            some = candidates(prospect, nodes, number == MAX_RUNS - 1)
            if not len(some.node):
                break
            after = logs[some.node] + probabilities(self.weights.scores(some.features, some.starts), some.starts)
            best = _unlike(after, nodes, some, prospect.num_layers, width, alike)
            after, grown = after[best], nodes.grown(prospect, some.node[best], some.seat[best], some.end[best])
            ended = grown.layer == prospect.num_layers
            done += [(float(after[n]), grown.paths[n]) for n in np.flatnonzero(ended)]
            going = ~ended
            if len(done) >= width:
                going &= after > sorted((log for log, _ in done), reverse=True)[width - 1]
            if not going.any():
                break
            nodes, logs = grown.some(np.flatnonzero(going)), after[going]
        done.sort(key=lambda one: -one[0])
        return [path for _, path in done[:width]]


def _unlike(logs: Floats, nodes: Nodes, some: Candidates, layers: int, width: int, alike: int) -> Ints:
    """The `width` likeliest candidates of which at most `alike` have the same seats in the same order."""
    seen: dict[tuple[object, ...], int] = {}
    kept: list[int] = []
    orders = [tuple(seat for seat, _ in path) for path in nodes.paths]
    for n in np.argsort(-logs, kind="stable").tolist():
        key = (orders[int(some.node[n])], int(some.seat[n]), bool(some.end[n] == layers))
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= alike:
            kept.append(n)
            if len(kept) == width:
                break
    return np.array(kept)


def settled(sheet: Sheet, paths: Sequence[Spans]) -> tuple[Floats, list[Runs]]:
    """Each sequence with the best places of embedding and head, and its value; inf where memory forbids all."""
    values = np.full(len(paths), np.inf)
    ends = [(DEVICE, DEVICE)] * len(paths)
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, path in enumerate(paths):
        alike.setdefault(tuple(seat for seat, _ in path), []).append(number)
    for seats, numbers in alike.items():
        stops = np.array([[end for _, end in paths[number]] for number in numbers])
        for pair in sheet.ends(sheet.seats[seats[0]], sheet.seats[seats[-1]]):
            for number, value in zip(numbers, sheet.values_of(seats, stops, *pair).tolist(), strict=True):
                if value < values[number]:
                    values[number], ends[number] = value, pair
    return values, [Runs(path, *pair) for path, pair in zip(paths, ends, strict=True)]


def polished(sheet: Sheet, plan: Runs, value: float, sweeps: int = 2) -> tuple[float, Runs]:
    """The same seats in the same order with better ends of runs, one after another over all layers they may have, and
    the value then."""
    seats, ends = [seat for seat, _ in plan.runs], [end for _, end in plan.runs]
    for _ in range(sweeps):
        before = value
        for n in range(len(ends) - 1):
            tried = np.arange(ends[n - 1] + 1 if n else 1, ends[n + 1])
            rows = np.tile(np.array(ends), (len(tried), 1))
            rows[:, n] = tried
            values = np.where(sheet.keeps(seats, rows), sheet.values_of(seats, rows, plan.embed, plan.head), np.inf)
            best = int(values.argmin())
            if values[best] < value:
                value, ends[n] = float(values[best]), int(tried[best])
        if not value < before:
            break
    return value, Runs(tuple(zip(seats, ends, strict=True)), plan.embed, plan.head)
