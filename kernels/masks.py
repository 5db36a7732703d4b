"""Pruning masks: which weights stay when the lowest scores of a comparison group go, and masks as bits.

The result is that of a stable ascending sort (`kernels.reference`), found by selection, which is linear: take the
k-th lowest score as threshold, keep what is above it, and look closer only where ties straddle the threshold.
On a CPU compiled loops and numpy do this (`kernels.cpu`), on any other device torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.kernels.cpu import BITS, pairwise_mask, refuse_nan, select_mask

# Groups of up to so many scores are ranked by comparing all pairs; selection, as in rows, is faster from about 12 on
# where scores differ (measured at 1536x8960: 23 and 151 ms of one core for m = 4, 51 and 30 for m = 16), but takes
# several times longer where many are equal.
PAIRWISE = 16


def row_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of each row.

    scores: floating (16 to 64 bits) [out, in], any strides, any device; infinities are fine, −0.0 equals 0.0.
    Returns bool [out, in] on the device of the scores, True = kept, with exactly in − k True in each row. Of equal
    scores the one in the lowest column is pruned first.
    Raises ValueError for NaN, for scores that are not a floating matrix, and for k outside 0..in.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be a matrix [out, in], got shape {tuple(scores.shape)}")
    return _mask(scores, k, select_mask, _torch_mask)


def matrix_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of the whole tensor; of equal scores the one with the lowest row-major index first.

    As `row_mask` otherwise; scores of any shape, k within 0..numel, exactly numel − k True in all.
    """
    return _mask(scores.reshape(1, -1), k, select_mask, _torch_mask).reshape(scores.shape)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Prune the n lowest of every m consecutive scores along the last dimension, which leaves the pattern (m − n):m.

    As `row_mask` otherwise, each m scores being a row; scores of any shape whose last dimension is a multiple of m.
    """
    if m < 1 or not scores.ndim or scores.shape[-1] % m:
        raise ValueError(f"scores of shape {tuple(scores.shape)} cannot be cut into groups of {m} along a row")
    groups = scores.reshape(scores.numel() // m, m)
    few = (pairwise_mask, _torch_pairwise_mask)
    return _mask(groups, n, *(few if m <= PAIRWISE else (select_mask, _torch_mask))).reshape(scores.shape)


def tile_mask(scores: Tensor, k: int, rows: int, columns: int) -> Tensor:
    """Prune the k lowest tiles of a matrix whole; a tile is rows × columns scores, its score their mean in fp32.

    scores: as `row_mask`, [out, in] with out a multiple of rows and in of columns. The sums are made by halving
    (`_halving_sum`), first over the rows of a tile, then over its columns, which leaves no freedom of order: they are
    the same on every device. Of equal tiles the one with the lowest row-major index is pruned first.
    Returns bool [out, in], with exactly k·rows·columns False. Raises ValueError as `row_mask`, where the shape cannot
    be cut so, and for a tile that has no mean since it holds both infinities.
    """
    if scores.ndim != 2 or rows < 1 or columns < 1 or scores.shape[0] % rows or scores.shape[1] % columns:
        raise ValueError(f"scores of shape {tuple(scores.shape)} cannot be cut into tiles of {rows}x{columns}")
    _check(scores)
    down, across = scores.shape[0] // rows, scores.shape[1] // columns
    sums = _halving_sum(scores.detach().float().reshape(down, rows, across, columns), 1)
    means = _halving_sum(sums, 2) / (rows * columns)
    if means.isnan().any():
        raise ValueError(f"{int(means.isnan().sum())} of {means.numel()} tiles hold NaN, or infinities of both signs")
    kept = matrix_mask(means, k)
    return kept[:, None, :, None].expand(down, rows, across, columns).reshape(scores.shape)


def pack(mask: Tensor) -> Tensor:
    """Bits of a bool mask of any shape: uint8 [ceil(numel / 8)] on its device, the first weight in the lowest bit.

    Equal to `numpy.packbits(mask.ravel(), bitorder="little")`; the last byte is padded with zeros.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be torch.bool, got {mask.dtype}")
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (flat << _bit_positions(mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of this shape whose `pack` is `bits`, on the device of the bits; padding bits are ignored.

    Raises ValueError where the bits are not uint8 [ceil(numel / 8)].
    """
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
        got = f"{bits.dtype} {tuple(bits.shape)}"
        raise ValueError(f"a mask of shape {tuple(shape)} is torch.uint8 ({-(-numel // 8)},) when packed, got {got}")
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=numel, bitorder="little").view(np.bool_))
    else:
        flat = ((bits[:, None] >> _bit_positions(bits.device)) & 1).bool().reshape(-1)[:numel]
    return flat.reshape(tuple(shape))


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _check(scores: Tensor) -> None:
    if scores.dtype not in BITS:
        raise ValueError(f"scores must be floating, got {scores.dtype}")


def _mask(
    rows: Tensor, k: int, on_cpu: Callable[[Tensor, int], Tensor], elsewhere: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """The checks of `row_mask` and the trivial masks; the rest is left to one of two functions of rows and k."""
    width = rows.shape[1]
    _check(rows)
    if not 0 <= k <= width:
        raise ValueError(f"cannot prune {k} of {width} scores: k must be within 0..{width}")
    trivial = k in (0, width) or not rows.numel()
    if not trivial and rows.device.type == "cpu":
        return on_cpu(rows.detach(), k)
    refuse_nan(rows)
    if trivial:
        return torch.full(rows.shape, k == 0, dtype=torch.bool, device=rows.device)
    return elsewhere(rows.detach(), k)


def _torch_pairwise_mask(groups: Tensor, n: int) -> Tensor:
    """`cpu.pairwise_mask` on any device, all groups at once. No NaN."""
    m = groups.shape[1]
    rank = torch.arange(m, dtype=torch.uint8, device=groups.device).repeat(len(groups), 1)
    for distance in range(1, m):
        lower = (groups[:, distance:] < groups[:, :-distance]).byte()
        rank[:, :-distance] += lower
        rank[:, distance:] -= lower
    return rank >= n


def _halving_sum(values: Tensor, dim: int) -> Tensor:
    """The sum over a dimension: its second half is added to its first until one is left; of an odd number the last is
    added to the first beforehand."""
    while (size := values.shape[dim]) > 1:
        half = size // 2
        folded = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if size % 2:
            folded.narrow(dim, 0, 1).add_(values.narrow(dim, size - 1, 1))
        values = folded
    return values.squeeze(dim)


def _torch_mask(rows: Tensor, k: int) -> Tensor:
    """On any device, all rows at once. 0 < k < width, no NaN."""
    if rows.shape[0] == 1:  # kthvalue gives a row to one thread block; topk spreads a long row over many
        threshold = rows.topk(k, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    else:
        threshold = rows.kthvalue(k, dim=1, keepdim=True).values
    mask = rows > threshold
    missing = (rows.shape[1] - k) - mask.sum(dim=1, keepdim=True)
    if missing.any():
        rank = (rows == threshold).cumsum(dim=1, dtype=torch.int32)  # 1, 2, … at the ties of a row
        mask |= (rows == threshold) & (rank > rank[:, -1:] - missing)
    return mask
