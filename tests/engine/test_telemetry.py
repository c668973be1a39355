"""What a session knows of its link, against links simulated frame by frame: no socket, no real time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.engine.meters import battery_share
from splitwise_llm.engine.rate_meter import RateMeter
from splitwise_llm.engine.telemetry import (
    ANSWER_BYTES,
    PING_EVERY_S,
    PING_WIRE_BYTES,
    PROBE_SHARE,
    SILENCE_S,
    Advert,
    ClassWatch,
    LinkView,
    Pings,
    ProbeBudget,
    RttFilter,
    StepClock,
    link_figures,
    link_watch,
    load_figures,
    load_watch,
)
from splitwise_llm.errors import ProtocolError
from splitwise_llm.spec import LinkSpec
from splitwise_llm.units import parse_rate

OFFSET_S, DRIFT = 1e6, 50e-6
Frame = tuple[float, float, int]
"""Sent (sender's clock), picked up (receiver's), bytes."""
Figure = Callable[[float], float]


def mbit(rate: float) -> float:
    return parse_rate(f"{rate:.6f}mbit")


def engine_traffic(until_s: float, draw: random.Random, chunk_every_s: float = 0.5) -> list[tuple[float, int]]:
    """(sent, bytes): tokens every 20 to 50 ms, pings ten a second, pieces of a prefill now and then."""
    sent, at_s = [(n * 0.1 + draw.uniform(0, 0.05), 80) for n in range(int(until_s / 0.1))], 0.0
    while at_s < until_s:
        sent.append((at_s, 3072))
        at_s += draw.uniform(0.02, 0.05)
    pieces = int(until_s / chunk_every_s) if chunk_every_s else 0
    sent += [(n * chunk_every_s + draw.uniform(0, 0.02), draw.choice((65536, 131072))) for n in range(pieces)]
    return sorted(sent)


def through(
    sent: Sequence[tuple[float, int]],
    rate: Figure,
    delay_s: Figure,
    draw: random.Random,
    *,
    jitter_s: float = 2e-4,
    late_s: float = 2e-4,
    stall_s: float = 0.01,
) -> list[Frame]:
    """First in, first out, with jitter, a reader who is a little late always and much later (up to `stall_s`) one
    time in thirty, and a sender's clock with an offset and a drift."""
    frames, free_s, arrival_s, picked_s = [], 0.0, 0.0, 0.0
    for at_s, size in sent:
        free_s = max(free_s, at_s)
        left = float(size)
        while left > 1e-6:  # the rate of the moment, in steps of a millisecond
            step = min(left, rate(free_s) * 1e-3)
            free_s += step / rate(free_s)
            left -= step
        arrival_s = max(arrival_s, free_s + delay_s(at_s) + draw.uniform(-jitter_s, jitter_s))
        stalled_s = draw.uniform(0, stall_s) if draw.random() < 1 / 30 else 0.0
        picked_s = max(picked_s, arrival_s + draw.expovariate(1 / late_s) + stalled_s)
        frames.append((at_s * (1 + DRIFT) + OFFSET_S, picked_s, size))
    return frames


def metered(frames: Sequence[Frame], now_s: float) -> RateMeter:
    """A meter that was fed until `now_s` and read ten times a second, as the engine does."""
    meter, next_s = RateMeter(), 0.1
    for frame in frames:
        if frame[1] > now_s:
            break
        while frame[1] > next_s:
            meter.read(next_s)
            next_s += 0.1
        meter.on_arrival(*frame)
    return meter


def crossed(frames: Sequence[Frame], now_s: float) -> int:
    return sum(size for _, at_s, size in frames if now_s - 1 < at_s <= now_s)


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 60.0), st.floats(0.0025, 0.05), st.integers(0, 1000))
def test_the_rate_is_within_a_tenth_once_64_KB_crossed_in_the_last_second(
    rate_mbit: float, delay_s: float, seed: int
) -> None:
    draw, rate = random.Random(seed), mbit(rate_mbit)
    frames = through(engine_traffic(3.0, draw, max(0.5, 4e5 / rate)), lambda _: rate, lambda _: delay_s, draw)
    found = metered(frames, 2.5).read(2.5)
    assert crossed(frames, 2.5) >= 65536
    assert found is not None
    if not found.is_bound:
        assert found.bytes_per_s == pytest.approx(rate, rel=0.1)
    assert found.low_bytes_per_s <= 1.1 * rate


def test_almost_every_reading_is_an_estimate_once_64_KB_crossed() -> None:
    held = list[bool]()
    for seed in range(60):
        draw = random.Random(seed)
        rate, delay_s = mbit(draw.choice((1, 3, 10, 30, 100))), draw.choice((0.0025, 0.01, 0.025, 0.05))
        frames = through(
            engine_traffic(3.0, draw, max(0.5, 4e5 / rate)), lambda _, r=rate: r, lambda _, d=delay_s: d, draw
        )
        found = metered(frames, 2.5).read(2.5)
        held.append(found is not None and not found.is_bound and abs(found.bytes_per_s / rate - 1) <= 0.1)
    assert sum(held) >= 0.9 * len(held)


@pytest.mark.parametrize(("before", "after"), [(1, 30), (30, 1), (10, 3), (3, 100), (100, 3)])
def test_a_step_of_the_rate_is_known_one_second_later(before: float, after: float) -> None:
    within = 0
    for seed in range(8):
        draw = random.Random(seed)
        frames = through(
            engine_traffic(5.0, draw, 0.7), lambda t: mbit(before if t < 3.0 else after), lambda _: 0.01, draw
        )
        found = metered(frames, 4.0).read(4.0)
        assert found is not None
        within += abs(found.bytes_per_s / mbit(after) - 1) <= 0.1
    assert within >= 7


def test_a_gigabit_is_bounded_from_below_and_never_underestimated() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        frames = through(engine_traffic(3.0, draw), lambda _: mbit(1000), lambda _: 0.002, draw)
        found = metered(frames, 2.5).read(2.5)
        assert found is not None
        if found.is_bound:
            assert found.bytes_per_s <= 1.1 * mbit(1000) <= 1.2 * found.most_bytes_per_s
        else:
            assert found.bytes_per_s == pytest.approx(mbit(1000), rel=0.15)


def test_a_slow_link_that_is_always_full_tells_its_rate_from_few_frames() -> None:
    draw = random.Random(1)
    frames = through(engine_traffic(3.0, draw, 0), lambda _: mbit(0.1), lambda _: 0.05, draw)
    found = metered(frames, 3.0).read(3.0)
    assert crossed(frames, 3.0) < 65536
    assert found is not None
    assert not found.is_bound
    assert found.bytes_per_s == pytest.approx(mbit(0.1), rel=0.05)


def test_equal_frames_far_apart_give_a_bound_that_is_one() -> None:
    draw = random.Random(3)
    sent = [(n * 0.04 + draw.uniform(0, 0.01), 3072) for n in range(60)]
    frames = through(sent, lambda _: mbit(50), lambda _: 0.01, draw)
    found = metered(frames, 2.4).read(2.4)
    assert found is not None
    assert found.is_bound
    assert found.bytes_per_s <= mbit(50) <= found.most_bytes_per_s


def test_without_traffic_the_last_estimate_stays_and_its_age_grows() -> None:
    draw = random.Random(4)
    frames = through(engine_traffic(3.0, draw), lambda _: mbit(10), lambda _: 0.01, draw)
    meter = metered(frames, 4.0)
    first, later = meter.read(4.0), meter.read(34.0)
    assert first is not None
    assert later is not None
    assert later.bytes_per_s == first.bytes_per_s == pytest.approx(mbit(10), rel=0.1)
    assert later.age_s == pytest.approx(first.age_s + 30.0)
    assert meter.delay_s(34.0) is None


def test_one_very_late_pick_up_does_not_look_like_a_slow_link() -> None:
    draw = random.Random(5)
    frames = through(engine_traffic(3.0, draw, 0), lambda _: mbit(20), lambda _: 0.01, draw, stall_s=0.0)
    late = [(sent, at + 0.05 if n == len(frames) - 8 else at, size) for n, (sent, at, size) in enumerate(frames)]
    for n in range(len(late) - 7, len(late)):
        late[n] = (late[n][0], max(late[n][1], late[n - 1][1]), late[n][2])
    found = metered(late, 3.1).read(3.1)
    assert found is not None
    assert found.is_bound or found.bytes_per_s >= 0.8 * mbit(20)
    assert found.most_bytes_per_s >= 0.8 * mbit(20)


@pytest.mark.parametrize("jump_s", [-100.0, 100.0])
@pytest.mark.parametrize("whose", ["sender", "own"])
def test_a_clock_that_is_set_costs_at_most_a_second_of_knowledge(jump_s: float, whose: str) -> None:
    draw = random.Random(6)
    frames = through(engine_traffic(5.0, draw), lambda _: mbit(10), lambda _: 0.02, draw)
    jumped = [
        (sent + jump_s * (whose == "sender" and at > 3.0), at + jump_s * (whose == "own" and at > 3.0), size)
        for sent, at, size in frames
    ]
    own_s = jump_s if whose == "own" else 0.0
    meter, offset_s = RateMeter(), OFFSET_S + (jump_s if whose == "sender" else 0.0) - own_s
    for frame, (_, at_s, _) in zip(jumped, frames, strict=True):
        if at_s <= 4.3:
            meter.on_arrival(*frame)
    found, delay_s = meter.read(4.3 + own_s), meter.delay_s(4.3 + own_s)
    assert found is not None
    assert found.bytes_per_s == pytest.approx(mbit(10), rel=0.1)
    assert delay_s is not None
    assert delay_s + offset_s == pytest.approx(0.02, abs=2e-3)


def test_duplicates_and_stragglers_do_not_count() -> None:
    draw = random.Random(7)
    frames = through(engine_traffic(3.0, draw), lambda _: mbit(10), lambda _: 0.02, draw)
    meter, undisturbed = RateMeter(), RateMeter()
    for n, (sent_s, at_s, size) in enumerate(frames):
        meter.on_arrival(sent_s, at_s, size)
        undisturbed.on_arrival(sent_s, at_s, size)
        if n % 5 == 4:
            meter.on_arrival(frames[n - 3][0], at_s, frames[n - 3][2])
            meter.on_arrival(sent_s, at_s, size)
    assert undisturbed.read(3.0) is not None
    assert meter.read(3.0) == undisturbed.read(3.0)
    assert meter.delay_s(3.0) == undisturbed.delay_s(3.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20), st.integers(1, 1 << 20)), max_size=40), st.floats(0, 40))
def test_whatever_the_frames_a_reading_is_finite_and_in_order(frames: list[Frame], now_s: float) -> None:
    meter = RateMeter()
    for frame in frames:
        meter.on_arrival(*frame)
    found = meter.read(now_s)
    if found is not None:
        assert 0 < found.low_bytes_per_s <= found.bytes_per_s <= found.most_bytes_per_s < math.inf
        assert 0 <= found.age_s < math.inf
    delay_s = meter.delay_s(now_s)
    assert delay_s is None or math.isfinite(delay_s)


def view_after(rtt_s: Figure, rate_mbit: float, seed: int, until_s: float) -> LinkView:
    """A device's view of a link both of whose directions carry the engine's traffic; a reply ten times a second."""
    draw, rate = random.Random(seed), mbit(rate_mbit)
    view, worker = LinkView(LinkSpec(0.5, mbit(7), mbit(7)), "given"), RateMeter()
    half = lambda t: rtt_s(t) / 2  # noqa: E731
    up, down = (through(engine_traffic(until_s, draw, 0.7), lambda _: rate, half, draw) for _ in range(2))
    # The worker's clock is OFFSET_S behind: its times are what the device's frames say less that.
    up = [(sent_s - OFFSET_S, at_s + OFFSET_S, size) for sent_s, at_s, size in up]
    now_s = 0.1
    while now_s <= until_s:
        while up and up[0][1] <= now_s - half(now_s) + OFFSET_S:
            worker.on_arrival(*up.pop(0))
        while down and down[0][1] <= now_s:
            view.on_arrival(*down.pop(0))
        fields = Advert.uplink(worker, now_s - half(now_s) + OFFSET_S)
        view.on_reply(now_s, rtt_s(now_s) + draw.expovariate(10), 64000, Advert(1, 0.0, None, 0, **fields))
        now_s += 0.1
    return view


@pytest.mark.parametrize(("before", "after"), [(0.005, 0.1), (0.1, 0.005), (0.02, 0.05)])
@pytest.mark.parametrize("rate_mbit", [3.0, 20.0, 100.0])
def test_a_step_of_the_RTT_is_known_one_second_later_under_load(before: float, after: float, rate_mbit: float) -> None:
    view = view_after(lambda t: before if t < 3.0 else after, rate_mbit, 8, 4.0)
    known = view.figures(4.0)
    assert abs(known.fast.rtt_s - after) <= max(0.1 * after, 2e-3)
    assert known.rtt_age_s <= 0.3
    assert known.pessimistic.rtt_s >= known.fast.rtt_s


def test_a_view_has_both_directions_and_ages() -> None:
    known = view_after(lambda _: 0.04, 10, 9, 3.0).figures(3.0)
    for rate in (known.fast.up_bytes_per_s, known.fast.down_bytes_per_s):
        assert rate == pytest.approx(mbit(10), rel=0.1)
    assert known.pessimistic.up_bytes_per_s <= known.fast.up_bytes_per_s
    assert max(known.up_age_s, known.down_age_s) < 0.5


def test_a_view_that_has_seen_nothing_is_the_prior_of_infinite_age() -> None:
    prior = LinkSpec(0.02, 1e6, 2e6)
    known = LinkView(prior, "assumed: 1 Gbit/s").figures(5.0)
    assert known.fast == known.pessimistic == prior
    assert known.rtt_age_s == known.up_age_s == known.down_age_s == math.inf
    assert known.source == "assumed: 1 Gbit/s"


def test_a_bound_lifts_the_prior_or_leaves_it() -> None:
    draw = random.Random(3)
    sent = [(n * 0.04 + draw.uniform(0, 0.01), 3072) for n in range(60)]
    for prior, lifted in ((1e9, False), (1e3, True)):
        view = LinkView(LinkSpec(0.02, 1e6, prior), "given")
        for frame in through(sent, lambda _: mbit(50), lambda _: 0.01, draw):
            view.on_arrival(*frame)
        known = view.figures(2.4)
        assert known.down_is_bound
        assert (known.fast.down_bytes_per_s > prior) == lifted


@given(st.floats(0.005, 0.2), st.floats(0.005, 0.2), st.integers(0, 99))
def test_the_filter_follows_a_step_within_a_second_at_four_samples_a_second(
    before: float, after: float, seed: int
) -> None:
    draw, rtt = random.Random(seed), RttFilter()
    for n in range(1, 24):
        rtt.add(n / 4, (before if n < 20 else after) + draw.uniform(0, 1e-3))
    assert rtt.fast_s(5.76) == pytest.approx(after, abs=1e-3 + 1e-9)
    assert rtt.age_s(5.80) == pytest.approx(0.05)


@given(st.integers(3, 19))
def test_one_spike_does_not_fool_the_filter_but_shows_in_the_quantile(place: int) -> None:
    rtt = RttFilter()
    for n in range(20):
        rtt.add(n / 4, 1.0 if n == place or n < 2 else 0.02)
    assert rtt.fast_s(19 / 4) == 0.02
    slow_s = rtt.pessimistic_s(19 / 4)
    assert slow_s == 1.0


def test_a_sample_behind_a_large_frame_lowers_the_figure_but_never_raises_it() -> None:
    rtt = RttFilter()
    rtt.add(0.0, 0.1, 500_000)
    assert rtt.fast_s(0.0) is None
    for n in range(4):
        rtt.add(n / 4, 0.05)
    for n in range(4, 12):
        rtt.add(n / 4, 0.4, 500_000)
    assert rtt.fast_s(3.0) == 0.05
    for n in range(12, 15):
        rtt.add(n / 4, 0.01, 500_000)
    assert rtt.fast_s(3.6) == 0.01


def test_after_a_long_queue_one_sample_is_enough_but_not_shortly_after_another() -> None:
    for wait_s, known_s in ((0.4, 0.02), (0.8, 0.05)):
        rtt = RttFilter()
        for n in range(4):
            rtt.add(n / 10, 0.02)
        rtt.add(0.3 + wait_s, 0.05)
        assert rtt.fast_s(0.35 + wait_s) == known_s


def test_a_round_trip_of_several_frames_each_way_needs_no_other_beside_it() -> None:
    for is_sure, known_s in ((False, 0.02), (True, 0.05)):
        rtt = RttFilter()
        rtt.add(0.0, 0.02)
        rtt.add(0.4, 0.05, is_sure=is_sure)
        assert rtt.fast_s(0.4) == known_s


def test_the_delay_stays_known_while_frames_come_as_foretold() -> None:
    draw, meter, known = random.Random(5), RateMeter(), []
    sent = [(n * 0.04 + draw.uniform(0, 0.01), 3072) for n in range(100)]
    frames = through(sent, lambda _: mbit(20), lambda _: 0.03, draw, jitter_s=0, late_s=1e-4, stall_s=0)
    for sent_s, at_s, size in frames:
        meter.on_arrival(sent_s, at_s, size)
        if at_s > 1.5:
            delay_s = meter.delay_s(at_s)
            known.append(delay_s is not None and abs(delay_s + OFFSET_S - 0.03) < 2e-3)
    assert all(known), "a fit is made twice a second then, and what it says of the delay is good for less"


def test_what_an_answer_takes_to_pass_a_slow_link_is_no_part_of_the_RTT() -> None:
    draw = random.Random(4)
    frames = through(engine_traffic(3.0, draw), lambda _: mbit(2), lambda _: 0.02, draw)
    view = LinkView(LinkSpec(0.5, mbit(7), mbit(7)), "given")
    for frame in frames:
        if frame[1] <= 3.0:
            view.on_arrival(*frame)
    view.on_reply(3.0, 0.041, ANSWER_BYTES)
    assert view.figures(3.0).fast.rtt_s == pytest.approx(0.04, abs=2e-4)


def test_a_ping_knows_what_may_have_been_in_front_of_it() -> None:
    pings = Pings()
    first = pings.sent(0.0, 100, 0)
    assert pings.answered(first, 0.02, 60) == (0.02, 160)
    second, third = pings.sent(1.0, 160, 60), pings.sent(1.1, 66_000, 60)
    assert pings.oldest_s() == 1.0
    assert pings.answered(second, 1.2, 120) == (pytest.approx(0.2), 120)
    assert pings.answered(third, 1.3, 180) == (pytest.approx(0.2), 65_840 + 120)
    assert pings.answered(third, 1.4, 180) is None
    assert pings.oldest_s() is None


@given(st.floats(1e4, 1e8), st.integers(0, 99), st.booleans())
def test_probes_stay_below_their_share_while_others_speak(rate: float, seed: int, wants_rate: bool) -> None:
    draw, budget, now_s, total = random.Random(seed), ProbeBudget(0.0), 0.0, 0
    while now_s < 20.0:
        now_s += draw.uniform(0.01, 0.05)
        total += budget.due(now_s, rate, now_s - 0.02, wants_rate=wants_rate) or 0
    assert total <= PROBE_SHARE * rate * now_s + 1
    if PROBE_SHARE * rate * PING_EVERY_S >= 2 * PING_WIRE_BYTES:
        assert total >= PING_WIRE_BYTES * (20.0 / (PING_EVERY_S + 0.05) - 1)


def test_in_silence_a_small_ping_goes_whatever_the_rate_and_is_paid_for_later() -> None:
    budget, sent = ProbeBudget(0.0), list[float]()
    for n in range(1, 101):
        if (size := budget.due(n / 50, 1e3, 0.0)) is not None:
            assert size == PING_WIRE_BYTES
            sent.append(n / 50)
    assert len(sent) == int(2.0 / SILENCE_S - 1e-9) or len(sent) == int(2.0 / SILENCE_S)
    assert budget.due(2.02, 1e3, 2.01) is None


@given(st.lists(st.floats(0.51, 1.99), max_size=50))
def test_figures_that_waver_within_their_class_are_never_announced(factors: list[float]) -> None:
    watch = link_watch()
    assert not watch.changed((1e6, 2e6, 0.05))
    assert not any(watch.changed((1e6 * factor, 2e6 * factor, 0.05 * factor)) for factor in factors)


def test_a_class_moves_with_the_figure_that_was_announced() -> None:
    watch = ClassWatch((1.0,))
    said = [watch.changed((value,)) for value in (10.0, 19.0, 21.0, 19.0, 11.0, 10.4, 22.0, 5.0, 10.1)]
    assert said == [False, False, True, False, False, True, True, True, True]


def test_differences_below_the_floors_are_no_class() -> None:
    watch = link_watch()
    assert not watch.changed(link_figures(LinkSpec(1e-4, 1e6, 1e6)))
    assert not watch.changed(link_figures(LinkSpec(1.9e-3, 1e6, 1e6)))
    load = load_watch()
    assert not load.changed(load_figures(Advert(1, 0.0, None, 0)))
    assert not load.changed(load_figures(Advert(1, 0.001, 5e-5, 0)))
    assert load.changed(load_figures(Advert(2, 0.001, 5e-5, 0)))


def test_a_step_clock_takes_medians_and_adds_up_what_waits() -> None:
    clock = StepClock()
    assert clock.step_s is None
    assert clock.queue_s([1, 1, 64]) == 0.0
    for seconds in (0.02, 0.021, 5.0, 0.02, 0.019):
        clock.ran(1, seconds)
    clock.ran(100, 0.5)
    assert clock.step_s == 0.02
    assert clock.queue_s([1, 64, 1]) == pytest.approx(0.04 + 64 * 0.005)


ADVERT = Advert(2, 0.1, 0.02, 1 << 30, 0.5, 12.5, "RAPL (1 package)", 1e6, 9e5, 1e6, 0.1, 1, -99.5)


@pytest.mark.parametrize("advert", [ADVERT, Advert(0, 0.0, None, 0)])
def test_an_advert_survives_its_header(advert: Advert) -> None:
    assert Advert.from_dict(advert.to_dict()) == advert


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sessions", -1), ("sessions", 1.5), ("sessions", None), ("queue_s", math.inf), ("step_s", "soon"),
        ("battery", 1.5), ("up_bytes_per_s", 0.0), ("up_bytes_per_s", math.nan), ("joules_from", 3), ("colour", 1),
        ("sessions", True),
    ],
)  # fmt: skip
def test_an_advert_with_figures_that_cannot_be_is_refused(field: str, value: float | str | None) -> None:
    with pytest.raises(ProtocolError, match=field):
        Advert.from_dict({**ADVERT.to_dict(), field: value})


def test_an_advert_without_its_first_fields_is_refused() -> None:
    with pytest.raises(ProtocolError, match="queue_s"):
        Advert.from_dict({"sessions": 1})


def test_the_emptiest_battery_of_the_machine_itself_counts(tmp_path: Path) -> None:
    assert battery_share(tmp_path) is None
    for name, kind, capacity, scope in (
        ("AC", "Mains", "", ""), ("BAT0", "Battery", "80", ""), ("BAT1", "Battery", "35", "System"),
        ("mouse", "Battery", "5", "Device"), ("odd", "Battery", "?", ""),
    ):  # fmt: skip
        supply = tmp_path / name
        supply.mkdir()
        (supply / "type").write_text(kind + "\n")
        if capacity:
            (supply / "capacity").write_text(capacity + "\n")
        if scope:
            (supply / "scope").write_text(scope + "\n")
    assert battery_share(tmp_path) == 0.35
