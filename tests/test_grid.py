"""The grid keeps what it made, and only what the same settings made; claims follow from figures."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from networks import steady_network
from splitwise_llm.bench import cells, scenarios
from splitwise_llm.bench.cells import MOST_EXTRA, Setting, Size, mean_estimate
from splitwise_llm.bench.claims import claims_of, judged
from splitwise_llm.bench.outcome import Outcome, compared, ratio, together
from splitwise_llm.bench.scenarios import CAUSAL, CLAIRVOYANT, Grid, cell_from, figures_of, run_grid, scalings
from splitwise_llm.bench.variants import VARIANTS, digest_of, is_ours, per_layer_policies, weight_files
from splitwise_llm.cost import Job, Limits, Table, World
from splitwise_llm.decision import Decision, WirePrecision
from splitwise_llm.errors import ModelError, RequestError, SpecError
from splitwise_llm.page import to_csv
from splitwise_llm.partition import Partition
from splitwise_llm.policies import rules
from splitwise_llm.policies.guided import Constant
from splitwise_llm.policies.knobs import Constants
from splitwise_llm.policies.menus import MAX_PLANS
from splitwise_llm.policies.per_layer import PerLayer
from splitwise_llm.records import Cell, Estimate
from splitwise_llm.sim.params import CloudProcess, SharedCloud
from splitwise_llm.sim.scenarios import HEAVY, SCENARIOS, Case, find_scenario


def cell(policy: str, mean_s: float) -> Cell:
    figures = {name: Estimate(mean_s, mean_s, mean_s) for name in ("mean_s", "p95_s", "device_j")}
    return Cell("healthy-cloud", "orin-7b", policy, 1, 10, figures, (1.0, 2.0), {"cloud": 1.0}, (0.0,), {"up": (0.0,)})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Neutral ones, ones that make the cloud dear, and ones that know nothing they see."""
    folder = tmp_path / "weights"
    steady_network().save(folder / "neutral.npz")
    steady_network({"cloud": 4}).save(folder / "dear.npz")
    steady_network({"device": 4}, seen=-2.0).save(folder / "lost.npz")
    return folder


CASES = (Case(("orin-nx-16gb",), "gpt2-xl", 0.2),)
FLAKY = replace(find_scenario("flaky-wan"), cases=CASES, cloud=CloudProcess((HEAVY,)))


@cache
def tables() -> tuple[Table, ...]:
    return Setting(FLAKY, FLAKY.cases[0], Size(1, 1, 1)).tables


def small(folder: Path) -> Setting:
    """One case; its tables are made once."""
    setting = Setting(FLAKY, FLAKY.cases[0], Size(2, 10, 5), weights=weight_files(folder))
    setting.__dict__["tables"] = tables()
    return setting


# Dies when policies/guided.py says `wanted = values.argmax(axis=1)` for `wanted = values.argmin(axis=1)`.
@pytest.mark.parametrize("tools", ["", "+tools"])
def test_neutral_weights_are_exact_drift_plus_penalty_in_every_request(weights: Path, tools: str) -> None:
    setting = small(weights)
    plain, neutral, dear = (setting.run(name + tools) for name in ("drift", "splitwise@neutral", "splitwise@dear"))
    assert np.array_equal(plain.total_s, neutral.total_s)
    assert np.array_equal(plain.last_plan, neutral.last_plan)
    assert tools or not np.array_equal(plain.total_s, dear.total_s)  # with tools the cloud is not used at all


def test_where_every_cell_is_kept_no_table_is_made(weights: Path) -> None:
    # Dies when bench/cells.py says `if True:` for `if choosers:  # else tables would be made that nobody needs`.
    setting = Setting(FLAKY, FLAKY.cases[0], Size(2, 10, 5), weights=weight_files(weights))
    setting.run_each([])
    assert "tables" not in setting.__dict__


def test_a_cell_says_how_often_it_fell_back_and_which_knobs_it_turned(weights: Path) -> None:
    setting = small(weights)
    assert setting.turned("drift") is None
    made = {name: scenarios.cell(setting, f"splitwise@{name}") for name in ("neutral", "dear", "lost")}
    assert made["neutral"].knobs == {}
    assert made["neutral"].metrics["fallback_share"].value == 0.0
    assert made["dear"].knobs == {"cloud x4": 1.0}
    assert made["lost"].knobs == {}
    assert made["lost"].metrics["fallback_share"].value == 1.0
    figures = figures_of(list(made.values()), {}).figures
    assert figures["flaky-wan.orin-gpt2xl/splitwise@dear/knob cloud x4"] == 1.0
    means = [one.metrics["mean_s"].value for one in made.values()]
    assert figures["flaky-wan.orin-gpt2xl/splitwise@seeds/mean_s"] == pytest.approx(np.mean(means))
    assert figures["flaky-wan.orin-gpt2xl/splitwise@seeds/mean_s_most"] == max(means)
    assert "knob cloud x4,1.0" in to_csv([made["dear"]])
    assert cell_from(made["dear"].to_dict()) == made["dear"]


def test_a_folder_without_weights_and_names_of_none_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no weights"):
        weight_files(tmp_path / "nowhere")
    with pytest.raises(
        RequestError,
        match="no weights for splitwise@other; there are splitwise@dear, splitwise@lost, splitwise@neutral",
    ):
        small(weights).chooser("splitwise@other")


def test_what_a_folder_holds_becomes_rows_of_the_policies_it_is_of(weights: Path) -> None:
    paper = Path(str(resources.files("splitwise_llm"))) / "data" / "policies" / "per_layer.npz"
    shutil.copy(paper, weights / "again.npz")
    (weights / "cheap.json").write_text(json.dumps({"constants": asdict(Constants(cloud=0.5))}))
    found = weight_files(weights)
    ours = {f"splitwise@{name}" for name in ("dear", "lost", "neutral")}
    assert set(found) == {*ours, "splitwise-paper@again", "tuned@cheap"}
    setting = small(weights)
    chooser = setting.chooser("tuned@cheap")
    assert isinstance(chooser, Constant)
    assert chooser.constants == Constants(cloud=0.5)
    again, shipped = (setting.run(name) for name in ("splitwise-paper@again", "splitwise-paper"))
    assert np.array_equal(again.total_s, shipped.total_s)
    assert len(per_layer_policies(found)) == 1
    made = [scenarios.cell(setting, name) for name in ("tuned@cheap", "splitwise@dear")]
    figures = figures_of(made, {}).figures
    assert figures["flaky-wan.orin-gpt2xl/tuned@seeds/mean_s"] == made[0].metrics["mean_s"].value
    assert figures["flaky-wan.orin-gpt2xl/splitwise@seeds/mean_s"] == made[1].metrics["mean_s"].value


# Dies when bench/cells.py says `extra |= theirs` for
# `extra |= dict.fromkeys(islice(theirs, max(MOST_EXTRA - len(extra), 0)))`.
def test_plans_of_weights_leave_room_in_a_table_for_those_of_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cells.layer_plans

    def many(policy: PerLayer, world: World, job: Job, *others: Any) -> list[Decision]:
        cuts = rules.that_exist(rules.cuts, world, Limits())
        chunked = [Decision(cut, WirePrecision.FP16, chunk) for cut in cuts for chunk in (None, 32, 128)]
        return chunked if policy is strange else kept(policy, world, job, *others)

    strange = PerLayer()
    monkeypatch.setattr(cells, "layer_plans", many)
    monkeypatch.setattr(cells, "per_layer_policies", lambda _: [strange])
    (table,) = Setting(FLAKY, FLAKY.cases[0], Size(1, 1, 1)).tables
    mine = {bill.decision for bill in tables()[0].bills}
    assert MOST_EXTRA < len(table) <= MAX_PLANS
    assert Decision(Partition.all_on(table.world.spec, 0), WirePrecision.FP16) in mine & {
        bill.decision for bill in table.bills
    }


@pytest.mark.parametrize("name", ["low_level.npz", "tuned.json"])
def test_what_is_of_none_of_them_is_refused_before_anything_is_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK nothing")
    with pytest.raises(ModelError, match=name):
        weight_files(tmp_path)


# Dies when bench/variants.py says `False` for `file.stem == SPREAD or file.stem.endswith("+tools")`.
@pytest.mark.parametrize("name", ["seeds.json", "mine+tools.json"])
def test_a_file_that_is_named_as_another_row_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"constants": asdict(Constants())}))
    with pytest.raises(SpecError, match="rename the file"):
        weight_files(tmp_path)


# Dies when bench/scenarios.py says `papers = list[str]()` for
# `papers = [digest_of(row, self.weight_files) for row in self.weight_files if row.startswith(f"{PAPER}@")]`.
def test_only_weights_of_the_papers_policy_whose_plans_are_in_every_table_make_all_cells_anew(weights: Path) -> None:
    alone = Grid(weights=weights).fingerprint
    assert alone == Grid().fingerprint
    paper = Path(str(resources.files("splitwise_llm"))) / "data" / "policies" / "per_layer.npz"
    shutil.copy(paper, weights / "again.npz")
    assert Grid(weights=weights).fingerprint != alone


def test_forms_of_ours_are_no_rivals_of_ours() -> None:
    assert all(is_ours(one.name + tools) for one in VARIANTS for tools in ("", "+tools"))
    assert is_ours("splitwise@seed1+tools")
    assert not any(is_ours(name) for name in ("drift", "tuned+tools", "splitwise-paper", "cloud-only"))
    assert judged(["drift", "splitwise+tools"]) == "splitwise"
    assert judged(["drift"]) == "drift"


def test_every_row_of_the_grid_has_the_learned_policies_and_all_names_are_known(weights: Path) -> None:
    for grid in (Grid(weights=weights), Grid(quick=True, weights=weights)):
        for scenario in SCENARIOS:
            policies = grid.policies(scenario)
            assert len(set(policies)) == len(policies)
            assert {"splitwise", "tuned", "splitwise@dear"} <= set(policies)
            assert ("splitwise+tools" in policies) == (scenario.num_devices <= scenarios.CROWD)


def test_only_a_learned_policys_cells_depend_on_its_weights(weights: Path) -> None:
    files = weight_files(weights)
    before = {name: digest_of(name, files) for name in ("drift+tools", "tuned", "splitwise@dear+tools")}
    steady_network({"link": 0}).save(weights / "dear.npz")
    assert before["drift+tools"] == ""
    assert before["tuned"]
    assert digest_of("splitwise@dear+tools", files) != before["splitwise@dear+tools"]
    assert digest_of("splitwise@neutral", files) != digest_of("splitwise@lost", files)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of one case and three policies."""
    monkeypatch.setattr(scenarios, "SCENARIOS", (FLAKY,))
    monkeypatch.setattr(Setting, "tables", property(lambda self: tables()))
    monkeypatch.setattr(scenarios, "RIVALS", ("cloud-only", "drift"))
    monkeypatch.setattr(scenarios, "ABLATED", ())


def test_cells_are_kept_one_by_one_and_a_missing_one_alone_is_made_again(
    tiny: None, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(size=Size(2, 10, 5), keep=tmp_path / "keep", weights=weights)
    first = run_grid(grid, lambda text: None)
    folder = tmp_path / "keep" / "flaky-wan.orin-gpt2xl"
    assert (folder / "cloud-only+tools.json").exists()
    outcomes = first.outcomes["flaky-wan", "orin-gpt2xl"]
    assert {CAUSAL, CLAIRVOYANT, "drift", "splitwise@neutral+tools"} <= set(outcomes)
    assert (outcomes["drift"].mean() >= outcomes[CLAIRVOYANT].mean() - 1e-6).all()
    assert compared(outcomes["splitwise@neutral"], outcomes["drift"], "p95_s") == Estimate(1.0, 1.0, 1.0)
    (folder / "drift.json").write_text((folder / "drift.json").read_text()[:40])
    ran: list[str] = []
    run = Setting.run
    monkeypatch.setattr(Setting, "run", lambda self, policy: ran.append(policy) or run(self, policy))
    again = run_grid(grid, lambda text: None)
    assert set(ran) == {"drift"}

    def steady(cells: list[Cell]) -> list[Cell]:  # all but how long decisions took
        return [replace(one, metrics={k: v for k, v in one.metrics.items() if "ms" not in k}) for one in cells]

    assert steady(again.cells) == steady(first.cells)
    steady_network({"cloud": 0}).save(weights / "lost.npz")
    ran.clear()
    run_grid(grid, lambda text: None)
    assert set(ran) == {"splitwise@lost", "splitwise@lost+tools"}
    for other in (replace(grid, seed=1), replace(grid, size=Size(2, 11, 5)), replace(grid, cut_gaps=True)):
        assert other.shelf.read("flaky-wan.orin-gpt2xl/drift") is None
    assert grid.shelf.read("flaky-wan.orin-gpt2xl/drift") is not None


def test_a_crowd_has_one_controller_that_takes_no_longer_than_the_selfish_and_no_shorter_than_one_alone() -> None:
    crowd = replace(find_scenario("rush-hour"), num_devices=11)
    setting = Setting(crowd, replace(crowd.cases[0], per_s=0.5, cloud=SharedCloud(4)), Size(1, 30, 4))
    bound = scenarios._controller(setting)
    assert bound is not None
    selfish = Outcome.of(setting.run("drift-selfish"), 0.0)
    alone_s = setting.tables[0].at(setting.tables[0].world.conditions()[None]).service_s.min()
    assert alone_s < bound.mean()[0] < 0.95 * selfish.mean()[0]
    assert scenarios._controller(Setting(FLAKY, FLAKY.cases[0], Size(1, 1, 1))) is None


def test_ratios_of_outcomes_are_paired_and_leave_out_what_does_not_count() -> None:
    total = np.array([[np.nan, 1.0, 3.0], [np.nan, 2.0, 6.0]])
    one = Outcome(total, 2 * total, total, total)
    twice = Outcome(2 * total, total, total, total)
    assert one.mean() == pytest.approx([2.0, 4.0])
    assert one.quantile(0.5) == 2.5
    assert compared(twice, one, "mean_s") == Estimate(2.0, 2.0, 2.0)
    assert compared(twice, one, "device_j") == Estimate(0.5, 0.5, 0.5)
    assert together([(twice, one), (one, one)], "p95_s").value == pytest.approx(2**0.5)
    assert Outcome.from_dict(one.to_dict()).mean("device_j") == pytest.approx([4.0, 8.0])


@pytest.mark.parametrize(("drift_s", "holds"), [(1.005, True), (1.02, False)])
def test_a_policy_holds_its_claim_within_one_percent(drift_s: float, holds: bool) -> None:
    claims = claims_of([cell("cloud-only", 1.0), cell("edge-only", 3.0), cell("drift", drift_s)])
    within = [claim.holds for claim in claims if "within 1 %" in claim.text]
    assert within == [holds] * 3
    assert next(claim for claim in claims if "wins" in claim.text).holds


def test_limits_of_a_latency_are_never_negative_and_those_of_a_growth_may_be() -> None:
    two = np.array([1.0, 4.0])  # whose limits are 9 standard deviations either way
    assert mean_estimate(two, 0.0).low == 0.0
    assert mean_estimate(two).low == pytest.approx(2.5 - 12.706 * 1.5, rel=1e-3)
    assert mean_estimate(np.array([0.2, 0.9]), 0.0, 1.0).high == 1.0


def test_limits_of_a_speed_up_hold_it_and_stay_finite_where_a_mean_may_be_nothing() -> None:
    def wide(policy: str, case: str, mean_s: float) -> Cell:
        one = cell(policy, mean_s)
        return replace(one, scenario="flaky-wan", case=case, metrics={"mean_s": Estimate(mean_s, 0.0, 2 * mean_s)})

    cells = [wide(policy, case, mean_s) for case in ("orin-gpt2xl", "orin-7b")
             for policy, mean_s in (("cloud-only", 3.0), ("edge-only", 1.5))]  # fmt: skip
    for one in scalings(cells)[0].series["edge-only"]:
        assert one.value == 2.0
        assert 0 < one.low < 2.0 < one.high < 10


def test_limits_are_over_traces_and_ratios_are_paired() -> None:
    one = mean_estimate(np.array([1.0, 2.0, 3.0]))
    assert (one.value, one.low) == (2.0, pytest.approx(2 - 4.303 / 3**0.5, rel=1e-3))
    base = np.array([1.0, 5.0, 2.0])
    assert ratio(2 * base, base) == Estimate(2.0, 2.0, 2.0)
