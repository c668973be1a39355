"""The same function for many numbers, on several processes that inherit all it holds: only results travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")

_INHERITED: Callable[[int], Any] | None = None


def in_forks(function: Callable[[int], T], count: int, processes: int) -> Iterator[T]:
    """`function` of 0 to `count` - 1 in order, each as soon as it and those before are there. One process: this one."""
    if processes == 1:
        yield from map(function, range(count))
        return
    global _INHERITED  # noqa: PLW0603 - what forks inherit
    _INHERITED = function
    with ProcessPoolExecutor(min(processes, count), get_context("fork")) as pool:
        yield from pool.map(_call, range(count))


def _call(number: int) -> Any:
    assert _INHERITED is not None
    return _INHERITED(number)


__all__ = ["in_forks"]
