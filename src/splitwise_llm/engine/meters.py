"""Joules, where the machine has something that counts them: RAPL, NVIDIA's own, an INA3221 on a Jetson; its battery.

A meter says how much energy was drawn since some moment; it does not know what for. Where there is none, nobody
makes a figure up.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol

POWERCAP, HWMON = Path("/sys/class/powercap"), Path("/sys/class/hwmon")
POWER_SUPPLY = Path("/sys/class/power_supply")
SAMPLE_S = 0.1
NO_METER = "no meter: energy figures stay assumed"


class Meter(Protocol):
    """Something that counts energy."""

    name: str

    def joules(self) -> float:
        """Energy since some moment, J; never falls."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


class Rapl:
    """The processor packages, from the counters of powercap; those wrap around, so read them often enough."""

    def __init__(self, zones: Sequence[Path]) -> None:
        self.name = f"RAPL ({len(zones)} package{'s' if len(zones) > 1 else ''})"
        self._zones = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
        self._last = [self._read(path) for path, _ in self._zones]
        self._total_uj = 0

    @staticmethod
    def _read(path: Path) -> int:
        return int(path.read_text())

    def joules(self) -> float:
        for n, (path, wrap) in enumerate(self._zones):
            now = self._read(path)
            self._total_uj += (now - self._last[n]) % (wrap + 1)
            self._last[n] = now
        return self._total_uj / 1e6

    def close(self) -> None:
        """Nothing runs."""


class Gauge:
    """Watts that are asked for again and again, summed over time."""

    def __init__(self, name: str, watts: Callable[[], float], sample_s: float = SAMPLE_S) -> None:
        self.name, self._watts, self._sample_s = name, watts, sample_s
        self._joules, self._last_w, self._last_s = 0.0, watts(), time.monotonic()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._sample_s):
            with suppress(OSError, ValueError, subprocess.SubprocessError):
                self.joules()

    def joules(self) -> float:
        now_w = self._watts()
        with self._lock:
            now_s = time.monotonic()
            self._joules += (now_s - self._last_s) * (now_w + self._last_w) / 2
            self._last_w, self._last_s = now_w, now_s
            return self._joules

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def find_meter(powercap: Path = POWERCAP, hwmon: Path = HWMON) -> Meter | None:
    """The best meter of this machine; None where there is none, or none that may be read."""
    with suppress(OSError, ValueError):
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        if zones:
            return Rapl(zones)
    with suppress(OSError, ValueError):
        for chip in sorted(hwmon.glob("hwmon*")):
            if (chip / "name").read_text().strip() == "ina3221" and _channels(chip):
                return Gauge("INA3221", lambda: _ina3221_watts(chip))  # noqa: B023 - returned at once
    if shutil.which("nvidia-smi"):
        with suppress(OSError, ValueError, subprocess.SubprocessError):
            return Gauge("NVML (nvidia-smi)", _nvidia_watts, 0.5)
    return None


def battery_share(supplies: Path = POWER_SUPPLY) -> float | None:
    """How full the machine's batteries are, 0 to 1, the emptiest counts; None where there is none. Batteries of
    devices that are attached to it (scope `Device`: a mouse, say) do not count."""
    shares = []
    for supply in sorted(supplies.glob("*")):
        with suppress(OSError, ValueError):
            scope = supply / "scope"
            if (supply / "type").read_text().strip() != "Battery":
                continue
            if scope.exists() and scope.read_text().strip() == "Device":
                continue
            shares.append(min(max(int((supply / "capacity").read_text()) / 100, 0.0), 1.0))
    return min(shares, default=None)


def _channels(chip: Path) -> list[tuple[Path, Path]]:
    """Voltage (mV) and current (mA) of every channel; a Jetson's first is the whole module's input."""
    pairs = ((chip / f"in{n}_input", chip / f"curr{n}_input") for n in (1, 2, 3))
    return [(volts, amperes) for volts, amperes in pairs if volts.exists() and amperes.exists()]


def _ina3221_watts(chip: Path) -> float:
    """The first channel: `VDD_IN` (Orin NX) or the largest rail; summing would count what hangs behind it twice."""
    volts, amperes = _channels(chip)[0]
    return int(volts.read_text()) * int(amperes.read_text()) / 1e6


def _nvidia_watts() -> float:
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    return sum(float(line) for line in said.stdout.split())


@cache
def the_meter() -> Meter | None:
    """This machine's meter, found once per process; it may start a thread of its own."""
    return find_meter()
