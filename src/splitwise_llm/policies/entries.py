"""What it takes a running generation to go on with each plan of a table, priced once for what machines hold.

`cost.moving` takes milliseconds per plan, most of them to find out what is lacking. That stays the same while a
generation only grows: so the ways to all plans are priced at two lengths, now and with the last token there, and in
between by a straight line. A move, or a machine that has lost something, makes another pattern. It decides nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import World
from splitwise_llm.cost.moving import Moving, moving_from
from splitwise_llm.decision import Decision
from splitwise_llm.plan import DEVICE
from splitwise_llm.rebuild import Gap, Held, Holdings

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KEPT = 32
"""Patterns that are remembered."""
Pattern = tuple[object, ...]


def place_of(decision: Decision) -> tuple[object, ...]:
    """What decisions have in common between which nothing moves."""
    return decision.partition, decision.wire, decision.prefill_wire


@dataclass(frozen=True, slots=True, eq=False)
class _Ways:
    """The ways to all places from one pattern, at one length. Gains of all places lie one after another."""

    context: int
    forms: Floats
    """(gains, 2, conditions): recomputing, carrying."""
    busy: Floats
    """(gains, 2): seconds of recomputing on the device, and on the others."""
    gaps: tuple[tuple[Gap, ...], ...]
    """Of each place."""


class Entries:
    """Ways to the plans of one table."""

    def __init__(self, world: World, decisions: Sequence[Decision]) -> None:
        self._world = world
        places: dict[tuple[object, ...], int] = {}
        self._firsts: list[Decision] = []
        of_plan = []
        for decision in decisions:
            key = place_of(decision)
            if key not in places:
                places[key] = len(places)
                self._firsts.append(decision)
            of_plan.append(places[key])
        self.place: Ints = np.array(of_plan)
        """(plans,): plans of the same place differ only in chunks and drafts."""
        machines = range(len(world.hosts))
        self._uses = np.array([[m in one.partition.machines for m in machines] for one in self._firsts])
        self._waits = np.array([world.basis.wait(m) for m in machines])
        self._patterns: OrderedDict[Pattern, tuple[_Ways, _Ways]] = OrderedDict()
        self._latest: tuple[Pattern, tuple[_Ways, _Ways]] | None = None
        self.misses = 0
        """Patterns that were priced."""

    def at(
        self, holdings: Holdings, context: int, last: int, conditions: Floats, present: Sequence[int]
    ) -> tuple[Floats, Floats, Floats]:
        """(plans,) each: seconds until the generation can go on with each plan, and of them work of the device and of
        the others. `context` positions are cached of at most `last`; `present` are the machines that run it now."""
        one, other = self._ways(holdings, context, max(last, context))
        share = (context - one.context) / (other.context - one.context) if other.context > one.context else 0.0
        forms = one.forms + share * (other.forms - one.forms)
        busy = one.busy + share * (other.busy - one.busy)
        seconds = (forms @ conditions).tolist()
        result = np.zeros((3, len(self._firsts)))
        at = 0
        for number, gaps in enumerate(one.gaps):
            total, chosen = _fastest(gaps, seconds[at : at + len(gaps)])
            result[0, number] = total
            for each in chosen:
                result[1:, number] += busy[at + each]
            at += len(gaps)
        known = np.zeros(len(self._waits), np.bool_)
        known[[*holdings.holders, *present]] = True
        result[0] += (conditions[self._waits] * (self._uses & ~known)).max(axis=1)
        seconds_, device_s, others_s = result[:, self.place]
        return seconds_, device_s, others_s

    def _ways(self, holdings: Holdings, context: int, last: int) -> tuple[_Ways, _Ways]:
        key = tuple(_pattern(held, context) for held in holdings.machines)
        is_latest = self._latest is not None and self._latest[0] == key  # mostly; hashing it takes longer
        kept = self._latest[1] if is_latest and self._latest else self._patterns.get(key)
        if kept is not None and kept[0].context <= context <= kept[1].context:
            if not is_latest:
                self._patterns.move_to_end(key)
                self._latest = key, kept
            return kept
        self.misses += 1
        one = self._priced(holdings, context)
        other = self._priced(_grown(holdings, context, last), last) if last > context else one
        if any(len(a) != len(b) for a, b in zip(one.gaps, other.gaps, strict=True)):
            other = one  # lacking something else: as it is now, until it has grown
        self._latest = key, (one, other)
        self._patterns[key] = one, other
        if len(self._patterns) > KEPT:
            self._patterns.popitem(last=False)
        return one, other

    def _priced(self, holdings: Holdings, context: int) -> _Ways:
        ways: list[Moving] = [moving_from(self._world, holdings, one, context) for one in self._firsts]
        gains = [gain for way in ways for gain in way.gains]
        size = self._world.basis.size
        forms = np.array([[gain.recompute, gain.transfer] for gain in gains]).reshape(-1, 2, size)
        busy = np.array(
            [(gain.busy_s[DEVICE], sum(gain.busy_s) - gain.busy_s[DEVICE]) for gain in gains]
        ).reshape(-1, 2)  # fmt: skip
        return _Ways(context, forms, busy, tuple(tuple(gain.gap for gain in way.gains) for way in ways))


def _fastest(gaps: Sequence[Gap], seconds: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
    """As `Moving.seconds` and `Moving.choose` of gaps that take so long (recomputed, carried): the seconds, and which
    are recomputed by a fill of their own."""
    if not gaps:
        return 0.0, []
    fastest, before = [0.0], []
    for number, (gap, (again, carried)) in enumerate(zip(gaps, seconds, strict=True)):
        before.append(sum(not gap.fills(other) for other in gaps[:number]))
        fastest.append(min(fastest[before[number]] + again, fastest[-1] + carried))
    chosen, number = [], len(gaps)
    while number:
        again, carried = seconds[number - 1]
        earlier = before[number - 1]
        if not gaps[number - 1].carries or fastest[earlier] + again <= fastest[number - 1] + carried:
            chosen.append(number - 1)
            number = earlier
        else:
            number -= 1
    return fastest[-1], chosen


def _pattern(held: Held, context: int) -> Pattern:
    """What one machine has, but for how many positions there are by now. A stream that is not kept to the end is of no
    use."""
    caches: list[tuple[object, ...]] = []
    before: Mapping[int, int] | None = None
    said: tuple[object, ...] = ()
    for half, units in held.filled.items():
        if units != before:  # most halves are as the one before them, and comparing takes less than looking closely
            before, least = units, min(units.values(), default=0)
            if least >= context:
                said = (tuple(units),)
            elif least == max(units.values()):
                said = (tuple(units), least)
            else:
                said = (tuple((unit, None if has >= context else has) for unit, has in units.items()),)
        caches.append((half, *said))
    kept = [(half, spans[-1][0]) for half, spans in held.kept.items() if spans and spans[-1][1] >= context]
    return tuple(caches), tuple(kept)


def _grown(holdings: Holdings, context: int, last: int) -> Holdings:
    """With as much of the positions to come as of those there are: all of them, or none."""

    def grown(held: Held) -> Held:
        filled = {
            half: {unit: last if has >= context else has for unit, has in units.items()}
            for half, units in held.filled.items()
        }
        kept = {
            half: (*spans[:-1], (spans[-1][0], last)) if spans and spans[-1][1] >= context else spans
            for half, spans in held.kept.items()
        }
        return Held(filled, kept)

    return Holdings(tuple(map(grown, holdings.machines)))


__all__ = ["Entries", "place_of"]
