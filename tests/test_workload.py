"""Recorded requests: what each format becomes, what is refused and why, and what can be made of a trace."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitwise_llm.errors import SpecError
from splitwise_llm.workload import RecordedRequest, RequestTrace, parse_requests, read_requests

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = (
    HEADER
    + """\
2023-11-16 23:59:59.5000000,374,44
2023-11-17 00:00:00.5000009,396,109
2023-11-17 00:00:01.5000000,879,55
"""
)
MOONCAKE = """\
{"timestamp": 27000, "input_length": 374, "output_length": 44, "hash_ids": [0, 1]}
{"timestamp": 28000, "input_length": 396, "output_length": 109, "hash_ids": []}
{"timestamp": 29000, "input_length": 879, "output_length": 55}
"""
THREE = RequestTrace(
    (RecordedRequest(0.0, 374, 44), RecordedRequest(1.0, 396, 109), RecordedRequest(2.0, 879, 55)), duration_s=3.0
)


@st.composite
def request_traces(draw: st.DrawFn) -> RequestTrace:
    arrivals_s = sorted(draw(st.lists(st.floats(0, 1000), max_size=20)))
    tokens = st.integers(1, 10_000)
    return RequestTrace(tuple(RecordedRequest(at_s, draw(tokens), draw(tokens)) for at_s in arrivals_s), 1001.0)


@pytest.mark.parametrize("text", [AZURE, MOONCAKE])
def test_a_trace_starts_with_its_first_request_and_ends_a_mean_gap_after_its_last(text: str) -> None:
    assert parse_requests(text) == THREE
    assert parse_requests(text).mean_per_s == 1.0


def test_columns_may_stand_in_any_order_and_times_may_have_a_zone() -> None:
    text = (
        "GeneratedTokens, TIMESTAMP, more, ContextTokens\n"
        "44,2024-05-10 01:00:00+01:00,x,374\n"
        "9,2024-05-10 00:00:01,y,3\n"
    )
    assert parse_requests(text) == RequestTrace((RecordedRequest(0.0, 374, 44), RecordedRequest(1.0, 3, 9)), 2.0)


def test_a_gzipped_file_is_read_as_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text(MOONCAKE)
    (tmp_path / "packed").write_bytes(gzip.compress(MOONCAKE.encode()))
    assert read_requests(tmp_path / "plain") == read_requests(tmp_path / "packed") == THREE


def test_requests_may_come_at_once() -> None:
    line = '{"timestamp": %d, "input_length": 1, "output_length": 1}\n'
    trace = parse_requests(line % 0 + line % 0 + line % 3000 + line % 3000)
    assert [request.arrival_s for request in trace.requests] == [0.0, 0.0, 3.0, 3.0]
    assert trace.duration_s == 4.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\n", ":1: 'hello' begins no known request trace"),
        ("TIMESTAMP,ContextTokens\n1,2\n", ":1: 'TIMESTAMP,ContextTokens' begins no known"),
        (HEADER, "0 requests at one time"),
        (HEADER + "2023-11-16 18:15:46,374,44\n", "1 requests at one time"),
        (AZURE[:-1], ":4: the last line has no end"),
        (AZURE[:-5] + "\n", ":4: 2 fields where the header has 3"),
        (AZURE + "2023-11-16 18:15:46,374,44\n", ":5: time goes back by"),
        (AZURE + "2023-11-16,\n", ":5: 2 fields"),
        (AZURE + "yesterday,374,44\n", ":5: 'yesterday' is no date and time"),
        (AZURE + "2023-11-18 18:15:46,,44\n", ":5: ContextTokens '' is no number of tokens"),
        (AZURE + "2023-11-18 18:15:46,374,-44\n", ":5: GeneratedTokens '-44' is no number of tokens"),
        (AZURE + "2023-11-18 18:15:46,374,0\n", ":5: GeneratedTokens '0' is no number of tokens"),
        (AZURE + "2023-11-18 18:15:46,3.5,1\n", ":5: ContextTokens '3.5' is no number of tokens"),
        (AZURE + "2023-11-18 18:15:46,99999999999,1\n", ":5: ContextTokens '99999999999'"),
        (MOONCAKE[:-10], ":3: no whole JSON object"),
        (MOONCAKE + "{" * 10, ":4: no whole JSON object"),
        (MOONCAKE + "[" * 100_000, ":4: no whole JSON object"),
        (MOONCAKE + "[]\n", ":4: has no timestamp, input_length, output_length"),
        (MOONCAKE + '{"timestamp": 99000, "input_length": 3}\n', ":4: has no output_length"),
        (MOONCAKE + '{"timestamp": 9000, "input_length": 3, "output_length": 1}\n', ":4: time goes back by 20 s"),
        (MOONCAKE + '{"timestamp": -1, "input_length": 3, "output_length": 1}\n', ":4: timestamp -1 is no time"),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 3, "output_length": 1}\n', ":4: timestamp nan is no time"),
        (MOONCAKE + '{"timestamp": "9", "input_length": 3, "output_length": 1}\n', ":4: timestamp '9' is no time"),
        (MOONCAKE + '{"timestamp": 99000, "input_length": -3, "output_length": 1}\n', ":4: input_length -3 is no"),
        (MOONCAKE + '{"timestamp": 99000, "input_length": 3, "output_length": true}\n', ":4: output_length True"),
        (MOONCAKE + '{"timestamp": 99000, "input_length": 3, "output_length": 1.5}\n', ":4: output_length 1.5"),
    ],
)
def test_what_is_no_request_trace_is_refused_with_file_and_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.csv"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_requests(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)


def test_a_damaged_or_missing_file_says_so(tmp_path: Path) -> None:
    whole = gzip.compress(MOONCAKE.encode() * 100)
    (tmp_path / "half.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpecError, match="truncated gzip"):
        read_requests(tmp_path / "half.gz")
    with pytest.raises(SpecError, match="cannot be read"):
        read_requests(tmp_path / "none")


@given(
    text=st.one_of(
        st.text(alphabet='0123456789{}":,-. timesapnu_lgoh\n', max_size=80),
        st.lists(st.sampled_from([*AZURE.splitlines(), *MOONCAKE.splitlines(), ""])).map("\n".join),
    )
)
def test_any_text_is_a_request_trace_or_refused_in_good_order(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert parse_requests(text).mean_per_s > 0


def test_a_trace_that_cannot_be_is_not_made() -> None:
    one = RecordedRequest(1.0, 5, 5)
    for requests, duration_s in (
        ((), 0.0),
        ((), math.inf),
        ((one,), 0.9),
        ((one, RecordedRequest(0.5, 5, 5)), 2.0),
        ((RecordedRequest(-1.0, 5, 5),), 2.0),
        ((RecordedRequest(math.nan, 5, 5),), 2.0),
        ((RecordedRequest(1.0, 0, 5),), 2.0),
        ((RecordedRequest(1.0, 5, 0),), 2.0),
    ):
        with pytest.raises(SpecError):
            RequestTrace(requests, duration_s)


def test_thinning_keeps_every_kth_request_at_its_own_time() -> None:
    assert THREE.thin(every=2).requests == (THREE.requests[0], THREE.requests[2])
    assert THREE.thin(every=2, first=1).requests == (THREE.requests[1],)
    assert THREE.thin(every=2).duration_s == 3.0


@given(trace=request_traces(), every=st.integers(1, 5))
def test_what_thinnings_keep_is_the_whole_trace(trace: RequestTrace, every: int) -> None:
    kept = [request for first in range(every) for request in trace.thin(every, first).requests]
    assert sorted(kept, key=id) == sorted(trace.requests, key=id)


@given(trace=request_traces(), factor=st.floats(0.01, 100))
def test_stretching_time_divides_the_rate(trace: RequestTrace, factor: float) -> None:
    assert trace.scale_time(factor).mean_per_s * factor == pytest.approx(trace.mean_per_s)
    assert THREE.scale_time(10.0).requests[1] == RecordedRequest(10.0, 396, 109)


def test_clipping_shortens_the_long_and_drops_none() -> None:
    assert [(r.prompt_tokens, r.output_tokens) for r in THREE.clip(380, 50).requests] == [
        (374, 44),
        (380, 50),
        (380, 50),
    ]


@given(trace=request_traces(), cut_s=st.floats(0.5, 1000.5))
def test_two_windows_hold_each_request_once(trace: RequestTrace, cut_s: float) -> None:
    before, after = trace.window(0, cut_s), trace.window(cut_s, trace.duration_s)
    assert len(before.requests) + len(after.requests) == len(trace.requests)
    assert before.requests == trace.requests[: len(before.requests)]
    assert THREE.window(1.0, 2.5) == RequestTrace((RecordedRequest(0.0, 396, 109), RecordedRequest(1.0, 879, 55)), 1.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: THREE.thin(every=0), "no thinning"),
        (lambda: THREE.thin(every=2, first=2), "no thinning"),
        (lambda: THREE.scale_time(0), "factor above 0"),
        (lambda: THREE.scale_time(math.nan), "factor above 0"),
        (lambda: THREE.clip(0, 1), "1 or more"),
        (lambda: THREE.window(1, 1), "no part of a trace of 3.0 s"),
        (lambda: THREE.window(0, 4), "no part of a trace of 3.0 s"),
    ],
)
def test_what_cannot_be_made_of_a_trace_is_refused(make: Callable[[], RequestTrace], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        make()


RECORDED = [
    # file, requests, seconds, requests/s, variation of gaps, prompt p50 p95 mean max, output p50 p95 mean max
    (
        "azure2023/AzureLLMInferenceTrace_conv_first_two_thirds.csv",
        (13_828, 2334, 5.93, 1.08, 1020, 4080, 1203, 14050, 115, 447, 201, 1000),
    ),
    (
        "azure2023/AzureLLMInferenceTrace_code_first_two_thirds.csv",
        (7148, 2291, 3.12, 12.7, 1460, 7150, 2028, 7437, 13, 87, 27, 1899),
    ),
    (
        "mooncake/conversation_trace_first_two_thirds.jsonl.gz",
        (7689, 2358, 3.26, 2.96, 7280, 40500, 12450, 124800, 356, 713, 348, 2000),
    ),
]


@pytest.mark.parametrize(("file", "published"), RECORDED)
def test_recorded_requests_have_the_statistics_their_description_says(file: str, published: tuple[float, ...]) -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPLITWISE_DATA", beside)) / "requests"
    if not (folder / file).exists():
        pytest.skip(f"no {file} in {folder}; point SPLITWISE_DATA at the folder that holds requests/{file}")
    trace = read_requests(folder / file)
    prompts = [request.prompt_tokens for request in trace.requests]
    outputs = [request.output_tokens for request in trace.requests]
    gaps_s = [after.arrival_s - before.arrival_s for before, after in pairwise(trace.requests)]
    found = [len(trace.requests), trace.duration_s, trace.mean_per_s, pstdev(gaps_s) / fmean(gaps_s)]
    for tokens in (prompts, outputs):
        percentiles = quantiles(tokens, n=100, method="inclusive")
        found += [percentiles[49], percentiles[94], fmean(tokens), max(tokens)]
    assert found == pytest.approx(list(published), rel=0.03)
