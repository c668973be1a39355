"""Memory that is predicted beside what it takes: a `splitwise worker` and a `splitwise generate` per run, each fresh.

What is predicted are weights, cache and activations (`cost.memory_bytes`), as limits of memory are meant; what a
process takes before it holds any of them is not part of it. It is measured by a partition that leaves the machine a
single unit, and subtracted.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from splitwise_llm import cost
from splitwise_llm.bench.figures import Figures
from splitwise_llm.bench.kept import Shelf
from splitwise_llm.bench.overhead import WIDE_LLAMA, Tell
from splitwise_llm.bench.processes import worker
from splitwise_llm.bench.random_models import make_model
from splitwise_llm.cost import Host, Job, World
from splitwise_llm.errors import RequestError, WorkerFailed
from splitwise_llm.model.checkpoint import Checkpoint, locate
from splitwise_llm.model.tokenizer import Tokenizer
from splitwise_llm.partition import Partition
from splitwise_llm.records import RequestRecord
from splitwise_llm.spec import DeviceSpec, Dtype, LinkSpec, ModelSpec, Weights

NAMES = ("edge", "cloud")
FORMS: Mapping[str, Weights] = {"bf16": Weights.FULL, "int8": Weights.INT8, "int4": Weights.INT4}
"""All compute in bf16."""
MODEL = {**WIDE_LLAMA, "num_hidden_layers": 22}
"""TinyLlama's shape: 2.2 GB in bf16. The table is the largest piece of it, and is at both ends."""
CASES: Mapping[str, str] = {
    "edge": "all:edge",
    "cloud": "all:cloud",
    "cut": "edge[0:11] cloud[11:22]",
    "u": "edge[0:5] cloud[5:17] edge[17:22]",
    "shared": "edge[0:5] edge+cloud[5:17](kv=edge:0-1,cloud:2-3 ffn=edge:0-3,cloud:4-7) edge[17:22]",
}
LITTLE = (
    "cloud[0:11] edge+cloud[11](kv=edge:0,cloud:1-3 ffn=edge:0,cloud:1-7) cloud[12:22]",
    "edge[0:11] edge+cloud[11](kv=edge:0-2,cloud:3 ffn=edge:0-6,cloud:7) edge[12:22]",
)
"""As little as the device, and the worker, can be given."""
NEW_TOKENS = 16
ROOMS = ("cost", "engine", "model", "wire")
LETTERS = 60
"""Of the prompt: 16 tokens, beside which weights and cache are all there is."""
LONG_LETTERS, LONG_CASES = 1500, ("cloud", "u")
"""398 tokens, all computed at once."""
_LEAST_LIMIT = 1_000_000
"""Of a machine that has nothing to do, bytes."""
_PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Taken:
    """One run: per machine what was predicted and the peak of its process, in bytes; the tokens of the prompt."""

    predicted: tuple[float, float]
    peaks: tuple[int, int]
    prompt_tokens: int


class Stand:
    """A model on disk, run in fresh processes. One that is there already is not made again."""

    def __init__(self, place: Path, config: Mapping[str, Any] = MODEL) -> None:
        self._model = place / "model"
        if not (self._model / "tokenizer.json").exists():  # which is written last
            make_model(self._model, config)
            shutil.copy(locate("bundled") / "tokenizer.json", self._model)
        self._spec, self._tokenizer = Checkpoint(self._model).architecture.spec, Tokenizer(self._model)
        self._text = Path(str(resources.files("splitwise_llm") / "data" / "excerpt.txt")).read_text(encoding="utf-8")
        self._answer = place / "answer.json"

    def run(self, partition: str, weights: Weights, letters: int = LETTERS) -> Taken:
        """With no more memory allowed on each machine than what is predicted needs, so that the device keeps nothing
        ready beside its part; fp16 on the wire. Raises WorkerFailed where a process ends otherwise than well."""
        prompt = self._text[:letters]
        job = Job(len(self._tokenizer.encode(prompt)), NEW_TOKENS)
        said = predicted(self._spec, partition, weights, job)
        near, far = (f"{max(math.ceil(limit_for(size)), _LEAST_LIMIT)}B" for size in said)
        form = ["--dtype", "bf16", "--weights", weights.value, "--memory"]
        with worker(str(self._model), *form, far) as cloud:
            _complete([
                "generate", prompt, "--model", str(self._model), "--machine", f"cloud={cloud.address}", "--partition",
                partition, "--wire", "fp16", "--chunk", "0", "-n", str(NEW_TOKENS), *form, near,
                "--json", str(self._answer), "--quiet",
            ])  # fmt: skip
        record = RequestRecord.from_dict(json.loads(self._answer.read_text()))
        peaks = {machine.name: machine.peak_memory_bytes for machine in record.machines}
        return Taken(said, (peaks[NAMES[0]], peaks.get(NAMES[1], 0)), job.prompt_tokens)


def limit_for(size: float) -> float:
    """The least limit under which so many bytes are admissible."""
    return size / (1 - cost.HELD_BACK) + 1


def predicted(spec: ModelSpec, partition: str, weights: Weights, job: Job) -> tuple[float, float]:
    """Bytes of the device and of the worker, by the cost model."""
    host = Host(DeviceSpec("this machine", 1e11, 1e10, 4e9), Dtype.BF16, weights)  # nobody asks for its speed
    world = World(spec, (host, host), {(0, 1): LinkSpec.parse("rtt=1ms up=1gbit down=1gbit")})
    asked = Partition.parse(partition, spec, NAMES)
    device, cloud = (cost.memory_bytes(world, asked, machine, job, None) for machine in (0, 1))
    return device, cloud


def _complete(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "splitwise_llm", *arguments],
            capture_output=True, text=True, timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(f"`splitwise {arguments[0]}` was not done after {_PATIENCE_S:g} s; run it alone") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-3:]
        raise WorkerFailed(f"`splitwise {arguments[0]}` ended with {done.returncode}: {' / '.join(said)}")


def run_memory(forms: Sequence[str], tell: Tell, keep: Path | None = None) -> Figures:
    """Of each form, case and machine: `FORM_CASE_MACHINE_over_predicted`, the growth of the process over what is
    predicted, with a prompt of 16 tokens; `..._long_prompt` with one of 398. The least and the most of all of them.
    What is kept in a folder, the model too (2.2 GB), is not made again.

    `most_over_limit`: growth over the limit, which is what the prediction needs. Raises RequestError, WorkerFailed.
    """
    if unknown := {*forms} - {*FORMS}:
        raise RequestError(f"there is no form {min(unknown)!r}; the forms are {', '.join(FORMS)}")
    result = Figures("serving", {"part": "memory", "forms": list(forms), "model": MODEL, "new_tokens": NEW_TOKENS})
    ratios: dict[str, list[float]] = {"": [], "_long_prompt": []}
    shelf = Shelf(keep, _fingerprint())
    with tempfile.TemporaryDirectory() as place:
        tell("making a random llama of 1.1 billion weights")
        stand = Stand(keep or Path(place))

        def run(form: str, partition: str, letters: int = LETTERS) -> Taken:
            name = hashlib.sha256(f"{form} {partition} {letters}".encode()).hexdigest()[:12]
            return Taken(**shelf.or_made(name, lambda: asdict(stand.run(partition, FORMS[form], letters))))

        for form in forms:
            bare = bare_bytes(*(run(form, partition) for partition in LITTLE))
            for name, size in zip(NAMES, bare, strict=True):
                result.add(f"{form}_{name}_bare_mb", size / 1e6, "the process itself")
            for kind, letters, cases in (("", LETTERS, tuple(CASES)), ("_long_prompt", LONG_LETTERS, LONG_CASES)):
                for case in cases:
                    taken = run(form, CASES[case], letters)
                    for name, ratio, note in compared(taken, bare):
                        result.add(f"{form}_{case}_{name}_over_predicted{kind}", ratio, note)
                        ratios[kind].append(ratio)
                        tell(f"{form} {case}{kind} {name}: {ratio:.3f} of predicted, {note}")
    for kind, each in ratios.items():
        result.add(f"least_over_predicted{kind}", min(each), f"of {len(each)}: at least 0.9")
        result.add(f"most_over_predicted{kind}", max(each), "at most 1.1")
    result.add("most_over_limit", max(map(max, ratios.values())) * (1 - cost.HELD_BACK), "at most 1")
    return result


def _fingerprint() -> str:
    """Of the source that memory depends on."""
    root, digest = Path(str(resources.files("splitwise_llm"))), hashlib.sha256(repr(MODEL).encode())
    for file in (*(one for room in ROOMS for one in sorted((root / room).rglob("*.py"))), Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def bare_bytes(device: Taken, cloud: Taken) -> tuple[float, float]:
    """What the process of the device, and of the worker, takes by itself: of the runs with as little as each can be
    given, the peak less what was predicted."""
    return device.peaks[0] - device.predicted[0], cloud.peaks[1] - cloud.predicted[1]


def compared(taken: Taken, bare: Sequence[float]) -> Iterator[tuple[str, float, str]]:
    """Of each machine that has something to do: its name, by how many times what is predicted its process grew, and
    that in words."""
    for name, said, peak, before in zip(NAMES, taken.predicted, taken.peaks, bare, strict=True):
        if said:
            whole = peak / (said + before)
            note = f"{(peak - before) / 1e6:.0f} of {said / 1e6:.0f} MB; with the process itself {whole:.3f}"
            yield name, (peak - before) / said, note


__all__ = ["CASES", "FORMS", "LITTLE", "Taken", "bare_bytes", "compared", "predicted", "run_memory"]
