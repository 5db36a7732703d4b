"""Triton: the k lowest scores of each row are pruned, exactly, in one pass over the row.

A row lies in registers as integers (`kernels.keys`). Its k-th lowest is found between two bounds: guesses are
interpolated from how many keys each bound leaves below, halved every few rounds so that no shape of values is slow, and
end as soon as a bound has exactly k on its side. Rows of several tiles are read again in every round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from autoprune.kernels.keys import BEYOND, Scores, Target, load_keys, refuse_nan, report_nan, tuned, write

TILE = 4096  # scores per program where rows are shorter than that: several rows then
LONGEST = 32768  # of a row that fits into registers: at 32 warps, 32 numbers in each thread
LOOPED = 8192  # tile of longer rows
HALVED = tl.constexpr(5)  # every so many rounds the bracket is halved


@triton.jit
def next_guess(low, high, below, upto, k, rounds):
    """int64, within low < guess < high where there is room, for k strictly above `below` and not above `upto`."""
    share = (k + 0.5 - below).to(tl.float32) / (upto + 1 - below).to(tl.float32)
    step = ((high - low).to(tl.float32) * share).to(tl.int64)
    step = tl.where(rounds % HALVED == HALVED - 1, (high - low) >> 1, step)
    return low + tl.maximum(tl.minimum(step, high - low - 1), 1)


@tuned(["FUSED", "MAGNITUDE", "PRUNES", "ROWS", "COLUMNS"])
@triton.jit(do_not_specialize=["height", "k"])
def select_rows(
    values,
    norms,
    stride,
    weight,
    pruned,
    weight_stride,
    pruned_stride,
    mask,
    flag,
    height,
    width,
    k,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    PRUNES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, columns = row.to(tl.int64)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (rows < height) & (columns < width)
    keys, nan = load_keys(values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
    report_nan(flag, nan)
    # Fewer than k keys do not exceed `low`, which are `below`; at least k do not exceed `high`, which are `upto`.
    low = tl.min(keys, axis=1).to(tl.int64) - 1
    high = tl.max(tl.where(inside, keys, -BEYOND), axis=1).to(tl.int64)
    below = tl.zeros([ROWS], tl.int32)
    upto = below + tl.where(k == 0, 0, width)
    high = tl.where(k == 0, low, high)
    searched = (upto > k) & (low + 1 < high)
    rounds = 0
    while tl.max(searched.to(tl.int32), axis=0) > 0:
        guess = next_guess(low, high, below, upto, k, rounds)
        count = tl.sum((keys <= guess.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        rises, falls = searched & (count < k), searched & (count >= k)
        low, below = tl.where(rises, guess, low), tl.where(rises, count, below)
        high, upto = tl.where(falls, guess, high), tl.where(falls, count, upto)
        searched = (upto > k) & (low + 1 < high)
        rounds += 1
    threshold = high.to(tl.int32)[:, None]
    keep = keys > threshold
    if tl.max((upto - k), axis=0) > 0:  # too many equal the threshold of a row: its last ones stay
        equal = (keys == threshold) & (upto > k)[:, None]
        keep = keep | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) > (k - below)[:, None]))
    write(
        keep, rows, rows < height, 0, width, weight, pruned, weight_stride, pruned_stride, mask, PRUNES, PACKED,
        ROWS, COLUMNS,
    )  # fmt: skip


@tuned(["FUSED", "MAGNITUDE", "PRUNES", "width"])
@triton.jit(do_not_specialize=["height", "k"])
def select_long_rows(
    values,
    norms,
    stride,
    weight,
    pruned,
    weight_stride,
    pruned_stride,
    mask,
    flag,
    height,
    width,
    k,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
    PRUNES: tl.constexpr,
    PACKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`select_rows` of one row that is longer than a tile."""
    rows = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    lowest = tl.full([1], BEYOND, tl.int32)
    highest = -lowest
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < width
        keys, nan = load_keys(values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
        report_nan(flag, nan)
        lowest = tl.minimum(lowest, tl.min(keys, axis=1))
        highest = tl.maximum(highest, tl.max(tl.where(inside, keys, -BEYOND), axis=1))
    low, high = lowest.to(tl.int64) - 1, highest.to(tl.int64)
    below = tl.zeros([1], tl.int32)
    upto = below + tl.where(k == 0, 0, width)
    high = tl.where(k == 0, low, high)
    rounds = 0
    while tl.max(((upto > k) & (low + 1 < high)).to(tl.int32), axis=0) > 0:
        guess = next_guess(low, high, below, upto, k, rounds)
        count = tl.zeros([1], tl.int32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)[None, :]
            inside = columns < width
            keys, nan = load_keys(
                values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING
            )
            count += tl.sum((keys <= guess.to(tl.int32)[:, None]).to(tl.int32), axis=1)
        low, below = tl.where(count < k, guess, low), tl.where(count < k, count, below)
        high, upto = tl.where(count < k, high, guess), tl.where(count < k, upto, count)
        rounds += 1
    threshold = high.to(tl.int32)[:, None]
    ranked = tl.zeros([1], tl.int32)  # ties before this tile
    for start in range(0, width, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < width
        keys, nan = load_keys(values, norms, rows * stride, columns, width, inside, FUSED, WIDENED, MAGNITUDE, CEILING)
        equal = (keys == threshold) & (upto > k)[:, None]
        rank = tl.cumsum(equal.to(tl.int32), axis=1) + ranked[:, None]
        keep = (keys > threshold) | (equal & (rank > (k - below)[:, None]))
        ranked += tl.sum(equal.to(tl.int32), axis=1)
        write(
            keep, rows, rows < height, start, width, weight, pruned, weight_stride, pruned_stride, mask, PRUNES,
            PACKED, 1, COLUMNS,
        )  # fmt: skip


def row_select(scores: Scores, k: int, target: Target) -> None:
    """Write the mask that leaves all but the k lowest of each row to the target; of equal ones the first columns go.

    0 ≤ k ≤ width. Raises ValueError for NaN, when the target has been written to.
    """
    height, width = target.shape
    flag = torch.zeros((), dtype=torch.int32, device=scores.device)
    common = scores.arguments() | target.arguments() | {"flag": flag, "height": height, "width": width, "k": k}
    if width > LONGEST:
        select_long_rows[(height,)](**common, COLUMNS=LOOPED)
    else:
        columns = max(32, triton.next_power_of_2(width))
        rows = max(1, TILE // columns)
        select_rows[(triton.cdiv(height, rows),)](**common, ROWS=rows, COLUMNS=columns)
    refuse_nan(flag)
