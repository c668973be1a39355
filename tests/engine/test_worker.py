"""Whatever a device says, the worker answers with a clear error and keeps serving others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm import cost
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.worker import Worker
from splitwise_llm.errors import (
    BrokenInvariant,
    LinkDied,
    MemoryTooSmall,
    ModelError,
    PeerMismatch,
    RequestError,
    Unreachable,
    WorkerFailed,
)
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Kind
from splitwise_llm.records import Interval
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.messages import Close, Closed, Data, Failed, Hello, Open, Opened, Welcome, pack, unpack


@dataclass
class Lab:
    """A worker, and ways to talk to it."""

    worker: Worker
    checkpoint: Checkpoint

    @asynccontextmanager
    async def link(self) -> AsyncIterator[MemoryLink]:
        near, far = memory_pair()
        task = asyncio.create_task(self._serve(far))
        yield near
        await near.close()
        await task

    async def _serve(self, far: Link) -> None:
        await self.worker.handle(far)
        await far.close()

    def hello(self) -> bytes:
        return pack(Hello(messages.PROTOCOL_VERSION, self.checkpoint.fingerprint))

    def opening(self, **changes: object) -> Open:
        partition = Partition.cut(self.checkpoint.architecture.spec, 2)
        usual = Open("s", 1, ["edge", "cloud"], partition.to_bytes(), "fp32", 0, 4, 3, [], 0.0, 0, 1.0, 0, 0.0, 0)
        return msgspec.structs.replace(usual, **changes)

    async def opened(self, link: Link, **changes: object) -> messages.Header:
        """Greet and open; the worker's answer to the opening."""
        await link.send(self.hello())
        assert isinstance(await said(link), Welcome)
        await link.send(pack(self.opening(**changes)))
        return await said(link)

    async def check_serves(self) -> None:
        """A well-behaved session still works."""
        async with self.link() as link:
            assert isinstance(await self.opened(link), Opened)
            x = torch.zeros(4, 64)
            await link.send(pack(Data(0, 0, "residual", 0, 1, 0, "fp32", 4, 64), x.numpy().tobytes()))
            token = await said(link)
            assert isinstance(token, Data)
            assert token.kind == "token"
            await link.send(pack(Close()))
            assert isinstance(await said(link), Closed)


async def said(link: Link) -> messages.Header:
    frame = await asyncio.wait_for(link.receive(), 10)
    assert frame is not None
    return unpack(frame)[0]


@pytest.fixture
def lab(tiny: Callable[[str], Path]) -> Callable[[Callable[[Lab], object]], None]:
    checkpoint = Checkpoint(tiny("llama"))

    def run(scene: Callable[[Lab], object]) -> None:
        async def play() -> None:
            with Machine(checkpoint) as machine:
                one = Lab(Worker(machine, max_sessions=2, idle_s=5), checkpoint)
                await scene(one)  # type: ignore[misc]
                await one.check_serves()

        asyncio.run(play())

    return run


Run = Callable[[Callable[[Lab], object]], None]


@given(frame=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_a_protocol_error(frame: bytes) -> None:
    try:
        unpack(frame)
    except messages.ProtocolError:
        return
    pytest.fail("random bytes were taken for a message")


def test_garbage_after_the_greeting_ends_only_that_session(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as link:
            await link.send(b"GET / HTTP/1.1\r\n\r\n")
            failed = await said(link)
            assert isinstance(failed, Failed)
            assert failed.error == "ProtocolError"

    lab(scene)


def test_another_protocol_version_or_model_is_refused_on_both_sides(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        for hello, says in [
            (Hello(99, lab.checkpoint.fingerprint), "protocol 99"),
            (Hello(messages.PROTOCOL_VERSION, "other"), "holds model other"),
        ]:
            async with lab.link() as link:
                await link.send(pack(hello))
                assert isinstance(await said(link), Welcome)
                failed = await said(link)
                assert isinstance(failed, Failed)
                assert failed.error == "PeerMismatch"
                assert says in failed.message

    lab(scene)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"partition": b"\x01\x00"}, "PartitionError", "action vector"),
        ({"wire": "fp64"}, "RequestError", "fp64"),
        ({"prompt_tokens": 300}, "RequestError", "context 256"),
        ({"prompt_tokens": 200, "max_new_tokens": 100}, "RequestError", "at most 56"),
        ({"prompt_tokens": 0}, "RequestError", "empty"),
        ({"temperature": -1.0}, "RequestError", "temperature"),
        ({"element_loss": 1.5}, "RequestError", "element loss"),
        ({"machine": 0}, "ProtocolError", "cannot be machine 0"),
        ({"machine": 2}, "ProtocolError", "cannot be machine 2"),
        ({"names": ["edge"], "machine": 1}, "ProtocolError", "machine 1 of 1"),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused_with_the_reason(
    lab: Run, changes: dict[str, object], error: str, says: str
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as link:
            failed = await lab.opened(link, **changes)
            assert isinstance(failed, Failed)
            assert failed.error == error
            assert says in failed.message

    lab(scene)


GOOD = Data(0, 0, "residual", 0, 1, 0, "fp32", 4, 64)
BYTES = torch.zeros(4, 64).numpy().tobytes()
NAN = torch.full((4, 64), float("nan")).numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "payload", "says"),
    [
        (GOOD, NAN, "NaN"),
        (GOOD, BYTES[:-4], "expected 1024"),
        (msgspec.structs.replace(GOOD, rows=3), BYTES, r"got fp32 (3, 64), expected fp32 (4, 64)"),
        (msgspec.structs.replace(GOOD, dtype="fp16"), BYTES, "expected fp32"),
        (msgspec.structs.replace(GOOD, kind="partial"), BYTES, "no such message"),
        (msgspec.structs.replace(GOOD, step=7), BYTES, "no such message"),
        (msgspec.structs.replace(GOOD, src=2), BYTES, "no such message"),
        (msgspec.structs.replace(GOOD, after=-1), BYTES, "no such message"),
    ],
)
def test_activations_that_the_plan_does_not_call_for_end_the_session(
    lab: Run, header: Data, payload: bytes, says: str
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as link:
            assert isinstance(await lab.opened(link), Opened)
            await link.send(pack(header, payload))
            failed = await said(link)
            assert isinstance(failed, Failed)
            assert failed.error == "ProtocolError"
            assert says in failed.message

    lab(scene)


def test_a_message_that_comes_twice_ends_the_session(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as link:
            assert isinstance(await lab.opened(link), Opened)
            await link.send(pack(GOOD, BYTES))
            await link.send(pack(GOOD, BYTES))
            while not isinstance(answer := await said(link), Failed):
                pass
            assert "came twice" in answer.message

    lab(scene)


def test_a_device_that_vanishes_leaves_nothing_behind(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        for _ in range(5):  # more than the session limit
            async with lab.link() as link:
                assert isinstance(await lab.opened(link), Opened)
                link.kill()

    lab(scene)


def test_memory_is_shared_by_all_sessions_of_a_worker(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        spec = lab.checkpoint.architecture.spec
        weights = cost.assigned_weight_bytes(spec, Partition.cut(spec, 2), 1, Dtype.FP32, Weights.FULL)
        cache = cost.assigned_kv_bytes(spec, Partition.cut(spec, 2), 1, Dtype.FP32, 7)
        lab.worker.machine._memory_limit = int(weights + 1.5 * cache)
        async with lab.link() as first, lab.link() as second:
            assert isinstance(await lab.opened(first), Opened)
            failed = await lab.opened(second)
            assert isinstance(failed, Failed)
            assert failed.error == "MemoryTooSmall"
            assert "together with 1 open sessions" in failed.message

    lab(scene)


@pytest.mark.parametrize(
    "changes",
    [
        {"dial": {0: "127.0.0.1:9"}},
        {"dial": {9: "127.0.0.1:9"}},
        {"names": ["edge", "cloud", "third"], "direct": [(1, 2), (2, 1)], "dial": {2: "127.0.0.1:9"}},
        {"names": ["edge", "cloud", "third"], "direct": [(1, 1)]},
        {"names": ["edge", "cloud", "third"], "direct": [(1, 7)]},
        {"names": ["edge", "cloud\n00:00 FAKE"]},
    ],
)
def test_a_device_cannot_make_a_worker_dial_or_log_what_it_likes(lab: Run, changes: dict[str, object]) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as link:
            failed = await lab.opened(link, **changes)
            assert isinstance(failed, Failed)
            assert failed.error == "ProtocolError"

    lab(scene)


def test_an_account_of_any_length_gets_through() -> None:
    many = [Interval(n % 60, n, n / 7, n / 7 + 1) for n in range(100_000)]
    closed = Closed([], 5, 6)
    header, payload = unpack(pack(closed, messages.pack_intervals(many)))
    assert header == closed
    assert messages.unpack_intervals(payload) == tuple(many)
    with pytest.raises(messages.ProtocolError):
        messages.unpack_intervals(payload[:-1])
    strange = pack(Closed([messages.Crossed(0, Kind.TOKEN, 1, 0, 2, 8)], 5, 6)).replace(b"token", b"taken")
    with pytest.raises(messages.ProtocolError):
        unpack(strange)
    with pytest.raises(BrokenInvariant, match="belongs in the payload"):
        pack(Failed("x", "y" * 2_000_000))


def test_sessions_beyond_the_limit_are_refused_and_the_others_go_on(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as first, lab.link() as second, lab.link() as third:
            assert isinstance(await lab.opened(first), Opened)
            assert isinstance(await lab.opened(second), Opened)
            failed = await lab.opened(third)
            assert isinstance(failed, Failed)
            assert "all 2 sessions" in failed.message
            await first.send(pack(GOOD, BYTES))
            assert isinstance(await said(first), Data)

    lab(scene)


def test_a_silent_session_is_closed_after_the_idle_limit(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        lab.worker.idle_s = 0.2
        async with lab.link() as link:
            assert isinstance(await lab.opened(link), Opened)
            failed = await said(link)
            assert isinstance(failed, Failed)
            assert "0.2 s" in failed.message
        lab.worker.idle_s = 5

    lab(scene)


# The device's side of the same


def edge_to(checkpoint: Checkpoint, machine: Machine, serve: Callable[[Link], object]) -> tuple[Edge, set[object]]:
    tasks: set[object] = set()

    async def connect(_: str) -> Link:
        near, far = memory_pair(("device", "cloud"))

        async def run() -> None:
            await serve(far)  # type: ignore[misc]
            await far.close()

        tasks.add(asyncio.create_task(run()))
        return near

    return Edge(machine, ["cloud"], connect), tasks


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (Welcome(9, "", "fp32", "full", 0, 0, 1, ""), PeerMismatch, "protocol 9"),
        (Welcome(messages.PROTOCOL_VERSION, "other", "fp32", "full", 0, 0, 1, ""), PeerMismatch, "same --model"),
        (Failed("MemoryTooSmall", "cloud would hold 5 GB"), MemoryTooSmall, "5 GB"),
        (Failed("WorkerFailed", "all 1 sessions are taken"), WorkerFailed, "all 1 sessions"),
        (Close(), messages.ProtocolError, "expected Welcome"),
        (None, LinkDied, "closed the link"),
    ],
)
def test_the_device_says_which_worker_failed_and_how(
    tiny: Callable[[str], Path], answer: messages.Header | None, error: type[Exception], says: str
) -> None:
    checkpoint = Checkpoint(tiny("llama"))

    async def serve(link: Link) -> None:
        await link.receive()
        if answer:
            await link.send(pack(answer))
            await link.receive()

    async def play() -> None:
        with Machine(checkpoint) as machine:
            edge, _ = edge_to(checkpoint, machine, serve)
            with pytest.raises(error, match=says):
                async with edge.generate([1, 2, 3], "edge[0:2] cloud[2:4]"):
                    pass

    asyncio.run(play())


def test_a_worker_that_dies_in_mid_generation_is_named(tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))

    async def play() -> None:
        with Machine(checkpoint) as machine, Machine(checkpoint) as other:
            worker = Worker(other)
            ends: list[MemoryLink] = []

            async def serve(link: Link) -> None:
                ends.append(link)  # type: ignore[arg-type]
                await worker.handle(link)

            edge, _ = edge_to(checkpoint, machine, serve)
            async with edge.generate([1, 2, 3], "edge[0:2] cloud[2:4]", stop_ids=()) as generation:
                async for _token in generation:
                    ends[0].kill()

    with pytest.raises(LinkDied, match="cloud was lost in mid-generation"):
        asyncio.run(play())


def test_a_machine_that_nobody_needs_may_be_down(tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))

    async def connect(name: str) -> Link:
        raise Unreachable(f"{name} is down")

    async def play() -> None:
        with Machine(checkpoint) as machine:
            edge = Edge(machine, ["cloud"], connect)
            async with edge.generate([1, 2, 3], "all:edge", max_new_tokens=2, stop_ids=()) as generation:
                assert len([token async for token in generation]) == 2
            with pytest.raises(Unreachable, match="cloud is down"):
                async with edge.generate([1, 2, 3], "all:cloud"):
                    pass

    asyncio.run(play())


def test_what_does_not_fit_is_said_before_loading(tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))

    async def play() -> None:
        with Machine(checkpoint, memory_bytes=100_000) as machine:
            edge = Edge(machine)
            with pytest.raises(MemoryTooSmall, match=r"edge would hold .* of weights .* and has 100.0 kB"):
                async with edge.generate([1, 2, 3], "all:edge"):
                    pass

    asyncio.run(play())


@pytest.mark.parametrize(
    ("prompt", "count", "says"),
    [
        ([], 4, "prompt is empty"),
        ([1] * 256, 4, "256 tokens, the model's context 256"),
        ([1] * 250, 7, "at most 6"),
        ([1, 256], 4, "outside the model's vocabulary"),
        ([1, 2], 0, "at least 1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_is_opened(
    tiny: Callable[[str], Path], prompt: list[int], count: int, says: str
) -> None:
    with Machine(Checkpoint(tiny("llama"))) as machine, pytest.raises(RequestError, match=says):
        Edge(machine).generate(prompt, max_new_tokens=count)


def test_a_broken_model_directory_is_named(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        Checkpoint(tmp_path)
    source = tiny("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        Checkpoint(tmp_path)
    whole = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="truncated"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="no safetensors file"):
        Checkpoint(tmp_path)
