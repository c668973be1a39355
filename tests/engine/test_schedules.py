"""Whatever fails and wherever the partition moves, a session's tokens come once each and say what an undisturbed run
says, or the session ends and names what it lost. It knows nothing of how."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schedules import (
    FAMILIES,
    LONGEST_S,
    PROMPT_TOKENS,
    SAMPLED,
    TOKENS,
    Act,
    Answerer,
    Result,
    Schedule,
    run,
    schedules,
)
from torch import Tensor

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.decision import Decision
from splitwise_llm.engine import walk
from splitwise_llm.engine.walk import GREEDY
from splitwise_llm.errors import MemoryTooSmall, PeerError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.partition import Partition
from splitwise_llm.spec import ModelSpec
from strategies import NAMES

NOISE = 1e-3
"""Partitions add in another order, which changes logits by about 1e-6."""


class Undisturbed:
    """What each family says to some prompts when nothing happens: prompts to which the answer is clear."""

    def __init__(self, tiny: Callable[[str], Path]) -> None:
        self.directory = tiny
        self.said: dict[tuple[str, int, bool], tuple[list[int], str]] = {}
        self.prompts: dict[str, list[list[int]]] = {}
        for family in FAMILIES:
            self.prompts[family] = []
            for seed in range(100):
                prompt = torch.randint(200, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
                answers = [self._answer(tiny(family), prompt, sampling) for sampling in (GREEDY, SAMPLED)]
                if all(answers):
                    number = len(self.prompts[family])
                    self.prompts[family].append(prompt)
                    for is_sampled, answer in enumerate(answers):
                        assert answer is not None
                        self.said[family, number, bool(is_sampled)] = answer
                if len(self.prompts[family]) == 2:
                    break
        self.spec: Callable[[str], ModelSpec] = cache(lambda family: Checkpoint(tiny(family)).architecture.spec)

    def texts(self, family: str) -> list[tuple[list[int], list[list[int]]]]:
        """Prompts, and what may be answered to each."""
        return [
            (prompt, [self.said[family, number, is_sampled][0] for is_sampled in (False, True)])
            for number, prompt in enumerate(self.prompts[family])
        ]

    @staticmethod
    def _answer(directory: Path, prompt: list[int], sampling: Sampling) -> tuple[list[int], str] | None:
        """None for an answer that rounding could change."""
        seen: list[tuple[Tensor, int, int]] = []

        def recording(logits: Tensor, sampling: Sampling, position: int) -> int:
            token = sample(logits, sampling, position)
            seen.append((logits.clone(), position, token))
            return token

        async def play() -> tuple[list[int], str]:
            async with (
                in_process(directory, ()) as edge,
                edge.generate(prompt, max_new_tokens=TOKENS, sampling=sampling, stop_ids=()) as generation,
            ):
                tokens = [token async for token in generation]
            return [token.id for token in tokens], "".join(token.text for token in tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "sample", recording)
            answer = asyncio.run(play())
        noise = torch.Generator().manual_seed(0)
        for logits, position, token in seen:
            for _ in range(10):
                moved = logits + NOISE * torch.randn(logits.shape, generator=noise)
                if sample(moved, sampling, position) != token:
                    return None
        return answer


@pytest.fixture(scope="session")
def undisturbed(tiny: Callable[[str], Path]) -> Undisturbed:
    return Undisturbed(tiny)


def check(undisturbed: Undisturbed, schedule: Schedule) -> Result:
    """Run a schedule, and all that must hold."""
    family = schedule.family
    result = run(undisturbed.directory(family), undisturbed.texts(family), schedule)
    said = f"{schedule}\n{result.story()}"
    assert not result.hanging, f"not over after {LONGEST_S:g} s: {said}"
    for session, outcome in zip(schedule.sessions, result.outcomes, strict=True):
        ids, text = undisturbed.said[family, session.prompt, session.is_sampled]
        assert outcome.ids == ids[: len(outcome.ids)], f"another text than the undisturbed {ids}: {said}"
        assert outcome.journal_bytes <= schedule.kept_bytes, f"journal out of its bound: {said}"
        if outcome.error is None:
            assert (outcome.ids, outcome.text) == (ids, text), f"not all of {ids}: {said}"
            assert list(outcome.generation.record.token_ids) == ids, said
            assert outcome.generation.record.text == text, said
            made = sum(run.tokens for run in outcome.generation.record.runs)
            assert made == len(ids), f"runs made {made} tokens: {said}"
        else:
            not_first = int(outcome.was_entered)
            at_fault = PeerError if outcome.was_entered else PeerError | MemoryTooSmall
            assert isinstance(outcome.error, at_fault), f"ended with what is no fault's doing: {said}"
            assert any(name in str(outcome.error) for name in NAMES[not_first:]), f"the error names nobody: {said}"
            may_fail = not outcome.was_entered and (bool(schedule.acts) or not schedule.fits)
            may_fail |= not schedule.fits and any(act.is_forever for act in schedule.acts)
            assert may_fail, f"gave up though it could have gone on: {said}"
    assert not result.left, f"left behind: {said}"
    assert not result.complaints, f"complaints: {said}"
    return result


INF = float("inf")


def decided(spec: ModelSpec, text: str, **how: Any) -> Decision:
    return Decision(Partition.parse(text, spec, NAMES), **how)


def shadow_filled_during_a_prefill_that_breaks(spec: ModelSpec) -> Schedule:
    """The device's shadow had more of the prompt than the share in use, which was asked to begin behind it: the session
    ended with "a run begins at position 8, and half 4 is cached up to 3 only"."""
    text = (
        "third[0:0.5] edge[0.5:1] cloud+third[1](kv=third:0-3 ffn=third:0,cloud:1-2,third:3,cloud:4-7) "
        "edge+cloud+third[2](kv=third:0,edge:1,third:2,edge:3 ffn=third:0,cloud:1,edge:2,cloud:3-4,third:5,cloud:6-7) "
        "embed=edge head=third"
    )
    first = decided(spec, text, prefill_chunk=1, draft=2, patience=0.0, shadow=True)
    second = decided(spec, "edge[0:1] cloud[1:3] embed=edge head=cloud", draft=1, patience=INF, shadow=True)
    acts = (Act(0, "reset", "cloud", 0.1, 5),)
    return Schedule("gpt2", (Answerer((first, "raises", second), 1, drafter="wrong"),), acts, "carry", is_direct=True)


def loop_asked_to_halt_waits_for_a_machine_that_is_lost(spec: ModelSpec) -> Schedule:
    """A worker's token loop was to halt at its next token, which needed a machine that was lost just then: the worker
    obeyed no order any more, and its run outlived the session."""
    text = (
        "cloud+third[0](kv=third:0,cloud:1,third:2,cloud:3 ffn=third:0-7) "
        "edge+cloud+third[1](kv=third:0-1,edge:2,cloud:3 ffn=third:0-7) "
        "edge+cloud+third[2](kv=edge:0,third:1,edge:2,cloud:3 ffn=edge:0-7) head=cloud"
    )
    moved = "edge+cloud[0](kv=edge:0,cloud:1-3 ffn=edge:0-7) cloud[1:2] third[2:2.5] edge[2.5:3] embed=cloud head=cloud"
    first = decided(spec, text.replace("head", "embed=cloud head"))
    second = decided(spec, moved, prefill_chunk=4, draft=1, patience=INF, shadow=True)
    acts = (Act(3, "reset", "third", None, 8), Act(1, "duplicate", "cloud", 0.3, 3))
    answers = (first, "stranger", second)
    return Schedule("gpt2", (Answerer(answers, 1, True, "model"),), acts, "compute", lease_s=0.1)


@pytest.mark.parametrize(
    "found",
    [shadow_filled_during_a_prefill_that_breaks, loop_asked_to_halt_waits_for_a_machine_that_is_lost],
    ids=lambda found: found.__name__,
)
def test_a_schedule_that_broke_once_is_got_over(
    undisturbed: Undisturbed, found: Callable[[ModelSpec], Schedule]
) -> None:
    for _ in range(3):  # they run in real time
        check(undisturbed, found(undisturbed.spec("gpt2")))


def test_a_link_lost_between_rounds_costs_the_drafts_accepted_last_and_they_are_counted(
    undisturbed: Undisturbed,
) -> None:
    cut = decided(undisturbed.spec("llama"), "edge[0:2] cloud[2:4]", draft=4, patience=INF)
    counted: list[int] = []
    for token, after in product((2, 6), range(4)):
        schedule = Schedule("llama", (Answerer((cut,), drafter="model"),), (Act(token, "reset", "cloud", None, after),))
        record = check(undisturbed, schedule).outcomes[0].generation.record
        counted.append(record.recomputed_tokens)
        behind = [run.known - run.start for run in record.runs if run.tokens == 0 and run.known > PROMPT_TOKENS]
        assert counted[-1] == sum(behind) <= 4 * sum(bool(run.ended) for run in record.runs), record.runs
    assert any(counted)


SETTINGS = settings(suppress_health_check=list(HealthCheck), phases=[Phase.generate])
"""Nothing is shrunk: schedules run in real time, and a smaller one may just be luckier. What fails is printed whole, to
be given to `check`."""


@pytest.mark.timeout(600)
@settings(SETTINGS, max_examples=10)
@given(data=st.data())
def test_a_session_says_the_same_whatever_happens_or_says_why_it_ends(
    undisturbed: Undisturbed, data: st.DataObject
) -> None:
    check(undisturbed, data.draw(schedules(undisturbed.spec)))


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(SETTINGS, max_examples=600)
@given(data=st.data())
def test_hundreds_of_schedules_of_faults_and_moves_change_no_text(
    undisturbed: Undisturbed, data: st.DataObject
) -> None:
    check(undisturbed, data.draw(schedules(undisturbed.spec)))
