"""Moments against numpy and exact arithmetic, and their merging."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import DTYPES, LANES, lane, random

from autoprune.kernels import moments, reference
from autoprune.kernels.moments import Moments, row_moments


def moments_on(name, weight, norms=None):
    with lane(name) as device:
        if name in ("cpu", "other"):
            return {"cpu": row_moments, "other": reference.row_moments}[name](weight, norms)
        return moments.triton_row_moments(weight.to(device), None if norms is None else norms.to(device)).cpu()


def exact(values):
    """Mean, M2, M3 and M4 of a list of floats, as fractions."""
    values = [Fraction(value) for value in values]
    mean = sum(values) / len(values)
    return [mean, *(sum((value - mean) ** power for value in values) for power in (2, 3, 4))]


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 33, 576, 1000, 4096, 11008])
def test_rows_equal_two_passes_in_fp64(name, dtype, width):
    weight, norms = random(3, width, dtype=dtype), random(width, seed=1).abs()
    for factors in (None, norms):
        values = weight.double().abs() * (1 if factors is None else factors.double())
        d = values - values.mean(1, keepdim=True)
        expected = torch.stack([values.mean(1), *((d**power).sum(1) for power in (2, 3, 4))], dim=1)
        scale = torch.stack([values.mean(1), *((d.abs() ** power).sum(1) for power in (2, 3, 4))], dim=1)
        assert ((moments_on(name, weight, factors) - expected).abs() <= 1e-12 * scale + 1e-300).all()


@pytest.mark.parametrize("name", LANES)
def test_a_few_numbers_against_exact_arithmetic(name):
    weight = torch.tensor([[1e-3, -5.0, 2.5, 1e3, -7.0, 0.0, 3.0]])
    found = moments_on(name, weight)[0].tolist()
    for value, right in zip(found, exact(weight[0].abs().tolist()), strict=True):
        assert math.isclose(value, right, rel_tol=1e-12)


@pytest.mark.parametrize("name", LANES)
def test_layouts_and_no_rows(name):
    wide = random(6, 40)
    for weight in (wide[:, ::2], wide.T, wide[::2]):
        assert torch.equal(moments_on(name, weight), moments_on(name, weight.contiguous()))
    assert moments_on(name, wide[:0]).shape == (0, 4)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 99))
def test_merged_equals_all_at_once(sizes, seed):
    parts = [random(size, 7, seed=seed + i).abs() * 10**i for i, size in enumerate(sizes)]
    whole = torch.cat(parts).flatten().tolist()
    merged = Moments.merged(Moments.of_rows(row_moments(part), 7) for part in parts)
    assert merged.count == len(whole)
    if whole:
        mean, second, third, fourth = exact(whole)
        bound = sum(abs(Fraction(value) - mean) ** 3 for value in whole)
        assert math.isclose(merged.mean, mean, rel_tol=1e-12) and math.isclose(merged.second, second, rel_tol=1e-11)
        assert abs(merged.third - third) <= 1e-11 * bound and math.isclose(merged.fourth, fourth, rel_tol=1e-11)


def test_skewness_and_kurtosis():
    numbers = Moments.of_rows(row_moments(torch.tensor([[0.0, 0.0, 0.0, 1.0]])), 4)
    assert math.isclose(numbers.skewness, 2 / math.sqrt(3)) and math.isclose(numbers.kurtosis, 7 / 3)
    assert math.isclose(numbers.std, math.sqrt(3) / 4) and numbers.variance == 3 / 16
    constant = Moments.of_rows(row_moments(torch.full((3, 5), 0.1)), 5)
    assert constant.skewness == constant.kurtosis == 0.0
    assert Moments().skewness == Moments().variance == 0.0 and Moments.merged([]) == Moments()


@pytest.mark.parametrize("name", LANES)
def test_what_is_not_finite_shows(name):
    weight = random(3, 40)
    weight[1, 39], weight[2, 0] = float("inf"), float("nan")
    found = moments_on(name, weight)
    assert found[0].isfinite().all() and not found[1:, 0].isfinite().any()


def test_other_shapes_are_refused():
    for weight in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="floating matrix"):
            row_moments(weight)
    with pytest.raises(ValueError, match="as many norms"):
        row_moments(torch.zeros(3, 2), torch.ones(3))
