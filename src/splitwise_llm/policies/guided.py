"""Exact drift plus penalty under knobs that somebody else turns, and the filter that keeps them from doing harm.

With D1 the objective at nominal prices and a* its minimiser, what the knobs lead to is executed if
`D1(a) <= D1(a*) + eta |D1(a*)| + C`, C = `slack` V; else a* is, and it is counted. It knows no learner.

What is no plan has a value, too: to ask again later costs `V (waited + an epoch) / T_ref` beyond a* (so that all
waiting together stays within the bound), to refuse costs `V T_max / T_ref`. With the outlook a plan on the device is,
in an outage, one that is left when the outage ends (`outlook`), and is valued as such; a request that has not begun is
asked again later where the cloud is worth waiting for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.cost import Entry, Limits, Prices, Table, Work, bill
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.lyapunov import Budgets, Penalty, Terms
from splitwise_llm.observation import Menu, Tools
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies import forecast
from splitwise_llm.policies.knobs import ODDS, SIZES, Constants, Knobs, Mode
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.policies.outlook import with_returns
from splitwise_llm.policies.planners import typical

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ETA, SLACK = 0.15, 0.1
GAIN = 1e-3
"""What is expected of an outage counts where it is less than what is known by more than this part."""
WORTH = 0.05
"""Waiting at admission is worth it where it spares more than this part. Only joules can be spared: whoever begins on
the device loses no time, but for what the approximation says. The drift is left out: told by it that the device's work
is dear, requests waited that had better begun (up to 2.9 % worse with several slots)."""
REFUSE = STAY = -1
LATER = -2
CLASSES = (Mode.EDGE, Mode.CLOUD, Mode.BOTH)
"""Which machines a plan uses; a table's plans are divided among these modes."""
_WAIT, _REFUSED = int(Mode.WAIT), int(Mode.SHED)
"""Plain numbers: numpy looks for a dozen attributes in a member of an enum each time it is compared with an array."""
_OUTLOOK = sum(SIZES) - 1
"""Where the masks have the last head's 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is made of one table once."""

    table: Table
    allowed: Bools
    """(plans,): made with the tools there are."""
    classes: Ints
    """(plans,): number in `CLASSES`."""
    of_class: Bools
    """(classes, 1, plans): the same, to be laid over systems."""
    device: Ints
    """The plans on the device alone."""
    returns: Bools
    """(plans,): what may be gone over to when an outage ends."""
    drafts: Bools
    """(plans,): whether it drafts."""
    penalty: Penalty
    weights: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Systems of a menu, their plans priced as they are."""

    menu: Menu
    prepared: Prepared
    prices: Prices
    terms: Terms
    """Of the objective, whatever the knobs weigh."""
    d1: Floats
    """(systems, plans): D at nominal prices; inf where a plan cannot be chosen."""
    best: Ints
    """(systems,): a*"""
    least: Floats
    """(systems,): D1(a*)"""
    bound: Floats
    """(systems,): what may be executed."""
    unit: Floats
    """(systems,): what the filter that ships lets pass above the least, by which differences of D1 are measured."""
    fresh: Bools
    """(systems,): at admission."""
    later_d1: Floats
    """(systems,): of asking again later."""
    shed_d1: float
    best_of_class: Ints
    """(classes, systems): the plan of each class of which D1 is least; any where none of it can be chosen."""
    least_of_class: Floats
    """(classes, systems): its D1."""
    prospect: Prospect | None = None
    """None: no system is in an outage."""


@dataclass(frozen=True, slots=True, eq=False)
class Prospect:
    """What systems in an outage can expect of its end."""

    at: Ints
    """Which they are."""
    outages_s: tuple[Floats, Floats]
    """(systems,) each, of all: `forecast.outages_s`."""
    terms: Terms
    """Of them, plans on the device being left when that is cheaper."""
    d1: Floats
    """(those, plans): D at nominal prices of these; inf where a plan cannot be chosen."""
    spared: Floats
    """(those,): share of the expected seconds, and of joules where they count, that waiting for the link spares at
    admission; below 0 in flight."""


@dataclass(frozen=True, slots=True, eq=False)
class Guided:
    """What is to be done, and what was held back."""

    choice: Ints
    """(systems,): a plan, or STAY, LATER, REFUSE as `Chooser` has them."""
    wanted: Ints
    """The same without the filter."""
    kept: Bools
    """(systems,): whether the filter put a* in its place."""
    d1: Floats
    """(systems,): D1 of what is done."""


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """The low level under knobs; a planner of the field gets the same tools, limits and budgets."""

    tools: Tools
    limits: Limits = field(default_factory=Limits)
    budgets: Budgets = field(default_factory=Budgets)
    v: float = 1.0
    arrivals_per_s: float = 0.0
    eta: float = ETA
    slack: float = SLACK
    epoch_s: float = 1.0
    t_max_s: float = 600.0
    w_energy: float = 0.0
    """Seconds that a joule of the device counts as, for all who are asked the same way."""
    _tables: dict[int, Prepared] = field(default_factory=dict, repr=False)
    _odds: dict[tuple[int, float], Table] = field(default_factory=dict, repr=False)

    def prepare(self, table: Table) -> Prepared:
        """Raises RequestError where no plan may be made."""
        kept = self._tables.get(id(table))
        if kept is None:
            world, job = table.world, table.bills[0].job
            decisions = [one.decision for one in table.bills]
            penalty, weights = typical(world, job, self.tools, self.limits, self.arrivals_per_s)
            energy = self.w_energy * penalty.e_ref_j / penalty.t_ref_s
            machines = [decision.partition.machines for decision in decisions]
            classes = np.array([0 if m == {DEVICE} else 2 if DEVICE in m else 1 for m in map(set, machines)])
            allowed = np.array([self.tools.allow(decision) for decision in decisions])
            kept = Prepared(
                table,
                allowed,
                classes,
                classes == np.arange(len(CLASSES))[:, None, None],
                np.nonzero(classes == 0)[0],
                allowed & (classes > 0),
                np.array([decision.draft > 0 for decision in decisions]),
                replace(penalty, v=self.v, w_energy=energy),
                weights * self.v,
            )
            self._tables[id(table)] = kept  # holds the table: its id stays its own
        return kept

    def price(self, menu: Menu) -> Priced:
        """At nominal prices."""
        prepared = self.prepare(menu.table)
        fresh = menu.current < 0
        prices = self._prices(menu, prepared.table, None)
        usable = menu.admissible & prepared.allowed
        usable = np.where(usable.any(axis=1, keepdims=True), usable, prepared.allowed)
        terms = self._terms(menu, prepared, prices)
        d1 = np.where(usable, terms.objective(prepared.weights, menu.virtual[:, None, :]), np.inf)
        best = d1.argmin(axis=1)
        least = d1[np.arange(len(best)), best]
        of_class = np.where(prepared.of_class, d1, np.inf)
        bound, unit = self._bound(least, self.eta, self.slack), self._bound(least, ETA, SLACK) - least
        per_s = self.v / prepared.penalty.t_ref_s
        return Priced(
            menu, prepared, prices, terms, d1, best, least,
            bound, unit, fresh,
            np.where(fresh, least + per_s * (menu.waited_s + self.epoch_s), self._staying(d1, menu, least)),
            per_s * self.t_max_s, of_class.argmin(axis=2), of_class.min(axis=2),
            self._prospect(menu, prepared, prices, usable),
        )  # fmt: skip

    def _prospect(
        self, menu: Menu, prepared: Prepared, prices: Prices, usable: Bools
    ) -> Prospect | None:  # fmt: skip
        """`prices` are of all plans, those that are out of reach waiting for the link."""
        if menu.past is None or not menu.past.is_down.any():
            return None
        at = np.nonzero(menu.past.is_down)[0]
        is_all = len(at) == len(menu.current)
        some = menu if is_all else menu.at(at)
        outages_s = forecast.outages_s(menu.past)
        outage_s = np.where(some.outage_s > 0, some.outage_s, outages_s[0][at])
        goes = np.empty_like(usable[at])
        goes[:] = prepared.returns
        penalty = prepared.penalty
        joule_s = penalty.w_energy * penalty.t_ref_s / penalty.e_ref_j
        prices_at = prices if is_all else _each(lambda value: value[at] if value.ndim > 1 else value, prices)
        found = with_returns(some, prices_at, prepared.device, goes, outage_s, joule_s)
        terms = self._terms(some, prepared, found)
        d1 = np.where(usable[at], terms.objective(prepared.weights, some.virtual[:, None, :]), np.inf)
        fresh, spared = some.current < 0, np.full(len(at), -1.0)
        if fresh.any():
            begun, waited = (
                np.where(mine, each.total_s + joule_s * each.device_j, np.inf).min(axis=1)
                for mine, each in ((usable[at], found), (goes & ~usable[at], prices_at))
            )
            spared = np.where(fresh & np.isfinite(waited), 1 - waited / begun, -1.0)
        return Prospect(at, outages_s, terms, d1, spared)

    def _bound(self, least: Floats, eta: float, slack: float) -> Floats:
        return least + eta * np.abs(least) + slack * self.v

    @staticmethod
    def _staying(d1: Floats, menu: Menu, least: Floats) -> Floats:
        here = d1[np.arange(len(least)), np.maximum(menu.current, 0)]
        return np.where(np.isfinite(here), here, least)

    def masks(self, priced: Priced) -> Bools:
        """(systems, values of all heads side by side): what may be turned to. Neutral always may."""
        masks = np.ones((len(priced.least), sum(SIZES)), np.bool_)
        for mode, least in zip(CLASSES, priced.least_of_class, strict=True):
            masks[:, mode] = least <= priced.bound
        masks[:, Mode.RACE] = masks[:, Mode.SHADOW] = False
        masks[:, Mode.WAIT] = priced.later_d1 <= priced.bound
        masks[:, Mode.SHED] = priced.fresh & (priced.shed_d1 <= priced.bound)
        masks[:, _OUTLOOK] = False
        if priced.prospect is not None:
            masks[priced.prospect.at, _OUTLOOK] = True
        return masks

    def guide(self, priced: Priced, knobs: Knobs) -> Guided:
        """What the knobs lead to, if the filter lets it pass. Raises BrokenInvariant rather than let anything worse."""
        n = np.arange(len(priced.least))
        wanted = self._wanted(priced, knobs)
        d1 = priced.d1[n, np.maximum(wanted, 0)]
        if priced.prospect is not None:
            at = priced.prospect.at
            turned = knobs.outlook[at] > 0
            returning = priced.prospect.d1[np.arange(len(at)), np.maximum(wanted[at], 0)]
            d1[at] = np.where(turned, np.minimum(d1[at], returning), d1[at])
        d1 = np.where(wanted == LATER, priced.later_d1, d1)
        d1 = np.where(wanted == _SHED, priced.shed_d1, d1)
        kept = ~(d1 <= priced.bound)
        done = np.where(kept, priced.best, wanted)
        d1 = np.where(kept, priced.least, d1)
        if not (d1 <= priced.bound).all():
            raise BrokenInvariant("a decision would cost more than the bound of the safety filter")
        answer = self._answer(priced, done)
        return Guided(answer, self._answer(priced, wanted) if kept.any() else answer, kept, d1)

    def choose(self, menu: Menu, knobs: Knobs | None = None) -> Ints:
        """With neutral knobs exact drift plus penalty, as `drift` among the policies."""
        return self.guide(self.price(menu), knobs or Knobs.neutral(len(menu.current))).choice

    def _wanted(self, priced: Priced, knobs: Knobs) -> Ints:
        """(systems,): a plan, LATER, or _SHED."""
        menu, prepared = priced.menu, priced.prepared
        values = np.full(priced.d1.shape, np.inf)
        kinds = set(knobs.draft.tolist())
        for odds in kinds:
            at = np.nonzero(knobs.draft == odds)[0]
            some, turned = (menu, knobs) if len(kinds) == 1 else (menu.at(at), knobs.at(at))
            table = self._table_with(prepared.table, odds)
            plain = table is prepared.table and (turned.patience == 1.0).all()
            if plain:
                terms = priced.terms if len(kinds) == 1 else _rows(priced.terms, at)
            else:
                terms = self._terms(some, prepared, self._prices(some, table, turned.patience))
            values[at] = _objective(terms, some, prepared, turned)
        waits = self._expect(priced, knobs, values) & (knobs.mode == int(Mode.AUTO))
        values = np.where(np.isfinite(priced.d1), values, np.inf)
        modes = set(knobs.mode.tolist())
        for number, mode in enumerate(CLASSES):
            if mode in modes:
                only = knobs.mode == int(mode)
                there = np.where(prepared.classes == number, values[only], np.inf)
                values[only] = np.where(np.isfinite(there).any(axis=1, keepdims=True), there, values[only])
        wanted = values.argmin(axis=1)
        wanted = np.where(waits | (knobs.mode == _WAIT), LATER, wanted)
        result: Ints = np.where((knobs.mode == _REFUSED) & priced.fresh, _SHED, wanted)
        return result

    def _expect(self, priced: Priced, knobs: Knobs, values: Floats) -> Bools:
        """Put what is expected in place of `values` (systems, plans) where the outlook is on and it is less by more
        than `GAIN` than what would be done; and (systems,) whether waiting for the link is worth it."""
        waits = np.zeros(len(values), np.bool_)
        if priced.prospect is None:
            return waits
        at, prepared = priced.prospect.at, priced.prepared
        on = knobs.outlook[at] > 0
        if not on.any():
            return waits
        is_all = len(at) == len(values)
        some, turned = (priced.menu, knobs) if is_all else (priced.menu.at(at), knobs.at(at))
        expected = _objective(priced.prospect.terms, some, prepared, turned)
        plain = np.where(np.isfinite(priced.d1[at]), values[at], np.inf).min(axis=1)
        gains = expected < (plain - GAIN * np.abs(plain))[:, None]
        values[at] = np.where(on[:, None] & gains, np.minimum(expected, values[at]), values[at])
        waits[at] = on & (priced.prospect.spared > WORTH)
        return waits

    @staticmethod
    def _answer(priced: Priced, plans: Ints) -> Ints:
        current = priced.menu.current
        stays = ~priced.fresh & ((plans == current) | (plans == LATER))
        answer: Ints = np.where(stays, STAY, np.where(plans == _SHED, REFUSE, plans))
        return answer

    def _prices(self, menu: Menu, table: Table, patience: Floats | None) -> Prices:
        """Of the rest of each request; `patience` scales what leaving a machine that is out of reach takes."""
        later, fresh = menu.remaining_tokens[:, None], (menu.current < 0)[:, None]
        if fresh.all():
            return table.at(menu.conditions, later)
        entry_s = menu.entry_s
        if patience is not None and menu.past is not None:
            leaves = menu.past.is_down & (menu.current >= 0)
            scale = np.where(leaves, patience, 1.0)[:, None]
            here = np.arange(entry_s.shape[1]) == menu.current[:, None]
            entry_s = np.where(here, entry_s, entry_s * scale)
        entry = Entry(entry_s, menu.entry_device_s, menu.entry_cloud_s)
        running = table.at(menu.conditions, later, entry)
        if not fresh.any():
            return running
        return _where(fresh, table.at(menu.conditions, later), running)

    def _terms(self, menu: Menu, prepared: Prepared, prices: Prices) -> Terms:
        objective = DriftPlusPenalty(
            prepared.penalty, prepared.weights, menu.queues[:, None, :], menu.virtual[:, None, :], self.budgets,
            menu.remaining_tokens[:, None], menu.waited_s[:, None], menu.past.waiting[:, None] if menu.past else 0.0,
        )  # fmt: skip
        return objective.terms(prices)

    def _table_with(self, table: Table, odds: float) -> Table:
        """The same plans, if a drafted token were accepted at other odds."""
        world = table.world
        a = world.drafter.acceptance
        if odds == 1.0 or not a > 0 or not self.prepare(table).drafts.any():
            return table
        key = (id(table), odds)
        if key not in self._odds:
            believed = replace(world, drafter=replace(world.drafter, acceptance=odds * a / (1 - a + odds * a)))
            self._odds[key] = Table(believed, [bill(believed, one.decision, one.job) for one in table.bills])
        return self._odds[key]


_SHED = -3


def _objective(terms: Terms, menu: Menu, prepared: Prepared, knobs: Knobs) -> Floats:
    """(systems, plans), as knobs weigh it."""
    scale = np.array([knobs.device, knobs.link, knobs.link, knobs.cloud]).T[:, None, :]
    return terms.objective(prepared.weights * scale, menu.virtual[:, None, :] * knobs.budgets[:, None, None])


def _rows(terms: Terms, at: Ints) -> Terms:
    return Terms(terms.paid[at], terms.added[at], terms.g[at])


def _where(which: Bools, these: Prices, those: Prices) -> Prices:
    def each(a: Floats, b: Floats) -> Floats:
        return np.asarray(np.where(which, a, b)) if a.ndim > 1 else a

    return _each(each, these, those)


def _each(make: Callable[..., Floats], *prices: Prices) -> Prices:
    """The figures that `make` makes of the same figure of all of them."""
    works = [one.work for one in prices]
    work = Work(*(make(*(getattr(one, item.name) for one in works)) for item in fields(Work)))
    plain = [item.name for item in fields(Prices) if item.name != "work"]
    return Prices(work=work, **{name: make(*(getattr(one, name) for one in prices)) for name in plain})


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """The same knobs always: what a plain optimiser has tuned, or, all 1, exact drift plus penalty."""

    guide: Guide
    constants: Constants = Constants()  # noqa: RUF009 - frozen
    in_flight: bool = True

    def choose(self, menu: Menu) -> Ints:
        return self.guide.choose(menu, self.constants.knobs(len(menu.current)))


__all__ = ["CLASSES", "ETA", "LATER", "ODDS", "REFUSE", "SLACK", "STAY", "Constant", "Guide", "Guided", "Priced"]
