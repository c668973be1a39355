"""A session goes on in another process from its journal, whoever else is there, and a session that never began leaves
no journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.cli.generate import _settled_file, _settled_link
from splitwise_llm.decision import Decision
from splitwise_llm.engine.backoff import RecoveryRules
from splitwise_llm.engine.boundaries import Boundaries
from splitwise_llm.engine.edge import Edge
from splitwise_llm.engine.generation import Generation
from splitwise_llm.engine.journal import Entry, Journal
from splitwise_llm.engine.machine import Machine
from splitwise_llm.errors import LinkDied, Unreachable
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.wire.link import Link
from splitwise_llm.wire.messages import PROTOCOL_VERSION

PROMPT, CUT, TOKENS = [3, 1, 4, 1, 5], "edge[0:2] cloud[2:4]", 12
SMALL_BYTES = 400_000
"""Room for the device's layers, not for all."""
QUICK = RecoveryRules(base_s=0.01, cap_s=0.2, floor_s=0.005, budget_s=0.3, attempt_s=0.1)


async def nobody(name: str) -> Link:
    raise Unreachable(f"nobody answers for {name}")


async def told(generation: Generation) -> None:
    async with generation:
        async for _ in generation:
            pass


async def begun(directory: Path, journal: Path, tokens: int) -> tuple[int, ...]:
    """What an undisturbed session says; `journal` is that of one that was left after so many tokens."""
    async with in_process(directory) as edge:
        whole = edge.generate(PROMPT, CUT, max_new_tokens=TOKENS, stop_ids=())
        await told(whole)
        async with edge.generate(PROMPT, CUT, max_new_tokens=TOKENS, stop_ids=(), journal=journal) as left:
            count = 0
            async for _ in left:
                count += 1
                if count == tokens:
                    break
        return whole.record.token_ids


def test_a_session_goes_on_alone_where_its_worker_does_not_answer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    async def play() -> None:
        directory, journal = tiny("llama"), tmp_path / "j"
        expected = await begun(directory, journal, 5)
        with Machine(Checkpoint(directory)) as machine, Edge(machine, ["cloud", "third"], nobody) as edge:
            decision = Decision(edge.partition(CUT), patience=0.0)
            generation = edge.resume(journal, decision, rules=QUICK)
            await told(generation)
            assert generation.record.token_ids == expected
            assert generation.record.partition == "all:edge"
            assert generation.record.is_degraded

    asyncio.run(asyncio.wait_for(play(), 30))


def test_what_cannot_go_on_says_how_many_tokens_are_safe_and_where(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    async def play() -> None:
        directory, journal = tiny("llama"), tmp_path / "j"
        await begun(directory, journal, 5)
        with (
            Machine(Checkpoint(directory), memory_bytes=SMALL_BYTES) as machine,
            Edge(machine, ["cloud", "third"], nobody) as edge,
            pytest.raises(LinkDied, match=r"tokens are there, and `splitwise resume .*j`"),
        ):
            await told(edge.resume(journal, CUT, rules=QUICK))

    asyncio.run(asyncio.wait_for(play(), 30))


def test_a_session_that_never_began_leaves_no_journal(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    async def play() -> None:
        with (
            Machine(Checkpoint(tiny("llama"))) as machine,
            Edge(machine, ["cloud"], nobody) as edge,
            pytest.raises(Unreachable),
        ):
            await told(edge.generate(PROMPT, CUT, max_new_tokens=4, journal=tmp_path / "j"))
        assert not (tmp_path / "j").exists()

    asyncio.run(asyncio.wait_for(play(), 30))


def test_a_character_that_was_cut_in_two_is_left_to_the_next_token(tmp_path: Path) -> None:
    text = "Prince 日本 é 😀"
    directory = locate("bundled")
    checkpoint, tokenizer = Checkpoint(directory), Tokenizer(directory)
    ids = tokenizer.encode(text)
    cut = [n for n in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[:n])]
    assert cut
    with Machine(checkpoint) as machine, Edge(machine) as edge:
        for n in cut:
            path = tmp_path / str(n)
            entry = Entry("s", checkpoint.fingerprint, PROTOCOL_VERSION, (1,), len(ids))
            journal = Journal.create(path, entry, Boundaries(machine.spec.d_model, 1 << 20))
            for token in ids[:n]:
                journal.token(token)
            journal.close()
            certain = edge.resume(path).certain
            assert "\ufffd" not in certain
            assert text.startswith(certain)


@pytest.mark.parametrize(
    ("settle", "said", "kept"),
    [
        (_settled_file, "cloud={0}", "cloud={0}"),
        (_settled_file, "cloud={0}:cut", "cloud={0}:cut"),
        (_settled_file, "cloud=nofile", "cloud=nofile"),
        (_settled_link, "cloud=rtt=20ms up='{0}:cut' down=5mbit", "cloud=rtt=20ms 'up={0}:cut' down=5mbit"),
        (_settled_link, "cloud=rtt='20ms", "cloud=rtt='20ms"),
        (_settled_link, "cloud", "cloud"),
    ],
)
def test_files_of_links_are_found_from_another_directory(
    settle: Callable[[str], str], said: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a walk.csv"
    file.write_text("0 1\n")
    monkeypatch.chdir(tmp_path)
    assert settle(said.format("a walk.csv")) == kept.format(file)
