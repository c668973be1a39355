"""Many sessions on one machine: computed together, in turns, each as if it were alone but for rounding."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.bench.reference import compare
from splitwise_llm.engine import pieces
from splitwise_llm.engine.batching import COMPANY_S, LEAST_TURN_ROWS, Company, Compute, Turns, turn_rows
from splitwise_llm.engine.machine import Machine, need_of
from splitwise_llm.engine.pieces import Job, Piece, walk
from splitwise_llm.errors import BrokenInvariant, ProtocolError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.share import Positions, Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, Dtype, Weights

ROUNDING = 2e-5


class Bench:
    """Shares of one model on one machine, each with so many positions cached, and steps for them."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint(directory)
        self.spec = checkpoint.architecture.spec
        self.resident = Resident(checkpoint, Dtype.FP32, Weights.FULL, torch.device("cpu"))
        self.dice = torch.Generator().manual_seed(0)

    def share(self, cached: int, text: str = "all:edge") -> Share:
        partition = Partition.parse(text, self.spec, ("edge", "cloud"))
        share = Share(self.resident, need_of(partition, 0), 64)
        if cached:
            for half, _, _ in share.held:
                share.partial(self.rows(cached), half, share.positions(0, cached))
        return share

    def rows(self, count: int) -> Tensor:
        return torch.randn(count, self.spec.d_model, generator=self.dice)

    def piece(self, share: Share, at: Positions, x: Tensor, start: int, stop: int, **more: object) -> Piece[Tensor]:
        return Piece(
            share, start, stop, at.count, at.stop, lambda: (x, at), lambda x, logits: x if logits is None else logits,
            **more,  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.fixture(params=["llama-gqa-tied", "gpt2", "qwen3"])
def bench(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Iterator[Bench]:
    with torch.inference_mode():
        yield Bench(tiny(request.param))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[int]]:
    """How many sessions were computed together, each time that was more than one."""
    sizes: Counter[int] = Counter()
    real = pieces.together

    def together(shares: Sequence[Share], *rest: object) -> Tensor:
        sizes[len(shares)] += 1
        return real(shares, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "together", together)
        yield sizes


# Dies when model/share.py says `[ats[0].cos for at in ats]` for `[at.cos for at in ats]`.
# Dies when engine/pieces.py says `start]` for `start and stop <= job.piece.stop]`.
def test_together_is_as_alone_whatever_the_positions_halves_and_units(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 2 * bench.spec.num_layers
    kinds = [  # cached, new rows, halves, units
        (5, 1, (0, last), "all:edge"),
        (9, 1, (0, last), "all:edge"),
        (1, 3, (0, last), "all:edge"),
        (7, 1, (1, last - 1), "all:edge"),
        (4, 2, (2, 3), "all:edge"),
    ]
    alone: list[Tensor] = []
    jobs: list[Job] = []
    for cached, count, (start, stop), text in kinds:
        share = bench.share(cached, text)
        x, at = bench.rows(count), share.positions(cached, count)
        alone.append(share.run(x, start, stop, at))
        share.cut(cached)
        jobs.append(Job(bench.piece(share, at, x, start, stop), start))
    with counted(monkeypatch) as sizes:
        walk(jobs)
    assert [job.error for job in jobs] == [None] * len(jobs)
    assert max(sizes) == len(kinds)
    for job, expected in zip(jobs, alone, strict=True):
        torch.testing.assert_close(job.value, expected, rtol=ROUNDING, atol=ROUNDING)


# Dies when model/share.py says `tuple(0 for half` for
# `tuple(id(self._ffn[half] if half % 2 else self._attention[half]) for half`.
def test_sessions_with_other_units_of_a_half_are_computed_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = bench.spec.num_layers
    shared = (
        f"edge+cloud[0](kv=edge:0,cloud:1-{bench.spec.num_kv_heads - 1} ffn=edge:0-{bench.spec.num_ffn_shards - 1})"
    )
    texts = ["all:edge", f"{shared} edge[1:{layers}]"] * 2
    jobs, expected = [], []
    for text in texts:
        share = bench.share(3, text)
        x, at = bench.rows(1), share.positions(3, 1)
        expected.append(share.run(x, 0, 2 * layers, at))
        share.cut(3)
        jobs.append(Job(bench.piece(share, at, x, 0, 2 * layers), 0))
    with counted(monkeypatch) as sizes:
        walk(jobs)
    assert sizes == {2: 2}
    for job, alone in zip(jobs, expected, strict=True):
        torch.testing.assert_close(job.value, alone, rtol=ROUNDING, atol=ROUNDING)


# Dies when engine/pieces.py says `[job.x[-1:] for` for `[job.x[-job.piece.head_rows :] for`.
def test_logits_are_those_of_the_last_rows_of_each(bench: Bench) -> None:
    last = 2 * bench.spec.num_layers
    jobs, expected = [], []
    for cached, count, head_rows in [(4, 1, 1), (2, 4, 4), (6, 3, 1)]:
        share = bench.share(cached)
        x, at = bench.rows(count), share.positions(cached, count)
        expected.append(share.all_logits(share.run(x, 0, last, at)[-head_rows:]))
        share.cut(cached)
        jobs.append(Job(bench.piece(share, at, x, 0, last, head_rows=head_rows), 0))
    walk(jobs)
    for job, logits in zip(jobs, expected, strict=True):
        assert job.value.shape == logits.shape
        torch.testing.assert_close(job.value, logits, rtol=1e-4, atol=1e-4)


# Dies when engine/pieces.py says `except BrokenInvariant as error:` for `except Exception as error:`.
def test_what_one_session_breaks_breaks_no_other(bench: Bench) -> None:
    last = 2 * bench.spec.num_layers
    shares = [bench.share(5) for _ in range(5)]
    x, good = bench.rows(1), shares[0].positions(5, 1)

    def rubbish() -> tuple[Tensor, Positions]:
        raise ProtocolError("no stream")

    def no_end(x: Tensor, logits: Tensor | None) -> Tensor:
        raise ProtocolError("no end")

    shares[3].clear()
    pieces = [
        bench.piece(shares[0], good, x, 0, last),
        Piece(shares[1], 0, last, 1, 6, rubbish, no_end),
        bench.piece(shares[2], shares[2].positions(9, 1), x, 0, last),
        bench.piece(shares[3], good, x, 0, last),
        Piece(shares[4], 0, last, 1, 6, lambda: (x, good), no_end),
    ]
    jobs = [Job(piece, 0) for piece in pieces]
    walk(jobs)
    kinds = [type(job.error) for job in jobs]
    assert kinds == [type(None), ProtocolError, BrokenInvariant, BrokenInvariant, ProtocolError]
    shares[0].cut(5)
    torch.testing.assert_close(jobs[0].value, shares[0].run(x, 0, last, good), rtol=ROUNDING, atol=ROUNDING)


def test_a_tap_sees_the_stream_where_it_asked(bench: Bench) -> None:
    last, seen = 2 * bench.spec.num_layers, dict[int, Tensor]()
    share, other = bench.share(3), bench.share(4)
    x, at = bench.rows(1), share.positions(3, 1)
    piece = bench.piece(share, at, x, 0, last, taps=(2, 3), tap=seen.__setitem__)
    beside = bench.piece(other, other.positions(4, 1), bench.rows(1), 0, last)
    walk([Job(piece, 0), Job(beside, 0)])
    share.cut(3)
    assert list(seen) == [2, 3]
    torch.testing.assert_close(seen[3], share.run(x, 0, 3, at), rtol=ROUNDING, atol=ROUNDING)


# Order


class Who:
    """Somebody."""


# Dies when engine/batching.py says `-within_s <= due_s` for `-within_s <= due_s <= within_s`.
# Dies when engine/batching.py says `due_s <= within_s` for `-within_s <= due_s <= within_s`.
def test_only_who_is_about_to_be_back_is_awaited() -> None:
    company, near, far = Company(), Who(), Who()
    for who, away_s in ((near, 0.002), (far, 0.080)):
        company.came(who, 0.0)
        company.went(who, 1.0)
        assert not company.awaits(1.0, 0.01), "nobody knows yet how long it stays away"
        company.came(who, 1.0 + away_s)
    company.went(near, 2.0)
    company.went(far, 2.0)
    assert company.awaits(2.0, 0.01)
    assert not company.awaits(2.03, 0.01), "the near one does not come any more, the far one not yet"
    assert company.awaits(2.075, 0.01)
    company.came(far, 2.08)
    assert not company.awaits(2.081, 0.01)


def test_a_session_is_alone_when_nobody_else_was_here_lately() -> None:
    company, one, other = Company(), Who(), Who()
    company.came(one, 0.0)
    assert company.is_alone(one, 0.0)
    company.came(other, 1.0)
    assert not company.is_alone(one, 1.0 + COMPANY_S / 2)
    assert company.is_alone(one, 1.0 + 2 * COMPANY_S)


# Dies when engine/batching.py says `pass  # stays` for `self._seen.pop(who, None)`.
def test_a_session_that_is_over_is_no_company() -> None:
    company, one, other = Company(), Who(), Who()
    company.came(other, 1.0)
    company.left(other)
    assert company.is_alone(one, 1.0)
    company.left(other)
    company.went(other, 1.1)
    assert company.is_alone(one, 1.1)


# Dies when engine/machine.py says `self._shares.get(None)` for `self._shares.pop(key, None)`.
# Dies when engine/machine.py says `self._compute.is_quiet(None)` for `self._compute.is_quiet(here)`.
def test_who_comes_right_after_another_session_computes_on_its_own_thread(tiny: Callable[[str], Path]) -> None:
    async def play() -> list[str]:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            partition, threads = Partition.all_on(machine.spec, 0), []
            x = torch.randn(1, machine.spec.d_model)
            shares = [await machine.open_share(key, "edge", partition, 0, 8) for key in ("first", "second")]
            for key, share in zip(("first", "second"), shares, strict=True):
                piece = step(share, x, 0)
                await machine.run(
                    replace(piece, finish=lambda *_: threads.append(threading.current_thread().name)), True
                )
                await machine.compute(
                    lambda: threads.append(threading.current_thread().name), lambda _: 0.0, here=share
                )
                machine.release(key)
        return threads

    own = threading.current_thread().name
    # A divided half is no other session, beside the whole ones around it.
    assert asyncio.run(play()) == [own] * 4


def prompts(bench: Bench, *priorities: int, rows: int = 100) -> list[Job]:
    shares = [bench.share(0) for _ in priorities]
    x = torch.zeros(rows, bench.spec.d_model)
    return [
        Job(bench.piece(share, Positions(0, rows, None, None, None), x, 0, 1, is_prefill=True, priority=priority), 0)
        for share, priority in zip(shares, priorities, strict=True)
    ]


def served(turns: Turns, count: int) -> list[Job]:
    """Who gets each of so many turns of 10 rows."""
    order: list[Job] = []
    for _ in range(count):
        job = turns.next()
        assert job is not None
        order.append(job)
        turns.add(job, 10.0)
    return order


# Dies when engine/batching.py says `had_rows * 2.0**job.piece.priority` for `had_rows / 2.0**job.piece.priority`.
def test_prompts_take_turns_by_their_priority_and_who_comes_late_is_not_behind(bench: Bench) -> None:
    turns = Turns()
    equal, other, high, late = prompts(bench, 0, 0, 1, 0)
    for job in (equal, other, high):
        turns.add(job)
    order = Counter(map(id, served(turns, 40)))
    assert [order[id(job)] for job in (equal, other, high)] == [10, 10, 20]
    turns.add(late)
    after = served(turns, 4)
    assert late in after[:2], "it is served as if it had been there"
    assert after.count(late) == 1, "and no more than that"


def test_a_turn_takes_about_as_long_as_a_decode_step() -> None:
    assert turn_rows(0.1, 0.002) == 50
    assert turn_rows(1e-6, 1.0) == turn_rows(None, 1.0) == turn_rows(1.0, None) == LEAST_TURN_ROWS


# The thread


def slow_device() -> DeviceSpec:
    """Weights of the tiny model take 40 ms to read; computing takes next to nothing."""
    return DeviceSpec("slow", flop_per_s=1e12, memory_bytes_per_s=1.5e7, memory_bytes=1e9)


async def opened(machine: Machine, count: int) -> list[Share]:
    partition = Partition.all_on(machine.spec, 0)
    return [await machine.open_share(Who(), "edge", partition, 0, 256) for _ in range(count)]


def step(share: Share, x: Tensor, start: int, **more: object) -> Piece[Tensor]:
    last = 2 * share.architecture.spec.num_layers
    return Piece(
        share, 0, last, len(x), start + len(x), lambda: (x, share.positions(start, len(x))), lambda x, _: x,
        **more,  # type: ignore[arg-type]
    )  # fmt: skip


# Dies when cost/hosts.py says `units * (len(batch) * weight + cached)` for `units * (weight + cached)`.
def test_an_emulated_machine_takes_the_time_of_the_batch(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama")), emulate=slow_device()) as machine:
            shares = await opened(machine, 6)
            x = torch.randn(1, machine.spec.d_model)
            one = await machine.run(step(shares[0], x, 0))
            hold = asyncio.create_task(machine.compute(lambda: time.sleep(0.05)))
            await asyncio.sleep(0.01)
            done = await asyncio.gather(*(machine.run(step(share, x, 0)) for share in shares[1:]))
            await hold
            assert {result.start_s for result in done} == {done[0].start_s}, "one iteration"
            assert done[0].stop_s - done[0].start_s < 3 * (one.stop_s - one.start_s), "weights are read once"
            assert machine.batches[5] == 1

    asyncio.run(play())


# Dies when engine/batching.py says `least_s = owed_s if` for `least_s = owed_s * min(allowance / rows, 1.0) if`.
def test_tokens_flow_between_the_turns_of_a_long_prompt_whose_bits_stay(tiny: Callable[[str], Path]) -> None:
    device = DeviceSpec("slow", flop_per_s=1e9, memory_bytes_per_s=1e8, memory_bytes=1e9)

    async def play() -> None:
        with Machine(Checkpoint(tiny("llama")), emulate=device) as machine:
            long, short = await opened(machine, 2)
            x = torch.randn(250, machine.spec.d_model)
            alone = (await machine.run(step(long, x, 0, is_prefill=True))).value
            long.cut(0)
            prompt = asyncio.create_task(machine.run(step(long, x, 0, is_prefill=True)))
            between = 0
            for position in range(40):
                await machine.run(step(short, x[:1], position))
                between += not prompt.done()
            assert 5 <= between < 40, "without turns it is two: before the prompt, and as it ends"
            assert torch.equal((await prompt).value, alone)

    asyncio.run(play())


# Dies when engine/batching.py says `>= allowance and False:` for `>= allowance and self._others_wait():`.
def test_who_comes_while_a_prompt_is_computed_waits_for_a_turn_not_for_all(
    tiny: Callable[[str], Path],
) -> None:
    ends: list[str] = []

    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            long, short = await opened(machine, 2)
            x = torch.randn(250, machine.spec.d_model)

            def come(half: int, _: Tensor) -> None:
                job = machine._compute.submit(step(short, x[:1], 0))
                job.result.add_done_callback(lambda _: ends.append(f"who came before half {half}"))

            prompt = step(long, x, 0, is_prefill=True, taps=(1,), tap=come)
            await machine.run(replace(prompt, finish=lambda x, _: ends.append("prompt")))

    asyncio.run(play())
    assert ends == ["who came before half 1", "prompt"]


def test_who_vanishes_leaves_the_batch_as_it_is(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            shares = await opened(machine, 4)
            x = torch.randn(60, machine.spec.d_model)
            entered, go = threading.Event(), threading.Event()

            def hold() -> tuple[Tensor, Positions]:
                entered.set()
                go.wait(5)
                return x[:1], shares[0].positions(0, 1)

            last = 2 * machine.spec.num_layers
            in_batch = asyncio.create_task(machine.run(Piece(shares[0], 0, last, 1, 1, hold, lambda x, _: x)))
            await asyncio.to_thread(entered.wait, 5)
            waits = asyncio.create_task(machine.run(step(shares[1], x[:1], 0)))
            prompt = asyncio.create_task(machine.run(step(shares[2], x, 0, is_prefill=True)))
            stays = asyncio.create_task(machine.run(step(shares[3], x[:1], 0)))
            await asyncio.sleep(0.01)
            for task in (in_batch, waits, prompt):
                task.cancel()
            await asyncio.gather(in_batch, waits, prompt, return_exceptions=True)
            go.set()
            assert (await stays).value.shape == (1, machine.spec.d_model)
            await machine.settle()
            assert {half: filled for half, _, filled in shares[1].held} == dict.fromkeys(range(0, last, 2), 0)
            assert {half: filled for half, _, filled in shares[2].held} == dict.fromkeys(range(0, last, 2), 0)
            assert not machine._compute.is_busy

    asyncio.run(play())


def test_closing_a_machine_answers_everybody(tiny: Callable[[str], Path]) -> None:
    async def play() -> None:
        with Machine(Checkpoint(tiny("llama")), emulate=slow_device()) as machine:
            shares = await opened(machine, 3)
            x = torch.randn(60, machine.spec.d_model)
            work = [machine.run(step(share, x, 0, is_prefill=True)) for share in shares]
            tasks = [asyncio.create_task(one) for one in work]
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(answer, asyncio.CancelledError) for answer in answers)
        with pytest.raises(RuntimeError, match="closed"):
            await machine.settle()

    asyncio.run(play())


# Dies when engine/batching.py says `self._at_hand = []` for `self._at_hand = [*batch, turn]`.
# Dies when engine/batching.py says `waiting = [` for `waiting = [call.result for call in self._calls] + [`.
@pytest.mark.parametrize("broken", ["next", "_run", "_run_turn"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_between_two_pieces_leaves_nobody_waiting(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    reached, called = threading.Event(), threading.Event()

    def mistake(*_: object) -> None:
        if broken != "next":  # there nobody can come in between
            reached.set()
            called.wait(5)
        raise ZeroDivisionError

    async def play() -> None:
        with Machine(Checkpoint(tiny("llama"))) as machine:
            shares = await opened(machine, 2)
            x = torch.randn(60, machine.spec.d_model)
            monkeypatch.setattr(Turns if broken == "next" else Compute, broken, mistake)
            work = [machine.run(step(share, x, 0, is_prefill=broken != "_run")) for share in shares]
            waiting = [asyncio.create_task(one) for one in work]
            if broken != "next":
                assert await asyncio.to_thread(reached.wait, 5)
                waiting.append(asyncio.create_task(machine.compute(lambda: None)))
                await asyncio.sleep(0)  # it is in the queue
                called.set()
            for answer in await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10):
                assert isinstance(answer, asyncio.CancelledError | RuntimeError), "said now, or that it is closed"
            with pytest.raises(RuntimeError, match="closed"):
                await machine.settle()

    asyncio.run(play())


# Sessions

TEXTS = ["all:cloud", "edge[0:2] cloud[2:8]", "edge[0:2] cloud[2:6] edge[6:8]", "cloud[0:5] edge[5:8]", "all:cloud"]


def test_the_texts_of_concurrent_sessions_are_those_of_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = locate("bundled")
    dice = random.Random(1)
    prompts = [[dice.randrange(2000) for _ in range(dice.randrange(4, 90))] for _ in TEXTS]

    async def play() -> None:
        async with in_process(directory, ("cloud",)) as edge:

            async def text(number: int) -> tuple[list[int], list[Tensor]]:
                seen: list[Tensor] = []

                def greedy(logits: Tensor, position: int) -> int:
                    seen.append(logits.clone())
                    return int(logits.argmax())

                on_edge = edge.partition(TEXTS[number]).head == 0
                async with edge.generate(
                    prompts[number], TEXTS[number], max_new_tokens=24, stop_ids=(), choose=greedy if on_edge else None
                ) as generation:
                    return [token.id async for token in generation], seen

            single = [await text(number) for number in range(len(TEXTS))]
            with counted(monkeypatch) as sizes:
                together = await asyncio.gather(*map(text, range(len(TEXTS))))
        assert max(sizes) >= 3, "they were computed together"
        for number, ((tokens, _), (alone, _)) in enumerate(zip(together, single, strict=True)):
            assert tokens == alone, TEXTS[number]
        for prompt, (tokens, logits) in zip(prompts, together, strict=True):
            if logits:
                assert compare(directory, prompt, tokens, logits).is_same

    asyncio.run(play())
