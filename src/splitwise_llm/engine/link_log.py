"""What a session saw of its links and workers over time, thinned, for its record. It measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from splitwise_llm.engine.telemetry import Advert, LinkFigures
from splitwise_llm.records import LinkSample

EVERY_S = 1.0
"""A sample is kept so often at least."""
SILENT_S = 0.45
"""The last one before a longer silence is kept, too: it says when nothing was heard any more. Pings are more frequent,
and nobody is suspected before 0.5 s (`backoff`)."""
FACTOR = 1.1
"""And whenever a figure has changed by so much, or the number of sessions at all."""


@dataclass(slots=True)
class LinkLog:
    """Samples by worker; times are of one's own monotonic clock."""

    _kept: dict[int, list[LinkSample]] = field(default_factory=dict)
    _latest: dict[int, LinkSample] = field(default_factory=dict)

    def add(self, number: int, now_s: float, figures: LinkFigures, advert: Advert | None, others: int) -> None:
        """What is known of the link to a worker, now that it has answered."""
        link = figures.fast
        sample = LinkSample(
            now_s, "", link.rtt_s, link.up_bytes_per_s, link.down_bytes_per_s, _age(figures.up_age_s),
            _age(figures.down_age_s), others, advert.queue_s if advert else 0.0, advert.step_s if advert else None,
        )  # fmt: skip
        kept, before = self._kept.setdefault(number, []), self._latest.get(number)
        if before is not None and now_s - before.at_s > SILENT_S and kept[-1] is not before:
            kept.append(before)
        if not kept or now_s - kept[-1].at_s >= EVERY_S or _differ(kept[-1], sample):
            kept.append(sample)
        self._latest[number] = sample

    def samples(self, names: Sequence[str], start_s: float) -> tuple[LinkSample, ...]:
        """All that were kept, in order of time from `start_s` on, with the last ones; `names` of machines 0, 1, ..."""
        found = [
            replace(sample, at_s=sample.at_s - start_s, worker=names[number])
            for number, kept in self._kept.items()
            for sample in (*kept, *((self._latest[number],) if self._latest[number] is not kept[-1] else ()))
        ]
        return tuple(sorted(found, key=lambda sample: sample.at_s))


def _age(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _differ(a: LinkSample, b: LinkSample) -> bool:
    pairs = (
        (a.rtt_s, b.rtt_s), (a.up_bytes_per_s, b.up_bytes_per_s), (a.down_bytes_per_s, b.down_bytes_per_s),
    )  # fmt: skip
    known = (a.up_age_s is None, a.down_age_s is None) == (b.up_age_s is None, b.down_age_s is None)
    return not known or a.others != b.others or any(max(x, y) > FACTOR * min(x, y) for x, y in pairs)
