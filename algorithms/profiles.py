"""What an allocation may know of a block, and of each of its linear layers: summaries of weights and Wanda scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.algorithms.spectra import tail_exponent
from autoprune.algorithms.statistics import fp64_chunks

# OWL's M: a score is an outlier when it exceeds this many times the mean score of its block (arXiv 2310.05175).
OUTLIER_FACTOR = 5.0


@dataclass(frozen=True)
class Profile:
    """Of a block or of one linear layer; A are the Wanda scores |W_ij|·x_norm_j.

    numel: number of prunable weights. skewness: E[(|w| − μ)³] / σ³ over all of them, 0 where |w| is constant (SDSA).
    outlier_share: percentage of A above OUTLIER_FACTOR times their mean, block and layer each by its own (OWL).
    score_mean: mean of A (DLP). log_score_variance: Var ln A over A > 0 (DSA), and tail_exponent: of the squared
    singular values, of a block the mean over its layers (AlphaPruning): None unless they were asked for, and the latter
    where a weight has none. kurtosis: of |w|, E[(|w| − μ)⁴] / σ⁴, 0 where |w| is constant; score_std: of A: None
    unless asked for. weight_mean, weight_std: of |w|. input_mean, input_std: of the x_norm of all input features, of a
    block over those of all its layers. Standard deviations divide by n.
    """

    numel: int
    skewness: float
    outlier_share: float
    score_mean: float
    log_score_variance: float | None = None
    tail_exponent: float | None = None
    kurtosis: float | None = None
    score_std: float | None = None
    weight_mean: float | None = None
    weight_std: float | None = None
    input_mean: float | None = None
    input_std: float | None = None


@dataclass(frozen=True)
class BlockProfile(Profile):
    """layers: the profile of each prunable layer, in the block's order."""

    layers: tuple[Profile, ...] = ()

    @classmethod
    def from_dict(cls, data: dict) -> BlockProfile:
        return cls(**{**data, "layers": tuple(Profile(**layer) for layer in data["layers"])})


@dataclass
class _Moments:
    """Count, mean and sums of the second to fourth powers of deviations, which merge exactly (Pébay 2008)."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    def merge(self, other: _Moments) -> None:
        count = self.count + other.count
        if not count:
            return
        delta, a, b = other.mean - self.mean, self.count, other.count
        fourth = self.fourth + other.fourth + delta**4 * a * b * (a * a - a * b + b * b) / count**3
        fourth += 6 * delta**2 * (a * a * other.second + b * b * self.second) / count**2
        self.fourth = fourth + 4 * delta * (a * other.third - b * self.third) / count
        third = self.third + other.third + delta**3 * a * b * (a - b) / count**2
        self.third = third + 3 * delta * (a * other.second - b * self.second) / count
        self.second += other.second + delta**2 * a * b / count
        self.mean += delta * b / count
        self.count = count

    def skewness(self) -> float:
        return 0.0 if self._constant() else self.third / self.count / self.std() ** 3

    def kurtosis(self) -> float:
        return 0.0 if self._constant() else self.fourth / self.count / self.std() ** 4

    def std(self) -> float:
        return math.sqrt(max(self.variance(), 0.0))

    def _constant(self) -> bool:
        """A constant |w| leaves nothing but the rounding of its mean."""
        return self.std() <= 1e-12 * self.mean

    def variance(self) -> float:
        return self.second / self.count if self.count else 0.0


@torch.no_grad()
def block_profile(layers: Iterable[tuple[Tensor, Tensor]], wants: Iterable[str] = ()) -> BlockProfile:
    """Profile of a block from its prunable weights [out, in] (any floating dtype) and the x_norm [in] of each.

    wants: which of "log_score_variance", "tail_exponent", "kurtosis" and "score_std" are to be had beside the rest.
    Exact: one pass for the means, one for everything that needs them, in fp64 and in the given order.
    Raises ValueError where there are no weights, shapes disagree, or a value is not finite.
    """
    layers, wants = list(layers), frozenset(wants)
    weight_means, score_means, numels = [], [], []
    for index, (weight, x_norm) in enumerate(layers):
        if weight.ndim != 2 or x_norm.shape != weight.shape[1:]:
            shapes = f"{tuple(weight.shape)} and {tuple(x_norm.shape)}"
            raise ValueError(f"layer {index} of the block must be a weight [out, in] and an x_norm [in], got {shapes}")
        columns = sum(rows.abs_().sum(dim=0) for rows in fp64_chunks(weight))
        weight_means.append(float(columns.sum()) / weight.numel())
        score_means.append(float((columns * x_norm.to(columns)).sum()) / weight.numel())
        numels.append(weight.numel())
    if not layers:
        raise ValueError("a block without prunable weights has no profile")
    if not math.isfinite(math.fsum(weight_means) + math.fsum(score_means)):
        raise ValueError("a weight or an x_norm of the block is not finite")

    numel = sum(numels)
    block_mean = math.fsum(mean * n for mean, n in zip(score_means, numels, strict=True)) / numel
    weights, logs, outliers, exponents, parts = _Moments(), _Moments(), 0, [], []
    scores, norms = _Moments(), _Moments()
    for (weight, x_norm), weight_mean, score_mean in zip(layers, weight_means, score_means, strict=True):
        magnitudes, log_scores, above_own = _Moments(), _Moments(), 0
        own_scores = _Moments(weight.numel(), score_mean)
        own_norms = _moments(x_norm.double())
        for rows in fp64_chunks(weight):
            score = rows.abs_() * x_norm.to(rows)
            outliers += int((score > OUTLIER_FACTOR * block_mean).sum())
            above_own += int((score > OUTLIER_FACTOR * score_mean).sum())
            if "log_score_variance" in wants:
                log = score[score > 0].log_()
                if len(log):
                    log_scores.merge(_moments(log))
            if "score_std" in wants:
                own_scores.second += float(score.sub_(score_mean).square_().sum())
            squares = rows.sub_(weight_mean).square()
            second = float(squares.sum())
            # About the layer's mean, not the chunk's: exact, and no third pass.
            magnitudes.second += second
            if "kurtosis" in wants:
                magnitudes.fourth += float((squares * squares).sum())
            magnitudes.third += float(squares.mul_(rows).sum())
        magnitudes.count, magnitudes.mean = weight.numel(), weight_mean
        exponent = tail_exponent(weight) if "tail_exponent" in wants else None
        parts.append(
            Profile(
                numel=weight.numel(),
                skewness=magnitudes.skewness(),
                outlier_share=100.0 * above_own / weight.numel(),
                score_mean=score_mean,
                log_score_variance=log_scores.variance() if "log_score_variance" in wants else None,
                tail_exponent=exponent,
                **_spreads(magnitudes, own_scores, own_norms, wants),
            )
        )
        scores.merge(own_scores)
        norms.merge(own_norms)
        weights.merge(magnitudes)
        logs.merge(log_scores)
        exponents.append(exponent)
    return BlockProfile(
        numel=numel,
        skewness=weights.skewness(),
        outlier_share=100.0 * outliers / numel,
        score_mean=block_mean,
        log_score_variance=logs.variance() if "log_score_variance" in wants else None,
        tail_exponent=None if None in exponents else sum(exponents) / len(exponents),
        **_spreads(weights, scores, norms, wants),
        layers=tuple(parts),
    )


def _moments(values: Tensor) -> _Moments:
    """Of fp64 numbers, of which there is at least one; no powers above the second."""
    mean = float(values.mean())
    return _Moments(values.numel(), mean, float((values - mean).square_().sum()))


def _spreads(weights: _Moments, scores: _Moments, norms: _Moments, wants: frozenset[str]) -> dict[str, float | None]:
    return {
        "kurtosis": weights.kurtosis() if "kurtosis" in wants else None,
        "score_std": scores.std() if "score_std" in wants else None,
        "weight_mean": weights.mean,
        "weight_std": weights.std(),
        "input_mean": norms.mean,
        "input_std": norms.std(),
    }
