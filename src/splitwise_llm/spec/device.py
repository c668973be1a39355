"""What a machine can do and what that takes, and the files that say so; knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from splitwise_llm.errors import SpecError
from splitwise_llm.spec.figures import Page, Range, read_page, unknown

_SHARE = Range(0.0, 1.0, "of peak", above=True)
_SECONDS = Range(0.0, 1.0, "s")
_WATTS = Range(0.0, 1e6, "W")
_RANGES = {
    "flop_per_s": Range(1e6, 1e17, "FLOP/s"),
    "memory_bytes_per_s": Range(1e6, 1e17, "bytes/s (not bits)"),
    "memory_bytes": Range(1e6, 1e15, "bytes"),
    "compute_efficiency": _SHARE,
    "memory_efficiency": _SHARE,
    "launch_s": _SECONDS,
    "message_s": _SECONDS,
    "token_s": _SECONDS,
    "load_bytes_per_s": Range(1e4, 1e13, "bytes/s (not bits)"),
    "idle_w": _WATTS,
    "decode_w": _WATTS,
    "prefill_w": _WATTS,
    "radio_w": _WATTS,
    "pue": Range(1.0, 5.0, "W per W"),
    "battery_j": Range(1.0, 1e10, "J"),
    "usd_per_hour": Range(0.0, 1e4, "USD/h"),
    "slots": Range(1, 100_000, "sequences", whole=True),
}

_HANDHELD_BATTERY = Range(1.0, 1.5e5, "J")
"""A phone holds about 6e4 J, a large tablet 1.4e5 J, a laptop more."""
_HANDHELD = {"memory_bytes_per_s": Range(1e6, 3e11, "bytes/s (not bits)"), "flop_per_s": Range(1e6, 2e14, "FLOP/s")}


def _doubts(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) of every figure of a device that cannot be right."""
    name, battery = figures["name"], figures.get("battery_j")
    if not isinstance(name, str) or not name.strip():
        yield "name", f"a device's name is {name!r}; expected text"
    for field, allowed in _RANGES.items():
        value = figures.get(field)
        if field not in figures or (field == "battery_j" and value is None):
            continue
        if not allowed.holds(value):
            yield field, f"device {name!r}: {field} is {value!r}; expected {allowed.text}"
        elif field in _HANDHELD and _HANDHELD_BATTERY.holds(battery) and not _HANDHELD[field].holds(value):
            said = f"{field} is {value!r}, and battery_j {battery!r} is a phone's; no phone is so fast"
            expected = f"expected {_HANDHELD[field].text}, or no battery_j for a machine on mains"
            yield field, f"device {name!r}: {said}: {expected}"
    idle = figures.get("idle_w", 0.0)
    for field in ("decode_w", "prefill_w"):
        busy = figures.get(field, 0.0)
        if _WATTS.holds(idle) and _WATTS.holds(busy) and busy < idle:
            said = f"idle_w is {idle!r} and {field} {f'only {busy!r}' if busy else 'not given'}"
            expected = "all three are of the whole device, which draws no less at work than at rest"
            yield "idle_w", f"device {name!r}: {said}; {expected}: give {field} with what it draws idle, or no idle_w"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What a machine can do and what that takes: a roofline, fixed times, power, price."""

    name: str
    flop_per_s: float
    """Peak, dense, in the format it computes in for a model's linear layers."""
    memory_bytes_per_s: float
    """Peak."""
    memory_bytes: float
    """Usable for a model: what the system keeps is not in it."""
    compute_efficiency: float = 1.0
    """Share of `flop_per_s` that an engine achieves in prefill; 1 where `flop_per_s` is itself an achieved rate."""
    memory_efficiency: float = 1.0
    """Share of `memory_bytes_per_s` that an engine achieves in decode."""
    launch_s: float = 0.0
    """Fixed time per sub-block (kernel launches, framework)."""
    message_s: float = 0.0
    """Software time at this end for one message sent or received: stack, copy, codec."""
    token_s: float = 0.0
    """Software time per step of a token loop that passes here: sampling's way to the text, and to the next step."""
    load_bytes_per_s: float = 1e9
    """Reading weights from storage."""
    idle_w: float = 0.0
    """Power of the whole device while it waits; `decode_w` and `prefill_w` the same in these states."""
    decode_w: float = 0.0
    prefill_w: float = 0.0
    radio_w: float = 0.0
    """More than that, while bits move."""
    pue: float = 1.0
    """What a data centre draws per watt of its machines."""
    battery_j: float | None = None
    usd_per_hour: float = 0.0
    """Rent; 0 for a device that is owned."""
    slots: int = 1
    """Sequences it runs at a time."""

    def __post_init__(self) -> None:
        for _, said in _doubts({field.name: getattr(self, field.name) for field in fields(self)}):
            raise SpecError(said)

    def seconds(self, flop: float, memory_bytes: float) -> float:
        """Roofline: `max(FLOP / achieved rate, bytes / achieved bandwidth) + launch` of one sub-block."""
        computing = flop / (self.flop_per_s * self.compute_efficiency)
        reading = memory_bytes / (self.memory_bytes_per_s * self.memory_efficiency)
        return max(computing, reading) + self.launch_s

    @classmethod
    def from_file(cls, path: str | Path, engine: str | None = None) -> DeviceSpec:
        """Read a device file: JSON with the field names of this class, each figure a number or
        `{"value": ..., "source": ...}`, and optionally `engines`, of which `engine` (or the file's own
        choice) overrides the figures that depend on software.

        Raises SpecError naming file, line and field.
        """
        figures, _ = read_device(Path(path), engine)
        return cls(**figures)


_REQUIRED = ("name", "flop_per_s", "memory_bytes_per_s", "memory_bytes")
_OF_ENGINES = ("compute_efficiency", "memory_efficiency", "launch_s", "message_s", "token_s")


def read_device(path: Path, engine: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures in a device file with an engine's in their place, and the source of each that names one."""
    page = read_page(path)
    known = ("name", *_RANGES)
    missing = [field for field in _REQUIRED if field not in page.data]
    if missing:
        raise page.wrong(f"lacks {', '.join(missing)}; a device file has {', '.join(known)}")
    stands: dict[str, tuple[str, ...]] = {field: (field,) for field in page.data}
    tables = _engine_tables(page)
    default = page.data.get("engine")
    chosen = default if engine is None else engine
    if chosen is not None:
        if not isinstance(chosen, str) or chosen not in tables:
            where = ("engine",) if engine is None else ("engines",)
            raise page.wrong(unknown("none of this device's engines", str(chosen), list(tables)), *where)
        stands.update({field: ("engines", chosen, field) for field in tables[chosen]})
    figures: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for field, names in stands.items():
        if field in ("engine", "engines"):
            continue
        if field not in known:
            raise page.wrong(f"has unknown {field}; a device file has {', '.join(known)}", *names)
        given = tables[names[1]][field] if len(names) > 1 else page.data[field]
        figures[field], source = _figure(page, given, names)
        if source:
            sources[field] = source
    for field, said in _doubts(figures):
        raise page.wrong(said, *stands[field])
    if chosen != default:
        figures["name"] += f":{chosen}"
    return figures, sources


def _engine_tables(page: Page) -> dict[str, dict[str, Any]]:
    """The figures each engine overrides. Raises SpecError unless they are figures that depend on software."""
    tables = page.data.get("engines", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise page.wrong('engines is no object of objects; write {"name": {"memory_efficiency": 0.7}}', "engines")
    for name, table in tables.items():
        for field, given in table.items():
            names = ("engines", name, field)
            if field not in _OF_ENGINES:
                raise page.wrong(f"has unknown {field}; an engine has {', '.join(_OF_ENGINES)}", *names)
            value, _ = _figure(page, given, names)
            if not _RANGES[field].holds(value):
                raise page.wrong(f"{field} of engine {name!r} is {value!r}; expected {_RANGES[field].text}", *names)
    return tables


def _figure(page: Page, given: Any, names: tuple[str, ...]) -> tuple[Any, str]:
    """The value and the source (or nothing) of a figure in either of its two forms."""
    if not isinstance(given, dict):
        return given, ""
    if set(given) != {"value", "source"} or not isinstance(given["source"], str) or not given["source"].strip():
        raise page.wrong(
            f'{names[-1]} is {json.dumps(given)}; expected a number or {{"value": 1.0, "source": "where it is from"}}',
            *names,
        )
    return given["value"], given["source"]
