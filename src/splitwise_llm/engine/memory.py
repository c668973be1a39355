"""How much memory this process used at most and how much the machine has left, as the kernel says."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS, _MEMINFO, _CLEAR = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/clear_refs")


def _kilobytes(path: Path, field: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def peak_memory_bytes() -> int:
    """The most resident memory since the start or the last `reset_peak_memory`."""
    peak = _kilobytes(_STATUS, "VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Start counting the peak anew, where the kernel allows it (Linux); elsewhere the peak stays lifelong."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; a very large number where nobody knows."""
    return _kilobytes(_MEMINFO, "MemAvailable") or 1 << 62
