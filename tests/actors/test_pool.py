"""The pool over a real Ray cluster and a tiny model: same numbers as one shard, and nothing lost when actors die."""

from dataclasses import replace

import pytest
import torch

from autoprune.actors.placement import ActorResources
from autoprune.actors.pool import EvaluatorPool, PoolPlan, shard_bounds
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.models.shard import ModelShard

pytestmark = pytest.mark.usefixtures("cluster")

WANDA = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm\n", "row")
JOBS = [
    WANDA,
    replace(WANDA, allocation=Allocation("sdsa")),
    replace(WANDA, group="matrix"),
    Algorithm("def score(W):\n    return W.abs()\n", "matrix"),
]
POISON = Algorithm("def score(W, x_norm):\n    return W.abs() / (x_norm - x_norm)\n")


def windows(seed: int, count: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def start(tiny_model):
    pools = []

    def pool(**changes) -> EvaluatorPool:
        plan = PoolPlan(
            model=str(tiny_model),
            blocks=4,
            shards=2,
            replicas=1,
            threads=1,
            dtype="float32",
            sparsity=0.5,
            splits={"calibration": windows(1), "fitness": windows(2), "report": windows(3)},
            deadline=60.0,
            attempts=2,
            resources=ActorResources(0.25, 0, "cpu"),
        )
        pools.append(EvaluatorPool(replace(plan, **changes)))
        pools[-1].start()
        return pools[-1]

    yield pool
    for pool in pools:
        pool.stop()


def reference(folder) -> tuple[list[float], float]:
    """The uniform jobs' NLL, measured in this process by one shard that holds the whole model; and the dense one."""
    shard = ModelShard(folder, 0, 4, "float32", "cpu")
    shard.calibrate(windows(1))
    text = windows(2)
    reports = [shard.forward("fitness", text, text, job, [0.5] * 4)[1] for job in (JOBS[0], JOBS[2], JOBS[3])]
    dense = shard.forward("fitness", text, text)[1]
    nlls = [sum(report.window_nlls) / 4 for report in (*reports, dense)]
    return nlls[:-1], nlls[-1]


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_every_way_to_shard_gives_the_same_numbers(start, tiny_model, shards, replicas):
    pool = start(shards=shards, replicas=replicas)
    uniform, dense = reference(tiny_model)
    assert pool.dense["fitness"].nll == pytest.approx(dense, rel=1e-5)
    results = dict(pool.evaluate(JOBS))
    assert sorted(results) == [0, 1, 2, 3]
    assert [results[index].nll for index in (0, 2, 3)] == pytest.approx(uniform, rel=1e-5)
    for evaluation in results.values():
        assert evaluation.error is None
        assert evaluation.tokens == 4 * 23
        assert evaluation.sparsity == pytest.approx(0.5, abs=1 / 32)
        assert len(evaluation.block_errors) == len(evaluation.block_sparsities) == 4
    assert len(set(results[1].block_sparsities)) > 1, "sdsa gives blocks different sparsities"


def test_an_algorithm_that_raises_fails_alone(start):
    pool = start()
    results = dict(pool.evaluate([WANDA, POISON, JOBS[3]]))
    assert "not finite" in results[1].error
    assert results[1].nll is None
    assert results[0].error is None and results[2].error is None
    assert pool.restarts == 0


def test_a_dead_actor_is_replaced_and_nothing_is_lost(start):
    import ray

    pool = start()
    expected = {index: evaluation.nll for index, evaluation in pool.evaluate(JOBS)}
    for victim in (0, 1):
        ray.kill(pool._replicas[0].actors[victim])
        results = {index: evaluation.nll for index, evaluation in pool.evaluate(JOBS)}
        assert results == pytest.approx(expected)
    assert pool.restarts == 2


def test_a_deadline_gives_a_candidate_up_after_its_attempts(start):
    pool = start(deadline=1e-6, attempts=2)
    results = list(pool.evaluate([WANDA]))
    assert [index for index, _ in results] == [0]
    assert results[0][1].error is None or "given up after 2 attempts" in results[0][1].error
    pool.plan = replace(pool.plan, deadline=60.0)
    assert [evaluation.error for _, evaluation in pool.evaluate([WANDA])] == [None]


def test_probes_run_in_evaluators(start):
    good, bad = start().probe([WANDA, Algorithm("def score(W):\n    return W.abs() * 0\n")])
    assert good.error is None and len(good.mask_hash) == 16
    assert bad.error and not bad.mask


@pytest.mark.parametrize(("blocks", "shards"), [(30, 2), (30, 4), (7, 7), (5, 3)])
def test_shard_bounds_cover_every_block_once(blocks, shards):
    bounds = shard_bounds(blocks, shards)
    assert [block for start, stop in bounds for block in range(start, stop)] == list(range(blocks))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1
