"""Spectra of weight matrices: how heavy the tail of their eigenvalues is."""

from __future__ import annotations

import torch
from torch import Tensor

# The fewest eigenvalues that a tail may have: through two or three points any power law passes.
TAIL_POINTS = 10
# Elements of the table (start of the tail × eigenvalue) made at a time: 8 MiB in fp64.
CHUNK = 1 << 20


@torch.no_grad()
def tail_exponent(weight: Tensor) -> float | None:
    """Exponent α of a power law p(λ) ∝ λ^−α through the tail of the eigenvalues λ of WᵀW; a smaller α, a heavier tail.

    weight: [out, in], any floating dtype and device; the work is done in fp64 on its device. λ are the squared
    singular values, those apart that are zero to rounding. Of the N that remain, for every start i of the tail that
    leaves it at least TAIL_POINTS of them, with k = N − i:
    - Hill's estimate: α_i = 1 + k / Σ_{j ≥ i} ln(λ_j / λ_i), j in ascending order;
    - distance of Kolmogorov and Smirnov: max_{j ≥ i} |1 − (λ_j / λ_i)^(1 − α_i) − (j − i) / k|, where (j − i) / k is
      the share of the tail below λ_j.
    α is that α_i whose distance is the least; of equals the longest tail's. Tails of equal eigenvalues are left out. A
    matrix with no more than TAIL_POINTS eigenvalues has all of them as its tail.
    As AlphaPruning measures a layer ("Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of
    Large Language Models", arXiv 2410.10912), after Clauset, Shalizi and Newman, arXiv 0706.1062.
    None where no tail has two different eigenvalues. Raises ValueError where W is not a matrix of finite numbers.
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise ValueError(f"a weight must be a floating matrix [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("a weight is not finite: it has no spectrum")
    matrix = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    eigenvalues = torch.linalg.eigvalsh(matrix @ matrix.T)  # ascending; the smaller of the two Gram matrices
    rounding = max(weight.shape) * torch.finfo(torch.float64).eps  # relative to the largest eigenvalue
    logs = eigenvalues[eigenvalues > rounding * eigenvalues[-1]].log()
    if not len(logs) or logs[-1] - logs[0] <= rounding:
        return None
    return _power_law(logs - logs[-1], rounding)  # logarithms near 0 in the tail: small sums, not differences of large


def _power_law(logs: Tensor, rounding: float) -> float:
    """`tail_exponent` from the logarithms of the eigenvalues, fp64 [N], ascending to 0.

    rounding: what eigenvalues of a tail differ by when they are equal; no power law fits such a tail.
    """
    number = len(logs)
    starts = torch.arange(max(number - TAIL_POINTS, 0) + 1, device=logs.device)
    tails = number - starts  # their lengths
    thresholds = logs[: len(starts)]
    sums = logs.flip(0).cumsum(0).flip(0)[: len(starts)] - tails * thresholds
    slopes = tails / sums
    distances = torch.empty_like(slopes)
    step = max(1, CHUNK // number)
    for first in range(0, len(starts), step):
        part = slice(first, first + step)
        ranks = torch.arange(first, number, device=logs.device) - starts[part, None]
        model = -torch.expm1(-slopes[part, None] * (logs[first:] - thresholds[part, None]))
        gaps = (model - ranks / tails[part, None]).abs_()
        distances[part] = gaps.masked_fill_(ranks < 0, 0.0).amax(dim=1)
    distances[thresholds >= -rounding] = torch.inf
    return float(1 + slopes[distances.argmin()])
