"""How far two masks are apart, and a fingerprint of one: `distance` and `digest` of packed masks, on their device."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels.keys import tuned

TILE = 4096  # words per program
# Of the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def distance(first: Tensor, second: Tensor) -> int:
    """Number of weights on which two packed masks differ. Both int32 [words], on one device (`masks.pack`).

    Raises ValueError where shapes or dtypes differ.
    """
    for bits in (first, second):
        _check(bits)
    if first.shape != second.shape:
        raise ValueError(f"masks of {len(first)} and {len(second)} words are not of the same weights")
    if first.device.type != "cuda":
        first, second = first.cpu(), second.cpu()
        return int(np.bitwise_count((first.numpy() ^ second.numpy()).view(np.uint32)).sum(dtype=np.int64))
    return triton_distance(first, second)


def digest(bits: Tensor) -> int:
    """64 bits, unsigned, over a packed mask, int32 [words], and the place of every word: the same on every device.

    The sum, modulo 2⁶⁴, of the words mixed with their places: no order of summation changes it. It tells masks apart
    that were not made to deceive: it is no cryptographic hash.
    """
    _check(bits)
    if bits.device.type != "cuda":
        return _numpy_digest(bits.cpu().numpy())
    return triton_digest(bits)


def _check(bits: Tensor) -> None:
    if bits.dtype != torch.int32 or bits.ndim != 1:
        raise ValueError(f"a packed mask is torch.int32 [words], got {bits.dtype} {tuple(bits.shape)}")


def _numpy_digest(words: np.ndarray) -> int:
    total, length = 0, 1 << 16
    for start in range(0, len(words), length):
        part = words[start : start + length].view(np.uint32).astype(np.uint64)
        with np.errstate(over="ignore"):
            mixed = part + np.arange(start + 1, start + 1 + len(part), dtype=np.uint64) * np.uint64(STEP)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(FIRST)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(SECOND)
            total += int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))
    return total % (1 << 64)


@tuned([], warps=(4, 8))
@triton.jit(do_not_specialize=["words"])
def differing_bits(first, second, counts, words, COLUMNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(first + at, mask=at < words, other=0) ^ tl.load(second + at, mask=at < words, other=0)
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)  # pairs, then fours, then bytes hold the number of their ones
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    x = (x + (x >> 16)) & 0x3F
    tl.store(counts + tl.program_id(0), tl.sum(x.to(tl.int32), axis=0))


@tuned([], warps=(4, 8))
@triton.jit(do_not_specialize=["words"])
def mixed_words(
    bits, sums, words, STEP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, COLUMNS: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    x = tl.load(bits + at, mask=at < words, other=0).to(tl.uint32, bitcast=True).to(tl.uint64)
    x = x + (at + 1).to(tl.uint64) * STEP
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    x = tl.where(at < words, x ^ (x >> 31), 0)
    tl.store(sums + tl.program_id(0), tl.sum(x, axis=0).to(tl.int64, bitcast=True))


def triton_distance(first: Tensor, second: Tensor) -> int:
    """`distance` by the kernel."""
    grid = (max(1, triton.cdiv(len(first), TILE)),)
    counts = torch.zeros(grid, dtype=torch.int32, device=first.device)
    with torch.cuda.device_of(first):
        differing_bits[grid](first.contiguous(), second.contiguous(), counts, len(first), COLUMNS=TILE)
    return int(counts.sum(dtype=torch.int64))


def triton_digest(bits: Tensor) -> int:
    """`digest` by the kernel."""
    grid = (max(1, triton.cdiv(len(bits), TILE)),)
    sums = torch.zeros(grid, dtype=torch.int64, device=bits.device)
    with torch.cuda.device_of(bits):
        mixed_words[grid](bits.contiguous(), sums, len(bits), STEP=STEP, FIRST=FIRST, SECOND=SECOND, COLUMNS=TILE)
    return int(sums.sum()) % (1 << 64)
