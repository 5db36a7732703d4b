"""Triton: masks as bits, 32 weights to an int32, the first in the lowest bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autoprune.kernels.keys import WORD, tuned

TILE = 8192  # weights per program


@tuned([], warps=(4, 8))
@triton.jit(do_not_specialize=["numel"])
def pack_words(kept, mask, numel, COLUMNS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * COLUMNS
    at = start + tl.arange(0, COLUMNS)
    single = tl.reshape((tl.load(kept + at, mask=at < numel, other=0) != 0).to(tl.int32), (COLUMNS // WORD, WORD))
    words = tl.sum(single << tl.arange(0, WORD)[None, :], axis=1)
    place = start // WORD + tl.arange(0, COLUMNS // WORD)
    tl.store(mask + place, words, mask=place * WORD < numel)


@tuned([], warps=(4, 8))
@triton.jit(do_not_specialize=["numel"])
def unpack_words(words, mask, numel, COLUMNS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    word = tl.load(words + at // WORD, mask=at < numel, other=0)
    tl.store(mask + at, ((word >> (at % WORD).to(tl.int32)) & 1).to(tl.int8), mask=at < numel)


def pack(mask: Tensor) -> Tensor:
    """int32 [ceil(numel / 32)] of a bool mask of any shape; the last word is padded with zeros."""
    numel = mask.numel()
    words = torch.empty(triton.cdiv(numel, WORD.value), dtype=torch.int32, device=mask.device)
    if numel:
        pack_words[(triton.cdiv(numel, TILE),)](mask.contiguous().view(torch.int8), words, numel, COLUMNS=TILE)
    return words


def unpack(words: Tensor, numel: int) -> Tensor:
    """bool [numel] of what `pack` made."""
    mask = torch.empty(numel, dtype=torch.bool, device=words.device)
    if numel:
        unpack_words[(triton.cdiv(numel, TILE),)](words.contiguous(), mask.view(torch.int8), numel, COLUMNS=TILE)
    return mask
