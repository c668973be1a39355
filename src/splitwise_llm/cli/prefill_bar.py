"""A bar for the time before the first token of a long prompt. It knows no machines."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LONG_PROMPT = 128
"""Positions; what is shorter is over before one has read it."""


class PrefillBar:
    """Shown on standard error, if that is a terminal, from a prompt's first piece until the first token."""

    def __init__(self, wanted: bool) -> None:
        self._is_wanted = wanted and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._done = 0

    def advance(self, done: int, of: int) -> None:
        """So many positions of the prompt are computed here."""
        self._done = max(self._done, done)
        if self._progress is None and self._is_wanted and of >= LONG_PROMPT:
            columns = TextColumn("prompt"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn()
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("", total=of)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)

    def stop(self) -> None:
        """The first token is there, or none will come."""
        self._is_wanted = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
