"""A link as constants; nothing of what happens on it."""

from __future__ import annotations

from dataclasses import dataclass

from splitwise_llm.errors import SpecError
from splitwise_llm.spec.figures import Range
from splitwise_llm.units import parse_rate, parse_seconds

_LINK_RTT = Range(0.0, 3600.0, "s")
_LINK_RATE = Range(0.125, 1e11, "bytes/s (1 bit/s to 800 Gbit/s)")


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link between the device and another machine, as constants."""

    rtt_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def __post_init__(self) -> None:
        if not _LINK_RTT.holds(self.rtt_s):
            raise SpecError(f"rtt is {self.rtt_s!r} s; expected {_LINK_RTT.text}")
        rates: tuple[tuple[str, object], ...] = (("up", self.up_bytes_per_s), ("down", self.down_bytes_per_s))
        for name, rate in rates:
            if not _LINK_RATE.holds(rate):
                said = f"{8e-9 * rate:g} Gbit/s" if isinstance(rate, float) else f"{rate!r} bytes/s"
                raise SpecError(
                    f"{name} is {said}, which no link carries; expected 1 bit/s up to 800 Gbit/s (1e11 B/s)"
                )

    @property
    def text(self) -> str:
        """The form that `parse` reads back to an equal link: `rtt=20ms up=50mbit down=50mbit`."""
        rtt = f"{1e3 * self.rtt_s:g}ms"
        if parse_seconds(rtt) != self.rtt_s:
            rtt = f"{float(self.rtt_s)!r}s"
        return f"rtt={rtt} up={_rate_text(self.up_bytes_per_s)} down={_rate_text(self.down_bytes_per_s)}"

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """From `rtt=20ms up=50mbit down=50mbit`. Raises SpecError."""
        pairs = dict(item.split("=", 1) for item in text.split() if "=" in item)
        if set(pairs) != {"rtt", "up", "down"} or len(pairs) != len(text.split()):
            raise SpecError(f"{text!r} is no link: write 'rtt=20ms up=50mbit down=50mbit'")
        return cls(parse_seconds(pairs["rtt"]), parse_rate(pairs["up"]), parse_rate(pairs["down"]))


def _rate_text(bytes_per_s: float) -> str:
    """In megabits where that is exact, else in bits, which always are."""
    text = f"{8e-6 * bytes_per_s:g}mbit"
    return text if parse_rate(text) == bytes_per_s else f"{8.0 * bytes_per_s!r}bit"
