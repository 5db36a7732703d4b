"""What the selecting kernels read and write: scores as integers in the order of their values, weights, masks.

A float's bits, with sign and magnitude made two's complement, are in the order of the floats, and −0.0 is 0.0. So one
kernel serves every dtype, and a threshold is found exactly, by halving integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels import cpu
from autoprune.kernels.cpu import BITS, bits_of, nan_error

WIDENED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # how a kernel makes fp32 of a weight's bits
# Beyond every key. Constants that kernels see are constexpr.
BEYOND = tl.constexpr(0x7FFFFFFF)
WORD = tl.constexpr(cpu.WORD)
NUMBERS = 64  # of a tile, in each thread, at most


@dataclass(frozen=True)
class Scores:
    """Scores [rows, width], as floats of 16 or 32 bits, or as a weight and the norms of its columns.

    values: scores, or the weight; norms: fp32 [width], or None: then the score is |W_ij|·norm_j, in fp32.
    """

    values: Tensor
    norms: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def ceiling(self) -> int:
        """The key of infinity."""
        return bits_of(math.inf, torch.float32 if self.norms is not None else self.values.dtype)

    def arguments(self) -> dict:
        """What `load_keys` is given, for a kernel's parameters of these names."""
        values = adjacent(self.values)
        integers = values.view(BITS[values.dtype])
        narrow = self.norms is None and values.element_size() == 2
        return {
            "values": integers,
            "norms": integers if self.norms is None else self.norms.contiguous(),
            "stride": values.stride(0),
            "FUSED": self.norms is not None,
            "WIDENED": WIDENED[values.dtype],
            "MAGNITUDE": 0x7FFF if narrow else 0x7FFFFFFF,
            "CEILING": self.ceiling,
        }


def adjacent(matrix: Tensor) -> Tensor:
    """The matrix with columns side by side in memory: itself where they are."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def keys_of(scores: Tensor) -> Tensor:
    """int32 keys of floating scores of 16 or 32 bits, of any shape, as the kernels make them."""
    bits = scores.contiguous().view(BITS[scores.dtype]).int()
    magnitude = bits & (0x7FFF if scores.element_size() == 2 else 0x7FFFFFFF)
    return torch.where(bits < 0, -magnitude, magnitude)


def tuned(key: Sequence[str], warps: Sequence[int] = (4, 8, 16, 32)) -> Callable:
    """Decorator of a kernel that may have any of these numbers of warps: the fastest is measured when it first meets
    values of the arguments in `key`, and kept in Triton's cache on disk, a small JSON file for each of them, kernel and
    kind of device. Only for kernels of whole numbers: sums of floats depend on the number of warps.

    What a kernel writes is put back after each measurement, since it may be what it reads.
    """

    def decorate(kernel):
        choices = warps[:1] if triton.knobs.runtime.interpret else warps
        written = [name for name in ("pruned", "mask", "counts") if name in kernel.arg_names]
        configs = [triton.Config({}, num_warps=count) for count in choices]
        return triton.autotune(
            configs,
            key=list(key),
            restore_value=written,
            cache_results=True,
            prune_configs_by={"early_config_prune": _with_room},
        )(kernel)

    return decorate


def _with_room(configs: list, _: dict, **sizes: int) -> list:
    """Those with which a tile fits into registers: others spill, and take minutes to compile."""
    tile = sizes.get("COLUMNS", 1) * sizes.get("ROWS", 1) * sizes.get("GROUPS", 1) * sizes.get("PADDED", 1)
    return [config for config in configs if tile <= NUMBERS * 32 * config.num_warps] or configs[-1:]


@triton.jit
def load_keys(
    values,
    norms,
    base,
    columns,
    width,
    inside,
    FUSED: tl.constexpr,
    WIDENED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    CEILING: tl.constexpr,
):
    """Keys int32, and which of them are NaN's, at the offsets base + columns; BEYOND where not `inside`."""
    bits = tl.load(values + base + columns, mask=inside, other=0)
    if FUSED:
        product = tl.abs(as_float(bits, WIDENED)) * tl.load(norms + tl.minimum(columns, width - 1))
        bits = product.to(tl.int32, bitcast=True)
    bits = bits.to(tl.int32)
    magnitude = bits & MAGNITUDE
    keys = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(inside, keys, BEYOND), (magnitude > CEILING) & inside


@triton.jit
def report_nan(flag, nan):
    """Set the flag, which `refuse_nan` reads, where one of a tile [rows, columns] is."""
    if tl.max(tl.max(nan.to(tl.int32), axis=1), axis=0) > 0:
        tl.store(flag, 1)


@triton.jit
def as_float(bits, WIDENED: tl.constexpr):
    """fp32 of the bits of a weight; arithmetic in 16 bits is not the same everywhere."""
    if WIDENED == 0:
        return bits.to(tl.float32, bitcast=True)
    elif WIDENED == 1:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def write_pruned(keep, rows, columns, inside, weight, pruned, weight_stride, pruned_stride):
    bits = tl.load(weight + rows * weight_stride + columns, mask=inside, other=0)
    bits = tl.where(keep, bits, tl.zeros_like(bits))
    tl.debug_barrier()  # where it overwrites what scores are made of, no thread is still to read it
    tl.store(pruned + rows * pruned_stride + columns, bits, mask=inside)


@triton.jit
def write(
    keep,
    rows,
    present,
    start,
    width,
    weight,
    pruned,
    weight_stride,
    pruned_stride,
    mask,
    PRUNES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write a tile [ROWS, COLUMNS] of a mask, packed or as bytes, and of the weight with zeros where it is not kept.

    rows: int64 [ROWS, 1]; present, of their shape: which of them there are; start: the tile's first column.
    """
    columns = start + tl.arange(0, COLUMNS)[None, :]
    inside = present & (columns < width)
    if PRUNES:
        write_pruned(keep, rows, columns, inside, weight, pruned, weight_stride, pruned_stride)
    if PACKED:  # the width is a multiple of WORD: a word is inside as a whole, or not at all
        single = tl.reshape((keep & inside).to(tl.int32), (ROWS, COLUMNS // WORD, WORD))
        words = tl.sum(single << tl.arange(0, WORD)[None, None, :], axis=2)
        place = start // WORD + tl.arange(0, COLUMNS // WORD)[None, :]
        tl.store(mask + rows * (width // WORD) + place, words, mask=present & (place < width // WORD))
    else:
        tl.store(mask + rows * width + columns, keep.to(tl.int8), mask=inside)


class Target:
    """Where a selection is written: the mask [rows, width], and the pruned weight where there is one.

    weight, pruned: both None, or the weight [rows, width] and a tensor like it, which may be the weight itself.
    mask: bool [rows, width]; where a weight is pruned and words do not straddle rows, bits as `masks.pack` makes them,
    unless `packed` forbids it.
    """

    def __init__(
        self, like: Tensor, weight: Tensor | None = None, pruned: Tensor | None = None, packed: bool = True
    ) -> None:
        self.shape, self.weight, self.pruned = like.shape, weight, pruned
        self.packed = packed and weight is not None and like.shape[1] % WORD.value == 0
        if self.packed:
            words = like.numel() // WORD.value
            self.mask = torch.empty(words, dtype=torch.int32, device=like.device)
        else:
            self.mask = torch.empty(self.shape, dtype=torch.bool, device=like.device)

    def arguments(self) -> dict:
        """What `write` is given, for a kernel's parameters of these names."""
        if self.weight is None:
            bytes_ = self.mask.view(torch.int8)
            views = {"weight": bytes_, "pruned": bytes_, "weight_stride": 0, "pruned_stride": 0}
        else:
            integers = BITS[self.weight.dtype]
            weight, pruned = adjacent(self.weight).view(integers), self.pruned.view(integers)
            views = {"weight": weight, "pruned": pruned}
            views |= {"weight_stride": weight.stride(0), "pruned_stride": pruned.stride(0)}
        return views | {
            "mask": self.mask if self.packed else self.mask.view(torch.int8),
            "PRUNES": self.weight is not None,
            "PACKED": self.packed,
        }


def refuse_nan(flag: Tensor) -> None:
    """flag: int32, set by a kernel that met NaN. Waits for the device."""
    if int(flag):
        raise nan_error()
