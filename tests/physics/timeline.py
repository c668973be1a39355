"""A second account of when a plan is done: tasks on machines and links that do one thing at a time, first come,
first served. It shares with the cost model what a stage takes a machine, and what a move weighs; nothing else."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from splitwise_llm.cost import World, stage_seconds
from splitwise_llm.plan import DEVICE, Kind, Move, Plan, Serial, Shared, Step

Resource = tuple[int, ...] | None


@dataclass
class Task:
    """Occupies a machine `(m,)` or a link `(src, dst)`, or nothing; what follows starts `latency_s` after its end."""

    chunk: int
    resource: Resource
    seconds: float
    latency_s: float
    after: list[int]
    followers: list[int] = field(default_factory=list)


class Timeline:
    """The tasks of some steps of a plan, each step beginning at 0."""

    def __init__(self, world: World, plan: Plan, steps: Sequence[Step], contended: bool) -> None:
        self.world, self.plan, self.contended = world, plan, contended
        self.tasks: list[Task] = []
        self._last: dict[tuple[int, int], int] = {}
        self.ends = [self._step(step) for step in steps]

    def _task(self, step: Step, resource: Resource, seconds: float, after: list[int], latency_s: float = 0.0) -> int:
        kept = resource if self.contended or (resource and len(resource) == 1) else None
        self.tasks.append(Task(step.index, kept, seconds, latency_s, after))
        for earlier in after:
            self.tasks[earlier].followers.append(len(self.tasks) - 1)
        return len(self.tasks) - 1

    def _message(self, step: Step, move: Move, after: list[int]) -> list[int]:
        """Leg by leg; a leg occupies its direction of a link while it is written."""
        size = self.plan.payload_bytes(move, step)
        for src, dst in self.plan.legs(move.src, move.dst):
            link = self.world.links[min(src, dst), max(src, dst)]
            rate = link.up_bytes_per_s if src < dst else link.down_bytes_per_s
            software_s = sum(self.world.hosts[m].message_s(size) for m in (src, dst))
            after = [self._task(step, (src, dst), size / rate, after, link.rtt_s / 2 + software_s)]
        return after

    def _step(self, step: Step) -> list[int]:
        """Tasks that a step has ended with: the token where the next one begins, or the first at the device."""
        plan = self.plan
        here: dict[int, list[int]] = {plan.embed: []}
        for move in plan.moves:
            if move.kind in (Kind.PROMPT, Kind.NEXT) and plan.rows(move, step):
                here = {plan.embed: self._message(step, move, [])}
        for index, stage in enumerate(plan.stages):
            if isinstance(stage, Serial) and stage.is_head_only and not step.emits:
                break
            moves = [move for move in plan.moves_after(index) if plan.rows(move, step)]
            done = {}
            for machine in stage.machines:
                before = [self._last[index, machine]] if (index, machine) in self._last else []
                seconds = stage_seconds(self.world.spec, self.world.hosts[machine], stage, machine, step)
                done[machine] = self._task(step, (machine,), seconds, here[machine] + before)
                self._last[index, machine] = done[machine]
            if isinstance(stage, Shared):
                gathered = {machine: [done[machine]] for machine in plan.joiners[index]}
                for move in moves:
                    if move.kind is Kind.PARTIAL:
                        gathered[move.dst] += self._message(step, move, [done[move.src]])
                done = {machine: self._task(step, None, 0.0, after) for machine, after in gathered.items()}
            here = {machine: [task] for machine, task in done.items()}
            for move in moves:
                if move.kind is Kind.RESIDUAL:
                    here[move.dst] = self._message(step, move, [done[move.src]])
        ends = [task for tasks in here.values() for task in tasks]
        token = [move for move in plan.moves if move.kind is Kind.TOKEN and plan.rows(move, step)]
        if token and (step.is_prefill or plan.embed != plan.head):
            ends = self._message(step, token[0], here[plan.head])
        return ends

    def finish_s(self) -> float:
        """When the last step has ended."""
        waiting = [len(task.after) for task in self.tasks]
        ready_s = [0.0] * len(self.tasks)
        left_s = [0.0] * len(self.tasks)
        free_s: dict[Resource, float] = {}
        queue = [(0.0, task.chunk, number) for number, task in enumerate(self.tasks) if not task.after]
        heapq.heapify(queue)
        while queue:
            now, _, number = heapq.heappop(queue)
            task = self.tasks[number]
            start = max(now, free_s.get(task.resource, 0.0)) if task.resource else now
            free_s[task.resource] = start + task.seconds
            left_s[number] = start + task.seconds + task.latency_s
            for follower in task.followers:
                ready_s[follower] = max(ready_s[follower], left_s[number])
                waiting[follower] -= 1
                if not waiting[follower]:
                    heapq.heappush(queue, (ready_s[follower], self.tasks[follower].chunk, follower))
        return max(left_s[number] for number in self.ends[-1])


def first_token_s(world: World, plan: Plan, prompt_tokens: int, contended: bool = True) -> float:
    """All prefill chunks offered at once, until the device has the first token."""
    chunks = plan.decision.num_chunks(prompt_tokens)
    return Timeline(world, plan, [plan.step(n, prompt_tokens) for n in range(chunks)], contended).finish_s()


def token_s(world: World, plan: Plan, step: Step, contended: bool = False) -> float:
    """One decode step, from the token where the embedding is to the next one there."""
    assert DEVICE == 0
    return Timeline(world, plan, [step], contended).finish_s()
