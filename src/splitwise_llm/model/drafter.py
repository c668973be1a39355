"""A smaller model that proposes what a larger one of the same tokenizer may say. It knows nothing of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.model.checkpoint import Checkpoint
from splitwise_llm.model.sampling import Sampling, sample
from splitwise_llm.model.share import Share
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.model.weights import Need, Resident
from splitwise_llm.spec import Dtype, Kernels, Weights


class ModelDrafter:
    """Proposes by running a whole model, token by token, with the noise that the larger one will draw with; or only its
    first `layers`, whose stream goes to the head as it is.

    Its keys and values of the text so far are kept; what turned out otherwise is forgotten. To be called from one
    thread. Raises ModelError where the two models' tokenizers differ, RequestError for layers that are not there.
    """

    is_light = False

    def __init__(
        self, checkpoint: Checkpoint, of: Checkpoint, capacity: int, sampling: Sampling,
        dtype: Dtype = Dtype.FP32, weights: Weights = Weights.FULL, layers: int | None = None,
        kernels: Kernels = Kernels.TORCH,
    ) -> None:  # fmt: skip
        check_same_tokenizer(checkpoint, of)
        spec = checkpoint.architecture.spec
        if layers is not None and not 1 <= layers <= spec.num_layers:
            raise RequestError(f"{layers} early layers were asked for; expected 1 to {spec.num_layers}")
        spec = replace(spec, num_layers=layers or spec.num_layers)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        units = tuple(
            (half, tuple(range(spec.num_ffn_shards if half % 2 else spec.num_kv_heads)))
            for half in range(2 * spec.num_layers)
        )
        need = Need(units, embed=True, head=True)
        resident = Resident(checkpoint, dtype, weights, device, kernels)
        resident.load(need)
        self.spec = spec
        self._capacity, self._sampling = min(capacity, spec.max_context), sampling
        self._share = Share(resident, need, self._capacity)
        self._cached: list[int] = []
        """The ids whose keys and values there are."""

    @property
    def num_cached(self) -> int:
        """Positions that its cache holds."""
        return len(self._cached)

    @torch.inference_mode()
    def propose(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """At most so many ids that may follow; none once the text is longer than this model's context."""
        most = min(most, self._capacity - len(ids))
        if most < 1:
            return ()
        same = next((n for n, (a, b) in enumerate(zip(self._cached, ids, strict=False)) if a != b), None)
        known = min(len(self._cached) if same is None else same, len(ids) - 1)
        if any(one >= self.spec.vocab_size for one in ids[known:]):
            return ()
        self._share.cut(known)
        del self._cached[known:]
        new = list(ids[known:])
        proposed: list[int] = []
        while True:
            at = self._share.positions(len(self._cached), len(new))
            x = self._share.run(self._share.embed(new, at), 0, 2 * self.spec.num_layers, at)
            self._cached += new
            proposed.append(sample(self._share.logits(x), self._sampling, len(self._cached)))
            if len(proposed) == most:
                return proposed
            new = proposed[-1:]


def check_same_tokenizer(one: Checkpoint, other: Checkpoint) -> None:
    """Raise ModelError unless two models mean the same by every id."""
    a, b = Tokenizer(one.directory), Tokenizer(other.directory)
    if a.vocabulary != b.vocabulary:
        count = len(set(a.vocabulary.items()) ^ set(b.vocabulary.items()))
        raise ModelError(
            f"the draft model {one.directory.name} has another tokenizer than {other.directory.name} ({count} entries "
            "differ): its ids would mean other text; take a smaller model of the same family, or --draft ngram"
        )
