"""Moments of the magnitudes of a weight, or of its Wanda scores, in one pass: `row_moments` on any device, and Triton.

Each row is one sum in a fixed order, tile by tile; tiles, rows and layers are merged by the formulas of Pébay (2008),
"Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments", in fp64.
No float is added in an order that another run might change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels import cpu, reference
from autoprune.kernels.keys import WIDENED, adjacent, as_float

TILE = 1024  # numbers whose mean is taken before their deviations


@dataclass(frozen=True)
class Moments:
    """Count, mean and sums of the second to fourth powers of deviations from the mean."""

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of_rows(cls, rows: Tensor, width: int) -> Moments:
        """Merged from `row_moments` [rows, 4] of rows of `width` numbers."""
        mean, second, third, fourth = rows.cpu().unbind(1)
        total = _sum(mean) / len(mean) if len(mean) else 0.0
        d = mean - total
        return cls(
            len(mean) * width,
            total,
            _sum(second + width * d**2),
            _sum(third + 3 * d * second + width * d**3),
            _sum(fourth + 4 * d * third + 6 * d**2 * second + width * d**4),
        )

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """Of all numbers that the parts stand for, in their order."""
        parts = [part for part in parts if part.count]
        count = sum(part.count for part in parts)
        if not count:
            return cls()
        mean = math.fsum(part.mean * part.count for part in parts) / count
        second = third = fourth = 0.0
        for part in parts:
            d, n = part.mean - mean, part.count
            second += part.second + n * d * d
            third += part.third + 3 * d * part.second + n * d * d * d
            fourth += part.fourth + 4 * d * part.third + 6 * d * d * part.second + n * d * d * d * d
        return cls(count, mean, second, third, fourth)

    @property
    def variance(self) -> float:
        return max(self.second / self.count, 0.0) if self.count else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.variance)

    @property
    def skewness(self) -> float:
        """E[(x − μ)³] / σ³; 0 where x is constant, which leaves nothing but the rounding of its mean."""
        return 0.0 if self._constant() else self.third / self.count / self.std / self.std / self.std

    @property
    def kurtosis(self) -> float:
        """E[(x − μ)⁴] / σ⁴; 0 where x is constant."""
        return 0.0 if self._constant() else self.fourth / self.count / self.variance / self.variance

    def _constant(self) -> bool:
        return self.std <= 1e-12 * abs(self.mean)


def _sum(values: Tensor) -> float:
    """Rounded once, so in no order; NaN where it is not finite."""
    return math.fsum(values.tolist()) if values.isfinite().all() else float(values.sum())


def row_moments(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    """Mean, M2, M3 and M4 of |W_ij|, or of |W_ij|·norm_j, of each row: fp64 [out, 4] on the device of the weight.

    weight: [out, in], floating (16 to 64 bits), with in > 0; norms: [in], of which fp64 is made.
    Products and sums are fp64. What is not finite makes its row's moments so.
    Raises ValueError for other shapes and dtypes.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.shape[1]:
        raise ValueError(f"moments are of a floating matrix [out, in], got {weight.dtype} {tuple(weight.shape)}")
    if norms is not None and norms.shape != weight.shape[1:]:
        raise ValueError(f"a weight {tuple(weight.shape)} needs as many norms as columns, got {tuple(norms.shape)}")
    norms = None if norms is None else norms.to(weight.device)
    if weight.device.type == "cuda" and weight.dtype in WIDENED:
        return triton_row_moments(weight, norms)
    if weight.device.type == "cpu":
        return cpu.row_moments(weight, norms)
    return reference.row_moments(weight, norms)


@triton.jit
def moments_of_rows(
    values, norms, stride, width, moments, WEIGHTED: tl.constexpr, WIDENED: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([1], tl.float64)
    mean, second, third, fourth = count, count, count, count
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < width
        bits = tl.load(values + row * stride + columns, mask=inside, other=0)
        x = tl.abs(as_float(bits, WIDENED)).to(tl.float64)
        if WEIGHTED:
            x *= tl.load(norms + columns, mask=inside, other=0.0)
        n = tl.minimum(width - start, COLUMNS).to(tl.float64)
        own = tl.sum(x, axis=0) / n
        d = tl.where(inside, x - own, 0.0)
        squares = d * d
        own2, own3, own4 = tl.sum(squares, axis=0), tl.sum(squares * d, axis=0), tl.sum(squares * squares, axis=0)
        total = count + n
        gap = (own - mean) / total
        a, b = gap * n, gap * count  # how far the means before and of this tile are from the new one
        fourth += own4 + 4 * (b * own3 - a * third) + 6 * (b * b * own2 + a * a * second)
        fourth += n * b * b * b * b + count * a * a * a * a
        third += own3 + 3 * (b * own2 - a * second) + n * b * b * b - count * a * a * a
        second += own2 + n * b * b + count * a * a
        mean += a
        count = total
    place = moments + row * 4 + tl.arange(0, 1)
    tl.store(place, mean)
    tl.store(place + 1, second)
    tl.store(place + 2, third)
    tl.store(place + 3, fourth)


def triton_row_moments(weight: Tensor, norms: Tensor | None) -> Tensor:
    """`row_moments` by the kernel."""
    moments = torch.empty(weight.shape[0], 4, dtype=torch.float64, device=weight.device)
    values = adjacent(weight).view(cpu.BITS[weight.dtype])
    if not len(weight):
        return moments
    with torch.cuda.device_of(weight):
        moments_of_rows[(len(weight),)](
            values,
            values if norms is None else norms.double().contiguous(),
            values.stride(0),
            weight.shape[1],
            moments,
            WEIGHTED=norms is not None,
            WIDENED=WIDENED[weight.dtype],
            COLUMNS=TILE,
            num_warps=4,  # never tuned: the order of a sum follows from it
        )
    return moments
