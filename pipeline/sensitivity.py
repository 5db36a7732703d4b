"""What pruning each decoder block alone costs: which blocks a model can spare least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.screening import subset_nll

if TYPE_CHECKING:
    from autoprune.actors.pool import EvaluatorPool

MOST = 0.9  # an allocation leaves every block a tenth of the mean retention, which is nearly 1 here


def sensitivity(
    pool: EvaluatorPool,
    algorithm: Algorithm,
    sparsity: float,
    windows: tuple[int, ...],
    step: Callable[[int, int], None],
) -> list[float] | None:
    """Nats per token above the dense model, for each block, where that block alone is pruned to `sparsity`, MOST at
    most, by the algorithm's score and group, on some windows of the fitness split. None where a block cannot be
    measured."""
    numels, costs, sparsity = pool.numels, [], min(sparsity, MOST)
    dense = subset_nll(pool.dense["fitness"], windows)
    split = f"fitness[{','.join(map(str, windows))}]"
    for block, numel in enumerate(numels):
        shares = tuple(sparsity if other == block else 0.0 for other in range(len(numels)))
        alone = replace(algorithm, allocation=Allocation("explicit", values=shares))
        # The share of all weights: then the values are met as they are.
        ((_, evaluation),) = pool.evaluate([alone], split, sparsity * numel / sum(numels))
        if evaluation.nll is None:
            return None
        costs.append(evaluation.nll - dense)
        step(block + 1, len(numels))
    return costs
