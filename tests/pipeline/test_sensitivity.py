"""What pruning a block alone costs: that block is pruned to the share that was asked for, and no other one."""

import pytest
from local import LocalEvaluator

from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.screening import subset_nll
from autoprune.pipeline.sensitivity import MOST, sensitivity

SCORE = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm\n", "matrix")


class Watched(LocalEvaluator):
    """As the pool; keeps what was measured."""

    @property
    def numels(self):
        return [profile.numel for profile in self._profiles]

    def evaluate(self, jobs, split="fitness", sparsity=None):
        self.calls += 1
        for index, evaluation in super().evaluate(jobs, split, sparsity):
            self.seen.append((split, evaluation))
            yield index, evaluation


@pytest.mark.parametrize("asked", [0.3, 0.6, 0.95])
def test_one_block_is_pruned_at_a_time(tiny_model, asked):
    pool, steps = Watched(tiny_model, 0.5), []
    pool.seen, pool.calls = [], 0
    costs = sensitivity(pool, SCORE, asked, (0, 2), lambda *step: steps.append(step))
    assert len(costs) == len(pool.seen) == 4 and steps == [(done, 4) for done in range(1, 5)]
    # In whatever order they were measured: the one with the largest share is the one that was pruned.
    seen = {e.block_sparsities.index(max(e.block_sparsities)): (split, e) for split, e in pool.seen}
    for block in range(4):
        split, evaluation = seen[block]
        shares = evaluation.block_sparsities
        assert split == "fitness[0,2]" and shares[block] == pytest.approx(min(asked, MOST), abs=0.01)
        assert all(share < 1e-3 for other, share in enumerate(shares) if other != block)
        assert costs[block] == evaluation.nll - subset_nll(pool.dense["fitness"], (0, 2))
    assert pool.calls == 1, "blocks of one size are given to the evaluators together"
