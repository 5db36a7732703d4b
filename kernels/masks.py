"""Pruning masks: which weights stay when the k lowest scores of a comparison group go, and masks as bits.

The result is that of a stable ascending sort (`kernels.reference`), found by selection, which is linear: take the
k-th lowest score as threshold, keep what is above it, and look closer only where ties straddle the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Scores copied and partitioned at a time on a CPU: 1 MiB in fp32, which stays in a core's cache and keeps the memory
# beside the scores small. Measured at 1536x8960: 5 to 25% faster than all rows at once.
CHUNK = 1 << 18


def row_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of each row.

    scores: floating [out, in], any strides, any device; infinities are fine, −0.0 equals 0.0.
    Returns bool [out, in] on the device of the scores, True = kept, with exactly in − k True in each row. Of equal
    scores the one in the lowest column is pruned first.
    Raises ValueError for NaN, for scores that are not a floating matrix, and for k outside 0..in.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be a matrix [out, in], got shape {tuple(scores.shape)}")
    return _mask(scores, k)


def matrix_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of the whole tensor; of equal scores the one with the lowest row-major index first.

    As `row_mask` otherwise; scores of any shape, k within 0..numel, exactly numel − k True in all.
    """
    return _mask(scores.reshape(1, -1), k).reshape(scores.shape)


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


def _mask(rows: Tensor, k: int) -> Tensor:
    """`row_mask` without the check of the shape."""
    width = rows.shape[1]
    if not rows.is_floating_point():
        raise ValueError(f"scores must be floating, got {rows.dtype}")
    if not 0 <= k <= width:
        raise ValueError(f"cannot prune {k} of {width} scores: k must be within 0..{width}")
    if rows.numel() and rows.min().isnan():  # a minimum propagates NaN and needs no memory
        raise ValueError(f"{int(rows.isnan().sum())} of {rows.numel()} scores are NaN: they cannot be ranked")
    if k in (0, width) or not rows.numel():
        return torch.full(rows.shape, k == 0, dtype=torch.bool, device=rows.device)
    return _partition_mask(rows.detach(), k) if rows.device.type == "cpu" else _torch_mask(rows.detach(), k)


def _partition_mask(rows: Tensor, k: int) -> Tensor:
    """On a CPU: numpy's SIMD quickselect, chunk by chunk. 0 < k < width, no NaN.

    On AMD processors with AVX-512 (measured on an EPYC) numpy picks a variant of it that is 2 to 4 times slower than
    the AVX2 one; NPY_DISABLE_CPU_FEATURES=AVX512F in the environment, set before numpy is imported, avoids it.
    """
    keep = rows.shape[1] - k
    mask = np.empty(rows.shape, dtype=np.bool_)
    step = max(1, CHUNK // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk, kept = rows[start : start + step], mask[start : start + step]
        scores = (chunk.float() if chunk.element_size() < 4 else chunk).numpy()  # exact; numpy has no bfloat16
        threshold = np.partition(scores, k - 1, axis=1)[:, k - 1 : k]
        np.greater(scores, threshold, out=kept)
        # No row can have more than `keep` scores above its k-th lowest: a full total means that every row is full.
        if np.count_nonzero(kept) < keep * len(kept):
            for row, missing in enumerate(keep - np.count_nonzero(kept, axis=1)):
                if missing:
                    kept[row, np.flatnonzero(scores[row] == threshold[row])[-missing:]] = True
    return torch.from_numpy(mask)


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
