"""Learning: from nothing to weights, with progress, curves and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitwise_llm.cli.options import app, out, tell
from splitwise_llm.errors import SpecError

if TYPE_CHECKING:
    from splitwise_llm.learn.courses import Course
    from splitwise_llm.learn.recorded import Recorded


class Learner(StrEnum):
    """What is learned."""

    HIGH = "high"
    LOW = "low"
    PAPER = "paper"


MADE = (
    "state.json", "learner.zip", "range.npz", "splitwise.npz", "low_level.npz", "low_level.pt", "per_layer.npz",
    "per_layer.pt",
)  # fmt: skip
"""What a run leaves in its folder, curves apart."""


@app.command()
def train(
    learner: Annotated[
        Learner,
        typer.Option(help="high: the policy splitwise; low: the proposer of plans; paper: the policy splitwise-paper."),
    ] = Learner.HIGH,
    config: Annotated[str, typer.Option(help="Of high: `default` makes what is shipped; or a JSON file.")] = "default",
    folder: Annotated[Path, typer.Option("--out", help="For weights, curves and checkpoints.")] = Path("training"),
    seed: Annotated[int | None, typer.Option(min=0, max=2**20, help="In place of the configuration's.")] = None,
    start: Annotated[Path | None, typer.Option(help="Of high: weights to begin at; default: neutral knobs.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Of high; the weights are the same.")] = 1,
    device: Annotated[str, typer.Option(help="Of high: where the network learns, cpu or cuda.")] = "cpu",
    from_records: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of high: records of live sessions to learn in, too, from the shipped weights on; repeatable."
        ),
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            help="Of high: folder of recorded links, as for `bench scenarios`, for a share of the courses; those that "
            "benches judge by are left out."
        ),
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(help="Of high: recorded requests for those courses; default: drawn.")
    ] = None,
    cut_gaps: Annotated[bool, typer.Option("--cut-gaps", help="Leave out what recorders paused in.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where the folder holds a run.")] = False,
) -> None:
    """Train a policy; stopped, it goes on where it was. Curves: `tensorboard --logdir DIR/curves`."""
    try:
        import sb3_contrib  # noqa: F401 - said here, not after minutes
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SpecError(f"training needs {error.name}: pip install splitwise-llm[learning]") from error
    if learner is not Learner.HIGH:
        if traces or requests or cut_gaps:
            raise SpecError(f"--traces, --requests and --cut-gaps are for --learner high, not {learner}")
        if config != "default" or start or processes > 1 or device != "cpu" or from_records:
            raise SpecError(
                f"--config, --start, --processes, --device and --from-records are for --learner high, not {learner}"
            )
    recorded = _recorded(traces, requests, cut_gaps)
    high = learner is Learner.HIGH and _high(config, seed, start, processes, device, from_records or [], recorded)
    if fresh:  # not before everything that was given is read: a mistake in it costs no run
        for name in MADE:
            (folder / name).unlink(missing_ok=True)
        for lesson in (folder / "lessons").glob("*.npz"):
            lesson.unlink()
    if high:
        weights = high(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with SummaryWriter(str(folder / "curves")) as writer:
            weights = _low(folder, seed or 0, writer) if learner is Learner.LOW else _paper(folder, seed or 0, writer)
    out.print(f"weights: {weights}; curves: tensorboard --logdir {folder / 'curves'}", markup=False)


def _high(
    config: str, seed: int | None, start: Path | None, processes: int, device: str, lived: list[Path],
    recorded: Recorded | None,
) -> Callable[[Path], Path]:  # fmt: skip
    """What learns, in the folder that it is given. Raises what reading raises."""
    from splitwise_llm.learn.train import read_config
    from splitwise_llm.learn.train import train as learn
    from splitwise_llm.policies.mind import shipped
    from splitwise_llm.policies.network import Network

    given = Network.load(start) if start else shipped() if lived else None
    asked, more = read_config(config, seed), _lived(lived) if lived else []
    return lambda folder: learn(
        asked, folder, tell, start=given, more=more, recorded=recorded, processes=processes, device=device
    )


def _recorded(traces: Path | None, requests: Path | None, cut_gaps: bool) -> Recorded | None:
    """What was recorded and may be learned from. Raises SpecError that says what is missing or cannot be used."""
    if traces is None:
        if requests or cut_gaps:
            raise SpecError("--requests and --cut-gaps go with recorded links: give --traces DIR, too")
        return None
    from splitwise_llm.learn.recorded import read_recorded

    return read_recorded(traces, requests, tell, cut_gaps=cut_gaps)


def _lived(files: list[Path]) -> list[Course]:
    """Live sessions as courses. Raises what reading them raises."""
    from dataclasses import replace

    from splitwise_llm.bench.replaying import Replay
    from splitwise_llm.learn.courses import Course
    from splitwise_llm.policies.guided import Guide
    from splitwise_llm.sim.params import NEVER_S
    from splitwise_llm.sim.replay import courses_from_records

    courses = []
    for one in courses_from_records(files):
        params = replace(Replay(one).params, sample_s=NEVER_S)
        guide = Guide(one.tools, one.scenario.limits, arrivals_per_s=one.case.per_s)
        name = f"{one.name} ({len(one.requests)} requests in {one.recordings.up.period_s:.1f} s)"
        courses.append(Course(name, params, guide))
    return courses


def _low(folder: Path, seed: int, writer: object) -> Path:
    from splitwise_llm.learn.low_level import Config, train_low_level

    file = folder / "low_level.npz"
    train_low_level(Config(), tell, writer, folder, seed).save(file)  # type: ignore[arg-type]
    return file


def _paper(folder: Path, seed: int, writer: object) -> Path:
    from splitwise_llm.learn.per_layer import PerLayerConfig, train_per_layer

    def told(done: int, of: int, figures: object) -> None:
        if done % 10 == 0 or done == of:
            tell(f"update {done} of {of}: {figures}")

    train_per_layer(PerLayerConfig(), told, writer, folder, seed)  # type: ignore[arg-type]
    return folder / "per_layer.npz"


__all__ = ["train"]
