"""The environment of `env` on several processes: each simulates some of the courses. The worlds are the same."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitwise_llm.errors import BrokenInvariant
from splitwise_llm.learn.courses import Course
from splitwise_llm.learn.env import CourseEnv, Learnable


def _serve(
    pipe: Connection, numbered: Sequence[tuple[int, Course]], worlds: int, seed: int, requests: int, pool: int
) -> None:
    """Until the pipe closes: answer each call of a method with what it returned, and what all look at."""
    numbers = [number for number, _ in numbered]
    env = CourseEnv([course for _, course in numbered], worlds, seed, requests, pool, numbers)
    while True:
        try:
            name, given = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        result = getattr(env, name)(*given)
        pipe.send((result, env.action_masks(), env.discounts, env.low, env.high, env.decisions, env.kept))


class ParallelEnv(Learnable):
    """As `CourseEnv`; `close` it, and its processes end."""

    def __init__(
        self, courses: Sequence[Course], worlds: int, seed: int, requests: int, processes: int, pool: int = 0
    ) -> None:
        super().__init__(worlds * len(courses))
        context = multiprocessing.get_context("fork")
        numbered = list(enumerate(courses))
        self._mine = [
            np.concatenate([np.arange(n * worlds, (n + 1) * worlds) for n, _ in part])
            for part in (numbered[first::processes] for first in range(processes))
            if part
        ]
        self._numbers = [[n for n, _ in numbered[first::processes]] for first in range(len(self._mine))]
        self._pipes, self._processes = [], []
        for first in range(len(self._mine)):
            ours, theirs = context.Pipe()
            args = (theirs, numbered[first::processes], worlds, seed, requests, pool)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _call(self, name: str, given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """A method of every part, with what each is given; raises BrokenInvariant where a process has died."""
        for pipe, what in zip(self._pipes, given, strict=True):
            pipe.send((name, what))
        results = []
        self.decisions = self.kept = 0
        for pipe, mine in zip(self._pipes, self._mine, strict=True):
            try:
                result, masks, discounts, low, high, decisions, kept = pipe.recv()
            except EOFError as error:
                raise BrokenInvariant("a process that simulates courses has died; its message is above") from error
            results.append(result)
            self._masks[mine], self.discounts[mine] = masks, discounts
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            self.decisions, self.kept = self.decisions + decisions, self.kept + kept
        return results

    def reset(self) -> NDArray[np.float32]:
        return self._joined(self._call("reset", [()] * len(self._pipes)))

    def step_wait(self) -> Any:
        parts = self._call("play", [(self._actions[mine],) for mine in self._mine])
        seen, reward, over = (self._joined([part[n] for part in parts]) for n in range(3))
        return seen, reward, over, [{} for _ in range(self.num_envs)]

    def gains(self) -> list[float]:
        result = [float("nan")] * sum(map(len, self._numbers))
        for numbers, each in zip(self._numbers, self._call("gains", [()] * len(self._pipes)), strict=True):
            for number, one in zip(numbers, each, strict=True):
                result[number] = one
        return result

    def _joined(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        whole = np.empty((self.num_envs, *parts[0].shape[1:]), parts[0].dtype)
        for mine, part in zip(self._mine, parts, strict=True):
            whole[mine] = part
        return whole

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()


__all__ = ["ParallelEnv"]
