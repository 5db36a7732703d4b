"""What a search ends with: seeds and best on the report split, the pruned model, and the report."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import time
from functools import partial
from pathlib import Path

from autoprune.actors.messages import Evaluation
from autoprune.actors.storage import write_atomic
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import SALVAGES
from autoprune.models.export import SIDECAR
from autoprune.pipeline.asking import prune_command
from autoprune.pipeline.config import Config
from autoprune.pipeline.config_reading import setting
from autoprune.pipeline.gcot import VERSION
from autoprune.pipeline.ledger import REPORT
from autoprune.pipeline.lineage import STATUSES, finite, paired_difference
from autoprune.pipeline.preparation import SPLITS, Prepared
from autoprune.pipeline.report import write_report
from autoprune.pipeline.report_markdown import result_text
from autoprune.pipeline.run_folder import CONFIG_FILE, MODEL
from autoprune.pipeline.search import Progress, Search
from autoprune.pipeline.sensitivity import sensitivity

# That are no models.
WRITERS = {"scripted": "scripted answers", "grammar": "the grammar, at random", "genetic": "variation, at random"}


def conclude(
    config: Config,
    folder: Path,
    pool,
    search: Search,
    prepared: Prepared,
    ui: tuple[str, str],
    progress: Progress,
) -> tuple[list[Path], dict[str, float], str]:
    """Measure seeds and best on the report split, export the best, write the report. Returns artifacts, metrics, and
    what to say of the whole in Markdown. prepared: of the target's model. ui: the command that shows MLflow, and the
    run's address there."""
    best = search.lineage.best()
    rows = [("dense", None), *((c.id.removeprefix("seed-"), c) for c in search.lineage if c.operator == "seed")]
    rows = [(method, c) for method, c in rows if c is None or c.status == "evaluated"] + [("best found", best)]
    algorithms = [c.algorithm for _, c in rows if c is not None]
    cases = search.evaluator.cases if config.target.further else []
    each = [search.measure(algorithms, f"{REPORT}@{index}") for index in range(len(cases))]
    reported = each[0] if each else search.measure(algorithms, REPORT)
    measured = [(search.evaluator.dense["fitness"], pool.dense["report"])]
    measured += [(c.evaluation, e) for (_, c), e in zip(rows[1:], reported, strict=True)]
    winner = reported[-1]
    table = [_row(method, candidate, *pair, winner) for (method, candidate), pair in zip(rows, measured, strict=True)]
    model = folder / MODEL
    if model.exists() and _algorithm_of(model) != best.algorithm.key:  # of an earlier end
        old = folder / f".{MODEL}-old"  # out of the way at once: a kill in the midst would leave half of it
        shutil.rmtree(old, ignore_errors=True)
        model.rename(old)
        shutil.rmtree(old)
    if not model.exists():
        progress.say(f"writing the pruned model of {best.id}")
        details = {
            "model": prepared.pinned,
            "candidate": best.id,
            "calibration": {
                "corpus": config.data.calibration,
                "sha256": prepared.hashes["calibration"],
                "windows": pool.calibration_windows,
                "context": config.data.context,
            },
            "dtype": config.target.dtype,
            "perplexity": {"fitness_nll": best.fitness, "report_nll": reported[-1].nll},
        }
        pool.export(model, best.algorithm, details)
    costs, costing = _sensitivity(config, folder, pool, search, best.algorithm, progress)
    written = [c for c in search.lineage if c.operator not in ("seed", "tune")]
    counts = {status: sum(c.status == status for c in written) for status in STATUSES}
    spent = search.spend()
    again = setting("name", f"{config.name}-again")
    summary = {
        "name": config.name,
        "config": config.to_dict(),
        "target": config.target.model,
        "generator": WRITERS.get(config.generator.kind, config.generator.model),
        "prompts": VERSION,
        "sparsity": config.target.sparsity,
        "group": config.target.group,
        "dtype": config.target.dtype,
        "context": config.data.context,
        "corpora": {name: getattr(config.data, name) for name in SPLITS},
        "corpora_sha256": prepared.hashes,
        "tokens_scored": {name: pool.dense[name].tokens for name in ("fitness", "report")},
        "table": table,
        "gain": _gain(rows, measured),
        "looks": search.ledger.look(best.algorithm.key),
        "sensitivity": costs,
        "cases": [
            {
                "name": case.name,
                "report_nll": dict(
                    zip(
                        [method for method, _ in rows],
                        [case.pool.dense[REPORT].nll, *(e.nll for e in own)],
                        strict=True,
                    )
                ),
            }
            for case, own in zip(cases, each, strict=True)
        ],
        "counts": {
            "answers": spent.answers,
            "usable": spent.answers - counts["invalid"],
            "invalid": counts["invalid"],
            "repeated": counts["repeat"],
            "screened": counts["screened"],
            "surplus": counts["surplus"],
            "evaluated": counts["evaluated"],
            "failed": counts["failed"],
            "poison": counts["poison"],
        },
        "salvaged": {kind: sum(kind in c.salvaged and c.status != "invalid" for c in written) for kind in SALVAGES},
        "tokens": {"prompt": spent.prompt_tokens, "completion": spent.completion_tokens},
        "seconds": {
            "generating": spent.generating,
            "evaluating": spent.evaluating + costing,
            "waiting": max(0.0, spent.total - spent.generating - spent.evaluating - costing),
            "total": spent.total,
        },
        "gpu_seconds": spent.gpu_seconds,
        "best": best.id,
        "model": str(model),
        "mlflow": ui[0],
        "mlflow_run": ui[1],
        "prune_command": prune_command(config, prepared.pinned, str(folder / "best.py"), f"pruned-{best.id}"),
        "command": shlex.join(["autoprune", "search", str(folder / CONFIG_FILE), "--set", again]),
    }
    artifacts = write_report(folder, search.lineage, summary)
    reports = {metric_name(row["method"]): row["report_nll"] for row in table}
    metrics = {f"report_nll.{name}": nll for name, nll in reports.items() if nll is not None}
    note = (
        f"{result_text(summary, best.id)}\n\nThe whole graph, and the report, are among the artifacts: `lineage.html`, "
    )
    note += "`report.html`. Each candidate that was measured is a child run; its tags say where it is from."
    return [*artifacts, folder / "lineage.json", folder / CONFIG_FILE], metrics, note.strip()


def _algorithm_of(model: Path) -> str | None:
    """The key of what pruned the weights there, as the sidecar says, which is written last; None where it says
    nothing."""
    try:
        return json.loads((model / SIDECAR).read_text())["algorithm"]["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _gain(rows: list[tuple], measured: list[tuple[Evaluation, Evaluation]]) -> dict:
    """The best found against the best of the baselines on the report split, window by window."""
    best = measured[-1][1]
    baselines = [(method, e) for (method, c), (_, e) in zip(rows[1:-1], measured[1:-1], strict=True) if e.nll]
    if best.nll is None or not baselines:
        return {"rival": None}
    rival, evaluation = min(baselines, key=lambda pair: pair[1].nll)
    nats, error = paired_difference(best, evaluation)
    error = error if math.isfinite(error) else None
    return {"rival": rival, "nats": nats, "error": error, "windows": len(best.window_nlls)}


def _sensitivity(
    config: Config, folder: Path, pool, search: Search, algorithm: Algorithm, progress: Progress
) -> tuple[list[float] | None, float]:
    """Measured once for an algorithm, if the configuration wants it; and the seconds that it took."""
    if not config.search.sensitivity:
        return None, 0.0
    windows = search.screen.windows or tuple(range(len(pool.dense["fitness"].window_nlls)))
    file, about = folder / "sensitivity.json", {"algorithm": algorithm.key, "windows": list(windows)}
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["about"] == about:
            return kept["costs"], kept.get("seconds", 0.0)
    progress.say("pruning each block alone, to see which the model can spare least")
    step = partial(progress.step, "blocks, each pruned alone")
    began = time.monotonic()
    costs = sensitivity(pool, algorithm, config.target.sparsity, windows, step)
    seconds = time.monotonic() - began
    write_atomic(file, json.dumps({"about": about, "costs": costs, "seconds": seconds}).encode())
    return costs, seconds


def metric_name(method: str) -> str:
    """A method's text in the letters that MLflow takes for the name of a metric."""
    return re.sub(r"[^\w./-]", "-", method.replace(" ", "_"))


def _row(method: str, candidate, fitness: Evaluation, report: Evaluation, best: Evaluation) -> dict:
    """above_best: how far it is above the best found on the report split, nats per token, and the standard error of
    that, paired window by window."""
    paired = len(report.window_nlls) == len(best.window_nlls) and report.nll is not None and best.nll is not None
    return {
        "method": method,
        "candidate": candidate.id if candidate is not None else None,
        "sparsity": fitness.sparsity,
        "fitness_nll": fitness.nll,
        "report_nll": report.nll,
        "report_window_nlls": list(report.window_nlls),
        "above_best": list(map(finite, paired_difference(report, best))) if paired and report is not best else None,
    }
