"""How well the pool keeps its actors busy: real Ray with evaluators that sleep, and on paper for many more.

    python bench/scaling/scaling.py measure            # 1 to 64 actors, several minutes
    python bench/scaling/scaling.py simulate JOURNAL   # 8, 64 and 512 GPUs, with the durations of a real search

Efficiency is the time in which perfectly packed actors would do the work, over the time that it took: what is lost is
the filling and emptying of pipelines, waiting behind longer candidates, and the driver.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from autoprune.actors.dispatch import Dispatch, depth, shallow

LONGEST = 0.5  # seconds at each shard; the shortest is a tenth of it
JOBS = 400  # per replica
SETUPS = ((1, 1), (4, 1), (4, 4), (4, 16))  # shards, replicas


def sleeper() -> type:
    """The class of evaluators that sleep for as long as an algorithm's name says. Within a function, so that it travels
    to the actors by value, and without torch, which 64 processes would take minutes to import."""

    class Sleeper:
        def __init__(self, *_, **__):
            pass

        def take_up(self, _):
            from types import SimpleNamespace

            report = SimpleNamespace(numels=[1], pruned=[0], errors=[], window_nlls=[1.0], seconds=0.0)
            return SimpleNamespace(digest="same", profiles=[], reports={"fitness": report})

        def forward(self, split, states, tokens, algorithm, sparsities):
            import time
            from types import SimpleNamespace

            time.sleep(algorithm)
            return None, SimpleNamespace(numels=[1], pruned=[0], errors=[], window_nlls=[1.0], seconds=algorithm)

    return Sleeper


def durations(count: int, seed: int, longest: float) -> list[float]:
    """Tenfold different, evenly in their logarithm."""
    rng = random.Random(seed)
    return [longest * 10 ** (rng.random() - 1) for _ in range(count)]


def measure(shards: int, replicas: int, jobs: int, longest: float) -> dict:
    """One pool, `jobs` candidates per replica, of at most `longest` seconds at each shard."""
    import torch

    from autoprune.actors.placement import ActorResources
    from autoprune.actors.pool import EvaluatorPool
    from autoprune.actors.replica import PoolPlan

    class Pool(EvaluatorPool):
        """Nothing to allocate: a job is its duration. Counts what the driver spends on dispatch."""

        def _planned(self, *_):
            return None

    plan = PoolPlan(
        model="none",
        bounds=tuple((shard, shard + 1) for shard in range(shards)),
        replicas=replicas,
        threads=1,
        dtype="float32",
        sparsity=0.5,
        splits={"calibration": torch.zeros(1, 2), "fitness": torch.zeros(1, 2)},
        statistics=frozenset(),
        features=frozenset(),
        deadline=600.0,
        attempts=3,
        resources=ActorResources(0.001, 0, "cpu"),
    )
    work = durations(jobs * replicas, shards * replicas, longest)
    pool = Pool(plan, actor=sleeper())
    pool.start()
    began, dispatching, busy = time.monotonic(), time.thread_time(), time.process_time()
    done = sum(evaluation.error is None for _, evaluation in pool.evaluate(work))
    seconds = time.monotonic() - began
    dispatching, busy = time.thread_time() - dispatching, time.process_time() - busy
    pool.stop()
    assert done == len(work)
    ray_calls = len(work) * shards
    return {
        "actors": shards * replicas,
        "shards": shards,
        "candidates": len(work),
        "seconds": seconds,
        "efficiency": sum(work) / replicas / seconds,
        "simulated": simulate(shards, replicas, work),
        "dispatch_ms_per_call": 1000 * dispatching / ray_calls,
        "process_ms_per_call": 1000 * busy / ray_calls,  # with Ray's threads, which look around in idle times, too
    }


def simulate(shards: int, replicas: int, work: Sequence[float]) -> float:
    """Efficiency of the same dispatch without a driver's delays: seconds at each shard, for each candidate."""
    table = Dispatch(len(work), replicas, depth(shards), float("inf"), 1, shallow(shards))
    free, ends, now = [[0.0] * shards for _ in range(replicas)], [], 0.0
    while table.left:
        while (sent := table.assign(now)) is not None:
            replica, job = sent
            at = now
            for shard in range(shards):
                free[replica][shard] = at = max(at, free[replica][shard]) + work[job]
            heapq.heappush(ends, (at, replica))
        now, replica = heapq.heappop(ends)
        table.finish(replica, now)
    return sum(work) / replicas / now


def recorded(journal: Path) -> list[float]:
    """Computing seconds of every evaluation of a search, over all its shards."""
    records = [json.loads(line)["record"] for line in journal.read_text().splitlines()]
    seconds = [r["evaluation"]["seconds"] for r in records if r["kind"] == "evaluation" and r["split"] == "fitness"]
    return [one for one in seconds if one > 0]


def paper(journal: Path) -> str:
    found = recorded(journal)
    rng = random.Random(0)
    lines = [
        f"Of {journal.name}: {len(found)} evaluations of {min(found):.1f} to {max(found):.1f} s, mean "
        f"{statistics.fmean(found):.1f} s.\n",
        "| GPUs | shards | replicas | candidates a generation | efficiency | candidates per hour |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in (8, 64, 512):
        for shards in (1, 4):
            replicas = gpus // shards
            for each in (4, 16, 64):
                work = [rng.choice(found) / shards for _ in range(each * replicas)]
                efficiency = simulate(shards, replicas, work)
                rate = 3600 * efficiency * replicas / statistics.fmean(work)
                lines.append(f"| {gpus} | {shards} | {replicas} | {len(work)} | {efficiency:.2f} | {rate:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["measure", "simulate"])
    parser.add_argument("journal", type=Path, nargs="?")
    parser.add_argument("--jobs", type=int, default=JOBS, help="candidates per replica")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds at each shard; the shortest is a tenth")
    parser.add_argument("--actors", type=int, nargs="+", default=[s * r for s, r in SETUPS], help="of these set-ups")
    options = parser.parse_args()
    if options.what == "simulate":
        print(paper(options.journal))
        return
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print("| actors | shards | candidates | seconds | efficiency | simulated | dispatch, ms per call | whole driver |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for shards, replicas in SETUPS:
        if shards * replicas not in options.actors:
            continue
        row = measure(shards, replicas, options.jobs, options.longest)
        print(
            f"| {row['actors']} | {row['shards']} | {row['candidates']} | {row['seconds']:.1f} | "
            f"{row['efficiency']:.3f} | {row['simulated']:.3f} | {row['dispatch_ms_per_call']:.2f} | "
            f"{row['process_ms_per_call']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
