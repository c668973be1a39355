"""Recorded link rates and round-trip times: two small types and the files they are read from; no link, no clock.

| rates | a line | what it becomes |
| --- | --- | --- |
| packet times (mahimahi) | whole milliseconds, one 1500-byte packet each | 1 ms bins, none averaged away |
| columns | `time_s  Mbit/s` | the rate holds until the next line, the last one for the median step |
| CSV log of a sampler | a header with one of `CSV_RATES` and one of `CSV_TIMES` | as columns |
| run lists | `Run k`, then Mbit/s every 0.1 s, comma separated | all runs, one after another, as if one |

| round trips | a line | what it becomes |
| --- | --- | --- |
| `ping` output | `[clock] ... icmp_seq=7 ... time=23.5 ms`, the clock optional | a probe at the time it was sent |
| table | a header with `pub_time(ms)` and `delay(ms)` | a probe at `pub_time` |
| run lists | `Run k`, then RTTs in ms, comma separated | a probe every 0.2 s, all runs one after another |

A probe between two answered ones that has no answer of its own was lost: its RTT is infinite. What was still
under way when a log ended, and what a list leaves out without a word, is not known and not counted.

Where a recorder paused, nothing is known. A pause (over 10 s and over ten median steps) is refused (`GapError`),
unless `gaps="cut"`: then the line before it lasts the median step, and what follows moves up.

The format is told by the content; a file may be gzipped; lines that are empty or start with `#` do not count.
"""

from splitwise_llm.traces.lines import Direction, GapError, Gaps
from splitwise_llm.traces.reading import named_trace, parse_rtt, parse_trace, read_rtt, read_trace, recorded_text
from splitwise_llm.traces.series import RateTrace, RttTrace

__all__ = [
    "Direction", "GapError", "Gaps", "RateTrace", "RttTrace", "named_trace", "parse_rtt", "parse_trace", "read_rtt",
    "read_trace", "recorded_text",
]  # fmt: skip
