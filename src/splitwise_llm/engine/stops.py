"""What one machine has to do at each stage of a plan: what comes, what leaves, what it keeps. It does none of it."""

from __future__ import annotations

from dataclasses import dataclass

from splitwise_llm.plan import Kind, Move, Plan, Serial, Stage


@dataclass(frozen=True, slots=True)
class Stop:
    """One stage of the plan as this machine takes part in it, worked out once per run."""

    index: int
    stage: Stage
    arrives: Move | None
    """The residual stream comes with this move; None: it is here already."""
    partials_out: tuple[Move, ...]
    partials_in: tuple[Move, ...]
    joins: bool
    residuals_out: tuple[Move, ...]
    crossing: Move | None
    """A move of the residual stream after this stage, whoever sends it: all copies become what it carries."""
    goes_on: bool
    """Whether this machine keeps its copy: it has a part in the next stage, and the stream does not come to it."""
    last_only: bool
    """Only the last position of the last chunk matters after this stage."""
    only_if_emits: bool
    """A head without layers, which has nothing to do in an earlier chunk."""


def stops(plan: Plan, me: int) -> tuple[Stop, ...]:
    """Of machine `me`, in the order of the plan."""
    found: list[Stop] = []
    for index, stage in enumerate(plan.stages):
        if me not in stage.machines:
            continue
        moves = plan.moves_after(index)
        residuals = [move for move in moves if move.kind is Kind.RESIDUAL]
        partials = [move for move in moves if move.kind is Kind.PARTIAL]
        here = [m for m in plan.moves_after(index - 1) if m.kind is Kind.RESIDUAL and m.dst == me]
        found.append(
            Stop(
                index,
                stage,
                arrives=here[0] if here else None,
                partials_out=tuple(move for move in partials if move.src == me),
                partials_in=tuple(move for move in partials if move.dst == me),
                joins=me in plan.joiners[index],
                residuals_out=tuple(move for move in residuals if move.src == me),
                crossing=residuals[0] if residuals else None,
                goes_on=_goes_on(plan, index, me),
                last_only=any(move.last_only for move in moves),
                only_if_emits=isinstance(stage, Serial) and stage.is_head_only,
            )
        )
    return tuple(found)


def _goes_on(plan: Plan, index: int, me: int) -> bool:
    return index + 1 < len(plan.stages) and me in plan.stages[index + 1].machines
