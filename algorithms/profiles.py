"""What an allocation may know of a block, and of each of its linear layers: summaries of weights and Wanda scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoprune.algorithms.spectra import tail_exponent
from autoprune.algorithms.statistics import fp64_chunks
from autoprune.kernels.moments import Moments, row_moments

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
    block over those of all its layers. taylor_mean: of |w| times the root mean square of its gradient, which is what
    the loss of a weight costs, to first order (arXiv 1906.10771): None before there are gradients (`with_taylor`).
    Standard deviations divide by n.
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
    taylor_mean: float | None = None


@dataclass(frozen=True)
class BlockProfile(Profile):
    """layers: the profile of each prunable layer, in the block's order."""

    layers: tuple[Profile, ...] = ()

    @classmethod
    def from_dict(cls, data: dict) -> BlockProfile:
        return cls(**{**data, "layers": tuple(Profile(**layer) for layer in data["layers"])})


@torch.no_grad()
def block_profile(layers: Iterable[tuple[Tensor, Tensor]], wants: Iterable[str] = ()) -> BlockProfile:
    """Profile of a block from its prunable weights [out, in] (any floating dtype) and the x_norm [in] of each.

    wants: which of "log_score_variance", "tail_exponent", "kurtosis" and "score_std" are to be had beside the rest.
    Exact: one pass for moments (`kernels.moments`), one for what needs the means, in fp64 and in the given order.
    Raises ValueError where there are no weights, shapes disagree, or a value is not finite.
    """
    layers, wants = list(layers), frozenset(wants)
    weights, scores, norms = [], [], []
    for index, (weight, x_norm) in enumerate(layers):
        if weight.ndim != 2 or x_norm.shape != weight.shape[1:]:
            shapes = f"{tuple(weight.shape)} and {tuple(x_norm.shape)}"
            raise ValueError(f"layer {index} of the block must be a weight [out, in] and an x_norm [in], got {shapes}")
        weights.append(Moments.of_rows(row_moments(weight), weight.shape[1]))
        scores.append(Moments.of_rows(row_moments(weight, x_norm), weight.shape[1]))
        norms.append(Moments.of_rows(row_moments(x_norm[None]), len(x_norm)))
    if not layers:
        raise ValueError("a block without prunable weights has no profile")
    if not math.isfinite(math.fsum(part.mean for part in (*weights, *scores))):
        raise ValueError("a weight or an x_norm of the block is not finite")

    block = Moments.merged(scores)
    logs, outliers, exponents, parts = [], 0, [], []
    for (weight, x_norm), own, own_scores, own_norms in zip(layers, weights, scores, norms, strict=True):
        log_parts, above_own = [], 0
        for rows in fp64_chunks(weight):
            score = rows.abs_() * x_norm.to(rows)
            outliers += int((score > OUTLIER_FACTOR * block.mean).sum())
            above_own += int((score > OUTLIER_FACTOR * own_scores.mean).sum())
            if "log_score_variance" in wants:
                log = score[score > 0].log_()
                mean = float(log.mean()) if len(log) else 0.0
                log_parts.append(Moments(len(log), mean, float((log - mean).square_().sum())))
        log_scores = Moments.merged(log_parts)
        exponent = tail_exponent(weight) if "tail_exponent" in wants else None
        outlier_share = 100.0 * above_own / weight.numel()
        parts.append(Profile(**_summaries(own, own_scores, own_norms, log_scores, exponent, outlier_share, wants)))
        logs.append(log_scores)
        exponents.append(exponent)
    exponent = None if None in exponents else sum(exponents) / len(exponents)
    of_block = Moments.merged(weights), block, Moments.merged(norms), Moments.merged(logs)
    outlier_share = 100.0 * outliers / block.count
    return BlockProfile(**_summaries(*of_block, exponent, outlier_share, wants), layers=tuple(parts))


def with_taylor(profile: BlockProfile, means: Sequence[float]) -> BlockProfile:
    """The profile with `taylor_mean`: `means` for its layers, in order, and their mean, weighted with numel, for the
    block."""
    layers = tuple(replace(own, taylor_mean=mean) for own, mean in zip(profile.layers, means, strict=True))
    whole = math.fsum(own.numel * own.taylor_mean for own in layers) / profile.numel
    return replace(profile, layers=layers, taylor_mean=whole)


def _summaries(
    weights: Moments,
    scores: Moments,
    norms: Moments,
    logs: Moments,
    exponent: float | None,
    outlier_share: float,
    wants: frozenset[str],
) -> dict[str, float | None]:
    return {
        "numel": weights.count,
        "skewness": weights.skewness,
        "outlier_share": outlier_share,
        "score_mean": scores.mean,
        "log_score_variance": logs.variance if "log_score_variance" in wants else None,
        "tail_exponent": exponent,
        "kurtosis": weights.kurtosis if "kurtosis" in wants else None,
        "score_std": scores.std if "score_std" in wants else None,
        "weight_mean": weights.mean,
        "weight_std": weights.std,
        "input_mean": norms.mean,
        "input_std": norms.std,
    }
