"""What machines say to each other: small typed headers, and raw payload bytes behind them. Never pickle.

A frame is four bytes of header length (little endian), the header as MessagePack, and the payload
to the end. Decoding is strict: unknown fields, wrong types and impossible lengths are ProtocolErrors.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from splitwise_llm.decision import MAX_DRAFT
from splitwise_llm.errors import BrokenInvariant, ProtocolError
from splitwise_llm.plan import Kind
from splitwise_llm.records import Interval

PROTOCOL_VERSION = 5
_LENGTH = struct.Struct("<I")
_INTERVAL = struct.Struct("<iiidd")
_MAX_HEADER_BYTES = 1 << 20
MAX_PRIORITY = 3
MAX_PING_BYTES = 16 << 20

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
MachineNumber = Annotated[int, msgspec.Meta(ge=0, lt=256)]
_Word = Annotated[str, msgspec.Meta(max_length=200)]
Figures = Annotated[dict[_Word, float | int | _Word | None], msgspec.Meta(max_length=64)]
"""A `DeviceSpec`, field by field; whoever takes one in checks it as such."""


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all headers."""


class Hello(_Header, frozen=True, tag="hello"):
    """Device to worker, first: who speaks, in which version, about which model."""

    protocol: int
    fingerprint: str


class Welcome(_Header, frozen=True, tag="welcome"):
    """Worker to device: the same in return, and what the worker can do."""

    protocol: int
    fingerprint: str
    dtype: str
    weights: str
    memory_bytes: int
    max_frame_bytes: Count
    threads: int
    emulated: str
    """What `--emulate` was given, empty for a machine that plays itself."""
    figures: Figures | None = None
    """What it can do; None where nobody has measured it."""
    stretch: Annotated[float, msgspec.Meta(ge=1.0, le=1e6)] = 1.0
    """Its compute takes so many times as long as `figures` say."""
    sessions: Count = 0
    """Open with other devices."""


class Open(_Header, frozen=True, tag="open"):
    """Device to worker: the session that this link is for, and which machine the worker is in it. A worker that
    knows the session goes on with what it still holds; whoever knows the id may."""

    session: str
    machine: MachineNumber
    names: list[str]
    capacity: Count
    """Positions: the prompt and all that may follow."""
    stop_ids: list[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    element_loss: float
    loss_seed: int
    priority: Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)] = 0
    """Its prompts get 2^priority times the turns that those of others get."""


class Held(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Positions whose keys and values of some units of one half a machine has."""

    half: Count
    units: tuple[int, ...]
    filled: Count


class Streams(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Positions (start, stop) of the residual stream before one half that a machine has kept as it crossed."""

    half: Count
    spans: tuple[tuple[int, int], ...]


class Away(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the last token loop made, of which the device may not have heard, as it went on without it or ended as the
    link died: ids from position `start` on, those that got through among them. What the worker holds is as if all of
    them were right."""

    run: Count
    start: Count
    ids: Annotated[list[Count], msgspec.Meta(min_length=1)]


class Opened(_Header, frozen=True, tag="opened"):
    """Worker to device: the session is open (or, to another worker: joined), and this is what is held of it."""

    known: bool = False
    """Whether it was open before."""
    held: list[Held] = []
    streams: list[Streams] = []
    away: Away | None = None


class Begin(_Header, frozen=True, tag="begin"):
    """Device to worker: a run. The machines walk ids `start` to `known` through a plan and then decode; a fill walks
    halves `first` to `stop` only, and nothing comes out of it."""

    run: Count
    partition: bytes
    wire: str
    prefill_chunk: Count
    """0: all at once."""
    start: Count
    known: Count
    tokens: Count
    """To be generated at most; 0 for a fill."""
    draft: Annotated[int, msgspec.Meta(ge=0, le=MAX_DRAFT)] = 0
    """Tokens that may be drafted before each decode step."""
    first: Count = 0
    stop: Count = 0
    """0: to the end."""
    feeder: Annotated[int, msgspec.Meta(ge=-1, lt=256)] = -1
    """Who has kept the stream before `first`; -1: nobody, the ids are to be embedded."""
    last: list[MachineNumber] = []
    """Who takes part in the last half of a fill, where it is shared; empty: all."""
    direct: list[tuple[int, int]] = []
    """Pairs of workers that reach each other without the device."""
    prefill_wire: str = ""
    """Of prefill chunks; empty: `wire`."""
    dial: dict[int, str] = {}
    """Address of each machine that this worker is to dial for such a pair."""


class Begun(_Header, frozen=True, tag="begun"):
    """Worker to device: the slices of a run are resident."""

    run: Count
    load_s: float


class Filled(_Header, frozen=True, tag="filled"):
    """Worker to device: its part of a fill is done."""

    run: Count


class Fetch(_Header, frozen=True, tag="fetch"):
    """Device to worker: send keys and values of these units of a half, positions `start` to `stop`, as `Rows`."""

    half: Count
    units: list[int]
    start: Count
    stop: Count


class Rows(_Header, frozen=True, tag="rows"):
    """Either way: keys, then values of units of a half, each (units, positions, head_dim) in the format computed in.
    A worker puts them where the next run's partition wants them."""

    half: Count
    units: list[int]
    start: Count
    stop: Count
    partition: bytes = b""
    """To a worker: of the run they are for."""


class Halt(_Header, frozen=True, tag="halt"):
    """Device to worker: end a run at the next token, or at once where no token is being made here; say what was
    counted."""

    run: Count
    at_once: bool = False
    """Something has failed: no next token may come."""
    keep: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)] = -1
    """Positions whose ids are certain; what was drafted behind them was not accepted, or another text has gone on from
    there. -1: as far as the worker knows itself."""


class Ping(_Header, frozen=True, tag="ping"):
    """Device to worker, at any time after the greeting: answer at once. The payload is any; a link is measured with
    it."""

    reply_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_PING_BYTES)]
    stamp: Count = 0
    """Comes back with the answer."""


class Pong(_Header, frozen=True, tag="pong"):
    """Worker to device: the answer, with a payload of as many bytes as were asked for, and how the worker is."""

    stamp: Count = 0
    advert: Figures | None = None
    """An `Advert`, field by field."""


class Join(_Header, frozen=True, tag="join"):
    """Worker to worker, first on a direct link: which session it is for, and who speaks. The answer is `Opened`."""

    session: str
    machine: MachineNumber


class Data(_Header, frozen=True, tag="data"):
    """One move of a step; the payload is activations (shape `rows` x `columns`) or ids (`rows` of int32)."""

    run: Count
    step: Count
    after: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]
    kind: str
    src: MachineNumber
    dst: MachineNumber
    depth: Count
    """One-way trips on the longest chain of messages behind this one, counted from the session's start."""
    dtype: str
    rows: Count
    columns: Count
    start: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)] = -1
    """The first position of a decode step in a run that drafts; -1: as the plan says."""


class Crossed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Messages and payload bytes of one kind after one stage over one directed link."""

    after: int
    kind: Kind
    src: int
    dst: int
    count: int
    payload_bytes: int


class Halted(_Header, frozen=True, tag="halted"):
    """Worker to device: a run is over here. What it sent in it, and what it holds now; the payload says when it
    computed, as `pack_intervals` writes it."""

    run: Count
    crossed: list[Crossed]
    frame_bytes: int
    held: list[Held] = []
    streams: list[Streams] = []
    rounds: list[tuple[Count, Count]] = []
    """Of a token loop here that drafts: positions computed and tokens made in each decode step."""


class Close(_Header, frozen=True, tag="close"):
    """Device to worker: the session is over, and what it held may be forgotten."""


class Closed(_Header, frozen=True, tag="closed"):
    """Worker to device: good-bye, and the most memory it held."""

    peak_memory_bytes: int


class Failed(_Header, frozen=True, tag="failed"):
    """Either way: the session cannot go on; `error` is a class of `errors.py`."""

    error: str
    message: str
    retry_after_s: float | None = None
    """When to come back, of a worker that is full."""
    run: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)] = -1
    """What cannot go on is this run; -1: the session."""
    machine: Annotated[int, msgspec.Meta(ge=-1, lt=256)] = -1
    """The worker that this one does not reach directly, though the run says so; -1: it is something else."""


H = TypeVar("H", bound=_Header)
Header = (
    Hello | Welcome | Open | Opened | Begin | Begun | Filled | Fetch | Rows | Halt | Halted
    | Ping | Pong | Join | Data | Close | Closed | Failed
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)


def pack(header: Header, payload: bytes = b"") -> bytes:
    """A frame."""
    head = _encoder.encode(header)
    if len(head) > _MAX_HEADER_BYTES:
        raise BrokenInvariant(
            f"a {type(header).__name__} header of {len(head)} bytes; what grows belongs in the payload"
        )
    return b"".join((_LENGTH.pack(len(head)), head, payload))


def unpack(frame: bytes) -> tuple[Header, memoryview]:
    """Header and payload of a frame. Raises ProtocolError for anything that is not one."""
    if len(frame) < _LENGTH.size:
        raise ProtocolError(f"a frame of {len(frame)} bytes is too short to hold a header")
    (length,) = _LENGTH.unpack_from(frame)
    if not 0 < length <= min(len(frame) - _LENGTH.size, _MAX_HEADER_BYTES):
        raise ProtocolError(f"a frame of {len(frame)} bytes names a header of {length}")
    view = memoryview(frame)
    try:
        header = _decoder.decode(view[_LENGTH.size : _LENGTH.size + length])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the header of a frame cannot be read: {error}") from error
    return header, view[_LENGTH.size + length :]


def pack_intervals(intervals: Sequence[Interval]) -> bytes:
    """Run, stage and step (int32), start and stop (seconds, float64) of each, one after the other."""
    return b"".join(_INTERVAL.pack(one.run, one.stage, one.step, one.start_s, one.stop_s) for one in intervals)


def unpack_intervals(payload: memoryview) -> tuple[Interval, ...]:
    """The inverse of `pack_intervals`. Raises ProtocolError."""
    if len(payload) % _INTERVAL.size:
        raise ProtocolError(f"{len(payload)} bytes are no whole number of intervals")
    return tuple(
        Interval(stage, step, start_s, stop_s, run)
        for run, stage, step, start_s, stop_s in _INTERVAL.iter_unpack(payload)
    )
