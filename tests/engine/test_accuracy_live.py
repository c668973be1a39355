"""The bench of nats through a worker process: its rows are those of the table, and sessions lose what it says."""

from __future__ import annotations

import asyncio
import itertools
from statistics import fmean

import pytest

from splitwise_llm.bench.accuracy import Choice, Text, boundaries
from splitwise_llm.bench.accuracy_live import (
    AT_ONCE,
    add_row,
    plan_rows,
    run_live,
    told,
    told_all,
    weight_rows,
    wire_rows,
)
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.processes import worker
from splitwise_llm.cost import Accuracy
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.engine.edge import edge_with
from splitwise_llm.errors import RequestError
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.spec import Dtype, Weights

SPEC = Checkpoint(locate("bundled")).architecture.spec
NUMBERS = itertools.count(1)
TABLE = Accuracy(
    {form: tuple(float(next(NUMBERS)) for _ in range(4)) for form in (Weights.INT8, Weights.INT4)},
    {wire: tuple(float(next(NUMBERS)) for _ in range(4)) for wire in WirePrecision if wire is not WirePrecision.FP32},
    "every figure another",
)


# Dies when bench/accuracy_live.py says `u_shape(spec, start, stop)` for `u_shape(spec, start, spec.num_layers - stop)`.
def test_each_figure_of_the_table_has_a_row_that_is_it_and_nothing_else() -> None:
    weights = [row.said(TABLE, SPEC) for row in weight_rows(SPEC)]
    assert weights == pytest.approx([loss for form in TABLE.weights.values() for loss in form])
    wires = [row.said(TABLE, SPEC) for row in wire_rows(SPEC)]
    assert wires == [loss for wire in TABLE.wire.values() for loss in wire]


def test_plans_have_their_heads_where_the_text_is_told() -> None:
    rows = [*plan_rows(SPEC), *weight_rows(SPEC), *wire_rows(SPEC)]
    assert all(row.decision.partition.head == 0 for row in rows)
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.said(TABLE, SPEC) > 0 for row in rows)


# Dies when bench/accuracy_live.py says `if said else None` for `if said and mean > CLEAR * error else None`.
def test_what_is_noise_has_no_ratio() -> None:
    row, result = next(wire_rows(SPEC)), Figures("exactness")
    assert add_row(result, row, [1.0, 1.2, 0.8, 1.0], 0.8) == pytest.approx(1.25)
    assert result.figures[f"{row.name}_over_table"] == pytest.approx(1.25)
    result = Figures("exactness")
    assert add_row(result, row, [1.0, -0.9, 0.8, -0.7], 0.8) is None
    assert add_row(result, row, [1.0, 1.2, 0.8, 1.0], 0.0) is None
    assert f"{row.name}_over_table" not in result.figures


@pytest.mark.usefixtures("forks")
def test_sessions_over_a_worker_process_lose_what_the_arithmetic_of_the_table_loses() -> None:
    pieces = [[(37 * n + 11 * piece) % SPEC.vocab_size for n in range(20)] for piece in range(2)]
    text = Text(Checkpoint(locate("bundled")), pieces, 8, Dtype.FP32)
    full = (Weights.FULL,) * 2 * SPEC.num_layers
    half = boundaries(SPEC.num_layers, 4)[1]
    wire = next(row for row in wire_rows(SPEC) if row.name == f"wire_int4_before_{half}")
    low = next(row for row in weight_rows(SPEC) if row.name == "weights_int4_0")

    async def live(decision: Decision, weights: Weights) -> list[float]:
        options = ("--weights", weights.value, "--kernels", "torch")
        with worker("bundled", *options) as cloud, edge_with("bundled", {"cloud": cloud.address}) as edge:
            lost = await told_all(edge, decision, pieces, 8)
            assert lost[:12] == pytest.approx(await told(edge, decision, pieces[0], 8), abs=1e-3)
            return lost

    exact = text.nats(Choice(full, {}))
    by_wire = text.nats(Choice(full, {half: WirePrecision.INT4}))
    lossy = asyncio.run(live(wire.decision, wire.on_worker))
    assert lossy == pytest.approx(by_wire, abs=2e-3)
    assert abs(fmean(by_wire) - fmean(exact)) > 0.01
    by_weights = text.nats(Choice((Weights.INT4,) * 4 + full[4:], {}))
    assert asyncio.run(live(low.decision, low.on_worker)) == pytest.approx(by_weights, abs=2e-3)
    assert max(abs(a - b) for a, b in zip(by_weights, exact, strict=True)) > 0.01
    int4 = WirePrecision.INT4
    of_halves = text.nats(Choice(full, {8: int4}, {8: int4, 9: int4}))  # the stream crosses before the shared layer
    one_layer = next(row for row in plan_rows(SPEC) if row.name == "shared_int4")
    assert asyncio.run(live(one_layer.decision, Weights.FULL)) == pytest.approx(of_halves, abs=2e-3)
    by_ends = text.nats(Choice(full, {0: int4, 16: int4}))
    inside = next(row for row in plan_rows(SPEC) if row.name == "inside_int4")
    assert asyncio.run(live(inside.decision, Weights.FULL)) == pytest.approx(by_ends, abs=2e-3)


# Dies when bench/accuracy_live.py says `Semaphore(99)` for `Semaphore(AT_ONCE)`.
def test_a_long_text_is_told_in_a_few_sessions_at_a_time_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    running = []
    most = [0]

    async def told_slowly(_edge: object, _decision: object, piece: list[int], _prompt: int) -> list[float]:
        running.append(piece)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0.001 * (30 - piece[0]))
        running.remove(piece)
        return [float(piece[0])]

    monkeypatch.setattr("splitwise_llm.bench.accuracy_live.told", told_slowly)
    lost = asyncio.run(told_all(None, None, [[n] for n in range(30)], 8))  # type: ignore[arg-type]
    assert lost == list(range(30))
    assert most == [AT_ONCE]


def test_parts_that_there_are_not_are_refused() -> None:
    with pytest.raises(RequestError, match="no part 'wire'; the parts are weights, wires, plans"):
        asyncio.run(run_live(["wire"], None, 480, print))
