"""Baseline score functions, from their papers, written in the algorithm language that candidates are written in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """source: text of `score(W, …) -> [out, in]`, lower = pruned first. group: the comparison group of its paper."""

    source: str
    group: str


# |W_ij|, compared over the whole matrix.
MAGNITUDE = Baseline(
    """\
def score(W):
    return W.abs()
""",
    "matrix",
)

# |W_ij|·‖X_j‖₂, compared within an output row: Sun et al., "A Simple and Effective Pruning Approach for Large Language
# Models", arXiv 2306.11695. x_norm is ‖X_j‖₂ / √tokens: one factor for all scores, which changes no order.
WANDA = Baseline(
    """\
def score(W, x_norm):
    return W.abs() * x_norm
""",
    "row",
)

# (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|)·‖X_j‖₂^a with a = 0.5, compared over the whole matrix: Relative Importance
# and Activations, Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
# ICLR 2024. The 1e-12, below the rounding of any real sum, gives an all-zero row or column the score 0 instead of NaN.
RIA = Baseline(
    """\
def score(W, x_norm):
    m0 = W.abs()
    r0 = m0.sum(dim=0) + 1e-12
    c0 = m0.sum(dim=1, keepdim=True) + 1e-12
    m1 = m0 / r0 + m0 / c0
    return m1 * x_norm.sqrt()
""",
    "matrix",
)

BASELINES: dict[str, Baseline] = {"magnitude": MAGNITUDE, "wanda": WANDA, "ria": RIA}
