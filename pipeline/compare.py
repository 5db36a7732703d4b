"""`autoprune compare`: measures every cell of a comparison that no earlier sitting has measured.

A cell's file is written the moment that its figures exist, so a kill loses only what was being measured. Nothing that
decides a figure can change without changing the cell's key, so a run folder may be used again with another
configuration: it goes on with the cells that both name.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from autoprune.actors.storage import write_atomic
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.allocation import needs as features_of
from autoprune.algorithms.statistics import GRAM_READERS
from autoprune.algorithms.tuning import Tuning
from autoprune.models.catalogue import sha256_of
from autoprune.models.checkpoint_files import weight_files
from autoprune.models.corpora import Corpus, token_windows
from autoprune.models.errors import InputError
from autoprune.models.footprint import model_sizes
from autoprune.models.loading import load_config, load_tokenizer, resolve_model
from autoprune.models.masking import needs
from autoprune.models.measuring import Measurement, Workbench
from autoprune.models.pruning import check_model, default_device, native_dtype
from autoprune.pipeline.comparison import Cell, Comparison, Result, Subject, cells
from autoprune.pipeline.comparison_report import Findings, figure, write_plots, write_tables
from autoprune.pipeline.launch import signals
from autoprune.pipeline.preparation import SPLITS, absolute, absolute_part, load_splits, misfit

CONFIG_FILE, CELLS = "config.yaml", "cells"  # in the run folder

Say = Callable[[str], None]


class Bench(Protocol):
    """Who measures one model: `models.measuring.Workbench`."""

    def measure_dense(self, split: str) -> Measurement: ...

    def measure(self, jobs: Sequence[tuple[Algorithm, float]], split: str) -> list[Measurement]: ...

    def tune(self, algorithm: Algorithm, name: str, sparsity: float, evaluations: int, split: str) -> Tuning: ...


class Tracker(Protocol):
    """Who shows: told of every cell, also of those that an earlier sitting measured."""

    def cell(self, cell: Cell, result: Result) -> None: ...


# subject, statistics and features that the algorithms read, offload, progress
OpenBench = Callable[[Subject, frozenset[str], frozenset[str], bool, Say], Bench]


def open_workbench(
    subject: Subject, statistics: frozenset[str], features: frozenset[str], offload: bool, say: Say
) -> Workbench:
    return Workbench(
        subject.folder,
        subject.blocks,
        subject.windows,
        subject.dtype,
        default_device(),
        offload,
        statistics,
        features,
        say,
    )


def run_comparison(config: Comparison, say: Say, open_bench: OpenBench = open_workbench) -> ComparisonRun:
    """Measure what is missing and write results.csv, results.md and the pictures.

    Raises InputError for anything that cannot be used, before anything is measured; Stopped after a signal.
    """
    config = settled(config)
    subjects = prepare(config)
    from autoprune.pipeline.comparison_tracking import ComparisonTracker

    folder = config.folder
    new = _open_folder(folder)
    try:
        uri = config.tracking.uri or f"sqlite:///{folder.parent / 'mlflow.db'}"
        tracker = ComparisonTracker(uri, config.tracking.experiment or "autoprune", config.name, folder)
        tracker.start(config.to_dict())
        write_atomic(folder / CONFIG_FILE, config.to_yaml().encode())
    except InputError:
        if new:
            shutil.rmtree(folder)
        raise
    status, artifacts = "FAILED", []
    run = ComparisonRun(config, subjects, tracker, say, open_bench)
    with signals():
        try:
            run.measure()
            artifacts = [*run.write(), *write_plots(folder, run.findings()), folder / CONFIG_FILE]
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.finish(status, {"cells": len(run.results), "errors": run.failed}, artifacts)
    say(f"MLflow: {tracker.ui_command}")
    return run


def settled(config: Comparison) -> Comparison:
    """The configuration with what depends on this machine and this folder decided, so that it can be run again from
    anywhere."""
    data = replace(config.data, **{name: absolute(getattr(config.data, name)) for name in SPLITS})
    models = tuple(dict.fromkeys(absolute(model) for model in config.models))
    methods = tuple(
        replace(
            group,
            scores=tuple(map(absolute_part, group.scores)),
            allocations=tuple(map(absolute_part, group.allocations)),
        )
        for group in config.methods
    )
    dtype, runs = native_dtype(config.dtype), str(Path(config.runs).resolve())
    return replace(config, runs=runs, models=models, dtype=dtype, data=data, methods=methods)


def prepare(config: Comparison) -> list[Subject]:
    """The models with their texts as tokens. Raises InputError where a model or a text cannot be used."""
    texts = load_splits(config.data)
    return [_subject(config, model, texts) for model in config.models]


def _subject(config: Comparison, model: str, texts: dict[str, Corpus]) -> Subject:
    folder = resolve_model(model)
    context = config.data.context
    check_model(folder, model, context)
    options = load_config(folder)
    patterns = dict.fromkeys(target.pattern for target in config.targets() if target.pattern)
    sizes = model_sizes(options, model, config.dtype) if patterns else None
    for pattern in patterns:
        for line in misfit(pattern, model, sizes):
            raise InputError(line)
    tokenizer = load_tokenizer(folder)
    windows = {
        name: token_windows(text, tokenizer, context, getattr(config.data, f"{name}_windows"))
        for name, text in texts.items()
    }
    return Subject(
        model=model,
        folder=folder,
        blocks=options.get_text_config().num_hidden_layers,
        checkpoint={
            "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "weights": {path.name: sha256_of(path) for path in sorted(set(weight_files(folder).values()))},
        },
        dtype=config.dtype,
        windows=windows,
        texts={name: (text.spec, text.sha256) for name, text in texts.items()},
    )


def _open_folder(folder: Path) -> bool:
    """Make the run folder, or check that it is one of a comparison. Returns whether it is new."""
    if (folder / CELLS).is_dir():
        return False
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds something else than a comparison: choose another name")
    try:
        (folder / CELLS).mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another folder with --set runs=…"
        ) from None
    return True


@dataclass
class ComparisonRun:
    """One sitting of a comparison. results: by the cell's key, what is known by now."""

    config: Comparison
    subjects: list[Subject]
    tracker: Tracker
    say: Say
    open_bench: OpenBench

    def __post_init__(self) -> None:
        self._cells = {subject.model: cells(self.config, subject) for subject in self.subjects}
        self._all = [cell for own in self._cells.values() for cell in own]
        self._folder = self.config.folder / CELLS
        self.results: dict[str, Result] = {}
        for cell in self._all:
            result = self._read(cell)
            if result is not None:
                self.results[cell.key] = result

    @property
    def failed(self) -> int:
        """How many cells have an error in place of figures."""
        return sum(result.error is not None for result in self.results.values())

    def measure(self) -> None:
        """Everything that is missing, model by model; the tracker hears of what is there, too."""
        for cell in self._all:
            if cell.key in self.results:
                self.tracker.cell(cell, self.results[cell.key])
        if self.results:
            self.say(f"{len(self.results)} of {len(self._all)} cells are there already")
        for subject in self.subjects:
            pending = [cell for cell in self._cells[subject.model] if cell.key not in self.results]
            if pending:
                self._measure_on(subject, pending)

    def _measure_on(self, subject: Subject, pending: list[Cell]) -> None:
        self.say(f"{subject.model}: {len(pending)} cells to measure, {subject.dtype}")
        algorithms = [cell.algorithm for cell in pending if cell.method is not None]
        statistics = frozenset().union(*(needs(algorithm) for algorithm in algorithms))
        features = frozenset().union(*(features_of(algorithm.allocation) for algorithm in algorithms))
        bench = self.open_bench(subject, statistics, features, self.config.offload, self.say)
        for batch in batches(pending, self.config.side_by_side):
            began = time.monotonic()
            results = self._measured(bench, batch)
            seconds = (time.monotonic() - began) / len(batch)
            for cell, result in zip(batch, results, strict=True):
                self._keep(cell, replace(result, seconds=seconds))
            self.write()

    def write(self) -> list[Path]:
        """The tables of what is known by now."""
        return write_tables(self.config.folder, self.config, self.findings())

    def findings(self) -> list[Findings]:
        return [Findings(subject, self._cells[subject.model], self.results) for subject in self.subjects]

    def _read(self, cell: Cell) -> Result | None:
        path = self._folder / f"{cell.key}.json"
        try:
            return Result.from_bytes(path.read_bytes(), cell)
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.say(f"{path} is damaged ({error}): it is measured again")
            return None

    def _keep(self, cell: Cell, result: Result) -> None:
        write_atomic(self._folder / f"{cell.key}.json", result.to_bytes(cell))
        self.results[cell.key] = result
        self.tracker.cell(cell, result)
        figures = result.error or f"perplexity {figure(result.nll)}, KL {result.kl:.4f}"
        place = f"{len(self.results)} of {len(self._all)}"
        self.say(f"{place}: {Path(cell.model).name}, {cell}: {figures} ({result.seconds:.1f} s)")

    def _measured(self, bench: Bench, batch: list[Cell]) -> list[Result]:
        """A batch's results: of an algorithm that yields no usable scores an error, of the others their figures."""
        try:
            if batch[0].method is None:
                dense = bench.measure_dense("report")
                if not math.isfinite(dense.nll):
                    raise InputError(f"{batch[0].what['dtype']} overflows on {batch[0].model}; try bfloat16 or float32")
                return [_result(None, dense)]
            if batch[0].method.tuned:
                return [self._tuned(bench, batch[0])]
            jobs = [(cell.algorithm, cell.target.share) for cell in batch]
            measurements = bench.measure(jobs, "report")
            return [_result(cell.algorithm, found) for cell, found in zip(batch, measurements, strict=True)]
        except InputError:
            raise  # about the model or the texts, not about a method
        except ValueError as error:
            if len(batch) == 1:
                return [_failed(batch[0].algorithm, str(error))]
        # One of them failed, and nothing says which. It mostly does so early, so that halving loses little.
        half = len(batch) // 2
        return self._measured(bench, batch[:half]) + self._measured(bench, batch[half:])

    def _tuned(self, bench: Bench, cell: Cell) -> Result:
        start, share = cell.algorithm, cell.target.share
        tuning = bench.tune(start, start.allocation.name, share, self.config.evaluations, "fitness")
        algorithm = replace(start, allocation=tuning.allocation)
        (measurement,) = bench.measure([(algorithm, share)], "report")
        trace = {str(allocation): nll if math.isfinite(nll) else None for allocation, nll in tuning.trace}
        found = _result(algorithm, measurement)
        return replace(found, fitness_nll=trace[str(tuning.allocation)], trace=tuple(trace.items()))


def batches(pending: Sequence[Cell], side_by_side: int) -> list[list[Cell]]:
    """Cells that are measured together, in the order in which they are: the dense model, algorithms that the kept
    statistics suffice for, tuned ones, then those that need Gram matrices, which share a walk over the blocks."""
    dense = [cell for cell in pending if cell.method is None]
    tuned = [cell for cell in pending if cell.method is not None and cell.method.tuned]
    fixed = [cell for cell in pending if cell.method is not None and not cell.method.tuned]
    gram = [cell for cell in fixed if needs(cell.algorithm) & GRAM_READERS]
    single = [cell for cell in fixed if not needs(cell.algorithm) & GRAM_READERS]
    groups = [gram[start : start + side_by_side] for start in range(0, len(gram), side_by_side)]
    return [[cell] for cell in (*dense, *single, *tuned)] + groups


def _result(algorithm: Algorithm | None, found: Measurement) -> Result:
    if not math.isfinite(found.nll) or not math.isfinite(found.kl):
        return _failed(algorithm, "the likelihood of the text is not finite: try bfloat16 or float32")
    figures = asdict(found)
    del figures["perplexity"]  # that of the NLL
    return Result(0.0, default_device(), algorithm and algorithm.to_dict(), **figures)


def _failed(algorithm: Algorithm | None, error: str) -> Result:
    return Result(0.0, default_device(), algorithm and algorithm.to_dict(), error)
