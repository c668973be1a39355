"""Everything that bars are decided by, from one folder: the grid, the small cases, stability. It judges nothing."""

from __future__ import annotations

from splitwise_llm.bench.bars import Evidence
from splitwise_llm.bench.scenarios import Grid, Results, Tell
from splitwise_llm.bench.stability import run_stability
from splitwise_llm.bench.variants import LEARNED, OURS, chooser_of, digest_of
from splitwise_llm.bench.yardsticks import ROWS, causal_rows
from splitwise_llm.cost import Limits
from splitwise_llm.errors import ModelError
from splitwise_llm.observation import PLAIN


def gather(grid: Grid, results: Results, tell: Tell) -> Evidence:
    """Run what the grid does not have, unless it is quick; what is kept is not run again."""
    cells = tuple(results.cells)
    if grid.quick:
        return Evidence(results.outcomes, cells, in_rows="not run: leave out --quick")
    try:
        chooser_of(OURS, PLAIN, Limits(), 0.0, {})
    except ModelError as error:
        return Evidence(results.outcomes, cells, in_rows=f"not run: {error}")
    rows = causal_rows(tell, ROWS, learned=LEARNED[:2], shelf=grid.shelf)

    def stability() -> dict[str, float]:
        return run_stability(False, tell, OURS).figures

    figures = grid.shelf.or_made("stability", stability, digest_of(OURS, {}))
    return Evidence(results.outcomes, cells, rows, figures)


__all__ = ["gather"]
