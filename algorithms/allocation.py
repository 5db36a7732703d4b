"""Allocations: which share of the budget each decoder block gets.

Every rule says how retention should vary over the blocks; `allocate` then makes the numel-weighted mean exact.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.statistics import BlockProfile

# No block keeps less than this share of the mean retention: a rule may starve a block, never empty it. Being relative,
# the floor can be met at every sparsity; a fixed one could not be at 99%. No block keeps more than all of itself.
RETENTION_FLOOR = 0.1
# SDSA's floor of the skewness, far below what weights show (half-normal: 0.995), so that its logarithm exists.
SKEWNESS_FLOOR = 0.05
# ATP's default: sparsity of the last block minus that of the first.
ATP_SPREAD = 0.16

# The parameters of each rule, with their least and greatest value.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "uniform": {},
    "sdsa": {"tau": (0.1, 100.0), "m": (0.0, 1.0), "depth": (0.0, 4.0)},
    "owl": {"lam": (0.0, 0.5)},
    "atp": {"beta": (-1.0, 1.0)},
}
# What a parameter is when it is not given. ATP's `beta` depends on the number L of blocks: ATP_SPREAD / (L − 1).
DEFAULTS: dict[str, dict[str, float]] = {
    "uniform": {},
    "sdsa": {"tau": 0.5, "m": 0.3, "depth": 0.0},
    "owl": {"lam": 0.08},
    "atp": {},
}


class AllocationError(ValueError):
    """An allocation, or a sparsity, that cannot be used; one line that says what would be right."""


def check_allocation(allocation: Allocation) -> None:
    """Raise AllocationError for an unknown name, an unknown parameter, or a value that is out of its range."""
    if allocation.name not in RANGES:
        nearest = _nearest(allocation.name, RANGES)
        raise AllocationError(
            f"unknown allocation {allocation.name!r}: expected {', '.join(RANGES)}; did you mean {nearest!r}?"
        )
    ranges = RANGES[allocation.name]
    for name, value in allocation.parameters.items():
        if name not in ranges:
            hint = f"did you mean {_nearest(name, ranges)!r}?" if ranges else "it has none"
            raise AllocationError(f"unknown parameter {name!r} of allocation {allocation.name!r}: {hint}")
        low, high = ranges[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            bounds = f"a number within {low:g}..{high:g}"
            raise AllocationError(
                f"parameter {name!r} of allocation {allocation.name!r} must be {bounds}, got {value!r}"
            )


def allocate(allocation: Allocation, profiles: Sequence[BlockProfile], sparsity: float) -> list[float]:
    """The sparsity of each block.

    profiles: one per decoder block of the model, in order. sparsity: the target, 0 ≤ sparsity < 1.
    Returns fractions within 0..1 − RETENTION_FLOOR·(1 − sparsity) whose mean, weighted with numel, is the target (to
    rounding). Where a rule asks a block to leave these bounds, the block stays at the bound and the others take over
    the difference.

    Rules, with R = 1 − sparsity, B blocks, b = 0 … B − 1:
    - `uniform`: r_b = R.
    - `sdsa`, our reconstruction of the Skew-aware Dynamic Sparsity Allocation of arXiv 2511.15390, whose details are
      not public: r_b ∝ ((1 − m) + m·B·p_b)·(1 + depth·(1 − b/(B − 1))), p = softmax(ln γ / tau), γ the skewness of |W|.
    - `owl` (Outlier Weighed Layerwise sparsity, arXiv 2310.05175): r_b = band_b − mean(band) + R,
      band = 2·lam·(z − min z)/(max z − min z), z the outlier share.
    - `atp` ("Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective", arXiv
      2502.14770): s_b = sparsity − beta·(B − 1)/2 + beta·b.
    Raises AllocationError as `check_allocation` does, and for a sparsity out of range or no blocks.
    """
    check_allocation(allocation)
    if not 0 <= sparsity < 1:
        raise AllocationError(f"the sparsity must be at least 0 and below 1, got {sparsity!r}")
    if not profiles:
        raise AllocationError("there is no block to allocate a sparsity to")
    rule = {"uniform": _uniform, "sdsa": _sdsa, "owl": _owl, "atp": _atp}[allocation.name]
    return rule(profiles, sparsity, **DEFAULTS[allocation.name] | allocation.parameters)


def _uniform(profiles: Sequence[BlockProfile], sparsity: float) -> list[float]:
    return [sparsity] * len(profiles)


def _sdsa(profiles: Sequence[BlockProfile], sparsity: float, tau: float, m: float, depth: float) -> list[float]:
    blocks = len(profiles)
    logits = [math.log(max(profile.skewness, SKEWNESS_FLOOR)) / tau for profile in profiles]
    exponentials = [math.exp(logit - max(logits)) for logit in logits]
    total = math.fsum(exponentials)
    depths = [1 + depth * (1 - b / max(blocks - 1, 1)) for b in range(blocks)]
    weights = [((1 - m) + m * blocks * e / total) * d for e, d in zip(exponentials, depths, strict=True)]
    # Proportions are differences of logarithms: "scale all by one factor" becomes "shift all by one constant".
    return _meet_budget([math.log(weight) for weight in weights], math.exp, profiles, sparsity)


def _owl(profiles: Sequence[BlockProfile], sparsity: float, lam: float) -> list[float]:
    shares = [profile.outlier_share for profile in profiles]
    low, high = min(shares), max(shares)
    band = [2 * lam * (share - low) / (high - low) if high > low else 0.0 for share in shares]
    return _meet_budget(band, float, profiles, sparsity)


def _atp(profiles: Sequence[BlockProfile], sparsity: float, beta: float | None = None) -> list[float]:
    beta = ATP_SPREAD / max(len(profiles) - 1, 1) if beta is None else beta
    return _meet_budget([-beta * b for b in range(len(profiles))], float, profiles, sparsity)


def _meet_budget(
    values: list[float], retention: Callable[[float], float], profiles: Sequence[BlockProfile], sparsity: float
) -> list[float]:
    """Sparsities 1 − clip(retention(value + shift)) for the one shift with which the budget is met.

    The retained number of weights never falls as the shift grows, so bisection finds it; a hundred halvings end at
    neighbouring floating-point numbers. retention: `float` or `math.exp`.
    """
    target = 1 - sparsity
    floor = RETENTION_FLOOR * target
    # Where retention is the floor and where it is 1: at the extreme shifts all blocks are at the floor, or kept whole.
    least, greatest = (math.log(floor), 0.0) if retention is math.exp else (floor, 1.0)
    budget = target * math.fsum(profile.numel for profile in profiles)

    def clipped(shift: float) -> list[float]:
        return [max(retention(min(value + shift, greatest)), floor) for value in values]

    low, high = least - max(values), greatest - min(values)
    for _ in range(100):
        middle = (low + high) / 2
        kept = math.fsum(profile.numel * r for profile, r in zip(profiles, clipped(middle), strict=True))
        low, high = (middle, high) if kept < budget else (low, middle)
    return [1 - r for r in clipped(high)]


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
