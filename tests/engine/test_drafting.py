"""Drafting never changes the text, whoever proposes what, wherever the token loop is; and leaves nothing in a cache
that was not accepted."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.raw_sessions import STREAM, Lab, held, kept, play
from splitwise_llm.bench.drafting import coupled_acceptance
from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision
from splitwise_llm.engine import hosted
from splitwise_llm.engine.account import Run
from splitwise_llm.engine.drafting import Draft, Drafter, Drafting, Lookup, Pace
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.machine import need_of
from splitwise_llm.errors import RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.model.share import Share
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.plan import DEVICE
from splitwise_llm.spec import Dtype, Weights
from splitwise_llm.wire.messages import Close, Closed, Data, Failed, Halt, Halted

U = "edge[0:1] cloud[1:3] edge[3:4]"
PLACES = {
    "edge": "all:edge",
    "cloud": "all:cloud",
    "cut": "edge[0:4] cloud[4:8]",
    "u": "edge[0:2] cloud[2:6] edge[6:8]",
    "shared": "edge[0:3] edge+cloud[3:5] edge[5:8]",
    "reversed": "cloud[0:2] edge[2:6] cloud[6:8]",
    "relayed": "cloud[0:2] third[2:6] cloud[6:8]",
    "three": "edge[0:2] cloud[2:4] third[4:8]",
}
AGAIN = "The men in the boats said to the men in the boats that the men in the boats saw the men in the"
WARM = Sampling(0.8, top_p=0.95, seed=5)
PROMPT = [17, 3, 99, 54, 180, 7, 61]


class Says:
    """Proposes what it is told to."""

    is_light = True

    def __init__(self, tells: Callable[[Sequence[int], int], Any]) -> None:
        self.propose = tells


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs whose crossings were found to be their plan's. The device, too, then holds nothing that is no text."""
    found: list[Run] = []
    original = Run.check

    def check(run: Run) -> None:
        original(run)
        assert {filled for _, _, filled in run.walker.share.held} <= {run.certain}
        found.append(run)

    monkeypatch.setattr(Run, "check", check)
    return found


def drafts_with(monkeypatch: pytest.MonkeyPatch, drafter: Drafter, most: int = 8) -> list[Drafting]:
    """Let all generations and workers draft with this, always as much as it says."""
    made: list[Drafting] = []

    def drafting(edge: Edge, *_: object) -> Drafting:
        made.append(Drafting(drafter, edge.machine.spec.vocab_size, _Always(), most))
        return made[-1]

    def there(_: Drafter, vocabulary: int) -> Drafting:
        made.append(Drafting(drafter, vocabulary, _Always()))
        return made[-1]

    monkeypatch.setattr(Edge, "_drafting", drafting)
    monkeypatch.setattr(hosted, "Drafting", there)
    return made


class _Always(Pace):
    def most(self, proposed: int) -> int:
        return proposed


async def _ids(generation: Generation) -> list[int]:
    async with generation:
        return [token.id async for token in generation]


# The text


# Dies when engine/walk.py says `number == len(drafted):` for `number == len(drafted) or drafted[number] != token:`.
# Dies when plan.py says `return step.count` for `return step.made`.
# Dies when engine/account.py says `if True:` for `if self.loop_machine == DEVICE:`.
@pytest.mark.parametrize("direct", [False, True], ids=["star", "direct"])
@pytest.mark.parametrize("where", PLACES)
def test_the_text_and_what_crosses_are_as_planned_with_every_drafter(
    where: str, direct: bool, checked: list[Run]
) -> None:
    if direct and where not in ("relayed", "three"):
        pytest.skip("no two workers")
    directory = locate("bundled")
    prompt = Tokenizer(directory).encode(AGAIN)

    async def all_ways() -> None:
        pairs = [("cloud", "third")] if direct else []
        async with in_process(directory, direct=pairs) as edge:
            for sampling in (Sampling(), WARM):
                plain = await _ids(edge.generate(prompt, PLACES[where], max_new_tokens=24, sampling=sampling))
                for text in ("ngram", "auto", "bundled:int4", "early:3"):
                    draft = Draft.parse(text, 4)
                    one = edge.generate(prompt, PLACES[where], max_new_tokens=24, sampling=sampling, draft=draft)
                    assert await _ids(one) == plain, (text, sampling)
                    assert one.record.is_degraded is False
                    if text == "ngram" and not sampling.temperature and one.plan.loop_machine == DEVICE:
                        assert len(checked[-1].rounds) < len(plain) - 1, "some of the repeated words were accepted"

    asyncio.run(all_ways())
    assert len(checked) == 10


@pytest.mark.parametrize(
    "where", ["all:edge", "all:cloud", U, "edge[0:2] cloud[2:4]", "cloud[0:1] edge[1:3] cloud[3:4]"]
)
def test_a_run_of_right_tokens_ends_at_a_stop_id_and_at_the_last_one_asked_for(
    where: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, checked: list[Run]
) -> None:
    async def scene() -> None:
        async with in_process(tiny("llama")) as edge:
            plain = await _ids(edge.generate(PROMPT, where, max_new_tokens=22, stop_ids=()))
            text = [*PROMPT, *plain]
            drafts_with(monkeypatch, Says(lambda ids, most: text[len(ids) : len(ids) + most] + [1] * most))
            for tokens, rounds in ((22, 3), (19, 2), (1, 0)):  # of 9 tokens each, behind the first
                decision = Decision(edge.partition(where), draft=8)
                assert await _ids(edge.generate(PROMPT, decision, max_new_tokens=tokens, stop_ids=())) == plain[:tokens]
                assert len(checked[-1].rounds) == rounds
            stop = next(token for number, token in enumerate(plain) if number >= 5 and token not in plain[:number])
            until = plain[: plain.index(stop) + 1]
            decision = Decision(edge.partition(where), draft=8)
            assert await _ids(edge.generate(PROMPT, decision, max_new_tokens=22, stop_ids=(stop,))) == until
            _check_nothing_is_left(checked[-1], len(PROMPT) + len(until) - 1)

    asyncio.run(scene())


def _check_nothing_is_left(run: Run, positions: int) -> None:
    """All machines hold these positions of a run, and no stream behind them."""
    said = {number: halted for number, (halted, _) in run.halted.items()}
    for number, one in said.items():
        assert {filled for _, filled in held(one).values()} <= {positions}, f"machine {number}"
        assert all(stop <= positions for spans in kept(one).values() for _, stop in spans), f"machine {number}"
    assert run.certain == positions
    assert said or not run.workers


# Dies when engine/halting.py says `(lambda: None)` for `(lambda: run.walker.share.cut(run.certain))`.
# Dies when engine/hosted.py says `await self._shares.cut(certain + 1)` for `await self._shares.cut(certain)`.
@pytest.mark.parametrize("where", ["all:edge", "all:cloud", U, "edge+cloud[0:4]", "cloud[0:1] edge[1:3] cloud[3:4]"])
def test_what_was_not_accepted_is_in_no_cache_once_a_run_is_over(
    where: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, checked: list[Run]
) -> None:
    async def scene() -> None:
        async with in_process(tiny("llama")) as edge:
            plain = await _ids(edge.generate(PROMPT, where, max_new_tokens=20, stop_ids=()))
            text = [*PROMPT, *plain, *[0] * 20]
            mixed = [token if number % 3 else (token + 1) % 256 for number, token in enumerate(text)]
            drafts_with(monkeypatch, Says(lambda ids, most: mixed[len(ids) : len(ids) + most]))
            stop = next(token for number, token in enumerate(plain) if number >= 5 and token not in plain[:number])
            until = plain[: plain.index(stop) + 1]
            one = edge.generate(PROMPT, Decision(edge.partition(where), draft=6), max_new_tokens=40, stop_ids=(stop,))
            assert await _ids(one) == until
            _check_nothing_is_left(checked[-1], len(PROMPT) + len(until) - 1)
            assert max(count for count, _ in checked[-1].rounds) == 7, "more was computed than is held"

    asyncio.run(scene())


def test_no_more_is_drafted_than_the_context_has_room_for(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, checked: list[Run]
) -> None:
    prompt = [(7 * n) % 256 for n in range(240)]

    async def scene() -> None:
        async with in_process(tiny("llama")) as edge:
            plain = await _ids(edge.generate(prompt, U, max_new_tokens=16, stop_ids=()))
            for text in ("early:2", "ngram"):
                draft = Draft.parse(text, 16)
                assert await _ids(edge.generate(prompt, U, max_new_tokens=16, stop_ids=(), draft=draft)) == plain
            with pytest.raises(RequestError, match="context of 256"):
                edge.generate(prompt, U, max_new_tokens=17, draft=Draft())
            drafts_with(monkeypatch, Says(lambda ids, most: (prompt + plain)[len(ids) :] + [0] * 100), most=16)
            decision = Decision(edge.partition(U), draft=16)
            assert await _ids(edge.generate(prompt, decision, max_new_tokens=16, stop_ids=())) == plain
            assert checked[-1].rounds == [(15, 15)]

    asyncio.run(scene())


def _fails(*_: object) -> Sequence[int]:
    raise ZeroDivisionError("no idea")


@pytest.mark.parametrize(
    ("tells", "failed"),
    [
        (lambda ids, most: [(ids[-1] + 1) % 256] * most, ""),
        (lambda ids, most: [5] * 10_000, ""),
        (lambda ids, most: [-1, 5], ""),
        (lambda ids, most: [5, 2**40], ""),
        (lambda ids, most: torch.tensor([5, 6]), ""),
        (lambda ids, most: [], ""),
        (lambda ids, most: [5.0, 6.0], "TypeError"),
        (lambda ids, most: "hello", "TypeError"),
        (lambda ids, most: [[5]], "TypeError"),
        (lambda ids, most: None, "TypeError"),
        (_fails, "ZeroDivisionError: no idea"),
    ],
)
@pytest.mark.parametrize("where", [U, "all:cloud"])
def test_a_drafter_that_returns_rubbish_changes_nothing(
    where: str,
    tells: Callable[[Sequence[int], int], Any],
    failed: str,
    tiny: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    checked: list[Run],
) -> None:
    async def scene() -> None:
        async with in_process(tiny("llama")) as edge:
            plain = await _ids(edge.generate(PROMPT, where, max_new_tokens=12, stop_ids=()))
            made = drafts_with(monkeypatch, Says(tells))
            decision = Decision(edge.partition(where), draft=8)
            assert await _ids(edge.generate(PROMPT, decision, max_new_tokens=12, stop_ids=())) == plain
            drafting = made[0 if where == U else -1]
            assert drafting.failed.startswith(failed)
            assert bool(drafting.failed) == bool(failed)

    asyncio.run(scene())
    assert len(checked) == 2


# Sampling


CELLS = 3
"""Tokens that may be drawn at each position."""


@pytest.mark.parametrize("text", ["ngram", pytest.param("early:3", marks=pytest.mark.long)])
def test_what_is_drawn_with_drafts_is_distributed_as_the_model_says(text: str, tiny: Callable[[str], Path]) -> None:
    """Chi-squared over the three tokens behind a prompt; with these seeds, as with almost all, below what one in a
    thousand would exceed."""
    directory, count = (tiny("llama"), 240) if text != "ngram" else (locate("bundled"), 240)
    likeliest = _likeliest(directory)
    end = Tokenizer(directory).encode(AGAIN) if text == "ngram" else PROMPT
    prompt = end
    for _ in range(2 * (text == "ngram")):  # so that what is likely has occurred, and was followed by what is likely
        firsts = [first for first, _ in reversed(likeliest(prompt))]
        prompt = [one for first in firsts for one in (first, likeliest([*prompt, first])[0][0])] + end
    expected = {
        (a, b, c): first * second * third
        for a, first in likeliest(prompt)
        for b, second in likeliest([*prompt, a])
        for c, third in likeliest([*prompt, a, b])
    }
    seen: Counter[tuple[int, ...]] = Counter()
    accepted = 0

    async def scene() -> None:
        nonlocal accepted
        async with in_process(directory, workers=()) as edge:
            draft = Draft.parse(text, 2)
            for seed in range(count):
                sampling = Sampling(1.0, top_k=CELLS, seed=seed)
                one = edge.generate(prompt, "all:edge", max_new_tokens=3, sampling=sampling, stop_ids=(), draft=draft)
                seen[tuple(await _ids(one))] += 1
                accepted += len(one._runs[-1].rounds) == 1

    asyncio.run(scene())
    assert sum(expected.values()) == pytest.approx(1)
    assert set(seen) <= set(expected)
    assert count / 20 < accepted < 19 * count / 20, "drafts are right sometimes, and wrong sometimes"
    large = [key for key, probability in expected.items() if count * probability >= 5]
    rest = 1 - sum(expected[key] for key in large)
    cells = [(seen[key], count * expected[key]) for key in large]
    if count * rest >= 5:
        cells.append((count - sum(n for n, _ in cells), count * rest))
    chi = sum((n - mean) ** 2 / mean for n, mean in cells)
    assert len(cells) > 8
    tail = float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(chi / 2)))
    assert tail > 0.001, (chi, len(cells))


def _likeliest(directory: Path) -> Callable[[Sequence[int]], list[tuple[int, float]]]:
    """What may follow some ids, and the probability that it is drawn."""
    resident = Resident(Checkpoint(directory), Dtype.FP32, Weights.FULL, torch.device("cpu"))
    spec = Checkpoint(directory).architecture.spec
    need = need_of(Partition.all_on(spec, 0), 0)
    resident.load(need)

    @torch.inference_mode()
    def likeliest(ids: Sequence[int]) -> list[tuple[int, float]]:
        share = Share(resident, need, len(ids))
        at = share.positions(0, len(ids))
        top = share.logits(share.run(share.embed(ids, at), 0, 2 * spec.num_layers, at)).topk(CELLS)
        return list(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    return likeliest


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0.1, 4.0))
def test_the_same_noise_accepts_nearly_what_rejection_does(seed: int, size: int, apart: float) -> None:
    """At most the standard scheme's `sum min(p, q)` = 1 - d, at least (1 - d) / (1 + d) (Daliri et al. 2024)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    q = (logits + apart * torch.randn(size, generator=generator, dtype=torch.float64)).softmax(-1)
    standard, coupled = float(torch.minimum(p, q).sum()), coupled_acceptance(p, q)
    assert standard / (2 - standard) - 1e-9 <= coupled <= standard + 1e-9
    certain = torch.zeros(size, dtype=torch.float64)
    certain[0] = 1
    assert coupled_acceptance(p, certain) == pytest.approx(float(p[0])), "lookup is sure: it is the standard scheme"


def test_two_models_that_draw_with_the_same_noise_agree_as_often_as_computed() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = torch.randn(12, generator=generator), torch.randn(12, generator=generator)
    count, sampling = 4000, Sampling(1.0, seed=2)
    agreed = sum(sample(ours, sampling, n) == sample(theirs, sampling, n) for n in range(count)) / count
    expected = coupled_acceptance(ours.softmax(-1), theirs.softmax(-1))
    assert abs(agreed - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    assert expected < float(torch.minimum(ours.softmax(-1), theirs.softmax(-1)).sum()) - 0.01


# Lookup


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6), st.integers(1, 9))
def test_lookup_is_what_followed_the_longest_match_that_came_last(pieces: list[list[int]], most: int) -> None:
    lookup, ids = Lookup(3, 1), list[int]()
    for piece in pieces:
        ids += piece
        assert list(lookup.propose(ids, most)) == _naive(ids, most)


def _naive(ids: list[int], most: int) -> list[int]:
    for size in (3, 2, 1):
        for at in range(len(ids) - 1, size - 1, -1):
            if ids[at - size : at] == ids[len(ids) - size :]:
                text = list(ids)
                while len(text) < len(ids) + most:
                    text.append(text[at + len(text) - len(ids)])
                return text[len(ids) :]
    return []


def test_lookup_in_another_text_finds_nothing_of_the_first() -> None:
    lookup = Lookup()
    assert lookup.propose([1, 2, 3, 1, 2], 2) == [3, 1]
    assert lookup.propose([4, 5, 6, 7, 2], 2) == []
    assert lookup.propose([1, 2], 2) == []


# How much


def test_acceptance_is_what_was_right_of_what_was_judged() -> None:
    pace = Pace()
    assert pace.acceptance == 0.5
    for _ in range(300):
        pace.judged([1, 2, 3, 4], [1, 2, 3, 9])
    assert pace.acceptance == pytest.approx(0.75, abs=0.01)
    assert pace.effective_acceptance == pytest.approx(0.75, abs=0.01)
    for _ in range(300):
        pace.judged([], [7])
    assert pace.effective_acceptance < 0.01, "who says nothing helps nobody"


# Dies when engine/drafting.py says `min(self.least, 0))` for `min(self.least, proposed))`.
def test_nothing_is_drafted_where_it_does_not_pay_and_again_where_it_does() -> None:
    pace = Pace()
    pace.begin(0.05, 0.005)
    for _ in range(30):
        pace.judged([1, 2, 3], [9])
    assert pace.most(8) == 0
    assert Pace(least=1, right=pace.right, all=pace.all, base_s=0.05, token_s=0.005).most(8) == 1, "it was told to"
    tries = [pace.retries() for _ in range(1000)]
    assert 3 < sum(tries) < 20, "a drafter that has to be asked is asked now and then"
    for _ in range(30):  # guesses that nobody verifies are judged, too
        pace.judged([1, 2, 3], [1])
    assert pace.most(8) >= 3
    assert pace.most(2) == 2
    assert pace.most(0) == 0


def test_the_times_of_steps_are_learnt_and_a_slower_link_is_no_costlier_draft() -> None:
    pace = Pace()
    for number in range(200):
        proposed = number % 5
        pace.took(proposed, 0.045 + 0.004 * proposed)
    assert (pace.base_s, pace.token_s) == (pytest.approx(0.045, rel=0.05), pytest.approx(0.004, rel=0.25))
    for _ in range(200):  # one length only: the two cannot be told apart
        pace.took(4, 0.145 + 0.004 * 4)
    assert pace.base_s is not None
    assert pace.token_s is not None
    assert pace.base_s > 0.1
    assert pace.base_s + 4 * pace.token_s == pytest.approx(0.161, rel=0.02)
    pace.begin(None, None)
    assert pace.most(8) == 2, "of a step of which nobody knows anything, and a token that is right every other time"


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ("off", Draft("off", 4, is_free=False)),
        ("auto", Draft("ngram", 4)),
        ("ngram", Draft("ngram", 4, is_free=False)),
        ("models/small", Draft("models/small", 4, is_free=False)),
        ("bundled:int4", Draft("bundled", 4, is_free=False, weights=Weights.INT4)),
        ("c:/models/small", Draft("c:/models/small", 4, is_free=False)),
        ("early:2", Draft("early", 4, is_free=False, layers=2)),
    ],
)
def test_who_is_to_draft_is_read(text: str, draft: Draft) -> None:
    assert Draft.parse(text, 4) == draft


@pytest.mark.parametrize(
    ("text", "most"), [("ngram", 0), ("ngram", 1000), ("early:0", 4), ("early", 4), ("early:x", 4)]
)
def test_who_cannot_draft_is_refused(text: str, most: int) -> None:
    with pytest.raises(RequestError, match=r"expected 1 to|early:2"):
        Draft.parse(text, most)


def test_more_early_layers_than_there_are_are_refused(tiny: Callable[[str], Path]) -> None:
    async def scene() -> None:
        async with in_process(tiny("llama")) as edge:
            with pytest.raises(RequestError, match="expected 1 to 4"):
                edge.generate(PROMPT, U, draft=Draft.parse("early:5", 4))

    asyncio.run(scene())


def test_a_model_that_is_asked_only_where_it_pays_is_left_alone_on_text_it_does_not_foretell(
    tiny: Callable[[str], Path],
) -> None:
    """A free choice, of a drafter that costs something to ask."""
    asked: list[int] = []

    class Costly(Says):
        is_light = False

    async def rounds(acceptance: bool) -> None:
        drafting = Drafting(Costly(lambda ids, most: asked.append(most) or [3] * most), 256)
        for _ in range(200):
            drafted = await drafting.propose([1, 2], 8)
            made = [*drafted, 3] if acceptance else [4]
            drafting.judged(drafted, made, 0.05 + 0.01 * len(drafted))

    asyncio.run(rounds(False))
    assert sum(asked[-10:]) == 10, "one token at a time"
    assert len(asked) < 40
    asked.clear()
    asyncio.run(rounds(True))
    assert len(asked) > 190
    assert asked[-1] == 8


# A worker, word by word


def _data(step: int, start: int, rows: int, said: int | None = None, at: int = 0) -> tuple[Data, bytes]:
    header = Data(1, step, 0, "residual", 0, 1, 0, "fp32", rows, 64, start if said is None else said)
    return header, STREAM[start : start + rows].numpy().tobytes()


async def _prefilled(lab: Lab, device: Any, **changes: object) -> None:
    await lab.begun(device, draft=3, **changes)
    await lab.feed(device, 0, 0, 4)
    assert await lab.token(device, 0) == lab.expected[3]


# Dies when engine/post.py says `if header.start < 0 or not` for `if header.start < step.start or not`.
# Dies when engine/post.py says `.draft + 1, stop)` for `.draft + 1, stop - header.start)`.
@pytest.mark.parametrize(
    ("step", "start", "rows", "said"),
    [
        (1, 3, 2, None),  # before what is known
        (2, 4, 2, None),  # two steps make two tokens at least
        (1, 4, 2, -1),  # nobody says where
        (1, 4, 5, None),  # more than may be drafted
        (1, 8, 2, None),  # more than may be made
        (1, 9, 1, None),
        (0, 0, 4, 0),  # a prompt, whose positions are known
    ],
)
def test_a_round_that_cannot_be_ends_the_session(
    step: int, start: int, rows: int, said: int | None, tiny: Callable[[str], Path]
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, draft=3)
            await device.say(*_data(step, start, rows, said))
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (-1, "ProtocolError")
            assert "position" in failed.message

    play(Checkpoint(tiny("llama")), scene)


def test_positions_beside_a_run_that_does_not_draft_end_the_session(tiny: Callable[[str], Path]) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device)
            await device.say(*_data(1, 4, 1))
            failed = await device.hear(Failed)
            assert (failed.run, failed.error) == (-1, "ProtocolError")
            assert "position 4 in a step whose positions are known" in failed.message

    play(Checkpoint(tiny("llama")), scene)


def test_two_messages_that_say_different_things_of_a_round_end_the_run(tiny: Callable[[str], Path]) -> None:
    async def scene(lab: Lab) -> None:
        where = lab.partition("edge[0:1] edge+cloud[1:2] edge[2:4]")
        plan = lab.plan(where)
        moves = [move for move in plan.moves if move.dst == 1]
        async with lab.session() as (device, _):
            await lab.begun(device, 1, where, draft=3)
            for move in moves:
                header = Data(1, 0, move.after, move.kind.value, 0, 1, 0, "fp32", 4, 64)
                await device.say(header, STREAM[:4].numpy().tobytes())
            for number, move in enumerate(moves):
                rows = 1 + number
                header = Data(1, 1, move.after, move.kind.value, 0, 1, 0, "fp32", rows, 64, 4)
                await device.say(header, STREAM[4 : 4 + rows].numpy().tobytes())
            header: Any = None
            while not isinstance(header, Failed):
                frame = await device.frame()
                assert frame is not None
                header = msgspec.msgpack.Decoder(Data | Failed).decode(
                    frame[4 : 4 + int.from_bytes(frame[:4], "little")]
                )
            assert (header.run, header.error) == (1, "ProtocolError")
            assert "step 1 is at positions 4 to 5" in header.message

    play(Checkpoint(tiny("llama")), scene)


async def _follows(device: Any, step: int) -> tuple[list[int], int]:
    """What the worker says follows each position of a round, and the position it says that of."""
    header, payload = await device.hear_all(Data)
    assert (header.kind, header.step) == ("token", step)
    return [int.from_bytes(payload[n : n + 4], "little") for n in range(0, len(payload), 4)], header.start


def test_a_round_is_answered_for_every_position_and_the_next_one_begins_behind_what_was_right(
    tiny: Callable[[str], Path],
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await _prefilled(lab, device)
            await device.say(*_data(1, 4, 3))
            assert await _follows(device, 1) == (lab.expected[4:7], 4)
            await device.say(*_data(2, 5, 2))  # only the first was right
            assert await _follows(device, 2) == (lab.expected[5:7], 5)
            await device.say(Halt(1, keep=6))
            halted = (await device.hear_all(Halted))[0]
            assert {filled for _, filled in held(halted).values()} == {6}
            assert kept(halted) == {4: ((0, 6),)}
            await device.ask(Close(), Closed)

    play(Checkpoint(tiny("llama")), scene)


# Dies when engine/hosted.py says `if False:` for `if keep >= 0 or (walker.plan.decision.draft and extent.tokens):`.
def test_a_link_that_is_lost_in_a_round_leaves_what_is_certain(tiny: Callable[[str], Path]) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await _prefilled(lab, device)
            await device.say(*_data(1, 4, 4))
            await _follows(device, 1)
        async with lab.session() as (device, opened):
            assert opened.known
            assert {filled for _, filled in held(opened).values()} == {5}, "the first of a round is no guess"
            assert kept(opened) == {4: ((0, 5),)}
            await device.ask(Close(), Closed)

    play(Checkpoint(tiny("llama")), scene)


async def _hung_up_while_busy(lab: Lab, word: Halt, device: Any) -> None:
    """A run is to end, and the link with it, before the machine is through with something else."""
    through = threading.Event()
    busy = asyncio.create_task(lab.worker.machine.compute(through.wait))
    await asyncio.sleep(0)
    await device.say(word)
    await asyncio.sleep(0.05)
    asyncio.get_running_loop().call_later(0.1, through.set)
    await device.link.close()
    await busy


# Dies when engine/hosted.py says `running = self._running.pop(halt.run, None)` for
# `running = self._running.get(halt.run)`.
def test_a_link_that_is_lost_while_a_run_is_halted_leaves_what_is_certain_too(tiny: Callable[[str], Path]) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await _prefilled(lab, device)
            await device.say(*_data(1, 4, 4))
            await _follows(device, 1)
            await _hung_up_while_busy(lab, Halt(1, keep=5), device)
        async with lab.session() as (device, opened):
            assert {filled for _, filled in held(opened).values()} == {5}, "what was drafted and never judged is there"
            assert kept(opened) == {4: ((0, 5),)}
            await device.ask(Close(), Closed)

    play(Checkpoint(tiny("llama")), scene)


# Dies when engine/walk.py says `self.certain = self.post.extent.start` for `self.certain = self.post.extent.known`.
def test_a_link_that_is_lost_in_a_prefill_leaves_what_was_computed_though_the_run_may_draft(
    tiny: Callable[[str], Path],
) -> None:
    async def scene(lab: Lab) -> None:
        async with lab.session() as (device, _):
            await lab.begun(device, draft=3, prefill_chunk=2)
            await lab.feed(device, 0, 0, 2)
            for _ in range(100):
                if _filled(lab):
                    break
                await asyncio.sleep(0.01)
        async with lab.session() as (device, opened):
            assert {filled for _, filled in held(opened).values()} == {2}
            await device.ask(Close(), Closed)

    play(Checkpoint(tiny("llama")), scene)


def _filled(lab: Lab) -> bool:
    (session,) = lab.worker._sessions.values()
    return all(filled for _, _, filled in session._shares.cached)


# Moving


class _Wanders:
    """Another place each time it is asked, drafting in some of them."""

    def __init__(self, edge: Edge, places: Sequence[tuple[str, int]]) -> None:
        self.decisions = [Decision(edge.partition(where), draft=draft) for where, draft in places]

    def decide(self, seen: object) -> Decision:
        self.decisions.append(self.decisions.pop(0))
        return self.decisions[-1]


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_a_text_that_moves_while_it_drafts_is_the_same(sampling: Sampling, checked: list[Run]) -> None:
    directory = locate("bundled")
    prompt = Tokenizer(directory).encode(AGAIN)
    places = [(PLACES["u"], 4), (PLACES["cloud"], 8), (PLACES["shared"], 0), (PLACES["relayed"], 2), (PLACES["u"], 1)]

    async def scene() -> None:
        async with in_process(directory) as edge:
            plain = await _ids(edge.generate(prompt, max_new_tokens=90, sampling=sampling, stop_ids=()))
            one = edge.generate(prompt, _Wanders(edge, places), max_new_tokens=90, sampling=sampling, stop_ids=())
            assert await _ids(one) == plain
            assert len([run for run in one.record.runs if run.tokens]) >= 3

    asyncio.run(scene())
    assert len(checked) >= 4
