"""Whatever fails and wherever the partition moves, a session's tokens come once each and say what an undisturbed run
says, or the session ends and names what it lost. It knows nothing of how."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schedules import FAMILIES, LONGEST_S, PROMPT_TOKENS, SAMPLED, TOKENS, Result, Schedule, run, schedules
from torch import Tensor

from splitwise_llm.bench.in_process import in_process
from splitwise_llm.engine import walk
from splitwise_llm.engine.walk import GREEDY
from splitwise_llm.errors import MemoryTooSmall, PeerError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.sampling import Sampling, sample
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
    result = run(undisturbed.directory(family), undisturbed.prompts[family], schedule)
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


SETTINGS = settings(suppress_health_check=list(HealthCheck), phases=[Phase.generate])
"""Nothing is shrunk: schedules run in real time, and a smaller one may just be luckier. What fails is printed whole, to
be given to `check`."""


@pytest.mark.timeout(600)
@settings(SETTINGS, max_examples=60)
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
