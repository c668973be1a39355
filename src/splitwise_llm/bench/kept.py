"""A folder of what is done already, for runs that may be stopped at any time. What is kept is not known here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shelf:
    """Things by name, each with what it was made with."""

    folder: Path | None
    """None: nothing is kept."""
    made_with: str
    """Something made with anything else is made anew."""

    def read(self, name: str, made_with: str = "") -> Any | None:
        """What is kept under a name; None where there is nothing, or something else."""
        file = self._file(name)
        if file is None or not file.exists():
            return None
        with suppress(ValueError, KeyError, TypeError):  # cut short, or of another kind
            data = json.loads(file.read_text())
            if data["made_with"] == self.made_with + made_with:
                return data["kept"]
        return None

    def write(self, name: str, kept: object, made_with: str = "") -> None:
        """Whole or not at all."""
        file = self._file(name)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(json.dumps({"made_with": self.made_with + made_with, "kept": kept}))
        part.replace(file)

    def or_made(self, name: str, make: Callable[[], Any], made_with: str = "") -> Any:
        """What is kept, or is made now and kept: plain data."""
        kept = self.read(name, made_with)
        if kept is None:
            kept = make()
            self.write(name, kept, made_with)
        return kept

    def _file(self, name: str) -> Path | None:
        return self.folder / f"{name}.json" if self.folder else None


__all__ = ["Shelf"]
