"""Recorded links to learn in, and others to choose among weights by; none that benches judge by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from splitwise_llm.errors import SpecError
from splitwise_llm.learn.courses import Named
from splitwise_llm.sim.paths import as_recorded
from splitwise_llm.sim.recordings import left_to_learn, link_files, read_recordings
from splitwise_llm.sim.scenarios import HEALTHY, Recordings


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """By their names. `apart` has no file of `learn`, and is empty where there is one link only."""

    learn: tuple[Named, ...]
    apart: tuple[Named, ...]

    @property
    def digest(self) -> str:
        """Of everything that weights depend on."""
        result = sha256()
        for part in (self.learn, self.apart):
            result.update(b"part")
            for name, one in part:
                result.update(name.encode())
                for figures in _figures(one):
                    result.update(np.array(figures, np.float64).tobytes() + b"end")
        return result.hexdigest()


def _figures(one: Recordings) -> list[tuple[float, ...]]:
    """Everything recorded of a link and its requests."""
    found: list[tuple[float, ...]] = []
    for rates in (one.up, one.down):
        found += [(*rates.times_s, rates.period_s), rates.bytes_per_s] if rates else [()]
    found += [(*one.rtt.times_s, one.rtt.period_s), one.rtt.rtt_s] if one.rtt else [()]
    if one.requests:
        each = [(asked.arrival_s, asked.prompt_tokens, asked.output_tokens) for asked in one.requests.requests]
        found += [(one.requests.duration_s,), *each]
    return found


def read_recorded(
    folder: Path, requests: Path | None, tell: Callable[[str], None], *, cut_gaps: bool = False
) -> Recorded:
    """What `folder` leaves to learn from, with others of the recorded `requests` than benches replay; None: requests
    are drawn. Raises SpecError where nothing is left, and what reading raises."""
    files = link_files(folder)
    learn, apart = left_to_learn(files)
    kept = len(files) - len(learn) - len(apart)
    chooses = ", ".join(one.name for one in apart) or "none is left to choose among weights by"
    tell(
        f"of {len(files)} recorded links benches keep {kept}; to learn in: {', '.join(one.name for one in learn)}; "
        f"to choose by: {chooses}"
    )
    read = read_recordings([*learn, *apart], requests, cut_gaps=cut_gaps, to_learn=True)
    named = [(one.name, recordings) for one, recordings in zip([*learn, *apart], read, strict=True)]
    for name, one in named:  # now, and not where courses are made, where nobody knows its name
        try:
            as_recorded(HEALTHY, one.up, one.down, one.rtt)
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from error
    return Recorded(tuple(named[: len(learn)]), tuple(named[len(learn) :]))


__all__ = ["Recorded", "read_recorded"]
