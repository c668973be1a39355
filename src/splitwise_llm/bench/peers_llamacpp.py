"""llama.cpp as a user runs it: its server, its RPC server and its quantiser as processes, and a client that takes
tokens one by one. It knows nothing of our engine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from splitwise_llm.errors import LinkDied, UserError, WorkerFailed

START_S = 300.0
"""To load a model; over RPC its weights travel, too."""
SILENCE_S = 120.0
"""Without a token for so long: it will not come any more."""
CONTEXT = 1024
RPC_NAMES = ("ggml-rpc-server", "rpc-server")


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs of one build."""

    server: Path
    rpc: Path
    quantize: Path

    @classmethod
    def find(cls, folder: Path) -> Binaries:
        """Those of a folder, its `bin` or its `build/bin`. Raises UserError."""
        if not folder.is_dir():
            raise UserError(
                f"--llamacpp {folder}: there is no such folder; runs/peers.sh builds llama.cpp into out/llama"
            )
        wanted = {"server": ("llama-server",), "rpc": RPC_NAMES, "quantize": ("llama-quantize",)}
        places = (folder, folder / "bin", folder / "build" / "bin")
        found = {
            role: next((place / name for place in places for name in names if os.access(place / name, os.X_OK)), None)
            for role, names in wanted.items()
        }
        missing = [wanted[role][0] for role, path in found.items() if path is None]
        if missing:
            raise UserError(
                f"--llamacpp {folder}: {', '.join(missing)} not found there, nor in its bin or build/bin; build them "
                "(runs/peers.sh does), with -DGGML_RPC=ON for the RPC server"
            )
        return cls(**{role: path for role, path in found.items() if path})


@dataclass(frozen=True, slots=True)
class Taken:
    """Tokens as they came: ids, seconds since they were asked for, and what a meter showed by then: bytes that a link
    had carried, or seconds for which a processor had worked."""

    ids: tuple[int, ...]
    times_s: tuple[float, ...]
    meter: tuple[float, ...]
    round_trips: float = 1.0
    """Per token."""

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token after the first."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)

    @property
    def typical_tpot_s(self) -> float:
        """The median time between tokens: without what is done once per prompt (a graph that is sent anew)."""
        gaps = sorted(after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False))
        middle = len(gaps) // 2
        return gaps[middle] if len(gaps) % 2 else (gaps[middle - 1] + gaps[middle]) / 2

    @property
    def metered(self) -> float:
        """Per token; from the third on, when everything is under way."""
        first = min(2, len(self.meter) - 2)
        return (self.meter[-1] - self.meter[first]) / (len(self.meter) - 1 - first)


def quantised(binaries: Binaries, source: Path, kind: str) -> Path:
    """The model in another format (as `llama-quantize` names it), beside it; itself for F32. Raises WorkerFailed."""
    if kind == "F32":
        return source
    into = source.with_name(f"{source.stem}-{kind}.gguf")
    if not into.exists():
        command = [str(binaries.quantize), str(source), str(into), kind, "1"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            into.unlink(missing_ok=True)
            raise WorkerFailed(f"llama-quantize to {kind} ended with {done.returncode}: {_tail(done.stderr)}")
    return into


class Program:
    """One of its programs, listening on a loopback port."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
        self.name, self.process, self.port, self._said = name, process, port, said

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> int:
        """SIGKILL. Its exit status."""
        self.process.send_signal(signal.SIGKILL)
        return self.process.wait()

    def said(self) -> str:
        """The last lines it printed."""
        self._said.seek(0)
        return _tail(self._said.read().decode(errors="replace"))

    def completion(self, prompt: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy tokens after a prompt, as they come. Raises LinkDied when the stream ends too soon or falls silent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SILENCE_S)
        asked = {
            "prompt": list(prompt), "n_predict": tokens, "stream": True, "cache_prompt": False, "ignore_eos": True,
            "return_tokens": True, "temperature": 0, "samplers": ["temperature"],
        }  # fmt: skip
        try:
            connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                raise WorkerFailed(f"llama-server answered {answer.status}: {answer.read(500)!r}")
            yield from parse_events(iter(answer.readline, b""))
        except (OSError, http.client.HTTPException) as error:
            raise LinkDied(f"llama-server fell silent or went away: {error}") from error
        finally:
            connection.close()


def parse_events(lines: Iterator[bytes]) -> Iterator[int]:
    """The ids in a stream of server-sent events. Raises LinkDied where it ends before the last event."""
    for line in lines:
        if line.startswith((b"error: ", b'data: {"error"')):
            raise LinkDied(f"llama-server reported {line.decode(errors='replace').strip()}")
        if not line.startswith(b"data: "):
            continue
        event: dict[str, Any] = json.loads(line[6:])
        yield from event.get("tokens", ())
        if event.get("stop"):
            return
    raise LinkDied("the stream of llama-server ended before its last event")


def take(tokens: Iterator[int], meter: Callable[[], float] = lambda: 0.0) -> Taken:
    """All of a stream, with times from now on."""
    start_s = time.perf_counter()
    came = [(token, time.perf_counter() - start_s, meter()) for token in tokens]
    ids, times_s, shown = zip(*came, strict=True)
    return Taken(ids, times_s, shown)


def processor_s(process: int) -> float:
    """How long the threads of a process have run, as Linux counts; NaN where it does not say. Unlike time on the wall
    it leaves out waiting for a processor that others use."""
    try:
        threads = [(one / "schedstat").read_text() for one in Path(f"/proc/{process}/task").iterdir()]
    except OSError:
        return math.nan
    return sum(int(text.split()[0]) for text in threads) / 1e9


@contextlib.contextmanager
def rpc_server(binaries: Binaries, threads: int) -> Iterator[Program]:
    """Its RPC server, ready."""
    port = free_port()
    command = [str(binaries.rpc), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)]
    with _program(command, port) as program:
        _wait(program, lambda: _listens(port))
        yield program


@contextlib.contextmanager
def server(binaries: Binaries, model: Path, threads: int, *options: str) -> Iterator[Program]:
    """Its server with a model, ready to answer: one slot, no cache of prompts, nothing moved of its own accord."""
    port = free_port()
    command = [
        str(binaries.server), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-t", str(threads), "-tb", str(threads), "-c", str(CONTEXT), "-np", "1",
        "--cache-ram", "0", "--ctx-checkpoints", "0", "-fit", "off", "--no-ui", *options,
    ]  # fmt: skip
    with _program(command, port) as program:
        _wait(program, lambda: _is_healthy(port))
        yield program


def half_remote(layers: int, address: str) -> tuple[str, ...]:
    """Its flags for the second half of the layers on an RPC server, the head here: `-ngl` counts the head first. A tied
    head goes by the name of the embedding."""
    return ("--rpc", address, "-ngl", str(layers - layers // 2 + 1), "-ot", "^(output|token_embd)=CPU")


def free_port() -> int:
    """One that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def _program(command: Sequence[str], port: int) -> Iterator[Program]:
    guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []  # it ends with us, however we end
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [*guard, *command], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            yield Program(Path(command[0]).name, process, port, said)
        finally:
            process.kill()


def _wait(program: Program, is_ready: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_S
    while not is_ready():
        if program.process.poll() is not None or time.monotonic() > deadline_s:
            raise WorkerFailed(f"{program.name} did not start: {program.said()}")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-5:]) or "it said nothing"
