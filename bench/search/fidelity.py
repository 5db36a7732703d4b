"""How well the cheap fidelities rank: candidates of a search, also those that it stopped, measured on all of them.

    python bench/search/fidelity.py runs/strategies/random-0 --candidates 48

Takes candidates of a run of bench/search/search.py evenly spaced in proposal order, measures each on the probe, on the
search's cheap windows and on the whole fitness split, and prints Spearman's rank correlations; which of them the search
would have stopped, and how many of these wrongly. Writes fidelity.json. What the run has measured is not measured anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from search import Untracked

from autoprune.actors.generator import estimate
from autoprune.actors.placement import plan_resources
from autoprune.actors.pool import EvaluatorPool
from autoprune.pipeline.config import load_config
from autoprune.pipeline.launch import cluster, signals
from autoprune.pipeline.preparation import pool_plan, prepare, settled
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.screening import noise, rank_correlation, reading, subset_nll
from autoprune.pipeline.search import Search

HERE = Path(__file__).parent


class Silent:
    """Writes nothing: this only measures."""

    count = staticmethod(estimate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--candidates", type=int, default=48)
    options = parser.parse_args()
    folder, progress = options.run.resolve(), ConsoleProgress()
    own = json.loads((folder / "bench.json").read_text())
    config = replace(settled(load_config(HERE / "search.yaml", own["settings"])), runs=str(folder.parent))
    with cluster(), signals():
        evaluators = config.evaluators
        _, shared = plan_resources(evaluators.shards, evaluators.replicas, evaluators.threads)
        pool = EvaluatorPool(pool_plan(config, prepare(config, config.target.model), shared), progress.say)
        try:
            pool.start()
            search = Search(config, folder, Silent(), pool, Untracked(), progress)
            search.restore()
            valid = [c for c in search.lineage if c.mask_hash and c.operator not in ("seed", "tune")]
            distinct = list({c.mask_hash: c for c in valid}.values())
            places = [i * len(distinct) // options.candidates for i in range(min(options.candidates, len(distinct)))]
            chosen = [distinct[place] for place in dict.fromkeys(places)]
            algorithms = [c.algorithm for c in chosen]
            rungs = {r: [reading(r, e) for e in search.screen.measure(r, algorithms)] for r in ("probe", "cheap")}
            full = [e.nll for e in search.measure(algorithms, "fitness")]
        finally:
            pool.stop()
    known = [
        i for i, value in enumerate(full) if value is not None and None not in (rungs["probe"][i], rungs["cheap"][i])
    ]
    found = {"candidates": len(known)}
    for rung, values in rungs.items():
        found[f"rank_correlation_{rung}"] = rank_correlation([(values[i], full[i]) for i in known])
    best = search.lineage.evaluated()[0]
    level = subset_nll(best.evaluation, search.screen.windows)
    error = noise(search.screen.differences())
    stopped = [i for i in known if rungs["cheap"][i] - level > error]
    found |= {
        "noise": error,
        "stopped_against_the_best": len(stopped),
        "of_these_better_than_the_best": sum(full[i] < best.fitness for i in stopped),
        "rungs": {rung: [values[i] for i in known] for rung, values in rungs.items()},
        "full": [full[i] for i in known],
    }
    (HERE / "fidelity.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("rungs", "full")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
