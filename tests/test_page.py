"""The scenario report: one page that fetches nothing, says what is modelled, and marks nobody best who is not."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib import rcParams

from splitwise_llm.errors import SpecError
from splitwise_llm.page import Ablation, Claim, Contents, MemoryRow, Provenance, Scaling, Setting, to_csv, to_html
from splitwise_llm.page.colours import COLOURS, OTHER, featured, strokes
from splitwise_llm.page.figures import bars_figure, latency_figure, memory_figure, queues_figure, scaling_figure
from splitwise_llm.page.metrics import METRICS, columns, show, show_limits
from splitwise_llm.page.standing import best, judge, ratios
from splitwise_llm.page.svg import canvas, log_axis, place, thin
from splitwise_llm.records import Cell, Estimate

OURS = "drift-plus-penalty+tools"
HERE = Provenance("splitwise bench scenarios --seed 7", 7, ("lte.csv",), "0.1.0", "2026-11-21", "a machine", 2, 12.0)
ONE = Estimate(1.0, 1.0, 1.0)
NEVER = Estimate(math.nan, math.nan, math.nan)


def figure(value: float, share: float = 0.02) -> Estimate:
    return Estimate(value, value * (1 - share), value * (1 + share))


def cell(policy: str, mean: float, case: str = "nano+tiny", scenario: str = "healthy-cloud", points: int = 60) -> Cell:
    draw = Random(f"{policy}{mean}{case}{scenario}")
    latencies = sorted(draw.lognormvariate(math.log(mean), 0.5) for _ in range(points))
    metrics = {metric.name: figure(draw.uniform(0.1, 9.0)) for metric in METRICS}
    metrics |= {"mean_s": figure(mean), "p95_s": figure(2 * mean), "device_j": figure(3 * mean)}
    metrics["total_j"] = figure(4 * mean)
    times = tuple(float(n) for n in range(points))
    queues = {name: tuple(draw.uniform(0, 5) for _ in times) for name in ("device", "up", "down", "cloud")}
    modes = {"edge": 0.5, "u": 0.3, "waiting": 0.2}
    return Cell(scenario, case, policy, 9, 1000, metrics, tuple(latencies), modes, times, queues, wins=3)


def contents(*cells: Cell, **more: object) -> Contents:
    given_cells = cells or (cell(OURS, 2.0), cell("cloud-only", 3.0), cell("edge-only", 4.0), cell("clairvoyant", 1.5))
    settings = (Setting(1, "healthy-cloud", "no floor; A100 busy", "cloud-only wins"),)
    told: dict[str, object] = {"ours": (OURS, "drift-plus-penalty"), "yardsticks": ("clairvoyant",)}
    return Contents(given_cells, settings, provenance=HERE, **({"claims": ()} | told | more))  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Ids, links, and whether every element that was opened is closed in its turn."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name in ("src", "srcset", "data", "action", "poster"):
                self.fetched.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def row(page: str, policy: str) -> str:
    """The table row of a policy in the scenario's own table."""
    return page[page.index(f"<td>{policy}") :].partition("</tr>")[0]


FULL = {
    "claims": (
        Claim("healthy-cloud", "cloud-only wins", True, "1.0 s"),
        Claim("healthy-cloud", "the policy is within 1 %", False, "1.2 s"),
        Claim("tunnel", "p95 falls", None, ""),
    ),
    "ablations": (
        Ablation("healthy-cloud", "nano+tiny", (("static", ONE), ("re-planned", figure(1.5)), ("+ int8", figure(1.8)))),
    ),
    "memory": (MemoryRow("tiny", "nano", "edge", 2e9, 0, True, 4e9), MemoryRow("tiny", "nano", "fp32", 8e9, 0, False)),
    "scalings": (
        Scaling("devices", "devices", (1.0, 60.0, 120.0), {OURS: (ONE, figure(2.0), figure(3.0))}, "rush-hour"),
        Scaling("models", "model", ("gpt2", "7b"), {"edge-only": (figure(0.5), NEVER)}),
    ),
}  # fmt: skip


def test_a_page_fetches_nothing_closes_what_it_opens_and_its_links_lead_somewhere() -> None:
    page = to_html(contents(**FULL))
    reader = read(page)
    assert reader.open == []
    assert reader.fetched == []
    assert "http" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert page.count("<svg") == 3 + 1 + 1 + 2  # a case's three, cost, one model, two scalings


def test_the_same_contents_give_the_same_page_and_leave_matplotlib_as_it_was() -> None:
    before = dict(rcParams)
    assert to_html(contents(**FULL)) == to_html(contents(**FULL))
    assert dict(rcParams) == before


def test_matplotlib_is_imported_only_to_draw_and_its_register_of_figures_never() -> None:
    code = (
        "import sys, splitwise_llm.page as page; assert 'matplotlib' not in sys.modules; sys.path.insert(0, 'tests');"
        "import test_page as t; page.to_html(t.contents()); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_joule_and_dollar_says_modelled() -> None:
    page = to_html(contents())
    heads = re.findall(r"<small>([^<]*)</small>", page)
    assert {head for head in heads if re.match(r"[J$]", head)} == {"J, modelled", "$, modelled"}
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert all("modelled" in text for text in drawn if re.match(r"(J|\$) ", text))
    assert sum("modelled" in text for text in drawn) == 3


def test_names_and_notes_are_text_wherever_they_stand() -> None:
    odd = '<b>&"$x_1$'
    page = to_html(contents(cell(OURS, 2.0), replace(cell(odd, 3.0), note="<script>no</script>")))
    assert odd not in page
    assert "<script>no" not in page
    assert "&lt;b&gt;&amp;&#34;$x_1$" in page  # in the tables
    assert re.search(r"<text[^>]*>&lt;b&gt;&amp;\"\$x_1\$</text>", page)  # in the figures, where a dollar is a dollar
    assert read(page).open == []


def test_the_best_of_a_column_is_marked_its_equals_too_and_a_yardstick_never() -> None:
    cells = [cell(OURS, 2.0), cell("near", 2.03), cell("far", 5.0), cell("clairvoyant", 1.0), cell("causal", 2.0)]
    page = to_html(contents(*cells, yardsticks=("clairvoyant", "causal")))
    first = {entry.policy: row(page, entry.policy).split("<td")[2] for entry in cells}
    assert 'class="best"' in first[OURS]
    assert 'class="near"' in first["near"]
    assert "class" not in first["far"]
    assert "class" not in first["clairvoyant"] + first["causal"]
    assert "2.00<i>1.96–2.04</i>" in first[OURS]


def test_a_column_where_more_is_better_marks_the_most() -> None:
    slow, fast = cell("slow", 2.0), cell("fast", 2.0)
    slow = replace(slow, metrics=slow.metrics | {"done_per_s": figure(1.0)})
    fast = replace(fast, metrics=fast.metrics | {"done_per_s": figure(2.0)})
    place_of = [metric.name for metric in columns(set(slow.metrics))].index("done_per_s") + 2
    page = to_html(contents(slow, fast))
    assert 'class="best"' in row(page, "fast").split("<td")[place_of]
    assert "class" not in row(page, "slow").split("<td")[place_of]


@example(mine=1.011, theirs=1.0, spread=0.0)
@example(mine=1.0, theirs=1.011, spread=0.0)
@given(mine=st.floats(0.01, 100), theirs=st.floats(0.01, 100), spread=st.floats(0, 0.2))
def test_a_policy_wins_is_level_within_a_percent_or_loses(mine: float, theirs: float, spread: float) -> None:
    both = {OURS: mine, "other": theirs}
    pair = [Cell("s", "c", name, 3, 9, {"mean_s": figure(value, spread)}) for name, value in both.items()]
    standing = judge(contents(*pair), pair, "mean_s")
    excess = mine / theirs - 1
    expected = "level" if abs(excess) <= 0.01 else "wins" if excess < 0 else "loses"
    assert standing.verdict == expected
    assert standing.best == (OURS if mine <= theirs else "other")
    assert standing.apart == (max(mine, theirs) * (1 - spread) > min(mine, theirs) * (1 + spread))


def test_variants_of_ours_are_no_rivals_and_a_missing_figure_is_no_win() -> None:
    cells = [cell(OURS, 3.0), cell("drift-plus-penalty", 1.0), cell("cloud-only", 4.0)]
    standing = judge(contents(*cells), cells, "mean_s")
    assert (standing.rival, standing.best) == ("cloud-only", "drift-plus-penalty")
    assert standing.excess == pytest.approx(-0.25)
    alone = [replace(cells[0], metrics={}), cells[2]]
    assert judge(contents(*alone), alone, "mean_s").verdict == "absent"
    diverged = replace(cells[0], metrics={"mean_s": Estimate(math.inf, math.inf, math.inf)})
    unknown = replace(cells[0], policy="unknown", metrics={"mean_s": NEVER})
    assert best([unknown, diverged, cells[2]], "mean_s") is cells[2]
    assert ratios(contents(diverged, cells[2]), [diverged, cells[2]])[OURS] == math.inf


def test_the_summary_counts_wins_losses_and_claims() -> None:
    cells = [cell(OURS, mean, case) for case, mean in (("a", 1.0), ("b", 2.005), ("c", 4.0))]
    page = to_html(contents(*cells, *(cell("cloud-only", 2.0, case) for case in "abc"), claims=FULL["claims"]))
    summary = " ".join(page[page.index('id="summary"') : page.index('id="overview"')].split())
    assert re.search(
        r"mean \(s\):.*?wins 1, is level \(within 1 % of the best other policy\) in 1 and loses 1 of 3", summary
    )
    assert "Best of all: cloud-only 2×, drift-plus-penalty+tools 1×." in summary
    assert "1 of 3 claims hold, 1 do not, 1 were not tested" in summary
    for word in ("holds", "does not hold", "not tested", "−50.0 %", "+100 %", "+0.2 %"):
        assert word in summary


def test_a_scenario_without_cells_says_that_it_was_not_run() -> None:
    settings = (Setting(1, "healthy-cloud", "x", "y"), Setting(4, "tunnel", "20 s outages", "p95 falls"))
    page = to_html(replace(contents(), settings=settings))
    assert "Not run in this report" in page[page.index('id="tunnel"') :]


def test_cells_that_hold_little_or_diverge_are_still_a_page() -> None:
    bare = Cell(
        "healthy-cloud", "nano+tiny", "edge-only", 0, 0, {}, note="nothing is admissible: 9 GB needed, 8 GB there"
    )
    never = Estimate(math.inf, math.nan, math.inf)
    diverged = replace(
        cell("even-split", 9.0), metrics={"mean_s": never, "total_j": never}, latencies_s=(0.0, 1.0, math.inf), modes={}
    )
    page = to_html(contents(bare, diverged, Cell("tunnel", "c", "x", 1, 1, {"own": ONE}), cell(OURS, 2.0)))
    assert "nothing is admissible" in page
    assert "∞" in page
    assert not re.search(r"\bnan\b", page)
    assert read(page).open == []


def test_each_step_of_an_ablation_shows_what_it_did_itself() -> None:
    page = to_html(contents(**FULL))
    table = page[page.index('id="ablation"') : page.index('id="cost"')]
    assert "×1.80<i>this step ×1.20</i>" in table
    assert "×1.50<i>this step ×1.50</i>" in table


def test_a_policy_has_one_colour_on_the_page_and_ours_the_first() -> None:
    names = [OURS, "drift-plus-penalty", "cloud-only", "edge-only", *(f"other-{n}" for n in range(9)), "clairvoyant"]
    table = strokes(contents(*(cell(name, 2.0 + n) for n, name in enumerate(names))))
    assert table[OURS].colour == table["drift-plus-penalty"].colour == list(COLOURS)[4]
    assert (table[OURS].dash, table["drift-plus-penalty"].dash, table["clairvoyant"].dash) == ("-", "--", ":")
    coloured = {stroke.colour for name, stroke in table.items() if name != "clairvoyant"} - {OTHER}
    assert len(coloured) == 6


def test_a_figure_names_ours_the_best_rival_and_the_pure_modes_and_the_yardsticks() -> None:
    cells = [cell(f"other-{n}", 3.0 + n) for n in range(12)]
    cells += [cell(OURS, 30.0), cell("cloud-only", 40.0), cell("edge-only", 50.0), cell("clairvoyant", 1.0)]
    said = contents(*cells)
    named = [cell.policy for cell in featured(said, cells, strokes(said))]
    assert {OURS, "other-0", "cloud-only", "edge-only", "clairvoyant"} <= set(named)
    assert len(named) == 7


def test_figures_hold_only_colours_that_the_style_sheet_turns_and_ids_of_their_own() -> None:
    said = contents(**FULL)
    table = strokes(said)
    drawn = [
        latency_figure(said.cells, said.cells[:2], table, "a-"),
        bars_figure(said.cells, table, "b-"),
        queues_figure(said.cells, table, "c-"),
        memory_figure(said.memory, "d-"),
        scaling_figure(said.scalings[0], table, "e-"),
    ]
    for prefix, svg in zip("abcde", drawn, strict=True):
        assert not re.search(r"#[0-9a-f]{6}", svg)
        assert {name[1:] for name in re.findall(r"var\(--(x\w+)\)", svg)} <= {colour[1:] for colour in COLOURS}
        assert all(name.startswith(f"{prefix}-") for name in re.findall(r" id=\"([^\"]+)", svg))
        assert read(svg).open == []


def test_without_anything_to_draw_there_is_no_figure() -> None:
    empty = [Cell("s", "c", "p", 1, 1, {})]
    table = strokes(contents(*empty))
    assert latency_figure(empty, empty, table, "a") is None
    assert bars_figure(empty, table, "a") is None
    assert queues_figure(empty, table, "a") is None


@given(count=st.integers(0, 2000), most=st.integers(2, 300))
def test_a_thinned_curve_keeps_its_ends_its_order_and_its_bound(count: int, most: int) -> None:
    values = [float(n) for n in range(count)]
    places, kept = thin(values, most)
    assert len(kept) == min(count, most)
    assert kept == [values[place] for place in places] == sorted(set(kept))
    assert kept[:1] + kept[-1:] == values[:1] + values[-1:]


@given(low=st.floats(1e-4, 1e4), factor=st.floats(1.0, 1e6))
def test_a_logarithmic_axis_has_a_few_numbers_inside_its_limits(low: float, factor: float) -> None:
    with canvas(3, 2) as drawing:
        axes = place(drawing, 0.5, 0.2, 2, 1)
        log_axis(axes, low, low * factor)
        left, right = axes.get_xlim()
        ticks = axes.get_xticks()
    assert 2 <= len(ticks) <= 11
    assert left <= low
    assert low * factor <= right
    assert all(left <= tick <= right for tick in ticks)


def test_figures_are_shown_with_three_digits_that_count() -> None:
    assert [show(v) for v in (0, 4.214, 42.14, 421.4, 12345.6, 0.04214)] == [
        "0",
        "4.21",
        "42.1",
        "421",
        "12,346",
        "0.0421",
    ]
    assert [show(v) for v in (-4.214, math.inf, math.nan, -0.0)] == ["−4.21", "∞", "–", "0"]
    assert show_limits(Estimate(4.214, 4.1, 4.3)) == "4.10–4.30"
    assert show_limits(Estimate(0.0, -0.012, 0.012)) == "−0.0120 to 0.0120"
    assert show_limits(ONE) == ""


def test_the_csv_has_a_row_per_figure_and_rounds_nothing() -> None:
    noted = replace(cell(OURS, 2.0), note='stopped early, at "0.5 %"\nof the mean')
    bare = Cell("tunnel", "c", "edge-only", 0, 0, {}, note="nothing is admissible")
    rows = list(csv.DictReader(io.StringIO(to_csv((noted, bare)))))
    assert len(rows) == len(noted.metrics) + 1 + len(noted.modes) + 1
    for name, estimate in noted.metrics.items():
        (found,) = (entry for entry in rows if entry["metric"] == name)
        assert (float(found["value"]), float(found["low"]), float(found["high"])) == (
            estimate.value,
            estimate.low,
            estimate.high,
        )
        assert (found["scenario"], found["case"], found["policy"]) == ("healthy-cloud", "nano+tiny", OURS)
        assert (found["requests"], found["traces"], found["note"]) == ("1000", "9", noted.note)
    assert [entry["value"] for entry in rows if entry["metric"] in ("wins", "mode_u")] == ["3", "0.3"]
    assert rows[-1]["note"] == "nothing is admissible"


def test_contents_that_cannot_be_right_are_refused_with_the_remedy() -> None:
    one = cell(OURS, 2.0)
    with pytest.raises(SpecError, match=r"given 2 times.*merge"):
        contents(one, one)
    with pytest.raises(SpecError, match="at least one cell"):
        Contents((), (), (), HERE, (OURS,))
    with pytest.raises(SpecError, match="give `ours`"):
        contents(one, ours=())
    with pytest.raises(SpecError, match="queue 'up' has 1 values for 60 times"):
        contents(replace(one, queues_s={"up": (1.0,)}))
    with pytest.raises(SpecError, match=r"1 values for 2 positions.*NaN"):
        contents(one, scalings=(Scaling("devices", "x", (1.0, 2.0), {OURS: (ONE,)}),))


GRID = [f"policy-{n}{tools}" for n in range(9) for tools in ("", "+tools")] + [OURS, "clairvoyant"]


def test_a_case_of_twenty_policies_takes_a_seventieth_of_ten_megabytes() -> None:
    page = to_html(contents(*(cell(name, 2.0 + n, points=300) for n, name in enumerate(GRID))))
    assert len(page.encode()) < 10e6 / 70 + 40_000  # the frame of the page is there once


@pytest.mark.long
def test_the_whole_grid_stays_below_ten_megabytes_and_a_minute() -> None:
    cells = [
        cell(name, 2.0 + n, case, scenario, points=300)
        for scenario in map("scenario-{}".format, range(14))
        for case in map("device+model-{}".format, range(5))
        for n, name in enumerate(GRID)
    ]
    start = time.process_time()
    page = to_html(contents(*cells))
    assert time.process_time() - start < 60
    assert len(page.encode()) < 10e6
