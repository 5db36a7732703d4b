"""Triton: the k lowest scores of a whole matrix are pruned, exactly, with one threshold.

A sample says between which two keys the threshold lies. One pass counts the keys below and copies those between; the
threshold is among these few. A second pass writes. The copies come in any order, and only their values matter, so the
result is the same every time. Where the sample misleads, its bracket is halved until few enough lie in it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels.cpu import nan_error
from autoprune.kernels.keys import Scores, Target, keys_of, load_keys, tuned, write
from autoprune.kernels.threshold import bracket, find

TILE = 4096  # scores per program
SAMPLE = 1 << 17  # at most; of small matrices a sixteenth
SHARE = 16  # at most one in so many scores is copied


@tuned(["FUSED", "MAGNITUDE", "COLUMNS"])
@triton.jit(do_not_specialize=["low", "high", "room"])
def count_and_copy(
    values,
    norms,
    stride,
    width,
    tiles,
    low,
    high,
    room,
    counts,
    copies,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """counts, int64 [3]: keys not above `low`, keys above it and not above `high`, NaN. The second kind is copied."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    columns = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    keys, nan = load_keys(
        values, norms, row.to(tl.int64) * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING
    )
    between = (keys > low) & (keys <= high)
    count = tl.sum(between.to(tl.int32), axis=0)
    tl.atomic_add(counts, tl.sum((keys <= low).to(tl.int32), axis=0).to(tl.int64))
    tl.atomic_add(counts + 2, tl.sum(nan.to(tl.int32), axis=0).to(tl.int64))
    if count > 0:
        place = tl.atomic_add(counts + 1, count.to(tl.int64)) + tl.cumsum(between.to(tl.int32), axis=0) - 1
        tl.store(copies + place, keys, mask=between & (place < room))


@triton.jit(do_not_specialize=["threshold"])
def count_ties(
    values,
    norms,
    stride,
    width,
    tiles,
    threshold,
    ties,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ties, int32 [programs]: keys of each tile that equal the threshold."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    columns = tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    keys, nan = load_keys(
        values, norms, row.to(tl.int64) * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING
    )
    tl.store(ties + tl.program_id(0), tl.sum((keys == threshold).to(tl.int32), axis=0))


@tuned(["FUSED", "MAGNITUDE", "PRUNES", "COLUMNS"])
@triton.jit(do_not_specialize=["threshold", "pruned_ties"])
def apply_threshold(
    values,
    norms,
    stride,
    weight,
    pruned,
    weight_stride,
    pruned_stride,
    mask,
    width,
    tiles,
    threshold,
    pruned_ties,
    before,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    PRUNES: tl.constexpr,
    PACKED: tl.constexpr,
    TIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keep what exceeds the threshold; with TIES, of those that equal it all but the first `pruned_ties`, of which
    `before`, int64 [programs], come before each tile."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = row.to(tl.int64) + tl.zeros([1, 1], tl.int64)
    start = tile.to(tl.int64) * COLUMNS
    columns = start + tl.arange(0, COLUMNS)[None, :]
    inside = columns < width
    keys, nan = load_keys(values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
    keep = keys > threshold
    if TIES:
        equal = keys == threshold
        rank = tl.cumsum(equal.to(tl.int32), axis=1) + tl.load(before + tl.program_id(0))
        keep = keep | (equal & (rank > pruned_ties))
    write(
        keep, rows, rows >= 0, start, width, weight, pruned, weight_stride, pruned_stride, mask, PRUNES, PACKED,
        1, COLUMNS,
    )  # fmt: skip


def matrix_select(scores: Scores, k: int, target: Target) -> None:
    """Write the mask that leaves all but the k lowest of all scores to the target; of equal ones the first go, in
    row-major order.

    0 < k < numel. Raises ValueError for NaN, and leaves the target as it was.
    """
    height, width = target.shape
    columns = min(TILE, max(32, triton.next_power_of_2(width)))
    tiles = triton.cdiv(width, columns)
    grid = (height * tiles,)
    common = scores.arguments() | {"width": width, "tiles": tiles, "COLUMNS": columns}
    threshold, less, equal = _threshold(scores, k, grid, common)
    prunes_ties, before = k - less, None
    if straddled := prunes_ties < equal:
        ties = torch.empty(grid, dtype=torch.int32, device=scores.device)
        count_ties[grid](**common, threshold=threshold, ties=ties, num_warps=4)
        before = ties.cumsum(0, dtype=torch.int64) - ties
    apply_threshold[grid](
        **common | target.arguments(),
        threshold=threshold,
        pruned_ties=prunes_ties,
        before=before if straddled else target.mask.view(torch.uint8),
        TIES=straddled,
    )


def _threshold(scores: Scores, k: int, grid: tuple[int], common: dict) -> tuple[int, int, int]:
    """The k-th lowest key, how many are lower, and how many equal it."""
    numel = scores.values.numel()
    room = max(numel // SHARE, 1024)
    copies = torch.empty(room, dtype=torch.int32, device=scores.device)

    def count(low: int, high: int):
        counts = torch.zeros(3, dtype=torch.int64, device=scores.device)
        count_and_copy[grid](**common, low=low, high=high, room=room, counts=counts, copies=copies)
        below, inside, nan = counts.tolist()
        if nan:
            raise nan_error()

        def pick(rank: int) -> tuple[int, int, int]:
            found = copies[:inside].sort().values
            key = int(found[rank])
            first, last = (int(torch.searchsorted(found, key, right=right)) for right in (False, True))
            return key, first, last - first

        return below, inside, pick if inside <= room else None

    lowest, highest = -scores.ceiling - 1, scores.ceiling
    low, high = bracket(_sample(scores), k / numel, lowest, highest)  # reads two of the sample from the device
    return find(k, lowest, highest, low, high, count)


def _sample(scores: Scores) -> Tensor:
    """Some of the keys, sorted."""
    height, width = scores.values.shape
    size = max(1, min(SAMPLE, height * width // SHARE))
    # Spread evenly by the golden ratio, whatever the width: at regular distances it would see a few columns only.
    places = torch.arange(size, dtype=torch.float64, device=scores.device)
    places = ((places * (math.sqrt(5) - 1) / 2).frac() * (height * width)).long()
    rows, columns = places // width, places % width
    values = scores.values[rows, columns]
    if scores.norms is not None:
        values = values.float().abs() * scores.norms[columns]
    return keys_of(values).sort().values
