"""What the pool makes of troubles that are not a candidate's: machines that stay away, that break whatever they are
given, or whose disk is full. Replicas are scripted here; `test_pool` has real ones."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch

from autoprune.actors.dispatch import TRIES
from autoprune.actors.messages import Evaluation, Probe
from autoprune.actors.placement import ActorResources
from autoprune.actors.pool import CONTROL, EvaluatorPool, _Start
from autoprune.actors.replica import PoolPlan
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.statistics import NotFiniteError
from autoprune.models.errors import InputError, Lost

DIED = ray.exceptions.ActorDiedError


class Scripted:
    """A replica whose `advance` gives one state after the other, the last one for ever; errors are raised."""

    def __init__(self, *states):
        self.states, self.calibrated, self.starts = list(states), [], 0
        self.digest, self.profiles = ["same"], []

    def start(self):
        self.starts += 1

    def kill(self):
        pass

    def take_up(self):
        pass

    def calibrate(self, expected=()):
        self.calibrated.append(list(expected))

    def dense(self, split):
        return []

    def advance(self, timeout=0.0):
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state


class Pool(EvaluatorPool):
    """script: what is measured, in order; then the control."""

    script = ()

    def _collect(self, split, reports):
        return Evaluation(1.0, 1)

    def _planned(self, *_):
        return []

    def _evaluate(self, jobs, split, sparsity):
        yield from self.script if jobs[0] != CONTROL else [(0, self.control)]


def make(*replicas, **changes) -> Pool:
    text = torch.zeros(2, 3, dtype=torch.int64)
    plan = PoolPlan(
        bounds=((0, 1),),
        replicas=len(replicas),
        threads=1,
        sparsity=0.5,
        splits={"calibration": text, "fitness": text, "report": text.repeat(4, 1)},
        statistics=frozenset(),
        features=frozenset(),
        attempts=2,
        resources=ActorResources(0.0, 0, "cpu"),
        **{"model": "none", "dtype": "float32", "deadline": 60.0, **changes},
    )
    pool = Pool(plan)
    pool._replicas = list(replicas)
    return pool


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr("autoprune.actors.pool.PAUSES", (0.0,) * (TRIES - 1))


@pytest.fixture
def started(cluster, hasty, monkeypatch):
    def start(*replicas, **changes):
        left = list(replicas)
        monkeypatch.setattr("autoprune.actors.pool.Replica", lambda *_: left.pop(0))
        pool = make(*replicas, **changes)
        pool.start()
        return pool

    return start


def test_one_replica_that_stays_away_is_no_reason_to_give_up_another_that_restarts():
    pool = make(Scripted(DIED()), Scripted("waiting"))
    pool._starting = {0: _Start(time.monotonic(), TRIES), 1: _Start(time.monotonic())}
    assert pool._look_after() == []
    pool._replicas[1] = Scripted(DIED())
    pool._starting[1].tries = TRIES
    with pytest.raises(Lost, match="no evaluator could be started"):
        pool._look_after()


@pytest.mark.parametrize("state", ["", "kept"])
def test_any_replica_may_be_the_first(started, state):
    well = Scripted("bare", "ready")
    pool = started(Scripted(DIED(), "waiting"), well, state=state)
    assert well.calibrated == [[]] and list(pool._starting) == [0] and set(pool.dense) == {"fitness", "report"}
    with pytest.raises(Lost, match="no evaluator could be started, after 4 tries"):
        started(Scripted(DIED()), Scripted(DIED()))


def test_replicas_that_are_all_lost_while_they_start_begin_anew(started):
    """As when their node is lost."""
    first = Scripted(DIED(), "bare", "ready")
    pool = started(first, Scripted(DIED(), "waiting"))
    assert first.starts == 2 and first.calibrated == [[]] and list(pool._starting) == [1] and pool.dense


def test_a_start_that_hangs_everywhere_ends_and_one_that_hangs_in_one_place_does_not(started, monkeypatch):
    monkeypatch.setattr("autoprune.actors.pool.START", 0)
    with pytest.raises(Lost, match="no evaluator could be started .not ready within 0 s"):
        started(Scripted("waiting"))
    assert started(Scripted("waiting"), Scripted("ready")).dense
    monkeypatch.undo()


def test_who_is_bare_first_learns_for_all_and_a_straggler_keeps_nobody_waiting(started):
    straggler, well = Scripted("waiting"), Scripted("bare", "waiting", "ready")
    pool = started(straggler, well, state="kept", deadline=0.5)
    assert well.calibrated == [[]] and list(pool._starting) == [0] and straggler.starts == 1 and pool.dense
    straggler.states = ["ready"]
    assert pool._look_after() == [0]


def test_tries_to_start_last_longer_than_ray_needs_to_see_that_a_node_is_gone(started, monkeypatch):
    """Until then it sends new actors there, and they fail at once."""
    now = [0.0]
    monkeypatch.undo()
    monkeypatch.setattr("autoprune.actors.pool.time.monotonic", lambda: now[0])
    monkeypatch.setattr("autoprune.actors.pool.time.sleep", lambda seconds: now.__setitem__(0, now[0] + 1.0))
    gone = Scripted(DIED())
    pool = make(gone)
    pool._starting = {0: _Start(0.0)}
    with pytest.raises(Lost, match="no evaluator could be started"):
        while True:
            pool._look_after(1.0)
    assert gone.starts == TRIES - 1 and now[0] > 80


def test_what_a_later_replica_learns_for_itself_is_kept_only_if_it_is_the_same(started):
    second = Scripted("bare", "bare", "ready")
    started(Scripted("ready"), second, state="kept")
    assert second.calibrated == [["same"]]


def test_a_model_that_a_machine_cannot_load_is_wrong_input(started):
    said = "autoprune.models.errors.InputError: no model 'x'"
    trouble = DIED(ray.exceptions.RayTaskError("load", said, ValueError()))
    with pytest.raises(InputError, match="^no model 'x'$"):
        started(Scripted(trouble))


POISON, FINE = Evaluation(None, 0, error="given up", poison=True), Evaluation(2.0, 5)
FAILED = Evaluation(None, 0, error="not finite")


@pytest.mark.parametrize(
    ("script", "control", "order"),
    [
        ([(0, POISON), (1, FINE)], FINE, [0, 1]),
        ([(0, POISON), (2, FAILED), (1, FINE)], FINE, [2, 0, 1]),
        ([(0, POISON)], FINE, [0]),
        ([(0, POISON)], FAILED, [0]),  # its evaluator lives, whatever it measured
    ],
)
def test_a_candidate_is_poison_once_another_one_was_measured(script, control, order):
    pool = make(Scripted("ready"))
    pool.script, pool.control = script, control
    assert [index for index, _ in pool.evaluate([Algorithm("x")] * 3)] == order


def test_where_nothing_can_be_measured_no_candidate_is_to_blame():
    pool = make(Scripted("ready"))
    pool.script, pool.control, seen = [(1, FAILED), (0, POISON), (2, POISON)], POISON, []
    with pytest.raises(Lost, match="magnitude pruning, too .*evaluators.deadline"):
        for index, _ in pool.evaluate([Algorithm("x")] * 3, "report"):
            seen.append(index)
    assert seen == [1]


class Prober:
    """A replica of one actor whose probes say what `fails` does of the algorithm."""

    def __init__(self, fails):
        @ray.remote(num_cpus=0)
        class Actor:
            def probe(self, algorithm, sparsity):
                if fails(algorithm):
                    raise MemoryError("too much")
                return Probe(None)

        self.actors = [Actor.remote()]


@pytest.mark.parametrize("all_fail", [False, True])
def test_a_probe_is_poison_only_where_magnitude_pruning_passes(cluster, monkeypatch, all_fail):
    bad = Algorithm("def score(W):\n    return W")
    pool = make(Prober(lambda algorithm: all_fail or "abs" not in algorithm.score))
    monkeypatch.setattr(pool, "_renew", lambda *_: None)
    if all_fail:
        with pytest.raises(Lost, match="all that they probe, magnitude pruning, too"):
            pool.probe([bad])
    else:
        first, second = pool.probe([bad, CONTROL])
        assert first.poison and second.error is None


def test_more_text_may_take_as_much_longer():
    pool = make(Scripted("ready"))
    assert (pool._deadline("fitness"), pool._deadline("report"), pool._deadline("report[0,3]")) == (60.0, 240.0, 60.0)


def test_what_was_stopped_is_not_started_again():
    """By the driver's end, while another thread waits for measurements."""
    replica = Scripted(DIED())
    pool = make(replica, Scripted("waiting"))
    pool._starting = {0: _Start(time.monotonic())}
    pool.stop()
    with pytest.raises(Lost, match="were stopped"):
        pool._look_after()
    assert not replica.starts


def test_an_evaluator_that_hangs_while_it_writes_is_replaced(cluster, tiny_model, tmp_path):
    @ray.remote(num_cpus=0)
    class Hanging:
        def export(self, *_):
            time.sleep(600)

    replica = Scripted("ready")
    replica.actors = [Hanging.remote()]
    pool = make(replica, model=str(tiny_model), deadline=0.02)
    with pytest.raises(Lost, match="could not write"):
        pool.export(tmp_path / "out", Algorithm("def score(W):\n    return W.abs()\n"), {})
    assert replica.starts == 1 and not list(tmp_path.iterdir())


def test_what_is_not_finite_is_said_with_what_may_help():
    cause = NotFiniteError("block 1, q_proj: an input is not finite")
    for dtype, way in (("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "the model is damaged")):
        pool = make(Scripted("ready"), dtype=dtype)
        (text,) = pool._unusable(SimpleNamespace(cause=cause)).args
        assert f"block 1, q_proj: an input is not finite: {dtype} overflows; " in text and text.endswith(way)


def test_a_full_disk_of_an_evaluators_machine_is_not_the_drivers(cluster, tiny_model, tmp_path):
    @ray.remote(num_cpus=0)
    class Full:
        def export(self, *_):
            raise OSError(28, "No space left on device")

    replica = Scripted("ready")
    replica.actors = [Full.remote()]
    pool = make(replica, model=str(tiny_model))
    with pytest.raises(Lost, match="could not write .*No space left"):
        pool.export(tmp_path / "out", Algorithm("def score(W):\n    return W.abs()\n"), {})
    assert replica.starts == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("gpus, gives, memory", [(0.5, 0.5, 1.0), (0.25, 0.5, 0.5), (0.5, 0.0, 0.5), (1, 0.0, 1.0)])
def test_a_sleeping_engines_part_of_a_gpu_is_the_evaluators_by_shares(gpus, gives, memory):
    plan = replace(make().plan, resources=ActorResources(0, gpus, "cuda"), gives=gives)
    assert plan.memory == memory
