"""Strategies of search at equal budgets: GCoT, a plain top-k prompt, best of N, genetic, and random.

    python bench/search/search.py runs/strategies                     # all that is missing, seed by seed
    python bench/search/search.py runs/strategies --arms genetic random --seeds 0
    python bench/search/search.py runs/strategies --only-report       # table and plot of what is there

Each strategy and seed is one search with the configuration in search.yaml, run one after the other on one pool of
evaluators and one vLLM. Stopped at any time, the same command goes on. What is finished is in results/, one file per
search, and is not run again; table.md and search.png are made of these files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from autoprune.actors.generator import GeneticGenerator, GrammarGenerator
from autoprune.actors.placement import plan_resources
from autoprune.actors.pool import EvaluatorPool
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.config import Config, load_config
from autoprune.pipeline.launch import cluster, signals, start_vllm
from autoprune.pipeline.lineage import paired_difference
from autoprune.pipeline.preparation import pool_plan, prepare, settled
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.report import algorithm_text
from autoprune.pipeline.screening import NEW_SLACK, rank_correlation
from autoprune.pipeline.search import Search

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GENETIC = "search.operators={explore: 0.5, mutate: 2, crossover: 1.5, tune: 1}"
ARMS: dict[str, tuple[str, ...]] = {
    "gcot": (),
    "topk": ("search.prompt=topk",),
    "best-of-n": ("search.prompt=fixed",),
    "genetic": ("generator.kind=genetic", GENETIC),
    "random": ("generator.kind=grammar", "search.prompt=fixed"),
}
# Not strategies of their own: GCoT without what keeps it diverse, which `table.md` sets beside it.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "gcot-undiverse": ("search.diversity=false",),
    "genetic-undiverse": ("generator.kind=genetic", GENETIC, "search.diversity=false"),
}


class Untracked:
    """No MLflow: the lineage and the journal hold everything."""

    def candidate(self, candidate, edges) -> None:
        pass

    def generation(self, index, metrics) -> None:
        pass


def configuration(runs: Path, arm: str, seed: int, overrides: list[str]) -> Config:
    """Of one search; its folder is made, and told what it is."""
    settings = [f"name={arm}-{seed}", f"runs={runs}", f"seed={seed}", *(ARMS | ABLATIONS)[arm], *overrides]
    config = settled(load_config(HERE / "search.yaml", settings))
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "bench.json").write_text(json.dumps({"settings": settings}))
    return config


def result(search: Search, seconds: float) -> dict:
    """What is kept of a search: how the best fell, what became of its answers, and what it cost."""
    lineage, spent = search.lineage, search.spent
    written = [c for c in lineage if c.operator not in ("seed", "tune")]
    counts = {status: sum(c.status == status for c in written) for status in ("invalid", "repeat", "screened")}
    valid = [c for c in written if c.mask_hash]
    by_evaluations, by_answers, best, answers = [], [], float("inf"), 0
    for generation in range(search.config.search.generations + 1):
        members = [c for c in lineage if c.generation == generation]
        if not members:
            break
        for candidate in members:
            answers += candidate.operator not in ("seed", "tune")
            if candidate.status == "evaluated":
                best = min(best, candidate.fitness)
                by_evaluations.append(best)
        by_answers.append([answers, best])
    (report,) = search.measure([lineage.best().algorithm], "report")
    winner = lineage.best()
    judged = [c for c in lineage.evaluated() if c.rival]
    differences = {c.id: paired_difference(c.evaluation, lineage[c.rival].evaluation) for c in judged}
    # Worse than its rival beyond the noise of the whole measurement; and by more than what a new kind is granted.
    slack = {c.id: 0.0 if c.niche == lineage[c.rival].niche else NEW_SLACK for c in judged}
    worse = [c for c in judged if differences[c.id][0] > 2 * differences[c.id][1]]
    wasted = [c for c in worse if differences[c.id][0] > slack[c.id] + 2 * differences[c.id][1]]
    rungs = {
        name: [(c.rungs[name], c.fitness) for c in judged if name in c.rungs and c.operator != "tune"]
        for name in search.config.search.fidelities
    }
    return {
        "answers": len(written),
        "usable": len(written) - counts["invalid"],
        "repeated": counts["repeat"],
        "screened": counts["screened"],
        "different_masks": len({c.mask_hash for c in valid}) / max(1, len(valid)),
        "evaluations": spent.evaluations,
        "cheap_evaluations": spent.cheap,
        "worse_than_rival": len(worse) / max(1, len(judged)),
        "wasted": len(wasted) / max(1, len(judged)),
        "rank_correlation": {name: rank_correlation(pairs) for name, pairs in rungs.items()},
        "best_by_evaluations": by_evaluations,
        "best_by_answers": by_answers,
        "best": winner.id,
        "operator": winner.operator,
        "fitness_nll": winner.fitness,
        "fresh_nll": winner.fresh and winner.fresh.nll,
        "report_nll": report.nll,
        "prompt_tokens": spent.prompt_tokens,
        "completion_tokens": spent.completion_tokens,
        "seconds": {"generating": spent.generating, "evaluating": spent.evaluating, "all": seconds},
        "algorithm": algorithm_text(winner.algorithm),
        "json": winner.algorithm.to_dict(),
        "spent": asdict(spent),
    }


def run(runs: Path, jobs: list[tuple[str, int]], overrides: list[str]) -> None:
    progress = ConsoleProgress()
    configs = {job: configuration(runs, *job, overrides) for job in jobs}
    first = next(iter(configs.values()))
    prepared = prepare(first, first.target.model)
    with cluster(), signals():
        evaluators = first.evaluators
        own, shared = plan_resources(evaluators.shards, evaluators.replicas, evaluators.threads)
        pool = EvaluatorPool(pool_plan(first, prepared, shared), progress.say)
        vllm = None
        try:
            pool.start()
            progress.say(f"dense: {pool.dense['fitness'].nll:.4f}, report {pool.dense['report'].nll:.4f}")
            for (arm, seed), config in configs.items():
                kind = config.generator.kind
                if kind == "vllm" and vllm is None:
                    vllm = start_vllm(config, own)
                    vllm.wait()
                generator = (
                    vllm
                    if kind == "vllm"
                    else {"genetic": GeneticGenerator, "grammar": GrammarGenerator}[kind](config.seed)
                )
                progress.say(f"=== {arm}, seed {seed}")
                search = Search(config, config.folder, generator, pool, Untracked(), progress)
                search.run()
                found = {"arm": arm, "seed": seed, "writer": config.generator.model if kind == "vllm" else kind}
                found |= result(search, search.spent.total)
                RESULTS.mkdir(exist_ok=True)
                (RESULTS / f"{arm}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
                progress.say(f"=== {arm}, seed {seed}: report {perplexity(found['report_nll']):.2f}")
        finally:
            pool.stop()
            if vllm is not None:
                vllm.stop()


def results() -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault(one["arm"], []).append(one)
    return {arm: found[arm] for arm in (*ARMS, *ABLATIONS) if arm in found}


def _spread(values: list[float], form: str) -> str:
    """Mean, and the range where there are several."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))}–{form.format(max(values))})"


def table(found: dict[str, list[dict]]) -> str:
    columns = {
        "fitness": lambda r: (perplexity(r["fitness_nll"]), "{:.1f}"),
        "report": lambda r: (perplexity(r["report_nll"]), "{:.1f}"),
        "answers": lambda r: (r["answers"], "{:.0f}"),
        "usable": lambda r: (100 * r["usable"] / max(1, r["answers"]), "{:.0f}%"),
        "repeated": lambda r: (100 * r["repeated"] / max(1, r["answers"]), "{:.0f}%"),
        "different masks": lambda r: (100 * r["different_masks"], "{:.0f}%"),
        "evaluations": lambda r: (r["evaluations"], "{:.0f}"),
        "cheap": lambda r: (r["cheap_evaluations"], "{:.0f}"),
        "worse than rival": lambda r: (100 * r["worse_than_rival"], "{:.0f}%"),
        "wasted": lambda r: (100 * r["wasted"], "{:.0f}%"),
        "tokens": lambda r: ((r["prompt_tokens"] + r["completion_tokens"]) / 1000, "{:.0f}k"),
        "generating": lambda r: (r["seconds"]["generating"] / 60, "{:.1f} min"),
        "evaluating": lambda r: (r["seconds"]["evaluating"] / 60, "{:.1f} min"),
    }
    lines = [f"| strategy | seeds | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for arm, runs in found.items():
        cells = []
        for read in columns.values():
            values = [read(r) for r in runs]
            cells.append(_spread([value for value, _ in values], values[0][1]))
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for arm, runs in found.items():
        if arm not in ARMS:
            continue
        colour = f"C{list(ARMS).index(arm)}"
        curves = (
            [[(i + 1, perplexity(v)) for i, v in enumerate(r["best_by_evaluations"])] for r in runs],
            [[(answers, perplexity(v)) for answers, v in r["best_by_answers"]] for r in runs],
        )
        for axis, own in zip(axes, curves, strict=True):
            grid = np.arange(0, max(x for curve in own for x, _ in curve) + 1)
            # The best so far is a staircase: between two points the earlier one holds.
            steps = np.array(
                [[next((y for x, y in reversed(curve) if x <= at), np.nan) for at in grid] for curve in own]
            )
            axis.plot(grid, np.nanmean(steps, axis=0), color=colour, label=f"{arm} ({len(runs)})")
            if len(runs) > 1:
                axis.fill_between(grid, steps.min(axis=0), steps.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="evaluations on the fitness split", ylabel="best perplexity, fitness split", yscale="log")
    axes[1].set(xlabel="answers")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, title="mean, and range over seeds")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/strategies"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *ABLATIONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    jobs = [(arm, seed) for arm, seed in jobs if not (RESULTS / f"{arm}-{seed}.json").exists()]
    if jobs and not options.only_report:
        began = time.monotonic()
        run(options.runs.resolve(), jobs, options.set)
        print(f"{len(jobs)} searches in {(time.monotonic() - began) / 60:.0f} min", file=sys.stderr)
    found = results()
    (HERE / "table.md").write_text(table(found))
    plot(found, HERE / "search.png")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
