"""A table of measured units says what was measured, rises where it must, and survives a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.cost import Host, Job, World, price, stage_seconds
from splitwise_llm.cost.measured import BatchPoint, HalfPoint, Measured, RowsPoint, SizePoint
from splitwise_llm.decision import Decision
from splitwise_llm.errors import SpecError
from splitwise_llm.partition import Part, Partition
from splitwise_llm.plan import Step
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights

SPEC = ModelSpec("llama", 4, 64, 8, 4, 8, 128, 100, 256, 3, True)
DEVICE = DeviceSpec("d", 1e10, 1e10, 1e9)
POINTS = [(1, 1, 64), (1, 1, 128), (1, 16, 64), (2, 1, 64), (2, 16, 64), (4, 1, 64), (4, 1, 128), (4, 16, 64)]
seconds = st.floats(0, 1, allow_nan=False)


def table(times: list[float], **changes: object) -> Measured:
    """A table with these seconds at POINTS, rested and not, in both parts."""
    halves = tuple(
        HalfPoint(part, units, rows, context, rested, s)
        for part in Part
        for rested in (False, True)
        for (units, rows, context), s in zip(POINTS, times, strict=True)
    )
    usual: dict[str, object] = {
        "model": SPEC, "dtype": Dtype.FP32, "weights": Weights.FULL, "threads": 1, "halves": halves,
        "head": (RowsPoint(1, False, 0.5), RowsPoint(1, True, 0.75)),
        "stage": (RowsPoint(1, False, 0.1), RowsPoint(1, True, 0.2), RowsPoint(16, True, 0.3)),
        "message": (SizePoint(100, 0.01), SizePoint(200, 0.03)), "here_s": 0.001, "thread_s": 0.002,
        "source": "made up",
    }  # fmt: skip
    return Measured(**usual | changes)  # type: ignore[arg-type]


RISING = [1.0, 1.5, 4.0, 1.8, 5.0, 2.0, 2.5, 9.0]


def test_a_point_that_was_measured_is_said_as_it_was_measured() -> None:
    units = table(RISING)
    for (number, rows, context), said in zip(POINTS, RISING, strict=True):
        assert units.half_s(Part.ATTENTION, number, rows, context, True) == said
    assert units.head_s(1, False) == 0.5
    assert units.stage_s(16, True) == 0.3
    assert units.message_s(200) == 0.03


def test_between_points_it_goes_straight_and_beyond_the_last_it_goes_on() -> None:
    units = table(RISING)
    assert units.half_s(Part.ATTENTION, 1, 1, 96, False) == pytest.approx(1.25)
    assert units.half_s(Part.ATTENTION, 1, 1, 256, False) == pytest.approx(2.5)
    assert units.half_s(Part.ATTENTION, 3, 1, 64, False) == pytest.approx(1.9)
    assert units.half_s(Part.ATTENTION, 1, 31, 64, True) == pytest.approx(7.0)
    assert units.message_s(150) == pytest.approx(0.02)
    assert units.message_s(300) == pytest.approx(0.05)
    assert units.message_s(4) == 0.01


@given(
    times=st.lists(seconds, min_size=8, max_size=8),
    units=st.integers(1, 3),
    rows=st.integers(1, 40),
    context=st.integers(40, 300),
)
def test_noise_never_makes_more_work_take_less(times: list[float], units: int, rows: int, context: int) -> None:
    said = table(times)
    here = said.half_s(Part.ATTENTION, units, rows, context, True)
    assert said.half_s(Part.ATTENTION, units + 1, rows, context, True) >= here - 1e-12
    assert said.half_s(Part.ATTENTION, units, rows, context + 7, True) >= here - 1e-12
    if rows < 16:  # beyond the last measured rows each context has a slope of its own
        assert said.half_s(Part.ATTENTION, units, rows + 1, context, True) >= here - 1e-12


@given(times=st.lists(seconds, min_size=8, max_size=8))
def test_a_file_gives_back_what_was_written(times: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("units") / "units.json"
    path.write_text(table(times).to_json())
    assert Measured.from_file(path, SPEC) == table(times)


def test_the_mean_of_two_tables_is_taken_point_by_point() -> None:
    doubled = table([2 * s for s in RISING], here_s=0.003, token_s=0.5)
    mean = Measured.between(table(RISING), doubled)
    assert mean.token_s == 0.25
    assert mean.half_s(Part.FFN, 4, 16, 64, True) == pytest.approx(1.5 * RISING[-1])
    assert mean.here_s == pytest.approx(0.002)
    other = table(RISING, weights=Weights.INT8)
    with pytest.raises(SpecError, match="have no mean"):
        Measured.between(table(RISING), other)


def test_steps_of_few_rows_keep_what_was_measured_of_a_machine_that_does_not_wait() -> None:
    few = tuple(HalfPoint(Part.FFN, 4, 4, 64, rested, 3.0 + rested) for rested in (False, True))
    units = table(RISING, halves=table(RISING).halves + few, head=(RowsPoint(1, False, 0.5), RowsPoint(4, True, 0.9)))
    assert [units.half_s(Part.FFN, 4, 4, 64, rested) for rested in (False, True)] == [3.0, 4.0]
    assert units.half_s(Part.FFN, 4, 16, 64, False) == RISING[-1]
    # Dies when cost/measured.py says `_line(mine or {` for `_line(both | mine or {`.
    assert units.head_s(4, False) == 0.9


def test_a_batch_takes_what_one_takes_and_what_the_others_add() -> None:
    batches = (BatchPoint(1, 2.0, 3.0, 0.5), BatchPoint(4, 2.6, 3.3, 0.8))
    units = table(RISING, batches=batches)
    assert units.half_s(Part.ATTENTION, 4, 1, 64, True, 4) == pytest.approx(RISING[5] + 0.6)
    assert units.half_s(Part.FFN, 2, 1, 64, True, 4) == pytest.approx(RISING[3] + 0.15)
    assert units.stage_s(1, True, 4) == pytest.approx(0.2 + 0.3)
    assert units.half_s(Part.FFN, 4, 1, 64, True, 1) == RISING[5]
    assert table(RISING).half_s(Part.FFN, 4, 1, 64, True, 16) == RISING[-1]  # no batch was measured: rows
    with pytest.raises(SpecError, match="expected 1 and then more"):
        table(RISING, batches=batches[1:])


def test_a_file_keeps_batches_and_one_without_any_is_read(tmp_path: Path) -> None:
    units = table(RISING, batches=(BatchPoint(1, 2.0, 3.0, 0.5), BatchPoint(4, 2.6, 3.3, 0.8)))
    path = tmp_path / "units.json"
    path.write_text(units.to_json())
    assert Measured.from_file(path) == units
    assert Measured.between(units, units) == units
    data = json.loads(units.to_json())
    del data["batches"]
    path.write_text(json.dumps(data))
    assert Measured.from_file(path).batches == ()
    del data["token_s"]
    path.write_text(json.dumps(data))
    assert Measured.from_file(path).token_s == 0


def _without(name: str) -> str:
    data = json.loads(table(RISING).to_json())
    del data[name]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read as JSON"),
        (table(RISING).to_json()[:400], "is it complete"),
        ("[]", "no table of measured units"),
        (_without("head"), "'head'"),
        (table(RISING).to_json().replace('"here_s"', '"somewhere_s"'), "unknown somewhere_s"),
        (table(RISING).to_json().replace(", 9.0]", ", -9.0]"), "-9.0 s; expected 0 or more"),
        (table(RISING).to_json().replace(", 9.0]", ", NaN]"), "nan s; expected 0 or more"),
        (table(RISING).to_json().replace('"attention", 4, 1, ', '"attention", 5, 1, '), "expected 1 to 4 units"),
        (table(RISING).to_json().replace('"attention", 4, 1, ', '"attention", 3, 1, '), "whole attention half"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_with_its_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "units.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=says) as raised:
        Measured.from_file(path)
    assert "units.json" in str(raised.value)


def test_units_of_another_model_are_refused_with_the_size_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "units.json"
    path.write_text(table(RISING).to_json())
    with pytest.raises(SpecError, match="num_layers is 4, this one's 5"):
        Measured.from_file(path, dataclasses.replace(SPEC, num_layers=5))


# What the prices make of it


def world(units: Measured, *stretch: float) -> World:
    hosts = tuple(Host(DEVICE, units.dtype, units.weights, units, one) for one in stretch)
    return World(SPEC, hosts, {(0, 1): LinkSpec(0.02, 1e6, 1e6)})


def test_a_token_costs_its_halves_its_head_and_its_stages() -> None:
    units = table(RISING)
    alone = price(world(units, 1, 1), Decision(Partition.all_on(SPEC, 0)), Job(16, 97))
    # Mean context 64: 4 layers of 2.0 each half, the head and the stage of a machine that never waits, one call.
    assert alone.tpot_s == pytest.approx(4 * (2.0 + 2.0) + 0.5 + 0.1 + 0.001)


def test_machines_that_wait_for_each_other_count_as_rested() -> None:
    units = table(RISING)
    cut = price(world(units, 1, 1), Decision(Partition.cut(SPEC, 2)), Job(16, 97))
    messages_s = 2 * units.message_s(256) + 2 * units.message_s(4)
    network_s = 0.02 + 260 / 1e6
    # Dies when `rested` is no longer handed on by the walk of a bill.
    assert cut.tpot_s == pytest.approx(16.0 + 0.75 + 2 * (0.2 + 0.001) + messages_s + network_s)


def test_slowing_a_machine_stretches_what_it_computes_and_not_what_its_software_takes() -> None:
    units = table(RISING)
    plan = world(units, 1, 1).plan(Decision(Partition.all_on(SPEC, 0)))
    step = Step(1, 63, 1, emits=True, is_prefill=False)
    own, slow = (
        stage_seconds(SPEC, Host(DEVICE, measured=units, stretch=n), plan.stages[0], 0, step, rested=True)
        for n in (1, 3)
    )
    # A slowed machine computes on its compute thread.
    assert slow == pytest.approx(3 * (own - units.here_s) + units.thread_s)


def test_a_decode_step_of_one_sequence_stays_on_its_thread_drafts_or_none() -> None:
    host = Host(DEVICE, measured=table(RISING))
    # Dies when cost/hosts.py says `threaded = rows > 1 or batch > 1` for `threaded = is_prefill or batch > 1`.
    assert host.stage_s(16, True) == pytest.approx(0.3 + 0.001)
    assert host.stage_s(16, True, is_prefill=True) == pytest.approx(0.3 + 0.002)
    assert host.stage_s(1, True, batch=2) == pytest.approx(0.2 + 0.1 / 15 + 0.002)


def test_a_cloud_that_keeps_the_loop_still_sends_its_tokens() -> None:
    units = table(RISING)
    near, far = (price(world(units, 1, 1), Decision(Partition.all_on(SPEC, m)), Job(16, 97)) for m in (0, 1))
    assert far.tpot_s - near.tpot_s == pytest.approx(units.message_s(4))


# Dies when cost/bill.py says `self.plan.embed != self.plan.head and` for `self.plan.embed != self.plan.head or`.
def test_what_a_token_takes_on_the_device_counts_where_the_loop_passes_there_and_is_never_stretched() -> None:
    bare, units = table(RISING), table(RISING, token_s=7.0)
    for decision in (Partition.all_on(SPEC, 0), Partition.cut(SPEC, 2), Partition.u_shape(SPEC, 1, 1)):
        for stretch in (1, 3):
            less, more = (
                price(world(one, stretch, 1), Decision(decision), Job(16, 97)).tpot_s for one in (bare, units)
            )
            assert more - less == pytest.approx(7.0)
    cloud = Decision(Partition.all_on(SPEC, 1))
    less, more = (price(world(one, 1, 1), cloud, Job(16, 97)).tpot_s for one in (bare, units))
    assert more == less


# Dies when cost/bill.py says `waited = True` for `waited = self.step.is_prefill or visit > 0`.
def test_a_machine_that_goes_on_where_the_loop_left_it_does_not_wake() -> None:
    units = table(RISING, stage=(RowsPoint(1, False, 0.1), RowsPoint(1, True, 50.0)))
    u = price(world(units, 1, 1), Decision(Partition.u_shape(SPEC, 1, 1)), Job(16, 97))
    network_s = 2 * (0.01 + 256 / 1e6) + 4 * units.message_s(256)
    # The device wakes once, for the last layer; the worker once.
    assert u.tpot_s == pytest.approx(16.0 + 0.75 + 2 * 50.0 + 0.1 + 3 * 0.001 + network_s)


def test_a_slowed_machine_is_rested_because_it_sleeps() -> None:
    units = table(RISING)
    plan = world(units, 1, 1).plan(Decision(Partition.all_on(SPEC, 0)))
    step = Step(1, 63, 1, emits=True, is_prefill=False)
    slow = stage_seconds(SPEC, Host(DEVICE, measured=units, stretch=2), plan.stages[0], 0, step)
    rested = stage_seconds(SPEC, Host(DEVICE, measured=units), plan.stages[0], 0, step, rested=True)
    assert slow - units.thread_s == pytest.approx(2 * (rested - units.here_s))
