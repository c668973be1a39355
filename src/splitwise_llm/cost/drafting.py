"""How many tokens to draft before a verifying step: from how often they are right, and what a step takes.

A step that verifies k drafted tokens makes 1 + a + ... + a^k tokens in expectation if each is right with probability a
(Leviathan et al. 2023, equation 1), and takes `base_s + k * token_s`.
"""

from __future__ import annotations

from collections.abc import Sequence


def tokens_per_round(acceptance: float, draft: int) -> float:
    """Expected tokens of a step that verifies `draft` tokens, each right with this probability if those before are."""
    if acceptance >= 1:
        return draft + 1.0
    return float((1 - acceptance ** (draft + 1)) / (1 - acceptance))


def acceptance_of(tokens: float, rounds: Sequence[int]) -> float:
    """The probability at which rounds of these draft lengths make so many tokens in expectation; 0 to 1.

    The inverse of `tokens_per_round`, found by halving: the sum rises with the probability.
    """
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(tokens_per_round(middle, draft) for draft in rounds) < tokens:
            low = middle
        else:
            high = middle
    return low


def best_draft(acceptance: float, base_s: float, token_s: float, most: int) -> int:
    """The length, 0 to `most`, that makes the most tokens per second.

    `base_s`: a step without drafts, round trip included; `token_s`: what each drafted token adds to it (drafting,
    computing and carrying it). Of equals the shortest. One more token pays while `a^k` of it is worth more than the
    step's seconds per token, and that only falls with k: so the first that does not pay is the end.
    """
    best = 0
    while best < most:
        rate = tokens_per_round(acceptance, best) / (base_s + best * token_s)
        if acceptance ** (best + 1) <= rate * token_s:
            break
        best += 1
    return best
