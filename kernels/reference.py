"""What the fast kernels must equal bit for bit: pruning masks from a stable ascending sort."""

from __future__ import annotations

import torch
from torch import Tensor


def row_mask(scores: Tensor, k: int) -> Tensor:
    """Bool [out, in], True = kept: the k lowest of each row of floating `scores` [out, in] are pruned.

    Of equal scores the one in the lowest column goes first; −0.0 equals 0.0.
    """
    order = (scores + 0.0).sort(dim=1, stable=True).indices  # −0.0 + 0.0 is 0.0, whatever the sort makes of signs
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :k], False)


def matrix_mask(scores: Tensor, k: int) -> Tensor:
    """As `row_mask`, but the k lowest of the whole matrix are pruned; ties by the lowest flat (row-major) index."""
    return row_mask(scores.reshape(1, -1), k).reshape(scores.shape)
