"""A published result beside ours, and when that counts as reproduced. It knows no study."""

from __future__ import annotations

from dataclasses import dataclass

NEAR = 0.25
"""A published figure is reproduced when ours is at most this far from it, relatively."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure and ours. None for ours: does not fit, or is not so; None for theirs: not published."""

    study: str
    name: str
    what: str
    ours: float | None
    published: float | None
    why: str = ""
    is_calibrated: bool = False
    """Whether a device file was fitted to the published figure, which then proves nothing."""

    @property
    def ratio(self) -> float | None:
        """Ours over published."""
        return self.ours / self.published if self.ours is not None and self.published else None

    @property
    def verdict(self) -> str:
        """`yes` within NEAR, `miss`, `calibrated`, or nothing where there is nothing to compare with."""
        if self.published is None:
            return ""
        if self.is_calibrated:
            return "calibrated"
        if self.ratio is None:
            return "miss"
        return "yes" if abs(self.ratio - 1) <= NEAR else "miss"


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that either holds or does not, published and here."""

    study: str
    what: str
    published: bool
    ours: bool

    @property
    def verdict(self) -> str:
        return "yes" if self.published == self.ours else "miss"


@dataclass(frozen=True, slots=True)
class Listing:
    """A table of text: its rows, the head first."""

    title: str
    remark: str
    lines: tuple[tuple[str, ...], ...]
