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

from autoprune.kernels.threshold import bracket, find

# The integers that hold the bits of each dtype of scores.
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

# Scores that a CPU thread works on at a time: 512 KiB in fp32, which stays in a core's cache and keeps the memory
# beside the scores small. Measured at 1536x8960: 5 to 25% faster than all rows at once.
CHUNK = 1 << 17
SHARE = 1 << 17  # the fewest scores that a thread is woken for: measured, 110,000 take as long in one as in two
LONG = 3 << 20  # a matrix of more scores is sampled first; smaller ones are faster without (3 and 5 ms at 2.4 million)
SAMPLE = 1 << 16  # of a large matrix, at most
ROOM = 64  # at most one in so many scores is copied to find a threshold
WORD = 32  # weights in a word of a packed mask

# Writes the mask of the rows from one to before another to bool [rows, width].
Choose = Callable[[int, int, np.ndarray], None]


@functools.cache
def bits_of(value: float, dtype: torch.dtype) -> int:
    return torch.tensor(value, dtype=dtype).view(BITS[dtype]).item()


def nan_error() -> ValueError:
    return ValueError("some scores are NaN: they cannot be ranked")


class Scores:
    """Bits of scores [rows, width]: of what is given, or of |W_ij|·norm_j in fp32, made when they are asked for.

    values: floating, any strides; norms: [width], or None. dtype: of the scores.
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

    def at(self, places: np.ndarray) -> np.ndarray:
        """Those at these places [n], in row-major order."""
        rows, columns = np.divmod(places, self.shape[1])
        bits = self._bits[rows, columns]
        if self._norms is None:
            return bits
        return self._fused(bits[None], self._norms[columns])[0]

    def _fused(self, bits: np.ndarray, norms: np.ndarray) -> np.ndarray:
        from autoprune.kernels.compiled import weighted  # here, since only a CPU needs numba, and it takes a second

        if self._dtype in (torch.float16, torch.float64):
            bits = bits.view(f"f{bits.itemsize}").astype(np.float32).view(np.int32)
        scores = np.empty(bits.shape, dtype=np.int32)
        weighted(bits, norms, 16 if bits.itemsize == 2 else 0, scores)
        return scores


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


def _in_threads(work: Callable[[range], Any], length: int, scores: int, alone: bool = False) -> list:
    """What `work` returns for the consecutive parts of range(length), which stand for so many scores in all.

    One part per thread that torch is set to use, fewer where there is little to do; numpy lets go of the
    interpreter's lock. Parts of a mask do not depend on each other, so their number changes nothing in it; where they
    do, the work is to be one thread's alone.
    """
    parts = 1 if alone else max(1, min(torch.get_num_threads(), length, scores // SHARE))
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
    return _mask(scores, _by_row(scores, k))


def matrix_mask(scores: Scores, k: int) -> Tensor:
    """`masks.matrix_mask`. 0 < k < numel."""
    height, width = scores.shape
    if height * width > LONG:
        return _mask(scores, *_by_threshold(scores, k))
    mask = np.empty(scores.shape, dtype=np.bool_)
    _select(scores.rows(0, height).reshape(1, -1), scores.dtype, k, mask.reshape(1, -1))
    return torch.from_numpy(mask)


def nm_mask(scores: Scores, n: int, m: int, pairwise: bool) -> Tensor:
    """`masks.nm_mask`, by comparing all pairs, or as many short rows. 0 < n < m, which divides the width."""
    return _mask(scores, _by_group(scores, n, m, pairwise))


def _mask(scores: Scores, choose: Choose, alone: bool = False) -> Tensor:
    mask, width = np.empty(scores.shape, dtype=np.bool_), scores.shape[1]

    def work(part: range) -> None:
        for start, stop in _steps(part, width):
            choose(start, stop, mask[start:stop])

    _in_threads(work, scores.shape[0], mask.size, alone)
    return torch.from_numpy(mask)


def _steps(part: range, width: int, unit: int = 1) -> list[tuple[int, int]]:
    """Consecutive (start, stop) of rows within the part, a chunk of scores each, whole units but for the last."""
    step = max(1, CHUNK // width // unit) * unit
    return [(start, min(start + step, part.stop)) for start in part[::step]]


def prune_rows(weight: Tensor, scores: Scores, k: int, pruned: Tensor) -> Tensor:
    """`masks.prune_rows`. 0 < k < width."""
    return _prune(weight, pruned, _by_row(scores, k))


def prune_matrix(weight: Tensor, scores: Scores, k: int, pruned: Tensor) -> Tensor:
    """`masks.prune_matrix`. 0 < k < numel."""
    if weight.numel() > LONG:
        return _prune(weight, pruned, *_by_threshold(scores, k))
    return apply(weight, matrix_mask(scores, k), pruned)


def prune_nm(weight: Tensor, scores: Scores, n: int, m: int, pairwise: bool, pruned: Tensor) -> Tensor:
    """`masks.prune_nm`. 0 < n < m, which divides the width."""
    return _prune(weight, pruned, _by_group(scores, n, m, pairwise))


def apply(weight: Tensor, mask: Tensor, pruned: Tensor) -> Tensor:
    """Write the weight with zeros where the mask, bool of its shape, is False, to `pruned`. Returns the packed mask."""
    kept_rows = mask.numpy()
    return _prune(weight, pruned, lambda start, stop, kept: np.copyto(kept, kept_rows[start:stop]))


def _prune(weight: Tensor, pruned: Tensor, choose: Choose, alone: bool = False) -> Tensor:
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

    _in_threads(work, -(-height // unit), source.size, alone)
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


def _by_row(scores: Scores, k: int) -> Choose:
    """How to choose the k lowest of each row."""
    return lambda start, stop, kept: _select(scores.rows(start, stop), scores.dtype, k, kept)


def _by_threshold(scores: Scores, k: int) -> tuple[Choose, bool]:
    """How to choose the k lowest of all scores, and whether rows must be chosen in order, since ties are parted."""
    threshold, less, equal = _threshold(scores, k)
    left, parted = k - less, k - less < equal  # how many of those that equal the threshold are still to be pruned

    def choose(start: int, stop: int, kept: np.ndarray) -> None:
        nonlocal left
        keys = _ordered(scores.rows(start, stop), scores.dtype)
        np.greater(keys, threshold, out=kept)
        if parted:
            ties = np.flatnonzero(keys == threshold)
            kept.reshape(-1)[ties[left:]] = True
            left = max(0, left - len(ties))

    return choose, parted


def _threshold(scores: Scores, k: int) -> tuple[int, int, int]:
    """The k-th lowest key, how many are lower, and how many equal it. 0 < k < numel."""
    from autoprune.kernels.compiled import gather

    height, width = scores.shape
    numel, infinity = height * width, bits_of(math.inf, scores.dtype)
    places = np.random.default_rng(0).integers(numel, size=min(SAMPLE, max(1, numel // 128)))
    sample = np.sort(_ordered(scores.at(places), scores.dtype))
    room = max(1, numel // ROOM)

    def count(low: int, high: int):
        def work(part: range) -> tuple[int, int, list[np.ndarray]]:
            below, inside, copies = 0, 0, []
            for start, stop in _steps(part, width):
                bits = scores.rows(start, stop).reshape(-1)
                own = np.empty(len(bits), bits.dtype)
                lower, here = gather(bits, infinity, low, high, own)
                if lower < 0:
                    lower, here = gather(_ordered(bits, scores.dtype), -1, low, high, own)
                below, inside = below + lower, inside + here
                if inside <= room:
                    copies.append(own[:here].copy())
            return below, inside, copies

        parts = _in_threads(work, height, numel)
        below, inside = (sum(part[i] for part in parts) for i in (0, 1))

        def pick(rank: int) -> tuple[int, int, int]:
            copies = np.concatenate(sum((part[2] for part in parts), []))
            copies.partition(rank)
            key = copies[rank]
            return int(key), np.count_nonzero(copies < key), np.count_nonzero(copies == key)

        return below, inside, pick if inside <= room else None

    low, high = bracket(sample, k / numel, -infinity - 1, infinity)
    return find(k, -infinity - 1, infinity, low, high, count)


def _by_group(scores: Scores, n: int, m: int, pairwise: bool) -> Choose:
    """How to choose the n lowest of every m along rows."""
    from autoprune.kernels.compiled import group_ranker

    def choose(start: int, stop: int, kept: np.ndarray) -> None:
        bits = scores.rows(start, stop)
        if pairwise:
            group_ranker(m)(_ordered(bits, scores.dtype).reshape(-1), n, kept.reshape(-1))
        else:
            _select(bits.reshape(-1, m), scores.dtype, n, kept.reshape(-1, m))

    return choose
