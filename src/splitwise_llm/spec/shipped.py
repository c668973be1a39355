"""Devices and models by name: those that come with the package, and files of one's own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from splitwise_llm.errors import ModelError, SpecError
from splitwise_llm.spec.device import DeviceSpec, read_device
from splitwise_llm.spec.figures import read_json, unknown
from splitwise_llm.spec.model import ModelSpec

_SHIPPED = Path(str(resources.files("splitwise_llm"))) / "data"

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
            unknown("no device file and none of the shipped devices", text, (*shipped_devices(), *_DEVICE_ALIASES))
        )
    return _SHIPPED / "devices" / f"{key}.json", chosen


def find_device(text: str) -> DeviceSpec:
    """The device of a file, or a shipped one by its name or short name (`pi5`), each optionally with an
    engine: `a100-80gb:llama.cpp`. Raises SpecError with the nearest name.
    """
    return DeviceSpec.from_file(*_find_file(text))


def device_sources(name: str) -> dict[str, str]:
    """Where each figure of a device is from, by field; figures given as plain numbers say nothing."""
    return read_device(*_find_file(name))[1]


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
        raise ModelError(unknown("no model directory or file and none of the shipped models", text, known))
    config, _ = read_json(path, ModelError)
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
