"""The stand-alone shaper between real sockets: bytes unchanged, time as its shape says, ends passed on.

Durations are the best of a few tries, or only bounded: other programs run on the machine of a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from splitwise_llm.errors import LinkDied, ListenError, SpecError, Unreachable
from splitwise_llm.wire.faults import Fault, Injection, Layer, parse_schedule
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.proxy import Proxy, run_proxy
from splitwise_llm.wire.shaper import LinkShape

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(2**16):
        writer.write(chunk)
        await writer.drain()


@contextlib.asynccontextmanager
async def server(serve: Serve) -> AsyncIterator[str]:
    """The address of a server on loopback; nothing of it is left at the end."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await serve(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(handle(reader, writer)))

    running = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with running:
        yield f"127.0.0.1:{running.sockets[0].getsockname()[1]}"
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


@contextlib.asynccontextmanager
async def proxied(serve: Serve, text: str, queue_bytes: int = 4 * 2**20, faults: str = "") -> AsyncIterator[Proxy]:
    schedule = parse_schedule(faults, Layer.PROXY) if faults else ()
    async with (
        server(serve) as address,
        await run_proxy(
            "127.0.0.1:0", address, LinkShape.parse(text), queue_bytes=queue_bytes, faults=schedule
        ) as proxy,
    ):
        yield proxy


@contextlib.asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*proxy.address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run it with a time limit, and see that it leaves neither a thread nor a task behind."""

    async def bounded() -> None:
        async with asyncio.timeout(15):
            await scenario()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    threads = threading.enumerate()
    asyncio.run(bounded())
    assert [thread for thread in threading.enumerate() if thread.name == "link-clock"] == [
        thread for thread in threads if thread.name == "link-clock"
    ]


def test_bytes_pass_unchanged_both_ways_on_many_connections() -> None:
    async def scenario() -> None:
        async with proxied(echo, "rtt=2ms") as proxy:

            async def one(seed: int) -> None:
                content = random.Random(seed).randbytes(200_000 + seed)
                async with client(proxy) as (reader, writer):
                    writer.write(content)
                    writer.write_eof()
                    assert await reader.read(-1) == content

            await asyncio.gather(*(one(seed) for seed in range(8)))

    run(scenario)


@pytest.mark.parametrize(("size", "tries"), [(1, 9), (4096, 9), (65536, 5)])
def test_an_echo_takes_the_round_trip_and_the_bytes_both_ways(size: int, tries: int) -> None:
    async def scenario() -> None:
        async with proxied(echo, "rtt=20ms up=20mbit down=40mbit") as proxy, client(proxy) as (reader, writer):
            took_s = []
            for _ in range(tries):
                start_s = time.perf_counter()
                writer.write(bytes(size))
                assert await reader.readexactly(size) == bytes(size)
                took_s.append(time.perf_counter() - start_s)
        serial_s = size / 2.5e6 + size / 5e6
        first_byte_s = min(size, 16384) / 2.5e6 + size / 5e6  # the echo starts before the last chunk came
        assert 0.020 + first_byte_s - 0.001 < min(took_s) < (0.020 + serial_s) * 1.05 + 0.004

    run(scenario)


def test_connections_share_the_rate_of_one_link() -> None:
    async def scenario() -> None:
        async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            size = len(await reader.read(-1))
            writer.write(str(size).encode())

        async with proxied(swallow, "up=16mbit") as proxy:

            async def one() -> None:
                async with client(proxy) as (reader, writer):
                    writer.write(bytes(200_000))
                    writer.write_eof()
                    assert await reader.read(-1) == b"200000"

            start_s = time.perf_counter()
            await asyncio.gather(one(), one())
            assert 0.2 - 0.001 < time.perf_counter() - start_s < 0.2 * 1.05 + 0.05

    run(scenario)


def test_a_half_close_passes_and_the_answer_still_comes_back() -> None:
    async def scenario() -> None:
        async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            question = await reader.read(-1)
            await asyncio.sleep(0.02)
            writer.write(b"answer to " + question)

        async with proxied(answer_at_the_end, "rtt=10ms rate=80mbit") as proxy, client(proxy) as (reader, writer):
            writer.write(b"question")
            writer.write_eof()
            assert await reader.read(-1) == b"answer to question"

    run(scenario)


def test_a_server_that_closes_first_is_heard_after_its_bytes() -> None:
    async def scenario() -> None:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(20_000))

        async with proxied(greet, "rtt=10ms down=8mbit") as proxy, client(proxy) as (reader, _):
            assert await reader.read(-1) == bytes(20_000)

    run(scenario)


def test_a_reset_passes_as_a_reset() -> None:
    async def scenario() -> None:
        async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        async with proxied(break_off, "rtt=10ms") as proxy, client(proxy) as (reader, writer):
            writer.write(b"x")
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)

    run(scenario)


def test_connections_that_break_in_any_order_do_not_hurt_others() -> None:
    async def scenario() -> None:
        async def break_off_or_echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            first = await reader.read(1)
            if first == b"x":
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.write(first)
                await echo(reader, writer)

        async with proxied(break_off_or_echo, "rtt=1ms") as proxy, client(proxy) as (reader, writer):

            async def broken(wait_s: float) -> None:
                async with client(proxy) as (_, other):
                    other.write(b"x")
                    await asyncio.sleep(wait_s)
                    with contextlib.suppress(OSError):
                        other.write_eof()
                    await asyncio.sleep(0.01)

            await asyncio.gather(*(broken(place / 20_000) for place in range(60)))
            writer.write(b"still here")
            assert await reader.readexactly(10) == b"still here"

    run(scenario)


def test_stopping_does_not_wait_for_a_client_who_does_not_read() -> None:
    async def scenario() -> None:
        async def pour(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(2**24))
            await writer.drain()

        async with server(pour) as address:
            # all of it comes out at once, and stays in the proxy when both ends have said their last
            proxy = await run_proxy("127.0.0.1:0", address, LinkShape.parse("rtt=200ms"), queue_bytes=2**25)
            with socket.create_connection(proxy.address) as idle:
                idle.shutdown(socket.SHUT_WR)
                await asyncio.sleep(0.5)
                await proxy.stop()
                idle.settimeout(1)
                with pytest.raises(ConnectionResetError):
                    sum(map(len, iter(lambda: idle.recv(2**20), b"")))

    run(scenario)


def test_writing_to_a_server_that_has_gone_ends_the_connection() -> None:
    async def scenario() -> None:
        async def leave(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

        async with proxied(leave, "rtt=2ms") as proxy, client(proxy) as (_, writer):

            async def go_on() -> None:
                while True:
                    writer.write(bytes(1000))
                    await writer.drain()
                    await asyncio.sleep(0.005)

            with pytest.raises(ConnectionError):
                await go_on()

    run(scenario)


def test_nobody_behind_the_proxy_ends_the_connection_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        with socket.socket() as reserved:  # taken, and nobody listens
            reserved.bind(("127.0.0.1", 0))
            port = reserved.getsockname()[1]
            async with (
                await run_proxy("127.0.0.1:0", f"127.0.0.1:{port}", LinkShape()) as proxy,
                client(proxy) as (reader, _),
            ):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read(1) == b""
        assert f"nobody answers at 127.0.0.1:{port}" in caplog.text

    with caplog.at_level(logging.WARNING, "splitwise_llm.wire.proxy"):  # the demo quiets it
        run(scenario)


def test_addresses_that_cannot_be_listened_on_are_refused() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ListenError, match=f"127.0.0.1:{port}.*choose another port"):
                await run_proxy(f"127.0.0.1:{port}", "127.0.0.1:1", LinkShape())
        with pytest.raises(ListenError, match="cannot listen on 192"):  # not of this machine
            await run_proxy("192.0.2.1:0", "127.0.0.1:1", LinkShape(), exposed=True)
        with pytest.raises(ListenError, match="can be reached from other machines"):
            await run_proxy("0.0.0.0:0", "127.0.0.1:1", LinkShape())
        for listen, to in (("nowhere", "127.0.0.1:1"), ("127.0.0.1:0", "nowhere")):
            with pytest.raises(SpecError, match="host:port"):
                await run_proxy(listen, to, LinkShape())

    run(scenario)


def test_a_link_that_becomes_another_delays_what_comes_then_on_connections_that_are_open() -> None:
    async def scenario() -> None:
        async with proxied(echo, "") as proxy, client(proxy) as (reader, writer):

            async def echo_s(size: int) -> float:
                start_s = time.perf_counter()
                writer.write(bytes(size))
                await reader.readexactly(size)
                return time.perf_counter() - start_s

            before_s = min([await echo_s(4096) for _ in range(9)])
            proxy.reshape(LinkShape.parse("rtt=40ms up=4mbit"))
            after_s = min([await echo_s(4096) for _ in range(5)])
            proxy.reshape(LinkShape())
            again_s = min([await echo_s(4096) for _ in range(9)])
        assert max(before_s, again_s) < 0.02
        assert after_s > 0.040 + 4096 / 0.5e6 - 0.001
        assert proxy.carried_bytes == (23 * 4096, 23 * 4096)

    run(scenario)


def test_nothing_arrives_while_the_link_is_down() -> None:
    async def scenario() -> None:
        async with proxied(echo, "rtt=4ms") as proxy, client(proxy) as (reader, writer):
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            proxy.down(True)
            writer.write(b"two")
            answer = asyncio.create_task(reader.readexactly(3))
            await asyncio.sleep(0.1)
            assert not answer.done()
            proxy.down(False)
            assert await asyncio.wait_for(answer, 1) == b"two"

    run(scenario)


def test_a_full_queue_holds_the_sender_back() -> None:
    async def scenario() -> None:
        async with proxied(echo, "", queue_bytes=2**16) as proxy:
            proxy.down(True)
            loop = asyncio.get_running_loop()
            with socket.create_connection(proxy.address) as sender:
                sender.setblocking(False)
                accepted = 0
                with contextlib.suppress(TimeoutError):
                    while accepted < 2**26:
                        async with asyncio.timeout(0.2):
                            await loop.sock_sendall(sender, bytes(2**16))
                        accepted += 2**16
                assert accepted < 2**24  # what the operating system buffers, and little more

    run(scenario)


def test_stopping_ends_open_connections_and_frees_the_port() -> None:
    async def scenario() -> None:
        async with server(echo) as address:
            proxy = await run_proxy("127.0.0.1:0", address, LinkShape.parse("rtt=10ms rate=8kbit"))
            async with client(proxy) as (reader, writer):
                writer.write(bytes(100_000))
                await writer.drain()
                await asyncio.sleep(0.05)
                await proxy.stop()
                await proxy.stop()
                with pytest.raises(ConnectionError):
                    await reader.readexactly(100_000)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*proxy.address)

    run(scenario)


def test_while_connections_are_refused_each_is_reset_and_counted_and_open_ones_go_on() -> None:
    async def scenario() -> None:
        async with proxied(echo, "") as proxy, client(proxy) as (reader, writer):
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            proxy.inject(Injection(Fault.CONNECT_REFUSED))
            for _ in range(2):
                with pytest.raises(ConnectionResetError):
                    async with client(proxy) as (refused, _):
                        await refused.readexactly(1)
            assert proxy.fired == {Fault.CONNECT_REFUSED: 2}
            writer.write(b"two")
            assert await reader.readexactly(3) == b"two"
            proxy.heal()
            async with client(proxy) as (again, other):
                other.write(b"new")
                assert await again.readexactly(3) == b"new"

    run(scenario)


def test_a_reset_breaks_every_connection_at_both_ends_and_only_once() -> None:
    async def scenario() -> None:
        broken = 0

        async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal broken
            try:
                await echo(reader, writer)
            except ConnectionResetError:
                broken += 1

        async with proxied(watch, "rtt=2ms", faults="reset after=0.1s") as proxy:
            async with client(proxy) as (one, first), client(proxy) as (two, second):
                for reader, writer in ((one, first), (two, second)):
                    writer.write(b"x")
                    assert await reader.readexactly(1) == b"x"
                for reader in (one, two):
                    with pytest.raises(ConnectionResetError):
                        await reader.readexactly(1)
            assert proxy.fired == {Fault.RESET: 2}
            await asyncio.sleep(0.05)  # the server's tasks have their turn
            assert broken == 2
            async with client(proxy) as (reader, writer):
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
            await asyncio.sleep(0.05)
            proxy.inject(Injection(Fault.RESET))
            assert proxy.fired == {Fault.RESET: 2}  # none is open

    run(scenario)


@pytest.mark.parametrize("fault", [Fault.DROP_UP, Fault.DROP_DOWN, Fault.DROP_BOTH])
def test_a_connection_that_lost_bytes_is_dead_for_ever_and_others_go_on(fault: Fault) -> None:
    async def scenario() -> None:
        heard = bytearray()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while chunk := await reader.read(2**16):
                heard.extend(chunk)
                writer.write(chunk)

        async with proxied(listen, "") as proxy, client(proxy) as (idle, spared), client(proxy) as (reader, writer):
            for one, other in ((idle, spared), (reader, writer)):
                other.write(b"a")
                assert await one.readexactly(1) == b"a"
            proxy.inject(Injection(fault))
            writer.write(b"b")
            await asyncio.sleep(0.03)
            assert proxy.fired == {fault: 1}
            proxy.heal()
            writer.write(b"c")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)
            assert bytes(heard) == (b"aabc" if fault is Fault.DROP_DOWN else b"aa")
            spared.write(b"d")  # lost nothing
            assert await idle.readexactly(1) == b"d"

    run(scenario)


def test_the_end_of_a_half_open_connection_is_not_passed_on() -> None:
    async def scenario() -> None:
        ended = asyncio.Event()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.read(1))
            try:
                await reader.read(-1)
            finally:
                ended.set()

        async with proxied(listen, "") as proxy:
            async with client(proxy) as (reader, writer):
                writer.write(b"a")
                await reader.readexactly(1)
                proxy.inject(Injection(Fault.DROP_UP))
                writer.write(b"b")
                await asyncio.sleep(0.02)
                proxy.heal()
            await asyncio.sleep(0.05)
            assert not ended.is_set()
        await asyncio.wait_for(ended.wait(), 1)  # the proxy has stopped

    run(scenario)


def test_a_crawl_is_shared_by_all_connections_and_what_waits_leaves_when_it_is_over() -> None:
    async def scenario() -> None:
        async with proxied(echo, "") as proxy, client(proxy) as (one, first), client(proxy) as (two, second):
            proxy.inject(Injection(Fault.CRAWL, rate_bytes_per_s=10_000.0))
            start_s = time.perf_counter()
            for writer in (first, second):
                writer.write(bytes(500))
            for reader in (one, two):
                await reader.readexactly(500)
            assert 0.1 < time.perf_counter() - start_s < 0.4  # 1000 bytes up, and the last 500 down
            first.write(bytes(200_000))
            await asyncio.sleep(0.05)
            proxy.heal()
            assert await asyncio.wait_for(one.readexactly(200_000), 1) == bytes(200_000)
            assert proxy.fired[Fault.CRAWL] >= 4

    run(scenario)


def test_a_delay_spike_makes_all_late_but_not_slower() -> None:
    async def scenario() -> None:
        async with proxied(echo, "") as proxy, client(proxy) as (reader, writer):
            proxy.inject(Injection(Fault.DELAY_SPIKE, delay_s=0.1))
            start_s = time.perf_counter()
            for i in range(5):
                writer.write(bytes([i]))
                await asyncio.sleep(0.005)  # as separate chunks
            assert await reader.readexactly(5) == bytes(range(5))
            assert 0.2 < time.perf_counter() - start_s < 0.4
            assert proxy.fired[Fault.DELAY_SPIKE] >= 2

    run(scenario)


def test_a_corruption_flips_one_bit() -> None:
    async def scenario() -> None:
        async with proxied(echo, "", faults="corrupt") as proxy, client(proxy) as (reader, writer):
            writer.write(bytes(1000))
            come = await reader.readexactly(1000)
            assert sum(byte.bit_count() for byte in come) == 1
            assert proxy.fired == {Fault.CORRUPT: 1}

    run(scenario)


def test_what_a_proxy_cannot_do_is_refused() -> None:
    async def scenario() -> None:
        with pytest.raises(SpecError, match="a TCP proxy cannot apply reorder"):
            await run_proxy("127.0.0.1:0", "127.0.0.1:1", LinkShape(), faults=[Injection(Fault.REORDER)])
        async with proxied(echo, "") as proxy:
            with pytest.raises(SpecError, match="a TCP proxy knows no frames"):
                proxy.inject(Injection(Fault.RESET, after_frames=2))

    run(scenario)


def test_a_network_link_meets_refusals_and_resets_as_errors_of_ours() -> None:
    async def scenario() -> None:
        async def answer(link: Link) -> None:
            while (frame := await link.receive()) is not None:
                await link.send(frame)

        async with (
            await serve("127.0.0.1:0", answer) as worker,
            await run_proxy("127.0.0.1:0", worker.address, LinkShape()) as proxy,
        ):
            address = f"127.0.0.1:{proxy.address[1]}"
            proxy.inject(Injection(Fault.CONNECT_REFUSED))
            with pytest.raises(Unreachable):
                await dial(address)
            assert proxy.fired[Fault.CONNECT_REFUSED] > 0
            proxy.heal()
            link = await dial(address)
            await link.send(b"alive")
            assert await link.receive() == b"alive"
            proxy.inject(Injection(Fault.RESET))
            with pytest.raises(LinkDied):
                await link.receive()
            await link.close()
            assert proxy.fired[Fault.RESET] == 1

    run(scenario)
