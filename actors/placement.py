"""How many CPUs and GPUs each actor asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class ActorResources:
    """What one actor reserves, and the device that it computes on."""

    num_cpus: float
    num_gpus: float
    device: str


def equal_share(actors: int, places: list[float]) -> float:
    """The largest share, rounded down to a hundredth, of which `actors` fit into places of these whole sizes.

    An actor lies within one place (a node's CPUs, a GPU): three shares of 0.66 do not fit into two GPUs.
    """
    for hundredths in range(100, 0, -1):
        if sum(int(size * 100) // hundredths for size in places) >= actors:
            return hundredths / 100
    return 0.01


def plan_resources(shards: int, replicas: int, threads: int) -> tuple[ActorResources, ActorResources]:
    """Resources of the generator and of each evaluator shard, from what the connected cluster has.

    With GPUs, the generator and every shard get an equal share of them, whole ones where there are enough. Without,
    shards reserve their threads as CPUs, less where the nodes have fewer, so that a search starts on any machine; the
    generator reserves none, since it rests while candidates are evaluated.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    actors = shards * replicas
    if gpus:
        resources = ActorResources(0, equal_share(actors + 1, [1.0] * gpus), "cuda")
        return resources, resources
    share = equal_share(actors, [node.get("CPU", 0) / threads for node in nodes])
    return ActorResources(0, 0, "cpu"), ActorResources(share * threads, 0, "cpu")
