"""What a candidate may read: tables from which everything that speaks of statistics and summaries is made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistic:
    """One input of a score function beside W.

    type: "r", float32 [in], one number per input feature; or "m", float32 [out, in], one per weight.
    description: what it is, in a line, as prompts tell it. signed: whether it may be negative.
    """

    type: str
    description: str
    signed: bool = False

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of a layer with W [rows, columns]."""
        return (rows, columns) if self.type == "m" else (columns,)


# By name, in the order in which a canonical program names them.
# x_kurtosis is E[(x − μ)⁴] / σ⁴, 0 where σ = 0. h_inv_diag is the diagonal of the inverse of SparseGPT's damped Hessian
# H = 2/N·XXᵀ + 0.01·mean(diag)·I (arXiv 2301.00774), always above 0.
STATISTICS: dict[str, Statistic] = {
    "x_norm": Statistic("r", "root mean square of each input feature"),
    "x_mean": Statistic("r", "mean of each input feature", signed=True),
    "x_std": Statistic("r", "standard deviation of each input feature"),
    "x_absmean": Statistic("r", "mean absolute value of each input feature"),
    "x_kurtosis": Statistic("r", "kurtosis of each input feature, high where few tokens make it large"),
    "h_inv_diag": Statistic(
        "r", "diagonal of the inverse Hessian, high where the input feature is weak or others can stand in"
    ),
    "g_rms": Statistic("m", "root mean square of the calibration loss's gradient by each weight, over its mean"),
}

# What a search offers unless told otherwise: what one forward pass leaves.
DEFAULT_STATISTICS = ("x_norm", "x_mean", "x_std")

# What an allocation reads of each unit (a block, or a linear layer where the allocation is per layer), as
# `profile.NAME`, float64 [units]. A are the Wanda scores |W|·x_norm, w the weights. All but depth are fields of
# `algorithms.profiles.Profile`. None but those in SIGNED_SUMMARIES can be negative.
SUMMARIES: dict[str, str] = {
    "numel": "number of prunable weights",
    "depth": "0 for the first block … 1 for the last",
    "skewness": "skewness of |w|, high where outliers are",
    "kurtosis": "kurtosis of |w|",
    "weight_mean": "mean of |w|",
    "weight_std": "standard deviation of |w|",
    "score_mean": "mean of A",
    "score_std": "standard deviation of A",
    "outlier_share": "percentage of A above 5 times their mean",
    "input_mean": "mean of x_norm over the input features",
    "input_std": "standard deviation of x_norm over the input features",
}
SIGNED_SUMMARIES = frozenset({"skewness"})
