"""The network link among strangers: bad input, taken ports, full servers, dead peers, and a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from splitwise_llm.errors import LinkDied, ListenError, Unreachable, WorkerFailed
from splitwise_llm.wire import grpc_link
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.keys import make_keys
from splitwise_llm.wire.link import Link

LOOPBACK = "127.0.0.1:0"


def run(body: Awaitable[None]) -> None:
    async def within_reason() -> None:
        await asyncio.wait_for(body, 20)

    asyncio.run(within_reason())


async def echo(link: Link) -> None:
    while (frame := await link.receive()) is not None:
        await link.send(frame)


async def answers(address: str) -> bool:
    link = await dial(address)
    await link.send(b"hello")
    answer = await link.receive()
    await link.close()
    return answer == b"hello"


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


# --- strangers on the port

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
HALF_HEADERS = b"\0\x40\0\x01\x04\0\0\0\x01\x83\x86"  # announces 16 kB of headers, sends two bytes

BAD_INPUT = {
    "nothing": b"",
    "random bytes": random.Random(7).randbytes(4096),
    "an HTTP/1 request": b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    "a TLS hello": bytes.fromhex("16030100050100000100"),
    "half an HTTP/2 preface": PREFACE[:10],
    "half an HTTP/2 message": PREFACE + SETTINGS + HALF_HEADERS,
    "an HTTP/2 frame of a wrong length": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\0\0\0\x01",
}


@pytest.mark.parametrize("stays", [False, True], ids=["hangs up", "stays"])
@pytest.mark.parametrize("sent", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_the_server_serves_on_after_bad_input(sent: bytes, stays: bool, capfd: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        async with await serve(LOOPBACK, echo) as server:
            before = await dial(server.address)
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(server.address))
            writer.write(sent)
            if not stays:
                writer.close()
            await asyncio.sleep(0.02)
            assert await answers(server.address)
            await before.send(b"still here")
            assert await before.receive() == b"still here"
            await before.close()
            writer.close()

    run(body())
    assert capfd.readouterr().err == ""


def test_a_message_over_the_limit_ends_only_the_link_it_came_on() -> None:
    async def echo_sizes(link: Link) -> None:
        while (frame := await link.receive()) is not None:
            await link.send(b"%d" % len(frame))

    async def body() -> None:
        async with await serve(LOOPBACK, echo_sizes, max_frame_bytes=50_000) as server:
            honest = await dial(server.address)
            hostile = await dial(server.address, max_frame_bytes=10**6)
            await hostile.send(bytes(50_000))
            assert await hostile.receive() == b"50000"
            await hostile.send(bytes(500_000))
            with pytest.raises(LinkDied, match="larger than max"):
                await hostile.receive()
            await honest.send(b"fits")
            assert await honest.receive() == b"4"
            await honest.close()
            await hostile.close()

    run(body())


def test_another_grpc_method_is_refused_and_another_grpc_server_is_no_worker() -> None:
    async def body() -> None:
        stranger = grpc_link.aio.server(options=[("grpc.so_reuseport", 0)])
        port = stranger.add_insecure_port(LOOPBACK)
        await stranger.start()
        with pytest.raises(Unreachable, match="no splitwise worker"):
            await dial(f"127.0.0.1:{port}")
        await stranger.stop(None)
        async with await serve(LOOPBACK, echo) as server, grpc_link.aio.insecure_channel(server.address) as channel:
            call = channel.stream_stream("/other.Service/Method")()
            assert await call.code() is grpc_link.grpc.StatusCode.UNIMPLEMENTED
            assert await answers(server.address)

    run(body())


def test_a_failing_handler_ends_only_its_own_link_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def sometimes(link: Link) -> None:
        while (frame := await link.receive()) is not None:
            if frame == b"fail":
                raise ZeroDivisionError("on request")
            await link.send(frame)

    async def body() -> None:
        async with await serve(LOOPBACK, sometimes) as server:
            well, ill = await dial(server.address), await dial(server.address)
            await ill.send(b"fail")
            with pytest.raises(LinkDied, match="the worker failed; its log says how"):
                await ill.receive()
            await well.send(b"fine")
            assert await well.receive() == b"fine"
            await well.close()

    run(body())
    assert [(r.name, r.levelname) for r in caplog.records if r.exc_info] == [(grpc_link.__name__, "ERROR")]
    assert "on request" in caplog.text


# --- listening


def test_a_taken_port_is_said_so() -> None:
    async def body() -> None:
        async with await serve(LOOPBACK, echo) as server:
            with pytest.raises(ListenError, match=f"{server.address}.*in use"):
                await serve(server.address, echo)
            assert await answers(server.address)

    run(body())


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:7070", "worker.example.org:7070"])
def test_without_tls_only_loopback_is_listened_on(listen: str) -> None:
    with pytest.raises(ListenError, match="splitwise keys"):
        run(serve(listen, echo))  # type: ignore[arg-type]


def test_an_address_of_another_machine_cannot_be_listened_on(tmp_path: Path) -> None:
    worker, _ = make_keys(tmp_path)
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:7070.*assign"):
        run(serve("192.0.2.1:7070", echo, tls=worker))  # type: ignore[arg-type]


def test_a_server_at_its_limit_refuses_the_next_link_until_one_has_ended() -> None:
    async def body() -> None:
        async with await serve(LOOPBACK, echo, max_links=2) as server:
            links = [await dial(server.address) for _ in range(2)]
            with pytest.raises(WorkerFailed, match=r"2 links.*--max-sessions"):
                await dial(server.address, name="cloud")
            for link in links:
                await link.send(b"unharmed")
                assert await link.receive() == b"unharmed"
            await links[0].close()
            assert await answers(server.address)
            await links[1].close()

    run(body())


# --- dialling


@contextmanager
def silent_listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_where_nobody_listens_the_message_says_what_to_start() -> None:
    with silent_listener() as address:
        pass
    with pytest.raises(Unreachable, match=f"{address}.*splitwise worker --listen {address} --model DIR"):
        run(dial(address))  # type: ignore[arg-type]


def test_a_listener_that_never_answers_is_given_up() -> None:
    with silent_listener() as address:
        begin = time.monotonic()
        with pytest.raises(Unreachable, match=r"cloud .* within 0\.3 s"):
            run(dial(address, name="cloud", timeout_s=0.3))  # type: ignore[arg-type]
        assert time.monotonic() - begin < 2


def test_a_failed_dial_does_not_delay_the_next_one() -> None:
    async def body() -> None:
        with silent_listener() as address:
            pass
        with pytest.raises(Unreachable):
            await dial(address)
        async with await serve(address, echo):
            begin = time.monotonic()
            assert await answers(address)
            assert time.monotonic() - begin < 0.5

    run(body())


def test_every_link_has_its_own_connection() -> None:
    async def tell_peer(link: Link) -> None:
        await link.send(link.peer.encode())

    async def body() -> None:
        async with await serve(LOOPBACK, tell_peer) as server:
            links = [await dial(server.address) for _ in range(3)]
            assert len({await link.receive() for link in links}) == 3
            for link in links:
                await link.close()

    run(body())


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def body() -> None:
        async with await serve(LOOPBACK, echo) as server:
            assert await answers(server.address)

    run(body())


# --- the other process


WORKER = """
import asyncio, time
from splitwise_llm.wire.grpc_link import serve

async def tell_time(link):
    while await link.receive() is not None:
        await link.send(repr(time.monotonic()).encode())

async def main():
    async with await serve("127.0.0.1:0", tell_time) as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""

DEVICE = """
import asyncio, sys
from splitwise_llm.wire.grpc_link import dial

async def main():
    link = await dial(sys.argv[1])
    try:
        await link.send(b"x")
        await link.receive()
        print("waiting", flush=True)
        await link.receive()
    finally:
        await link.close()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as child:
        try:
            yield child
        finally:
            child.kill()


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


async def time_to_notice(address: str, act: Callable[[], None]) -> float:
    link = await dial(address)
    await link.send(b"alive?")
    await link.receive()
    begin = time.monotonic()
    act()
    with pytest.raises(LinkDied, match=f"{address}.*broke"):
        await link.receive()
    took_s = time.monotonic() - begin
    await link.close()
    return took_s


def test_a_killed_worker_is_noticed_at_once() -> None:
    async def body() -> None:
        with process(WORKER) as worker:
            address = await asyncio.to_thread(first_line, worker)
            assert await time_to_notice(address, worker.kill) < 1

    run(body())


def test_a_stopped_worker_is_noticed_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_link, "STUCK_AFTER_S", 0.5)

    async def body() -> None:
        with process(WORKER) as worker:
            address = await asyncio.to_thread(first_line, worker)
            assert await time_to_notice(address, lambda: worker.send_signal(signal.SIGSTOP)) < 4

    run(body())


def test_a_killed_device_is_noticed_by_the_worker() -> None:
    async def body() -> None:
        told: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        async def wait_for_the_end(link: Link) -> None:
            await link.send(await link.receive() or b"")
            try:
                await link.receive()
            except LinkDied as error:
                told.set_result(error)
                raise

        async with await serve(LOOPBACK, wait_for_the_end) as server:
            with process(DEVICE, server.address) as device:
                assert await asyncio.to_thread(first_line, device) == "waiting"
                device.kill()
                assert "device (127.0.0.1:" in str(await asyncio.wait_for(told, 3))
            assert await answers(server.address)

    run(body())


def test_a_frame_leaves_before_a_caller_that_blocks_the_loop() -> None:
    async def body() -> None:
        with process(WORKER) as worker:
            link = await dial(await asyncio.to_thread(first_line, worker))
            await link.send(b"warm")
            await link.receive()
            sent = time.monotonic()
            await link.send(b"x")
            time.sleep(0.5)  # noqa: ASYNC251
            assert float(await link.receive() or b"nan") - sent < 0.25
            await link.close()

    run(body())


# --- the end


def test_ctrl_c_ends_both_processes_without_a_word() -> None:
    with process(WORKER) as worker, process(DEVICE, first_line(worker)) as device:
        assert first_line(device) == "waiting"
        for child in (device, worker):
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=10)
            assert (child.returncode, out, err) == (0, "", "")


def test_stop_tells_the_links_that_are_open_and_refuses_new_ones() -> None:
    async def body() -> None:
        server = await serve(LOOPBACK, echo)
        link = await dial(server.address)
        await server.stop(grace_s=0.05)
        with pytest.raises(LinkDied, match="the worker was stopped"):
            await link.receive()
        with pytest.raises(Unreachable):
            await dial(server.address)
        await server.stop()
        await link.close()

    run(body())


def test_stop_lets_a_handler_finish_within_the_grace() -> None:
    async def slow(link: Link) -> None:
        await link.receive()
        await asyncio.sleep(0.2)
        await link.send(b"done")

    async def body() -> None:
        server = await serve(LOOPBACK, slow)
        link = await dial(server.address)
        await link.send(b"begin")
        await asyncio.sleep(0.02)
        await server.stop(grace_s=5)
        assert await link.receive() == b"done"
        assert await link.receive() is None
        await link.close()

    run(body())


async def fill(link: Link) -> int:
    """Sends until the link takes no more; how many MiB it took."""
    for count in range(100):
        try:
            await asyncio.wait_for(link.send(bytes(2**20)), 0.2)
        except TimeoutError:
            return count
    return 100


def test_a_receiver_that_lags_holds_the_sender_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_link, "READ_AHEAD_BYTES", 2**20)
    filled = asyncio.Event()
    received: list[None] = []

    async def lag(link: Link) -> None:
        await filled.wait()
        while (await link.receive()) is not None:
            received.append(None)

    async def body() -> None:
        async with await serve(LOOPBACK, lag) as server:
            link = await dial(server.address)
            took = await fill(link)
            assert took < 60
            filled.set()
            await link.close()
            assert len(received) == took + 1  # the last send was cancelled, yet its frame was whole and queued

    run(body())


def test_neither_end_hangs_when_the_other_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_link, "LINGER_S", 0.2)
    monkeypatch.setattr(grpc_link, "READ_AHEAD_BYTES", 2**20)
    left = asyncio.Event()

    async def fill_and_leave(link: Link) -> None:
        await fill(link)
        await link.close()
        left.set()

    async def idle(link: Link) -> None:
        await asyncio.Event().wait()

    async def body() -> None:
        async with asyncio.timeout(5), await serve(LOOPBACK, fill_and_leave) as server:
            link = await dial(server.address)
            await left.wait()
            await link.close()
        async with asyncio.timeout(5), await serve(LOOPBACK, idle) as server:
            for close_first in (True, False):
                link = await dial(server.address)
                await fill(link)
                if close_first:
                    await link.close()
            await server.stop(grace_s=0)
            await link.close()

    run(body())


def test_nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def once() -> tuple[int, int, int]:
        async with await serve(LOOPBACK, echo) as server:
            assert await answers(server.address)
            links = [await dial(server.address) for _ in range(3)]
            files_in_use = files()
            for link in links[:2]:
                await link.send(bytes(100_000))
                await link.receive()
                await link.close()
            await asyncio.sleep(0.05)
            assert files() <= files_in_use - 4  # a closed link holds no socket, at neither end
            await server.stop(grace_s=0.05)
        with pytest.raises(Unreachable):
            await dial(server.address)
        await asyncio.sleep(0.05)
        return len(asyncio.all_tasks()), files(), threading.active_count()

    assert len({asyncio.run(once()) for _ in range(5)}) == 1
    assert not caplog.records
