"""Workers and shaped links as processes of their own, started and surely ended again."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from splitwise_llm.errors import WorkerFailed

READY = "ready on "
_START_S = 120.0


@dataclass(slots=True)
class Child:
    """A `splitwise` command that listens somewhere, running as a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def kill(self) -> None:
        """End it without a good-bye (SIGKILL)."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def child(arguments: Sequence[str]) -> Iterator[Child]:
    """Run `splitwise ARGUMENTS` until the block ends. It must print a line that ends in `ready on HOST:PORT`.

    The child ends with its standard input, so it cannot outlive this process however this one dies.
    Raises WorkerFailed, with what it printed, when it ends or stays silent instead.
    """
    with _start([*arguments, "--until-stdin-closes"]) as process:
        try:
            yield Child(process, _address(process, arguments))
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close() if process.stdin else None
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "splitwise_llm", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process; the child ends with its standard input
    )


def _address(process: subprocess.Popen[str], arguments: Sequence[str]) -> str:
    said: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            said.append(line.rstrip())
            if READY in line:
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + _START_S
    found.wait(max(0.0, deadline - time.monotonic()))
    for line in said:
        place = re.search(rf"{READY}(\S+)", line)
        if place:
            return place.group(1)
    process.kill()
    raise WorkerFailed(f"`splitwise {' '.join(arguments)}` did not start: {' / '.join(said[-5:]) or 'it said nothing'}")


def worker(model: str, *options: str) -> contextlib.AbstractContextManager[Child]:
    """A worker process for a model, on a free loopback port."""
    return child(["worker", "--model", model, "--listen", "127.0.0.1:0", *options])


def shaped_link(to: str, *options: str) -> contextlib.AbstractContextManager[Child]:
    """A link shaper in front of an address, on a free loopback port."""
    return child(["link", "--listen", "127.0.0.1:0", "--to", to, *options])
