"""A replica: the target model, split over a pipeline of evaluator actors. What the pool asks of Ray is asked here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import torch

from autoprune.actors.evaluator import EvaluatorShard, Ready
from autoprune.actors.messages import split_places
from autoprune.actors.placement import ActorResources, Neighbours
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.profiles import BlockProfile
from autoprune.models.shard import ShardReport


@dataclass(frozen=True)
class PoolPlan:
    """What the pool measures and on how many actors.

    model: bundled name, folder that every node sees, or hub id. splits: name → token windows, int64 [windows, L];
    must have "calibration" and "fitness". statistics, features: what algorithms and their allocations may read (see
    `ModelShard.calibrate`). bounds: first block of each shard, and the one after its last. deadline: seconds that a
    replica may take for one candidate; attempts: how often a candidate may bring a replica down before it is given up.
    state: where actors keep what they learn of the dense model, a folder or what `Storage` knows; empty: nowhere.
    gives: the part of a GPU whose engine sleeps while they work: its memory is theirs so long, by shares, and is given
    back after each use.
    """

    model: str
    bounds: tuple[tuple[int, int], ...]
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
    state: str = ""
    gives: float = 0.0

    @property
    def memory(self) -> float:
        """The part of a GPU's memory that an actor may take: its share of all but the engine's part, as if there was an
        engine on each GPU."""
        return min(1.0, self.resources.num_gpus / (1.0 - self.gives))

    @property
    def shards(self) -> int:
        return len(self.bounds)

    def about(self) -> dict:
        """What the state of a shard follows from, beside its weights; JSON."""
        return {
            "dtype": self.dtype,
            "device": self.resources.device,
            "threads": self.threads,
            "statistics": sorted(self.statistics),
            "features": sorted(self.features),
            "splits": {
                name: [list(tokens.shape), hashlib.sha256(tokens.contiguous().numpy()).hexdigest()]
                for name, tokens in self.splits.items()
            },
        }


class Replica:
    """Actors that hold the model's blocks between them.

    `start` makes them; then `advance` says how far they are: "waiting"; "bare", when nothing was kept that they could
    take up, so that they need `calibrate`; or "ready".
    """

    def __init__(
        self,
        plan: PoolPlan,
        tokens: Mapping[str, ray.ObjectRef],
        places: Neighbours | None = None,
        actor: type = EvaluatorShard,
    ) -> None:
        """tokens: the plan's splits in Ray's store, and whatever part of one is sent later. places: of its actors;
        None: anywhere. actor: the class of the actors, EvaluatorShard or one that does as it does."""
        self._plan, self._tokens, self._places, self._class = plan, tokens, places, actor
        self._empty = ray.put(torch.empty(0))
        self.actors: list = []
        self.ready: list[Ready] = []
        self._pending: list[ray.ObjectRef] = []

    def start(self) -> None:
        """Make new actors, which load their blocks and take up what is kept of them."""
        plan, resources = self._plan, self._plan.resources
        actor, reserved = ray.remote(self._class), {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
        placed = [{"scheduling_strategy": self._places.strategy(p)} if self._places else {} for p in range(plan.shards)]
        self.actors = [
            actor.options(**reserved, **placed[place]).remote(
                plan.model,
                start,
                stop,
                plan.dtype,
                resources.device,
                plan.threads,
                alone=True,
                state=plan.state,
                share=plan.memory,
            )
            for place, (start, stop) in enumerate(plan.bounds)
        ]
        self.take_up()

    def take_up(self) -> None:
        """Look for what is kept, which another replica may have learned meanwhile."""
        self.ready = []
        self._pending = [actor.take_up.remote(self._plan.about()) for actor in self.actors]

    def advance(self, timeout: float = 0.0) -> str:
        """How far the actors are, after `timeout` seconds at most. Raises what one of them raised."""
        if not self._pending:
            return "ready" if self.ready else "bare"
        done, left = ray.wait(self._pending, num_returns=len(self._pending), timeout=timeout)
        found = ray.get(done)
        if left:
            return "waiting"
        self._pending = []
        if not all(found):
            return "bare"
        self.ready = found
        return "ready"

    def calibrate(self, expected: Sequence[str] = ()) -> None:
        """Send calibration and the dense passes, and have what comes of them kept. expected: the digests that other
        replicas have shown, where there are any."""
        plan, states = self._plan, self._tokens["calibration"]
        for actor in self.actors:
            states = actor.calibrate.remote(states, plan.statistics, plan.features)
        after = [states]  # what comes later does not wait for how these end
        if "g_rms" in plan.statistics:
            upstream = self._tokens["calibration"]
            for actor in reversed(self.actors):
                upstream = actor.backward.remote(upstream)
            after.append(upstream)
        for split in plan.splits:
            if split != "calibration":
                after += self.send(split, None)
        known = expected or [None] * plan.shards
        self._pending = [
            actor.keep.remote(plan.about(), digest, *after) for actor, digest in zip(self.actors, known, strict=True)
        ]

    def send(
        self, split: str, algorithm: Algorithm | None, sparsities: Sparsities | ray.ObjectRef | None = None
    ) -> list[ray.ObjectRef]:
        """A chain of calls through the shards; hidden states go from actor to actor, ShardReports come here."""
        states, reports = self._tokens[split], []
        for actor in self.actors:
            tokens = self._tokens[split] if actor is self.actors[-1] else self._empty
            states, report = actor.forward.options(num_returns=2).remote(split, states, tokens, algorithm, sparsities)
            reports.append(report)
        return reports

    @property
    def digest(self) -> list[str]:
        """Of each shard, once it is ready."""
        return [one.digest for one in self.ready]

    @property
    def profiles(self) -> list[BlockProfile]:
        return [profile for one in self.ready for profile in one.profiles]

    def dense(self, split: str) -> list[ShardReport]:
        return [one.reports[split] for one in self.ready]

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.ready, self._pending = [], []


def split_windows(splits: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Token windows of a split, or of some of its windows (see `split_places`)."""
    base, places = split_places(name)
    return splits[base] if places is None else splits[base][places]


# What Ray says of an actor that went away for a reason in which no candidate has a part, and what it raises there: a
# node is gone, or out of reach, which is all that is known of it at first; its disk or its object store is full.
BLAMELESS_WORDS = ("ray.kill", "node has died", "node is dead", "preempted", "The actor never ran")
BLAMELESS_ERRORS = (
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ObjectFetchTimedOutError,
    ray.exceptions.ObjectStoreFullError,
    ray.exceptions.OutOfDiskError,
)


def blameless(error: BaseException) -> bool:
    """Whether a call failed for what a machine met, or since somebody who may killed an actor: no candidate's doing."""
    return isinstance(error, BLAMELESS_ERRORS) or any(words in str(error) for words in BLAMELESS_WORDS)
