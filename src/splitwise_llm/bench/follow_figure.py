"""The figure of `bench follow`, from what it wrote with `--json`. It does not run anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INCHES = (8.0, 4.6)
MBIT = 1e6 / 8


def draw_follow(data: Mapping[str, Any], file: Path) -> None:
    """The recorded uplink above; below it each request's latency, where it was asked, for the policy (with its moves)
    and the best fixed partition."""
    from matplotlib import rc_context  # noqa: PLC0415 - half a second, and only a figure needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    rates = [rate / MBIT for rate in data["uplink_bytes_per_s"]]
    means = {name[: -len(" mean_s")]: value for name, value in data["figures"].items() if name.endswith(" mean_s")}
    fixed = [name for name in means if name != "drift"]
    best = min(fixed, key=lambda name: means[name])
    with rc_context({"svg.hashsalt": "follow", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=INCHES, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        above.fill_between(range(len(rates)), rates, step="post", color="#9ab", linewidth=0)
        for at_s, for_s in data["stalls_s"]:
            for axes in (above, below):
                axes.axvspan(at_s, at_s + for_s, color="#d66", alpha=0.35, linewidth=0)
        above.set_ylabel("uplink, Mbit/s")
        for name, colour, marker in ((best, "#c70", "x"), ("drift", "#04a", "o")):
            ones = [one for one in data["served"] if one["contender"] == name]
            at = [one["trace_s"] for one in ones]
            below.plot(
                at, [one["total_s"] for one in ones], marker, color=colour, markersize=4, fillstyle="none",
                label=f"{name}: mean {means[name]:.2f} s", linestyle="",
            )  # fmt: skip
            if name == "drift":
                for why, style in (("moves", "^"), ("faults", "v")):
                    some = [(one["trace_s"], one["total_s"]) for one in ones if one[why]]
                    if some:
                        below.plot(*zip(*some, strict=True), style, color=colour, markersize=3, label=f"drift, {why}")
        below.set_ylabel("from asking to the last token, s")
        below.set_xlabel("second of the recording; shaded: nothing got through for a second or longer")
        below.set_ylim(0, 1.12 * max(one["total_s"] for one in data["served"] if one["contender"] in ("drift", best)))
        below.legend(frameon=False, ncols=4, loc="upper left")
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
