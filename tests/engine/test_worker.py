"""Whatever a device says, the worker answers with a clear error and keeps serving others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.raw_sessions import Lab, play, stream
from splitwise_llm import cost
from splitwise_llm.decision import Decision
from splitwise_llm.engine import post
from splitwise_llm.engine.backoff import Door, RecoveryRules
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
from splitwise_llm.records import Interval, RequestRecord
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import MemoryLink, memory_pair
from splitwise_llm.wire.messages import (
    Close,
    Closed,
    Data,
    Failed,
    Halted,
    Hello,
    Ping,
    Pong,
    Welcome,
    pack,
    unpack,
)
from splitwise_llm.wire.sequence import Sequenced


@pytest.fixture
def lab(tiny: Callable[[str], Path]) -> Callable[[Callable[[Lab], Awaitable[None]]], None]:
    checkpoint = Checkpoint(tiny("llama"))

    def run(scene: Callable[[Lab], Awaitable[None]]) -> None:
        play(checkpoint, scene)

    return run


Run = Callable[[Callable[[Lab], Awaitable[None]]], None]


@given(frame=st.binary(max_size=200))
def test_bytes_that_are_no_message_are_a_protocol_error(frame: bytes) -> None:
    try:
        unpack(frame)
    except messages.ProtocolError:
        return
    pytest.fail("random bytes were taken for a message")


def test_garbage_ends_only_its_link(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as device:
            await device.raw.send(b"GET / HTTP/1.1\r\n\r\n")
            assert await device.frame() is None, "who does not even number frames is hung up on"
        async with lab.link() as device:
            await device.link.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await device.hear(Failed)).error == "ProtocolError"

    lab(scene)


def test_garbage_in_mid_session_ends_that_session(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.link.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await device.hear(Failed)).error == "ProtocolError"
        assert not lab.worker.machine._open

    lab(scene)


def test_another_protocol_version_or_model_is_refused_on_both_sides(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        for hello, says in [
            (Hello(99, lab.checkpoint.fingerprint), "protocol 99"),
            (Hello(messages.PROTOCOL_VERSION, "other"), "holds model other"),
        ]:
            async with lab.link() as device:
                await device.ask(hello, Welcome)
                failed = await device.hear(Failed)
                assert failed.error == "PeerMismatch"
                assert says in failed.message

    lab(scene)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"capacity": 300}, "RequestError", "context is 256"),
        ({"capacity": 1}, "RequestError", "1 positions"),
        ({"temperature": -1.0}, "RequestError", "temperature"),
        ({"element_loss": 1.5}, "RequestError", "element loss"),
        ({"machine": 0}, "ProtocolError", "cannot be machine 0"),
        ({"machine": 2}, "ProtocolError", "cannot be machine 2"),
        ({"names": ["edge"], "machine": 1}, "ProtocolError", "machine 1 of 1"),
        ({"names": ["edge", "cloud\n00:00 FAKE"]}, "ProtocolError", "machine names"),
    ],
)
def test_an_opening_that_cannot_be_served_is_refused_with_the_reason(
    lab: Run, changes: dict[str, object], error: str, says: str
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.link() as device:
            failed = await lab.refused(device, **changes)
            assert failed.error == error
            assert says in failed.message

    lab(scene)


GOOD, BYTES = stream(0, 0, 4)


@pytest.mark.parametrize(
    ("header", "payload", "says"),
    [
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
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.say(header, payload)
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (-1, "ProtocolError")
            assert says in failed.message
        assert not lab.worker.machine._open

    lab(scene)


def test_frames_for_runs_that_never_begin_end_the_session_before_they_fill_the_memory(
    lab: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post, "MAX_EARLY_FRAMES", 10)

    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            for step in range(11):
                await device.say(msgspec.structs.replace(GOOD, run=2, step=step), BYTES)
            assert "not begun" in (await device.hear(Failed)).message

    lab(scene)


def test_devices_that_vanish_hold_no_more_places_than_there_are(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        for n in range(5):  # more than the session limit
            async with lab.session(session=str(n)) as (device, opened):
                assert not opened.known
                await lab.begun(device)
                device.raw.kill()
        assert len(lab.worker.machine._open) == 2

    lab(scene)


def test_memory_is_shared_by_all_sessions_of_a_worker(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        spec = lab.checkpoint.architecture.spec
        weights = cost.assigned_weight_bytes(spec, lab.cut, 1, Dtype.FP32, Weights.FULL)
        cache = cost.assigned_kv_bytes(spec, lab.cut, 1, Dtype.FP32, 24)
        lab.worker.machine._memory_limit = int(weights + 1.5 * cache)
        async with lab.session(session="first") as (first, _), lab.session(session="second") as (second, _):
            await lab.begun(first)
            failed = await second.ask(lab.begin(), Failed)
            assert (failed.run, failed.error) == (1, "MemoryTooSmall")
            assert "together with 1 other sessions" in failed.message
            assert failed.retry_after_s is not None, "it would fit without them"
            assert await lab.decode(first, 0, 4, 5) == lab.expected[3:5]
            await first.ask(Close(), Closed)
            await lab.begun(second, 2)  # there is room now
            await second.ask(Close(), Closed)

    lab(scene)


THREE: dict[str, object] = {"names": ["edge", "cloud", "third"]}


@pytest.mark.parametrize(
    ("opening", "changes"),
    [
        ({}, {"dial": {0: "127.0.0.1:9"}}),
        ({}, {"dial": {9: "127.0.0.1:9"}}),
        (THREE, {"direct": [(1, 2), (2, 1)], "dial": {2: "127.0.0.1:9"}}),
        (THREE, {"direct": [(1, 1)]}),
        (THREE, {"direct": [(1, 7)]}),
        (THREE, {"direct": [(2, 1)], "dial": {2: "127.0.0.1:9"}}),
    ],
)
def test_a_device_cannot_make_a_worker_dial_what_it_likes(
    lab: Run, opening: dict[str, object], changes: dict[str, object]
) -> None:
    async def connect(address: str) -> Link:
        raise AssertionError(f"dialled {address}")

    async def scene(lab: Lab) -> None:
        lab.worker._connect = connect
        async with lab.session(**opening) as (device, _):
            failed = await device.ask(lab.begin(**changes), Failed)
            assert (failed.run, failed.error) == (1, "ProtocolError")

    lab(scene)


def test_an_account_of_any_length_gets_through() -> None:
    many = [Interval(n % 60, n, n / 7, n / 7 + 1, n % 5) for n in range(100_000)]
    halted = Halted(1, [], 6)
    header, payload = unpack(pack(halted, messages.pack_intervals(many)))
    assert header == halted
    assert messages.unpack_intervals(payload) == tuple(many)
    with pytest.raises(messages.ProtocolError):
        messages.unpack_intervals(payload[:-1])
    strange = pack(Halted(1, [messages.Crossed(0, Kind.TOKEN, 1, 0, 2, 8)], 6)).replace(b"token", b"taken")
    with pytest.raises(messages.ProtocolError):
        unpack(strange)
    with pytest.raises(BrokenInvariant, match="belongs in the payload"):
        pack(Failed("x", "y" * 2_000_000))


def test_sessions_beyond_the_limit_are_refused_and_the_others_go_on(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session(session="first") as (first, _), lab.session(session="second"), lab.link() as third:
            await lab.begun(first)
            failed = await lab.refused(third, session="third")
            assert "all 2 sessions" in failed.message
            assert failed.retry_after_s is not None
            assert await lab.decode(first, 0, 4, 5) == lab.expected[3:5]

    lab(scene)


def test_a_silent_session_is_closed_after_the_idle_limit(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        lab.worker.idle_s = 0.3
        async with lab.session() as (device, _):
            await lab.begun(device)
            for _ in range(4):  # any word is a sign of life
                await asyncio.sleep(0.15)
                await device.ask(Ping(0), Pong)
            failed = await device.hear(Failed)
            assert "0.3 s" in failed.message
        assert not lab.worker.machine._open, "nobody is there to come back"
        lab.worker.idle_s = 5

    lab(scene)


# The device's side of the same


def edge_to(checkpoint: Checkpoint, machine: Machine, serve: Callable[[Link], object]) -> tuple[Edge, set[object]]:
    tasks: set[object] = set()

    async def connect(_: str) -> Link:
        near, far = memory_pair(("device", "cloud"))

        async def run() -> None:
            with suppress(LinkDied):  # the device breaks a dead link off
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

    async def serve(raw: Link) -> None:
        link = Sequenced(raw)
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


PARTITION = "edge[0:2] cloud[2:4]"
SOON = RecoveryRules(budget_s=0.3)


def beside_a_worker(
    tiny: Callable[[str], Path],
    *,
    kill: bool = True,
    returns: bool = True,
    room_for: str = "all:edge",
    rules: RecoveryRules | None = None,
    patience: float = 1.0,
) -> RequestRecord:
    """12 tokens across a cut, whose link is killed at the third; then the worker is there again, or is not. The device
    has memory for its share of one partition and no more."""
    checkpoint = Checkpoint(tiny("llama"))
    spec = checkpoint.architecture.spec
    most = Partition.parse(room_for, spec, ("edge", "cloud"))
    # Beside its share of the cut: what it computes while it holds that needs a cache of its own.
    caches = cost.assigned_kv_bytes(spec, most, 0, Dtype.FP32, 15) + cost.assigned_kv_bytes(
        spec, Partition.cut(spec, 2), 0, Dtype.FP32, 15
    )
    memory = cost.assigned_weight_bytes(spec, most, 0, Dtype.FP32, Weights.FULL) + caches

    async def play() -> RequestRecord:
        with Machine(checkpoint, memory_bytes=int(memory) + 1) as machine, Machine(checkpoint) as other:
            worker = Worker(other)
            ends: list[MemoryLink] = []

            async def serve(link: Link) -> None:
                if ends and not returns:
                    return
                ends.append(link)  # type: ignore[arg-type]
                await worker.handle(link)

            edge, _ = edge_to(checkpoint, machine, serve)
            decision = Decision(edge.partition(PARTITION), patience=patience)
            async with edge.generate([1, 2, 3], decision, max_new_tokens=12, stop_ids=(), rules=rules) as generation:
                count = 0
                async for _token in generation:
                    count += 1
                    if count == 3 and kill:
                        ends[0].kill()
            return generation.record

    return asyncio.run(play())


@pytest.fixture(scope="module")
def undisturbed(tiny: Callable[[str], Path]) -> tuple[int, ...]:
    record = beside_a_worker(tiny, kill=False)
    assert not record.is_degraded
    assert not record.events
    assert len(set(record.token_ids)) > 5, "a run that repeats itself would prove nothing"
    return record.token_ids


def test_a_worker_that_is_lost_and_comes_back_is_gone_on_with(
    tiny: Callable[[str], Path], undisturbed: tuple[int, ...]
) -> None:
    record = beside_a_worker(tiny, room_for=PARTITION)
    assert record.token_ids == undisturbed
    assert record.is_degraded
    assert [run.partition for run in record.runs] == [PARTITION] * len(record.runs)
    assert [run.why for run in record.runs] == ["admission", "fault"], "its caches were there: nothing was filled"
    assert "cloud was lost in mid-generation" in record.runs[0].ended
    assert record.runs[1].start == record.runs[1].known - 1
    kinds = [event.kind for event in record.events]
    assert kinds.index("lost") < kinds.index("waiting" if "waiting" in kinds else "back")
    assert any("cloud: back, nothing was lost" in event.text for event in record.events)


@pytest.mark.parametrize("patience", [0.0, 1.0])
def test_a_worker_that_does_not_come_back_is_done_without(
    patience: float, tiny: Callable[[str], Path], undisturbed: tuple[int, ...]
) -> None:
    record = beside_a_worker(tiny, returns=False, patience=patience)
    assert record.token_ids == undisturbed
    assert record.partition == "all:edge"
    assert any(event.kind == "failed-over" and "all:edge" in event.text for event in record.events)


def test_a_worker_that_does_not_come_back_and_cannot_be_done_without_is_named(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(LinkDied, match="cloud was lost in mid-generation"):
        beside_a_worker(tiny, returns=False, room_for=PARTITION, rules=SOON)


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
            with pytest.raises(MemoryTooSmall, match=r"edge would hold .* of weights .* and may count on 100.0 kB"):
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


# Dies when engine/worker.py says `if is_taken is None:` for `if not is_taken:`.
def test_devices_that_open_sessions_in_floods_are_told_to_come_back_one_by_one(lab: Run) -> None:
    async def scene(lab: Lab) -> None:
        refused: list[float] = []
        lab.worker._door = Door(0.1, 3)
        for number in range(5):
            async with lab.link() as device:
                await device.ask(lab.hello(), Welcome)
                await device.say(lab.opening(session=str(number)))
                frame = await device.frame()
                assert frame is not None
                header, _ = unpack(frame)
                if isinstance(header, Failed):
                    assert header.error == "WorkerFailed"
                    assert header.retry_after_s is not None
                    refused.append(header.retry_after_s)
                else:
                    await device.ask(Close(), Closed)
        assert len(refused) == 2, "three are taken in at once"
        assert refused[1] > refused[0] + 5, "each has a moment of its own"
        lab.worker._door = Door(1e6, 100)  # the scene is over

    lab(scene)
