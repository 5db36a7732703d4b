"""The rules of allocation: how the blocks of a model, or its linear layers, are to differ in what they keep.

A rule only wishes; `algorithms.allocation.allocate` clips the wishes and meets the budget. Where an original averages
its blocks without weights, or clips after the budget was met, ours is weighted with numel and exact after clipping.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# SDSA's floor of the skewness, far below what weights show (half-normal: 0.995), so that its logarithm exists.
SKEWNESS_FLOOR = 0.05
# No skewness counts as more than so many times the median of all units. A single heavy weight can make that of a whole
# block: in Qwen2.5-Coder-1.5B one projection takes block 15 to 20, where others have 1.6 to 3.8, and the block is not
# one that needs more. Chosen on C4 at 60%, at the defaults below: SmolLM2-135M has perplexity 143.9 without a cap,
# 142.8 with 1.75 and 145.5 with 1.5; Qwen2.5-Coder-1.5B has 59.8 without, 55.0 with 2, 53.7 with 1.75, 53.6 with 1.5.
SKEWNESS_CAP = 1.75
# The odds of pruning, S/(1 − S), at which SDSA's parameters mean what they say: those of 60%. Its exponent was
# measured up to 70%, where it is 1.6, and grows to no more than that of 75%.
SDSA_ODDS, SDSA_EXPONENT = 1.5, 2.0
# ATP's default: sparsity of the last block minus that of the first.
ATP_SPREAD = 0.16

# The parameters of each rule, with their least and greatest value.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "uniform": {},
    "sdsa": {"tau": (0.1, 100.0), "m": (0.0, 1.0), "depth": (0.0, 4.0), "taylor": (0.0, 2.0)},
    "owl": {"lam": (0.0, 0.5)},
    "dlp": {"alpha": (0.0, 0.5)},
    "dsa": {"lam": (0.0, 0.5)},
    "alphapruning": {"epsilon": (0.0, 0.9)},
    "atp": {"beta": (-1.0, 1.0)},
    "explicit": {},
}
# What a parameter is when it is not given. SDSA's were chosen on text that no figure is reported on (C4, at 60%), and
# before it had a cap: its depth factor takes SmolLM2-135M from 26% to 30% below the perplexity of uniform sparsity, and
# Qwen2.5-Coder-1.5B from 22% to 47%. So was its exponent (`_sdsa`): it is better than none on both models at 50%, at
# 70% and for 2:4. Its parameter `taylor` is none unless it is given, since it takes gradients. ATP's `beta` depends on
# the number of blocks: see `atp_beta`.
DEFAULTS: dict[str, dict[str, float]] = {
    "uniform": {},
    "sdsa": {"tau": 1.0, "m": 0.6, "depth": 0.5},
    "owl": {"lam": 0.08},
    "dlp": {"alpha": 0.15},
    "dsa": {"lam": 0.08},
    "alphapruning": {"epsilon": 0.3},
    "atp": {},
    "explicit": {},
}


def written_out(name: str, parameters: dict[str, float]) -> dict[str, float]:
    """All parameters of a rule, its defaults included, so that equal allocations have equal texts; SDSA's `taylor` only
    where it is not 0."""
    return {key: value for key, value in (DEFAULTS.get(name, {}) | parameters).items() if value or key != "taylor"}


@dataclass(frozen=True)
class Units:
    """What sparsities are sought for: the B blocks of a model, or all linear layers of all blocks, in order.

    summaries: one number per unit, that which the rule reads (`Rule.reads`), or for `explicit` the unit's value; empty
    where the rule reads none. depths: the index 0 … B − 1 of the block that is the unit or that holds it. blocks: B.
    sparsity: the target, 0 ≤ sparsity < 1.
    """

    summaries: Sequence[float]
    depths: Sequence[int]
    blocks: int
    sparsity: float


@dataclass(frozen=True)
class Rule:
    """What a unit wishes for, and what the wish means.

    wishes: from the units and the rule's parameters, one number per unit. reads: the field of a `Profile` that
    becomes `Units.summaries`. pruned: wishes speak of sparsity, else of retention. scaled: all wishes, which are then
    positive, are multiplied by one factor to meet the budget; else one constant is added to all.
    """

    wishes: Callable[..., list[float]]
    reads: str | None = None
    pruned: bool = False
    scaled: bool = False


def atp_beta(spread: float, blocks: int) -> float:
    """ATP's beta with which the last of the blocks is sparser than the first by `spread`."""
    return spread / max(blocks - 1, 1)


def _uniform(units: Units) -> list[float]:
    return [0.0] * len(units.depths)


def _explicit(units: Units) -> list[float]:
    return list(units.summaries)


def _sdsa(units: Units, tau: float, m: float, depth: float) -> list[float]:
    """(((1 − m) + m·U·p)·(1 + depth·(1 − b/(B − 1))))^e, e as `sdsa_exponent`;
    p is the softmax of ln γ / tau, γ the skewness between SKEWNESS_FLOOR and SKEWNESS_CAP medians.

    With s = S·(1 + δ) instead of r = R·(1 + δ), a block that stands out would deviate from the mean by an equal share
    of what is pruned, not of what is kept: by δ·S/R of the retention. So the spread grows with the odds, and is none
    where nothing is pruned.
    """
    skews = [max(skewness, SKEWNESS_FLOOR) for skewness in units.summaries]
    most = SKEWNESS_CAP * statistics.median(skews)
    logits = [math.log(min(skewness, most)) / tau for skewness in skews]
    greatest = max(logits)
    exponentials = [math.exp(logit - greatest) for logit in logits]
    mean = math.fsum(exponentials) / len(exponentials)
    last = max(units.blocks - 1, 1)
    exponent = sdsa_exponent(units.sparsity)
    return [
        (((1 - m) + m * e / mean) * (1 + depth * (1 - b / last))) ** exponent
        for e, b in zip(exponentials, units.depths, strict=True)
    ]


def sdsa_exponent(sparsity: float) -> float:
    """The odds of pruning over SDSA_ODDS, or SDSA_EXPONENT: with it SDSA's wishes lie further apart the more is
    pruned (see `_sdsa`)."""
    return min(sparsity / (1 - sparsity) / SDSA_ODDS, SDSA_EXPONENT)


def _owl(units: Units, lam: float) -> list[float]:
    return _band(units.summaries, lam)


def _dlp(units: Units, alpha: float) -> list[float]:
    total = math.fsum(units.summaries)
    return _band([1 - mean / total if total else 0.0 for mean in units.summaries], alpha)


def _dsa(units: Units, lam: float) -> list[float]:
    values = [math.asin(min(math.atan(variance), 1.0)) for variance in units.summaries]
    return _band([1 - share for share in _minmax(values)], lam)


def _alphapruning(units: Units, epsilon: float) -> list[float]:
    return [share * 2 * epsilon + 1 - epsilon for share in _minmax(units.summaries)]


def _atp(units: Units, beta: float | None = None) -> list[float]:
    beta = atp_beta(ATP_SPREAD, units.blocks) if beta is None else beta
    return [beta * b for b in units.depths]


def _band(values: Sequence[float], half: float) -> list[float]:
    """The values stretched over a band that is 2·half wide."""
    return [2 * half * share for share in _minmax(values)]


def _minmax(values: Sequence[float]) -> list[float]:
    """(value − min) / (max − min); 0 where all are equal."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


RULES: dict[str, Rule] = {
    "uniform": Rule(_uniform),
    "sdsa": Rule(_sdsa, reads="skewness", scaled=True),
    "owl": Rule(_owl, reads="outlier_share"),
    "dlp": Rule(_dlp, reads="score_mean"),
    "dsa": Rule(_dsa, reads="log_score_variance"),
    "alphapruning": Rule(_alphapruning, reads="tail_exponent", pruned=True, scaled=True),
    "atp": Rule(_atp, pruned=True),
    "explicit": Rule(_explicit, pruned=True),
}

# By rule, how often what it yields has changed: figures that were measured before do not count as its own any more.
REVISIONS = {"sdsa": 1}
