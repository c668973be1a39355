"""Proposing tokens before they are computed, and learning how long a proposal pays. It never decides what the text is.

A proposal is verified by the plan itself, position by position, with the noise that each position has anyway: so the
text is the one that there would be without, greedy or sampled. For a proposal that is certain (lookup in the text) that
is the standard rejection scheme of speculative sampling; for one that a model samples it is its coupled form, in which
both models draw with the same noise.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from splitwise_llm.cost import Drafter as PricedDrafter
from splitwise_llm.cost import best_draft
from splitwise_llm.decision import MAX_DRAFT
from splitwise_llm.errors import RequestError
from splitwise_llm.spec import ModelSpec, Weights

log = logging.getLogger(__name__)

PRIOR_RIGHT, PRIOR_ALL = 1.0, 2.0
"""An acceptance nobody has seen: as of one proposed token that was right and one that was not."""

FADES = 0.97
"""Weight that what was seen keeps with each round: about the last thirty rounds count."""

SLOWER_SHARE = 0.15
"""Of a step, what each drafted token adds to it until that was measured."""

PRICED_STEP = 0.05
"""Of an acceptance, as policies see it: each new figure prices every plan anew."""

RECENT = 0.2
"""Share of a step's surprise that is believed."""

STEADIER = 0.15
"""What a drafted token adds wavers by so much of what the step without does: it is the link that changes."""

RETRY_ROUNDS, RETRY_MOST = 8, 128
"""A drafter that did not pay is given another try after so many proposals, twice as many each time it fails."""

LONGEST, SHORTEST = 5, 1
"""Ids that must have occurred before in a row; the longest match is taken."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a session is asked to draft with."""

    by: str = "ngram"
    """`off`; `ngram`, lookup in the text so far; `early`, the first layers of the model itself and its head; or the
    directory, name or hub id of a smaller model."""
    most: int = 8
    """Tokens before each verifying step."""
    is_free: bool = True
    """Whether not to draft is one of the choices where it does not pay."""
    weights: Weights = Weights.FULL
    """Of a drafting model."""
    layers: int = 0
    """Of `early`."""

    def __post_init__(self) -> None:
        if not 1 <= self.most <= MAX_DRAFT:
            raise RequestError(f"{self.most} drafted tokens at most; expected 1 to {MAX_DRAFT}")
        if (self.by == "early") != (self.layers > 0):
            raise RequestError(f"{self.by!r} is to draft with {self.layers} early layers; write it as in early:2")

    @classmethod
    def parse(cls, text: str, most: int) -> Self:
        """From `off`, `auto`, `ngram`, `early:N`, or a model, as in `DIR` or `DIR:int4`. Raises RequestError."""
        name, _, layers = text.partition(":")
        if name == "early":
            count = int(layers) if layers.isascii() and layers.isdigit() else 0
            return cls(name, most, is_free=False, layers=count)
        if text in ("off", "auto", "ngram"):
            return cls("ngram" if text == "auto" else text, most, is_free=text == "auto")
        model, weights = cls.model_and_weights(text)
        return cls(model, most, is_free=False, weights=weights)

    @staticmethod
    def model_and_weights(text: str) -> tuple[str, Weights]:
        """What stands before and behind the last colon, where that is a format of weights."""
        model, _, weights = text.rpartition(":")
        return (model, Weights(weights)) if model and weights in list(Weights) else (text, Weights.FULL)


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
        """A step of so many drafted tokens is over. What was not expected of it is shared out between the two times, as
        far as each may have caused it (normalised least mean squares): so a link that got slower is no costlier draft,
        though every step has one."""
        if self.base_s is None:
            self.base_s = seconds / (1 + SLOWER_SHARE * proposed)
        if self.token_s is None:
            self.token_s = SLOWER_SHARE * self.base_s
        believed_s = RECENT * (seconds - self.base_s - proposed * self.token_s)
        causes = 1 + (STEADIER * proposed) ** 2
        self.base_s = max(self.base_s + believed_s / causes, 0.0)
        self.token_s = max(self.token_s + believed_s * proposed * STEADIER**2 / causes, 0.0)


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
    weights: Weights = Weights.FULL
    """Of that model."""
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
        """As the cost model knows it, in steps: plans are priced anew for each figure."""
        steps = round(self.pace.effective_acceptance / PRICED_STEP)
        return PricedDrafter(min(steps * PRICED_STEP, 1 - PRICED_STEP), self.model, self.weights)

    async def propose(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """The tokens to verify after these, at most `room`. A drafter that fails is done with, and so is one whose
        proposals are no ids."""
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
            self._guess = self._ids(found)
        except Exception as error:  # a stranger's code; without it the text is the same
            log.warning("drafting ends", exc_info=error)
            self.failed = f"{type(error).__name__}: {error}"
            return ()
        return self._guess[: min(most, self.pace.most(len(self._guess))) if self.drafter.is_light else most]

    async def _computed(self, text: Sequence[int], most: int) -> Sequence[int]:
        if self.compute is None:
            return self.drafter.propose(text, most)
        return await self.compute(lambda: self.drafter.propose(text, most))

    def _ids(self, found: Sequence[int]) -> tuple[int, ...]:
        """The ids of a proposal, up to the first that the model does not have: a smaller one may have more. Raises
        TypeError for what is no id of any."""
        ids = tuple(operator.index(one) for one in found)
        return ids[: next((n for n, one in enumerate(ids) if not 0 <= one < self.vocabulary), MAX_DRAFT)]

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
