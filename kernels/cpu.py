"""Masks on a CPU, in as many threads as torch is set to use; `kernels.masks` is their public face.

Everything is done in chunks that fit into a core's cache: scores that follow from a weight and norms exist for one
chunk at a time, and the weight is pruned while its chunk is there.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
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
LONG = 3 << 20  # a row of more scores is sampled first; shorter ones are faster without (3 and 5 ms at 2.4 million)
SAMPLE = 1 << 16  # of a long row, at most
WORD = 32  # weights in a word of a packed mask


@functools.cache
def bits_of(value: float, dtype: torch.dtype) -> int:
    return torch.tensor(value, dtype=dtype).view(BITS[dtype]).item()


def nan_error() -> ValueError:
    return ValueError("some scores are NaN: they cannot be ranked")


class Scores:
    """Bits of scores [rows, width]: of what is given, or of |W_ij|·norm_j in fp32, made when they are asked for.

    values: floating, contiguous where `flat` is used; norms: [width], or None. dtype: of the scores.
    """

    def __init__(self, values: Tensor, norms: Tensor | None = None) -> None:
        self.shape, self._dtype = values.shape, values.dtype
        self.dtype = values.dtype if norms is None else torch.float32
        self._bits = values.detach().view(BITS[values.dtype]).numpy()
        self._norms = None if norms is None else norms.detach().float().numpy()

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Contiguous [stop − start, width]; may be a view: not to be written to."""
        bits = np.ascontiguousarray(self._bits[start:stop])
        return bits if self._norms is None else self._fused(bits, self._norms)

    def flat(self, index: slice | np.ndarray) -> np.ndarray:
        """Contiguous; in row-major order. May be a view: not to be written to."""
        bits = np.ascontiguousarray(self._bits.reshape(-1)[index])
        if self._norms is None:
            return bits
        if isinstance(index, slice):
            first = index.start % len(self._norms)
            return self._fused(bits, self._tiled[first : first + len(bits)])
        return self._fused(bits, self._norms[index % len(self._norms)])

    @functools.cached_property
    def _tiled(self) -> np.ndarray:
        """Norms over and over, for a chunk that starts in any column."""
        return np.tile(self._norms, CHUNK // len(self._norms) + 2)

    def _fused(self, bits: np.ndarray, norms: np.ndarray) -> np.ndarray:
        from autoprune.kernels.compiled import weighted  # here, since only a CPU needs numba, and it takes a second

        if self._dtype in (torch.float16, torch.float64):
            bits = bits.view(f"f{bits.itemsize}").astype(np.float32).view(np.int32)
        rows = bits.reshape(-1, len(norms))
        scores = np.empty(rows.shape, dtype=np.int32)
        weighted(rows, norms, 16 if bits.itemsize == 2 else 0, scores)
        return scores.reshape(bits.shape)


def _ordered(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Integers in the order of the scores, in which −0.0 equals 0.0; may be the bits themselves: not to be written to.

    The bits of floats are in their order where no sign is set; integers are compared faster than floats, and sorted
    without a guard against NaN. Raises ValueError for NaN, whose bits lie beyond those of infinity.
    """
    infinity = bits_of(math.inf, dtype)
    # One pass for both: as unsigned integers, signs and NaN lie beyond infinity.
    if bits.view(f"u{bits.itemsize}").max() <= infinity:
        return bits
    keys = bits
    if bits.min() < 0:  # sign and magnitude → two's complement
        sign = bits >> (8 * bits.itemsize - 1)
        keys = bits & np.iinfo(bits.dtype).max
        keys ^= sign
        keys -= sign
    if keys.max() > infinity or keys.min() < -infinity:
        raise nan_error()
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
    try:
        return [work(ranges[0]), *(other.result() for other in others)]
    finally:
        wait(others)  # after an error, too: nobody writes to a tensor that the caller has back


@functools.lru_cache(maxsize=1)
def _pool(workers: int, process: int) -> ThreadPoolExecutor:
    """Kept between calls; a forked process, which inherits no threads, is another `process` and makes its own."""
    return ThreadPoolExecutor(workers, "masks")


def row_mask(scores: Scores, k: int) -> Tensor:
    """`masks.row_mask`. 0 < k < width."""
    mask = np.empty(scores.shape, dtype=np.bool_)
    if scores.shape[1] > LONG:
        for index, kept in enumerate(mask):
            values = torch.from_numpy(scores.rows(index, index + 1)).view(scores.dtype)
            _long_row(Scores(values), k, kept)
        return torch.from_numpy(mask)

    def work(part: range) -> None:
        for start, stop in _steps(part, scores.shape[1]):
            _select(scores.rows(start, stop), scores.dtype, k, mask[start:stop])

    _in_threads(work, scores.shape[0], mask.size)
    return torch.from_numpy(mask)


def matrix_mask(scores: Scores, k: int) -> Tensor:
    """`masks.matrix_mask` of scores that are contiguous. 0 < k < numel."""
    mask = np.empty(scores.shape, dtype=np.bool_)
    if mask.size > LONG:
        _long_row(scores, k, mask.reshape(-1))
    else:
        _select(scores.rows(0, len(mask)).reshape(1, -1), scores.dtype, k, mask.reshape(1, -1))
    return torch.from_numpy(mask)


def nm_mask(scores: Scores, n: int, m: int, pairwise: bool) -> Tensor:
    """`masks.nm_mask`, by comparing all pairs, or as many short rows. 0 < n < m, which divides the width."""
    mask, width = np.empty(scores.shape, dtype=np.bool_), scores.shape[1]

    def work(part: range) -> None:
        for start, stop in _steps(part, width):
            _select_groups(scores.rows(start, stop), scores.dtype, n, m, pairwise, mask[start:stop])

    _in_threads(work, scores.shape[0], mask.size)
    return torch.from_numpy(mask)


def _steps(part: range, width: int, unit: int = 1) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of rows within the part, a chunk of scores each, whole units but for the last."""
    step = max(1, CHUNK // width // unit) * unit
    return [(start, min(start + step, part.stop)) for start in part[::step]]


def prune_rows(weight: Tensor, scores: Scores, k: int, pruned: Tensor) -> Tensor:
    """`masks.prune_rows`. 0 < k < width."""
    if weight.shape[1] > LONG:
        return apply(weight, row_mask(scores, k), pruned)
    return _prune(weight, pruned, lambda start, stop, kept: _select(scores.rows(start, stop), scores.dtype, k, kept))


def prune_nm(weight: Tensor, scores: Scores, n: int, m: int, pairwise: bool, pruned: Tensor) -> Tensor:
    """`masks.prune_nm`. 0 < n < m, which divides the width."""

    def choose(start: int, stop: int, kept: np.ndarray) -> None:
        _select_groups(scores.rows(start, stop), scores.dtype, n, m, pairwise, kept)

    return _prune(weight, pruned, choose)


def apply(weight: Tensor, mask: Tensor, pruned: Tensor) -> Tensor:
    """Write the weight with zeros where the mask, bool of its shape, is False, to `pruned`. Returns the packed mask."""
    kept_rows = mask.numpy()
    return _prune(weight, pruned, lambda start, stop, kept: np.copyto(kept, kept_rows[start:stop]))


def _prune(weight: Tensor, pruned: Tensor, choose: Callable[[int, int, np.ndarray], None]) -> Tensor:
    """choose: writes the mask of the rows from one to before another to bool [rows, width]."""
    from autoprune.kernels.compiled import keep_only

    height, width = weight.shape
    source, target = (tensor.detach().view(BITS[tensor.dtype]).numpy() for tensor in (weight, pruned))
    words = np.zeros(-(-source.size // WORD), dtype=np.int32)
    packed = words.view(np.uint8)
    unit = WORD // math.gcd(width, WORD)  # rows that are whole words

    def work(part: range) -> None:
        rows = range(part.start * unit, min(part.stop * unit, height))
        for start, stop in _steps(rows, width, unit):
            kept = np.empty((stop - start, width), dtype=np.bool_)
            choose(start, stop, kept)
            keep_only(source[start:stop], kept, target[start:stop])
            bits = np.packbits(kept.reshape(-1), bitorder="little")
            first = start * width // 8
            packed[first : first + len(bits)] = bits

    _in_threads(work, -(-height // unit), source.size)
    return torch.from_numpy(words)


def row_moments(weight: Tensor, norms: Tensor | None) -> Tensor:
    """`moments.row_moments`."""
    from autoprune.kernels.compiled import add_moments

    height, width = weight.shape
    moments = np.zeros((height, 4))
    factors = np.ones(0) if norms is None else norms.detach().double().numpy()

    def work(part: range) -> None:
        for start, stop in _steps(part, width):
            rows = weight.detach()[start:stop]
            rows = rows.float() if rows.element_size() < 4 else rows  # exact; and numpy knows no bfloat16
            add_moments(rows.contiguous().numpy(), factors, moments[start:stop])

    _in_threads(work, height, weight.numel())
    return torch.from_numpy(moments)


def _select(bits: np.ndarray, dtype: torch.dtype, k: int, kept: np.ndarray) -> None:
    """Write the mask of rows of score bits to `kept`. 0 < k < width."""
    from autoprune.kernels.compiled import select_rows

    infinity, octave = (bits_of(value, dtype) for value in (math.inf, 2.0))
    octave -= bits_of(1.0, dtype)
    # An eighth of an octave holds about an eighth of a row, or so: only where to look next in the first row.
    if not select_rows(bits, k, bits.dtype.type(infinity), octave / bits.shape[1], kept):
        raise nan_error()


def _long_row(scores: Scores, k: int, kept: np.ndarray) -> None:
    """Write the mask of all scores, as one row, to `kept` [numel]. 0 < k < numel.

    A sample says between which two values the threshold lies, but for rare cases; only the scores between them, a few
    in a hundred, need a closer look. The sample decides how long it takes, never the result.
    """
    from autoprune.kernels.compiled import split

    width = len(kept)
    size = min(SAMPLE, max(1, width // 128))
    sample = np.sort(_ordered(scores.flat(np.random.default_rng(0).integers(width, size=size)), scores.dtype))
    middle = k * size // width
    margin = 4 * math.sqrt(size * k / width * (1 - k / width)) + 1  # four standard deviations of a rank
    low, high = sample[max(0, int(middle - margin))], sample[min(size - 1, int(middle + margin))]
    equal, infinity = low == high, bits_of(math.inf, scores.dtype)

    def work(part: range) -> list[np.ndarray]:
        """Of this part: where the scores between the two values are."""
        found, room = [], np.empty(min(CHUNK, len(part)), dtype=np.int64)
        for start in part[::CHUNK]:
            here = slice(start, min(start + CHUNK, part.stop))
            bits = scores.flat(here)
            count = split(bits, infinity, low, high, kept[here], room)
            if count < 0:
                keys = _ordered(bits, scores.dtype)
                np.greater(keys, high, out=kept[here])
                places = np.flatnonzero((keys >= low) ^ kept[here])
            else:
                places = room[:count]
            found.append(start + places)
        return found

    inside = np.concatenate(sum(_in_threads(work, width, width), []))
    count = k - (width - np.count_nonzero(kept) - len(inside))  # to prune of those inside
    if not 0 <= count <= len(inside):
        inside, count, equal = np.arange(width), k, False
    chosen = np.arange(len(inside))[None] >= count
    if not equal and 0 < count < len(inside):
        _select(scores.flat(inside)[None], scores.dtype, count, chosen)
    kept[inside] = chosen[0]


def _select_groups(bits: np.ndarray, dtype: torch.dtype, n: int, m: int, pairwise: bool, kept: np.ndarray) -> None:
    """Write the mask of every m score bits along rows to `kept`. 0 < n < m."""
    from autoprune.kernels.compiled import group_ranker

    if pairwise:
        group_ranker(m)(_ordered(bits, dtype).reshape(-1), n, kept.reshape(-1))
    else:
        _select(bits.reshape(-1, m), dtype, n, kept.reshape(-1, m))
