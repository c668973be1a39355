"""How much of the processor other programs took meanwhile, so that a disturbed measurement can be made again.

It judges a measurement by what else ran, never by its result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

PROC = Path("/proc")
_IDLE = (3, 4)
"""Places of `idle` and `iowait` in the first line of `stat`."""


class Neighbours:
    """Processor time of everyone but this process and some others, since it was made; others count for nothing where
    this process has real-time priority (`chrt -r 1`), for they get what it leaves."""

    def __init__(self, pids: Sequence[int] = (), proc: Path = PROC) -> None:
        self._stat = proc / "stat"
        self._paths = [proc / str(pid) / "stat" for pid in (os.getpid(), *pids)]
        self._real_time = hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
        self._start_s = time.monotonic()
        self._busy_s, self._own_s = self._read()

    def _read(self) -> tuple[float, float]:
        """Seconds all processors were busy (what a hypervisor took for others included), and ours of them."""
        try:
            ticks = [int(word) for word in self._stat.read_text().split("\n", 1)[0].split()[1:9]]
            mine = [path.read_text().rpartition(")")[2].split() for path in self._paths]
        except (OSError, ValueError):  # not Linux, or a process that has ended: nothing is known
            return 0.0, 0.0
        hertz = os.sysconf("SC_CLK_TCK")
        busy = sum(value for place, value in enumerate(ticks) if place not in _IDLE)
        return busy / hertz, sum(int(fields[11]) + int(fields[12]) for fields in mine) / hertz

    @property
    def share(self) -> float:
        """Of all processors since the start; 0 where nobody knows."""
        if self._real_time:
            return 0.0
        busy_s, own_s = self._read()
        elapsed_s = (time.monotonic() - self._start_s) * (os.cpu_count() or 1)
        foreign_s = (busy_s - self._busy_s) - (own_s - self._own_s)
        return min(max(foreign_s / elapsed_s, 0.0), 1.0) if elapsed_s > 0 else 0.0
