"""What every test may use: small models of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from forked import forked_workers
from splitwise_llm.bench.random_models import TINY, make_model

settings.register_profile("splitwise", deadline=None, derandomize=True)
settings.load_profile("splitwise")
torch.set_num_threads(1)

ALONE = ("engine", "wire")
"""Folders of tests that start processes, use sockets or measure time: nothing is to run beside them."""
BUNDLED_TOKENIZER = Path(__file__).parent.parent / "src/splitwise_llm/data/bundled/tokenizer.json"


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ALONE:
            item.add_marker("alone")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two of torch's, which may add up in the order in which they come."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small random model, by its name in TINY, with the bundled tokenizer beside it."""
    made: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            make_model(path, TINY[name], seed=len(name))
            (path / "tokenizer.json").write_bytes(BUNDLED_TOKENIZER.read_bytes())
            made[name] = path
        return made[name]

    return directory


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """Workers and shaped links of the module are forks of one process: they need not import torch again."""
    with forked_workers():
        yield
