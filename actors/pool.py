"""The pool of evaluators: replicas of a pipeline of shards, with deadlines and bounded attempts.

Every job leaves `evaluate` exactly once: as a measurement, or as an error. A replica that broke is made anew while the
others work on, and gets no work before it has shown the digests that all replicas share.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from autoprune.actors.dispatch import BLAMELESS, PAUSES, TRIES, Dispatch, depth, shallow
from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.messages import Evaluation, Probe, last_line
from autoprune.actors.placement import Neighbours
from autoprune.actors.replica import PoolPlan, Replica, blameless, split_windows
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.allocation import AllocationError
from autoprune.algorithms.profiles import BlockProfile
from autoprune.algorithms.statistics import NotFiniteError
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.errors import InputError, Lost
from autoprune.models.export import export, part_count
from autoprune.models.loading import resolve_model
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ShardReport

START = 10  # a replica may take so many deadlines to load, calibrate and measure the dense model
OTHER = "it came with another model, or other statistics"
CONTROL = Algorithm("def score(W):\n    return W.abs()\n")  # brings down no evaluator that is well
LOOK = 1.0  # seconds between two looks at actors of which nothing is heard


@dataclass
class _Start:
    """A replica that is being made anew: since when (monotonic), and the how many-th time in a row."""

    began: float
    tries: int = 1


class EvaluatorPool:
    """Measures algorithms on the target model. Call `start` first and `stop` last."""

    def __init__(
        self,
        plan: PoolPlan,
        report: Callable[[str], None] = lambda _: None,
        places: Sequence[Neighbours] = (),
        actor: type = EvaluatorShard,
    ) -> None:
        """report: called with a line for people when something worth knowing happens. places: of each replica; empty:
        anywhere. actor: the class of the actors (see `Replica`)."""
        self.plan = plan
        self.restarts, self._stopped = 0, False
        self._report, self._places, self._actor = report, places or [None] * plan.replicas, actor
        self._replicas: list[Replica] = []
        self._starting: dict[int, _Start] = {}
        self._now: tuple[Dispatch, dict[int, list[ray.ObjectRef]]] = (Dispatch(0, plan.replicas, 1, 0.0, 1), {})
        self._digest: list[str] = []
        self._profiles: list[BlockProfile] = []
        self.dense: dict[str, Evaluation] = {}

    # Coming and going

    def start(self) -> None:
        """Have the dense model calibrated and measured on every split: by the first replica, if what it learns is kept
        where the others find it, else by each."""
        self._tokens = {name: ray.put(tokens) for name, tokens in self.plan.splits.items()}
        self._replicas = [Replica(self.plan, self._tokens, places, self._actor) for places in self._places]
        for replica in self._replicas:
            replica.start()
        waiting, looked = list(range(self.plan.replicas)), set()
        began = [time.monotonic()] * self.plan.replicas  # what it does now
        first = None  # who learns for all, if what it learns is kept
        while waiting:
            for index in list(waiting):
                trouble = None
                try:
                    state = self._replicas[index].advance(LOOK / len(waiting))
                except ray.exceptions.RayError as error:
                    if unusable := self._unusable(error):
                        raise unusable from error
                    trouble = last_line(error)
                late = time.monotonic() - began[index]
                if not trouble and state == "waiting" and late > START * self.plan.deadline:
                    trouble = f"not ready within {START * self.plan.deadline:g} s"
                    if waiting == [index] and not self._digest:
                        raise Lost(f"no evaluator could be started ({trouble})")
                if trouble:
                    waiting.remove(index)  # the others begin without it
                    first = None if first == index else first
                    self._renew(index, trouble)
                elif state == "ready":
                    waiting.remove(index)
                    if not self._welcome(index):
                        self._renew(index, OTHER)
                elif state == "waiting" and self._digest and late > self.plan.deadline:
                    waiting.remove(index)  # the others begin, and it may come later
                    self._starting[index] = _Start(began[index])
                elif state == "bare" and self._digest and self.plan.state and index not in looked:
                    looked.add(index)  # the first one has kept what it learned
                    began[index] = time.monotonic()
                    self._replicas[index].take_up()
                elif state == "bare" and (self._digest or not self.plan.state or first in (None, index)):
                    first, began[index] = index, time.monotonic()
                    self._replicas[index].calibrate(self._digest)
        self._in_service()  # where all are lost meanwhile, with their node perhaps, they begin anew
        for split, evaluation in self.dense.items():
            if evaluation.error:
                raise InputError(f"the dense model measures no likelihood on {split}: try target.dtype=float32")

    def _unusable(self, error: Exception) -> InputError | None:
        """What makes it useless to try once more, in words for the user."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, NotFiniteError):
            wider = {"float16": "bfloat16", "bfloat16": "float32"}.get(self.plan.dtype)
            way = f"try target.dtype={wider}" if wider else "the model is damaged"
            return InputError(f"{last_line(cause)}: {self.plan.dtype} overflows; {way}")
        if isinstance(cause, ValueError):
            return InputError(last_line(cause))
        # What a constructor raised comes as text.
        unusable = re.search(r"InputError: (.*)", str(error)) if getattr(error, "actor_init_failed", False) else None
        return InputError(unusable[1]) if unusable else None

    def _welcome(self, index: int) -> bool:
        """Take a replica that is ready into service, if it shows the digests of the others."""
        replica = self._replicas[index]
        if self._digest and replica.digest != self._digest:
            return False
        if not self._digest:
            self._digest, self._profiles = replica.digest, replica.profiles
            self.dense = {s: self._collect(s, replica.dense(s)) for s in self.plan.splits if s != "calibration"}
        return True

    def _renew(self, index: int, reason: str) -> None:
        """Make a replica anew; `_look_after` sees to the rest."""
        if self._stopped:  # by another thread
            raise Lost(f"the evaluators were stopped while they worked ({reason})")
        self._report(f"an evaluator is replaced ({reason})")
        self.restarts += 1
        before = self._starting.get(index)
        self._starting[index] = _Start(time.monotonic(), before.tries + 1 if before else 1)
        self._replicas[index].kill()
        self._replicas[index].start()

    def _look_after(self, timeout: float = 0.0) -> list[int]:
        """Go on with making replicas anew, for `timeout` seconds at most; returns those that are in service again.

        Raises Lost where none is in service and all have failed TRIES times in a row.
        """
        back = []
        for index, start in list(self._starting.items()):
            replica, trouble = self._replicas[index], None
            try:
                state = replica.advance(timeout)
                if state == "bare":
                    replica.calibrate(self._digest)
                elif state == "ready" and self._welcome(index):
                    del self._starting[index]
                    back.append(index)
                    continue
                elif state == "ready":
                    trouble = OTHER
                elif time.monotonic() - start.began > START * self.plan.deadline:
                    trouble = f"not ready within {START * self.plan.deadline:g} s"
            except ray.exceptions.RayError as error:
                trouble = last_line(error)
            others = [self._starting.get(other) for other in range(len(self._replicas))]
            if trouble and all(other and other.tries >= TRIES for other in others):
                raise Lost(f"no evaluator could be started, after {start.tries} tries ({trouble})")
            if not trouble:
                continue
            pause = PAUSES[start.tries - 1] if start.tries < TRIES else max(self.plan.deadline, PAUSES[-1])
            if time.monotonic() - start.began >= pause:
                self._renew(index, trouble)
            else:
                time.sleep(timeout)
        return back

    def _in_service(self) -> list[Replica]:
        """Replicas that may be given work, at least one: waits for it."""
        self._look_after()
        while len(self._starting) == len(self._replicas):
            self._look_after(LOOK / len(self._replicas))
        return [replica for index, replica in enumerate(self._replicas) if index not in self._starting]

    def in_flight(self) -> list[list[int]]:
        """Candidates on their way: how many are at, or wait for, each shard of each replica."""
        table, flights = self._now
        found = []
        for index, jobs in enumerate(table.in_flight()):
            counts = [0] * self.plan.shards
            for job in jobs if index not in self._starting else ():
                done, _ = ray.wait(flights[job], num_returns=self.plan.shards, timeout=0, fetch_local=False)
                counts[min(len(done), self.plan.shards - 1)] += 1
            found.append(counts)
        return found

    @property
    def calibration_windows(self) -> int:
        """Of the calibration text, which may be shorter than what was asked for."""
        return len(self.plan.splits["calibration"])

    @property
    def numels(self) -> list[int]:
        """Prunable weights of each block."""
        return [profile.numel for profile in self._profiles]

    def stop(self) -> None:
        self._stopped = True
        for replica in self._replicas:
            replica.kill()

    # Measuring

    def _planned(self, replica: Replica, algorithm: Algorithm, sparsity: float) -> Sparsities | ray.ObjectRef:
        """Of all blocks. An allocation that is a candidate's own program runs in an evaluator, as its score does, and
        fails there as its score would."""
        if algorithm.allocation.source:
            return replica.actors[0].plan.remote(algorithm, self._profiles, sparsity)
        return planned_sparsities(algorithm, self._profiles, sparsity)

    def _collect(self, split: str, reports: Sequence[ShardReport]) -> Evaluation:
        numels = [n for report in reports for n in report.numels]
        pruned = [n for report in reports for n in report.pruned]
        nlls = reports[-1].window_nlls
        if not all(math.isfinite(nll) for nll in nlls):
            return _failed("the pruned model's likelihood is not finite", sum(report.seconds for report in reports))
        return Evaluation(
            nll=sum(nlls) / len(nlls),
            tokens=len(nlls) * (split_windows(self.plan.splits, split).shape[1] - 1),
            window_nlls=tuple(nlls),
            block_sparsities=tuple(p / n for p, n in zip(pruned, numels, strict=True)),
            block_errors=tuple(e for report in reports for e in report.errors),
            sparsity=sum(pruned) / sum(numels),
            seconds=sum(report.seconds for report in reports),
        )

    @property
    def room(self) -> int:
        """Candidates that are measured at a time, where there are so many."""
        return self.plan.replicas * depth(self.plan.shards)

    def _deadline(self, split: str) -> float:
        """The plan's is for the fitness split: more text may take as much longer."""
        windows = [len(split_windows(self.plan.splits, name)) for name in (split, "fitness")]
        return self.plan.deadline * max(1.0, windows[0] / windows[1])

    def evaluate(
        self, jobs: Sequence[Algorithm], split: str = "fitness", sparsity: float | None = None
    ) -> Iterator[tuple[int, Evaluation]]:
        """Measure the jobs on a split (see `split_windows`); yields (index of the job, measurement) as they finish, in
        any order. sparsity: to prune to, other than the plan's.

        That a candidate brings down its evaluators is believed once something was measured after it. Raises Lost where
        nothing can be: not the candidates are the reason then.
        """
        doubted: list[tuple[int, Evaluation]] = []
        for index, evaluation in self._measured(jobs, split, sparsity):
            if evaluation.poison:
                doubted.append((index, evaluation))
                continue
            if evaluation.error is None:
                yield from doubted
                doubted = []
            yield index, evaluation
        if doubted:
            ((_, control),) = self._measured([CONTROL], split, sparsity)
            if control.poison:
                raise Lost(
                    f"evaluators end with all that they get on {split}, magnitude pruning, too ({control.error}); "
                    f"look at their machines, or raise evaluators.deadline ({self.plan.deadline:g} s)"
                )
            yield from doubted

    def _measured(
        self, jobs: Sequence[Algorithm], split: str, sparsity: float | None
    ) -> Iterator[tuple[int, Evaluation]]:
        """As `_evaluate`; then a GPU is left to whoever has the rest of it, if that is wanted."""
        yield from self._evaluate(jobs, split, sparsity)
        if self.plan.gives:
            given = [actor.give_back.remote() for replica in self._in_service() for actor in replica.actors]
            ray.wait(given, num_returns=len(given), timeout=self.plan.deadline)

    def _evaluate(
        self, jobs: Sequence[Algorithm], split: str, sparsity: float | None
    ) -> Iterator[tuple[int, Evaluation]]:
        if split not in self._tokens:  # some windows of one that is there
            self._tokens[split] = ray.put(split_windows(self.plan.splits, split))
        plan, sparsity = self.plan, sparsity or self.plan.sparsity
        deadline = self._deadline(split)
        shards, attempts = plan.shards, plan.attempts
        table = Dispatch(len(jobs), plan.replicas, depth(shards), deadline, attempts, shallow(shards))
        for index in self._starting:
            table.close(index)
        flights: dict[int, list[ray.ObjectRef]] = {}  # by job: the ShardReports to come, of which the last one decides
        self._now = table, flights
        while table.left:
            for index in self._look_after():
                table.open(index)
            while (sent := table.assign(time.monotonic())) is not None:
                replica, job = sent
                try:
                    planned = self._planned(self._replicas[replica], jobs[job], sparsity)
                except AllocationError as error:
                    table.withdraw(replica)
                    yield job, _failed(str(error))
                    continue
                flights[job] = self._replicas[replica].send(split, jobs[job], planned)
            oldest = {flights[job][-1]: replica for replica, job in table.oldest().items()}
            if not oldest:
                for index in self._look_after(LOOK / len(self._replicas)):
                    table.open(index)
                continue
            done, _ = ray.wait(list(oldest), num_returns=1, timeout=LOOK)
            for reference in done:
                yield from self._ended(table, oldest[reference], flights, split)
            for replica in table.late(time.monotonic()):
                if not ray.wait([flights[table.oldest()[replica]][-1]], timeout=0)[0]:
                    yield from self._broke(table, replica, TimeoutError(f"no result within {deadline:g} s"))

    def _ended(
        self, table: Dispatch, replica: int, flights: dict[int, list[ray.ObjectRef]], split: str
    ) -> Iterator[tuple[int, Evaluation]]:
        """What left a replica: a measurement, the algorithm's own failure, or the end of the replica."""
        job = table.oldest()[replica]
        try:
            evaluation = self._collect(split, ray.get(flights[job]))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, ValueError):
                # Not a failure that an algorithm may have: a dead actor, or one that cannot be trusted any more.
                yield from self._broke(table, replica, error, not blameless(error))
                return
            evaluation = _failed(last_line(cause))
        table.finish(replica, time.monotonic())
        del flights[job]
        yield job, evaluation

    def _broke(
        self, table: Dispatch, replica: int, error: Exception, blame: bool = True
    ) -> Iterator[tuple[int, Evaluation]]:
        """Have a replica made anew. The oldest candidate in flight is the suspect, if there is one; it and the others
        are sent again, as often as a suspect may."""
        given_up = table.close(replica, blame)
        self._renew(replica, last_line(error))
        if given_up is not None:
            poison = {"error": self._given_up(error), "poison": True, "traceback": str(error)}
            yield given_up, Evaluation(nll=None, tokens=0, **poison)

    def _given_up(self, error: Exception) -> str:
        """In words that are the same every time: they get into prompts. What an error says names processes."""
        return f"given up: it brought down its evaluator {self.plan.attempts} times ({type(error).__name__})"

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]:
        """Run the score functions on the probe layers, inside evaluator processes."""
        found: dict[int, Probe] = {}
        failures = [0.0] * len(algorithms)
        while len(found) < len(algorithms):
            left = [index for index in range(len(algorithms)) if index not in found]
            actors = itertools.cycle((r, actor) for r in self._in_service() for actor in r.actors)
            calls = [
                (index, replica, actor.probe.remote(algorithms[index], self.plan.sparsity))
                for index, (replica, actor) in zip(left, actors, strict=False)
            ]
            broken = []
            for index, replica, call in calls:
                if replica in broken:  # what waited behind what broke it is sent again
                    continue
                try:
                    found[index] = ray.get(call, timeout=self.plan.deadline)
                except (ray.exceptions.RayError, TimeoutError) as error:
                    broken.append(replica)
                    failures[index] += BLAMELESS if blameless(error) else 1
                    if failures[index] >= self.plan.attempts:
                        found[index] = Probe(self._given_up(error), poison=True, traceback=str(error))
                    self._renew(self._replicas.index(replica), last_line(error))
        if any(probe.poison for probe in found.values()) and list(algorithms) != [CONTROL]:
            (control,) = self.probe([CONTROL])
            if control.error is not None:
                raise Lost(
                    f"evaluators end with all that they probe, magnitude pruning, too ({control.error}); look at their "
                    "machines"
                )
        return [found[index] for index in range(len(algorithms))]

    def export(self, out: Path, algorithm: Algorithm, details: dict) -> dict:
        """Write the target, pruned by `algorithm`, to a folder on the driver's machine: each shard makes its own part.
        Returns the sidecar."""
        for attempt in range(1, self.plan.attempts + 1):
            replica = self._in_service()[0]
            try:
                return self._export(replica, out, algorithm, details)
            except (ray.exceptions.RayError, _PartLost) as error:
                if attempt == self.plan.attempts:
                    raise Lost(f"the evaluators could not write {out} ({last_line(error)})") from error
                self._renew(self._replicas.index(replica), last_line(error))
        raise AssertionError("unreachable")

    def _export(self, replica: Replica, out: Path, algorithm: Algorithm, details: dict) -> dict:
        plan, patience = self.plan, START * self.plan.deadline
        planned = self._planned(replica, algorithm, plan.sparsity)
        sparsities = ray.get(planned, timeout=patience) if isinstance(planned, ray.ObjectRef) else planned

        source = resolve_model(plan.model)
        per_block = checkpoint_bytes(source) / plan.bounds[-1][1]
        counts = [part_count(int(per_block * (stop - start)), stop - start) for start, stop in plan.bounds]

        def write(paths: list[Path]) -> list[dict[str, dict]]:
            rest = iter(paths)
            parts = [
                (actor, list(itertools.islice(rest, count)))
                for actor, count in zip(replica.actors, counts, strict=True)
            ]
            calls = [actor.export.remote(files, algorithm, sparsities) for actor, files in parts]
            try:
                made = ray.get(calls, timeout=patience)
                for (actor, files), (_, written) in zip(parts, made, strict=True):
                    for file in () if written else files:
                        _fetch(actor, file, patience)
            except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError) as error:
                # As OSErrors, which both may be, they would seem to be of this machine's disk.
                raise _PartLost(last_line(error)) from error
            return [layers for layers, _ in made]

        return export(source, out, sum(counts), write, algorithm, plan.sparsity, sparsities, details)


class _PartLost(Exception):
    """An evaluator could not make its part of a pruned model."""


def _fetch(actor, path: Path, patience: float) -> None:
    """What an evaluator on a machine that does not see the folder made of its part, a few pieces ahead. patience:
    seconds for each."""
    pieces = actor.part.options(num_returns="streaming", _generator_backpressure_num_objects=4).remote(path.name)
    with open(path, "wb") as file:
        while ray.wait([pieces], timeout=patience)[0]:
            piece = next(pieces, None)
            if piece is None:
                return
            file.write(ray.get(piece, timeout=patience))
    raise ray.exceptions.GetTimeoutError(f"no part of {path.name} within {patience:g} s")


def _failed(error: str, seconds: float = 0.0) -> Evaluation:
    return Evaluation(nll=None, tokens=0, error=error, seconds=seconds)
