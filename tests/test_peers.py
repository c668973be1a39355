"""What stands beside llama.cpp: the file written for it, its programs found or asked for, its stream read, its end
survived. Nothing here needs llama.cpp; a small program plays its server."""

from __future__ import annotations

import math
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from forked import splitwise_text
from splitwise_llm.bench.peers import (
    OUR_WAYS,
    TEXT_FIGURES,
    THEIR_WAYS,
    TINYLLAMA,
    after_kill,
    check_room,
    fastest,
    same_share,
    weight_bytes,
)
from splitwise_llm.bench.peers_gguf import ALIGNMENT, PARTS, interleaved_heads, write_gguf
from splitwise_llm.bench.peers_llamacpp import (
    Binaries,
    Taken,
    half_remote,
    parse_events,
    processor_s,
    quantised,
    server,
    take,
)
from splitwise_llm.bench.random_models import make_model
from splitwise_llm.errors import LinkDied, MemoryTooSmall, ModelError, UserError, WorkerFailed

pytestmark = pytest.mark.alone
GROUPED = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 101, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip

FAKE_SERVER = """#!{python}
import http.server, json, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200); self.end_headers()
        for n in range(asked["n_predict"]):
            event = {{"tokens": [sum(asked["prompt"]) + n], "stop": False}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n"); self.wfile.flush()
            if n == 4:
                print("Remote RPC server crashed"); sys.stdout.flush(); os._exit(134)
        self.wfile.write(b'data: {{"tokens": [], "stop": true}}\\n\\n')
    def log_message(self, *_): pass
if "{model}" not in sys.argv:
    sys.exit("no such model")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def build(folder: Path, text: str = "#!/bin/sh\n") -> Binaries:
    for name in ("llama-server", "ggml-rpc-server", "llama-quantize"):
        program(folder / "bin" / name, text)
    return Binaries.find(folder)


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """A reader of its own, from the format's description: metadata, and tensors in rows and columns."""
    data = path.read_bytes()
    at = 0

    def number(form: str) -> int | float | bool:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        size = int(number("Q"))
        at += size
        return data[at - size : at].decode()

    def value(kind: int) -> object:
        if kind == 9:
            inner, count = int(number("I")), int(number("Q"))
            return [value(inner) for _ in range(count)]
        return text() if kind == 8 else number({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert (data[:4], struct.unpack_from("<I", data, 4)) == (b"GGUF", (3,))
    at = 8
    tensors, pairs = int(number("Q")), int(number("Q"))
    said = {text(): value(int(number("I"))) for _ in range(pairs)}
    infos = []
    for _ in range(tensors):
        name = text()
        shape = [int(number("Q")) for _ in range(int(number("I")))]
        infos.append((name, shape[::-1], int(number("I")), int(number("Q"))))
    start = at + -at % ALIGNMENT
    found = {}
    for name, shape, kind, offset in infos:
        assert (kind, offset % ALIGNMENT) == (0, 0)
        found[name] = np.frombuffer(data, "<f4", int(np.prod(shape)), start + offset).reshape(shape)
    assert len(data) % ALIGNMENT == 0
    return said, found


def test_a_gguf_file_holds_every_weight_bit_for_bit(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", GROUPED)
    (model / "tokenizer.json").write_text("{}")
    write_gguf(model, tmp_path / "model.gguf")
    said, theirs = read_gguf(tmp_path / "model.gguf")
    ours = load_file(model / "model.safetensors")
    assert len(theirs) == len(ours) == 2 * len(PARTS) + 3
    for layer in range(2):
        for part, name in PARTS.items():
            want = ours[f"model.layers.{layer}.{part}.weight"]
            if name in ("attn_q", "attn_k"):
                want = interleaved_heads(want, 8 if name == "attn_q" else 2)
            assert theirs[f"blk.{layer}.{name}.weight"].tobytes() == want.contiguous().numpy().tobytes()
    for mine, name in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):
        assert theirs[f"{name}.weight"].tobytes() == ours[f"{mine}.weight"].numpy().tobytes()
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.dimension_count"] == 8
    tokens = said["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len({*tokens}) == 101, "names must differ, or the program that reads them ends"


def test_interleaved_heads_rotated_as_neighbours_attend_as_halves_do() -> None:
    torch.manual_seed(0)
    heads, size, width = 3, 8, 16
    x = torch.randn(width)
    angles = torch.rand(2, size // 2)  # of two positions

    def halves(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = (rows @ x).view(heads, 2, size // 2).unbind(1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    def neighbours(rows: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, b = (rows @ x).view(heads, size // 2, 2).unbind(2)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    q, k = torch.randn(2, heads * size, width)
    published = (halves(q, angles[0]) * halves(k, angles[1])).sum(1)
    theirs = [interleaved_heads(rows, heads) for rows in (q, k)]
    written = (neighbours(theirs[0], angles[0]) * neighbours(theirs[1], angles[1])).sum(1)
    torch.testing.assert_close(written, published)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa-tied", "llama3-rope", "qwen2"])
def test_what_is_no_plain_llama_is_not_written(tiny: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="plain Llama"):
        write_gguf(tiny(name), tmp_path / "model.gguf")


def test_programs_are_found_in_a_build_and_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.*no such folder.*runs/peers\.sh"):
        Binaries.find(tmp_path / "nowhere")
    program(tmp_path / "build" / "bin" / "llama-server")
    program(tmp_path / "build" / "bin" / "rpc-server")
    (tmp_path / "llama-quantize").write_text("not to be run")
    with pytest.raises(UserError, match=r": llama-quantize not found.*runs/peers\.sh"):
        Binaries.find(tmp_path)
    quantize = program(tmp_path / "llama-quantize")
    found = Binaries.find(tmp_path)
    assert (found.rpc.name, found.quantize) == ("rpc-server", quantize), "older builds call it so"


def test_the_command_refuses_a_folder_without_a_build(tmp_path: Path) -> None:
    command = ("bench", "peers", "--llamacpp", str(tmp_path))
    done = splitwise_text(*command)
    assert done.returncode == 2
    assert "llama-server, ggml-rpc-server, llama-quantize not found" in done.stderr
    assert "Traceback" not in done.stderr
    done = splitwise_text(*command, "--part", "lokal")
    assert (done.returncode, "lokal" in done.stderr, "local, link, kill, draft" in done.stderr) == (2, True, True)


def test_the_half_that_goes_away_is_a_layer_more_in_their_count_because_the_head_is_counted_first() -> None:
    assert half_remote(22, "127.0.0.1:7") == ("--rpc", "127.0.0.1:7", "-ngl", "12", "-ot", "^(output|token_embd)=CPU")
    assert half_remote(5, "a:1")[3] == "4", "the device has the smaller half of 5, as `edge[0:2] cloud[2:5]`"


def test_a_stream_of_events_is_its_ids_and_one_that_breaks_off_is_an_error() -> None:
    whole = [b'data: {"tokens":[7],"stop":false}\n', b"\n", b'data: {"tokens":[8,9],"stop":false}\n', b"\n"]
    last = b'data: {"tokens":[],"stop":true}\n'
    assert list(parse_events(iter([*whole, last, b'data: {"tokens":[1]}\n']))) == [7, 8, 9]
    came: list[int] = []
    with pytest.raises(LinkDied, match="ended before its last event"):
        came.extend(parse_events(iter(whole)))
    for bad in (b'error: {"code":500}\n', b'data: {"error":{"code":500}}\n'):
        with pytest.raises(LinkDied, match="500"):
            list(parse_events(iter([*whole, bad, last])))


def test_a_server_answers_token_by_token_until_it_ends(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    binaries = build(tmp_path, FAKE_SERVER.format(python=sys.executable, model=model))
    with server(binaries, model, 1) as running:
        assert take(running.completion([1, 2], 4)).ids == (3, 4, 5, 6)
        assert after_kill(running.completion([1, 2], 9), _Far(), 3) == (
            2,
            "the stream of llama-server ended before its last event",
        )
        assert "RPC server crashed" in running.said()
        with pytest.raises(LinkDied):
            list(running.completion([1, 2], 4))
    assert running.process.returncode is not None
    with pytest.raises(WorkerFailed, match="llama-server did not start: no such model"), server(binaries, tmp_path, 1):
        pass


class _Far:
    """A far process that only counts its deaths."""

    def __init__(self) -> None:
        self.killed = 0

    def kill(self) -> int:
        self.killed += 1
        return -9


def test_the_far_process_is_killed_once_at_the_token_and_what_comes_then_is_counted() -> None:
    far, seen = _Far(), []

    def tokens() -> Iterator[int]:
        for n in range(10):
            seen.append(far.killed)
            yield n

    assert after_kill(tokens(), far, 4) == (6, "")
    assert seen == [0] * 4 + [1] * 6


def test_a_quantiser_that_fails_says_why_and_leaves_no_half_file(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"")
    binaries = build(tmp_path, "#!/bin/sh\necho half > $2\necho 'unknown type' >&2\nexit 3\n")
    assert quantised(binaries, source, "F32") == source
    with pytest.raises(WorkerFailed, match="Q4_0 ended with 3: unknown type"):
        quantised(binaries, source, "Q4_0")
    assert sorted(os.listdir(tmp_path)) == ["bin", "model.gguf"]


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    assert weight_bytes(TINYLLAMA) == pytest.approx(4 * 1.1e9, rel=1e-3), "it is called 1.1 B"
    check_room(10**9, 3 * 10**9, 5 * 10**9)
    with pytest.raises(MemoryTooSmall, match=r"2\.6.*of memory and 2.*--quick"):
        check_room(10**9, 2 * 10**9, 5 * 10**9)
    with pytest.raises(UserError, match=r"on disk.*--folder"):
        check_room(10**9, 3 * 10**9, 3 * 10**9)


def test_times_and_bytes_per_token_leave_out_what_is_done_once() -> None:
    one = Taken((1, 2, 3, 4, 5), (1.0, 1.9, 2.1, 2.3, 2.5), (900, 1900, 2000, 2100, 2200))
    assert (one.ttft_s, one.tpot_s) == (1.0, pytest.approx(0.375))
    assert one.typical_tpot_s == pytest.approx(0.2)
    assert one.metered == 100


def test_processor_time_goes_on_while_a_process_computes_and_stands_while_it_sleeps() -> None:
    start_s = processor_s(os.getpid())
    time.sleep(0.2)
    slept_s = processor_s(os.getpid())
    until_s = time.process_time() + 0.2
    while time.process_time() < until_s:
        pass
    assert slept_s - start_s < 0.1 < processor_s(os.getpid()) - slept_s
    assert math.isnan(processor_s(2**22 + 1)), "beyond the largest number of a process"


def test_the_fastest_of_theirs_counts_and_texts_are_compared_up_to_where_they_part() -> None:
    slow, fast = (Taken((1, 2), (gap, 2 * gap), (0, 0)) for gap in (0.3, 0.2))
    assert fastest({"F16": [slow], "BF16": [fast]}, lambda one: one.ttft_s) == ("BF16", [0.2])
    assert same_share((1, 2, 3, 4), (1, 2, 9, 4)) == 0.5
    assert same_share((1, 2), (1, 2, 3, 4)) == 0.5
    assert same_share((1, 2), (1, 2)) == 1


def test_every_way_of_drafting_is_compared_and_both_may_draft_as_many_tokens() -> None:
    assert {mine for _, mine, _, _ in TEXT_FIGURES} == {*OUR_WAYS}
    assert {its for _, _, its, _ in TEXT_FIGURES} == {*THEIR_WAYS}
    assert len({name for name, *_ in TEXT_FIGURES}) == len(TEXT_FIGURES)
    for way, draft in OUR_WAYS.items():
        flags = THEIR_WAYS[way]
        assert (draft is None) == (not flags)
        assert draft is None or str(draft.most) in flags
    assert THEIR_WAYS["int4"][-1] == "-md", "the draft model's file is put behind it"
