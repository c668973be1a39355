"""Equal sessions side by side: what they make of the machines and links that all of them use, by a closed form.

Their loops are closed: each comes back a round trip after it has left. Sessions that meet at a machine leave it one
after another, and so do not meet there again, as long as it has a gap for each of them: then it computes them one by
one and none waits. Where it has not, it computes together as many as it takes to keep up. The same holds for a link,
which cannot take several at once: where they fill it, they wait for it.
"""

from __future__ import annotations

from splitwise_llm.cost.bill import bill
from splitwise_llm.cost.terms import Form, Load
from splitwise_llm.cost.world import Job, World
from splitwise_llm.decision import Decision
from splitwise_llm.errors import RequestError


def crowded(world: World, decision: Decision, job: Job, sessions: int) -> Form:
    """The conditions under which each of so many equal sessions decodes, everything else idle.

    They say nothing of prompts, which take turns. Raises PartitionError, RequestError.
    """
    if sessions < 1:
        raise RequestError(f"{sessions} sessions side by side; expected at least 1")
    one, basis = bill(world, decision, job), world.basis
    together = dict.fromkeys(decision.partition.machines, 1)
    while True:
        loads = {machine: _load(world, decision, job, machine, batch) for machine, batch in together.items()}
        x = world.conditions(loads)
        token_s = float(one.tpot.at(x))
        behind = [
            machine
            for machine, batch in together.items()
            if batch < sessions and sessions / batch * loads[machine].slow * one.token_busy_s[machine] > token_s
        ]
        if not behind:
            break
        together[behind[0]] += 1
    for lane, size in one.token_bytes.items():
        late_s = sessions * size * float(x[basis.inverse(*lane)]) - float(one.tpot.at(x))
        if late_s > 0:
            x[basis.inverse(*lane)] += late_s / size
    return x


def _load(world: World, decision: Decision, job: Job, machine: int, batch: int) -> Load:
    rested = len(decision.partition.machines) > 1
    load = world.load(machine, batch, context=job.mean_context, rested=rested)
    return Load(load.slow, batch)  # who waits for an iteration is counted by it
