"""Where actors run: how many CPUs and GPUs each reserves, waiting until the cluster has them, and who is whose
neighbour."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from autoprune.models.errors import InputError

POLL = 2.0  # seconds between two looks at what the cluster has
SOON = 3.0  # seconds for which nothing is said: a place that is free takes a moment, too


@dataclass(frozen=True)
class ActorResources:
    """What one actor reserves, and the device that it computes on."""

    num_cpus: float
    num_gpus: float
    device: str

    def __str__(self) -> str:
        """Where it computes, for people."""
        return self.device if not self.num_gpus else f"{self.num_gpus:g} GPU each"

    def bundle(self) -> dict[str, float]:
        """As Ray's placement groups name it; empty where nothing is reserved."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in named.items() if amount}


@dataclass(frozen=True)
class Layout:
    """Who is to run: `engines` language models, each on `tensor_parallel` GPUs, and `replicas` × `shards` evaluators.

    gpus_per_shard, gpus_per_engine: of which each reserves so much, whole GPUs or a part of one; 0: equal shares of
    what the cluster has. engines is 0 where no language model runs on the cluster. threads: of each evaluator without
    GPUs.
    """

    shards: int
    replicas: int
    threads: int
    engines: int = 1
    tensor_parallel: int = 1
    gpus_per_shard: float = 0.0
    gpus_per_engine: float = 0.0

    def resources(self) -> tuple[ActorResources, ActorResources]:
        """Of each engine and of each evaluator, on the cluster that is connected.

        With GPUs every actor gets what the layout says, or an equal share of them, whole ones where there are enough.
        Without, evaluators reserve their threads as CPUs, less where the nodes have fewer, so that a search starts on
        any machine; engines reserve none, since they rest while candidates are evaluated.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        actors = self.shards * self.replicas
        if not gpus and not self.gpus_per_shard and not self.gpus_per_engine and self.tensor_parallel == 1:
            share = equal_share(actors, [node.get("CPU", 0) / self.threads for node in nodes])
            return ActorResources(0, 0, "cpu"), ActorResources(share * self.threads, 0, "cpu")
        engine, shard = self.gpu_shares(gpus)
        return ActorResources(0, engine, "cuda"), ActorResources(0, shard, "cuda")

    def gpu_shares(self, gpus: int) -> tuple[float, float]:
        """Of so many GPUs, of each engine and of each evaluator."""
        actors = self.shards * self.replicas
        engine = max(self.gpus_per_engine, float(self.tensor_parallel) if self.tensor_parallel > 1 else 0.0)
        left = gpus - self.engines * engine - actors * self.gpus_per_shard
        sharing = (0 if engine else self.engines) + (0 if self.gpus_per_shard else actors)
        # Where the cluster has no room for them yet, those of which nothing is said are to have whole ones.
        places = [left] if gpus == 1 and left > 0 else [1.0] * int(left)
        share = equal_share(sharing, places) if places else 1.0
        return engine or share, self.gpus_per_shard or share


def equal_share(actors: int, places: list[float]) -> float:
    """The largest share, rounded down to a hundredth, of which `actors` fit into places of these whole sizes.

    An actor lies within one place (a node's CPUs, a GPU): three shares of 0.66 do not fit into two GPUs.
    """
    for hundredths in range(100, 0, -1):
        if sum(int(size * 100) // hundredths for size in places) >= actors:
            return hundredths / 100
    return 0.01


class Neighbours:
    """Places for actors that work in a row, such as the shards of a replica: on one node where that has room, and
    otherwise so that those on one node follow one another. They stay reserved until `free`, also while an actor is
    made anew."""

    def __init__(self, count: int, resources: ActorResources) -> None:
        self._group: PlacementGroup = placement_group([resources.bundle()] * count, strategy="PACK")
        self._order = list(range(count))

    def placed(self) -> bool:
        """Whether the places are reserved by now."""
        table = placement_group_table(self._group)
        if table["state"] != "CREATED":
            return False
        nodes = table["bundles_to_node_id"]
        self._order = sorted(self._order, key=lambda bundle: (nodes[bundle], bundle))
        return True

    def strategy(self, place: int) -> PlacementGroupSchedulingStrategy:
        """For the actor that is the `place`-th of the row."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._order[place])

    def free(self) -> None:
        remove_placement_group(self._group)


@dataclass(frozen=True)
class Reservation:
    """The places of a layout: a row of one for each engine, or None where those reserve nothing, and a row of its
    shards for each replica."""

    engine: ActorResources
    evaluator: ActorResources
    engines: list[Neighbours | None]
    replicas: list[Neighbours]

    def free(self) -> None:
        for row in filter(None, (*self.engines, *self.replicas)):
            row.free()


def reserve(layout: Layout, limit: float, say: Callable[[str], None]) -> Reservation:
    """Places for all actors of a layout, once the cluster has them: an autoscaler sees what is asked for.

    Tells what is still missing whenever that changes. Raises InputError with it after `limit` seconds.
    """
    there, found, began, told = _there(), _asked(layout), time.monotonic(), ""
    try:
        while missing := _missing(found):
            if time.monotonic() - began > limit:
                raise InputError(
                    f"the cluster did not become large enough within {limit:g} s ({missing}): add nodes, or ask for "
                    "less with evaluators.replicas, evaluators.shards, evaluators.gpus_per_shard, generator.engines"
                )
            waited = time.monotonic() - began > min(SOON, limit / 4)
            if waited and missing != told:
                say(f"waiting for the cluster: {missing}")
                told = missing
            time.sleep(min(POLL if waited else POLL / 10, limit / 10))
            # A node that fell silent is counted for some seconds: shares of it are no longer to be had. Where the
            # cluster grows, what was asked for stays asked for.
            now = _there()
            if any(now[name] < amount for name, amount in there.items()):
                found.free()
                there, found = now, _asked(layout)
    except BaseException:
        found.free()
        raise
    return found


def _there() -> dict[str, float]:
    """CPUs and GPUs of the cluster."""
    have = ray.cluster_resources()
    return {name: have.get(name, 0.0) for name in ("CPU", "GPU")}


def _asked(layout: Layout) -> Reservation:
    """Places that Ray is asked for, as what the cluster has now allows."""
    engine, evaluator = layout.resources()
    engines = [Neighbours(1, engine) if engine.bundle() else None for _ in range(layout.engines)]
    replicas = [Neighbours(layout.shards, evaluator) for _ in range(layout.replicas)]
    return Reservation(engine, evaluator, engines, replicas)


def _missing(places: Reservation) -> str:
    """What is not reserved yet, for people; empty where all is."""
    engines = sum(not row.placed() for row in places.engines if row)
    replicas = sum(not row.placed() for row in places.replicas)
    if not engines and not replicas:
        return ""
    parts = [(engines, len(places.engines), "generators"), (replicas, len(places.replicas), "replicas of evaluators")]
    have = ", ".join(f"{amount:g} {name}s" for name, amount in _there().items())
    nodes = sum(node["Alive"] for node in ray.nodes())
    waiting = ", ".join(f"{n} of {of} {what}" for n, of, what in parts if n)
    each = places.evaluator.bundle() if replicas else places.engine.bundle()
    needs = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
    return f"no place for {waiting}, of {needs} an actor; {nodes} nodes have {have}"
