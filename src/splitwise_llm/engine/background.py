"""What a session does beside its runs, each thing a task with a name. It does not know what any of them is for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Background:
    """The tasks of one session that nobody waits for."""

    tell: Callable[[str, str], None]
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def start(self, what: str, work: Coroutine[None, None, None], which: str = "") -> None:
        """Go on with it until the session ends; that it failed by our own fault is told, and hurts nobody."""

        def over(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                log.error("%s failed", what, exc_info=error)
                self.tell(what, f"failed: {type(error).__name__}: {error}")

        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(over)
        self.tasks[f"{what} {which}".rstrip()] = task

    def is_running(self, what: str) -> bool:
        """Whether it was started and has not ended."""
        return what in self.tasks and not self.tasks[what].done()

    async def stop(self, what: str) -> None:
        """End one, if it was started; it may be started again."""
        if task := self.tasks.pop(what, None):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop_all(self) -> None:
        """End all of them."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
