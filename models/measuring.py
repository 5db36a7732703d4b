"""Measure many algorithms on one model, in this process: dense figures and statistics are made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.statistics import GRAM_READERS, NotFiniteError
from autoprune.algorithms.tuning import Tuning, tune
from autoprune.models.errors import InputError
from autoprune.models.masking import Chooser, needs, planned_sparsities
from autoprune.models.perplexity import Reference, perplexity, standard_error
from autoprune.models.shard import Lane, ModelShard, ShardReport

CALIBRATION = "calibration"  # the split that statistics come from


@dataclass(frozen=True)
class Measurement:
    """One algorithm, or the dense model, on one split.

    nll: nats per token over `tokens` scored tokens, window_nlls of each window; kl: mean KL(dense ‖ pruned) per token,
    nats, 0 where it was not asked for; both with the standard error over windows. sparsity: achieved, of all prunable
    weights; block_sparsities likewise per block. fallbacks, dead_inputs, damped: see `ShardReport`.
    pruning_seconds: scores, selection and updates; forward_seconds: the rest of its way, of which algorithms side by
    side bear equal parts (statistics that they share included).
    """

    nll: float
    perplexity: float
    standard_error: float | None
    kl: float
    kl_standard_error: float | None
    tokens: int
    sparsity: float
    block_sparsities: tuple[float, ...]
    fallbacks: tuple[str, ...]
    dead_inputs: int
    damped: int
    pruning_seconds: float
    forward_seconds: float
    window_nlls: tuple[float, ...] = ()


class Workbench:
    """A whole model on one device, with its splits.

    splits: token windows int64 [windows, L] by name; must have CALIBRATION. statistics, features: all that the
    algorithms to be measured read (see `ModelShard.calibrate`); what follows from Gram matrices is made anew for each
    `measure` that needs it, block by block, since those of a whole model would not fit.
    Raises InputError where the dense model measures no likelihood, or overflows.
    """

    def __init__(
        self,
        folder: Path,
        blocks: int,
        splits: dict[str, torch.Tensor],
        dtype: str,
        device: str,
        offload: bool = False,
        statistics: Iterable[str] = (),
        features: Iterable[str] = (),
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.splits = splits
        self.shard = ModelShard(folder, 0, blocks, dtype, device, offload)
        self._progress = progress
        self._references: dict[str, Reference] = {}
        self.dense: dict[str, Measurement] = {}
        wants = {"x_norm", *statistics} - GRAM_READERS
        tokens = splits[CALIBRATION]
        progress(f"calibrating on {len(tokens)} windows of {tokens.shape[1]} tokens")
        calibrate(self.shard, tokens, wants, features, dtype)

    def measure_dense(self, split: str) -> Measurement:
        """Figures of the dense model, and what KL is measured against."""
        if split not in self.dense:
            self._progress(f"measuring the dense model on {split}")
            lane = Lane(hidden=self.shard.enter(self.splits[split]))
            began = time.perf_counter()
            self.shard.walk([lane])
            self._references[split] = Reference(lane.hidden, self.shard.model.logits)
            self.dense[split] = self._finish(lane, split, time.perf_counter() - began, divergence=False)
        return self.dense[split]

    def measure(
        self, jobs: Sequence[tuple[Algorithm, float]], split: str, divergence: bool = True
    ) -> list[Measurement]:
        """Each (algorithm, sparsity) on a split, side by side: they share the statistics of each block.

        divergence: whether the KL to the dense model is measured, too; it takes another pass through the head.

        Raises LanguageError or ValueError where an algorithm yields no usable scores.
        """
        if divergence:
            self.measure_dense(split)
        lanes = []
        for algorithm, sparsity in jobs:
            planned = planned_sparsities(algorithm, self.shard.profiles, sparsity)
            lanes.append(Lane(Chooser(algorithm), planned, self.shard.enter(self.splits[split])))
        gram = any(needs(algorithm) & GRAM_READERS for algorithm, _ in jobs)
        calibration = self.shard.enter(self.splits[CALIBRATION]) if gram else None
        count = self.shard.model.count

        def visit(index: int, lane: Lane, *_) -> None:
            if gram and lane is lanes[-1]:
                self._progress(f"block {index + 1} of {count}, {len(lanes)} algorithms side by side")

        began = time.perf_counter()
        self.shard.walk(lanes, calibration, visit)
        # The walk is shared; what each lane pruned in it is its own.
        pruning = sum(lane.report.pruning_seconds for lane in lanes)
        seconds = (time.perf_counter() - began - pruning) / len(lanes)
        return [self._finish(lane, split, seconds, divergence) for lane in lanes]

    def tune(self, algorithm: Algorithm, name: str, sparsity: float, evaluations: int, split: str) -> Tuning:
        """The parameters of allocation rule `name` that are best for this algorithm on a split, which must not be one
        that is reported."""

        def measure(allocations: list[Allocation]) -> list[float]:
            jobs = [(replace(algorithm, allocation=allocation), sparsity) for allocation in allocations]
            # Side by side where that saves making Gram matrices anew; one by one otherwise, so that progress shows.
            together = bool(needs(algorithm) & GRAM_READERS)
            found = []
            for batch in [jobs] if together else [[job] for job in jobs]:
                found += self.measure(batch, split, divergence=False)
                for (tried, _), measured in zip(batch, found[-len(batch) :], strict=True):
                    self._progress(f"tuning: {tried.allocation} {measured.perplexity:.2f}")
            return [measured.nll for measured in found]

        taylor = algorithm.allocation.parameters.get("taylor", 0.0)
        return tune(name, measure, evaluations, algorithm.allocation.per, self.shard.model.count, taylor)

    def _finish(self, lane: Lane, split: str, seconds: float, divergence: bool = True) -> Measurement:
        tokens = self.splits[split]
        began = time.perf_counter()
        self.shard.score(lane, tokens, self._references[split] if divergence else None)
        seconds += time.perf_counter() - began
        return _measurement(lane.report, tokens.numel() - len(tokens), seconds)


def calibrate(
    shard: ModelShard, tokens: torch.Tensor, statistics: Iterable[str], features: Iterable[str], dtype: str
) -> None:
    """Statistics of a whole model over token windows, gradients included where they are asked for."""
    wants = frozenset(statistics)
    try:
        shard.calibrate(tokens, wants, features)
        if "g_rms" in wants:
            shard.backward(tokens)
    except NotFiniteError as error:
        raise InputError(f"{error}: {dtype} overflows on this model; try bfloat16 or float32") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def _measurement(report: ShardReport, tokens: int, seconds: float) -> Measurement:
    nlls, divergences = report.window_nlls, report.window_kls
    nll = sum(nlls) / len(nlls)
    return Measurement(
        nll=nll,
        perplexity=perplexity(nll),
        standard_error=standard_error(nlls),
        kl=sum(divergences) / len(divergences) if divergences else 0.0,
        kl_standard_error=standard_error(divergences),
        tokens=tokens,
        sparsity=sum(report.pruned) / sum(report.numels),
        block_sparsities=tuple(p / n for p, n in zip(report.pruned, report.numels, strict=True)),
        fallbacks=tuple(report.fallbacks),
        dead_inputs=report.dead_inputs,
        damped=report.damped,
        pruning_seconds=report.pruning_seconds,
        forward_seconds=seconds,
        window_nlls=tuple(nlls),
    )
