"""What every kind of link promises; all kinds pass the same tests.

The device end is `device`, the other `worker`; `kill` ends the link without a good-bye.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.errors import LinkDied, RequestError
from splitwise_llm.wire.faulty import FaultyLink
from splitwise_llm.wire.grpc_link import dial, serve
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.keys import make_keys
from splitwise_llm.wire.link import MAX_FRAME_BYTES, Link, TlsFiles
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.sequence import Sequenced
from splitwise_llm.wire.shaped import ShapedLink
from splitwise_llm.wire.shaper import LinkShape

KINDS = [
    "memory", "grpc", "grpc-tls", "shaped-memory", "shaped-grpc", "faulty-memory", "faulty-grpc",
    "sequenced-memory", "sequenced-shaped-grpc", "sequenced-faulty-memory", "sequenced-faulty-shaped-grpc",
]  # fmt: skip
SOON_S = 10.0


class Pair(NamedTuple):
    device: Link
    worker: Link
    kill: Callable[[], None]

    def ways(self) -> list[tuple[Link, Link]]:
        return [(self.device, self.worker), (self.worker, self.device)]


Test = Callable[[Pair], Coroutine[Any, Any, None]]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[TlsFiles, TlsFiles]:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(params=KINDS)
def run(request: pytest.FixtureRequest, keys: tuple[TlsFiles, TlsFiles]) -> Callable[[Test], None]:
    """Runs a test body with a pair of the kind, and checks that nothing is left afterwards."""

    def run_with_pair(test: Test) -> None:
        async def body() -> None:
            async with asyncio.timeout(SOON_S), open_pair(request.param, keys) as pair:
                await test(pair)
            await nothing_is_left()

        asyncio.run(body())

    return run_with_pair


@asynccontextmanager
async def open_pair(kind: str, keys: tuple[TlsFiles, TlsFiles] | None = None) -> AsyncIterator[Pair]:
    if kind.startswith("sequenced-"):
        async with open_pair(kind.removeprefix("sequenced-"), keys) as pair:
            yield Pair(Sequenced(pair.device), Sequenced(pair.worker), pair.kill)
    elif kind.startswith("faulty-"):
        async with open_pair(kind.removeprefix("faulty-"), keys) as pair:
            faulty = FaultyLink(pair.device, Faults())
            try:
                yield Pair(faulty, pair.worker, pair.kill)
            finally:
                await faulty.close()
    elif kind.startswith("shaped-"):
        async with open_pair(kind.removeprefix("shaped-"), keys) as pair:
            shaped = ShapedLink(pair.device, LinkShape(up=1e9, down=1e9, delay_s=0.002))
            try:
                yield Pair(shaped, pair.worker, pair.kill)
            finally:
                await shaped.close()
    elif kind == "memory":
        device, worker = memory_pair()
        try:
            yield Pair(device, worker, device.kill)
        finally:
            await device.close()
            await worker.close()
    else:
        worker_keys, device_keys = keys if keys and kind == "grpc-tls" else (None, None)
        accepted: asyncio.Queue[Link] = asyncio.Queue()
        done = asyncio.Event()

        async def hand_out(link: Link) -> None:
            await accepted.put(link)
            await done.wait()

        async with (
            await serve("127.0.0.1:0", hand_out, tls=worker_keys) as server,
            cable(server.address) as (
                address,
                cut,
            ),
        ):
            device = await dial(address, tls=device_keys)
            try:
                yield Pair(device, await accepted.get(), cut)
            finally:
                await device.close()
                done.set()


@asynccontextmanager
async def cable(to: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """An address that leads to another one, until it is cut."""
    host, port = to.split(":")
    ends: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        ends.extend((writer, far_writer))
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))

    def cut() -> None:
        for end in ends:
            end.transport.abort()

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    finally:
        cut()
        server.close()


async def nothing_is_left() -> None:
    until = time.monotonic() + 2
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        assert time.monotonic() < until, f"tasks still run: {others}"
        await asyncio.sleep(0.001)


async def receive_all(link: Link) -> list[bytes]:
    frames = []
    while (frame := await link.receive()) is not None:
        frames.append(frame)
    return frames


async def send_all(link: Link, frames: list[bytes]) -> None:
    for frame in frames:
        await link.send(frame)


def test_frames_keep_their_order_in_both_directions_at_once(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        up = [b"up %d" % i for i in range(300)]
        down = [b"down %d" % i for i in range(300)]

        async def take(link: Link) -> list[bytes]:
            return [await link.receive() or b"" for _ in range(300)]

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all(pair.device, up))
            group.create_task(send_all(pair.worker, down))
            at_worker = group.create_task(take(pair.worker))
            at_device = group.create_task(take(pair.device))
        assert at_worker.result() == up
        assert at_device.result() == down

    run(body)


@pytest.mark.parametrize("size", [0, 1, 2, 4095, 65_536, 5_000_000])
def test_a_frame_of_any_size_arrives_intact(run: Callable[[Test], None], size: int) -> None:
    frame = bytes(i * 31 % 251 for i in range(min(size, 4096))) * (size // 4096 + 1)
    frame = frame[:size]

    async def body(pair: Pair) -> None:
        for sender, receiver in pair.ways():
            sending = asyncio.create_task(sender.send(frame))
            assert await receiver.receive() == frame
            await sending

    run(body)


@pytest.mark.parametrize("kind", ["memory", "grpc"])
@settings(max_examples=25, deadline=None)
@given(frames=st.lists(st.binary(max_size=64) | st.sampled_from([b"", b"\xc1", b"\xc1\xc1", b"\0"]), max_size=20))
def test_any_bytes_are_a_frame(kind: str, frames: list[bytes]) -> None:
    async def body() -> None:
        async with asyncio.timeout(SOON_S), open_pair(kind) as pair:
            await send_all(pair.device, frames)
            await pair.device.close()
            assert await receive_all(pair.worker) == frames

    asyncio.run(body())


def test_frames_of_concurrent_senders_stay_whole_and_in_call_order(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        for sender, receiver in pair.ways():
            calls = [bytes([task]) * (1 + 30_000 * (task % 3)) for task in range(60)]
            sending = [asyncio.create_task(sender.send(frame)) for frame in calls]
            assert [await receiver.receive() for _ in calls] == calls
            await asyncio.gather(*sending)

    run(body)


@pytest.mark.parametrize("way", [0, 1], ids=["device closes", "worker closes"])
def test_frames_sent_before_a_close_still_arrive(run: Callable[[Test], None], way: int) -> None:
    async def body(pair: Pair) -> None:
        sender, receiver = pair.ways()[way]
        frames = [bytes([i]) * 50_000 for i in range(40)]
        await send_all(sender, frames)
        await sender.close()
        assert await receive_all(receiver) == frames
        assert await receiver.receive() is None

    run(body)


@pytest.mark.parametrize("way", [0, 1], ids=["device closes", "worker closes"])
def test_after_a_close_neither_end_sends(run: Callable[[Test], None], way: int) -> None:
    async def body(pair: Pair) -> None:
        closer, other = pair.ways()[way]
        await closer.close()
        with pytest.raises(LinkDied, match="closed on this side"):
            await closer.send(b"late")
        assert await closer.receive() is None
        assert await other.receive() is None
        with pytest.raises(LinkDied, match="has closed the link"):
            await other.send(b"late")

    run(body)


def test_close_is_idempotent_and_both_ends_may_close_at_once(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        await asyncio.gather(pair.device.close(), pair.worker.close(), pair.device.close())
        await pair.device.close()
        await pair.worker.close()
        assert await pair.device.receive() is None

    run(body)


def test_ones_own_close_ends_a_receive_that_waits(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        for end in (pair.device, pair.worker):
            waiting = asyncio.create_task(end.receive())
            await asyncio.sleep(0.01)
            await end.close()
            assert await waiting is None

    run(body)


def test_a_frame_over_the_limit_is_refused_and_the_link_goes_on(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        for sender, receiver in pair.ways():
            limit = sender.max_frame_bytes
            assert MAX_FRAME_BYTES - 100 < limit <= MAX_FRAME_BYTES
            with pytest.raises(RequestError, match=rf"{limit + 1} bytes.*{limit} bytes"):
                await sender.send(bytes(limit + 1))
            await sender.send(b"fits")
            assert await receiver.receive() == b"fits"

    run(body)


def test_a_cancelled_receive_loses_no_frame(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        for sender, receiver in pair.ways():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receiver.receive(), 0.02)
            await sender.send(b"first")
            assert await receiver.receive() == b"first"

    run(body)


def test_a_cancelled_send_leaves_the_link_whole(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        big = b"b" * 3_000_000
        for sender, receiver in pair.ways():
            sending = asyncio.create_task(sender.send(big))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.wait([sending])
            await sender.send(b"next")
            first = await receiver.receive()
            assert first == b"next" or (first == big and await receiver.receive() == b"next")

    run(body)


def test_an_abrupt_death_is_told_to_both_ends_and_stays_so(run: Callable[[Test], None]) -> None:
    async def body(pair: Pair) -> None:
        await pair.device.send(b"alive")
        assert await pair.worker.receive() == b"alive"
        waiting = [asyncio.create_task(end.receive()) for end in (pair.device, pair.worker)]
        await asyncio.sleep(0.02)
        pair.kill()
        for end, task in zip((pair.device, pair.worker), waiting, strict=True):
            with pytest.raises(LinkDied, match="broke") as caught:
                await task
            assert end.peer in str(caught.value)
            with pytest.raises(LinkDied):
                await end.receive()
            with pytest.raises(LinkDied):
                await end.send(b"anyone?")
            await asyncio.wait_for(end.close(), 1)

    run(body)
