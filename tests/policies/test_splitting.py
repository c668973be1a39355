"""Cutting where element loss and device load together cost least."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from splitwise_llm.cost import Host, World
from splitwise_llm.errors import RequestError, SpecError
from splitwise_llm.observation import MachineView, Observation
from splitwise_llm.policies.splitting import LayerSplitting, SplitTable
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights

SPEC = ModelSpec("llama", 16, 64, 4, 4, 16, 128, 100, 128, 3, False)


def table() -> SplitTable:
    """Early cuts lose more, the more so the more is lost."""
    splits, losses = tuple(range(1, 8)), (0.0, 0.1, 0.3)
    nats = np.array([[3.0, 3.0 + 0.02 * (8 - split), 3.0 + 0.2 * (8 - split)] for split in splits])
    return SplitTable(8, splits, losses, nats, "made up")


def observed(**changes: object) -> Observation:
    views = tuple(MachineView(n, n != "away", 10**9, Dtype.FP32, Weights.FULL) for n in ("edge", "away", "cloud"))
    return Observation(SPEC, views, 8, 8, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.0, 0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("loss", [0.0, 0.07, 0.2, 0.3])
def test_the_split_is_the_exhaustive_optimum(loss: float, weight: float) -> None:
    policy = LayerSplitting(table(), loss, weight)
    costs = {split: np.interp(loss, (0, 0.1, 0.3), (0, 0.02 * (8 - split), 0.2 * (8 - split))) for split in range(1, 8)}
    best = min(costs, key=lambda split: (round(costs[split] + weight * split / 8, 12), split))
    assert policy.costs()[policy.split() - 1] == pytest.approx(costs[best] + weight * best / 8)


def test_a_worse_channel_moves_the_cut_where_early_cuts_lose_more() -> None:
    assert [LayerSplitting(table(), loss, 0.5).split() for loss in (0.0, 0.1, 0.3)] == [1, 1, 7]


def test_the_decision_is_a_cut_at_the_same_depth_with_a_worker_within_reach() -> None:
    partition = LayerSplitting(table(), 0.3, 0.0).decide(observed()).partition
    assert [partition.owners(2 * layer)[0] for layer in range(16)] == [0] * 14 + [2] * 2


def test_a_split_that_does_not_fit_gives_way_to_the_next_best() -> None:
    def world(bytes_: float) -> World:
        device, cloud = DeviceSpec("small", 1e9, 1e9, bytes_), DeviceSpec("big", 1e9, 1e9, 1e9)
        links = {(0, 1): LinkSpec(0.01, 1e6, 1e6), (0, 2): LinkSpec(0.01, 1e6, 1e6)}
        return World(SPEC, (Host(device, Dtype.FP32), Host(cloud), Host(cloud)), links)

    policy = LayerSplitting(table(), 0.3, 0.0)
    partition = policy.decide(observed(world=world(1.3e6))).partition
    layers = sum(partition.owners(2 * layer)[0] == 0 for layer in range(16))
    assert 0 < layers < 14
    big = ModelSpec("llama", 16, 1024, 4, 4, 256, 4096, 100, 128, 3, False)
    with pytest.raises(RequestError, match="no split"):
        policy.decide(
            Observation(big, observed().machines, 8, 8, World(big, world(1e6).hosts, world(1e6).links)),
        )


def test_a_table_is_read_back_and_a_wrong_one_is_refused_by_name(tmp_path: Path) -> None:
    good = {"num_layers": 4, "splits": [1, 2], "losses": [0, 0.1], "nats": [[3, 4], [3, 5]], "source": "made up"}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(good))
    assert SplitTable.from_file(path).lost(0.05).tolist() == [0.5, 1.0]
    for wrong in (
        {"splits": [1, 4]}, {"splits": None}, {"losses": [0.1, 0]}, {"losses": [0.1, 1]}, {"nats": [[3]]}, {"nats": "x"}
    ):  # fmt: skip
        path.write_text(json.dumps(good | wrong))
        with pytest.raises(SpecError, match=r"table\.json"):
            SplitTable.from_file(path)
    path.write_text("{")
    with pytest.raises(SpecError, match="bench layer-splitting"):
        SplitTable.from_file(path)


def test_what_cannot_be_answered_is_said() -> None:
    with pytest.raises(RequestError, match=r"0 to 0\.3"):
        LayerSplitting(table(), 0.4).split()
    alone = Observation(SPEC, observed().machines[:1], 8, 8)
    with pytest.raises(RequestError, match="worker within reach"):
        LayerSplitting(table(), 0.1).decide(alone)


def test_the_shipped_table_covers_the_papers_losses_and_more_loss_never_helps() -> None:
    shipped = SplitTable.shipped()
    assert shipped.splits == tuple(range(1, 8))
    assert (shipped.losses[0], shipped.losses[-1]) == (0.0, 0.3)
    assert (np.diff(shipped.nats, axis=1) > 0).all()
    assert "measured by" in shipped.source
