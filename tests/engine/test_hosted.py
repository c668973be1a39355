"""A worker's session, word by word: it outlives its links for a while, and what comes late, twice or out of turn does
it no harm."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from engine.raw_sessions import Lab, Play, Speaker, held, kept, stream
from splitwise_llm import cost
from splitwise_llm.engine.hosted import Hosted
from splitwise_llm.errors import ProtocolError
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Kind
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire import messages
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import (
    Begun,
    Close,
    Closed,
    Data,
    Failed,
    Fetch,
    Filled,
    Halt,
    Halted,
    Opened,
    Ping,
    Pong,
    Rows,
    Welcome,
)

ALL_GROUPS = (0, 1, 2, 3)


# Runs


def test_a_run_gives_the_models_tokens_and_counts_what_it_sent(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, opened):
            assert (opened.known, held(opened), kept(opened)) == (False, {}, {})
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 9) == lab.expected[3:9]
            halted, payload = await _halt(device)
            mine = [c for c in lab.plan(lab.cut).traffic(4, 6) if c.src == 1]
            assert lab.sent(halted) == tuple(mine)
            assert held(halted) == {4: (ALL_GROUPS, 9), 6: (ALL_GROUPS, 9)}
            assert kept(halted) == {4: ((0, 9),)}
            assert {i.run for i in messages.unpack_intervals(payload)} == {1}
            await device.ask(Close(), Closed)
            assert await device.frame() is None, "it hangs up"
        async with lab.session() as (_, opened):
            assert (opened.known, held(opened)) == (False, {}), "what was closed is forgotten"

    scene(one)


async def _halt(device: Speaker, run: int = 1, at_once: bool = False) -> tuple[Halted, memoryview]:
    await device.say(Halt(run, at_once))
    halted, payload = await device.hear_all(Halted)
    assert halted.run == run
    return halted, payload


def test_data_out_of_order_and_twice_changes_nothing(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.feed(device, 1, 4, 5)  # before the run itself is known here
            await lab.feed(device, 1, 4, 5)
            await lab.begun(device)
            await lab.feed(device, 2, 5, 6)
            await lab.feed(device, 0, 0, 4)
            await lab.feed(device, 0, 0, 4)
            tokens = [await lab.token(device, step) for step in range(3)]
            assert tokens == lab.expected[3:6]
            assert await device.is_silent(), "no token comes twice"
            halted, _ = await _halt(device)
            assert [c.count for c in lab.sent(halted)] == [3]

    scene(one)


def test_what_comes_for_a_run_that_is_over_or_was_replaced_is_dropped(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 6) == lab.expected[3:6]
            await _halt(device)
            await lab.feed(device, 3, 6, 7)
            await lab.begun(device, 2, start=5, known=6)
            await lab.feed(device, 0, 0, 4)  # of run 1, and of another shape than run 2's
            await lab.feed(device, 0, 5, 6, run=2)
            assert await lab.token(device, 0, run=2) == lab.expected[5]
            await lab.begun(device, 3, start=5, known=6)  # without a word to run 2
            await lab.feed(device, 1, 6, 7, run=2)
            await lab.feed(device, 0, 5, 6, run=3)
            assert await lab.token(device, 0, run=3) == lab.expected[5]
            over, _ = await _halt(device, 1)
            assert not over.crossed, "it is over: all that is left to say is what is held"
            assert held(over)[4] == (ALL_GROUPS, 6)
            await lab.feed(device, 1, 6, 7, run=3)
            assert await lab.token(device, 1, run=3) == lab.expected[6]

    scene(one)


# Dies when engine/hosted.py says `if begin.run < 0:` for `if begin.run in self._running:`.
def test_a_run_that_has_begun_is_not_begun_again(scene: Play) -> None:
    """Nobody would ever end the task of the one before it."""

    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.say(lab.begin())
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (1, "ProtocolError")
            assert await lab.decode(device, 0, 4, 6) == lab.expected[3:6]

    scene(one)


def test_a_token_loop_is_halted_at_a_token_and_goes_on_from_there(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        everything = Partition.all_on(lab.checkpoint.architecture.spec, 1)
        prompt = Data(1, 0, -1, "prompt", 0, 1, 0, "ids", 4, 1)
        ids = [17, 3, 99, 54]
        async with lab.session(session="undisturbed") as (device, _):
            await lab.begun(device, 1, everything, tokens=18)
            await device.say(prompt, _ids(ids))
            whole = [await lab.token(device, step) for step in range(18)]
            await device.ask(Close(), Closed)
        async with lab.session() as (device, _):
            await lab.begun(device, 1, everything, tokens=18)
            await device.say(prompt, _ids(ids))
            tokens = [await lab.token(device, step) for step in range(3)]
            await device.say(Halt(1))
            halted: Halted | None = None
            while halted is None:
                frame = await device.frame()
                assert frame is not None
                header, payload = messages.unpack(frame)
                if isinstance(header, Data):
                    tokens.append(int.from_bytes(payload, "little"))
                else:
                    assert isinstance(header, Halted)
                    halted = header
            assert sum(c.count for c in halted.crossed if c.kind is Kind.TOKEN) == len(tokens) < 18
            filled = 4 + len(tokens) - 1
            assert {positions for _, positions in held(halted).values()} == {filled}
            again, left = ids + tokens, 18 - len(tokens)
            await lab.begun(device, 2, everything, start=filled, known=len(again), tokens=left)
            await device.say(msgspec.structs.replace(prompt, run=2, rows=1), _ids(again[filled:]))
            assert tokens + [await lab.token(device, step, run=2) for step in range(left)] == whole

    scene(one)


def _ids(ids: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in ids)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_run_that_waits_for_others_is_halted_at_once(scene: Play, at_once: bool) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
            halted, _ = await asyncio.wait_for(_halt(device, at_once=at_once), 2)
            assert held(halted)[4] == (ALL_GROUPS, 6)

    scene(one)


# Dies when engine/hosted.py says `header.at_once and False` for `header.at_once and header.run in self._running`.
def test_a_token_loop_that_is_to_halt_at_a_token_and_gets_none_is_still_halted_at_once(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, 1, Partition.all_on(lab.checkpoint.architecture.spec, 1), tokens=18)
            await device.say(Halt(1))  # no prompt comes: there is no next token
            assert await device.is_silent()
            await asyncio.wait_for(_halt(device, at_once=True), 2)  # the first of two answers
            await device.hear(Halted)
            await lab.begun(device, 2)
            assert await lab.decode(device, 0, 4, 6, run=2) == lab.expected[3:6]

    scene(one)


def test_pings_are_answered_while_a_run_waits(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            pong = await device.ask(Ping(0, stamp=7), Pong)
            assert pong.stamp == 7

    scene(one)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"start": 6, "known": 8}, "ProtocolError", "half 4 is cached up to 4 only"),
        ({"start": 4, "known": 4}, "ProtocolError", "positions 4 to 4"),
        ({"start": 4, "known": 24, "tokens": 2}, "ProtocolError", "a session of 24 positions"),
        ({"partition": b"\x01\x00"}, "PartitionError", "action vector"),
        ({"wire": "fp64"}, "RequestError", "fp64"),
        ({"tokens": 0, "first": 4, "stop": 4, "feeder": 1}, "PartitionError", "halves 4 to 4"),
        ({"tokens": 0, "first": 4, "stop": 8}, "PartitionError", "fed by None"),
        ({"tokens": 0, "start": 6, "known": 8, "first": 4, "stop": 7, "feeder": 0}, "ProtocolError", "a fill begins"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_the_session_lives(
    scene: Play, changes: dict[str, object], error: str, says: str
) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 4)
            failed = await device.ask(lab.begin(2, **changes), Failed)
            assert (failed.run, failed.error) == (2, error)
            assert says in failed.message
            await lab.begun(device, 3, start=3, known=4)
            assert await lab.decode(device, 3, 4, 5, run=3) == lab.expected[3:5]

    scene(one)


def test_a_run_that_does_not_fit_is_refused_and_one_that_does_goes_on_from_what_is_cached(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        spec, cloud = lab.checkpoint.architecture.spec, lab.worker.machine
        mine = cost.assigned_weight_bytes(spec, lab.cut, 1, Dtype.FP32, Weights.FULL)
        cloud._memory_limit = int(mine + 3 * cost.assigned_kv_bytes(spec, lab.cut, 1, Dtype.FP32, 24))
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
            failed = await device.ask(lab.begin(2, Partition.all_on(spec, 1)), Failed)
            assert (failed.run, failed.error) == (2, "MemoryTooSmall")
            await lab.begun(device, 3, start=6, known=7)
            assert await lab.decode(device, 6, 7, 8, run=3) == lab.expected[6:8]
        cloud._memory_limit = None

    scene(one)


def test_what_is_wrong_in_a_runs_numbers_ends_the_run_only(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            header, payload = stream(0, 0, 4)
            await device.say(header, b"\xff" * len(payload))
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (1, "ProtocolError")
            assert "NaN" in failed.message
            await lab.begun(device, 2)
            assert await lab.decode(device, 0, 4, 5, run=2) == lab.expected[3:5]

    scene(one)


# Links that die


def test_a_link_that_dies_leaves_the_caches_for_the_next_one(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 7) == lab.expected[3:7]
            device.raw.kill()
        async with lab.session() as (device, opened):
            assert opened.known
            assert held(opened) == {4: (ALL_GROUPS, 7), 6: (ALL_GROUPS, 7)}
            assert kept(opened) == {4: ((0, 7),)}
            await lab.feed(device, 4, 7, 8)  # on its way when the link died: its run is over
            await lab.begun(device, 2, start=7, known=8)
            assert await lab.decode(device, 7, 8, 10, run=2) == lab.expected[7:10]

    scene(one)


def test_a_link_closed_without_a_word_leaves_them_too(scene: Play) -> None:
    """A device hangs up a link that it takes for dead; whether that reaches the worker is chance."""

    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 7)
            await device.link.close()
        async with lab.session() as (_, opened):
            assert opened.known
            assert held(opened)[4] == (ALL_GROUPS, 7)

    scene(one)


def test_a_good_bye_counts_though_its_answer_finds_nobody(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.say(Close())
            await device.link.close()
        assert not lab.worker.machine._open

    scene(one)


# Dies when engine/hosted.py says `(begin.wire,)` for `(begin.wire, begin.prefill_wire or begin.wire)`.
def test_a_run_in_an_unknown_precision_is_refused_by_name(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            for change in ({"wire": "fp8"}, {"prefill_wire": "fp8"}):
                failed = await device.ask(lab.begin(1, **change), Failed)
                assert "unknown wire precision 'fp8'" in failed.message

    scene(one)


def test_a_link_that_dies_in_mid_prefill_leaves_what_was_filled(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, known=8, prefill_chunk=4)
            await lab.feed(device, 0, 0, 4)
            walker = lab.worker._sessions["s"]._running[1].walker
            for _ in range(5000):  # the second chunk never comes, so nothing is sent
                if walker.intervals:
                    break
                await asyncio.sleep(0.001)
            device.raw.kill()
        async with lab.session() as (device, opened):
            assert held(opened) == {4: (ALL_GROUPS, 4), 6: (ALL_GROUPS, 4)}
            await lab.begun(device, 2, start=4, known=8)
            assert await lab.decode(device, 4, 8, 9, run=2) == lab.expected[7:9]

    scene(one)


def test_a_device_that_is_back_while_its_last_run_still_computes_finds_it_ended(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
            busy = asyncio.create_task(lab.worker.machine.compute(lambda: time.sleep(0.3)))
            await lab.feed(device, 3, 6, 7)
            device.raw.kill()
            await asyncio.sleep(0.05)  # the worker has noticed
            async with lab.session() as (again, opened):
                assert busy.done()
                assert opened.known
                filled = held(opened)[4][1]
                assert filled in (6, 7), "the last step was computed, or was not"
                await lab.begun(again, 2, start=filled, known=filled + 1)
                stop = filled + 2
                assert await lab.decode(again, filled, filled + 1, stop, run=2) == lab.expected[filled:stop]

    scene(one)


def test_a_link_that_dies_before_the_worker_has_answered_costs_nothing(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
            device.raw.kill()
        for turns in range(6):
            async with lab.link() as device:
                await device.ask(lab.hello(), Welcome)
                await device.say(lab.opening())
                for _ in range(turns):
                    await asyncio.sleep(0)
                device.raw.kill()
        async with lab.session() as (_, opened):
            assert held(opened)[4] == (ALL_GROUPS, 6)

    scene(one)


def test_after_the_lease_everything_is_forgotten(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 5)
            device.raw.kill()
        assert lab.worker.machine._open
        await asyncio.sleep(0.3)
        assert not lab.worker.machine._open
        async with lab.session() as (_, opened):
            assert (opened.known, held(opened), kept(opened)) == (False, {}, {})

    scene(one, lease_s=0.1)


def test_each_loss_has_a_lease_of_its_own(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        for _ in range(4):  # longer than the lease, all in all
            async with lab.session() as (device, opened):
                if not opened.known:
                    await lab.begun(device)
                    await lab.decode(device, 0, 4, 5)
                await asyncio.sleep(0.3)
                device.raw.kill()
            await asyncio.sleep(0.1)
        async with lab.session() as (_, opened):
            assert (opened.known, held(opened)[4]) == (True, (ALL_GROUPS, 5))

    scene(one, lease_s=0.5)


def test_a_second_link_takes_over_from_one_that_seems_alive(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (first, _):
            await lab.begun(first)
            assert await lab.decode(first, 0, 4, 6) == lab.expected[3:6]
            async with lab.session() as (second, opened):
                assert opened.known
                assert held(opened)[4] == (ALL_GROUPS, 6)
                await lab.begun(second, 2, start=6, known=7)
                assert await first.frame() is None, "the first one is hung up"
                first.raw.kill()  # what becomes of it does not matter any more
                assert await lab.decode(second, 6, 7, 9, run=2) == lab.expected[6:9]
                await asyncio.sleep(0.2)
                assert "s" in lab.worker._sessions, "no lease began with the end of the first link"

    scene(one, lease_s=0.1)


def test_rubbish_on_a_link_that_has_a_successor_ends_no_session(scene: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last frame may be taken while the next link is being taken over."""
    real = Hosted._take_orders
    links: list[object] = []

    async def take_orders(self: Hosted, link: Link, *rest: Any) -> None:
        links.append(link)
        try:
            await real(self, link, *rest)
        except asyncio.CancelledError:
            if link is not links[0]:
                raise
            raise ProtocolError("rubbish") from None

    monkeypatch.setattr(Hosted, "_take_orders", take_orders)

    async def one(lab: Lab) -> None:
        async with lab.session() as (first, _):
            await lab.begun(first)
            assert await lab.decode(first, 0, 4, 6) == lab.expected[3:6]
            async with lab.session() as (second, opened):
                assert held(opened)[4] == (ALL_GROUPS, 6)
                first.raw.kill()
                await asyncio.sleep(0.1)
                assert "s" in lab.worker._sessions
                await lab.begun(second, 2, start=6, known=7)
                assert await lab.decode(second, 6, 7, 9, run=2) == lab.expected[6:9]

    scene(one)


def test_another_request_under_the_same_name_is_refused_and_the_session_goes_on(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 5) == lab.expected[3:5]
            async with lab.link() as other:
                failed = await lab.refused(other, seed=9)
                assert failed.error == "ProtocolError"
                assert "another request" in failed.message
            await lab.feed(device, 2, 5, 6)
            assert await lab.token(device, 2) == lab.expected[5]

    scene(one)


# How many


def test_the_session_left_longest_ago_makes_room_and_one_in_use_does_not(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        for name in ("old", "new"):
            async with lab.session(session=name) as (device, _):
                await lab.begun(device)
                await lab.decode(device, 0, 4, 5)
                device.raw.kill()
        async with lab.session(session="third") as (third, first):
            assert not first.known
            async with lab.session(session="new") as (_, opened):
                assert (opened.known, held(opened)[4]) == (True, (ALL_GROUPS, 5))
                async with lab.link() as fourth:
                    failed = await lab.refused(fourth, session="old")
                    assert failed.error == "WorkerFailed"
                    assert "all 2 sessions are taken; try again in" in failed.message
                    assert failed.retry_after_s is not None
                    assert 0 < failed.retry_after_s < 60
                await lab.begun(third)
                assert await lab.decode(third, 0, 4, 5) == lab.expected[3:5]

    scene(one)


def test_nobody_is_turned_out_for_a_session_that_cannot_be(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        for name in ("old", "new"):
            async with lab.session(session=name) as (device, _):
                await lab.begun(device)
                await lab.decode(device, 0, 4, 5)
                device.raw.kill()
        async with lab.link() as third:
            assert (await lab.refused(third, session="third", capacity=0)).error == "RequestError"
        async with lab.session(session="old") as (_, opened):
            assert opened.known

    scene(one)


def test_there_are_never_more_sessions_than_allowed_however_many_come_at_once(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        for name in ("old", "new"):
            async with lab.session(session=name) as (device, _):
                device.raw.kill()
        most = 0

        async def come(name: str) -> bool:
            nonlocal most
            async with lab.link() as device:
                await device.ask(lab.hello(), Welcome)
                await device.say(lab.opening(session=name))
                frame = await device.frame()
                assert frame is not None
                most = max(most, len(lab.worker._sessions))
                await asyncio.sleep(0.1)
                return isinstance(messages.unpack(frame)[0], Opened)

        came = await asyncio.gather(*(come(f"new {n}") for n in range(5)))
        assert (sum(came), most) == (2, 2)

    scene(one)


# Caches


def test_a_fill_walks_a_piece_from_a_stream_that_is_fed_and_the_run_goes_on_from_it(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            fill = lab.begin(1, tokens=0, known=6, first=4, stop=7, feeder=0)
            await device.ask(fill, Begun)
            header, payload = stream(0, 0, 6)
            await device.say(msgspec.structs.replace(header, after=-1), payload)
            assert (await device.hear(Filled)).run == 1
            halted, _ = await _halt(device)
            assert held(halted) == {4: (ALL_GROUPS, 6), 6: (ALL_GROUPS, 6)}
            await lab.begun(device, 2, start=6, known=7)
            assert await lab.decode(device, 6, 7, 9, run=2) == lab.expected[6:9]

    scene(one)


def test_a_fill_beside_a_run_ends_neither(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 5)
            deeper = lab.partition("edge[0:1] cloud[1:4]")
            await device.ask(lab.begin(2, deeper, tokens=0, known=5, first=2, stop=3, feeder=0), Begun)
            await lab.feed(device, 2, 5, 6)
            assert await lab.token(device, 2) == lab.expected[5]
            header, payload = stream(0, 0, 5, run=2)
            await device.say(msgspec.structs.replace(header, after=-1), payload)
            assert (await device.hear(Filled)).run == 2
            await lab.feed(device, 3, 6, 7)
            assert await lab.token(device, 3) == lab.expected[6]
            halted, _ = await _halt(device, 2)
            assert held(halted) == {2: (ALL_GROUPS, 5), 4: (ALL_GROUPS, 7), 6: (ALL_GROUPS, 7)}

    scene(one)


def test_keys_and_values_are_carried_from_one_session_to_the_next(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        rows: list[tuple[int, bytes]] = []
        async with lab.session(session="from") as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
            for half in (4, 6):
                await device.say(Fetch(half, [0, 1, 2, 3], 0, 6))
                header, payload = await device.hear_all(Rows)
                assert (header.half, header.start, header.stop) == (half, 0, 6)
                rows.append((half, bytes(payload)))
            await device.ask(Close(), Closed)
        async with lab.session(session="to") as (device, _):
            for half, payload in rows:
                await device.say(Rows(half, [0, 1, 2, 3], 0, 6, lab.cut.to_bytes()), payload)
            await lab.begun(device, 1, start=6, known=7)
            assert await lab.decode(device, 6, 7, 9) == lab.expected[6:9]

    scene(one)


@pytest.mark.parametrize("fetch", [Fetch(4, [0], 0, 9), Fetch(0, [0], 0, 1), Fetch(4, [0], 3, 2), Fetch(4, [9], 0, 1)])
def test_rows_that_are_not_here_are_said_not_to_be(scene: Play, fetch: Fetch) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 4) == lab.expected[3:4]
            await device.say(fetch)
            rows, payload = await device.hear_all(Rows)
            assert (rows.half, rows.units, bytes(payload)) == (fetch.half, [], b"")
            await lab.feed(device, 1, 4, 5)
            assert await lab.token(device, 1) == lab.expected[4]

    scene(one)


@pytest.mark.parametrize(
    ("rows", "num_bytes"),
    [
        (Rows(4, [0], 0, 2, b"cut"), 7),
        (Rows(4, [0], 9, 11, b"cut"), 256),
        (Rows(4, [0], 23, 25, b"cut"), 256),
        (Rows(0, [0], 0, 2, b"cut"), 256),
        (Rows(4, [9], 0, 2, b"cut"), 256),
        (Rows(4, [0], 0, 2, b"none"), 256),
    ],
)
def test_rows_that_have_no_place_here_are_not_taken_and_a_run_goes_on(scene: Play, rows: Rows, num_bytes: int) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            assert await lab.decode(device, 0, 4, 4) == lab.expected[3:4]
            partition = lab.cut.to_bytes() if rows.partition == b"cut" else rows.partition
            await device.say(msgspec.structs.replace(rows, partition=partition), bytes(num_bytes))
            await lab.feed(device, 1, 4, 5)
            assert await lab.token(device, 1) == lab.expected[4]
            halted, _ = await _halt(device)
            assert held(halted) == {4: (ALL_GROUPS, 5), 6: (ALL_GROUPS, 5)}

    scene(one)


def test_a_word_out_of_place_ends_the_session(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.say(lab.opening())
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (-1, "ProtocolError")
            assert "got Open in mid-session" in failed.message
        assert "s" not in lab.worker._sessions

    scene(one)


def test_streams_of_tokens_that_the_next_run_does_not_know_are_not_kept(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 8)
            await lab.begun(device, 2, start=5, known=6)
            halted, _ = await _halt(device, 2)
            assert kept(halted) == {4: ((0, 6),)}
            assert held(halted)[4] == (ALL_GROUPS, 5)

    scene(one)
