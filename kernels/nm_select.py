"""Triton: the n lowest of every m neighbours in a row are pruned, by the rank of each among its m in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autoprune.kernels.keys import Scores, Target, load_keys, refuse_nan, tuned, write

PAIRS = 8192  # that a program compares
LARGEST = 32  # m


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
    tiles = tl.cdiv(width, GROUPS * M)
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = row.to(tl.int64)
    place = tl.arange(0, PADDED)
    columns = (tile * GROUPS + tl.arange(0, GROUPS))[:, None] * M + place[None, :]
    inside = (place < M)[None, :] & (columns < width)
    norm_at = tl.minimum(columns, width - 1)
    keys, nan = load_keys(values, norms, rows * stride + columns, norm_at, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
    if tl.max(tl.max(nan.to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flag, 1)
    own, other = keys[:, :, None], keys[:, None, :]
    first = (place[None, :] < place[:, None])[None, :, :]  # of two that are equal, the first is the lower one
    lower = (other < own) | ((other == own) & first)
    keep = tl.sum(lower.to(tl.int32), axis=2) >= n
    if PACKED:  # no padding then: the tile is one piece of a row
        keep = tl.reshape(keep, (1, GROUPS * PADDED))
        columns = tl.reshape(columns, (1, GROUPS * PADDED))
        inside = tl.reshape(inside, (1, GROUPS * PADDED))
        write(
            keep, rows + tl.zeros([1, 1], tl.int64), columns, inside, width, weight, pruned, weight_stride,
            pruned_stride, mask, PRUNES, True, 1, GROUPS * PADDED,
        )  # fmt: skip
    else:
        write(
            keep, rows, columns, inside, width, weight, pruned, weight_stride, pruned_stride, mask, PRUNES, False,
            GROUPS, PADDED,
        )  # fmt: skip


def nm_select(scores: Scores, n: int, m: int, target: Target) -> None:
    """Write the mask that leaves all but the n lowest of every m of a row to the target; equal ones as in a row.

    0 ≤ n ≤ m ≤ LARGEST, m divides the width, and is a power of two where the target is packed.
    Raises ValueError for NaN, when the target has been written to.
    """
    height, width = target.shape
    flag = torch.zeros((), dtype=torch.int32, device=scores.device)
    padded = triton.next_power_of_2(m)
    groups = max(32 // padded, PAIRS // padded**2, 1)
    grid = (height * triton.cdiv(width, groups * m),)
    common = scores.arguments() | target.arguments() | {"flag": flag, "width": width, "n": n}
    select_groups[grid](**common, M=m, GROUPS=groups, PADDED=padded)
    refuse_nan(flag)
