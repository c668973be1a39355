"""Recorded links in a folder and recorded requests in a file, found and read; what replays them is not known here.

What benches judge by is chosen here, too (`judged_by`), and so is what that leaves to learn from (`left_to_learn`).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.scenarios import Recordings
from splitwise_llm.traces import GapError, Gaps, read_rtt, read_trace
from splitwise_llm.workload import RequestTrace, read_requests

R = TypeVar("R")

EVERY_S = 30
"""Recorded requests are thinned to about one in so many seconds: what one device asks, not a data centre's users."""
JUDGED, QUICKLY_JUDGED = 8, 2
"""Recorded links that benches judge by, and those of what is quick."""
APART = 3
"""Of what is left to learn from, one link in so many only chooses among weights."""
MANIFEST = "manifest.csv"
_KINDS = re.compile(r"(?<![a-z0-9])(up|down|rtt)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LinkFiles:
    """The files of one recorded link. Without a downlink the uplink's rates hold both ways, without round trips the
    scenario's do."""

    name: str
    up: Path
    down: Path | None
    rtt: Path | None

    @property
    def text(self) -> str:
        """For people: which files are used."""
        said = [f"up {self.up.name}", f"down {self.down.name if self.down else 'as up'}"]
        return ", ".join([*said, f"rtt {self.rtt.name}" if self.rtt else "rtt of the scenario"])

    @property
    def paths(self) -> set[Path]:
        return {path for path in (self.up, self.down, self.rtt) if path}


def link_files(folder: Path) -> tuple[LinkFiles, ...]:
    """The recorded links of a folder, one for each uplink: those that its `manifest.csv` recommends, or, where there
    is none, files with `up`, `down` and `rtt` in their names, as in `lte.up.gz`.

    An uplink goes with the downlink, and the round trips, of the same name or in the same file; else with the only
    downlink there is, and with the logs of round trips in turn. Raises SpecError that says what is missing.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder} is no folder; give one with recorded links, as in lte.up (and lte.down, lte.rtt)")
    manifest = folder / MANIFEST
    found = list(_of_manifest(manifest) if manifest.exists() else _by_name(folder))
    ups, downs, rtts = ([path for kind, path in found if kind == wanted] for wanted in ("up", "down", "rtt"))
    if not ups:
        where = (
            f"{manifest} recommends no uplink" if manifest.exists() else f"{folder} has no file with 'up' in its name"
        )
        raise SpecError(f"{where}; a recorded link has one at least: put it there, as in lte.up")
    result: list[LinkFiles] = []
    for number, up in enumerate(ups):
        name = up.name.split(".")[0][:32]
        if any(name == other.name for other in result):
            name = f"{name}-{number + 1}"
        down = _partner(up, downs) or (downs[0] if len(downs) == 1 else None)
        rtt = _partner(up, rtts) or (rtts[number % len(rtts)] if rtts else None)
        result.append(LinkFiles(name, up, down, rtt))
    return tuple(result)


def _of_manifest(manifest: Path) -> Iterator[tuple[str, Path]]:
    with manifest.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in ("core", "file", "direction") if column not in (rows.fieldnames or ())]
        if missing:
            raise SpecError(f"{manifest}:1: has no column {', '.join(missing)}; expected core, file and direction")
        for row in rows:
            if row["core"] != "1":
                continue
            if row["direction"] not in ("up", "down", "rtt"):
                raise SpecError(
                    f"{manifest}:{rows.line_num}: direction is {row['direction']!r}; expected up, down or rtt"
                )
            beside = manifest.parent / row["file"]
            yield row["direction"], beside if beside.exists() else manifest.parent.parent / row["file"]


def _by_name(folder: Path) -> Iterator[tuple[str, Path]]:
    """Of several words in a name the last one counts: `downtown.up` is an uplink."""
    for path in sorted(folder.iterdir()):
        words = _KINDS.findall(path.name)
        if words and path.is_file() and not path.name.startswith("."):
            yield words[-1].lower(), path


def _partner(up: Path, others: Sequence[Path]) -> Path | None:
    """The file that is named as `up` but for its kind, or `up` itself."""

    def bare(path: Path) -> tuple[Path, str]:
        return path.parent, _KINDS.sub("", path.name.removesuffix(".gz")).lower()

    return next((other for other in others if other == up or bare(other) == bare(up)), None)


def spread_over(files: Sequence[LinkFiles], most: int) -> Sequence[LinkFiles]:
    """At most so many of them, evenly from the whole list."""
    return files[:: max(1, len(files) // most)][:most]


def judged_by(files: Sequence[LinkFiles], *, quick: bool = False) -> Sequence[LinkFiles]:
    """Those that benches replay, of a folder's links: nothing may learn from them."""
    return spread_over(files, QUICKLY_JUDGED if quick else JUDGED)


def left_to_learn(files: Sequence[LinkFiles]) -> tuple[list[LinkFiles], list[LinkFiles]]:
    """Links to learn in, and others to choose among weights by: none of a file that benches judge by, quickly or not,
    and no file in both. A downlink or round trips that are taken already are left out. Raises SpecError where nothing
    to learn from is left."""
    judged = {path for quick in (False, True) for one in judged_by(files, quick=quick) for path in one.paths}
    left = _without(files, judged)
    if not left:
        names = ", ".join(one.name for one in files)
        raise SpecError(
            f"benches judge by every recorded link there is ({names}), and nothing is learned from those: put more "
            f"than {JUDGED} into the folder, or train without --traces"
        )
    apart = left[APART - 1 :: APART] or left[1:]
    learn = [one for one in left if one not in apart]
    return learn, _without(apart, {path for one in learn for path in one.paths})


def _without(files: Sequence[LinkFiles], taken: set[Path]) -> list[LinkFiles]:
    return [
        replace(one, down=None if one.down in taken else one.down, rtt=None if one.rtt in taken else one.rtt)
        for one in files
        if one.up not in taken
    ]


def named(files: Sequence[LinkFiles], name: str) -> LinkFiles:
    """The recorded link of this name; the first where the name is empty. Raises SpecError that suggests the nearest."""
    for one in files:
        if name in ("", one.name):
            return one
    names = [one.name for one in files]
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SpecError(f"no recorded link {name!r} among {', '.join(names)}{hint}")


def thinned(asked: RequestTrace, *, to_learn: bool = False) -> RequestTrace:
    """One request in about `EVERY_S` seconds; `to_learn` from, others than benches judge by. Raises SpecError where
    there are no others."""
    every = max(1, round(EVERY_S * asked.mean_per_s))
    if not to_learn:
        return asked.thin(every)
    if every == 1 or not (left := asked.thin(every, every // 2)).requests:
        raise SpecError(
            f"{len(asked.requests)} recorded requests in {asked.duration_s:.0f} s, and benches judge by all of them; "
            "nothing is learned from those: give more, as of a server that many ask, or train without --requests"
        )
    return left


def read_recordings(
    files: Sequence[LinkFiles], requests: Path | None, *, cut_gaps: bool = False, to_learn: bool = False
) -> list[Recordings]:
    """What is in the files, in their order, each with the same thinned requests, if any (`thinned`).

    Raises SpecError that names every recording with a pause of which nothing is known, unless `cut_gaps`.
    """
    asked = thinned(read_requests(requests), to_learn=to_learn) if requests else None
    gaps: Gaps = "cut" if cut_gaps else "refuse"
    pauses: dict[str, None] = {}  # in order, each once: links may share a log

    def read(path: Path, how: Callable[[Path], R]) -> R | None:
        try:
            return how(path)
        except GapError as error:
            pauses[error.where] = None
            return None

    result = []
    for one in files:
        up = read(one.up, lambda path: read_trace(path, "up", gaps))
        down = read(one.down, lambda path: read_trace(path, "down", gaps)) if one.down else None
        rtt = read(one.rtt, lambda path: read_rtt(path, gaps)) if one.rtt else None
        if up:
            result.append(Recordings(asked, up, down, rtt))
    if pauses:
        said = "\n  ".join(pauses)
        raise SpecError(
            f"recorders paused, and nothing is known of the link meanwhile (the first pause of each file):\n  {said}\n"
            "give --cut-gaps to leave all such pauses out (what follows moves up), or take these files away"
        )
    return result


__all__ = [
    "LinkFiles", "judged_by", "left_to_learn", "link_files", "named", "read_recordings", "spread_over", "thinned",
]  # fmt: skip
