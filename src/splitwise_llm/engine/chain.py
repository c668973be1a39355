"""An append-only file of JSON records chained by checksums, safe against a torn end. It does not know what they mean.

One record is one line: a JSON object that ends with its number `n` and `crc`, the CRC32 of all records up to and
including this one (their bytes without `crc`), in eight hexadecimal digits. So `jq` reads it, and a record that was
edited, removed, inserted or moved shows. A checksum finds accidents and edits by hand; it is no signature.

What is written here has left the process: each record is one `write`, so killing the process loses nothing. Losing
power loses at most what was not yet synced: a thread syncs within a second of a record, because a sync takes
milliseconds to tenths of seconds and the writer must not wait for it. What is lost so is computed again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from splitwise_llm.errors import BrokenInvariant, JournalError

SYNC_PERIOD_S = 1.0
_LINE = re.compile(rb'(\{.+,"n":([0-9]+)),"crc":"([0-9a-f]{8})"\}')
_ENDING = re.compile(rb',"crc":"[0-9a-f]{8}"\}.')
"""The end of a record, and something behind it on the same line."""


@dataclass(frozen=True, slots=True)
class Sound:
    """What a file holds up to its last whole record."""

    records: tuple[bytes, ...]
    """JSON objects, without number and checksum."""
    size: int
    """Bytes of the file that they take, from its start."""
    crc: int
    torn_bytes: int = 0
    """Behind them: a record that was not written to its end."""


def sound(data: bytes, name: str) -> Sound:
    """The records of a file's bytes. `name` is for messages.

    Raises JournalError unless each is whole and in its place; only the last may be torn, and is left out.
    """
    records: list[bytes] = []
    size, crc = 0, 0
    while size < len(data):
        end = data.find(b"\n", size)
        line = data[size : end if end >= 0 else len(data)]
        match = _LINE.fullmatch(line) if end >= 0 else None
        so_far = crc32(match[1], crc) if match else 0
        if not match or match[3] != b"%08x" % so_far:
            if end in (-1, len(data) - 1) and not _ENDING.search(line):
                break  # the last line, and one record at most: the one that was being written
            raise _unsound(match, len(records), size, name)
        records.append(match[1][: -len(b',"n":' + match[2])] + b"}")
        size, crc = end + 1, so_far
    if not records:
        raise _unsound(None, 0, 0, name)
    return Sound(tuple(records), size, crc, len(data) - size)


def _unsound(match: re.Match[bytes] | None, expected: int, at: int, name: str) -> JournalError:
    if not expected:
        return JournalError(
            f"{name} does not begin with a whole record: it is no journal, or its beginning was cut off or edited, or "
            f"the process died while it began; begin anew"
        )
    found = "bytes that are no whole record"
    if match:
        number = int(match[2])
        found = f"record {number} with a wrong checksum" if number == expected else f"record {number}"
    return JournalError(
        f"{name}: {found} at byte {at}, where record {expected} was expected, and not at the end of the file: it was "
        f"cut or edited. What is before is whole: its first {at} bytes are a journal that can be resumed (`head -c "
        f"{at}`)"
    )


class Chain:
    """The one writer of a file. No error of the file leaves `append`: `failed` says what it was, and then no more is
    written and what was half written is taken back. To be used from one thread, and closed."""

    def __init__(self, path: Path, descriptor: int, end: Sound) -> None:
        self.path = path
        self.failed = ""
        self._descriptor, self._size, self._crc, self._count = descriptor, end.size, end.crc, len(end.records)
        self._dirty, self._closing = threading.Event(), threading.Event()
        self._is_dirty = self._is_closed = False  # the events, at less cost for every record
        self._syncing = threading.Thread(target=self._keep_synced, name=f"sync {path.name}", daemon=True)
        self._syncing.start()

    @classmethod
    def create(cls, path: Path, first: bytes, replace: bool = False) -> Chain:
        """A new file, readable for its owner only, that holds a first record.

        What exists at `path` is refused, finished or not, for it is somebody's text; with `replace` it may be a file
        whose first line is a record, that no process has open. An empty file needs no permission.
        Raises JournalError.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            descriptor = _open(path)
        except OSError as error:
            raise JournalError(f"{path}: a journal cannot be created there: {error.strerror}") from error
        chain = None
        try:
            _lock(descriptor, path)
            head = os.pread(descriptor, 1 << 20, 0)
            if head and not replace:
                raise JournalError(f"{path} exists; name another file, or say that it may be replaced")
            if head and not _LINE.match(head.split(b"\n")[0]):
                raise JournalError(f"{path} is no journal and is not replaced; name another file")
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, 0)
            chain = cls(path, descriptor, Sound((), 0, 0))
            chain.append(first)
            if chain.failed:
                raise JournalError(chain.failed)
            os.fsync(descriptor)
            _sync_directory(path)
        except BaseException as error:
            if chain:
                chain.close()
            else:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise JournalError(f"{path}: a journal cannot be created there: {error.strerror}") from error
            raise
        return chain

    @classmethod
    def reopen(cls, path: Path, expected: Sound) -> Chain:
        """Go on behind what `read` found, with a torn end cut off.

        Raises JournalError when a process has it open, or when it is no longer what was read.
        """
        descriptor = _open(path)
        try:
            _lock(descriptor, path)
            if sound(_whole(descriptor), str(path)) != expected:
                raise JournalError(f"{path} has changed since it was read; resume it again")
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, expected.size)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise JournalError(f"{path} cannot be gone on with: {error.strerror}") from error
            raise
        return cls(path, descriptor, expected)

    def append(self, record: bytes) -> None:
        """Write one record, a JSON object on one line with at least one field. Nothing once `failed`."""
        if self.failed:
            return
        if self._is_closed:
            raise BrokenInvariant(f"{self.path} is closed")
        body = b'%b,"n":%d' % (record[:-1], self._count)
        crc = crc32(body, self._crc)
        line = b'%b,"crc":"%08x"}\n' % (body, crc)
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            self.failed = f"{self.path} is no longer written: {error.strerror}"
            with contextlib.suppress(OSError):  # at worst the end is torn, which a reader understands
                os.ftruncate(self._descriptor, self._size)
            return
        self._size, self._crc, self._count = self._size + len(line), crc, self._count + 1
        if not self._is_dirty:
            self._is_dirty = True
            self._dirty.set()

    def close(self) -> None:
        """Sync, and let go of the file; may take as long as a sync. Nothing happens the second time."""
        if self._is_closed:
            return
        self._is_closed = True
        self._closing.set()
        self._dirty.set()
        self._syncing.join()
        self._sync()
        os.close(self._descriptor)

    def _keep_synced(self) -> None:
        while self._dirty.wait():
            if self._closing.wait(SYNC_PERIOD_S):
                return
            self._dirty.clear()
            self._is_dirty = False  # before the sync: what is written during it needs another
            self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self.failed = self.failed or f"{self.path} is no longer written: {error.strerror}"


def read(path: Path, live: bool = False) -> Sound:
    """What a file holds. `live`: it may be open in the process that writes it; then its end may be torn, or not.

    Raises JournalError: missing, no journal, damaged, or in use.
    """
    descriptor = _open(path, os.O_RDONLY)
    try:
        if not live:
            _lock(descriptor, path, fcntl.LOCK_SH)
        data = _whole(descriptor)
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if not data:
        raise JournalError(f"{path} is empty: its session never began; begin anew")
    return sound(data, str(path))


def _open(path: Path, access: int = os.O_RDWR | os.O_APPEND) -> int:
    try:
        descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise JournalError(f"{path} cannot be opened: {error.strerror}; expected a session's journal") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise JournalError(f"{path} is no regular file; expected a session's journal")
    return descriptor


def _lock(descriptor: int, path: Path, kind: int = fcntl.LOCK_EX) -> None:
    """Take the file, for as long as the descriptor is open: the kernel lets go of it when the process dies."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pids = re.findall(rb'"pid":([0-9]+)', _whole(descriptor))
        who = f"process {pids[-1].decode()}" if pids else "another process"
        raise JournalError(f"{path} is in use by {who}; end it first, or wait until it has finished") from error
    if os.fstat(descriptor).st_nlink == 0:
        raise JournalError(f"{path} was removed just now; try again")


def _whole(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _sync_directory(path: Path) -> None:
    """So that the name survives a loss of power, too."""
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
