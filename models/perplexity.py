"""`ppl_token@L`: token mean of the negative log-likelihood in fp32 over non-overlapping windows of L tokens."""

from __future__ import annotations

import math

import torch
from torch import nn


def perplexity(nll: float) -> float:
    """exp(nll), infinite where that is too large for a number."""
    return math.exp(nll) if nll < 700 else math.inf


def window_nlls(hidden: torch.Tensor, tokens: torch.Tensor, norm: nn.Module, head: nn.Module) -> list[float]:
    """Mean NLL per scored token, in nats, of each window.

    hidden: [windows, L, D] as it leaves the last block; tokens: int64 [windows, L]. A window's first token is not
    scored, so each window has L − 1 scored tokens. Logits are made one window at a time: they are the largest tensor.
    """
    nlls = []
    for states, ids in zip(hidden, tokens, strict=True):
        logits = head(norm(states[:-1])).float()
        nlls.append(nn.functional.cross_entropy(logits, ids[1:].to(logits.device)).item())
    return nlls
