"""The pool over a real Ray cluster and a tiny model: same numbers as one shard, and nothing lost when actors die."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from autoprune.actors.dispatch import TRIES
from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.placement import ActorResources
from autoprune.actors.pool import EvaluatorPool
from autoprune.actors.replica import PoolPlan, Replica
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.errors import Lost
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ModelShard

pytestmark = pytest.mark.usefixtures("cluster")

WANDA = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm\n", "row")
JOBS = [
    WANDA,
    replace(WANDA, allocation=Allocation("sdsa")),
    replace(WANDA, group="matrix"),
    Algorithm("def score(W):\n    return W.abs()\n", "matrix"),
    Algorithm("def score(W, h_inv_diag, g_rms):\n    return W.square() / h_inv_diag * g_rms\n"),
]
STATISTICS = frozenset({"x_norm", "h_inv_diag", "g_rms"})
POISON = Algorithm("def score(W, x_norm):\n    return W.abs() / (x_norm - x_norm)\n")


def windows(seed: int, count: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


def make_pool(model, actor=EvaluatorShard, **changes) -> EvaluatorPool:
    plan = PoolPlan(
        model=str(model),
        bounds=((0, 2), (2, 4)),
        replicas=1,
        threads=1,
        dtype="float32",
        sparsity=0.5,
        splits={"calibration": windows(1), "fitness": windows(2), "report": windows(3)},
        statistics=STATISTICS,
        features=frozenset(),
        deadline=60.0,
        attempts=2,
        resources=ActorResources(0.25, 0, "cpu"),
    )
    pool = EvaluatorPool(replace(plan, **changes), actor=actor)
    pool.start()
    return pool


def marked() -> type:
    # Within a function, so that it travels to the actors, which have no module of this name.
    class Marked(EvaluatorShard):
        """Leaves a file behind when it calibrates; scores with certain numbers in them bring it down."""

        def calibrate(self, states, statistics, features):
            (Path(self._storage.local) / f"calibrated-{self.shard.model.start}").touch()
            return super().calibrate(states, statistics, features)

        def forward(self, split, states, tokens, algorithm, sparsities):
            if algorithm and "666" in algorithm.score:
                os.kill(os.getpid(), signal.SIGKILL)
            if algorithm and "777" in algorithm.score:
                raise MemoryError("77 GiB")
            return super().forward(split, states, tokens, algorithm, sparsities)

    return Marked


@pytest.fixture(scope="module")
def pool(tiny_model, cluster):
    """Two shards, shared: starting actors takes longer than what the tests do with them."""
    pool = make_pool(tiny_model)
    yield pool
    pool.stop()


def reference(folder) -> tuple[list[float], float]:
    """The uniform jobs' NLL, measured in this process by one shard that holds the whole model; and the dense one."""
    shard = ModelShard(folder, 0, 4, "float32", "cpu")
    shard.calibrate(windows(1), STATISTICS)
    shard.backward(windows(1))
    text = windows(2)
    uniform = (JOBS[0], *JOBS[2:])
    reports = [shard.forward("fitness", text, text, job, [[0.5] * 7] * 4)[1] for job in uniform]
    dense = shard.forward("fitness", text, text)[1]
    nlls = [sum(report.window_nlls) / 4 for report in (*reports, dense)]
    return nlls[:-1], nlls[-1]


@pytest.mark.parametrize(("bounds", "replicas"), [(((0, 4),), 1), (((0, 3), (3, 4)), 2)])
def test_every_way_to_shard_gives_the_same_numbers(tiny_model, bounds, replicas):
    pool = make_pool(tiny_model, bounds=bounds, replicas=replicas)
    try:
        check_numbers(pool, tiny_model)
    finally:
        pool.stop()


def check_numbers(pool: EvaluatorPool, model) -> None:
    uniform, dense = reference(model)
    assert pool.dense["fitness"].nll == pytest.approx(dense, rel=1e-5)
    results = dict(pool.evaluate(JOBS))
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert [results[index].nll for index in (0, 2, 3, 4)] == pytest.approx(uniform, rel=1e-5)
    for evaluation in results.values():
        assert evaluation.error is None
        assert evaluation.tokens == 4 * 23
        assert evaluation.sparsity == pytest.approx(0.5, abs=1 / 32)
        assert len(evaluation.block_errors) == len(evaluation.block_sparsities) == 4
    assert len(set(results[1].block_sparsities)) > 1, "sdsa gives blocks different sparsities"


def test_some_windows_of_a_split_and_another_sparsity(pool):
    ((_, whole),) = pool.evaluate([WANDA])
    ((_, part),) = pool.evaluate([WANDA], "fitness[3,1]")
    assert part.window_nlls == pytest.approx((whole.window_nlls[3], whole.window_nlls[1]), rel=1e-5)
    assert part.tokens == 2 * 23 and part.block_sparsities == whole.block_sparsities
    ((_, more),) = pool.evaluate([WANDA], sparsity=0.75)
    assert more.sparsity == pytest.approx(0.75, abs=1 / 32)


def test_an_algorithm_that_raises_fails_alone(pool):
    before = pool.restarts
    results = dict(pool.evaluate([WANDA, POISON, JOBS[3]]))
    assert "not finite" in results[1].error
    assert results[1].nll is None
    assert results[0].error is None and results[2].error is None
    assert pool.restarts == before


def test_layers_share_by_gradients_and_what_does_not_fit_the_model_fails_alone(pool, tiny_model):
    """The shares of both shards are those of the whole model."""
    taylor = replace(WANDA, allocation=Allocation("sdsa", {"taylor": 0.5}))
    misfit = replace(WANDA, allocation=Allocation("explicit", values=(0.5, 0.5)))
    found = dict(pool.evaluate([misfit, taylor, misfit]))
    assert found[0].error == found[2].error and "expected 4 values, one sparsity per block, got 2" in found[0].error
    shard = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    shard.calibrate(windows(1), STATISTICS)
    shard.backward(windows(1))
    planned = planned_sparsities(taylor, shard.profiles, 0.5)
    assert len({round(s, 6) for s in planned[0]}) > 1
    nlls = shard.forward("fitness", windows(2), windows(2), taylor, planned)[1].window_nlls
    assert found[1].error is None and found[1].nll == pytest.approx(sum(nlls) / 4, rel=1e-5)


def test_an_allocation_of_a_candidate_s_own_runs_in_an_evaluator(pool, monkeypatch):
    """It does what the rule of the same content does; one that fails on the real model fails alone."""
    own = replace(WANDA, allocation=Allocation("written", source=WRITTEN_ALLOCATIONS["sdsa"]))
    body = "return 1 / (profile.numel - profile.numel)"
    bad = replace(WANDA, allocation=Allocation("written", source=f"def allocate(profile, sparsity):\n    {body}\n"))
    before = pool.restarts
    monkeypatch.setattr("autoprune.algorithms.allocation.parse_allocation", lambda _: pytest.fail("ran in the driver"))
    results = dict(pool.evaluate([own, bad, JOBS[1]]))
    assert results[0].nll == results[2].nll and results[0].block_sparsities == results[2].block_sparsities
    assert "allocate must return retentions" in results[1].error and pool.restarts == before


def test_a_dead_actor_is_replaced_and_nothing_is_lost(pool):
    import ray

    expected = {index: evaluation.nll for index, evaluation in pool.evaluate(JOBS)}
    before = pool.restarts
    for victim in (0, 1):
        ray.kill(pool._replicas[0].actors[victim])
        results = {index: evaluation.nll for index, evaluation in pool.evaluate(JOBS)}
        assert results == pytest.approx(expected)
    assert pool.restarts == before + 2


@pytest.mark.parametrize(("attempts", "lost"), [(1, [0]), (2, [])])
def test_a_hanging_actor_is_replaced_at_the_deadline(pool, attempts, lost):
    """The oldest candidate in flight is the suspect: lost after its attempts, otherwise sent again like the others."""
    plan, before = pool.plan, pool.restarts
    pool._replicas[0].actors[0].__ray_call__.remote(lambda self: time.sleep(600))
    pool.plan = replace(plan, deadline=5.0, attempts=attempts)
    results = dict(pool.evaluate([WANDA] * 3))
    pool.plan = plan
    assert sorted(results) == [0, 1, 2]
    assert pool.restarts == before + 1
    assert [index for index in results if results[index].error] == lost
    for index in lost:
        assert results[index].poison and "its evaluator 1 times (TimeoutError)" in results[index].error
        assert results[index].traceback == "no result within 5 s"


@pytest.fixture(scope="module")
def two(tiny_model, cluster, tmp_path_factory):
    """Two replicas of one shard each, which keep what they learn."""
    pool = make_pool(
        tiny_model, marked(), bounds=((0, 4),), replicas=2, state=str(tmp_path_factory.mktemp("state")), deadline=30.0
    )
    yield pool
    pool.stop()


def test_what_one_replica_learned_is_taken_up_by_all_and_by_the_next_pool(two, tiny_model):
    """Also with numbers: to the bit."""
    import ray

    state = Path(two.plan.state)
    assert (state / "calibrated-0").exists()
    (state / "calibrated-0").unlink()
    expected = dict(two.evaluate(JOBS))
    again = make_pool(tiny_model, marked(), bounds=((0, 4),), state=str(state))
    try:
        found = dict(again.evaluate(JOBS))
        assert {i: e.window_nlls for i, e in found.items()} == {i: e.window_nlls for i, e in expected.items()}
        assert again.dense["report"].window_nlls == two.dense["report"].window_nlls
        ray.kill(again._replicas[0].actors[0])
        ((_, after),) = again.evaluate(JOBS[:1])
        assert after.window_nlls == expected[0].window_nlls
    finally:
        again.stop()
    assert not (state / "calibrated-0").exists()


@pytest.mark.parametrize("number, error", [(666, "ActorDiedError"), (777, "RayTaskError")])
def test_poison_brings_down_its_own_evaluator_and_no_other_candidate(two, number, error):
    poison = Algorithm(f"def score(W):\n    return W.abs() * {number}\n")
    before = two.restarts
    results = dict(two.evaluate([WANDA, poison, *JOBS]))
    assert sorted(results) == list(range(len(JOBS) + 2))
    assert results[1].poison and error in results[1].error and len(results[1].traceback) > len(error)
    assert all(results[i].error is None for i in results if i != 1)
    assert two.restarts == before + two.plan.attempts


def test_the_others_work_on_while_a_replica_is_made_anew(two, monkeypatch):
    """It stays away for as long as its start takes: nothing waits for it."""
    import ray

    started, real = [], Replica.advance

    def never(self, timeout=0.0):
        return "waiting" if self in started else real(self, timeout)

    monkeypatch.setattr(Replica, "advance", never)
    monkeypatch.setattr(Replica, "start", lambda self, start=Replica.start: (started.append(self), start(self)))
    ray.kill(two._replicas[1].actors[0])
    results = dict(two.evaluate(JOBS * 2))
    assert len(results) == 2 * len(JOBS) and all(e.error is None for e in results.values())
    assert started == [two._replicas[1]]
    monkeypatch.undo()
    deadline = time.monotonic() + 60
    while len(two._in_service()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(two._in_service()) == 2, "it comes back once it may"
    assert len(dict(two.evaluate(JOBS))) == len(JOBS)


def test_an_evaluator_that_comes_back_with_another_model_gets_no_work(tiny_model, two, monkeypatch):
    import ray

    while two._starting:  # after the test before
        two._look_after(0.2)
    said = []
    monkeypatch.setattr(two, "_report", said.append)
    monkeypatch.setattr(two, "_digest", ["other"])
    for name, value in {"TRIES": 2, "PAUSES": (0.0,)}.items():  # a start takes longer than all else here
        monkeypatch.setattr(f"autoprune.actors.pool.{name}", value)
    for replica in two._replicas:
        ray.kill(replica.actors[0])
    with pytest.raises(Lost, match="no evaluator could be started, after 2 tries .*it came with another model"):
        dict(two.evaluate(JOBS))
    assert sum("another model" in line for line in said) >= 1
    monkeypatch.undo()
    monkeypatch.setattr("autoprune.actors.pool.PAUSES", (0.0,) * (TRIES - 1))
    assert len(dict(two.evaluate(JOBS))) == len(JOBS)


def test_candidates_run_without_the_credentials_of_the_driver(tiny_model, pool):
    """What the cluster's processes inherited or were given is gone, in new actors as well; the rest is there."""
    import ray

    secrets = {"HF_TOKEN": "a", "AWS_SECRET_ACCESS_KEY": "b", "RAY_JOB_CONFIG_JSON_ENV_VAR": "c", "CUSTOMER": "d"}

    def names(_):
        import os

        return set(os.environ)

    class Given(EvaluatorShard):
        def __init__(self, *arguments, alone):
            import os

            os.environ |= secrets
            super().__init__(*arguments, alone=alone)

    given = ray.remote(Given).options(num_cpus=0.25)
    for alone in (False, True):
        actor = given.remote(str(tiny_model), 0, 4, "float32", "cpu", 1, alone=alone)
        left = ray.get(actor.__ray_call__.remote(names))
        assert secrets.keys() & left == (set() if alone else secrets.keys()) and {"PATH", "HOME"} <= left
        ray.kill(actor)
    for shard in pool._replicas[0].actors:
        left = ray.get(shard.__ray_call__.remote(names))
        assert "PYTEST_CURRENT_TEST" not in left and "PATH" in left


def test_probes_run_in_evaluators(pool):
    good, bad = pool.probe([WANDA, Algorithm("def score(W):\n    return W.abs() * 0\n")])
    assert good.error is None and len(good.mask_hash) == 16
    assert bad.error and not bad.mask


def test_machines_that_share_no_folder_hand_their_parts_over(tiny_model, tmp_path, monkeypatch):
    """Each shard two files, since none may be larger than memory."""
    monkeypatch.setattr("autoprune.models.export.PART_BYTES", checkpoint_bytes(tiny_model) / 3)

    def elsewhere() -> type:
        class Elsewhere(EvaluatorShard):
            def __init__(self, *arguments, **options):
                from autoprune.actors import evaluator

                evaluator.PIECE = 1000
                super().__init__(*arguments, **options)

            def _sees(self, folder):
                return False

        return Elsewhere

    parts = []
    for name, actor in (("shared", EvaluatorShard), ("apart", elsewhere())):
        pool = make_pool(tiny_model, actor)
        sidecar = pool.export(tmp_path / name, JOBS[1], {"candidate": "c"})
        kept = ray.get(
            [one.__ray_call__.remote(lambda self: str(getattr(self, "_parts", ""))) for one in pool._replicas[0].actors]
        )
        assert not any(Path(path).exists() for path in kept if path), "a copy stayed behind"
        assert any(kept) == (name == "apart")
        pool.stop()
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        parts.append((sidecar, {file: (tmp_path / name / file).read_bytes() for file in files}))
    assert parts[0] == parts[1]
    assert sum(name.endswith(".safetensors") for name in parts[0][1]) == 4
