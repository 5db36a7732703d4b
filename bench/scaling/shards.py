"""Two shards against one, with real work: how long the same candidates take, and how much memory an actor needs.

    python bench/scaling/shards.py                     # about 20 minutes on 2 cores
    python bench/scaling/shards.py --candidates 8 --repeats 1

One thread per actor. Ideal is the time of one actor, over the actors that share its work: what is missing is the
filling and emptying of the pipeline, shards of different cost, and transport. Memory is told with what a process has
that holds no model: libraries are most of it where the model is small.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import ray

from autoprune.actors.placement import ActorResources
from autoprune.actors.pool import EvaluatorPool
from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.config import Config, load_config
from autoprune.pipeline.population import seed
from autoprune.pipeline.preparation import Prepared, pool_plan, prepare_all, settled

HERE = Path(__file__).resolve().parent
SETUPS = ((1, 1), (2, 1), (1, 2))  # shards, replicas
SCORES = ("wanda", "ria", "magnitude")


def candidates(count: int) -> list[Algorithm]:
    """Different ones: no evaluation is shared between two."""
    found = [seed(f"{SCORES[i % len(SCORES)]}+sdsa:m={0.1 + 0.01 * (i // len(SCORES)):.2f}") for i in range(count)]
    return [one.algorithm for one in found]


def own_memory(_=None) -> float:
    """MB that belong to this process alone, without the pages that it shares with others."""
    return psutil.Process().memory_full_info().uss / 1e6


class Bare:
    """An actor that has imported what an evaluator needs, and has computed once."""

    def __init__(self) -> None:
        import torch

        from autoprune.actors import evaluator

        assert evaluator.EvaluatorShard
        torch.set_num_threads(1)
        torch.ones(64, 64) @ torch.ones(64, 64)


def bare_memory() -> float:
    actor = ray.remote(Bare).remote()
    found = ray.get(actor.__ray_call__.remote(own_memory))
    ray.kill(actor)
    return found


def memory(pool: EvaluatorPool) -> list[float]:
    """MB of each evaluator."""
    actors = [actor for replica in pool._replicas for actor in replica.actors]
    return ray.get([actor.__ray_call__.remote(own_memory) for actor in actors])


def configuration(folder: str, shards: int = 1, replicas: int = 1) -> Config:
    settings = [
        f"runs={folder}",
        "data.report_windows=1",
        "data.calibration_windows=8",
        "evaluators.threads=1",
        f"evaluators.shards={shards}",
        f"evaluators.replicas={replicas}",
        "search.seeds=[wanda+sdsa]",
        "search.statistics=[x_norm]",
    ]
    return settled(load_config(HERE.parent / "search" / "search.yaml", settings))


def measure(config: Config, prepared: Prepared, work: list[Algorithm]) -> dict:
    pool = EvaluatorPool(pool_plan(config, prepared, ActorResources(0.001, 0, "cpu")), print)
    try:
        pool.start()
        began = time.monotonic()
        found = [evaluation for _, evaluation in pool.evaluate(work)]
        seconds = time.monotonic() - began
        assert all(evaluation.error is None for evaluation in found)
        return {"seconds": seconds, "memory": memory(pool), "nlls": sorted(e.nll for e in found)}
    finally:
        pool.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(folder)
        prepared = prepare_all(config)[config.target.model]
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        work = candidates(options.candidates)
        bare = bare_memory()
        rows = {setup: [] for setup in SETUPS}
        for _ in range(options.repeats):
            for setup in SETUPS:
                rows[setup].append(measure(configuration(folder, *setup), prepared, work))
                print(setup, f"{rows[setup][-1]['seconds']:.1f} s", flush=True)
    first = rows[1, 1]
    print(f"\n{config.target.model}, {len(work)} candidates, {options.repeats} times in turn; one thread per actor.")
    print(f"An actor that holds no model has {bare:,.0f} MB.\n")
    print(
        "| shards | replicas | seconds | of the ideal | MB per actor | less that without a model | measures the same |"
    )
    print("|---:|---:|---:|---:|---:|---:|---|")
    for (shards, replicas), found in rows.items():
        seconds = [one["seconds"] for one in found]
        shares = [a["seconds"] / (shards * replicas) / b["seconds"] for a, b in zip(first, found, strict=True)]
        same = all(one["nlls"] == first[0]["nlls"] for one in found)
        print(
            f"| {shards} | {replicas} | {' '.join(f'{s:.1f}' for s in seconds)} | "
            f"{statistics.fmean(shares):.2f} ({min(shares):.2f}–{max(shares):.2f}) | "
            f"{', '.join(f'{m:,.0f}' for m in found[-1]['memory'])} | "
            f"{', '.join(f'{m - bare:,.0f}' for m in found[-1]['memory'])} | {'yes' if same else 'no'} |"
        )


if __name__ == "__main__":
    main()
