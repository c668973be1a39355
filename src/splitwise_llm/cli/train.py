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
    threads: Annotated[int | None, typer.Option(min=1, help="For the network; worlds are simulated on one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew where the folder holds a run.")] = False,
) -> None:
    """Train the policy `splitwise`; stopped, it goes on where it was. `tensorboard --logdir DIR/curves` shows curves."""
    try:
        from splitwise_llm.learn.train import read_config
        from splitwise_llm.learn.train import train as learn
    except ImportError as error:
        raise SpecError(f"training needs {error.name}: pip install sb3-contrib==2.9.2 tensorboard") from error
    from dataclasses import replace

    from splitwise_llm.policies.network import Network

    chosen = read_config(config, seed)
    if threads is not None:
        chosen = replace(chosen, threads=threads)
    if fresh:
        for name in ("state.json", "learner.zip", "range.npz", "splitwise.npz"):
            (folder / name).unlink(missing_ok=True)
    weights = learn(chosen, folder, tell, start=Network.load(start) if start else None)
    out.print(f"weights: {weights}; curves: tensorboard --logdir {folder / 'curves'}", markup=False)


__all__ = ["train"]
