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
    numels, sparsity = pool.numels, min(sparsity, MOST)
    costs: dict[int, float | None] = {}
    dense = subset_nll(pool.dense["fitness"], windows)
    split = f"fitness[{','.join(map(str, windows))}]"
    for numel in sorted(set(numels)):  # blocks of one size together, so that all evaluators have work
        blocks = [block for block, other in enumerate(numels) if other == numel]
        alone = [
            replace(algorithm, allocation=Allocation("explicit", values=_only(block, len(numels), sparsity)))
            for block in blocks
        ]
        # The share of all weights: then the values are met as they are.
        for index, evaluation in pool.evaluate(alone, split, sparsity * numel / sum(numels)):
            costs[blocks[index]] = None if evaluation.nll is None else evaluation.nll - dense
            step(len(costs), len(numels))
    found = [costs[block] for block in range(len(numels))]
    return None if None in found else found


def _only(block: int, blocks: int, sparsity: float) -> tuple[float, ...]:
    return tuple(sparsity if other == block else 0.0 for other in range(blocks))
