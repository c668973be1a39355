"""Files of recordings: opened, unpacked, and given to the format that knows their first line."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from splitwise_llm.errors import SpecError
from splitwise_llm.traces.lines import Direction, GapError, Gaps, LineError, Lines, Pause
from splitwise_llm.traces.rates import rate_reader
from splitwise_llm.traces.round_trips import rtt_reader
from splitwise_llm.traces.series import RateTrace, RttTrace

_Trace = TypeVar("_Trace", RateTrace, RttTrace)


def read_trace(path: str | Path, direction: Direction, gaps: Gaps = "refuse") -> RateTrace:
    """The trace in a file, plain or gzipped; `direction` chooses where a file has both.

    Raises SpecError, naming file, line and remedy, when there is no such file or it is no trace.
    """
    return parse_trace(recorded_text(path), direction, str(path), gaps)


def named_trace(text: str, direction: Direction) -> RateTrace:
    """The trace that a link's text names: `FILE`, or `FILE:cut` to leave out its pauses. Raises SpecError."""
    path = text.removesuffix(":cut")
    return read_trace(path, direction, "refuse" if path == text else "cut")


def parse_trace(text: str, direction: Direction, name: str = "trace", gaps: Gaps = "refuse") -> RateTrace:
    """The trace in the text of a file; `name` is for messages. Raises SpecError as `read_trace` does."""
    return _parsed(text, name, lambda lines: rate_reader(lines[0][1])(lines, direction, gaps))


def read_rtt(path: str | Path, gaps: Gaps = "refuse") -> RttTrace:
    """The round-trip times in a file, plain or gzipped. Raises SpecError as `read_trace` does."""
    return parse_rtt(recorded_text(path), str(path), gaps)


def parse_rtt(text: str, name: str = "trace", gaps: Gaps = "refuse") -> RttTrace:
    """The round-trip times in the text of a file; `name` is for messages. Raises SpecError as `read_trace` does."""
    return _parsed(text, name, lambda lines: rtt_reader(lines[0][1])(lines, gaps))


def recorded_text(path: str | Path) -> str:
    """The text of a file, plain or gzipped. Raises SpecError, with a remedy, when there is none."""
    try:
        content = Path(path).read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SpecError(f"{path}: a damaged or truncated gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the path of a trace file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not text; a trace is a text file, plain or gzipped") from error


def _parsed(text: str, name: str, read: Callable[[Lines], _Trace]) -> _Trace:
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    lines = [(number, line) for number, line in numbered if line and not line.startswith("#")]
    if not lines:
        raise SpecError(f"{name}: is empty; a trace has at least one line with a time, a rate or a round trip")
    try:
        return read(lines)
    except Pause as error:
        raise GapError(f"{name}:{error.number}: {error}") from error
    except LineError as error:
        raise SpecError(f"{name}:{error.number}: {error}") from error
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from error
    except csv.Error as error:
        raise SpecError(f"{name}: a damaged CSV file ({error}); fetch it again") from error
