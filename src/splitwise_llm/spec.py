"""Plain numbers of models, devices and links, in SI units; knows nothing of how any of them works inside."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from splitwise_llm.errors import ModelError, SpecError, UserError
from splitwise_llm.units import parse_bytes, parse_rate, parse_seconds

INT4_GROUP = 32
"""Input columns that share one scale in int4 weights; FFN shards are multiples of it where the model allows."""
MAX_FFN_SHARDS = 8
MAX_LAYERS = 10_000

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


class Dtype(StrEnum):
    """The number format a machine computes in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def num_bytes(self) -> int:
        return 4 if self is Dtype.FP32 else 2


class Weights(StrEnum):
    """How the weights of linear layers stay in memory: as computed in, or weight-only quantised."""

    FULL = "full"
    INT8 = "int8"
    INT4 = "int4"

    def num_bytes(self, rows: int, columns: int, dtype: Dtype) -> float:
        """Bytes of a (rows, columns) matrix. int8: a byte each and a bf16 scale per row; int4: half a byte
        each and a bf16 scale and zero per INT4_GROUP columns."""
        match self:
            case Weights.FULL:
                return float(rows * columns * dtype.num_bytes)
            case Weights.INT8:
                return rows * (columns + 2.0)
            case Weights.INT4:
                return rows * columns * (0.5 + 4 / INT4_GROUP)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The sizes of a decoder-only transformer, enough to place, count and price its parts.

    Two kinds of unit can be placed on a machine of their own: a *key/value group* of a layer's
    attention (a key/value head and the query heads that read it) and an *FFN shard* (an equal
    block of the inner columns).
    """

    family: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_context: int
    ffn_matrices: int
    """3 with a gate (SwiGLU), 2 without."""
    tied_head: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
                raise ModelError(f"{field.name} is {value}; a model has at least one")
        if self.num_layers > MAX_LAYERS:
            raise ModelError(f"num_layers is {self.num_layers}; expected at most {MAX_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} key/value heads evenly"
            )

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_ffn_shards(self) -> int:
        """The largest count up to MAX_FFN_SHARDS whose shards are equal and whole int4 groups (or just equal)."""
        for unit in (INT4_GROUP, 1):
            counts = [n for n in range(1, MAX_FFN_SHARDS + 1) if self.d_ff % (n * unit) == 0]
            if counts:
                return counts[-1]
        raise AssertionError("one shard always divides")

    @property
    def shard_columns(self) -> int:
        return self.d_ff // self.num_ffn_shards

    @property
    def group_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the q, k, v and o slices of one key/value group."""
        query = self.heads_per_group * self.head_dim
        return (
            (query, self.d_model),
            (self.head_dim, self.d_model),
            (self.head_dim, self.d_model),
            (self.d_model, query),
        )

    @property
    def shard_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the up (and gate) and down slices of one FFN shard."""
        up = (self.shard_columns, self.d_model)
        return (up,) * (self.ffn_matrices - 1) + ((self.d_model, self.shard_columns),)

    def kv_bytes_per_position(self, groups: int, dtype: Dtype) -> int:
        """Bytes of keys and values that `groups` groups of one layer keep per position."""
        return 2 * groups * self.head_dim * dtype.num_bytes

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the sizes from the content of a Hugging Face `config.json`.

        Raises ModelError for an unknown family or a missing or impossible size.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"config.json says model_type {family!r}; supported families are {', '.join(FAMILIES)}")
        names = _GPT2_SIZES if family == "gpt2" else _LLAMA_SIZES

        def size(field: str, default: int | None = None) -> int:
            given = config.get(names[field])
            value: object = default if given is None else given
            if not isinstance(value, int) or isinstance(value, bool):
                raise ModelError(f"config.json has {names[field]} = {value!r}; expected a whole number")
            return value

        d_model, num_heads = size("d_model"), size("num_heads")
        width = d_model // max(num_heads, 1)
        return cls(
            family=family,
            num_layers=size("num_layers"),
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=num_heads if family == "gpt2" else size("num_kv_heads", num_heads),
            head_dim=width if family == "gpt2" else size("head_dim", width),
            d_ff=size("d_ff", 4 * d_model if family == "gpt2" else None),
            vocab_size=size("vocab_size"),
            max_context=size("max_context"),
            ffn_matrices=2 if family == "gpt2" else 3,
            tied_head=bool(config.get("tie_word_embeddings", family == "gpt2")),
        )


_GPT2_SIZES = {
    "num_layers": "n_layer", "d_model": "n_embd", "num_heads": "n_head", "d_ff": "n_inner",
    "vocab_size": "vocab_size", "max_context": "n_positions",
}  # fmt: skip
_LLAMA_SIZES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "d_ff": "intermediate_size",
    "vocab_size": "vocab_size", "max_context": "max_position_embeddings",
}  # fmt: skip


_SHIPPED = Path(str(resources.files("splitwise_llm"))) / "data"


class _Page(NamedTuple):
    """A JSON file of named figures, and the line on which each stands, by the names that lead to it."""

    path: Path
    data: dict[str, Any]
    lines: dict[tuple[str, ...], int]

    def wrong(self, said: str, *names: str) -> SpecError:
        line = self.lines.get(names)
        return SpecError(f"{self.path}, line {line}: {said}" if line else f"{self.path}: {said}")


def _read_json(path: Path, error: type[UserError]) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and the text it was read from. Raises `error` with the line."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not text in UTF-8 ({cause.reason} at byte {cause.start}); expected JSON") from cause
    except (OSError, ValueError) as cause:
        said = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"{path} cannot be read: {said}; check the path and its permissions") from cause
    if not text.strip():
        raise error(f"{path} is empty; expected a JSON object of named figures")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as cause:
        cut = cause.pos >= len(text.rstrip()) or cause.msg.startswith("Unterminated")
        said = "the file ends in the middle; is it complete?" if cut else f"{cause.msg} at column {cause.colno}"
        raise error(f"{path}, line {cause.lineno}: this is no JSON: {said}") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} cannot be read as JSON: {cause}") from cause
    if not isinstance(data, dict):
        raise error(f"{path} holds a JSON {type(data).__name__}; expected an object of named figures")
    return data, text


_KEY_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"(\s*:)?|[\[\]{}]')


def _read_page(path: Path) -> _Page:
    """Read a file of figures. Raises SpecError, also for a name that stands twice in one object."""
    data, text = _read_json(path, SpecError)
    page = _Page(path, data, {})
    names: list[str] = []
    for token in _KEY_OR_BRACKET.finditer(text):
        if token.group() in ("{", "["):
            names.append("")
        elif token.group() in ("}", "]"):
            names.pop()
        elif token.group(1):
            names[-1] = json.loads(token.group().rstrip(": \t\r\n"))
            where = tuple(names)
            if where in page.lines:
                raise page.wrong(f"{names[-1]} stands a second time below; keep one of the two", *where)
            page.lines[where] = text.count("\n", 0, token.start()) + 1
    return page


class _Range(NamedTuple):
    """Figures that may be: from `low` (or only above it) to `high`."""

    low: float
    high: float
    unit: str
    above: bool = False
    whole: bool = False

    @property
    def text(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} {'above' if self.above else 'from'} {self.low:g} to {self.high:g} {self.unit}"

    def holds(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


_SHARE = _Range(0.0, 1.0, "of peak", above=True)
_SECONDS = _Range(0.0, 1.0, "s")
_WATTS = _Range(0.0, 1e6, "W")
_RANGES = {
    "flop_per_s": _Range(1e6, 1e17, "FLOP/s"),
    "memory_bytes_per_s": _Range(1e6, 1e17, "bytes/s (not bits)"),
    "memory_bytes": _Range(1e6, 1e15, "bytes"),
    "compute_efficiency": _SHARE,
    "memory_efficiency": _SHARE,
    "launch_s": _SECONDS,
    "message_s": _SECONDS,
    "load_bytes_per_s": _Range(1e4, 1e13, "bytes/s (not bits)"),
    "idle_w": _WATTS,
    "decode_w": _WATTS,
    "prefill_w": _WATTS,
    "radio_w": _WATTS,
    "pue": _Range(1.0, 5.0, "W per W"),
    "battery_j": _Range(1.0, 1e10, "J"),
    "usd_per_hour": _Range(0.0, 1e4, "USD/h"),
    "slots": _Range(1, 100_000, "sequences", whole=True),
}
_LINK_RTT = _Range(0.0, 3600.0, "s")
_LINK_RATE = _Range(0.125, 1e11, "bytes/s (1 bit/s to 800 Gbit/s)")

_HANDHELD_BATTERY = _Range(1.0, 1.5e5, "J")
"""A phone holds about 6e4 J, a large tablet 1.4e5 J, a laptop more."""
_HANDHELD = {"memory_bytes_per_s": _Range(1e6, 3e11, "bytes/s (not bits)"), "flop_per_s": _Range(1e6, 2e14, "FLOP/s")}


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
        figures, _ = _read_device(Path(path), engine)
        return cls(**figures)


_REQUIRED = ("name", "flop_per_s", "memory_bytes_per_s", "memory_bytes")
_OF_ENGINES = ("compute_efficiency", "memory_efficiency", "launch_s", "message_s")


def _read_device(path: Path, engine: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures in a device file with an engine's in their place, and the source of each that names one."""
    page = _read_page(path)
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
            raise page.wrong(_unknown("none of this device's engines", str(chosen), list(tables)), *where)
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


def _engine_tables(page: _Page) -> dict[str, dict[str, Any]]:
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


def _figure(page: _Page, given: Any, names: tuple[str, ...]) -> tuple[Any, str]:
    """The value and the source (or nothing) of a figure in either of its two forms."""
    if not isinstance(given, dict):
        return given, ""
    if set(given) != {"value", "source"} or not isinstance(given["source"], str) or not given["source"].strip():
        raise page.wrong(
            f'{names[-1]} is {json.dumps(given)}; expected a number or {{"value": 1.0, "source": "where it is from"}}',
            *names,
        )
    return given["value"], given["source"]


def _unknown(kind: str, text: str, names: Sequence[str]) -> str:
    """What to say about a name that is none of these."""
    nearest = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{text!r} is {kind}: {', '.join(names) or 'there are none'}{hint}"


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link between the device and another machine, as constants."""

    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def __post_init__(self) -> None:
        if not _LINK_RTT.holds(self.rtt_s):
            raise SpecError(f"rtt is {self.rtt_s!r} s; expected {_LINK_RTT.text}")
        rates: tuple[tuple[str, object], ...] = (("up", self.up_bytes_per_s), ("down", self.down_bytes_per_s))
        for name, rate in rates:
            if not _LINK_RATE.holds(rate):
                said = f"{8e-9 * rate:g} Gbit/s" if isinstance(rate, float) else f"{rate!r} bytes/s"
                raise SpecError(
                    f"{name} is {said}, which no link carries; expected 1 bit/s up to 800 Gbit/s (1e11 B/s)"
                )

    @property
    def text(self) -> str:
        """The form that `parse` reads back to an equal link: `rtt=20ms up=50mbit down=50mbit`."""
        rtt = f"{1e3 * self.rtt_s:g}ms"
        if parse_seconds(rtt) != self.rtt_s:
            rtt = f"{float(self.rtt_s)!r}s"
        return f"rtt={rtt} up={_rate_text(self.up_bytes_per_s)} down={_rate_text(self.down_bytes_per_s)}"

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """From `rtt=20ms up=50mbit down=50mbit`. Raises SpecError."""
        pairs = dict(item.split("=", 1) for item in text.split() if "=" in item)
        if set(pairs) != {"rtt", "up", "down"} or len(pairs) != len(text.split()):
            raise SpecError(f"{text!r} is no link: write 'rtt=20ms up=50mbit down=50mbit'")
        return cls(parse_seconds(pairs["rtt"]), parse_rate(pairs["up"]), parse_rate(pairs["down"]))


def _rate_text(bytes_per_s: float) -> str:
    """In megabits where that is exact, else in bits, which always are."""
    text = f"{8e-6 * bytes_per_s:g}mbit"
    return text if parse_rate(text) == bytes_per_s else f"{8.0 * bytes_per_s!r}bit"


_DEVICE_ALIASES = {
    "pi5": "raspberry-pi-5", "s23": "galaxy-s23", "orin-nx": "orin-nx-16gb", "agx-orin": "agx-orin-64gb",
    "3090": "rtx-3090", "a100": "a100-80gb", "a100-40": "a100-40gb", "a100-80": "a100-80gb",
    "h100": "h100-80gb", "h100-80": "h100-80gb",
}  # fmt: skip


def _names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (_SHIPPED / folder).glob("*.json")))


def shipped_devices() -> tuple[str, ...]:
    """Names of the devices whose figures come with the package."""
    return _names("devices")


def shipped_models() -> tuple[str, ...]:
    """Names of the models whose sizes come with the package."""
    return _names("models")


def _existing(text: str) -> Path | None:
    """The path that text names, if there is one."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null byte
        return None


def _find_file(text: str) -> tuple[Path, str | None]:
    """The device file and the engine that text names."""
    path = _existing(text)
    if path and path.is_file():
        return path, None
    name, colon, engine = text.strip().rpartition(":") if ":" in text else (text.strip(), "", "")
    chosen = engine if colon else None
    path = _existing(name)
    if path and path.is_file():
        return path, chosen
    key = name.lower().removesuffix(".json")
    key = _DEVICE_ALIASES.get(key, key)
    if key not in shipped_devices():
        raise SpecError(
            _unknown("no device file and none of the shipped devices", text, (*shipped_devices(), *_DEVICE_ALIASES))
        )
    return _SHIPPED / "devices" / f"{key}.json", chosen


def find_device(text: str) -> DeviceSpec:
    """The device of a file, or a shipped one by its name or short name (`pi5`), each optionally with an
    engine: `a100-80gb:llama.cpp`. Raises SpecError with the nearest name.
    """
    return DeviceSpec.from_file(*_find_file(text))


def device_sources(name: str) -> dict[str, str]:
    """Where each figure of a device is from, by field; figures given as plain numbers say nothing."""
    return _read_device(*_find_file(name))[1]


def find_model(text: str) -> ModelSpec:
    """The sizes of a shipped model by its name, of a directory with `config.json`, of a JSON file in that
    form, or of the bundled model (`bundled`). Raises ModelError with the nearest name.
    """
    key = text.strip().lower().removesuffix(".json")
    path = _existing(text)
    if key == "bundled":
        path = _SHIPPED / "bundled" / "config.json"
    elif key in shipped_models() and not (path and path.is_file()):
        path = _SHIPPED / "models" / f"{key}.json"
    elif path and path.is_dir():
        path = path / "config.json"
    elif path is None:
        known = ("bundled", *shipped_models())
        raise ModelError(_unknown("no model directory or file and none of the shipped models", text, known))
    config, _ = _read_json(path, ModelError)
    try:
        return ModelSpec.from_config(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def parse_emulation(text: str) -> float | DeviceSpec:
    """What `--emulate` was given: a factor by which compute is stretched (1.5), or a device (a file or a name).

    Raises SpecError for a factor below 1 (a machine cannot be made faster by sleeping).
    """
    try:
        factor = float(text)
    except ValueError:
        return find_device(text)
    if not 1 <= factor < 1e6:
        raise SpecError(f"--emulate {text}: a factor stretches compute by sleeping, so it is 1 or more")
    return factor


__all__ = [
    "FAMILIES", "INT4_GROUP", "DeviceSpec", "Dtype", "LinkSpec", "ModelSpec", "Weights", "device_sources",
    "find_device", "find_model", "parse_bytes", "parse_emulation", "shipped_devices", "shipped_models",
]  # fmt: skip
