"""The bench that holds prices against runs: what it runs, what it calls an error, and that it runs at all."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from forked import splitwise_text
from splitwise_llm.bench import fidelity
from splitwise_llm.bench.accuracy import Choice, Text, boundaries, measure, spans, windows
from splitwise_llm.bench.fidelity import Outcome, Stand, seconds_per_token, summarise
from splitwise_llm.bench.fidelity_cases import (
    EMULATED,
    KINDS,
    LINKS,
    SLOWER,
    Case,
    Told,
    cases,
    decisions,
    kind_of,
    right_tokens,
    rounds,
)
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.neighbours import Neighbours
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import NO_LOSS, Accuracy, Host, Job, World, price
from splitwise_llm.cost.drafting import tokens_per_round
from splitwise_llm.cost.measured import Measured
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.profiling import Grid
from splitwise_llm.errors import BrokenInvariant, RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.partition import Partition
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, Weights, find_model

pytestmark = pytest.mark.alone
BUNDLED = find_model("bundled")


def test_every_kind_of_partition_is_run_on_every_link() -> None:
    run = decisions(BUNDLED)
    assert len(run) >= 12
    assert len(LINKS) == 4
    kinds = [decision.partition for decision in run.values()]
    assert Partition.all_on(BUNDLED, 0) in kinds
    assert Partition.all_on(BUNDLED, 1) in kinds
    assert any(layer.is_shared for partition in kinds for layer in partition.layers)
    assert any(len({*layer.groups, *layer.shards}) > 1 and not layer.is_shared for p in kinds for layer in p.layers)
    assert any(partition.head == 0 and partition.layers[-1].groups[0] == 1 for partition in kinds)
    assert {decision.wire for decision in run.values()} == {WirePrecision.FP32, WirePrecision.INT8}
    assert {kind_of(name) for name in run} == set(KINDS)
    assert {kind_of(name) for name, decision in run.items() if decision.draft} == {"drafting"}
    assert all(decision.prefill_chunk for name, decision in run.items() if kind_of(name) == "overlap")
    assert any(decision.prefill_wire is WirePrecision.INT8 for decision in run.values())
    everything = list(cases(BUNDLED, 16, list(run), list(LINKS)))
    assert len(everything) == len(run) * len(LINKS)
    for link in LINKS:
        assert {case.slower for case in everything if case.link == link} == set(EMULATED)


def test_figures_are_absolute_and_signed_errors_of_all_cases() -> None:
    decision = decisions(BUNDLED)["edge"]
    outcomes = [
        Outcome(Case(str(n), decision, Job(8, 4), link, (1.0, 1.0)), -n / 10, n / 100, 0.0, 0.0)
        for n, link in enumerate([*LINKS, *LINKS])
    ]
    outcomes.append(Outcome(Case("many", decision, Job(8, 4), "5ms_100mbit", (1, 1), "sessions"), None, 0.03, 0.0, 0.0))
    result = Figures("fidelity")
    summarise(result, outcomes)
    assert result.figures["ttft_median_abs_error"] == pytest.approx(0.35)
    assert result.figures["ttft_p90_abs_error"] == pytest.approx(0.7)
    assert result.figures["tpot_p90_abs_error"] == pytest.approx(0.07)
    assert result.figures["tpot_median_abs_error_sessions"] == pytest.approx(0.03)
    assert "ttft_median_abs_error_sessions" not in result.figures  # how prompts take turns is not priced
    assert "tpot_median_abs_error_drafting" not in result.figures  # there was none
    assert result.figures["bytes_max_abs_error"] == result.figures["crossings_max_abs_error"] == 0
    assert result.figures["signed_error_5ms_100mbit_ttft"] == pytest.approx(-0.2)
    assert result.figures["signed_error_80ms_5mbit_tpot"] == pytest.approx(0.05)


def test_real_runs_cross_as_often_and_carry_as_much_as_they_are_priced() -> None:
    async def play() -> list[Outcome]:
        link = "5ms_100mbit"
        with ExitStack() as stack:
            stand = Stand(locate("bundled"), [link], stack, slower=(1.0,))
            known = decisions(stand.machine.spec)
            block = [
                Case("cut_middle", known["cut_middle"], Job(96, 6), link, (1.0, 1.0)),
                Case("shared_one", known["shared_one"], Job(64, 6), link, (SLOWER, 1.0)),
                Case("draft_u", known["draft_u"], Job(32, 12), link, (1.0, 1.0), "drafting"),
                Case("sessions_u", known["sessions_u"], Job(16, 24), link, (1.0, 1.0), "sessions"),
            ]
            return await fidelity.measure(stand, [block], 1, Grid(((120, 120), (120, 32)), ((32, 32),)), lambda _: None)

    outcomes = asyncio.run(play())
    assert [(one.bytes, one.crossings) for one in outcomes] == [(0, 0)] * 4
    for one in outcomes:  # loosely: a neighbour may have the processor
        assert one.ttft is None or -0.9 < one.ttft < 9
        assert -0.9 < one.tpot < 9


@pytest.mark.parametrize(("acceptance", "draft"), [(0.3, 2), (0.6, 3), (0.8, 4)])
def test_a_drafter_that_was_told_the_text_is_right_as_often_as_it_is_asked_to_be(acceptance: float, draft: int) -> None:
    tokens = 1200
    played, made, text = [], 1, list(range(tokens))
    drafter = Told(7, text, acceptance, 1000)
    while made < tokens:
        room = min(draft, tokens - made - 1)
        guess = drafter.propose([0] * 7 + text[:made], room) if room else ()
        right = next((n for n, token in enumerate(guess) if token != text[made + n]), len(guess))
        played.append((1 + len(guess), 1 + right))
        made += 1 + right
    assert played == rounds(tokens, draft, acceptance)
    # Dies when bench/fidelity_cases.py says `draw = (number * GOLDEN) % 0.5` for `draw = (0.5 + number * GOLDEN) % 1`.
    assert (tokens - 1) / len(played) == pytest.approx(tokens_per_round(acceptance, draft), rel=0.01)
    assert right_tokens(3, 0.0, draft) == 0


def test_sessions_side_by_side_count_while_all_of_them_decode() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0, 6.0]
    assert seconds_per_token([early, late]) == pytest.approx(1.0)
    with pytest.raises(BrokenInvariant, match="ask for more tokens"):
        seconds_per_token([early, [3.5, 4.5, 5.5, 6.5, 7.5]])


def _proc(root: Path, busy: int, own: int) -> None:
    """A /proc in which so many ticks went to everyone, and to each of this process and number 7."""
    (root / "stat").write_text(f"cpu  {busy} 0 0 1000 1000 0 0 0 0 0\ncpu0 1 2 3\n")
    for pid in (os.getpid(), 7):
        (root / str(pid)).mkdir(exist_ok=True)
        (root / str(pid) / "stat").write_text(f"{pid} (a) b) S 1 1 1 0 0 0 0 0 0 0 {own} 0 0 0\n")


def test_other_programs_are_noticed_and_our_own_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    _proc(tmp_path, 0, 0)
    neighbours = Neighbours([7], tmp_path)
    now[0] += 1.0
    hertz = os.sysconf("SC_CLK_TCK")
    _proc(tmp_path, hertz, hertz // 4)  # one second of two processors, half of it ours
    assert neighbours.share == pytest.approx(0.25)
    assert Neighbours([8], tmp_path).share == 0  # nobody knows


# Accuracy


def test_groups_are_the_spans_that_the_table_means() -> None:
    assert spans(8) == [range(4), range(4, 8), range(8, 12), range(12, 16)]
    assert spans(2) == [range(2), range(2, 4)]
    table = Accuracy({Weights.INT4: (1.0, 2.0, 3.0, 4.0)}, {WirePrecision.INT8: (1.0, 2.0, 3.0, 4.0)}, "made up")
    for layers in (4, 5, 8, 12, 22):
        for group, (span, boundary) in enumerate(zip(spans(layers), boundaries(layers, 4), strict=True)):
            assert table.wire_by_boundary(WirePrecision.INT8, layers)[boundary] == group + 1
            by_half = table.weights_by_half(Weights.INT4, layers)
            assert sum(by_half[half] for half in span) == pytest.approx(group + 1)


def test_a_text_is_read_in_pieces_that_fit_the_context() -> None:
    pieces, prompt = windows(list(range(5000)), 2000, 1024)
    assert [len(piece) for piece in pieces] == [512] * 4
    assert (prompt, pieces[0][0], pieces[-1][-1]) == (32, 0, 4999)
    short, prompt = windows(list(range(40)), 2000, 1024)
    assert (len(short), len(short[0]), prompt) == (1, 40, 20)
    with pytest.raises(RequestError, match="expected at least 32"):
        windows(list(range(20)), 2000, 1024)


def test_an_exact_choice_loses_nothing_and_a_coarse_wire_something() -> None:
    checkpoint = Checkpoint(locate("bundled"))
    text = Text(checkpoint, [list(range(300, 348))], 8, Dtype.FP32)
    full = (Weights.FULL,) * 16
    base = text.nats(Choice(full, {}))
    assert len(base) == 40
    assert text.nats(Choice(full, {4: WirePrecision.FP32})) == base
    coarse = text.nats(Choice(full, dict.fromkeys((2, 6, 10, 14), WirePrecision.INT4)))
    assert sum(abs(a - b) for a, b in zip(coarse, base, strict=True)) > 0.1
    low = text.nats(Choice((Weights.INT4,) * 4 + full[4:], {}))
    assert sum(abs(a - b) for a, b in zip(low, base, strict=True)) > 0


def test_what_is_measured_is_a_table_with_its_sums_beside_the_whole() -> None:
    checkpoint = Checkpoint(locate("bundled"))
    ids = [(37 * n) % 4000 for n in range(48)]
    table, figures = measure(checkpoint, ids, "numbers", 32, Dtype.FP32, lambda _: None)
    assert set(table.weights) == {Weights.INT8, Weights.INT4}
    assert set(table.wire) == set(WirePrecision) - {WirePrecision.FP32}
    assert all(len(row) == 4 and min(row) >= 0 for row in table.weights.values())
    assert all(len(row) == 8 and min(row) >= 0 for row in table.wire.values())
    assert set(table.partials) == set(table.ends) == set(table.wire)
    assert all(len(row) == 4 for row in table.partials.values())
    assert sum(table.partials[WirePrecision.INT4]) + sum(table.ends[WirePrecision.INT4]) > 0
    for name, count in ("wire", 8), ("partials", 4), ("ends", 2):
        parts = sum(figures.figures[f"{name}_int4_{number}"] for number in range(count))
        assert figures.figures[f"{name}_int4_sum"] == pytest.approx(parts)
    assert "numbers" in table.source


# Dies when bench/accuracy.py says `groups = min(groups, num_layers)` for `groups = min(groups, 2 * num_layers)`.
def test_with_as_many_groups_as_layers_each_crossing_has_its_own_figure() -> None:
    assert boundaries(8, 16) == list(range(16))
    assert boundaries(8, 99) == list(range(16))
    assert spans(8, 99) == [range(2 * layer, 2 * layer + 2) for layer in range(8)]
    table = Accuracy({}, {WirePrecision.INT8: tuple(float(half) for half in range(16))}, "made up")
    assert table.wire_by_boundary(WirePrecision.INT8, 8) == (*range(16), 15)
    checkpoint = Checkpoint(locate("bundled"))
    table, _ = measure(checkpoint, [(37 * n) % 4000 for n in range(48)], "numbers", 32, Dtype.FP32, lambda _: None, 8)
    assert [len(row) for row in (*table.wire.values(), *table.partials.values())] == [16] * 4 + [8] * 4
    assert [len(row) for row in table.weights.values()] == [8, 8]


def test_the_bundled_model_comes_with_a_table_and_unknown_ones_count_as_lossless() -> None:
    table = Accuracy.shipped("bundled")
    assert "measured on" in table.source
    assert sum(table.wire[WirePrecision.INT4]) > sum(table.wire[WirePrecision.FP16])
    assert sum(table.partials[WirePrecision.INT4]) < sum(table.wire[WirePrecision.INT4])
    assert Accuracy.shipped("no-such-model") is NO_LOSS
    assert Accuracy.shipped("../bundled/config") is NO_LOSS


def test_a_text_too_short_to_measure_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    text, device = tmp_path / "short.txt", tmp_path / "here.json"
    text.write_text("Only this.")
    said = splitwise_text("profile", "--accuracy", str(text), "--out", str(device))
    assert said.returncode == 2
    assert "expected at least 32" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.long
def test_a_profile_writes_files_that_can_be_read_and_priced(tmp_path: Path) -> None:
    device = tmp_path / "here.json"
    with worker("bundled") as cloud:
        options = ["--name", "this one", "--machine", f"cloud={cloud.address}", "--budget", "2"]
        said = subprocess.run(
            [sys.executable, "-m", "splitwise_llm", "profile", "--out", str(device), *options],
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
    assert said.returncode == 0, said.stderr
    spec = DeviceSpec.from_file(device)
    units = Measured.from_file(tmp_path / "here.units.json", BUNDLED)
    link = LinkSpec.parse(json.loads((tmp_path / "here.cloud.link.json").read_text())["link"])
    hosts = (Host(spec, units.dtype, units.weights, units),) * 2
    assert 0 < price(World(BUNDLED, hosts, {(0, 1): link}), Decision(Partition.cut(BUNDLED, 4)), Job(32, 8)).tpot_s < 1
