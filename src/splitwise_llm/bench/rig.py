"""Real machines to break: workers as processes that can be killed and come back, and a shaped link in a thread of its
own that is told what to do to the bytes. It does not know what a generation is.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from splitwise_llm.bench.processes import Child, child
from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.proxy import Proxy, run_proxy
from splitwise_llm.wire.shaper import LinkShape

T = TypeVar("T")


class Host:
    """A worker process that keeps its address: `start`, `kill` and `start` again, as often as you like."""

    def __init__(self, model: str, *options: str) -> None:
        self._command = ["worker", "--model", model, *options]
        self._running: tuple[Child, ExitStack] | None = None
        self.address = "127.0.0.1:0"
        self.pids: list[int] = []
        """Of all its lives."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        return self._running is not None and self._running[0].process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that runs, or ran last."""
        return self.pids[-1]

    def start(self) -> None:
        """Nothing if it runs. Raises WorkerFailed."""
        if self.is_alive:
            return
        self.stop()
        stack = ExitStack()
        running = stack.enter_context(child([*self._command, "--listen", self.address]))
        self._running, self.address = (running, stack), running.address
        self.pids.append(running.process.pid)

    def kill(self) -> int:
        """SIGKILL; the process has gone when this returns. Its exit status."""
        if self._running is None:
            raise BrokenInvariant("a worker that was never started cannot be killed")
        self._running[0].kill()
        status = self._running[0].process.returncode
        self.stop()
        return status

    def stop(self) -> None:
        """In good order, if it runs."""
        running, self._running = self._running, None
        if running:
            running[1].close()


class Line:
    """A shaped link to an address, in a thread of its own: it is on time though whoever uses it computes."""

    def __init__(self, to: str, shape: LinkShape) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        self._thread.start()
        self._proxy: Proxy = self._run(run_proxy("127.0.0.1:0", to, shape))
        self.address = f"127.0.0.1:{self._proxy.address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._proxy.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def fired(self) -> Counter[Fault]:
        """How often each fault has hit something."""
        return self._call(lambda: Counter(self._proxy.fired))

    def reshape(self, shape: LinkShape) -> None:
        """Be another link from now on, for connections that are open too."""
        self._call(lambda: self._proxy.reshape(shape))

    @property
    def carried_bytes(self) -> int:
        """Sent so far, both ways together, framing included."""
        return self._call(lambda: sum(self._proxy.carried_bytes))

    def inject(self, *injections: Injection) -> None:
        """Let them happen; they act when this returns."""
        for injection in injections:
            self._call(lambda injection=injection: self._proxy.inject(injection))  # type: ignore[misc]

    def heal(self) -> None:
        """End whatever acts."""
        self._call(self._proxy.heal)

    def _call(self, work: Callable[[], T]) -> T:
        async def there() -> T:
            return work()

        return self._run(there())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
