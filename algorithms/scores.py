"""Baseline scores, from their papers: functions in the language that candidates are written in, and what is native."""

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

# |W_ij·W_ij|·(G_ij − min G) / (max G − min G), compared within an output row; G is the root of the summed squared
# gradients of the calibration loss, its extremes are those of the layer's matrix: the metric that Pruner-Zero found,
# Dong et al., "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models", arXiv 2406.02924.
# g_rms is G up to one factor, which the scaling removes. The floor, below any real range of gradients, gives a layer
# whose gradients are all equal the score 0 instead of NaN.
PRUNER_ZERO = Baseline(
    """\
def score(W, g_rms):
    m0 = g_rms - g_rms.amin()
    m1 = m0 / m0.amax().clamp(min=1e-30)
    return (W * W).abs() * m1
""",
    "row",
)

# W_ij² / [H⁻¹]_jj, compared within an output row: twice the error that is left when the weight goes and the others of
# its row make up for it as well as they can. Hassibi & Stork, "Second Order Derivatives for Network Pruning: Optimal
# Brain Surgeon", NIPS 5, 1993, with the damped Hessian of SparseGPT, arXiv 2301.00774; the others stay as they are.
OBS_DIAG = Baseline(
    """\
def score(W, h_inv_diag):
    return W.square() / h_inv_diag
""",
    "row",
)

# |W_ij|·G_ij, compared over the whole matrix; G is the root mean square of the gradients of the calibration loss. Its
# square is the expected squared change of the loss, to first order, when the weight goes: Molchanov et al., "Importance
# Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771.
TAYLOR = Baseline(
    """\
def score(W, g_rms):
    return W.abs() * g_rms
""",
    "matrix",
)

BASELINES: dict[str, Baseline] = {
    "magnitude": MAGNITUDE,
    "wanda": WANDA,
    "ria": RIA,
    "pruner-zero": PRUNER_ZERO,
    "obs-diag": OBS_DIAG,
    "taylor": TAYLOR,
}

# Scores that cannot be written in the language, since they choose the mask while they change the weights (see
# `algorithms.updates`), and their comparison groups. The name stands for the text in `Algorithm.score`.
NATIVE: dict[str, str] = {"sparsegpt": "row"}


def halves(text: str) -> tuple[str, str]:
    """What stands before and after the + of `METHOD[+ALLOCATION]`; METHOD is a name, or a file, in whose path there may
    be any character."""
    parts = text.split("+")
    for count in range(1, len(parts)):
        method = "+".join(parts[:count])
        if method.endswith(".py") or method.partition("/")[0] in BASELINES | NATIVE:
            return method, "+".join(parts[count:])
    return (text, "") if text.endswith(".py") else (parts[0], "+".join(parts[1:]))
