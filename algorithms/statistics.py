"""What calibration leaves per linear layer (moments of its inputs) and per block (a profile of its weights)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# OWL's M: a score is an outlier when it exceeds this many times the mean score of its block (arXiv 2310.05175).
OUTLIER_FACTOR = 5.0
# Elements that are taken to fp64 at a time (2 MiB per intermediate), so that the memory beside the data stays small.
CHUNK = 1 << 18


class InputMoments:
    """Count, sum and sum of squares of every input feature of a linear layer, in fp64 on the CPU.

    features: number of inputs of the layer. The sums are independent of how the inputs were split into calls but for
    the rounding of fp64.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.sum = torch.zeros(features, dtype=torch.float64)
        self.sum_of_squares = torch.zeros(features, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take inputs [..., features] of any floating dtype and device into account.

        Raises ValueError, and leaves the sums as they were, where the shape is wrong or an input is not finite.
        """
        features = len(self.sum)
        if x.ndim == 0 or x.shape[-1] != features:
            raise ValueError(f"inputs must be [..., {features}], got shape {tuple(x.shape)}")
        rows = x.reshape(-1, features)
        total, squares = torch.zeros_like(self.sum), torch.zeros_like(self.sum)
        for chunk in _fp64_chunks(rows):
            total += chunk.sum(dim=0).cpu()
            squares += chunk.square_().sum(dim=0).cpu()
        if not squares.isfinite().all():
            feature = int((~squares.isfinite()).nonzero()[0])
            raise ValueError(f"an input of the layer is not finite (feature {feature} of {features})")
        self.count += len(rows)
        self.sum += total
        self.sum_of_squares += squares

    def merge(self, other: InputMoments) -> None:
        """Become the moments of both sets of inputs; nothing is lost, since sums add up."""
        if len(other.sum) != len(self.sum):
            raise ValueError(f"cannot merge moments of {len(other.sum)} features into moments of {len(self.sum)}")
        self.count += other.count
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares

    @property
    def x_norm(self) -> Tensor:
        """Root mean square of each input feature, float32 [features]: Wanda's ‖X_j‖₂ / √tokens."""
        return self._mean(self.sum_of_squares).sqrt().float()

    @property
    def x_mean(self) -> Tensor:
        """Mean of each input feature, float32 [features]."""
        return self._mean(self.sum).float()

    @property
    def x_std(self) -> Tensor:
        """Population standard deviation of each input feature, float32 [features]."""
        variance = self._mean(self.sum_of_squares) - self._mean(self.sum).square()
        return variance.clamp(min=0).sqrt().float()  # rounding can leave a tiny negative variance

    def _mean(self, total: Tensor) -> Tensor:
        if not self.count:
            raise ValueError("there are no moments before the first input was added")
        return total / self.count


@dataclass(frozen=True)
class BlockProfile:
    """What an allocation may know about a block.

    numel: number of prunable weights. skewness: E[(|w| − μ)³] / σ³ over all of them, 0 where |w| is constant.
    outlier_share: percentage of the Wanda scores |W_ij|·x_norm_j of the block above OUTLIER_FACTOR times their mean.
    """

    numel: int
    skewness: float
    outlier_share: float


@torch.no_grad()
def block_profile(layers: Iterable[tuple[Tensor, Tensor]]) -> BlockProfile:
    """Profile of a block from its prunable weights [out, in] (any floating dtype) and the x_norm [in] of each.

    Exact: one pass for the means, one for the central moments and the outliers, in fp64 and in the given order.
    Skewness is the one that SDSA asks for, the outlier share that of OWL (arXiv 2310.05175).
    Raises ValueError where there are no weights, shapes disagree, or a value is not finite.
    """
    layers = list(layers)
    numel, weight_sum, score_sum = 0, 0.0, 0.0
    for index, (weight, x_norm) in enumerate(layers):
        if weight.ndim != 2 or x_norm.shape != weight.shape[1:]:
            shapes = f"{tuple(weight.shape)} and {tuple(x_norm.shape)}"
            raise ValueError(f"layer {index} of the block must be a weight [out, in] and an x_norm [in], got {shapes}")
        numel += weight.numel()
        for magnitude, score in _magnitudes_and_scores(weight, x_norm):
            weight_sum += magnitude.sum().item()
            score_sum += score.sum().item()
    if not numel:
        raise ValueError("a block without prunable weights has no profile")
    if not math.isfinite(weight_sum + score_sum):
        raise ValueError("a weight or an x_norm of the block is not finite")

    mean, threshold = weight_sum / numel, OUTLIER_FACTOR * score_sum / numel
    second, third, outliers = 0.0, 0.0, 0
    for weight, x_norm in layers:
        for magnitude, score in _magnitudes_and_scores(weight, x_norm):
            outliers += int((score > threshold).sum())
            squares = magnitude.sub_(mean).square()
            second += squares.sum().item()
            third += squares.mul_(magnitude).sum().item()
    sigma = math.sqrt(second / numel)
    # A constant |w| leaves nothing but the rounding of its mean.
    skewness = third / numel / sigma**3 if sigma > 1e-12 * mean else 0.0
    return BlockProfile(numel, skewness, 100.0 * outliers / numel)


def _magnitudes_and_scores(weight: Tensor, x_norm: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """|W| and |W|·x_norm of some rows at a time, fp64."""
    scale = x_norm.to(weight.device, torch.float64)
    for rows in _fp64_chunks(weight):
        magnitude = rows.abs_()
        yield magnitude, magnitude * scale


def _fp64_chunks(rows: Tensor) -> Iterator[Tensor]:
    """Consecutive rows of a matrix, about CHUNK elements at a time, as fp64 copies that the caller may overwrite."""
    for part in rows.split(max(1, CHUNK // max(1, rows.shape[1]))):
        yield part.to(torch.float64, copy=True)
