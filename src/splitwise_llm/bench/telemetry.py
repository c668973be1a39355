"""How close what a session knows of its link comes to the truth: real gRPC links behind a proxy whose shape steps.

The traffic is like the engine's (a frame up and one back per token, now and then a piece of a prefill); the frames
say nothing. Both ends and the proxy share one process, so event loops are about as late as on a busy machine.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import msgspec

from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.engine.memory import available_memory_bytes
from splitwise_llm.engine.rate_meter import RateMeter
from splitwise_llm.engine.telemetry import PING_WIRE_BYTES, Advert, LinkFigures, LinkView, Pings, ProbeBudget, StepClock
from splitwise_llm.spec import LinkSpec
from splitwise_llm.traces import RateTrace
from splitwise_llm.units import parse_rate
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.proxy import run_proxy
from splitwise_llm.wire.sequence import Sequenced
from splitwise_llm.wire.shaper import Lane, LinkShape

RATES_MBIT, RTTS_S = (1.0, 3.0, 10.0, 30.0, 100.0), (0.005, 0.02, 0.05, 0.1)
STEP_S, READ_AFTER_S = 2.5, 1.0
TOKEN_BYTES, TOKEN_S = 3072, (0.02, 0.05)
CHUNKS_BYTES, CHUNK_MOST_S, CHUNK_EVERY_S = (65536, 131072, 262144, 524288), 0.3, 0.6
"""A chunk is drawn from those that take the link at most so long; the smallest may take longer."""
CROSSED_BYTES = 65536
RTT_BAR, RTT_BAR_S, RATE_BAR = 0.1, 2e-3, 0.1

TOKEN, CHUNK, ASK_CHUNK, PING, PONG = b"t", b"c", b"a", b"p", b"o"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was known of a link one second after a step, and what was so."""

    truth: LinkSpec
    known: LinkFigures
    up_crossed_bytes: int
    down_crossed_bytes: int
    """In the second before."""

    @property
    def rtt_error(self) -> float:
        return abs(self.known.fast.rtt_s / self.truth.rtt_s - 1)

    @property
    def rtt_holds(self) -> bool:
        error_s = abs(self.known.fast.rtt_s - self.truth.rtt_s)
        return error_s <= max(RTT_BAR * self.truth.rtt_s, RTT_BAR_S)

    def rates(self) -> tuple[tuple[float, bool, bool], ...]:
        """(relative error, is an estimate, holds) of each direction that enough bytes have crossed."""
        fast, truth, known = self.known.fast, self.truth, self.known
        rows = (
            (self.up_crossed_bytes, fast.up_bytes_per_s / truth.up_bytes_per_s, known.up_is_bound, known.up_age_s),
            (
                self.down_crossed_bytes, fast.down_bytes_per_s / truth.down_bytes_per_s, known.down_is_bound,
                known.down_age_s,
            ),
        )  # fmt: skip
        found = []
        for crossed, ratio, is_bound, age_s in rows:
            if crossed >= CROSSED_BYTES:
                is_estimate = not is_bound and age_s <= READ_AFTER_S
                found.append((abs(ratio - 1), is_estimate, is_estimate and abs(ratio - 1) <= RATE_BAR))
        return tuple(found)


class _SteppedLane(Lane):
    """A lane whose delay, too, changes with time: a frame travels for the delay of the moment it was handed over."""

    def __init__(self, rate: RateTrace, delays_s: Sequence[float], step_s: float) -> None:
        super().__init__(rate, max(delays_s))
        self._delays_s, self._step_s = tuple(delays_s), step_s

    def deliver_at(self, now_s: float, num_bytes: int) -> float:
        self._delay_s = self._delays_s[min(int(now_s / self._step_s), len(self._delays_s) - 1)]
        return super().deliver_at(now_s, num_bytes)


@dataclass(frozen=True, slots=True)
class _Steps(LinkShape):
    """One link after the other, each for `step_s`; the last one stays."""

    links: tuple[LinkSpec, ...] = ()
    step_s: float = STEP_S

    def lanes(self) -> tuple[Lane, Lane]:
        return self._lane([link.up_bytes_per_s for link in self.links]), self._lane(
            [link.down_bytes_per_s for link in self.links]
        )

    def _lane(self, rates: Sequence[float]) -> Lane:
        times_s = tuple(n * self.step_s for n in range(len(rates)))
        trace = RateTrace(times_s, tuple(rates), len(rates) * self.step_s + 3600.0)
        return _SteppedLane(trace, [link.rtt_s / 2 for link in self.links], self.step_s)


def stepped_links(count: int, seed: int) -> tuple[LinkSpec, ...]:
    """Links in a random order in which rate (each way) and RTT all change from one to the next."""
    draw = random.Random(seed)
    found = [LinkSpec(0.02, parse_rate("10mbit"), parse_rate("10mbit"))]
    rates = [parse_rate(f"{rate}mbit") for rate in RATES_MBIT]
    while len(found) < count + 1:
        last = found[-1]
        up, down = (
            draw.choice([rate for rate in rates if rate != now]) for now in (last.up_bytes_per_s, last.down_bytes_per_s)
        )
        found.append(LinkSpec(draw.choice([rtt for rtt in RTTS_S if rtt != last.rtt_s]), up, down))
    return tuple(found)


class _Worker:
    """The far end: answers tokens and pings, sends chunks when asked, and measures the uplink."""

    def __init__(self) -> None:
        self.meter, self.steps = RateMeter(), StepClock()
        self.crossed: deque[tuple[float, int]] = deque()

    def on_arrival(self, sent_s: float, arrived_s: float, num_bytes: int) -> None:
        self.meter.on_arrival(sent_s, arrived_s, num_bytes)
        self.crossed.append((arrived_s, num_bytes))

    async def serve(self, raw: Link) -> None:
        link = Sequenced(raw)
        link.on_arrival = self.on_arrival
        while (frame := await link.receive()) is not None:
            if frame[:1] == TOKEN:
                await link.send(TOKEN + bytes(TOKEN_BYTES))
            elif frame[:1] == ASK_CHUNK:
                await link.send(CHUNK + bytes(int.from_bytes(frame[1:5], "little")))
            elif frame[:1] == PING:
                await link.send(PONG + frame[1:9] + msgspec.msgpack.encode(self.advert().to_dict()))
        await link.close()

    def advert(self) -> Advert:
        up = Advert.uplink(self.meter, time.monotonic())
        return Advert(1, 0.0, self.steps.step_s, available_memory_bytes(), **up)  # type: ignore[arg-type]


class _Device:
    """The near end: makes the traffic, and knows what a device knows."""

    def __init__(self, link: Sequenced, prior: LinkSpec, seed: int) -> None:
        self.view = LinkView(prior, "given")
        self.crossed: deque[tuple[float, int]] = deque()
        self.probe_bytes, self.read_s = 0, list[float]()
        self._link = link
        link.on_arrival = self._on_arrival
        self._draw = random.Random(seed)
        self._pings = Pings()
        self._tokens = asyncio.Semaphore(0)

    def _on_arrival(self, sent_s: float, arrived_s: float, num_bytes: int) -> None:
        self.view.on_arrival(sent_s, arrived_s, num_bytes)
        self.crossed.append((arrived_s, num_bytes))

    async def receive(self) -> None:
        while (frame := await self._link.receive()) is not None:
            if frame[:1] == TOKEN:
                self._tokens.release()
            elif frame[:1] == PONG:
                now_s = time.monotonic()
                stamp = int.from_bytes(frame[1:9], "little")
                if (trip := self._pings.answered(stamp, now_s, self._link.received_bytes)) is not None:
                    self.view.on_reply(now_s, *trip, Advert.from_dict(msgspec.msgpack.decode(frame[9:])))

    async def decode(self) -> None:
        while True:
            await self._link.send(TOKEN + bytes(TOKEN_BYTES))
            await self._tokens.acquire()
            await asyncio.sleep(self._draw.uniform(*TOKEN_S))

    async def chunks(self, truth: Sequence[LinkSpec], zero_s: float) -> None:
        """One up and one down 50 ms after each step, and more in its course where they are short."""
        for step in range(len(truth)):
            slowest = min(truth[step].up_bytes_per_s, truth[step].down_bytes_per_s)
            often = CHUNKS_BYTES[0] <= CHUNK_MOST_S * slowest
            for at_s in (0.05, *(0.05 + n * CHUNK_EVERY_S for n in range(1, int(STEP_S / CHUNK_EVERY_S)) if often)):
                await asyncio.sleep(max(zero_s + step * STEP_S + at_s - time.monotonic(), 0))
                await self._link.send(CHUNK + bytes(self._chunk(truth[step].up_bytes_per_s)))
                await self._link.send(ASK_CHUNK + self._chunk(truth[step].down_bytes_per_s).to_bytes(4, "little"))

    def _chunk(self, bytes_per_s: float) -> int:
        sizes = [size for size in CHUNKS_BYTES if size <= CHUNK_MOST_S * bytes_per_s]
        return self._draw.choice(sizes or CHUNKS_BYTES[:1])

    async def ping(self) -> None:
        budget = ProbeBudget(time.monotonic())
        while True:
            await asyncio.sleep(0.02)
            now_s = time.monotonic()
            begun_s = time.perf_counter()
            known = self.view.figures(now_s)
            self.read_s.append(time.perf_counter() - begun_s)
            heard_s = self.crossed[-1][0] if self.crossed else -math.inf
            hurry = self.view.is_stirred(now_s)
            rate = known.pessimistic.up_bytes_per_s
            size = budget.due(now_s, rate, heard_s, wants_rate=known.up_is_bound, hurry=hurry)
            if size is not None:
                self.probe_bytes += size
                stamp = self._pings.sent(now_s, self._link.sent_bytes, self._link.received_bytes)
                filling = bytes(max(size - PING_WIRE_BYTES, 0))
                await self._link.send(PING + stamp.to_bytes(8, "little") + filling)


def _crossed(frames: deque[tuple[float, int]], now_s: float) -> int:
    while frames and frames[0][0] < now_s - 1.0:
        frames.popleft()
    return sum(size for _, size in frames)


async def read_after_steps(links: Sequence[LinkSpec], seed: int) -> tuple[list[Reading], _Device]:
    """Run the traffic over a link that steps through `links`; a reading one second after each step but the first."""
    worker = _Worker()
    async with await serve("127.0.0.1:0", worker.serve) as server:
        zero_s = time.monotonic()
        async with await run_proxy("127.0.0.1:0", server.address, _Steps(links=tuple(links))) as proxy:
            link = Sequenced(await dial(f"{proxy.address[0]}:{proxy.address[1]}"))
            device = _Device(link, links[0], seed)
            jobs = (device.receive(), device.decode(), device.ping(), device.chunks(links, zero_s))
            tasks = [asyncio.create_task(job) for job in jobs]
            readings = []
            try:
                for step, truth in enumerate(links[1:], start=1):
                    await asyncio.sleep(max(zero_s + step * STEP_S + READ_AFTER_S - time.monotonic(), 0))
                    now_s = time.monotonic()
                    up, down = _crossed(worker.crossed, now_s), _crossed(device.crossed, now_s)
                    readings.append(Reading(truth, device.view.figures(now_s), up, down))
                    for task in tasks:
                        if task.done():
                            task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await link.close()
    return readings, device


async def run_telemetry(steps: int, tell: Tell, seed: int = 1) -> Figures:
    """`telemetry_rtt_error` and `telemetry_rate_error`: medians of relative errors one second after a step; `..._worst`
    and `..._within` (the share that meets the bar) beside them.

    A rate counts where 64 KB have crossed in that second; one that then is no fresh estimate is not within the bar,
    and `telemetry_rate_estimated` is the share that are estimates.
    """
    links = stepped_links(steps, seed)
    settings: dict[str, object] = {"steps": steps, "rates_mbit": RATES_MBIT, "rtts_s": RTTS_S, "seed": seed}
    result = Figures("telemetry", settings | {"step_s": STEP_S, "read_after_s": READ_AFTER_S})
    tell(f"{steps} steps of {STEP_S:g} s")
    readings, device = await read_after_steps(links, seed)
    rtts = [reading.rtt_error for reading in readings]
    rates = [rate for reading in readings for rate in reading.rates()]
    result.add_median("telemetry_rtt_error", rtts, "relative, one second after a step")
    result.add("telemetry_rtt_error_worst", max(rtts))
    result.add("telemetry_rtt_within", sum(reading.rtt_holds for reading in readings) / len(readings), "10 % or 2 ms")
    result.add("telemetry_rate_counted", len(rates) / (2 * len(readings)), "64 KB had crossed in the second before")
    if rates:
        errors = [error for error, is_estimate, _ in rates if is_estimate]
        result.add("telemetry_rate_estimated", len(errors) / len(rates))
        result.add("telemetry_rate_within", sum(holds for _, _, holds in rates) / len(rates), "estimated, within 10 %")
        if errors:
            result.add_median("telemetry_rate_error", errors, "of those estimated")
            result.add("telemetry_rate_error_worst", max(errors))
    result.add("telemetry_read_ms", 1e3 * median(device.read_s), "one look at the link, four to ten a second suffice")
    spent_s = (steps + 1) * STEP_S
    sent_share = device.probe_bytes / spent_s / (sum(link.up_bytes_per_s for link in links) / len(links))
    result.add("telemetry_probe_share", sent_share, "of the uplink's mean rate")
    return result
