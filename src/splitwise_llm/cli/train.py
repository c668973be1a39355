"""Learning: from nothing to weights, with progress, curves and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitwise_llm.cli.options import app, out, tell
from splitwise_llm.errors import SpecError


@app.command()
def train(
    config: Annotated[str, typer.Option(help="`default` makes what is shipped; `tiny`; or a JSON file.")] = "default",
    folder: Annotated[Path, typer.Option("--out", help="For weights, curves and checkpoints.")] = Path("training"),
    seed: Annotated[int | None, typer.Option(min=0, max=2**20, help="In place of the configuration's.")] = None,
    start: Annotated[Path | None, typer.Option(help="Weights to begin at; default: neutral knobs.")] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="That simulate; the weights are the same.")] = 1,
    device: Annotated[str, typer.Option(help="Where the network learns: cpu or cuda.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where the folder holds a run.")] = False,
) -> None:
    """Train the policy `splitwise`; stopped, it goes on where it was. Curves: `tensorboard --logdir DIR/curves`."""
    try:
        from splitwise_llm.learn.train import read_config
        from splitwise_llm.learn.train import train as learn
    except ImportError as error:
        raise SpecError(f"training needs {error.name}: pip install sb3-contrib==2.9.2 tensorboard") from error
    from splitwise_llm.policies.network import Network

    chosen = read_config(config, seed)
    if fresh:
        for name in ("state.json", "learner.zip", "range.npz", "splitwise.npz"):
            (folder / name).unlink(missing_ok=True)
    given = Network.load(start) if start else None
    weights = learn(chosen, folder, tell, start=given, processes=processes, device=device)
    out.print(f"weights: {weights}; curves: tensorboard --logdir {folder / 'curves'}", markup=False)


__all__ = ["train"]
