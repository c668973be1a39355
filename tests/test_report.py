"""What a person sees: pictures of partitions, tables of records, figures with their spread."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from splitwise_llm.bench.figures import Figures, interleaved, median_interval, ratios
from splitwise_llm.partition import Partition
from splitwise_llm.plan import Crossings, Kind
from splitwise_llm.records import MachineRecord, RequestRecord
from splitwise_llm.report import figures_table, partition_picture, requests_table
from splitwise_llm.spec import ModelSpec

SPEC = ModelSpec("llama", 4, 64, 8, 4, 16, 256, 100, 128, 3, True)
NAMES = ("edge", "cloud")

RECORD = RequestRecord(
    partition="edge[0:2] cloud[2:4]",
    wire="fp32",
    prompt_tokens=4,
    token_ids=(5, 6),
    text="ab",
    open_s=0.1,
    ttft_s=0.05,
    tpot_s=0.02,
    round_trips_per_token=1.0,
    crossings=(Crossings(0, Kind.RESIDUAL, 0, 1, 2, 1280), Crossings(1, Kind.TOKEN, 1, 0, 2, 8)),
    frame_bytes=1500,
    machines=(MachineRecord("edge", 300_000_000, (), ""), MachineRecord("cloud", 310_000_000, (), "")),
)


def drawn(table: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_picture_shows_layers_by_machines() -> None:
    partition = Partition.parse("edge[0:1.5] cloud[1.5:2] edge+cloud[2] cloud[3:4] head=edge", SPEC, NAMES)
    assert partition_picture(partition, NAMES, plain=True) == (
        "        0  1  2  3\n"
        " edge E ## #. == .. H\n"
        "cloud   .. .# == ##"
    )  # fmt: skip


def test_a_table_has_a_row_per_mode_and_says_whether_the_tokens_are_the_same() -> None:
    other = replace(RECORD, token_ids=(5, 7), machines=RECORD.machines[:1])
    text = drawn(requests_table({"cut": RECORD, "odd": other}, reference=(5, 6)))
    assert "emulated" not in text
    cut, odd = (next(line for line in text.splitlines() if f" {mode} " in line) for mode in ("cut", "odd"))
    for said in ("50 ms", "20.00", "1.3 kB", "8 B", "310 MB", "yes"):
        assert said in cut
    assert "NO" in odd
    slow = replace(RECORD, machines=(replace(RECORD.machines[0], emulated="pi"), RECORD.machines[1]))
    assert "emulated" in drawn(requests_table({"cut": slow}, (5, 6)))


def test_a_record_is_a_line_of_json_with_its_derived_figures() -> None:
    data = json.loads(RECORD.to_json())
    assert (data["up_bytes"], data["down_bytes"], data["emulated"]) == (1280, 8, False)
    assert data["token_ids"] == [5, 6]
    assert "\n" not in RECORD.to_json()


def test_figures_carry_medians_and_intervals() -> None:
    figures = Figures("some", {"rounds": 9})
    figures.add("exact", 3.0, "note")
    figures.add_median("ratio", [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    said = figures.to_dict()
    assert said["figures"] == {"exact": 3.0, "ratio": 5.0}
    assert said["intervals"] == {"ratio": (2.0, 8.0)}
    text = drawn(figures_table("bench some", figures.figures, figures.notes))
    assert "2 to 8, 9 runs" in text


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_an_interval_of_a_median_holds_it(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= sorted(values)[len(values) // 2] <= high


def test_interleaved_runs_take_turns_and_the_first_round_is_thrown_away() -> None:
    order: list[str] = []

    def measure(name: str, value: float):  # type: ignore[no-untyped-def]
        async def run() -> float:
            order.append(name)
            return value

        return run

    measured = asyncio.run(interleaved({"a": measure("a", 1.0), "b": measure("b", 2.0)}, 2, lambda _: None))
    assert measured == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert ratios(measured["b"], measured["a"]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])
