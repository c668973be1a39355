"""Numbers with units, read at the rim and written for people; inside everything is SI (seconds, bytes).

Megabits are not megabytes: `mbit` is 10^6 bits, `MB` is 10^6 bytes, `MiB` is 2^20 bytes.
"""

from __future__ import annotations

import math
import re

from splitwise_llm.errors import SpecError

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*$")

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}
_BYTES_PER_S = {
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8,
    "bit/s": 1 / 8, "kbit/s": 1e3 / 8, "mbit/s": 1e6 / 8, "gbit/s": 1e9 / 8,
    "kB/s": 1e3, "MB/s": 1e6, "GB/s": 1e9,
}  # fmt: skip
_BYTES = {
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}


def _read(text: str, units: dict[str, float], what: str, example: str) -> float:
    found = _NUMBER.match(text)
    unit = found.group(2) if found else ""
    if found is None or (unit not in units and unit.lower() not in units):
        raise SpecError(f"{text!r} is not {what}: write a number and one of {', '.join(units)}, as in {example!r}")
    value = float(found.group(1)) * units.get(unit, units.get(unit.lower(), math.nan))
    if not math.isfinite(value):
        raise SpecError(f"{text!r} is not {what}: the number must be finite")
    return value


def parse_seconds(text: str) -> float:
    """Seconds from text such as `20ms`, `1.5s`, `2min`. Raises SpecError."""
    return _read(text, _SECONDS, "a duration", "20ms")


def parse_rate(text: str) -> float:
    """Bytes per second from text such as `20mbit` (2.5e6) or `3MB/s`. Raises SpecError."""
    return _read(text, _BYTES_PER_S, "a rate", "20mbit")


def parse_bytes(text: str) -> int:
    """Bytes from text such as `512MB` or `2GiB`. Raises SpecError."""
    return round(_read(text, _BYTES, "a size", "512MB"))


def show_bytes(count: float) -> str:
    """`12.3 MB`, for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
