"""Kept residual streams: a position once, the newest wins, exactly as sent, within a bound that costs little."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.decision import WirePrecision
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.wire.codec import decode, encode

COLUMNS = 5
PLENTY = 1 << 30
FP32 = WirePrecision.FP32


def stream(rows: int, seed: int, wire: WirePrecision = FP32) -> bytes:
    return encode(torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)), wire)


def put_rows(kept: Boundaries, half: int, start: int, stop: int) -> None:
    for position in range(start, stop):
        kept.put(half, position, 1, FP32, stream(1, position))


Row = tuple[WirePrecision, list[float]]
puts = st.tuples(
    st.just("put"),
    st.integers(0, 2),
    st.integers(0, 150),
    st.sampled_from([1, 1, 1, 2, 7, 63, 64, 90]),
    st.sampled_from([FP32, FP32, WirePrecision.BF16, WirePrecision.INT8, WirePrecision.INT4]),
)
decoding = st.tuples(
    st.just("decode"), st.integers(0, 1), st.integers(0, 150), st.integers(30, 140), st.sampled_from([FP32, "int8"])
)
acts = st.one_of(
    puts,
    decoding,
    st.tuples(st.just("truncate"), st.integers(0, 200)),
    st.tuples(st.just("drop"), st.integers(0, 3)),
    st.tuples(st.just("take"), st.integers(0, 3), st.integers(0, 200), st.integers(1, 100)),
)


@settings(max_examples=150)
@given(st.lists(acts, max_size=12), st.sampled_from([PLENTY, PLENTY, 0, 900, 4000]))
def test_what_is_kept_is_what_a_table_by_half_and_position_would_keep(acts: list[tuple], limit: int) -> None:
    kept = Boundaries(COLUMNS, limit)
    model: dict[int, dict[int, Row]] = {}
    seed = put_bytes = 0

    def put(half: int, start: int, rows: int, wire: WirePrecision) -> None:
        nonlocal seed, put_bytes
        seed += 1
        payload = stream(rows, seed, wire)
        put_bytes += len(payload)
        kept.put(half, start, rows, wire, memoryview(payload) if seed % 2 else payload)
        decoded = decode(payload, wire, rows, COLUMNS).float().tolist()
        model.setdefault(half, {}).update({start + i: (wire, row) for i, row in enumerate(decoded)})

    for act in acts:
        match act:
            case ("put", half, start, rows, wire):
                put(half, start, rows, wire)
            case ("decode", half, start, rows, wire):
                for position in range(start, start + rows):
                    put(half, position, 1, WirePrecision(wire))
            case ("truncate", position):
                kept.truncate(position)
                model = {h: {p: row for p, row in rows.items() if p < position} for h, rows in model.items()}
            case ("drop", half):
                kept.drop(half)
                model.pop(half, None)
            case ("take", half, start, count) if kept.covers(half, start, start + count):
                kept.take(half, start, start + count)
        if limit < PLENTY:  # what had to go is any of it, but never another payload
            here = {h: {p for a, b in kept.kept(h) for p in range(a, b)} for h in model}
            assert all(here[h] <= set(model[h]) for h in model)
            model = {h: {p: rows[p] for p in here[h]} for h, rows in model.items()}
        held = sum(wire.payload_bytes(1, COLUMNS) for rows in model.values() for wire, _ in rows.values())
        assert kept.bytes_held == held <= limit
        assert kept.halves == tuple(sorted(half for half, rows in model.items() if rows))

    assert kept.dropped_bytes <= put_bytes
    assert not kept.dropped_bytes or limit < PLENTY
    for half in range(4):
        rows = model.get(half, {})
        assert [p for a, b in kept.kept(half) for p in range(a, b)] == sorted(rows)
        assert kept.kept(half) == tuple(sorted(set(kept.kept(half))))
        for start, stop in kept.kept(half):
            assert kept.covers(half, start, stop)
            assert not kept.covers(half, start, stop + 1)
            for a, b in {(start, stop), (start, start + 1), (stop - 1, stop), ((start + stop) // 2, stop)}:
                wire, payload = kept.take(half, a, b)
                sent = {rows[p][0] for p in range(a, b)}
                assert wire is (sent.pop() if len(sent) == 1 else FP32)
                assert decode(payload, wire, b - a, COLUMNS).float().tolist() == [rows[p][1] for p in range(a, b)]


def test_what_is_not_kept_cannot_be_taken() -> None:
    kept = Boundaries(COLUMNS, PLENTY)
    kept.put(4, 10, 5, FP32, stream(5, 0))
    for half, start, stop in [(3, 10, 12), (4, 9, 12), (4, 14, 16), (4, 12, 12)]:
        with pytest.raises(BrokenInvariant, match="kept are"):
            kept.take(half, start, stop)
    assert kept.covers(4, 10, 10)
    assert not kept.covers(5, 0, 1)
    kept.drop(5)


def test_a_payload_of_another_length_is_refused() -> None:
    kept = Boundaries(COLUMNS, PLENTY)
    for rows, size in [(2, COLUMNS * 4), (0, 0), (1, COLUMNS * 4 + 1)]:
        with pytest.raises(BrokenInvariant, match="bytes of fp32"):
            kept.put(0, 0, rows, FP32, bytes(size))
    assert kept.bytes_held == 0


@pytest.mark.parametrize("start", [0, 10])
def test_putting_a_chunk_keeps_the_payload_that_was_sent_and_not_a_copy(start: int) -> None:
    kept, payload = Boundaries(COLUMNS, PLENTY), stream(100, 0)
    put_rows(kept, 2, 0, start)
    kept.put(2, start, 100, FP32, payload)
    put_rows(kept, 2, start + 100, 300)
    assert kept.take(2, start, start + 100)[1] is payload
    assert kept.covers(2, 0, 300)


def test_rows_are_joined_only_with_their_neighbours() -> None:
    kept = Boundaries(COLUMNS, PLENTY)
    for start, stop in [(0, 30), (40, 70), (71, 80), (90, 160)]:
        put_rows(kept, 2, start, stop)
    assert kept.kept(2) == ((0, 30), (40, 70), (71, 80), (90, 160))
    for position in (0, 29, 40, 69, 71, 79, 90, 159):
        assert kept.take(2, position, position + 1) == (FP32, stream(1, position))


def test_a_half_that_is_no_longer_in_use_goes_before_any_piece_of_one_that_is() -> None:
    row = COLUMNS * 4
    kept = Boundaries(COLUMNS, 300 * row)
    put_rows(kept, 4, 0, 50)  # an old partition's
    put_rows(kept, 6, 0, 50)  # another's
    for position in range(20):
        kept.put(8, position, 1, FP32, stream(1, 0))
    kept.take(4, 0, 10)  # the older one is used once more
    for position in range(20, 210):
        kept.put(8, position, 1, FP32, stream(1, 0))
    assert kept.halves == (4, 8)
    assert kept.dropped_bytes == 50 * row
    for position in range(210, 260):
        kept.put(8, position, 1, FP32, stream(1, 0))
    assert kept.kept(8) == ((0, 260),)
    assert kept.halves == (8,)


def test_of_two_boundaries_in_use_one_is_lost_entirely_before_the_other_is_touched() -> None:
    row = COLUMNS * 4
    kept = Boundaries(COLUMNS, 300 * row)
    for position in range(299):
        for half in (4, 20):
            kept.put(half, position, 1, FP32, stream(1, 0))
        assert kept.bytes_held <= 300 * row
        assert kept.covers(20, 0, position + 1)
    for position in range(299, 500):
        kept.put(20, position, 1, FP32, stream(1, 0))
        assert kept.covers(20, position, position + 1)
    assert 200 * row < kept.bytes_held <= 300 * row


def test_rows_filled_in_behind_others_and_rows_after_a_truncation_are_joined_as_well() -> None:
    kept = Boundaries(COLUMNS, PLENTY)
    put_rows(kept, 4, 1000, 1300)
    put_rows(kept, 4, 0, 1000)
    kept.truncate(500)
    put_rows(kept, 4, 500, 2000)
    assert kept.kept(4) == ((0, 2000),)
    assert len(kept._halves[4].pieces) < 2000 / 64 + 64


def test_a_row_costs_its_bytes_and_not_the_objects_around_them() -> None:
    kept = Boundaries(COLUMNS, PLENTY)
    put_rows(kept, 4, 0, 6400)
    pieces = kept._halves[4].pieces
    assert sum(map(sys.getsizeof, (p.payload for p in pieces))) + 100 * len(pieces) < 1.5 * kept.bytes_held
    assert kept.covers(4, 0, 6400)
    assert decode(kept.take(4, 0, 6400)[1], FP32, 6400, COLUMNS)[777].tolist() == (
        decode(stream(1, 777), FP32, 1, COLUMNS)[0].tolist()
    )
