"""Recorded links in a folder and recorded requests in a file, found and read; what replays them is not known here."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from splitwise_llm.errors import SpecError
from splitwise_llm.sim.scenarios import Recordings
from splitwise_llm.traces import GapError, Gaps, read_rtt, read_trace
from splitwise_llm.workload import read_requests

R = TypeVar("R")

EVERY_S = 30
"""Recorded requests are thinned to about one in so many seconds: what one device asks, not a data centre's users."""
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


def named(files: Sequence[LinkFiles], name: str) -> LinkFiles:
    """The recorded link of this name; the first where the name is empty. Raises SpecError that suggests the nearest."""
    for one in files:
        if name in ("", one.name):
            return one
    names = [one.name for one in files]
    close = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SpecError(f"no recorded link {name!r} among {', '.join(names)}{hint}")


def read_recordings(files: Sequence[LinkFiles], requests: Path, *, cut_gaps: bool = False) -> list[Recordings]:
    """What is in the files, in their order, each with the same thinned requests.

    Raises SpecError that names every recording with a pause of which nothing is known, unless `cut_gaps`.
    """
    asked = read_requests(requests)
    thinned = asked.thin(max(1, round(EVERY_S * asked.mean_per_s)))
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
            result.append(Recordings(thinned, up, down, rtt))
    if pauses:
        said = "\n  ".join(pauses)
        raise SpecError(
            f"recorders paused, and nothing is known of the link meanwhile (the first pause of each file):\n  {said}\n"
            "give --cut-gaps to leave all such pauses out (what follows moves up), or take these files away"
        )
    return result


__all__ = ["LinkFiles", "link_files", "named", "read_recordings", "spread_over"]
