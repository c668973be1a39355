"""Real processes, real signals, real sockets: what dies is got over, and the text is that of the undisturbed run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from forked import REAL
from splitwise_llm.bench import processes
from splitwise_llm.bench.breaking import Bench, Setup
from splitwise_llm.bench.edge_killed import play_edge_killed
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.matrix import (
    STRIKING,
    Cell,
    Mode,
    Moment,
    Outcome,
    Scene,
    all_cells,
    crowded_cells,
    drafted_cells,
    extra_tokens,
    pairwise,
    untold,
)
from splitwise_llm.bench.soak import Look, growth, run_soak
from splitwise_llm.bench.survival import Plan, add_matrix, failures, run_matrix, verdicts
from splitwise_llm.partition import Partition
from splitwise_llm.records import Event, RequestRecord, RunRecord
from splitwise_llm.spec import ModelSpec
from splitwise_llm.wire.faults import Fault

PAIRS = pairwise(all_cells())
CHECKED = tuple(
    cell for cell in PAIRS if (list(Fault).index(cell.fault) + list(Mode).index(cell.mode) + cell.spare) % 2 == 0
)
"""Half of the pairs; `bench survival` plays all, and with --full the whole matrix, drafting, crowds and pipelines."""


@pytest.fixture(scope="module")
def bench(forks: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(Setup(), tmp_path_factory.mktemp("journals")) as bench:
        yield bench


@pytest.mark.parametrize("cell", CHECKED, ids=lambda cell: cell.name)
def test_a_generation_gets_over_a_fault_with_the_same_text_and_its_record_says_what_happened(
    bench: Bench, cell: Cell
) -> None:
    number = CHECKED.index(cell)
    is_edge = cell.fault is Fault.EDGE_KILLED
    outcome = asyncio.run(play_edge_killed(bench, cell, number) if is_edge else bench.play(cell, number))
    assert outcome.is_well, outcome


def test_a_soak_under_random_faults_leaves_nothing_behind_and_every_text_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_start", REAL)  # orphans are looked for among the children of this process
    figures = asyncio.run(run_soak(45.0, 3, lambda _: None)).figures
    assert figures["soak_sessions"] > 5
    assert figures["soak_faults"] > 5
    assert figures["soak_identical_share"] == 1.0
    assert figures["soak_errors"] == 0
    assert figures["soak_rss_growth_edge"] < 0.15  # the whole half hour, in runs/, is held to 0.05
    assert figures["soak_rss_growth_cloud"] < 0.15
    assert figures["soak_descriptor_growth_edge"] <= 12
    assert figures["soak_descriptor_growth_cloud"] <= 12
    assert figures["soak_task_growth"] <= 20
    assert figures["soak_tasks_left"] == 0
    assert figures["soak_orphans"] == 0


# What the harness itself says


def test_the_matrix_has_every_fault_in_every_way_at_every_moment() -> None:
    cells = all_cells()
    assert len(set(cells)) == len(cells) == (len(Fault) + 1) * len(Mode) * len(Moment)
    assert len({cell.name for cell in cells}) == len(cells)


def test_in_a_fourth_of_the_cells_every_two_of_fault_way_moment_and_drafting_meet() -> None:
    def met(cells: tuple[Cell, ...]) -> Counter[tuple[str, str]]:
        return Counter(
            pair
            for cell in cells
            for pair in combinations(
                (replace(cell, drafting=False).row, f"{cell.mode} way", str(cell.moment), f"drafts {cell.drafting}"), 2
            )
        )

    everything = all_cells() + tuple(replace(cell, drafting=True) for cell in all_cells())
    assert set(met(PAIRS)) == set(met(everything))
    assert 4 * len(PAIRS) == len(all_cells())
    assert {(cell.fault, cell.drafting) for cell in CHECKED} == {(f, d) for f in Fault for d in (False, True)}


def test_the_whole_matrix_has_drafting_in_every_way_and_some_faults_of_crowds_and_pipelines() -> None:
    cells = Plan.of(full=True, keep=None).cells
    assert len({cell.name for cell in cells}) == len(cells)
    assert {(c.fault, c.mode) for c in cells if c.drafting and c.scene is Scene.ALONE} == {
        (fault, mode) for fault in Fault for mode in Mode
    }
    for scene in (Scene.CROWD, Scene.PIPELINE):
        assert {(c.fault, c.drafting) for c in cells if c.scene is scene} == {
            (fault, drafting) for fault in STRIKING for drafting in (False, True)
        }
    assert set(drafted_cells()) | set(crowded_cells()) <= set(cells)


SPEC = ModelSpec("llama", 4, 64, 8, 4, 16, 256, 100, 128, 3, True)
CUT = Partition.cut(SPEC, 2)
CLOUD = Partition.all_on(SPEC, 1)
FIRST = RunRecord(1, "edge[0:2] cloud[2:4]", "fp32", 0, 10, 3, 0.0, "admission", "cloud was lost")
AGAIN = RunRecord(3, "edge[0:2] cloud[2:4]", "fp32", 12, 13, 5, 2.0, "fault")


def recorded(*runs: RunRecord, events: tuple[Event, ...] = (), **changes: object) -> RequestRecord:
    base = RequestRecord("all:edge", "fp32", 10, (1, 2), "", 0.0, 0.0, 0.0, 0.0, (), 0, (), runs=runs, events=events)
    return replace(base, **changes)  # type: ignore[arg-type]


def fill(first: int, stop: int, start: int = 0) -> RunRecord:
    what = f"fill halves {first} to {stop}, positions {start} to 12"
    return RunRecord(2, "edge[0:2] cloud[2:4]", "fp32", start, 12, 0, 1.0, what)


@pytest.mark.parametrize(
    ("partition", "runs", "extra"),
    [
        (CUT, (FIRST, fill(4, 7), AGAIN), 0),
        (CUT, (FIRST, fill(3, 7), AGAIN), 0),  # an FFN has no cache
        (CUT, (FIRST, fill(2, 7), AGAIN), 12),
        (CUT, (FIRST, fill(0, 7, start=4), AGAIN), 8),
        (CUT, (FIRST, replace(AGAIN, start=2)), 10),
        (CLOUD, (FIRST, replace(AGAIN, start=2)), 0),  # it had lost all of it
        (CUT, (replace(FIRST, tokens=0), replace(AGAIN, start=0, known=10)), 0),  # no token had come
        (Partition.shared(SPEC, {0: 1, 1: 1}), (FIRST, fill(4, 7), AGAIN), 12),
    ],
)
def test_what_is_computed_again_counts_as_extra_where_it_was_not_lost(
    partition: Partition, runs: tuple[RunRecord, ...], extra: int
) -> None:
    assert extra_tokens(recorded(*runs), partition, 1) == extra
    assert extra_tokens(recorded(*runs, recomputed_tokens=40), partition, 1) == 40


FAULT, BACK = Event(1.0, "fault", "cloud was lost"), Event(2.0, "back", "cloud: back")


@pytest.mark.parametrize(
    ("cell", "record", "says"),
    [
        (Cell(Fault.RESET, Mode.CUT, Moment.MID), recorded(FIRST, AGAIN, events=(FAULT,), is_degraded=True), ""),
        (Cell(Fault.RESET, Mode.CUT, Moment.MID), recorded(AGAIN), "no run ended early"),
        (Cell(Fault.RESET, Mode.CUT, Moment.LAST), recorded(AGAIN), ""),
        (Cell(Fault.DROP_UP, Mode.CLOUD, Moment.MID), recorded(AGAIN), ""),
        (Cell(Fault.DUPLICATE, Mode.CUT, Moment.MID), recorded(AGAIN), ""),
        (Cell(Fault.RESET, Mode.CUT, Moment.MID), recorded(FIRST, AGAIN, is_degraded=True), "no event of a fault"),
        (Cell(Fault.RESET, Mode.CUT, Moment.MID), recorded(FIRST, AGAIN, events=(FAULT,)), "not say degraded"),
        (
            Cell(Fault.WORKER_RESTARTED, Mode.CUT, Moment.MID),
            recorded(FIRST, AGAIN, events=(FAULT,), is_degraded=True),
            "worker's return",
        ),
        (
            Cell(Fault.WORKER_RESTARTED, Mode.CUT, Moment.MID),
            recorded(FIRST, AGAIN, events=(FAULT, BACK), is_degraded=True),
            "",
        ),
        (
            Cell(Fault.WORKER_OUT_OF_MEMORY, Mode.CUT, Moment.MID),
            recorded(FIRST, AGAIN, events=(FAULT,), is_degraded=True),
            "want of memory",
        ),
        (Cell(Fault.JOURNAL_DISK_FULL, Mode.CUT, Moment.MID), recorded(AGAIN), "journal"),
    ],
)
def test_a_record_that_leaves_something_out_is_found(cell: Cell, record: RequestRecord, says: str) -> None:
    assert bool(untold(cell, record)) == bool(says)
    assert says in untold(cell, record)


def test_a_generation_that_fails_in_any_way_is_not_well() -> None:
    good = Outcome("x", True, True, "", "", 1.0)
    assert good.is_well
    for bad in (
        replace(good, fired=False), replace(good, identical=False), replace(good, told="?"), replace(good, error="?")
    ):  # fmt: skip
        assert not bad.is_well
        assert bad.verdict not in ("same", "n/a")
        assert replace(bad, inapplicable="it cannot").is_well


def test_finished_cells_are_kept_and_played_again_only_when_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tuple(Cell(Fault.RESET, Mode.CUT, moment) for moment in Moment)
    played: list[Cell] = []

    async def play(self: Bench, cell: Cell, number: int) -> Outcome:
        played.append(cell)
        return Outcome(cell.name, True, cell.moment is not Moment.MID, "", "", 1.0, events=((1.0, "lost", "x"),))

    monkeypatch.setattr(Bench, "play", play)
    plan = Plan(cells, keep=tmp_path / "cells")
    first = asyncio.run(run_matrix(plan, lambda _: None))
    assert played == list(cells)
    assert asyncio.run(run_matrix(plan, lambda _: None)) == first
    assert played == list(cells)
    kept = sorted((tmp_path / "cells").glob("*.json"))
    assert len(kept) == len(cells)
    kept[0].write_text("{")
    asyncio.run(run_matrix(plan, lambda _: None))
    assert len(played) == len(cells) + 1
    asyncio.run(run_matrix(replace(plan, setup=Setup(new_tokens=12)), lambda _: None))
    assert len(played) == 2 * len(cells) + 1

    assert [cell.moment for cell, _ in failures(first)] == [Moment.MID]
    assert verdicts(first) == [("reset", {"cut": "TEXT (mid)"})]
    figures = Figures("survival")
    add_matrix(figures, first)
    assert figures.figures["identical_share"] == 0.75


def test_growth_is_from_the_second_quarter_to_the_last() -> None:
    looks = [Look(float(at_s), 1000 if at_s < 10 else 10 * at_s, at_s) for at_s in range(41)]
    assert growth(looks, lambda one: one.descriptors, min) == 20
    assert growth(looks, lambda one: one.rss_bytes, max) == 400 - 190
