"""Masks on a CPU, in as many threads as torch is set to use; `kernels.masks` is their public face."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The integers that hold the bits of each dtype of scores.
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

# Scores that a CPU thread works on at a time: 1 MiB in fp32, which stays in a core's cache and keeps the memory beside
# the scores small. Measured at 1536x8960: 5 to 25% faster than all rows at once.
CHUNK = 1 << 18
SHARE = 1 << 17  # the fewest scores that a thread is woken for: measured, 110,000 take as long in one as in two
SAMPLE = 1 << 15  # of a row longer than CHUNK, to find about where its threshold is


def bits_of(value: float, dtype: torch.dtype) -> int:
    return torch.tensor(value, dtype=dtype).view(BITS[dtype]).item()


def refuse_nan(scores: Tensor) -> None:
    """On any device. Raises ValueError, which says how many scores are NaN, where there is one."""
    if scores.numel() and scores.min().isnan():  # a minimum propagates NaN and needs no memory
        raise ValueError(f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN: they cannot be ranked")


class _Ordered:
    """Scores on a CPU as integers in the same order, in which −0.0 equals 0.0: `ordered[index]`, as of an array.

    The bits of floats are in their order where no sign is set; integers are compared faster than floats, and sorted
    without a guard against NaN.
    Raises ValueError for NaN, whose bits lie beyond those of infinity, in what is asked for.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.bits = scores.view(BITS[scores.dtype]).numpy()
        self.infinity = bits_of(math.inf, scores.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """May be a view of the scores: not to be written to."""
        keys = np.ascontiguousarray(self.bits[index])
        # One pass for both: as unsigned integers, signs and NaN lie beyond infinity.
        if keys.view(f"u{keys.itemsize}").max() <= self.infinity:
            return keys
        if keys.min() < 0:  # sign and magnitude → two's complement
            sign = keys >> (8 * keys.itemsize - 1)
            keys = keys & np.iinfo(keys.dtype).max
            keys ^= sign
            keys -= sign
            if keys.min() < -self.infinity:
                refuse_nan(self.scores)
        if keys.max() > self.infinity:
            refuse_nan(self.scores)
        return keys


def _in_threads(work: Callable[[range], Any], length: int, scores: int) -> list:
    """What `work` returns for the consecutive parts of range(length), which stand for so many scores in all.

    One part per thread that torch is set to use, fewer where there is little to do; numpy lets go of the
    interpreter's lock. Parts of a mask do not depend on each other, so their number changes nothing in it.
    """
    parts = max(1, min(torch.get_num_threads(), length, scores // SHARE))
    ranges = [range(length * part // parts, length * (part + 1) // parts) for part in range(parts)]
    if parts == 1:
        return [work(ranges[0])]
    pool = _pool(torch.get_num_threads() - 1, os.getpid())
    others = [pool.submit(work, part) for part in ranges[1:]]
    return [work(ranges[0]), *(other.result() for other in others)]


@functools.lru_cache(maxsize=1)
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    """Kept between calls; a forked process, which inherits no threads, is another `process` and makes its own."""
    return ThreadPoolExecutor(workers, "masks")


def select_mask(rows: Tensor, k: int) -> Tensor:
    """`masks.row_mask`, by counting (`kernels.compiled`). 0 < k < width."""
    height, width = rows.shape
    bits, mask = rows.view(BITS[rows.dtype]).numpy(), np.empty(rows.shape, dtype=np.bool_)
    if width > CHUNK:
        for scores, kept in zip(rows, mask, strict=True):
            _long_row(scores, k, kept)
        return torch.from_numpy(mask)
    step = CHUNK // width

    def work(part: range) -> None:
        for start in part[::step]:
            here = slice(start, min(start + step, part.stop))
            _select(rows, np.ascontiguousarray(bits[here]), k, mask[here])

    _in_threads(work, height, rows.numel())
    return torch.from_numpy(mask)


def _select(scores: Tensor, bits: np.ndarray, k: int, kept: np.ndarray) -> None:
    """Write the mask of rows of bits, of these scores or of some of them, to `kept`. 0 < k < width."""
    from autoprune.kernels.compiled import select_rows  # here, since only a CPU needs numba, and it takes a second

    infinity, octave = (bits_of(value, scores.dtype) for value in (math.inf, 2.0))
    octave -= bits_of(1.0, scores.dtype)
    # An eighth of an octave holds about an eighth of a row, or so: only where to look next in the first row.
    if not select_rows(bits, k, bits.dtype.type(infinity), octave / bits.shape[1], kept):
        refuse_nan(scores)


def _long_row(scores: Tensor, k: int, kept: np.ndarray) -> None:
    """Write the mask of one row [width] to `kept`. 0 < k < width.

    A sample says between which two values the threshold lies, but for rare cases; only the scores between them, a few
    in a hundred, need a closer look. The sample decides how long it takes, never the result.
    """
    ordered, width = _Ordered(scores), len(kept)
    sample = np.sort(ordered[np.random.default_rng(0).integers(width, size=SAMPLE)])
    middle = k * SAMPLE // width
    margin = 4 * math.sqrt(SAMPLE * k / width * (1 - k / width)) + 1  # four standard deviations of a rank
    low, high = sample[max(0, int(middle - margin))], sample[min(SAMPLE - 1, int(middle + margin))]
    equal = low == high

    def work(part: range) -> list[np.ndarray]:
        """Of this part: where the scores between the two values are."""
        found = []
        for start in part[::CHUNK]:
            here = slice(start, min(start + CHUNK, part.stop))
            keys = ordered[here]
            np.greater(keys, high, out=kept[here])
            found.append(start + np.flatnonzero((keys >= low) ^ kept[here]))
        return found

    inside = np.concatenate(sum(_in_threads(work, width, width), []))
    count = k - (width - np.count_nonzero(kept) - len(inside))  # to prune of those inside
    if not 0 <= count <= len(inside):
        inside, count, equal = np.arange(width), k, False
    chosen = np.arange(len(inside))[None] >= count
    if not equal and 0 < count < len(inside):
        _select(scores, ordered.bits[inside][None], count, chosen)
    kept[inside] = chosen[0]


def pairwise_mask(groups: Tensor, n: int) -> Tensor:
    """`masks.nm_mask` of groups [count, m] by the rank of each score among its m, at most 256. 0 < n < m.

    A score's rank in a stable sort is its column, plus the lower ones on its right, minus the higher ones on its left.
    All pairs at one distance are compared at once, along the flat array; those across a border of groups are dropped.
    """
    count, m = groups.shape
    ordered, mask = _Ordered(groups.reshape(-1)), np.empty(groups.numel(), dtype=np.bool_)
    step = max(1, CHUNK // (2 * m))  # ranks need room in the cache, too
    columns = np.tile(np.arange(m, dtype=np.uint8), min(step, count))

    def work(part: range) -> None:
        first, second, ranks = (np.empty(len(columns), dtype=np.uint8) for _ in range(3))
        for start in part[::step]:
            here = slice(start * m, min(start + step, part.stop) * m)
            keys = ordered[here]
            rank = ranks[: len(keys)]
            rank[...] = columns[: len(keys)]
            for distance in range(1, m):
                size = len(keys) - distance
                lower, same_group = first[:size], second[:size]
                np.less(keys[distance:], keys[:-distance], out=lower.view(np.bool_))
                np.less(columns[:size], m - distance, out=same_group.view(np.bool_))
                lower &= same_group
                rank[:-distance] += lower
                rank[distance:] -= lower
            np.greater_equal(rank, n, out=mask[here])

    _in_threads(work, count, groups.numel())
    return torch.from_numpy(mask).reshape(groups.shape)
