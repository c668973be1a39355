"""Files that are there whole or not at all. What is in them is not known here."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path | None) -> Iterator[Path | None]:
    """A new empty file beside `path`, to be written; it takes that name when the block ends well, and is removed when
    it does not (Ctrl-C included), so a file that was there survives. A pipe or a device is written as it is, and
    None stays None.

    Raises OSError at once where nothing can be written.
    """
    if path is None or (path.exists() and not path.is_file()):
        if path is not None and path.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(path))
        yield path
        return
    target = path.resolve()  # of a link, what it leads to
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.open("w").close()
    except OSError as error:  # of what was asked for, not of what a person never heard of
        raise type(error)(error.errno, error.strerror, str(path)) from None
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is signal.SIG_DFL:  # which would end the process without a chance to remove anything
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield part
        if target.exists():
            shutil.copymode(target, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGINT, before)


__all__ = ["whole"]
