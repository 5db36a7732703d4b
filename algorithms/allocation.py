"""Allocations: which share of the budget each decoder block, or each linear layer, gets.

Every rule (`algorithms.rules`) says how sparsity should vary; what is here makes the numel-weighted mean exact.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import product
from operator import mul

import torch

from autoprune.algorithms.algorithm import Allocation, Sparsities
from autoprune.algorithms.cost import metered
from autoprune.algorithms.language import parse_allocation
from autoprune.algorithms.profiles import BlockProfile, Profile
from autoprune.algorithms.rules import DEFAULTS, RANGES, RULES, Rule, Units, sdsa_exponent

# No block keeps less than this share of the mean retention: a rule may starve a block, never empty it. Being relative,
# the floor can be met at every sparsity; a fixed one could not be at 99%. No block keeps more than all of itself.
RETENTION_FLOOR = 0.1
PER = ("block", "layer")
# Summaries that cost more than a look at the weights and are None in a profile unless they were asked for.
OPTIONAL = frozenset({"log_score_variance", "tail_exponent", "kurtosis", "score_std"})
TAYLOR = "taylor_mean"  # the summary that gradients leave
# The rule whose wishes are a program in the algorithm language (`Allocation.source`).
WRITTEN = "written"
# Share of the greatest wish that stands for a wish of nothing.
LEAST_WISH = 1e-9
# `nm_counts` counts in parts of 1/GRID of a weight in m, so that sums are exact and the same on every machine.
GRID = 1 << 20
# So many units, those whose rounding is least clear, `nm_counts` rounds in every way: 4096 ways.
BORDER = 12


class AllocationError(ValueError):
    """An allocation, or a sparsity, that cannot be used; one line that says what would be right."""


def check_allocation(allocation: Allocation) -> None:
    """Raise AllocationError for an unknown name, an unknown parameter, or a value that is out of its range;
    LanguageError for a written one that is not in the language."""
    name = allocation.name
    _check_name(name)
    if allocation.per not in PER:
        raise AllocationError(f"an allocation is per {' or '.join(PER)}, got {allocation.per!r}")
    if name == WRITTEN:
        parse_allocation(allocation.source)
        if allocation.parameters or allocation.values:
            raise AllocationError("a written allocation has no parameters and no values")
        return
    if allocation.source:
        raise AllocationError(f"only the allocation {WRITTEN!r} has a source, not {name!r}")
    ranges = RANGES[name]
    for parameter, value in allocation.parameters.items():
        if parameter not in ranges:
            nearest = difflib.get_close_matches(parameter, ranges, n=1, cutoff=0)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "it has none"
            raise AllocationError(f"unknown parameter {parameter!r} of allocation {name!r}: {hint}")
        _check_number(f"parameter {parameter!r} of allocation {name!r}", value, *ranges[parameter])
    if name != "explicit" and allocation.values:
        raise AllocationError(f"only the allocation 'explicit' has values, not {name!r}")
    if name == "explicit" and not allocation.values:
        raise AllocationError("the allocation 'explicit' needs its values: one sparsity per block or layer")
    for index, value in enumerate(allocation.values):
        _check_number(f"value {index} of allocation {name!r}", value, 0.0, 1.0)


def needs(allocation: Allocation) -> frozenset[str]:
    """The fields of a `Profile` that an allocation reads and that are None unless asked for: some of OPTIONAL, and
    TAYLOR.

    Raises AllocationError for an unknown name.
    """
    _check_name(allocation.name)
    if allocation.name == WRITTEN:
        return OPTIONAL & set(parse_allocation(allocation.source).reads)
    own = {TAYLOR} if allocation.parameters.get("taylor") else set()
    return own | OPTIONAL & {RULES[allocation.name].reads}


def by_layer(allocation: Allocation) -> bool:
    """Whether layers of one block may get different sparsities."""
    return allocation.per == "layer" or TAYLOR in needs(allocation)


def allocate(allocation: Allocation, profiles: Sequence[BlockProfile], sparsity: float) -> Sparsities:
    """The sparsity of each linear layer of each block.

    profiles: one per decoder block of the model, in order. sparsity: the target, 0 ≤ sparsity < 1.
    The units are the blocks, whose layers all get the block's sparsity, or (allocation.per = "layer") all layers of
    all blocks. Returns fractions within 0..1 − RETENTION_FLOOR·(1 − sparsity) whose mean over the units, weighted with
    numel, is the target (to rounding). Where a rule asks a unit to leave these bounds, the unit stays at the bound and
    the others take over the difference. Units that all wish for the same get exactly the target.

    Rules, with R = 1 − sparsity, units u of retention r_u = 1 − s_u, U of them, in block b_u of 0 … B − 1, and
    minmax(x) = (x − min x) / (max x − min x) over the units, 0 where all are equal:
    - `uniform`: r_u = R.
    - `sdsa`, our reconstruction of the Skew-aware Dynamic Sparsity Allocation of arXiv 2511.15390, whose details are
      not public: r_u ∝ (((1 − m) + m·U·p_u)·(1 + depth·(1 − b_u/(B − 1))))^e, p = softmax(ln γ / tau), γ the skewness
      of |W|, at most 1.75 times its median over the units, e = (sparsity/R)/1.5, which is 1 at 60%, and at most 2.
      With the parameter taylor, which is ours alone, the layers are the units: that of each, or of its block, is
      multiplied by t^(taylor·e), t the layer's mean of |w| times the root mean square of its gradient: layers, and
      with them blocks, keep more where weights mean more to the loss.
    - `owl` (Outlier Weighed Layerwise sparsity, arXiv 2310.05175): r_u = band_u − mean(band) + R,
      band = 2·lam·minmax(z), z the outlier share.
    - `dlp` (Dynamic Layerwise Pruning, arXiv 2505.23807): as `owl` with alpha for lam, z = 1 − I/ΣI, I the mean of the
      Wanda scores (the paper speaks of their median).
    - `dsa` ("Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models", NeurIPS 2024): as `owl`,
      z = 1 − minmax(v), v = asin(atan(Var ln A)), A the Wanda scores. asin ends at 1 and atan reaches π/2: its argument
      is clamped to 1, so that units whose variance is tan 1 = 1.557 or more are equals.
    - `alphapruning` (arXiv 2410.10912): s_u = η·(minmax(α)·2·epsilon + 1 − epsilon), α the tail exponent, one η.
    - `atp` ("Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective", arXiv
      2502.14770): s_u = sparsity − beta·(B − 1)/2 + beta·b_u; by default beta = ATP_SPREAD/(B − 1).
    - `explicit`: s_u = value_u plus one constant, with one value per unit.
    - `written`: r_u ∝ what `allocate(profile, sparsity)` of allocation.source returns (see `algorithms.language`).
    "mean" is weighted with numel, and the mean, the factor or the constant is that with which the budget is met after
    clipping; the originals of `owl`, `dlp`, `dsa` and `atp` take blocks for equals.
    Raises AllocationError as `check_allocation` does; for a sparsity out of range; where there are no blocks, or a
    block has no layers though layers are the units; where a summary that the rule reads is None or not finite; and for
    another number of explicit values than there are units.
    """
    check_allocation(allocation)
    if not 0 <= sparsity < 1:
        raise AllocationError(f"the sparsity must be at least 0 and below 1, got {sparsity!r}")
    if not profiles:
        raise AllocationError("there is no block to allocate a sparsity to")
    counts = [len(profile.layers) for profile in profiles]
    units: list[Profile] = list(profiles)
    depths = list(range(len(profiles)))
    if by_layer(allocation) and 0 in counts:
        raise AllocationError(f"the profile of block {counts.index(0)} has no layers: no allocation per layer")
    if allocation.per == "layer":
        units, depths = _layers(profiles)
    if allocation.name == WRITTEN:
        rule = Rule(None, scaled=True)
        wishes = _written(allocation, units, depths, sparsity)
    else:
        rule = RULES[allocation.name]
        described = Units(_summaries(allocation, units, depths), depths, len(profiles), sparsity)
        parameters = DEFAULTS[allocation.name] | allocation.parameters
        taylor = parameters.pop("taylor", 0.0)
        wishes = rule.wishes(described, **parameters)
        if taylor:
            units, wishes = _by_taylor(allocation, profiles, wishes, taylor * sdsa_exponent(sparsity))

    kept, floor = 1 - sparsity, RETENTION_FLOOR * (1 - sparsity)
    numels = [unit.numel for unit in units]
    if min(wishes) == max(wishes):
        shares = [sparsity] * len(units)
    elif rule.pruned:
        shares = _fill(wishes, rule.scaled, numels, sparsity, 0.0, 1 - floor)
    else:
        shares = [1 - r for r in _fill(wishes, rule.scaled, numels, kept, floor, 1.0)]
    if not by_layer(allocation):
        return [[share] * count for share, count in zip(shares, counts, strict=True)]
    return _nested(shares, counts)


def nm_counts(retentions: Sequence[Sequence[float]], numels: Sequence[Sequence[int]], m: int) -> list[list[int]]:
    """How many weights n of every m each unit keeps, for sparsities that n:m patterns are to approach.

    retentions: of each unit, 0..1, and numels: its number of weights, both [blocks][layers].
    Returns n with 1 ≤ n ≤ m. n is retention·m rounded up or down, after units below 1/m were raised to it at the
    expense of the others (one constant off all that are above); so that Σ numel·n/m comes near Σ numel·retention. By
    the largest remainder: units are rounded up in the order of their remainders, of equals the earlier block's first,
    until the budget is met. Then the BORDER units next to that end are rounded in the way, of all ways, that comes
    nearest to the budget; among equals the one with the least Σ numel·(n − retention·m)², then the one that rounds up
    earlier. So the budget is met as nearly as any rounding meets it where no more than BORDER units need rounding, and
    is missed by no more than half of a unit's numel/m otherwise. Retentions n/m, to 1/GRID of a weight in m, are met
    exactly.
    """
    shares = [share for block in retentions for share in block]
    sizes = [numel for block in numels for numel in block]
    budget = math.fsum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes)
    wished = _fill([share * m for share in shares], False, sizes, budget * m, 1.0, float(m))
    grid = [round(wish * GRID) for wish in wished]
    counts, remainders = [g // GRID for g in grid], [g % GRID for g in grid]
    # Of equal remainders the sort keeps the order.
    order = sorted((unit for unit in range(len(grid)) if remainders[unit]), key=lambda unit: -remainders[unit])
    missing = sum(sizes[unit] * remainders[unit] for unit in order)
    end, left = 0, missing
    while end < len(order) and sizes[order[end]] * GRID < 2 * left:  # rounding it up brings the budget nearer
        left -= sizes[order[end]] * GRID
        end += 1
    first = max(min(end - BORDER // 2, len(order) - BORDER), 0)
    border = order[first : first + BORDER]
    missing -= GRID * sum(sizes[unit] for unit in order[:first])

    def misses(way: tuple[int, ...]) -> tuple[int, int]:
        up = [unit for unit, chosen in zip(border, way, strict=True) if chosen]
        squares = sum(sizes[unit] * (GRID - 2 * remainders[unit]) for unit in up)  # (1 − f)² − f², f the remainder
        return abs(missing - GRID * sum(sizes[unit] for unit in up)), squares

    way = min(product((1, 0), repeat=len(border)), key=misses)
    for unit in order[:first] + [unit for unit, chosen in zip(border, way, strict=True) if chosen]:
        counts[unit] += 1
    return _nested(counts, [len(block) for block in numels])


def _summaries(allocation: Allocation, units: Sequence[Profile], depths: Sequence[int]) -> list[float]:
    """What the rule reads of each unit: a field of its profile, or its explicit value."""
    if allocation.name == "explicit":
        if len(allocation.values) != len(units):
            expected = f"expected {len(units)} values, one sparsity per {allocation.per}, got {len(allocation.values)}"
            raise AllocationError(f"the allocation 'explicit' does not fit the model: {expected}")
        return list(allocation.values)
    field = RULES[allocation.name].reads
    if field is None:
        return []
    return [_measured(allocation, field, unit, depth) for unit, depth in zip(units, depths, strict=True)]


def _layers(profiles: Sequence[BlockProfile]) -> tuple[list[Profile], list[int]]:
    """The layers of all blocks, in order, and the index of the block that holds each."""
    held = [(layer, index) for index, profile in enumerate(profiles) for layer in profile.layers]
    return [layer for layer, _ in held], [index for _, index in held]


def _by_taylor(
    allocation: Allocation, profiles: Sequence[BlockProfile], wishes: Sequence[float], exponent: float
) -> tuple[list[Profile], list[float]]:
    """All layers, and their wishes: those that they or their blocks have, times a power of their `taylor_mean`."""
    layers, blocks = _layers(profiles)
    own = wishes if allocation.per == "layer" else [wishes[block] for block in blocks]
    means = [_measured(allocation, TAYLOR, layer, block) for layer, block in zip(layers, blocks, strict=True)]
    # Of their greatest, so that the power of what may be very small is a number; a layer without any keeps least.
    greatest = max(means) or 1.0
    return layers, [w * max(mean / greatest, LEAST_WISH) ** exponent for w, mean in zip(own, means, strict=True)]


def _written(allocation: Allocation, units: Sequence[Profile], depths: Sequence[int], sparsity: float) -> list[float]:
    """What a candidate's own allocation wishes each unit to keep, held above 0 so that a factor can meet the budget."""
    program = parse_allocation(allocation.source)
    profile = {"depth": torch.tensor(depths, dtype=torch.float64) / max(*depths, 1)}
    for name in program.reads:
        if name != "depth":
            summaries = [_measured(allocation, name, unit, depth) for unit, depth in zip(units, depths, strict=True)]
            profile[name] = torch.tensor(summaries, dtype=torch.float64)
    with metered(program.source, "the number of units", len(units)):
        wishes = program(profile, sparsity)
    return wishes.clamp(min=LEAST_WISH * wishes.max()).tolist()


def _measured(allocation: Allocation, field: str, unit: Profile, depth: int) -> float:
    """A summary of a unit in block `depth`. Raises AllocationError where it is None or not finite."""
    summary = getattr(unit, field)
    if summary is None or not math.isfinite(summary):
        state = "was not measured, or does not exist," if summary is None else f"is {summary}"
        raise AllocationError(f"the allocation {allocation.name!r} reads {field}, which {state} in block {depth}")
    return summary


def _fill(
    wishes: Sequence[float], scaled: bool, numels: Sequence[int], mean: float, low: float, high: float
) -> list[float]:
    """clip(wish + t), or clip(wish·t) where `scaled`, to low..high, for the one t with which the weighted mean is met.

    The mean, weighted with numel, never falls as t grows, and is linear in t between the edges at which a unit reaches
    a bound. A mean beyond a bound gives the bound.
    """
    if not low < mean < high:
        return [min(max(mean, low), high)] * len(wishes)
    total = mean * sum(numels)

    def clipped(t: float) -> list[float]:
        return [min(max(wish * t if scaled else wish + t, low), high) for wish in wishes]

    def filled(t: float) -> float:
        return math.fsum(map(mul, numels, clipped(t)))

    edges = sorted({bound / wish if scaled else bound - wish for wish in wishes for bound in (low, high)})
    place = bisect_left(edges, total, 1, len(edges) - 1, key=filled)  # all are at a bound at the first and the last
    start, end = edges[place - 1], edges[place]
    less, more = filled(start), filled(end)
    return clipped(start + (end - start) * (total - less) / (more - less) if more > less else end)


def _check_name(name: str) -> None:
    if name not in RULES and name != WRITTEN:
        nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0)[0]
        raise AllocationError(f"unknown allocation {name!r}: expected {', '.join(RULES)}; did you mean {nearest!r}?")


def _check_number(what: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise AllocationError(f"{what} must be a number within {low:g}..{high:g}, got {value!r}")


def _nested(flat: Sequence, counts: Sequence[int]) -> list[list]:
    """Consecutive parts of these lengths."""
    parts, start = [], 0
    for count in counts:
        parts.append(list(flat[start : start + count]))
        start += count
    return parts
