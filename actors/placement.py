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


def plan_resources(shards: int, replicas: int, threads: int) -> tuple[ActorResources, ActorResources]:
    """Resources of the generator and of each evaluator shard, from what the connected cluster has.

    With GPUs, the generator and every shard get an equal share of them, whole ones where there are enough. Without,
    shards reserve their threads as CPUs, less where the machine has fewer, so that a search starts on any machine;
    the generator reserves none, since it rests while candidates are evaluated.
    """
    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 1.0)
    actors = shards * replicas
    if gpus >= 1:
        share = 1.0 if gpus >= actors + 1 else int(gpus / (actors + 1) * 100) / 100
        resources = ActorResources(0, share, "cuda")
        return resources, resources
    return ActorResources(0, 0, "cpu"), ActorResources(min(float(threads), cpus / actors), 0, "cpu")
