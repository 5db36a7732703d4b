"""Composes the real parts of a search (Ray, vLLM, MLflow), runs it, and exports and reports its best."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.answers import SALVAGES
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.errors import InputError
from autoprune.models.export import check_space
from autoprune.models.loading import resolve_model
from autoprune.pipeline.checkpoint import Journal, load_checkpoint, write_atomic
from autoprune.pipeline.config import Config, difference, load_config
from autoprune.pipeline.gcot import VERSION
from autoprune.pipeline.ledger import JOURNAL, REPORT
from autoprune.pipeline.lineage import STATUSES
from autoprune.pipeline.preparation import SPLITS, Prepared, pool_plan, prepare_all, settled
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.report import write_report
from autoprune.pipeline.search import CHECKPOINT, Search
from autoprune.pipeline.targets import Case, Cases

CONFIG_FILE = "config.yaml"
# That are no models.
WRITERS = {"scripted": "scripted answers", "grammar": "the grammar, at random", "genetic": "variation, at random"}


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. Everything that was finished is in the journal."""


def run_search(config: Config, resume: bool, progress: ConsoleProgress) -> Path:
    """Search, export the best, report. Returns the run folder.

    Raises InputError for anything that cannot be used, and leaves no run folder then; Stopped after a signal; Lost
    when something that the search stands on went away.
    """
    began = time.monotonic()
    config = settled(config)
    prepared = prepare_all(config)
    generator = _prepare_generator(config)
    folder = config.folder
    check_space(folder, checkpoint_bytes(prepared[config.target.model].folder))
    _open_folder(folder, config, resume)
    try:
        # Ray sets a handler of its own for SIGTERM, so ours comes after it.
        with cluster(), signals():
            return _run(config, folder, prepared, generator, progress, began)
    except InputError:
        if not resume and not (folder / JOURNAL).exists():
            shutil.rmtree(folder)
        raise


def _prepare_generator(config: Config):
    """The generator, or None where it is an actor that starts later and whose model has been found to exist."""
    from autoprune.actors.generator import BY_CHANCE, OpenAIGenerator, ScriptedGenerator

    settings = config.generator
    if settings.kind == "openai":
        return OpenAIGenerator(settings.base_url, settings.model, settings.api_key_variable)
    if settings.kind in BY_CHANCE:
        return BY_CHANCE[settings.kind](config.seed)
    if settings.kind == "scripted":
        return ScriptedGenerator(Path(settings.answers))
    resolve_model(settings.model)
    return None


def start_vllm(config: Config, resources):
    """vLLM in an actor, which loads while others do; `wait` for it. resources: ActorResources."""
    from autoprune.actors.generator import VllmGenerator

    settings = config.generator
    options = {"max_model_len": settings.max_model_len, "seed": config.seed, "enforce_eager": True}
    return VllmGenerator(settings.model, resources, options | settings.engine, settings.kv_cache_gib)


def _open_folder(folder: Path, config: Config, resume: bool) -> None:
    """Make the run folder, or check that the one to resume has the same configuration."""
    stored = folder / CONFIG_FILE
    if resume:
        if not stored.exists():
            raise InputError(f"no run to resume in {folder}: expected {CONFIG_FILE} there")
        # Budgets may grow: what was done within the old ones is the same.
        old = replace(load_config(stored), name=config.name, runs=config.runs, budgets=config.budgets)
        changed = difference(old, config)
        if changed:
            raise InputError(f"the configuration of {folder} was changed ({'; '.join(changed)}): start another run")
        # Damage is told now, not after minutes of loading models.
        Journal(folder / JOURNAL)
        load_checkpoint(folder / CHECKPOINT)
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"run folder {folder} exists: add --resume {config.name} to go on, or choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(stored, config.to_yaml().encode())
    except OSError as error:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --set runs=…"
        ) from None


@contextmanager
def signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C become Stopped, once; a second one is not caught.

    The handler raises KeyboardInterrupt: Ray's waiting calls let no other exception through.
    """
    received = []

    def stop(number: int, _frame: object) -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(*received) from None
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that RAY_ADDRESS or the job names, or a local one that ends with the search."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without GPUs keep seeing whatever the machine shows; Ray announces this as its own future default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    already = ray.is_initialized()
    if not already:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def _run(
    config: Config,
    folder: Path,
    prepared: dict[str, Prepared],
    generator,
    progress: ConsoleProgress,
    began: float,
) -> Path:
    from autoprune.actors.placement import plan_resources
    from autoprune.actors.pool import EvaluatorPool
    from autoprune.pipeline.tracking import MlflowTracker

    settings, evaluators = config.generator, config.evaluators
    uri = config.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
    tracker = MlflowTracker(uri, config.tracking.experiment, config.name, folder)
    tracker.start(config.to_dict() | {"prompts": VERSION})
    own, shared = plan_resources(evaluators.shards, evaluators.replicas * len(prepared), evaluators.threads)
    status = "FAILED"
    pools = {m: EvaluatorPool(pool_plan(config, one, shared), progress.say) for m, one in prepared.items()}
    artifacts: list[Path] = []
    metrics: dict[str, float] = {}
    try:
        if settings.kind == "vllm":
            progress.say(f"starting vLLM with {settings.model}")
            generator = start_vllm(config, own)
        for model, pool in pools.items():
            progress.say(f"starting {evaluators.replicas} × {evaluators.shards} evaluators for {model}")
            pool.start()
            dense = ", ".join(f"{name} {pool.dense[name].nll:.4f}" for name in SPLITS[1:])
            progress.say(f"dense: {dense} nats per token")
        if settings.kind == "vllm":
            generator.wait()  # it loaded while the evaluators measured the dense model
        evaluator = _evaluator(config, pools)
        hashes = prepared[config.target.model].hashes
        search = Search(config, folder, generator, evaluator, tracker, progress, began, hashes)
        search.run()
        pool = pools[config.target.model]
        artifacts, metrics = _conclude(config, folder, pool, search, hashes, tracker.ui_command, progress)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if generator is not None:
            generator.stop()
        for pool in pools.values():
            pool.stop()
        tracker.finish(status, metrics, artifacts)
    return folder


def _evaluator(config: Config, pools: dict):
    """The target's pool, or all cases as one evaluator."""
    target = config.target
    if not target.further:
        return pools[target.model]
    every = zip((target, *target.further), target.cases, strict=True)
    cases = [Case(pools[case.model], case.sparsity, name) for case, name in every]
    return Cases(cases, worst=target.combine == "worst")


def _conclude(
    config: Config,
    folder: Path,
    pool,
    search: Search,
    hashes: dict[str, str],
    ui_command: str,
    progress: ConsoleProgress,
) -> tuple[list[Path], dict[str, float]]:
    """Measure seeds and best on the report split, export the best, write the report. Returns artifacts and metrics."""
    best = search.lineage.best()
    rows = [("dense", None), *((c.id.removeprefix("seed-"), c) for c in search.lineage if c.operator == "seed")]
    rows = [(method, c) for method, c in rows if c is None or c.status == "evaluated"] + [("best found", best)]
    algorithms = [c.algorithm for _, c in rows if c is not None]
    cases = search.evaluator.cases if config.target.further else []
    each = [search.measure(algorithms, f"{REPORT}@{index}") for index in range(len(cases))]
    reported = each[0] if each else search.measure(algorithms, REPORT)
    measured = [(search.evaluator.dense["fitness"], pool.dense["report"])]
    measured += [(c.evaluation, e) for (_, c), e in zip(rows[1:], reported, strict=True)]
    table = [_row(method, candidate, *pair) for (method, candidate), pair in zip(rows, measured, strict=True)]
    model = folder / "model"
    if not model.exists():
        progress.say(f"writing the pruned model of {best.id}")
        details = {
            "model": config.target.model,
            "candidate": best.id,
            "calibration": {
                "corpus": config.data.calibration,
                "sha256": hashes["calibration"],
                "windows": config.data.calibration_windows,
                "context": config.data.context,
            },
            "dtype": config.target.dtype,
            "perplexity": {"fitness_nll": best.fitness, "report_nll": reported[-1].nll},
        }
        pool.export(model, best.algorithm, details)
    written = [c for c in search.lineage if c.operator not in ("seed", "tune")]
    counts = {status: sum(c.status == status for c in written) for status in STATUSES}
    spent = search.spend()
    summary = {
        "name": config.name,
        "config": config.to_dict(),
        "target": config.target.model,
        "generator": WRITERS.get(config.generator.kind, config.generator.model),
        "prompts": VERSION,
        "sparsity": config.target.sparsity,
        "dtype": config.target.dtype,
        "context": config.data.context,
        "corpora": {name: getattr(config.data, name) for name in SPLITS},
        "corpora_sha256": hashes,
        "tokens_scored": {name: pool.dense[name].tokens for name in ("fitness", "report")},
        "table": table,
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
        },
        "salvaged": {kind: sum(kind in c.salvaged and c.status != "invalid" for c in written) for kind in SALVAGES},
        "tokens": {"prompt": spent.prompt_tokens, "completion": spent.completion_tokens},
        "seconds": {
            "generating": spent.generating,
            "evaluating": spent.evaluating,
            "waiting": max(0.0, spent.total - spent.generating - spent.evaluating),
            "total": spent.total,
        },
        "best": best.id,
        "model": str(model),
        "mlflow": ui_command,
        "command": shlex.join(["autoprune", "search", str(folder / CONFIG_FILE), "--set", f"name={config.name}-again"]),
    }
    artifacts = write_report(folder, search.lineage, summary)
    metrics = {f"report_nll.{metric_name(row['method'])}": row["report_nll"] for row in table}
    return [*artifacts, folder / "lineage.json", folder / CONFIG_FILE], metrics


def metric_name(method: str) -> str:
    """A method's text in the letters that MLflow takes for the name of a metric."""
    return re.sub(r"[^\w./-]", "-", method.replace(" ", "_"))


def _row(method: str, candidate, fitness: Evaluation, report: Evaluation) -> dict:
    return {
        "method": method,
        "candidate": candidate.id if candidate is not None else None,
        "sparsity": fitness.sparsity,
        "fitness_nll": fitness.nll,
        "report_nll": report.nll,
    }
