"""Allocations: the budget is met exactly, bounds hold, and the rules do what their formulas say."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.allocation import (
    DEFAULTS,
    RANGES,
    RETENTION_FLOOR,
    AllocationError,
    allocate,
    check_allocation,
)
from autoprune.algorithms.statistics import BlockProfile

PROFILES = st.lists(
    st.builds(BlockProfile, st.integers(1, 10**10), st.floats(-1, 1e4), st.floats(0, 100)), min_size=1, max_size=40
)
SPARSITIES = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.01, 0.5, 0.6, 0.99]))


@st.composite
def allocations(draw):
    name = draw(st.sampled_from(list(RANGES)))
    chosen = draw(st.sets(st.sampled_from(list(RANGES[name])))) if RANGES[name] else ()
    return Allocation(name, {parameter: draw(st.floats(*RANGES[name][parameter])) for parameter in sorted(chosen)})


def weighted_mean(profiles, values) -> float:
    total = math.fsum(profile.numel for profile in profiles)
    return math.fsum(profile.numel * value for profile, value in zip(profiles, values, strict=True)) / total


@settings(max_examples=300, deadline=None)
@given(allocations(), PROFILES, SPARSITIES)
def test_budget_is_exact_and_bounds_hold(allocation, profiles, sparsity):
    result = allocate(allocation, profiles, sparsity)
    assert len(result) == len(profiles)
    assert weighted_mean(profiles, result) == pytest.approx(sparsity, abs=1e-12)
    floor = RETENTION_FLOOR * (1 - sparsity)
    assert all(-1e-15 <= s <= 1 - floor + 1e-15 for s in result)
    assert result == allocate(allocation, profiles, sparsity)


@settings(max_examples=100, deadline=None)
@given(PROFILES, SPARSITIES, st.floats(*RANGES["sdsa"]["tau"]), st.floats(*RANGES["sdsa"]["m"]))
def test_sdsa_keeps_no_less_of_a_more_skewed_block(profiles, sparsity, tau, m):
    result = allocate(Allocation("sdsa", {"tau": tau, "m": m}), profiles, sparsity)
    ordered = [s for _, s in sorted(zip((p.skewness for p in profiles), result, strict=True))]
    assert all(after <= before + 1e-12 for before, after in zip(ordered, ordered[1:], strict=False))


@settings(max_examples=100, deadline=None)
@given(PROFILES, SPARSITIES, st.floats(*RANGES["owl"]["lam"]))
def test_owl_keeps_no_less_of_a_block_with_more_outliers(profiles, sparsity, lam):
    result = allocate(Allocation("owl", {"lam": lam}), profiles, sparsity)
    ordered = [s for _, s in sorted(zip((p.outlier_share for p in profiles), result, strict=True))]
    assert all(after <= before + 1e-12 for before, after in zip(ordered, ordered[1:], strict=False))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=30), st.floats(0.1, 20), st.floats(0, 50), SPARSITIES)
def test_equal_profiles_get_equal_shares(numels, skewness, share, sparsity):
    profiles = [BlockProfile(numel, skewness, share) for numel in numels]
    for name in ("uniform", "sdsa", "owl"):
        assert allocate(Allocation(name), profiles, sparsity) == pytest.approx([sparsity] * len(numels), abs=1e-12)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.6, 0.99])
def test_a_single_block_gets_the_target(name, sparsity):
    middle = {parameter: (low + high) / 2 for parameter, (low, high) in RANGES[name].items()}
    for parameters in ({}, middle):
        result = allocate(Allocation(name, parameters), [BlockProfile(7, 1.5, 3.0)], sparsity)
        assert result == pytest.approx([sparsity], abs=1e-15)


def redistributed(raw, scale, profiles, sparsity):
    """Oracle: fill the budget, pin the blocks beyond a bound at it (the side with the larger excess first), repeat."""
    floor, pinned = RETENTION_FLOOR * (1 - sparsity), {}
    budget = (1 - sparsity) * sum(p.numel for p in profiles)
    while True:
        free = [b for b in range(len(raw)) if b not in pinned]
        left = budget - sum(profiles[b].numel * r for b, r in pinned.items())
        numel = sum(profiles[b].numel for b in free)
        mass = sum(profiles[b].numel * raw[b] for b in free)
        kept = {b: raw[b] * left / mass if scale else raw[b] + (left - mass) / numel for b in free}
        over = sum(profiles[b].numel * (kept[b] - 1) for b in free if kept[b] > 1)
        under = sum(profiles[b].numel * (floor - kept[b]) for b in free if kept[b] < floor)
        if max(over, under) < 1e-9:
            return [1 - (pinned | kept)[b] for b in range(len(raw))]
        pinned |= (
            {b: 1.0 for b in free if kept[b] > 1} if over >= under else {b: floor for b in free if kept[b] < floor}
        )


SKEWED = [BlockProfile(*block) for block in [(100, 2.9, 4.0), (300, 1.2, 9.0), (250, 20.0, 0.5), (80, 0.01, 2.0)]]
CLIPPING = pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.6, 0.9, 0.97])


@CLIPPING
@pytest.mark.parametrize("tau, m, depth", [(0.5, 0.3, 0.0), (1.0, 0.6, 0.5), (0.25, 1.0, 0.0), (0.5, 1.0, 4.0)])
def test_sdsa_equals_its_formula(sparsity, tau, m, depth):
    powers = [max(p.skewness, 0.05) ** (1 / tau) for p in SKEWED]
    raw = [((1 - m) + m * 4 * power / sum(powers)) * (1 + depth * (1 - b / 3)) for b, power in enumerate(powers)]
    result = allocate(Allocation("sdsa", {"tau": tau, "m": m, "depth": depth}), SKEWED, sparsity)
    assert result == pytest.approx(redistributed(raw, True, SKEWED, sparsity), abs=1e-10)


@CLIPPING
@pytest.mark.parametrize("lam", [0.0, 0.04, 0.08, 0.5])
def test_owl_equals_its_formula(sparsity, lam):
    band = [2 * lam * (z - 0.5) / (9.0 - 0.5) for z in (4.0, 9.0, 0.5, 2.0)]
    mean = sum(p.numel * b for p, b in zip(SKEWED, band, strict=True)) / 730
    raw = [b - mean + 1 - sparsity for b in band]
    result = allocate(Allocation("owl", {"lam": lam}), SKEWED, sparsity)
    assert result == pytest.approx(redistributed(raw, False, SKEWED, sparsity), abs=1e-12)


@CLIPPING
@pytest.mark.parametrize("beta", [-0.1, 0.0, 0.03, 0.6])
def test_atp_equals_its_formula(sparsity, beta):
    raw = [1 - (sparsity - beta * 3 / 2 + beta * b) for b in range(4)]
    result = allocate(Allocation("atp", {"beta": beta}), SKEWED, sparsity)
    assert result == pytest.approx(redistributed(raw, False, SKEWED, sparsity), abs=1e-12)


def test_atp_by_default_spreads_sixteen_points_from_first_to_last():
    result = allocate(Allocation("atp"), [BlockProfile(10, 1.0, 1.0)] * 9, 0.6)
    assert result == pytest.approx([0.52 + 0.02 * b for b in range(9)], abs=1e-12)


def test_one_block_with_an_extreme_skewness_does_not_take_everything():
    """A block like the middle one of Qwen2.5-Coder-1.5B (γ = 20) may be kept nearly whole; the others stay alive."""
    profiles = [BlockProfile(1000, 20.0 if b == 13 else 1.6 + 0.05 * b, 1.0) for b in range(28)]
    result = allocate(Allocation("sdsa"), profiles, 0.6)
    assert result[13] == pytest.approx(0.0, abs=1e-12) and max(result) < 0.7


def test_defaults_are_within_their_ranges():
    assert DEFAULTS.keys() == RANGES.keys()
    for name, parameters in DEFAULTS.items():
        check_allocation(Allocation(name, parameters))
        if name != "atp":  # whose default depends on the number of blocks
            assert parameters.keys() == RANGES[name].keys()


@pytest.mark.parametrize(
    "allocation, message",
    [
        (Allocation("sdas"), "unknown allocation 'sdas': expected uniform, sdsa, owl, atp; did you mean 'sdsa'"),
        (Allocation("sdsa", {"tua": 1.0}), "unknown parameter 'tua' of allocation 'sdsa': did you mean 'tau'"),
        (Allocation("uniform", {"tau": 1.0}), "unknown parameter 'tau' of allocation 'uniform': it has none"),
        (Allocation("sdsa", {"tau": 0.0}), "'tau' of allocation 'sdsa' must be a number within 0.1..100, got 0.0"),
        (Allocation("sdsa", {"m": 1.01}), "within 0..1, got 1.01"),
        (Allocation("owl", {"lam": math.nan}), "got nan"),
        (Allocation("atp", {"beta": "0.1"}), "got '0.1'"),
        (Allocation("sdsa", {"m": True}), "got True"),
    ],
)
def test_bad_allocations_are_refused_in_one_line(allocation, message):
    for refuse in (lambda: check_allocation(allocation), lambda: allocate(allocation, SKEWED, 0.5)):
        with pytest.raises(AllocationError) as error:
            refuse()
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 60, math.nan])
def test_bad_sparsities_are_refused(sparsity):
    with pytest.raises(AllocationError, match="at least 0 and below 1"):
        allocate(Allocation("uniform"), SKEWED, sparsity)


def test_no_blocks_are_refused():
    with pytest.raises(AllocationError, match="no block"):
        allocate(Allocation("uniform"), [], 0.5)
