"""Composes the real parts of a search (Ray, vLLM, MLflow), runs it, and exports and reports its best."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.answers import SALVAGES
from autoprune.algorithms.vocabulary import SUMMARIES
from autoprune.models.catalogue import CATALOGUE
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.corpora import load_corpus, overlap, token_windows
from autoprune.models.errors import InputError
from autoprune.models.export import check_space
from autoprune.models.loading import load_config as load_model_config
from autoprune.models.loading import load_tokenizer, resolve_model
from autoprune.models.pruning import check_model, native_dtype
from autoprune.pipeline.checkpoint import Journal, load_checkpoint, write_atomic
from autoprune.pipeline.config import Config, difference, load_config
from autoprune.pipeline.lineage import STATUSES
from autoprune.pipeline.population import seed
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.report import write_report
from autoprune.pipeline.search import CHECKPOINT, JOURNAL, Search

CONFIG_FILE = "config.yaml"
WRITERS = {"scripted": "scripted answers", "grammar": "the grammar, at random"}  # that are no models
SPLITS = ("calibration", "fitness", "report")


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. Everything that was finished is in the journal."""


def run_search(config: Config, resume: bool, progress: ConsoleProgress) -> Path:
    """Search, export the best, report. Returns the run folder.

    Raises InputError for anything that cannot be used, and leaves no run folder then; Stopped after a signal; Lost
    when something that the search stands on went away.
    """
    began = time.monotonic()
    config = _settled(config)
    for text in config.search.seeds:
        seed(text)
    splits = [(name, getattr(config.data, name)) for name in SPLITS]
    for index, (name, spec) in enumerate(splits):
        for other, other_spec in splits[:index]:
            if overlap(spec, other_spec):
                raise InputError(
                    f"data.{name} ({spec}) overlaps data.{other} ({other_spec}): give them different texts"
                )
    folder = config.folder
    texts = {name: load_corpus(spec) for name, spec in splits}
    target = resolve_model(config.target.model)
    check_model(target, config.target.model, config.data.context)
    blocks = load_model_config(target).get_text_config().num_hidden_layers
    if config.evaluators.shards > blocks:
        shards = config.evaluators.shards
        raise InputError(
            f"evaluators.shards is {shards}: expected at most {blocks}, the blocks of {config.target.model}"
        )
    tokenizer = load_tokenizer(target)
    windows = {
        name: token_windows(text, tokenizer, config.data.context, getattr(config.data, f"{name}_windows"))
        for name, text in texts.items()
    }
    generator = _prepare_generator(config)
    check_space(folder, checkpoint_bytes(target))
    _open_folder(folder, config, resume)
    hashes = {name: text.sha256 for name, text in texts.items()}
    try:
        # Ray sets a handler of its own for SIGTERM, so ours comes after it.
        with _ray(), signals():
            return _run(config, folder, blocks, windows, hashes, generator, progress, began)
    except InputError:
        if not resume and not (folder / JOURNAL).exists():
            shutil.rmtree(folder)
        raise


def _settled(config: Config) -> Config:
    """The configuration with what depends on this machine and this folder decided, so that it can be resumed later."""
    target = replace(config.target, dtype=native_dtype(config.target.dtype), model=absolute(config.target.model))
    writer = config.generator
    writer = replace(writer, model=absolute(writer.model), answers=absolute(writer.answers))
    data = replace(config.data, **{name: absolute(getattr(config.data, name)) for name in SPLITS})
    return replace(config, runs=str(Path(config.runs).resolve()), target=target, generator=writer, data=data)


def absolute(name: str) -> str:
    """A path that exists here as an absolute one; any other name, and the slice after a path, as they are."""
    path, bracket, rest = name.partition("[")
    if path in CATALOGUE:
        return name
    return f"{Path(path).resolve()}{bracket}{rest}" if path and Path(path).exists() else name


def _prepare_generator(config: Config):
    """The generator, or None where it is an actor that starts later and whose model has been found to exist."""
    from autoprune.actors.generator import GrammarGenerator, OpenAIGenerator, ScriptedGenerator

    settings = config.generator
    if settings.kind == "openai":
        return OpenAIGenerator(settings.base_url, settings.model, settings.api_key_variable)
    if settings.kind == "grammar":
        return GrammarGenerator(config.seed)
    if settings.kind == "scripted":
        return ScriptedGenerator(Path(settings.answers))
    resolve_model(settings.model)
    return None


def _open_folder(folder: Path, config: Config, resume: bool) -> None:
    """Make the run folder, or check that the one to resume has the same configuration."""
    stored = folder / CONFIG_FILE
    if resume:
        if not stored.exists():
            raise InputError(f"no run to resume in {folder}: expected {CONFIG_FILE} there")
        changed = difference(replace(load_config(stored), name=config.name, runs=config.runs), config)
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
def _ray() -> Iterator[None]:
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
    blocks: int,
    windows: dict[str, torch.Tensor],
    hashes: dict[str, str],
    generator,
    progress: ConsoleProgress,
    began: float,
) -> Path:
    from autoprune.actors.generator import VllmGenerator
    from autoprune.actors.placement import plan_resources
    from autoprune.actors.pool import EvaluatorPool, PoolPlan
    from autoprune.algorithms.allocation import OPTIONAL
    from autoprune.algorithms.allocation import needs as features_of
    from autoprune.models.masking import needs
    from autoprune.pipeline.tracking import MlflowTracker

    settings, evaluators = config.generator, config.evaluators
    uri = config.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
    tracker = MlflowTracker(uri, config.tracking.experiment, config.name, folder)
    tracker.start(config.to_dict())
    own, shared = plan_resources(evaluators.shards, evaluators.replicas, evaluators.threads)
    status = "FAILED"
    seeds = [seed(text).algorithm for text in config.search.seeds]
    plan = PoolPlan(
        model=config.target.model,
        blocks=blocks,
        shards=evaluators.shards,
        replicas=evaluators.replicas,
        threads=evaluators.threads,
        dtype=config.target.dtype,
        sparsity=config.target.sparsity,
        splits=windows,
        statistics=frozenset(config.search.statistics).union(*(needs(seed) for seed in seeds)),
        features=frozenset(OPTIONAL & SUMMARIES.keys() if config.search.allocation == "written" else ()).union(
            *(features_of(seed.allocation) for seed in seeds)
        ),
        deadline=evaluators.deadline,
        attempts=evaluators.attempts,
        resources=shared,
    )
    pool = EvaluatorPool(plan, progress.say)
    artifacts: list[Path] = []
    metrics: dict[str, float] = {}
    try:
        if settings.kind == "vllm":
            progress.say(f"starting vLLM with {settings.model}")
            options = {"max_model_len": settings.max_model_len, "seed": config.seed, "enforce_eager": True}
            generator = VllmGenerator(settings.model, own, options | settings.engine, settings.kv_cache_gib)
        progress.say(f"starting {evaluators.replicas} × {evaluators.shards} evaluators for {config.target.model}")
        pool.start()
        if settings.kind == "vllm":
            generator.wait()  # it loaded while the evaluators measured the dense model
        progress.say(f"dense: {', '.join(f'{name} {e.nll:.4f}' for name, e in pool.dense.items())} nats per token")
        search = Search(config, folder, generator, pool, tracker, progress, began)
        search.run()
        artifacts, metrics = _conclude(config, folder, pool, search, hashes, tracker.ui_command, progress)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if generator is not None:
            generator.stop()
        pool.stop()
        tracker.finish(status, metrics, artifacts)
    return folder


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
    best = search.lineage.evaluated()[0]
    rows = [("dense", None), *((c.id.removeprefix("seed-"), c) for c in search.lineage if c.operator == "seed")]
    rows = [(method, c) for method, c in rows if c is None or c.status == "evaluated"] + [("best found", best)]
    reported = search.measure([c.algorithm for _, c in rows if c is not None], "report")
    measured = [(pool.dense["fitness"], pool.dense["report"])]
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
    written = [c for c in search.lineage if c.operator != "seed"]
    counts = {status: sum(c.status == status for c in written) for status in STATUSES}
    spent = search.spend()
    summary = {
        "name": config.name,
        "config": config.to_dict(),
        "target": config.target.model,
        "generator": WRITERS.get(config.generator.kind, config.generator.model),
        "sparsity": config.target.sparsity,
        "dtype": config.target.dtype,
        "context": config.data.context,
        "corpora": {name: getattr(config.data, name) for name in SPLITS},
        "corpora_sha256": hashes,
        "tokens_scored": {name: pool.dense[name].tokens for name in ("fitness", "report")},
        "table": table,
        "counts": {
            "answers": spent.answers,
            "usable": spent.answers - counts["invalid"],
            "invalid": counts["invalid"],
            "repeated": counts["repeat"],
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
    metrics = {f"report_nll.{row['method'].replace('+', '-').replace(' ', '_')}": row["report_nll"] for row in table}
    return [*artifacts, folder / "lineage.json", folder / CONFIG_FILE], metrics


def _row(method: str, candidate, fitness: Evaluation, report: Evaluation) -> dict:
    return {
        "method": method,
        "candidate": candidate.id if candidate is not None else None,
        "sparsity": fitness.sparsity,
        "fitness_nll": fitness.nll,
        "report_nll": report.nll,
    }
