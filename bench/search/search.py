"""Strategies of search with equal bounds on answers and full evaluations: GCoT, top-k, best of N, genetic, random.

    python bench/search/search.py runs/strategies                     # all that is missing, seed by seed
    python bench/search/search.py runs/strategies --arms genetic random --seeds 0
    python bench/search/search.py runs/strategies --only-report       # table and plot of what is there

Each strategy and seed is one search with the configuration in search.yaml, run one after the other on one pool of
evaluators and one vLLM. Cheap measurements and tokens are not equal: GCoT takes more of both than top-k. Stopped at any
time, the same command goes on. What is finished is in results/, one file per search, and is not run again; table.md and
search.png are made of these files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from autoprune.actors.chance import BY_CHANCE
from autoprune.actors.pool import EvaluatorPool
from autoprune.models.perplexity import perplexity
from autoprune.pipeline.config import Config, build, difference, load_config
from autoprune.pipeline.launch import cluster, reserve_places, signals, start_vllm
from autoprune.pipeline.lineage import paired_difference
from autoprune.pipeline.preparation import pool_plan, prepare_all, settled
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.screening import NEW_SLACK, noise, rank_correlation, reading
from autoprune.pipeline.search import Search
from autoprune.pipeline.wording import algorithm_text

HERE = Path(__file__).parent
RESULTS = HERE / "results"
GENETIC = "search.operators={explore: 0.5, mutate: 2, crossover: 1.5, tune: 1}"
# So many prompts share the answers of a generation, where prompts, or parents, differ.
PROMPTS = "search.prompts=6"
ARMS: dict[str, tuple[str, ...]] = {
    "gcot": (PROMPTS,),
    "topk": ("search.prompt=topk",),
    "best-of-n": ("search.prompt=fixed",),
    "genetic": ("generator.kind=genetic", GENETIC, PROMPTS),
    "random": ("generator.kind=grammar", "search.prompt=fixed"),
}
# Not strategies of their own: without one of its parts, which `table.md` sets beside it. GCoT without trials of
# statistics is what it was before there were any, and without diversity it has none either.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "gcot-untried": ("search.trials=false",),
    "gcot-undiverse": ("search.diversity=false", PROMPTS),
    "genetic-undiverse": ("generator.kind=genetic", GENETIC, "search.diversity=false", PROMPTS),
}


class Untracked:
    """No MLflow: the lineage and the journal hold everything."""

    def candidate(self, candidate, edges) -> None:
        pass

    def generation(self, index, metrics) -> None:
        pass


def configuration(runs: Path, arm: str, seed: int, overrides: list[str]) -> Config:
    """Of one search, whose folder is made."""
    settings = [f"name={arm}-{seed}", f"runs={runs}", f"seed={seed}", *(ARMS | ABLATIONS)[arm], *overrides]
    config = settled(load_config(HERE / "search.yaml", settings))
    config.folder.mkdir(parents=True, exist_ok=True)
    return config


def plan(arm: str, seed: int, overrides: list[str]) -> Config:
    """What a result rests on."""
    return load_config(HERE / "search.yaml", [f"seed={seed}", *(ARMS | ABLATIONS)[arm], *overrides])


def code() -> str:
    """Hash of the sources that a result rests on: results of different code are not the same experiment."""
    root = HERE.parents[1]
    files = sorted(
        path for floor in ("pipeline", "actors", "models", "algorithms") for path in (root / floor).rglob("*")
    )
    digest = hashlib.sha256()
    for path in (path for path in files if path.suffix in (".py", ".txt")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def finished(arm: str, seed: int, overrides: list[str]) -> bool:
    """Whether there is a result; SystemExit where it is of another configuration."""
    path = RESULTS / f"{arm}-{seed}.json"
    if not path.exists():
        return False
    # Keys that are newer than the result have their defaults in it.
    changed = difference(build(Config, json.loads(path.read_text())["config"]), plan(arm, seed, overrides))
    if changed:
        raise SystemExit(
            f"{path} is of another configuration ({'; '.join(changed)}): move it away, or leave --set and search.yaml "
            "as they were"
        )
    return True


def fidelity(search: Search, count: int) -> dict:
    """`count` candidates of a finished search, also such as were stopped, on every fidelity: how these rank, and whom
    each would stop at the end of the search, rightly or not. Evenly spaced in proposal order, all different."""
    valid = [c for c in search.lineage if c.mask_hash and c.operator not in ("seed", "tune")]
    distinct = list({c.mask_hash: c for c in valid}.values())
    chosen = [distinct[i * len(distinct) // count] for i in range(count)] if len(distinct) > count else distinct
    algorithms = [c.algorithm for c in chosen]
    for rung in ("probe", "cheap"):
        for candidate, evaluation in zip(chosen, search.screen.measure(rung, algorithms), strict=True):
            value = reading(evaluation)
            candidate.rungs |= {} if value is None else {rung: value}
    levels = dict(zip([c.id for c in chosen], [e.nll for e in search.measure(algorithms, "fitness")], strict=True))
    known = [c for c in chosen if levels[c.id] is not None and len(c.rungs) == 2]
    found: dict = {"candidates": len(known), "noise": noise(search.screen.differences())}
    for rung in ("probe", "cheap"):
        stopped = [c for c in known if search.screen.stops(rung, c, search.screen.rival(c), found["noise"])]
        found[rung] = {
            "rank_correlation": rank_correlation([(c.rungs[rung], levels[c.id]) for c in known]),
            "stopped": len(stopped),
            "of_these_better_than_their_rival": sum(levels[c.id] < search.screen.rival(c).fitness for c in stopped),
        }
    return found | {"measured": [[c.id, c.rungs["probe"], c.rungs["cheap"], levels[c.id]] for c in known]}


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
        "rank_correlation": search.screen.correlations(),
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


def run(runs: Path, jobs: list[tuple[str, int]], overrides: list[str], count: int) -> None:
    progress = ConsoleProgress()
    configs = {job: configuration(runs, *job, overrides) for job in jobs}
    first = next(iter(configs.values()))
    prepared = prepare_all(first)[first.target.model]
    with cluster(), signals():
        places = reserve_places(replace(first, generator=replace(first.generator, kind="vllm")), 1, progress.say)
        # What evaluators learn of the dense model is the same for all searches.
        shared = replace(first, name="all")
        pool = EvaluatorPool(
            pool_plan(shared, prepared, places.evaluator, places.engine), progress.say, places.replicas
        )
        vllm = None
        try:
            pool.start()
            progress.say(f"dense: {pool.dense['fitness'].nll:.4f}, report {pool.dense['report'].nll:.4f}")
            for (arm, seed), config in configs.items():
                kind = config.generator.kind
                if kind == "vllm" and vllm is None:
                    vllm = start_vllm(config, places, progress.say)
                    vllm.wait()
                generator = vllm if kind == "vllm" else BY_CHANCE[kind](config.seed)
                progress.say(f"=== {arm}, seed {seed}")
                search = Search(config, config.folder, generator, pool, Untracked(), progress)
                search.run()
                found = {"arm": arm, "seed": seed, "writer": config.generator.model if kind == "vllm" else kind}
                found |= {"code": code(), "config": plan(arm, seed, overrides).to_dict()} | result(
                    search, search.spent.total
                )
                if count:
                    found["fidelity"] = fidelity(search, count)
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
    codes: dict[str, list[str]] = {}
    for arm, runs in found.items():
        for r in runs:
            codes.setdefault(r["code"], []).append(f"{arm}-{r['seed']}")
    if len(codes) > 1:
        each = "; ".join(f"{code}: {', '.join(names)}" for code, names in sorted(codes.items()))
        lines.append(f"\nOf {len(codes)} versions of the code. {each}.")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """Best so far against evaluations and against answers: mean over seeds, and their range. Dots: where searches
    ended, by whichever budget was used up first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for arm in (arm for arm in ARMS if arm in found):
        runs, colour = found[arm], f"C{list(ARMS).index(arm)}"
        by_evaluations = [[(i + 1, v) for i, v in enumerate(r["best_by_evaluations"])] for r in runs]
        by_answers = [[tuple(point) for point in r["best_by_answers"]] for r in runs]
        for axis, curves in zip(axes, (by_evaluations, by_answers), strict=True):
            grid = range(max(c[0][0] for c in curves), max(c[-1][0] for c in curves) + 1)
            # The best so far is a staircase: between two points the earlier one holds.
            steps = [[perplexity(next(y for x, y in reversed(c) if x <= at)) for at in grid] for c in curves]
            columns = list(zip(*steps, strict=True))
            mean = [statistics.fmean(column) for column in columns]
            axis.step(grid, mean, where="post", color=colour, label=f"{arm} ({len(runs)})")
            axis.plot([c[-1][0] for c in curves], [perplexity(c[-1][1]) for c in curves], "o", color=colour, ms=4)
            if len(runs) > 1:
                low, high = map(min, columns), map(max, columns)
                axis.fill_between(grid, list(low), list(high), step="post", color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="evaluations on the whole fitness split", ylabel="best perplexity on the fitness split")
    axes[1].set(xlabel="answers")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, title="mean and range over seeds")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/strategies"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=[*ARMS, *ABLATIONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--fidelity", type=int, default=0, metavar="N", help="also measure N of each on all fidelities")
    parser.add_argument("--only-report", action="store_true")
    options = parser.parse_args()
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    jobs = [job for job in jobs if not finished(*job, options.set)]
    if jobs and not options.only_report:
        began = time.monotonic()
        run(options.runs.resolve(), jobs, options.set, options.fidelity)
        print(f"{len(jobs)} searches in {(time.monotonic() - began) / 60:.0f} min", file=sys.stderr)
    found = results()
    (HERE / "table.md").write_text(table(found))
    plot(found, HERE / "search.png")
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
