"""`splitwise` as a person runs it, in a process of its own, but without importing torch each time, which takes seconds.

One process imports everything and does nothing else. Each command is a fork of it with its own arguments, folder,
environment, streams and end. Python's own way in and out is not part of it: tests of that start a real command.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import pytest

from splitwise_llm.bench import processes
from splitwise_llm.cli import main

REAL = processes._start
"""How workers are started in earnest."""
STREAMS = ("stdin", "stdout", "stderr")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["splitwise_llm.engine.flight", "splitwise_llm.engine.worker", "splitwise_llm.wire.proxy", "forked"]
)


def splitwise(
    *arguments: str | bytes, stdin: bytes = b"", timeout: float = 100.0
) -> subprocess.CompletedProcess[bytes]:
    """Run `splitwise ARGUMENTS` to its end."""
    argv = [os.fsdecode(one) for one in arguments]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in STREAMS]
        for file in files:
            file.write_bytes(stdin if file.name == "stdin" else b"")
        process = _CONTEXT.Process(target=_command, args=(argv, os.getcwd(), dict(os.environ), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout, files[1].read_bytes(), files[2].read_bytes())
        done = subprocess.CompletedProcess(argv, process.exitcode, files[1].read_bytes(), files[2].read_bytes())
        process.close()
    return done


def splitwise_text(*arguments: str, timeout: float = 100.0) -> subprocess.CompletedProcess[str]:
    """As `splitwise`, with what it says as text."""
    done = splitwise(*arguments, timeout=timeout)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class Started:
    """A `splitwise` command that runs, as `subprocess.Popen` would have it: what `bench.processes` needs of one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        given, to_give = _CONTEXT.Pipe(duplex=False)
        to_read, said = _CONTEXT.Pipe(duplex=False)
        self.args = arguments
        self._process = _CONTEXT.Process(
            target=_listener, args=(arguments, os.getcwd(), dict(os.environ), given, said), daemon=True
        )
        self._process.start()
        given.close()
        said.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        with to_give, to_read:
            self.stdin = os.fdopen(os.dup(to_give.fileno()), "w")
            self.stdout = os.fdopen(os.dup(to_read.fileno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.wait()
        self.stdout.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


@contextmanager
def forked_workers() -> Iterator[None]:
    """Until the block ends, workers and shaped links are forks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_start", Started)
        yield


# What the forks do


def _command(argv: Sequence[str], folder: str, environment: Mapping[str, str], files: Sequence[Path]) -> None:
    how = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
    _be(argv, folder, environment, [os.open(file, flags) for file, flags in zip(files, how, strict=True)])


def _listener(
    argv: Sequence[str], folder: str, environment: Mapping[str, str], given: Connection, said: Connection
) -> None:
    os.setsid()
    with given, said:
        streams = [os.dup(given.fileno()), os.dup(said.fileno()), os.dup(said.fileno())]
    _be(argv, folder, environment, streams)


def _be(argv: Sequence[str], folder: str, environment: Mapping[str, str], streams: Sequence[int]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    sys.argv = ["splitwise", *argv]
    main()
