"""What a session on the device must remember to survive: the journal. It refuses to know machines, links and policies.

The token ids are enough to go on from any machine: sampling noise is a function of (seed, position), and keys and
values can be computed again. The decisions say which partition computed which positions, the boundaries (in memory
only) save computing all of it again. A file (`splitwise resume` reads it) holds everything but the boundaries, which
can be rebuilt from the ids and are thousands of times their size.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from splitwise_llm.engine import chain
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.chain import Chain, Sound
from splitwise_llm.errors import BrokenInvariant, JournalError, SplitwiseError
from splitwise_llm.model.sampling import Sampling
from splitwise_llm.wire.codec import ElementLoss

FORMAT = 1
EVENTS_KEPT = 1000
"""In memory, the latest; a link may flap for days."""

_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="record"):
    """Base of what a journal's file holds, a line each."""


class Entry(_Record, frozen=True, tag="opening"):
    """What a session was begun with."""

    session: str
    fingerprint: str
    """Of the model."""
    protocol: int
    """Version of what the machines say to each other."""
    prompt: tuple[_Id, ...]
    max_new_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    stop_ids: tuple[_Id, ...] = ()
    sampling: Sampling = Sampling()
    loss: ElementLoss = ElementLoss()
    dtype: str = "fp32"
    weights: str = "full"
    workers: dict[str, str] = {}
    """Addresses by name, in the machines' order."""
    options: dict[str, object] = {}
    """What else the command line needs to go on: model, policy or partition, links, limits. Plain JSON, all finite."""
    began_unix_s: float = 0.0
    """By the wall clock; set where the journal begins."""
    pid: int = 0
    journal: int = FORMAT
    """The version of the file's format; and that it is a journal. The form of a line (`chain`) is for all versions."""


class Delivered(_Record, frozen=True, tag="token"):
    """A token, its position in the context, and when (s since the session began)."""

    id: _Id
    position: int
    at_s: _Seconds


class Decided(_Record, frozen=True, tag="decision"):
    """A run that began: its number, what it runs, from which position on, and why."""

    run: Annotated[int, msgspec.Meta(ge=0)]
    partition: str
    """As text, with the machines' names."""
    wire: str
    prefill_chunk: int | None
    position: Annotated[int, msgspec.Meta(ge=0)]
    """The first that it computes; all before are filled."""
    why: str = ""
    at_s: _Seconds = 0.0
    draft: Annotated[int, msgspec.Meta(ge=0)] = 0
    prefill_wire: str | None = None
    """While the prompt is prefilled; None: `wire`."""


class Event(_Record, frozen=True, tag="event"):
    """Something that happened to the session: an error, a state, a probe."""

    kind: str
    text: str = ""
    at_s: _Seconds = 0.0


class _Resumed(_Record, frozen=True, tag="resumed"):
    """Another process goes on from here."""

    pid: int
    at_s: _Seconds


class _Finished(_Record, frozen=True, tag="finished"):
    """No token follows."""

    reason: str
    at_s: _Seconds


_Line = Entry | Delivered | Decided | Event | _Resumed | _Finished
_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[_Line] = msgspec.json.Decoder(_Line)
_R = TypeVar("_R", Decided, Event)


@dataclass(frozen=True, slots=True)
class Saved:
    """A session as its file tells it."""

    entry: Entry
    tokens: tuple[Delivered, ...]
    decisions: tuple[Decided, ...]
    events: tuple[Event, ...]
    resumed: int
    """How often another process has gone on with it."""
    finished: str
    """Why no token follows; empty for a session that can be resumed."""
    last_s: float
    """When the last of all this was, since the session began."""
    sound: Sound

    @property
    def ids(self) -> list[int]:
        """Prompt and tokens."""
        return [*self.entry.prompt, *(token.id for token in self.tokens)]

    @property
    def last_run(self) -> int:
        """The highest number of a run; a new one is higher."""
        return max((decided.run for decided in self.decisions), default=0)

    @property
    def note(self) -> str:
        """What a person should be told of the file; mostly nothing."""
        torn = self.sound.torn_bytes
        return f"the last record was torn: {torn} bytes of it are left out" if torn else ""


class Journal:
    """A session's memory on the device: the opening, the ids, the decisions, the latest events, the boundaries.

    No error of its file is raised once it was made: `failed` says that the file is no longer kept and why, and an
    event of kind `journal` does. To be used from one thread.
    """

    def __init__(
        self, entry: Entry, boundaries: Boundaries, file: Chain | None = None, clock: Callable[[], float] | None = None
    ) -> None:
        """In memory, or with a file that `create` or `continue_from` opened. `clock` (s) never goes back."""
        self.entry, self.boundaries, self._file = entry, boundaries, file
        self.ids: list[int] = list(entry.prompt)
        """Prompt and tokens, for reading; `token` adds to it."""
        self.times_s: list[float] = []
        """Of the tokens, since the session began."""
        self.decisions: list[Decided] = []
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.finished = ""
        self._clock = clock or time.monotonic
        self._began_s = self._clock()
        self._told_failed = False

    @classmethod
    def create(cls, path: Path, entry: Entry, boundaries: Boundaries, replace: bool = False) -> Journal:
        """A journal with a new file, on the disk (synced) before this returns.

        What exists at `path` is refused, finished or not; with `replace` a journal that no process uses may be.
        Raises JournalError: nothing is lost yet, and who asked for a file should know that there is none.
        """
        entry = _stamped(entry)
        return cls(entry, boundaries, Chain.create(path, _encoder.encode(entry), replace))

    @classmethod
    def continue_from(cls, saved: Saved, path: Path, boundaries: Boundaries) -> Journal:
        """Go on with what `read_journal` found at `path`, in the same file; a torn end is cut off.

        Raises JournalError when it is in use, has changed meanwhile, or has finished.
        """
        if saved.finished:
            raise JournalError(f"{path}: this session has finished ({saved.finished}); there is nothing to go on with")
        journal = cls(saved.entry, boundaries, Chain.reopen(path, saved.sound))
        journal.ids += [token.id for token in saved.tokens]
        journal.times_s += [token.at_s for token in saved.tokens]
        journal.decisions += saved.decisions
        journal.events.extend(saved.events)
        # Between two processes only the wall clock runs, and it may have been set back.
        elapsed_s = max(time.time() - saved.entry.began_unix_s, saved.last_s)
        journal._began_s -= elapsed_s
        journal._write(_Resumed(os.getpid(), journal.now_s))
        return journal

    @property
    def now_s(self) -> float:
        """Seconds since the session began, to the microsecond."""
        return round(self._clock() - self._began_s, 6)

    @property
    def tokens(self) -> Sequence[int]:
        """The ids of the answer so far."""
        return self.ids[len(self.entry.prompt) :]

    @property
    def path(self) -> Path | None:
        """Of the file; None without one."""
        return self._file.path if self._file else None

    @property
    def failed(self) -> str:
        """Why the file is no longer kept; empty while it is, or where there is none."""
        return self._file.failed if self._file else ""

    def token(self, token: int) -> None:
        """A token, before anybody sees it. It survives the death of this process, and mostly that of the machine."""
        if self.finished:
            raise BrokenInvariant(f"a token after a session finished ({self.finished})")
        at_s = round(self._clock() - self._began_s, 6)
        if self._file:  # written out here: on this path every call costs, for a model's weights have swept the caches
            self._file.append(b'{"record":"token","id":%d,"position":%d,"at_s":%.6f}' % (token, len(self.ids), at_s))
            if self._file.failed:
                self._tell_failed()
        self.ids.append(token)
        self.times_s.append(at_s)

    def decide(self, decided: Decided) -> None:
        """A run begins."""
        decided = self._now(msgspec.structs.replace(decided, why=_plain(decided.why)))
        self.decisions.append(decided)
        self._write(decided)

    def event(self, kind: str, text: str = "") -> None:
        """Something happened."""
        event = self._now(Event(_plain(kind), _plain(text)))
        self.events.append(event)
        self._write(event)

    def finish(self, reason: str) -> None:
        """No token follows: the last record; events behind it are kept in memory. A session that gave up but may be
        resumed is closed without."""
        if not reason or self.finished:
            raise BrokenInvariant(f"a session finishes once and for a reason; {self.finished!r}, now {reason!r}")
        self._write(_Finished(_plain(reason), self.now_s))
        self.finished = reason

    def close(self) -> None:
        """Let go of the file, synced: takes as long as a disk does. Nothing happens the second time."""
        if self._file:
            self._file.close()

    def discard(self) -> None:
        """Remove the file of a session that never began; nothing where there is none."""
        self.close()
        if self._file:
            self._file.path.unlink(missing_ok=True)

    def _now(self, record: _R) -> _R:
        return msgspec.structs.replace(record, at_s=self.now_s)

    def _write(self, record: _Line) -> None:
        if self._file and not self.finished:
            self._file.append(_encoder.encode(record))
            if self._file.failed:
                self._tell_failed()

    def _tell_failed(self) -> None:
        if not self._told_failed:
            self._told_failed = True
            self.event("journal", self.failed)


def read_journal(path: Path, live: bool = False) -> Saved:
    """What a journal's file holds. `live`: although a process is writing it.

    Raises JournalError, which says what was found, what was expected and what to do: missing, no journal, of another
    version, empty, cut, edited, out of order, in use.
    """
    found = chain.read(path, live)
    entry = _opening(found.records[0], path)
    tokens: list[Delivered] = []
    decisions: list[Decided] = []
    events: list[Event] = []
    resumed, finished, last_s = 0, "", 0.0
    for number, text in enumerate(found.records[1:], 1):
        record = _read(text, path, number)
        if finished:
            raise _wrong(path, number, "something behind the end of the session")
        match record:
            case Delivered():
                position = len(entry.prompt) + len(tokens)
                if record.position != position or len(tokens) == entry.max_new_tokens:
                    most = f"{entry.max_new_tokens} tokens at most"
                    raise _wrong(path, number, f"a token at position {record.position}, expected {position}, {most}")
                tokens.append(record)
            case Decided():
                decisions.append(record)
            case Event():
                events.append(record)
            case _Resumed():
                resumed += 1
            case _Finished():
                finished = record.reason
            case Entry():
                raise _wrong(path, number, "a second opening")
        last_s = max(last_s, record.at_s)
    return Saved(entry, tuple(tokens), tuple(decisions), tuple(events), resumed, finished, last_s, found)


def check(saved: Saved, fingerprint: str, protocol: int) -> None:
    """Raise JournalError unless a session was begun with this model and version: its text would not be the same."""
    entry = saved.entry
    if entry.fingerprint != fingerprint:
        raise JournalError(
            f"the journal's session ran model {entry.fingerprint}, this one is {fingerprint}; resume it with the model "
            f"it was begun with{_model(entry)}"
        )
    if entry.protocol != protocol:
        raise JournalError(
            f"the journal's session was begun in protocol version {entry.protocol}, this is {protocol}; resume it with "
            f"the version that began it"
        )


def _model(entry: Entry) -> str:
    return f" ({entry.options['model']})" if "model" in entry.options else ""


def _stamped(entry: Entry) -> Entry:
    """The opening as it is written. Raises BrokenInvariant for one that would not be read again."""
    entry = msgspec.structs.replace(entry, began_unix_s=time.time(), pid=os.getpid(), journal=FORMAT)
    try:
        if _decoder.decode(_encoder.encode(entry)) == entry and entry.prompt:
            return entry
    except (TypeError, ValueError, SplitwiseError) as error:
        raise BrokenInvariant(f"an opening that is no plain data: {error}") from error
    raise BrokenInvariant("an opening that is no plain data (a tuple, NaN or infinity in its options), or no prompt")


def _opening(text: bytes, path: Path) -> Entry:
    try:
        head = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        head = None
    if not isinstance(head, dict) or head.get("record") != "opening" or "journal" not in head:
        raise JournalError(f"{path} is no journal of a session; expected what `splitwise generate --journal` wrote")
    if head["journal"] != FORMAT:
        raise JournalError(
            f"{path} is a journal in format {head['journal']}, this version reads {FORMAT}; resume it with the version "
            f"that began it"
        )
    entry = _read(text, path, 0)
    if not isinstance(entry, Entry) or not entry.prompt:
        raise _wrong(path, 0, "no prompt")
    return entry


def _read(text: bytes, path: Path, number: int) -> _Line:
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, SplitwiseError) as error:
        raise _wrong(path, number, str(error)) from error


def _wrong(path: Path, number: int, found: str) -> JournalError:
    return JournalError(f"{path}: record {number} cannot be: {found}; it was not written by this program, begin anew")


def _plain(text: str) -> str:
    """What can be written; a file's name may hold what is no character."""
    return text.encode(errors="replace").decode()
