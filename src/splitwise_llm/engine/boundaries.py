"""The residual streams a machine has sent, encoded as they were sent, within a bound. It knows no plan and no link.

What is dropped here can be rebuilt from the token ids; it only takes longer.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

from splitwise_llm.decision import WirePrecision
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.wire import codec

_BLOCK_ROWS = 64
"""Smaller pieces are joined, once as many were put, so that a row costs its bytes and not the objects around them."""
_END = 1 << 62


class _Piece(NamedTuple):
    """Positions `start` to `stop` in one payload."""

    start: int
    stop: int
    precision: WirePrecision
    payload: bytes | memoryview


@dataclass(slots=True)
class _Kept:
    """What is kept of one half: pieces by position, of which no two overlap."""

    touched: int
    pieces: list[_Piece] = field(default_factory=list)
    loose: int = 0
    """Pieces put since small ones were last joined."""


class Boundaries:
    """Encoded residual streams (positions, d_model) by the half-layer that they go into: the boundary before half h.

    A position of a half is kept once; the newest payload wins. `limit_bytes` bounds the payloads. Beyond it go, whole,
    the halves that are idle (nothing was put or taken there for two rounds of all halves), the longest idle first.
    Where none is, pieces go from the front of the half whose front is furthest from position 0 (of equals, the lowest
    half, which is the cheapest to rebuild from the ids): one boundary is lost entirely before another is touched.
    `dropped_bytes` counts both.

    To be used from one thread. Payloads are kept as they are given, not copied: they must not change.
    """

    def __init__(self, d_model: int, limit_bytes: int) -> None:
        self.d_model, self.limit_bytes = d_model, limit_bytes
        self.bytes_held = 0
        self.dropped_bytes = 0
        self._halves: dict[int, _Kept] = {}
        self._clock = 0
        self._row_bytes = {precision: precision.payload_bytes(1, d_model) for precision in WirePrecision}

    def put(self, half: int, start: int, rows: int, precision: WirePrecision, payload: bytes | memoryview) -> None:
        """Keep the stream into `half` at positions `start` to `start + rows`, as `codec.encode` wrote it.

        Raises BrokenInvariant for a payload of another length.
        """
        size = len(payload)
        if rows < 1 or start < 0 or size != rows * self._row_bytes[precision]:
            raise BrokenInvariant(f"{size} bytes of {precision} for positions {start} to {start + rows}")
        self._clock += 1
        kept = self._halves.get(half)
        if kept is None:
            kept = self._halves[half] = _Kept(self._clock)
        kept.touched = self._clock
        piece = _Piece(start, start + rows, precision, payload)
        if kept.pieces and start < kept.pieces[-1].stop:
            self._cut(kept, start, start + rows)
            kept.pieces.insert(bisect_right(kept.pieces, start, key=_start), piece)
        else:
            kept.pieces.append(piece)
        self.bytes_held += size
        kept.loose += 1
        if kept.loose >= _BLOCK_ROWS:
            self._join(kept)
        if self.bytes_held > self.limit_bytes:
            self._make_room()

    def covers(self, half: int, start: int, stop: int) -> bool:
        """Whether every position `start` to `stop` of a half is kept."""
        if stop <= start:
            return True
        for piece in self._from(half, start):
            if piece.start > start:
                return False
            start = piece.stop
            if start >= stop:
                return True
        return False

    def kept(self, half: int) -> tuple[tuple[int, int], ...]:
        """The ranges (start, stop) of positions kept of a half, ascending, as long as they go."""
        ranges: list[tuple[int, int]] = []
        for piece in self._from(half, 0):
            if ranges and ranges[-1][1] == piece.start:
                ranges[-1] = (ranges[-1][0], piece.stop)
            else:
                ranges.append((piece.start, piece.stop))
        return tuple(ranges)

    @property
    def halves(self) -> tuple[int, ...]:
        """The halves of which anything is kept, ascending."""
        return tuple(sorted(self._halves))

    def take(self, half: int, start: int, stop: int) -> tuple[WirePrecision, bytes]:
        """The stream into `half` at positions `start` to `stop`, in one payload, exactly as it was sent.

        Where it was sent in several precisions it is written in FP32, which holds each of them exactly.
        Raises BrokenInvariant for what is not kept (ask `covers`), and for no positions.
        """
        if stop <= start or not self.covers(half, start, stop):
            raise BrokenInvariant(f"positions {start} to {stop} before half {half}; kept are {self.kept(half)}")
        self._clock += 1
        self._halves[half].touched = self._clock
        pieces: list[_Piece] = []
        for piece in self._from(half, start):
            if piece.start >= stop:
                break
            pieces.append(self._part(piece, max(piece.start, start), min(piece.stop, stop)))
        precisions = {piece.precision for piece in pieces}
        wire = precisions.pop() if len(precisions) == 1 else WirePrecision.FP32
        if len(pieces) == 1:
            return wire, bytes(pieces[0].payload)
        return wire, codec.glue([(self._in(wire, p), p.stop - p.start) for p in pieces], wire, self.d_model)

    def truncate(self, position: int) -> None:
        """Forget all positions from `position` on."""
        for half, kept in list(self._halves.items()):
            self._cut(kept, position, _END)
            if not kept.pieces:
                del self._halves[half]

    def drop(self, half: int) -> None:
        """Forget a half; nothing happens if nothing of it is kept."""
        kept = self._halves.pop(half, None)
        if kept:
            self.bytes_held -= sum(len(piece.payload) for piece in kept.pieces)

    def _from(self, half: int, start: int) -> list[_Piece]:
        """The pieces of a half that end after `start`."""
        kept = self._halves.get(half)
        return kept.pieces[bisect_right(kept.pieces, start, key=_stop) :] if kept else []

    def _part(self, piece: _Piece, start: int, stop: int) -> _Piece:
        """Positions `start` to `stop` of a piece; copied where they are not all, so that the rest can go."""
        if (start, stop) == (piece.start, piece.stop):
            return piece
        rows, first = piece.stop - piece.start, start - piece.start
        cut = codec.rows(piece.payload, piece.precision, rows, self.d_model, first, stop - piece.start)
        return _Piece(start, stop, piece.precision, cut)

    def _in(self, wire: WirePrecision, piece: _Piece) -> bytes | memoryview:
        if piece.precision is wire:
            return piece.payload
        rows = piece.stop - piece.start
        return codec.encode(codec.decode(piece.payload, piece.precision, rows, self.d_model).float(), wire)

    def _cut(self, kept: _Kept, start: int, stop: int) -> None:
        """Take positions `start` to `stop` out of a half."""
        first = bisect_right(kept.pieces, start, key=_stop)
        last = first
        left: list[_Piece] = []
        while last < len(kept.pieces) and kept.pieces[last].start < stop:
            piece = kept.pieces[last]
            if piece.start < start:
                left.append(self._part(piece, piece.start, start))
            if piece.stop > stop:
                left.append(self._part(piece, stop, piece.stop))
            self.bytes_held -= len(piece.payload)
            last += 1
        self.bytes_held += sum(len(piece.payload) for piece in left)
        kept.pieces[first:last] = left

    def _join(self, kept: _Kept) -> None:
        """Join neighbouring small pieces of one precision to blocks. Blocks and large pieces are not copied again."""
        joined: list[_Piece] = []
        group: list[_Piece] = []
        rows = 0

        def settle() -> None:
            nonlocal rows
            if len(group) > 1:
                wire = group[0].precision
                payload = codec.glue([(p.payload, p.stop - p.start) for p in group], wire, self.d_model)
                joined.append(_Piece(group[0].start, group[-1].stop, wire, payload))
            else:
                joined.extend(group)
            group.clear()
            rows = 0

        for piece in kept.pieces:
            size = piece.stop - piece.start
            if group and (
                rows >= _BLOCK_ROWS
                or size >= _BLOCK_ROWS
                or group[-1].stop != piece.start
                or group[0].precision is not piece.precision
            ):
                settle()
            group.append(piece)
            rows += size
        settle()
        kept.pieces = joined
        kept.loose = 0

    def _make_room(self) -> None:
        while self.bytes_held > self.limit_bytes:
            half, kept = min(self._halves.items(), key=lambda one: one[1].touched)
            held = self.bytes_held
            if self._clock - kept.touched > 2 * len(self._halves):
                self.drop(half)
            else:
                half, kept = max(self._halves.items(), key=lambda one: (one[1].pieces[0].start, -one[0]))
                self.bytes_held -= len(kept.pieces.pop(0).payload)
                if not kept.pieces:
                    del self._halves[half]
            self.dropped_bytes += held - self.bytes_held


def _start(piece: _Piece) -> int:
    return piece.start


def _stop(piece: _Piece) -> int:
    return piece.stop
