"""Loops over rows on a CPU, compiled by numba when they are first called; the compiled code is kept on disk.

Those that select are plain counts and comparisons of integers, which the compiler turns into vector instructions.
None holds the interpreter's lock, so that rows are done in threads (`kernels.cpu`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import njit

STEP = 32  # keys that are looked at together, where few are wanted
ROUNDS_BETWEEN = 4  # of interpolation, before the bracket is narrowed to keys that exist


def compiled(function: Callable) -> Callable:
    """Compiled when it is first called; kept on disk where there is a folder for that, beside this file or at home."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep it: compiled anew in every process
        return njit(nogil=True)(function)


@compiled
def select_rows(bits: np.ndarray, k: int, infinity: int, spacing: float, kept: np.ndarray) -> bool:
    """Write the mask of `masks.row_mask` to `kept`, bool [rows, width]; False, and nothing of use there, for NaN.

    bits: integers, contiguous [rows, width], that hold the bits of floats; infinity: the bits of infinity;
    spacing: about how far apart the bits of a row's scores lie. 0 < k < width.
    """
    height, width = bits.shape
    buffer = np.empty(width, bits.dtype)
    guess = np.int64(abs(bits[0, 0])) if height else np.int64(0)
    for r in range(height):
        keys = bits[r]
        outside = False
        for j in range(width):
            outside |= (keys[j] < 0) | (keys[j] > infinity)
        if outside:
            keys = buffer
            if not _ordered(bits[r], infinity, keys):
                return False
        # Rows of a matrix have similar thresholds: the last one is where to look first.
        guess, upto, spacing = _threshold(keys, k, guess, spacing, np.int64(infinity))
        threshold, row = keys.dtype.type(guess), kept[r]
        for j in range(width):
            row[j] = keys[j] > threshold
        j = width - 1
        while upto > k:  # too many equal the threshold: the last ones stay
            if keys[j] == threshold:
                row[j] = True
                upto -= 1
            j -= 1
    return True


@compiled
def _ordered(bits: np.ndarray, infinity: int, keys: np.ndarray) -> bool:
    """Sign and magnitude → integers in the order of the floats, −0.0 as 0.0. False where one is NaN."""
    greatest = np.iinfo(bits.dtype).max
    nan = False
    for j in range(len(bits)):
        magnitude = bits[j] & greatest
        nan |= magnitude > infinity
        keys[j] = -magnitude if bits[j] < 0 else magnitude
    return not nan


@compiled
def _threshold(keys: np.ndarray, k: int, guess: int, spacing: float, ceiling: int) -> tuple[int, int, float]:
    """A number that k keys do not exceed, or the k-th lowest key where there is no such number; how many do not
    exceed it; and about how far apart the keys lie there, of which `spacing` is an estimate beforehand.

    The first guesses are to lie on both sides of the threshold. Between the bounds of that bracket, which fewer than k
    and at least k keys do not exceed, the next ones are interpolated from the counts at the bounds. That one side does
    not stay where it was, and that equal keys end the search, is seen to by narrowing the bracket to keys that exist,
    and halving it, every few rounds.
    """
    floor = -ceiling - 1
    low, below, high, upto = floor, 0, ceiling, len(keys)
    middle, rounds, overshoot = guess, 0, 1.5
    while upto > k and low + 1 < high:
        if not low < middle < high:
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
        bound, count = keys.dtype.type(middle), np.int32(0)  # in 64 bits: half as fast
        for j in range(len(keys)):
            count = np.int32(count + (keys[j] <= bound))
        if count < k:
            low, below = middle, count
        else:
            high, upto = middle, count
        if low == floor or high == ceiling:
            lacking = k - count
            middle += np.int64(spacing * overshoot * (lacking + (3 if lacking > 0 else -3)))
            overshoot *= 3
            continue
        if rounds == 0:
            spacing = (np.float64(high) - np.float64(low)) / (upto - below)
        rounds += 1
        middle = low
        if rounds % ROUNDS_BETWEEN:
            share = (k + 0.5 - below) / (upto + 1 - below)
            middle = np.int64(low + (np.float64(high) - np.float64(low)) * share)
        else:
            low, high = _narrowed(keys, low, high)
    return high, upto, spacing


@compiled
def _narrowed(keys: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """The bracket low < key ≤ high, made as narrow as the keys inside of it, of which there are some."""
    above, under = keys.dtype.type(low), keys.dtype.type(high)
    least, most = under, above
    for j in range(len(keys)):
        key = keys[j]
        least = min(least, key if key > above else under)
        most = max(most, key if key <= under else above)
    return np.int64(least) - 1, np.int64(most)


@compiled
def weighted(rows: np.ndarray, norms: np.ndarray, shift: int, scores: np.ndarray) -> None:
    """Write the bits of |x_j|·norm_j in fp32 to int32 [rows, width]; rows: as many bits of fp32 numbers, or, to be
    shifted by 16, of bf16 ones; norms: fp32 [width]."""
    for r in range(rows.shape[0]):
        row, own = rows[r], scores[r]
        for j in range(len(row)):
            own[j] = (np.int32(row[j]) << np.int32(shift)) & np.int32(0x7FFFFFFF)
        values = own.view(np.float32)
        for j in range(len(row)):
            values[j] *= norms[j]


@compiled
def keep_only(bits: np.ndarray, kept: np.ndarray, out: np.ndarray) -> None:
    """Write integers [rows, width], and zeros where `kept`, bool [rows, width], is not set, to `out`, which may be
    `bits`."""
    for r in range(bits.shape[0]):
        row, own, target = bits[r], kept[r].view(np.uint8), out[r]
        for j in range(len(row)):  # a product: of 16 bits, a choice becomes a branch that takes 25 times as long
            target[j] = row[j] * (own[j] != 0)


@compiled
def add_moments(rows: np.ndarray, norms: np.ndarray, moments: np.ndarray) -> None:
    """Write mean, M2, M3 and M4 of |x_j|, or of |x_j|·norm_j where there are norms, to fp64 [rows, 4]."""
    width = rows.shape[1]
    values = np.empty(width)
    for r in range(rows.shape[0]):
        total = 0.0
        for j in range(width):
            values[j] = abs(np.float64(rows[r, j])) * norms[j] if len(norms) else abs(np.float64(rows[r, j]))
            total += values[j]
        mean = total / width
        second = third = fourth = 0.0
        for j in range(width):
            d = values[j] - mean
            square = d * d
            second += square
            third += square * d
            fourth += square * square
        moments[r, 0], moments[r, 1], moments[r, 2], moments[r, 3] = mean, second, third, fourth


@compiled
def gather(keys: np.ndarray, infinity: int, low: int, high: int, copies: np.ndarray) -> tuple[int, int]:
    """How many keys do not exceed `low`, and how many others do not exceed `high`; the latter are written to `copies`.

    infinity: of bits of floats, which are keys where none has a sign; where one has, or is NaN, the answer is −1 and
    nothing of use. Of keys that are known to be such: −1.
    """
    below, count, whole = 0, 0, len(keys) // STEP * STEP
    unsigned = infinity >= 0
    least, most = keys.dtype.type(0), keys.dtype.type(infinity)
    low, high = keys.dtype.type(low), keys.dtype.type(high)
    outside = False
    for start in range(0, whole, STEP):
        part = keys[start : start + STEP]
        lower = upto = np.int32(0)
        for j in range(STEP):
            key = part[j]
            lower += np.int32(key <= low)
            upto += np.int32(key <= high)
            outside |= (key < least) | (key > most)
        below += lower
        if upto > lower:  # few of these have any
            for j in range(STEP):
                if part[j] > low and part[j] <= high:
                    copies[count] = part[j]
                    count += 1
    for j in range(whole, len(keys)):
        key = keys[j]
        below += key <= low
        outside |= (key < least) | (key > most)
        if key > low and key <= high:
            copies[count] = key
            count += 1
    if unsigned and outside:
        return -1, -1
    return below, count


@functools.cache
def group_ranker(m: int) -> Callable[[np.ndarray, int, np.ndarray], None]:
    """A function of keys [groups·m], n, and `kept`, to which it writes which of every m are not among the n lowest; of
    equal keys the first is the lower one. Compiled for m: with loops of constant length it takes a sixth of the time.
    """

    @compiled
    def rank_groups(keys: np.ndarray, n: int, kept: np.ndarray) -> None:
        for group in range(len(keys) // m):
            for i in range(m):
                key, rank = keys[group * m + i], np.int32(0)
                for j in range(m):
                    other = keys[group * m + j]
                    rank += np.int32(other < key) | (np.int32(other == key) & np.int32(j < i))
                kept[group * m + i] = rank >= n

    return rank_groups
