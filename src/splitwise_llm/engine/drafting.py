"""Proposing tokens before they are computed, and learning how long a proposal pays. It never decides what the text is.

A proposal is verified by the plan itself, position by position, with the noise that each position has anyway: so the
text is the one that there would be without, greedy or sampled. For a proposal that is certain (lookup in the text) that
is the standard rejection scheme of speculative sampling; for one that a model samples it is its coupled form, in which
both models draw with the same noise.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from splitwise_llm.cost import Drafter as PricedDrafter
from splitwise_llm.cost import best_draft
from splitwise_llm.decision import MAX_DRAFT
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import ModelSpec

log = logging.getLogger(__name__)

PRIOR_RIGHT, PRIOR_ALL = 1.0, 2.0
"""An acceptance nobody has seen: as of one proposed token that was right and one that was not."""

FADES = 0.97
"""Weight that what was seen keeps with each round: about the last thirty rounds count."""

SLOWER_SHARE = 0.15
"""Of a step, what each drafted token adds to it until that was measured."""

RECENT = 0.2
"""Weight of the newest time in an average."""

RETRY_ROUNDS, RETRY_MOST = 8, 128
"""A drafter that did not pay is given another try after so many proposals, twice as many each time it fails."""

LONGEST, SHORTEST = 5, 1
"""Ids that must have occurred before in a row; the longest match is taken."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a session is asked to draft with."""

    by: str = "ngram"
    """`off`; `ngram`, lookup in the text so far; or the directory, name or hub id of a smaller model."""
    most: int = 8
    """Tokens before each verifying step."""
    is_free: bool = True
    """Whether not to draft is one of the choices where it does not pay."""

    def __post_init__(self) -> None:
        if not 1 <= self.most <= MAX_DRAFT:
            raise RequestError(f"{self.most} drafted tokens at most; expected 1 to {MAX_DRAFT}")

    @classmethod
    def parse(cls, text: str, most: int) -> Self:
        """From `off`, `auto`, `ngram` or a model. Raises RequestError."""
        return cls("ngram" if text == "auto" else text, most, is_free=text == "auto")


class Drafter(Protocol):
    """Who proposes."""

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """At most so many ids that may follow these; none where there is nothing to go by. Called anew with whatever
        text there is then, on the thread that computes where `is_light` is false."""
        ...

    @property
    def is_light(self) -> bool:
        """Whether it takes microseconds."""
        ...


class Lookup:
    """What followed the last ids where they occurred before in this text (prompt lookup, n-grams)."""

    is_light = True

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._behind: dict[tuple[int, ...], int] = {}
        """By n-gram, the position behind its latest occurrence but the end of the text."""
        self._done = 0

    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """See `Drafter`. Where what followed reaches the text's end, it is taken to go on in the same way."""
        self._read(ids)
        proposed: list[int] = []
        at = self._find(ids)
        while at is not None and len(proposed) < most:
            proposed.append(ids[at] if at < len(ids) else proposed[at - len(ids)])
            at += 1
        return proposed

    def _find(self, ids: Sequence[int]) -> int | None:
        for size in self._sizes:
            gram = tuple(ids[len(ids) - size :]) if size <= len(ids) else ()
            at = self._behind.get(gram)
            if gram and at is not None and at < len(ids) and tuple(ids[at - size : at]) == gram:
                return at
        return None

    def _read(self, ids: Sequence[int]) -> None:
        """Enter the n-grams that something follows already."""
        if self._done > len(ids):
            self._done = 0
        for stop in range(max(self._done, 1), len(ids)):
            for size in self._sizes:
                if size <= stop:
                    self._behind[tuple(ids[stop - size : stop])] = stop
        self._done = len(ids)


@dataclass(slots=True)
class Pace:
    """How many tokens to propose, from how often they were right and how long steps took. What it has learnt of a text
    is good for the next run, what it has learnt of steps is not: `begin` anew.

    `least` is 0 where not to draft at all is one of the choices, else 1.
    """

    least: int = 0
    right: float = PRIOR_RIGHT
    all: float = PRIOR_ALL
    """Proposed tokens that were judged: those right, and of each proposal the first that was not."""
    silent: float = 1.0
    """Rounds for which nothing was proposed, faded like the others."""
    base_s: float | None = None
    """A step without drafts."""
    token_s: float | None = None
    """What one more position adds."""
    _waits: int = 0
    _patience: int = RETRY_ROUNDS

    @property
    def acceptance(self) -> float:
        """Of a proposed token, if those before it were right."""
        return self.right / self.all

    @property
    def effective_acceptance(self) -> float:
        """The same, of someone who always proposes: silence counts as a wrong token."""
        return self.right / (self.all + self.silent)

    def begin(self, base_s: float | None, token_s: float | None) -> None:
        """A run begins whose steps are predicted to take so long; None: nobody knows."""
        self.base_s, self.token_s = base_s, token_s

    def most(self, proposed: int) -> int:
        """How many of so many proposed tokens to verify."""
        if not proposed:
            return 0
        base_s = self.base_s if self.base_s else 1.0
        token_s = self.token_s if self.token_s is not None and self.base_s else SLOWER_SHARE * base_s
        return max(best_draft(self.acceptance, base_s, token_s, proposed), min(self.least, proposed))

    def retries(self) -> bool:
        """Whether it is time to try again what did not pay, for a drafter that costs something to ask."""
        self._waits += 1
        if self._waits < self._patience:
            return False
        self._waits, self._patience = 0, min(2 * self._patience, RETRY_MOST)
        return True

    def judged(self, guess: Sequence[int], made: Sequence[int]) -> None:
        """What followed, beside what had been guessed, verified or not."""
        right = next((n for n, (a, b) in enumerate(zip(guess, made, strict=False)) if a != b), None)
        wrong = right is not None
        right = min(len(guess), len(made)) if right is None else right
        self.right, self.all, self.silent = FADES * self.right, FADES * self.all, FADES * self.silent
        self.right += right
        self.all += right + wrong
        self.silent += not guess
        if right:
            self._patience = RETRY_ROUNDS

    def took(self, proposed: int, seconds: float) -> None:
        """A step of so many drafted tokens is over."""
        if not proposed:
            self.base_s = _mixed(self.base_s, seconds)
        elif self.base_s is not None:
            self.token_s = _mixed(self.token_s, max(seconds - self.base_s, 0.0) / proposed)


def _mixed(average: float | None, newest: float) -> float:
    return newest if average is None else (1 - RECENT) * average + RECENT * newest


Compute = Callable[[Callable[[], Sequence[int]]], Awaitable[Sequence[int]]]


@dataclass(slots=True)
class Drafting:
    """Who proposes in one session on one machine, and how much of it is verified."""

    drafter: Drafter
    vocabulary: int
    pace: Pace = field(default_factory=Pace)
    most: int = MAX_DRAFT
    """Tokens that may be verified now; at 0 it is only noted what would have been right."""
    compute: Compute | None = None
    """Runs what is not light on the thread that computes."""
    model: ModelSpec | None = None
    """Of the drafter, if it is a model: so that it can be priced."""
    failed: str = ""
    """Why nothing is proposed any more; empty while it is."""
    proposed: int = 0
    """Tokens verified in all, and how many of them were right."""
    right: int = 0
    seen: list[int] = field(default_factory=list)
    """Of a machine that does not hold the session: the ids that came by, as far as they follow each other."""
    _guess: tuple[int, ...] = ()
    _stop: int = 0

    @property
    def as_priced(self) -> PricedDrafter:
        """As the cost model knows it."""
        return PricedDrafter(min(self.pace.effective_acceptance, 0.99), self.model)

    async def propose(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """The tokens to verify after these, at most `room`. A drafter that fails is done with; what is no id ends a
        proposal."""
        self._guess = ()
        if self.failed or room < 1:
            return ()
        text, most = ids or self.seen, min(room, self.most)
        try:
            if self.drafter.is_light:  # to guess costs nothing, even if it is not verified
                found: Sequence[int] = self.drafter.propose(text, min(room, MAX_DRAFT))
            else:
                most = self.pace.most(most) or int(most > 0 and self.pace.retries())
                found = await self._computed(text, most) if most else ()
        except Exception as error:  # a stranger's code; without it the text is the same
            log.warning("drafting ends", exc_info=error)
            self.failed = f"{type(error).__name__}: {error}"
            return ()
        wrong = next((n for n, one in enumerate(found) if not self._is_id(one)), len(found))
        self._guess = tuple(found[:wrong])
        return self._guess[: min(most, self.pace.most(wrong) if self.drafter.is_light else wrong)]

    async def _computed(self, text: Sequence[int], most: int) -> Sequence[int]:
        if self.compute is None:
            return self.drafter.propose(text, most)
        return await self.compute(lambda: self.drafter.propose(text, most))

    def _is_id(self, one: object) -> bool:
        return isinstance(one, int) and 0 <= one < self.vocabulary

    def judged(self, drafted: Sequence[int], made: Sequence[int], seconds: float) -> None:
        """A round is over: these tokens followed."""
        if self._guess or self.drafter.is_light:
            self.pace.judged(self._guess, made)
        self.pace.took(len(drafted), seconds)
        self.proposed += len(drafted)
        self.right += len(made) - 1

    def follows(self, position: int, ids: Sequence[int]) -> None:
        """Ids came by at a position; what is not next to what came before replaces it."""
        first = self._stop - len(self.seen)
        if first <= position <= self._stop:
            del self.seen[position - first :]
        else:
            self.seen.clear()
        self.seen += ids
        self._stop = position + len(ids)
