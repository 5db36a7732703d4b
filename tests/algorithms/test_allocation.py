"""Allocations: the budget is met exactly, bounds hold, the rules do what their formulas say; counts of n:m patterns."""

import math
import statistics
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.allocation import (
    BORDER,
    DEFAULTS,
    GRID,
    RANGES,
    RETENTION_FLOOR,
    AllocationError,
    allocate,
    by_layer,
    check_allocation,
    needs,
    nm_counts,
)
from autoprune.algorithms.profiles import BlockProfile, Profile, with_taylor
from autoprune.algorithms.rules import RULES

SUMMARIES = {
    "skewness": st.floats(-1, 1e4),
    "outlier_share": st.floats(0, 100),
    "score_mean": st.floats(0, 1e3),
    "log_score_variance": st.floats(0, 50),
    "tail_exponent": st.floats(1, 40),
    "taylor_mean": st.floats(0, 1e3),
}
LAYERS = st.lists(st.builds(Profile, st.integers(1, 10**10), **SUMMARIES), min_size=1, max_size=5)
SPARSITIES = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.01, 0.5, 0.6, 0.99]))


@st.composite
def models(draw):
    """Profiles of 1 to 20 blocks; what a block is need not follow from what its layers are, but for its size."""
    blocks = []
    for layers in draw(st.lists(LAYERS, min_size=1, max_size=20)):
        summaries = {name: draw(values) for name, values in SUMMARIES.items()}
        blocks.append(BlockProfile(sum(layer.numel for layer in layers), **summaries, layers=tuple(layers)))
    return blocks


def units_of(profiles, per):
    return profiles if per == "block" else [layer for profile in profiles for layer in profile.layers]


def flat(result, per):
    """One sparsity per unit."""
    return [block[0] for block in result] if per == "block" else [value for block in result for value in block]


def weighted_mean(units, values) -> float:
    total = math.fsum(unit.numel for unit in units)
    return math.fsum(unit.numel * value for unit, value in zip(units, values, strict=True)) / total


@settings(max_examples=150, deadline=None)
@given(st.data(), models(), st.sampled_from(["block", "layer"]), st.sampled_from(list(RANGES)), SPARSITIES)
def test_budget_is_exact_and_bounds_hold(data, profiles, per, name, sparsity):
    units = units_of(profiles, per)
    chosen = data.draw(st.sets(st.sampled_from(list(RANGES[name])))) if RANGES[name] else ()
    parameters = {parameter: data.draw(st.floats(*RANGES[name][parameter])) for parameter in sorted(chosen)}
    size = len(units) if name == "explicit" else 0
    values = tuple(data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)))
    allocation = Allocation(name, parameters, per, values)
    result = allocate(allocation, profiles, sparsity)
    assert [len(block) for block in result] == [len(profile.layers) for profile in profiles]
    apart = by_layer(allocation)
    if apart == (per == "layer"):
        assert weighted_mean(units, flat(result, per)) == pytest.approx(sparsity, abs=1e-12)
    layers = units_of(profiles, "layer")
    assert weighted_mean(layers, flat(result, "layer")) == pytest.approx(sparsity, abs=1e-12)
    floor = RETENTION_FLOOR * (1 - sparsity)
    assert all(-1e-15 <= s <= 1 - floor + 1e-15 for block in result for s in block)
    if not apart:
        assert all(len(set(block)) == 1 for block in result)
    assert result == allocate(allocation, profiles, sparsity)


# Of two units, the one with the greater summary keeps no less (+1) or no more (−1).
SENSE = {"sdsa": 1, "owl": 1, "dlp": -1, "dsa": -1, "alphapruning": -1}


@settings(max_examples=100, deadline=None)
@given(st.data(), models(), st.sampled_from(["block", "layer"]), st.sampled_from(list(SENSE)), SPARSITIES)
def test_rules_follow_their_summary(data, profiles, per, name, sparsity):
    parameters = {p: data.draw(st.floats(*bounds)) for p, bounds in RANGES[name].items() if p != "depth"}
    if name == "sdsa":
        parameters |= {"depth": 0.0, "taylor": 0.0}
    result = flat(allocate(Allocation(name, parameters, per), profiles, sparsity), per)
    summaries = [SENSE[name] * getattr(unit, RULES[name].reads) for unit in units_of(profiles, per)]
    ordered = [s for _, s in sorted(zip(summaries, result, strict=True))]
    assert all(after <= before + 1e-12 for before, after in zip(ordered, ordered[1:], strict=False))


@pytest.mark.parametrize("per", ["block", "layer"])
@pytest.mark.parametrize("name", ["uniform", *SENSE])
def test_equal_units_get_exactly_the_target(name, per):
    layers = [Profile(numel, 1.7, 2.0, 0.3, 1.1, 4.0) for numel in (7, 300, 12)]
    profiles = [BlockProfile(319, 1.7, 2.0, 0.3, 1.1, 4.0, layers=tuple(layers))] * 5
    parameters = {"depth": 0.0} if name == "sdsa" else {}  # by default it knows where a block is
    assert allocate(Allocation(name, parameters, per), profiles, 0.6) == [[0.6] * 3] * 5


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.6, 0.99])
def test_a_single_block_gets_exactly_the_target(name, sparsity):
    middle = {parameter: (low + high) / 2 for parameter, (low, high) in RANGES[name].items()}
    profile = BlockProfile(7, 1.5, 3.0, 0.1, 1.0, 3.0, layers=(Profile(7, 1.0, 1.0, 1.0, taylor_mean=0.2),))
    values = (0.3,) if name == "explicit" else ()
    for parameters in ({}, middle):
        assert allocate(Allocation(name, parameters, values=values), [profile], sparsity) == [[sparsity]]


def redistributed(raw, scaled, numels, mean, low, high):
    """Oracle: fill the budget, pin the units beyond a bound at it (the side with the larger excess first), repeat."""
    pinned = {}
    while True:
        free = [u for u in range(len(raw)) if u not in pinned]
        left = mean * sum(numels) - sum(numels[u] * amount for u, amount in pinned.items())
        numel = sum(numels[u] for u in free)
        mass = sum(numels[u] * raw[u] for u in free)
        filled = {u: raw[u] * left / mass if scaled else raw[u] + (left - mass) / numel for u in free}
        over = sum(numels[u] * (filled[u] - high) for u in free if filled[u] > high)
        under = sum(numels[u] * (low - filled[u]) for u in free if filled[u] < low)
        if max(over, under) < 1e-9:
            return [(pinned | filled)[u] for u in range(len(raw))]
        pinned |= (
            {u: high for u in free if filled[u] > high} if over >= under else {u: low for u in free if filled[u] < low}
        )


def kept(raw, scaled, units, sparsity):
    """Sparsities of units whose retention is to be proportional to `raw`, or to differ from it by a constant."""
    low = RETENTION_FLOOR * (1 - sparsity)
    return [1 - r for r in redistributed(raw, scaled, [unit.numel for unit in units], 1 - sparsity, low, 1.0)]


def pruned(raw, scaled, units, sparsity):
    """As `kept`, of sparsity."""
    high = 1 - RETENTION_FLOOR * (1 - sparsity)
    return redistributed(raw, scaled, [unit.numel for unit in units], sparsity, 0.0, high)


def model_of(*blocks):
    """Blocks of layers of (numel, skewness, outlier share, score mean, Var ln A, α); a block is their plain mean."""
    profiles = []
    for layers in blocks:
        means = [sum(column) / len(layers) for column in list(zip(*layers, strict=True))[1:]]
        profile = BlockProfile(sum(layer[0] for layer in layers), *means)
        profiles.append(replace(profile, layers=tuple(Profile(*layer) for layer in layers)))
    return profiles


MODEL = model_of(
    [(60, 2.9, 4.0, 0.2, 0.4, 2.1), (40, 1.0, 7.0, 0.9, 1.9, 3.3)],
    [(300, 1.2, 9.0, 1.4, 0.9, 8.0)],
    [(50, 20.0, 0.5, 0.1, 1.2, 2.4), (150, 30.0, 0.1, 0.3, 0.1, 2.0), (50, 0.01, 3.0, 2.0, 0.8, 5.5)],
    [(80, 0.01, 2.0, 1.1, 1.3, 3.9)],
)
DEPTHS = {"block": [0, 1, 2, 3], "layer": [0, 0, 1, 2, 2, 2, 3]}
CLIPPING = pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.9, 0.97])
PER = pytest.mark.parametrize("per", ["block", "layer"])


def minmax(values):
    return [(value - min(values)) / (max(values) - min(values)) for value in values]


def band(z, half, units, sparsity):
    values = [2 * half * share for share in minmax(z)]
    return [value - weighted_mean(units, values) + 1 - sparsity for value in values]


@PER
@CLIPPING
@pytest.mark.parametrize("tau, m, depth", [(0.5, 0.3, 0.0), (1.0, 0.6, 0.5), (0.25, 1.0, 0.0), (0.5, 1.0, 4.0)])
def test_sdsa_equals_its_formula(sparsity, tau, m, depth, per):
    units = units_of(MODEL, per)
    skews = [max(unit.skewness, 0.05) for unit in units]
    powers = [min(skew, 1.75 * statistics.median(skews)) ** (1 / tau) for skew in skews]
    mixed = [(1 - m) + m * len(units) * power / sum(powers) for power in powers]
    exponent = min(2, sparsity / (1 - sparsity) / 1.5)
    raw = [(share * (1 + depth * (1 - b / 3))) ** exponent for share, b in zip(mixed, DEPTHS[per], strict=True)]
    result = allocate(Allocation("sdsa", {"tau": tau, "m": m, "depth": depth}, per), MODEL, sparsity)
    assert flat(result, per) == pytest.approx(kept(raw, True, units, sparsity), abs=1e-10)


@PER
@CLIPPING
@pytest.mark.parametrize("taylor", [0.5, 2.0])
def test_sdsa_shares_by_what_the_loss_of_a_layer_costs(sparsity, taylor, per):
    """Against the formula: with `taylor` layers are the units, and their blocks, or they themselves, are skewed."""
    means = iter([0.3, 0.1, 4.0, 2.0, 0.0, 1.5, 0.7])
    profiles = [with_taylor(profile, [next(means) for _ in profile.layers]) for profile in MODEL]
    assert profiles[0].taylor_mean == pytest.approx((60 * 0.3 + 40 * 0.1) / 100)
    exponent = min(2, sparsity / (1 - sparsity) / 1.5)
    units, layers, parameters = units_of(MODEL, per), units_of(profiles, "layer"), {"tau": 0.5, "m": 0.3, "depth": 1.0}
    powers = [min(max(u.skewness, 0.05), 1.75 * statistics.median([u.skewness for u in units])) ** 2 for u in units]
    own = [0.7 + 0.3 * len(units) * power / sum(powers) for power in powers]
    shares = own if per == "layer" else [own[block] for block in DEPTHS["layer"]]
    raw = [
        (share * (1 + 1.0 * (1 - b / 3)) * max(layer.taylor_mean / 4.0, 1e-9) ** taylor) ** exponent
        for share, b, layer in zip(shares, DEPTHS["layer"], layers, strict=True)
    ]
    allocation = Allocation("sdsa", parameters | {"taylor": taylor}, per)
    result = allocate(allocation, profiles, sparsity)
    assert flat(result, "layer") == pytest.approx(kept(raw, True, layers, sparsity), abs=1e-9)
    with pytest.raises(AllocationError, match="reads taylor_mean, which was not measured"):
        allocate(allocation, MODEL, sparsity)
    without = Allocation("sdsa", parameters | {"taylor": 0.0}, per)
    assert allocate(without, MODEL, sparsity) == allocate(Allocation("sdsa", parameters, per), MODEL, sparsity)


@PER
@CLIPPING
@pytest.mark.parametrize("half", [0.0, 0.04, 0.08, 0.5])
@pytest.mark.parametrize("name", ["owl", "dlp", "dsa"])
def test_rules_with_a_band_equal_their_formulas(name, half, sparsity, per):
    units = units_of(MODEL, per)
    if name == "owl":
        parameter, z = "lam", [unit.outlier_share for unit in units]
    elif name == "dlp":
        parameter, z = "alpha", [1 - unit.score_mean / sum(u.score_mean for u in units) for unit in units]
    else:
        values = [math.asin(min(1.0, math.atan(unit.log_score_variance))) for unit in units]
        parameter, z = "lam", [1 - share for share in minmax(values)]
    result = flat(allocate(Allocation(name, {parameter: half}, per), MODEL, sparsity), per)
    assert result == pytest.approx(kept(band(z, half, units, sparsity), False, units, sparsity), abs=1e-12)


def test_dsa_takes_variances_where_the_arcsine_ends_for_equals():
    profiles = model_of(*[[(10, 1.0, 1.0, 1.0, variance, 1.0)] for variance in (0.5, 1.55, 1.56, 30.0)])
    result = flat(allocate(Allocation("dsa"), profiles, 0.5), "block")
    assert result[0] < result[1] < result[2] == result[3]


@PER
@CLIPPING
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 0.9])
def test_alphapruning_equals_its_formula(sparsity, epsilon, per):
    units = units_of(MODEL, per)
    raw = [share * 2 * epsilon + 1 - epsilon for share in minmax([unit.tail_exponent for unit in units])]
    result = flat(allocate(Allocation("alphapruning", {"epsilon": epsilon}, per), MODEL, sparsity), per)
    assert result == pytest.approx(pruned(raw, True, units, sparsity), abs=1e-12)


def test_alphapruning_scales_sparsities_by_one_factor():
    profiles = model_of(*[[(10, 1.0, 1.0, 1.0, 1.0, alpha)] for alpha in (2.0, 3.0, 6.0)])
    low, middle, high = flat(allocate(Allocation("alphapruning"), profiles, 0.5), "block")
    assert (middle / low, high / low) == pytest.approx(((0.7 + 0.15) / 0.7, 1.3 / 0.7))


@PER
@CLIPPING
@pytest.mark.parametrize("beta", [-0.1, 0.0, 0.03, 0.6])
def test_atp_equals_its_formula(sparsity, beta, per):
    units = units_of(MODEL, per)
    raw = [sparsity - beta * 3 / 2 + beta * b for b in DEPTHS[per]]
    result = flat(allocate(Allocation("atp", {"beta": beta}, per), MODEL, sparsity), per)
    assert result == pytest.approx(pruned(raw, False, units, sparsity), abs=1e-12)


def test_atp_by_default_spreads_sixteen_points_from_first_to_last():
    profiles = model_of(*[[(10, 1.0, 1.0, 1.0, 1.0, 1.0)]] * 9)
    result = allocate(Allocation("atp"), profiles, 0.6)
    assert flat(result, "block") == pytest.approx([0.52 + 0.02 * b for b in range(9)], abs=1e-12)


@PER
@CLIPPING
def test_explicit_values_are_shifted_to_the_budget(sparsity, per):
    units = units_of(MODEL, per)
    values = (0.5, 0.7, 0.2, 1.0, 0.0, 0.6, 0.65)[: len(units)]
    result = flat(allocate(Allocation("explicit", {}, per, values), MODEL, sparsity), per)
    assert result == pytest.approx(pruned(values, False, units, sparsity), abs=1e-12)


@PER
@pytest.mark.parametrize("name", ["sdsa", "atp", "alphapruning"])
def test_explicit_values_that_meet_the_budget_stay(name, per):
    first = allocate(Allocation(name, per=per), MODEL, 0.55)
    again = allocate(Allocation("explicit", per=per, values=tuple(flat(first, per))), MODEL, 0.55)
    assert flat(again, per) == pytest.approx(flat(first, per), abs=1e-14)


@pytest.mark.parametrize("per, units", [("block", 4), ("layer", 7)])
@pytest.mark.parametrize("given_values", [1, 5, 8])
def test_explicit_values_must_be_one_per_unit(per, units, given_values):
    with pytest.raises(AllocationError, match=f"expected {units} values, one sparsity per {per}, got {given_values}"):
        allocate(Allocation("explicit", per=per, values=(0.5,) * given_values), MODEL, 0.5)


def test_sdsa_spreads_less_where_less_is_pruned():
    """The spread of what is kept, beside its mean, at 50% and 70% is that at 60% times the odds, and none at 0%."""

    def spread(sparsity):
        kept = [1 - s for s in flat(allocate(Allocation("sdsa", {"depth": 0.0}), mild, sparsity), "block")]
        return math.log(kept[1] / kept[0])

    layers = (Profile(1000, 1.0, 1.0, 1.0),)
    mild = [BlockProfile(1000, skewness, 1.0, 1.0, layers=layers) for skewness in (1.5, 1.8)]
    assert spread(0.5) == pytest.approx(spread(0.6) / 1.5) and spread(0.7) == pytest.approx(spread(0.6) / 1.5 * 7 / 3)
    assert spread(0.6) > 0.1 and spread(0.0) == 0


def test_one_block_with_an_extreme_skewness_does_not_take_everything():
    """A block like the middle one of Qwen2.5-Coder-1.5B (γ = 20) counts as one of 1.75 times the median."""
    layers = (Profile(1000, 1.0, 1.0, 1.0),)
    skews = [20.0 if b == 13 else 1.6 + 0.05 * b for b in range(28)]
    result = allocate(Allocation("sdsa"), [BlockProfile(1000, skew, 1.0, 1.0, layers=layers) for skew in skews], 0.6)
    shares = flat(result, "block")
    skews[13] = 1.75 * statistics.median(skews)
    tamed = allocate(Allocation("sdsa"), [BlockProfile(1000, skew, 1.0, 1.0, layers=layers) for skew in skews], 0.6)
    assert shares == pytest.approx(flat(tamed, "block")) and 0.3 < shares[13] < 0.5 < max(shares) < 0.75


def test_rules_read_what_they_say_and_nothing_else():
    """With every other summary of the profiles hidden, each rule gives what it gave."""
    hidden = {name: math.nan for name in SUMMARIES}
    for name, rule in RULES.items():
        if name == "explicit":
            continue
        shown = [replace(p, **{k: v for k, v in hidden.items() if k != rule.reads}) for p in MODEL]
        assert allocate(Allocation(name), shown, 0.6) == allocate(Allocation(name), MODEL, 0.6)


def test_needs_are_the_summaries_that_must_be_asked_for():
    wanted = {"dsa": {"log_score_variance"}, "alphapruning": {"tail_exponent"}}
    assert {name: needs(Allocation(name)) for name in RANGES} == {
        name: frozenset(wanted.get(name, ())) for name in RANGES
    }
    assert needs(Allocation("sdsa", {"taylor": 0.5})) == {"taylor_mean"} and not needs(Allocation("sdsa"))
    with pytest.raises(AllocationError, match="did you mean 'owl'"):
        needs(Allocation("olw"))


@pytest.mark.parametrize("name, field", [("dsa", "log_score_variance"), ("alphapruning", "tail_exponent")])
def test_a_summary_that_was_not_measured_is_named(name, field):
    profiles = [*MODEL[:2], replace(MODEL[2], **{field: None}), MODEL[3]]
    with pytest.raises(
        AllocationError, match=f"'{name}' reads {field}, which was not measured, or does not exist, in block 2"
    ):
        allocate(Allocation(name), profiles, 0.5)
    with pytest.raises(AllocationError, match=f"{field}, which is inf in block 0"):
        allocate(Allocation(name), [replace(MODEL[0], **{field: math.inf}), *MODEL[1:]], 0.5)
    layers = (*MODEL[2].layers[:2], replace(MODEL[2].layers[2], **{field: None}))
    profiles[2] = replace(MODEL[2], layers=layers)
    assert allocate(Allocation(name), profiles, 0.5) == allocate(Allocation(name), MODEL, 0.5)
    with pytest.raises(AllocationError, match="was not measured, or does not exist, in block 2"):
        allocate(Allocation(name, per="layer"), profiles, 0.5)


def test_defaults_are_within_their_ranges():
    assert DEFAULTS.keys() == RANGES.keys() == RULES.keys()
    for name, parameters in DEFAULTS.items():
        check_allocation(Allocation(name, parameters, values=(0.0, 1.0) if name == "explicit" else ()))
        if name != "atp":  # whose default depends on the number of blocks
            assert parameters.keys() == RANGES[name].keys() - {"taylor"}  # which takes gradients


KNOWN = "uniform, sdsa, owl, dlp, dsa, alphapruning, atp, explicit"


@pytest.mark.parametrize(
    "allocation, message",
    [
        (Allocation("sdas"), f"unknown allocation 'sdas': expected {KNOWN}; did you mean 'sdsa'"),
        (Allocation("sdsa", {"tua": 1.0}), "unknown parameter 'tua' of allocation 'sdsa': did you mean 'tau'"),
        (Allocation("uniform", {"tau": 1.0}), "unknown parameter 'tau' of allocation 'uniform': it has none"),
        (Allocation("sdsa", {"tau": 0.0}), "'tau' of allocation 'sdsa' must be a number within 0.1..100, got 0.0"),
        (Allocation("sdsa", {"m": 1.01}), "within 0..1, got 1.01"),
        (Allocation("owl", {"lam": math.nan}), "got nan"),
        (Allocation("alphapruning", {"epsilon": 1.0}), "within 0..0.9, got 1.0"),
        (Allocation("atp", {"beta": "0.1"}), "got '0.1'"),
        (Allocation("sdsa", {"m": True}), "got True"),
        (Allocation("sdsa", per="row"), "per block or layer, got 'row'"),
        (Allocation("sdsa", values=(0.5,)), "only the allocation 'explicit' has values, not 'sdsa'"),
        (Allocation("explicit"), "'explicit' needs its values"),
        (Allocation("explicit", values=(0.5, 1.5)), "value 1 of allocation 'explicit' must be a number within 0..1"),
        (Allocation("explicit", values=(math.nan,)), "got nan"),
    ],
)
def test_bad_allocations_are_refused_in_one_line(allocation, message):
    for refuse in (lambda: check_allocation(allocation), lambda: allocate(allocation, MODEL, 0.5)):
        with pytest.raises(AllocationError) as error:
            refuse()
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 60, math.nan])
def test_bad_sparsities_are_refused(sparsity):
    with pytest.raises(AllocationError, match="at least 0 and below 1"):
        allocate(Allocation("uniform"), MODEL, sparsity)


def test_no_blocks_and_per_layer_no_layers_are_refused():
    with pytest.raises(AllocationError, match="no block"):
        allocate(Allocation("uniform"), [], 0.5)
    bare = [MODEL[0], replace(MODEL[1], layers=())]
    with pytest.raises(AllocationError, match="block 1 has no layers"):
        allocate(Allocation("owl", per="layer"), bare, 0.5)
    assert [len(block) for block in allocate(Allocation("owl"), bare, 0.5)] == [2, 0]


# Units of an n:m pattern, as (share that is to be kept, numel). Thousandths, so that none is nearly a whole n of m.
UNITS = st.lists(st.tuples(st.integers(0, 1000).map(lambda i: i / 1000), st.integers(1, 50)), min_size=1, max_size=7)


def miss(counts, retentions, numels, m):
    """How far counts are from the budget, in weights."""
    return abs(sum(size * (n / m - r) for n, r, size in zip(counts, retentions, numels, strict=True)))


@settings(max_examples=150, deadline=None)
@given(UNITS, st.sampled_from([2, 4, 8]))
def test_nm_counts_meet_the_budget_as_nearly_as_any_rounding(units, m):
    retentions = [max(share, 1 / m) for share, _ in units]
    numels = [size for _, size in units]
    (counts,) = nm_counts([retentions], [numels], m)
    exact = [round(r * m, 9) for r in retentions]
    assert all(math.floor(x) <= n <= math.ceil(x) for n, x in zip(counts, exact, strict=True))
    roundings = product(*[{math.floor(x), math.ceil(x)} for x in exact])
    best = min(miss(way, retentions, numels, m) for way in roundings)
    assert miss(counts, retentions, numels, m) == pytest.approx(best, abs=1e-5 * sum(numels))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=4), max_size=30))
def test_nm_counts_of_many_units_keep_their_promises(blocks):
    blocks = [[(0.3, 10)], *blocks]
    retentions, numels = ([[unit[i] for unit in block] for block in blocks] for i in (0, 1))
    m = 4
    result = nm_counts(retentions, numels, m)
    assert [len(block) for block in result] == [len(block) for block in numels]
    counts, shares, sizes = ([x for block in table for x in block] for table in (result, retentions, numels))
    assert all(1 <= n <= m for n in counts)
    if sum(size * r for size, r in zip(sizes, shares, strict=True)) > sum(sizes) / m:
        assert miss(counts, shares, sizes, m) <= max(sizes) / m / 2 * (1 + 1e-5) + 1e-5 * sum(sizes)
    else:
        assert set(counts) == {1}
    assert result == nm_counts(retentions, numels, m)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(250, 1000).map(lambda i: i / 1000), min_size=1, max_size=5))
@example([0.446, 0.624, 0.624, 0.681])
def test_nm_counts_of_equal_units_are_those_nearest_to_their_retentions(retentions):
    """Brute force over every count of every unit: nearest to the budget, then to each retention."""
    (counts,) = nm_counts([retentions], [[1] * len(retentions)], 4)
    exact = [round(4 * r * GRID) / GRID for r in retentions]  # 9.5 in all may be a tie or not: as it is counted

    def distances(way):
        return abs(sum(way) - sum(exact)), sum((n - x) ** 2 for n, x in zip(way, exact, strict=True))

    best = min(map(distances, product(range(1, 5), repeat=len(exact))))
    assert distances(counts) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("n, m", [(1, 4), (2, 4), (3, 4), (4, 4), (1, 2), (5, 8), (3, 16)])
def test_a_retention_of_n_in_m_everywhere_is_met_exactly(n, m):
    numels = [[576 * 576, 192 * 576, 192 * 576, 576 * 1536], [1536 * 576] * 3, [7]]
    for retention in (n / m, 1 - (1 - n / m), math.nextafter(n / m, 0), math.nextafter(n / m, 1)):
        result = nm_counts([[retention] * len(block) for block in numels], numels, m)
        assert result == [[n] * len(block) for block in numels]


def test_equal_remainders_are_rounded_up_in_the_earlier_blocks():
    counts = nm_counts([[0.4] for _ in range(30)], [[1000] for _ in range(30)], 4)  # 1.6 of 4
    assert counts == [[2]] * 18 + [[1]] * 12


def test_units_are_rounded_up_in_the_order_of_their_remainders():
    retentions = [[0.25 + 0.24 * ((7 * b) % 30) / 30] for b in range(30)]
    counts = nm_counts(retentions, [[64]] * 30, 4)
    chosen = sum(4 * block[0] - 1 for block in retentions)
    up = sorted(range(30), key=lambda b: -retentions[b][0])[: round(chosen)]
    assert BORDER < 30
    assert [b for b, block in enumerate(counts) if block == [2]] == sorted(up)


def test_units_that_cannot_keep_less_are_paid_for_by_the_others():
    """Half of the units wish for 0.2 of 4 and keep 1; the others, which wish for 2.2, are left with 1.4 each."""
    assert nm_counts([[0.05] * 4, [0.55] * 4], [[10] * 4] * 2, 4) == [[1] * 4, [2, 2, 1, 1]]
