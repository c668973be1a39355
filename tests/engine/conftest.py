"""What tests of a worker's sessions share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from engine.raw_sessions import Lab, Play, play
from splitwise_llm.model.checkpoint import Checkpoint


@pytest.fixture
def scene(tiny: Callable[[str], Path]) -> Play:
    """Plays a scene with a worker that holds a small model; the options are the worker's."""
    checkpoint = Checkpoint(tiny("llama"))

    def run(one: Callable[[Lab], Awaitable[None]], **options: object) -> None:
        play(checkpoint, one, **options)

    return run
