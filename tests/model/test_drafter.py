"""A drafting model says what the model alone would say, whatever was proposed before; and only ids that mean the
same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitwise_llm.engine.machine import need_of
from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.drafter import ModelDrafter
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.model.share import Share
from splitwise_llm.model.weights import Resident
from splitwise_llm.partition import Partition
from splitwise_llm.spec import Dtype, Weights

WARM = Sampling(1.0, top_k=20, seed=3)


class Alone:
    """The same model run anew for every token."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights, layers: int) -> None:
        self._resident = Resident(checkpoint, Dtype.FP32, weights, torch.device("cpu"))
        self._need = need_of(Partition.all_on(checkpoint.architecture.spec, 0), 0)
        self._resident.load(self._need)
        self._layers = layers

    @torch.inference_mode()
    def follow(self, ids: Sequence[int], count: int, sampling: Sampling) -> list[int]:
        text = list(ids)
        while len(text) < len(ids) + count:
            share = Share(self._resident, self._need, len(text))
            at = share.positions(0, len(text))
            x = share.run(share.embed(text, at), 0, 2 * self._layers, at)
            text.append(sample(share.logits(x), sampling, len(text)))
        return text[len(ids) :]


@pytest.fixture(scope="module")
def alone(tiny: Callable[[str], Path]) -> Callable[[Weights, int], Alone]:
    checkpoint = Checkpoint(tiny("llama"))
    made: dict[tuple[Weights, int], Alone] = {}
    return lambda weights, layers: made.setdefault((weights, layers), Alone(checkpoint, weights, layers))


# Dies when model/drafter.py says `self._share.cut(known + 1)` for `self._share.cut(known)`.
# Dies when model/drafter.py says `if same is None else len(self._cached)` for `if same is None else same`.
@pytest.mark.parametrize(("weights", "layers"), [(Weights.FULL, None), (Weights.INT4, None), (Weights.FULL, 2)])
@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_it_proposes_what_the_model_says_whatever_became_of_the_proposals_before(
    weights: Weights,
    layers: int | None,
    sampling: Sampling,
    tiny: Callable[[str], Path],
    alone: Callable[[Weights, int], Alone],
) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    reference = alone(weights, layers or 4)

    @settings(max_examples=15)
    @given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(0, 255)), min_size=1, max_size=4))
    def goes_on(rounds: list[tuple[int, int, int]]) -> None:
        drafter = ModelDrafter(checkpoint, checkpoint, 64, sampling, weights=weights, layers=layers)
        text = [5, 9, 2]
        for most, right, other in rounds:
            proposed = drafter.propose(text, most)
            assert list(proposed) == reference.follow(text, most, sampling)
            text += [*proposed[:right], other, 7]  # what differs may lie further back than the last

    goes_on()


def test_it_stops_where_its_context_ends(tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    drafter = ModelDrafter(checkpoint, checkpoint, 10_000, Sampling())
    text = [n % 256 for n in range(250)]
    assert len(drafter.propose(text, 8)) == 6
    assert drafter.propose([*text, *text[:6]], 8) == ()
    assert drafter.propose([*text, *text], 8) == ()
    assert len(drafter.propose(text[:100], 8)) == 8, "and goes on with a text that is shorter"


def test_it_is_silent_about_ids_that_it_does_not_have(tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))  # its tokenizer knows more ids than the model
    drafter = ModelDrafter(checkpoint, checkpoint, 64, Sampling())
    assert drafter.propose([1, 300, 2], 4) == ()
    before = drafter.propose([1, 2, 3], 4)
    assert drafter.propose([1, 300, 2], 4) == (), "though there is something cached"
    assert drafter.propose([1, 2, 3], 4) == before


def test_a_model_with_another_tokenizer_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    ours = Checkpoint(tiny("llama"))
    for file in ours.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    words = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'
    (tmp_path / "tokenizer.json").write_text(words)
    with pytest.raises(ModelError, match=r"another tokenizer .* take a smaller model of the same family"):
        ModelDrafter(Checkpoint(tmp_path), ours, 64, Sampling())
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        ModelDrafter(Checkpoint(tmp_path), ours, 64, Sampling())


@pytest.mark.parametrize("layers", [-1, 5])
def test_layers_that_are_not_there_are_refused(layers: int, tiny: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny("llama"))
    with pytest.raises(RequestError, match="expected 1 to 4"):
        ModelDrafter(checkpoint, checkpoint, 64, Sampling(), layers=layers)
