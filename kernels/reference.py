"""What the fast kernels must equal, in plain torch on any device: pruning masks from a stable ascending sort, bit for
bit, and moments, up to the rounding of fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def row_mask(scores: Tensor, k: int) -> Tensor:
    """Bool [out, in], True = kept: the k lowest of each row of floating `scores` [out, in] are pruned.

    Of equal scores the one in the lowest column goes first; −0.0 equals 0.0.
    """
    order = (scores + 0.0).sort(dim=1, stable=True).indices  # −0.0 + 0.0 is 0.0, whatever the sort makes of signs
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], False)


def matrix_mask(scores: Tensor, k: int) -> Tensor:
    """As `row_mask`, but the k lowest of the whole matrix are pruned; ties by the lowest flat (row-major) index."""
    return row_mask(scores.reshape(1, -1), k).reshape(scores.shape)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """As `row_mask`, for every m consecutive scores along the last dimension: the n lowest of each are pruned."""
    return row_mask(scores.reshape(scores.numel() // m, m), n).reshape(scores.shape)


def tile_mask(scores: Tensor, k: int, rows: int, columns: int) -> Tensor:
    """As `matrix_mask`, over the fp32 means of rectangles of rows × columns, each kept or pruned as a whole.

    The sum of a rectangle is `halving_sum` of its rows, and then of the columns of what that leaves.
    """
    mask = torch.ones_like(scores, dtype=torch.bool)
    down, across = scores.shape[0] // rows, scores.shape[1] // columns
    tiles = [
        (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        for i in range(down)
        for j in range(across)
    ]
    sums = [halving_sum(list(halving_sum(list(scores[tile].float())))) for tile in tiles]
    kept = matrix_mask(torch.stack(sums) / (rows * columns), k)
    for tile, keep in zip(tiles, kept, strict=True):
        mask[tile] = keep
    return mask


def halving_sum(terms: list[Tensor]) -> Tensor:
    """The sum in a fixed order: a list's second half is added to its first, of an odd number the last to the first."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    sums = [first + second for first, second in zip(terms[:half], terms[half : 2 * half], strict=True)]
    if len(terms) % 2:
        sums[0] = sums[0] + terms[-1]
    return halving_sum(sums)


def row_moments(weight: Tensor, norms: Tensor | None = None) -> Tensor:
    """Mean, M2, M3 and M4 of |W_ij|, or of |W_ij|·norm_j, of each row: fp64 [out, 4], in two passes."""
    values = weight.double().abs().contiguous()
    values = values if norms is None else values * norms.double()
    mean = values.mean(dim=1, keepdim=True)
    powers = [((values - mean) ** power).sum(dim=1) for power in (2, 3, 4)]
    return torch.stack([mean[:, 0], *powers], dim=1)
