"""Triton: the n lowest of every m neighbours in a row are pruned, by the rank of each among its m in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autoprune.kernels.keys import Scores, Target, load_keys, refuse_nan, report_nan, tuned, write, write_pruned

PAIRS = 8192  # that a program compares


@tuned(["FUSED", "MAGNITUDE", "PRUNES", "GROUPS", "PADDED"], warps=(4, 8))
@triton.jit(do_not_specialize=["n"])
def select_groups(
    values,
    norms,
    stride,
    weight,
    pruned,
    weight_stride,
    pruned_stride,
    mask,
    flag,
    width,
    tiles,
    n,
    M: tl.constexpr,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    PRUNES: tl.constexpr,
    PACKED: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
):
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows, start = row.to(tl.int64), tile.to(tl.int64) * (GROUPS * M)
    place = tl.arange(0, PADDED)
    columns = start + tl.arange(0, GROUPS)[:, None] * M + place[None, :]
    inside = (place < M)[None, :] & (columns < width)
    keys, nan = load_keys(values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
    report_nan(flag, nan)
    own, other = keys[:, :, None], keys[:, None, :]
    first = (place[None, :] < place[:, None])[None, :, :]  # of two that are equal, the first is the lower one
    lower = (other < own) | ((other == own) & first)
    keep = tl.sum(lower.to(tl.int32), axis=2) >= n
    if PADDED == M:  # the tile is one piece of a row
        rows = rows + tl.zeros([1, 1], tl.int64)
        write(
            tl.reshape(keep, (1, GROUPS * M)), rows, rows >= 0, start, width, weight, pruned, weight_stride,
            pruned_stride, mask, PRUNES, PACKED, 1, GROUPS * M,
        )  # fmt: skip
    else:
        if PRUNES:
            write_pruned(keep, rows, columns, inside, weight, pruned, weight_stride, pruned_stride)
        tl.store(mask + rows * width + columns, keep.to(tl.int8), mask=inside)


def nm_select(scores: Scores, n: int, m: int, target: Target) -> None:
    """Write the mask that leaves all but the n lowest of every m of a row to the target; equal ones as in a row.

    0 ≤ n ≤ m ≤ 32, m divides the width, and is a power of two where the target is packed.
    Raises ValueError for NaN, when the target has been written to.
    """
    height, width = target.shape
    flag = torch.zeros((), dtype=torch.int32, device=scores.device)
    padded = triton.next_power_of_2(m)
    groups = max(32 // padded, PAIRS // padded**2, 1)
    tiles = triton.cdiv(width, groups * m)
    common = scores.arguments() | target.arguments() | {"flag": flag, "width": width, "tiles": tiles, "n": n}
    select_groups[(height * tiles,)](**common, M=m, GROUPS=groups, PADDED=padded)
    refuse_nan(flag)
