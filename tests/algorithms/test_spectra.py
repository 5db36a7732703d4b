"""Tail exponents: equal to plain loops over every start of the tail, and right on spectra that are power laws."""

import math

import pytest
import torch

from autoprune.algorithms import spectra
from autoprune.algorithms.spectra import TAIL_POINTS, tail_exponent


def exponent_in_loops(weight, points=TAIL_POINTS):
    """Oracle: Hill's estimate for each start of the tail, and of them the one nearest to its data."""
    values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(weight.double()))
    values = [value for value in values if value > max(weight.shape) * 2.0**-52 * values[-1]]
    best = (math.inf, math.nan)
    for start in range(max(len(values) - points, 0) + 1):
        tail = values[start:]
        total = sum(math.log(value / tail[0]) for value in tail)
        if tail[-1] / tail[0] - 1 < 1e-12:
            continue
        alpha = 1 + len(tail) / total
        gaps = [abs(1 - (value / tail[0]) ** (1 - alpha) - rank / len(tail)) for rank, value in enumerate(tail)]
        best = min(best, (max(gaps), alpha))
    return best[1]


def with_spectrum(eigenvalues, rows, columns, seed=0):
    """A matrix [rows, columns] whose squared singular values are these, with random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(eigenvalues), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(eigenvalues), generator=generator, dtype=torch.float64))
    return left * torch.as_tensor(eigenvalues, dtype=torch.float64).sqrt() @ right.T


def pareto(alpha, number, seed):
    """Sample of p(λ) ∝ λ^−α, λ ≥ 1."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - torch.rand(number, generator=generator, dtype=torch.float64)) ** (1 / (1 - alpha))


@pytest.mark.parametrize(
    "shape", [(64, 96), (96, 64), (40, 40), (TAIL_POINTS, 50), (TAIL_POINTS + 1, 50), (5, 30), (2, 9)]
)
@pytest.mark.parametrize("heavy", [False, True])
def test_it_equals_plain_loops(shape, heavy):
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape)
    if heavy:
        weight *= torch.randn(shape[1]).exp()
        weight[0] *= 20
    assert tail_exponent(weight) == pytest.approx(exponent_in_loops(weight), rel=1e-8)


def test_it_is_the_same_for_every_size_of_the_table_in_parts(monkeypatch):
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(3))
    whole = tail_exponent(weight)
    for chunk in (1, 70 * 7, 70 * 61 - 1):
        monkeypatch.setattr(spectra, "CHUNK", chunk)
        assert tail_exponent(weight) == whole


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 6.0])
def test_it_finds_the_exponent_of_pareto_samples(alpha):
    """The standard error of Hill's estimate from k points is (α − 1) / √k; the choice of the tail adds a little."""
    found = [tail_exponent(pareto(alpha, 250, seed).sqrt().diag()) for seed in range(5)]
    assert sum(found) / len(found) == pytest.approx(alpha, abs=2 * (alpha - 1) / math.sqrt(250))


def test_it_finds_where_the_tail_begins():
    """Half of the eigenvalues are uniform noise below 1; from 1 on the exponent is 2.5 at the quantiles of its law."""
    noise = torch.linspace(0.5, 0.99, 100, dtype=torch.float64)
    tail = (1 - (torch.arange(100, dtype=torch.float64) + 0.5) / 100) ** (1 / (1 - 2.5))
    assert tail_exponent(with_spectrum(torch.cat([noise, tail]), 200, 210)) == pytest.approx(2.5, abs=0.1)


def test_a_tail_of_equal_eigenvalues_is_left_out():
    """The 15 greatest are equal, exactly or but for rounding: an exponent of theirs would have no bound."""
    values = torch.tensor([*range(1, 40), *[900.0] * 15])
    for weight in (values.sqrt().diag(), with_spectrum(values, 60, 64)):
        assert tail_exponent(weight) == pytest.approx(exponent_in_loops(weight), rel=1e-8)
        assert tail_exponent(weight) < 100


def test_a_heavier_tail_has_a_smaller_exponent():
    torch.manual_seed(0)
    light = torch.randn(100, 120)
    heavy = light.clone()
    heavy[:, :30] *= torch.linspace(2, 12, 30)
    assert tail_exponent(heavy) < tail_exponent(light) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scale_orientation_dtype_and_strides_change_nothing(dtype):
    weight = torch.randn(48, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept, expected = weight.clone(), tail_exponent(weight.double())
    assert tail_exponent(weight) == expected
    assert tail_exponent(weight.T) == pytest.approx(expected, rel=1e-9)
    assert tail_exponent(weight.double() * 1e-5) == pytest.approx(expected, rel=1e-9)
    assert torch.equal(weight, kept)


def test_eigenvalues_that_are_zero_to_rounding_do_not_count():
    """A matrix of rank 40 has 40 eigenvalues; its 60 others, noise about 0, would be the longest tail by far."""
    values = pareto(2.0, 40, 7)
    full, deficient = with_spectrum(values, 40, 50), with_spectrum(values, 100, 120)
    assert tail_exponent(deficient) == pytest.approx(tail_exponent(full), rel=1e-6)


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.full((3, 3), math.inf), "not finite"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "not finite"),
        (torch.ones(3), "must be a floating matrix"),
        (torch.ones(3, 3, dtype=torch.int8), "must be a floating matrix"),
        (torch.ones(0, 3), "must be a floating matrix"),
    ],
)
def test_matrices_without_an_exponent_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        tail_exponent(weight)


@pytest.mark.parametrize("weight", [torch.zeros(4, 6), torch.eye(20), torch.ones(30, 50), torch.randn(1, 9)])
def test_without_two_different_eigenvalues_there_is_no_exponent(weight):
    assert tail_exponent(weight) is None
