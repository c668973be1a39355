"""What a worker makes while its device is out of reach is not made twice: who comes back is told of it, and takes it
where it goes on from the text there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from engine.raw_sessions import Lab, Play, held
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision
from splitwise_llm.engine import hosted
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.machine import Machine
from splitwise_llm.engine.worker import Worker
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec
from splitwise_llm.wire.faults import Fault, Injection
from splitwise_llm.wire.faulty import FaultyConnect
from splitwise_llm.wire.injector import Faults
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.memory import memory_pair
from splitwise_llm.wire.messages import Away, Data, Halt, Halted, unpack

PROMPT, TOKENS = [17, 3, 99, 54], 18
RULES = RecoveryRules(
    least_limit_s=0.15, heartbeat_s=0.1, base_s=0.01, cap_s=0.2, floor_s=0.005, attempt_s=0.15, budget_s=10.0
)
OUTAGE_S, AT_TOKEN = 1.0, 3


# The worker, word by word


def _ids(ids: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in ids)


async def _left_alone(lab: Lab, tokens: int = TOKENS) -> tuple[list[int], list[int]]:
    """What a token loop says undisturbed, and the first of it, whose device then hung up."""
    everything, prompt = lab.partition("all:cloud"), Data(1, 0, -1, "prompt", 0, 1, 0, "ids", 4, 1)
    said: list[list[int]] = []
    for name, count in (("undisturbed", tokens), ("s", 2)):
        async with lab.session(session=name) as (device, _):
            await lab.begun(device, 1, everything, tokens=tokens)
            await device.say(prompt, _ids(PROMPT))
            said.append([await lab.token(device, step) for step in range(count)])
    return said[0], said[1]


async def _until_made(lab: Lab, count: int) -> None:
    """The session `s` has made so many."""
    async with asyncio.timeout(5):
        session = lab.worker._sessions["s"]
        while not any(len(one.walker.made) >= count for one in session._running.values()):  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)


# Dies when engine/hosted.py says `await self._stop_runs()` for `await self._stop_runs(besides_loops=True)`.
def test_a_token_loop_goes_on_alone_and_whoever_comes_back_is_told_what_it_made(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        whole, _ = await _left_alone(lab)
        await _until_made(lab, TOKENS)
        async with lab.session() as (_, opened):
            assert opened.known
            assert opened.away == Away(1, 4, whole)
            assert {filled for _, filled in held(opened).values()} == {4 + TOKENS - 1}
        async with lab.session() as (device, opened):
            assert opened.away == Away(1, 4, whole), "it is said until the session has gone on"
            await lab.begun(device, 2, start=6, known=7)
        async with lab.session() as (_, opened):
            assert opened.away is None

    scene(one)


def test_what_another_text_has_gone_on_from_is_cut_on_the_devices_word(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        await _left_alone(lab)
        await _until_made(lab, TOKENS)
        async with lab.session() as (device, _):
            cut = await device.ask(Halt(1, keep=7), Halted)
            assert {filled for _, filled in held(cut).values()} == {7}
        async with lab.session() as (_, opened):
            assert opened.away is None

    scene(one)


# Dies when engine/hosted.py says `if keep > 10**9 or` for `if keep >= 0 or`.
def test_a_loop_that_is_ended_at_once_leaves_what_the_device_knows(scene: Play) -> None:
    """What it made behind that nobody takes any more: another text may go on from there."""

    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, 1, lab.partition("all:cloud"), tokens=TOKENS)
            await device.say(Data(1, 0, -1, "prompt", 0, 1, 0, "ids", 4, 1), _ids(PROMPT))
            for step in range(4):
                await lab.token(device, step)
            await device.say(Halt(1, at_once=True, keep=5))
            while not isinstance(halted := unpack(await device.frame() or b"")[0], Halted):
                pass
            assert {filled for _, filled in held(halted).values()} == {5}
        async with lab.session() as (_, opened):
            assert opened.away is None, "the device has said how much of it is right"

    scene(one)


# Dies when engine/hosted.py says `if walker.needs_nobody and not walker.halting` for `if walker.makes_tokens_alone`.
def test_a_loop_whose_last_word_is_lost_says_what_it_made_when_the_device_is_back(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, 1, lab.partition("all:cloud"), tokens=TOKENS)
            await device.say(Data(1, 0, -1, "prompt", 0, 1, 0, "ids", 4, 1), _ids(PROMPT))
            first = await lab.token(device, 0)
            await device.say(Halt(1))
            await asyncio.sleep(0.1)
        async with lab.session() as (_, opened):
            assert opened.away is not None
            assert (opened.away.run, opened.away.start, opened.away.ids[0]) == (1, 4, first)
            assert {filled for _, filled in held(opened).values()} == {4 + len(opened.away.ids) - 1}

    scene(one)


def test_a_run_that_needs_its_device_ends_with_the_link(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await lab.decode(device, 0, 4, 6)
        await asyncio.sleep(0.05)
        assert not lab.worker._sessions["s"]._running
        async with lab.session() as (_, opened):
            assert (opened.known, opened.away) == (True, None)

    scene(one)


def test_nobody_computes_for_a_device_that_never_comes_back(scene: Play) -> None:
    async def one(lab: Lab) -> None:
        await _left_alone(lab)
        await asyncio.sleep(0.3)
        assert "s" not in lab.worker._sessions

    scene(one, lease_s=0.1)


# The session on the device


SLOW = DeviceSpec("slow", 1e12, 1e12, 1e12, launch_s=2e-2)
"""Three layers take it about 60 ms, QUICK 15."""
QUICK = DeviceSpec("quick", 1e12, 1e12, 1e12, launch_s=5e-3)


async def _disturbed(directory: Path, patience: float, tokens: int = 16) -> RequestRecord:
    """A generation of the worker's alone, whose link is silent for a while."""
    checkpoint, serving = Checkpoint(directory), set[asyncio.Task[None]]()
    with ExitStack() as stack:
        worker = Worker(stack.enter_context(Machine(checkpoint, emulate=QUICK)))
        device = stack.enter_context(Machine(checkpoint, emulate=SLOW))

        async def connect(name: str) -> Link:
            near, far = memory_pair(("device", name))

            async def serve() -> None:
                await worker.handle(far)
                await far.close()

            serving.add(asyncio.create_task(serve()))
            return near

        faults = Faults()
        edge = Edge(device, ("cloud",), FaultyConnect(connect, {"cloud": faults}))
        decision = Decision(Partition.all_on(checkpoint.architecture.spec, 1), patience=patience)
        generation = edge.generate(PROMPT, decision, max_new_tokens=tokens, stop_ids=(), rules=RULES)
        count = 0
        async with generation:
            async for _ in generation:
                count += 1
                if count == AT_TOKEN:
                    faults.inject(Injection(Fault.DROP_BOTH, 0.0, for_s=OUTAGE_S))
        await worker.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        return generation.record


async def _undisturbed(directory: Path, tokens: int = 16) -> tuple[int, ...]:
    async with in_process(directory, ("cloud",)) as edge:
        generation = edge.generate(PROMPT, "all:cloud", max_new_tokens=tokens, stop_ids=())
        async with generation:
            async for _ in generation:
                pass
        return generation.record.token_ids


@pytest.mark.parametrize("patience", [0.0, float("inf")], ids=["goes on elsewhere", "waits"])
def test_tokens_made_during_an_outage_come_at_once_when_it_is_over(
    tiny: Callable[[str], Path], patience: float
) -> None:
    record = asyncio.run(_disturbed(tiny("llama"), patience))
    assert record.token_ids == asyncio.run(_undisturbed(tiny("llama")))
    (caught,) = [event for event in record.events if event.kind == "caught-up"]
    alone = sum(run.tokens for run in record.runs if run.partition == "all:edge")
    assert alone == 0 if patience else 0 < alone < 16 - AT_TOKEN
    assert sum(run.tokens for run in record.runs) == 16, "each is counted once"
    assert record.recomputed_tokens == 0
    assert "cloud made meanwhile" in caught.text
    late = [at_s for at_s in record.token_times_s if at_s > caught.at_s - 0.02]
    assert len(late) >= 2, "all at once"


def test_a_longer_answer_goes_on_where_it_was_as_soon_as_it_can(tiny: Callable[[str], Path]) -> None:
    """It is not done when the outage is over, and nothing is computed on the device for tokens that came late."""
    record = asyncio.run(_disturbed(tiny("llama"), 0.0, tokens=100))
    assert record.token_ids == asyncio.run(_undisturbed(tiny("llama"), 100))
    kinds = [event.kind for event in record.events]
    assert kinds.index("caught-up") < kinds.index("move")
    assert [run.partition for run in record.runs if not run.why.startswith("fill")] == [
        "all:cloud", "all:edge", "all:cloud",
    ]  # fmt: skip
    assert record.recomputed_tokens == 0


# Dies when engine/meanwhile.py says `return None` for `return away.start + differs`.
# Dies when engine/meanwhile.py says `> 10**9` for `>= vocab_size`.
@pytest.mark.parametrize("where", [AT_TOKEN, -1], ids=["another text", "no word at all"])
def test_another_text_than_the_one_there_is_is_not_taken_and_its_cache_is_cut(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, where: int
) -> None:
    cut: list[int] = []
    stop_runs, halt = hosted.Hosted._stop_runs, hosted.Hosted._halt

    async def another(self: hosted.Hosted, besides_loops: bool = False) -> None:
        had = self._away
        await stop_runs(self, besides_loops)
        if self._away is not None and self._away is not had:
            ids = list(self._away.ids)
            ids[where] = (ids[where] + 1) % 100 if where >= 0 else 10**6
            self._away = Away(self._away.run, self._away.start, ids)

    async def noted(self: hosted.Hosted, link: Link, word: Halt) -> None:
        cut.append(word.keep)
        await halt(self, link, word)

    monkeypatch.setattr(hosted.Hosted, "_stop_runs", another)
    monkeypatch.setattr(hosted.Hosted, "_halt", noted)
    record = asyncio.run(_disturbed(tiny("llama"), 0.0))
    assert record.token_ids == asyncio.run(_undisturbed(tiny("llama")))
    assert "caught-up" not in [event.kind for event in record.events]
    assert len(PROMPT) + AT_TOKEN in cut if where >= 0 else max(cut) > len(PROMPT) + AT_TOKEN


def test_a_session_that_is_resumed_by_another_process_takes_what_was_made_since(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    async def both() -> None:
        async with in_process(tiny("llama"), ("cloud",)) as edge:
            left = edge.generate(PROMPT, "all:cloud", max_new_tokens=16, stop_ids=(), journal=tmp_path / "j")
            with suppress(RuntimeError):
                async with left:
                    async for _ in left:
                        raise RuntimeError("the process dies")
            await asyncio.sleep(0.3)
            resumed = edge.resume(tmp_path / "j", "all:cloud")
            async with resumed:
                async for _ in resumed:
                    pass
            assert resumed.record.token_ids == await _undisturbed(tiny("llama"))
            (caught,) = [event for event in resumed.record.events if event.kind == "caught-up"]
            assert "tokens that cloud made meanwhile" in caught.text

    asyncio.run(both())
