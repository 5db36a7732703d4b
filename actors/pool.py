"""The pool of evaluators: replicas of a pipeline of shards, with deadlines and bounded attempts.

Every job leaves `evaluate` exactly once: as a measurement, or as an error. A replica runs its candidates in the order
in which they were sent, each candidate one shard behind the one before it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
import torch

from autoprune.actors.evaluator import EvaluatorShard
from autoprune.actors.messages import Evaluation, Probe, last_line, split_places
from autoprune.actors.placement import ActorResources
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.allocation import AllocationError
from autoprune.algorithms.profiles import BlockProfile
from autoprune.algorithms.statistics import NotFiniteError
from autoprune.models.errors import InputError, Lost
from autoprune.models.export import export
from autoprune.models.loading import resolve_model
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ShardReport

START = 10  # a replica may take so many deadlines to load, calibrate and measure the dense model


@dataclass(frozen=True)
class PoolPlan:
    """What the pool measures and on how many actors.

    model: bundled name, folder that every node sees, or hub id. splits: name → token windows, int64 [windows, L];
    must have "calibration". statistics, features: what algorithms and their allocations may read (see
    `ModelShard.calibrate`). deadline: seconds that a replica may take for one candidate; attempts: how often a
    candidate may bring a replica down before it is given up.
    """

    model: str
    blocks: int
    shards: int
    replicas: int
    threads: int
    dtype: str
    sparsity: float
    splits: dict[str, torch.Tensor]
    statistics: frozenset[str]
    features: frozenset[str]
    deadline: float
    attempts: int
    resources: ActorResources


@dataclass
class _Flight:
    """A candidate on its way through a replica: one reference to a ShardReport per shard, the last one decides."""

    job: int
    reports: list


@dataclass
class _Replica:
    actors: list
    in_flight: deque[_Flight] = field(default_factory=deque)
    progressed: float = 0.0


def split_windows(splits: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Token windows of a split, or of some of its windows (see `split_places`)."""
    base, places = split_places(name)
    return splits[base] if places is None else splits[base][places]


def shard_bounds(blocks: int, shards: int) -> list[tuple[int, int]]:
    """Contiguous ranges of blocks whose sizes differ by one at most, in order."""
    edges = [blocks * index // shards for index in range(shards + 1)]
    return list(zip(edges, edges[1:], strict=False))


class EvaluatorPool:
    """Measures algorithms on the target model. Call `start` first and `stop` last."""

    def __init__(self, plan: PoolPlan, report: Callable[[str], None] = lambda _: None) -> None:
        """report: called with a line for people when something worth knowing happens."""
        self.plan = plan
        self.restarts = 0
        self._report = report
        self._bounds = shard_bounds(plan.blocks, plan.shards)
        self._profiles: list[BlockProfile] = []
        self.dense: dict[str, Evaluation] = {}

    def start(self) -> None:
        """Load, calibrate and measure the dense model on every split; the replicas do so side by side."""
        self._tokens = {name: ray.put(tokens) for name, tokens in self.plan.splits.items()}
        self._empty = ray.put(torch.empty(0))
        self._replicas = [_Replica(self._new_actors()) for _ in range(self.plan.replicas)]
        prepared = [self._prepare(replica) for replica in self._replicas]
        for replica, (gradients, profiles, dense) in zip(self._replicas, prepared, strict=True):
            try:
                ray.get(gradients)  # what came after them did not wait for how they ended
                self._profiles = [p for part in ray.get(profiles) for p in part]
                self.dense = {split: self._collect(split, ray.get(reports)) for split, reports in dense.items()}
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, NotFiniteError):
                    reason = last_line(cause)
                    raise InputError(f"{reason}: {self.plan.dtype} overflows; try target.dtype=bfloat16") from None
                if isinstance(cause, ValueError):
                    raise InputError(last_line(cause)) from None
                raise Lost(f"the evaluators could not start ({last_line(error)})") from error
            replica.progressed = time.monotonic()
        for split, evaluation in self.dense.items():
            if evaluation.error:
                raise InputError(f"the dense model measures no likelihood on {split}: try target.dtype=float32")

    def _new_actors(self) -> list:
        plan, resources = self.plan, self.plan.resources
        actor = ray.remote(EvaluatorShard).options(num_cpus=resources.num_cpus, num_gpus=resources.num_gpus)
        return [
            actor.remote(plan.model, start, stop, plan.dtype, resources.device, plan.threads, alone=True)
            for start, stop in self._bounds
        ]

    def _prepare(self, replica: _Replica) -> tuple[list, list, dict[str, list]]:
        """Send calibration and the dense passes to a fresh replica. Returns references, so replicas do not wait."""
        states = self._tokens["calibration"]
        for actor in replica.actors:
            states = actor.calibrate.remote(states, self.plan.statistics, self.plan.features)
        gradients = []
        if "g_rms" in self.plan.statistics:
            upstream = self._tokens["calibration"]
            for actor in reversed(replica.actors):
                upstream = actor.backward.remote(upstream)
            gradients = [upstream]
        profiles = [actor.profiles.remote() for actor in replica.actors]
        dense = {s: self._send(replica, s, None) for s in self.plan.splits if s != "calibration"}
        return gradients, profiles, dense

    def _send(self, replica: _Replica, split: str, algorithm: Algorithm | None, sparsity: float | None = None) -> list:
        """A chain of calls through a replica's shards; hidden states go from actor to actor, reports come here."""
        planned = self._planned(replica, algorithm, sparsity or self.plan.sparsity) if algorithm else None
        if split not in self._tokens:  # some windows of one that is there
            self._tokens[split] = ray.put(split_windows(self.plan.splits, split))
        states, reports = self._tokens[split], []
        for actor, (_, stop) in zip(replica.actors, self._bounds, strict=True):
            tokens = self._tokens[split] if stop == self.plan.blocks else self._empty
            states, report = actor.forward.options(num_returns=2).remote(split, states, tokens, algorithm, planned)
            reports.append(report)
        return reports

    def _collect(self, split: str, reports: list[ShardReport]) -> Evaluation:
        numels = [n for report in reports for n in report.numels]
        pruned = [n for report in reports for n in report.pruned]
        nlls = reports[-1].window_nlls
        if not all(math.isfinite(nll) for nll in nlls):
            return _failed("the pruned model's likelihood is not finite")
        return Evaluation(
            nll=sum(nlls) / len(nlls),
            tokens=len(nlls) * (split_windows(self.plan.splits, split).shape[1] - 1),
            window_nlls=tuple(nlls),
            block_sparsities=tuple(p / n for p, n in zip(pruned, numels, strict=True)),
            block_errors=tuple(e for report in reports for e in report.errors),
            sparsity=sum(pruned) / sum(numels),
            seconds=sum(report.seconds for report in reports),
        )

    def sparsities(self, algorithm: Algorithm) -> Sparsities:
        """From the algorithm's allocation and the dense model's summaries."""
        planned = self._planned(self._replicas[0], algorithm, self.plan.sparsity)
        return ray.get(planned) if isinstance(planned, ray.ObjectRef) else planned

    def _planned(self, replica: _Replica, algorithm: Algorithm, sparsity: float) -> Sparsities | ray.ObjectRef:
        """Of all blocks. An allocation that is a candidate's own program runs in an evaluator, as its score does, and
        fails there as its score would."""
        if algorithm.allocation.source:
            return replica.actors[0].plan.remote(algorithm, self._profiles, sparsity)
        return planned_sparsities(algorithm, self._profiles, sparsity)

    def probe(self, algorithms: Sequence[Algorithm]) -> list[Probe]:
        """Run the score functions on the probe layers, inside evaluator processes."""
        actors = [actor for replica in self._replicas for actor in replica.actors]
        calls = [
            actors[index % len(actors)].probe.remote(algorithm, self.plan.sparsity)
            for index, algorithm in enumerate(algorithms)
        ]
        probes = []
        for call in calls:
            try:
                probes.append(ray.get(call, timeout=self.plan.deadline))
            except (ray.exceptions.RayError, TimeoutError) as error:
                probes.append(Probe(f"the probe failed: {last_line(error)}", lost=True))
                self._restart_broken()
        return probes

    def evaluate(
        self, jobs: Sequence[Algorithm], split: str = "fitness", sparsity: float | None = None
    ) -> Iterator[tuple[int, Evaluation]]:
        """Measure the jobs on a split (see `split_windows`); yields (index of the job, measurement) as they finish, in
        any order. sparsity: to prune to, other than the plan's."""
        queue, failures = deque(range(len(jobs))), [0] * len(jobs)
        while queue or any(replica.in_flight for replica in self._replicas):
            yield from self._fill(queue, jobs, split, sparsity)
            if not any(replica.in_flight for replica in self._replicas):
                continue
            last = {flight.reports[-1]: r for r in self._replicas for flight in list(r.in_flight)[:1]}
            done, _ = ray.wait(list(last), num_returns=1, timeout=1.0)
            for reference in done:
                replica = last[reference]
                flight = replica.in_flight.popleft()
                try:
                    evaluation = self._collect(split, ray.get(flight.reports))
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if not isinstance(cause, ValueError):
                        # Not the algorithm's fault: a dead actor, or one that cannot be trusted any more.
                        replica.in_flight.appendleft(flight)
                        yield from self._recover(replica, queue, failures, last_line(error))
                        continue
                    evaluation = _failed(last_line(cause))
                replica.progressed = time.monotonic()
                yield flight.job, evaluation
            for replica in self._replicas:
                late = replica.in_flight and time.monotonic() - replica.progressed > self.plan.deadline
                if late and not ray.wait([replica.in_flight[0].reports[-1]], timeout=0)[0]:
                    reason = f"no result within {self.plan.deadline:g} s"
                    yield from self._recover(replica, queue, failures, reason)

    def _fill(
        self, queue: deque[int], jobs: Sequence[Algorithm], split: str, sparsity: float | None
    ) -> Iterator[tuple[int, Evaluation]]:
        """Keep one candidate per shard in flight, and one waiting, in every replica. Yields what cannot be sent: an
        allocation that does not fit this model."""
        for replica in self._replicas:
            while queue and len(replica.in_flight) <= self.plan.shards:
                if not replica.in_flight:
                    replica.progressed = time.monotonic()
                job = queue.popleft()
                try:
                    reports = self._send(replica, split, jobs[job], sparsity)
                except AllocationError as error:
                    yield job, _failed(str(error))
                    continue
                replica.in_flight.append(_Flight(job, reports))

    def _recover(
        self, replica: _Replica, queue: deque[int], failures: list[int], reason: str
    ) -> Iterator[tuple[int, Evaluation]]:
        """Replace a replica's actors. The oldest candidate in flight is the suspect; the others are sent again."""
        suspect, *others = [flight.job for flight in replica.in_flight]
        replica.in_flight.clear()
        failures[suspect] += 1
        given_up = failures[suspect] >= self.plan.attempts
        queue.extendleft(reversed(others if given_up else [suspect, *others]))
        self._report(f"an evaluator was replaced ({reason}); {len(others) + (not given_up)} evaluations are sent again")
        self._restart(replica)
        if given_up:
            yield suspect, _failed(f"given up after {failures[suspect]} attempts: {reason}", lost=True)

    def _restart(self, replica: _Replica) -> None:
        self.restarts += 1
        began = time.monotonic()
        for actor in replica.actors:
            ray.kill(actor)
        replica.actors = self._new_actors()
        gradients, profiles, dense = self._prepare(replica)
        try:
            everything = [*gradients, *profiles, *(report for reports in dense.values() for report in reports)]
            ray.get(everything, timeout=START * self.plan.deadline)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise Lost(f"an evaluator could not be replaced ({last_line(error)})") from error
        for other in self._replicas:  # nobody looked at them meanwhile
            other.progressed += time.monotonic() - began
        replica.progressed = time.monotonic()

    def _restart_broken(self) -> None:
        """Replace the replicas that have an actor which does not answer; nothing may be in flight."""
        for replica in self._replicas:
            _, silent = ray.wait(
                [actor.__ray_ready__.remote() for actor in replica.actors], num_returns=len(replica.actors), timeout=5
            )
            if silent:
                self._restart(replica)

    def export(self, out: Path, algorithm: Algorithm, details: dict) -> dict:
        """Write the target, pruned by `algorithm`, to a folder: each shard writes its own part. Returns the sidecar."""
        sparsities, plan = self.sparsities(algorithm), self.plan
        source = resolve_model(plan.model)

        def write(paths: list[Path]) -> list[dict[str, dict]]:
            return ray.get(
                [
                    actor.export.remote(path, algorithm, sparsities)
                    for actor, path in zip(self._replicas[0].actors, paths, strict=True)
                ]
            )

        return export(source, out, plan.shards, write, algorithm, plan.sparsity, sparsities, details)

    def stop(self) -> None:
        for replica in getattr(self, "_replicas", []):
            for actor in replica.actors:
                ray.kill(actor)


def _failed(error: str, lost: bool = False) -> Evaluation:
    return Evaluation(nll=None, tokens=0, error=error, lost=lost)
