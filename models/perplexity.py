"""`ppl_token@L`: token mean of the negative log-likelihood in fp32 over non-overlapping windows of L tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reference:
    """The dense model's way to its logits over the same tokens: hidden states that leave its last block, and its head.

    Keeping logits instead would take vocabulary / hidden size times the memory.
    """

    hidden: Tensor
    logits: Logits


def perplexity(nll: float) -> float:
    """exp(nll), infinite where that is too large for a number."""
    return math.inf if nll >= 700 else math.exp(nll)


def standard_error(values: list[float]) -> float | None:
    """Of the mean over windows; None for a single one."""
    if len(values) < 2:
        return None
    return float(torch.tensor(values, dtype=torch.float64).std() / math.sqrt(len(values)))


def score_windows(
    hidden: Tensor, tokens: Tensor, logits: Logits, reference: Reference | None = None
) -> tuple[list[float], list[float]]:
    """Mean NLL per scored token of each window, and mean KL(reference ‖ model) per scored token, both in nats.

    hidden: [windows, L, D] as it leaves the last block; tokens: int64 [windows, L]; logits: from such states to
    [windows, L, vocabulary]. A window's first token is not scored, so each window has L − 1 scored tokens. Logits are
    made one window at a time: they are the largest tensor. Without a reference there is no KL: an empty list. Where one
    of the two models pads its vocabulary further, the KL is over what they share.
    """
    nlls, divergences = [], []
    for window, ids in enumerate(tokens):
        predicted = logits(hidden[window : window + 1])[0, :-1].float()
        nlls.append(nn.functional.cross_entropy(predicted, ids[1:].to(predicted.device)).item())
        if reference is not None:
            dense = reference.logits(reference.hidden[window : window + 1])[0, :-1].float()
            shared = min(dense.shape[-1], predicted.shape[-1])
            log_p, log_q = torch.log_softmax(dense[:, :shared], -1), torch.log_softmax(predicted[:, :shared], -1)
            divergence = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            divergences.append(divergence.item() / len(dense))
    return nlls, divergences
