"""The closed form of how much to draft is the best there is, and the tokens it counts on are those that come."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.cost import Drafter, best_draft, tokens_per_round

SHARES = st.floats(0, 1, exclude_max=True)
TIMES = st.floats(1e-4, 10.0)


# Dies when cost/drafting.py says `if acceptance**best <=` for `if acceptance ** (best + 1) <=`.
@given(SHARES | st.just(1.0), TIMES, st.floats(0, 10.0), st.integers(0, 16))
def test_no_other_length_makes_more_tokens_per_second(
    acceptance: float, base_s: float, token_s: float, most: int
) -> None:
    def rate(draft: int) -> float:
        return tokens_per_round(acceptance, draft) / (base_s + draft * token_s)

    chosen = best_draft(acceptance, base_s, token_s, most)
    assert 0 <= chosen <= most
    assert rate(chosen) >= max(rate(draft) for draft in range(most + 1)) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("acceptance", "token_s", "draft"), [(0.0, 0.0, 0), (0.5, 1.0, 0), (0.999, 1e-6, 8), (1.0, 0.1, 8), (0.5, 0.1, 2)]
)
def test_lengths_at_the_ends(acceptance: float, token_s: float, draft: int) -> None:
    assert best_draft(acceptance, 1.0, token_s, 8) == draft


@given(SHARES, st.integers(0, 16))
def test_the_price_and_the_choice_count_the_same_tokens(acceptance: float, draft: int) -> None:
    assert tokens_per_round(acceptance, draft) == pytest.approx(Drafter(acceptance).tokens_per_round(draft))


def test_so_many_tokens_come_of_a_round_on_average() -> None:
    chance, count = random.Random(1), 20_000
    made = 0
    for _ in range(count):
        right = 0
        while right < 4 and chance.random() < 0.7:
            right += 1
        made += right + 1
    assert made / count == pytest.approx(tokens_per_round(0.7, 4), rel=0.01)
