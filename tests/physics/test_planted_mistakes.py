"""Every test that says which one-line change kills it is killed by it: each change is made in a copy of the source, and
the test run against the copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent.parent
SOURCE = TESTS.parent / "src"
FILES = (
    *sorted(TESTS.glob("physics/test_*.py")),
    *(TESTS / f"test_{name}.py" for name in ("cost", "lyapunov", "moving", "rebuild")),
)
SAID = re.compile(r"# Dies when (?P<file>\S+\.py) says `(?P<mistake>.+?)` for `(?P<right>.+?)`\.$")
TEST = re.compile(r"def (test_\w+)\(")


class Planted(NamedTuple):
    """A change, and the test above which it stands."""

    path: Path
    test: str
    file: str
    mistake: str
    right: str


def planted(path: Path) -> Iterator[Planted]:
    said: list[tuple[str, str, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("# Dies when"):
            found = SAID.match(line)
            assert found, f"{path.name}: cannot read {line!r}"
            said.append((found["file"], found["mistake"], found["right"]))
        elif test := TEST.match(line):
            for change in said:
                yield Planted(path, test[1], *change)
            said = []


ALL = [one for path in FILES if path != Path(__file__) for one in planted(path)]


def test_the_changes_are_to_lines_that_are_there() -> None:
    gone = [one for one in ALL if one.right not in (SOURCE / "splitwise_llm" / one.file).read_text()]
    assert len(ALL) > 60
    assert not gone


@pytest.mark.long
@pytest.mark.parametrize("one", ALL, ids=lambda one: f"{one.test}-{one.file}")
def test_a_planted_mistake_is_found(one: Planted, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    changed = tmp_path / "src/splitwise_llm" / one.file
    changed.write_text(changed.read_text().replace(one.right, one.mistake))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", f"{one.path}::{one.test}", "-x", "-p", "no:cacheprovider"],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, f"{one.test} lives on with {one.mistake!r} for {one.right!r}:\n{run.stdout}{run.stderr}"
