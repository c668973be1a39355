"""Published results beside what our cost model, programs and simulations give for the same case; misses are misses.

Nothing published goes into ours, but for the calibrations that device files name. Differences are explained, not
tuned away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from splitwise_llm.bench import dynopipe, edgeshard, splitting_envs, tensor_parallel
from splitwise_llm.bench.comparison import NEAR, Fact, Listing, Row
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.overhead import Tell
from splitwise_llm.bench.splitting_envs import PLAIN_STEPS, SURROGATE_STEPS


@dataclass(frozen=True, slots=True)
class Result:
    """What `splitwise bench reproductions` finds."""

    figures: Figures
    rows: tuple[Row, ...]
    facts: tuple[Fact, ...]
    listings: tuple[Listing, ...]

    def to_dict(self) -> dict[str, object]:
        """The figures, and each beside what was published."""
        rows = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        facts = [asdict(fact) | {"verdict": fact.verdict} for fact in self.facts]
        listings = [asdict(listing) for listing in self.listings]
        return self.figures.to_dict() | {"rows": rows, "facts": facts, "listings": listings}


def run_reproductions(tell: Tell, plain_steps: int = PLAIN_STEPS, surrogate_steps: int = SURROGATE_STEPS) -> Result:
    """All studies, a few minutes; figures by short names, `compared` and `missed` among them."""
    settings: dict[str, object] = {"near": NEAR, "plain_steps": plain_steps, "surrogate_steps": surrogate_steps}
    tell("EdgeShard: what fits, and how fast")
    rows, facts = [*edgeshard.latency_rows()], [*edgeshard.fit_facts()]
    tell("EdgeShard: throughput, simulated")
    rows += edgeshard.throughput_rows()
    tell("EdgeShard: links from 1 to 50 Mbit/s")
    listings = [edgeshard.sequences_listing(), edgeshard.link_listing()]
    tell("DynoPipe: the queueing model")
    more, listing = dynopipe.rows_and_listing()
    rows, listings = rows + more, [*listings, listing]
    tell("Raspberry Pi 5: shared layers")
    rows += tensor_parallel.rows()
    facts += tensor_parallel.facts()
    tell("layer splitting: two learners, a minute or two")
    more, listing = splitting_envs.rows_and_listing(plain_steps, surrogate_steps)
    rows, listings = rows + more, [*listings, listing]
    figures = Figures("reproductions", settings)
    for row in rows:
        if row.ours is not None:
            beside = f"published {row.published:.4g}, ratio {row.ratio:.2f}" if row.ratio and row.published else ""
            figures.add(row.name, row.ours, f"{row.what}; {beside} {row.verdict}".strip("; "))
    verdicts = [row.verdict for row in rows if row.verdict in ("yes", "miss")] + [fact.verdict for fact in facts]
    figures.add("compared", len(verdicts), "published figures and statements that nothing here was fitted to")
    figures.add("missed", verdicts.count("miss"), f"of them further off than {NEAR:.0%}, or otherwise here")
    return Result(figures, tuple(rows), tuple(facts), tuple(listings))


def to_markdown(result: Result) -> str:
    """The page docs/reproductions.md."""
    figures = result.figures.figures
    rows = [("study", "what", "ours", "published", "ratio", "within 25 %", "why")]
    rows += [
        (row.study, row.what, _number(row.ours, "does not fit"), _number(row.published, "-"), _ratio(row),
         row.verdict or "-", row.why)
        for row in result.rows
    ]  # fmt: skip
    facts = [("study", "statement", "ours", "published", "same")]
    facts += [(fact.study, fact.what, _yes(fact.ours), _yes(fact.published), fact.verdict) for fact in result.facts]
    parts = [
        _HEAD.format(compared=round(figures["compared"]), missed=round(figures["missed"])),
        _table(rows),
        "## What holds and what does not\n",
        _table(facts),
    ]
    for listing in result.listings:
        parts += [f"## {listing.title}\n", f"{listing.remark}\n", _table(listing.lines)]
    return "\n".join([*parts, _ASSUMED])


_HEAD = """# Published results, and ours

Written by `splitwise bench reproductions --page docs/reproductions.md` (`runs/reproductions.sh`). {compared}
published figures and statements are compared, {missed} are missed: ours differs by more than 25 %, or the statement
does not hold here. What a device file was fitted to (docs/devices.md) is called calibrated and not counted; no
other published result goes into ours. A row without a published figure stands beside one that has it.
"""

_ASSUMED = """## Assumed

EdgeShard (arXiv 2405.14371): twelve AGX Orin 32 GB, two Orin NX 16 GB, an RTX 3090; 32 tokens in, 96 out. Full
precision is read as fp32, in memory and on the wire: in fp16 13B would fit one board, where it is published as out
of memory, and 7B alone would be twice as fast as published. The device reaches the cloud at 1 Mbit/s, every other
link carries 50 Mbit/s +-20 % (median of five draws), with 0.5 ms between boards and 5 ms to the cloud; the delays
are ours. Published times of its baselines, and of 13B, are second-hand. "Its recurrence" keeps one best way to each
layer and machine, with the memory that way has used; "exact" is the best of all ordered choices of machines, each
once, and all cuts. Four sequences under way are assumed because the published throughput times the published
latency is 4.0 sequences for 7B and 3.9 for 70B (1.8 for 13B).

DynoPipe (ISCA 2026): service 179 ms in the cloud and 256 ms at the edge, linear in layers. 179 ms is what three or
four tokens take at its 54 ms per token, so its requests are short, or it is the time of a prompt.

distributed-llama (README at e8dc8ec): gigabit Ethernet at 0.5 ms RTT, FP16 partial sums, 16 tokens in and 64 out.
One board calibrates its memory efficiency, two the software time of a message; four are predicted.

Layer splitting (arXiv 2406.02616, code Kanra13-ch/adaptive_layersplit): the two released environments with splits 1
to 7 of the bundled model's eight layers in the place of 1 to 10 of 32. The plain one reads the measured table where
the released code evaluates a model; the surrogate is a network of the released shape fitted to the table. Its
released weights were not used. The control is a made-up table whose best split moves from 1 to 7 as more is lost.
"""


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest)]) + "\n"


def _number(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.4g}"


def _ratio(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
