"""A model directory as published (`config.json`, safetensors, `tokenizer.json`), read slice by slice.

Nothing is kept mapped: a slice is copied out and its file closed, so that memory holds only what
was asked for. It does not know what the tensors are for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitwise_llm.errors import ModelError
from splitwise_llm.model.families import Architecture

BUNDLED = "bundled"
_SAMPLES_PER_TENSOR = 4
_SAMPLE_BYTES = 64
_DTYPES = ("F32", "F16", "BF16", "F64")
_BLOCK_BYTES = 16 << 20
"""Of a file, at most so much is mapped at a time."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is; offsets in bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def locate(model: str) -> Path:
    """The directory of a model: the bundled one, a path, or a hub id (downloaded only then).

    Raises ModelError when there is no such directory and no hub that knows the name.
    """
    if model == BUNDLED:
        return Path(str(resources.files("splitwise_llm") / "data" / "bundled"))
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    parts = model.split("/")
    if path.exists() or model.startswith((".", "/", "~")) or len(parts) != 2 or not all(parts):
        raise ModelError(
            f"{model!r} is no directory with a model; give one with config.json and model.safetensors, "
            f"a hub id such as 'org/name', or '{BUNDLED}'"
        )
    return _download(model)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # noqa: PLC0415 - only when a hub id is named

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{hub_id!r} is no local directory, and the hub did not provide it ({type(error).__name__}: {error}); "
            "check the name and the connection, or give a directory"
        ) from error


class Checkpoint:
    """Read access to one model directory.

    Raises ModelError, on construction, for a missing or unreadable file or an unsupported model.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config = _json_object(self.directory / "config.json")
        if self.config.get("quantization_config"):
            raise ModelError(f"{self.directory} is quantised already; give the full-precision model and use --weights")
        try:
            self.tensors = _index(self.directory)
            self.architecture = Architecture.from_config(self.config, frozenset(self.tensors))
            self.stop_ids = self._stop_ids()
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ModelError(
                f"{self.directory} has a value that cannot be in config.json or its like: {error}"
            ) from error

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The tensor of this name. Raises ModelError unless it exists with this shape."""
        found = self.tensors.get(name)
        if found is None:
            raise ModelError(f"{self.directory} has no tensor {name!r} that its config.json calls for")
        if found.shape != shape:
            raise ModelError(
                f"{self.directory}: tensor {name!r} has shape {found.shape}, config.json calls for {shape}"
            )
        if found.dtype not in _DTYPES:
            raise ModelError(
                f"{self.directory}: tensor {name!r} is stored as {found.dtype}; read are {', '.join(_DTYPES)}"
            )
        return found

    def copy_slice(self, name: str, shape: tuple[int, ...], dim: int, start: int, into: Tensor) -> None:
        """Copy `into.shape[dim]` rows (dim 0) or columns (dim 1) from `start` into a tensor, converting its dtype."""
        info = self.info(name, shape)
        first, columns = (start, slice(None)) if dim == 0 else (0, slice(start, start + into.shape[1]))
        row_bytes = (info.stop - info.start) // shape[0]
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        try:
            for row in range(0, into.shape[0], step):
                # The file is mapped while it is open, and every page touched counts as memory: hence the blocks.
                with safe_open(info.file, framework="pt") as file:
                    rows = slice(first + row, first + min(row + step, into.shape[0]))
                    part = file.get_slice(name)
                    into[row : row + step].copy_(part[rows] if len(shape) == 1 else part[rows, columns])
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{info.file}: tensor {name!r} cannot be read: {error}") from error

    def vector(self, name: str, length: int, dtype: torch.dtype) -> Tensor:
        """A whole one-dimensional tensor, copied."""
        vector = torch.empty(length, dtype=dtype)
        self.copy_slice(name, (length,), 0, 0, vector)
        return vector

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of sizes, tensor names and shapes, and samples of every tensor's bytes.

        Two machines compare it before the first token. It catches another model or another
        fine-tune without reading gigabytes; it is no protection against a forger.
        """
        digest = hashlib.sha256(repr(self.architecture).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            with info.file.open("rb") as file:
                for sample in range(_SAMPLES_PER_TENSOR):
                    room = max(info.stop - info.start - _SAMPLE_BYTES, 0)
                    file.seek(info.start + room * sample // max(_SAMPLES_PER_TENSOR - 1, 1))
                    digest.update(file.read(min(_SAMPLE_BYTES, info.stop - info.start)))
        return digest.hexdigest()[:16]

    def _stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text, from `generation_config.json` or `config.json`."""
        path = self.directory / "generation_config.json"
        config = _json_object(path) if path.exists() else {}
        ids = config.get("eos_token_id", self.config.get("eos_token_id"))
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        return tuple(int(token) for token in ids)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}; a model directory has it") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no object")
    return cast("dict[str, Any]", data)


def _index(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""
    whole, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if whole.exists():
        files: Sequence[Path] = [whole]
    elif index.exists():
        files = [directory / name for name in sorted(set(_json_object(index).get("weight_map", {}).values()))]
    else:
        raise ModelError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    return {name: info for file in files for name, info in _header(file).items()}


def _header(file: Path) -> dict[str, TensorInfo]:
    """The table of contents of one safetensors file (eight bytes of length, then JSON)."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= size - 8:
                raise ModelError(f"{file} is no safetensors file, or it is truncated")
            table = json.loads(stream.read(length))
        table.pop("__metadata__", None)
        base = 8 + length
        infos = {
            name: TensorInfo(
                file, entry["dtype"], tuple(entry["shape"]), *(base + offset for offset in entry["data_offsets"])
            )
            for name, entry in table.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is no readable safetensors file: {error}") from error
    if any(info.stop > size for info in infos.values()):
        raise ModelError(f"{file} is truncated: it has {size} bytes and its header names more; fetch it again")
    return infos
