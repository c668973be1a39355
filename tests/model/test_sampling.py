"""Sampling: greedy, filters, the right distribution, and noise that depends on seed and position alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from splitwise_llm.errors import RequestError
from splitwise_llm.model.sampling import Sampling, sample

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(sampling: Sampling, count: int = 4000) -> Counter[int]:
    return Counter(sample(LOGITS, sampling, position) for position in range(count))


def test_greedy_takes_the_largest() -> None:
    assert {sample(LOGITS, Sampling(), position) for position in range(9)} == {4}


def test_noise_is_a_function_of_seed_and_position() -> None:
    one = [sample(LOGITS, Sampling(1.0, seed=7), position) for position in range(60)]
    assert one == [sample(LOGITS, Sampling(1.0, seed=7), position) for position in range(60)]
    assert one[30:] == [sample(LOGITS, Sampling(1.0, seed=7), position) for position in range(30, 60)]
    assert one != [sample(LOGITS, Sampling(1.0, seed=8), position) for position in range(60)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    seen, expected = draws(Sampling(temperature)), (LOGITS / temperature).softmax(-1)
    for token, probability in enumerate(expected.tolist()):
        assert abs(seen[token] / 4000 - probability) < 0.035


def test_top_k_and_top_p_keep_only_the_most_likely() -> None:
    assert set(draws(Sampling(2.0, top_k=2))) == {4, 0}
    # Probabilities of the sorted tokens are about .64 .23 .09 .03 .01: the first two reach 0.8.
    assert set(draws(Sampling(1.0, top_p=0.8))) == {4, 0}
    assert set(draws(Sampling(1.0, top_p=0.5))) == {4}
    assert set(draws(Sampling(1.0, top_k=9, top_p=1.0))) == set(range(5))


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="expected"):
        Sampling(**bad)  # type: ignore[arg-type]
