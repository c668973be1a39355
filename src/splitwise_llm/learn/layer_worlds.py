"""Where the per-layer policy learns: requests one after another on a device beside a cloud, priced by `cost`.

Devices, models, requests and floors are those of the shipped specs at random; links, loads and arrivals wander. Each
decision costs its exact drift plus penalty D, the queues take its work and are served until the next request. It
knows no network and no learner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from splitwise_llm.cost import Bill, Floor, Host, Job, Limits, Table, World
from splitwise_llm.errors import RequestError
from splitwise_llm.lyapunov import served
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.policies.objective import DriftPlusPenalty
from splitwise_llm.policies.per_layer import Site, plain_partitions
from splitwise_llm.policies.per_layer_network import PAST, Actions, Floats, Rules
from splitwise_llm.sim.scenarios import CLOUD_DEVICE
from splitwise_llm.spec import Dtype, LinkSpec, Weights, find_device, find_model
from splitwise_llm.units import parse_rate

DEVICES = ("orin-nx-16gb", "agx-orin-32gb", "agx-orin-64gb", "galaxy-s23", "raspberry-pi-5")
CLOUDS = (CLOUD_DEVICE, "l4", "rtx-3090", "h100-80gb")
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tinyllama-1.1b", "qwen2.5-0.5b", "llama-7b", "llama-3.1-8b",
          "llama-13b")  # fmt: skip
"""12 to 48 layers."""
JOBS = (Job(128, 128), Job(64, 256), Job(512, 64), Job(1024, 64))
FLOORS = (None, None, Floor(1, 1), Floor(2, 2))
BILLS_KEPT = 32
"""Per place."""


@dataclass(frozen=True, slots=True)
class Weather:
    """What wanders at every place."""

    rate: tuple[str, str] = ("0.5mbit", "500mbit")
    """Ends of a log-uniform range."""
    rtt_s: tuple[float, float] = (0.001, 0.2)
    wanders: float = 0.35
    """Change of a link from request to request, standard deviation of a logarithm."""
    batches: tuple[int, ...] = (1, 32, 64, 96)
    """Sequences in the cloud's batch, in each class of load."""
    waits_s: tuple[float, ...] = (0.0, 0.0, 0.3, 2.0)
    """Mean wait for the cloud in each class."""
    outages: float = 0.05
    """Share of requests at which the cloud is out of reach."""

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes per second."""
        low, high = self.rate
        return parse_rate(low), parse_rate(high)


@dataclass(eq=False)
class Place:
    """A site with prices of what was tried there."""

    site: Site
    kept: OrderedDict[Partition, Table] = field(default_factory=OrderedDict)
    plain: Table | None = None
    """The plans of rules that are admissible: what D is seen relative to."""

    def table(self, partition: Partition) -> Table:
        """The prices of one partition."""
        table = self.kept.get(partition)
        if table is None:
            table = self.kept[partition] = self._table([self.site.bill(partition)])
            if len(self.kept) > BILLS_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(partition)
        return table

    def _table(self, bills: Sequence[Bill]) -> Table:
        return Table(self.site.world, bills)

    def objective(self, queues: Floats) -> DriftPlusPenalty:
        """D with these queues (4,)."""
        return DriftPlusPenalty(self.site.penalty, self.site.weights, queues)


def place(world: World, job: Job, limits: Limits, arrivals_per_s: float) -> Place:
    """Raises RequestError where nothing is admissible."""
    site = Site.of(world, job, limits, arrivals_per_s)
    one = Place(site)
    one.plain = one._table([site.bill(partition) for partition in plain_partitions(world, job, limits)])
    return one


def places(number: int, dice: np.random.Generator) -> list[Place]:
    """Different sites, at random."""
    found: list[Place] = []
    while len(found) < number:
        spec, job = find_model(str(dice.choice(MODELS))), JOBS[dice.integers(len(JOBS))]
        device, cloud = find_device(str(dice.choice(DEVICES))), find_device(str(dice.choice(CLOUDS)))
        weights = (Weights.INT4, Weights.INT4, Weights.INT8)[dice.integers(3)]
        hosts = (Host(device, Dtype.FP16, weights), Host(cloud))
        rate = parse_rate("20mbit")
        world = World(spec, hosts, {(0, 1): LinkSpec(0.02, rate, rate)})
        limits = Limits(floor=FLOORS[dice.integers(len(FLOORS))])
        utilisation = dice.uniform(0.05, 0.8)
        if job.prompt_tokens + job.tokens_out > spec.max_context:
            continue
        try:
            one = place(world, job, limits, 1.0)
            per_s = utilisation / one.site.penalty.t_ref_s
            found.append(place(world, job, limits, per_s))
        except RequestError:
            continue
    return found


class Streams:
    """One request after another at each of some places."""

    def __init__(
        self,
        somewhere: Sequence[Place],
        dice: np.random.Generator,
        weather: Weather = Weather(),
        history: float = 0.5,
    ) -> None:
        """`history`: the share of places that keep one; the others show the present as their past."""
        self.places, self.dice, self.weather = somewhere, dice, weather
        count = len(somewhere)
        self.queues = np.zeros((count, 4))
        self.rates = _log_uniform(dice, weather.rates, count)
        self.rtts = _log_uniform(dice, weather.rtt_s, count)
        self.loads = dice.integers(len(weather.batches), size=count)
        self.waits = np.zeros(count)
        self.outage = np.zeros(count, dtype=bool)
        self.keeps = dice.random(count) < history
        self.past = np.zeros((count, PAST, 3))
        self.rules = [one.site.rules for one in somewhere]
        self.seen = 0
        t_ref = np.array([one.site.penalty.t_ref_s for one in somewhere])
        self.queues[:] = dice.exponential(0.5, (count, 4)) * t_ref[:, None] * (dice.random((count, 4)) < 0.4)
        self._observe()

    def _observe(self) -> None:
        """What holds for the next request: conditions, and the history with it."""
        dice, weather, count = self.dice, self.weather, len(self.places)
        moved = dice.random(count) < 0.2
        self.loads = np.where(moved, dice.integers(len(weather.batches), size=count), self.loads)
        self.waits = np.array(weather.waits_s)[self.loads] * dice.exponential(1.0, count)
        self.outage = dice.random(count) < weather.outages
        self.rates = np.clip(self.rates * np.exp(weather.wanders * dice.standard_normal(count)), *weather.rates)
        self.rtts = np.clip(self.rtts * np.exp(weather.wanders * dice.standard_normal(count)), *weather.rtt_s)
        self.asymmetry = np.exp(0.3 * dice.standard_normal(count))
        self.conditions = [self._conditions(n) for n in range(count)]
        figures = np.concatenate(
            [
                one.site.past(self.conditions[n][None], self.queues[n][None], np.array([one.site.arrivals_per_s]))
                for n, one in enumerate(self.places)
            ]
        )
        fill = ~self.keeps if self.seen else np.ones(count, dtype=bool)
        self.past = np.concatenate([self.past[:, 1:], figures[:, None]], axis=1)
        self.past[fill] = figures[fill, None]
        self.seen += 1

    def _conditions(self, n: int) -> Floats:
        world, batch = self.places[n].site.world, self.weather.batches[self.loads[n]]
        up = float(self.rates[n])
        link = LinkSpec(float(self.rtts[n]), up, up * float(self.asymmetry[n]))
        return world.basis.conditions({(0, 1): link}, {1: world.load(1, batch, float(self.waits[n]))})

    def figures(self) -> Floats:
        """(places, figures)"""
        return np.concatenate(
            [
                one.site.figures(self.conditions[n][None], self.queues[n][None], self.past[n][None])
                for n, one in enumerate(self.places)
            ]
        )

    def allowed(self) -> Rules:
        """The masks of now: in an outage the cloud is out of reach, unless the floor or memory need it."""
        alone = np.array([_fits_alone(rules) for rules in self.rules])
        return Rules.stack(self.rules).without_cloud(self.outage & alone)

    def step(self, actions: Actions) -> tuple[Floats, Floats]:
        """(places,) D of what was decided, and of the best plain plan; then the next requests come."""
        paid, plain = np.zeros(len(self.places)), np.zeros(len(self.places))
        for n, one in enumerate(self.places):
            objective = one.objective(self.queues[n])
            table = one.table(one.site.partition(actions, n)) if actions.possible[n] else one.plain
            assert table is not None
            assert one.plain is not None
            prices = table.at(self.conditions[n])
            paid[n] = objective.value(prices).max()
            plain[n] = objective.value(one.plain.at(self.conditions[n])).min()
            work = prices.work
            self.queues[n] += [float(each[0]) for each in (work.device_s, work.up_s, work.down_s, work.cloud_s)]
            gap_s = np.array(self.dice.exponential(1.0 / one.site.arrivals_per_s))
            self.queues[n] = served(self.queues[n], np.where(self.outage[n], [1.0, 0, 0, 1.0], np.ones(4)), gap_s)
            t_ref = one.site.penalty.t_ref_s
            self.queues[n] = np.minimum(self.queues[n], 20 * t_ref)
        self._observe()
        return paid, plain


def _log_uniform(dice: np.random.Generator, ends: tuple[float, float], count: int) -> Floats:
    result: Floats = np.exp(dice.uniform(np.log(ends[0]), np.log(ends[1]), count))
    return result


def _fits_alone(rules: Rules) -> bool:
    layers = float(rules.layers[0])
    head = 0.0 if rules.tied[0] else 1.0
    return bool(rules.size[0, DEVICE] @ np.array([layers, layers, 1.0, head]) <= rules.room[0, DEVICE])


__all__ = ["Place", "Streams", "place", "places"]
