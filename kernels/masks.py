"""Pruning masks: which weights stay when the lowest scores of a comparison group go, and masks as bits.

The result is that of a stable ascending sort (`kernels.reference`), found by selection, which is linear: find the k-th
lowest score, keep what is above it, and look closer only where ties straddle it. On a CPU compiled loops and numpy do
this (`kernels.cpu`), on CUDA Triton (`row_select`, `matrix_select`, `nm_select`), elsewhere, and for fp64 on CUDA, the
sort itself. All of them are equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.kernels import cpu, reference
from autoprune.kernels.cpu import BITS, nan_error

# On a CPU, groups of up to so many scores are ranked by comparing all pairs; selection, as in rows, is faster from
# about 12 on where scores differ (at 1536x8960: 11 and 151 ms of one core for m = 4, 44 and 30 for m = 16), but
# takes several times longer where many are equal.
PAIRWISE = 16
LARGEST_M = 32  # of n:m in registers
TRITON_DEVICES, CPU_DEVICES = {"cuda"}, {"cpu"}


def row_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of each row.

    scores: floating (16 to 64 bits) [out, in], any strides, any device; infinities are fine, −0.0 equals 0.0.
    Returns bool [out, in] on the device of the scores, True = kept, with exactly in − k True in each row. Of equal
    scores the one in the lowest column is pruned first.
    Raises ValueError for NaN, for scores that are not a floating matrix, and for k outside 0..in.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be a matrix [out, in], got shape {tuple(scores.shape)}")
    trivial = _trivial(scores, k, scores.shape[1])
    if trivial is not None:
        return trivial
    if _on_triton(scores):
        from autoprune.kernels.row_select import row_select

        return _selected(row_select, scores, k)
    if scores.device.type in CPU_DEVICES:
        return cpu.row_mask(cpu.Scores(scores), k)
    return reference.row_mask(_without_nan(scores), k)


def matrix_mask(scores: Tensor, k: int) -> Tensor:
    """Prune the k lowest scores of the whole tensor; of equal scores the one with the lowest row-major index first.

    As `row_mask` otherwise; scores of any shape, k within 0..numel, exactly numel − k True in all.
    """
    trivial = _trivial(scores, k, scores.numel())
    if trivial is not None:
        return trivial
    if _on_triton(scores):
        from autoprune.kernels.matrix_select import matrix_select

        return _selected(matrix_select, scores.reshape(1, -1), k).reshape(scores.shape)
    if scores.device.type in CPU_DEVICES:
        return cpu.matrix_mask(cpu.Scores(scores.reshape(-1, scores.shape[-1])), k).reshape(scores.shape)
    return reference.matrix_mask(_without_nan(scores), k)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Prune the n lowest of every m consecutive scores along the last dimension, which leaves the pattern (m − n):m.

    As `row_mask` otherwise, each m scores being a row; scores of any shape whose last dimension is a multiple of m.
    """
    _check_groups(scores, m)
    trivial = _trivial(scores, n, m)
    if trivial is not None:
        return trivial
    rows = scores.reshape(-1, scores.shape[-1])
    if _on_triton(scores):
        return _triton_nm_mask(rows, n, m).reshape(scores.shape)
    if scores.device.type in CPU_DEVICES:
        return cpu.nm_mask(cpu.Scores(rows), n, m, m <= PAIRWISE).reshape(scores.shape)
    return reference.nm_mask(_without_nan(scores), n, m)


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
    # By a tensor: a number would be turned into a factor on CUDA, which rounds otherwise.
    means = _halving_sum(sums, 2) / torch.tensor(rows * columns, dtype=torch.float32, device=scores.device)
    if means.isnan().any():
        raise ValueError(f"{int(means.isnan().sum())} of {means.numel()} tiles hold NaN, or infinities of both signs")
    kept = matrix_mask(means, k)
    return kept[:, None, :, None].expand(down, rows, across, columns).reshape(scores.shape)


def prune_rows(weight: Tensor, scores: Tensor, k: int, out: Tensor | None = None) -> Tensor:
    """Set the k weights with the lowest scores of each row to zero: `row_mask` and its use in one pass.

    weight: floating (16 to 64 bits) [out, in]; scores: [out, in] as `row_mask`, or fp32 norms [in] of its columns: then
    the score is |W_ij|·norm_j, in fp32, and takes no memory. out: where the pruned weight is written, as the weight in
    shape, dtype and device, with columns side by side in memory; None: over the weight.
    Returns the mask as `pack` makes it. Raises ValueError as `row_mask`, and where shapes disagree; where scores are
    NaN, `out` may have been written to.
    """
    weight, scores, out = _check_pruning(weight, scores, out)
    if not 0 < k < weight.shape[1] or not weight.numel():
        return _apply_trivial(weight, scores, k, weight.shape[1], out)
    if _on_triton(weight, scores):
        from autoprune.kernels.row_select import row_select

        return _pruned(row_select, weight, scores, out, k)
    if weight.device.type in CPU_DEVICES:
        return cpu.prune_rows(weight, _cpu_scores(weight, scores), k, out)
    return _apply(weight, row_mask(_score_matrix(weight, scores), k), out)


def prune_matrix(weight: Tensor, scores: Tensor, k: int, out: Tensor | None = None) -> Tensor:
    """As `prune_rows`, for the k lowest scores of the whole matrix (`matrix_mask`)."""
    weight, scores, out = _check_pruning(weight, scores, out)
    if not 0 < k < weight.numel():
        return _apply_trivial(weight, scores, k, weight.numel(), out)
    if _on_triton(weight, scores):
        from autoprune.kernels.matrix_select import matrix_select

        return _pruned(matrix_select, weight, scores, out, k)
    if weight.device.type in CPU_DEVICES:
        return cpu.prune_matrix(weight, _cpu_scores(weight, scores), k, out)
    return _apply(weight, matrix_mask(_score_matrix(weight, scores), k), out)


def prune_nm(weight: Tensor, scores: Tensor, n: int, m: int, out: Tensor | None = None) -> Tensor:
    """As `prune_rows`, for the n lowest of every m neighbours in a row (`nm_mask`)."""
    weight, scores, out = _check_pruning(weight, scores, out)
    _check_groups(weight, m)
    if not 0 < n < m or not weight.numel():
        return _apply_trivial(weight, scores, n, m, out)
    if _on_triton(weight, scores) and m <= LARGEST_M:
        from autoprune.kernels.nm_select import nm_select

        return _pruned(nm_select, weight, scores, out, n, m)
    if weight.device.type in CPU_DEVICES:
        return cpu.prune_nm(weight, _cpu_scores(weight, scores), n, m, m <= PAIRWISE, out)
    return _apply(weight, nm_mask(_score_matrix(weight, scores), n, m), out)


def prune_tiles(weight: Tensor, scores: Tensor, k: int, rows: int, columns: int, out: Tensor | None = None) -> Tensor:
    """As `prune_rows`, for the k lowest tiles (`tile_mask`); of norms, a matrix of scores is made."""
    return prune_masked(weight, tile_mask(_score_matrix(weight, scores), k, rows, columns), out)


def prune_masked(weight: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """As `prune_rows`, for a mask that is there: bool [out, in], True = kept."""
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"expected a mask torch.bool {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    weight, mask, out = _check_pruning(weight, mask, out, is_mask=True)
    if weight.device.type in CPU_DEVICES and weight.numel():
        return cpu.apply(weight, mask, out)
    return _apply(weight, mask, out)


def pack(mask: Tensor) -> Tensor:
    """Bits of a bool mask of any shape: int32 [ceil(numel / 32)] on its device, the first weight in the lowest bit.

    Its bytes equal `numpy.packbits(mask.ravel(), bitorder="little")`; the last word is padded with zeros.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be torch.bool, got {mask.dtype}")
    if mask.device.type in TRITON_DEVICES:
        from autoprune.kernels.pack import pack as on_triton

        with torch.cuda.device_of(mask):
            return on_triton(mask)
    words = np.zeros(-(-mask.numel() // cpu.WORD), dtype=np.int32)
    bits = np.packbits(mask.cpu().numpy(), bitorder="little")
    words.view(np.uint8)[: len(bits)] = bits
    return torch.from_numpy(words).to(mask.device)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of this shape whose `pack` is `bits`, on the device of the bits; padding bits are ignored.

    Raises ValueError where the bits are not int32 [ceil(numel / 32)].
    """
    numel = math.prod(shape)
    if bits.dtype != torch.int32 or bits.shape != (-(-numel // cpu.WORD),):
        got = f"{bits.dtype} {tuple(bits.shape)}"
        raise ValueError(
            f"a mask of shape {tuple(shape)} is torch.int32 ({-(-numel // cpu.WORD)},) when packed, got {got}"
        )
    if bits.device.type in TRITON_DEVICES:
        from autoprune.kernels.pack import unpack as on_triton

        with torch.cuda.device_of(bits):
            return on_triton(bits, numel).reshape(tuple(shape))
    flat = np.unpackbits(bits.cpu().contiguous().numpy().view(np.uint8), count=numel, bitorder="little")
    return torch.from_numpy(flat.view(np.bool_)).to(bits.device).reshape(tuple(shape))


def _check(scores: Tensor) -> None:
    if scores.dtype not in BITS:
        raise ValueError(f"scores must be floating, got {scores.dtype}")


def _check_count(k: int, width: int) -> None:
    if not 0 <= k <= width:
        raise ValueError(f"cannot prune {k} of {width} scores: k must be within 0..{width}")


def _check_groups(scores: Tensor, m: int) -> None:
    if m < 1 or not scores.ndim or scores.shape[-1] % m:
        raise ValueError(f"scores of shape {tuple(scores.shape)} cannot be cut into groups of {m} along a row")


def _trivial(scores: Tensor, k: int, width: int) -> Tensor | None:
    """The mask where nothing is to be chosen. Raises ValueError for k, a dtype, or NaN then."""
    _check(scores)
    _check_count(k, width)
    if scores.numel() and 0 < k < width:
        return None
    return torch.full(_without_nan(scores).shape, k == 0, dtype=torch.bool, device=scores.device)


def _without_nan(scores: Tensor) -> Tensor:
    """The scores. Raises ValueError for NaN; a minimum propagates it, and needs no memory."""
    if scores.numel() and scores.detach().amin().isnan():
        raise nan_error()
    return scores


def _check_pruning(
    weight: Tensor, scores: Tensor, out: Tensor | None, is_mask: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scores (or a mask) and the tensor to write to, which shares no memory with the others unless it is the
    weight itself. Raises ValueError where they do not belong together."""
    out = weight if out is None else out
    _check(weight)
    if weight.ndim != 2 or scores.shape not in (weight.shape, weight.shape[1:]):
        raise ValueError(
            f"a weight [out, in] needs scores of its shape, or norms [in]; got {tuple(weight.shape)} and "
            f"{tuple(scores.shape)}"
        )
    if not is_mask:
        _check(scores)
    if scores.ndim == 1 and scores.dtype != torch.float32:
        raise ValueError(f"norms must be torch.float32, got {scores.dtype}")
    if scores.device != weight.device:
        raise ValueError(f"the weight is on {weight.device} and its scores are on {scores.device}")
    if (out.shape, out.dtype, out.device) != (weight.shape, weight.dtype, weight.device):
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}: expected the weight's like")
    if out.numel() and (out.shape[1] > 1 and out.stride(1) != 1 or len(out) > 1 and out.stride(0) < out.shape[1]):
        raise ValueError("the columns of out must be side by side in memory, and its rows apart")
    weight, scores, out = weight.detach(), scores.detach(), out.detach()
    same = weight.data_ptr() == out.data_ptr() and weight.stride() == out.stride()
    return weight if same else _apart(weight, out), _apart(scores, out), out


def _apart(tensor: Tensor, out: Tensor) -> Tensor:
    """The tensor, or a copy where writing to `out` might change it."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() else tensor


def _on_triton(*tensors: Tensor) -> bool:
    return all(tensor.device.type in TRITON_DEVICES and tensor.element_size() < 8 for tensor in tensors)


def _selected(select, scores: Tensor, *counts: int) -> Tensor:
    from autoprune.kernels.keys import Scores, Target

    with torch.cuda.device_of(scores):
        target = Target(scores)
        select(Scores(scores.detach()), *counts, target)
    return target.mask


def _triton_nm_mask(rows: Tensor, n: int, m: int) -> Tensor:
    if m > LARGEST_M:
        return row_mask(rows.reshape(-1, m), n).reshape(rows.shape)
    from autoprune.kernels.nm_select import nm_select

    return _selected(nm_select, rows, n, m)


def _pruned(select, weight: Tensor, scores: Tensor, out: Tensor, *counts: int) -> Tensor:
    from autoprune.kernels.keys import Scores, Target

    whole_words = len(counts) == 1 or counts[1] & (counts[1] - 1) == 0  # of n:m, only where m is a power of two
    with torch.cuda.device_of(weight):
        target = Target(weight, weight, out, packed=whole_words)
        select(Scores(weight, scores) if scores.ndim == 1 else Scores(scores), *counts, target)
    return target.mask if target.packed else pack(target.mask)


def _cpu_scores(weight: Tensor, scores: Tensor) -> cpu.Scores:
    return cpu.Scores(weight, scores) if scores.ndim == 1 else cpu.Scores(scores)


def _score_matrix(weight: Tensor, scores: Tensor) -> Tensor:
    return weight.float().abs() * scores if scores.ndim == 1 else scores


def _apply(weight: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """On any device."""
    torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device), out=out)
    return pack(mask)


def _apply_trivial(weight: Tensor, scores: Tensor, k: int, width: int, out: Tensor) -> Tensor:
    """All or nothing is pruned. NaN is refused; a matrix of scores is only made where there is an infinity."""
    _check_count(k, width)
    _without_nan(scores)
    if scores.ndim == 1 and weight.numel():
        bounds = torch.aminmax(_without_nan(weight))
        if not all(bound.isfinite() for bound in (*bounds, scores.amax())):
            _without_nan(_score_matrix(weight, scores))
    return _apply(weight, torch.full(weight.shape, k == 0, dtype=torch.bool, device=weight.device), out)


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
